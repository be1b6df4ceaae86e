"""FlashAttention-3 for Hopper GPUs in CuTe DSL: exact attention, compiled at the first call and cached.

>>> import torch, fa3
>>> q = torch.randn(4, 4096, 16, 128, device="cuda", dtype=torch.bfloat16)
>>> out = fa3.flash_attn_func(q, q, q, causal=True)

Tensors are (batch, seqlen, heads, head_dim), as in FlashAttention-3's own interface. CPU tensors run the reference.
"""

__version__ = "0.1.0"
__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "explain"]

try:
    from . import ops  # registers the operators that torch.compile takes
    from .attention import explain, flash_attn_func, flash_attn_qkvpacked_func
except Exception as error:  # a package is missing or broken: the functions say so, and `doctor` runs
    broken = error

    def __getattr__(name):
        if name in __all__:
            raise ImportError(f"fa3.{name} can't be used ({broken}): see `python -m fa3 doctor`") from broken
        raise AttributeError(name)
