"""Sums over CTAs, in fp32 in global memory: how a warpgroup's accumulator is added to what others have added.

A sum lies there as the accumulators' registers do, so that nothing has to be brought into another order on the way: for each
tile, for each of its warps, 16 bytes of each lane in turn. Who reads it (dq.py) has the same registers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64

from . import tiles, wgmma
from .barriers import WARP
from .output import WARPS
from .schedule import TileList

COUNTS = 4  # numbers that `count` points to
FINISHED = 2  # the place of the first of them that Finished has
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
    address = sums.iterator.toint() + Int64(number) * (elements * 4)  # as a number: a pointer would lose its alignment
    return cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=16)


def counts_of(dQ):
    """(heads, batch): a place for COUNTS int32 numbers a head, where the first row of its dQ will be: nobody writes that before DqKernel."""
    stride = (dQ.stride[2], dQ.stride[3])
    return cute.make_tensor(dQ.iterator, cute.make_layout((dQ.shape[2], dQ.shape[3]), stride=stride))


def count(counts, head, batch):
    """A pointer to a head's, in that order: how many have made zeros for its group of heads, where it is the first of that; how many tiles
    of keys are claimed, where it is the first of all; and of its group, how many CTAs have added all that a tile of keys adds, and how many
    of DqKernel know that all have.
    """
    return cute.recast_ptr(counts[None, batch].iterator + Int64(head) * counts.stride[0], dtype=Int32)


@dataclass(frozen=True)
class Zeros:
    """Zeros that the sums begin with, made shortly before they are needed: they are still in the L2 cache then.

    They are counted by groups of K/V heads that are worked on together. DeltaKernel makes those of the first 2 * `ahead` groups' queries,
    and of the last group's. The others are made by the CTAs that have the tiles of keys of the group `ahead` before, each a part. The first
    `ahead` groups have all the tiles that CTAs begin with: the others are claimed, so that those who make zeros are running. And a tile's
    zeros are made by tiles before it in the list, so nobody waits for somebody who waits for him; where CTAs also wait for turns, as long
    as zeros are made first.
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
        own = cute.make_tensor(self.page.iterator + cute.arch.lane_idx() * (PAGE // WARP), PAGE // WARP)
        own.fill(0.0)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()

    @cute.jit
    def make(self, position):
        """A warp: the part that goes with a tile of keys."""
        t = self.tiles
        group, part = t.in_group(position)
        group += self.ahead
        if self.by_ctas(group):
            of_head = self.queries_per_kv * (self.sums.shape[2] // PAGE)
            pages = of_head * t.group_heads.divisor
            of_part = cute.ceil_div(pages, t.group_tiles.divisor)
            first = part * of_part
            target = self.sums.iterator + Int64(group * t.group_heads.divisor) * of_head * PAGE
            for i in cutlass.range(first + cute.arch.lane_idx(), min(first + of_part, pages), WARP, unroll=1):
                store_bulk((target + Int64(i) * PAGE).toint(), self.page.iterator, PAGE)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0)
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                count_up(self.count_of(group))  # after what the other lanes have stored, too

    @cute.jit
    def await_those_of(self, position):
        """A warp: waits until what a tile of keys adds can be added."""
        group, _ = self.tiles.in_group(position)
        if self.by_ctas(group):
            if cute.arch.lane_idx() == 0:
                await_count(self.count_of(group), self.tiles.group_tiles.divisor)
            cute.arch.sync_warp()

    @cute.jit
    def by_ctas(self, group):
        """Whether CTAs make the zeros of a group, and not DeltaKernel."""
        return group >= 2 * self.ahead and group < self.tiles.last_group

    def count_of(self, group):
        return count_of_group(self.counts, self.tiles, group, self.queries_per_kv).toint()


@dataclass(frozen=True)
class Turns:
    """Who adds to a tile when, where the order is fixed: kept by a warp of its own, so that the others wait for shared memory only."""

    counts: cute.Tensor  # (batch, heads, tiles · parts) int32, zeros at first: how many have added
    granted: cute.Pointer  # mbarriers: it is this CTA's turn, which one warp or two say, and its warps have added
    added: cute.Pointer
    parts: Constexpr[int]  # of a tile that are counted, each the part of one CTA of a cluster
    part: Int32  # which this CTA has

    @cute.jit
    def take(self, tile, turn, known, following, phase):
        """A warp: has what the CTA computes next added to a tile, once `turn` others have added to it.

        known: whether they have, as found out before. Returns whether so many as `following` have added to the tile after it: the answer
        is on its way while this CTA adds.
        """
        seen = Int32(-1)
        if cute.arch.lane_idx() == 0:
            count = self.place(tile)
            if not known:
                await_count(count, turn)
            cute.arch.mbarrier_arrive(self.granted)
            seen = glance(count + 4 * self.parts if following >= 0 else count)
            cute.arch.mbarrier_wait(self.added, phase)
            # what other threads have added comes before, as they arrived at `added`; and what `seen` tells of comes before what follows
            cute.arch.fence_acq_rel_gpu()
            cute.arch.inline_ptx("red.relaxed.gpu.global.add.s32 [{$r0}], 1;", read_only_args=[count])
        cute.arch.sync_warp()
        return seen == following

    @cute.jit
    def begin(self):
        """The warp that passes turns on, before anything else: as far as it goes, the CTA may add to its first tile."""
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(self.granted)
        cute.arch.sync_warp()

    @cute.jit
    def grant(self, tile, turn, phase):
        """A warp, in place of `take`: has what the CTA computes next added to a tile, once `turn` others have added to it. Another warp must
        `pass_on` each of these turns.
        """
        if cute.arch.lane_idx() == 0:
            await_count(self.place(tile), turn)
            cute.arch.mbarrier_wait(self.added, phase ^ 1)  # to the tile before: or this would count for that one's turn
            cute.arch.mbarrier_arrive(self.granted)
        cute.arch.sync_warp()

    @cute.jit
    def pass_on(self, tile, phase):
        """A warp: once the CTA has added to a tile, it is the next one's turn."""
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_wait(self.added, phase)
            cute.arch.mbarrier_arrive(self.granted)  # the tile after it, as far as this warp goes: so it isn't left behind
            count_up(self.place(tile))
        cute.arch.sync_warp()

    def place(self, tile):
        """The address of a tile's count, or of its part that this CTA adds to."""
        return self.counts.iterator.toint() + (Int64(tile) * self.parts + self.part) * 4

    def tile(self, m, head, batch):
        """The number that `take` knows tile m of a head by."""
        return number_of(self.counts, self.parts, m, head, batch)


@dataclass(frozen=True)
class Adder:
    """Adds accumulators straight from registers, a warp its part on its own."""

    sums: cute.Tensor  # (batch, heads, elements of all tiles) fp32
    turns: Turns | None  # where they add in order
    elements: Constexpr[int]  # of a tile
    size: Constexpr[int]  # of a thread's accumulator

    def place(self, tile, part, thread):
        """The address in global memory of what a thread adds to a part of a tile, by that one's number among all; parts and tiles follow."""
        warp = part * WARPS + cute.arch.make_warp_uniform(thread // WARP)
        return by_vectors(tile_of(self.sums, tile, self.elements), warp, self.size)[None, None, thread % WARP].iterator.toint()

    @property
    def tile_bytes(self):
        return 4 * self.elements

    @cute.jit
    def add(self, acc: cute.Tensor, address, phase, part: Constexpr[int] = 0):
        """To a `place`, or to that of so many parts later. phase: of the turns' mbarriers."""
        if cutlass.const_expr(self.turns is not None):
            cute.arch.mbarrier_wait(self.turns.granted, phase)
        for j in cutlass.range_constexpr(self.size // VECTOR):
            offset = 4 * WARP * (part * WARPS * self.size + VECTOR * j)
            add_vector(address, offset, [wgmma.flat(acc)[VECTOR * j + i] for i in range(VECTOR)])
        if cutlass.const_expr(self.turns is not None):
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(self.turns.added)


@dataclass(frozen=True)
class Finished:
    """Tells DqKernel's CTAs, which may start while the last ones of BackwardKernel run, for which groups of K/V heads dQ's sums are complete."""

    counts: cute.Tensor  # as counts_of has it, zeros at first
    tiles: TileList  # of keys
    queries_per_kv: Int32
    ctas: Constexpr[int]  # that have a tile of keys together

    @cute.jit
    def group_of(self, head_kv, batch):
        group, _ = divmod(batch * self.tiles.heads.divisor + head_kv, self.tiles.group_heads)
        return min(group, self.tiles.last_group)

    def place(self, group):
        return count_of_group(self.counts, self.tiles, group, self.queries_per_kv).toint() + 4 * FINISHED

    def count(self, head_kv, batch):
        """One thread: a CTA's tile of keys has been added; what other threads have added comes before, if they have met this one since."""
        count_up(self.place(self.group_of(head_kv, batch)))

    @cute.jit
    def await_all(self, group, query_tiles):
        """One thread: waits for a group. Returns whether it is the last that knows, of the CTAs that have query_tiles tiles for each K/V head:
        nobody reads the group's counts any more.
        """
        heads = self.tiles.group_heads.divisor if group < self.tiles.last_group else self.tiles.last_heads.divisor
        place = self.place(group)
        await_count(place, heads * self.tiles.query_tiles * self.ctas)
        before = cute.arch.inline_ptx(
            "atom.acq_rel.gpu.global.add.s32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[place + 4]
        )
        return Int32(before + 1 == heads * query_tiles)


def count_of_group(counts, tiles, group, queries_per_kv):
    """As `count`, for a group of the list's K/V heads."""
    batch, head_kv = divmod(group * tiles.group_heads.divisor, tiles.heads)
    return count(counts, head_kv * queries_per_kv, batch)


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


def glance(address):
    """A counter's value by now. A fence must follow before what is known by it is used."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address]
    )


def count_up(address):
    """Adds 1 to a counter in global memory, after all that this thread has written."""
    cute.arch.inline_ptx("red.release.gpu.global.add.s32 [{$r0}], 1;", read_only_args=[address])


def add_vector(address, offset, numbers):
    """Adds 4 fp32 numbers to 16 bytes of global memory, at an address that needs no registers but that of the first of many."""
    cute.arch.inline_ptx(
        f"red.relaxed.gpu.global.add.v4.f32 [{{$r0}} + {offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
        read_only_args=[address, *numbers],
    )


def store_bulk(target, source, count):
    """One lane: TMA stores so many fp32 numbers of shared memory to an address of global memory, and the L2 cache keeps them."""
    cute.arch.inline_ptx(
        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [{$r0}], [{$r1}], {$r2}, {$r3};",
        read_only_args=[target, Int32(source.toint()), Int32(4 * count), Int64(tiles.EVICT_LAST)],
    )
