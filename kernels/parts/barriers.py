"""Who waits for whom inside a CTA: rings of shared-memory stages, and warpgroups that take turns."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, pipeline

from ..configs import WARPGROUP

# Named barriers; 0 is __syncthreads. Warpgroup w uses base + w.
TURN_BARRIER = 1
WARP = 32
UNMADE_NAN = -0x2153  # 0xffffdead as an int: no instruction makes this NaN, they all make 0x7fffffff


def tma_ring(mbarriers, stages, bytes_a_stage, consumer_warps):
    """Stages filled by TMA (one thread issues) and emptied by consumer_warps warps."""
    return pipeline.PipelineTmaAsync.create(
        barrier_storage=mbarriers,
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps),
        tx_count=bytes_a_stage,
        defer_sync=True,
    )


def thread_ring(mbarriers, stages, consumer_warps):
    """Stages filled by one thread and emptied by one thread of each of consumer_warps warps."""
    return pipeline.PipelineAsync.create(
        barrier_storage=mbarriers,
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps),
        defer_sync=True,
    )


def producing(stages):
    """The producer's place in a ring of so many stages."""
    return pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)


def consuming(stages, first=0):
    """A consumer's place in a ring of so many stages, of which it starts with number `first`."""
    return pipeline.PipelineState(stages, Int32(0), Int32(first), Int32(0))


def at_turn(stages, turn):
    """A consumer's place in a ring of so many stages after so many."""
    return pipeline.PipelineState(stages, Int32(0), turn % stages, turn // stages % 2)


def filling(at, offset=0):
    """The producer's view of a consumer's place, or of the one so many stages later (or earlier) in the same round."""
    return pipeline.PipelineState(at.stages, at.count, at.index + offset, at.phase ^ 1)


@cute.jit
def before(at):
    """The place that a consumer was at one stage earlier."""
    wraps = at.index == 0
    return pipeline.PipelineState(
        at.stages, at.count - 1, at.stages - 1 if wraps else at.index - 1, at.phase ^ 1 if wraps else at.phase
    )


def send(source, size, mbarrier, rank):
    """One thread: so many bytes of shared memory go to the same place in another CTA of the cluster, where they count for that mbarrier."""
    cute.arch.inline_ptx(
        """{
            .reg .b32 there, counted;
            mapa.shared::cluster.u32 there, {$r0}, {$r3};
            mapa.shared::cluster.u32 counted, {$r2}, {$r3};
            cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [{$r0}], {$r1}, [counted];
        }""",
        read_only_args=[Int32(source.toint()), Int32(size), Int32(mbarrier.toint()), Int32(rank)],
    )


@cute.jit
def lend(ring, at):
    """Producer warp: leaves a stage, once it is empty, to the consumers to write to; returns the next place."""
    ring.sync_object_empty.wait(at.index, at.phase)
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(ring.producer_get_barrier(at))
    at.advance()
    return at


@cute.jit
def release_after(ring, at, value: cute.Tensor):
    """consumer_release that can't be moved up before value[0] is computed: its predicate looks at the value, in vain."""
    if ring.is_signaling_thread or cute.recast_tensor(value, Int32)[0] == UNMADE_NAN:
        cute.arch.mbarrier_arrive(ring.consumer_get_barrier(at))


@dataclass(frozen=True)
class Turns:
    """Warpgroups issue their GEMMs in turn (pingpong, paper section 3.1); a no-op where `on` is False."""

    on: Constexpr[bool]
    warpgroups: Constexpr[int]
    warpgroup: Int32

    @cute.jit
    def begin(self):
        """Once, before the first turn: the last warpgroup lets warpgroup 0 start."""
        if cutlass.const_expr(self.on):
            if self.warpgroup == self.warpgroups - 1:
                self.give()

    @cute.jit
    def take(self):
        if cutlass.const_expr(self.on):
            cute.arch.barrier(barrier_id=TURN_BARRIER + self.warpgroup, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def give(self):
        if cutlass.const_expr(self.on):
            following = self.warpgroup + 1 if self.warpgroup + 1 < self.warpgroups else Int32(0)
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + following, number_of_threads=2 * WARPGROUP)
