"""Bad calls on CPU tensors: the same are refused as on a GPU, but for those that only a kernel can't take."""

import pytest
import torch

from fa3 import flash_attn_func
from fa3.reference import attention
from tests.bad_calls import CASES, check_refused, good, with_grad

name = lambda case: case.name


@pytest.mark.parametrize("case", [c for c in CASES if c.where == "everywhere"], ids=name)
def test_refused_and_usable_after(case):
    arguments = good("cpu")
    flash_attn_func(**arguments)  # a call that is remembered, and must not let its neighbours in
    check_refused(case, "cpu")
    assert torch.equal(flash_attn_func(**arguments), attention(**arguments)[0])


@pytest.mark.parametrize("case", [c for c in CASES if c.where == "kernel"], ids=name)
def test_layouts_that_only_a_kernel_refuses_work(case):
    arguments = case.make("cpu")
    assert torch.equal(case.call(arguments), attention(**arguments)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_requires_grad_is_fine_where_no_grad_is_taken(mode):
    arguments = good("cpu") | dict(q=with_grad("cpu"))
    with mode():
        out = flash_attn_func(**arguments)
    assert not out.requires_grad
    torch.testing.assert_close(out, attention(**arguments)[0].detach())


def test_there_are_enough_cases_and_each_has_its_own_name():
    assert len({c.name for c in CASES}) == len(CASES) >= 24


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)])
def test_tensors_that_are_not_dense_are_refused(make):
    q = torch.randn(2, 8, 2, 64).bfloat16()
    for argument in "qkv":
        with pytest.raises(ValueError, match=rf"^{argument} must be a dense"):
            flash_attn_func(**(dict(q=q, k=q, v=q) | {argument: make(q)}))
