"""ForwardConfig and BackwardConfig: what they refuse, with which numbers, and that what they accept fits a Hopper SM."""

import itertools
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from fa3.kernels import configs
from fa3.kernels.configs import BackwardConfig, ConfigError, ForwardConfig


def buildable():
    """Every config that can be built, over a grid of the fields that decide shared memory and registers."""
    grid = dict(
        head_dim=(64, 128, 256),
        tile_m=(64, 128, 192),
        tile_n=range(16, 257, 16),
        stages=(1, 2, 3, 4),
        pingpong=(False, True),
        overlap=(False, True),
    )
    found = []
    for values in itertools.product(*grid.values()):
        try:
            found.append(ForwardConfig(**dict(zip(grid, values))))
        except ConfigError:
            pass
    return found


def test_what_is_accepted_fits_an_sm():
    accepted = buildable()
    assert len(accepted) > 100
    assert {(c.head_dim, c.tile_m) for c in accepted} >= {(64, 192), (128, 128), (256, 128)}
    for c in accepted:
        producer, consumer = c.registers
        assert c.shared_memory <= 227 * 1024, c
        assert c.threads == 128 * (1 + c.consumer_warpgroups) <= 1024, c
        assert c.threads * c.entry_registers <= 65536, c
        assert 128 * (producer + c.consumer_warpgroups * consumer) <= c.threads * c.entry_registers, c  # the CTA's own: waiting for more never ends
        # setmaxnreg takes multiples of 8 from 24 to 256 (PTX ISA), and one kind of warpgroup gives what the other gets
        assert all(24 <= r <= 256 and r % 8 == 0 for r in (producer, consumer)), c
        assert producer <= c.entry_registers <= consumer, c


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(dtype="fp32"), "dtype must be one of .*'bf16'.*, got 'fp32'"),
        (dict(head_dim=96), r"head_dim must be one of \(64, 128, 256\), got 96"),
        (dict(mask="window"), "mask must be one of .*'causal'.*, got 'window'"),
        (dict(tile_m=100), "tile_m must be one of .*128.*, got 100"),
        (dict(tile_n=100), "tile_n must be a multiple of 16.*, got 100"),
        (dict(tile_n=0), "tile_n must be .* from 16 to 256, got 0"),
        (dict(tile_n=272), "tile_n must be .* from 16 to 256, got 272"),
        (dict(late_release=True, overlap=False), "late_release .* needs overlap=True"),
        (dict(rescale_from=9.0), "rescale_from must be from 0 to 8.*, got 9.0"),
        (dict(stages=0), "stages must be .*, got 0"),
        (dict(scheduler="random"), "scheduler must be one of .*'persistent'.*, got 'random'"),
        (dict(warp_specialised=False), "warp_specialised=False needs pingpong=False, got True"),
        (dict(warp_specialised=False, pingpong=False, mask="causal"), "warp_specialised=False needs mask='none', got 'causal'"),
        (dict(warp_specialised=False, pingpong=False, extra_q_slots=2), "scheduler can't be 'dynamic'"),
        (dict(warp_specialised=False, pingpong=False, scheduler="single"), "needs extra_q_slots=tile_m/64 or q_in_registers=True"),
        (dict(head_dim=64, stages=8, tile_m=192, tile_n=96), "leaves O neither .* nor a stage of V"),
        (dict(head_dim=256, tile_m=192, tile_n=32, stages=1, overlap=False), "accumulator takes 128 registers; with 512 threads"),
        (dict(presume=True, overlap=False), "presume .* needs overlap=True"),
        (dict(presume=True, late_release=True), "late_release .*presume=True and mask='none'"),
        (dict(extra_k_stages=3), "extra_k_stages must be one of .*, got 3"),
        (dict(mask="causal", tile_m=192, extra_q_slots=1), "needs stages >= 3 for three warpgroups with a causal mask, got 2"),
        (dict(extra_k_stages=-1), "needs 2 stages of K and of V, got 1 and 2"),
        (dict(extra_k_stages=-1, stages=1, overlap=False), "extra_k_stages=-1 with stages=1"),
        (dict(extra_q_slots=1, pingpong=False), "extra_q_slots=1 .* needs pingpong=True"),
        (
            dict(warp_specialised=False, pingpong=False, scheduler="single", q_in_registers=True, extra_q_slots=1),
            "extra_q_slots 0 or tile_m/64, got 1",
        ),
        (dict(extra_q_slots=3), "extra_q_slots must be one of .*, got 3"),
        (dict(stages=1, overlap=True), "overlap .*2 stages of K and of V, got 1 and 1"),
        (dict(tile_m=64, pingpong=True), "pingpong needs two consumer warpgroups, got tile_m=64"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=says):
        replace(ForwardConfig(), **changes)


def test_too_much_shared_memory_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="shared memory") as refusal:
        ForwardConfig(head_dim=256, tile_n=128, overlap=False)
    numbers = [int(n) for n in re.findall(r"\d+", str(refusal.value))]
    assert 227 * 1024 in numbers  # what there is
    assert any(n >= (128 + 4 * 128) * 256 * 2 for n in numbers)  # what Q and two stages of K and V alone take
    assert "tile_n=128" in str(refusal.value)


def test_too_many_registers_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="registers") as refusal:
        ForwardConfig(head_dim=256, tile_m=192, tile_n=80, stages=1, overlap=False)
    numbers = [int(n) for n in re.findall(r"\d+", str(refusal.value))]
    assert 160 in numbers  # what a consumer thread of three warpgroups gets
    assert 128 + 40 in numbers  # O and S in fp32: 64 · 256 / 128 and 64 · 80 / 128


def test_a_refusal_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_a_config_is_data():
    c = ForwardConfig(head_dim=64, mask="causal", tile_m=192)
    line = repr(c)
    assert "\n" not in line and line.startswith("ForwardConfig(")
    assert all(f"{f.name}={getattr(c, f.name)!r}" in line for f in fields(c))
    assert eval(line, {"ForwardConfig": ForwardConfig}) == c
    assert pickle.loads(pickle.dumps(c)) == c
    assert len({c, replace(c), replace(c, lse=not c.lse)}) == 2
    with pytest.raises(FrozenInstanceError):
        c.tile_n = 64
    with pytest.raises(ConfigError):
        replace(c, tile_n=17)


def test_configs_load_neither_torch_nor_the_dsl():
    """Looking up a cached kernel must not cost an import."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("configs", {configs.__file__!r})
module = sys.modules["configs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.ForwardConfig()
assert not {{"torch", "cutlass", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def backward_buildable():
    """Every BackwardConfig that can be built, over a grid of the fields that decide shared memory and registers."""
    grid = dict(head_dim=(64, 128, 256), tile_m=range(16, 129, 16), tile_n=(64, 128), cluster=(1, 2), deterministic=(False, True))
    found = []
    for values in itertools.product(*grid.values()):
        try:
            found.append(BackwardConfig(**dict(zip(grid, values))))
        except ConfigError:
            pass
    return found


def test_what_is_accepted_backward_fits_an_sm():
    accepted = backward_buildable()
    assert {(c.head_dim, c.tile_m) for c in accepted} >= {(64, 128), (128, 48), (128, 64), (256, 64)}
    for c in accepted:
        assert c.shared_memory <= 227 * 1024, c
        assert c.threads * c.entry_registers <= 65536, c
        assert sum(r * n for r, n in zip(c.registers, (128, 128, 256) if c.dq_warpgroup else (128, 256))) <= c.threads * c.entry_registers, c
        # what dQ's sum is made of: every number of a tile is in one thread's accumulator, and moves 16 bytes at a time
        assert c.accumulator_size * 128 * c.dq_parts == c.tile_m * c.head_dim and c.accumulator_size % 4 == 0, c
        # the kernel before moves 16 bytes a thread, 256 threads at a time, and a tile's LSE is copied in pieces of 16 bytes
        assert c.tile_m % (256 * 8 // c.head_dim) == 0 and c.tile_m * c.head_dim % (256 * 4) == 0 and c.tile_m * 4 % 16 == 0, c


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(dtype="fp32"), "dtype must be one of .*'bf16'.*, got 'fp32'"),
        (dict(head_dim=96), r"head_dim must be one of \(64, 128, 256\), got 96"),
        (dict(head_dim=256), r"tile_n must be one of \(64,\), got 128"),
        (dict(head_dim=256, tile_n=64, cluster=2, tile_m=80), r"tile_m must be one of \(64,\), got 80"),
        (dict(head_dim=64, tile_m=128, cluster=2), r"cluster must be one of \(1,\), got 2"),
        (dict(head_dim=256, tile_n=64), r"cluster must be one of \(2,\), got 1"),
        (dict(cluster=3), r"cluster must be one of \(1, 2\), got 3"),
        (dict(mask="window"), "mask must be one of .*'causal'.*, got 'window'"),
        (dict(tile_m=72), "tile_m must be one of .*64.*, got 72"),
        (dict(head_dim=64, tile_m=64), r"tile_m must be one of \(128,\), got 64"),
        (dict(tile_n=64), r"tile_n must be one of \(128,\), got 64"),
        (dict(tile_m=80), r"tile_m must be one of \(16, 32, 48, 64\), got 80"),
    ],
)
def test_a_backward_config_that_cannot_run_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        BackwardConfig(**changes)
