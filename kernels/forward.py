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
from .parts.barriers import WARP, Turns
from .parts.mask import RightMask
from .parts.output import write_rows
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
        query_tiles = cute.ceil_div(Q.shape[0], c.tile_m)
        grid = query_tiles * Q.shape[2] * Q.shape[3] if c.scheduler == "single" else ctas
        copies, scale_log2 = (load_q, load_k, load_v), softmax_scale * Float32(LOG2_E)
        self.kernel(copies, Q, K, V, O, LSE, scale_log2, head_group, counter, q_layout, k_layout).launch(
            grid=[grid, 1, 1],
            block=[c.threads, 1, 1],
            smem=c.shared_memory,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl="nopdl" not in c.knobs,
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
        copies: tuple[cute.CopyAtom, cute.CopyAtom, cute.CopyAtom],
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
        q_barriers = smem.allocate_array(cutlass.Int64, 2 * c.consumer_warpgroups)
        k_barriers = smem.allocate_array(cutlass.Int64, 2 * c.stages)
        v_barriers = smem.allocate_array(cutlass.Int64, 2 * c.stages)
        schedule_barriers = smem.allocate_array(cutlass.Int64, 2)
        slot = smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)
        sQ = smem.allocate_tensor(self.dtype, q_layout.outer, byte_alignment=1024, swizzle=q_layout.inner)
        sK = smem.allocate_tensor(self.dtype, k_layout.outer, byte_alignment=1024, swizzle=k_layout.inner)
        sV = smem.allocate_tensor(self.dtype, k_layout.outer, byte_alignment=1024, swizzle=k_layout.inner)

        consumer_warps = c.consumer_warpgroups * WARPGROUP // WARP
        q_ring = barriers.tma_ring(q_barriers, c.consumer_warpgroups, c.tile_bytes["Q"] // c.consumer_warpgroups, WARPGROUP // WARP)
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
        if cutlass.const_expr("nopdl" not in c.knobs): cute.arch.griddepcontrol_wait()  # what stands above may run while the kernel before this one on the stream ends
        if cutlass.const_expr("nopdl" not in c.knobs): cute.arch.griddepcontrol_launch_dependents()

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
            self.consume(consumer, schedule, O, LSE)

    @cute.jit
    def produce(self, schedule, mask, rings, copies, tensors, shared):
        """One warp: for each tile, Q, then K and V from the last tile to the first, in the order they are consumed."""
        c = self.config
        q_ring, k_ring, v_ring = rings
        q_at, k_at, v_at = barriers.producing(c.consumer_warpgroups), barriers.producing(c.stages), barriers.producing(c.stages)
        s_at = barriers.producing(1)
        group = tensors[0].shape[2] // tensors[1].shape[2]  # query heads of a K/V head
        position = schedule.first()
        if cutlass.const_expr(c.q_in_registers):
            q_at = self.bring_q(schedule, position, q_ring, copies[0], tensors[0], shared[0], q_at)
        while position < schedule.tiles.length():
            tile, head, batch = schedule.tiles.tile(position)
            following = schedule.claim(position)
            n_stop, n_unmasked = mask.key_tiles(tile * c.tile_m, c.tile_m)
            source_k = TmaSource.of_head(k_ring, copies[1], shared[1], tensors[1], head // group, batch)
            source_v = TmaSource.of_head(v_ring, copies[2], shared[2], tensors[2], head // group, batch)
            k_at = source_k.bring(n_stop - 1, k_at)
            if cutlass.const_expr(not c.q_in_registers):  # its place is free once the tile before has its last S
                q_at = self.bring_q(schedule, position, q_ring, copies[0], tensors[0], shared[0], q_at)
            for step in cutlass.range(n_stop - 1, unroll=1):
                n = n_stop - 2 - step
                if cutlass.const_expr(c.overlap):
                    k_at = source_k.bring(n, k_at)
                    v_at = source_v.bring(n + 1, v_at)
                else:
                    v_at = source_v.bring(n + 1, v_at)
                    k_at = source_k.bring(n, k_at)
                if cutlass.const_expr(c.q_in_registers):
                    if step == 0:
                        q_at = self.bring_q(schedule, following, q_ring, copies[0], tensors[0], shared[0], q_at)
            if cutlass.const_expr(c.q_in_registers):
                if n_stop == 1:
                    q_at = self.bring_q(schedule, following, q_ring, copies[0], tensors[0], shared[0], q_at)
            s_at = schedule.tell(following, s_at)
            v_at = source_v.bring(0, v_at)
            position = following
        schedule.finish()
        q_ring.producer_tail(q_at)
        k_ring.producer_tail(k_at)
        v_ring.producer_tail(v_at)
        if cutlass.const_expr(c.scheduler == "dynamic"):
            schedule.ring.producer_tail(s_at)

    @cute.jit
    def bring_q(self, schedule, position, ring, copy, Q, sQ, q_at):
        """Q of the tile at a position, if there is one: a stage for each warpgroup's rows."""
        if position < schedule.tiles.length():
            tile, head, batch = schedule.tiles.tile(position)
            source = TmaSource.of_head(ring, copy, sQ, Q, head, batch)
            for w in cutlass.range_constexpr(self.config.consumer_warpgroups):
                q_at = source.bring(tile * self.config.consumer_warpgroups + w, q_at)
        return q_at

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
    def consume(self, t: Consumer, schedule, O, LSE):
        """One warpgroup: for each tile of the schedule, its 64 rows of O and of LSE.

        With overlap, tiles follow each other as steps do: one's last O and the next one's first S are in flight together.
        """
        c = self.config
        q_at = barriers.consuming(c.consumer_warpgroups, t.index)
        k_at, v_at, s_at = barriers.consuming(c.stages), barriers.consuming(c.stages), barriers.consuming(1)
        t.turns.begin()
        t.O.fill(0.0)
        position = schedule.first()
        while position < schedule.tiles.length():
            tile, head, batch = schedule.tiles.tile(position)
            if not self.has_rows(t, tile):
                q_at, k_at, v_at = self.pass_over(t, tile, q_at, k_at, v_at)
                position, s_at = schedule.hear(position, s_at)
            else:
                self.load_q(t, q_at)
                t.turns.take()
                n, n_unmasked, k_at, v_at = self.start_tile(t, tile, q_at, k_at, v_at)
                t.turns.give()
                k_at = self.p_alone(t, tile, n, n_unmasked, q_at, k_at, first=True)
                going_on = True
                while going_on:
                    k_at, v_at = self.mainloop(t, tile, n, n_unmasked, q_at, k_at, v_at)
                    q_at.advance(c.consumer_warpgroups)
                    position, s_at = schedule.hear(position, s_at)
                    finished, v_last = (tile, head, batch), v_at.clone()
                    tile, head, batch = schedule.tiles.tile(position)
                    going_on = c.overlap and position < schedule.tiles.length() and self.has_rows(t, tile)
                    if going_on:
                        self.load_q(t, q_at)
                        t.v_ring.consumer_wait(v_at)
                        t.turns.take()
                        self.issue_o(t, v_at)
                        v_at.advance()
                        n, n_unmasked, k_at, v_at = self.start_tile(t, tile, q_at, k_at, v_at)
                        t.turns.give()
                        wgmma.wait(1)
                        t.v_ring.consumer_release(v_last)
                        self.epilogue(t, O, LSE, *finished)
                        k_at = self.p_alone(t, tile, n, n_unmasked, q_at, k_at, first=True)
                    else:
                        v_at = self.o_alone(t, v_at)
                        self.epilogue(t, O, LSE, *finished)

    def has_rows(self, t: Consumer, tile):
        """Whether a tile has rows for this warpgroup; the last ones may lie past the end."""
        return tile * self.config.tile_m + t.index * ROWS < t.mask.seqlen_q

    @cute.jit
    def pass_over(self, t: Consumer, tile, q_at, k_at, v_at):
        """A tile without rows for this warpgroup: takes part in what the others wait for."""
        t.q_ring.consumer_wait(q_at)
        t.q_ring.consumer_release(q_at)
        q_at.advance(self.config.consumer_warpgroups)
        n_stop, _ = t.mask.key_tiles(tile * self.config.tile_m, self.config.tile_m)
        for step in cutlass.range(n_stop, unroll=1):
            t.k_ring.consumer_wait(k_at)
            t.k_ring.consumer_release(k_at)
            k_at.advance()
            t.turns.take()
            t.turns.give()
            t.v_ring.consumer_wait(v_at)
            t.v_ring.consumer_release(v_at)
            v_at.advance()
        return q_at, k_at, v_at

    @cute.jit
    def load_q(self, t: Consumer, q_at):
        """Q into registers, if that is where the config wants it."""
        if cutlass.const_expr(self.config.q_in_registers):
            t.q_ring.consumer_wait(q_at)
            wgmma.load_operand(t.qk, t.Q, t.sQ, t.thread)
            t.q_ring.consumer_release(q_at)

    @cute.jit
    def start_tile(self, t: Consumer, tile, q_at, k_at, v_at):
        """S of the first keys that this warpgroup's rows see, in flight. Returns their tile, and the first unmasked one."""
        c = self.config
        tile_stop, _ = t.mask.key_tiles(tile * c.tile_m, c.tile_m)
        n_stop, n_unmasked = t.mask.key_tiles(tile * c.tile_m + t.index * ROWS, ROWS)
        if cutlass.const_expr(t.mask.causal):
            if n_stop < tile_stop:  # only the other warpgroups' rows see the tile's first keys
                n_stop = tile_stop - 1  # one tile at a time: V of the next one comes after this tile's own
                t.k_ring.consumer_wait(k_at)
                t.k_ring.consumer_release(k_at)
                k_at.advance()
                t.turns.give()
                t.v_ring.consumer_wait(v_at)
                t.v_ring.consumer_release(v_at)
                v_at.advance()
                t.turns.take()
        if cutlass.const_expr(not c.q_in_registers):
            t.q_ring.consumer_wait(q_at)
        t.k_ring.consumer_wait(k_at)
        self.issue_s(t, k_at)
        return n_stop - 1, n_unmasked, k_at, v_at

    @cute.jit
    def p_alone(self, t: Consumer, tile, n, n_unmasked, q_at, k_at, first: Constexpr[bool]):
        """P of key tile n, once its S is there, with nothing to overlap."""
        wgmma.wait(0)
        t.k_ring.consumer_release(k_at)
        self.release_q(t, n, q_at)
        k_at.advance()
        if n >= n_unmasked:
            t.mask.apply(t.S, tile * self.config.tile_m + t.index * ROWS, n, t.thread)
        if cutlass.const_expr(first):
            t.softmax.reset()
        t.softmax.step(t.S)
        if cutlass.const_expr(not first):
            t.softmax.rescale(t.O)
        round_into(t.P, t.S)
        return k_at

    @cute.jit
    def mainloop(self, t: Consumer, tile, n, n_unmasked, q_at, k_at, v_at):
        """From a P to the last one: key tiles from the last to the first, so that those that need masking come first."""
        first_row = tile * self.config.tile_m + t.index * ROWS
        if cutlass.const_expr(self.config.overlap):
            if cutlass.const_expr(t.mask.causal):  # else only the first tile can reach past seqlen_k
                while n > n_unmasked:
                    n -= 1
                    k_at, v_at = self.overlapped_step(t, first_row, n, q_at, k_at, v_at, masked=True)
            while n > 0:
                n -= 1
                k_at, v_at = self.overlapped_step(t, first_row, n, q_at, k_at, v_at, masked=False)
        else:
            while n > 0:
                n -= 1
                v_at = self.o_alone(t, v_at)
                t.k_ring.consumer_wait(k_at)
                t.turns.take()
                self.issue_s(t, k_at)
                t.turns.give()
                k_at = self.p_alone(t, tile, n, n_unmasked, q_at, k_at, first=False)
        return k_at, v_at

    @cute.jit
    def overlapped_step(self, t: Consumer, first_row, n, q_at, k_at, v_at, masked: Constexpr[bool]):
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
        self.release_q(t, n, q_at)
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
    def o_alone(self, t: Consumer, v_at):
        """O += P V of a tile, with nothing to overlap."""
        t.v_ring.consumer_wait(v_at)
        self.issue_o(t, v_at)
        wgmma.wait(0)
        t.v_ring.consumer_release(v_at)
        v_at.advance()
        return v_at

    @cute.jit
    def release_q(self, t: Consumer, n, q_at):
        """Lets the producer overwrite Q once the last S is there (Q in registers: as soon as it is there)."""
        if cutlass.const_expr(not self.config.q_in_registers):
            if n == 0:
                t.q_ring.consumer_release(q_at)

    def issue_s(self, t, k_at):
        """S = Q Kᵀ, in flight."""
        wgmma.issue(t.qk, t.S, t.Q, t.K[None, None, None, k_at.index], zero=True)

    def issue_o(self, t, v_at):
        """O += P V, in flight."""
        P = wgmma.as_operand(t.P, self.config.tile_n)
        wgmma.issue(t.pv, t.O, P, t.V[None, None, None, v_at.index], zero=False)

    @cute.jit
    def epilogue(self, t: Consumer, O, LSE, tile, head, batch):
        """O and LSE straight from registers to memory, but for the rows past the end; O is zero afterwards."""
        t.softmax.finish(t.O)
        first_row = tile * self.config.tile_m + t.index * ROWS
        if cutlass.const_expr(LSE is not None):
            if t.thread % 4 == 0:
                for r in cutlass.range_constexpr(2):
                    row = first_row + wgmma.row_in_tile(t.thread, r)
                    if row < O.shape[0]:
                        LSE[batch, head, row] = t.softmax.m[r]
        write_rows(t.O, O[None, None, head, batch], first_row, t.thread)
        t.O.fill(0.0)
