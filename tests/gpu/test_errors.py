"""Bad calls on CUDA tensors: bar 7 of the issue."""

import pytest
import torch

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
