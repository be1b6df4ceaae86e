"""FlashAttention-3's backward pass for Hopper (arXiv 2407.08608, appendix B.1).

A CTA takes tile_n keys of a K/V head, and when it is done with them the next ones that are left. Its producer warpgroup loads. Two
consumer warpgroups have 64 of the keys each, and one more has dQ; in backward_wide.py, where gradients take more registers, the two have
one of them each, and dQ too. They walk over the queries that see the CTA's keys, of all query heads of the group. The names are the
paper's: P = exp(S - LSE), dP = dO Vᵀ, dS = P ∘ (dP - delta), dV = Pᵀ dO, dK = dSᵀ Q, dQ = dS K.

S and dP are computed transposed, keys by queries: so P and dS are, in registers, the operands that dV and dK need, and only dQ,
a sum over keys, takes dS from shared memory. dQ is also a sum over CTAs: threads add to it in global memory, in fp32.

In a cluster of two, CTAs with neighbouring keys walk over the queries in step and send each other dS: then each has half of head_dim of
dQ for all of their keys, and adds half as much to memory.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .configs import SCHEDULE_STAGES, WARPGROUP, BackwardConfig
from .delta import DeltaKernel
from .dq import DqKernel
from .parts import accumulate, barriers, tiles, wgmma
from .parts.barriers import WARP
from .parts.mask import RightMask
from .parts.output import WARP_ROWS, WARPS, StagedOutput
from .parts.rounding import DTYPES, round_into, widened
from .parts.schedule import Schedule, TileList
from .parts.softmax import LOG2_E, exp2
from .parts.sources import RowSource, TmaSource

ROWS = 64  # keys of a consumer warpgroup, the M of a WGMMA
WARPGROUPS = 2  # that consume
DQ_BARRIER = 1  # named barrier of the warpgroup that has dQ
LONG = 2048  # keys: with more, their tiles take long
CLAIM_AHEAD = 1  # the next tile of keys is claimed when so many tiles of queries are yet to be loaded for this one


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: which one it is, what it waits for, and what it multiplies."""

    index: Int32
    thread: Int32
    leads: Boolean  # whether this thread is its warp's first
    mask: RightMask
    scale_log2: Float32
    q_ring: pipeline.PipelineTmaAsync
    do_ring: pipeline.PipelineTmaAsync
    k_ring: pipeline.PipelineTmaAsync
    v_ring: pipeline.PipelineTmaAsync
    ds_full: cute.Pointer  # mbarriers for each buffer of dS
    ds_empty: cute.Pointer
    kq: Constexpr  # the WGMMA operation of Sᵀ = K Qᵀ and of dPᵀ = V dOᵀ
    pdo: Constexpr  # of dV += Pᵀ dO and of dK += dSᵀ Q
    lse_address: Int32  # in shared memory, in the first stage or buffer: of what this thread needs of LSE,
    delta_address: Int32  # of delta,
    ds_address: Int32  # and where its part of dSᵀ goes
    K: cute.Tensor  # operands in shared memory, of the product that is named first
    Q: cute.Tensor
    V: cute.Tensor
    dO: cute.Tensor
    dO_of_dV: cute.Tensor
    Q_of_dK: cute.Tensor
    lse_log2: cute.Tensor  # registers
    S: cute.Tensor
    dP: cute.Tensor
    P: cute.Tensor  # rounded
    dS: cute.Tensor
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
        turns: cute.Tensor | None,  # (batch, heads, query tiles · cluster) int32: deterministic only
        softmax_scale: Float32,
        sms: Int32,  # of the GPU: as many CTAs, where they claim one tile of keys after another
        stream: cuda.CUstream,
    ):
        c = self.config
        by_head = [1, 3, 2, 0]  # (seqlen, head_dim, heads, batch)
        Q, K, V, O, dO, dQ, dK, dV = (
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=by_head)) for t in (Q, K, V, O, dO, dQ, dK, dV)
        )
        q_layout = do_layout = tiles.smem_layout(self.dtype, c.tile_m, c.head_dim, c.query_stages)
        k_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, c.k_stages)
        v_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, c.v_stages)
        ds_layout = tiles.smem_layout(self.dtype, c.tile_m, c.tile_n * c.cluster, c.ds_buffers)
        load_q, mQ = tiles.tma_load(Q, q_layout, c.tile_m, c.head_dim)
        load_do, mdO = tiles.tma_load(dO, do_layout, c.tile_m, c.head_dim)
        load_k, mK = tiles.tma_load(K, k_layout, c.tile_n, c.head_dim)
        load_v, mV = tiles.tma_load(V, v_layout, c.tile_n, c.head_dim)
        load_other_k, other_K = (load_k, mK)
        if cutlass.const_expr(c.cluster == 2):
            half_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim // 2, 1)
            load_other_k, other_K = tiles.tma_load(K, half_layout, c.tile_n, c.head_dim // 2)
        (store_dk, mdK), (store_dv, mdV) = (tiles.tma_store(x, self.out_layout(), WARP_ROWS, c.out_columns) for x in (dK, dV))
        key_tiles = cute.ceil_div(K.shape[0], c.tile_n * c.cluster)
        head_group = Int32(1)
        if cutlass.const_expr(c.deterministic):
            head_group = max(1, sms // (key_tiles * c.cluster))  # a head's CTAs add one after the other, so they should start so
        last_heads = None
        if cutlass.const_expr(c.mask == "causal" and not c.last_keys_first):
            # so many that an SM gets two of their tiles, or four where tiles are long; more wait for DRAM at the end
            ctas_tiles = (2 + 2 * Int32(K.shape[0] > LONG)) * sms
            last_heads = min(K.shape[2] * K.shape[3], max(1, ctas_tiles // (key_tiles * c.cluster)))
        tile_list = TileList.of(c.last_keys_first, key_tiles, 1, K.shape[2], K.shape[3], head_group, last_heads)
        ctas = tile_list.length if c.scheduler == "single" else min(tile_list.length, max(1, sms // c.cluster))
        queries_per_kv = Q.shape[2] // K.shape[2]
        ahead = cute.ceil_div(ctas, key_tiles * head_group)
        counts = accumulate.counts_of(dQ)
        query_tiles = lse_log2.shape[2] // c.tile_m
        tiles_of = Q.shape[2] * query_tiles, queries_per_kv * query_tiles
        zeroed = 2 * ahead * head_group, tile_list.last_group * head_group
        DeltaKernel(c)(O, dO, LSE, dq_accum, lse_log2, delta, turns, counts, zeroed, queries_per_kv, stream)
        copies = load_q, load_do, load_k, load_v, load_other_k, store_dk, store_dv
        tensors = mQ, mdO, mK, mV, other_K, mdK, mdV
        layouts = q_layout, do_layout, k_layout, v_layout, ds_layout
        scales = softmax_scale, softmax_scale * Float32(LOG2_E)
        self.kernel(
            copies, tensors, lse_log2, delta, dq_accum, turns, scales, tile_list, counts, ahead, queries_per_kv, tiles_of, layouts
        ).launch(
            grid=[ctas * c.cluster, 1, 1],
            block=[c.threads, 1, 1],
            cluster=[c.cluster, 1, 1] if c.cluster > 1 else None,
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )
        finished = accumulate.Finished(counts, tile_list, queries_per_kv, c.cluster)
        recent = cute.ceil_div(max(1, sms // c.cluster), key_tiles)  # heads of which tiles run at the end, but for a larger last group
        first_done = Int32(0)
        if cutlass.const_expr(c.counts_finished):
            first_done = max(0, min(tile_list.last_group * head_group, K.shape[2] * K.shape[3] - recent) - recent)
        DqKernel(c)(dq_accum, dQ, softmax_scale, finished, first_done, stream)

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
        turns = None
        if c.deterministic:
            turns = make_fake_tensor(Int32, (batch, heads, counters), (cute.sym_int64(), cute.sym_int64(), 1))
        accum = workspace(cute.sym_int32())
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return *tensors, lse, *gradients, accum, workspace(rows), workspace(rows), turns, Float32(1.0), Int32(1), stream

    @cute.kernel
    def kernel(
        self,
        copies: tuple[cute.CopyAtom, ...],  # load Q, dO, K, V, columns of other keys; store dK, dV
        tensors: tuple[cute.Tensor, ...],  # the same, as TMA sees them
        lse_log2: cute.Tensor,
        delta: cute.Tensor,
        dq_accum: cute.Tensor,
        turns: cute.Tensor | None,
        scales: tuple[Float32, Float32],  # of the scores, and log2(e) times that
        tile_list: TileList,
        counts: cute.Tensor,  # as accumulate.counts_of has it
        ahead: Int32,  # as accumulate.Zeros has it
        queries_per_kv: Int32,
        tiles_of: tuple[Int32, Int32],  # of queries, of all heads of a batch, and of a K/V head: as arguments they take no registers
        layouts: tuple[cute.ComposedLayout, ...],  # of Q, dO, K, V and dS in shared memory
    ):
        c = self.config
        thread = cute.arch.thread_idx()[0]
        warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        warp_index = cute.arch.make_warp_uniform(thread // WARP)

        smem = SmemAllocator()
        q_barriers = smem.allocate_array(cutlass.Int64, 2 * c.query_stages)
        do_barriers = smem.allocate_array(cutlass.Int64, 2 * c.query_stages)
        k_barriers = smem.allocate_array(cutlass.Int64, 2 * c.k_stages)
        v_barriers = smem.allocate_array(cutlass.Int64, 2 * c.v_stages)
        other_k_barriers = smem.allocate_array(cutlass.Int64, 2) if c.in_pairs else None
        schedule_barriers = smem.allocate_array(cutlass.Int64, 2 * SCHEDULE_STAGES)
        slots = smem.allocate_tensor(Int32, cute.make_layout((4, SCHEDULE_STAGES)), byte_alignment=16)
        ds_full = smem.allocate_array(cutlass.Int64, c.ds_buffers * 3)
        ds_empty = ds_full + c.ds_buffers
        ds_come = ds_empty + c.ds_buffers
        ready = smem.allocate_array(cutlass.Int64, SCHEDULE_STAGES) if c.in_pairs else None
        p_full = smem.allocate_array(cutlass.Int64, 1)
        remote_ds_empty = smem.allocate_array(cutlass.Int64, 1)
        near_end = smem.allocate_array(cutlass.Int64, 1)
        page = smem.allocate_tensor(Float32, cute.make_layout(accumulate.PAGE), byte_alignment=16)
        turn_barriers = smem.allocate_array(cutlass.Int64, 2)  # granted, added
        s_lse = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.query_stages)), byte_alignment=16)
        s_delta = smem.allocate_tensor(Float32, cute.make_layout((c.tile_m, c.query_stages)), byte_alignment=16)
        shared = [self.allocate(smem, layout) for layout in layouts]
        sQ, sdO, sK, sV, sdS = shared
        s_out, s_other_k = None, None
        if cutlass.const_expr(c.tile_bytes["out"] > 0):
            s_out = smem.allocate_tensor(Int32, cute.make_layout(c.tile_bytes["out"] // 4), byte_alignment=1024)
        if cutlass.const_expr(c.cluster == 2):
            s_other_k = self.allocate(smem, tiles.smem_layout(self.dtype, c.tile_n, c.head_dim // 2, 1))

        consumer_warps, dq_warps = WARPGROUPS * WARPGROUP // WARP, c.dq_warpgroup * WARPS
        row_bytes = 4 * c.tile_m
        q_ring = barriers.tma_ring(q_barriers, c.query_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        do_ring = barriers.tma_ring(do_barriers, c.query_stages, c.tile_bytes["Q"] + row_bytes, consumer_warps)
        k_bytes, other_k_ring = c.tile_bytes["K"] + c.tile_bytes["other K"], None
        if cutlass.const_expr(c.in_pairs):  # another's dS comes when it comes, so its K goes later than this CTA's
            k_bytes = c.tile_bytes["K"]
            other_k_ring = barriers.tma_ring(other_k_barriers, 1, c.tile_bytes["other K"], dq_warps)
        k_ring = barriers.tma_ring(k_barriers, c.k_stages, k_bytes, consumer_warps + dq_warps)
        v_ring = barriers.tma_ring(v_barriers, c.v_stages, c.tile_bytes["K"], consumer_warps)
        schedule_ring = None
        if cutlass.const_expr(c.scheduler == "dynamic"):
            listeners = consumer_warps + dq_warps + 3  # all warps but the one that claims
            schedule_ring = barriers.thread_ring(schedule_barriers, SCHEDULE_STAGES, listeners)
        if warp_index == 0:
            for copy in copies:
                cpasync.prefetch_descriptor(copy)
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_init(p_full, WARPS)
                cute.arch.mbarrier_init(remote_ds_empty, WARPGROUPS * WARPS)
                cute.arch.mbarrier_init(near_end, 1)
                cute.arch.mbarrier_init(turn_barriers, 1 + c.turns_kept_by_two)
                cute.arch.mbarrier_init(turn_barriers + 1, c.dq_parts // c.cluster * WARPS)
                if cutlass.const_expr(c.in_pairs):
                    for i in cutlass.range_constexpr(SCHEDULE_STAGES):
                        cute.arch.mbarrier_init(ready + i, 1)
                for i in cutlass.range_constexpr(c.ds_buffers):
                    cute.arch.mbarrier_init(ds_full + i, c.tile_n // ROWS * WARPS)
                    cute.arch.mbarrier_init(ds_empty + i, WARPGROUPS * WARPS + 1 if c.wide else WARPS * c.cluster)
                    if cutlass.const_expr(c.cluster == 2):
                        cute.arch.mbarrier_init(ds_come + i, 1)
        cute.arch.mbarrier_init_fence()
        self.meet()
        if cutlass.const_expr(not c.counts_finished):
            cute.arch.griddepcontrol_launch_dependents()

        Q, dO, K, V, other_K, mdK, mdV = tensors
        mask = RightMask(c.mask == "causal", c.tile_m, c.tile_n, Q.shape[0], K.shape[0])
        claims = cute.make_tensor(accumulate.count(counts, 0, 0) + 1, 1)  # which DeltaKernel sets to zero, and so no Schedule.finish
        first_claimed = c.deterministic and c.scheduler == "dynamic"
        schedule = Schedule(c.scheduler, tile_list, schedule_ring, slots, claims, c.cluster, first_claimed, ready)
        if cutlass.const_expr(c.deterministic):
            turns = accumulate.Turns(turns, turn_barriers, turn_barriers + 1, c.cluster, self.rank())
        adder = accumulate.Adder(dq_accum, turns, c.tile_m * c.head_dim, c.accumulator_size)
        finished = accumulate.Finished(counts, tile_list, queries_per_kv, c.cluster)
        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(c.registers[0])
            zeros = accumulate.Zeros(dq_accum, counts, page, tile_list, ahead, queries_per_kv)
            if warp_index == 0:
                rings, rows = (q_ring, do_ring), ((lse_log2, delta), (s_lse, s_delta))
                self.produce_queries(schedule, near_end, mask, rings, copies[:2], (Q, dO), (sQ, sdO), rows, queries_per_kv)
            elif warp_index == 1:
                self.produce_keys(schedule, zeros, (k_ring, v_ring, other_k_ring), copies[2:5], (K, V, other_K), (sK, sV, s_other_k))
            elif warp_index == 2:
                if cutlass.const_expr(c.turns_kept_by_two):
                    self.keep_turns_by_two(schedule, mask, turns, queries_per_kv, grants=True)
                elif cutlass.const_expr(c.deterministic):
                    self.keep_turns(schedule, mask, turns, queries_per_kv)
                elif cutlass.const_expr(c.in_pairs):
                    self.send_ds(schedule, mask, (ds_full, ds_come), sdS, queries_per_kv)
                elif cutlass.const_expr(c.scheduler == "dynamic"):
                    self.make_zeros(schedule, zeros)
            elif cutlass.const_expr(c.scheduler == "dynamic"):
                if cutlass.const_expr(c.in_pairs):
                    self.claim_together(schedule, near_end, zeros)
                else:
                    self.claim(schedule, near_end, zeros)
            elif cutlass.const_expr(c.turns_kept_by_two):
                self.keep_turns_by_two(schedule, mask, turns, queries_per_kv, grants=False)
        elif c.dq_warpgroup and warpgroup_index > WARPGROUPS:
            cute.arch.setmaxregister_decrease(c.registers[1])
            waited_for = k_ring, other_k_ring, ds_full, ds_empty, ds_come
            self.compute_dq(schedule, mask, waited_for, (sK, s_other_k), sdS, (adder, finished), thread % WARPGROUP, queries_per_kv, tiles_of)
        else:
            cute.arch.setmaxregister_increase(c.registers[-1])
            outputs = self.outputs(copies[5:], (mdK, mdV), sK, sV, s_out)
            own = warpgroup_index - 1, thread % WARPGROUP, mask, scales[1]
            rings = q_ring, do_ring, k_ring, v_ring, ds_full, ds_empty
            if cutlass.const_expr(c.wide):
                rings = *rings, p_full, ds_come, remote_ds_empty
            exchanged = rings, (sQ, sdO, sK, sV, sdS, s_other_k), (s_lse, s_delta)
            self.consume(own, exchanged, schedule, (adder, finished), outputs, scales[0], queries_per_kv, tiles_of)
        if cutlass.const_expr(c.cluster > 1):
            self.meet()  # nobody leaves before what the other sent to its shared memory is there

    def out_layout(self):
        """Of dK, or dV, in shared memory: 16 rows for each warp."""
        c = self.config
        return tiles.smem_layout(self.dtype, WARP_ROWS, c.out_columns, c.tile_n // WARP_ROWS)

    def outputs(self, stores, tensors, sK, sV, s_out):
        """What takes dK and dV to memory: each warp through its own part of s_out, side by side or one after the other."""
        c = self.config
        layout = self.out_layout()
        abreast = 1 + c.outputs_abreast
        place = WARP_ROWS * c.out_columns
        shape, stride = layout.outer.shape[:2], layout.outer.stride[:2]
        by_warp = cute.make_layout((*shape, c.tile_n // WARP_ROWS, 1), stride=(*stride, place * abreast, 0))
        memory = cute.recast_ptr(s_out.iterator, layout.inner, dtype=self.dtype)
        return [
            StagedOutput(store, cute.make_tensor(memory + i * (abreast - 1) * place, by_warp), tensor, WARPGROUPS, 1, streamed=True)
            for i, (store, tensor) in enumerate(zip(stores, tensors))
        ]

    def query_tiles(self, mask, together):
        """(first, stop): the tiles of queries that see a key of a CTA's, or of a cluster's."""
        c = self.config
        return RightMask(mask.causal, c.tile_m, c.tile_n * c.cluster, mask.seqlen_q, mask.seqlen_k).query_tiles(together)

    def own_keys(self, together):
        """Number of the tile of keys that this CTA has of its cluster's."""
        return together if self.config.cluster == 1 else together * 2 + self.rank()

    def together(self, n):
        """Number of a cluster's tiles that this one is of."""
        return n if self.config.cluster == 1 else n // 2

    def rank(self):
        """Of this CTA in its cluster."""
        cluster = self.config.cluster
        return cute.arch.make_warp_uniform(cute.arch.block_idx()[0] % cluster) if cluster > 1 else Int32(0)

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
    def produce_queries(self, schedule, near_end, mask, rings, copies, tensors, shared, rows, queries_per_kv):
        """One warp: for each tile of keys Q with its LSE, and dO with its delta, of every tile of queries of every head of the group.

        Towards a tile's end, but not before, it has the next one claimed.
        """
        c = self.config
        (q_ring, do_ring), (load_q, load_do), (Q, dO), (sQ, sdO) = rings, copies, tensors, shared
        q_at, do_at = barriers.producing(c.query_stages), barriers.producing(c.query_stages)
        position, tile, s_at = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        together, head_kv, batch = tile
        cute.arch.griddepcontrol_wait()  # for what the kernel before makes: LSE and delta, dQ's zeros, and the counters'
        if cutlass.const_expr(c.counts_finished):
            cute.arch.griddepcontrol_launch_dependents()  # not before, as DqKernel looks at these counters
        while position < schedule.tiles.length:
            m_first, m_stop = self.query_tiles(mask, together)
            to_come = max(m_stop - m_first, 0) * queries_per_kv
            claim_at = min(to_come, CLAIM_AHEAD)
            for h in cutlass.range(queries_per_kv, unroll=1):
                head = head_kv * queries_per_kv + h
                q = TmaSource.of_head(q_ring, load_q, Q, sQ, head, batch)
                do = TmaSource.of_head(do_ring, load_do, dO, sdO, head, batch)
                q_row, do_row = (RowSource.of_head(row, s_row, head, batch) for row, s_row in zip(*rows))
                for m in cutlass.range(m_first, m_stop, unroll=1):
                    if cutlass.const_expr(c.scheduler == "dynamic"):
                        if to_come == claim_at and cute.arch.lane_idx() == 0:
                            cute.arch.mbarrier_arrive(near_end)
                    q_at = q.bring(m, q_at, q_row)
                    do_at = do.bring(m, do_at, do_row)
                    to_come -= 1
            position, (together, head_kv, batch), s_at = schedule.hear(position, s_at)
        q_ring.producer_tail(q_at)
        do_ring.producer_tail(do_at)

    @cute.jit
    def claim(self, schedule, near_end, zeros):
        """One warp: claims the CTA's next tile when told, and tells the others. In deterministic mode it makes zeros, too."""
        c = self.config
        position, phase = schedule.first(), Int32(schedule.first_claimed)  # 1: waits for nothing the first time
        s_at = barriers.producing(SCHEDULE_STAGES)
        if cutlass.const_expr(c.deterministic):
            zeros.start()
        cute.arch.griddepcontrol_wait()
        while position < schedule.tiles.length:
            cute.arch.mbarrier_wait(near_end, phase)
            position, place = schedule.claimed(schedule.claim(), position)
            if cutlass.const_expr(c.deterministic):
                if position < schedule.tiles.length:
                    zeros.make(position)  # before it is told: that may wait for a turn, and so for who waits for these zeros
            s_at = schedule.tell(position, place, s_at)
            phase ^= 1
        schedule.ring.producer_tail(s_at)

    @cute.jit
    def produce_keys(self, schedule, zeros, rings, copies, tensors, shared):
        """One warp: K and V of each tile. With K, in a cluster, this CTA's half of head_dim of the other CTA's keys.

        V isn't loaded before dQ's zeros are there: no dS without V, so nothing is added to dQ before; and the other loads needn't wait.
        """
        c = self.config
        k_at, v_at = barriers.producing(c.k_stages), barriers.producing(c.v_stages)
        position, tile, s_at = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        together, head_kv, batch = tile
        while position < schedule.tiles.length:
            n = self.own_keys(together)
            # read by one CTA only, they needn't stay in the L2 cache, where dQ's zeros should
            policy = Int64(tiles.EVICT_FIRST) if c.cluster == 1 else None
            k, v = (TmaSource.of_head(*x, head_kv, batch, policy) for x in zip(rings, copies[:2], tensors[:2], shared[:2]))
            before = k_at.clone()
            k_at = k.bring(n, k_at)
            if cutlass.const_expr(c.wide):
                sides = tiles.partition(copies[2], shared[2], tensors[2], head_kv, batch, self.rank())
                cute.copy(copies[2], sides[1][None, n ^ 1], sides[0][None, 0], tma_bar_ptr=rings[0].producer_get_barrier(before))
            if cutlass.const_expr(c.scheduler == "dynamic"):
                zeros.await_those_of(position)
            v_at = v.bring(n, v_at)
            if cutlass.const_expr(c.in_pairs):
                other_k = TmaSource.of_head(rings[2], copies[2], tensors[2], shared[2], head_kv, batch, part=self.rank())
                other_k.bring(n ^ 1, before)
            position, (together, head_kv, batch), s_at = schedule.hear(position, s_at)
        if cutlass.const_expr(c.in_pairs):
            rings[2].producer_tail(k_at.clone())
        rings[0].producer_tail(k_at)
        rings[1].producer_tail(v_at)

    @cute.jit
    def claim_together(self, schedule, near_end, zeros):
        """One warp of each CTA of a cluster: the first one's claims the next tiles for both, the other one's makes zeros."""
        position, phase, first = schedule.first(), Int32(schedule.first_claimed), self.rank() == 0  # 1: waits for nothing the first time
        s_at = barriers.producing(SCHEDULE_STAGES)
        if not first:
            zeros.start()
        cute.arch.griddepcontrol_wait()
        while position < schedule.tiles.length:
            if first:
                cute.arch.mbarrier_wait(near_end, phase)
                position, place = schedule.claimed(schedule.claim(), position)
                s_at = schedule.tell(position, place, s_at)
            elif cutlass.const_expr(schedule.first_claimed):
                position, s_at = schedule.be_told(s_at)
                if position < schedule.tiles.length:
                    zeros.make(position)
            else:
                zeros.make(position)
                position, s_at = schedule.be_told(s_at)
            phase ^= 1
        schedule.ring.producer_tail(s_at)

    @cute.jit
    def send_ds(self, schedule, mask, barriers_of_ds, sdS, queries_per_kv):
        """One warp: sends what the CTA has of dS, tile by tile."""
        ds_full, ds_come = barriers_of_ds
        rank = self.rank()
        own, at = self.ds_of(sdS, rank), barriers.consuming(self.config.ds_buffers)
        position, tile, s_at = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        together, head_kv, batch = tile
        while position < schedule.tiles.length:
            m_first, m_stop = self.query_tiles(mask, together)
            for _ in cutlass.range((m_stop - m_first) * queries_per_kv, unroll=1):
                self.await_ds(ds_full, at)
                if cute.arch.lane_idx() == 0:
                    self.send(own[None, None, at.index], ds_come + at.index, rank)
                at.advance()
            position, (together, head_kv, batch), s_at = schedule.hear(position, s_at)

    def await_ds(self, ds_full, at):
        """Waits for what the consumers have of dS; WGMMAs and bulk copies may then read it. The fence is here and not where dS is written, as
        consumers have no time for it.
        """
        cute.arch.mbarrier_wait(ds_full + at.index, at.phase)
        cute.arch.fence_view_async_shared()

    def ds_of(self, sdS, rank):
        """dS of a cluster's CTA, in both buffers."""
        c = self.config
        return cute.local_tile(sdS, (c.tile_m, c.tile_n, c.ds_buffers), (0, rank, 0))

    def send(self, own, ds_come, rank):
        """One thread: what the CTA has of dS, to the same place in the cluster's other CTA, where it is free by then, and expects that one's.
        With two buffers it is free: that CTA has read what was there two tiles of queries before, or no dS would have been written here in
        the meantime.
        """
        size = self.config.tile_m * self.config.tile_n * 2
        cute.arch.mbarrier_arrive_and_expect_tx(ds_come, size)
        barriers.send(own.iterator, size, ds_come, 1 - rank)

    @cute.jit
    def make_zeros(self, schedule, zeros):
        """One warp: zeros for tiles to come, with each tile a part."""
        zeros.start()
        position, _, s_at = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        cute.arch.griddepcontrol_wait()
        while position < schedule.tiles.length:
            zeros.make(position)
            position, _, s_at = schedule.hear(position, s_at)

    @cute.jit
    def keep_turns(self, schedule, mask, turns, queries_per_kv):
        """One warp, where the order is fixed in which key tiles add to dQ: has the CTA wait for its turn at every tile of queries."""
        phase = Int32(0)
        position, tile, s_at = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        together, head_kv, batch = tile
        cute.arch.griddepcontrol_wait()
        while position < schedule.tiles.length:
            m_first, m_stop = self.query_tiles(mask, together)
            for h in cutlass.range(queries_per_kv, unroll=1):
                known = Boolean(False)
                for m in cutlass.range(m_first, m_stop, unroll=1):
                    turn = self.turn(mask, m, together)
                    following = self.turn(mask, m + 1, together) if m + 1 < m_stop else -1  # which no count is
                    known = turns.take(turns.tile(m, head_kv * queries_per_kv + h, batch), turn, known, following, phase)
                    phase ^= 1
            position, (together, head_kv, batch), s_at = schedule.hear(position, s_at)

    @cute.jit
    def keep_turns_by_two(self, schedule, mask, turns, queries_per_kv, grants: Constexpr[bool]):
        """The same by two warps, where a CTA has one tile of keys: one waits for turns, the other passes them on, which takes as long."""
        together, head_kv, batch = schedule.tiles.tile(schedule.first())
        cute.arch.griddepcontrol_wait()
        m_first, m_stop = self.query_tiles(mask, together)
        phase = Int32(0)
        if cutlass.const_expr(not grants):
            turns.begin()
        for h in cutlass.range(queries_per_kv, unroll=1):
            for m in cutlass.range(m_first, m_stop, unroll=1):
                tile = turns.tile(m, head_kv * queries_per_kv + h, batch)
                if cutlass.const_expr(grants):
                    turns.grant(tile, self.turn(mask, m, together), phase)
                else:
                    turns.pass_on(tile, phase)
                phase ^= 1

    def consumer(self, index, thread, mask, scale_log2, rings, shared, rows):
        """A consumer warpgroup with its operands laid out."""
        c = self.config
        sQ, sdO, sK, sV, sdS, *_ = shared
        kq_op = wgmma.operation(self.dtype, c.tile_m, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        pdo_op = wgmma.operation(self.dtype, c.head_dim, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)
        kq, pdo = (cute.make_tiled_mma(op) for op in (kq_op, pdo_op))
        part = index if c.cluster == 1 else self.rank() * WARPGROUPS + index
        own_ds = self.own_rows(tiles.transposed(sdS), part)[None, None, 0]
        lse_address, delta_address = (wgmma.address_of_columns(x, thread) for x in rows)
        delta_after = delta_address - lse_address
        lse_address = wgmma.keep(lse_address)
        delta_address = lse_address + delta_after

        def operand_a(mma, tile):
            return mma.make_fragment_A(mma.get_slice(0).partition_A(tile))

        def operand_b(mma, tile):
            return mma.make_fragment_B(mma.get_slice(0).partition_B(tile))

        def accumulator(mma, columns, dtype=Float32):
            return cute.make_rmem_tensor(mma.partition_shape_C((ROWS, columns)), dtype)

        return Consumer(
            index,
            thread,
            cute.arch.lane_idx() == 0,
            mask,
            scale_log2,
            *rings,
            kq_op,
            pdo_op,
            lse_address,
            delta_address,
            ds_address=wgmma.keep(wgmma.address_of_transposed(kq_op, own_ds, thread)),
            K=operand_a(kq, self.own_rows(sK, index)),
            Q=operand_b(kq, sQ),
            V=operand_a(kq, self.own_rows(sV, index)),
            dO=operand_b(kq, sdO),
            dO_of_dV=operand_b(pdo, tiles.transposed(sdO)),
            Q_of_dK=operand_b(pdo, tiles.transposed(sQ)),
            lse_log2=cute.make_rmem_tensor((2, c.tile_m // 8), Float32),
            S=accumulator(kq, c.tile_m),
            dP=accumulator(kq, c.tile_m),
            P=accumulator(kq, c.tile_m, self.dtype),
            dS=accumulator(kq, c.tile_m, self.dtype),
            dK=accumulator(pdo, c.head_dim),
            dV=accumulator(pdo, c.head_dim),
        )

    def own_rows(self, shared, index):
        """This warpgroup's 64 rows of a tile in shared memory."""
        return cute.local_tile(shared, (ROWS, *shared.shape[1:]), (index, 0, 0))

    @cute.jit
    def consume(self, own, exchanged, schedule, adding, outputs, softmax_scale, queries_per_kv, tiles_of):
        """One warpgroup: dK and dV of 64 keys of each tile that the CTA gets. (adding, tiles_of: for the kernel whose consumers have dQ too.)

        One loop over the tiles of queries of all tiles of keys, as ptxas spills in a loop around the loop.
        """
        position, tile, _ = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        if cutlass.const_expr(not schedule.first_claimed):
            self.consume_from(position, tile, own, exchanged, schedule, outputs, softmax_scale, queries_per_kv)
        elif position < schedule.tiles.length:
            self.consume_from(position, tile, own, exchanged, schedule, outputs, softmax_scale, queries_per_kv)

    @cute.jit
    def consume_from(self, position, tile, own, exchanged, schedule, outputs, softmax_scale, queries_per_kv):
        """The tile at this position of the list, and the CTA's next ones."""
        c = self.config
        t = self.consumer(*own, *exchanged)
        at, turn = barriers.consuming(2), Int32(0)
        heard = int(schedule.first_claimed)  # positions before the loop
        together, head_kv, batch = tile
        m, m_stop = self.query_tiles(t.mask, together)
        n = self.own_keys(together)
        heads_left = queries_per_kv
        self.begin_tile(t, turn, at)
        going = heads_left > 0
        while going:
            k_at, v_at = barriers.at_turn(c.k_stages, turn), barriers.at_turn(c.v_stages, turn)
            last = m + 1 == m_stop and heads_left == 1
            if self.hides(t.mask, n, m, t.index):
                self.pass_over(t, v_at, at, last)
            else:
                self.step(t, n, m, k_at.index, v_at, at, last)
            at.advance()
            m += 1
            if m == m_stop:
                heads_left -= 1
                m, _ = self.query_tiles(t.mask, self.together(n))
                if heads_left == 0:
                    t.k_ring.consumer_release(k_at)
                    t.v_ring.consumer_release(v_at)
                    self.write(t, (n, head_kv, batch), outputs, softmax_scale)
                    position, (n, head_kv, batch), _ = schedule.hear(position, barriers.at_turn(SCHEDULE_STAGES, turn + heard))
                    going = position < schedule.tiles.length
                    turn += 1
                    m, _ = self.query_tiles(t.mask, n)
                    n = self.own_keys(n)
                    heads_left = queries_per_kv
                    if going:
                        self.begin_tile(t, turn, at)
        outputs[0].finish()

    @cute.jit
    def begin_tile(self, t: Consumer, turn, at):
        """Before a tile's first step."""
        t.dK.fill(0.0)
        t.dV.fill(0.0)
        t.k_ring.consumer_wait(barriers.at_turn(self.config.k_stages, turn))
        self.fetch_lse(t, at)

    @cute.jit
    def compute_dq(self, schedule, mask, waited_for, keys, sdS, adding, thread, queries_per_kv, tiles_of):
        """One warpgroup: what each tile of keys that the CTA gets adds to dQ, a part of a tile of dQ at a time."""
        c = self.config
        (sK, s_other_k), (k_ring, other_k_ring, ds_full, ds_empty, ds_come), (adder, finished) = keys, waited_for, adding
        memory, registers = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        queries, _ = c.dq_part
        op = wgmma.operation(self.dtype, queries, OperandMajorMode.K, memory, OperandMajorMode.MN)  # dQᵀ = Kᵀ dSᵀ
        kept_op = wgmma.operation(self.dtype, queries, OperandMajorMode.K, registers)
        mma = cute.make_tiled_mma(op)
        rows, columns = tiles.transposed(sK), sdS
        if cutlass.const_expr(c.in_pairs):  # this CTA's half of head_dim, of its own keys and then of the other's
            rank = self.rank()
            rows = [self.own_rows(rows, rank), tiles.transposed(s_other_k)]
            columns = [self.ds_of(sdS, r) for r in (rank, 1 - rank)]
        elif cutlass.const_expr(c.head_dim == 64):
            rows, columns = [rows] * 2, [self.own_rows(columns, half) for half in range(2)]
        else:
            rows, columns = [self.own_rows(rows, half) for half in range(2)], [columns] * 2
        kept = cute.make_rmem_tensor(cute.make_tiled_mma(kept_op).partition_shape_A((64, max(16, c.keys_in_registers))), self.dtype)
        A = [mma.make_fragment_A(mma.get_slice(0).partition_A(x)) for x in rows]
        B = [mma.make_fragment_B(mma.get_slice(0).partition_B(x)) for x in columns]
        dQ = cute.make_rmem_tensor(mma.partition_shape_C((64, queries)), Float32)
        position, tile, _ = schedule.begin(barriers.consuming(SCHEDULE_STAGES))
        n, head_kv, batch = tile
        turn, ds_at = Int32(0), barriers.consuming(c.ds_buffers)
        while position < schedule.tiles.length:
            k_at = barriers.at_turn(c.k_stages, turn)
            m_first, m_stop = self.query_tiles(mask, n)
            part = self.rank() if c.in_pairs else 0
            place = adder.place(batch * tiles_of[0] + head_kv * tiles_of[1], part, thread)
            k_ring.consumer_wait(k_at)
            if cutlass.const_expr(c.in_pairs):
                other_k_ring.consumer_wait(k_at)
            elif cutlass.const_expr(c.keys_in_registers > 0):
                wgmma.load_operand(kept_op, kept, self.kept(sK, k_at.index), thread, transposed=True)
            for h in cutlass.range(queries_per_kv, unroll=1):
                place += Int64(m_first) * adder.tile_bytes
                for m in cutlass.range(m_first, m_stop, unroll=1):
                    self.await_ds(ds_full, ds_at)
                    operands = [(a[None, None, None, k_at.index], b[None, None, None, ds_at.index]) for a, b in zip(A, B)]
                    if cutlass.const_expr(c.in_pairs):
                        if cutlass.const_expr(c.deterministic):  # where a warp keeps the turns, in place of the one that sends
                            if thread == 0:
                                self.send(columns[0][None, None, ds_at.index], ds_come + ds_at.index, rank)
                        wgmma.issue(op, dQ, *operands[0], accumulate=False)
                        wgmma.wait(0)
                        if m + 1 == m_stop and h + 1 == queries_per_kv:
                            k_ring.consumer_release(k_at)
                        cute.arch.mbarrier_wait(ds_come + ds_at.index, ds_at.phase)
                        wgmma.issue(op, dQ, *operands[1], accumulate=True)
                        wgmma.wait(0)
                        if cute.arch.lane_idx() == 0:
                            cute.arch.mbarrier_arrive(ds_empty + ds_at.index)
                            cute.arch.mbarrier_arrive(ds_empty + ds_at.index, 1 - rank)
                        adder.add(dQ, place, ds_at.index)
                    else:
                        for part in cutlass.range_constexpr(len(operands)):
                            if cutlass.const_expr(c.keys_in_registers > 0):
                                wgmma.issue(kept_op, dQ, kept, operands[part][1], accumulate=False)
                                wgmma.issue(op, dQ, *operands[part], accumulate=True, skip=c.keys_in_registers)
                                wgmma.wait(0)
                            elif self.hides(mask, n, m, 1):
                                wgmma.issue(op, dQ, *operands[part], accumulate=False, k=ROWS)
                                wgmma.wait(0)
                            else:
                                wgmma.issue(op, dQ, *operands[part], accumulate=False)
                                wgmma.wait(0)
                            if cutlass.const_expr(part == len(operands) - 1):
                                if cute.arch.lane_idx() == 0:
                                    cute.arch.mbarrier_arrive(ds_empty + ds_at.index)
                            adder.add(dQ, place, ds_at.index, part)
                    ds_at.advance()
                    place += adder.tile_bytes
            if cutlass.const_expr(c.in_pairs):
                other_k_ring.consumer_release(k_at)
            else:
                k_ring.consumer_release(k_at)
            if cutlass.const_expr(c.counts_finished):
                cute.arch.barrier(barrier_id=DQ_BARRIER, number_of_threads=WARPGROUP)
                if thread == 0:
                    finished.count(head_kv, batch)
            position, (n, head_kv, batch), _ = schedule.hear(position, barriers.at_turn(SCHEDULE_STAGES, turn + int(schedule.first_claimed)))
            turn += 1

    def kept(self, sK, stage):
        """(head_dim, keys) of K in shared memory: of the keys that dQ's warpgroup has in registers."""
        c = self.config
        return cute.local_tile(tiles.transposed(sK)[None, None, stage], (c.head_dim, c.keys_in_registers), (0, 0))

    @cute.jit
    def write(self, t: Consumer, tile, outputs, softmax_scale):
        """dK and dV of a tile, complete, on their way to memory."""
        n, head_kv, batch = tile
        dK, dV = outputs
        place = n * WARPGROUPS + t.index, head_kv, batch, t.index, t.thread
        dV.write(t.dV, 0, *place)
        self.scale(t.dK, softmax_scale)
        dK.write(t.dK, 0, *place, free=self.config.outputs_abreast)

    @cute.jit
    def step(self, t: Consumer, n, m, k_stage, v_at, at, last):
        """A tile of queries: S, P, dP, dS, dV and dK. last: whether it is the last one for this tile of keys.

        ptxas puts the exponentials between dP's WGMMAs. What is loaded from shared memory comes late, as WGMMAs keep it busy: delta is
        asked for beside dV, and LSE of the next tile of queries beside dK.
        """
        c = self.config
        K, V = t.K[None, None, None, k_stage], t.V[None, None, None, v_at.index]
        dO, Q = t.dO_of_dV[None, None, None, at.index], t.Q_of_dK[None, None, None, at.index]
        wgmma.issue(t.kq, t.S, K, t.Q[None, None, None, at.index], accumulate=False)
        wgmma.wait(0)
        if t.mask.cuts(m, n):
            t.mask.apply_transposed(t.S, n * c.tile_n + t.index * ROWS, m * c.tile_m, t.thread)
        self.scale_scores(t)
        t.v_ring.consumer_wait(v_at)
        t.do_ring.consumer_wait(at)
        wgmma.issue(t.kq, t.dP, V, t.dO[None, None, None, at.index], accumulate=False)
        for part in [*range(c.dv_parts)]:
            self.exponentials(t, part)
            queries = dict(k=c.tile_m * (part + 1) // c.dv_parts, skip=c.tile_m * part // c.dv_parts)
            wgmma.issue(t.pdo, t.dV, wgmma.as_operand(t.P, c.tile_m), dO, accumulate=True, **queries)
        delta = wgmma.load_columns(t.delta_address + 4 * c.tile_m * at.index, c.tile_m)
        wgmma.wait(c.dv_parts)
        self.differentials(t.dP, t.P, delta)
        round_into(t.dS, t.dP)
        cute.arch.mbarrier_wait(t.ds_empty + at.index, at.phase ^ 1)
        wgmma.store_transposed(t.dS, t.ds_address + c.tile_bytes["dS"] * at.index)
        wgmma.issue(t.pdo, t.dK, wgmma.as_operand(t.dS, c.tile_m), Q, accumulate=True)
        cute.arch.sync_warp()
        if t.leads:
            cute.arch.mbarrier_arrive(t.ds_full + at.index)
        self.fetch_following_lse(t, at, last)
        wgmma.wait(0)
        self.release_queries(t, at)

    @cute.jit
    def pass_over(self, t: Consumer, v_at, at, last):
        """In place of a step, where the warpgroup's keys are hidden from the tile of queries: what others wait for."""
        t.v_ring.consumer_wait(v_at)
        t.do_ring.consumer_wait(at)
        cute.arch.mbarrier_wait(t.ds_empty + at.index, at.phase ^ 1)
        if cutlass.const_expr(self.config.in_pairs):
            t.dS.fill(0)
            wgmma.store_transposed(t.dS, t.ds_address + self.config.tile_bytes["dS"] * at.index)
            cute.arch.sync_warp()
        if t.leads:
            cute.arch.mbarrier_arrive(t.ds_full + at.index)
        self.fetch_following_lse(t, at, last)
        self.release_queries(t, at)

    @cute.jit
    def release_queries(self, t: Consumer, at):
        if t.leads:
            cute.arch.mbarrier_arrive(t.do_ring.consumer_get_barrier(at))
            cute.arch.mbarrier_arrive(t.q_ring.consumer_get_barrier(at))

    def hides(self, mask, n, m, index):
        """Whether no query of tile m sees keys of this consumer warpgroup. They add nothing, and their dS is not there."""
        c = self.config
        return mask.hides(m, n * c.tile_n + index * ROWS) if c.half_hidden else Boolean(False)

    @cute.jit
    def fetch_following_lse(self, t: Consumer, at, last):
        """LSE of the next step."""
        following = at.clone()
        if not last:  # then begin_tile does it; this tile's is loaded again, and not used
            following.advance()
        self.fetch_lse(t, following)

    def fetch_lse(self, t: Consumer, at):
        c = self.config
        t.q_ring.consumer_wait(at)
        t.lse_log2.store(wgmma.load_columns(t.lse_address + 4 * c.tile_m * at.index, c.tile_m).load())

    @cute.jit
    def scale_scores(self, t: Consumer):
        """S becomes the exponents of P, to base 2."""
        s = wgmma.flat(t.S)
        for i in [*range(cute.size(s))]:
            s[i] = s[i] * t.scale_log2 - t.lse_log2[i % 2, i // 4]

    @cute.jit
    def scale(self, acc: cute.Tensor, factor):
        flat = wgmma.flat(acc)
        for i in [*range(cute.size(flat))]:  # a list, so that the loop is Python's
            flat[i] = flat[i] * factor

    @cute.jit
    def exponentials(self, t: Consumer, part):
        """A part of those becomes P."""
        halves = 2 // self.config.dv_parts
        for half in [*range(halves * part, halves * (part + 1))]:
            S, P = (wgmma.columns(x, half, 2) for x in (t.S, t.P))
            s = wgmma.flat(S)
            for i in [*range(cute.size(s))]:
                s[i] = exp2(s[i])
            round_into(P, S)

    @cute.jit
    def differentials(self, dP: cute.Tensor, P: cute.Tensor, delta: cute.Tensor):
        """dP becomes dS = P ∘ (dP - delta)."""
        dp, p = wgmma.flat(dP), widened(P)
        for i in [*range(cute.size(dp))]:
            dp[i] = p[i] * (dp[i] - delta[i % 2, i // 4])

    def turn(self, mask, m, together):
        """How many tiles of keys (a cluster's count as one) add to dQ of query tile m before this one does, where the order is fixed."""
        c = self.config
        mask = RightMask(mask.causal, c.tile_m, c.tile_n * c.cluster, mask.seqlen_q, mask.seqlen_k)
        return mask.key_tiles(m * c.tile_m, c.tile_m)[0] - 1 - together
