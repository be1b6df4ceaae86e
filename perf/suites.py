"""What is measured: every suite is a tuple of Points, and nothing else."""

import dataclasses
from dataclasses import dataclass

from perf import PerfError

ELEMENT_BYTES = {"bf16": 2, "fp16": 2}
# FLOP of a direction over the forward's: the backward has five GEMMs where the forward has two
DIRECTION_FLOPS = {"fwd": 1.0, "bwd": 2.5}


@dataclass(frozen=True)
class Point:
    """One attention problem: q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim)."""

    head_dim: int
    causal: bool  # aligned to the bottom right: query i sees keys up to i + seqlen_k - seqlen_q
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    dtype: str = "bf16"
    direction: str = "fwd"

    def __post_init__(self):
        for name in ("head_dim", "batch", "seqlen_q", "seqlen_k", "heads", "heads_kv"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if type(self.causal) is not bool:
            raise ValueError(f"causal must be True or False, got {self.causal!r}")
        if self.heads % self.heads_kv:
            raise ValueError(f"heads ({self.heads}) must be a multiple of heads_kv ({self.heads_kv})")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ELEMENT_BYTES)}, got {self.dtype!r}")
        if self.direction not in DIRECTION_FLOPS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTION_FLOPS)}, got {self.direction!r}")

    def visible_pairs(self) -> float:
        """(query, key) pairs of one head that count as work.

        Causal with seqlen_q = seqlen_k counts half the square, as FlashAttention's papers do (the exact number is
        seqlen/2 pairs more); with seqlen_q != seqlen_k there is no such convention, so the exact number is counted.
        """
        q, k = self.seqlen_q, self.seqlen_k
        if not self.causal:
            return q * k
        if q == k:
            return q * k / 2
        triangle = min(q, k)  # the last min(q, k) rows end in the triangle below the diagonal; earlier rows see nothing
        return triangle * (k - triangle) + triangle * (triangle + 1) // 2

    def flops(self) -> float:
        """4 FLOP for each visible pair, head-dim element, query head and batch (a multiply and an add, in two GEMMs)."""
        return 4 * self.visible_pairs() * self.head_dim * self.heads * self.batch * DIRECTION_FLOPS[self.direction]

    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and the output together; in the backward direction, of their gradients too."""
        rows = 2 * self.seqlen_q * self.heads + 2 * self.seqlen_k * self.heads_kv
        tensors = {"fwd": 1, "bwd": 2}[self.direction]
        return tensors * self.batch * rows * self.head_dim * ELEMENT_BYTES[self.dtype]

    def seqlen_label(self) -> str:
        return str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"

    def heads_label(self) -> str:
        return str(self.heads) if self.heads == self.heads_kv else f"{self.heads}:{self.heads_kv}"

    def mask_label(self) -> str:
        return "causal" if self.causal else "full"

    def label(self) -> str:
        return (
            f"{self.direction} {self.dtype} d{self.head_dim} {self.mask_label()} "
            f"b{self.batch} s{self.seqlen_label()} h{self.heads_label()}"
        )


# FlashAttention-3's grid (arXiv 2407.08608, section 4.1): 16k tokens and hidden size 2048 at every point
PAPER_TOKENS = 16384
PAPER_HIDDEN = 2048
PAPER = tuple(
    Point(d, causal, PAPER_TOKENS // s, s, s, PAPER_HIDDEN // d, PAPER_HIDDEN // d)
    for d in (64, 128, 256)
    for causal in (False, True)
    for s in (512, 1024, 2048, 4096, 8192, 16384)
)

# Grouped-query models, each beside multi-head attention with as many query heads, the rate it is held against.
# Only batch 1 goes beyond 32k tokens: at 128k one launch already takes a fifth of a second.
GQA_TOKENS = 32768
GQA = tuple(
    Point(128, True, batch, s, s, heads, heads_kv)
    for heads in (32, 64)
    for heads_kv in (8, heads)
    for s in (1024, 4096, 16384, 65536, 131072)
    for batch in (1, 2, 4, 8)
    if batch == 1 or batch * s <= GQA_TOKENS
)

# Lengths that no tile divides, each beside the nearest round length at the same batch
ROUND_LENGTHS = {1000: 1024, 2047: 2048, 4097: 4096, 5000: 5120, 33333: 32768}
ODD_LENGTHS = tuple(
    Point(d, causal, max(1, PAPER_TOKENS // round_length), s, s, PAPER_HIDDEN // d, PAPER_HIDDEN // d)
    for d in (64, 128, 256)
    for causal in (False, True)
    for odd, round_length in ROUND_LENGTHS.items()
    for s in (odd, round_length)
)

# A chunk of a long prompt against what is already in the cache
CHUNKED_PREFILL = tuple(
    Point(d, True, 1, chunk, 32768, 32, 8) for d in (64, 128, 256) for chunk in (128, 256, 512, 1024)
)

# So small that the GPU waits for the host
HOST = tuple(Point(128, causal, 1, 128, 128, 16, 16) for causal in (False, True))

# FlashAttention-3's Table 2: what each of its ideas is worth (measured by perf.sweep, in fp16)
ABLATION = (Point(128, False, 4, 8448, 8448, 16, 16),)

SUITES = {
    "paper": PAPER,
    "ablation": ABLATION,
    "shapes": GQA + ODD_LENGTHS + CHUNKED_PREFILL,
    "gqa": GQA,
    "odd-lengths": ODD_LENGTHS,
    "chunked-prefill": CHUNKED_PREFILL,
    "host": HOST,
}


def held_against(point):
    """The point whose rate this one's is held against, or None.

    A grouped-query point against multi-head attention, an odd length against the nearest round one, fp16 against bf16.
    """
    square = point.seqlen_q == point.seqlen_k
    if square and point.heads != point.heads_kv:
        return dataclasses.replace(point, heads_kv=point.heads)
    if square and point.seqlen_q in ROUND_LENGTHS:
        round_length = ROUND_LENGTHS[point.seqlen_q]
        return dataclasses.replace(point, seqlen_q=round_length, seqlen_k=round_length)
    if point.dtype == "fp16":
        return dataclasses.replace(point, dtype="bf16")
    return None


def select(suite, *, head_dims=None, causal=None, seqlens=None, dtypes=("bf16",), direction="fwd"):
    """The suite's points that pass every filter (None passes all; seqlens filters seqlen_q), once for each dtype."""
    points = SUITES[suite]
    for option, asked, name in (("--head-dim", head_dims, "head_dim"), ("--seqlen", seqlens, "seqlen_q")):
        if asked is None:
            continue
        known = sorted({getattr(point, name) for point in points})
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise PerfError(f"{option}: suite {suite} has no {unknown}; it has {known}")
        points = [point for point in points if getattr(point, name) in asked]
    if causal is not None:
        points = [point for point in points if point.causal == causal]
    if not points:
        raise PerfError(f"no point of suite {suite} passes these filters together")
    return [dataclasses.replace(point, dtype=dtype, direction=direction) for dtype in dtypes for point in points]


def across_dtypes(points):
    """The points in groups of those that differ in dtype alone; groups and points in the order in which they come."""
    groups = {}
    for point in points:
        groups.setdefault(dataclasses.replace(point, dtype="bf16"), []).append(point)
    return list(groups.values())
