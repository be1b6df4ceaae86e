"""Outputs: what takes a warpgroup's 64 rows of O from registers to memory."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from . import tiles, wgmma
from .barriers import WARP

WARPS = 4  # of a warpgroup
WARP_ROWS = 16  # rows of a warpgroup's accumulator that one warp holds


@dataclass(frozen=True)
class StagedOutput:
    """Through shared memory and on by TMA, which clips the rows past the end: each warp its 16 rows, on its own.

    Where there isn't room for all columns they go in parts, through `buffers` places in turn.
    """

    atom: cute.CopyAtom
    stages: cute.Tensor  # (16, columns of a part, (warp of the CTA, buffer), stage) shared memory
    O: cute.Tensor  # (seqlen_q, head_dim, heads, batch) coordinates in global memory
    warpgroups: Constexpr[int]
    buffers: Constexpr[int]
    streamed: Constexpr[bool] = False  # whether the L2 cache drops it first, as nobody reads it soon

    @classmethod
    def in_memory(cls, atom, memory, layout, stages, stride, O, warpgroups, buffers):
        """In so many stages at a swizzled tensor's memory, `stride` elements apart, each laid out as tiles.smem_layout has it."""
        staged = cute.make_layout((*layout.outer.shape, stages), stride=(*layout.outer.stride, stride))
        return cls(atom, cute.make_tensor(memory.iterator, staged), O, warpgroups, buffers)

    @cute.jit
    def write(self, acc: cute.Tensor, stage, block, head, batch, index, thread, free: Constexpr[bool] = False):
        """acc: the fragment of O, 64 rows, number `block` of the head. stage: the one to use.

        index: which of the CTA's warpgroups this is. free: whether the stage is known to be, so that nothing need be waited for.
        """
        shared = self.stages[None, None, None, stage]
        columns = cute.size(shared, mode=[1])
        parts = cute.size(self.O, mode=[1]) // columns
        op = wgmma.operation(shared.element_type, columns, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)
        by_row = cute.group_modes(cute.make_tensor(shared.iterator, cute.select(shared.layout, mode=[0, 2, 1])), 0, 2)
        warp = cute.arch.make_warp_uniform(thread // WARP)
        for part in cutlass.range_constexpr(parts):
            buffer = part % self.buffers
            if cutlass.const_expr(part > 0 or not free):
                self.finish(0 if part == 0 else self.buffers - 1)
            rows = cute.local_tile(by_row, (WARPS * WARP_ROWS, columns), (index + buffer * self.warpgroups, 0))
            wgmma.store_accumulator(op, wgmma.columns(acc, part, parts), rows, thread)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            tO, gO = tiles.partition(self.atom, shared, self.O, head, batch, part)
            place = (index + buffer * self.warpgroups) * WARPS + warp
            policy = Int64(tiles.EVICT_FIRST) if self.streamed else None
            cute.copy(self.atom, tO[None, place], gO[None, block * WARPS + warp], cache_policy=policy)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish(self, but: Constexpr[int] = 0):
        """Waits until TMA has read what the warp stored before, but for so many parts, so that that shared memory is free again."""
        cute.arch.cp_async_bulk_wait_group(but, read=True)
        cute.arch.sync_warp()
