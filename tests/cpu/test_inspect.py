"""Every shipped kernel, really compiled for Hopper and read: no spills, the expected instructions, as the config predicted.

And that the rule finds what it is there for, in reports made up by hand and in a config that does spill.
"""

import fcntl
import json
import os
import pickle
import re
from dataclasses import replace

import pytest

from fa3 import inspect, plan, toolkit
from fa3.inspect import expected_warp_mmas, expected_wgmmas, inspect_all, problems, read_report
from fa3.kernels.configs import BackwardConfig, ForwardConfig

SHIPPED = [config for family in plan.FAMILIES for config in plan.shipped(family)]
SPILLS = ForwardConfig(tile_m=192, tile_n=128, head_dim=128)
OTHERS = [  # configs that nobody ships, for the formulas
    SPILLS,
    ForwardConfig(tile_m=64, tile_n=96, pingpong=False, mask="causal"),
    ForwardConfig(head_dim=64, tile_m=192, tile_n=160, overlap=False, scheduler="single", lse=False),
    ForwardConfig(head_dim=256, tile_m=128, tile_n=64, overlap=False, scheduler="dynamic"),
    ForwardConfig(dtype="fp16", tile_n=176, mask="causal", scheduler="dynamic"),
    ForwardConfig(tile_n=96, scheduler="single"),
    ForwardConfig(mask="causal", presume=True),
    ForwardConfig(head_dim=64, tile_m=192, presume=True, scheduler="single", extra_k_stages=1),
    ForwardConfig(warp_specialised=False, pingpong=False, scheduler="persistent", q_in_registers=True),
    BackwardConfig(tile_m=48, mask="causal"),
    BackwardConfig(head_dim=64, tile_m=128),
    BackwardConfig(head_dim=64, tile_m=128, deterministic=True, mask="causal"),
    BackwardConfig(head_dim=256, tile_n=64, cluster=2, deterministic=True, mask="causal"),
]


@pytest.fixture(scope="session")
def reports(tools, tmp_path_factory):
    """{config: report} of all configs here, made once, in parallel processes; by one of pytest-xdist's workers for all."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "inspect.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "inspect.pickle").exists():
            configs = SHIPPED + OTHERS
            (shared / "inspect.pickle").write_bytes(pickle.dumps(dict(zip(configs, inspect_all(configs)))))
        return pickle.loads((shared / "inspect.pickle").read_bytes())


@pytest.mark.parametrize("config", SHIPPED, ids=repr)
def test_shipped_kernel(config, reports):
    report = reports[config]
    assert problems(report) == []
    # the same again, spelled out
    assert (report.stack, report.local, report.counts["LDL"], report.counts["STL"]) == (0, 0, 0, 0)
    expected = {"HGMMA": expected_wgmmas(config), "HMMA": expected_warp_mmas(config), "QGMMA": 0}
    assert {**expected, **report.matrix} == expected
    assert report.matrix["HGMMA"] > 0 and (report.matrix.get("HMMA", 0) > 0) == getattr(config, "presume", False)
    assert report.counts["UTMALDG"] >= 3 and report.counts["UTMASTG"] >= 1
    backward = config.family == "backward"
    assert (report.counts["REDG"] >= 8) == backward  # four numbers an instruction; who counts tiles, zeros or turns has a few more
    columns = config.tile_n if config.family == "forward" else config.tile_m
    assert report.counts["MUFU.EX2"] >= columns * 64 // 128  # S, once in the code at least
    assert report.registers == config.entry_registers
    assert report.setmaxnreg == config.registers
    assert report.shared == config.shared_memory
    assert report.threads == config.threads


@pytest.mark.parametrize("config", OTHERS[1:], ids=repr)
def test_other_kernels_are_as_predicted_too(config, reports):
    """But for spills: near the limits whether there are any is the compiler's to say."""
    assert [p for p in problems(reports[config]) if "spill" not in p and "serialised" not in p] == []


def test_a_config_that_spills_is_found_out(reports):
    found = "\n".join(problems(reports[SPILLS]))
    assert "spill" in found and "serialised" in found
    assert reports[SPILLS].stack > 0 and f"{reports[SPILLS].stack} bytes" in found


def test_reports_are_json(reports):
    for config, report in reports.items():
        data = json.loads(json.dumps(report.as_json()))
        assert data["config"] == repr(config)
        assert data["problems"] == problems(report)
        assert data["matrix"]["HGMMA"] > 0 and data["matrix"]["QGMMA"] == 0
        assert data["predicted"]["shared"] == config.shared_memory


# The rule, on reports made up by hand.


@pytest.fixture
def healthy():
    config = ForwardConfig()
    return read_report(config, usage=USAGE, sass=sass(config), ptx=PTX, host=host(config.shared_memory))


USAGE = " Function kernel_cutlass_kernel:\n  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1184 TEXTURE:0\n"
PTX = ".visible .entry kernel(\n)\n.reqntid 384, 1, 1\n.minnctapersm 1\n"
HOST = """
  llvm.func @other() {
    %2 = llvm.mlir.constant(7 : i64) : i64
  }
  llvm.func @launch() {
    %2 = llvm.mlir.constant(BYTES : i64) : i64
    %8 = llvm.getelementptr %3[0, 2] : (!llvm.ptr) -> !llvm.ptr, !llvm.array<16 x i64>
    %9 = llvm.getelementptr %5[0, 2] : (!llvm.ptr) -> !llvm.ptr, LAUNCH
    llvm.store %2, %9 : i64, !llvm.ptr
  }
  llvm.mlir.global internal constant @printfFormat_0("shared memory usage in 'x' may exceed available memory set in kernel launch.")
"""


def host(shared):
    return HOST.replace("BYTES", str(shared)).replace("LAUNCH", inspect.LAUNCH)


def sass(config):
    lines = ["S2R R0, SR_TID.X", "@P0 BRA `(.L_x_0)", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "@!UP1 UTMALDG.4D [UR8], [UR16], desc[URZ]"]
    lines += ["USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0"]
    lines += ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24"] * expected_wgmmas(config)
    lines += ["WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R2", "R2P PR, R12, 0x7f", "UTMASTG.4D [UR4], [UR8]", "EXIT"]
    return "".join(f"        /*{16 * i:04x}*/   {line} ;\n.L_x_{i}:\n" for i, line in enumerate(lines))


def test_healthy_report(healthy):
    assert problems(healthy) == []
    assert (healthy.registers, healthy.setmaxnreg, healthy.threads) == (168, (24, 240), 384)
    assert healthy.shared == ForwardConfig().shared_memory
    assert healthy.matrix == {"HGMMA": 48, "QGMMA": 0}
    assert healthy.counts == {
        "UTMALDG": 1, "UTMASTG": 1, "REDG": 0, "MUFU.EX2": 1, "LDL": 0, "STL": 0, "USETMAXREG": 2, "WARPGROUP.DEPBAR": 1, "R2P": 1,
    }  # fmt: skip
    assert healthy.instructions == 10 + 48


def with_count(name, count):
    return lambda r: replace(r, counts={**r.counts, name: count})


def with_matrix(**counts):
    return lambda r: replace(r, matrix={**r.matrix, **counts})


BROKEN = {
    "stack": (lambda r: replace(r, stack=224), "spill: 224 bytes of stack"),
    "local": (lambda r: replace(r, local=16), "spill: .*16 of local memory"),
    "loads from local memory": (with_count("LDL", 3), r"spill: .*3 loads \(LDL\)"),
    "stores to local memory": (with_count("STL", 5), r"spill: .*5 stores \(STL\)"),
    "warp-level matrix instruction": (with_matrix(HMMA=8), "8 HMMA, expected 0"),
    "fp8 matrix instruction": (with_matrix(QGMMA=1), "1 QGMMA, expected 0"),
    "one WGMMA too few": (with_matrix(HGMMA=47), "47 HGMMA, expected 48"),
    "no WGMMA": (with_matrix(HGMMA=0), "0 HGMMA, expected 48"),
    "serialised": (with_count("WARPGROUP.DEPBAR", 48), "serialised: 48 waits .* for 48 HGMMA"),
    "half serialised": (with_count("WARPGROUP.DEPBAR", 24), "serialised: 24 waits"),
    "no TMA load": (with_count("UTMALDG", 0), "no TMA load"),
    "no TMA store": (with_count("UTMASTG", 0), "no TMA store"),
    "entry registers": (lambda r: replace(r, registers=128), "128 registers at entry, the config predicted 168"),
    "setmaxnreg": (lambda r: replace(r, setmaxnreg=(24, 232)), r"\[24, 232\] registers, the config predicted \[24, 240\]"),
    "no setmaxnreg": (lambda r: replace(r, setmaxnreg=()), r"setmaxnreg to \[\] registers"),
    "threads": (lambda r: replace(r, threads=512), "512 threads, the config predicted 384"),
    "shared memory": (lambda r: replace(r, shared=1024), "asks for 1024 bytes .*, the config predicted"),
    "shared memory not found": (lambda r: replace(r, shared=None), "asks for None bytes"),
    "static shared memory": (lambda r: replace(r, shared_static=5120), "5120 bytes of static shared memory"),
    "shared memory overrun": (lambda r: replace(r, shared_fits=False), "allocates more shared memory"),
}


def test_several_kernels_are_read_as_one_call():
    config = BackwardConfig(head_dim=256, tile_n=64, cluster=2)
    small = USAGE.replace("REG:168", "REG:32").replace("STACK:0", "STACK:8")
    ptx = PTX + PTX.replace("384", "256")
    both = host(config.shared_memory) + host(8192)
    report = read_report(config, usage=USAGE + small, sass=sass(config), ptx=ptx, host=both)
    assert (report.registers, report.threads, report.shared) == (168, 384, config.shared_memory)
    assert [re.sub(r":.*", "", p) for p in problems(report)] == ["registers spill", "no addition to memory (REDG)"]


@pytest.mark.parametrize("name", BROKEN)
def test_problem_is_found(name, healthy):
    breaks, says = BROKEN[name]
    (found,) = problems(breaks(healthy))
    assert re.search(says, found), found


def test_a_launch_with_too_little_shared_memory_is_read():
    """The DSL's own check stays in the host code when the kernel's allocations exceed what the launch asks for."""
    text = host(1024)
    assert not inspect.overruns(text)
    assert inspect.overruns(text.replace("%8 =", "%7 = llvm.mlir.addressof @printfFormat_0 : !llvm.ptr\n    %8 ="))
    assert inspect.launched_shared_memory("llvm.func @nothing() {}") is None


class Cramped(ForwardConfig):
    """Asks for less shared memory than its tiles take."""

    @property
    def shared_memory(self):
        return super().shared_memory - 8192


def test_too_little_shared_memory_is_found_in_a_real_kernel(tools):
    (found,) = problems(inspect.inspect(Cramped(head_dim=64, tile_n=32)))
    assert "allocates more shared memory" in found


# The tools.


def test_missing_tool_is_an_error_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(toolkit, "places", lambda tool: [])
    with pytest.raises(toolkit.ToolError, match=r"cuobjdump was not found.*pip install 'fa3\[inspect\]'"):
        toolkit.read("nvdisasm", "-c", "x.cubin")


def tool(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_tool_too_old_is_passed_over(monkeypatch, tmp_path):
    old = tool(tmp_path / "old", "echo 'nvdisasm fatal: unknown ELF version' >&2; exit 1")
    new = tool(tmp_path / "new", 'echo "read $2"')
    monkeypatch.setattr(toolkit, "places", lambda name: [old, new])
    assert toolkit.read("nvdisasm", "-c", "x.cubin") == "read x.cubin\n"
    monkeypatch.setattr(toolkit, "places", lambda name: [old])
    with pytest.raises(toolkit.ToolError, match=r"pip install 'fa3\[inspect\]'\n.*old: nvdisasm fatal: unknown ELF version"):
        toolkit.read("nvdisasm", "-c", "x.cubin")


def test_tools_are_found_on_the_path_and_in_cuda_home(monkeypatch, tmp_path):
    on_path = tool(tmp_path / "bin" / "nvdisasm", "echo 'Cuda compilation tools, release 13.9, V13.9.1'")
    at_home = tool(tmp_path / "cuda" / "bin" / "nvdisasm", "exit 1")
    monkeypatch.setattr(toolkit, "packages", lambda name: [])
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolkit.places("nvdisasm")[:2] == [on_path, at_home]
    assert toolkit.version(on_path) == "13.9" and toolkit.version(at_home) is None


def test_tools_of_packages_come_first(monkeypatch, tmp_path):
    found = {
        "nvidia": tool(tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm", "exit 0"),
        "triton": tool(tmp_path / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm", "exit 0"),
    }
    monkeypatch.setattr(toolkit, "packages", lambda name: [tmp_path / name])
    assert toolkit.places("nvdisasm")[:2] == list(found.values())


def test_a_config_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"Unheard\(.*head_dim=64.*\) can't be inspected"):
        inspect_all([Unheard(head_dim=64, tile_n=32)], jobs=1)


class Unheard(ForwardConfig):
    """Of a family for which there is no kernel."""

    family = "unheard of"
