"""Matrix multiply by a single warp (mma.sync), for what a warp must do without its warpgroup."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warp

from . import wgmma


@cute.jit
def again(acc: cute.Tensor, A: cute.Tensor, first_a, B: cute.Tensor, first_b):
    """This warp's 16 rows of acc = A Bᵀ, computed as before by a WGMMA: acc is that one's fragment.

    A, B: (rows, k) in global memory, of which A's 16 rows from first_a on are multiplied, its last one in place of those past
    the end, and B's from first_b on, as many as acc has columns. An accumulator of mma.sync lies as 16 rows of a WGMMA's do.
    """
    lane = cute.arch.lane_idx()
    lane = cute.arch.shuffle_sync(lane, lane)  # itself, but ptxas can't work out the addresses in every step, in registers it hasn't got
    mma = cute.make_tiled_mma(warp.MmaF16BF16Op(B.element_type, Float32, (16, 8, 16)), permutation_mnk=(16, 16, 16))
    rA = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_A((16, 16)), A.element_type)
    rB = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_B((16, 16)), B.element_type)
    # Operands of mma.sync: lane l has, of row l / 4 and of row l / 4 + 8, columns 2(l % 4) and the next, and the same 8 columns on
    a_pairs, b_pairs = cute.recast_tensor(rA, Int32), cute.recast_tensor(rB, Int32)
    own_a = [address(A, min(first_a + lane // 4 + 8 * r, A.shape[0] - 1), lane) for r in range(2)]
    own_b, eight_rows = address(B, first_b + lane // 4, lane), Int64(B.stride[0]) * (8 * B.element_type.width // 8)
    wgmma.flat(acc).fill(0.0)
    for k in cutlass.range(cute.size(B, mode=[1]) // 16, unroll=1):
        for i in cutlass.range_constexpr(4):
            a_pairs[i] = load_from_l2(own_a[i % 2] + 32 * k + i // 2 * 16)
        at = own_b + 32 * k
        for j in cutlass.range_constexpr(cute.size(acc) // 8):
            for i in cutlass.range_constexpr(4):
                b_pairs[i] = load_from_l2(at + i % 2 * 16)
                if cutlass.const_expr(i % 2 == 1):
                    at += eight_rows
            part = cute.make_tensor(acc.iterator + 8 * j, cute.make_layout(((2, 2), 1, 2), stride=((1, 2), 0, 4)))
            cute.gemm(mma, part, rA, rB, part)


def address(tensor, row, lane):
    """Of a row's first pair of elements for a lane."""
    return tensor.iterator.toint() + (Int64(row) * tensor.stride[0] + 2 * (lane % 4)) * (tensor.element_type.width // 8)


def load_from_l2(address):
    """Four bytes of global memory, past the L1 cache: a kernel that started before the one before it ended may have old lines there."""
    return cute.arch.inline_ptx("ld.global.cg.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])
