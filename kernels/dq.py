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
from .parts.schedule import Divisor, TileList

WARPGROUPS = 2


class DqKernel:
    """A CTA takes a tile of tile_m queries of a head; if counts_finished, as soon as BackwardKernel's CTAs have added all of its group's."""

    def __init__(self, config: BackwardConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(self, dq_accum, dQ, softmax_scale, finished, first_done, stream: cuda.CUstream):
        """dQ: (seqlen_q, head_dim, heads, batch); dq_accum: (batch, heads, rows · head_dim).

        finished: tells of which heads the sums are complete. first_done: so many K/V heads, counted over all batches, are so sooner.
        """
        c = self.config
        layout = tiles.smem_layout(self.dtype, c.tile_m, c.head_dim, 1)
        store, mdQ = tiles.tma_store(dQ, layout, c.tile_m, c.head_dim)
        query_tiles, queries_per_kv = cute.ceil_div(dQ.shape[0], c.tile_m), finished.queries_per_kv
        of_head = query_tiles * queries_per_kv  # a K/V head's: of its query heads one after the other
        tile_list = TileList.of(False, of_head, 1, dQ.shape[2] // queries_per_kv, dQ.shape[3], Int32(1))
        arguments = softmax_scale, finished, first_done, tile_list, Divisor(query_tiles)
        self.kernel(store, mdQ, dq_accum, *arguments, layout).launch(
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
        finished: accumulate.Finished,
        first_done: Int32,
        tile_list: TileList,
        query_tiles: Divisor,
        layout: cute.ComposedLayout,
    ):
        c = self.config
        thread = cute.arch.thread_idx()[0]
        smem = SmemAllocator()
        shared = smem.allocate_tensor(self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        is_last = smem.allocate_tensor(Int32, 1)
        cute.arch.griddepcontrol_launch_dependents()
        number, head_kv, batch = self.place(tile_list, first_done)
        if cutlass.const_expr(c.counts_finished):
            group = finished.group_of(head_kv, batch)
            if thread == 0:
                is_last[0] = finished.await_all(group, tile_list.query_tiles)
            cute.arch.sync_threads()
            last = is_last[0]
            first_batch, first_head = divmod(group * finished.tiles.group_heads.divisor, finished.tiles.heads)
            has_counts = number == 0 and head_kv == first_head and batch == first_batch
            # the tile that has the group's counts is written by the CTA that is the last to look at them, after its own tile
            for i in cutlass.range(Int32(has_counts), 1 + last, unroll=1):
                if i == 1:
                    number, head_kv, batch = Int32(0), first_head, first_batch
                    if group == 0:
                        cute.arch.griddepcontrol_wait()  # the first of all counts claims, too; and so this grid doesn't end before that one
                self.convert(store, dQ, dq_accum, scale, shared, thread, divmod(number, query_tiles), head_kv, batch, finished.queries_per_kv)
        else:
            cute.arch.griddepcontrol_wait()
            self.convert(store, dQ, dq_accum, scale, shared, thread, divmod(number, query_tiles), head_kv, batch, finished.queries_per_kv)

    @cute.jit
    def place(self, tile_list, first_done):
        """(number, K/V head, batch) of the CTA's tile; in front the heads that are complete sooner.

        Of these the last ones come first, as the L2 cache may still have their sums.
        """
        block, sooner = cute.arch.block_idx()[0], first_done * tile_list.query_tiles
        return tile_list.tile(sooner - 1 - block if block < sooner else tile_list.length - 1 - (block - sooner))

    @cute.jit
    def convert(self, store, dQ, dq_accum, scale, shared, thread, place, head_kv, batch, queries_per_kv):
        """A tile of dQ. place: (query head of the K/V head's, tile of queries)"""
        c = self.config
        head, m = head_kv * queries_per_kv + place[0], place[1]
        warp = cute.arch.make_warp_uniform(thread // WARP)
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
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
            aligned = cute.make_ptr(Float32, sums.iterator.toint(), cute.AddressSpace.gmem, assumed_align=16)  # as slicing has lost it
            cute.autovec_copy(cute.make_tensor(aligned, sums.layout), cute.make_tensor(acc.iterator, sums.shape))
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
        cute.arch.sync_threads()
