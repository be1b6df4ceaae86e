"""Tile schedules: in which order the tiles of queries are worked off, and by which CTA.

All tiles stand in one list. Tiles of one head share its K and V, so heads are taken in groups whose K and V fit the L2
cache together; inside a group, causal masks take the longest tiles (the last rows) of all its heads first. The last group may
be larger than the others, so that the list ends with short tiles of several heads.
A CTA's first tile is the one of its own number. What follows depends on the kind:
    single      nothing: one CTA a tile, the hardware hands them out in order
    persistent  one tile of every round of the CTAs, odd rounds in reverse, so that each CTA's list adds up alike
    dynamic     the first tile that no CTA has claimed yet: one warp claims it and tells the others
Where CTAs wait for those that have tiles before theirs, first tiles must be claimed too: a CTA of a low number may not have started.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, pipeline


SLOT_BYTES = 16  # of a claimed position and its tile
Divisor = cute.FastDivmodDivisorV2  # a number that was prepared, on the host, for being divided by


@dataclass(frozen=True)
class TileList:
    """The list of all tiles, heads in groups that are worked on together. Heads of all batches are counted through."""

    longest_first: Constexpr[bool]
    longer_end: Constexpr[bool]  # whether the last group may have more heads than the others, and not only fewer
    warpgroups: Constexpr[int]
    blocks: Int32
    query_tiles: Int32
    length: Int32
    last_group: Int32
    group_tiles: Divisor
    group_heads: Divisor
    last_heads: Divisor  # in the last group
    heads: Divisor  # of one batch

    @classmethod
    def of(cls, longest_first, blocks, warpgroups, heads, batch, head_group, last_heads=None):
        """blocks: of 64 query rows, of which a tile has one for each warpgroup. last_heads: how many the last group has at least."""
        query_tiles = cute.ceil_div(blocks, warpgroups)
        longer_end = last_heads is not None
        last_group = (heads * batch - (last_heads if longer_end else 1)) // head_group
        divisors = (query_tiles * head_group, head_group, heads * batch - last_group * head_group, heads)
        length = query_tiles * heads * batch
        return cls(longest_first, longer_end, warpgroups, blocks, query_tiles, length, last_group, *map(Divisor, divisors))

    @cute.jit
    def in_group(self, position):
        """(group, position in the group) at a position of the list."""
        group, within = divmod(position, self.group_tiles)
        if self.longer_end and group > self.last_group:
            group, within = self.last_group, position - self.last_group * self.group_tiles.divisor
        return group, within

    @cute.jit
    def tile(self, position):
        """(block, head, batch) at a position of the list: the tile is the block and the ones after it, one a warpgroup.

        Tiles are counted from the last rows: if there are too few blocks, the tile of the first rows starts with negative ones,
        which don't exist. With a causal mask that is the shortest one, where idle warpgroups cost least.
        """
        group, within = self.in_group(position)
        query_tile, head = divmod(within, self.group_heads)
        if group >= self.last_group:
            query_tile, head = divmod(within, self.last_heads)
        batch, head = divmod(group * self.group_heads.divisor + head, self.heads)
        if cutlass.const_expr(not self.longest_first):
            query_tile = self.query_tiles - 1 - query_tile
        return self.blocks - (query_tile + 1) * self.warpgroups, head, batch


@dataclass(frozen=True)
class Schedule:
    """One CTA's way through the list. Positions at or past the list's length mean: done.

    ring, slots: used by dynamic only; the barriers and the shared memory through which a claimed position travels, with its tile.
    counter: dynamic only; in global memory, the positions claimed so far and the CTAs that are done, both zero at launch.
        Not touched where every tile is some CTA's first (Plan.counted).
    """

    kind: Constexpr[str]
    tiles: TileList
    ring: pipeline.PipelineAsync | None
    slots: cute.Tensor | None
    counter: cute.Tensor | None
    cluster: Constexpr[int] = 1  # CTAs that have a tile together
    first_claimed: Constexpr[bool] = False  # dynamic only: a CTA's first tile is claimed as the others are; it may get none
    ready: cute.Pointer | None = None  # dynamic in clusters: mbarriers by stage, in the first CTA: the other one can be told of a position

    @cute.jit
    def begin(self, at):
        """The others: as `hear`, for the position that the CTA begins with."""
        position = self.first()
        if cutlass.const_expr(self.first_claimed):
            position, place, at = self.hear(position, at)
        else:
            place = self.tiles.tile(position)
        return position, place, at

    def first(self):
        return cute.arch.block_idx()[0] // self.cluster if self.cluster > 1 else cute.arch.block_idx()[0]

    @cute.jit
    def following(self, position):
        """The position after this one, for the kinds that need no telling."""
        ctas = cute.arch.grid_dim()[0]
        if cutlass.const_expr(self.kind == "single"):
            following = self.tiles.length
        else:
            following = (position // ctas + 1) * ctas + (ctas - 1 - position % ctas)
        return following

    @cute.jit
    def claim(self):
        """One warp of the CTA: asks for a position; `claimed` waits for the answer, which takes a round trip to the L2.

        An increment up to a bound that is never met, and not an addition: of that ptxas makes a vote, an atomic and a
        shuffle that waits for it at once.
        """
        ticket = Int32(0)
        if cutlass.const_expr(self.kind == "dynamic"):
            ticket = cute.arch.inline_ptx(
                "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], 0x7fffffff;",
                write_only_types=[Int32],
                read_only_args=[self.counter.iterator.toint()],
                predicate=self.counted() and cute.arch.lane_idx() == 0,
            )
        return ticket

    @cute.jit
    def claimed(self, ticket, position):
        """The same warp: the position after this one, from what `claim` returned, and its (block, head, batch)."""
        if cutlass.const_expr(self.kind == "dynamic"):
            following = self.tiles.length
            if self.counted():
                following = cute.arch.shuffle_sync(ticket, 0)
                if cutlass.const_expr(not self.first_claimed):
                    following += self.ctas()
        else:
            following = self.following(position)
        return following, self.tiles.tile(following)

    def ctas(self):
        """CTAs, or clusters, of the grid."""
        return cute.arch.grid_dim()[0] // self.cluster if self.cluster > 1 else cute.arch.grid_dim()[0]

    def counted(self):
        """Whether positions are claimed at all: not where every tile is some CTA's first."""
        return Boolean(True) if self.first_claimed else self.tiles.length > self.ctas()

    @cute.jit
    def tell(self, position, place, at):
        """The same warp: hands the others a claimed position; returns the next place in the ring."""
        if cutlass.const_expr(self.kind == "dynamic"):
            self.ring.producer_acquire(at)
            if cute.arch.lane_idx() == 0:
                numbers = position, *place
                for i, number in enumerate(numbers):
                    self.slots[i, at.index] = number
                self.ring.producer_commit(at)
                if cutlass.const_expr(self.cluster == 2):
                    cute.arch.mbarrier_wait(self.ready + at.index, at.phase ^ 1)
                    cute.arch.store_async_dsmem(self.slot(at), numbers, self.full(at), 1)
            at.advance()
        return at

    @cute.jit
    def be_told(self, at):
        """In place of `claim`, `claimed` and `tell` in a cluster's second CTA: the position that the first one claims, and the next place."""
        self.ring.producer_acquire(at)
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(at), SLOT_BYTES)
            cute.arch.mbarrier_arrive(self.ready + at.index, 0)
        cute.arch.mbarrier_wait(self.full(at), at.phase ^ 1)
        position = self.slots[0, at.index]
        at.advance()
        return position, at

    def slot(self, at):
        return self.slots[None, at.index].iterator

    def full(self, at):
        return self.ring.sync_object_full.get_barrier(at.index)

    @cute.jit
    def hear(self, position, at):
        """The others: the position after this one, its (block, head, batch), and the next place in the ring."""
        if cutlass.const_expr(self.kind == "dynamic"):
            self.ring.consumer_wait(at)
            heard = cute.make_rmem_tensor(4, Int32)
            cute.autovec_copy(self.slots[None, at.index], heard)
            following, place = heard[0], (heard[1], heard[2], heard[3])
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                self.ring.consumer_release(at)
            at.advance()
        else:
            following = self.following(position)
            place = self.tiles.tile(following)
        return following, place, at

    @cute.jit
    def finish(self):
        """The claiming warp, at the end: the last CTA to get here leaves the counter as it found it, zero."""
        if cutlass.const_expr(self.kind == "dynamic"):
            if self.counted() and cute.arch.lane_idx() == 0:
                cute.arch.fence_acq_rel_gpu()
                done = cute.arch.atomic_add(self.counter.iterator + 1, Int32(1), sem="relaxed", scope="gpu")
                if done == cute.arch.grid_dim()[0] - 1:
                    cute.arch.fence_acq_rel_gpu()
                    self.counter[0] = Int32(0)
                    self.counter[1] = Int32(0)
