"""Shared-memory tiles in the layout that TMA writes and WGMMA reads (128-byte swizzle), and the TMA copies of them."""

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync, warpgroup

# Policies of the L2 cache, as createpolicy.fractional makes them on sm_90 for all of what is copied with them
EVICT_FIRST = 0x12F0000000000000  # for what nobody needs again
EVICT_LAST = 0x14F0000000000000  # for what will be needed soon


def smem_layout(dtype, rows, columns, stages):
    """(rows, columns, stages), rows K-major: atoms of 8 rows by 128 bytes, swizzled."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


def transposed(tensor):
    """The same tile with its first two modes exchanged: V as WGMMA's MN-major B."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[1, 0, 2]))


def tma_load(tensor, layout, rows, columns):
    """(atom, coordinate tensor): loads (rows, columns) of the first two modes of a global tensor into one stage."""
    return cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), tensor, cute.select(layout, mode=[0, 1]), (rows, columns)
    )


def tma_store(tensor, layout, rows, columns):
    """(atom, coordinate tensor): stores one stage to (rows, columns) of a global tensor; what lies outside is clipped."""
    return cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), tensor, cute.select(layout, mode=[0, 1]), (rows, columns)
    )


@cute.jit
def partition(atom: cute.CopyAtom, shared: cute.Tensor, tensor: cute.Tensor, head, batch, part=0):
    """(shared side by stage, global side by tile) of a TMA copy of the (rows, columns) tiles of one head.

    part: which columns, in tiles, where the tile hasn't got all of them.
    """
    rows, columns = cute.size(shared, mode=[0]), cute.size(shared, mode=[1])
    tiles = cute.local_tile(tensor[None, None, head, batch], (rows, columns), (None, part))
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(tiles, 0, 2)
    )
