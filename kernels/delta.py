"""What the backward needs beforehand: delta = rowsum(dO ∘ O) and the LSE in powers of 2, a number for each query; dQ's first zeros,
and those of what is counted.

delta: FlashAttention-2 (arXiv 2307.08691), section 3.1, where it is called D.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .configs import BackwardConfig
from .parts import accumulate, wgmma
from .parts.schedule import TileList
from .parts.softmax import LOG2_E

THREADS = 256
VECTOR = 8  # fp16 or bf16 numbers that a thread loads at a time
FP32_VECTOR = 4


class DeltaKernel:
    """A CTA takes tile_m queries of a head, and the rows past the end that their tile has."""

    def __init__(self, config: BackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, O, dO, LSE, dq_accum, lse_log2, delta, turns, counts, zeroed, queries_per_kv, stream: cuda.CUstream):
        """O, dO: (seqlen_q, head_dim, heads, batch). counts, queries_per_kv: as accumulate.Zeros has them.

        zeroed: (stop, start): K/V heads of all batches below and from these numbers have their queries' part of dq_accum set to zero.

        The others as BackwardKernel has them.
        """
        tile_list = TileList.of(False, lse_log2.shape[2] // self.config.tile_m, 1, O.shape[2], O.shape[3], Int32(1))
        self.kernel(O, dO, LSE, dq_accum, lse_log2, delta, turns, counts, zeroed, queries_per_kv, tile_list).launch(
            grid=[tile_list.length, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        O: cute.Tensor,
        dO: cute.Tensor,
        LSE: cute.Tensor,
        dq_accum: cute.Tensor,
        lse_log2: cute.Tensor,
        delta: cute.Tensor,
        turns: cute.Tensor | None,
        counts: cute.Tensor,
        zeroed: tuple[Int32, Int32],
        queries_per_kv: Int32,
        tile_list: TileList,
    ):
        c = self.config
        # the last tile first: what the first heads need is in the L2 cache when BackwardKernel begins with them
        m, head, batch = tile_list.tile(tile_list.length - 1 - cute.arch.block_idx()[0])
        thread = cute.arch.thread_idx()[0]
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if m == 0 and thread == 0:
            of_head = cute.make_tensor(accumulate.count(counts, head, batch), accumulate.COUNTS)
            of_head.fill(0)
        if cutlass.const_expr(turns is not None):
            if thread < c.cluster:
                turns[batch, head, m * c.cluster + thread] = Int32(0)

        lanes = c.head_dim // VECTOR  # of a row
        rows = THREADS // lanes  # at a time
        own_rows = [m * c.tile_m + i * rows + thread // lanes for i in range(c.tile_m // rows)]
        # a row past the end reads the last one, so that nothing keeps all the loads from being in flight at once
        read = [min(row, O.shape[0] - 1) for row in own_rows]
        o, do = ([self.loaded(x[row, None, head, batch], thread % lanes) for row in read] for x in (O, dO))
        lse = [LSE[batch, head, row] * Float32(LOG2_E) for row in read]
        for i in cutlass.range_constexpr(len(own_rows)):
            own = Float32(0.0)
            for j in cutlass.range_constexpr(VECTOR):
                own += o[i][j].to(Float32) * do[i][j].to(Float32)
            own = cute.arch.warp_reduction_sum(own, threads_in_group=lanes)
            if thread % lanes == 0:
                row = own_rows[i]
                exists = row < O.shape[0]
                # exp2(S - inf) is 0: for rows past the end, and for those that see nothing
                place = wgmma.place_of_column(row)
                lse_log2[batch, head, place] = lse[i] if exists and lse[i] != -Float32.inf else Float32.inf
                delta[batch, head, place] = own if exists else Float32(0.0)

        head_kv = batch * (O.shape[2] // queries_per_kv) + head // queries_per_kv  # of all
        if head_kv < zeroed[0] or head_kv >= zeroed[1]:
            elements = c.tile_m * c.head_dim
            zeros = cute.make_rmem_tensor(FP32_VECTOR, Float32)
            zeros.fill(0.0)
            sums = cute.zipped_divide(dq_accum[batch, head, None], (FP32_VECTOR,))
            for i in cutlass.range_constexpr(elements // FP32_VECTOR // THREADS):
                cute.autovec_copy(zeros, sums[None, m * (elements // FP32_VECTOR) + i * THREADS + thread])

    @cute.jit
    def loaded(self, row: cute.Tensor, lane):
        """A thread's part of a row, in registers."""
        fragment = cute.make_rmem_tensor(VECTOR, row.element_type)
        cute.autovec_copy(cute.zipped_divide(row, (VECTOR,))[None, lane], fragment)
        return fragment
