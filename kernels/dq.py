"""dQ from its fp32 sum: scaled, rounded, and brought into rows."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator

from .configs import WARPGROUP, BackwardConfig
from .parts import accumulate, tiles, wgmma
from .parts.barriers import WARP
from .parts.output import WARPS
from .parts.rounding import DTYPES, round_into
from .parts.schedule import TileList

WARPGROUPS = 2


class DqKernel:
    """A CTA takes a tile of tile_m queries of a head."""

    def __init__(self, config: BackwardConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(self, dq_accum, dQ, softmax_scale, stream: cuda.CUstream):
        """dQ: (seqlen_q, head_dim, heads, batch); dq_accum: (batch, heads, rows · head_dim)."""
        c = self.config
        layout = tiles.smem_layout(self.dtype, c.tile_m, c.head_dim, 1)
        store, mdQ = tiles.tma_store(dQ, layout, c.tile_m, c.head_dim)
        tile_list = TileList.of(False, cute.ceil_div(dQ.shape[0], c.tile_m), 1, dQ.shape[2], dQ.shape[3], Int32(1))
        self.kernel(store, mdQ, dq_accum, softmax_scale, tile_list, layout).launch(
            grid=[tile_list.length, 1, 1],
            block=[WARPGROUPS * WARPGROUP, 1, 1],
            smem=c.tile_bytes["Q"] + 1024,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        store: cute.CopyAtom,
        dQ: cute.Tensor,
        dq_accum: cute.Tensor,
        scale: Float32,
        tile_list: TileList,
        layout: cute.ComposedLayout,
    ):
        c = self.config
        # the last tile first: the last heads' sums are in the L2 cache still
        m, head, batch = tile_list.tile(tile_list.length - 1 - cute.arch.block_idx()[0])
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // WARP)
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        smem = SmemAllocator()
        shared = smem.allocate_tensor(self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        queries, head_dims = c.dq_part
        columns = head_dims if c.dq_by_rows else queries
        op = wgmma.operation(self.dtype, columns, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        shape = cute.make_tiled_mma(op).partition_shape_C((64, columns))
        acc, rounded = cute.make_rmem_tensor(shape, Float32), cute.make_rmem_tensor(shape, self.dtype)
        elements = c.tile_m * c.head_dim
        tile = accumulate.tile_of(dq_accum, accumulate.number_of(dq_accum, elements, m, head, batch), elements)
        flat = wgmma.flat(acc)
        for turn in cutlass.range_constexpr(c.dq_parts // WARPGROUPS):
            part = turn * WARPGROUPS + index
            sums = accumulate.by_vectors(tile, part * WARPS + warp % WARPS, c.accumulator_size)[None, None, thread % WARP]
            cute.autovec_copy(sums, cute.make_tensor(acc.iterator, sums.shape))
            for i in cutlass.range_constexpr(cute.size(acc)):
                flat[i] = flat[i] * scale
            round_into(rounded, acc)
            own = cute.local_tile(shared[None, None, 0], c.dq_part, (part, 0) if queries < c.tile_m else (0, part))
            own = own if c.dq_by_rows else cute.make_tensor(own.iterator, cute.select(own.layout, mode=[1, 0]))
            wgmma.store_rounded(op, rounded, own, thread % WARPGROUP, transposed=not c.dq_by_rows)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if warp == 0:
            tdQ, gdQ = tiles.partition(store, shared, dQ, head, batch)
            cute.copy(store, tdQ[None, 0], gdQ[None, m])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
