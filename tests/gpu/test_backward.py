"""The backward kernels' gradients: accuracy against fp32/fp64 math, every layout and size, bits from run to run, memory, and
how they live with the rest of PyTorch: autograd, CUDA graphs, streams, torch.compile, operator checks.

A gradient is right when its largest error is at most twice that of plain PyTorch attention's gradient in the same dtype, plus
SLACK of the terms that it is the sum of (`terms`): with one key, say, dQ and dK are 0 by cancellation, and plain attention gets
exactly that, where fp32 sums that should cancel don't quite. With 2 to FEW_KEYS keys plain attention's largest error is that of
few roundings, and may be small by luck; delta has its own, from O's, and a quarter of the dtype's epsilon takes SLACK's place.

Under compute-sanitizer: `compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_backward.py -k small_case`.
"""

import concurrent.futures
import math
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fa3 import flash_attn_func, flash_attn_qkvpacked_func, plan
from fa3.attention import backward_of, device_of
from fa3.problem import Problem
from fa3.reference import attention, plain_attention
from tests.gpu.test_forward import (
    BF16, FP16, HEADS, INF, LAYOUTS, LENGTHS, NAN, dtypes, head_dims, inputs, masks, normal, poisoned_memory, same_bits,
)  # fmt: skip
from tests.gpu.test_runtime import alone  # noqa: F401 (a fixture)

SLACK = 1e-5  # 84 times fp32's epsilon
FEW_KEYS = 8
FEW_HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (2, 1)}
MEGABYTE = 1 << 20

some_heads = pytest.mark.parametrize("heads", HEADS)
deterministic_or_not = pytest.mark.parametrize("deterministic", [False, True], ids=["in any order", "deterministic"])


def gradients(q, k, v, dout, needed="qkv", **options):
    """Name -> gradient of those of q, k and v that are needed, written into poisoned memory."""
    leaves = {name: x.detach().requires_grad_(name in needed) for name, x in zip("qkv", (q, k, v))}
    with poisoned_memory():
        out = flash_attn_func(**leaves, **options)
        return dict(zip(needed, torch.autograd.grad(out, [leaves[name] for name in needed], dout)))


def by_autograd(attend, q, k, v, dout, dtype):
    """Name -> gradient of what attend returns, everything in this dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    if not out.requires_grad:  # there was nothing to attend to
        return {name: torch.zeros_like(x) for name, x in zip("qkv", leaves)}
    return dict(zip("qkv", torch.autograd.grad(out, leaves, dout.to(dtype))))


def terms(q, k, v, dout, causal, softmax_scale, dtype):
    """Name -> root of the sum of the squares of what an element of its gradient is the sum of, at its largest.

    dV = Σ P dO, and dQ, dK = Σ scale · P (dP - delta) K, Q, with dP and delta each sums over the head dim that may cancel: by
    them stands the root of the sum of the squares of their own terms. Rounding errors of fp32 are in proportion to it.
    """
    heads, heads_kv = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    Q, K, V, dO = (x.to(dtype).transpose(1, 2) for x in (q, k, v, dout))
    K, V = (x.repeat_interleave(heads // heads_kv, dim=1) for x in (K, V))
    S = Q @ K.transpose(2, 3) * scale
    if causal:
        S = S.masked_fill(~visible(*S.shape[2:], S.device), -INF)
    P = torch.softmax(S, dim=-1).nan_to_num(0) ** 2
    dS = 2 * P * (dO**2 @ (V**2).transpose(2, 3))
    squares = {
        "q": scale**2 * (dS @ K**2),
        "k": (scale**2 * (dS.transpose(2, 3) @ Q**2)).unflatten(1, (heads_kv, -1)).sum(2),
        "v": (P.transpose(2, 3) @ dO**2).unflatten(1, (heads_kv, -1)).sum(2),
    }
    return {name: x.max().sqrt().item() for name, x in squares.items()}


def visible(seqlen_q, seqlen_k, device):
    """(seqlen_q, seqlen_k) bool: which keys a query sees under the causal mask."""
    query, key = torch.arange(seqlen_q, device=device), torch.arange(seqlen_k, device=device)
    return key <= query[:, None] + seqlen_k - seqlen_q


def truth_and_plain(q, k, v, dout, causal, softmax_scale):
    """Name -> gradient in fp32 or fp64 math, and name -> gradient of plain attention."""
    wide = torch.float64 if q.shape[1] * k.shape[1] <= 2048**2 else torch.float32
    options = dict(causal=causal, softmax_scale=softmax_scale)
    truth = lambda q, k, v: attention(q, k, v, **options, dtype=wide, out_dtype=wide)[0]
    plain = lambda q, k, v: plain_attention(q, k, v, **options)
    return by_autograd(truth, q, k, v, dout, wide), by_autograd(plain, q, k, v, dout, q.dtype)


def faults(found, q, k, v, dout, causal=False, softmax_scale=None):
    """What is wrong with these gradients (name -> tensor): sentences, none where they are right."""
    truth, plain = truth_and_plain(q, k, v, dout, causal, softmax_scale)
    inputs = dict(q=q, k=k, v=v)
    wrong, slack = [], None
    for name, grad in found.items():
        x = inputs[name]
        if (grad.shape, grad.dtype, grad.device) != (x.shape, x.dtype, x.device):
            wrong.append(f"d{name} is {tuple(grad.shape)} {grad.dtype} on {grad.device}, {name} is {tuple(x.shape)} {x.dtype}")
        elif grad.numel():
            error = (grad - truth[name]).abs().max().item()
            bound = 2 * (plain[name] - truth[name]).abs().max().item()
            assert math.isfinite(bound), f"plain attention's d{name} overflows, so it measures nothing: choose smaller inputs"
            if not error <= bound:
                slack = slack or terms(q, k, v, dout, causal, softmax_scale, truth[name].dtype)
                bound += slack[name] * (torch.finfo(q.dtype).eps / 4 if 1 < k.shape[1] < FEW_KEYS else SLACK)
                if not error <= bound:
                    wrong.append(f"d{name} of up to {truth[name].abs().max():.3g} is off by {error:.3g}, more than {bound:.3g}")
    blind = q.shape[1] if k.shape[1] == 0 else max(0, q.shape[1] - k.shape[1]) if causal else 0
    if "q" in found and not (found["q"][:, :blind] == 0).all():
        wrong.append("dq isn't 0 in rows that see nothing")
    return wrong


def check(q, k, v, dout=None, **options):
    """Fails with what is wrong with the kernels' gradients; returns them. dout: random by default."""
    dout = torch.randn(q.shape, device=q.device, dtype=q.dtype) if dout is None else dout
    found = gradients(q, k, v, dout, **options)
    assert not faults(found, q, k, v, dout, **{n: options[n] for n in ("causal", "softmax_scale") if n in options})
    return found


def differing(found, want):
    """Names of the gradients that aren't the same to the last bit."""
    return [name for name in want if not same_bits(found[name], want[name])]


def near(a, b):
    """Equal but for sums taken in another order: a last place of the dtype, or fp32's error of the larger numbers' sums."""
    a, b, eps = a.float(), b.float(), torch.finfo(b.dtype).eps
    return ((a - b).abs() <= eps * b.abs() + SLACK * b.abs().max()).all().item() if b.numel() else a.shape == b.shape


# Accuracy: bar 1 of the issue.


@dtypes
@head_dims
@masks
@some_heads  # changes slowest, so that workers start on kernels that differ
def test_every_length(dtype, d, causal, heads):
    wrong = []
    for seqlen_q, seqlen_k in LENGTHS:
        large = seqlen_q == 8192
        if large and d != 128:
            continue
        q, k, v = inputs(1 if large else 2, seqlen_q, seqlen_k, *(FEW_HEADS if large else HEADS)[heads], d, dtype)
        dout = torch.randn_like(q)
        found = gradients(q, k, v, dout, causal=causal)
        bad = faults(found, q, k, v, dout, causal)
        again = gradients(q, k, v, dout, causal=causal)
        bad += [f"two runs' d{name} differ" for name in found if not near(again[name], found[name])]
        wrong += [f"lengths {seqlen_q}, {seqlen_k}: {fault}" for fault in bad]
    assert not wrong, "\n" + "\n".join(wrong)


def squares(x):
    """(batch, blocks, heads): sums of the squares of each 64 rows."""
    rows = torch.nn.functional.pad(x.double() ** 2, (0, 0, 0, 0, 0, -x.shape[1] % 64))
    return rows.unflatten(1, (-1, 64)).sum((2, 4))


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_every_block_of_rows(dtype, d, causal, heads):
    """The largest error is that of rows that see few keys; other rows' gradients are smaller than that under a causal mask.

    So the root mean square of the error in each 64 rows is compared, too, with that of plain attention in the same rows.
    """
    for seqlen_q, seqlen_k in ((1023, 1024), (2048, 2048), (1500, 700), (700, 1500)):
        q, k, v = inputs(1, seqlen_q, seqlen_k, *HEADS[heads], d, dtype)
        dout = torch.randn_like(q)
        found = gradients(q, k, v, dout, causal=causal)
        truth, plain = truth_and_plain(q, k, v, dout, causal, None)
        for name, grad in found.items():
            ours, theirs = (squares(x - truth[name]) for x in (grad, plain[name]))
            assert (ours <= 4 * theirs).all(), f"lengths {seqlen_q}, {seqlen_k}, d{name}: {(ours / theirs).sqrt()}"


MORE_LENGTHS = [
    (1, 4097), (4097, 1), (4097, 64), (64, 4097), (4097, 4097), (5, 2000), (2000, 5), (113, 799), (799, 113), (1023, 113),
    (113, 1023), (799, 1023), (1, 799), (799, 1), (129, 127), (127, 129), (65, 63), (640, 1), (1, 640),
]  # fmt: skip


@deterministic_or_not
@head_dims
@masks
def test_more_lengths(d, causal, deterministic):
    wrong = []
    for i, (seqlen_q, seqlen_k) in enumerate(MORE_LENGTHS):
        batch = 1 if seqlen_q == seqlen_k else 1 + i % 3
        q, k, v = inputs(batch, seqlen_q, seqlen_k, 6, 2, d)
        dout = torch.randn_like(q)
        found = faults(gradients(q, k, v, dout, causal=causal, deterministic=deterministic), q, k, v, dout, causal)
        wrong += [f"batch {batch}, lengths {seqlen_q}, {seqlen_k}: {fault}" for fault in found]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("around", [16, 64, 80, 96, 128, 192, 256, 384])
def test_lengths_beside_a_tiles_edge(around):
    wrong = []
    for d in (64, 128, 256):
        for causal in (False, True):
            for seqlen_q, seqlen_k in [(around + i, around + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                q, k, v = inputs(1, seqlen_q, seqlen_k, 2, 1, d)
                dout = torch.randn_like(q)
                found = faults(gradients(q, k, v, dout, causal=causal), q, k, v, dout, causal)
                wrong += [f"d {d}, causal {causal}, lengths {seqlen_q}, {seqlen_k}: {fault}" for fault in found]
    assert not wrong, "\n" + "\n".join(wrong)


@masks
@head_dims
@pytest.mark.parametrize("places", ["few", "many"])
def test_large_gradients_in_fp16(d, causal, places):
    """dP - delta past fp16's largest number, in some places, where dS and the gradients are not: powers of 2 change no error."""
    q, k, v = inputs(2, 200, 500, 4, 2, d, FP16)
    dout, of_dout = torch.randn_like(q), 256
    of_v = 16 if places == "many" else 4 if d == 256 else 8
    dp = (of_dout * dout.float()).transpose(1, 2) @ (of_v * v.float()).repeat_interleave(2, dim=2).permute(0, 2, 3, 1)
    share = (dp.abs() > torch.finfo(FP16).max).float().mean()
    assert (0.02 < share < 0.5) if places == "many" else (0 < share < 0.01)
    found = gradients(q, k, of_v * v, of_dout * dout, causal=causal)
    found = {name: x / (of_dout if name == "v" else of_v * of_dout) for name, x in found.items()}
    assert not faults(found, q, k, v, dout, causal)


MORE_TILES = [(8, 700, 700, 16, 16), (5, 300, 900, 32, 8), (64, 130, 100, 12, 4), (40, 200, 256, 16, 16)]


@deterministic_or_not
@masks
@head_dims
def test_small_case(d, causal, deterministic):
    """Several tiles of queries and of keys, none of them full, and two query heads to a K/V head."""
    check(*inputs(2, 200, 300, 4, 2, d), causal=causal, deterministic=deterministic)
    check(*inputs(1, 300, 200, 2, 2, d), causal=causal, deterministic=deterministic)  # and rows that see nothing


@deterministic_or_not
@masks
@head_dims
@pytest.mark.parametrize("shape", MORE_TILES, ids=str)
def test_more_tiles_than_sms(shape, d, causal, deterministic):
    """CTAs that claim one tile of keys after another, of K/V heads that find their dQ's zeros made by those before them."""
    check(*inputs(*shape, d), causal=causal, deterministic=deterministic)


# CTAs in pairs, which planning chooses for lengths that suit them, at all lengths.


@pytest.fixture
def pairs(monkeypatch):
    """Every call has them that can."""
    monkeypatch.setattr(plan, "in_pairs", lambda problem: problem.head_dim == 128)
    backward_of.cache_clear()
    yield
    backward_of.cache_clear()


@dtypes
@masks
@some_heads
def test_pairs_at_every_length(pairs, dtype, causal, heads):
    test_every_length(dtype, 128, causal, heads)


@deterministic_or_not
@masks
def test_pairs_in_a_small_case(pairs, causal, deterministic):
    test_small_case(128, causal, deterministic)


@deterministic_or_not
@masks
def test_pairs_at_more_lengths(pairs, causal, deterministic):
    test_more_lengths(128, causal, deterministic)


@deterministic_or_not
@masks
@pytest.mark.parametrize("shape", MORE_TILES, ids=str)
def test_pairs_with_more_tiles_than_sms(pairs, shape, causal, deterministic):
    test_more_tiles_than_sms(shape, 128, causal, deterministic)


@masks
@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
def test_pairs_that_are_deterministic(pairs, causal, heads):
    test_deterministic(128, causal, heads)


@masks
@some_heads
def test_pairs_fifty_times(pairs, causal, heads):
    test_fifty_repeats(128, causal, heads)


@masks
def test_pairs_have_the_same_gradients_of_keys_and_values_each_time(pairs, causal):
    test_keys_and_values_gradients_are_deterministic_in_any_case(128, causal)


@masks
def test_pairs_where_planning_chooses_them(causal):
    """Lengths on both sides of its bounds, against whichever kernel it takes."""
    taken = set()
    for seqlen_q, seqlen_k in [(511, 1024), (512, 1024), (512, 1025), (1024, 256), (1025, 1024), (8192, 200), (8191, 512), (600, 8200)]:
        q, k, v = inputs(1, seqlen_q, seqlen_k, 4, 2, 128)
        check(q, k, v, causal=causal)
        problem = Problem("bf16", 1, seqlen_q, seqlen_k, 4, 2, 128, causal, 1.0, True, 0)
        taken.add(plan.plan_backward(problem, device_of(q.device)).config.cluster)
    assert taken == {1, 2}


def wide_rows(x):
    """Rows of a head with room between them."""
    return torch.nn.functional.pad(x, (0, 72))[..., : x.shape[3]]


def every_other_head(x):
    return x.repeat_interleave(2, dim=2)[:, :, ::2]


def heads_before_the_sequence(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_before_the_batch(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


STORAGES = [torch.clone, wide_rows, every_other_head, heads_before_the_sequence, sequence_before_the_batch]


def drawn(seed):
    """(shape, what q is multiplied by, how q, k, v and dout lie in memory, options, gradients wanted) of a random call."""
    r = random.Random(seed)
    length = lambda: int(2 ** r.uniform(0, 11))
    heads_kv, group = r.choice((1, 2, 3, 5)), r.choice((1, 1, 2, 3, 7))
    shape = dict(
        batch=r.randint(1, 3), seqlen_q=length(), seqlen_k=length(), heads=heads_kv * group, heads_kv=heads_kv,
        d=r.choice((64, 128, 256)), dtype=r.choice((FP16, BF16)),
    )  # fmt: skip
    options = dict(
        causal=r.random() < 0.5, softmax_scale=r.choice((None, None, None, 0.3, -0.2, 0.0)), deterministic=r.random() < 0.3,
        sm_margin=r.choice((0, 0, 0, 1, 40)),
    )  # fmt: skip
    steep = r.choice((1, 1, 1, 5, 40))
    storages = [r.choice(STORAGES) for _ in range(4)]
    return shape, steep, storages, options, r.choice(("qkv", "qkv", "qkv", "q", "k", "v", "qk", "qv", "kv"))


@pytest.mark.parametrize("five", range(12))
def test_random_calls(five):
    wrong = []
    for seed in range(5 * five, 5 * five + 5):
        shape, steep, storages, options, needed = drawn(seed)
        q, k, v = inputs(**shape)
        q, k, v, dout = (lay(x) for lay, x in zip(storages, (q * steep, k, v, torch.randn_like(q))))
        found = gradients(q, k, v, dout, needed, **options)
        case = f"{shape}, q · {steep}, {[lay.__name__ for lay in storages]}, {options}, d{needed}"
        wrong += [f"{case}: {x}" for x in faults(found, q, k, v, dout, options["causal"], options["softmax_scale"])]
    assert not wrong, "\n" + "\n".join(wrong)


# Sizes.


@masks
@pytest.mark.parametrize("shape", [(0, 5, 7, 4), (2, 0, 7, 4), (2, 5, 0, 4), (2, 0, 0, 4), (2, 5, 7, 0)], ids=str)
def test_nothing_in_nothing_out(shape, causal):
    batch, seqlen_q, seqlen_k, heads = shape
    q, k, v = inputs(batch, seqlen_q, seqlen_k, heads, heads // 2, 64)
    found = gradients(q, k, v, torch.ones_like(q), causal=causal)
    for name, x in zip("qkv", (q, k, v)):
        assert found[name].shape == x.shape and found[name].dtype == x.dtype and (found[name] == 0).all()
    torch.cuda.synchronize()


@masks
@pytest.mark.parametrize("batch, heads", [(700, 100), (70_000, 1), (1, 70_000)])
def test_seventy_thousand_tiles(batch, heads, causal):
    q, k, v = inputs(batch, 16, 16, heads, heads, 64)
    dout = torch.randn_like(q)
    found = gradients(q, k, v, dout, causal=causal)
    dim = 0 if batch > 1 else 2
    for *tensors, dq, dk, dv in zip(*(x.chunk(2, dim) for x in (q, k, v, dout, *found.values()))):
        assert not faults(dict(q=dq, k=dk, v=dv), *tensors, causal)


def check_corners(q, k, v):
    """Tensors too large for a reference: checks the first and last batch and head."""
    dout = torch.empty_like(q).normal_()
    found = gradients(q, k, v, dout)
    for b in (slice(0, 1), slice(-1, None)):
        for h in (slice(0, 1), slice(-1, None)):
            corner = lambda x: x[b, :, h]
            wrong = faults({n: corner(x) for n, x in found.items()}, *map(corner, (q, k, v, dout)))
            assert not wrong, f"batch {b}, head {h}: {wrong}"


def test_keys_beyond_two_to_the_31_elements(alone):  # noqa: F811
    q, k, v = inputs(2, 128, 2**17 + 64, 64, 64, 128)
    assert k.numel() > 2**31
    check_corners(q, k, v)


def test_queries_beyond_two_to_the_31_elements(alone):  # noqa: F811
    """So many in the fp32 sum of dQ too."""
    q, k, v = inputs(2, 2**17 + 64, 100, 64, 64, 128)
    assert q.numel() > 2**31
    check_corners(q, k, v)


@pytest.mark.parametrize("far", ["q and dout", "k and v"])
def test_one_head_beyond_two_to_the_31_elements(far, alone):  # noqa: F811
    """The sequence stride alone takes the last row past 2³¹ elements."""
    storage = torch.empty(2**31 + 2**21, device="cuda", dtype=BF16)
    one, other = (storage.as_strided((1, 2049, 1, 128), (0, 2**20, 128, 1), i * 128) for i in (0, 1))
    one.normal_(), other.normal_()
    if far == "k and v":
        check(normal(1, 200, 2, 128), one, other)
    else:
        check(one, normal(1, 200, 1, 128), normal(1, 200, 1, 128), other)


# Layouts.


@head_dims
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout, d):
    for causal in (False, True):
        q, k, v = layout(3, 403, 4, d)
        options = dict(causal=causal, deterministic=True)
        dout = torch.randn(q.shape, device=q.device, dtype=q.dtype)
        found = check(q, k, v, dout, **options)
        assert not differing(found, gradients(q.contiguous(), k.contiguous(), v.contiguous(), dout, **options))


def one_number(x):
    """What out.sum().backward() passes: stride 0 everywhere."""
    return x.new_ones(()).expand(x.shape)


def one_row_expanded(x):
    return x[:, :1].expand(x.shape)


def one_batch_and_head_expanded(x):
    return x[:1, :, :1].expand(x.shape)


def head_dim_not_contiguous(x):
    return torch.stack([x, x], dim=-1)[..., 0]


def head_dim_first(x):
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def misaligned(x):
    """Starts 2 bytes past a multiple of 16."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def odd_strides(x):
    """Rows that are no multiple of 16 bytes apart."""
    return torch.nn.functional.pad(x, (0, 4))[..., : x.shape[3]]


def backwards(x):
    """Lazily negated: the memory holds -x."""
    return torch._neg_view(-x)


DOUTS = [
    *STORAGES[1:], one_number, one_row_expanded, one_batch_and_head_expanded, head_dim_not_contiguous, head_dim_first,
    misaligned, odd_strides, backwards,
]  # fmt: skip


@head_dims
@pytest.mark.parametrize("layout", DOUTS, ids=lambda layout: layout.__name__)
def test_layout_of_dout(layout, d):
    """Autograd passes on whatever the next layer's backward returned."""
    for shape in ((2, 203, 310, 4, 2), (1, 1, 150, 1, 1)):
        q, k, v = inputs(*shape, d)
        dout = layout(torch.randn_like(q))
        found = check(q, k, v, dout, causal=True, deterministic=True)
        contiguous = dout.resolve_neg().clone(memory_format=torch.contiguous_format)
        assert not differing(found, gradients(q, k, v, contiguous, causal=True, deterministic=True))


@masks
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_backward_of_a_sum(reduce, causal):
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    out = flash_attn_func(*leaves, causal=causal, deterministic=True)
    reduce(out).backward()
    dout = torch.full_like(out, 1 if reduce is torch.sum else 1 / out.numel()).detach()
    want = gradients(*leaves, dout, causal=causal, deterministic=True)
    assert not differing({n: x.grad for n, x in zip("qkv", leaves)}, want)


@masks
@head_dims
def test_qkvpacked_equals_separate(d, causal):
    options = dict(causal=causal, deterministic=True)
    qkv = normal(2, 203, 3 * 4, d)
    for packed, parts, more in (
        (qkv.view(2, 203, 3, 4, d), lambda x: x.unbind(2), {}),
        (qkv, lambda x: x.split((8, 2, 2), dim=2), dict(num_heads_q=8)),
    ):
        leaf = packed.clone().requires_grad_()
        out = flash_attn_qkvpacked_func(leaf, **options, **more)
        dout = torch.randn_like(out)
        (found,) = torch.autograd.grad(out, leaf, dout)
        assert found.shape == leaf.shape
        assert not differing(dict(zip("qkv", parts(found))), check(*parts(packed), dout, **options))


@head_dims
def test_gradient_of_an_expanded_head_and_batch(d):
    """The views' own backward sums what the kernels wrote."""
    q, (k, v) = normal(3, 150, 4, d), (normal(1, 200, 1, d).requires_grad_() for _ in range(2))
    wide = [x.expand(3, -1, 4, -1) for x in (k, v)]
    dout = torch.randn_like(q)
    found = torch.autograd.grad(flash_attn_func(q, *wide, deterministic=True), (k, v), dout)
    each = gradients(q, *(x.detach() for x in wide), dout, deterministic=True)
    for grad, name in zip(found, "kv"):
        torch.testing.assert_close(grad.float(), each[name].float().sum((0, 2), keepdim=True), rtol=2e-2, atol=2e-2)


# Options.


@head_dims
@masks
@pytest.mark.parametrize("scale", [None, 0.3, 1.0, -0.5, 0.0, 1e-6])
def test_softmax_scale(scale, causal, d):
    q, k, v = inputs(2, 150, 203, 4, 2, d)
    check(q, k, v, causal=causal, softmax_scale=scale)
    check(k, q[:, :, :2], q[:, :, 2:], causal=causal, softmax_scale=scale)  # 203 queries, some of which see nothing


@masks
def test_a_negative_scale_is_a_negative_query(causal):
    q, k, v = inputs(2, 203, 300, 4, 2, 128)
    dout = torch.randn_like(q)
    options = dict(causal=causal, deterministic=True)
    found = check(q, k, v, dout, softmax_scale=-0.25, **options)
    want = gradients(-q, k, v, dout, softmax_scale=0.25, **options)
    assert not differing({**found, "q": -found["q"]}, want)


@masks
@head_dims
def test_sm_margin(d, causal):
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    q, k, v = inputs(2, 1023, 1024, 8, 2, d)
    for margin in (1, 8, sms - 1):
        check(q, k, v, causal=causal, sm_margin=margin)


def test_lse_beside_out():
    """return_attn_probs changes no gradient, and a loss of the LSE is refused: it isn't differentiable."""
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    out, lse = flash_attn_func(*leaves, causal=True, deterministic=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    found = dict(zip("qkv", torch.autograd.grad(out, leaves, dout)))
    assert not differing(found, gradients(*leaves, dout, causal=True, deterministic=True))
    with pytest.raises((RuntimeError, NotImplementedError)):
        lse.sum().backward()


NEEDS = ["q", "k", "v", "qk", "qv", "kv"]


@masks
@pytest.mark.parametrize("needed", NEEDS)
def test_only_the_gradients_that_are_needed(needed, causal):
    """Inputs that don't require grad get none; the others' are what they are when all are taken."""
    tensors = list(inputs(2, 203, 310, 4, 2, 128))
    dout = torch.randn_like(tensors[0])
    leaves = [x.clone().requires_grad_(name in needed) for name, x in zip("qkv", tensors)]
    flash_attn_func(*leaves, causal=causal, deterministic=True).backward(dout)
    assert [x.grad is not None for x in leaves] == [name in needed for name in "qkv"]
    all_of_them = gradients(*tensors, dout, causal=causal, deterministic=True)
    assert not differing({n: x.grad for n, x in zip("qkv", leaves)}, {n: all_of_them[n] for n in needed})


# Numbers.


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("steep", [5, 40])
def test_steep_softmax(dtype, d, causal, steep):
    q, k, v = inputs(2, 403, 500, 4, 2, d, dtype)
    check(q * steep, k, v, causal=causal)


@dtypes
@masks
def test_every_score_far_below_zero(dtype, causal):
    q, k, v = inputs(2, 203, 300, 4, 2, 128, dtype)
    check(q * 0.1 + 6, k * 0.1 - 6, v, causal=causal)


@dtypes
@masks
def test_equal_scores(dtype, causal):
    """P is 1 / keys; what is left of dP - delta is what V differs from its mean by."""
    q, k, v = inputs(2, 513, 640, 4, 2, 128, dtype)
    check(torch.ones_like(q), torch.ones_like(k), v + 3, causal=causal)


@head_dims
@masks
def test_gradients_scale_with_dout(d, causal):
    """Exactly, by powers of 2, as loss scaling needs: nothing under- or overflows in bf16."""
    q, k, v = inputs(2, 403, 500, 4, 2, d)
    dout = torch.randn_like(q)
    want = gradients(q, k, v, dout, causal=causal, deterministic=True)
    for factor in (2.0**-16, 2.0**16):
        found = gradients(q, k, v, dout * factor, causal=causal, deterministic=True)
        assert not differing(found, {n: x * factor for n, x in want.items()}), f"dout · {factor}"


@head_dims
def test_rows_that_see_nothing_leave_no_trace(d):
    """However large their dO."""
    for seqlen_q, seqlen_k in ((1000, 300), (403, 400), (2048, 1)):
        q, k, v = inputs(2, seqlen_q, seqlen_k, 4, 2, d)
        dout = torch.randn_like(q)
        dout[:, : seqlen_q - seqlen_k] *= 1e4
        check(q, k, v, dout, causal=True)


@masks
@head_dims
@pytest.mark.parametrize("which, value", [("dout", NAN), ("q", NAN), ("k", NAN), ("v", NAN), ("dout", INF), ("v", INF)])
def test_one_bad_number_spreads_as_in_fp32_math(which, value, causal, d):
    """Where the formula makes something not finite of it, the kernels do; and only there.

    A key that a query doesn't see may get 0 times what isn't finite, which the formula has too, or nothing.
    """
    batch, row, channel = 1, 170, 5  # query heads 2 and 3 share K/V head 1
    tensors = dict(zip(("q", "k", "v"), inputs(2, 200, 300, 4, 2, d)))
    tensors["dout"] = torch.randn_like(tensors["q"])
    clean = by_autograd(lambda *x: attention(*x, causal=causal)[0], *tensors.values(), torch.float32)
    tensors[which][batch, row, 2 if which in ("q", "dout") else 1, channel] = value

    must, may = ({n: torch.zeros_like(x, dtype=torch.bool) for n, x in clean.items()} for _ in range(2))
    sees = visible(200, 300, "cuda") if causal else torch.ones(200, 300, dtype=torch.bool, device="cuda")
    if which in ("q", "dout"):
        channels = slice(None) if which == "q" else channel  # of dV = Σ P dO, where P is as it was
        must["q"][batch, row, 2] = may["q"][batch, row, 2] = True
        must["k"][batch, sees[row], 1] = must["v"][batch, sees[row], 1, channels] = True
        may["k"][batch, :, 1] = may["v"][batch, :, 1, channels] = True
    else:
        must["q"][batch, sees[:, row], 2:] = may["q"][batch, :, 2:] = True
        must["k"][batch, :, 1] = may["k"][batch, :, 1] = True  # through the last query, which sees all keys
        must["v"][batch, :, 1] = may["v"][batch, :, 1] = which == "k"
    found = gradients(**tensors, causal=causal)
    for name, grad in found.items():
        assert not grad[must[name]].isfinite().any(), f"d{name} is finite where it can't be"
        torch.testing.assert_close(grad.float()[~may[name]], clean[name][~may[name]], rtol=2e-2, atol=2e-2)


@dtypes
@masks
def test_inputs_are_not_modified(dtype, causal):
    leaves = [x.requires_grad_() for x in inputs(2, 203, 300, 4, 2, 128, dtype)]
    out, lse = flash_attn_func(*leaves, causal=causal, return_attn_probs=True)
    tensors = [*leaves, out, lse, torch.randn_like(out)]
    before = [x.detach().clone() for x in tensors]
    torch.autograd.grad(out, leaves, tensors[-1])
    assert all(same_bits(x.detach(), y) for x, y in zip(tensors, before))


# The same bits from run to run.


def other_work(stream, r):
    """Enqueues matrix products of random size on another stream, which takes SMs and bandwidth from what runs meanwhile."""
    with torch.cuda.stream(stream):
        n = r.choice((256, 1024, 4096))
        a = torch.ones(n, n, device="cuda", dtype=BF16)
        for _ in range(r.randint(1, 4)):
            a = a @ a


@head_dims
@masks
@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
def test_deterministic(d, causal, heads):
    for batch, seqlen_q, seqlen_k in ((3, 1111, 1333), (3, 1333, 1111), (6, 2048, 2048), (1, 129, 4000)):
        q, k, v = inputs(batch, seqlen_q, seqlen_k, 8, {"mha": 8, "gqa": 2, "mqa": 1}[heads], d)
        dout = torch.randn_like(q)
        first = gradients(q, k, v, dout, causal=causal, deterministic=True)
        assert batch == 6 or not faults(first, q, k, v, dout, causal)  # 6: large for a reference
        side, r = torch.cuda.Stream(), random.Random(0)
        for run in range(1, 20):
            other_work(side, r)
            found = differing(gradients(q, k, v, dout, causal=causal, deterministic=True), first)
            assert not found, f"lengths {seqlen_q}, {seqlen_k}, run {run}: {found}"


# Gradients where CTAs start late, or a few at a time: while a forward on another stream has some of the SMs for milliseconds,
# and on a stream that has 16 of them (a green context).
CHILD = """
import os
import sys
import torch
from cuda.bindings import driver
from fa3 import flash_attn_func, plan

def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

def returned(result):
    error, *values = result
    assert error == driver.CUresult.CUDA_SUCCESS, error
    return values[0] if len(values) == 1 else values

def stream_of_few(count):
    device = returned(driver.cuDeviceGet(0))
    all_sms = returned(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    parts, *_ = returned(driver.cuDevSmResourceSplitByCount(1, all_sms, 0, count))
    assert parts[0].sm.smCount == count
    described = returned(driver.cuDevResourceGenerateDesc(parts, 1))
    context = returned(driver.cuGreenCtxCreate(described, device, driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM))
    stream = returned(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
    return torch.cuda.ExternalStream(int(stream))

def compare(found, want, exact, where):
    for name, got, expected in zip("qkv", found, want):
        assert torch.equal(got, expected) or (name == "q" and not exact), (name, where)
        assert (got - expected).abs().max() < 0.01 * expected.abs().max(), (name, where)

d = int(sys.argv[1])
if "pairs" in sys.argv:
    plan.in_pairs = lambda problem: True
long = normal(1, 2**19, 1, 128)
q, k, v, dout = (normal(25, seqlen, 16, d).requires_grad_() for seqlen in (128, 640, 640, 128))
side, few = torch.cuda.Stream(), stream_of_few(16)
for deterministic in (False, True):
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    want = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for taken in (1, 16, 66, 110, 131):
        rows = normal(1, 128, taken, 128)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            flash_attn_func(rows, long, long, pack_gqa=False)
        found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        torch.cuda.synchronize()
        compare(found, want, deterministic, (deterministic, taken))
    with torch.cuda.stream(few):
        out = flash_attn_func(q, k, v, deterministic=deterministic)
        found = torch.autograd.grad(out, (q, k, v), dout)
    torch.cuda.synchronize()
    compare(found, want, deterministic, (deterministic, "few"))
os._exit(0)  # PyTorch may abort a process that ends soon after a backward written in Python (its issues 38230 and 190489)
"""


@pytest.mark.parametrize("which", [("64",), ("128",), ("128", "pairs"), ("256",)], ids=" ".join)
def test_ctas_that_start_late(which):
    """With one or two tiles of queries a tile of keys, a CTA's claims are furthest ahead of its turns to add."""
    subprocess.run([sys.executable, "-c", CHILD, *which], check=True, timeout=180)  # of its own: it can be ended where it hangs


@head_dims
@masks
def test_keys_and_values_gradients_are_deterministic_in_any_case(d, causal):
    """Where no two query heads share a K/V head."""
    q, k, v = inputs(3, 1111, 1333, 8, 8, d)
    dout = torch.randn_like(q)
    first = check(q, k, v, dout, causal=causal)
    side, r = torch.cuda.Stream(), random.Random(0)
    for run in range(1, 20):
        other_work(side, r)
        again = gradients(q, k, v, dout, causal=causal)
        assert not {"k", "v"} & set(differing(again, first)), f"run {run}"
        assert near(again["q"], first["q"]), f"run {run}"


@some_heads
@head_dims
@masks
def test_fifty_repeats(d, causal, heads):
    for batch, seqlen_q, seqlen_k in ((2, 113, 203), (1, 799, 1023), (2, 1023, 799)):
        q, k, v = inputs(batch, seqlen_q, seqlen_k, *HEADS[heads], d)
        dout = torch.randn_like(q)
        first = check(q, k, v, dout, causal=causal)
        for run in range(1, 50):
            again = gradients(q, k, v, dout, causal=causal)
            moved = [name for name in first if not near(again[name], first[name])]
            assert not moved, f"lengths {seqlen_q}, {seqlen_k}, run {run}: {moved}"
        assert not faults(again, q, k, v, dout, causal)


# Memory: bar 3 of the issue.


def bytes_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@deterministic_or_not
@head_dims
@masks
def test_memory(d, causal, deterministic):
    """Gradients, dQ's fp32 sum, two fp32 numbers a query, and the allocator's rounding of at most 1 MB a tensor."""
    heads, seqlen = 8, 16384 - 57
    leaves = [x.requires_grad_() for x in inputs(1, seqlen, seqlen, heads, 2, d)]
    dout = torch.randn_like(leaves[0])
    options = dict(causal=causal, deterministic=deterministic)
    torch.autograd.grad(flash_attn_func(*leaves, **options), leaves, dout)  # whatever a first call keeps
    torch.cuda.synchronize()

    before = torch.cuda.memory_allocated()
    out = flash_attn_func(*leaves, **options)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= bytes_of(out) + 4 * heads * seqlen + 2 * MEGABYTE, "more than O and LSE is kept for the backward"

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    rows = -(-seqlen // 128) * 128
    assert peak <= bytes_of(*found) + 4 * heads * rows * (d + 2) + 7 * MEGABYTE
    del found
    assert torch.cuda.memory_allocated() <= before + MEGABYTE, "the backward keeps memory"


def test_what_is_saved():
    """q, k, v, O and the LSE, nothing else."""
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.detach()) or x, lambda x: x):
        out = flash_attn_func(*leaves, causal=True)
    places = sorted(x.data_ptr() for x in saved)
    (lse,) = [x for x in saved if x.dtype == torch.float32]
    assert lse.shape == (2, 4, 203)
    assert places == sorted([*(x.data_ptr() for x in leaves), out.data_ptr(), lse.data_ptr()])


# Autograd.


def test_backward_twice():
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    out = flash_attn_func(*leaves, causal=True, deterministic=True)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(map(same_bits, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, dout)


def test_second_derivatives_are_refused():
    """Not left out of a sum without a word."""
    leaves = [x.requires_grad_() for x in inputs(1, 100, 100, 2, 2, 64)]
    out = flash_attn_func(*leaves)
    with pytest.raises((RuntimeError, NotImplementedError)):
        (dq,) = torch.autograd.grad(out, leaves[:1], torch.randn_like(out), create_graph=True)
        (dq.float().square().sum() + leaves[0].float().sum()).backward()


def test_inputs_changed_in_place_before_the_backward_are_noticed():
    q, k, v = (x.requires_grad_() for x in inputs(1, 100, 100, 2, 2, 64))
    for i in range(3):
        tensors = [x * 1 for x in (q, k, v)]
        out = flash_attn_func(*tensors)
        tensors[i].mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            out.sum().backward()
    out = flash_attn_func(q, k, v)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_gradients_accumulate():
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    douts = [torch.randn_like(leaves[0]) for _ in range(2)]
    for dout in douts:
        flash_attn_func(*leaves, deterministic=True).backward(dout)
    one, two = (gradients(*leaves, dout, deterministic=True) for dout in douts)
    assert not differing({n: x.grad for n, x in zip("qkv", leaves)}, {n: one[n] + two[n] for n in "qkv"})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    leaves = [x.requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128)]
    dout = torch.randn_like(leaves[0])
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True)
    checkpoint(call, *leaves, use_reentrant=reentrant).backward(dout)
    want = gradients(*leaves, dout, causal=True, deterministic=True)
    assert not differing({n: x.grad for n, x in zip("qkv", leaves)}, want)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    """fp32 inputs run in autocast's dtype, and their gradients come in fp32; the backward may run outside of it."""
    leaves = [x.float().requires_grad_() for x in inputs(2, 203, 310, 4, 2, 128, dtype)]
    with torch.autocast("cuda", dtype):
        out = flash_attn_func(*leaves, causal=True, deterministic=True)
    assert out.dtype == dtype
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    want = gradients(*(x.detach().to(dtype) for x in leaves), dout, causal=True, deterministic=True)
    assert not differing(dict(zip("qkv", found)), {n: x.float() for n, x in want.items()})


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_autocast_between_linear_layers(dtype):
    """fp32 weights, as in training; a half-precision input of the other dtype is not converted."""
    block = Block(4, 64).to("cuda")
    x = torch.randn(2, 300, 256, device="cuda")
    with torch.autocast("cuda", dtype):
        block(x).square().mean().backward()
        assert flash_attn_func(*inputs(1, 10, 10, 1, 1, 64, FP16 if dtype == BF16 else BF16)).dtype != dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


def test_one_tensor_as_query_key_and_value():
    x = normal(2, 203, 4, 128).requires_grad_()
    out = flash_attn_func(x, x, x, deterministic=True)
    dout = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, dout)
    each = gradients(x, x, x, dout, deterministic=True)
    torch.testing.assert_close(found.float(), sum(each.values()).float(), rtol=2e-2, atol=2e-2)


# CUDA: graphs, streams, threads, devices.


@deterministic_or_not
@masks
@head_dims
def test_graph_of_forward_and_backward(d, causal, deterministic):
    options = dict(causal=causal, deterministic=deterministic)
    draw = lambda: [*inputs(2, 1000, 900, 8, 8, d), normal(2, 1000, 8, d)]
    *leaves, dout = draw()
    leaves = [x.requires_grad_() for x in leaves]

    def step():
        out = flash_attn_func(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiled and loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [x.detach() for x in step()]
    for replays in (1, 2, 5):
        with torch.no_grad():
            for x, new in zip([*leaves, dout], draw()):
                x.copy_(new)
        for x in got:
            x.fill_(NAN)
        for _ in range(replays):
            graph.replay()
        out, *found = got
        assert same_bits(out, flash_attn_func(*(x.detach() for x in leaves), **options))
        want = gradients(*leaves, dout, **options)
        found = dict(zip("qkv", found))
        assert set(differing(found, want)) <= (set() if deterministic else {"q"})
        assert not faults(found, *(x.detach() for x in leaves), dout, causal)


def test_graphed_callable():
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True)
    sample = tuple(x.requires_grad_() for x in inputs(2, 333, 333, 8, 2, 128))
    graphed = torch.cuda.make_graphed_callables(call, sample)
    for _ in range(3):
        leaves = [x.requires_grad_() for x in inputs(2, 333, 333, 8, 2, 128)]
        out = graphed(*leaves)
        dout = torch.randn_like(out)
        found = dict(zip("qkv", torch.autograd.grad(out, leaves, dout)))
        assert not differing(found, gradients(*leaves, dout, causal=True, deterministic=True))


@masks
def test_graph_replayed_beside_eager_calls(causal):
    """A replay on one stream and calls on another, at once, share nothing that they write."""
    leaves = [x.requires_grad_() for x in inputs(2, 1000, 1000, 8, 2, 128)]
    dout = torch.randn_like(leaves[0])

    def step():
        return torch.autograd.grad(flash_attn_func(*leaves, causal=causal, deterministic=True), leaves, dout)

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    side, wrong = torch.cuda.Stream(), torch.zeros(2, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
            wrong[0] += sum((x != y).sum() for x, y in zip(got, want))
        wrong[1] += sum((x != y).sum() for x, y in zip(step(), want))
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


@deterministic_or_not
def test_side_stream(deterministic):
    """The kernels wait for what their own stream did before, and for no other stream."""
    options = dict(causal=True, deterministic=deterministic)
    *fresh, fresh_dout = *inputs(2, 300, 300, 4, 4, 64), normal(2, 300, 4, 64)
    want = gradients(*fresh, fresh_dout, **options)
    stale, dout = [torch.zeros_like(x).requires_grad_() for x in fresh], torch.zeros_like(fresh_dout)
    step = lambda: torch.autograd.grad(flash_attn_func(*stale, **options), stale, dout)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        step()  # so that the stream owns memory, and allocating waits for nothing
    torch.cuda.synchronize()

    torch.cuda._sleep(1_000_000_000)  # half a second in which the default stream gets nothing done
    blocked = torch.cuda.Event()
    blocked.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would read the zeros
        with torch.no_grad():
            for x, new in zip([*stale, dout], [*fresh, fresh_dout]):
                x.copy_(new)
        found = step()
        arrived = [torch.empty_like(x, device="cpu").copy_(x) for x in found]  # waits for the side stream alone
    assert not blocked.query(), "the default stream wasn't busy, so this test has shown nothing"
    torch.cuda.synchronize()
    wrong = differing(dict(zip("qkv", arrived)), {n: x.cpu() for n, x in want.items()})
    assert set(wrong) <= (set() if deterministic else {"q"})
    assert near(arrived[0], want["q"].cpu())


def test_two_threads():
    """Each on a stream of its own; one kernel, and two."""
    jobs = [
        (list(inputs(2, 333, 400, 8, 2, 128)), dict(causal=True, deterministic=True)),
        (list(inputs(1, 1024, 1024, 4, 4, 128)), dict(causal=True, deterministic=True)),
        (list(inputs(3, 777, 500, 3, 1, 64)), dict(softmax_scale=0.3, deterministic=True)),
    ]
    start = threading.Barrier(len(jobs), timeout=60)

    def step(tensors, options):
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(flash_attn_func(*leaves, **options), leaves, torch.ones_like(tensors[0]))

    expected = [step(*job) for job in jobs]
    torch.cuda.synchronize()

    def work(job, want):
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            start.wait()
            for _ in range(100):
                wrong += sum((x != y).sum() for x, y in zip(step(*job), want))
            return wrong.item()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(work, jobs, expected)) == [0] * len(jobs)


def test_current_device_is_left_as_it_was():
    """On the last GPU, which with two or more isn't the current one; a call follows its inputs."""
    last = torch.cuda.device_count() - 1
    q, k, v, dout = (x.to(f"cuda:{last}") for x in (*inputs(2, 300, 300, 4, 2, 64), normal(2, 300, 4, 64)))
    with torch.cuda.device(0):
        found = check(q, k, v, dout, causal=True, deterministic=True)
        assert torch.cuda.current_device() == 0
        home = gradients(*(x.to("cuda:0") for x in (q, k, v, dout)), causal=True, deterministic=True)
    assert not differing({n: x.cpu() for n, x in found.items()}, {n: x.cpu() for n, x in home.items()})


# torch.compile.


@pytest.fixture
def fresh_compiler():
    """Nothing that torch.compile traced before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_call(call, q, k, v, dout):
    """(O, gradients) of one call."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return out.detach(), dict(zip("qkv", torch.autograd.grad(out, leaves, dout)))


def check_same(call, want, *tensors):
    (out, found), (want_out, want_found) = of_call(call, *tensors), of_call(want, *tensors)
    assert same_bits(out, want_out) and not differing(found, want_found)


@masks
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_eager(mode, causal, fresh_compiler):
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=causal, deterministic=True)
    compiled = torch.compile(call, fullgraph=True, mode=mode)
    for _ in range(4):  # CUDA graphs are recorded in the second, and replayed from the third
        torch.compiler.cudagraph_mark_step_begin()
        check_same(compiled, call, *inputs(2, 203, 310, 4, 2, 128), normal(2, 203, 4, 128))


def test_compiled_takes_any_strides(fresh_compiler):
    """Packed q, k and v, and a dO that isn't contiguous, beside a scale of its own."""
    call = lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=0.2, deterministic=True)
    q, k, v = normal(2, 203, 12, 64).view(2, 203, 3, 4, 64).unbind(2)
    for layout in (torch.clone, heads_before_the_sequence, one_number):
        torch._dynamo.reset()
        check_same(torch.compile(call, fullgraph=True), call, q, k, v, layout(normal(2, 203, 4, 64)))


@pytest.mark.parametrize("dynamic", [None, True], ids=["found out", "told"])
def test_compiled_lengths_are_dynamic(dynamic, fresh_compiler):
    """Compiled once for all lengths, or where it isn't told, a second time at the second length."""
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for i, (seqlen_q, seqlen_k) in enumerate([(100, 130), (257, 300), (1000, 777), (64, 2048), (333, 90)]):
        with torch._dynamo.config.patch(error_on_recompile=i > (0 if dynamic else 1)):
            check_same(compiled, call, *inputs(2, seqlen_q, seqlen_k, 4, 2, 128), normal(2, seqlen_q, 4, 128))


class Block(torch.nn.Module):
    """Attention between linear layers, of a packed qkv."""

    def __init__(self, heads, d, checkpointed=False):
        super().__init__()
        self.heads, self.checkpointed = heads, checkpointed
        self.qkv = torch.nn.Linear(heads * d, 3 * heads * d)
        self.out = torch.nn.Linear(heads * d, heads * d)

    def attend(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.out(flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True).flatten(2))

    def forward(self, x):
        return x + (checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_module(checkpointed, fresh_compiler):
    block = Block(4, 64, checkpointed).to("cuda", BF16)
    x = torch.randn(2, 300, 256, device="cuda", dtype=BF16)
    want = torch.autograd.grad(block(x).sum(), block.parameters())
    found = torch.autograd.grad(torch.compile(block, fullgraph=True)(x).sum(), block.parameters())
    for a, b in zip(found, want):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_compiled_under_autocast(fresh_compiler):
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True)
    q, k, v = (x.float() for x in inputs(2, 203, 310, 4, 2, 128))
    with torch.autocast("cuda", BF16):
        check_same(torch.compile(call, fullgraph=True), call, q, k, v, normal(2, 203, 4, 128))


# Operators.


@masks
@pytest.mark.parametrize("wanted", ["", "q", "kv", "qkv"])
def test_operator_of_the_forward(wanted, causal):
    q, k, v = (x.requires_grad_(n in wanted) for n, x in zip("qkv", inputs(2, 130, 203, 4, 2, 64)))
    torch.library.opcheck(torch.ops.fa3.forward.default, (q, k, v, 0.125, causal, True, 0))
    q, k, v = (x.detach().requires_grad_(n in wanted) for n, x in zip("qkv", LAYOUTS[0](2, 130, 4, 64)))
    torch.library.opcheck(torch.ops.fa3.forward.default, (q, k, v, -0.3, causal, True, 8))


@masks
@pytest.mark.parametrize("layout", [torch.clone, heads_before_the_sequence, one_number, misaligned])
def test_operator_of_the_backward(layout, causal):
    for scale, tensors in ((0.125, inputs(2, 130, 203, 4, 2, 64)), (-0.3, LAYOUTS[0](2, 130, 4, 64))):
        q, k, v = tensors
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
        arguments = layout(torch.randn_like(out)), q, k, v, out, lse, scale, causal, True
        torch.library.opcheck(torch.ops.fa3.backward.default, arguments)
        assert all(x.is_contiguous() for x in torch.ops.fa3.backward(*arguments))
