"""Planned launches: what is decided once for a problem, and what a call then does with its tensors."""

from functools import lru_cache

import torch

from . import jit
from .plan import Device
from .problem import check_address, odd_strides


class Launch:
    """A planned forward call: allocates the output and starts the kernel on torch's current stream."""

    def __init__(self, problem, plan, strides):
        self.kernel = jit.get(plan.config)
        self.strides = strides if any(strides) else None
        self.out_shape = (problem.batch, problem.seqlen_q, problem.heads, problem.head_dim)
        self.lse_shape = (problem.batch, problem.heads, problem.seqlen_q) if problem.lse else None
        self.q_factor, scale = positive(problem.softmax_scale)
        self.arguments = (scale, plan.head_group, plan.ctas, int(problem.sm_margin > 0))
        self.counter = self.fresh_counter = no_counter
        if plan.config.scheduler == "dynamic":
            self.counter, self.fresh_counter = (counter_for, zeros) if plan.counted else (untouched_counter, uninitialised)

    def __call__(self, q, k, v, keep=True):
        """keep: whether a counter may outlive the call. Not in memory that belongs to a CUDA graph, as torch.compile's may."""
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (at_q | at_k | at_v) & 15 or not (at_q and at_k and at_v):
            for name, t in (("q", q), ("k", k), ("v", v)):
                check_address(name, t)
        if self.strides is not None:
            q, k, v = (t if s is None else t.as_strided(t.shape, s) for t, s in zip((q, k, v), self.strides))
        if self.q_factor is not None:
            q = q * self.q_factor
        out = q.new_empty(*self.out_shape)
        counter = (self.counter if keep else self.fresh_counter)(q.device)
        if self.lse_shape is None:
            self.kernel(q, k, v, out, None, *self.arguments, counter)
            return out
        lse = q.new_empty(*self.lse_shape, dtype=torch.float32)
        self.kernel(q, k, v, out, lse, *self.arguments, counter)
        return out, lse


class BackwardLaunch:
    """A planned backward call: allocates the workspace and starts the kernels on torch's current stream.

    dout may lie in memory in any way: what TMA can't read is copied. So may the others, which saved_tensors_hooks move.
    dq, dk and dv are written whole: last dimension contiguous, other strides and the address multiples of 16 bytes.
    """

    def __init__(self, problem, plan):
        self.kernel = jit.get(plan.config)
        self.q_factor, self.scale = positive(problem.softmax_scale)
        self.workspace = plan.workspace.values()
        self.sms = plan.sms

    def __call__(self, dout, q, k, v, out, lse, dq, dk, dv):
        if self.q_factor is not None:
            q = q * self.q_factor
        q, k, v, out, dout = map(readable, (q, k, v, out, dout))
        workspace = [None if needed is None else allocated(*needed, q.device) for needed in self.workspace]
        self.kernel(q, k, v, out, dout, lse.contiguous(), dq, dk, dv, *workspace, self.scale, self.sms)
        if self.q_factor is not None:
            dq.mul_(self.q_factor)


def positive(softmax_scale):
    """(a factor for q or None, a positive scale) that stand for a scale.

    exp(s · scale) is taken against the largest s, so kernels want a positive scale: its sign, or 0, goes into q.
    """
    if softmax_scale == 0.0:
        return 0.0, 1.0
    return (-1.0 if softmax_scale < 0 else None), abs(softmax_scale)


def allocated(shape, dtype, device):
    """dtype: its name."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def readable(t):
    """t as TMA can read it: as it is, with other strides where a dimension's size is 1, or a copy."""
    t = t.resolve_neg()
    if t.stride(3) != 1 or odd_strides(t) or t.data_ptr() % 16:
        t = t.clone(memory_format=torch.contiguous_format)
    strides = restrided(t)
    return t if strides is None else t.as_strided(t.shape, strides)


def restrided(t):
    """Strides that TMA can take in place of t's: those of dimensions of size 1 are arbitrary. None if t's will do."""
    strides = tuple(8 if size == 1 and i < 3 else stride for i, (size, stride) in enumerate(zip(t.shape, t.stride())))
    needed = any(size == 1 and stride * t.element_size() % 16 for size, stride in zip(t.shape[:3], t.stride()))
    return strides if needed else None


COUNTERS = {}  # (device, stream) -> a dynamic schedule's counter, which every launch leaves zero


def counter_for(device):
    """Two zeros on the device that no launch which may run at the same time uses.

    Launches on one stream follow each other, so they share a counter. A CUDA graph may be replayed beside any stream, and
    the id of a stream that isn't torch's (an even one, but for the default stream's 0; torch's c10/cuda/CUDAStream.cpp) may
    stand for several or come back for another one: those calls get a counter of their own, from torch's allocator. (Threads
    on per-thread default streams share one id, by which that allocator reuses memory: no torch allocation is safe there.)
    """
    stream = torch.cuda.current_stream(device).stream_id
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing or (stream != 0 and stream % 2 == 0):
        return zeros(device)
    counter = COUNTERS.get((device, stream))
    if counter is None:
        counter = COUNTERS[device, stream] = zeros(device)
    return counter


def zeros(device):
    """A counter for one call."""
    return torch.zeros(2, dtype=torch.int32, device=device)


@lru_cache
def untouched_counter(device):
    """What a dynamic schedule gets that will not count: a launch needs some tensor, and this one costs a graph no node."""
    return uninitialised(device)


def uninitialised(device):
    """The same for one call."""
    return torch.empty(2, dtype=torch.int32, device=device)


def no_counter(device):
    """What the other schedules get."""
    return None


@lru_cache
def device_of(device):
    properties = torch.cuda.get_device_properties(device)
    return Device(sms=properties.multi_processor_count, l2_bytes=properties.L2_cache_size)
