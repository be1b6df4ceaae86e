"""flash_attn_func and flash_attn_qkvpacked_func: validate, plan, compile or fetch, launch."""

from functools import lru_cache

import torch
from torch.autograd import forward_ad

from . import jit, reference
from .plan import Device, plan_forward
from .problem import Problem, check_address, refuse_grad

CALLS_REMEMBERED = 4096  # distinct (shapes, strides, options) whose validation and plan are kept


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Exact attention, softmax(q kᵀ · softmax_scale) v, in one fused kernel (FlashAttention-3, arXiv 2407.08608).

    Args:
        q: (batch, seqlen_q, heads, head_dim), fp16 or bf16; head_dim 64, 128 or 256. Last dimension contiguous, other
            strides free but multiples of 16 bytes. CUDA tensors need a Hopper GPU; CPU tensors run the reference.
        k, v: (batch, seqlen_k, heads_kv, head_dim), q's dtype and device. heads must be a multiple of heads_kv: query
            head h reads head h // (heads // heads_kv) (grouped-query and multi-query attention).
        softmax_scale: factor of the scores before the softmax, at most 2 ** 127 in magnitude (below fp32's smallest normal
            number it counts as 0); None means head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (aligned to the bottom right).
        sm_margin: SMs to leave to other kernels.
        return_attn_probs: also return the log-sum-exp of each row.
        qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa, deterministic:
            FlashAttention-3's arguments whose features do not exist here yet; anything but "off" raises.

    Returns:
        out like q, contiguous; with return_attn_probs, (out, lse), lse (batch, heads, seqlen_q) fp32, natural log.
        A row that sees no key, or whose scores are all -inf, is zeros in out and -inf in lse. Scaled scores of more than 1e8
        in magnitude are past what fp32 resolves: such rows may come out as anything.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, layout or value, by name.
        NotImplementedError: an argument whose feature does not exist yet, inputs that require grad (no backward yet),
            or a CUDA device that is not Hopper.
    """
    options = (
        softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits,
        pack_gqa, deterministic, sm_margin, return_attn_probs,
    )  # fmt: skip
    try:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, q.is_neg() or k.is_neg() or v.is_neg(), options, *map(type, options),
        )  # fmt: skip
        call = CALLS.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no strided tensors, or unhashable: the validation says which
        key = call = None
    if call is None or carry_derivatives(q, k, v):
        problem = Problem.of(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=causal,
            sm_margin=sm_margin,
            lse=return_attn_probs,
            unsupported={
                "qv": (qv, [None]),
                "q_descale": (q_descale, [None]),
                "k_descale": (k_descale, [None]),
                "v_descale": (v_descale, [None]),
                "window_size": (tuple(window_size) if isinstance(window_size, list) else window_size, [(-1, -1)]),
                "attention_chunk": (attention_chunk, [0]),
                "softcap": (softcap, [0.0, 0]),
                "num_splits": (num_splits, [1, 0]),
                "pack_gqa": (pack_gqa, [None, False]),
                "deterministic": (deterministic, [False]),
            },
        )
        call = call_for(problem, q, k, v)
        if key is not None:
            if len(CALLS) >= CALLS_REMEMBERED:
                CALLS.clear()
            CALLS[key] = call
    return call(q, k, v)


def carry_derivatives(q, k, v):
    """Whether derivatives may be asked for, backward or (tangents, which a key can't show) in forward mode."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return backward or getattr(forward_ad, "_current_level", 0) >= 0  # 0 where torch has renamed it: slower, not wrong


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_func of q, k and v that live in one tensor; nothing is copied.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, heads + 2 · heads_kv, head_dim):
            the query heads, then the key heads, then the value heads.
        num_heads_q: the number of query heads in a 4-dimensional qkv.
        The others: as in flash_attn_func.

    Returns, raises: as flash_attn_func.
    """
    q, k, v = unpack(qkv, num_heads_q)
    refuse_grad("qkv", qkv)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def unpack(qkv, num_heads_q):
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv must be a torch.Tensor, got {type(qkv).__name__}")
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv must be (batch, seqlen, 3, heads, head_dim), got shape {tuple(qkv.shape)}")
        if num_heads_q is not None:
            raise ValueError(f"num_heads_q goes with a 4-dimensional qkv, got {num_heads_q!r} with {qkv.dim()} dimensions")
        return qkv.unbind(2)
    if qkv.dim() != 4:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, heads + 2 · heads_kv, "
            f"head_dim), got shape {tuple(qkv.shape)}"
        )
    if not isinstance(num_heads_q, int) or isinstance(num_heads_q, bool):
        raise TypeError(f"num_heads_q must be an int where qkv has 4 dimensions, got {num_heads_q!r}")
    heads_kv, odd = divmod(qkv.shape[2] - num_heads_q, 2)
    if odd or num_heads_q < 1 or heads_kv < 1:
        raise ValueError(f"num_heads_q must leave an even number of K and V heads of qkv's {qkv.shape[2]}, got {num_heads_q}")
    return qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)


def explain(q, k, v, causal=False):
    """One line that says which kernel and launch flash_attn_func(q, k, v, causal=causal) takes."""
    problem = Problem.of(q, k, v, softmax_scale=None, causal=causal, sm_margin=0, lse=False, unsupported={})
    if not q.is_cuda:
        return "reference (CPU tensors)"
    if problem.empty:
        return "no kernel (nothing to attend to)"
    return str(plan_forward(problem, device_of(q.device)))


CALLS = {}  # what a call's shapes, strides and options decided, once


def call_for(problem, q, k, v):
    """The function of (q, k, v) that runs this problem: reference, no kernel at all, or a planned launch."""
    if problem.empty:
        return lambda q, k, v: nothing_to_attend(problem, q)
    if not q.is_cuda:
        return lambda q, k, v: run_reference(problem, q, k, v)
    plan = plan_forward(problem, device_of(q.device))
    return Launch(problem, plan, [restrided(t) for t in (q, k, v)])


def run_reference(problem, q, k, v):
    out, lse = reference.attention(q, k, v, softmax_scale=problem.softmax_scale, causal=problem.causal)
    return (out, lse) if problem.lse else out


def nothing_to_attend(problem, q):
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse_shape = (problem.batch, problem.heads, problem.seqlen_q)
    return (out, torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)) if problem.lse else out


class Launch:
    """A planned forward call: allocates the output and starts the kernel on torch's current stream."""

    def __init__(self, problem, plan, strides):
        self.kernel = jit.get(plan.config)
        self.strides = strides if any(strides) else None
        self.out_shape = (problem.batch, problem.seqlen_q, problem.heads, problem.head_dim)
        self.lse_shape = (problem.batch, problem.heads, problem.seqlen_q) if problem.lse else None
        # exp(s · scale) is taken against the largest s, so the kernel wants a positive scale: its sign, or 0, goes into q
        scale = abs(problem.softmax_scale)
        if scale == 0.0:
            self.q_factor, scale = 0.0, 1.0
        else:
            self.q_factor = -1.0 if problem.softmax_scale < 0 else None
        self.arguments = (scale, plan.head_group, plan.ctas, int(problem.sm_margin > 0))
        self.counter = no_counter
        if plan.config.scheduler == "dynamic":
            self.counter = counter_for if plan.counted else untouched_counter

    def __call__(self, q, k, v):
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (at_q | at_k | at_v) & 15 or not (at_q and at_k and at_v):
            for name, t in (("q", q), ("k", k), ("v", v)):
                check_address(name, t)
        if self.strides is not None:
            q, k, v = (t if s is None else t.as_strided(t.shape, s) for t, s in zip((q, k, v), self.strides))
        if self.q_factor is not None:
            q = q * self.q_factor
        out = q.new_empty(*self.out_shape)
        counter = self.counter(q.device)
        if self.lse_shape is None:
            self.kernel(q, k, v, out, None, *self.arguments, counter)
            return out
        lse = q.new_empty(*self.lse_shape, dtype=torch.float32)
        self.kernel(q, k, v, out, lse, *self.arguments, counter)
        return out, lse


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
        return torch.zeros(2, dtype=torch.int32, device=device)
    counter = COUNTERS.get((device, stream))
    if counter is None:
        counter = COUNTERS[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return counter


@lru_cache
def untouched_counter(device):
    """What a dynamic schedule gets that will not count: a launch needs some tensor, and this one costs a graph no node."""
    return torch.empty(2, dtype=torch.int32, device=device)


def no_counter(device):
    """What the other schedules get."""
    return None


@lru_cache
def device_of(device):
    properties = torch.cuda.get_device_properties(device)
    return Device(sms=properties.multi_processor_count, l2_bytes=properties.L2_cache_size)
