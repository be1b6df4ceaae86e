"""Sources: what brings tile n of Q, K or V into a stage of shared memory."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import pipeline

from . import tiles


@dataclass(frozen=True)
class TmaSource:
    """The tiles of one head of a tensor with ordinary strides, brought by TMA; rows past the end arrive as zeros."""

    ring: pipeline.PipelineTmaAsync
    atom: cute.CopyAtom
    stages: cute.Tensor  # (copy, stage) shared memory
    tiles: cute.Tensor  # (copy, tile) coordinates in global memory

    @classmethod
    def of_head(cls, ring, atom, shared, tensor, head, batch):
        return cls(ring, atom, *tiles.partition(atom, shared, tensor, head, batch))

    @cute.jit
    def bring(self, n, at):
        """Waits until the stage at `at` is empty and starts the load of tile n into it; returns the next place."""
        self.ring.producer_acquire(at)
        barrier = self.ring.producer_get_barrier(at)
        cute.copy(self.atom, self.tiles[None, n], self.stages[None, at.index], tma_bar_ptr=barrier)
        at.advance()
        return at

    @cute.jit
    def announce(self, n):
        """Has tile n fetched into the L2 cache."""
        cute.prefetch(self.atom, self.tiles[None, n])
