"""The public functions on CPU tensors: values, LSE, dtypes, layouts and defaults, with the semantics of the kernels."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fa3
from fa3 import flash_attn_func, flash_attn_qkvpacked_func

FP16, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])


def normal(batch, seqlen, heads, d, dtype=BF16):
    g = torch.Generator().manual_seed(seqlen * 100 + heads)
    return torch.randn(batch, seqlen, heads, d, generator=g).to(dtype)


def by_torch(q, k, v, scale=None, causal=False):
    """(O, LSE) in fp32 by torch's own attention, given the mask as a matrix; for rows that each see something."""
    Q, K, V = (x.float().transpose(1, 2) for x in (q, k, v))
    K, V = (x.repeat_interleave(Q.shape[1] // K.shape[1], dim=1) for x in (K, V))
    seen = torch.ones(Q.shape[2], K.shape[2], dtype=torch.bool)
    if causal:
        seen = seen.tril(K.shape[2] - Q.shape[2])
    out = F.scaled_dot_product_attention(Q, K, V, attn_mask=seen, scale=scale).transpose(1, 2)
    scores = Q @ K.mT * (scale if scale is not None else Q.shape[3] ** -0.5)
    return out, scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


@dtypes
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (4, 1), (6, 2)], ids=["mha", "mqa", "gqa"])
@pytest.mark.parametrize("scale", [None, 0.3, -0.1, 0.0, 1])
def test_values(dtype, d, causal, heads, heads_kv, scale):
    q, k, v = normal(2, 21, heads, d, dtype), normal(2, 34, heads_kv, d, dtype), normal(2, 34, heads_kv, d, dtype) + 1
    out, lse = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    want, want_lse = by_torch(q, k, v, scale, causal)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (dtype, q.shape, torch.float32, (2, heads, 21))
    torch.testing.assert_close(out.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)  # fp32 inside, rounded once
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(flash_attn_func(q, k, v, softmax_scale=scale, causal=causal), out)


@dtypes
def test_rows_that_see_nothing(dtype):
    q, k, v = normal(2, 9, 4, 64, dtype), normal(2, 4, 2, 64, dtype), normal(2, 4, 2, 64, dtype)
    out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == float("-inf")).all()
    want, want_lse = by_torch(q[:, 5:], k, v, causal=True)
    torch.testing.assert_close(out[:, 5:].float(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(lse[:, :, 5:], want_lse, rtol=1e-5, atol=1e-5)
    out, lse = flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert out.dtype == dtype and (out == 0).all() and (lse == float("-inf")).all()


def test_nothing_in_nothing_out():
    for batch, seqlen_q, seqlen_k in ((0, 5, 7), (2, 0, 7), (0, 0, 0)):
        q, k, v = normal(batch, seqlen_q, 4, 64), normal(batch, seqlen_k, 2, 64), normal(batch, seqlen_k, 2, 64)
        out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (batch, 4, seqlen_q)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_qkvpacked_equals_separate(causal):
    qkv = normal(2, 20, 12, 64)
    five = qkv.view(2, 20, 3, 4, 64)
    options = dict(softmax_scale=0.2, causal=causal, return_attn_probs=True)
    got = flash_attn_qkvpacked_func(five, **options)
    want = flash_attn_func(five[:, :, 0], five[:, :, 1], five[:, :, 2], **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    got = flash_attn_qkvpacked_func(qkv, num_heads_q=8, **options)
    want = flash_attn_func(qkv[:, :, :8], qkv[:, :, 8:10], qkv[:, :, 10:], **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(flash_attn_qkvpacked_func(five, 0.2, causal), flash_attn_qkvpacked_func(five, **options)[0])


def test_values_that_mean_off_are_accepted():
    q, k, v = normal(1, 20, 4, 64), normal(1, 20, 2, 64), normal(1, 20, 2, 64)
    want = flash_attn_func(q, k, v, softmax_scale=0.2, causal=True)
    got = flash_attn_func(q, k, v, 0.2, True, None, None, None, None, (-1, -1), 0, 0.0, 1, None, False, 0, False)
    assert torch.equal(got, want)
    offs = dict(num_splits=0), dict(pack_gqa=False), dict(window_size=[-1, -1]), dict(softcap=0)
    nothing_to_the_output = dict(sm_margin=8), dict(deterministic=True)
    for off in (*offs, *nothing_to_the_output):
        assert torch.equal(flash_attn_func(q, k, v, softmax_scale=0.2, causal=True, **off), want), off


def test_each_call_is_its_own():
    """What one call's options decide must not leak into the next call on tensors of the same shape."""
    q, k, v = normal(1, 20, 4, 64), normal(1, 20, 4, 64), normal(1, 20, 4, 64) + 1
    for causal, scale in ((False, None), (True, None), (False, 1.0), (True, 0.0), (False, 0.0), (False, None)):
        out = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
        torch.testing.assert_close(out.float(), by_torch(q, k, v, scale, causal)[0], rtol=2**-7, atol=1e-5)


def test_inputs_are_not_modified():
    tensors = [normal(2, 20, 4, 64), normal(2, 30, 2, 64), normal(2, 30, 2, 64)]
    before = [x.clone() for x in tensors]
    flash_attn_func(*tensors, softmax_scale=-0.5, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))


def test_signatures_are_flash_attention_3s():
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, None if p.default is p.empty else p.default) for p in parameters]

    descales = [("q_descale", None), ("k_descale", None), ("v_descale", None)]
    window = [("window_size", (-1, -1)), ("attention_chunk", 0), ("softcap", 0.0)]
    assert defaults(flash_attn_func) == (
        [("q", None), ("k", None), ("v", None), ("softmax_scale", None), ("causal", False), ("qv", None)] + descales + window
        + [("num_splits", 1), ("pack_gqa", None), ("deterministic", False), ("sm_margin", 0), ("return_attn_probs", False)]
    )  # fmt: skip
    assert defaults(flash_attn_qkvpacked_func) == (
        [("qkv", None), ("softmax_scale", None), ("causal", False)] + descales + window
        + [("deterministic", False), ("num_heads_q", None), ("sm_margin", 0), ("return_attn_probs", False)]
    )  # fmt: skip
    assert {"flash_attn_func", "flash_attn_qkvpacked_func"} <= set(fa3.__all__)


def test_lse_is_fp32_whatever_torchs_default_dtype():
    q, k = normal(1, 4, 2, 64), normal(1, 0, 2, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for keys in (k, q):
            assert flash_attn_func(q, keys, keys, causal=True, return_attn_probs=True)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@dtypes
def test_autocast_lets_16_bit_tensors_be(dtype):
    q, k, v = (normal(2, 40, 4, 64, dtype) for _ in range(3))
    want = flash_attn_func(q, k, v, return_attn_probs=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@dtypes
def test_autocast_casts_fp32(dtype):
    """All of them or some, as rotary embeddings in fp32 leave them; what was remembered of one state says nothing of another."""
    q, k, v = (normal(2, 40, 4, 64, torch.float32) for _ in range(3))
    want = flash_attn_func(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
    packed = torch.stack([q, k, v], dim=2)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            for tensors in ((q, k, v), (q, k, v.to(dtype)), (q.to(dtype), k, v)):
                assert torch.equal(flash_attn_func(*tensors, causal=True), want)
            assert torch.equal(flash_attn_qkvpacked_func(packed, causal=True), want)
            with pytest.raises(TypeError, match="float16 or torch.bfloat16, got torch.float64"):
                flash_attn_func(q.double(), k, v)
            with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="got torch.float32"):
                flash_attn_func(q, k, v, causal=True)
        with pytest.raises(TypeError, match="got torch.float32"):
            flash_attn_func(q, k, v, causal=True)
        other = {FP16: BF16, BF16: FP16}[dtype]
        with torch.autocast("cpu", dtype), pytest.raises(TypeError, match="must have q's dtype"):
            flash_attn_func(q, k, v.to(other))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_with_only_infinitely_low_scores(causal):
    """As the kernels have it: zeros and -inf, and no NaN."""
    q, k, v = torch.ones(1, 6, 2, 64).half(), normal(1, 9, 1, 64, torch.float16), normal(1, 9, 1, 64, torch.float16)
    k[:, :, :, 0] = float("-inf")
    out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    k[:, 2, :, 0] = 0  # the one key with a score, which every row sees
    out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    torch.testing.assert_close(out, v[:, 2:3].expand_as(out))
    assert lse.isfinite().all()


def test_numbers_that_are_not_pythons():
    q = normal(1, 5, 2, 64)
    want = flash_attn_func(q, q, q, softmax_scale=0.125)
    for scale in (np.float32(0.125), np.float64(0.125), Fraction(1, 8)):
        assert torch.equal(flash_attn_func(q, q, q, softmax_scale=scale, sm_margin=np.int64(0)), want)
    zero = flash_attn_func(q, q, q, softmax_scale=0.0)
    assert torch.equal(flash_attn_func(q * 2.0**100, q, q, softmax_scale=1e-39), zero)


def test_tangents_are_refused():
    q = normal(1, 5, 2, 64)
    want = flash_attn_func(q, q, q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="^k carries a forward-mode tangent"):
            flash_attn_func(q, dual, q)
        assert torch.equal(flash_attn_func(q, q, q), want)
    assert torch.equal(flash_attn_func(q, q, q), want)


def test_packed_tangents_are_refused():
    qkv = normal(1, 5, 6, 64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))
        with pytest.raises(NotImplementedError, match="^qkv carries a forward-mode tangent"):
            flash_attn_qkvpacked_func(dual, num_heads_q=2)


def test_functorch_is_right_or_refused():
    tensors = [normal(3, 5, 2, 64)[:, None] for _ in range(3)]
    got = torch.vmap(flash_attn_func)(*tensors)
    assert torch.equal(got, torch.stack([flash_attn_func(q, k, v) for q, k, v in zip(*tensors)]))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: flash_attn_func(q, q, q).sum())(tensors[0][0])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: flash_attn_func(q, q, q), (tensors[0][0],), (tensors[1][0],))
