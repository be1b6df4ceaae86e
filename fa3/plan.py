"""Problem -> Plan: which kernel, which config, which grid. Pure Python, no GPU."""

import math
from dataclasses import dataclass

from .kernels.configs import DTYPE_BYTES, BackwardConfig, ForwardConfig
from .problem import Problem

# (head_dim, mask) -> what differs from ForwardConfig's defaults. Chosen by the sweeps of perf/NOTES.md: d 64 and 128 by
# perf/results/2026-11-22-presume-fwd-h200.json, d 256 by 2026-11-23-sweep-fwd-h200.json and -2.json.
FORWARD = {
    (64, "none"): dict(tile_m=192, tile_n=128, stages=3, extra_q_slots=3, presume=True),
    (64, "causal"): dict(tile_m=192, tile_n=128, stages=3, extra_q_slots=3, presume=True),
    (128, "none"): dict(tile_m=128, tile_n=128, extra_k_stages=1, q_in_registers=True, presume=True),
    (128, "causal"): dict(tile_m=128, tile_n=128, extra_k_stages=1, q_in_registers=True, presume=True),
    (256, "none"): dict(tile_m=128, tile_n=64, extra_q_slots=1, presume=True),
    (256, "causal"): dict(tile_m=128, tile_n=64, extra_q_slots=1, late_release=True),
}
# head_dim -> (rate, row): the same with fewer queries a tile, for problems that haven't got enough of the others for all SMs.
# rate: of an SM, as a share of what it reaches with FORWARD's (perf/results/2026-11-22-few-tiles-fwd-h200.json).
FORWARD_SMALLER = {
    64: (
        (0.87, dict(tile_m=128, tile_n=192, stages=3, extra_q_slots=2, presume=True)),
        (0.60, dict(tile_m=64, tile_n=192, stages=3, pingpong=False, presume=True)),
    ),
    128: ((0.70, dict(tile_m=64, tile_n=176, pingpong=False, presume=True)),),
    256: ((0.80, dict(tile_m=64, tile_n=96, pingpong=False, presume=True)),),
}
ENOUGH_TILES = 8  # an SM: with more, SMs that wait for the last tiles cost little
ALIKE = 0.75  # of the keys that the longest tile takes: where the mean one takes more, tiles are done in rounds
EXTRA_KEYS = 192  # what a tile's beginning and end cost, in keys
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
    config = forward_config(problem.dtype, problem.head_dim, mask, problem.lse, chosen_row(problem, device))
    return planned(config, problem, device)


def rows(head_dim, mask):
    """(rate, row) of every kernel for a head dim and mask, the ones with larger tiles first."""
    return ((1.0, FORWARD[head_dim, mask]), *FORWARD_SMALLER[head_dim])


def chosen_row(problem, device):
    """Which of `rows`: the one that is done first. sm_margin has no say in it: it changes no bit of the output."""
    choices = rows(problem.head_dim, "causal" if problem.causal else "none")
    default = ForwardConfig.tile_m, ForwardConfig.tile_n  # a row need not name them
    tiles = [(row.get("tile_m", default[0]), row.get("tile_n", default[1])) for _, row in choices]
    times = [time_taken(problem, *tile, device.sms) / rate for tile, (rate, _) in zip(tiles, choices)]
    return times.index(min(times))


def time_taken(problem, tile_m, tile_n, sms):
    """How long the slowest SM is busy, in queries times keys: an estimate, for comparing tiles."""

    def queries(blocks):  # of 64 in a tile; a warpgroup without any still costs its turns
        return (64 * blocks + tile_m) / 2

    tiles, blocks = -(-problem.seqlen_q // tile_m), -(-problem.seqlen_q // 64)
    longest, mean = queries(min(blocks, tile_m // 64)), queries(blocks / tiles)
    keys = -(-problem.seqlen_k // tile_n) * tile_n
    most, taken = keys + EXTRA_KEYS, min(keys, keys_seen(problem) + tile_n / 2) + EXTRA_KEYS
    rounds = tiles * problem.heads * problem.batch / sms
    if taken <= ALIKE * most:
        return max(longest * most, rounds * mean * taken)  # the longest are done first, and the others fill up
    return taken * (math.ceil(rounds) * longest if rounds <= ENOUGH_TILES else rounds * mean)


def keys_seen(problem):
    """By the mean query."""
    if not problem.causal:
        return problem.seqlen_k
    diagonal = min(problem.seqlen_q, problem.seqlen_k)
    return diagonal * (problem.seqlen_k - diagonal / 2) / problem.seqlen_q


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


def forward_config(dtype, head_dim, mask, lse, row=0) -> ForwardConfig:
    """row: number in `rows`."""
    return ForwardConfig(dtype=dtype, head_dim=head_dim, mask=mask, lse=lse, **rows(head_dim, mask)[row][1])


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


# (head_dim, mask) -> what differs from BackwardConfig's defaults; perf/NOTES.md, issue 4, says why, and how fast it is, as does
# perf/results/2026-11-28-paper-bwd-h200-3.json.
BACKWARD = {
    (64, "none"): dict(tile_m=128),
    (64, "causal"): dict(tile_m=128),
    (128, "none"): dict(),
    (128, "causal"): dict(),
    (256, "none"): dict(tile_n=64, cluster=2),
    (256, "causal"): dict(tile_n=64, cluster=2),
}
BACKWARD_IN_PAIRS = {(128, "none"): dict(cluster=2), (128, "causal"): dict(cluster=2)}  # and where `in_pairs`


@dataclass(frozen=True)
class BackwardPlan:
    """A backward call's config, its workspace, and the launch argument that is no tensor."""

    config: BackwardConfig
    batch: int
    heads: int
    query_tiles: int
    sms: int

    @property
    def rows(self):
        """Queries, counted in whole tiles."""
        return self.query_tiles * self.config.tile_m

    @property
    def workspace(self):
        """name -> (shape, dtype), in the order of the kernel's arguments; None for what isn't needed."""
        per_head = self.batch, self.heads
        return {
            "dq_accum": ((*per_head, self.rows * self.config.head_dim), "float32"),
            "lse_log2": ((*per_head, self.rows), "float32"),
            "delta": ((*per_head, self.rows), "float32"),
            "turns": ((*per_head, self.config.cluster * self.query_tiles), "int32") if self.config.deterministic else None,
        }

    def __str__(self):
        return str(self.config)


def plan_backward(problem: Problem, device: Device) -> BackwardPlan:
    """The plan of the backward of a forward call that has scores to compute."""
    mask = "causal" if problem.causal else "none"
    config = backward_config(problem.dtype, problem.head_dim, mask, problem.deterministic, in_pairs(problem))
    return planned_backward(config, problem, device)


def in_pairs(problem):
    """Whether CTAs work in pairs that add up dQ of both's keys before it goes to memory, at head_dim 128.

    Half of these additions brings up to 8 %, and 5 to 17 % where they are made in order; but every pair must have keys for both, or nearly,
    and with a causal mask one waits for the other at the diagonal: from 2k to 4k queries, in any order, that costs as much or more.
    """
    key_tiles = -(-problem.seqlen_k // 128)
    return (
        (problem.head_dim, "causal" if problem.causal else "none") in BACKWARD_IN_PAIRS
        and (key_tiles % 2 == 0 or key_tiles > 64)
        and problem.seqlen_q >= 512
        and not (problem.causal and not problem.deterministic and 1024 < problem.seqlen_q < 8192)
    )


def planned_backward(config, problem, device):
    """The plan of a backward call whose config is chosen already."""
    query_tiles = -(-problem.seqlen_q // config.tile_m)
    key_tiles = -(-problem.seqlen_k // config.tile_n)
    for name, tiles in (("q", query_tiles * problem.heads * problem.batch), ("k", key_tiles * problem.heads_kv * problem.batch)):
        if tiles >= 2**31:
            raise ValueError(f"{name} has {tiles} tiles; the backward can launch at most {2**31 - 1}")
    most = (2**31 - 1) // (config.tile_m * config.head_dim)  # tiles: 32 bits count the numbers of a head's fp32 sum of dQ
    if query_tiles > most:
        raise ValueError(f"q has {problem.seqlen_q} rows; the backward takes at most {most * config.tile_m} at head_dim {config.head_dim}")
    return BackwardPlan(config, problem.batch, problem.heads, query_tiles, device.sms)


def backward_config(dtype, head_dim, mask, deterministic, pairs=False) -> BackwardConfig:
    row = (BACKWARD_IN_PAIRS if pairs else BACKWARD)[head_dim, mask]
    return BackwardConfig(dtype=dtype, head_dim=head_dim, mask=mask, deterministic=deterministic, **row)


def shipped(family="forward"):
    """Every config of a family that planning can choose, for precompiling and for CI."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    if family == "backward":
        alone = [(where, deterministic, False) for where in BACKWARD for deterministic in (False, True)]
        pairs = [(where, deterministic, True) for where in BACKWARD_IN_PAIRS for deterministic in (False, True)]
        return [backward_config(dtype, *where, *rest) for where, *rest in alone + pairs for dtype in DTYPE_BYTES]
    return [
        forward_config(dtype, head_dim, mask, lse, row)
        for head_dim, mask in FORWARD
        for row in range(len(rows(head_dim, mask)))
        for dtype in DTYPE_BYTES
        for lse in (False, True)
    ]


FAMILIES = ("forward", "backward")
