"""Configs that planning doesn't choose: each field of ForwardConfig that can be switched gives a right kernel."""

import math
from dataclasses import replace

import pytest

from fa3.attention import Launch, device_of
from fa3.kernels.configs import ForwardConfig
from fa3.plan import FORWARD, forward_config, planned, rows
from fa3.problem import Problem
from tests.gpu.test_forward import faults, inputs, poisoned_memory

VARIANTS = {
    "single": dict(scheduler="single"),
    "persistent": dict(scheduler="persistent"),
    "no overlap": dict(overlap=False),
    "no pingpong": dict(pingpong=False),
    "neither": dict(overlap=False, pingpong=False),
    "one stage": dict(overlap=False, stages=1),
    "one warpgroup": dict(tile_m=64, pingpong=False),
    "tile_n 64": dict(tile_n=64),
    "tile_n 176": dict(tile_n=176),
    "two places for Q": dict(extra_q_slots=2),
    "Q in registers": dict(q_in_registers=True),
    "Q in registers, persistent": dict(q_in_registers=True, scheduler="persistent"),
    "rescale always": dict(rescale_from=0.0),
    "three places for two warpgroups' Q": dict(head_dim=256, tile_n=64, extra_q_slots=1),
    "d 64, five places for three": dict(head_dim=64, tile_m=192, extra_q_slots=2),
    "more stages of K": dict(extra_k_stages=1, tile_n=112),
    "more stages of V": dict(stages=3, extra_k_stages=-1, tile_n=112),
    "presumed maxima": dict(presume=True, tile_n=48),
    "presumed maxima, Q in registers": dict(presume=True, q_in_registers=True, extra_k_stages=1),
    "d 64, presumed maxima": dict(head_dim=64, tile_m=192, presume=True),
    "d 256, presumed maxima": dict(head_dim=256, tile_n=80, presume=True),
    "late release": dict(late_release=True, rescale_from=0.0),
    "d 64, three warpgroups, single": dict(head_dim=64, tile_m=192, scheduler="single"),
    "d 64, three warpgroups, no pingpong": dict(head_dim=64, tile_m=192, pingpong=False),
    "d 64, three warpgroups, no overlap": dict(head_dim=64, tile_m=192, overlap=False),
    "d 64, three warpgroups, narrow tiles": dict(head_dim=64, tile_m=192, tile_n=32),  # key tiles that one warpgroup alone sees
    "d 64, more stages": dict(head_dim=64, tile_m=192, stages=4, extra_q_slots=3),
    "d 64, late release": dict(head_dim=64, tile_m=192, late_release=True),
    "no warp specialisation": dict(warp_specialised=False, pingpong=False, scheduler="persistent", q_in_registers=True),
    "no warp specialisation, single": dict(warp_specialised=False, pingpong=False, scheduler="single", extra_q_slots=2),
    "d 256, single": dict(head_dim=256, tile_n=80, scheduler="single"),
    "d 256, no overlap": dict(head_dim=256, tile_n=64, overlap=False),
}
LENGTHS = [(1, 1), (113, 203), (799, 300), (1023, 1024), (1500, 700)]


def run(config, q, k, v, causal, head_group, ctas):
    """(O, LSE) of a kernel whose config and launch are chosen by hand."""
    batch, seqlen_q, heads, d = q.shape
    problem = Problem("bf16", batch, seqlen_q, k.shape[1], heads, k.shape[2], d, causal, 1 / math.sqrt(d), True, 0)
    plan = replace(planned(config, problem, device_of(q.device)), head_group=head_group, ctas=ctas)
    launch = Launch(problem, plan, [None, None, None])
    with poisoned_memory():
        return launch(q, k, v)


@pytest.mark.parametrize(
    ("name", "causal"),
    [(n, c) for n in VARIANTS for c in (False, True) if not (c and "warp specialisation" in n)],
    ids=lambda x: x if isinstance(x, str) else "causal" if x else "full",
)
def test_variant(name, causal):
    check_lengths(ForwardConfig(mask="causal" if causal else "none", **VARIANTS[name]))


@pytest.mark.parametrize(
    ("head_dim", "mask", "row"), [(*key, row) for key in FORWARD for row in range(len(rows(*key)))], ids=str
)
def test_shipped(head_dim, mask, row):
    """Of which planning would choose only some for shapes as small as here."""
    check_lengths(forward_config("bf16", head_dim, mask, True, row))


def check_lengths(config):
    found = []
    for seqlen_q, seqlen_k in LENGTHS:
        q, k, v = inputs(3, seqlen_q, seqlen_k, 6, 2, config.head_dim)
        causal = config.mask == "causal"
        for head_group, ctas in ((1, 1), (5, 7), (18, 132)):
            out, lse = run(config, q, k, v, causal, head_group, ctas)
            found += [f"{(seqlen_q, seqlen_k)} groups of {head_group}, {ctas} CTAs: {x}" for x in faults(out, lse, q, k, v, causal)]
    assert not found, "\n".join(found)
