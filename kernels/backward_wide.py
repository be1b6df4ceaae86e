"""The backward pass at head_dim 256: two warpgroups share a CTA's 64 keys, and each has one of their gradients.

dK or dV of 64 keys takes 128 registers of a warpgroup. One has S, P and dV; the other dP, dS and dK, for which it gets P through
shared memory; and each half of head_dim of dQ, in a cluster a quarter, for which both get dS so.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .backward import ROWS, WARPGROUPS, BackwardKernel
from .configs import WARPGROUP
from .parts import barriers, tiles, wgmma
from .parts.mask import RightMask
from .parts.output import StagedOutput
from .parts.rounding import round_into
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
    ds_full: cute.Pointer  # mbarriers: a buffer of dS is in shared memory, and P
    p_full: cute.Pointer
    scores: Constexpr  # the WGMMA operation of Sᵀ = K Qᵀ and of dPᵀ = V dOᵀ
    gradient: Constexpr  # of dV += Pᵀ dO and of dK += dSᵀ Q
    dsk: Constexpr  # of dQ = dS K, half of head_dim
    lse_log2: cute.Tensor  # (tile_m, stage) shared memory
    delta: cute.Tensor
    sP: cute.Tensor  # (4, tile_m / 16) shared memory: this thread's part of P, two numbers in one
    sdS: cute.Tensor  # (keys of this CTA, tile_m, buffer) shared memory: dSᵀ
    K: cute.Tensor  # operands in shared memory, of the product that is named first
    Q: cute.Tensor
    V: cute.Tensor
    dO: cute.Tensor
    dO_of_dV: cute.Tensor
    Q_of_dK: cute.Tensor
    dS_of_dQ: cute.Tensor  # (..., buffer)
    K_of_dQ: cute.Tensor
    other_dS_of_dQ: cute.Tensor | None  # the same of the other CTA's keys
    other_K_of_dQ: cute.Tensor | None
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
        sQ, sdO, sK, sV, sdS, sP, s_other_k = shared
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

        own_p = cute.make_layout((4, c.tile_m // 16), stride=(1, 4 * WARPGROUP))
        part = rank * WARPGROUPS + index  # of head_dim
        own_columns = cute.local_tile(tiles.transposed(sK), (columns, c.tile_n, 1), (part, 0, 0))
        of_keys = (c.tile_m, c.tile_n, c.ds_buffers)
        other_dS, other_K = None, None
        if cutlass.const_expr(c.cluster == 2):
            other_dS = operand_a(dsk, cute.local_tile(sdS, of_keys, (0, 1 - rank, 0)))
            other_columns = cute.local_tile(tiles.transposed(s_other_k), (columns, c.tile_n, 1), (index, 0, 0))
            other_K = operand_b(dsk, other_columns)[None, None, None, 0]
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
            *rows,
            sP=cute.make_tensor(sP.iterator + 4 * thread, own_p),
            sdS=tiles.transposed(cute.local_tile(sdS, of_keys, (0, rank, 0))),
            K=operand_a(scores, sK)[None, None, None, 0],
            Q=operand_b(scores, sQ),
            V=operand_a(scores, sV)[None, None, None, 0],
            dO=operand_b(scores, sdO),
            dO_of_dV=operand_b(gradient, tiles.transposed(sdO)),
            Q_of_dK=operand_b(gradient, tiles.transposed(sQ)),
            dS_of_dQ=operand_a(dsk, cute.local_tile(sdS, of_keys, (0, rank, 0))),
            K_of_dQ=operand_b(dsk, own_columns)[None, None, None, 0],
            other_dS_of_dQ=other_dS,
            other_K_of_dQ=other_K,
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
        """One warpgroup: dV or dK of the CTA's keys, and half of what they add to dQ."""
        c = self.config
        adder, finished = adding
        t = self.consumer(*own, *exchanged)
        together, head_kv, batch = schedule.tiles.tile(schedule.first())
        m_first, m_stop = self.query_tiles(t.mask, together)
        n = self.own_keys(together)
        q_at, do_at = barriers.consuming(c.q_stages), barriers.consuming(c.do_stages)
        ds_at, p_at, kv_at = barriers.consuming(c.ds_buffers), barriers.consuming(1), barriers.consuming(1)
        t.k_ring.consumer_wait(kv_at)
        t.v_ring.consumer_wait(kv_at)
        count = (m_stop - m_first) * queries_per_kv  # at least 1, as a tile has keys that the last query sees
        m, tile = m_first, batch * tiles_of[0] + head_kv * tiles_of[1] + m_first
        part = t.rank * WARPGROUPS + t.index
        self.step(t, n, m, tile, None, adder, part, (q_at, do_at, ds_at, p_at))
        for i in cutlass.range(1, count, unroll=1):
            before = tile
            q_at.advance()
            do_at.advance()
            ds_at.advance()
            p_at.advance()
            m += 1
            tile += 1
            if m == m_stop:
                m = m_first
                tile += m_first
            self.step(t, n, m, tile, before, adder, part, (q_at, do_at, ds_at, p_at))
        if cutlass.const_expr(c.dq_beside == "S"):
            self.issue_dq(t, ds_at)
            wgmma.wait(0)
            adder.add(t.dQ, adder.place(tile, part, t.thread), p_at.phase)
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
    def step(self, t: Consumer, n, m, tile, before, adder, part, places):
        """A tile of queries; its dQ or, beside S, that of the tile before, as all of that one's dS is there by now.

        tile, before: their numbers among all; `before` is None where there was none. part: of dQ's tile, which this warpgroup has.
        """
        q_at, do_at, ds_at, p_at = places
        if t.index == 0:
            self.of_values(t, n, m, before, q_at, do_at, ds_at)
            self.finish_step(t, tile, before, adder, part, ds_at, p_at, t.do_ring, do_at)
        else:
            self.of_keys(t, before, q_at, do_at, ds_at, p_at)
            self.finish_step(t, tile, before, adder, part, ds_at, p_at, t.q_ring, q_at)

    @cute.jit
    def finish_step(self, t: Consumer, tile, before, adder, part, ds_at, p_at, ring, at):
        """Waits for dV, or dK, so that dO's stage, or Q's, is free; and adds dQ."""
        c = self.config
        if cutlass.const_expr(c.dq_beside == "S"):
            if cutlass.const_expr(before is not None):
                adder.add(t.dQ, adder.place(before, part, t.thread), p_at.phase ^ 1)
            wgmma.wait(0)
            ring.consumer_release(at)
        else:
            self.issue_dq(t, ds_at)
            wgmma.wait(c.cluster)
            ring.consumer_release(at)
            wgmma.wait(0)
            adder.add(t.dQ, adder.place(tile, part, t.thread), p_at.phase)

    @cute.jit
    def of_values(self, t: Consumer, n, m, before, q_at, do_at, ds_at):
        """The first warpgroup, one tile of queries: S, P, and dV, which is in flight then."""
        c = self.config
        t.q_ring.consumer_wait(q_at)
        wgmma.issue(t.scores, t.S, t.K, t.Q[None, None, None, q_at.index], accumulate=False)
        lse = wgmma.load_by_columns(t.lse_log2[None, q_at.index], t.thread)
        self.finish_scores(t, before, ds_at)
        if t.mask.cuts(m, n):
            t.mask.apply_transposed(t.S, n * c.tile_n, m * c.tile_m, t.thread)
        self.exponentials(t, lse)
        round_into(t.P, t.S)
        t.do_ring.consumer_wait(do_at)  # dP needs it too; and here it keeps the compiler from waiting for dQ before it computes P
        wgmma.wait(0)
        cute.autovec_copy(self.pairs(t, t.P), t.sP)
        self.arrive(t.p_full)
        dO = t.dO_of_dV[None, None, None, do_at.index]
        wgmma.issue(t.gradient, t.dX, wgmma.as_operand(t.P, c.tile_m), dO, accumulate=before is not None)
        t.q_ring.consumer_release(q_at)  # not before a WGMMA that waits for P, and so for the load of LSE

    @cute.jit
    def exponentials(self, t: Consumer, lse_log2: cute.Tensor):
        """S becomes P."""
        s = wgmma.flat(t.S)
        for i in [*range(cute.size(s))]:
            s[i] = exp2(s[i] * t.scale_log2 - lse_log2[i % 2, i // 4])

    @cute.jit
    def of_keys(self, t: Consumer, before, q_at, do_at, ds_at, p_at):
        """The second warpgroup, one tile of queries: dP, dS, and dK, which is in flight then."""
        c = self.config
        t.do_ring.consumer_wait(do_at)
        wgmma.issue(t.scores, t.S, t.V, t.dO[None, None, None, do_at.index], accumulate=False)
        delta = wgmma.load_by_columns(t.delta[None, do_at.index], t.thread)
        self.finish_scores(t, before, ds_at)
        cute.arch.mbarrier_wait(t.p_full, p_at.phase)
        cute.autovec_copy(t.sP, self.pairs(t, t.P))
        self.differentials(t.S, t.P, delta)
        round_into(t.dS, t.S)
        wgmma.wait(0)
        wgmma.store_rounded(t.scores, t.dS, t.sdS[None, None, ds_at.index], t.thread, transposed=True)
        cute.arch.fence_view_async_shared()
        self.hand_over_ds(t, ds_at)
        t.q_ring.consumer_wait(q_at)
        Q = t.Q_of_dK[None, None, None, q_at.index]
        wgmma.issue(t.gradient, t.dX, wgmma.as_operand(t.dS, c.tile_m), Q, accumulate=before is not None)
        t.do_ring.consumer_release(do_at)  # likewise for delta

    @cute.jit
    def finish_scores(self, t: Consumer, before, ds_at):
        """Waits for S, or dP, and has dQ of the tile before computed behind it, if that is its place."""
        c = self.config
        if cutlass.const_expr(before is None or c.dq_beside != "S"):
            wgmma.wait(0)
        else:
            self.issue_dq(t, barriers.before(ds_at))
            wgmma.wait(c.cluster)

    def pairs(self, t, fragment):
        """A rounded fragment as sP has it."""
        return cute.make_tensor(cute.recast_tensor(fragment, Int32).iterator, t.sP.shape)

    @cute.jit
    def arrive(self, barrier):
        """What this warp has stored is there."""
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def hand_over_ds(self, t: Consumer, ds_at):
        """Says that this warp's part of dS is there; in a cluster the warpgroup sends it to the other CTA too, and expects that one's.

        A buffer of the other's is free again: its dS of the tile before, which has come, was handed over after dQ of the one before that,
        by this warpgroup, and by the first one, as that hands over P after it.
        """
        c = self.config
        barrier = t.ds_full + ds_at.index
        if cutlass.const_expr(c.cluster == 1):
            self.arrive(barrier)
        else:
            size = c.tile_m * c.tile_n * 2
            cute.arch.barrier(barrier_id=OWN_BARRIER, number_of_threads=WARPGROUP)
            if t.thread == 0:
                barriers.send(t.sdS[None, None, ds_at.index].iterator, size, barrier, 1 - t.rank)
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
            elif cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def issue_dq(self, t, ds_at):
        """dQ = dS K, in flight, once dS is there: a group of WGMMAs for each CTA's keys."""
        cute.arch.mbarrier_wait(t.ds_full + ds_at.index, ds_at.phase)
        wgmma.issue(t.dsk, t.dQ, t.dS_of_dQ[None, None, None, ds_at.index], t.K_of_dQ, accumulate=False)
        if cutlass.const_expr(self.config.cluster == 2):
            wgmma.issue(t.dsk, t.dQ, t.other_dS_of_dQ[None, None, None, ds_at.index], t.other_K_of_dQ, accumulate=True)
