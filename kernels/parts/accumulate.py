"""Sums over CTAs, in fp32 in global memory: how a warpgroup's accumulator is added to what others have added.

A sum lies there as the accumulators' registers do, so that nothing has to be brought into another order on the way: for each
tile, for each of its warps, 16 bytes of each lane in turn. Who reads it (dq.py) has the same registers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64

from . import wgmma
from .barriers import WARP
from .output import WARPS
from .schedule import TileList

VECTOR = 4  # fp32 numbers that a lane moves at a time
PAGE = 128  # zeros that a lane moves at a time


def by_vectors(pointer, warp, size):
    """(4, size / 4, lane): where the lanes' numbers of a warp's accumulator, `size` a lane, lie in a tile at that pointer."""
    layout = cute.make_layout((VECTOR, size // VECTOR, WARP), stride=(1, VECTOR * WARP, VECTOR))
    return cute.make_tensor(pointer + warp * (WARP * size), layout)


def number_of(sums, elements, m, head, batch):
    """Of tile m of a head among those of all heads of all batches, which lie in that order, so many elements each."""
    return (batch * sums.shape[1] + head) * (sums.shape[2] // elements) + m


def tile_of(sums, number, elements):
    """A pointer to a tile."""
    return (sums.iterator + Int64(number) * elements).align(16)


def counts_of(dQ):
    """(heads, batch): a place for two int32 numbers a head, where the first row of its dQ will be: nobody writes that before DqKernel."""
    stride = (dQ.stride[2], dQ.stride[3])
    return cute.make_tensor(dQ.iterator, cute.make_layout((dQ.shape[2], dQ.shape[3]), stride=stride))


def count(counts, head, batch):
    """A pointer to a head's: how many have made zeros for its K/V head; and, for the first head of all, how many tiles are claimed."""
    return cute.recast_ptr(counts[None, batch].iterator + Int64(head) * counts.stride[0], dtype=Int32)


@dataclass(frozen=True)
class Zeros:
    """Zeros that the sums begin with, made shortly before they are needed: they are still in the L2 cache then.

    DeltaKernel makes those of the first `ahead` K/V heads' queries. The others are made by the CTAs that have the tiles of keys of the
    K/V head `ahead` before, each a part. `ahead` heads have at least as many tiles as there are CTAs, so no CTA begins with a tile that it
    would have to wait for; and a tile's zeros are made by tiles before it in the list, so nobody waits for somebody who waits for him.
    """

    sums: cute.Tensor  # (batch, heads, elements of all tiles) fp32
    counts: cute.Tensor  # as counts_of has it, zeros at first
    page: cute.Tensor  # (PAGE) shared memory
    tiles: TileList  # of keys
    ahead: Int32
    queries_per_kv: Int32

    @cute.jit
    def start(self):
        """The warp that makes them, before anything else."""
        own = cute.make_tensor(self.page.iterator + cute.arch.lane_idx() * VECTOR, VECTOR)
        own.fill(0.0)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()

    @cute.jit
    def make(self, position):
        """A warp: the part that goes with a tile of keys."""
        group, part = divmod(position, self.tiles.group_tiles)
        group += self.ahead
        if group * self.tiles.query_tiles < self.tiles.length:
            pages = self.queries_per_kv * (self.sums.shape[2] // PAGE)
            of_part = cute.ceil_div(pages, self.tiles.query_tiles)
            first = part * of_part
            target = self.sums.iterator + Int64(group) * pages * PAGE
            for i in cutlass.range(first + cute.arch.lane_idx(), min(first + of_part, pages), WARP, unroll=1):
                store_bulk((target + Int64(i) * PAGE).toint(), self.page.iterator, PAGE)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0)
            cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                count_up(self.count_of(group))

    @cute.jit
    def await_those_of(self, position):
        """A warp: waits until a tile of keys can be begun."""
        group, _ = divmod(position, self.tiles.group_tiles)
        if group >= self.ahead:
            if cute.arch.lane_idx() == 0:
                await_count(self.count_of(group), self.tiles.query_tiles)
            cute.arch.sync_warp()

    def count_of(self, group):
        batch, head_kv = divmod(group, self.tiles.heads)
        return count(self.counts, head_kv * self.queries_per_kv, batch).toint()


@dataclass(frozen=True)
class Adder:
    """Adds accumulators, a warp its part on its own: through shared memory, from where TMA adds it to global memory."""

    sums: cute.Tensor  # (batch, heads, elements of all tiles) fp32
    shared: cute.Tensor | None  # (elements of a tile); None where there is no room, for `add`
    turns: cute.Tensor | None  # (batch, heads, tiles · warps of one) int32 zeros: how many have added, if they do so in order
    # (2, warps of this CTA) shared memory, where they add in order: each one's next turn, and the counter it has yet to count up, or -1
    notes: cute.Tensor | None
    elements: Constexpr[int]  # of a tile
    size: Constexpr[int]  # of a thread's accumulator

    @cute.jit
    def start(self, index, thread):
        """Each warp, before anything else."""
        warp = self.warp(index, thread)
        if cutlass.const_expr(self.notes is not None):
            if cute.arch.lane_idx() == 0:
                self.notes[1, warp] = Int32(-1)

    @cute.jit
    def note(self, turn, index, thread):
        """When the next `send` may add: once so many others have added to that tile. Kept in shared memory, as registers are few."""
        warp = self.warp(index, thread)
        if cutlass.const_expr(self.notes is not None):
            if cute.arch.lane_idx() == 0:
                self.notes[0, warp] = turn

    @cute.jit
    def put(self, acc: cute.Tensor, index, thread):
        """The accumulator of warpgroup `index` into shared memory, which `send` takes it from, once it is fenced."""
        self.finish(index, thread)
        own = self.own(index, thread)[None, None, thread % WARP]
        cute.autovec_copy(cute.make_tensor(acc.iterator, own.shape), own)

    @cute.jit
    def send(self, tile, index, thread):
        """Starts the addition of what was put to a tile. A fence, and all lanes, must have come between."""
        warp, own = self.warp(index, thread), self.own(index, thread)  # by shuffles, in which all lanes must take part
        if cute.arch.lane_idx() == 0:
            if cutlass.const_expr(self.turns is not None):
                number = tile * self.warps + warp
                await_count(self.counter(number), self.notes[0, warp])
                self.notes[1, warp] = number
            target = by_vectors(tile_of(self.sums, tile, self.elements), warp, self.size)
            add_bulk(target.iterator, own.iterator, WARP * self.size)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def add(self, acc: cute.Tensor, tile, turn, index, thread):
        """The accumulator straight from registers to a tile. turn: how many others add to it before, where they do so in order."""
        warp, lane = self.warp(index, thread), thread % WARP
        counter = Int64(0)
        if cutlass.const_expr(self.turns is not None):
            counter = self.counter(tile * self.warps + warp)
            if lane == 0:
                await_count(counter, turn)
            cute.arch.sync_warp()
        target = by_vectors(tile_of(self.sums, tile, self.elements), warp, self.size)[None, None, lane]
        for j in cutlass.range_constexpr(self.size // VECTOR):
            add_vector(target[None, j].iterator, [wgmma.flat(acc)[VECTOR * j + i] for i in range(VECTOR)])
        if cutlass.const_expr(self.turns is not None):
            cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_warp()
            if lane == 0:
                count_up(counter)

    @cute.jit
    def finish(self, index, thread):
        """Waits until the shared memory that this warp adds from is free again; where they add in order, until it has been added."""
        if cutlass.const_expr(self.turns is None):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        else:
            warp = self.warp(index, thread)
            if cute.arch.lane_idx() == 0:
                cute.arch.cp_async_bulk_wait_group(0)
                number = self.notes[1, warp]
                if number >= 0:
                    count_up(self.counter(number))
                self.notes[1, warp] = Int32(-1)
        cute.arch.sync_warp()

    def tile(self, m, head, batch):
        """The number that `send` and `add` know tile m of a head by."""
        return number_of(self.sums, self.elements, m, head, batch)

    def counter(self, number):
        """Address of the count of a warp's part of a tile; those are counted through all tiles."""
        return self.turns.iterator.toint() + Int64(number) * 4

    def own(self, index, thread):
        """A warp's shared memory, as by_vectors has it."""
        return by_vectors(self.shared.iterator, self.warp(index, thread), self.size)

    def warp(self, index, thread):
        """Which of a tile's warps this is."""
        return index * WARPS + cute.arch.make_warp_uniform(thread // WARP)

    @property
    def warps(self):
        """That a tile has."""
        return self.elements // (WARP * self.size)


def await_count(address, count):
    """Waits until a counter in global memory has this value, and for what was written before it was counted up."""
    cute.arch.inline_ptx(
        """{
            .reg .pred other;
            .reg .s32 seen;
            again:
            ld.acquire.gpu.global.s32 seen, [{$r0}];
            setp.ne.s32 other, seen, {$r1};
            @other bra again;
        }""",
        read_only_args=[address, count],
    )


def count_up(address):
    """Adds 1 to a counter in global memory, after all that this thread has written."""
    cute.arch.inline_ptx("red.release.gpu.global.add.s32 [{$r0}], 1;", read_only_args=[address])


def add_vector(target, numbers):
    """Adds 4 fp32 numbers to 16 bytes of global memory."""
    cute.arch.inline_ptx(
        "red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[target.toint(), *numbers],
    )


def store_bulk(target, source, count):
    """One lane: TMA stores so many fp32 numbers of shared memory to an address of global memory."""
    cute.arch.inline_ptx(
        "cp.async.bulk.global.shared::cta.bulk_group [{$r0}], [{$r1}], {$r2};",
        read_only_args=[target, Int32(source.toint()), Int32(4 * count)],
    )


def add_bulk(target, source, count):
    """One lane: TMA adds so many fp32 numbers of shared memory to global memory."""
    cute.arch.inline_ptx(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], {$r2};",
        read_only_args=[target.toint(), Int32(source.toint()), Int32(4 * count)],
    )
