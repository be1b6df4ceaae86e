"""Problem: one validated description of a call. Every argument error of the library is raised here."""

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch.autograd import forward_ad

from .hopper import CAPABILITY

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
HEAD_DIMS = (64, 128, 256)
LARGEST_SCALE = 2.0**127  # times log2(e), which is what a kernel gets, it is finite in fp32
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # kernels flush what is smaller


@dataclass(frozen=True)
class Problem:
    """Attention of q (batch, seqlen_q, heads, head_dim) to k and v (batch, seqlen_k, heads_kv, head_dim)."""

    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool
    softmax_scale: float
    lse: bool
    sm_margin: int
    deterministic: bool = False  # of the gradients

    @property
    def empty(self):
        """No score to compute: O is zeros and LSE -inf, whatever there is of them."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k, self.heads)

    @classmethod
    def of(cls, q, k, v, *, softmax_scale, causal, sm_margin, lse, unsupported, deterministic=False):
        """Validates the arguments of a call. unsupported: name -> (value, the values that mean "off")."""
        scale = check_arguments(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=causal,
            sm_margin=sm_margin,
            lse=lse,
            unsupported=unsupported,
            deterministic=deterministic,
        )
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            refuse_tangent(name, tensor)
        if q.is_cuda:
            check_device(q.device)
            check_margin_leaves_sms(sm_margin, q.device)
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                check_memory(name, tensor)
        return cls(
            dtype=DTYPES[q.dtype],
            batch=q.shape[0],
            seqlen_q=q.shape[1],
            seqlen_k=k.shape[1],
            heads=q.shape[2],
            heads_kv=k.shape[2],
            head_dim=q.shape[3],
            causal=causal,
            softmax_scale=scale,
            lse=lse,
            sm_margin=int(sm_margin),
            deterministic=deterministic,
        )


def check_arguments(q, k, v, *, softmax_scale, causal, sm_margin, lse, unsupported, deterministic):
    """What can be checked without memory or a GPU, so while torch.compile traces too. Returns the scale."""
    check_tensors({"q": q, "k": k, "v": v})
    check_shapes(q, k, v)
    for name, (value, off) in unsupported.items():
        check_off(name, value, off)
    for name, flag in (("causal", causal), ("return_attn_probs", lse), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    check_sm_margin(sm_margin)
    return checked_scale(softmax_scale, q.shape[3])


def check_gradient(dout, q, out, lse):
    """The forward's results and the gradient of out, as a backward takes them with q."""
    batch, seqlen_q, heads, _ = q.shape
    for name, t, shape, dtype in (
        ("dout", dout, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, (batch, heads, seqlen_q), torch.float32),
    ):
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {t.device}")


def check_tensors(tensors):
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            raise ValueError(f"{name} must be a dense (strided) tensor, got layout {t.layout}{', nested' * t.is_nested}")
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim), got shape {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be torch.float16 or torch.bfloat16, got {t.dtype}")
        if t.device.type not in ("cuda", "cpu"):
            raise ValueError(f"{name} must be on a CUDA device or the CPU, got device {t.device}")
    q = tensors["q"]
    for name, t in tensors.items():
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {t.device}")


def refuse_tangent(name, t):
    if forward_ad.unpack_dual(t).tangent is not None:
        raise NotImplementedError(f"{name} carries a forward-mode tangent, which is not supported: pass {name}.detach()")


def check_shapes(q, k, v):
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q's head_dim must be one of {HEAD_DIMS}, got {q.shape[3]} (shape {tuple(q.shape)})")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k's head_dim must be q's, {q.shape[3]}, got {k.shape[3]}")
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v's head_dim must be q's, {q.shape[3]}, got {v.shape[3]}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k's batch must be q's, {q.shape[0]}, got {k.shape[0]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v's (batch, seqlen, heads) must be k's, {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    heads, heads_kv = q.shape[2], k.shape[2]
    if heads != 0 and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(f"q's heads must be a multiple of k's heads, got {heads} and {heads_kv}")


def check_off(name, value, off):
    if isinstance(value, torch.Tensor) or not any(type(value) is type(o) and value == o for o in off):
        allowed = " or ".join(repr(o) for o in off)
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise NotImplementedError(f"{name} is not supported yet: it must be {allowed}, got {shown}")


def check_sm_margin(sm_margin):
    if not isinstance(sm_margin, Integral) or isinstance(sm_margin, bool):
        raise TypeError(f"sm_margin must be an int, got {sm_margin!r}")
    if sm_margin < 0:
        raise ValueError(f"sm_margin must be from 0 to the number of SMs less one, got {sm_margin}")


def check_margin_leaves_sms(sm_margin, device):
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if sm_margin >= sms:
        raise ValueError(f"sm_margin must be from 0 to {sms - 1} on this device, got {sm_margin}")


def check_device(device):
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != CAPABILITY:
        raise NotImplementedError(
            f"q is on {device}, {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}; "
            f"the kernels need a Hopper GPU, compute capability 9.0 (H100, H200, GH200)"
        )


def check_memory(name, t):
    """What TMA asks of a tensor: unit stride in head_dim, every other stride and the address on 16 bytes."""
    if 0 in t.shape:
        return
    if t.is_neg():
        raise ValueError(f"{name} must not be a lazily negated view (torch.Tensor.is_neg): pass {name}.resolve_neg()")
    if t.stride(3) != 1:
        raise ValueError(f"{name}'s last dimension must be contiguous (stride 1), got strides {t.stride()}")
    if odd_strides(t):
        raise ValueError(f"{name}'s strides must be multiples of 16 bytes (8 elements), got strides {t.stride()}")
    check_address(name, t)


def odd_strides(t):
    """Whether a stride other than the last dimension's isn't on 16 bytes; a dimension of size 1 has none."""
    return any(size > 1 and stride * t.element_size() % 16 for size, stride in zip(t.shape[:3], t.stride()))


def check_address(name, t):
    if t.data_ptr() == 0:  # a fake or functional tensor, or a storage that was resized to nothing
        raise ValueError(f"{name} must have memory for its {t.numel()} elements, got a {type(t).__name__} at address 0")
    if t.data_ptr() % 16:
        raise ValueError(f"{name}'s storage must start on 16 bytes, got address {t.data_ptr():#x}: clone it")


def checked_scale(softmax_scale, head_dim):
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, Real):
        raise TypeError(f"softmax_scale must be a number or None, got {softmax_scale!r}")
    if not -LARGEST_SCALE <= softmax_scale <= LARGEST_SCALE:  # NaN is not either
        raise ValueError(f"softmax_scale must be finite, from {-LARGEST_SCALE:.3g} to {LARGEST_SCALE:.3g}, got {softmax_scale!r}")
    return 0.0 if abs(softmax_scale) < SMALLEST_SCALE else float(softmax_scale)


def unpack(qkv, num_heads_q):
    """q, k and v, which live in qkv: views."""
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv must be a torch.Tensor, got {type(qkv).__name__}")
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv must be (batch, seqlen, 3, heads, head_dim), got shape {tuple(qkv.shape)}")
        if num_heads_q is not None:
            raise ValueError(f"num_heads_q goes with a 4-dimensional qkv, got {num_heads_q!r} with {qkv.dim()} dimensions")
        return qkv.unbind(2)
    if qkv.dim() != 4:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, heads + 2 · heads_kv, "
            f"head_dim), got shape {tuple(qkv.shape)}"
        )
    if not isinstance(num_heads_q, int) or isinstance(num_heads_q, bool):
        raise TypeError(f"num_heads_q must be an int where qkv has 4 dimensions, got {num_heads_q!r}")
    heads_kv, odd = divmod(qkv.shape[2] - num_heads_q, 2)
    if odd or num_heads_q < 1 or heads_kv < 1:
        raise ValueError(f"num_heads_q must leave an even number of K and V heads of qkv's {qkv.shape[2]}, got {num_heads_q}")
    return qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)
