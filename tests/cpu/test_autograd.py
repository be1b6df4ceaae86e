"""Gradients on CPU tensors, what autograd keeps and gives, and what a backward launch hands to its kernel."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fa3 import autograd, flash_attn_func, flash_attn_qkvpacked_func, jit, launch, plan, reference
from fa3.kernels.configs import BackwardConfig
from fa3.launch import BackwardLaunch
from fa3.problem import Problem

FP16, BF16, FP64 = torch.float16, torch.bfloat16, torch.float64
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}
attention = sys.modules["fa3.attention"]
dtypes = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def normal(batch, seqlen, heads, d, dtype=BF16):
    return torch.randn(batch, seqlen, heads, d).to(dtype)


def inputs(batch=2, seqlen_q=21, seqlen_k=34, heads=4, heads_kv=2, d=64, dtype=BF16):
    """q, k and v that require grad, and a gradient of the output."""
    q, k, v = (normal(batch, n, h, d, dtype) for n, h in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv)))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), normal(batch, seqlen_q, heads, d, dtype)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def by_torch(q, k, v, dout, scale=None, causal=False):
    """Gradients in fp64 through torch's own attention; rows that see nothing are left out of it."""
    Q, K, V = leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    blind = max(0, q.shape[1] - k.shape[1]) if causal else 0
    seen = torch.ones(q.shape[1] - blind, k.shape[1], dtype=torch.bool)
    if causal:
        seen = seen.tril(k.shape[1] - seen.shape[0])
    K, V = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2) for x in (K, V))
    out = F.scaled_dot_product_attention(Q[:, blind:].transpose(1, 2), K, V, attn_mask=seen, scale=scale).transpose(1, 2)
    return torch.autograd.grad(out, leaves, dout[:, blind:].double())


def check_close(found, want, dtype):
    """fp32 inside, rounded once: the last place, and fp32's error of sums that cancel."""
    for grad, true in zip(found, want):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), true, rtol=torch.finfo(dtype).eps, atol=1e-5)


# Values.


@dtypes
@masks
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(21, 34), (33, 33), (20, 9), (1, 1), (1, 40)])
@pytest.mark.parametrize("scale", [None, 0.3, -0.1, 0.0])
def test_values(dtype, causal, heads, seqlen_q, seqlen_k, scale):
    q, k, v, dout = inputs(2, seqlen_q, seqlen_k, *HEADS[heads], dtype=dtype)
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
    found = torch.autograd.grad(out, (q, k, v), dout)
    check_close(found, by_torch(q, k, v, dout, scale, causal), dtype)
    if causal:
        assert (found[0][:, : max(0, seqlen_q - seqlen_k)] == 0).all()  # they see nothing
    with torch.no_grad():
        assert torch.equal(flash_attn_func(q, k, v, softmax_scale=scale, causal=causal), out)


@pytest.mark.parametrize("d", [64, 128, 256])
@masks
def test_head_dims(d, causal):
    q, k, v, dout = inputs(d=d)
    found = torch.autograd.grad(flash_attn_func(q, k, v, causal=causal), (q, k, v), dout)
    check_close(found, by_torch(q, k, v, dout, causal=causal), BF16)


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(2, 5, 0), (2, 0, 5), (0, 5, 5), (2, 0, 0)])
@masks
def test_nothing_to_attend_to(batch, seqlen_q, seqlen_k, causal):
    q, k, v, dout = inputs(batch, seqlen_q, seqlen_k)
    out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert out.requires_grad and (out == 0).all() and (lse == float("-inf")).all()
    for x, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), dout)):
        assert grad.shape == x.shape and grad.dtype == BF16 and (grad == 0).all()


def test_rows_with_only_infinitely_low_scores():
    q, k, v, dout = inputs(dtype=FP16)
    with torch.no_grad():
        q.copy_(q.abs())
        k[:, :, 0, 0] = float("-inf")  # of two K/V heads; and key 5 has a score
        k[:, 5, 0, 0] = 0
    for seen in (slice(0, 5), slice(0, 34)):
        found = torch.autograd.grad(flash_attn_func(q, k[:, seen], v[:, seen]), (q, k, v), dout)
        assert found[2].isfinite().all()
        assert (found[2][:, :5, 0] == 0).all() and not (found[2][:, 0, 1] == 0).any()


@pytest.mark.parametrize("scores_at_once", [reference.SCORES_AT_ONCE, 50], ids=["whole", "chunked"])
@masks
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 5), (3, 8), (8, 3), (4, 0), (0, 4)])
def test_reference_gradients_are_its_own_by_autograd(seqlen_q, seqlen_k, causal, scores_at_once, monkeypatch):
    q, k, v, dout = (x.detach() for x in inputs(2, seqlen_q, seqlen_k, 4, 2, 8, FP64))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*leaves, causal=causal, softmax_scale=0.7, dtype=FP64)
    want = [torch.zeros_like(x) for x in leaves] if 0 in (seqlen_q, seqlen_k) else torch.autograd.grad(out, leaves, dout)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", scores_at_once)
    options = dict(causal=causal, softmax_scale=0.7)
    for grad, true in zip(reference.gradients(dout, q, k, v, dtype=FP64, **options), want):
        torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-12)
    narrow = [x.to(BF16) for x in (dout, q, k, v)]
    assert [x.dtype for x in reference.gradients(*narrow, **options)] == [BF16] * 3
    assert [x.dtype for x in reference.gradients(*narrow, **options, out_dtype=FP64)] == [FP64] * 3


# What autograd keeps and gives.


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_only_the_gradients_that_are_needed(needed):
    q, k, v, dout = inputs()
    want = dict(zip("qkv", torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)))
    tensors = {name: x.detach().requires_grad_(name in needed) for name, x in zip("qkv", (q, k, v))}
    out = flash_attn_func(**tensors)
    given = []
    out.grad_fn.register_hook(lambda gradients, _: given.append(gradients))
    out.backward(dout)
    assert [grad is not None for grad in given[0]] == [name in needed for name in "qkv"]
    for name, x in tensors.items():
        assert torch.equal(x.grad, want[name]) if name in needed else x.grad is None


def saved_by(function, *arguments, **options):
    """What the function returns, and the tensors that autograd keeps for its backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        return function(*arguments, **options), kept


def same_memory(tensors):
    return sorted((x.data_ptr(), x.shape, x.stride()) for x in tensors)


def test_what_is_saved():
    q, k, v, _ = inputs()
    (out, lse), kept = saved_by(flash_attn_func, q, k, v, return_attn_probs=True)
    assert same_memory(kept) == same_memory([q, k, v, out, lse])
    out, kept = saved_by(flash_attn_func, q, k.detach(), v.detach())
    assert len(kept) == 5 and {x.dtype for x in kept if x.dim() == 3} == {torch.float32}
    qkv = normal(2, 9, 6, 64).requires_grad_()
    (out, lse), kept = saved_by(flash_attn_qkvpacked_func, qkv, num_heads_q=4, return_attn_probs=True)
    assert same_memory(kept) == same_memory([qkv, out, lse])
    for options in ({}, dict(return_attn_probs=True)):
        assert saved_by(torch.no_grad()(flash_attn_func), q, k, v, **options)[1] == []
        assert saved_by(flash_attn_func, q.detach(), k.detach(), v.detach(), **options)[1] == []


def test_lse_is_not_differentiable():
    for q, k, v, dout in (inputs(), inputs(seqlen_k=0)):
        out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
        assert out.requires_grad and not lse.requires_grad and lse.grad_fn is None
        with pytest.raises(RuntimeError, match="does not require grad"):
            lse.sum().backward()
        (out.float().sum() + lse.clamp(min=0).sum()).backward()
        assert torch.equal(q.grad, torch.autograd.grad(flash_attn_func(q, k, v), q, torch.ones_like(dout))[0])
    qkv = normal(2, 9, 6, 64).requires_grad_()
    assert not flash_attn_qkvpacked_func(qkv, num_heads_q=2, return_attn_probs=True)[1].requires_grad


def test_no_grad_records_nothing():
    q, k, v, _ = inputs()
    for _ in range(2):  # what is remembered with gradients and without are two calls
        assert flash_attn_func(q, k, v).requires_grad
        with torch.no_grad():
            assert not flash_attn_func(q, k, v).requires_grad
        with torch.inference_mode():
            assert flash_attn_func(q, k, v).is_inference()
        assert not flash_attn_func(q.detach(), k.detach(), v.detach()).requires_grad


def test_second_derivatives_are_refused():
    q, k, v, dout = inputs()
    qkv = normal(2, 9, 6, 64).requires_grad_()
    for out, x in ((flash_attn_func(q, k, v), q), (flash_attn_qkvpacked_func(qkv, num_heads_q=2), qkv)):
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
        assert grad.requires_grad  # else a penalty on it would count for nothing, without a word
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


def test_a_changed_input_is_noticed():
    q, k, v, dout = inputs()
    inside = k * 1
    out = flash_attn_func(q, inside, v)
    inside.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_one_tensor_as_all_three():
    x = normal(2, 20, 4, 64).requires_grad_()
    dout = normal(2, 20, 4, 64)
    out = flash_attn_func(x, x, x, causal=True)
    parts = by_torch(x, x, x, dout, causal=True)
    (grad,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(grad.double(), sum(parts), rtol=3 * 2**-8, atol=3e-2)  # three roundings, of each part


def test_gradients_accumulate():
    q, k, v, dout = inputs()
    for i in range(1, 4):
        flash_attn_func(q, k, v, causal=True).backward(dout)
        if i == 1:
            once = [x.grad.clone() for x in (q, k, v)]
    for x, grad in zip((q, k, v), once):
        torch.testing.assert_close(x.grad, 3 * grad, rtol=2**-7, atol=0)


def test_a_graph_that_is_kept_gives_the_same_again():
    q, k, v, dout = inputs()
    out = flash_attn_func(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, (q, k, v), dout)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_checkpoint(use_reentrant, packed):
    x = normal(2, 20, 12, 64).requires_grad_()

    def layer(x):
        if packed:
            return flash_attn_qkvpacked_func(x * 2, num_heads_q=4, causal=True)
        return flash_attn_func(*(x * 2).split(4, dim=2), causal=True)

    dout = normal(2, 20, 4, 64)
    (want,) = torch.autograd.grad(layer(x), x, dout)
    out, kept = saved_by(checkpoint, layer, x, use_reentrant=use_reentrant)
    assert len(kept) <= 1  # the layer's input
    out.backward(dout)
    assert torch.equal(x.grad, want)


def test_saved_on_another_device():
    """save_on_cpu gives back tensors with other strides than those that were saved."""
    q, k, v, dout = inputs()
    transposed = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    want = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)
    with torch.autograd.graph.save_on_cpu():
        out = flash_attn_func(transposed, k, v)
    assert all(map(torch.equal, torch.autograd.grad(out, (transposed, k, v), dout), want))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_another_call(deterministic):
    q, k, v, dout = inputs()
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    check_close(torch.autograd.grad(out, (q, k, v), dout), by_torch(q, k, v, dout), BF16)
    assert out.grad_fn.call.backward.args[0].deterministic is deterministic


# Gradients of the output that lie in memory in some other way.


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


def offset(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = [strided, offset, heads_first, torch._neg_view]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_outputs_gradient_do_not_matter(layout):
    q, k, v, dout = inputs()
    out = flash_attn_func(q, k, v)
    found = torch.autograd.grad(out, (q, k, v), layout(dout), retain_graph=True)
    want = torch.autograd.grad(out, (q, k, v), layout(dout).clone().contiguous())
    assert all(map(torch.equal, found, want))


def test_expanded_gradient_of_the_output():
    q, k, v, dout = inputs()
    flash_attn_func(q, k, v).sum().backward()
    want = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), torch.ones_like(dout))
    assert all(map(torch.equal, (q.grad, k.grad, v.grad), want))


# Packed.


@masks
@pytest.mark.parametrize("layout", ["five", "four"])
def test_packed_equals_separate(layout, causal):
    if layout == "five":
        qkv, options = torch.randn(2, 20, 3, 4, 64).to(BF16).requires_grad_(), {}
        parts = qkv.unbind(2)
    else:
        qkv, options = normal(2, 20, 12, 64).requires_grad_(), dict(num_heads_q=8)
        parts = qkv.split([8, 2, 2], dim=2)
    options |= dict(causal=causal, softmax_scale=0.2)
    dout = torch.randn(parts[0].shape).to(BF16)
    out = flash_attn_qkvpacked_func(qkv, **options)
    options.pop("num_heads_q", None)
    separate = flash_attn_func(*parts, **options)
    assert torch.equal(out, separate)
    (found,), (want,) = torch.autograd.grad(out, qkv, dout), torch.autograd.grad(separate, qkv, dout)
    assert torch.equal(found, want) and found.is_contiguous()


def test_packed_backward_is_one_step():
    qkv = normal(2, 20, 12, 64).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, num_heads_q=8)
    assert isinstance(out.grad_fn, autograd.PackedAttention._backward_cls)
    assert [type(node).__name__ for node, _ in out.grad_fn.next_functions if node] == ["AccumulateGrad"]
    empty = normal(2, 0, 12, 64).requires_grad_()
    flash_attn_qkvpacked_func(empty, num_heads_q=8).sum().backward()
    assert empty.grad.shape == empty.shape


# Autocast.


@dtypes
def test_autocast(dtype):
    q, k, v, dout = (x.detach() for x in inputs(dtype=torch.float32))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype):
        out = flash_attn_func(*leaves, causal=True)
    assert out.dtype == dtype
    found = torch.autograd.grad(out, leaves, dout.to(dtype))
    narrow = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(flash_attn_func(*narrow, causal=True), narrow, dout.to(dtype))
    for grad, true in zip(found, want):
        assert grad.dtype == torch.float32 and torch.equal(grad, true.float())


def test_a_module_under_autocast_trains_as_with_torchs_attention():
    """A backward inside of autocast as well: it doesn't reach into the reference."""
    project = torch.nn.Linear(128, 3 * 128)
    x, dout = torch.randn(2, 20, 128), torch.randn(2, 20, 2, 64).to(BF16)
    found = []
    for attend in (
        lambda qkv: flash_attn_qkvpacked_func(qkv),
        lambda qkv: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2),
    ):
        with torch.autocast("cpu", BF16):
            out = attend(project(x).view(2, 20, 3, 2, 64))
            found.append(torch.autograd.grad(out, project.weight, dout)[0])
    assert (found[0] - found[1]).abs().max() < 2e-2 * found[1].abs().max()
    q, k, v, dout = inputs()
    with torch.autocast("cpu", BF16):
        inside = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)
    assert all(map(torch.equal, inside, torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)))


# The backward launch, with something in the kernel's place that looks at what it is given and does the reference's work.


class Kernel:
    """A backward kernel on CPU tensors, for one call at a time."""

    def __init__(self, config):
        self.config = config
        self.got = None

    def __call__(self, q, k, v, out, dout, lse, dq, dk, dv, dq_accum, lse_log2, delta, turns, scale, sms):
        assert sms == plan.Device().sms
        self.got = dict(q=q, k=k, v=v, out=out, dout=dout, lse=lse, dq=dq, dk=dk, dv=dv, scale=scale)
        for name, x in list(self.got.items())[:9]:
            if name != "lse":
                assert x.stride(3) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3]), (name, x.stride())
                assert x.data_ptr() % 16 == 0, name
        assert lse.is_contiguous() and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
        assert scale > 0
        self.workspace = dict(dq_accum=dq_accum, lse_log2=lse_log2, delta=delta, turns=turns)
        causal = self.config.mask == "causal"
        for written, grad in zip((dq, dk, dv), reference.gradients(dout, q, k, v, softmax_scale=scale, causal=causal)):
            written.copy_(grad)


@pytest.fixture
def kernel(monkeypatch):
    """Backward launches on CPU tensors; the last one's kernel."""
    used = []

    def get(config):
        used.append(Kernel(config))
        return used[-1]

    def backward_of(problem, device):
        return BackwardLaunch(problem, plan.plan_backward(problem, plan.Device()))

    monkeypatch.setattr(jit, "get", get)
    monkeypatch.setattr(attention, "backward_of", backward_of)
    monkeypatch.setattr(attention, "CALLS", {})
    return lambda: used[-1]


@masks
@pytest.mark.parametrize("scale", [None, 0.3, -0.1, 0.0])
def test_launch_scales(kernel, scale, causal):
    """A kernel takes positive scales only: the sign, or 0, is q's and dq's."""
    q, k, v, dout = inputs()
    before = [x.detach().clone() for x in (q, k, v, dout)]
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
    found = torch.autograd.grad(out, (q, k, v), dout)
    check_close(found, by_torch(q, k, v, dout, scale, causal), BF16)
    assert kernel().got["scale"] == {None: 0.125, 0.3: 0.3, -0.1: 0.1, 0.0: 1.0}[scale]
    assert all(map(torch.equal, (q, k, v, dout), before))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launch_copies_what_tma_cannot_read(kernel, layout):
    q, k, v, dout = inputs()
    out = flash_attn_func(q, k, v)
    found = torch.autograd.grad(out, (q, k, v), layout(dout))
    check_close(found, by_torch(q, k, v, layout(dout)), BF16)
    got = kernel().got
    assert all(got[name].data_ptr() == x.data_ptr() for name, x in dict(q=q, k=k, v=v, out=out).items())
    assert got["dout"].is_contiguous() == (layout is not heads_first)  # which has strides that TMA takes


def test_launch_reads_expanded_tensors_in_place(kernel):
    q, k, v, _ = inputs()
    row = normal(1, 1, 4, 64)
    out = flash_attn_func(q, k[:1, :, :1].expand(2, 34, 2, 64), v)
    torch.autograd.grad(out, (q, k, v), row.expand(2, 21, 4, 64))
    got = kernel().got
    assert got["dout"].stride()[:2] == (0, 0) and got["dout"].data_ptr() == row.data_ptr()
    assert got["k"].stride(0) == 0 and got["k"].stride(2) == 0
    flash_attn_func(q, k, v).sum().backward()
    assert kernel().got["dout"].is_contiguous()


def test_launch_gives_dimensions_of_size_1_strides_that_tma_takes(kernel):
    q, k, v, dout = (x.detach() for x in inputs(1, 1, 1, 1, 1))
    odd = lambda x: x.as_strided(x.shape, (3, 5, 7, 1))
    leaves = [odd(x).requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(flash_attn_func(*leaves), leaves, odd(dout))
    check_close(found, by_torch(q, k, v, dout), BF16)
    assert all(kernel().got[name].data_ptr() == x.data_ptr() for name, x in zip(("q", "k", "v", "dout"), (q, k, v, dout)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_launch_allocates_the_workspace(kernel, deterministic):
    q, k, v, dout = inputs()
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        torch.autograd.grad(out, (q, k, v), dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel().config.deterministic is deterministic
    problem = Problem("bf16", 2, 21, 34, 4, 2, 64, False, 0.125, True, 0, deterministic)
    for name, needed in plan.plan_backward(problem, plan.Device()).workspace.items():
        given = kernel().workspace[name]
        if needed is None:
            assert given is None
            continue
        shape, dtype = needed
        assert (given.shape, given.dtype) == (shape, getattr(torch, dtype)) and given.is_contiguous()
        assert given.isnan().all() if dtype == "float32" else (given == torch.iinfo(given.dtype).max).all()  # nothing is spent on filling it


@pytest.mark.parametrize("layout", ["five", "four"])
def test_launch_writes_into_the_packed_gradient(kernel, layout):
    qkv = (torch.randn(2, 20, 3, 4, 64) if layout == "five" else torch.randn(2, 20, 12, 64)).to(BF16).requires_grad_()
    heads, options = ((4, 4), {}) if layout == "five" else ((8, 2), dict(num_heads_q=8))
    out = flash_attn_qkvpacked_func(qkv, causal=True, softmax_scale=-0.2, **options)
    dout = torch.randn(out.shape).to(BF16)
    (found,) = torch.autograd.grad(out, qkv, dout)
    q, k, v = qkv.detach().flatten(2, -2).split([heads[0], heads[1], heads[1]], dim=2)
    want = torch.cat(by_torch(q, k, v, dout, -0.2, True), dim=2)
    check_close([found.flatten(2, -2)], [want], BF16)
    got = kernel().got
    starts = [0, heads[0] * 64, (heads[0] + heads[1]) * 64]
    assert [got[name].data_ptr() for name in ("dq", "dk", "dv")] == [found.data_ptr() + 2 * start for start in starts]
    assert [got[name].data_ptr() for name in ("k", "v")] == [qkv.data_ptr() + 2 * start for start in starts[1:]]


def test_launch_is_planned_with_the_forward(kernel, monkeypatch):
    """So that what the backward can't do shows there; and once for calls that are alike."""
    q, k, v, dout = inputs()
    planned = []

    def refuse(problem, device):
        planned.append(problem)
        raise NotImplementedError("q's head_dim must be one of [128] where gradients are wanted, got 64")

    right = plan.plan_backward
    monkeypatch.setattr(plan, "plan_backward", refuse)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="head_dim"):
            flash_attn_func(q, k, v)
    with torch.no_grad():
        flash_attn_func(q, k, v)
    assert len(planned) == 2
    monkeypatch.setattr(plan, "plan_backward", right)
    first, again, other = (flash_attn_func(q, k, v, causal=causal).grad_fn.call for causal in (False, False, True))
    assert first is again and first is not other


def test_launches_are_remembered_by_problem(monkeypatch):
    """Of calls whose strides differ, too: those are looked at when a backward runs."""
    monkeypatch.setattr(jit, "get", Kernel)
    monkeypatch.setattr(attention, "device_of", lambda device: plan.Device())
    problem = Problem("bf16", 2, 21, 34, 4, 2, 64, False, 0.125, True, 0)
    device = torch.device("cuda", 0)
    try:
        problems = problem, dataclasses.replace(problem), dataclasses.replace(problem, causal=True)
        launches = [attention.backward_of(p, device) for p in problems]
    finally:
        attention.backward_of.cache_clear()
    assert isinstance(launches[0], launch.BackwardLaunch) and launches[0] is launches[1] is not launches[2]


def test_empty_problems_launch_nothing(monkeypatch):
    monkeypatch.setattr(jit, "get", lambda config: pytest.fail("a kernel for nothing"))
    problem = Problem("bf16", 2, 21, 0, 4, 2, 64, False, 0.125, True, 0)
    write = attention.backward_of(problem, torch.device("cuda", 0))
    q, k = normal(2, 21, 4, 64), normal(2, 0, 2, 64)
    dq = torch.full_like(q, float("nan"))
    write(q, q, k, k, q, None, dq, k.clone(), k.clone())
    assert (dq == 0).all()
