"""README's examples run as they stand (on CPU tensors where there is no GPU), and what it names exists."""

import re
from pathlib import Path

import fa3
from fa3 import jit, plan
from fa3.__main__ import parser
from fa3.kernels.configs import ForwardConfig

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_example():
    (example,) = [e for e in EXAMPLES if "flash_attn_func" in e]
    names = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape and names["lse"].shape == (2, 16, 1024)


def test_example_that_inspects(tools, capsys):
    (example,) = [e for e in EXAMPLES if "inspect" in e]
    exec(example, {})
    printed = capsys.readouterr().out
    assert "HGMMA" in printed and "232448" in printed


def test_what_is_named_exists():
    assert {name for name in re.findall(r"`(flash_attn_\w+)`", README)} >= set(fa3.__all__) - {"explain"}
    assert callable(jit.get) and callable(fa3.explain)
    assert plan.FORWARD[128, "causal"] and ForwardConfig(mask="causal", tile_m=128, tile_n=160)
    commands = parser().format_help()
    for name in re.findall(r"python -m fa3 (\w+)", README):
        assert name in commands
