"""fa3::forward and fa3::backward: the operators that stand for an attention in a graph of torch.compile or torch.export.

Eager calls don't take this way: dispatching an operator costs the host about what a whole call does. A copy of this package
under another name has operators of that name.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from .attention import CALLS_REMEMBERED, OPERATORS, backward_of, find_call
from .autograd import refuse_second_derivatives
from .launch import Launch, readable
from .problem import Problem, check_arguments, check_gradient

FORWARD, BACKWARD = f"{__package__}::forward", f"{__package__}::backward"
DEVICES = ("cpu", "cuda")
OFF = (None, None, None, None, (-1, -1), 0, 0.0, 1, None)  # flash_attn_func's options from qv to pack_gqa

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, bool deterministic, int sm_margin) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    BACKWARD,
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float softmax_scale, bool causal, bool deterministic)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(FORWARD, DEVICES)
def forward(q, k, v, softmax_scale, causal, deterministic, sm_margin):
    """(out, lse) of flash_attn_func, and its errors: what lies in memory is only known here."""
    call = find_call(q, k, v, (softmax_scale, causal, *OFF, deterministic, sm_margin, True), operator=True)
    return call(q, k, v, keep=False) if isinstance(call, Launch) else call(q, k, v)


@torch.library.register_fake(FORWARD)
def forward_shapes(q, k, v, softmax_scale, causal, deterministic, sm_margin):
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


@torch.library.impl(BACKWARD, DEVICES)
def backward(dout, q, k, v, out, lse, softmax_scale, causal, deterministic):
    """(dq, dk, dv), contiguous. Strides are free here: what TMA can't read is copied."""
    tensors = dout, q, k, v, out, lse
    key = (*((t.shape, t.dtype, t.device) for t in tensors), softmax_scale, causal, deterministic)
    call = BACKWARD_CALLS.get(key)
    if call is None:
        arguments = dict(softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)
        arguments |= dict(sm_margin=0, lse=True, unsupported={})
        check_arguments(q, k, v, **arguments)
        check_gradient(dout, q, out, lse)
        problem = Problem.of(*map(readable, (q, k, v)), **arguments)
        if len(BACKWARD_CALLS) >= CALLS_REMEMBERED:
            BACKWARD_CALLS.clear()
        call = BACKWARD_CALLS[key] = backward_of(problem, q.device)
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    if q.device.type == "cpu":  # by autograd, which records nothing inside an operator: in a thread, which isn't inside one
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call, *tensors, *gradients).result()
    else:
        call(*tensors, *gradients)
    return gradients


BACKWARD_CALLS = {}  # as attention.CALLS


@torch.library.register_fake(BACKWARD)
def backward_shapes(dout, q, k, v, out, lse, softmax_scale, causal, deterministic):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save(ctx, inputs, output):
    q, k, v, softmax_scale, causal, deterministic, _ = inputs
    out, lse = output
    ctx.options = softmax_scale, causal, deterministic
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def gradients(ctx, dout, _):
    return *OPERATORS.backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None


torch.library.register_autograd(FORWARD, gradients, setup_context=save)
torch.library.register_autograd(BACKWARD, refuse_second_derivatives)
