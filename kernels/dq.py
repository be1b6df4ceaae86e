"""dQ from its fp32 sum: scaled, rounded, and brought into rows."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .configs import WARPGROUP, BackwardConfig
from .parts import accumulate, tiles, wgmma
from .parts.barriers import WARP
from .parts.output import WARPS
from .parts.rounding import DTYPES, round_into


@dataclass(frozen=True)
class Conversion:
    """What is read, dq_accum: (batch, heads, rows · head_dim); and written, dQ: (seqlen_q, head_dim, heads, batch), as TMA sees it."""

    config: Constexpr[BackwardConfig]
    dq_accum: cute.Tensor
    store: cute.CopyAtom
    dQ: cute.Tensor
    scale: Float32

    @cute.jit
    def of_tile(self, m, head, batch, shared: cute.Tensor, thread, barrier):
        """One warpgroup: tile_m queries of a head. shared: (tile_m, head_dim, 1), where they go through; barrier: the warpgroup's own."""
        c = self.config
        queries, head_dims = c.dq_part
        columns = head_dims if c.dq_by_rows else queries
        op = wgmma.operation(DTYPES[c.dtype], columns, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        shape = cute.make_tiled_mma(op).partition_shape_C((64, columns))
        warp = cute.arch.make_warp_uniform(thread // WARP)
        tile = accumulate.tile_of(self.dq_accum, m, head, batch, c.tile_m * c.head_dim)
        parts = [cute.make_rmem_tensor(shape, Float32) for _ in range(c.dq_warps // WARPS)]
        for part, acc in enumerate(parts):
            sums = accumulate.by_vectors(tile, part * WARPS + warp, c.accumulator_size)[None, None, thread % WARP]
            cute.autovec_copy(sums, cute.make_tensor(acc.iterator, sums.shape))
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # what was stored before has left shared memory
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
        rounded = cute.make_rmem_tensor(shape, DTYPES[c.dtype])
        for part, acc in enumerate(parts):
            flat = wgmma.flat(acc)
            for i in [*range(cute.size(acc))]:
                flat[i] = flat[i] * self.scale
            round_into(rounded, acc)
            own = cute.local_tile(shared[None, None, 0], c.dq_part, (part, 0) if queries < c.tile_m else (0, part))
            own = own if c.dq_by_rows else cute.make_tensor(own.iterator, cute.select(own.layout, mode=[1, 0]))
            wgmma.store_rounded(op, rounded, own, thread, transposed=not c.dq_by_rows)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
        if warp == 0:
            tdQ, gdQ = tiles.partition(self.store, shared, self.dQ, head, batch)
            cute.copy(self.store, tdQ[None, 0], gdQ[None, m])
            cute.arch.cp_async_bulk_commit_group()
