"""fp32 fragments rounded to fp16 or bf16, two scores an instruction."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from . import wgmma

DTYPES = {"fp16": cutlass.Float16, "bf16": cutlass.BFloat16}
PTX = {cutlass.Float16: "cvt.rn.f16x2.f32", cutlass.BFloat16: "cvt.rn.bf16x2.f32"}


@cute.jit
def round_into(target: cute.Tensor, source: cute.Tensor):
    """target = source, to nearest even, exactly here.

    Written as PTX because LLVM sinks ordinary conversions to their first use. For P that is between two WGMMAs, where
    the fp32 values stay live twice as wide and ptxas, seeing an operand written in mid-pipeline, serialises every WGMMA.
    """
    dtype = target.element_type
    pairs, values = cute.recast_tensor(wgmma.flat(target), Int32), wgmma.flat(source)
    for i in [*range(cute.size(pairs))]:  # a list, so that the loop is Python's
        pairs[i] = cute.arch.inline_ptx(
            PTX[dtype] + " {$w0}, {$r1}, {$r0};",
            write_only_types=[Int32],
            read_only_args=[Float32(values[2 * i]), Float32(values[2 * i + 1])],
        )


@cute.jit
def widened(source: cute.Tensor):
    """source in fp32, flat, exactly.

    A bf16 number is the upper half of an fp32 one: an instruction each, where the compiler takes three for two.
    """
    flat = wgmma.flat(source)
    if cutlass.const_expr(source.element_type is cutlass.BFloat16):
        pairs = cute.recast_tensor(flat, Int32)
        bits = cute.make_rmem_tensor(cute.size(flat), Int32)
        for i in [*range(cute.size(pairs))]:
            bits[2 * i], bits[2 * i + 1] = pairs[i] << 16, pairs[i] & -0x10000
        wide = cute.recast_tensor(bits, Float32)
    else:
        wide = cute.make_rmem_tensor(cute.size(flat), Float32)
        wide.store(flat.load().to(Float32))
    return wide


def are_finite(fragment: cute.Tensor):
    """Whether none of a thread's fp16 numbers, a power of 2 of them, is infinite or NaN."""
    pairs = cute.recast_tensor(wgmma.flat(fragment), Int32)
    largest = [pairs[i] for i in range(cute.size(pairs))]  # in size, of the upper halves and of the lower ones, or NaN
    while len(largest) > 1:
        largest = [
            cute.arch.inline_ptx("max.NaN.xorsign.abs.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[*two])
            for two in zip(largest[::2], largest[1::2])
        ]
    exponents, one, signs = 0x7C007C00, 0x04000400, -0x7FFF8000  # of both halves
    return (((largest[0] & exponents) + one) & signs) == 0  # an exponent of all ones carries into its sign's place


@cute.jit
def multiply_pairs(target: cute.Tensor, factors: cute.Tensor):
    """target = target * factors, all fp16, two products an instruction."""
    pairs, by = (cute.recast_tensor(wgmma.flat(x), Int32) for x in (target, factors))
    for i in [*range(cute.size(pairs))]:
        pairs[i] = cute.arch.inline_ptx(
            "mul.rn.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[pairs[i], by[i]]
        )
