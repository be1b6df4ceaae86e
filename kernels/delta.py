"""What the backward needs beforehand: each query's delta and LSE, dQ's first zeros, and those that are counted from."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .configs import BackwardConfig
from .parts import accumulate
from .parts.delta import DeltaRows
from .parts.schedule import Divisor, TileList

THREADS = 256
FP32_VECTOR = 4


class DeltaKernel:
    """A CTA takes tile_m queries of a head, and the rows past the end that their tile has."""

    def __init__(self, config: BackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, rows, dq_accum, turns, counts, zeroed, later, queries_per_kv, stream: cuda.CUstream):
        """rows: a DeltaRows. counts, queries_per_kv: as accumulate.Zeros has them. dq_accum, turns: as BackwardKernel has them.

        K/V heads, counted over all batches: zeroed: (stop, start), those below and from these have their queries' part of dq_accum set to
        zero; later: (first, number) of those whose LSE and delta BackwardKernel's CTAs make, if delta_ahead.
        """
        c = self.config
        query_tiles = rows.lse_log2.shape[2] // c.tile_m
        of_head = query_tiles * queries_per_kv  # a K/V head's: of its query heads one after the other
        tile_list = TileList.of(False, of_head, 1, rows.O.shape[2] // queries_per_kv, rows.O.shape[3], Int32(1))
        zeroed, later = ([number * of_head for number in pair] for pair in (zeroed, later))
        self.kernel(rows, dq_accum, turns, counts, tuple(zeroed), tuple(later), queries_per_kv, tile_list, Divisor(query_tiles)).launch(
            grid=[tile_list.length - later[1] * c.delta_ahead, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        rows: DeltaRows,
        dq_accum: cute.Tensor,
        turns: cute.Tensor | None,
        counts: cute.Tensor,
        zeroed: tuple[Int32, Int32],  # tiles
        later: tuple[Int32, Int32],
        queries_per_kv: Int32,
        tile_list: TileList,
        query_tiles: Divisor,
    ):
        c = self.config
        block, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        thread = cute.arch.thread_idx()[0]
        # the last tile first: what the first heads need is in the L2 cache when BackwardKernel begins with them
        position = ctas - 1 - block
        if cutlass.const_expr(c.delta_ahead):
            if position >= later[0]:
                position += later[1]
        number, head_kv, batch = tile_list.tile(position)
        head, m = divmod(number, query_tiles)
        head += head_kv * queries_per_kv
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if thread == 0:
            for i in cutlass.range(block, rows.O.shape[3] * tile_list.heads.divisor, ctas, unroll=1):
                of_batch, of_head = divmod(i, tile_list.heads)
                cute.make_tensor(accumulate.count(counts, of_head * queries_per_kv, of_batch), accumulate.COUNTS).fill(0)
        if cutlass.const_expr(turns is not None):
            length = turns.shape[0] * turns.shape[1] * turns.shape[2]
            in_a_row = cute.make_tensor(turns.iterator, length)
            for i in cutlass.range(block * THREADS + thread, length, ctas * THREADS, unroll=1):
                in_a_row[i] = Int32(0)
        rows.make(m, head, batch, thread, THREADS)
        if position < zeroed[0] or position >= zeroed[1]:
            elements = c.tile_m * c.head_dim
            zeros = cute.make_rmem_tensor(FP32_VECTOR, Float32)
            zeros.fill(0.0)
            sums = cute.zipped_divide(dq_accum[batch, head, None], (FP32_VECTOR,))
            for i in cutlass.range_constexpr(elements // FP32_VECTOR // THREADS):
                cute.autovec_copy(zeros, sums[None, m * (elements // FP32_VECTOR) + i * THREADS + thread])
