"""Sources: what brings tile n of Q, K or V into a stage of shared memory, and who, where no producer does."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync

from . import barriers, tiles


@dataclass(frozen=True)
class TmaSource:
    """The tiles of one head of a tensor with ordinary strides, brought by TMA; rows past the end arrive as zeros."""

    ring: pipeline.PipelineTmaAsync
    atom: cute.CopyAtom
    stages: cute.Tensor  # (copy, stage) shared memory
    tiles: cute.Tensor  # (copy, tile) coordinates in global memory
    policy: Int64 | None = None  # of the L2 cache, such as tiles.EVICT_FIRST

    @classmethod
    def of_head(cls, ring, atom, tensor, shared, head, batch, policy=None, part=0):
        """part: which columns of the tensor, in tiles."""
        return cls(ring, atom, *tiles.partition(atom, shared, tensor, head, batch, part), policy)

    @cute.jit
    def bring(self, n, at, beside=None):
        """Waits until the stage at `at` is empty and starts the load of tile n into it, and of what a RowSource has beside it;
        returns the next place.
        """
        self.ring.producer_acquire(at)
        barrier = self.ring.producer_get_barrier(at)
        cute.copy(
            self.atom, self.tiles[None, n], self.stages[None, at.index], tma_bar_ptr=barrier, cache_policy=self.policy
        )
        if cutlass.const_expr(beside is not None):
            beside.bring(n, at, barrier)
        at.advance()
        return at

    @cute.jit
    def prefetch(self, n):
        """Has tile n fetched into the L2 cache."""
        cute.prefetch(self.atom, self.tiles[None, n])


@dataclass(frozen=True)
class RowSource:
    """The fp32 numbers that one head has for each row, such as LSE: a tile's lie in one piece."""

    tiles: cute.Tensor  # (rows of a tile, tile) global memory
    stages: cute.Tensor  # (rows of a tile, stage) shared memory

    @classmethod
    def of_head(cls, tensor, shared, head, batch):
        return cls(cute.zipped_divide(tensor[batch, head, None], (shared.shape[0],)), shared)

    @cute.jit
    def bring(self, n, at, barrier):
        """Starts the load of tile n's numbers into the stage at `at`, which counts for that barrier."""
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        if cute.arch.lane_idx() == 0:
            cute.copy(atom, self.tiles[None, n], self.stages[None, at.index], mbar_ptr=barrier)


@dataclass(frozen=True)
class Feeder:
    """Loading without warp specialisation: one warp of the last consumer warpgroup (`feeds`) loads between its WGMMAs.

    A no-op where `on` is False. Its places in the rings are those that the consumers will come to.
    """

    on: Constexpr[bool]
    feeds: Boolean
    rings: tuple  # of Q, K, V, as all the following
    copies: tuple
    tensors: tuple
    shared: tuple

    def source(self, which, head, batch):
        head = head if which == 0 else head // (self.tensors[0].shape[2] // self.tensors[1].shape[2])
        return TmaSource.of_head(self.rings[which], self.copies[which], self.tensors[which], self.shared[which], head, batch)

    @cute.jit
    def start(self, block, head, batch, n, warpgroups: Constexpr[int], q_at, k_at):
        """Q and the first K of a tile; q_at: the last warpgroup's."""
        if cutlass.const_expr(self.on):
            if self.feeds:
                for w in cutlass.range_constexpr(warpgroups):
                    self.source(0, head, batch).bring(block + w, barriers.filling(q_at, w + 1 - warpgroups))
                self.source(1, head, batch).bring(n, barriers.filling(k_at))

    @cute.jit
    def step(self, head, batch, n, k_at, v_at, v_ahead: Constexpr[bool]):
        """What the step after S of tile n needs: the next K, and this tile's V, which v_ahead puts one place after v_at."""
        if cutlass.const_expr(self.on):
            if self.feeds:
                if n > 0:
                    k_next = k_at.clone()
                    k_next.advance()
                    self.source(1, head, batch).bring(n - 1, barriers.filling(k_next))
                v_next = v_at.clone()
                if cutlass.const_expr(v_ahead):
                    v_next.advance()
                self.source(2, head, batch).bring(n, barriers.filling(v_next))
