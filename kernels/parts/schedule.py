"""Tile schedules: in which order the tiles of queries are worked off, and by which CTA.

Tiles of one head share its K and V, so heads are taken in groups whose K and V fit the L2 cache together; inside a
group, causal masks take the longest tiles (the last rows) of all its heads first.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32


@dataclass(frozen=True)
class TileSchedule:
    """Walks the tiles of one CTA. persistent: CTA c of C takes one tile of every C, else only tile c.

    head_group: heads (of all batches, flattened) that are worked on together; the last group may be smaller.
    longest_first: query tiles in falling order, and every second round of the CTAs reversed, so that each CTA's list
    adds up to about the same.
    """

    persistent: Constexpr[bool]
    longest_first: Constexpr[bool]
    query_tiles: Int32
    heads: Int32
    batch: Int32
    head_group: Int32

    @cute.jit
    def rounds(self):
        """How many tiles this CTA has."""
        count = Int32(1)
        if cutlass.const_expr(self.persistent):
            ctas = cute.arch.grid_dim()[0]
            tiles = self.query_tiles * self.heads * self.batch
            full = tiles // ctas
            count = full + (1 if self.position(full) < tiles else 0)
        return count

    @cute.jit
    def position(self, round):
        """The place in the list of all tiles that this CTA takes in its round number `round`."""
        cta, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        if cutlass.const_expr(self.longest_first and self.persistent):
            cta = ctas - 1 - cta if round % 2 == 1 else cta
        return round * ctas + cta

    @cute.jit
    def tile(self, round):
        """(query tile, head, batch) of this CTA's round."""
        position = self.position(round)
        group_tiles = self.query_tiles * self.head_group
        group, within = position // group_tiles, position % group_tiles
        first_head = group * self.head_group
        heads_here = min(self.head_group, self.heads * self.batch - first_head)
        query_tile, head = within // heads_here, first_head + within % heads_here
        if cutlass.const_expr(self.longest_first):
            query_tile = self.query_tiles - 1 - query_tile
        return query_tile, head % self.heads, head // self.heads
