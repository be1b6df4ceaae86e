"""FlashAttention-3's forward pass for Hopper (arXiv 2407.08608, Algorithms 1 and 2).

A CTA is one producer warpgroup, of which a warp each loads Q, K and V, and one to three consumer warpgroups of 64
query rows each. The names are the paper's: S = Q Kᵀ, P = exp(S - m), O = P V, m and l the running row maximum and sum.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .configs import SCHEDULE_STAGES, WARPGROUP, ForwardConfig
from .parts import barriers, tiles, warp_mma, wgmma
from .parts.barriers import WARP, Turns
from .parts.mask import RightMask
from .parts.output import WARP_ROWS, StagedOutput
from .parts.rounding import DTYPES, round_into
from .parts.schedule import Divisor, Schedule, TileList
from .parts.softmax import LOG2_E, OnlineSoftmax
from .parts.sources import Feeder, TmaSource

CLAIM_AHEAD = 3  # tiles of K before a tile's last load, at which the next tile is claimed: a few steps hide what that takes
HIGHEST_P = {"fp16": 2.0**15, "bf16": 2.0**60}  # what P may grow to before its maximum must follow: P, l and O don't overflow
ROWS = 64  # query rows of a consumer warpgroup, the M of a WGMMA: a block. A tile is named by its first one (parts/schedule.py)


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: which one it is, what it waits for, and what it multiplies."""

    index: Int32
    thread: Int32
    mask: RightMask
    turns: Turns
    softmax: OnlineSoftmax
    feeder: Feeder
    q_ring: pipeline.PipelineTmaAsync
    k_ring: pipeline.PipelineTmaAsync
    v_ring: pipeline.PipelineTmaAsync
    mQ: cute.Tensor  # Q and K in global memory, (seqlen, head_dim, heads, batch)
    mK: cute.Tensor
    queries_per_kv: Divisor
    qk: Constexpr  # the WGMMA operation of S = Q Kᵀ
    pv: Constexpr  # and of O = P V
    sQ: cute.Tensor  # Q in shared memory, (64, head_dim, slot)
    Q: cute.Tensor  # Q, K, V as operands: in shared memory, but Q in registers where the config says so
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
        leaves_sms: Int32,  # 1: SMs are left to other kernels, so the next call must not wait on them for this one's end
        counter: cute.Tensor | None,  # (2) int32, zeros: "dynamic" only (parts/schedule.py)
        stream: cuda.CUstream,
    ):
        c = self.config
        by_head = [1, 3, 2, 0]  # (seqlen, head_dim, heads, batch)
        Q, K, V, O = (cute.make_tensor(t.iterator, cute.select(t.layout, mode=by_head)) for t in (Q, K, V, O))
        q_layout = tiles.smem_layout(self.dtype, ROWS, c.head_dim, c.q_slots)
        k_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, c.k_stages)
        v_layout = tiles.smem_layout(self.dtype, c.tile_n, c.head_dim, c.stages)
        mQ, mK = Q, K
        load_q, Q = tiles.tma_load(Q, q_layout, ROWS, c.head_dim)
        load_k, K = tiles.tma_load(K, k_layout, c.tile_n, c.head_dim)
        load_v, V = tiles.tma_load(V, v_layout, c.tile_n, c.head_dim)
        o_layout = tiles.smem_layout(self.dtype, WARP_ROWS, c.o_columns, c.o_buffers * c.tile_m // WARP_ROWS)
        store_o, O = tiles.tma_store(O, o_layout, WARP_ROWS, c.o_columns)
        blocks = cute.ceil_div(Q.shape[0], ROWS)
        tile_list = TileList.of(c.mask == "causal", blocks, c.consumer_warpgroups, Q.shape[2], Q.shape[3], head_group)
        grid = tile_list.length if c.scheduler == "single" else ctas
        copies, layouts = (load_q, load_k, load_v, store_o), (q_layout, k_layout, v_layout, o_layout)
        scale_log2 = softmax_scale * Float32(LOG2_E)
        queries_per_kv = Divisor(Q.shape[2] // K.shape[2])
        self.kernel(copies, Q, K, V, O, LSE, mQ, mK, scale_log2, tile_list, queries_per_kv, leaves_sms, counter, layouts).launch(
            grid=[grid, 1, 1],
            block=[c.threads, 1, 1],
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
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
        return q, k, v, o, lse, Float32(1.0), Int32(1), Int32(1), Int32(0), counter, stream

    @cute.kernel
    def kernel(
        self,
        copies: tuple[cute.CopyAtom, cute.CopyAtom, cute.CopyAtom, cute.CopyAtom],
        Q: cute.Tensor,
        K: cute.Tensor,
        V: cute.Tensor,
        O: cute.Tensor,
        LSE: cute.Tensor | None,
        mQ: cute.Tensor,  # Q and K, not as TMA sees them
        mK: cute.Tensor,
        scale_log2: Float32,
        tile_list: TileList,
        queries_per_kv: Divisor,
        leaves_sms: Int32,
        counter: cute.Tensor | None,
        layouts: tuple[cute.ComposedLayout, ...],  # of Q, K, V, O
    ):
        c = self.config
        thread = cute.arch.thread_idx()[0]
        warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        warp_index = cute.arch.make_warp_uniform(thread // WARP)

        smem = SmemAllocator()
        q_barriers = smem.allocate_array(cutlass.Int64, 2 * c.q_slots)
        k_barriers = smem.allocate_array(cutlass.Int64, 2 * c.k_stages)
        v_barriers = smem.allocate_array(cutlass.Int64, 2 * c.stages)
        schedule_barriers = smem.allocate_array(cutlass.Int64, 2 * SCHEDULE_STAGES)
        slots = smem.allocate_tensor(Int32, cute.make_layout((4, SCHEDULE_STAGES)), byte_alignment=16)
        q_layout, k_layout, v_layout, o_layout = layouts
        sQ, sK, sV = (self.allocate(smem, layout) for layout in (q_layout, k_layout, v_layout))
        sO, o_stages = (sV, c.stages) if c.o_borrows_v else (self.allocate(smem, o_layout), 1)
        o_stride = c.tile_n * c.head_dim  # of V's stages; one of its own has none
        output = StagedOutput.in_memory(copies[3], sO, o_layout, o_stages, o_stride, O, c.consumer_warpgroups, c.o_buffers)

        consumer_warps = c.consumer_warpgroups * WARPGROUP // WARP
        q_ring = barriers.tma_ring(q_barriers, c.q_slots, c.tile_bytes["Q"], WARPGROUP // WARP)
        k_ring = barriers.tma_ring(k_barriers, c.k_stages, c.tile_bytes["K"], consumer_warps)
        v_ring = barriers.tma_ring(v_barriers, c.stages, c.tile_bytes["K"], consumer_warps)
        schedule_ring = None
        if cutlass.const_expr(c.scheduler == "dynamic"):
            schedule_ring = barriers.thread_ring(schedule_barriers, SCHEDULE_STAGES, consumer_warps + 2)  # and Q's and V's
        if warp_index == 0:
            for copy in copies:
                cpasync.prefetch_descriptor(copy)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if leaves_sms == 0:
            cute.arch.griddepcontrol_launch_dependents()  # the next call may start where SMs are free; it waits for this one's end

        seqlen_q, seqlen_k = Q.shape[0], K.shape[0]
        schedule = Schedule(c.scheduler, tile_list, schedule_ring, slots, counter)
        mask = RightMask(c.mask == "causal", c.tile_m, c.tile_n, seqlen_q, seqlen_k)
        loads = (q_ring, k_ring, v_ring), copies[:3], (Q, K, V), (sQ, sK, sV)
        work = schedule, mask, scale_log2, thread % WARPGROUP, loads, mQ, mK, queries_per_kv, output, LSE
        if cutlass.const_expr(not c.warp_specialised):
            cute.arch.griddepcontrol_wait()
            self.consume(warpgroup_index, *work)
        elif warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(c.registers[0])
            of_q, of_k, of_v = zip(*loads)
            if warp_index == 0:
                self.produce_k(schedule, mask, *of_k, queries_per_kv)
            elif warp_index == 1:
                self.produce_v(schedule, mask, *of_v, queries_per_kv)
            elif warp_index == 2:
                self.produce_q(schedule, *of_q)
        else:
            cute.arch.setmaxregister_increase(c.registers[1])
            self.consume(warpgroup_index - 1, *work)

    def allocate(self, smem, layout):
        """Shared memory for tiles of this layout."""
        return smem.allocate_tensor(self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    @cute.jit
    def produce_q(self, schedule, ring, copy, Q, sQ):
        """One warp: for each tile, Q, a stage for each warpgroup's rows."""
        c = self.config
        q_at, s_at = barriers.producing(c.q_slots), barriers.consuming(SCHEDULE_STAGES)
        position = schedule.first()
        block, head, batch = schedule.tiles.tile(position)
        first = TmaSource.of_head(ring, copy, Q, sQ, head, batch)
        for w in cutlass.range_constexpr(c.consumer_warpgroups):
            first.prefetch(block + w)
        self.await_inputs()
        while position < schedule.tiles.length:
            source = TmaSource.of_head(ring, copy, Q, sQ, head, batch)
            if cutlass.const_expr(c.q_waits):
                for w in cutlass.range_constexpr(c.consumer_warpgroups):
                    source.prefetch(block + w)
            for w in cutlass.range_constexpr(c.consumer_warpgroups):
                q_at = source.bring(block + w, q_at)
            position, (block, head, batch), s_at = schedule.hear(position, s_at)
        ring.producer_tail(q_at)

    @cute.jit
    def produce_k(self, schedule, mask, ring, copy, K, sK, queries_per_kv):
        """One warp: for each tile, K from the last tile to the first, in the order they are consumed.

        Towards a tile's end, but not before, it claims the CTA's next one: whoever is ahead shall get it.
        """
        c = self.config
        k_at, s_at = barriers.producing(c.k_stages), barriers.producing(SCHEDULE_STAGES)
        position, ticket = schedule.first(), Int32(0)
        block, head, batch = schedule.tiles.tile(position)
        self.prefetch_first(mask, TmaSource.of_head(ring, copy, K, sK, head // queries_per_kv, batch), block, c.k_stages)
        self.await_inputs()
        while position < schedule.tiles.length:
            n_stop, _ = mask.key_tiles(block * ROWS, c.tile_m)
            source = TmaSource.of_head(ring, copy, K, sK, head // queries_per_kv, batch)
            for step in cutlass.range(n_stop, unroll=1):
                near_end = step == max(n_stop - CLAIM_AHEAD, 0)
                if near_end:
                    ticket = schedule.claim()
                k_at = source.bring(n_stop - 1 - step, k_at)
                if near_end:
                    position, (block, head, batch) = schedule.claimed(ticket, position)
                    s_at = schedule.tell(position, (block, head, batch), s_at)
        schedule.finish()
        ring.producer_tail(k_at)
        if cutlass.const_expr(c.scheduler == "dynamic"):
            schedule.ring.producer_tail(s_at)

    @cute.jit
    def produce_v(self, schedule, mask, ring, copy, V, sV, queries_per_kv):
        """One warp: V in the same order, and before each tile's a stage of it for O of the tile before, if that has no other place."""
        c = self.config
        v_at, s_at = barriers.producing(c.stages), barriers.consuming(SCHEDULE_STAGES)
        position = schedule.first()
        block, head, batch = schedule.tiles.tile(position)
        self.prefetch_first(mask, TmaSource.of_head(ring, copy, V, sV, head // queries_per_kv, batch), block, c.stages)
        self.await_inputs()
        while position < schedule.tiles.length:
            v_at = self.lend_v(ring, v_at)  # the first is let pass
            n_stop, _ = mask.key_tiles(block * ROWS, c.tile_m)
            source = TmaSource.of_head(ring, copy, V, sV, head // queries_per_kv, batch)
            for step in cutlass.range(n_stop, unroll=1):
                v_at = source.bring(n_stop - 1 - step, v_at)
            position, (block, head, batch), s_at = schedule.hear(position, s_at)
        v_at = self.lend_v(ring, v_at)
        ring.producer_tail(v_at)

    @cute.jit
    def prefetch_first(self, mask, source, block, stages: Constexpr[int]):
        """Has what fills the ring first fetched into the L2 cache."""
        n_stop, _ = mask.key_tiles(block * ROWS, self.config.tile_m)
        for step in cutlass.range(min(n_stop, stages), unroll=1):
            source.prefetch(n_stop - 1 - step)

    def await_inputs(self):
        """Waits for the end of the kernel before. Nobody touches memory before the producers have loaded from it.

        What was prefetched may still be written by that kernel: the L2 cache is where all SMs' writes meet, so what it holds
        follows them.
        """
        cute.arch.griddepcontrol_wait()

    def lend_v(self, ring, v_at):
        """A stage of V for the consumers to write O to, if they have no other place."""
        return barriers.lend(ring, v_at) if self.config.o_borrows_v else v_at

    def consumer(self, index, thread, mask, scale_log2, loads, mQ, mK, queries_per_kv):
        """A consumer warpgroup with its operands laid out."""
        c = self.config
        rings, _, _, (sQ, sK, sV) = loads
        last = c.threads - WARPGROUP  # the one warpgroup that has rows in every tile
        feeds = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP) == last // WARP
        registers, shared = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        qk_op = wgmma.operation(self.dtype, c.tile_n, OperandMajorMode.K, registers if c.q_in_registers else shared)
        pv_op = wgmma.operation(self.dtype, c.head_dim, OperandMajorMode.MN, registers)
        qk, pv = cute.make_tiled_mma(qk_op), cute.make_tiled_mma(pv_op)
        own_sQ = sQ[None, None, index] if c.q_in_registers else sQ
        return Consumer(
            index,
            thread,
            mask,
            Turns(c.pingpong, c.consumer_warpgroups, index),
            OnlineSoftmax.start(c.rescale_from, HIGHEST_P[c.dtype], scale_log2),
            Feeder(not c.warp_specialised, feeds, *loads),
            *rings,
            mQ,
            mK,
            queries_per_kv,
            qk_op,
            pv_op,
            sQ=sQ,
            Q=qk.make_fragment_A(qk.get_slice(0).partition_A(own_sQ)),
            K=qk.make_fragment_B(qk.get_slice(0).partition_B(sK)),
            V=pv.make_fragment_B(pv.get_slice(0).partition_B(tiles.transposed(sV))),
            S=cute.make_rmem_tensor(qk.partition_shape_C((ROWS, c.tile_n)), Float32),
            P=cute.make_rmem_tensor(qk.partition_shape_C((ROWS, c.tile_n)), self.dtype),
            O=cute.make_rmem_tensor(pv.partition_shape_C((ROWS, c.head_dim)), Float32),
        )

    @cute.jit
    def consume(self, index, schedule, mask, scale_log2, thread, loads, mQ, mK, queries_per_kv, output, LSE):
        """One warpgroup: for each tile of the schedule, its 64 rows of O and of LSE.

        With overlap, tiles follow each other as steps do: one's last O and the next one's first S are in flight together.
        """
        c = self.config
        t = self.consumer(index, thread, mask, scale_log2, loads, mQ, mK, queries_per_kv)
        q_at = barriers.consuming(c.q_slots, t.index)
        k_at, v_at, s_at = barriers.consuming(c.k_stages), barriers.consuming(c.stages), barriers.consuming(SCHEDULE_STAGES)
        t.turns.begin()
        v_at = self.let_pass(t.v_ring, v_at, c.o_borrows_v)
        position = schedule.first()
        block, head, batch = schedule.tiles.tile(position)
        while position < schedule.tiles.length:
            if not self.has_rows(t, block):
                q_at, k_at, v_at = self.pass_over(t, block, q_at, k_at, v_at)
                position, (block, head, batch), s_at = schedule.hear(position, s_at)
            else:
                t.feeder.start(block, head, batch, self.first_n(t, block), c.consumer_warpgroups, q_at, k_at)
                self.load_q(t, q_at)
                t.turns.take()
                n, n_unmasked, skipped, k_at = self.start_tile(t, block, q_at, k_at)
                t.turns.give()
                t.feeder.step(head, batch, n, k_at, v_at, v_ahead=False)
                k_at = self.p_alone(t, block, n, n_unmasked, q_at, k_at, first=True)
                v_at = self.let_pass(t.v_ring, v_at, skipped)
                going_on = True
                while going_on:
                    k_at, v_at, o_begun = self.mainloop(t, block, head, batch, n, n_unmasked, q_at, k_at, v_at)
                    if cutlass.const_expr(not (c.q_waits or c.q_in_registers)):
                        t.q_ring.consumer_release(q_at)
                    q_at.advance(c.consumer_warpgroups)
                    finished = block, head, batch
                    position, (block, head, batch), s_at = schedule.hear(position, s_at)
                    going_on = c.overlap and position < schedule.tiles.length and self.has_rows(t, block)
                    if going_on:
                        t.feeder.start(block, head, batch, self.first_n(t, block), c.consumer_warpgroups, q_at, k_at)
                        self.load_q(t, q_at)
                        t.v_ring.consumer_wait(v_at)
                        t.turns.take()
                        self.issue_o(t, v_at, o_begun)
                        n, n_unmasked, skipped, k_at = self.start_tile(t, block, q_at, k_at)
                        t.turns.give()
                        t.feeder.step(head, batch, n, k_at, v_at, v_ahead=True)
                        wgmma.wait(1)
                        t.v_ring.consumer_release(v_at)
                        v_at.advance()
                        self.epilogue(t, output, LSE, *finished, v_at)
                        k_at = self.p_alone(t, block, n, n_unmasked, q_at, k_at, first=True)
                        v_at = self.return_v(t, output, v_at)
                        v_at = self.let_pass(t.v_ring, v_at, skipped)
                    else:
                        v_at = self.o_alone(t, v_at, o_begun)
                        self.epilogue(t, output, LSE, *finished, v_at)
                        v_at = self.return_v(t, output, v_at)
        output.finish()

    def first_n(self, t: Consumer, block):
        """The key tile that a tile of queries starts with."""
        return t.mask.key_tiles(block * ROWS, self.config.tile_m)[0] - 1

    def has_rows(self, t: Consumer, block):
        """Whether a tile has rows for this warpgroup: the first one may have fewer."""
        return block + t.index >= 0

    @cute.jit
    def let_pass(self, ring, at, whether):
        """A stage that this warpgroup has no use for; returns the next place."""
        if whether:
            ring.consumer_wait(at)
            ring.consumer_release(at)
            at.advance()
        return at

    @cute.jit
    def pass_over(self, t: Consumer, block, q_at, k_at, v_at):
        """A tile without rows for this warpgroup: takes part in what the others wait for."""
        c = self.config
        t.q_ring.consumer_wait(q_at)
        t.q_ring.consumer_release(q_at)
        q_at.advance(c.consumer_warpgroups)
        n_stop, _ = t.mask.key_tiles(block * ROWS, c.tile_m)
        for step in cutlass.range(n_stop, unroll=1):
            k_at = self.let_pass(t.k_ring, k_at, True)
            t.turns.take()
            t.turns.give()
            v_at = self.let_pass(t.v_ring, v_at, True)
        v_at = self.let_pass(t.v_ring, v_at, c.o_borrows_v)
        return q_at, k_at, v_at

    @cute.jit
    def load_q(self, t: Consumer, q_at):
        """Q into registers, if that is where the config wants it."""
        if cutlass.const_expr(self.config.q_in_registers):
            t.q_ring.consumer_wait(q_at)
            wgmma.load_operand(t.qk, t.Q, t.sQ[None, None, q_at.index], t.thread)

    @cute.jit
    def start_tile(self, t: Consumer, block, q_at, k_at):
        """S of the first keys that this warpgroup's rows see, in flight.

        Returns their tile, the first tile without a mask, and whether one was skipped, whose V is yet to be let pass.
        """
        c = self.config
        tile_stop, _ = t.mask.key_tiles(block * ROWS, c.tile_m)
        n_stop, n_unmasked = t.mask.key_tiles((block + t.index) * ROWS, ROWS)
        skipped = False
        if cutlass.const_expr(t.mask.causal):
            skipped = n_stop < tile_stop  # only other warpgroups' rows see the tile's first keys
            if skipped:
                n_stop = tile_stop - 1  # no more than one: a stage of V is held for each
                k_at = self.let_pass(t.k_ring, k_at, True)
                t.turns.give()
                t.turns.take()
        if cutlass.const_expr(not c.q_in_registers):
            t.q_ring.consumer_wait(q_at)
        t.k_ring.consumer_wait(k_at)
        self.issue_s(t, q_at, k_at)
        if cutlass.const_expr(c.q_in_registers):
            t.q_ring.consumer_release(q_at)  # not before the WGMMAs that wait for the loads
        return n_stop - 1, n_unmasked, skipped, k_at

    @cute.jit
    def p_alone(self, t: Consumer, block, n, n_unmasked, q_at, k_at, first: Constexpr[bool]):
        """P of key tile n, once its S is there, with nothing to overlap."""
        wgmma.wait(0)
        t.k_ring.consumer_release(k_at)
        self.release_q(t, n, q_at)
        k_at.advance()
        if n >= n_unmasked:
            t.mask.apply(t.S, (block + t.index) * ROWS, n, t.thread)
        if cutlass.const_expr(first):
            t.softmax.reset()
        t.softmax.step(t.S)
        if cutlass.const_expr(not first):
            t.softmax.rescale(t.O)
        round_into(t.P, t.S)
        return k_at

    @cute.jit
    def mainloop(self, t: Consumer, block, head, batch, n, n_unmasked, q_at, k_at, v_at):
        """From a P to the last one: key tiles from the last to the first, so that those that need masking come first."""
        o_begun = Boolean(False)
        if cutlass.const_expr(self.config.overlap):
            if cutlass.const_expr(t.mask.causal):  # else only the first tile can reach past seqlen_k
                while n > n_unmasked:
                    n -= 1
                    k_at, v_at = self.overlapped_step(t, block, head, batch, n, q_at, k_at, v_at, o_begun, masked=True)
                    o_begun = Boolean(True)
            while n > 0:
                n -= 1
                k_at, v_at = self.overlapped_step(t, block, head, batch, n, q_at, k_at, v_at, o_begun, masked=False)
                o_begun = Boolean(True)
        else:
            while n > 0:
                n -= 1
                v_at = self.o_alone(t, v_at, o_begun)
                o_begun = Boolean(True)
                t.k_ring.consumer_wait(k_at)
                t.turns.take()
                self.issue_s(t, q_at, k_at)
                t.turns.give()
                k_at = self.p_alone(t, block, n, n_unmasked, q_at, k_at, first=False)
        return k_at, v_at, o_begun

    @cute.jit
    def overlapped_step(self, t: Consumer, block, head, batch, n, q_at, k_at, v_at, o_begun, masked: Constexpr[bool]):
        """Algorithm 2's loop: S of tile n and O of tile n + 1 are in flight together, the softmax of tile n follows."""
        t.k_ring.consumer_wait(k_at)
        t.turns.take()
        self.issue_s(t, q_at, k_at)
        t.v_ring.consumer_wait(v_at)
        self.issue_o(t, v_at, o_begun)
        t.turns.give()
        t.feeder.step(head, batch, n, k_at, v_at, v_ahead=True)
        wgmma.wait(1)
        if cutlass.const_expr(self.config.presume and not masked):
            t.k_ring.consumer_release(k_at)
            self.release_q(t, n, q_at)
            self.presumed_p(t, block, head, batch, n, v_at)
        else:
            if cutlass.const_expr(not self.config.late_release):
                t.k_ring.consumer_release(k_at)
            self.release_q(t, n, q_at)
            if cutlass.const_expr(masked):
                t.mask.apply(t.S, (block + t.index) * ROWS, n, t.thread)
            highest = t.softmax.first_row(t.S)
            if cutlass.const_expr(self.config.late_release):
                barriers.release_after(t.k_ring, k_at, t.softmax.l)
            t.softmax.second_row(t.S, highest)
            wgmma.wait(0)
            t.v_ring.consumer_release(v_at)
            round_into(t.P, t.S)
            t.softmax.rescale(t.O)
        k_at.advance()
        v_at.advance()
        return k_at, v_at

    @cute.jit
    def presumed_p(self, t: Consumer, block, head, batch, n, v_at):
        """P of a tile without a mask against the maximum of before; where a row has a much higher one, once more with that.

        So no maximum stands between S and its exponentials, and O stays as it is. A warp that presumed wrongly needs S again,
        for which it takes Q and K from global memory: they aren't kept in shared memory for what hardly ever happens.
        """
        l_tile, holds = t.softmax.presume(t.S)
        wgmma.wait(0)
        t.v_ring.consumer_release(v_at)
        round_into(t.P, t.S)
        if cute.arch.vote_all_sync(holds):
            t.softmax.take_in(l_tile)
        else:
            Q = t.mQ[None, None, head, batch]
            K = t.mK[None, None, head // t.queries_per_kv, batch]
            first_row = (block + t.index) * ROWS + t.thread // WARP * WARP_ROWS
            warp_mma.gemm(t.S, Q, first_row, K, n * self.config.tile_n)
            t.softmax.step(t.S)
            t.softmax.rescale(t.O)
            round_into(t.P, t.S)

    @cute.jit
    def o_alone(self, t: Consumer, v_at, o_begun):
        """O += P V of a tile, with nothing to overlap."""
        t.v_ring.consumer_wait(v_at)
        self.issue_o(t, v_at, o_begun)
        wgmma.wait(0)
        t.v_ring.consumer_release(v_at)
        v_at.advance()
        return v_at

    @cute.jit
    def release_q(self, t: Consumer, n, q_at):
        """Where the next Q waits for it, lets the producer overwrite Q as soon as the tile's last S is there."""
        if cutlass.const_expr(self.config.q_waits):
            if n == 0:
                t.q_ring.consumer_release(q_at)

    def issue_s(self, t, q_at, k_at):
        """S = Q Kᵀ, in flight."""
        Q = t.Q if self.config.q_in_registers else t.Q[None, None, None, q_at.index]
        wgmma.issue(t.qk, t.S, Q, t.K[None, None, None, k_at.index], accumulate=False)

    def issue_o(self, t, v_at, o_begun):
        """O = P V, or O += P V once it is begun, in flight."""
        wgmma.issue(t.pv, t.O, wgmma.as_operand(t.P, self.config.tile_n), t.V[None, None, None, v_at.index], accumulate=o_begun)

    @cute.jit
    def epilogue(self, t: Consumer, output, LSE, block, head, batch, v_at):
        """O and LSE to memory, but for the rows past the end. v_at: the stage of V lent for it, if one is."""
        c = self.config
        t.softmax.finish(t.O)
        if cutlass.const_expr(LSE is not None):
            if t.thread % 4 == 0:
                for r in cutlass.range_constexpr(2):
                    row = (block + t.index) * ROWS + wgmma.row_in_tile(t.thread, r)
                    if row < t.mask.seqlen_q:
                        LSE[batch, head, row] = t.softmax.m[r]
        stage = 0
        if cutlass.const_expr(c.o_borrows_v):
            t.v_ring.consumer_wait(v_at)
            stage = v_at.index
        output.write(t.O, stage, block + t.index, head, batch, t.index, t.thread)

    @cute.jit
    def return_v(self, t: Consumer, output, v_at):
        """Gives back the stage of V that O went through, if one was lent; returns the next place."""
        if cutlass.const_expr(self.config.o_borrows_v):
            output.finish()
            t.v_ring.consumer_release(v_at)
            v_at.advance()
        return v_at
