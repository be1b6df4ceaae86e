"""The forward kernel's answers: accuracy against fp32/fp64 math, every layout and size, and NaN and infinity.

A kernel is right when its largest error is at most twice that of plain PyTorch attention in the same dtype, plus SLACK
(the yardstick of FlashAttention's own tests; plain PyTorch rounds S and P to the dtype, the kernel only P).
"""

import contextlib
import math
import random
import sys

import pytest
import torch

from fa3 import flash_attn_func, flash_attn_qkvpacked_func, plan
from fa3.reference import attention, plain_attention

SLACK = 1e-5
LSE_TOLERANCE = 1e-3
NAN, INF = float("nan"), float("inf")
FP16, BF16 = torch.float16, torch.bfloat16

LENGTHS = [(1, 1), (1, 113), (64, 128), (113, 203), (128, 217), (799, 3), (1023, 1024), (1024, 1023), (2048, 2048)]
LENGTHS += [(3, 1024), (1024, 0), (8192, 8192)]
HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (5, 1)}

dtypes = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
head_dims = pytest.mark.parametrize("d", [64, 128, 256])
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
all_kernels = pytest.mark.usefixtures("kernels")
# of scores: with steep ones maxima rise so far from tile to tile that presuming them fails, and S is computed again
steepness = pytest.mark.parametrize("steep", [1, 400])


@pytest.fixture(params=["large tiles", "middle tiles", "small tiles"])
def kernels(request, monkeypatch):
    """Every kernel for a head dim and mask, whatever planning would choose for the shape."""

    def row(problem, device):
        choices = len(plan.rows(problem.head_dim, "causal" if problem.causal else "none"))
        return {"large tiles": 0, "middle tiles": 1, "small tiles": choices - 1}[request.param]

    monkeypatch.setattr(plan, "chosen_row", row)
    monkeypatch.setattr(sys.modules["fa3.attention"], "CALLS", {})


@contextlib.contextmanager
def poisoned_memory():
    """Inside, memory that torch.empty hands out holds NaN, so an element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


def call(q, k, v, **options):
    """(O, LSE) of the kernel, written into poisoned memory."""
    with poisoned_memory():
        return flash_attn_func(q, k, v, return_attn_probs=True, **options)


def normal(batch, seqlen, heads, d, dtype=BF16):
    return torch.randn(batch, seqlen, heads, d, device="cuda", dtype=dtype)


def inputs(batch, seqlen_q, seqlen_k, heads, heads_kv, d, dtype=BF16):
    return (normal(batch, n, h, d, dtype) for n, h in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv)))


def same_bits(a, b):
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def faults(out, lse, q, k, v, causal=False, softmax_scale=None, lse_tolerance=LSE_TOLERANCE):
    """What is wrong with the kernel's answer to this call: sentences, none where it is right. lse=None isn't looked at."""
    wide = torch.float64 if q.shape[1] * k.shape[1] <= 2048**2 else torch.float32
    options = dict(causal=causal, softmax_scale=softmax_scale)
    truth, truth_lse = attention(q, k, v, **options, dtype=wide, out_dtype=wide)
    found = []
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        return [f"O is {tuple(out.shape)} {out.dtype} on {out.device}, q is {tuple(q.shape)} {q.dtype} on {q.device}"]
    if out.numel():
        error = (out - truth).abs().max().item()
        plain = (plain_attention(q, k, v, **options) - truth).abs().max().item()
        if not error <= 2 * plain + SLACK:
            found.append(f"O is off by {error:.3g}, plain attention by {plain:.3g}")
    blind = truth_lse == -INF
    if not (out.transpose(1, 2)[blind] == 0).all():
        found.append("O isn't 0 in rows that see nothing")
    if lse is None:
        return found
    if (lse.shape, lse.dtype, lse.device) != (truth_lse.shape, torch.float32, q.device):
        return found + [f"LSE is {tuple(lse.shape)} {lse.dtype} on {lse.device}"]
    if not torch.equal(lse == -INF, blind):
        found.append("LSE isn't -inf exactly where a row sees nothing")
    elif not blind.all():
        error = (lse - truth_lse)[~blind].abs().max().item()
        if not error <= lse_tolerance:
            found.append(f"LSE is off by {error:.3g}")
    return found


def check(q, k, v, lse_tolerance=LSE_TOLERANCE, **options):
    """Calls the kernel and fails with what is wrong; returns (O, LSE). options are causal and softmax_scale."""
    out, lse = call(q, k, v, **options)
    assert not faults(out, lse, q, k, v, **options, lse_tolerance=lse_tolerance)
    return out, lse


# Accuracy: bar 2 of the issue.


@all_kernels
@dtypes
@head_dims
@masks
@pytest.mark.parametrize("heads", HEADS)  # changes slowest, so that workers start on kernels that differ
def test_every_length(dtype, d, causal, heads):
    wrong = []
    for seqlen_q, seqlen_k in LENGTHS:
        batch = 1 if seqlen_q == 8192 else 2
        q, k, v = inputs(batch, seqlen_q, seqlen_k, *HEADS[heads], d, dtype)
        out, lse = call(q, k, v, causal=causal)
        found = faults(out, lse, q, k, v, causal)
        again, lse_again = call(q, k, v, causal=causal)
        if not (same_bits(out, again) and same_bits(lse, lse_again)):
            found.append("two runs differ")
        wrong += [f"seqlen_q {seqlen_q}, seqlen_k {seqlen_k}: {fault}" for fault in found]
    assert not wrong, "\n" + "\n".join(wrong)


@all_kernels
@dtypes
@head_dims
@masks
def test_out_alone(dtype, d, causal):
    """What users call: no LSE asked for, which may be another kernel."""
    wrong = []
    for seqlen_q, seqlen_k in ((1, 113), (128, 217), (799, 3), (1023, 1024), (1024, 0)):
        q, k, v = inputs(2, seqlen_q, seqlen_k, 8, 2, d, dtype)
        with poisoned_memory():
            out = flash_attn_func(q, k, v, causal=causal)
        assert isinstance(out, torch.Tensor)
        found = faults(out, None, q, k, v, causal)
        wrong += [f"seqlen_q {seqlen_q}, seqlen_k {seqlen_k}: {fault}" for fault in found]
    assert not wrong, "\n" + "\n".join(wrong)


def random_shape(seed):
    r = random.Random(seed)
    heads_kv, group = r.choice((1, 2, 3, 5)), r.choice((1, 2, 3, 7))
    return dict(
        batch=r.randint(1, 4), seqlen_q=r.randint(1, 900), seqlen_k=r.randint(1, 900), heads=heads_kv * group,
        heads_kv=heads_kv, d=r.choice((64, 128, 256)), dtype=r.choice((FP16, BF16)),
    ), r.random() < 0.5  # fmt: skip


@pytest.mark.parametrize("ten", range(4))
def test_random_shapes(ten):
    wrong = []
    for seed in range(10 * ten, 10 * ten + 10):
        shape, causal = random_shape(seed)
        q, k, v = inputs(**shape)
        out, lse = call(q, k, v, causal=causal)
        wrong += [f"{shape}, causal {causal}: {fault}" for fault in faults(out, lse, q, k, v, causal)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("around", [16, 64, 80, 128, 176, 192, 256, 384])
def test_lengths_beside_a_tiles_edge(around):
    wrong = []
    for d in (64, 128, 256):
        for causal in (False, True):
            for seqlen_q, seqlen_k in [(around + i, around + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                q, k, v = inputs(1, seqlen_q, seqlen_k, 2, 1, d)
                out, lse = call(q, k, v, causal=causal)
                found = faults(out, lse, q, k, v, causal)
                wrong += [f"d {d}, causal {causal}, lengths {seqlen_q}, {seqlen_k}: {fault}" for fault in found]
    assert not wrong, "\n" + "\n".join(wrong)


# Sizes.


@masks
def test_nothing_in_nothing_out(causal):
    for batch, seqlen_q, seqlen_k in ((0, 5, 7), (2, 0, 7), (2, 0, 0), (0, 0, 0)):
        q, k, v = inputs(batch, seqlen_q, seqlen_k, 4, 2, 64)
        out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (batch, 4, seqlen_q) and lse.dtype == torch.float32
    torch.cuda.synchronize()


@masks
@pytest.mark.parametrize("batch, heads", [(700, 100), (70_000, 1), (1, 70_000)])
def test_seventy_thousand_tiles(batch, heads, causal):
    q, k, v = inputs(batch, 16, 16, heads, heads, 64)
    out, lse = call(q, k, v, causal=causal)
    pieces = list(zip(*(x.chunk(2, dim=0 if batch > 1 else 2) for x in (out, q, k, v))))
    for piece, piece_lse in zip(pieces, lse.chunk(2, dim=0 if batch > 1 else 1), strict=True):
        assert not faults(piece[0], piece_lse, *piece[1:], causal)


def check_corners(q, k, v, rows, lse_tolerance=LSE_TOLERANCE):
    """Calls the kernel on tensors too large for a reference; checks the last rows of the first and last batch and head."""
    out, lse = call(q, k, v)
    for b in (0, -1):
        for h in (0, -1):
            batch, head, last = slice(b, b + 1 or None), slice(h, h + 1 or None), slice(-rows, None)
            args = q[batch, last, head], k[batch, :, head], v[batch, :, head]
            found = faults(out[batch, last, head], lse[batch, head, last], *args, lse_tolerance=lse_tolerance)
            assert not found, f"batch {b}, head {h}: {found}"


@steepness
def test_keys_beyond_two_to_the_31_elements(steep):
    q, k, v = inputs(2, 128, 2**17 + 64, 64, 64, 128)
    assert k.numel() > 2**31
    check_corners(q * steep, k, v, rows=16, lse_tolerance=2e-2)


def test_queries_beyond_two_to_the_31_elements():
    q, k, v = inputs(2, 2**17 + 64, 100, 64, 64, 128)
    assert q.numel() > 2**31
    check_corners(q, k, v, rows=500)


@steepness
def test_one_head_beyond_two_to_the_31_elements(steep):
    """The sequence stride alone takes the last key past 2³¹ elements."""
    storage = torch.empty(2**31 + 2**21, device="cuda", dtype=BF16)
    k = storage.as_strided((1, 2049, 1, 128), (0, 2**20, 128, 1))
    k.normal_()
    v = storage.as_strided((1, 2049, 1, 128), (0, 2**20, 128, 1), 128)
    v.normal_()
    check(normal(1, 200, 2, 128) * steep, k, v, lse_tolerance=2e-2)


# Layouts.


def packed(batch, seqlen, heads, d):
    return normal(batch, seqlen, 3 * heads, d).view(batch, seqlen, 3, heads, d).unbind(2)


def heads_first(batch, seqlen, heads, d):
    return (normal(batch, heads, seqlen, d).transpose(1, 2) for _ in range(3))


def sequence_first(batch, seqlen, heads, d):
    return (normal(seqlen, batch, heads, d).transpose(0, 1) for _ in range(3))


def slice_of_a_wider_head(batch, seqlen, heads, d):
    wide = [normal(batch, seqlen, heads, d + 72) for _ in range(3)]
    return wide[0][..., :d], wide[1][..., 72:], wide[2][..., 8 : d + 8]


def every_other_row_and_head(batch, seqlen, heads, d):
    return (normal(batch, 2 * seqlen, 2 * heads, d)[:, ::2, 1::2] for _ in range(3))


def one_batch_expanded(batch, seqlen, heads, d):
    q, k, v = (normal(1, seqlen, heads, d).expand(batch, -1, -1, -1) for _ in range(3))
    return q, k, v


def one_head_expanded(batch, seqlen, heads, d):
    q, k, v = (normal(batch, seqlen, 1, d).expand(-1, -1, heads, -1) for _ in range(3))
    return q, k, v


def only_keys_and_values_expanded(batch, seqlen, heads, d):
    k, v = (normal(1, seqlen, 1, d).expand(batch, -1, heads, -1) for _ in range(2))
    return normal(batch, seqlen, heads, d), k, v


def odd_strides_where_the_size_is_one(batch, seqlen, heads, d):
    """Strides that are never multiplied by anything but 0 may be anything."""
    return (normal(1, seqlen, 1, d).as_strided((1, seqlen, 1, d), (3, d, 5, 1)) for _ in range(3))


LAYOUTS = [
    packed, heads_first, sequence_first, slice_of_a_wider_head, every_other_row_and_head, one_batch_expanded,
    one_head_expanded, only_keys_and_values_expanded, odd_strides_where_the_size_is_one,
]  # fmt: skip


@head_dims
@steepness
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout, steep, d):
    for causal in (False, True):
        q, k, v = layout(3, 403, 4, d)
        options = dict(causal=causal, softmax_scale=steep / math.sqrt(d))
        out, lse = check(q, k, v, **options, lse_tolerance=2e-2)
        plain_out, plain_lse = call(q.contiguous(), k.contiguous(), v.contiguous(), **options)
        assert same_bits(out, plain_out) and same_bits(lse, plain_lse)


@masks
def test_qkvpacked_equals_separate(causal):
    qkv = normal(2, 203, 3 * 4, 128)
    five = qkv.view(2, 203, 3, 4, 128)
    want = flash_attn_func(*five.unbind(2), causal=causal, return_attn_probs=True)
    got = flash_attn_qkvpacked_func(five, causal=causal, return_attn_probs=True)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    assert same_bits(flash_attn_qkvpacked_func(five, causal=causal), want[0])

    q, k, v = qkv.split((8, 2, 2), dim=2)
    want = flash_attn_func(q, k, v, softmax_scale=0.2, causal=causal)
    got = flash_attn_qkvpacked_func(qkv, softmax_scale=0.2, causal=causal, num_heads_q=8)
    assert same_bits(got, want)
    assert not faults(got, None, q, k, v, causal, 0.2)


# Options.


@all_kernels
@head_dims
@masks
@pytest.mark.parametrize("scale", [None, 0.3, 1.0, -0.5, 0.0, 1e-6])
def test_softmax_scale(scale, causal, d):
    q, k, v = inputs(2, 150, 203, 4, 2, d)
    check(q, k, v, causal=causal, softmax_scale=scale)
    check(k, q[:, :, :2], q[:, :, 2:], causal=causal, softmax_scale=scale)  # 203 queries, some of which see nothing


@all_kernels
@masks
def test_steep_negative_scale(causal):
    """The largest scaled score is the smallest score; taken the other way the exponentials overflow."""
    q, k, v = (x * 4 for x in inputs(2, 203, 300, 4, 4, 64))
    check(q, k, v, causal=causal, softmax_scale=-0.5, lse_tolerance=2e-2)


@masks
def test_sm_margin_changes_no_bit(causal):
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    q, k, v = inputs(2, 1023, 1024, 8, 2, 128)
    want, want_lse = check(q, k, v, causal=causal)
    for margin in (1, 8, sms - 1):
        out, lse = call(q, k, v, causal=causal, sm_margin=margin)
        assert same_bits(out, want) and same_bits(lse, want_lse), f"sm_margin {margin}"


def test_return_attn_probs():
    q, k, v = inputs(1, 64, 64, 2, 2, 64)
    both = flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(both, tuple) and len(both) == 2
    assert isinstance(flash_attn_func(q, k, v), torch.Tensor)


@masks
def test_arguments_by_position_and_defaults_spelled_out(causal):
    """In FlashAttention-3's order; and the values that mean "off" are not refused."""
    q, k, v = inputs(1, 130, 140, 4, 2, 64)
    want = flash_attn_func(q, k, v, softmax_scale=0.2, causal=causal)
    got = flash_attn_func(q, k, v, 0.2, causal, None, None, None, None, (-1, -1), 0, 0.0, 1, None, False, 0, False)
    assert same_bits(got, want)
    for off in (dict(num_splits=0), dict(pack_gqa=False), dict(window_size=[-1, -1])):
        assert same_bits(flash_attn_func(q, k, v, softmax_scale=0.2, causal=causal, **off), want), off


# Numbers.


@all_kernels
@dtypes
@head_dims
@masks
def test_large_magnitudes(dtype, d, causal):
    q, k, v = (x * 20 for x in inputs(2, 203, 300, 4, 2, d, dtype))
    check(q, k, v * 500, causal=causal, lse_tolerance=2e-2)


@all_kernels
@dtypes
@masks
def test_every_score_far_below_zero(dtype, causal):
    """A row maximum that starts from 0 instead of from -inf would lose every exponential."""
    q, k, v = inputs(2, 203, 300, 4, 2, 128, dtype)
    q, k = q * 0.1 + 6, k * 0.1 - 6
    _, lse = check(q, k, v, causal=causal, lse_tolerance=2e-2)
    assert lse.max() < -300


@all_kernels
@dtypes
@head_dims
@masks
@pytest.mark.parametrize("rise", [0.02, 0.5, 3.0])
def test_scores_that_rise_towards_the_first_key(dtype, d, causal, rise):
    """The kernel works from the last key to the first, so the maxima of these rows never stand still; every third row's fall."""
    q, k, v = inputs(2, 700, 900, 4, 2, d, dtype)
    q[..., 0] = 8.0
    q[:, ::3, :, 0] = -8.0
    q[:, 1::3, 1, 0] = 0.0
    k[..., 0] = rise * torch.arange(900, 0, -1, device=k.device)[:, None] * math.sqrt(d) / 8
    check(q, k, v, causal=causal, lse_tolerance=2e-2)


@all_kernels
def test_probabilities_of_one_key_return_its_value():
    """With scores so far apart that P is one-hot, O is V's row to the last bit."""
    key = torch.eye(128, device="cuda", dtype=BF16) * 100
    k = key[None, :, None, :]
    which = torch.randperm(128, device="cuda")
    q = k[:, which]
    v = normal(1, 128, 1, 128)
    out, lse = call(q, k, v)
    assert same_bits(out, v[:, which])
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4 * 128**-0.5), rtol=1e-5, atol=0)


@all_kernels
@masks
@head_dims
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_one_bad_number_spreads_as_in_plain_attention(which, value, d, causal):
    batch, row, heads, channel = 1, 170, slice(2, 4), 5  # query heads 2 and 3 share K/V head 1
    tensors = dict(zip("qkv", inputs(2, 200, 300, 4, 2, d)))
    options = dict(causal=causal, out_dtype=torch.float32)
    clean, _ = attention(**tensors, **options)
    tensors[which] = tensors[which].clone()
    tensors[which][batch, row, 2 if which == "q" else 1, channel] = value
    plain, plain_lse = attention(**tensors, **options)

    # Plain attention multiplies hidden values by 0, which is NaN if the value isn't finite; a kernel need not.
    want = plain
    if which == "v" and causal:
        sees = torch.arange(200, device="cuda") + 300 - 200 >= row
        want = torch.where(sees[None, :, None, None], plain, clean)
    out, lse = call(*tensors.values(), causal=causal)
    out = torch.where(plain.isnan() & ~want.isnan() & out.isnan(), want, out.float())

    touched = want.isnan() | want.isinf()
    assert touched.any() and touched[batch, :, heads].sum() == touched.sum()  # the test is about what it says
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert torch.equal(lse.isfinite(), plain_lse.isfinite()) and not (lse == -INF).any()


@all_kernels
@masks
@head_dims
def test_keys_of_score_minus_infinity_drop_out(d, causal):
    """Whole tiles of them, before any key that counts: minus infinity must not be subtracted from itself."""
    q, k, v = inputs(2, 200, 600, 4, 2, d)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, 250:, :, 0] = -INF
    check(q, k, v, causal=causal)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_blind_tiles_between_seeing_ones(d):
    """Causal with more queries than keys, in more head groups than one: a CTA goes from tiles that see nothing to others."""
    for batch, seqlen_q, seqlen_k in ((8, 2048, 1024), (4, 4096, 1024), (1, 8192, 4096)):
        q, k, v = inputs(batch, seqlen_q, seqlen_k, 16, 16, d)
        for _ in range(3):
            check(q, k, v, causal=True)


@pytest.mark.parametrize("d, level, keys", [(128, 3.0, 131072), (128, 7.0, 131072), (256, 4.25, 32768), (128, 8.75, 8192)])
def test_equal_scores_add_up(d, level, keys):
    """All scores equal: the maximum never moves, and nothing may drift over the tiles. O is the mean of V."""
    q = torch.full((1, 128, 1, d), level, device="cuda", dtype=BF16)
    k = torch.full((1, keys, 1, d), level, device="cuda", dtype=BF16)
    v = torch.ones_like(k)
    v[:, keys // 2 :] = -1
    out, lse = call(q, k, v)
    truth = d**0.5 * level**2 + math.log(keys)
    assert (lse - truth).abs().max() < LSE_TOLERANCE * max(1, abs(truth) / 1000)
    assert out.abs().max() < 1e-3


@all_kernels
@pytest.mark.parametrize("value", [NAN, INF], ids=["NaN", "inf"])
def test_rows_that_see_nothing_stay_zero_beside_a_bad_v(value):
    q, k, v = inputs(1, 160, 100, 2, 2, 128)
    v[:, 99] = value  # in the tile that the seeing rows share with the blind ones
    out, lse = call(q, k, v, causal=True)
    assert (out[:, :60] == 0).all() and (lse[:, :, :60] == -INF).all()


@dtypes
@masks
def test_inputs_are_not_modified(dtype, causal):
    tensors = list(inputs(2, 203, 300, 4, 2, 128, dtype))
    before = [x.clone() for x in tensors]
    call(*tensors, causal=causal)
    torch.cuda.synchronize()
    assert all(same_bits(x, y) for x, y in zip(tensors, before))


def test_poisoned_memory_is_poisoned():
    """The other tests lean on it: what torch.empty gives is NaN inside, in every dtype a kernel writes."""
    with poisoned_memory():
        for dtype in (FP16, BF16, torch.float32):
            x = torch.empty(3, 7, device="cuda", dtype=dtype)
            assert x.isnan().all() and torch.empty_like(x).isnan().all() and x.new_empty(5).isnan().all()
