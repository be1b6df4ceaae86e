"""Problem -> Plan: which kernel, which config, which grid. Pure Python, no GPU."""

from dataclasses import dataclass, replace

from .kernels.configs import DTYPE_BYTES, ForwardConfig
from .problem import Problem

# (head_dim, mask) -> what differs from ForwardConfig's defaults.
FORWARD = {
    (64, "none"): dict(tile_m=192, tile_n=128),
    (64, "causal"): dict(tile_m=192, tile_n=128),
    (128, "none"): dict(tile_m=128, tile_n=128),
    (128, "causal"): dict(tile_m=128, tile_n=128),
    (256, "none"): dict(tile_m=128, tile_n=80),
    (256, "causal"): dict(tile_m=128, tile_n=80),
}


@dataclass(frozen=True)
class Device:
    """What planning asks of a GPU."""

    sms: int = 132
    l2_bytes: int = 50 * 2**20


@dataclass(frozen=True)
class Plan:
    """A kernel's config and the launch arguments that are not tensors."""

    config: ForwardConfig
    head_group: int
    ctas: int
    softmax_scale: float

    def __str__(self):
        return f"{self.config} head_group={self.head_group} ctas={self.ctas}"


def plan_forward(problem: Problem, device: Device) -> Plan:
    """The plan of a forward call that has scores to compute."""
    mask = "causal" if problem.causal else "none"
    config = forward_config(problem.dtype, problem.head_dim, mask, problem.lse)
    if problem.sm_margin:
        config = replace(config, scheduler="persistent")  # only a persistent grid leaves SMs alone
    tiles = -(-problem.seqlen_q // config.tile_m) * problem.heads * problem.batch
    if tiles >= 2**31:
        raise ValueError(f"q has {tiles} tiles of {config.tile_m} queries; at most {2**31 - 1} can be launched")
    return Plan(
        config=config,
        head_group=head_group(problem, device),
        ctas=min(device.sms - problem.sm_margin, tiles),
        softmax_scale=problem.softmax_scale,
    )


def forward_config(dtype, head_dim, mask, lse) -> ForwardConfig:
    return ForwardConfig(dtype=dtype, head_dim=head_dim, mask=mask, lse=lse, **FORWARD[head_dim, mask])


def head_group(problem, device):
    """Heads to work on together: for causal masks, as many as keep their K and V in half the L2; else one K/V head's."""
    queries_per_kv = problem.heads // problem.heads_kv
    if not problem.causal:
        return queries_per_kv
    kv_bytes = 2 * problem.seqlen_k * problem.head_dim * DTYPE_BYTES[problem.dtype]
    kv_heads = max(1, device.l2_bytes // 2 // kv_bytes)
    return min(kv_heads * queries_per_kv, problem.heads * problem.batch)


def shipped(family="forward"):
    """Every config of a family that planning can choose, for precompiling and for CI."""
    if family != "forward":
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    return [
        forward_config(dtype, head_dim, mask, lse)
        for head_dim, mask in FORWARD
        for dtype in DTYPE_BYTES
        for lse in (False, True)
    ]


FAMILIES = ("forward",)
