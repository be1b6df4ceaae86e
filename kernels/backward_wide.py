"""The backward pass at head_dim 256: two warpgroups share a CTA's 64 keys, and each has one of their gradients.

dK or dV of 64 keys takes 128 registers of a warpgroup. One has S, P and dV; the other dP, dS and dK, for which it gets P through
shared memory. CTAs work in clusters of two, which send each other dS; each has half of head_dim of dQ for the keys of both, and each
of its warpgroups half of that.

dQ of a tile of queries is computed behind S and dP of the next one: so dS has the time to come, and the tensor cores have work while S
becomes P.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float16, Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .backward import ROWS, WARPGROUPS, BackwardKernel
from .configs import WARPGROUP
from .parts import barriers, tiles, wgmma
from .parts.mask import RightMask
from .parts.output import StagedOutput
from .parts.rounding import are_finite, multiply_pairs, round_into, widened
from .parts.softmax import exp2

ALL_BARRIER = 1  # named barriers: of both warpgroups that consume, and of the second one
OWN_BARRIER = 2


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: which one it is, what it waits for, and what it multiplies."""

    index: Int32
    thread: Int32
    rank: Int32  # of the CTA in its cluster
    mask: RightMask
    scale_log2: Float32
    q_ring: pipeline.PipelineTmaAsync
    do_ring: pipeline.PipelineTmaAsync
    k_ring: pipeline.PipelineTmaAsync
    v_ring: pipeline.PipelineTmaAsync
    ds_full: cute.Pointer  # mbarriers, which complete once a tile of queries: this CTA's dS is in shared memory,
    ds_empty: cute.Pointer  # nobody here needs it any more, and the other CTA has it,
    p_full: cute.Pointer  # P is in dS's place,
    ds_come: cute.Pointer  # the other CTA's dS has come,
    remote_ds_empty: cute.Pointer  # and that one doesn't need what it was sent any more
    scores: Constexpr  # the WGMMA operation of Sᵀ = K Qᵀ and of dPᵀ = V dOᵀ
    gradient: Constexpr  # of dV += Pᵀ dO and of dK += dSᵀ Q
    dsk: Constexpr  # of dQ = dS K, a quarter of head_dim
    lse_address: Int32  # in shared memory, in the first stage: of what this thread needs of LSE,
    delta_address: Int32  # of delta,
    ds_address: Int32  # and where its part of Pᵀ and dSᵀ goes
    sdS: cute.Tensor  # (keys of this CTA, tile_m) shared memory: dSᵀ
    K: cute.Tensor  # operands in shared memory, of the product that is named first
    Q: cute.Tensor
    V: cute.Tensor
    dO: cute.Tensor
    dO_of_dV: cute.Tensor
    Q_of_dK: cute.Tensor
    dS_of_dQ: tuple[cute.Tensor, cute.Tensor]  # of this CTA's keys and of the other's
    K_of_dQ: tuple[cute.Tensor, cute.Tensor]
    S: cute.Tensor  # registers: S, or dP
    P: cute.Tensor  # rounded
    dS: cute.Tensor
    dQ: cute.Tensor
    dX: cute.Tensor  # dV, or dK


class WideBackwardKernel(BackwardKernel):
    """The kernels that a BackwardConfig of head_dim 256 describes."""

    def consumer(self, index, thread, mask, scale_log2, rings, shared, rows):
        """A consumer warpgroup with its operands laid out."""
        c = self.config
        sQ, sdO, sK, sV, sdS, s_other_k = shared
        K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN
        registers, memory = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        columns = c.dq_part[1]
        rank = self.rank()
        scores_op = wgmma.operation(self.dtype, c.tile_m, K_MAJOR, memory)
        gradient_op = wgmma.operation(self.dtype, c.head_dim, MN_MAJOR, registers)
        dsk_op = wgmma.operation(self.dtype, columns, MN_MAJOR, memory)
        scores, gradient, dsk = (cute.make_tiled_mma(op) for op in (scores_op, gradient_op, dsk_op))

        def operand_a(mma, tile):
            return mma.make_fragment_A(mma.get_slice(0).partition_A(tile))

        def operand_b(mma, tile):
            return mma.make_fragment_B(mma.get_slice(0).partition_B(tile))

        def accumulator(mma, columns, dtype=Float32):
            return cute.make_rmem_tensor(mma.partition_shape_C((ROWS, columns)), dtype)

        def columns_of(shared, part):
            return cute.local_tile(tiles.transposed(shared), (columns, c.tile_n, 1), (part, 0, 0))

        dS = [self.ds_of(sdS, r) for r in (rank, 1 - rank)]
        own_ds = tiles.transposed(dS[0])[None, None, 0]
        parts_of_k = [columns_of(sK, rank * WARPGROUPS + index), columns_of(s_other_k, index)]
        lse_address, delta_address = (wgmma.address_of_columns(x, thread) for x in rows)
        delta_after = delta_address - lse_address
        lse_address = wgmma.keep(lse_address)
        delta_address = lse_address + delta_after
        return Consumer(
            index,
            thread,
            rank,
            mask,
            scale_log2,
            *rings,
            scores_op,
            gradient_op,
            dsk_op,
            lse_address,
            delta_address,
            ds_address=wgmma.keep(wgmma.address_of_transposed(scores_op, own_ds, thread)),
            sdS=own_ds,
            K=operand_a(scores, sK)[None, None, None, 0],
            Q=operand_b(scores, sQ),
            V=operand_a(scores, sV)[None, None, None, 0],
            dO=operand_b(scores, sdO),
            dO_of_dV=operand_b(gradient, tiles.transposed(sdO)),
            Q_of_dK=operand_b(gradient, tiles.transposed(sQ)),
            dS_of_dQ=tuple(operand_a(dsk, x)[None, None, None, 0] for x in dS),
            K_of_dQ=tuple(operand_b(dsk, x)[None, None, None, 0] for x in parts_of_k),
            S=accumulator(scores, c.tile_m),
            P=accumulator(scores, c.tile_m, self.dtype),
            dS=accumulator(scores, c.tile_m, self.dtype),
            dQ=accumulator(dsk, columns),
            dX=accumulator(gradient, c.head_dim),
        )

    def outputs(self, stores, tensors, sK, sV, s_out):
        """What takes dK and dV to memory: from where K and V were, which nobody needs when they are complete."""
        return [
            StagedOutput.in_memory(store, memory, self.out_layout(), 1, 0, tensor, self.config.tile_n // ROWS, 1)
            for store, tensor, memory in zip(stores, tensors, (sK, sV))
        ]

    @cute.jit
    def consume(self, own, exchanged, schedule, adding, outputs, softmax_scale, queries_per_kv, tiles_of):
        """One warpgroup: dV or dK of the CTA's keys, and a quarter of what the cluster's add to dQ."""
        c = self.config
        adder, finished = adding
        t = self.consumer(*own, *exchanged)
        together, head_kv, batch = schedule.tiles.tile(schedule.first())
        m_first, m_stop = self.query_tiles(t.mask, together)
        n = self.own_keys(together)
        at, kv_at = barriers.consuming(c.query_stages), barriers.consuming(1)
        t.k_ring.consumer_wait(kv_at)
        t.v_ring.consumer_wait(kv_at)
        count = (m_stop - m_first) * queries_per_kv  # at least 1, as a tile has keys that the last query sees
        m, part = m_first, t.rank * WARPGROUPS + t.index
        place = adder.place(batch * tiles_of[0] + head_kv * tiles_of[1] + m_first, part, t.thread)
        self.step(t, n, m, None, adder, at)
        for i in cutlass.range(1, count, unroll=1):
            before = place
            at.advance()
            m += 1
            place += adder.tile_bytes
            if m == m_stop:
                m = m_first
                place += Int64(m_first) * adder.tile_bytes
            self.step(t, n, m, before, adder, at)
        self.issue_dq(t, at.index)
        wgmma.wait(0)
        adder.add(t.dQ, place, at.index)
        cute.arch.barrier(barrier_id=ALL_BARRIER, number_of_threads=WARPGROUPS * WARPGROUP)  # all have done with K and V, and have added to dQ
        if cutlass.const_expr(c.counts_finished):
            if t.index == 0 and t.thread == 0:
                finished.count(head_kv, batch)
        if t.index == 0:
            outputs[1].write(t.dX, 0, n, head_kv, batch, 0, t.thread)
        else:
            self.scale(t.dX, softmax_scale)
            outputs[0].write(t.dX, 0, n, head_kv, batch, 0, t.thread)
        outputs[0].finish()
        t.k_ring.consumer_release(kv_at)
        t.v_ring.consumer_release(kv_at)

    @cute.jit
    def step(self, t: Consumer, n, m, before, adder, at):
        """A tile of queries, and dQ of the tile before, which goes to the place `before`; None where there is no such tile."""
        if t.index == 0:
            self.of_values(t, n, m, before, at)
            self.finish_step(t, before, adder, at, t.do_ring)
        else:
            self.of_keys(t, before, at)
            self.finish_step(t, before, adder, at, t.q_ring)

    @cute.jit
    def finish_step(self, t: Consumer, before, adder, at, ring):
        """Adds dQ of the tile before, and waits for dV, or dK, so that dO's stage, or Q's, is free."""
        if cutlass.const_expr(before is not None):
            adder.add(t.dQ, before, at.index ^ 1)
        wgmma.wait(0)
        ring.consumer_release(at)

    @cute.jit
    def of_values(self, t: Consumer, n, m, before, at):
        """The first warpgroup, one tile of queries: S, P, and dV, which is in flight then."""
        c = self.config
        t.q_ring.consumer_wait(at)
        wgmma.issue(t.scores, t.S, t.K, t.Q[None, None, None, at.index], accumulate=False)
        lse = wgmma.load_columns(t.lse_address + 4 * c.tile_m * at.index, c.tile_m)
        self.follow_with_dq(t, before, at)
        wgmma.wait(0 if before is None else c.cluster)
        if t.mask.cuts(m, n):
            t.mask.apply_transposed(t.S, n * c.tile_n, m * c.tile_m, t.thread)
        self.exponentials(t, lse)
        round_into(t.P, t.S)
        t.do_ring.consumer_wait(at)  # dP needs it too; and here it keeps the compiler from waiting for dQ before it computes P
        wgmma.wait(0)
        if cutlass.const_expr(before is not None):
            self.hand_back_ds(t)
            cute.arch.mbarrier_wait(t.ds_empty, at.index ^ 1)
        wgmma.store_transposed(t.P, t.ds_address)
        self.arrive(t.p_full)
        dO = t.dO_of_dV[None, None, None, at.index]
        wgmma.issue(t.gradient, t.dX, wgmma.as_operand(t.P, c.tile_m), dO, accumulate=before is not None)
        t.q_ring.consumer_release(at)  # not before a WGMMA that waits for P, and so for the load of LSE

    @cute.jit
    def exponentials(self, t: Consumer, lse_log2: cute.Tensor):
        """S becomes P."""
        s = wgmma.flat(t.S)
        for i in [*range(cute.size(s))]:
            s[i] = exp2(s[i] * t.scale_log2 - lse_log2[i % 2, i // 4])

    @cute.jit
    def of_keys(self, t: Consumer, before, at):
        """The second warpgroup, one tile of queries: dP, dS, and dK, which is in flight then."""
        c = self.config
        t.do_ring.consumer_wait(at)
        wgmma.issue(t.scores, t.S, t.V, t.dO[None, None, None, at.index], accumulate=False)
        delta = wgmma.load_columns(t.delta_address + 4 * c.tile_m * at.index, c.tile_m)
        self.follow_with_dq(t, before, at)
        wgmma.wait(0)
        if cutlass.const_expr(before is not None):
            self.hand_back_ds(t)
        cute.arch.mbarrier_wait(t.p_full, at.index)
        wgmma.load_transposed(t.P, t.ds_address)
        if cutlass.const_expr(self.dtype is Float16):
            self.differentials_in_fp16(t, delta)
        else:
            self.differentials(t.S, t.P, delta)
            round_into(t.dS, t.S)
        wgmma.store_transposed(t.dS, t.ds_address)  # where this warp, and no other, has read P
        self.hand_over_ds(t, before, at)
        t.q_ring.consumer_wait(at)
        Q = t.Q_of_dK[None, None, None, at.index]
        wgmma.issue(t.gradient, t.dX, wgmma.as_operand(t.dS, c.tile_m), Q, accumulate=before is not None)
        t.do_ring.consumer_release(at)  # likewise for delta

    @cute.jit
    def differentials_in_fp16(self, t: Consumer, delta: cute.Tensor):
        """dS = P ∘ (dP - delta) of factors that are rounded both, two products an instruction, as fp16's way to fp32 takes longer than bf16's;
        in fp32 where a warp has a difference that fp16 can't hold. The differences could be had before P, but the compiler would have them
        keep dS from being handed back.
        """
        dp = wgmma.flat(t.S)
        for i in [*range(cute.size(dp))]:
            dp[i] = dp[i] - delta[i % 2, i // 4]
        round_into(t.dS, t.S)
        fits = cute.arch.vote_all_sync(are_finite(t.dS))
        if fits:
            multiply_pairs(t.dS, t.P)
        else:
            p = widened(t.P)
            for i in [*range(cute.size(dp))]:
                dp[i] = dp[i] * p[i]
            round_into(t.dS, t.S)

    @cute.jit
    def follow_with_dq(self, t: Consumer, before, at):
        """Has dQ of the tile before computed behind S, or dP."""
        if cutlass.const_expr(before is not None):
            self.issue_dq(t, at.index ^ 1)

    @cute.jit
    def arrive(self, barrier):
        """What this warp has stored is there."""
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def hand_back_ds(self, t: Consumer):
        """Says that this warp doesn't need dS any more, nor what came of it."""
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(t.ds_empty)
            cute.arch.mbarrier_arrive(t.remote_ds_empty, 1 - t.rank)

    @cute.jit
    def hand_over_ds(self, t: Consumer, before, at):
        """Says that dS is there, and sends it to the other CTA."""
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=OWN_BARRIER, number_of_threads=WARPGROUP)
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(t.ds_full)
        if t.thread == 0:
            if cutlass.const_expr(before is not None):
                cute.arch.mbarrier_wait(t.remote_ds_empty, at.index ^ 1)
            self.send(t.sdS, t.ds_come, t.rank)

    @cute.jit
    def issue_dq(self, t, phase):
        """dQ = dS K, in flight, once dS is there: a group of WGMMAs for each CTA's keys."""
        cute.arch.mbarrier_wait(t.ds_full, phase)
        wgmma.issue(t.dsk, t.dQ, t.dS_of_dQ[0], t.K_of_dQ[0], accumulate=False)
        cute.arch.mbarrier_wait(t.ds_come, phase)
        if t.index == 0 and t.thread == 0:
            cute.arch.mbarrier_arrive(t.ds_empty, 1 - t.rank)  # what that CTA sent has come
        wgmma.issue(t.dsk, t.dQ, t.dS_of_dQ[1], t.K_of_dQ[1], accumulate=True)
