"""flash_attn_func and flash_attn_qkvpacked_func: validate, plan, compile or fetch, launch."""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch.autograd import forward_ad

from . import reference
from .autograd import Differentiable
from .launch import BackwardLaunch, Launch, device_of, restrided
from .plan import plan_backward, plan_forward
from .problem import Problem, check_arguments, refuse_tangent, unpack

CALLS_REMEMBERED = 4096  # distinct (shapes, strides, options) whose validation and plan are kept
OPERATORS = getattr(torch.ops, __package__)  # which ops.py defines


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
        deterministic: q's gradient is equal to the last bit from run to run, for which the backward takes up to 1.16
            times as long (H200, 4k and up); out and the gradients of k and v are anyway.
        sm_margin: SMs that the forward leaves to other kernels.
        return_attn_probs: also return the log-sum-exp of each row.
        qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa:
            FlashAttention-3's arguments whose features do not exist here yet; anything but "off" raises.

    Returns:
        out like q, contiguous; with return_attn_probs, (out, lse), lse (batch, heads, seqlen_q) fp32, natural log.
        A row that sees no key, or whose scores are all -inf, is zeros in out and -inf in lse. Scaled scores of more than 1e8
        in magnitude are past what fp32 resolves: such rows may come out as anything.

    Gradients: of out, for those of q, k and v that require grad; q, k, v, out and lse are kept for it. lse is not
        differentiable: it never requires grad. A row that sees no key has gradient 0. The gradient of out may lie in memory
        in any way; what a kernel can't read is copied. No second derivatives, no forward mode.
    torch.autocast: fp32 tensors are cast to its dtype, as for torch's scaled_dot_product_attention, and gradients come back
        in fp32; fp16 and bf16 tensors stay what they are.
    torch.compile, torch.export: a call is one operator, fa3::forward; nothing breaks the graph, and lengths may be dynamic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, layout or value, by name.
        NotImplementedError: an argument whose feature does not exist yet, a tangent of forward-mode differentiation,
            a second derivative, or a CUDA device that is not Hopper.
    """
    options = (
        softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits,
        pack_gqa, deterministic, sm_margin, return_attn_probs,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return traced(q, k, v, options)
    return find_call(q, k, v, options)(q, k, v)


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
    """flash_attn_func of q, k and v that live in one tensor; nothing is copied, and their gradients live in one tensor too.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, heads + 2 · heads_kv, head_dim):
            the query heads, then the key heads, then the value heads.
        num_heads_q: the number of query heads in a 4-dimensional qkv.
        The others: as in flash_attn_func.

    Returns, raises: as flash_attn_func.
    """
    q, k, v = unpack(qkv, num_heads_q)
    options = (
        softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, 1,
        None, deterministic, sm_margin, return_attn_probs,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return traced(q, k, v, options)
    refuse_tangent("qkv", qkv)
    call = find_call(q, k, v, options)
    return call.packed(qkv, num_heads_q) if isinstance(call, Differentiable) else call(q, k, v)


def explain(q, k, v, causal=False):
    """One line that says which kernel and launch flash_attn_func(q, k, v, causal=causal) takes."""
    problem = Problem.of(q, k, v, softmax_scale=None, causal=causal, sm_margin=0, lse=False, unsupported={})
    if not q.is_cuda:
        return "reference (CPU tensors)"
    if problem.empty:
        return "no kernel (nothing to attend to)"
    return str(plan_forward(problem, device_of(q.device)))


CALLS = {}  # what a call's shapes, strides and options decided, once


def find_call(q, k, v, options, operator=False):
    """The function of (q, k, v) that runs a call: remembered, or validated and planned.

    options: in flash_attn_func's order. operator: the call stands inside an operator, which autograd and autocast surround.
    """
    gradients = False
    try:
        gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad) and not operator
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, q.is_neg() or k.is_neg() or v.is_neg(), gradients, options, *map(type, options),
        )  # fmt: skip
        call = CALLS.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no strided tensors, or unhashable: the validation says which
        key = call = None
    if call is None or getattr(forward_ad, "_current_level", 0) >= 0:  # a key shows no tangents; 0 where torch has renamed it
        if not operator:
            low = [lowered(t) for t in (q, k, v)]
            if low[0] is not q or low[1] is not k or low[2] is not v:
                return lambda q, k, v: find_call(*low, options)(*low)
        call = planned_call(Problem.of(q, k, v, **named(*options)), q, k, v, gradients)
        if key is not None:
            if len(CALLS) >= CALLS_REMEMBERED:
                CALLS.clear()
            CALLS[key] = call
    return call


def named(
    softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa,
    deterministic, sm_margin, return_attn_probs,
):  # fmt: skip
    """flash_attn_func's options as the validation takes them."""
    return dict(
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
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
        },
    )


def lowered(t):
    """t as torch.autocast hands it to torch's own attention: what is fp32, in autocast's dtype for its device."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.float32 or t.device.type not in ("cuda", "cpu"):
        return t
    device = t.device.type
    return t.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


def traced(q, k, v, options):
    """The call as torch.compile sees it: checked as far as shapes and options go, then one operator."""
    q, k, v = lowered(q), lowered(k), lowered(v)
    arguments = named(*options)
    scale = check_arguments(q, k, v, **arguments)
    out, lse = OPERATORS.forward(q, k, v, scale, arguments["causal"], arguments["deterministic"], arguments["sm_margin"])
    return (out, lse) if arguments["lse"] else out


def planned_call(problem, q, k, v, gradients):
    """The function of (q, k, v) that runs this problem, recorded for autograd where gradients are wanted."""
    if not gradients:
        return forward_of(problem, q, k, v)
    backward = backward_of(problem, q.device)  # planned now, so that what it can't do shows here
    return Differentiable(forward_of(replace(problem, lse=True), q, k, v), backward, problem.lse)


def forward_of(problem, q, k, v):
    """The function of (q, k, v) that computes this problem: reference, no kernel at all, or a planned launch."""
    if problem.empty:
        return lambda q, k, v: nothing_to_attend(problem, q)
    if not q.is_cuda:
        return lambda q, k, v: run_reference(problem, q, k, v)
    plan = plan_forward(problem, device_of(q.device))
    return Launch(problem, plan, [restrided(t) for t in (q, k, v)])


@lru_cache(CALLS_REMEMBERED)
def backward_of(problem, device):
    """The function of (dout, q, k, v, out, lse, dq, dk, dv) that computes this problem's gradients: as forward_of."""
    if problem.empty:
        return no_gradients
    if device.type == "cpu":
        return partial(reference_gradients, problem)
    return BackwardLaunch(problem, plan_backward(problem, device_of(device)))


def run_reference(problem, q, k, v):
    out, lse = reference.attention(q, k, v, softmax_scale=problem.softmax_scale, causal=problem.causal)
    return (out, lse) if problem.lse else out


def reference_gradients(problem, dout, q, k, v, out, lse, dq, dk, dv):
    gradients = reference.gradients(dout, q, k, v, softmax_scale=problem.softmax_scale, causal=problem.causal)
    for written, computed in zip((dq, dk, dv), gradients):
        written.copy_(computed)


def nothing_to_attend(problem, q):
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse_shape = (problem.batch, problem.heads, problem.seqlen_q)
    return (out, torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)) if problem.lse else out


def no_gradients(dout, q, k, v, out, lse, dq, dk, dv):
    for written in (dq, dk, dv):
        written.zero_()
