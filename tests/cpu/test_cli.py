"""python -m fa3 without a GPU: help, doctor, compile, inspect, demo and bench, what they print and their exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fa3 import bench, demo, doctor, hopper, jit, plan, timing, toolkit
from fa3.__main__ import main
from fa3.kernels.configs import ForwardConfig

SMALL = [ForwardConfig(head_dim=64, tile_m=128, tile_n=32, lse=lse) for lse in (False, True)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FA3_CACHE", raising=False)
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes
    return tmp_path / "cache"


@pytest.fixture
def few(monkeypatch):
    """Two quick configs in place of all that are shipped."""
    monkeypatch.setattr(plan, "shipped", lambda family="forward": SMALL)


def command(*words, **environment):
    """A finished `python -m fa3 WORDS` in a new process that sees no GPU."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "fa3", *words], capture_output=True, text=True, env=environment)


def test_help_is_the_default(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "doctor", "compile", "inspect", "bench"))


@pytest.mark.parametrize("words", [["fly"], ["compile", "--set", "d100"], ["compile", "--jobs", "0"], ["bench", "--head-dim", "100"]])
def test_wrong_arguments(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert words[-1] in capsys.readouterr().err


# doctor


def findings(capsys):
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    return code, {f["name"]: f for f in found["findings"]}


def test_doctor_as_a_command():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none: kernels compile, CPU tensors run the reference" in done.stdout
    assert torch.__version__ in done.stdout
    assert "\x1b" not in done.stdout  # no colours in a pipe


def test_doctor_says_what_is_here(capsys, cache):
    code, found = findings(capsys)
    assert code == 0
    assert found["torch"]["found"].startswith(torch.__version__)
    assert found["code generator"]["found"].startswith("cu1")
    for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-bindings"):
        assert found[name]["state"] == "ok" and found[name]["found"] == doctor.version(name)
    assert str(cache) in found["cache"]["found"]
    assert found["cached kernels"]["mend"] == "python -m fa3 compile"
    assert not cache.exists()  # looking leaves nothing


@pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-bindings", "rich"])
def test_doctor_misses_a_package(package, capsys, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name == package else real(name))
    code, found = findings(capsys)
    assert code == 1
    assert found[package] == dict(name=package, found="not installed", state="missing", mend=f"pip install {package}")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "MISSING" in printed and f"-> pip install {package}" in printed and "1 missing" in printed


@pytest.mark.parametrize("module", ["cutlass", "tvm_ffi", "torch"])
def test_doctor_runs_where_the_library_cannot(module):
    code = f"""
import sys
sys.modules[{module!r}] = None  # importing it fails
import fa3
try:
    fa3.flash_attn_func
except ImportError as error:
    assert "python -m fa3 doctor" in str(error), error
else:
    assert {module!r} == "tvm_ffi"  # which is imported at the first compilation
from fa3.__main__ import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "MISSING" in done.stdout and f"importing {module} fails" in done.stdout


def test_doctor_on_optional_things(capsys, monkeypatch):
    """Neither a GPU nor inspect's tools nor a cache are needed."""
    monkeypatch.setattr(toolkit, "places", lambda tool: [])
    monkeypatch.setenv("FA3_CACHE", "0")
    code, found = findings(capsys)
    assert code == 0
    assert found["nvdisasm"]["mend"] == found["cuobjdump"]["mend"] == "pip install 'fa3[inspect]'"
    assert "turned off" in found["cache"]["found"]


def test_doctor_on_drivers(monkeypatch):
    """CUDA 13's code needs driver 580; a torch without CUDA beside a driver is a mistake."""
    generator = doctor.dsl("570.10")[1]
    if generator.found.startswith("cu13"):
        assert generator.state == "missing" and "580" in generator.found
    assert doctor.dsl("580.65.06")[1].state in ("ok", "note")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.torch_here(None).state == "ok"
    assert doctor.torch_here("580.65.06").state == "missing" and "pip install" in doctor.torch_here("580.65.06").mend


def test_doctor_on_the_cache(capsys, cache, few):
    assert main(["compile", "--jobs", "1"]) == 0
    files = sorted(cache.glob("*.fa3"))
    (cache / "0123.fa3").write_bytes(files[0].read_bytes())
    files[0].write_bytes(files[0].read_bytes()[:-100])
    capsys.readouterr()
    code, found = findings(capsys)
    assert code == 0
    assert "3 kernels" in found["cache"]["found"]
    assert "2 of the 2 shipped" in found["cached kernels"]["found"]
    assert found["other kernels"]["found"].startswith("1 ")
    assert str(files[0]) in found["damaged kernel"]["found"] and found["damaged kernel"]["mend"].startswith("rm ")


def test_doctor_on_a_cache_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / place))
        _, found = findings(capsys)
        assert "can't be written" in found["cache"]["found"] and "FA3_CACHE_DIR" in found["cache"]["mend"]


# compile


def test_compile_fills_the_cache(capsys, cache, few):
    """In parallel processes, and only what isn't there."""
    assert main(["compile"]) == 0
    assert "2 compiled, 0 there already, 0 failed" in capsys.readouterr().out
    assert {p.stem for p in cache.glob("*.fa3")} == {jit.key(config) for config in SMALL}
    assert main(["compile", "--set", "d64"]) == 0
    assert "0 compiled, 2 there already, 0 failed" in capsys.readouterr().out
    assert main(["compile", "--set", "d128"]) == 0
    assert "0 compiled, 0 there already, 0 failed" in capsys.readouterr().out


def test_compile_says_which_config_failed(capsys, monkeypatch, few):
    bad = ForwardConfig(head_dim=64, tile_m=192)

    def get(config):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(plan, "shipped", lambda family="forward": [bad])
    monkeypatch.setattr(jit, "get", get)
    assert main(["compile"]) == 1
    printed = capsys.readouterr()
    assert f"FAILED {bad}: no such instruction" in printed.err
    assert "0 compiled, 0 there already, 1 failed" in printed.out


@pytest.mark.filterwarnings("ignore:fa3 can't cache")
def test_compile_into_a_place_that_cannot_be_written(capsys, monkeypatch, tmp_path, few):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "file"))
    jit.clear()
    assert main(["compile", "--jobs", "1"]) == 1
    assert "FA3_CACHE_DIR" in capsys.readouterr().err


def test_compile_with_the_cache_off(capsys, monkeypatch):
    monkeypatch.setenv("FA3_CACHE", "0")
    assert main(["compile"]) == 2
    assert "FA3_CACHE=0" in capsys.readouterr().err


# inspect


def test_inspect_as_table_and_json(tools, capsys, few):
    assert main(["inspect"]) == 0
    table = capsys.readouterr().out
    assert "2 forward kernels for sm_90a" in table and "no problems" in table
    assert [line.split()[0] for line in table.splitlines() if "HGMMA" in line and "0/0" in line] == ["False", "True"]  # lse
    assert main(["inspect", "--family", "forward", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [r["config"] for r in reports] == [repr(config) for config in SMALL]
    assert all(r["stack"] == r["local"] == 0 and r["problems"] == [] for r in reports)


def test_inspect_lists_problems(tools, capsys, monkeypatch):
    spills = ForwardConfig(tile_m=192, tile_n=128, head_dim=128)
    monkeypatch.setattr(plan, "shipped", lambda family="forward": [spills])
    assert main(["inspect"]) == 1
    assert f"PROBLEM {spills}: registers spill" in capsys.readouterr().out
    assert main(["inspect", "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert any("spill" in problem for problem in report["problems"])


def test_inspect_without_tools(capsys, monkeypatch):
    monkeypatch.setattr(toolkit, "places", lambda tool: [])
    monkeypatch.setattr(plan, "shipped", lambda family="forward": SMALL[:1])
    assert main(["inspect"]) == 2
    assert "pip install 'fa3[inspect]'" in capsys.readouterr().err


def test_inspect_of_an_unknown_family(capsys):
    assert main(["inspect", "--family", "sideways"]) == 2
    assert "forward" in capsys.readouterr().err


# demo and bench


def test_demo_without_a_gpu(tools):
    done = command("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO HOPPER GPU" in done.stdout
    assert "2 forward kernels" in done.stdout and "2 backward kernels" in done.stdout
    assert done.stdout.count("no problems") == 2
    assert "on the CPU" in done.stdout and "TOO LARGE" not in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if "ok" in line.split()] == DEMO_ROWS
    assert "\x1b" not in done.stdout


def test_demo_without_tools_still_compiles(capsys, monkeypatch):
    monkeypatch.setattr(toolkit, "places", lambda tool: [])
    assert demo.compile_and_read() is False
    printed = capsys.readouterr().out
    assert "pip install 'fa3[inspect]'" in printed and "4 of 4 kernels compile" in printed


DEMO_ROWS = [["forward", "full"], ["backward", "full"], ["forward", "causal"], ["backward", "causal"]]


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_demo_finds_wrong_results(factor, capsys, monkeypatch):
    right = demo.flash_attn_func
    monkeypatch.setattr(demo, "flash_attn_func", lambda *qkv, causal: right(*qkv, causal=causal) * factor)
    assert demo.check_on_cpu(seqlen=64) is True
    assert capsys.readouterr().out.count("TOO LARGE") == 4


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_demo_finds_one_wrong_gradient(wrong, capsys, monkeypatch):
    right = demo.flash_attn_func

    def attend(*qkv, causal):
        detached = [x.detach() if name == wrong else x for name, x in zip(("dq", "dk", "dv"), qkv)]
        lost = 0 * sum(x.sum() for x in qkv)  # so that there is a gradient, of zeros
        return right(*detached, causal=causal) + lost

    monkeypatch.setattr(demo, "flash_attn_func", attend)
    assert demo.check_on_cpu(seqlen=64) is True
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "TOO LARGE" in line]
    assert rows == [row for row in DEMO_ROWS if row[0] == "backward"]


def test_demo_compiles_what_its_calls_would_launch():
    shipped, shipped_backward = plan.shipped(), plan.shipped("backward")
    for causal in (False, True):
        config = plan.plan_forward(demo.problem(causal), plan.Device()).config
        assert config in shipped and config.head_dim == 128 and not config.lse
        config = plan.plan_backward(demo.problem(causal), plan.Device()).config
        assert config in shipped_backward and config.head_dim == 128 and not config.deterministic


@pytest.fixture
def pretend(monkeypatch):
    """The CPU passes for a small Hopper GPU on which every call takes 2 ms."""
    randn = torch.randn
    monkeypatch.setattr(hopper, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "randn", lambda shape, device, **options: randn(shape, **options | dict(generator=None)))
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(timing, "milliseconds", lambda calls: {name: (call(), 2.0)[1] for name, call in calls.items()})
    for name, size in dict(BATCH=1, SEQLEN=200, HEADS=2).items():
        monkeypatch.setattr(demo, name, size)
    monkeypatch.setattr(bench, "TOKENS", 512)
    monkeypatch.setattr(bench, "HIDDEN", 256)


def test_demo_on_a_gpu(pretend, capsys, monkeypatch):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "attention on pretended GPU: batch 1, seqlen 200, 2 heads, head_dim 128, bf16" in printed
    assert "NO HOPPER GPU" not in printed and "TOO LARGE" not in printed
    rows = [line for line in printed.splitlines() if "ok" in line.split()]
    assert [row.split()[:2] for row in rows] == DEMO_ROWS and all("from the disk cache" in row for row in rows)
    forward, backward = (rows[i].split()[-4:] for i in (0, 1))
    assert forward[::2] == backward[::2] == ["2.000", "2.000"]
    monkeypatch.setattr(demo, "flash_attn_func", lambda q, k, v, causal: q + 0 * (k + v))
    assert main(["demo"]) == 1
    assert capsys.readouterr().out.count("TOO LARGE") == 4


def test_bench_on_a_gpu(pretend, capsys):
    assert main(["bench", "--head-dim", "64", "128", "--seqlen", "128", "256", "--causal", "no"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if " full " in line]
    assert [row[:5] for row in rows] == [
        ["64", "full", "128", "4", "4"],
        ["64", "full", "256", "2", "4"],
        ["128", "full", "128", "4", "2"],
        ["128", "full", "256", "2", "2"],
    ]
    assert all(row[-1] == "1.00" for row in rows)


def test_calls_are_timed_in_turns(monkeypatch):
    """As many launches a burst as fill it; a median over the rounds, so that one slow round doesn't count."""
    bursts = []

    def burst(call, launches):
        bursts.append((call(), launches))
        return {"slow": 10.0, "fast": 0.001}[call()] * (50 if len(bursts) == 7 else 1)

    monkeypatch.setattr(timing, "burst", burst)
    assert timing.milliseconds({"a": lambda: "slow", "b": lambda: "fast"}) == {"a": 10.0, "b": 0.001}
    assert bursts[2:] == [("slow", 3), ("fast", 500)] * timing.ROUNDS


def test_bench_needs_a_gpu():
    done = command("bench")
    assert done.returncode == 2
    assert "needs a Hopper GPU" in done.stderr


def test_tflops_count_half_for_causal():
    q, k = torch.empty(4, 4096, 16, 128, device="meta"), torch.empty(4, 2048, 16, 128, device="meta")
    assert timing.tflops(q, q, False, 1.0) == pytest.approx(4 * 4096**2 * 128 * 16 * 4 / 1e9)
    assert timing.tflops(q, k, True, 1.0) == pytest.approx(4 * 4096 * 2048 * 128 * 16 * 4 / 2 / 1e9)
