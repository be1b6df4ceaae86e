"""FlashAttention-3's backward pass for Hopper (arXiv 2407.08608, appendix B.1).

A CTA owns tile_n keys of a K/V head: a warp of its producer warpgroup loads, and each of two consumer warpgroups has 64 of
the keys. It walks over the queries that see them, of all query heads of the group. The names are the paper's:
P = exp(S - LSE), dP = dO Vᵀ, dS = P ∘ (dP - delta), dV = Pᵀ dO, dK = dSᵀ Q, dQ = dS K.

S and dP are computed transposed, keys by queries: so P and dS are, in registers, the operands that dV and dK need, and only dQ,
a sum over keys, takes dS from shared memory. dQ is also a sum over CTAs: they add to it in global memory, in fp32.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .configs import WARPGROUP, BackwardConfig
from .delta import DeltaKernel
from .dq import DqKernel
from .parts import accumulate, barriers, tiles, wgmma
from .parts.barriers import WARP
from .parts.mask import RightMask
from .parts.output import WARP_ROWS, StagedOutput
from .parts.rounding import DTYPES, round_into
from .parts.schedule import Divisor, TileList
from .parts.softmax import LOG2_E, exp2
from .parts.sources import RowSource, TmaSource

ROWS = 64  # keys of a consumer warpgroup, the M of a WGMMA
WARPGROUPS = 2  # that consume
DS_BARRIER = 1  # named barrier: dS of both warpgroups is in shared memory


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: which one it is, what it waits for, and what it multiplies."""

    index: Int32
    thread: Int32
    mask: RightMask
    scale_log2: Float32
    q_ring: pipeline.PipelineTmaAsync
    do_ring: pipeline.PipelineTmaAsync
    k_ring: pipeline.PipelineTmaAsync
    v_ring: pipeline.PipelineTmaAsync
    kq: Constexpr  # the WGMMA operation of Sᵀ = K Qᵀ and of dPᵀ = V dOᵀ
    pdo: Constexpr  # of dV += Pᵀ dO and of dK += dSᵀ Q
    dsk: Constexpr  # of dQ = dS K, or dQᵀ = Kᵀ dSᵀ
    lse_log2: cute.Tensor  # (tile_m, stage) shared memory
    delta: cute.Tensor
    sdS: cute.Tensor  # (own keys, tile_m, buffer) shared memory: where this warpgroup's part of dSᵀ goes
    K: cute.Tensor  # operands in shared memory, of the product that is named first
    Q: cute.Tensor
    V: cute.Tensor
    dO: cute.Tensor
    dO_of_dV: cute.Tensor
    Q_of_dK: cute.Tensor
    dS_of_dQ: cute.Tensor
    K_of_dQ: cute.Tensor
    S: cute.Tensor  # registers
    dP: cute.Tensor
    P: cute.Tensor  # rounded
    dS: cute.Tensor
    dQ: cute.Tensor
    dK: cute.Tensor
    dV: cute.Tensor


class BackwardKernel:
    """The kernels that a BackwardConfig describes; called with tensors of (batch, seqlen, heads, head_dim)."""

    def __init__(self, config: BackwardConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        Q: cute.Tensor,  # (batch, seqlen_q, heads, head_dim)
        K: cute.Tensor,  # (batch, seqlen_k, heads_kv, head_dim)
        V: cute.Tensor,  # like K
        O: cute.Tensor,  # like Q, from the forward
        dO: cute.Tensor,  # like Q
        LSE: cute.Tensor,  # (batch, heads, seqlen_q) fp32, natural log, from the forward
        dQ: cute.Tensor,  # like Q
        dK: cute.Tensor,  # like K
        dV: cute.Tensor,  # like K
        dq_accum: cute.Tensor,  # (batch, heads, rows · head_dim) fp32: dQ's sum, rows being seqlen_q in whole tiles of tile_m
        lse_log2: cute.Tensor,  # (batch, heads, rows) fp32
        delta: cute.Tensor,  # (batch, heads, rows) fp32
        semaphore: cute.Tensor | None,  # (batch, heads, query tiles) int32, zeros: deterministic only
        softmax_scale: Float32,
        head_group: Int32,  # K/V heads whose tiles are worked on together (parts/schedule.py)
        stream: cuda.CUstream,
    ):
        c = self.config
        by_head = [1, 3, 2, 0]  # (seqlen, head_dim, heads, batch)
        Q, K, V, O, dO, dQ, dK, dV = (
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=by_head)) for t in (Q, K, V, O, dO, dQ, dK, dV)
        )
        DeltaKernel(c)(O, dO, LSE, dq_accum, lse_log2, delta, stream)

        q_layout = tiles.smem_layout(self.dtype, c.tile_m, c.head_dim, c.q_stages)
        do_layout = tiles.smem_layout(self.dtype, c.tile_m, c.head_dim, c.do_stages)
        k_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, 1)
        ds_layout = tiles.smem_layout(self.dtype, c.tile_m, c.tile_n, c.ds_buffers)
        load_q, Q = tiles.tma_load(Q, q_layout, c.tile_m, c.head_dim)
        load_do, dO = tiles.tma_load(dO, do_layout, c.tile_m, c.head_dim)
        load_k, K = tiles.tma_load(K, k_layout, c.tile_n, c.head_dim)
        load_v, V = tiles.tma_load(V, k_layout, c.tile_n, c.head_dim)
        out_layout = tiles.smem_layout(self.dtype, WARP_ROWS, c.head_dim, c.tile_n // WARP_ROWS)
        store_dk, mdK = tiles.tma_store(dK, out_layout, WARP_ROWS, c.head_dim)
        store_dv, mdV = tiles.tma_store(dV, out_layout, WARP_ROWS, c.head_dim)
        key_tiles = cute.ceil_div(K.shape[0], c.tile_n)
        tile_list = TileList.of(False, key_tiles, 1, K.shape[2], K.shape[3], head_group)
        copies, layouts = (load_q, load_do, load_k, load_v, store_dk, store_dv), (q_layout, do_layout, k_layout, ds_layout, out_layout)
        tensors = (Q, dO, K, V, mdK, mdV)
        queries_per_kv = Q.shape[2] // K.shape[2]
        self.kernel(
            copies, tensors, lse_log2, delta, dq_accum, semaphore, softmax_scale, tile_list, queries_per_kv, layouts
        ).launch(
            grid=[tile_list.length, 1, 1],
            block=[c.threads, 1, 1],
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        DqKernel(c)(dq_accum, dQ, softmax_scale, stream)

    def fake_arguments(self):
        """What __call__ takes, as the compiler wants it described: every extent and stride decided at run time."""
        c = self.config
        batch, seqlen_q, seqlen_k, heads, heads_kv, rows, query_tiles = (cute.sym_int32() for _ in range(7))

        def tensor(seqlen, heads):
            strides = (*(cute.sym_int64(divisibility=16 * 8 // self.dtype.width) for _ in range(3)), 1)
            return make_fake_tensor(self.dtype, (batch, seqlen, heads, c.head_dim), strides, assumed_align=16)

        def workspace(extent, dtype=Float32):
            strides = (cute.sym_int64(divisibility=4), cute.sym_int64(divisibility=4), 1)
            return make_fake_tensor(dtype, (batch, heads, extent), strides, assumed_align=16)

        of_q, of_k = (seqlen_q, heads), (seqlen_k, heads_kv)
        tensors = [tensor(*shape) for shape in (of_q, of_k, of_k, of_q, of_q)]
        lse = make_fake_tensor(Float32, (batch, heads, seqlen_q), (cute.sym_int64(), cute.sym_int64(), 1))
        gradients = [tensor(*shape) for shape in (of_q, of_k, of_k)]
        semaphore = None
        if c.deterministic:
            semaphore = make_fake_tensor(Int32, (batch, heads, query_tiles), (cute.sym_int64(), cute.sym_int64(), 1))
        accum = workspace(cute.sym_int32())
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return *tensors, lse, *gradients, accum, workspace(rows), workspace(rows), semaphore, Float32(1.0), Int32(1), stream

    @cute.kernel
    def kernel(
        self,
        copies: tuple[cute.CopyAtom, ...],  # load Q, dO, K, V; store dK, dV
        tensors: tuple[cute.Tensor, ...],  # the same, as TMA sees them
        lse_log2: cute.Tensor,
        delta: cute.Tensor,
        dq_accum: cute.Tensor,
        semaphore: cute.Tensor | None,
        softmax_scale: Float32,
        tile_list: TileList,
        queries_per_kv: Int32,
        layouts: tuple[cute.ComposedLayout, ...],  # of Q, dO, K and V, dS, dK and dV
    ):
        c = self.config
        thread = cute.arch.thread_idx()[0]
        warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        warp_index = cute.arch.make_warp_uniform(thread // WARP)

        smem = SmemAllocator()
        q_barriers = smem.allocate_array(cutlass.Int64, 2 * c.q_stages)
        do_barriers = smem.allocate_array(cutlass.Int64, 2 * c.do_stages)
        k_barriers = smem.allocate_array(cutlass.Int64, 2)
        v_barriers = smem.allocate_array(cutlass.Int64, 2)
        s_lse = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.q_stages)), byte_alignment=16)
        s_delta = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.do_stages)), byte_alignment=16)
        q_layout, do_layout, k_layout, ds_layout, out_layout = layouts
        shared = [self.allocate(smem, layout) for layout in (q_layout, do_layout, k_layout, k_layout, ds_layout)]
        sQ, sdO, sK, sV, sdS = shared
        sdQ = smem.allocate_tensor(Float32, cute.make_layout(c.tile_m * c.head_dim), byte_alignment=128)

        consumer_warps = WARPGROUPS * WARPGROUP // WARP
        row_bytes = 4 * c.tile_m
        q_ring = barriers.tma_ring(q_barriers, c.q_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        do_ring = barriers.tma_ring(do_barriers, c.do_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        k_ring = barriers.tma_ring(k_barriers, 1, c.tile_bytes["K"], consumer_warps)
        v_ring = barriers.tma_ring(v_barriers, 1, c.tile_bytes["K"], consumer_warps)
        if warp_index == 0:
            for copy in copies:
                cpasync.prefetch_descriptor(copy)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()

        Q, dO, K, V, mdK, mdV = tensors
        n, head_kv, batch = tile_list.tile(cute.arch.block_idx()[0])
        mask = RightMask(c.mask == "causal", c.tile_m, c.tile_n, Q.shape[0], K.shape[0])
        m_first, m_stop = mask.query_tiles(n)
        place = n, head_kv, batch, m_first, m_stop, queries_per_kv
        rings = q_ring, do_ring, k_ring, v_ring
        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(c.registers[0])
            if warp_index == 0:
                self.produce(place, rings, copies[:4], (Q, dO, K, V), shared[:4], (lse_log2, delta), (s_lse, s_delta))
        else:
            cute.arch.setmaxregister_increase(c.registers[1])
            sdK, sdV = sK, sV  # nobody needs K and V when dK and dV are complete
            outputs = [
                StagedOutput.in_memory(copy, memory, out_layout, 1, 0, tensor, WARPGROUPS, 1)
                for copy, memory, tensor in ((copies[4], sdK, mdK), (copies[5], sdV, mdV))
            ]
            adder = accumulate.Adder(dq_accum, sdQ, semaphore, c.tile_m * c.head_dim, c.accumulator_size)
            operands = sQ, sdO, sK, sV, sdS
            index, thread = warpgroup_index - 1, thread % WARPGROUP
            t = self.consumer(index, thread, mask, softmax_scale * Float32(LOG2_E), rings, operands, (s_lse, s_delta))
            self.consume(t, place, adder, outputs, softmax_scale)

    def allocate(self, smem, layout):
        """Shared memory for tiles of this layout."""
        return smem.allocate_tensor(self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    @cute.jit
    def produce(self, place, rings, copies, tensors, shared, rows, s_rows):
        """One warp: K and V once, then Q with its LSE, and dO with its delta, of every tile of queries of every head of the group."""
        c = self.config
        n, head_kv, batch, m_first, m_stop, queries_per_kv = place
        q_ring, do_ring, k_ring, v_ring = rings
        load_q, load_do, load_k, load_v = copies
        Q, dO, K, V = tensors
        sQ, sdO, sK, sV = shared
        at = barriers.producing(1)
        TmaSource.of_head(k_ring, load_k, K, sK, head_kv, batch).bring(n, at.clone())
        TmaSource.of_head(v_ring, load_v, V, sV, head_kv, batch).bring(n, at.clone())
        q_at, do_at = barriers.producing(c.q_stages), barriers.producing(c.do_stages)
        cute.arch.griddepcontrol_wait()  # for what the kernel before makes: LSE and delta, and dQ's zeros
        for h in cutlass.range(queries_per_kv, unroll=1):
            head = head_kv * queries_per_kv + h
            q = TmaSource.of_head(q_ring, load_q, Q, sQ, head, batch)
            do = TmaSource.of_head(do_ring, load_do, dO, sdO, head, batch)
            q_row, do_row = (RowSource.of_head(row, s_row, head, batch) for row, s_row in zip(rows, s_rows))
            for m in cutlass.range(m_first, m_stop, unroll=1):
                q_at = q.bring(m, q_at, q_row)
                do_at = do.bring(m, do_at, do_row)
        q_ring.producer_tail(q_at)
        do_ring.producer_tail(do_at)

    def consumer(self, index, thread, mask, scale_log2, rings, shared, rows):
        """A consumer warpgroup with its operands laid out."""
        c = self.config
        sQ, sdO, sK, sV, sdS = shared
        K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN
        registers, memory = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        kq_op = wgmma.operation(self.dtype, c.tile_m, K_MAJOR, memory)
        pdo_op = wgmma.operation(self.dtype, c.head_dim, MN_MAJOR, registers)
        own_keys = cute.local_tile(tiles.transposed(sdS), (ROWS, c.tile_m, c.ds_buffers), (index, 0, 0))
        if c.dq_by_rows:  # 64 queries each
            dsk_op = wgmma.operation(self.dtype, c.head_dim, MN_MAJOR, memory)
            dq_a, dq_b = self.own_rows(sdS, index), tiles.transposed(sK)
        else:  # 64 of head_dim each
            dsk_op = wgmma.operation(self.dtype, c.tile_m, K_MAJOR, memory, MN_MAJOR)
            dq_a, dq_b = self.own_rows(tiles.transposed(sK), index), sdS
        kq, pdo, dsk = (cute.make_tiled_mma(op).get_slice(0) for op in (kq_op, pdo_op, dsk_op))
        kq_mma, pdo_mma, dsk_mma = (cute.make_tiled_mma(op) for op in (kq_op, pdo_op, dsk_op))

        def accumulator(mma, columns, dtype=Float32):
            return cute.make_rmem_tensor(mma.partition_shape_C((ROWS, columns)), dtype)

        return Consumer(
            index,
            thread,
            mask,
            scale_log2,
            *rings,
            kq_op,
            pdo_op,
            dsk_op,
            *rows,
            sdS=own_keys,
            K=kq_mma.make_fragment_A(kq.partition_A(self.own_rows(sK, index)))[None, None, None, 0],
            Q=kq_mma.make_fragment_B(kq.partition_B(sQ)),
            V=kq_mma.make_fragment_A(kq.partition_A(self.own_rows(sV, index)))[None, None, None, 0],
            dO=kq_mma.make_fragment_B(kq.partition_B(sdO)),
            dO_of_dV=pdo_mma.make_fragment_B(pdo.partition_B(tiles.transposed(sdO))),
            Q_of_dK=pdo_mma.make_fragment_B(pdo.partition_B(tiles.transposed(sQ))),
            dS_of_dQ=dsk_mma.make_fragment_A(dsk.partition_A(dq_a)) if c.dq_by_rows else dsk_mma.make_fragment_B(dsk.partition_B(dq_b)),
            K_of_dQ=(dsk_mma.make_fragment_B(dsk.partition_B(dq_b)) if c.dq_by_rows else dsk_mma.make_fragment_A(dsk.partition_A(dq_a)))[None, None, None, 0],
            S=accumulator(kq_mma, c.tile_m),
            dP=accumulator(kq_mma, c.tile_m),
            P=accumulator(kq_mma, c.tile_m, self.dtype),
            dS=accumulator(kq_mma, c.tile_m, self.dtype),
            dQ=accumulator(dsk_mma, c.head_dim if c.dq_by_rows else c.tile_m),
            dK=accumulator(pdo_mma, c.head_dim),
            dV=accumulator(pdo_mma, c.head_dim),
        )

    def own_rows(self, shared, index):
        """This warpgroup's 64 rows of a tile in shared memory."""
        return cute.local_tile(shared, (ROWS, *shared.shape[1:]), (index, 0, 0))

    @cute.jit
    def consume(self, t: Consumer, place, adder, outputs, softmax_scale):
        """One warpgroup: dK and dV of its 64 keys, and what they add to dQ."""
        c = self.config
        n, head_kv, batch, m_first, m_stop, queries_per_kv = place
        q_at, do_at, kv_at = barriers.consuming(c.q_stages), barriers.consuming(c.do_stages), barriers.consuming(1)
        ds_at = barriers.consuming(c.ds_buffers)
        t.dK.fill(0.0)
        t.dV.fill(0.0)
        count = max(m_stop - m_first, 0) * queries_per_kv
        m, head = m_first, head_kv * queries_per_kv
        t.k_ring.consumer_wait(kv_at)
        t.v_ring.consumer_wait(kv_at)
        done = Int32(0)
        while done < count:
            q_at, do_at, ds_at = self.step(t, n, m, head, batch, adder, q_at, do_at, ds_at)
            done += 1
            m += 1
            if m == m_stop:
                m, head = m_first, head + 1
        cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=WARPGROUPS * WARPGROUP)  # all have done with K and V
        for i in cutlass.range_constexpr(wgmma.size(t.dK)):
            wgmma.flat(t.dK)[i] = wgmma.flat(t.dK)[i] * softmax_scale
        for gradient, output in zip((t.dV, t.dK), reversed(outputs)):
            output.write(gradient, 0, n * WARPGROUPS + t.index, head_kv, batch, t.index, t.thread)
        outputs[0].finish()
        adder.finish()

    @cute.jit
    def step(self, t: Consumer, n, m, head, batch, adder, q_at, do_at, ds_at):
        """One tile of queries."""
        c = self.config
        t.q_ring.consumer_wait(q_at)
        wgmma.issue(t.kq, t.S, t.K, t.Q[None, None, None, q_at.index], accumulate=False)
        t.do_ring.consumer_wait(do_at)
        wgmma.issue(t.kq, t.dP, t.V, t.dO[None, None, None, do_at.index], accumulate=False)
        wgmma.wait(1)
        if t.mask.cuts(m, n):
            t.mask.apply_transposed(t.S, n * c.tile_n + t.index * ROWS, m * c.tile_m, t.thread)
        self.exponentials(t, t.lse_log2[None, q_at.index])
        wgmma.wait(0)
        round_into(t.P, t.S)
        self.differentials(t, t.delta[None, do_at.index])
        round_into(t.dS, t.dP)
        wgmma.store_rounded(t.kq, t.dS, t.sdS[None, None, ds_at.index], t.thread, transposed=True)
        cute.arch.fence_view_async_shared()
        wgmma.issue(t.pdo, t.dV, wgmma.as_operand(t.P, c.tile_m), t.dO_of_dV[None, None, None, do_at.index], accumulate=True)
        cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=WARPGROUPS * WARPGROUP)
        self.issue_dq(t, ds_at)
        wgmma.issue(t.pdo, t.dK, wgmma.as_operand(t.dS, c.tile_m), t.Q_of_dK[None, None, None, q_at.index], accumulate=True)
        wgmma.wait(1)
        t.do_ring.consumer_release(do_at)
        adder.add(t.dQ, m, head, batch, t.index, t.thread)
        wgmma.wait(0)
        t.q_ring.consumer_release(q_at)
        q_at.advance()
        do_at.advance()
        ds_at.advance()
        return q_at, do_at, ds_at

    @cute.jit
    def exponentials(self, t: Consumer, lse_log2: cute.Tensor):
        """S becomes P."""
        s, lse = wgmma.flat(t.S), wgmma.by_columns(lse_log2, t.thread)
        for j in cutlass.range_constexpr(wgmma.size(t.S) // 4):
            pair = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(lse[None, j], pair)
            for i in cutlass.range_constexpr(4):
                s[4 * j + i] = exp2(s[4 * j + i] * t.scale_log2 - pair[i % 2])

    @cute.jit
    def differentials(self, t: Consumer, delta: cute.Tensor):
        """dP becomes dS = P ∘ (dP - delta)."""
        dp, p, deltas = wgmma.flat(t.dP), wgmma.flat(t.S), wgmma.by_columns(delta, t.thread)
        for j in cutlass.range_constexpr(wgmma.size(t.dP) // 4):
            pair = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(deltas[None, j], pair)
            for i in cutlass.range_constexpr(4):
                dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - pair[i % 2])

    def issue_dq(self, t, ds_at):
        """dQ = dS K, or dQᵀ = Kᵀ dSᵀ, in flight."""
        dS = t.dS_of_dQ[None, None, None, ds_at.index]
        A, B = (dS, t.K_of_dQ) if self.config.dq_by_rows else (t.K_of_dQ, dS)
        wgmma.issue(t.dsk, t.dQ, A, B, accumulate=False)
