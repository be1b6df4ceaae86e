"""Matrix multiply by a single warp (mma.sync), for what a warp must do without its warpgroup."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warp

from . import wgmma


@cute.jit
def again(acc: cute.Tensor, A: cute.Tensor, B: cute.Tensor, thread, a_in_registers: cutlass.Constexpr[bool]):
    """This warp's 16 rows of acc = A Bᵀ, computed as before by a WGMMA: acc is that one's fragment.

    A: its register operand, or A's (64, k) in shared memory; B: (n, k) in shared memory. An accumulator of mma.sync lies as
    16 rows of a WGMMA's do, and so does its operand A.
    """
    mma = cute.make_tiled_mma(warp.MmaF16BF16Op(B.element_type, Float32, (16, 8, 16)), permutation_mnk=(16, 16, 16))
    n, depth, lane = cute.size(B, mode=[0]), cute.size(B, mode=[1]), thread % 32
    ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), B.element_type)
    copy_a, copy_b = (make(ldmatrix, mma).get_slice(lane) for make in (cute.make_tiled_copy_A, cute.make_tiled_copy_B))
    shared_b = copy_b.partition_S(B)
    rA = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_A((16, 16)), B.element_type)
    rB = cute.make_rmem_tensor(mma.get_slice(lane).partition_shape_B((16, 16)), B.element_type)
    wgmma.flat(acc).fill(0.0)
    if cutlass.const_expr(a_in_registers):
        for k in cutlass.range_constexpr(depth // 16):
            add(mma, acc, cute.make_tensor(A.iterator + 8 * k, rA.layout), copy_b, shared_b[None, None, k], rB)
    else:
        shared_a = copy_a.partition_S(cute.local_tile(A, (16, depth), (thread // 32, 0)))
        for k in cutlass.range(depth // 16, unroll=1):
            cute.copy(copy_a, shared_a[None, None, k], copy_a.retile(rA)[None, None, 0])
            add(mma, acc, rA, copy_b, shared_b[None, None, k], rB)


@cute.jit
def add(mma: cute.TiledMma, acc: cute.Tensor, A: cute.Tensor, copy_b, shared_b: cute.Tensor, B: cute.Tensor):
    """acc += A Bᵀ for 16 of their k, 16 of B's rows at a time, each through the registers of B."""
    for j in cutlass.range_constexpr(cute.size(shared_b, mode=[1])):
        part = cute.make_tensor(acc.iterator + 8 * j, cute.make_layout(((2, 2), 1, 2), stride=((1, 2), 0, 4)))
        cute.copy(copy_b, shared_b[None, j], copy_b.retile(B)[None, 0, 0])
        cute.gemm(mma, part, A, B, part)
