"""Matrix multiply by a single warp (mma.sync), for what a warp must do without its warpgroup."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warp

from . import wgmma


@cute.jit
def gemm(acc: cute.Tensor, A: cute.Tensor, first_a, B: cute.Tensor, first_b):
    """This warp's 16 rows of what a WGMMA computes, acc = A Bᵀ: acc is that one's fragment.

    A, B: (rows, k) in global memory, of which A's 16 rows from first_a on are multiplied, its last one in place of those past
    the end, and B's from first_b on, as many as acc has columns. An accumulator of mma.sync lies as 16 rows of a WGMMA's do.
    """
    lane = cute.arch.lane_idx()
    lane = cute.arch.shuffle_sync(lane, lane)  # itself, but ptxas can't work out the addresses in every step, in registers it hasn't got
    mma = cute.make_tiled_mma(warp.MmaF16BF16Op(B.element_type, Float32, (16, 8, 16)), permutation_mnk=(16, 16, 16))
    rA = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_A((16, 16)), A.element_type)
    rB = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_B((16, 16)), B.element_type)
    # Of mma.sync's operands lane l has, of rows l / 4 and l / 4 + 8, two pairs of columns. Which columns a sum over all of them
    # doesn't care, if they are the same for A and B: so 8 bytes in a row.
    a_pairs, b_pairs = cute.recast_tensor(rA, Int32), cute.recast_tensor(rB, Int32)
    own_a = [address(A, min(first_a + lane // 4 + 8 * r, A.shape[0] - 1), lane) for r in range(2)]
    own_b, eight_rows = address(B, first_b + lane // 4, lane), Int64(B.stride[0]) * (8 * B.element_type.width // 8)
    wgmma.flat(acc).fill(0.0)
    for k in cutlass.range(cute.size(B, mode=[1]) // 16, unroll=1):
        at = own_b + 32 * k
        for r in cutlass.range_constexpr(2):
            a_pairs[r], a_pairs[2 + r] = load_from_l2(own_a[r] + 32 * k)
        for j in cutlass.range_constexpr(cute.size(acc) // 8):
            for r in cutlass.range_constexpr(2):
                b_pairs[2 * r], b_pairs[2 * r + 1] = load_from_l2(at)
                at += eight_rows
            part = cute.make_tensor(acc.iterator + 8 * j, cute.make_layout(((2, 2), 1, 2), stride=((1, 2), 0, 4)))
            cute.gemm(mma, part, rA, rB, part)


def address(tensor, row, lane):
    """Of a row's first 8 bytes for a lane."""
    return tensor.iterator.toint() + (Int64(row) * tensor.stride[0] + 4 * (lane % 4)) * (tensor.element_type.width // 8)


def load_from_l2(address):
    """8 bytes of global memory, past the L1 cache: a kernel that started before the one before it ended may have old lines there."""
    load = "ld.global.cg.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    return cute.arch.inline_ptx(load, write_only_types=[Int32] * 2, read_only_args=[address])
