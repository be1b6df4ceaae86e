"""Masks: which tiles of K a tile of queries needs, which of those need masking, and the masking of one tile of S.

Both masks bound a row on the right: query i sees the keys below visible(i).
    none     visible(i) = seqlen_k
    causal   visible(i) = i + seqlen_k - seqlen_q + 1, aligned to the bottom right, as FlashAttention has it
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from . import wgmma
from .wgmma import row_of

WORD = 24  # columns of a thread whose visibility travels in one integer; under 32, so that the shift is defined


@dataclass(frozen=True)
class RightMask:
    """causal: the mask's kind, fixed at compile time. tile_m, tile_n: the tile's shape."""

    causal: Constexpr[bool]
    tile_m: Constexpr[int]
    tile_n: Constexpr[int]
    seqlen_q: Int32
    seqlen_k: Int32

    @cute.jit
    def key_tiles(self, first_row, rows: Constexpr[int]):
        """(stop, unmasked): so many rows of queries need key tiles 0..stop-1; those under `unmasked` in full.

        stop is 1 at least, for rows that see no key too: all that comes of it is masked.
        """
        stop = cute.ceil_div(self.seqlen_k, self.tile_n)
        unmasked = self.seqlen_k // self.tile_n
        if cutlass.const_expr(self.causal):
            first_visible = self.visible(first_row)
            stop = min(stop, max(1, cute.ceil_div(first_visible + rows - 1, self.tile_n)))
            # - 1: a row that sees the last key of a tile and none of the next has no maximum yet that could be presumed
            unmasked = min(unmasked, max(0, first_visible - 1) // self.tile_n)
        return stop, unmasked

    @cute.jit
    def query_tiles(self, n):
        """(first, stop): the tiles of queries that see a key of tile n; none if first isn't below stop."""
        first, stop = Int32(0), cute.ceil_div(self.seqlen_q, self.tile_m)
        if cutlass.const_expr(self.causal):
            first = max(0, n * self.tile_n - (self.seqlen_k - self.seqlen_q)) // self.tile_m
        return first, stop

    def cuts(self, m, n):
        """Whether a query of tile m doesn't see a key of tile n."""
        return self.visible(m * self.tile_m) < (n + 1) * self.tile_n

    def hides(self, m, first_key):
        """Whether no query of tile m sees this key, nor one after it."""
        return self.visible((m + 1) * self.tile_m - 1) <= first_key

    def visible(self, row):
        """The keys that query `row` sees are those below this number, which may be negative or over seqlen_k."""
        return row + (self.seqlen_k - self.seqlen_q + 1) if self.causal else self.seqlen_k

    @cute.jit
    def apply(self, S: cute.Tensor, first_row, n, thread):
        """-inf where query first_row + row_in_tile(...) does not see a key of tile n.

        A thread's columns of a row rise with the index, so a row's visibility is a count; as the low bits of a word it
        costs one bit test a score, which the compiler turns into predicates seven at a time (R2P).
        """
        s = wgmma.flat(S)
        for r in cutlass.range_constexpr(2):
            row = row_of(S, r)
            left = self.visible(first_row + wgmma.row_in_tile(thread, r)) - n * self.tile_n - 2 * (thread % 4)
            count = (left >> 3) * 2 + min(left & 7, 2)
            for w in cutlass.range_constexpr(0, len(row), WORD):
                bits = (Int32(1) << min(max(count - w, 0), WORD)) - 1
                for b in cutlass.range_constexpr(min(WORD, len(row) - w)):
                    i = row[w + b]
                    s[i] = s[i] if bits & (1 << b) else -Float32.inf

    @cute.jit
    def apply_transposed(self, S: cute.Tensor, first_key, first_query, thread):
        """`apply` for S with a row for each key, first_key + row_in_tile(...), and a column for each query.

        With a causal mask a key is hidden from the first queries, else from all or none.
        """
        s = wgmma.flat(S)
        for r in cutlass.range_constexpr(2):
            row, key = row_of(S, r), first_key + wgmma.row_in_tile(thread, r)
            if cutlass.const_expr(self.causal):
                left = key - (self.seqlen_k - self.seqlen_q) - first_query - 2 * (thread % 4)
                count = (left >> 3) * 2 + min(left & 7, 2)
                for w in cutlass.range_constexpr(0, len(row), WORD):
                    bits = (Int32(1) << min(max(count - w, 0), WORD)) - 1
                    for b in cutlass.range_constexpr(min(WORD, len(row) - w)):
                        i = row[w + b]
                        s[i] = -Float32.inf if bits & (1 << b) else s[i]
            else:
                hidden = key >= self.seqlen_k
                for i in row:
                    s[i] = -Float32.inf if hidden else s[i]
