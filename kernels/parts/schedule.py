"""Tile schedules: in which order the tiles of queries are worked off, and by which CTA.

All tiles stand in one list. Tiles of one head share its K and V, so heads are taken in groups whose K and V fit the L2
cache together; inside a group, causal masks take the longest tiles (the last rows) of all its heads first.
A CTA's first tile is the one of its own number. What follows depends on the kind:
    single      nothing: one CTA a tile, the hardware hands them out in order
    persistent  one tile of every round of the CTAs, odd rounds in reverse, so that each CTA's list adds up alike
    dynamic     the first tile that no CTA has claimed yet: one warp claims it and tells the others
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, pipeline


@dataclass(frozen=True)
class TileList:
    """The list of all tiles. head_group: heads (of all batches, flattened) that are worked on together."""

    longest_first: Constexpr[bool]
    query_tiles: Int32
    heads: Int32
    batch: Int32
    head_group: Int32

    @cute.jit
    def length(self):
        return self.query_tiles * self.heads * self.batch

    @cute.jit
    def tile(self, position):
        """(query tile, head, batch) at a position of the list."""
        group_tiles = self.query_tiles * self.head_group
        group, within = position // group_tiles, position % group_tiles
        first_head = group * self.head_group
        heads_here = min(self.head_group, self.heads * self.batch - first_head)
        query_tile, head = within // heads_here, first_head + within % heads_here
        if cutlass.const_expr(self.longest_first):
            query_tile = self.query_tiles - 1 - query_tile
        return query_tile, head % self.heads, head // self.heads


@dataclass(frozen=True)
class Schedule:
    """One CTA's way through the list. Positions at or past the list's length mean: done.

    ring, slot: dynamic only; the barriers and the shared memory through which a claimed position travels, with its tile.
    counter: dynamic only; in global memory, the positions claimed so far and the CTAs that are done, both zero at launch.
        Not touched where every tile is some CTA's first (Plan.counted).
    """

    kind: Constexpr[str]
    tiles: TileList
    ring: pipeline.PipelineAsync | None
    slot: cute.Tensor | None
    counter: cute.Tensor | None

    def first(self):
        return cute.arch.block_idx()[0]

    @cute.jit
    def following(self, position):
        """The position after this one, for the kinds that need no telling."""
        ctas = cute.arch.grid_dim()[0]
        if cutlass.const_expr(self.kind == "single"):
            following = self.tiles.length()
        else:
            following = (position // ctas + 1) * ctas + (ctas - 1 - position % ctas)
        return following

    @cute.jit
    def claim(self, position):
        """One warp of the CTA: the position after this one."""
        if cutlass.const_expr(self.kind == "dynamic"):
            claimed = Int32(0)
            if self.tiles.length() > cute.arch.grid_dim()[0]:
                if cute.arch.lane_idx() == 0:
                    claimed = cute.arch.atomic_add(self.counter.iterator, Int32(1), sem="relaxed", scope="gpu")
            following = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(claimed, 0)
        else:
            following = self.following(position)
        return following

    @cute.jit
    def tell(self, position, at):
        """The same warp: hands the others a claimed position; returns the next place in the ring."""
        if cutlass.const_expr(self.kind == "dynamic"):
            self.ring.producer_acquire(at)
            tile, head, batch = self.tiles.tile(position)
            if cute.arch.lane_idx() == 0:
                self.slot[0], self.slot[1], self.slot[2], self.slot[3] = position, tile, head, batch
                self.ring.producer_commit(at)
            at.advance()
        return at

    @cute.jit
    def hear(self, position, at):
        """The others: the position after this one, its (query tile, head, batch), and the next place in the ring."""
        if cutlass.const_expr(self.kind == "dynamic"):
            self.ring.consumer_wait(at)
            heard = cute.make_rmem_tensor(4, Int32)
            cute.autovec_copy(self.slot, heard)
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
            if self.tiles.length() > cute.arch.grid_dim()[0] and cute.arch.lane_idx() == 0:
                cute.arch.fence_acq_rel_gpu()
                done = cute.arch.atomic_add(self.counter.iterator + 1, Int32(1), sem="relaxed", scope="gpu")
                if done == cute.arch.grid_dim()[0] - 1:
                    self.counter[0] = Int32(0)
                    self.counter[1] = Int32(0)
