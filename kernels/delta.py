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

    @cute.jit
    def of_tile(self, m, head, batch, thread):
        """One warpgroup: tile_m queries of a head, and the rows past the end that their tile has."""
        c = self.config
        lanes = c.head_dim // VECTOR  # of a row
        rows = WARPGROUP // lanes  # at a time
        times = c.tile_m // rows
        for start in cutlass.range_constexpr(0, times, TOGETHER):
            row = [m * c.tile_m + (start + i) * rows + thread // lanes for i in range(min(TOGETHER, times - start))]
            inside = [min(r, self.O.shape[0] - 1) for r in row]  # rows past the end are loaded from the last one, and not used
            loaded = [[self.loaded(x[r, None, head, batch], thread % lanes) for x in (self.O, self.dO)] for r in inside]
            for r, (o, do) in zip(row, loaded):
                own = Float32(0.0)
                for j in [*range(VECTOR)]:
                    own += o[j].to(Float32) * do[j].to(Float32)
                own = cute.arch.warp_reduction_sum(own, threads_in_group=lanes)
                if thread % lanes == 0:
                    self.write(r, head, batch, own)

        vectors = c.tile_m * c.head_dim // FP32_VECTOR
        zeros = cute.make_rmem_tensor(FP32_VECTOR, Float32)
        zeros.fill(0.0)
        own = cute.zipped_divide(self.dq_accum[batch, head, None], (FP32_VECTOR,))
        for i in cutlass.range_constexpr(vectors // WARPGROUP):
            cute.autovec_copy(zeros, own[None, m * vectors + i * WARPGROUP + thread])

    @cute.jit
    def write(self, row, head, batch, delta):
        """Delta and LSE of a row. LSE is inf, so that exp2(S - inf) is 0, for rows past the end and for those that see nothing."""
        lse = Float32.inf
        if row < self.O.shape[0]:
            lse = self.LSE[batch, head, row] * Float32(LOG2_E)
            lse = Float32.inf if lse == -Float32.inf else lse
        else:
            delta = Float32(0.0)
        self.lse_log2[batch, head, row] = lse
        self.delta[batch, head, row] = delta

    @cute.jit
    def loaded(self, row: cute.Tensor, lane):
        """A thread's part of a row, in registers."""
        fragment = cute.make_rmem_tensor(VECTOR, row.element_type)
        cute.autovec_copy(cute.zipped_divide(row, (VECTOR,))[None, lane], fragment)
        return fragment
