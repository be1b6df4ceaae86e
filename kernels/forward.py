"""FlashAttention-3's forward pass for Hopper (arXiv 2407.08608, Algorithms 1 and 2).

A CTA is one producer warpgroup, of which one thread drives TMA, and one to three consumer warpgroups of 64 query rows
each. The names are the paper's: S = Q Kᵀ, P = exp(S - m), O = P V, m and l the running row maximum and sum.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .configs import WARPGROUP, ForwardConfig
from .parts import barriers, tiles, wgmma
from .parts.barriers import EPILOGUE_BARRIER, WARP, Turns
from .parts.mask import RightMask
from .parts.rounding import round_into
from .parts.schedule import Schedule, TileList
from .parts.softmax import LOG2_E, OnlineSoftmax
from .parts.sources import TmaSource

DTYPES = {"fp16": cutlass.Float16, "bf16": cutlass.BFloat16}
ROWS = 64  # query rows of a consumer warpgroup: the M of a WGMMA


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: which one it is, what it waits for, and what it multiplies."""

    index: Int32
    thread: Int32
    mask: RightMask
    turns: Turns
    softmax: OnlineSoftmax
    q_ring: pipeline.PipelineTmaAsync
    k_ring: pipeline.PipelineTmaAsync
    v_ring: pipeline.PipelineTmaAsync
    qk: Constexpr  # the WGMMA operation of S = Q Kᵀ
    pv: Constexpr  # and of O = P V
    sQ: cute.Tensor  # this warpgroup's rows of Q in shared memory
    Q: cute.Tensor  # Q, K, V as operands: of shared memory, but Q in registers where the config says so
    K: cute.Tensor
    V: cute.Tensor
    S: cute.Tensor  # registers
    P: cute.Tensor
    O: cute.Tensor


class ForwardKernel:
    """The kernel that a ForwardConfig describes; called with tensors of (batch, seqlen, heads, head_dim)."""

    def __init__(self, config: ForwardConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        Q: cute.Tensor,  # (batch, seqlen_q, heads, head_dim)
        K: cute.Tensor,  # (batch, seqlen_k, heads_kv, head_dim)
        V: cute.Tensor,  # like K
        O: cute.Tensor,  # like Q
        LSE: cute.Tensor | None,  # (batch, heads, seqlen_q) fp32, natural log
        softmax_scale: Float32,
        head_group: Int32,  # heads whose tiles are worked on together (parts/schedule.py)
        ctas: Int32,  # CTAs to start, where the schedule is not "single"
        counter: cute.Tensor | None,  # (2) int32, zeros: "dynamic" only (parts/schedule.py)
        stream: cuda.CUstream,
    ):
        c = self.config
        by_head = [1, 3, 2, 0]  # (seqlen, head_dim, heads, batch)
        Q, K, V, O = (cute.make_tensor(t.iterator, cute.select(t.layout, mode=by_head)) for t in (Q, K, V, O))
        q_layout = tiles.smem_layout(self.dtype, ROWS, c.head_dim, c.consumer_warpgroups)
        k_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, c.stages)
        load_q, Q = tiles.tma_load(Q, q_layout, ROWS, c.head_dim)
        load_k, K = tiles.tma_load(K, k_layout, c.tile_n, c.head_dim)
        load_v, V = tiles.tma_load(V, k_layout, c.tile_n, c.head_dim)
        store_o, O = tiles.tma_store(O, q_layout, ROWS, c.head_dim)
        query_tiles = cute.ceil_div(Q.shape[0], c.tile_m)
        grid = query_tiles * Q.shape[2] * Q.shape[3] if c.scheduler == "single" else ctas
        copies, scale_log2 = (load_q, load_k, load_v, store_o), softmax_scale * Float32(LOG2_E)
        self.kernel(copies, Q, K, V, O, LSE, scale_log2, head_group, counter, q_layout, k_layout).launch(
            grid=[grid, 1, 1],
            block=[c.threads, 1, 1],
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
        )

    def fake_arguments(self):
        """What __call__ takes, as the compiler wants it described: every extent and stride decided at run time."""
        c = self.config
        batch, seqlen_q, seqlen_k, heads, heads_kv = (cute.sym_int32() for _ in range(5))

        def tensor(seqlen, heads):
            strides = (*(cute.sym_int64(divisibility=16 * 8 // self.dtype.width) for _ in range(3)), 1)
            return make_fake_tensor(self.dtype, (batch, seqlen, heads, c.head_dim), strides, assumed_align=16)

        lse = None
        if c.lse:
            lse = make_fake_tensor(Float32, (batch, heads, seqlen_q), (cute.sym_int64(), cute.sym_int64(), 1))
        counter = make_fake_tensor(Int32, (2,), (1,)) if c.scheduler == "dynamic" else None
        q, k, v, o = tensor(seqlen_q, heads), tensor(seqlen_k, heads_kv), tensor(seqlen_k, heads_kv), tensor(seqlen_q, heads)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return q, k, v, o, lse, Float32(1.0), Int32(1), Int32(1), counter, stream

    @cute.kernel
    def kernel(
        self,
        copies: tuple[cute.CopyAtom, cute.CopyAtom, cute.CopyAtom, cute.CopyAtom],
        Q: cute.Tensor,
        K: cute.Tensor,
        V: cute.Tensor,
        O: cute.Tensor,
        LSE: cute.Tensor | None,
        scale_log2: Float32,
        head_group: Int32,
        counter: cute.Tensor | None,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
    ):
        c = self.config
        thread = cute.arch.thread_idx()[0]
        warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        warp_index = cute.arch.make_warp_uniform(thread // WARP)

        smem = SmemAllocator()
        q_barriers = smem.allocate_array(cutlass.Int64, 2)
        k_barriers = smem.allocate_array(cutlass.Int64, 2 * c.stages)
        v_barriers = smem.allocate_array(cutlass.Int64, 2 * c.stages)
        schedule_barriers = smem.allocate_array(cutlass.Int64, 2)
        slot = smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)
        sQ = smem.allocate_tensor(self.dtype, q_layout.outer, byte_alignment=1024, swizzle=q_layout.inner)
        sK = smem.allocate_tensor(self.dtype, k_layout.outer, byte_alignment=1024, swizzle=k_layout.inner)
        sV = smem.allocate_tensor(self.dtype, k_layout.outer, byte_alignment=1024, swizzle=k_layout.inner)
        if cutlass.const_expr(c.o_reuses_q):
            sO = sQ
        else:
            sO = smem.allocate_tensor(self.dtype, q_layout.outer, byte_alignment=1024, swizzle=q_layout.inner)

        consumer_warps = c.consumer_warpgroups * WARPGROUP // WARP
        q_ring = barriers.tma_ring(q_barriers, 1, c.tile_bytes["Q"], consumer_warps)
        k_ring = barriers.tma_ring(k_barriers, c.stages, c.tile_bytes["K"], consumer_warps)
        v_ring = barriers.tma_ring(v_barriers, c.stages, c.tile_bytes["K"], consumer_warps)
        schedule_ring = None
        if cutlass.const_expr(c.scheduler == "dynamic"):
            schedule_ring = barriers.thread_ring(schedule_barriers, 1, consumer_warps)
        if warp_index == 0:
            for copy in copies:
                cpasync.prefetch_descriptor(copy)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        seqlen_q, seqlen_k = Q.shape[0], K.shape[0]
        heads, batch = Q.shape[2], Q.shape[3]
        query_tiles = cute.ceil_div(seqlen_q, c.tile_m)
        tile_list = TileList(c.mask == "causal", query_tiles, heads, batch, head_group)
        schedule = Schedule(c.scheduler, tile_list, schedule_ring, slot, counter)
        mask = RightMask(c.mask == "causal", c.tile_m, c.tile_n, seqlen_q, seqlen_k)
        rings = (q_ring, k_ring, v_ring)

        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(c.registers[0])
            if warp_index == 0:
                self.produce(schedule, mask, rings, copies, (Q, K, V), (sQ, sK, sV))
        else:
            cute.arch.setmaxregister_increase(c.registers[1])
            softmax = OnlineSoftmax.start(c.rescale_from, c.max_chains, scale_log2)
            turns = Turns(c.pingpong, c.consumer_warpgroups, warpgroup_index - 1)
            consumer = self.consumer(thread % WARPGROUP, mask, turns, softmax, rings, sQ, sK, sV)
            self.consume(consumer, schedule, copies[3], O, LSE, sO)

    @cute.jit
    def produce(self, schedule, mask, rings, copies, tensors, shared):
        """One warp: for each tile, Q, then K and V from the last tile to the first, in the order they are consumed."""
        c = self.config
        q_ring, k_ring, v_ring = rings
        q_at, k_at, v_at = barriers.producing(1), barriers.producing(c.stages), barriers.producing(c.stages)
        s_at = barriers.producing(1)
        group = tensors[0].shape[2] // tensors[1].shape[2]  # query heads of a K/V head
        position = schedule.first()
        while position < schedule.tiles.length():
            tile, head, batch = schedule.tiles.tile(position)
            n_stop, n_unmasked = mask.key_tiles(tile)
            if n_stop > 0 or c.o_reuses_q:  # O of a tile that sees no key goes through Q's memory too
                source_q = TmaSource.of_head(q_ring, copies[0], shared[0], tensors[0], head, batch)
                q_at = source_q.bring_all(tile * c.consumer_warpgroups, q_at)
            if n_stop > 0:
                source_k = TmaSource.of_head(k_ring, copies[1], shared[1], tensors[1], head // group, batch)
                source_v = TmaSource.of_head(v_ring, copies[2], shared[2], tensors[2], head // group, batch)
                k_at = source_k.bring(n_stop - 1, k_at)
                for step in cutlass.range(n_stop - 1, unroll=1):
                    n = n_stop - 2 - step
                    if cutlass.const_expr(c.overlap):
                        k_at = source_k.bring(n, k_at)
                        v_at = source_v.bring(n + 1, v_at)
                    else:
                        v_at = source_v.bring(n + 1, v_at)
                        k_at = source_k.bring(n, k_at)
                v_at = source_v.bring(0, v_at)
            position = schedule.claim(position)
            s_at = schedule.tell(position, s_at)
        schedule.finish()
        q_ring.producer_tail(q_at)
        k_ring.producer_tail(k_at)
        v_ring.producer_tail(v_at)
        if cutlass.const_expr(c.scheduler == "dynamic"):
            schedule.ring.producer_tail(s_at)

    def consumer(self, thread, mask, turns, softmax, rings, sQ, sK, sV):
        """A consumer warpgroup with its operands laid out."""
        c, w = self.config, turns.warpgroup
        q_source = warpgroup.OperandSource.RMEM if c.q_in_registers else warpgroup.OperandSource.SMEM
        qk_op = wgmma.operation(self.dtype, c.tile_n, OperandMajorMode.K, q_source)
        pv_op = wgmma.operation(self.dtype, c.head_dim, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)
        qk, pv = cute.make_tiled_mma(qk_op), cute.make_tiled_mma(pv_op)
        return Consumer(
            w,
            thread,
            mask,
            turns,
            softmax,
            *rings,
            qk_op,
            pv_op,
            sQ=sQ[None, None, w],
            Q=qk.make_fragment_A(qk.get_slice(0).partition_A(sQ[None, None, w])),
            K=qk.make_fragment_B(qk.get_slice(0).partition_B(sK)),
            V=pv.make_fragment_B(pv.get_slice(0).partition_B(tiles.transposed(sV))),
            S=cute.make_rmem_tensor(qk.partition_shape_C((ROWS, c.tile_n)), Float32),
            P=cute.make_rmem_tensor(qk.partition_shape_C((ROWS, c.tile_n)), self.dtype),
            O=cute.make_rmem_tensor(pv.partition_shape_C((ROWS, c.head_dim)), Float32),
        )

    @cute.jit
    def consume(self, t: Consumer, schedule, store_o, O, LSE, sO):
        """One warpgroup: for each tile of the schedule, its 64 rows of O and of LSE."""
        c = self.config
        q_at, k_at, v_at = barriers.consuming(1), barriers.consuming(c.stages), barriers.consuming(c.stages)
        s_at = barriers.consuming(1)
        t.turns.begin()
        position = schedule.first()
        while position < schedule.tiles.length():
            tile, head, batch = schedule.tiles.tile(position)
            n_stop, n_unmasked = t.mask.key_tiles(tile)
            t.O.fill(0.0)
            t.softmax.reset()
            if n_stop > 0 or c.o_reuses_q:
                t.q_ring.consumer_wait(q_at)
            if n_stop > 0:
                if cutlass.const_expr(c.q_in_registers):
                    wgmma.load_operand(t.qk, t.Q, t.sQ, t.thread)
                self.release_q(t, q_at, "loaded")
                k_at, v_at = self.mainloop(t, tile, n_stop, n_unmasked, q_at, k_at, v_at)
            t.softmax.finish(t.O)
            self.epilogue(t, store_o, O, LSE, sO, tile, head, batch)
            if n_stop > 0 or c.o_reuses_q:
                if cutlass.const_expr(c.o_reuses_q):
                    self.wait_for_store(t)
                self.release_q(t, q_at, "stored")
                q_at.advance()
            position, s_at = schedule.hear(position, s_at)
        self.wait_for_store(t)

    @cute.jit
    def mainloop(self, t: Consumer, tile, n_stop, n_unmasked, q_at, k_at, v_at):
        """Key tiles from the last to the first, so that those that need masking come first."""
        first_row = tile * self.config.tile_m + t.index * ROWS
        n = n_stop - 1
        if cutlass.const_expr(self.config.overlap):
            k_at = self.first_s(t, first_row, n, n_unmasked, k_at)
            if cutlass.const_expr(t.mask.causal):  # else only the first tile can reach past seqlen_k
                while n > n_unmasked:
                    n -= 1
                    k_at, v_at = self.overlapped_step(t, first_row, n, k_at, v_at, masked=True)
            while n > 0:
                n -= 1
                k_at, v_at = self.overlapped_step(t, first_row, n, k_at, v_at, masked=False)
            self.release_q(t, q_at, "last S")
            v_at = self.last_o(t, v_at)
        else:
            while n >= 0:
                k_at, v_at = self.plain_step(t, first_row, n, n_unmasked, k_at, v_at)
                n -= 1
            self.release_q(t, q_at, "last S")
        return k_at, v_at

    @cute.jit
    def plain_step(self, t: Consumer, first_row, n, n_unmasked, k_at, v_at):
        """Algorithm 1: S, softmax and O of tile n, one after the other."""
        t.k_ring.consumer_wait(k_at)
        t.turns.take()
        self.issue_s(t, k_at)
        wgmma.wait(0)
        t.turns.give()
        t.k_ring.consumer_release(k_at)
        k_at.advance()
        if n >= n_unmasked:
            t.mask.apply(t.S, first_row, n, t.thread)
        t.softmax.step(t.S)
        t.softmax.rescale(t.O)
        round_into(t.P, t.S)
        return k_at, self.last_o(t, v_at)

    @cute.jit
    def first_s(self, t: Consumer, first_row, n, n_unmasked, k_at):
        """Algorithm 2 before its loop: S and P of the first tile, with nothing to overlap yet."""
        t.k_ring.consumer_wait(k_at)
        self.issue_s(t, k_at)
        wgmma.wait(0)
        t.k_ring.consumer_release(k_at)
        k_at.advance()
        if n >= n_unmasked:
            t.mask.apply(t.S, first_row, n, t.thread)
        t.softmax.step(t.S)
        round_into(t.P, t.S)
        return k_at

    @cute.jit
    def overlapped_step(self, t: Consumer, first_row, n, k_at, v_at, masked: Constexpr[bool]):
        """Algorithm 2's loop: S of tile n and O of tile n + 1 are in flight together, the softmax of tile n follows."""
        t.k_ring.consumer_wait(k_at)
        t.turns.take()
        self.issue_s(t, k_at)
        t.v_ring.consumer_wait(v_at)
        self.issue_o(t, v_at)
        t.turns.give()
        wgmma.wait(1)
        if cutlass.const_expr(not self.config.late_release):
            t.k_ring.consumer_release(k_at)
        if cutlass.const_expr(masked):
            t.mask.apply(t.S, first_row, n, t.thread)
        highest = t.softmax.first_row(t.S)
        if cutlass.const_expr(self.config.late_release):
            barriers.release_after(t.k_ring, k_at, t.softmax.l)
        t.softmax.second_row(t.S, highest)
        k_at.advance()
        wgmma.wait(0)
        t.v_ring.consumer_release(v_at)
        v_at.advance()
        round_into(t.P, t.S)
        t.softmax.rescale(t.O)
        return k_at, v_at

    @cute.jit
    def last_o(self, t: Consumer, v_at):
        """O += P V of a tile, with nothing to overlap: after Algorithm 2's loop, and in each step of Algorithm 1."""
        t.v_ring.consumer_wait(v_at)
        self.issue_o(t, v_at)
        wgmma.wait(0)
        t.v_ring.consumer_release(v_at)
        v_at.advance()
        return v_at

    @cute.jit
    def release_q(self, t: Consumer, q_at, moment: Constexpr[str]):
        """Lets the producer overwrite Q, if this is the moment for it."""
        if cutlass.const_expr(self.config.q_free_after == moment):
            t.q_ring.consumer_release(q_at)

    def issue_s(self, t, k_at):
        """S = Q Kᵀ, in flight."""
        wgmma.issue(t.qk, t.S, t.Q, t.K[None, None, None, k_at.index], zero=True)

    def issue_o(self, t, v_at):
        """O += P V, in flight."""
        P = wgmma.as_operand(t.P, self.config.tile_n)
        wgmma.issue(t.pv, t.O, P, t.V[None, None, None, v_at.index], zero=False)

    @cute.jit
    def epilogue(self, t: Consumer, store_o, O, LSE, sO, tile, head, batch):
        """LSE straight to memory; O to shared memory and from there by TMA, which clips the rows past the end."""
        c = self.config
        if cutlass.const_expr(LSE is not None):
            if t.thread % 4 == 0:
                for r in cutlass.range_constexpr(2):
                    row = tile * c.tile_m + t.index * ROWS + wgmma.row_in_tile(t.thread, r)
                    if row < O.shape[0]:
                        LSE[batch, head, row] = t.softmax.m[r]
        self.wait_for_store(t)
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + t.index, number_of_threads=WARPGROUP)
        wgmma.store_accumulator(t.pv, t.O, sO[None, None, t.index], t.thread)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + t.index, number_of_threads=WARPGROUP)
        if t.thread < WARP:
            tO, gO = tiles.partition(store_o, sO, O, head, batch)
            cute.copy(store_o, tO[None, t.index], gO[None, tile * c.consumer_warpgroups + t.index])
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def wait_for_store(self, t: Consumer):
        """The warp that stores waits until TMA has read what it stored, so that the shared memory is free again."""
        if t.thread < WARP:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
