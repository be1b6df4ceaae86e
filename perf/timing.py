"""How a time is taken: the device, a burst of launches, and rounds in which the providers take turns.

Protocol. Every provider runs on the same tensors, fresh from a normal distribution at every point. In each round the
providers run one after the other in a random order; a turn is a short warm-up and then a burst of launches between two
CUDA events, as many as fill burst_ms. A sample is the burst's time over its launches; what is reported is the median
over the rounds, with the spread (largest - smallest) / median.
So every provider meets the same clock and temperature, which on a power-limited chip decide the rate. A GEMM takes turns too.
In shorter turns two providers' bursts of a round lie closer together: on an H100 their ratio has a standard deviation of 3.4 % over
the rounds with bursts of 8 ms, 5.5 % with 25, and there is time for more rounds.

L2 isn't flushed between launches: at the paper's sizes q, k, v and the output are 268 MB, several times the L2
(60 MB on an H200). Where a point's tensors do fit (its `tensor_bytes` are in the results), all providers run L2-warm.

A launch in the backward direction is one torch.autograd.grad over the graph of a forward that ran before: all the backward's
kernels, and none of the forward's.

Launching must not be what is timed (suite `host` times it), and autograd's takes 50 to 100 us. A provider whose host time
for a launch is longer than its GPU time starts behind a spin kernel, long enough for the queue never to run empty during the
burst, which is then no longer than what the queue holds.
"""

import time
from typing import Callable, NamedTuple

from perf.peers import Tensors

BURST_MS = 25.0
WARMUP = 0.8  # of the burst's length
MIN_LAUNCHES = 3
MAX_LAUNCHES = 500
QUEUED_KERNELS = 1000  # CUDA queues 1024 at most: who enqueues one more waits until another is done
# Kernels and memsets, at most. Backward: delta, the gradients, dQ's rounding; grouped heads: two more, and three zeroed sums
KERNELS_PER_CALL = {"fwd": 2, "bwd": 8}
ESTIMATE_MS = 2.0
HOST_MARGIN = 1.2  # on the host time that a head start has to cover
CALLS_PER_CHUNK = 100  # enqueues timed before the queue is drained
CALLS_PER_GRAPH = 20
GEMM_SIZE = 8192


class Burst(NamedTuple):
    gpu_ms: float  # between the events, all launches together
    host_ms: float  # to enqueue them


class Turn(NamedTuple):
    """What one provider does in each round."""

    launches: int
    warmup: int
    head_start_ms: float


class Runnable(NamedTuple):
    call: Callable
    context: Callable  # a context manager's factory, entered around every burst
    kernels: int = 1  # of a call, at most


class CudaDevice:
    """The GPU, as far as measuring needs it. Tests put a fake one in its place."""

    SPIN_CYCLES_PER_MS = 2_000_000  # at H100's and H200's highest clock; at a lower one the spin only gets longer

    def __init__(self):
        import torch

        self.torch = torch
        self.dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def tensors(self, point):
        def normal(seqlen, heads):
            shape = (point.batch, seqlen, heads, point.head_dim)
            return self.torch.randn(shape, device="cuda", dtype=self.dtypes[point.dtype])

        q_shape, k_shape = (point.seqlen_q, point.heads), (point.seqlen_k, point.heads_kv)
        inputs = normal(*q_shape), normal(*k_shape), normal(*k_shape)
        if point.direction == "fwd":
            return Tensors(*inputs)
        return Tensors(*(tensor.requires_grad_() for tensor in inputs), dout=normal(*q_shape))

    def gemm(self, dtype):
        """A GEMM, the machine's own measure of what its tensor cores give in this run."""
        shape = (GEMM_SIZE, GEMM_SIZE)
        a, b = (self.torch.randn(shape, device="cuda", dtype=self.dtypes[dtype]) for _ in range(2))
        out = self.torch.empty_like(a)
        return lambda: self.torch.matmul(a, b, out=out)

    def burst(self, call, launches, warmup=0, head_start_ms=0.0):
        cuda = self.torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        if head_start_ms > 0:
            cuda._sleep(int(head_start_ms * self.SPIN_CYCLES_PER_MS))
        for _ in range(warmup):
            call()
        start.record()
        began = time.perf_counter()
        for _ in range(launches):
            call()
        host_ms = (time.perf_counter() - began) * 1e3
        end.record()
        end.synchronize()
        return Burst(start.elapsed_time(end), host_ms)

    def enqueue(self, call, calls):
        """Milliseconds of host time for so many calls, the GPU idle before; the clock stops before the GPU is waited for."""
        self.torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        host_ms = (time.perf_counter() - began) * 1e3
        self.torch.cuda.synchronize()
        return host_ms

    def capture(self, call, calls):
        """A callable that replays a CUDA graph of so many calls."""
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                call()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def relative_difference(self, output, reference):
        """|output - reference| / |reference| in fp32, Frobenius norms."""
        reference = reference.float()
        return ((output.float() - reference).norm() / reference.norm()).item()

    def synchronize(self):
        """Raises if a kernel has failed: CUDA errors stay, and everything after one fails with it."""
        self.torch.cuda.synchronize()

    def release(self):
        self.torch.cuda.empty_cache()


def plan_turn(runnable, device, burst_ms=BURST_MS):
    """How many launches fill a burst, from a first look at the runnable's GPU and host time."""
    with runnable.context():
        first = device.burst(runnable.call, 1, head_start_ms=ESTIMATE_MS)
        launches = max(1, min(10, int(ESTIMATE_MS / max(first.gpu_ms, 1e-3))))
        look = device.burst(runnable.call, launches, head_start_ms=ESTIMATE_MS)
    gpu_ms = max(look.gpu_ms / launches, 1e-3)
    host_ms = look.host_ms / launches
    launches = min(MAX_LAUNCHES, max(MIN_LAUNCHES, round(burst_ms / gpu_ms)))
    warmup = min(MAX_LAUNCHES, max(1, round(WARMUP * burst_ms / gpu_ms)))
    behind_ms = host_ms * HOST_MARGIN - gpu_ms
    if behind_ms <= 0:
        return Turn(launches, warmup, 0.0)
    most = QUEUED_KERNELS // (2 * runnable.kernels)
    launches, warmup = min(launches, most), min(warmup, most)
    return Turn(launches, warmup, behind_ms * (launches + warmup))


def take_turns(names, rounds, rng, turn, failed):
    """Calls turn(name) once per round for every name in random order, and returns each name's samples.

    A name whose turn raises is handed to failed(name, error) and takes no further part.
    """
    samples = {name: [] for name in names}
    for _ in range(rounds):
        order = list(samples)
        rng.shuffle(order)
        for name in order:
            try:
                samples[name].append(turn(name))
            except Exception as error:
                del samples[name]
                failed(name, error)
    return samples


def gpu_times(runnables, device, rounds, rng, failed, per_launch=1, burst_ms=BURST_MS):
    """{name: (samples in ms, launches a sample)}, each sample a burst's GPU time over launches * per_launch calls."""
    turns = {}
    for name, runnable in runnables.items():
        try:
            turns[name] = plan_turn(runnable, device, burst_ms)
        except Exception as error:
            failed(name, error)

    def turn(name):
        launches, warmup, head_start_ms = turns[name]
        with runnables[name].context():
            burst = device.burst(runnables[name].call, launches, warmup, head_start_ms)
        return burst.gpu_ms / (launches * per_launch)

    samples = take_turns(turns, rounds, rng, turn, failed)
    return {name: (taken, turns[name].launches * per_launch) for name, taken in samples.items()}


def host_times(runnables, device, chunks, rng, failed):
    """{name: (samples in ms, calls a sample)}, each sample the host time of a chunk of calls over its calls."""

    def turn(name):
        with runnables[name].context():
            return device.enqueue(runnables[name].call, CALLS_PER_CHUNK) / CALLS_PER_CHUNK

    warm = take_turns(runnables, 1, rng, turn, failed)
    samples = take_turns(warm, chunks, rng, turn, failed)
    return {name: (taken, CALLS_PER_CHUNK) for name, taken in samples.items()}
