"""torch.compile and torch.export of the functions, and the operators that they see, on CPU tensors."""

import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fa3 import flash_attn_func, flash_attn_qkvpacked_func, jit, launch, ops, plan
from fa3.problem import Problem

FP16, BF16 = torch.float16, torch.bfloat16
FORWARD, BACKWARD = torch.ops.fa3.forward.default, torch.ops.fa3.backward.default
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def inputs(seqlen_q=21, seqlen_k=34, heads=4, heads_kv=2, d=64, dtype=BF16):
    """q, k and v that require grad, and a gradient of the output."""
    shapes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)
    q, k, v, dout = (torch.randn(2, seqlen, h, d).to(dtype) for seqlen, h in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def check_same(compiled, eager, leaves, dout):
    """Outputs and gradients, to the last bit."""
    results = [call(*leaves) for call in (compiled, eager)]
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results)):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    outs = [r[0] if isinstance(r, tuple) else r for r in results]
    found, want = (torch.autograd.grad(out, leaves, dout) for out in outs)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("softmax_scale, deterministic, return_attn_probs", [(None, False, False), (0.3, True, True)])
@masks
def test_one_graph(causal, softmax_scale, deterministic, return_attn_probs):
    options = dict(softmax_scale=softmax_scale, deterministic=deterministic, return_attn_probs=return_attn_probs)
    backend = CompileCounterWithBackend("aot_eager")
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=causal, **options)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    q, k, v, dout = inputs()
    check_same(compiled, call, (q, k, v), dout)
    operators = [node.target for node in backend.graphs[0].graph.nodes if node.op == "call_function"]
    assert operators[0] == torch.ops.fa3.forward and set(operators[1:]) == {operator.getitem}
    assert backend.frame_count == 1 and counters["graph_break"] == {}
    with torch.no_grad():
        assert not compiled(q, k, v)[0].requires_grad


@masks
@pytest.mark.parametrize("layout", ["five", "four"])
def test_packed(layout, causal):
    shape, options = ((2, 20, 3, 4, 64), {}) if layout == "five" else ((2, 20, 12, 64), dict(num_heads_q=8))
    call = lambda qkv: flash_attn_qkvpacked_func(qkv, causal=causal, **options)
    qkv = torch.randn(shape).to(BF16).requires_grad_()
    dout = torch.randn(call(qkv).shape).to(BF16)
    check_same(torch.compile(call, fullgraph=True, backend="aot_eager"), call, [qkv], dout)
    assert counters["graph_break"] == {}


def test_lengths_become_dynamic():
    """The second length makes them so; no third graph comes, forward or backward."""
    backend = CompileCounterWithBackend("aot_eager")
    call = lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for seqlen_q, seqlen_k in ((21, 34), (30, 40), (40, 30), (7, 7), (130, 2), (64, 64)):
        *leaves, dout = inputs(seqlen_q, seqlen_k)
        check_same(compiled, call, leaves, dout)
    assert backend.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for seqlen in (11, 33, 55):
            *leaves, dout = inputs(seqlen, seqlen + 3)
            check_same(compiled, call, leaves, dout)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_lengths_marked_dynamic(packed):
    backend = CompileCounterWithBackend("aot_eager")
    call = flash_attn_qkvpacked_func if packed else flash_attn_func
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=False)
    for seqlen in (20, 30, 45):
        leaves = [torch.randn(2, seqlen, 3, 4, 64).to(BF16).requires_grad_()] if packed else inputs(seqlen, seqlen)[:3]
        for x in leaves:
            torch._dynamo.mark_dynamic(x, 1)
        check_same(compiled, call, leaves, torch.randn(2, seqlen, 4, 64).to(BF16))
    assert backend.frame_count == 1


def test_gradients_of_any_layout():
    """What comes back into the operator isn't contiguous here, or has stride 0."""
    heads_first = lambda x: x.transpose(1, 2).flatten(2) * 2
    for after in (heads_first, lambda x: x.float().sum(), lambda x: x[..., ::2], lambda x: x.mean(1)):
        call = lambda q, k, v: after(flash_attn_func(q, k, v))
        *leaves, _ = inputs()
        dout = torch.ones_like(call(*leaves))
        check_same(torch.compile(call, fullgraph=True, backend="aot_eager"), call, leaves, dout)


@pytest.mark.parametrize("needed", ["q", "kv"])
def test_some_gradients(needed):
    q, k, v, dout = inputs()
    tensors = {name: x.detach().requires_grad_(name in needed) for name, x in zip("qkv", (q, k, v))}
    out = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")(**tensors)
    out.backward(dout)
    want = dict(zip("qkv", torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)))
    for name, x in tensors.items():
        assert torch.equal(x.grad, want[name]) if name in needed else x.grad is None


class Block(torch.nn.Module):
    """Attention in a module, as it is used: fp32 weights, and bf16 by autocast."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.qkv, self.project, self.checkpointed = torch.nn.Linear(128, 384), torch.nn.Linear(128, 128), checkpointed

    def attend(self, x):
        qkv = self.qkv(x).view(*x.shape[:2], 3, 2, 64)
        return self.project(flash_attn_qkvpacked_func(qkv, causal=True).flatten(2))

    def forward(self, x):
        return x + (checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_module_under_autocast(checkpointed):
    block = Block(checkpointed)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for seqlen in (16, 24, 40):
        x, gradients = torch.randn(2, seqlen, 128), []
        for module in (compiled, block):
            with torch.autocast("cpu", BF16):
                loss = module(x).square().mean()
            gradients.append(torch.autograd.grad(loss, list(block.parameters())))
        assert all(map(torch.equal, *gradients))
    assert backend.frame_count == 2
    with pytest.raises(Exception, match="got torch.float32"):  # outside of autocast it is another call
        torch.compile(block, backend="aot_eager")(x)


def test_fp32_under_autocast():
    q, k, v, dout = inputs(dtype=torch.float32)
    with torch.autocast("cpu", FP16):
        compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
        check_same(compiled, flash_attn_func, (q, k, v), dout.half())


def test_inductor():
    block = Block().to(BF16)
    x = torch.randn(2, 40, 128).to(BF16)
    gradients = lambda module: torch.autograd.grad(module(x).sum(), list(block.parameters()))
    for a, b in zip(gradients(torch.compile(block, fullgraph=True)), gradients(block)):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    q, k, v = (x.detach() for x in inputs(30, 30)[:3])
    seqlen = {1: torch.export.Dim("seqlen", min=2, max=4096)}
    for strict in (False, True):
        exported = torch.export.export(Attention(), (q, k, v), dynamic_shapes=(seqlen,) * 3, strict=strict)
        assert [node.target for node in exported.graph.nodes if "fa3" in str(node.target)] == [FORWARD]
        longer = [x.detach() for x in inputs(50, 50)[:3]]
        assert all(map(torch.equal, exported.module()(*longer), Attention()(*longer)))


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(softcap=30.0), NotImplementedError, "softcap is not supported"),
        (dict(window_size=[5, 0]), NotImplementedError, "window_size is not supported"),
        (dict(causal=1), TypeError, "causal must be True or False"),
        (dict(deterministic=None), TypeError, "deterministic must be True or False"),
        (dict(return_attn_probs=1), TypeError, "return_attn_probs must be"),
        (dict(sm_margin=-1), ValueError, "sm_margin must be"),
        (dict(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite"),
        (dict(q=torch.zeros(2, 21, 4, 64)), TypeError, "q must be torch.float16 or torch.bfloat16"),
        (dict(v=torch.zeros(2, 34, 2, 128, dtype=BF16)), ValueError, "v's head_dim must be q's"),
        (dict(k=torch.zeros(2, 35, 2, 64, dtype=BF16)), ValueError, r"v's \(batch, seqlen, heads\) must be k's"),
    ],
)
def test_bad_calls_raise_as_in_eager(change, error, says):
    q, k, v, _ = inputs()
    arguments = dict(q=q, k=k, v=v) | change
    for call in (flash_attn_func, torch.compile(flash_attn_func, backend="aot_eager")):
        with pytest.raises(error, match=says):
            call(**arguments)


# Operators.


@masks
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 7), (7, 5), (4, 0)])
@pytest.mark.parametrize("needed", ["", "q", "qkv"])
def test_forward_operator(needed, seqlen_q, seqlen_k, causal):
    q, k, v = (x.detach().requires_grad_(name in needed) for name, x in zip("qkv", inputs(seqlen_q, seqlen_k)[:3]))
    opcheck(FORWARD, (q, k, v, 0.125, causal, False, 0))
    opcheck(FORWARD, (q.transpose(1, 2).contiguous().transpose(1, 2).detach(), k.detach(), v.detach(), -0.2, causal, True, 3))


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


@masks
@pytest.mark.parametrize("layout", [torch.clone, strided, lambda x: x[:1, :1].expand(x.shape)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 7), (7, 5), (4, 0)])
def test_backward_operator(layout, seqlen_q, seqlen_k, causal):
    q, k, v, dout = (x.detach() for x in inputs(seqlen_q, seqlen_k))
    out, lse = FORWARD(q, k, v, 0.125, causal, False, 0)
    opcheck(BACKWARD, (layout(dout), q, k, v, out, lse, 0.125, causal, False))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(flash_attn_func(*leaves, causal=causal), leaves, layout(dout))
    found = BACKWARD(layout(dout), q.detach(), k.detach(), v.detach(), out, lse, 0.125, causal, False)
    assert all(map(torch.equal, found, want)) and all(x.is_contiguous() for x in found)


def test_operators_record_one_derivative():
    q, k, v, dout = inputs()
    out, lse = FORWARD(q, k, v, 0.125, False, False, 0)
    assert out.requires_grad and not lse.requires_grad
    (dq,) = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(dout=torch.zeros(2, 20, 4, 64, dtype=BF16)), ValueError, r"dout must have shape \(2, 21, 4, 64\)"),
        (dict(dout=torch.zeros(2, 21, 4, 64)), TypeError, "dout must have dtype torch.bfloat16"),
        (dict(out=torch.zeros(2, 21, 4, 64, dtype=FP16)), TypeError, "out must have dtype"),
        (dict(lse=torch.zeros(2, 21, 4)), ValueError, r"lse must have shape \(2, 4, 21\)"),
        (dict(lse=torch.zeros(2, 4, 21, dtype=BF16)), TypeError, "lse must have dtype torch.float32"),
        (dict(k=torch.zeros(2, 33, 2, 64, dtype=BF16)), ValueError, "v's"),
    ],
)
def test_backward_operator_refuses(change, error, says):
    q, k, v, dout = (x.detach() for x in inputs())
    arguments = dict(dout=dout, q=q, k=k, v=v, out=dout, lse=torch.zeros(2, 4, 21)) | change
    with pytest.raises(error, match=says):
        BACKWARD(**arguments, softmax_scale=0.125, causal=False, deterministic=False)


def test_operators_take_no_part_in_autocast():
    q, k, v, _ = (x.detach().float() for x in inputs())
    with torch.autocast("cpu", BF16), pytest.raises(TypeError, match="got torch.float32"):
        FORWARD(q, k, v, 0.125, False, False, 0)


def test_eager_calls_dispatch_no_operator():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    q, k, v, dout = inputs()
    with Watch():
        flash_attn_func(q, k, v).backward(dout)
        torch.no_grad()(flash_attn_func)(q, k, v)
    assert seen and not any(function.namespace == "fa3" for function in seen)


@pytest.mark.parametrize("seqlen, zeroed", [(10_000, True), (16, False)])
def test_operator_keeps_no_memory(seqlen, zeroed, monkeypatch):
    """A launch's counter may lie in a CUDA graph's pool, where torch.compile captures one: each call has its own."""
    given = []
    monkeypatch.setattr(jit, "get", lambda config: lambda *arguments: given.append(arguments[-1]))
    problem = Problem("bf16", 1, seqlen, 16, 8, 8, 64, False, 0.125, True, 0)
    forward = launch.Launch(problem, plan.plan_forward(problem, plan.Device()), [None] * 3)
    monkeypatch.setattr(ops, "find_call", lambda *arguments, operator: forward)
    q, k = torch.randn(1, seqlen, 8, 64).to(BF16), torch.randn(1, 16, 8, 64).to(BF16)
    for _ in range(2):
        FORWARD(q, k, k, 0.125, False, False, 0)
    assert given[0] is not given[1] and all(x.shape == (2,) and x.dtype == torch.int32 for x in given)
    assert not zeroed or all((x == 0).all() for x in given)
    assert launch.COUNTERS == {} and launch.untouched_counter.cache_info().currsize == 0


def test_a_copy_under_another_name_has_its_own_operators(tmp_path):
    root = Path(__file__).resolve().parents[2]
    code = f"""
import pathlib, shutil, sys, torch
shutil.copytree({str(root / "fa3")!r}, pathlib.Path({str(tmp_path)!r}) / "fa3_copied")
shutil.copytree({str(root / "kernels")!r}, pathlib.Path({str(tmp_path)!r}) / "fa3_copied" / "kernels")
sys.path.insert(0, {str(tmp_path)!r})
import fa3, fa3_copied
x = torch.randn(1, 5, 2, 64).bfloat16()
compiled = torch.compile(fa3_copied.flash_attn_func, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x, x, x), fa3.flash_attn_func(x, x, x))
assert torch.ops.fa3_copied.forward.default is not torch.ops.fa3.forward.default
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
