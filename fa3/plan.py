"""Problem -> Plan: which kernel, which config, which grid. Pure Python, no GPU."""

from dataclasses import dataclass

from .kernels.configs import DTYPE_BYTES, ForwardConfig
from .problem import Problem

# (head_dim, mask) -> what differs from ForwardConfig's defaults. Chosen by the sweeps of perf/NOTES.md: d 64 and 128 by
# perf/results/2026-11-22-presume-fwd-h200.json, d 256 by 2026-11-22-branches-fwd-h200.json and 2026-11-22-sweep-fwd-h200-3.json.
FORWARD = {
    (64, "none"): dict(tile_m=192, tile_n=128, stages=3, extra_q_slots=3, presume=True),
    (64, "causal"): dict(tile_m=192, tile_n=128, stages=3, extra_q_slots=3, presume=True),
    (128, "none"): dict(tile_m=128, tile_n=128, extra_k_stages=1, q_in_registers=True, presume=True),
    (128, "causal"): dict(tile_m=128, tile_n=128, extra_k_stages=1, q_in_registers=True, presume=True),
    (256, "none"): dict(tile_m=128, tile_n=64, extra_q_slots=1, late_release=True),
    (256, "causal"): dict(tile_m=128, tile_n=64, extra_q_slots=1, late_release=True),
}
# The same where tiles of 64 queries are so few that each gets an SM to itself: one warpgroup's step is shorter than two's.
# perf/results/2026-11-22-few-tiles-fwd-h200.json has them beside others.
FORWARD_FEW = {
    64: dict(tile_m=64, tile_n=192, stages=3, pingpong=False, presume=True),
    128: dict(tile_m=64, tile_n=160, pingpong=False, presume=True),
    256: dict(tile_m=64, tile_n=80, pingpong=False, presume=True),
}
L2_SHARE = 0.6  # of the L2 cache, for the K and V of the heads worked on together


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
    tiles: int

    @property
    def counted(self):
        """Whether CTAs claim tiles through a counter: not where every tile is some CTA's first."""
        return self.config.scheduler == "dynamic" and self.tiles > self.ctas

    def __str__(self):
        return f"{self.config} head_group={self.head_group} ctas={self.ctas}"


def plan_forward(problem: Problem, device: Device) -> Plan:
    """The plan of a forward call that has scores to compute."""
    mask = "causal" if problem.causal else "none"
    config = forward_config(problem.dtype, problem.head_dim, mask, problem.lse, few_tiles(problem, device))
    return planned(config, problem, device)


def few_tiles(problem, device):
    """Whether every tile of 64 queries can have an SM to itself. sm_margin has no say in it: it changes no bit of the output."""
    return -(-problem.seqlen_q // 64) * problem.heads * problem.batch <= device.sms


def planned(config, problem, device):
    """The plan of a forward call whose config is chosen already."""
    tiles = -(-problem.seqlen_q // config.tile_m) * problem.heads * problem.batch
    if tiles >= 2**31:
        raise ValueError(f"q has {tiles} tiles of {config.tile_m} queries; at most {2**31 - 1} can be launched")
    return Plan(
        config=config,
        head_group=head_group(problem, device),
        ctas=min(device.sms - problem.sm_margin, tiles),
        tiles=tiles,
    )


def forward_config(dtype, head_dim, mask, lse, few=False) -> ForwardConfig:
    row = FORWARD_FEW[head_dim] if few else FORWARD[head_dim, mask]
    return ForwardConfig(dtype=dtype, head_dim=head_dim, mask=mask, lse=lse, **row)


def head_group(problem, device):
    """Query heads to work on together, counted over all batches.

    For causal masks, as many as keep their K and V in L2_SHARE of the L2, in groups of one size where that exists: a small
    last group would put long tiles at the very end. Otherwise the query heads of one K/V head.
    """
    queries_per_kv = problem.heads // problem.heads_kv
    if not problem.causal:
        return queries_per_kv
    kv_heads = problem.heads_kv * problem.batch
    kv_bytes = 2 * problem.seqlen_k * problem.head_dim * DTYPE_BYTES[problem.dtype]
    limit = min(kv_heads, max(1, int(L2_SHARE * device.l2_bytes) // kv_bytes))
    together = next(n for n in range(limit, 0, -1) if kv_heads % n == 0)
    if 2 * together <= limit:  # no divisor near the limit: groups of almost one size
        together = -(-kv_heads // -(-kv_heads // limit))
    return together * queries_per_kv


def shipped(family="forward"):
    """Every config of a family that planning can choose, for precompiling and for CI."""
    if family != "forward":
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    return [
        forward_config(dtype, head_dim, mask, lse, few)
        for few in (False, True)
        for head_dim, mask in FORWARD
        for dtype in DTYPE_BYTES
        for lse in (False, True)
    ]


FAMILIES = ("forward",)
