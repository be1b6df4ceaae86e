"""Attention in plain PyTorch: what CPU tensors run, and what every kernel is compared with.

`attention` is the truth, in fp32 or fp64. `plain_attention` is the yardstick: attention as one writes it in PyTorch, in
the inputs' own dtype, whose error against the truth is what a kernel's error is measured by.
Source: FlashAttention-3, arXiv 2407.08608, section 2.1: S = Q Kᵀ · scale, P = softmax(S), O = P V.
"""

import torch

SCORES_AT_ONCE = 1 << 26  # elements of S that `attention` holds at a time: 256 MB in fp32


def attention(q, k, v, *, softmax_scale=None, causal=False, dtype=torch.float32, out_dtype=None):
    """Exact attention: O = softmax(Q Kᵀ · softmax_scale) V, over chunks of queries so that memory stays bounded.

    q: (batch, seqlen_q, heads, d); k: (batch, seqlen_k, heads_kv, d); v: (batch, seqlen_k, heads_kv, d_v); any
        floating dtype, any strides. Query head h attends to K/V head h // (heads // heads_kv).
    softmax_scale: None for 1/sqrt(d).
    causal: aligned to the bottom right: query i sees the keys j <= i + seqlen_k - seqlen_q.
    dtype: what is computed in; torch.float64 for a reference of the reference.
    out_dtype: dtype of O, q's own by default.

    Returns O, (batch, seqlen_q, heads, d_v), and the LSE, fp32 (batch, heads, seqlen_q): the natural logarithm of the
    row's sum of exponentials of scaled scores. A row that sees no key, or only scores of -inf, has O = 0 and LSE = -inf.
    NaN and infinity spread as the formula spreads them: a hidden key counts as 0 · V, which is NaN where V isn't finite.
    Differentiable by autograd; autocast doesn't reach inside. Shapes that don't fit raise torch's RuntimeError; fa3.problem is
    what checks a call.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _attention(q, k, v, softmax_scale, causal, dtype, out_dtype or q.dtype)


def _attention(q, k, v, softmax_scale, causal, dtype, out_dtype):
    batch, seqlen_q, heads, d = q.shape
    seqlen_k, heads_kv, d_v = v.shape[1:]
    group = heads // heads_kv
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    K = k.to(dtype).permute(0, 2, 3, 1)
    V = v.to(dtype).transpose(1, 2)

    blind = seqlen_q if seqlen_k == 0 else max(0, seqlen_q - seqlen_k) if causal else 0  # first rows, which see nothing
    O = [torch.zeros(batch, blind, heads, d_v, dtype=out_dtype, device=q.device)]
    lse = [torch.full((batch, heads, blind), float("-inf"), dtype=torch.float32, device=q.device)]
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * seqlen_k))
    for start in range(blind, seqlen_q, step):
        rows = min(step, seqlen_q - start)
        Q = q[:, start : start + rows].to(dtype).unflatten(2, (heads_kv, group))
        Q = Q.permute(0, 2, 3, 1, 4).reshape(batch, heads_kv, group * rows, d)
        S = (Q @ K * scale).view(batch, heads, rows, seqlen_k)
        if causal:
            S = S.masked_fill(_hidden(start, rows, seqlen_q, seqlen_k, q.device), float("-inf"))
        nothing = S.amax(dim=-1, keepdim=True) == float("-inf")
        P = torch.softmax(S.masked_fill(nothing, 0), dim=-1)
        PV = (P.view(batch, heads_kv, group * rows, seqlen_k) @ V).view(batch, heads, rows, d_v)
        O.append(PV.masked_fill(nothing, 0).transpose(1, 2))
        lse.append(torch.logsumexp(S, dim=-1))
    return torch.cat([o.to(out_dtype) for o in O], dim=1), torch.cat([x.float() for x in lse], dim=2)


def gradients(dout, q, k, v, *, softmax_scale=None, causal=False, dtype=torch.float32, out_dtype=None):
    """dQ, dK and dV of `attention` by autograd, over chunks of queries so that memory stays bounded.

    dout: the gradient of O, of its shape. out_dtype: dtype of all three, each input's own by default. The others: as in
    `attention`. A query that sees no key has gradient 0, and gives none.
    """
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * seqlen_k))
    with torch.autocast(q.device.type, enabled=False), torch.enable_grad():
        K, V = (x.detach().to(dtype).requires_grad_() for x in (k, v))
        dQ, dK, dV = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for start in range(0, seqlen_q, step):
            stop = min(start + step, seqlen_q)
            seen = seqlen_k - (seqlen_q - stop) * causal  # by the chunk's last query
            if seen > 0:
                Q = q[:, start:stop].detach().to(dtype).requires_grad_()
                O, _ = _attention(Q, K[:, :seen], V[:, :seen], softmax_scale, causal, dtype, dtype)
                dQ[:, start:stop], dk, dv = torch.autograd.grad(O, (Q, K, V), dout[:, start:stop].detach().to(dtype))
                dK += dk
                dV += dv
    return tuple(dx.to(out_dtype or x.dtype) for dx, x in ((dQ, q), (dK, k), (dV, v)))


def plain_attention(q, k, v, causal=False, softmax_scale=None):
    """Attention as plain PyTorch does it: both products and the softmax in the inputs' dtype, S and P in memory whole.

    Shapes, scale and mask as in `attention`; returns O alone, in q's dtype, 0 in rows that see no key.
    """
    seqlen_q, heads, d = q.shape[1:]
    group = heads // k.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    Q = q.transpose(1, 2)
    K, V = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    S = Q @ K.transpose(2, 3) * scale
    if not causal:
        return (torch.softmax(S, dim=-1) @ V).transpose(1, 2)
    hidden = _hidden(0, seqlen_q, seqlen_q, k.shape[1], q.device)
    P = torch.softmax(S.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0)
    return (P @ V).transpose(1, 2)


def _hidden(start, rows, seqlen_q, seqlen_k, device):
    """(rows, seqlen_k) bool: the keys that the causal mask hides from the queries start, start + 1, ..."""
    last_seen = torch.arange(start, start + rows, device=device) + seqlen_k - seqlen_q
    return torch.arange(seqlen_k, device=device) > last_seen[:, None]
