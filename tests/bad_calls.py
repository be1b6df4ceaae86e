"""Calls that must be refused, for CPU tensors and CUDA ones: each names the argument and says what is allowed."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fa3

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
WRONG = (ValueError, TypeError)  # it will never work
NOT_YET = NotImplementedError  # it would in another version
EITHER = (*WRONG, NOT_YET)


@dataclass(frozen=True)
class BadCall:
    """One call that must raise.

    make: device -> keyword arguments.
    error: the exceptions it may raise.
    says: regular expressions, each of which the message must match: the argument's name and what is allowed.
    where: "everywhere"; "kernel", an error for CUDA tensors while CPU tensors work; or "cuda", impossible on the CPU.
    """

    name: str
    make: Callable
    error: type | tuple
    says: tuple
    where: str = "everywhere"
    function: str = "flash_attn_func"

    def call(self, arguments):
        return getattr(fa3, self.function)(**arguments)


def tensor(device, batch=2, seqlen=32, heads=4, d=64, dtype=BF16):
    return torch.randn(batch, seqlen, heads, d).to(device, dtype)


def good(device):
    """A call that works: GQA 2:1, d 64, bf16."""
    return dict(q=tensor(device), k=tensor(device, heads=2), v=tensor(device, heads=2))


def changed(**changes):
    """The good call with these arguments; a value that is a function is called with the device."""
    return lambda device: good(device) | {n: x(device) if callable(x) else x for n, x in changes.items()}


def all_of(**shape):
    """The good call with q, k and v all of this shape or dtype."""
    return lambda device: {name: tensor(device, **shape) for name in "qkv"}


def misaligned(device):
    """Starts 2 bytes past a multiple of 16."""
    return torch.randn(2 * 32 * 4 * 64 + 1).to(device, BF16)[1:].view(2, 32, 4, 64)


def odd_head_stride(device):
    """68 elements from head to head, which isn't a multiple of 16 bytes."""
    return tensor(device, d=68)[..., :64]


def odd_seqlen_stride(device):
    return torch.randn(2, 32, 4 * 64 + 4).to(device, BF16)[..., :256].unflatten(2, (4, 64))


def strided_head_dim(device):
    """Every other element of a head: the last dimension isn't contiguous."""
    return tensor(device, d=128)[..., ::2]


def with_grad(device):
    return tensor(device).requires_grad_()


def sms(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def one(device):
    return torch.ones(2, 2, device=device)


HALF = r"b?float16|[fb][pf]?16|half"
D = r"64\D+128\D+256"
EQUAL = r"same|equal|match|must (be|have)|expected|agree"

CASES = [
    # tensors: what they are
    BadCall("q is a list", changed(q=[[1.0]]), WRONG, (r"\bq\b", r"[Tt]ensor")),
    BadCall("k is None", changed(k=None), WRONG, (r"\bk\b", r"[Tt]ensor")),
    BadCall("v is a number", changed(v=3.0), WRONG, (r"\bv\b", r"[Tt]ensor")),
    BadCall("fp32", all_of(dtype=FP32), EITHER, (r"\bq\b", HALF)),
    BadCall("fp64", all_of(dtype=torch.float64), EITHER, (r"\bq\b", HALF)),
    BadCall("int32", all_of(dtype=torch.int32), EITHER, (r"\bq\b", HALF)),
    BadCall("fp8", all_of(dtype=torch.float8_e4m3fn), EITHER, (r"\bq\b", HALF)),
    BadCall("k of another dtype", changed(k=lambda dev: tensor(dev, heads=2, dtype=FP16)), WRONG, (r"\bk\b", HALF)),
    BadCall("v of another dtype", changed(v=lambda dev: tensor(dev, heads=2, dtype=FP32)), WRONG, (r"\bv\b", HALF)),
    BadCall("k on the CPU", changed(k=lambda dev: tensor("cpu", heads=2)), WRONG, (r"\bk\b", "cuda"), "cuda"),
    BadCall("v on the CPU", changed(v=lambda dev: tensor("cpu", heads=2)), WRONG, (r"\bv\b", "cuda"), "cuda"),
    BadCall("q on the CPU", changed(q=lambda dev: tensor("cpu")), WRONG, (r"\b[qk]\b", "cuda"), "cuda"),
    # tensors: their shapes
    BadCall("3-D q", changed(q=lambda dev: tensor(dev)[0]), WRONG, (r"\bq\b", r"batch\W+seqlen|4|four")),
    BadCall("3-D k and v", lambda dev: good(dev) | {n: tensor(dev, heads=2)[0] for n in "kv"}, WRONG,
            (r"\bk\b", r"batch\W+seqlen|4|four")),
    BadCall("5-D v", changed(v=lambda dev: tensor(dev, heads=2)[None]), WRONG, (r"\bv\b", r"batch\W+seqlen|4|four")),
    BadCall("head dim 100", all_of(d=100), EITHER, (r"head|\bq\b", "100", D)),
    BadCall("head dim 512", all_of(d=512), EITHER, (r"head|\bq\b", "512", D)),
    BadCall("k of another head dim", changed(k=lambda dev: tensor(dev, heads=2, d=128)), EITHER, (r"\bk\b", "128", "64")),
    BadCall("v of another head dim", changed(v=lambda dev: tensor(dev, heads=2, d=128)), EITHER, (r"\bv\b", "128", "64")),
    BadCall("heads not divisible", changed(q=lambda dev: tensor(dev, heads=5)), WRONG,
            (r"heads", r"\b5\b", r"\b2\b", "multiple|divi")),
    BadCall("more K/V heads than query heads", changed(q=lambda dev: tensor(dev, heads=1)), WRONG,
            (r"heads", r"\b1\b", r"\b2\b", "multiple|divi")),
    BadCall("K/V heads differ", changed(v=lambda dev: tensor(dev, heads=4)), WRONG, (r"\bv\b", "4", "2")),
    BadCall("batch of k", changed(k=lambda dev: tensor(dev, batch=3, heads=2)), WRONG, (r"\bk\b", "3", "2", EQUAL)),
    BadCall("batch of v", changed(v=lambda dev: tensor(dev, batch=1, heads=2)), WRONG, (r"\bv\b", "1", "2", EQUAL)),
    BadCall("seqlen of v", changed(v=lambda dev: tensor(dev, seqlen=33, heads=2)), WRONG, (r"\bv\b", "33", "32")),
    # tensors: where their elements lie
    BadCall("misaligned q", changed(q=misaligned), WRONG, (r"\bq\b", "16"), "kernel"),
    BadCall("misaligned k", lambda dev: {n: misaligned(dev) if n == "k" else tensor(dev) for n in "qkv"}, WRONG,
            (r"\bk\b", "16"), "kernel"),
    BadCall("misaligned v", lambda dev: {n: misaligned(dev) if n == "v" else tensor(dev) for n in "qkv"}, WRONG,
            (r"\bv\b", "16"), "kernel"),
    BadCall("odd head stride of q", changed(q=odd_head_stride), WRONG, (r"\bq\b", "stride", "8|16"), "kernel"),
    BadCall("odd seqlen stride of q", changed(q=odd_seqlen_stride), WRONG, (r"\bq\b", "stride", "8|16"), "kernel"),
    BadCall("odd strides of v", lambda dev: {n: odd_head_stride(dev) if n == "v" else tensor(dev) for n in "qkv"}, WRONG,
            (r"\bv\b", "stride", "8|16"), "kernel"),
    BadCall("strided last dimension of q", changed(q=strided_head_dim), WRONG, (r"\bq\b", "contiguous|stride"), "kernel"),
    BadCall("strided last dimension of k", lambda dev: {n: strided_head_dim(dev) if n == "k" else tensor(dev) for n in "qkv"},
            WRONG, (r"\bk\b", "contiguous|stride"), "kernel"),
    # numbers and flags
    BadCall("scale is NaN", changed(softmax_scale=float("nan")), WRONG, ("softmax_scale", "finite|None")),
    BadCall("scale is infinite", changed(softmax_scale=float("-inf")), WRONG, ("softmax_scale", "finite|None")),
    BadCall("scale is over a kernel's range", changed(softmax_scale=2.5e38), WRONG, ("softmax_scale", "1.7e\\+38")),
    BadCall("scale is over every float's range", changed(softmax_scale=10**400), WRONG, ("softmax_scale", "1.7e\\+38")),
    BadCall("scale is a string", changed(softmax_scale="0.1"), WRONG, ("softmax_scale", "number|float|None")),
    BadCall("scale is True", changed(softmax_scale=True), WRONG, ("softmax_scale", "number|float|None")),
    BadCall("scale is a tensor", changed(softmax_scale=lambda dev: torch.tensor(0.1, device=dev)), WRONG,
            ("softmax_scale", "number|float|None")),
    BadCall("causal is a string", changed(causal="no"), WRONG, ("causal", "bool|True")),
    BadCall("causal is 1", changed(causal=1), WRONG, ("causal", "bool|True")),
    BadCall("causal is None", changed(causal=None), WRONG, ("causal", "bool|True")),
    BadCall("causal is a tensor", changed(causal=one), WRONG, ("causal", "bool|True")),
    BadCall("sm_margin is negative", changed(sm_margin=-1), WRONG, ("sm_margin", "-1", "0")),
    BadCall("sm_margin is a fraction", changed(sm_margin=1.5), WRONG, ("sm_margin", "1.5", "int|whole")),
    BadCall("sm_margin is False", changed(sm_margin=False), WRONG, ("sm_margin", "False", "int|whole")),
    BadCall("return_attn_probs is 0", changed(return_attn_probs=0), WRONG, ("return_attn_probs", "bool|True")),
    BadCall("return_attn_probs is a string", changed(return_attn_probs="yes"), WRONG, ("return_attn_probs", "bool|True")),
    BadCall("deterministic is 1", changed(deterministic=1), WRONG, ("deterministic", "bool|True")),
    BadCall("deterministic is None", changed(deterministic=None), WRONG, ("deterministic", "bool|True")),
    BadCall("sm_margin is every SM", changed(sm_margin=sms), WRONG, ("sm_margin", r"13[0-9]|11[0-9]|7[0-9]"), "cuda"),
    # features that don't exist yet
    BadCall("sliding window", changed(window_size=(128, 0)), NOT_YET, ("window_size", r"128", r"-1")),
    BadCall("window on the right", changed(window_size=(-1, 5), causal=True), NOT_YET, ("window_size", r"5", r"-1")),
    BadCall("unknown window", changed(window_size="all"), EITHER, ("window_size", r"-1")),
    BadCall("window of one number", changed(window_size=(-1,)), EITHER, ("window_size", r"-1")),
    BadCall("softcap", changed(softcap=30.0), NOT_YET, ("softcap", r"30", r"\b0(\.0)?\b")),
    BadCall("attention_chunk", changed(attention_chunk=128), NOT_YET, ("attention_chunk", "128", r"\b0\b")),
    BadCall("num_splits", changed(num_splits=4), NOT_YET, ("num_splits", "4", r"\b1\b")),
    BadCall("pack_gqa", changed(pack_gqa=True), NOT_YET, ("pack_gqa", "None|False")),
    BadCall("qv", changed(qv=tensor), NOT_YET, (r"\bqv\b", "None")),
    BadCall("q_descale", changed(q_descale=one), NOT_YET, (r"\bq_descale\b", "None")),
    BadCall("k_descale", changed(k_descale=one), NOT_YET, (r"\bk_descale\b", "None")),
    BadCall("v_descale", changed(v_descale=one), NOT_YET, (r"\bv_descale\b", "None")),
]  # fmt: skip


def packed(**changes):
    """A call of flash_attn_qkvpacked_func that works, with these arguments."""
    qkv = lambda device: torch.randn(2, 32, 3, 4, 64).to(device, BF16)
    return lambda device: {n: x(device) if callable(x) else x for n, x in (dict(qkv=qkv) | changes).items()}


def eight_heads(device):
    return tensor(device, heads=8)


CASES += [
    BadCall(f"packed: {name}", make, error, says, function="flash_attn_qkvpacked_func")
    for name, make, error, says in [
        ("not a tensor", packed(qkv=None), WRONG, ("qkv", "[Tt]ensor")),
        ("3-D", packed(qkv=lambda dev: tensor(dev)[0]), WRONG, ("qkv", r"batch\W+seqlen|\b[45]\b")),
        ("four where three should be", packed(qkv=lambda dev: torch.randn(2, 32, 4, 4, 64).to(dev, BF16)), WRONG,
         ("qkv", r"\b3\b")),
        ("4-D without num_heads_q", packed(qkv=eight_heads), WRONG, ("num_heads_q",)),
        ("num_heads_q leaves an odd rest", packed(qkv=eight_heads, num_heads_q=5), WRONG, ("num_heads_q", "5", "8")),
        ("num_heads_q leaves nothing", packed(qkv=eight_heads, num_heads_q=8), WRONG, ("num_heads_q", "8")),
        ("num_heads_q is 0", packed(qkv=eight_heads, num_heads_q=0), WRONG, ("num_heads_q", r"\b0\b")),
        ("num_heads_q with 5 dimensions", packed(num_heads_q=3), WRONG, ("num_heads_q",)),
        ("num_heads_q is a string", packed(qkv=eight_heads, num_heads_q="4"), WRONG, ("num_heads_q", "int|whole")),
        ("fp32", packed(qkv=lambda dev: torch.randn(2, 32, 3, 4, 64).to(dev)), EITHER, (HALF,)),
        ("softcap", packed(softcap=30.0), NOT_YET, ("softcap", "30", r"\b0(\.0)?\b")),
        ("sliding window", packed(window_size=(128, 0)), NOT_YET, ("window_size", "128", r"-1")),
        ("attention_chunk", packed(attention_chunk=128), NOT_YET, ("attention_chunk", "128", r"\b0\b")),
        ("deterministic is 0", packed(deterministic=0), WRONG, ("deterministic", "bool|True")),
        ("q_descale", packed(q_descale=one), NOT_YET, (r"\bq_descale\b", "None")),
        ("sm_margin is negative", packed(sm_margin=-1), WRONG, ("sm_margin", "-1", r"\b0\b")),
        ("causal is a string", packed(causal="no"), WRONG, ("causal", "bool|True")),
    ]
]  # fmt: skip


def bits(x):
    """A copy of the tensor's elements, as bytes on the CPU."""
    return x.detach().cpu().flatten().clone().view(torch.uint8)


def check_refused(case, device):
    """Makes the bad call: it raises as it should, its message says what it should, and its tensors are as before."""
    arguments = case.make(device)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {name: bits(x) for name, x in tensors.items()}
    try:
        case.call(arguments)
    except Exception as error:
        assert isinstance(error, case.error), f"raised {error!r}"
        for pattern in case.says:
            assert re.search(pattern, str(error)), f"the message has no {pattern!r}: {error}"
    else:
        raise AssertionError("the call was accepted")
    for name, x in tensors.items():
        assert torch.equal(bits(x), before[name]), f"{name} was modified"
