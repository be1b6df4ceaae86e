"""What the backward needs to know of each query beforehand: delta = rowsum(dO ∘ O), and its LSE in powers of 2.

delta: FlashAttention-2 (arXiv 2307.08691), section 3.1, where it is called D.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from ..configs import WARPGROUP
from . import accumulate, wgmma
from .schedule import Divisor, TileList
from .softmax import LOG2_E

VECTOR = 8  # fp16 or bf16 numbers that a thread loads at a time
AT_MOST = 4  # rows that a thread of dQ's warpgroup loads at a time: more take more registers than it has


@dataclass(frozen=True)
class DeltaRows:
    """Makes them, a tile of queries at a time."""

    O: cute.Tensor  # (seqlen_q, head_dim, heads, batch)
    dO: cute.Tensor
    LSE: cute.Tensor  # (batch, heads, seqlen_q) fp32, natural log
    lse_log2: cute.Tensor  # (batch, heads, rows) fp32, rows being seqlen_q in whole tiles: what is made
    delta: cute.Tensor
    tile_m: Constexpr[int]

    @cute.jit
    def make(self, m, head, batch, thread, threads: Constexpr[int], at_most: Constexpr[int]):
        """So many threads: those of tile m of a head. at_most: of how many rows a thread has loads in flight."""
        lanes = self.O.shape[1] // VECTOR  # of a row
        rows = threads // lanes  # at a time
        turns, seqlen = self.tile_m // rows, self.O.shape[0]
        at_once = max(n for n in range(1, at_most + 1) if turns % n == 0)
        lse_log2, delta = (x[batch, head, None] for x in (self.lse_log2, self.delta))
        # a row past the end reads the last one, so that nothing keeps all the loads from being in flight at once
        lse = self.LSE[batch, head, min(m * self.tile_m + thread % self.tile_m, seqlen - 1)] * Float32(LOG2_E)
        of_head = [cute.zipped_divide(x[None, None, head, batch], (1, VECTOR)) for x in (self.O, self.dO)]
        for start in cutlass.range_constexpr(0, turns, at_once):
            own_rows = [m * self.tile_m + i * rows + thread // lanes for i in range(start, start + at_once)]
            read = [min(row, seqlen - 1) for row in own_rows]
            o, do = ([self.loaded(x[None, (row, thread % lanes)]) for row in read] for x in of_head)
            for i in cutlass.range_constexpr(at_once):
                own = Float32(0.0)
                for j in cutlass.range_constexpr(VECTOR):
                    own += o[i][j].to(Float32) * do[i][j].to(Float32)
                own = cute.arch.warp_reduction_sum(own, threads_in_group=lanes)
                if thread % lanes == 0:
                    delta[wgmma.place_of_column(own_rows[i])] = own if own_rows[i] < seqlen else Float32(0.0)
        if thread < self.tile_m:
            row = m * self.tile_m + thread
            # exp2(S - inf) is 0: for rows past the end, and for those that see nothing
            lse_log2[wgmma.place_of_column(row)] = lse if row < seqlen and lse != -Float32.inf else Float32.inf

    @cute.jit
    def loaded(self, part: cute.Tensor):
        """A thread's part of a row, in registers."""
        fragment = cute.make_rmem_tensor(VECTOR, part.element_type)
        cute.autovec_copy(part, cute.make_tensor(fragment.iterator, part.shape))
        return fragment


@dataclass(frozen=True)
class DeltaAhead:
    """Has them made by CTAs that have tiles of keys, with each tile a part of what a group `ahead` further needs, as accumulate.Zeros has
    zeros: what DeltaKernel would wait for memory for is done beside WGMMAs.
    """

    rows: DeltaRows
    counts: cute.Tensor  # as accumulate.counts_of has it, zeros at first
    tiles: TileList  # of keys
    ahead: Int32
    queries_per_kv: Int32
    query_tiles: Divisor  # of a head
    heads: Divisor  # of queries, of one batch
    ctas: Constexpr[int]  # that have a tile of keys together

    @cute.jit
    def make(self, position, rank, thread, barrier_id: Constexpr[int]):
        """A warpgroup of a cluster's CTA `rank`: the part that goes with a tile of keys."""
        t = self.tiles
        group, part = t.in_group(position)
        group += self.ahead
        if accumulate.made_by_ctas(t, self.ahead, group):
            heads = self.queries_per_kv * t.group_heads.divisor
            of_group = self.query_tiles.divisor * heads
            of_part = cute.ceil_div(of_group, t.group_tiles.divisor * self.ctas)
            first = (part * self.ctas + rank) * of_part
            for i in cutlass.range(first, min(first + of_part, of_group), unroll=1):
                head, m = divmod(i, self.query_tiles)
                batch, head = divmod(group * heads + head, self.heads)
                self.rows.make(m, head, batch, thread, WARPGROUP, AT_MOST)
            cute.arch.fence_proxy("async.global")  # they are read by bulk copies
            cute.arch.barrier(barrier_id=barrier_id, number_of_threads=WARPGROUP)
            if thread == 0:
                accumulate.count_up(self.count_of(group))

    @cute.jit
    def await_those_of(self, position):
        """A warp: waits until those that a tile of keys needs are there, if there is one."""
        group, _ = self.tiles.in_group(position)
        if accumulate.made_by_ctas(self.tiles, self.ahead, group):
            if cute.arch.lane_idx() == 0:
                accumulate.await_count(self.count_of(group), self.tiles.group_tiles.divisor * self.ctas)
            cute.arch.sync_warp()

    def count_of(self, group):
        return accumulate.count_of_group(self.counts, self.tiles, group, self.queries_per_kv).toint() + 4 * accumulate.DELTAS
