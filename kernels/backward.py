"""FlashAttention-3's backward pass for Hopper (arXiv 2407.08608, appendix B.1).

A CTA owns tile_n keys of a K/V head: a warp of its producer warpgroup loads, and two consumer warpgroups share the work: each
has 64 of the keys here, and one of the gradients in backward_wide.py, where they take more registers. The CTA walks over the queries that see them, of all query heads of the group. The names are the paper's:
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
from .parts.output import WARP_ROWS, WARPS, StagedOutput
from .parts.rounding import DTYPES, round_into
from .parts.schedule import TileList
from .parts.softmax import LOG2_E, exp2
from .parts.sources import RowSource, TmaSource

ROWS = 64  # keys of a consumer warpgroup, the M of a WGMMA
WARPGROUPS = 2  # that consume
ALL_BARRIER = 1  # named barrier of the consumers


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
    ds_full: cute.Pointer  # an mbarrier for each buffer of dS
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
        semaphore: cute.Tensor | None,  # (batch, heads, query tiles · dq_warps) int32, zeros: deterministic only
        softmax_scale: Float32,
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
        ds_layout = tiles.smem_layout(self.dtype, c.tile_m, c.tile_n * c.cluster, c.ds_buffers)
        load_q, Q = tiles.tma_load(Q, q_layout, c.tile_m, c.head_dim)
        load_do, dO = tiles.tma_load(dO, do_layout, c.tile_m, c.head_dim)
        plain_K = K
        load_k, K = tiles.tma_load(K, k_layout, c.tile_n, c.head_dim)
        load_v, V = tiles.tma_load(V, k_layout, c.tile_n, c.head_dim)
        out_layout = tiles.smem_layout(self.dtype, WARP_ROWS, c.head_dim, c.tile_n // WARP_ROWS)
        load_other_k, other_K = (load_k, K)
        if cutlass.const_expr(c.cluster == 2):
            half_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim // 2, 1)
            load_other_k, other_K = tiles.tma_load(plain_K, half_layout, c.tile_n, c.head_dim // 2)
        store_dk, mdK = tiles.tma_store(dK, out_layout, WARP_ROWS, c.head_dim)
        store_dv, mdV = tiles.tma_store(dV, out_layout, WARP_ROWS, c.head_dim)
        key_tiles = cute.ceil_div(K.shape[0], c.tile_n * c.cluster)
        tile_list = TileList.of(c.last_keys_first, key_tiles, 1, K.shape[2], K.shape[3], Int32(1))
        copies = load_q, load_do, load_k, load_v, load_other_k, store_dk, store_dv
        tensors = Q, dO, K, V, other_K, mdK, mdV
        layouts = q_layout, do_layout, k_layout, ds_layout, out_layout
        queries_per_kv = Q.shape[2] // K.shape[2]
        self.kernel(
            copies, tensors, lse_log2, delta, dq_accum, semaphore, softmax_scale, tile_list, queries_per_kv, layouts
        ).launch(
            grid=[tile_list.length * c.cluster, 1, 1],
            block=[c.threads, 1, 1],
            cluster=[c.cluster, 1, 1] if c.cluster > 1 else None,
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        DqKernel(c)(dq_accum, dQ, softmax_scale, stream)

    def fake_arguments(self):
        """What __call__ takes, as the compiler wants it described: every extent and stride decided at run time."""
        c = self.config
        batch, seqlen_q, seqlen_k, heads, heads_kv, rows, counters = (cute.sym_int32() for _ in range(7))

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
            semaphore = make_fake_tensor(Int32, (batch, heads, counters), (cute.sym_int64(), cute.sym_int64(), 1))
        accum = workspace(cute.sym_int32())
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return *tensors, lse, *gradients, accum, workspace(rows), workspace(rows), semaphore, Float32(1.0), stream

    @cute.kernel
    def kernel(
        self,
        copies: tuple[cute.CopyAtom, ...],  # load Q, dO, K, V, columns of other keys; store dK, dV
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
        ds_full = smem.allocate_array(cutlass.Int64, c.ds_buffers)
        p_full = smem.allocate_array(cutlass.Int64, 1)
        s_lse = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.q_stages)), byte_alignment=16)
        s_delta = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.do_stages)), byte_alignment=16)
        q_layout, do_layout, k_layout, ds_layout, out_layout = layouts
        shared = [self.allocate(smem, layout) for layout in (q_layout, do_layout, k_layout, k_layout, ds_layout)]
        sQ, sdO, sK, sV, sdS = shared
        sdQ, sP, s_other_k = None, None, None
        if cutlass.const_expr(c.tile_bytes["dQ"] > 0):
            sdQ = smem.allocate_tensor(Float32, cute.make_layout(c.tile_m * c.head_dim), byte_alignment=128)
        if cutlass.const_expr(c.tile_bytes["P"] > 0):
            sP = smem.allocate_tensor(Int32, cute.make_layout(c.tile_bytes["P"] // 4), byte_alignment=128)

        if cutlass.const_expr(c.cluster == 2):
            s_other_k = self.allocate(smem, tiles.smem_layout(self.dtype, c.tile_n, c.head_dim // 2, 1))

        consumer_warps = WARPGROUPS * WARPGROUP // WARP
        row_bytes = 4 * c.tile_m
        q_ring = barriers.tma_ring(q_barriers, c.q_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        do_ring = barriers.tma_ring(do_barriers, c.do_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        k_ring = barriers.tma_ring(k_barriers, 1, c.tile_bytes["K"] + c.tile_bytes["other K"], consumer_warps)
        v_ring = barriers.tma_ring(v_barriers, 1, c.tile_bytes["K"], consumer_warps)
        if warp_index == 0:
            for copy in copies:
                cpasync.prefetch_descriptor(copy)
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_init(p_full, WARPS)
                for i in cutlass.range_constexpr(c.ds_buffers):
                    cute.arch.mbarrier_init(ds_full + i, c.tile_n // ROWS * WARPS)
        cute.arch.mbarrier_init_fence()
        self.meet()
        cute.arch.griddepcontrol_launch_dependents()

        Q, dO, K, V, other_K, mdK, mdV = tensors
        together, head_kv, batch = tile_list.tile(cute.arch.block_idx()[0] // c.cluster)
        mask = RightMask(c.mask == "causal", c.tile_m, c.tile_n, Q.shape[0], K.shape[0])
        of_cluster = RightMask(c.mask == "causal", c.tile_m, c.tile_n * c.cluster, Q.shape[0], K.shape[0])
        m_first, m_stop = of_cluster.query_tiles(together)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx()[0] % c.cluster)
        place = together * c.cluster + rank, head_kv, batch, m_first, m_stop, queries_per_kv
        rings = q_ring, do_ring, k_ring, v_ring
        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(c.registers[0])
            if warp_index == 0:
                loaded = [*shared[:4], s_other_k]
                self.produce(place, rings, copies[:5], (Q, dO, K, V, other_K), loaded, (lse_log2, delta), (s_lse, s_delta))
        else:
            cute.arch.setmaxregister_increase(c.registers[1])
            sdK, sdV = sK, sV  # nobody needs K and V when dK and dV are complete
            outputs = [
                StagedOutput.in_memory(copy, memory, out_layout, 1, 0, tensor, c.tile_n // ROWS, 1)
                for copy, memory, tensor in ((copies[5], sdK, mdK), (copies[6], sdV, mdV))
            ]
            adder = accumulate.Adder.start(dq_accum, sdQ, semaphore, c.tile_m * c.head_dim, c.accumulator_size)
            own = warpgroup_index - 1, thread % WARPGROUP, mask, softmax_scale * Float32(LOG2_E)
            exchanged = (*rings, ds_full, p_full), (sQ, sdO, sK, sV, sdS, sP, s_other_k), (s_lse, s_delta)
            self.consume(own, exchanged, place, adder, outputs, softmax_scale)
        if cutlass.const_expr(c.cluster > 1):
            self.meet()  # nobody leaves before what the other sent to its shared memory is there

    def meet(self):
        """All threads of the CTA, or of the cluster, wait for each other."""
        if self.config.cluster == 1:
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def allocate(self, smem, layout):
        """Shared memory for tiles of this layout."""
        return smem.allocate_tensor(self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    @cute.jit
    def produce(self, place, rings, copies, tensors, shared, rows, s_rows):
        """One warp: K and V once, then Q with its LSE, and dO with its delta, of every tile of queries of every head of the group."""
        c = self.config
        n, head_kv, batch, m_first, m_stop, queries_per_kv = place
        q_ring, do_ring, k_ring, v_ring = rings
        load_q, load_do, load_k, load_v, load_other_k = copies
        Q, dO, K, V, other_K = tensors
        sQ, sdO, sK, sV, s_other_k = shared
        at = barriers.producing(1)
        TmaSource.of_head(k_ring, load_k, K, sK, head_kv, batch).bring(n, at.clone())
        if cutlass.const_expr(c.cluster == 2):  # of the other CTA's keys, this one's half of head_dim
            sides = tiles.partition(load_other_k, s_other_k, other_K, head_kv, batch, n % 2)
            cute.copy(load_other_k, sides[1][None, n ^ 1], sides[0][None, 0], tma_bar_ptr=k_ring.producer_get_barrier(at))
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
        *rings, _ = rings
        sQ, sdO, sK, sV, sdS, *_ = shared
        K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN
        registers, memory = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        kq_op = wgmma.operation(self.dtype, c.tile_m, K_MAJOR, memory)
        pdo_op = wgmma.operation(self.dtype, c.head_dim, MN_MAJOR, registers)
        dsk_op = (
            wgmma.operation(self.dtype, c.head_dim, MN_MAJOR, memory)  # dQ = dS K, 64 queries each
            if c.dq_by_rows
            else wgmma.operation(self.dtype, c.tile_m, K_MAJOR, memory, MN_MAJOR)  # dQᵀ = Kᵀ dSᵀ, 64 of head_dim each
        )
        kq, pdo, dsk = (cute.make_tiled_mma(op) for op in (kq_op, pdo_op, dsk_op))

        def operand_a(mma, tile):
            return mma.make_fragment_A(mma.get_slice(0).partition_A(tile))

        def operand_b(mma, tile):
            return mma.make_fragment_B(mma.get_slice(0).partition_B(tile))

        if c.dq_by_rows:
            dS_of_dQ, K_of_dQ = operand_a(dsk, self.own_rows(sdS, index)), operand_b(dsk, tiles.transposed(sK))
        else:
            dS_of_dQ, K_of_dQ = operand_b(dsk, sdS), operand_a(dsk, self.own_rows(tiles.transposed(sK), index))

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
            sdS=self.own_rows(tiles.transposed(sdS), index),
            K=operand_a(kq, self.own_rows(sK, index))[None, None, None, 0],
            Q=operand_b(kq, sQ),
            V=operand_a(kq, self.own_rows(sV, index))[None, None, None, 0],
            dO=operand_b(kq, sdO),
            dO_of_dV=operand_b(pdo, tiles.transposed(sdO)),
            Q_of_dK=operand_b(pdo, tiles.transposed(sQ)),
            dS_of_dQ=dS_of_dQ,
            K_of_dQ=K_of_dQ[None, None, None, 0],
            S=accumulator(kq, c.tile_m),
            dP=accumulator(kq, c.tile_m),
            P=accumulator(kq, c.tile_m, self.dtype),
            dS=accumulator(kq, c.tile_m, self.dtype),
            dQ=accumulator(dsk, c.head_dim if c.dq_by_rows else c.tile_m),
            dK=accumulator(pdo, c.head_dim),
            dV=accumulator(pdo, c.head_dim),
        )

    def own_rows(self, shared, index):
        """This warpgroup's 64 rows of a tile in shared memory."""
        return cute.local_tile(shared, (ROWS, *shared.shape[1:]), (index, 0, 0))

    @cute.jit
    def consume(self, own, exchanged, place, adder, outputs, softmax_scale):
        """One warpgroup: dK and dV of its 64 keys, and what they add to dQ."""
        c = self.config
        t = self.consumer(*own, *exchanged)
        n, head_kv, batch, m_first, m_stop, queries_per_kv = place
        q_at, do_at, kv_at = barriers.consuming(c.q_stages), barriers.consuming(c.do_stages), barriers.consuming(1)
        ds_at = barriers.consuming(c.ds_buffers)
        t.k_ring.consumer_wait(kv_at)
        t.v_ring.consumer_wait(kv_at)
        count = max(m_stop - m_first, 0) * queries_per_kv
        if count > 0:
            m, head = m_first, head_kv * queries_per_kv
            before = m, head
            q_at, do_at, ds_at = self.step(t, n, m, batch, before, adder, q_at, do_at, ds_at, first=True)
            for i in cutlass.range(1, count, unroll=1):
                before = m, head
                m += 1
                if m == m_stop:
                    m, head = m_first, head + 1
                q_at, do_at, ds_at = self.step(t, n, m, batch, before, adder, q_at, do_at, ds_at, first=False)
            self.issue_dq(t, barriers.before(ds_at))
            wgmma.wait(0)
            adder.put(t.dQ, t.index, t.thread)
            self.publish()
            adder.send(self.turn(t, m, n), m, head, batch, t.index, t.thread)
        else:
            t.dK.fill(0.0)
            t.dV.fill(0.0)
        cute.arch.barrier(barrier_id=ALL_BARRIER, number_of_threads=WARPGROUPS * WARPGROUP)  # all have done with K and V
        self.scale(t.dK, softmax_scale)
        for gradient, output in zip((t.dV, t.dK), reversed(outputs)):
            output.write(gradient, 0, n * WARPGROUPS + t.index, head_kv, batch, t.index, t.thread)
        outputs[0].finish()
        adder.finish()

    @cute.jit
    def step(self, t: Consumer, n, m, batch, before, adder, q_at, do_at, ds_at, first: Constexpr[bool]):
        """A tile of queries: S, P, dP, dS, dV and dK; and dQ of the tile before, as the other warpgroup's dS is there by now.

        before: (m, head) of that tile.
        """
        c = self.config
        t.q_ring.consumer_wait(q_at)
        wgmma.issue(t.kq, t.S, t.K, t.Q[None, None, None, q_at.index], accumulate=False)
        lse = wgmma.load_by_columns(t.lse_log2[None, q_at.index], t.thread)
        if cutlass.const_expr(first):
            wgmma.wait(0)
        else:
            self.issue_dq(t, barriers.before(ds_at))
            wgmma.wait(1)
        if t.mask.cuts(m, n):
            t.mask.apply_transposed(t.S, n * c.tile_n + t.index * ROWS, m * c.tile_m, t.thread)
        self.exponentials(t, lse)
        round_into(t.P, t.S)
        t.do_ring.consumer_wait(do_at)
        wgmma.issue(t.kq, t.dP, t.V, t.dO[None, None, None, do_at.index], accumulate=False)
        dO, Q = t.dO_of_dV[None, None, None, do_at.index], t.Q_of_dK[None, None, None, q_at.index]
        wgmma.issue(t.pdo, t.dV, wgmma.as_operand(t.P, c.tile_m), dO, accumulate=not first)
        delta = wgmma.load_by_columns(t.delta[None, do_at.index], t.thread)
        if cutlass.const_expr(not first):
            wgmma.wait(2)
            adder.put(t.dQ, t.index, t.thread)
            self.publish()
            adder.send(self.turn(t, before[0], n), *before, batch, t.index, t.thread)
        wgmma.wait(1)
        self.differentials(t, delta)
        round_into(t.dS, t.dP)
        wgmma.store_rounded(t.kq, t.dS, t.sdS[None, None, ds_at.index], t.thread, transposed=True)
        self.publish()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(t.ds_full + ds_at.index)
        wgmma.issue(t.pdo, t.dK, wgmma.as_operand(t.dS, c.tile_m), Q, accumulate=not first)
        wgmma.wait(0)
        t.do_ring.consumer_release(do_at)
        t.q_ring.consumer_release(q_at)
        q_at.advance()
        do_at.advance()
        ds_at.advance()
        return q_at, do_at, ds_at

    @cute.jit
    def scale(self, acc: cute.Tensor, factor):
        flat = wgmma.flat(acc)
        for i in [*range(cute.size(flat))]:  # a list, so that the loop is Python's
            flat[i] = flat[i] * factor

    @cute.jit
    def exponentials(self, t: Consumer, lse_log2: cute.Tensor):
        """S becomes P."""
        s = wgmma.flat(t.S)
        for i in [*range(cute.size(s))]:
            s[i] = exp2(s[i] * t.scale_log2 - lse_log2[i % 2, i // 4])

    @cute.jit
    def differentials(self, t: Consumer, delta: cute.Tensor):
        """dP becomes dS = P ∘ (dP - delta)."""
        dp, p = wgmma.flat(t.dP), wgmma.flat(t.P)
        for i in [*range(cute.size(dp))]:
            dp[i] = p[i].to(Float32) * (dp[i] - delta[i % 2, i // 4])

    def publish(self):
        """What this warp has stored to shared memory may now be read by TMA and by WGMMAs."""
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()

    def turn(self, t, m, n):
        """How many key tiles add to dQ of query tile m before tile n does, where the order is fixed."""
        c = self.config
        if not c.deterministic:
            return None
        mask = RightMask(t.mask.causal, c.tile_m, c.tile_n * c.cluster, t.mask.seqlen_q, t.mask.seqlen_k)
        return mask.key_tiles(m * c.tile_m, c.tile_m)[0] - 1 - n // c.cluster

    @cute.jit
    def issue_dq(self, t, ds_at):
        """dQ = dS K, or dQᵀ = Kᵀ dSᵀ, in flight, once all of dS is there."""
        cute.arch.mbarrier_wait(t.ds_full + ds_at.index, ds_at.phase)
        dS = t.dS_of_dQ[None, None, None, ds_at.index]
        A, B = (dS, t.K_of_dQ) if self.config.dq_by_rows else (t.K_of_dQ, dS)
        wgmma.issue(t.dsk, t.dQ, A, B, accumulate=False)
