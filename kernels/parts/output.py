"""Outputs: what takes a warpgroup's 64 rows of O, in registers, to memory."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from . import tiles, wgmma
from .rounding import round_into

WARPS = 4  # of a warpgroup
WARP_ROWS = 16  # rows of a warpgroup's accumulator that one warp holds


@dataclass(frozen=True)
class StagedOutput:
    """Through shared memory and on by TMA, which clips the rows past the end: each warp its 16 rows, on its own."""

    atom: cute.CopyAtom
    shared: cute.Tensor  # (16, head_dim, warp of the CTA)
    O: cute.Tensor  # coordinates in global memory
    warpgroups: Constexpr[int]

    @cute.jit
    def write(self, op: Constexpr, acc: cute.Tensor, tile, head, batch, warpgroup, thread):
        self.finish()
        by_row = cute.group_modes(cute.make_tensor(self.shared.iterator, cute.select(self.shared.layout, mode=[0, 2, 1])), 0, 2)
        rows = cute.local_tile(by_row, (WARPS * WARP_ROWS, cute.size(by_row, mode=[1])), (warpgroup, 0))
        wgmma.store_accumulator(op, acc, rows, thread)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        warp = warpgroup * WARPS + cute.arch.make_warp_uniform(thread // 32)
        tO, gO = tiles.partition(self.atom, self.shared, self.O, head, batch)
        cute.copy(self.atom, tO[None, warp], gO[None, tile * (self.warpgroups * WARPS) + warp])
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish(self):
        """Waits until TMA has read what the warp stored before, so that the shared memory is free again."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()


@dataclass(frozen=True)
class DirectOutput:
    """Straight from registers, where shared memory has no room."""

    O: cute.Tensor  # (seqlen_q, head_dim, heads, batch)
    warpgroups: Constexpr[int]

    @cute.jit
    def write(self, op: Constexpr, acc: cute.Tensor, tile, head, batch, warpgroup, thread):
        """The four lanes of a row hand each other what they hold, so that each writes 16 bytes in one piece."""
        lane = thread % 4
        rounded = cute.make_rmem_tensor(cute.size(acc), self.O.element_type)
        round_into(rounded, acc)
        words = cute.recast_tensor(rounded, Int32)
        for r in cutlass.range_constexpr(2):
            chunks = [*range(r, cute.size(words), 8)]
            for i in chunks:
                a, b = exchange(words[i], words[i + 2], lane, 1), exchange(words[i + 4], words[i + 6], lane, 1)
                words[i], words[i + 4] = exchange(a[0], b[0], lane, 2)
                words[i + 2], words[i + 6] = exchange(a[1], b[1], lane, 2)
            row = (tile * self.warpgroups + warpgroup) * WARPS * WARP_ROWS + wgmma.row_in_tile(thread, r)
            if row < self.O.shape[0]:
                target = self.O[row, None, head, batch]
                for place, i in enumerate(chunks):
                    piece = cute.make_rmem_tensor(4, Int32)
                    for k in range(4):
                        piece[k] = words[i + 2 * k]
                    piece = cute.recast_tensor(piece, target.element_type)
                    cute.autovec_copy(piece, cute.local_tile(target, (8,), (4 * place + lane,)))

    def finish(self):
        """Nothing to wait for."""


@cute.jit
def exchange(a, b, lane, bit: cutlass.Constexpr[int]):
    """With the lane whose number differs in `bit`: the lower keeps both a's, the higher both b's, the lower lane's first."""
    higher = lane & bit != 0
    got = cute.arch.shuffle_sync_bfly(a if higher else b, offset=bit)
    return (got if higher else a), (b if higher else got)
