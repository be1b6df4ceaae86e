"""Matrix multiply by a single warp (mma.sync), for what a warp must do without its warpgroup."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warp

from . import wgmma


@cute.jit
def again(acc: cute.Tensor, A: cute.Tensor, B: cute.Tensor, thread, a_in_registers: cutlass.Constexpr[bool]):
    """This warp's 16 rows of acc = A Bᵀ, computed as before by a WGMMA: acc is that one's fragment.

    A: its register operand, or A's (64, k) in shared memory; B: (n, k) in global memory, rows of 16 bytes aligned to 16.
    An accumulator of mma.sync lies as 16 rows of a WGMMA's do, and so does its operand A.
    """
    mma = cute.make_tiled_mma(warp.MmaF16BF16Op(B.element_type, Float32, (16, 8, 16)), permutation_mnk=(16, 16, 16))
    depth, lane = cute.size(B, mode=[1]), thread % 32
    rA = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_A((16, 16)), B.element_type)
    rB = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_B((16, 16)), B.element_type)
    row = Int64(B.stride[0]) * (B.element_type.width // 8)
    own = B.iterator.toint() + lane // 4 * row + lane % 4 * 4
    wgmma.flat(acc).fill(0.0)
    if cutlass.const_expr(a_in_registers):
        for k in cutlass.range_constexpr(depth // 16):
            add(mma, acc, cute.make_tensor(A.iterator + 8 * k, rA.layout), own + 32 * k, row, rB)
    else:
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), B.element_type)
        copy_a = cute.make_tiled_copy_A(ldmatrix, mma).get_slice(lane)
        shared_a = copy_a.partition_S(cute.local_tile(A, (16, depth), (thread // 32, 0)))
        for k in cutlass.range(depth // 16, unroll=1):
            cute.copy(copy_a, shared_a[None, None, k], copy_a.retile(rA)[None, None, 0])
            add(mma, acc, rA, own + 32 * k, row, rB)


@cute.jit
def add(mma: cute.TiledMma, acc: cute.Tensor, A: cute.Tensor, address, row, B: cute.Tensor):
    """acc += A Bᵀ for 16 of their k, 16 of B's rows at a time. address: of this lane's first pair of B; row: bytes from row to row.

    mma.sync's operand B: lane l has, of row l / 4 and row l / 4 + 8, columns 2(l % 4) and the next, and the same 8 columns on.
    """
    pairs = cute.recast_tensor(B, Int32)
    for j in cutlass.range_constexpr(cute.size(acc) // 8):
        for i in cutlass.range_constexpr(4):
            pairs[i] = load_from_l2(address + (16 * j + i // 2 * 8) * row + i % 2 * 16)
        part = cute.make_tensor(acc.iterator + 8 * j, cute.make_layout(((2, 2), 1, 2), stride=((1, 2), 0, 4)))
        cute.gemm(mma, part, A, B, part)


def load_from_l2(address):
    """Four bytes of global memory, past the L1 cache: a kernel that started before the one before it ended may have old lines there."""
    return cute.arch.inline_ptx("ld.global.cg.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])
