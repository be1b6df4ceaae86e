"""Problem -> Plan, without a GPU: properties that hold whatever the tables of tuned configs say."""

import itertools
from dataclasses import replace

import pytest

from fa3 import demo
from fa3.kernels.configs import SHARED_MEMORY_LIMIT, ForwardConfig
from fa3.plan import FAMILIES, FORWARD, Device, plan_backward, plan_forward, shipped
from perf import suites

DEVICE = Device()
SHAPES = [  # batch, seqlen_q, seqlen_k, heads, heads_kv
    (1, 1, 1, 1, 1),
    (1, 1, 100_000, 32, 8),
    (2, 113, 203, 6, 2),
    (4, 4096, 4096, 16, 16),
    (1, 16384, 16384, 16, 1),
    (64, 300, 5, 8, 8),
    (1, 2**20, 2**20, 8, 8),
    (70_000, 64, 64, 1, 1),
]
KINDS = list(itertools.product(("fp16", "bf16"), (64, 128, 256), (False, True), (False, True)))  # dtype, d, causal, lse


def problem(shape=SHAPES[3], dtype="bf16", head_dim=128, causal=False, lse=False, sm_margin=0, deterministic=False):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    return replace(
        demo.problem(causal),
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=heads,
        heads_kv=heads_kv,
        dtype=dtype,
        head_dim=head_dim,
        lse=lse,
        sm_margin=sm_margin,
        deterministic=deterministic,
        softmax_scale=head_dim**-0.5,
    )


def tiles(problem, config):
    return -(-problem.seqlen_q // config.tile_m) * problem.heads * problem.batch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_plan_is_of_its_problem(shape):
    for dtype, d, causal, lse in KINDS:
        p = problem(shape, dtype, d, causal, lse)
        plan = plan_forward(p, DEVICE)
        c = plan.config
        assert (c.dtype, c.head_dim, c.mask) == (dtype, d, "causal" if causal else "none")
        assert c.lse or not lse
        assert 1 <= plan.ctas <= tiles(p, c)
        assert c.scheduler == "single" or plan.ctas <= DEVICE.sms
        assert 1 <= plan.head_group <= p.heads * p.batch
        assert plan == plan_forward(p, DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planning_chooses_among_the_shipped_configs(shape):
    """What `python -m fa3 compile` and CI cover is all that a call without sm_margin can need."""
    configs = set(shipped())
    for dtype, d, causal, lse in KINDS:
        for sms in (1, 78, 114, 132):
            plan = plan_forward(problem(shape, dtype, d, causal, lse), replace(DEVICE, sms=sms))
            assert plan.config in configs


def test_problems_with_tiles_enough_take_the_large_ones():
    for p in suites.PAPER:
        shape = (p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.heads_kv)
        config = plan_forward(problem(shape, p.dtype, p.head_dim, p.causal), DEVICE).config
        assert config.tile_m == FORWARD[p.head_dim, config.mask]["tile_m"]


@pytest.mark.parametrize(
    ("head_dim", "shape", "tile_m"),
    [
        (64, (1, 512, 512, 16, 16), 64),  # 128 tiles of 64
        (64, (1, 512, 32768, 32, 8), 128),  # 128 tiles of 128; of 192, 96
        (64, (64, 1, 4096, 32, 8), 64),  # many tiles, but one query in each
        (128, (1, 512, 512, 16, 16), 64),
        (128, (1, 512, 32768, 32, 8), 128),
        (256, (1, 600, 32768, 32, 8), 64),  # 320 in three rounds; of 128, 160 in two
        (64, (1, 256, 4096, 70, 70), 128),  # 140 in two rounds; of 64, 280 in three
        (64, (25, 1024, 16384, 2, 2), 192),  # 300 in three rounds; of 64, 800 in seven
        (128, (1, 2048, 512, 29, 29), 128),  # causal: rows that see nothing take their time too
        (128, (1, 1045, 613, 32, 8), 128),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_are_as_small_as_keeps_all_sms_busy(head_dim, shape, tile_m, causal):
    p = problem(shape, head_dim=head_dim, causal=causal)
    assert plan_forward(p, DEVICE).config.tile_m == tile_m
    assert plan_forward(replace(p, sm_margin=66), DEVICE).config.tile_m == tile_m  # a margin changes no bit


def test_tiles_of_a_causal_problem_fill_up_with_shorter_ones():
    p = problem((1, 2048, 2048, 6, 6))
    assert plan_forward(p, DEVICE).config.tile_m == 128  # 96 in one round; of 64, 192 in two
    assert plan_forward(replace(p, causal=True), DEVICE).config.tile_m == 64  # half the time of the longest of 128


def test_a_row_may_leave_the_tile_to_the_defaults(monkeypatch):
    monkeypatch.setitem(FORWARD, (128, "causal"), {})
    config = plan_forward(problem(causal=True), DEVICE).config
    assert config == ForwardConfig(mask="causal", lse=False)


def test_a_smaller_gpu_takes_larger_tiles():
    p = problem((1, 512, 512, 16, 16))  # 128 tiles of 64
    assert plan_forward(p, replace(DEVICE, sms=132)).config.tile_m == 64
    assert plan_forward(p, replace(DEVICE, sms=78)).config.tile_m == 128


def test_shipped_configs():
    configs = shipped()
    assert len(set(configs)) == len(configs)
    assert {(c.dtype, c.head_dim, c.mask, c.lse) for c in configs} >= {
        (dtype, d, "causal" if causal else "none", lse) for dtype, d, causal, lse in KINDS
    }
    for config in configs:
        assert isinstance(config, ForwardConfig) and config.family == "forward"
        assert config.shared_memory <= SHARED_MEMORY_LIMIT


def test_every_family_ships_something():
    assert all(shipped(family) for family in FAMILIES)
    with pytest.raises(ValueError, match="family must be one of .*forward.*, got 'sideways'"):
        shipped("sideways")


def test_shipped_backward_configs():
    configs = shipped("backward")
    assert len(set(configs)) == len(configs)
    kinds = {(c.dtype, c.head_dim, c.mask, c.deterministic) for c in configs}
    masks = [(d, mask) for d in (64, 128, 256) for mask in ("none", "causal")]
    assert kinds == {(dtype, *where, fixed) for dtype in ("fp16", "bf16") for where in masks for fixed in (False, True)}
    pairs = {(c.dtype, 128, c.mask, c.deterministic) for c in configs if (c.head_dim, c.cluster) == (128, 2)}
    assert pairs == {kind for kind in kinds if kind[1] == 128}
    assert all(c.family == "backward" for c in configs)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_have_keys_for_both(causal):
    """128 keys each; one pair that lacks some is nothing among many."""

    def taken(seqlen_q, seqlen_k, **changes):
        return plan_backward(problem((1, seqlen_q, seqlen_k, 4, 4), causal=causal, **changes), DEVICE).config.cluster

    assert taken(1024, 1024) == taken(512, 250) == taken(16384, 8193) == 2
    assert taken(1024, 128) == taken(1024, 640) == taken(16384, 8192 - 128) == 1
    assert taken(511, 1024) == 1
    assert taken(4096, 4096) == (1 if causal else 2)
    assert taken(4096, 4096, deterministic=True) == 2
    assert taken(1024, 1024, head_dim=64) == 1
    assert taken(1024, 1024, head_dim=256) == 2  # always, one tile a cluster


@pytest.mark.parametrize("shape, name", [((2**19, 64, 64, 2**12, 1), "q"), ((2**20, 1, 300, 2**10, 2**10), "k")])
def test_more_backward_tiles_than_a_grid_can_count_are_refused(shape, name):
    with pytest.raises(ValueError, match=rf"{name} has \d+ tiles.* at most {2**31 - 1}"):
        plan_backward(problem(shape), DEVICE)


def test_a_head_whose_dq_has_more_numbers_than_32_bits_count_is_refused():
    plan_backward(problem((1, 2**23 - 64, 64, 1, 1), head_dim=256), DEVICE)
    with pytest.raises(ValueError, match=f"q has {2**23 - 63} rows; the backward takes at most {2**23 - 64} at head_dim 256"):
        plan_backward(problem((1, 2**23 - 63, 64, 1, 1), head_dim=256), DEVICE)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 64, 1000])
def test_backward_workspace_is_dqs_sum_and_two_numbers_a_query(seqlen_q, deterministic):
    plan = plan_backward(problem((3, seqlen_q, 300, 8, 2), head_dim=64), DEVICE)
    plan = replace(plan, config=replace(plan.config, deterministic=deterministic))
    assert plan.config.deterministic == deterministic
    assert plan.rows % plan.config.tile_m == 0 and 0 <= plan.rows - seqlen_q < plan.config.tile_m
    shapes = {name: None if spec is None else spec[0] for name, spec in plan.workspace.items()}
    queries = (3, 8, plan.rows)
    turns = (3, 8, plan.query_tiles) if deterministic else None
    assert shapes == {"dq_accum": (3, 8, plan.rows * 64), "lse_log2": queries, "delta": queries, "turns": turns}


@pytest.mark.parametrize("margin", [1, 20, 131])
def test_sm_margin_leaves_sms_alone(margin):
    for dtype, d, causal, lse in KINDS:
        plan = plan_forward(problem(SHAPES[4], dtype, d, causal, lse, sm_margin=margin), DEVICE)
        assert plan.config.scheduler != "single"  # one CTA a tile would go to every SM
        assert 1 <= plan.ctas <= DEVICE.sms - margin


def test_heads_in_flight_keep_their_keys_in_the_l2():
    for seqlen_k in (1, 512, 4096, 16384, 2**20):
        p = problem((8, 4096, seqlen_k, 32, 8), causal=True)
        group = plan_forward(p, DEVICE).head_group
        kv_heads = group / (p.heads // p.heads_kv)
        assert kv_heads <= 1 or kv_heads * 2 * seqlen_k * p.head_dim * 2 <= DEVICE.l2_bytes


def test_more_tiles_than_a_grid_can_count_are_refused_with_the_number():
    p = problem((2**20, 64, 64, 2**12, 2**12))
    with pytest.raises(ValueError, match=rf"{2**32} .*{2**31 - 1}"):
        plan_forward(p, DEVICE)


def test_a_plan_prints_as_one_line():
    plan = plan_forward(problem(), DEVICE)
    assert "\n" not in str(plan) and repr(plan.config) in str(plan)
