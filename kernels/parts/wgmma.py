"""Warpgroup matrix multiply: one warpgroup, 64 rows, accumulators in registers.

Where an accumulator's elements live (PTX ISA, "wgmma register fragments", m64nNk16): in warp w, lane l, row half r and
column group j, elements (c, r, j) for c in 0, 1 are columns 8j + 2(l % 4) + c of row 16w + l / 4 + 8r. A fragment is
stored as ((2, 2, N/8), 1, 1) in that order, so element i of it, flat, has c = i % 2, r = i / 2 % 2, j = i / 4.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup


def operation(dtype, n, b_major, a_source, a_major=OperandMajorMode.K):
    """The WGMMA of A (64, k) times B (n, k): fp32 accumulators."""
    return warpgroup.MmaF16BF16Op(dtype, Float32, (64, n, 16), a_source, a_major, b_major)


@cute.jit
def issue(op: cutlass.Constexpr, acc: cute.Tensor, A: cute.Tensor, B: cute.Tensor, accumulate, k: cutlass.Constexpr = None, skip: cutlass.Constexpr = 0):
    """acc = A Bᵀ, or acc += A Bᵀ with accumulate (a Python bool, or one of the kernel's), as one group of WGMMAs in flight.

    k: of A's and B's columns, the first so many; all where it is None. skip: but not the first so many. Until that is waited for, acc and a register A must not be touched.
    """
    mma = cute.make_tiled_mma(op)
    warpgroup.fence()
    for i in cutlass.range_constexpr(skip // 16, cute.size(A, mode=[2]) if k is None else k // 16):
        mma.set(warpgroup.Field.ACCUMULATE, accumulate if i == skip // 16 else True)
        cute.gemm(mma, acc, A[None, None, i], B[None, None, i], acc)
    warpgroup.commit_group()


@cute.jit
def load_operand(op: cutlass.Constexpr, fragment: cute.Tensor, shared: cute.Tensor, thread, transposed: cutlass.Constexpr[bool] = False):
    """Operand A (64, k) from shared memory into registers, by ldmatrix. transposed: where A's columns, and not its rows, are contiguous."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transposed, 4), shared.element_type)
    copy = cute.make_tiled_copy_A(atom, cute.make_tiled_mma(op)).get_slice(thread)
    cute.copy(copy, copy.partition_S(shared), copy.retile(fragment))


@cute.jit
def store_accumulator(op: cutlass.Constexpr, acc: cute.Tensor, shared: cute.Tensor, thread):
    """An accumulator, rounded to the type of a shared-memory tile, into that tile, by stmatrix."""
    rounded = cute.make_rmem_tensor(acc.layout, shared.element_type)
    rounded.store(acc.load().to(shared.element_type))
    store_rounded(op, rounded, shared, thread, transposed=False)


@cute.jit
def store_rounded(op: cutlass.Constexpr, rounded: cute.Tensor, shared: cute.Tensor, thread, transposed: cutlass.Constexpr[bool]):
    """A fragment of fp16 or bf16 that lies as an accumulator does into a shared-memory tile, by stmatrix.

    transposed: where the tile's rows, and not its columns, are contiguous.
    """
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transposed, 4), shared.element_type)
    copy = cute.make_tiled_copy_C(atom, cute.make_tiled_mma(op)).get_slice(thread)
    cute.copy(copy, copy.retile(rounded), copy.partition_D(shared))


def address_of_transposed(op, shared: cute.Tensor, thread):
    """Where `store_transposed` puts this thread's part of a tile of 16-bit numbers in swizzled shared memory, whose rows are contiguous."""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), shared.element_type)
    own = cute.make_tiled_copy_C(atom, cute.make_tiled_mma(op)).get_slice(thread).partition_D(shared)
    address = Int32(own.iterator.toint())
    return address ^ (address >> 3 & 0x70)  # the swizzle of 128 bytes: which 16 of them, by which row of 8


@cute.jit
def store_transposed(rounded: cute.Tensor, address):
    """`store_rounded` to an address: 16 columns of the accumulator, rows of 128 bytes there, at a time."""
    pairs = cute.recast_tensor(flat(rounded), Int32)
    for i in [*range(cute.size(pairs) // 4)]:  # a list, so that the loop is Python's
        cute.arch.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[address + i * 16 * 128, *(pairs[4 * i + j] for j in range(4))],
        )


@cute.jit
def load_transposed(rounded: cute.Tensor, address):
    """What `store_transposed` has stored, back into the same registers."""
    pairs = cute.recast_tensor(flat(rounded), Int32)
    for i in [*range(cute.size(pairs) // 4)]:
        loaded = cute.arch.inline_ptx(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[Int32] * 4,
            read_only_args=[address + i * 16 * 128],
        )
        for j in [*range(4)]:
            pairs[4 * i + j] = loaded[j]


def keep(number):
    """The same number, which ptxas keeps in a register from here on.

    Where it is short of them it would compute what follows from the thread's index again each time; and reading that index (S2R) takes
    until all is done that the warp has asked of shared memory before. A shuffle's result it can't compute again.
    """
    return cute.arch.shuffle_sync(number, cute.arch.lane_idx())


def wait(groups_in_flight):
    """Waits until at most this many of the warpgroup's committed groups are still in flight."""
    warpgroup.wait_group(groups_in_flight)


def row_in_tile(thread, half):
    """Row (0 to 63) of this warpgroup's tile that row half 0 or 1 of a thread's fragment belongs to."""
    return thread // 32 * 16 + thread % 32 // 4 + 8 * half


def flat(fragment):
    """A fragment as one compact vector, element i as in this file's first paragraph."""
    return cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))


def place_of_column(column):
    """Where `load_by_columns` looks for a column's number: four of a thread's columns, of two groups of eight, lie side by side."""
    within = column % 16
    return column - within + within % 8 // 2 * 4 + within // 8 * 2 + within % 2


def load_by_columns(numbers: cute.Tensor, thread):
    """(2, N/8) in registers: of one fp32 number for each column of an accumulator, in shared memory, those of this thread's columns."""
    return load_own_columns(numbers.iterator + 4 * (thread % 4), cute.size(numbers))


def load_columns(address, columns: cutlass.Constexpr[int]):
    """The same, so many columns, from an `address_of_columns`."""
    return load_own_columns(cute.make_ptr(Float32, address, cute.AddressSpace.smem, assumed_align=16), columns)


def address_of_columns(numbers: cute.Tensor, thread):
    """Where in shared memory the numbers of this thread's columns begin."""
    return Int32(numbers.iterator.toint()) + 16 * (thread % 4)


@cute.jit
def load_own_columns(pointer, columns: cutlass.Constexpr[int]):
    own = cute.make_layout((4, columns // 16), stride=(1, 16))
    loaded = cute.make_rmem_tensor(own.shape, Float32)
    cute.autovec_copy(cute.make_tensor(pointer, own), loaded)
    return cute.make_tensor(loaded.iterator, cute.make_layout((2, columns // 8)))


def columns(fragment, part, parts):
    """Part `part` of an accumulator's columns, cut into so many parts: the accumulator of a narrower WGMMA."""
    size = cute.size(fragment) // parts
    return cute.make_tensor(fragment.iterator + part * size, cute.make_layout(((2, 2, size // 4), 1, 1)))


def row_of(fragment, r):
    """The flat indices of row half r of an accumulator."""
    return [i for i in range(cute.size(fragment)) if i // 2 % 2 == r]


def as_operand(P, k):
    """The fp16/bf16 fragment P (64, k) of an accumulator, seen as register operand A: the same registers, regrouped."""
    return cute.make_tensor(P.iterator, cute.make_layout(((2, 2, 2), 1, k // 16), stride=((1, 2, 4), 0, 8)))
