"""python -m fa3 bench: a quick look at the forward's speed beside torch's own attention."""

import sys

import torch

from . import flash_attn_func, hopper, timing
from .terminal import show_table

TOKENS, HIDDEN = 16384, 2048  # of every point, as in the paper's grid (arXiv 2407.08608, section 4.1)


def run(head_dims, seqlens, masks, dtype):
    """The exit code: 2 without a Hopper GPU."""
    why_not = hopper.missing()
    if why_not:
        print(f"bench needs a Hopper GPU: {why_not}", file=sys.stderr)
        return 2
    print(f"forward on {torch.cuda.get_device_name()}, {dtype}, {TOKENS} tokens, hidden size {HIDDEN}; medians")
    rows = []
    for d in head_dims:
        for causal in masks:
            rows += [point(d, seqlen, causal, dtype) for seqlen in seqlens]
    headers = ["head_dim", "mask", "seqlen", "batch", "heads", "ms", "TFLOP/s", "torch SDPA ms", "TFLOP/s", "speed-up"]
    show_table(headers, rows)
    return 0


def point(d, seqlen, causal, dtype):
    batch, heads = max(1, TOKENS // seqlen), HIDDEN // d
    shape = (batch, seqlen, heads, d)
    q, k, v = (torch.randn(shape, device="cuda", dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]) for _ in range(3))
    ms = timing.milliseconds(
        {"fa3": lambda: flash_attn_func(q, k, v, causal=causal), "torch": timing.torch_sdpa(q, k, v, causal)}
    )
    row = [d, "causal" if causal else "full", seqlen, batch, heads]
    for name in ("fa3", "torch"):
        row += [f"{ms[name]:.3f}", f"{timing.tflops(q, k, causal, ms[name]):.0f}"]
    return [*row, f"{ms['torch'] / ms['fa3']:.2f}"]
