"""What the backward needs to know of each query beforehand: delta = rowsum(dO ∘ O), and its LSE in powers of 2.

delta: FlashAttention-2 (arXiv 2307.08691), section 3.1, where it is called D.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from . import accumulate, wgmma
from .barriers import WARP
from .schedule import Divisor, TileList
from .softmax import LOG2_E

VECTOR = 8  # fp16 or bf16 numbers that a thread loads at a time
WARP_VECTOR = 4  # where it has few registers


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
    def make(self, m, head, batch, thread, threads: Constexpr[int]):
        """So many threads: those of tile m of a head, with all loads in flight at once."""
        rows, lanes = self.at_a_time(threads), self.lanes
        own_rows = [m * self.tile_m + i * rows + thread // lanes for i in range(self.tile_m // rows)]
        o, do = ([self.loaded(x, row, head, batch, thread % lanes) for row in own_rows] for x in (self.O, self.dO))
        lse = self.lse(m * self.tile_m + thread % self.tile_m, head, batch)
        for i in cutlass.range_constexpr(len(own_rows)):
            self.store_delta(own_rows[i], head, batch, o[i], do[i], thread % lanes)
        if thread < self.tile_m:
            self.store_lse(m * self.tile_m + thread, head, batch, lse)

    @cute.jit
    def make_by_warp(self, first_row, head, batch):
        """One warp that has few registers: of as many rows as it has lanes, each a row, whose other parts the L1 cache has when one is there."""
        row, own = first_row + cute.arch.lane_idx(), Float32(0.0)
        self.store_lse(row, head, batch, self.lse(row, head, batch))
        self.delta[batch, head, wgmma.place_of_column(row)] = Float32(0.0)  # which it stays past the end:
        row = min(row, self.O.shape[0] - 1)  # these lanes store the last row's, as it does, too (not to store takes more registers)
        target = self.delta[batch, head, None].iterator + wgmma.place_of_column(row)
        o_at, do_at = (self.place(x, row, head, batch, 0) for x in (self.O, self.dO))
        for _ in cutlass.range(self.O.shape[1] // WARP_VECTOR, unroll=1):
            own = self.added(own, *(self.loaded_from(at, WARP_VECTOR) for at in (o_at, do_at)))
            o_at += 2 * WARP_VECTOR
            do_at += 2 * WARP_VECTOR
        cute.make_tensor(target, 1)[0] = own

    @property
    def lanes(self):
        """Threads that have a row together."""
        return self.O.shape[1] // VECTOR

    def at_a_time(self, threads):
        """Rows, for so many threads."""
        return threads // self.lanes

    @cute.jit
    def lse(self, row, head, batch):
        """To base 2; of the last row in place of those past the end, so that nothing keeps loads from being in flight."""
        return self.LSE[batch, head, min(row, self.O.shape[0] - 1)] * Float32(LOG2_E)

    @cute.jit
    def store_lse(self, row, head, batch, lse):
        # exp2(S - inf) is 0: for rows past the end, and for those that see nothing
        place = wgmma.place_of_column(row)
        self.lse_log2[batch, head, place] = lse if row < self.O.shape[0] and lse != -Float32.inf else Float32.inf

    @cute.jit
    def store_delta(self, row, head, batch, o: cute.Tensor, do: cute.Tensor, lane):
        own = cute.arch.warp_reduction_sum(self.added(Float32(0.0), o, do), threads_in_group=self.lanes)
        if lane == 0:
            self.delta[batch, head, wgmma.place_of_column(row)] = own if row < self.O.shape[0] else Float32(0.0)

    def added(self, number, o: cute.Tensor, do: cute.Tensor):
        for j in range(cute.size(o)):
            number += o[j].to(Float32) * do[j].to(Float32)
        return number

    def loaded(self, x: cute.Tensor, row, head, batch, lane):
        """A thread's part of a row, in registers; of the last row in place of those past the end."""
        return self.loaded_from(self.place(x, row, head, batch, lane), VECTOR)

    @cute.jit
    def place(self, x: cute.Tensor, row, head, batch, lane):
        """The address of that."""
        of_row = x[min(row, x.shape[0] - 1), None, head, batch]
        return cute.zipped_divide(of_row, (VECTOR,))[None, lane].iterator.toint()

    @cute.jit
    def loaded_from(self, address, count: Constexpr[int]):
        fragment = cute.make_rmem_tensor(count, self.O.element_type)
        pointer = cute.make_ptr(self.O.element_type, address, cute.AddressSpace.gmem, assumed_align=2 * count)
        cute.autovec_copy(cute.make_tensor(pointer, count), fragment)
        return fragment


@dataclass(frozen=True)
class DeltaAhead:
    """Has them made by CTAs that have tiles of keys, with each tile a part of what a group `ahead` further needs, as accumulate.Zeros has
    zeros: for what DeltaKernel would wait for memory for is done beside WGMMAs.
    """

    rows: DeltaRows
    counts: cute.Tensor  # as accumulate.counts_of has it, zeros at first
    tiles: TileList  # of keys
    ahead: Int32
    first: Int32  # group for which they are, as far as the last one, which is DeltaKernel's again
    queries_per_kv: Int32
    warp_rows: Divisor  # a head's queries, in whole tiles, by so many as a warp has lanes
    heads: Divisor  # of queries, of one batch

    @cute.jit
    def make(self, position):
        """A warp: the part that goes with a tile of keys."""
        t = self.tiles
        group, part = t.in_group(position)
        group += self.ahead
        if self.by_ctas(group):
            heads = self.queries_per_kv * t.group_heads.divisor
            of_group = self.warp_rows.divisor * heads
            of_part = cute.ceil_div(of_group, t.group_tiles.divisor)
            for i in cutlass.range(part * of_part, min((part + 1) * of_part, of_group), unroll=1):
                head, number = divmod(i, self.warp_rows)  # in one loop, so that no addresses are kept
                batch, head = divmod(group * heads + head, self.heads)
                self.rows.make_by_warp(number * WARP, head, batch)
            cute.arch.fence_proxy("async.global")  # they are read by bulk copies
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                accumulate.count_up(self.count_of(group))

    @cute.jit
    def await_those_of(self, position):
        """A warp: waits until those that a tile of keys needs are there, if there is one."""
        group, _ = self.tiles.in_group(position)
        if self.by_ctas(group):
            if cute.arch.lane_idx() == 0:
                accumulate.await_count(self.count_of(group), self.tiles.group_tiles.divisor)
            cute.arch.sync_warp()

    @cute.jit
    def by_ctas(self, group):
        return group >= self.first and group < self.tiles.last_group

    def count_of(self, group):
        return accumulate.count_of_group(self.counts, self.tiles, group, self.queries_per_kv).toint() + 4 * accumulate.DELTAS

