"""Bad calls on CUDA tensors: bar 7 of the issue."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fa3 import flash_attn_func
from fa3.reference import attention
from tests.bad_calls import CASES, check_refused, good, with_grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_and_usable_after(case):
    arguments = good("cuda")
    want = flash_attn_func(**arguments)
    check_refused(case, "cuda")
    torch.cuda.synchronize()
    assert torch.equal(flash_attn_func(**arguments), want)
    torch.testing.assert_close(want.float(), attention(**arguments, out_dtype=torch.float32)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_requires_grad_is_fine_where_no_grad_is_taken(mode):
    arguments = good("cuda") | dict(q=with_grad("cuda"))
    with mode():
        out = flash_attn_func(**arguments)
    assert not out.requires_grad
    assert torch.equal(out, flash_attn_func(**(arguments | dict(q=arguments["q"].detach()))))


def emptied(t):
    """Its storage resized to nothing, as sharded training does."""
    t.untyped_storage().resize_(0)
    return t


def fake(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def negated(t):
    return torch._neg_view(t)


def dual(t):
    return forward_ad.make_dual(t, torch.ones_like(t))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize(
    "change, error, says",
    [
        (emptied, ValueError, "must have memory"),
        (fake, ValueError, "must have memory"),
        (negated, ValueError, "resolve_neg"),
        (dual, NotImplementedError, "forward-mode"),
    ],
)
def test_tensors_that_no_kernel_can_read(argument, change, error, says):
    arguments = good("cuda")
    want = flash_attn_func(**arguments)  # remembered, and must not let its neighbours in
    with forward_ad.dual_level():
        with pytest.raises(error, match=rf"^{argument} .*{says}"):
            flash_attn_func(**(arguments | {argument: change(arguments[argument].clone())}))
    torch.cuda.synchronize()
    assert torch.equal(flash_attn_func(**arguments), want)
