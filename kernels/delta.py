"""What the backward needs beforehand: delta = rowsum(dO ∘ O) and the LSE in powers of 2, a number for each query, and dQ's zeros.

delta: FlashAttention-2 (arXiv 2307.08691), section 3.1, where it is called D.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32

from .configs import WARPGROUP, BackwardConfig
from .parts.softmax import LOG2_E

VECTOR = 8  # fp16 or bf16 numbers that a thread loads at a time
FP32_VECTOR = 4
TOGETHER = 8  # rows that a thread has a part of and loads together


@dataclass(frozen=True)
class Preparation:
    """What is read and written; O, dO: (seqlen_q, head_dim, heads, batch), the others as BackwardKernel has them."""

    config: Constexpr[BackwardConfig]
    O: cute.Tensor
    dO: cute.Tensor
    LSE: cute.Tensor
    dq_accum: cute.Tensor
    lse_log2: cute.Tensor
    delta: cute.Tensor

    def of_tiles(self, places, thread):
        """One warpgroup: of each place (m, head, batch, whether it exists) the tile_m queries, and the rows past the end that it has.

        The rows that come next are loaded before those at hand are summed up, whether they exist or not.
        """
        c = self.config
        rows = WARPGROUP // self.lanes  # at a time
        steps = [(place, start) for place in places for start in range(0, c.tile_m // rows, TOGETHER)]
        loaded = [self.load(*step, thread) for step in steps[:1]]
        for i, (place, start) in enumerate(steps):
            if i + 1 < len(steps):
                loaded.append(self.load(*steps[i + 1], thread))
            self.sum_up(place, start, loaded[i], thread)

    @property
    def lanes(self):
        """Threads that share a row."""
        return self.config.head_dim // VECTOR

    def rows(self, m, start, thread):
        """Those that a thread has a part of, of the `start`th and the following times that the warpgroup takes rows of tile m."""
        c, at_a_time = self.config, WARPGROUP // self.lanes
        stop = min(start + TOGETHER, c.tile_m // at_a_time)
        return [m * c.tile_m + i * at_a_time + thread // self.lanes for i in range(start, stop)]

    @cute.jit
    def load(self, place, start: Constexpr[int], thread):
        """(LSE, O, dO) for each row. In place of rows past the end the last one's, which will not be used."""
        m, head, batch, _ = place
        inside = [min(row, self.O.shape[0] - 1) for row in self.rows(m, start, thread)]
        parts = [[self.part(x[row, None, head, batch], thread % self.lanes) for x in (self.O, self.dO)] for row in inside]
        return [(self.LSE[batch, head, row], *of_row) for row, of_row in zip(inside, parts)]

    @cute.jit
    def sum_up(self, place, start: Constexpr[int], loaded, thread):
        """Writes LSE and delta of the rows, and dQ's zeros."""
        c = self.config
        m, head, batch, exists = place
        for row, (lse, o, do) in zip(self.rows(m, start, thread), loaded):
            own = Float32(0.0)
            for j in [*range(VECTOR)]:
                own += o[j].to(Float32) * do[j].to(Float32)
            own = cute.arch.warp_reduction_sum(own, threads_in_group=self.lanes)
            inside = row < self.O.shape[0]
            if exists and thread % self.lanes == 0:
                # exp2(S - inf) is 0: for rows past the end, and for those that see nothing
                self.lse_log2[batch, head, row] = lse * Float32(LOG2_E) if inside and lse != -Float32.inf else Float32.inf
                self.delta[batch, head, row] = own if inside else Float32(0.0)
        vectors = len(loaded) * VECTOR // FP32_VECTOR  # a thread's
        if exists:
            zeros = cute.make_rmem_tensor(FP32_VECTOR, Float32)
            zeros.fill(0.0)
            accum = cute.zipped_divide(self.dq_accum[batch, head, None], (FP32_VECTOR,))
            first = m * (c.tile_m * c.head_dim // FP32_VECTOR) + start * (WARPGROUP * VECTOR // FP32_VECTOR)
            for i in cutlass.range_constexpr(vectors):
                cute.autovec_copy(zeros, accum[None, first + i * WARPGROUP + thread])

    @cute.jit
    def part(self, row: cute.Tensor, lane):
        """A thread's part of a row, in registers."""
        fragment = cute.make_rmem_tensor(VECTOR, row.element_type)
        cute.autovec_copy(cute.zipped_divide(row, (VECTOR,))[None, lane], fragment)
        return fragment
