"""fa3.reference against loops in fp64, torch's own attention, and the rules for rows that see nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from fa3 import reference
from fa3.reference import attention, plain_attention

NAN, INF = float("nan"), float("inf")


def normal(batch, seqlen_q, seqlen_k, heads, heads_kv, d, dtype=torch.float32):
    g = torch.Generator().manual_seed(batch * 1000 + seqlen_q * 10 + seqlen_k)
    draw = lambda seqlen, h: torch.randn(batch, seqlen, h, d, generator=g).to(dtype)
    return draw(seqlen_q, heads), draw(seqlen_k, heads_kv), draw(seqlen_k, heads_kv)


def loops(q, k, v, scale, causal):
    """Attention one number at a time, in Python's own fp64."""
    batch, seqlen_q, heads, d = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((batch, heads, seqlen_q), -INF)
    Q, K, V = q.double().tolist(), k.double().tolist(), v.double().tolist()
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // heads_kv)
            for i in range(seqlen_q):
                seen = [j for j in range(seqlen_k) if not causal or j <= i + seqlen_k - seqlen_q]
                if not seen:
                    continue
                s = [scale * sum(Q[b][i][h][c] * K[b][j][g][c] for c in range(d)) for j in seen]
                m = max(s)
                l = sum(math.exp(x - m) for x in s)
                lse[b, h, i] = m + math.log(l)
                for c in range(d):
                    out[b, i, h, c] = sum(math.exp(x - m) / l * V[b][j][g][c] for x, j in zip(s, seen))
    return out, lse


@pytest.mark.parametrize("scores_at_once", [reference.SCORES_AT_ONCE, 50], ids=["whole", "chunked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads, heads_kv", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 7), (5, 5), (3, 8), (8, 3), (4, 0), (0, 4)])
def test_equals_loops(monkeypatch, seqlen_q, seqlen_k, heads, heads_kv, causal, scores_at_once):
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", scores_at_once)
    q, k, v = normal(2, seqlen_q, seqlen_k, heads, heads_kv, 4)
    for scale, given in ((0.5, None), (1.7, 1.7), (-0.8, -0.8), (0.0, 0.0)):
        want_out, want_lse = loops(q, k, v, scale, causal)
        out, lse = attention(q, k, v, softmax_scale=given, causal=causal, dtype=torch.float64, out_dtype=torch.float64)
        torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
        out, lse = attention(q, k, v, softmax_scale=given, causal=causal)
        torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain_attention(q, k, v, causal, given).double(), want_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal, seqlen_q, seqlen_k", [(False, 65, 33), (False, 1, 129), (True, 77, 77)])
def test_equals_torch_where_the_masks_agree(causal, seqlen_q, seqlen_k):
    q, k, v = normal(2, seqlen_q, seqlen_k, 8, 2, 64)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, causal=causal)[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_attention(q, k, v, causal), want, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_are_zero_whatever_the_inputs_hold():
    q, k, v = normal(2, 9, 4, 2, 2, 8)
    v[:, 2] = NAN
    k[:, 1] = INF
    out, lse = attention(q, k, v, causal=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == -INF).all()
    assert out[:, 7:].isnan().all()
    out, lse = attention(q, k[:, :0], v[:, :0])
    assert out.shape == q.shape and (out == 0).all() and (lse == -INF).all()


def test_nothing_in_nothing_out():
    for batch, seqlen_q, seqlen_k in ((0, 5, 3), (2, 0, 3), (0, 0, 0)):
        q, k, v = normal(batch, seqlen_q, seqlen_k, 4, 2, 8)
        for causal in (False, True):
            out, lse = attention(q, k, v, causal=causal)
            assert out.shape == q.shape and lse.shape == (batch, 4, seqlen_q)
            assert plain_attention(q, k, v, causal).shape == q.shape


def test_nan_and_infinity_spread_as_the_formula_spreads_them():
    q, k, v = normal(1, 6, 6, 2, 1, 4)
    clean, clean_lse = attention(q, k, v)

    bad = q.clone()
    bad[0, 2, 1, 0] = NAN
    out, lse = attention(bad, k, v)
    assert out[0, 2, 1].isnan().all() and lse[0, 1, 2].isnan()
    assert out.isnan().sum() == 4 and lse.isnan().sum() == 1

    bad = v.clone()
    bad[0, 3, 0, 1] = INF
    out, lse = attention(q, k, bad)
    assert (out[..., 1] == INF).all() and torch.equal(lse, clean_lse)
    assert torch.equal(out[..., [0, 2, 3]], clean[..., [0, 2, 3]])

    bad = k.clone()
    bad[0, 5, 0, 2] = INF  # a score of +inf (the row is NaN) or -inf (the key drops out), by the sign of q
    out, lse = attention(q, bad, v)
    without, _ = attention(q, k[:, :5], v[:, :5])
    up = q[0, :, :, 2] > 0
    assert up.any() and not up.all()
    assert out[0][up].isnan().all()
    torch.testing.assert_close(out[0][~up], without[0][~up])
    out, _ = attention(q, bad, v, causal=True)
    assert out[0, :5].isfinite().all()  # hidden from all but the last query


def test_strides_do_not_matter():
    qkv = torch.randn(2, 3, 5, 7, 8).permute(0, 3, 1, 2, 4)  # (batch, seqlen, 3, heads, d), heads before the sequence
    q, k, v = qkv.unbind(2)
    k = k[:, :, :1].expand(-1, -1, 5, -1)
    v = v[:1].expand(2, -1, -1, -1)
    for causal in (False, True):
        got = attention(q, k, v, causal=causal)
        want = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=causal)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    q, k, v = normal(1, 20, 20, 2, 2, 16, dtype)
    out, lse = attention(q, k, v, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide, _ = attention(q, k, v, causal=True, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(out, wide.to(dtype))  # fp32 inside, rounded once
    assert plain_attention(q, k, v).dtype == dtype


def test_plain_attention_rounds_in_the_inputs_dtype():
    q, k, v = normal(1, 64, 64, 2, 2, 64, torch.bfloat16)
    truth, _ = attention(q, k, v, causal=True, dtype=torch.float64, out_dtype=torch.float64)
    rounded = attention(q, k, v, causal=True)[0]
    error = (plain_attention(q, k, v, True) - truth).abs().max()
    assert (rounded - truth).abs().max() < error < 0.1


@pytest.mark.parametrize("causal, seqlen_q, seqlen_k", [(False, 4, 6), (True, 6, 6), (True, 6, 3), (True, 3, 5)])
def test_autograd_differentiates_it(causal, seqlen_q, seqlen_k):
    q, k, v = (x.double().requires_grad_() for x in normal(1, seqlen_q, seqlen_k, 4, 2, 3))
    truth = lambda q, k, v: attention(q, k, v, causal=causal, dtype=torch.float64)[0]
    assert torch.autograd.gradcheck(truth, (q, k, v))
    attention(q, k, v, causal=causal)[1].sum().backward()  # the LSE too, with -inf in rows that see nothing
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
