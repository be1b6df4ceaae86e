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

    def of_tiles(self, places, shared: cute.Tensor, thread, barrier):
        """One warpgroup: of each place (m, head, batch, whether it exists) the tile_m queries. The next are loaded before those at hand leave,
        where registers allow.

        shared: (tile_m, head_dim, 1), where they go through; barrier: the warpgroup's own.
        """
        ahead = 1 if self.config.tile_m * self.config.head_dim <= 64 * WARPGROUP else 0
        loaded = []
        for i, place in enumerate(places):
            loaded += [self.load(*later[:3], thread) for later in places[len(loaded) : i + 1 + ahead]]
            self.write(place, loaded[i], shared, thread, barrier)

    def load(self, m, head, batch, thread):
        """The sums of a tile, a part for each of the warpgroups whose accumulators they were."""
        c = self.config
        warp = cute.arch.make_warp_uniform(thread // WARP)
        tile = accumulate.tile_of(self.dq_accum, m, head, batch, c.tile_m * c.head_dim)
        parts = []
        for part in range(c.dq_warps // WARPS):
            sums = accumulate.by_vectors(tile, part * WARPS + warp, c.accumulator_size)[None, None, thread % WARP]
            acc = cute.make_rmem_tensor(sums.shape, Float32)
            cute.autovec_copy(sums, acc)
            parts.append(acc)
        return parts

    @cute.jit
    def write(self, place, parts, shared: cute.Tensor, thread, barrier):
        """Scales and rounds a tile and stores it."""
        c = self.config
        m, head, batch, exists = place
        queries, head_dims = c.dq_part
        columns = head_dims if c.dq_by_rows else queries
        op = wgmma.operation(DTYPES[c.dtype], columns, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        rounded = cute.make_rmem_tensor(cute.make_tiled_mma(op).partition_shape_C((64, columns)), DTYPES[c.dtype])
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # what was stored before has left shared memory
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
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
        if exists and thread < WARP:
            tdQ, gdQ = tiles.partition(self.store, shared, self.dQ, head, batch)
            cute.copy(self.store, tdQ[None, 0], gdQ[None, m])
            cute.arch.cp_async_bulk_commit_group()
