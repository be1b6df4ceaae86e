"""How autograd records an attention: q, k, v, out and lse are saved, and nothing else; lse has no gradient."""

import torch

from .problem import unpack


class Differentiable:
    """A call whose gradients are wanted.

    forward: (q, k, v) -> (out, lse).
    backward: (dout, q, k, v, out, lse, dq, dk, dv) -> None; writes the last three.
    lse: whether the caller gets it.
    """

    def __init__(self, forward, backward, lse):
        self.forward = forward
        self.backward = backward
        self.lse = lse

    def __call__(self, q, k, v):
        out, lse = Attention.apply(self, q, k, v)
        return (out, lse) if self.lse else out

    def packed(self, qkv, num_heads_q):
        """The same of q, k and v that live in qkv, whose gradient is written in one piece."""
        out, lse = PackedAttention.apply(self, num_heads_q, qkv)
        return (out, lse) if self.lse else out


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, q, k, v):
        return record(ctx, call, call.forward(q, k, v), q, k, v)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return None, None, None, None
        gradients = Gradients.apply(ctx.call, dout, *ctx.saved_tensors)
        return None, *(dx if needed else None for dx, needed in zip(gradients, ctx.needs_input_grad[1:]))


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, num_heads_q, qkv):
        ctx.num_heads_q = num_heads_q
        return record(ctx, call, call.forward(*unpack(qkv, num_heads_q)), qkv)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return None, None, None
        return None, None, PackedGradients.apply(ctx.call, ctx.num_heads_q, dout, *ctx.saved_tensors)


def record(ctx, call, results, *inputs):
    out, lse = results
    ctx.call = call
    ctx.save_for_backward(*inputs, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else a zero gradient of lse would be made for each backward
    return out, lse


def refuse_second_derivatives(ctx, *gradients):
    raise NotImplementedError("second derivatives are not supported: attention's gradients can't be differentiated again")


class Gradients(torch.autograd.Function):
    backward = staticmethod(refuse_second_derivatives)

    @staticmethod
    def forward(ctx, call, dout, q, k, v, out, lse):
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        call.backward(dout, q, k, v, out, lse, *gradients)
        return gradients


class PackedGradients(torch.autograd.Function):
    backward = staticmethod(refuse_second_derivatives)

    @staticmethod
    def forward(ctx, call, num_heads_q, dout, qkv, out, lse):
        dqkv = qkv.new_empty(qkv.shape)
        call.backward(dout, *unpack(qkv, num_heads_q), out, lse, *unpack(dqkv, num_heads_q))
        return dqkv
