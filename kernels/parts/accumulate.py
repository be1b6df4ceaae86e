"""Sums over CTAs, in fp32 in global memory: how a warpgroup's accumulator is added to what others have added.

A sum lies there as the accumulators' registers do, so that nothing has to be brought into another order on the way: for each
tile, for each of its warps, 16 bytes of each lane in turn. Who reads it (dq.py) has the same registers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64

from . import wgmma
from .barriers import WARP

VECTOR = 4  # fp32 numbers that a lane moves at a time
WARPS = 4  # of a warpgroup


def by_vectors(pointer, warp, size):
    """(4, size / 4, lane): where the lanes' numbers of a warp's accumulator, `size` a lane, lie in a tile at that pointer."""
    layout = cute.make_layout((VECTOR, size // VECTOR, WARP), stride=(1, VECTOR * WARP, VECTOR))
    return cute.make_tensor(pointer + warp * (WARP * size), layout)


def tile_of(sums, m, head, batch, elements):
    """A pointer to tile m of a head. sums: (batch, heads, elements of all tiles)."""
    return sums[batch, head, None].iterator + Int64(m) * elements


@dataclass(frozen=True)
class Adder:
    """Adds accumulators, a warp its part on its own: through shared memory, from where TMA adds it to global memory."""

    sums: cute.Tensor  # (batch, heads, elements of all tiles) fp32
    shared: cute.Tensor  # a tile of it
    turns: cute.Tensor | None  # (batch, heads, tiles) zeros: where it is written whose turn it is, if tiles are added to in order
    elements: Constexpr[int]  # of a tile
    size: Constexpr[int]  # of a thread's accumulator

    @cute.jit
    def add(self, acc: cute.Tensor, m, head, batch, index, thread):
        """Adds the accumulator of warpgroup `index` to tile m of a head."""
        self.finish()
        warp = index * WARPS + cute.arch.make_warp_uniform(thread // WARP)
        own = by_vectors(self.shared.iterator, warp, self.size)
        cute.autovec_copy(cute.make_tensor(acc.iterator, cute.select(own.layout, mode=[0, 1]).shape), own[None, None, thread % WARP])
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            target = by_vectors(tile_of(self.sums, m, head, batch, self.elements), warp, self.size)
            add_bulk(target.iterator, own.iterator, WARP * self.size)
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish(self):
        """Waits until the shared memory that this warp adds from is free again."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()


def add_bulk(target, source, count):
    """One lane: TMA adds so many fp32 numbers of shared memory to global memory."""
    cute.arch.inline_ptx(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], {$r2};",
        read_only_args=[target.toint(), Int32(source.toint()), Int32(4 * count)],
    )
