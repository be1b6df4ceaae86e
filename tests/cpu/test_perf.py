"""perf/ without a GPU: the suites, the timing loop on a fake device, the files, compare, table, report, the command line."""

import copy
import dataclasses
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # perf is run from the repository root, not installed

from perf import PerfError, once, peers, report, results, runner, stamps, suites, sweep, table, timing, variants  # noqa: E402
from perf.__main__ import main, parser  # noqa: E402
from perf.suites import Point  # noqa: E402
from perf.timing import CudaDevice  # noqa: E402

from fa3 import attention, jit, plan, reference  # noqa: E402
from fa3.kernels.configs import BackwardConfig, ForwardConfig  # noqa: E402

SQUARE = Point(64, False, 1, 512, 512, 4, 4)
CAUSAL = Point(64, True, 2, 1024, 1024, 4, 4)
BACKWARD = dataclasses.replace(SQUARE, direction="bwd")


# ---------------------------------------------------------------- suites


def visible(point):
    """The (query, key) pairs of one head, counted one by one."""
    offset = point.seqlen_k - point.seqlen_q
    return sum(
        1 for i in range(point.seqlen_q) for j in range(point.seqlen_k) if not point.causal or j <= i + offset
    )


def test_paper_grid():
    points = suites.SUITES["paper"]
    assert len(points) == len(set(points)) == 36
    for point in points:
        assert point.batch * point.seqlen_q == 16384 and point.seqlen_q == point.seqlen_k
        assert point.heads * point.head_dim == 2048 and point.heads == point.heads_kv
    assert {p.head_dim for p in points} == {64, 128, 256}
    assert {p.seqlen_q for p in points} == {512, 1024, 2048, 4096, 8192, 16384}
    assert Counter(p.causal for p in points) == {True: 18, False: 18}


def test_paper_grid_is_the_targets_grid():
    targets = table.targets()
    assert {point for point in targets if point.direction == "fwd"} == set(suites.PAPER)
    assert {point for point in targets if point.direction == "bwd"} == set(suites.select("paper", direction="bwd"))
    assert targets[Point(64, False, 32, 512, 512, 32, 32)] == 1.221  # from the file


@pytest.mark.parametrize("q, k", [(1, 1), (1, 7), (5, 9), (9, 5), (7, 1), (64, 65), (65, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_against_counting(q, k, causal):
    point = Point(8, causal, 3, q, k, 6, 2)
    pairs = visible(point)
    if causal and q == k:
        assert abs(point.visible_pairs() - pairs) == q / 2  # the papers' half leaves half of the diagonal out
        pairs = q * k / 2
    assert point.flops() == 4 * pairs * 8 * 6 * 3


def test_flops_of_the_papers_points():
    assert Point(128, False, 1, 16384, 16384, 16, 16).flops() == 4 * 16384**2 * 128 * 16
    assert Point(128, True, 1, 16384, 16384, 16, 16).flops() == 2 * 16384**2 * 128 * 16
    assert Point(128, False, 1, 512, 512, 16, 16, direction="bwd").flops() == 2.5 * 4 * 512**2 * 128 * 16
    assert Point(128, True, 1, 512, 512, 16, 16, direction="bwd").flops() == 2.5 * 2 * 512**2 * 128 * 16


def test_tensor_bytes():
    assert {point.tensor_bytes() for point in suites.PAPER} == {4 * 16384 * 2048 * 2}
    assert Point(128, True, 1, 8, 4, 6, 2).tensor_bytes() == 2 * (8 * 6 + 4 * 2) * 128 * 2
    assert {point.tensor_bytes() for point in suites.select("paper", direction="bwd")} == {8 * 16384 * 2048 * 2}


def test_shapes_suite_has_what_it_is_for():
    shapes = suites.SUITES["shapes"]
    assert len(shapes) == len(set(shapes))
    gqa = [p for p in suites.GQA if p.heads != p.heads_kv]
    assert {(p.heads, p.heads_kv) for p in gqa} == {(32, 8), (64, 8)}
    assert {p.batch for p in gqa} == {1, 2, 4, 8} and {1024, 131072} <= {p.seqlen_q for p in gqa}
    assert all(p.head_dim == 128 and p.causal for p in gqa)
    assert {1000, 2047, 4097, 5000, 33333} <= {p.seqlen_q for p in suites.ODD_LENGTHS}
    chunked = suites.CHUNKED_PREFILL
    assert {(p.seqlen_q, p.seqlen_k) for p in chunked} == {(s, 32768) for s in (128, 256, 512, 1024)}
    held = [p for p in shapes if suites.held_against(p) is not None]
    assert all(suites.held_against(p) in shapes for p in held)  # every ratio has its other half in the same run
    assert len(held) == 24 + 30


def test_filters_are_honoured():
    points = suites.select("paper", head_dims=[128], causal=True, seqlens=[512, 4096], dtypes=["fp16", "bf16"])
    assert {(p.head_dim, p.causal, p.seqlen_q, p.dtype) for p in points} == {
        (128, True, s, t) for s in (512, 4096) for t in ("fp16", "bf16")
    }
    assert len(suites.select("paper", causal=False)) == 18
    with pytest.raises(PerfError, match=r"--head-dim.*\[96\].*\[64, 128, 256\]"):
        suites.select("paper", head_dims=[128, 96])
    with pytest.raises(PerfError, match="no point"):
        suites.select("gqa", causal=False)


@pytest.mark.parametrize("wrong", [{"heads_kv": 3}, {"batch": 0}, {"seqlen_q": 1.0}, {"dtype": "fp8"}, {"causal": 1}])
def test_impossible_points_are_refused(wrong):
    fields = dict(head_dim=64, causal=True, batch=1, seqlen_q=8, seqlen_k=8, heads=4, heads_kv=4)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Point(**{**fields, **wrong})


# ---------------------------------------------------------------- timing and the loop, on a fake device


class Call:
    """A provider's callable: so many ms of GPU and host time a launch, and an output."""

    def __init__(self, gpu_ms, host_ms=0.01, output=1.0, fails_after=None):
        self.gpu_ms, self.host_ms, self.output, self.fails_after = gpu_ms, host_ms, output, fails_after
        self.launched = 0

    def __call__(self):
        self.launched += 1
        if self.fails_after is not None and self.launched > self.fails_after:
            raise RuntimeError("no kernel image\nsecond line")
        return self.output


class FakeDevice:
    """Its clock counts what the calls say they cost."""

    def __init__(self, jitter=0.0):
        self.bursts = []  # (call, launches, warmup, head_start_ms)
        self.jitter = jitter
        self.rng = random.Random(0)
        self.lost = False

    def tensors(self, point):
        return ("q", "k", "v")

    def gemm(self, dtype):
        return Call({"bf16": 1.5, "fp16": 1.6}[dtype])

    def burst(self, call, launches, warmup=0, head_start_ms=0.0):
        for _ in range(warmup + launches):
            call()
        self.bursts.append((call, launches, warmup, head_start_ms))
        factor = 1 + self.rng.uniform(-self.jitter, self.jitter)
        return timing.Burst(call.gpu_ms * launches * factor, call.host_ms * launches)

    def enqueue(self, call, calls):
        for _ in range(calls):
            call()
        return call.host_ms * calls

    def capture(self, call, calls):
        call()
        return Call(call.gpu_ms * calls, 0.005)

    def relative_difference(self, output, reference):
        return abs(output - reference) / abs(reference)

    def synchronize(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def release(self):
        pass


class Fake(peers.Provider):
    def __init__(self, name, make_call, config=None):
        self.name, self.make_call, self.config = name, make_call, config

    def available(self):
        return None

    def version(self):
        return "1"

    def make(self, point, tensors):
        call = self.make_call(point)
        if isinstance(call, Exception):
            raise call
        return call

    def config_line(self, point, tensors):
        return self.config


def empty_run(suite="paper", rounds=5, dtypes=("bf16",)):
    return {
        "schema": results.SCHEMA,
        "suite": suite,
        "direction": "fwd",
        "date": "2026-11-22T10:00:00+00:00",
        "complete": False,
        "machine": {"gpu": "NVIDIA H200", "sms": 132},
        "versions": {"torch": "2.11.0"},
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "protocol": {"rounds": rounds, "burst_ms": 25.0, "seed": 7, "dtypes": list(dtypes)},
        "left_out": [],
        "gemm": None,
        "records": [],
    }


def bench(tmp_path, providers, device=None, suite="paper", points=(SQUARE, CAUSAL)):
    """Runs the loop; returns the file's contents and what was printed."""
    output = io.StringIO()
    data = empty_run(suite)
    path = tmp_path / "run.json"
    runner.Bench(data, path, providers, device or FakeDevice(), Console(file=output, width=200)).measure(list(points))
    return results.read(path), output.getvalue()


@pytest.mark.parametrize("gpu_ms, launches, warmup", [(1.0, 25, 20), (0.25, 100, 80), (9.0, 3, 2), (400.0, 3, 1), (0.001, 500, 500)])
def test_a_burst_is_as_long_for_everyone(gpu_ms, launches, warmup):
    turn = timing.plan_turn(timing.Runnable(Call(gpu_ms, 0.0001), nullcontext), FakeDevice())
    assert turn == (launches, warmup, 0.0)


def test_a_shorter_burst_has_a_shorter_warm_up():
    runnable = timing.Runnable(Call(0.5, 0.0001), nullcontext)
    assert timing.plan_turn(runnable, FakeDevice(), burst_ms=10.0) == (20, 16, 0.0)
    times = timing.gpu_times({"fa3": runnable}, FakeDevice(), 3, random.Random(0), None, burst_ms=10.0)
    assert times == {"fa3": ([0.5] * 3, 20)}


def test_a_head_start_covers_a_slow_host():
    turn = timing.plan_turn(timing.Runnable(Call(0.1, 0.15), nullcontext), FakeDevice())
    total = turn.launches + turn.warmup
    assert turn.head_start_ms >= total * (0.15 - 0.1)  # by then everything is enqueued that the GPU would wait for
    assert timing.plan_turn(timing.Runnable(Call(0.1, 0.05), nullcontext), FakeDevice()).head_start_ms == 0


def test_a_burst_behind_a_head_start_fits_into_the_queue():
    slow_host = Call(0.02, 0.1)
    for kernels, most in ((1, 500), (2, 250), (8, 62)):
        turn = timing.plan_turn(timing.Runnable(slow_host, nullcontext, kernels), FakeDevice())
        assert (turn.launches, turn.warmup) == (most, most)  # 25 ms would be 1250
        assert (turn.launches + turn.warmup) * kernels <= 1000
        assert turn.head_start_ms >= 2 * most * (0.1 - 0.02)
    turn = timing.plan_turn(timing.Runnable(Call(0.4, 0.1), nullcontext, 8), FakeDevice())
    assert turn == (62, 50, 0.0)  # who never runs empty may wait for the queue


class FakeTorch:
    """What CudaDevice calls in torch.cuda, writing down the order; its GPU time is what has been launched between events."""

    def __init__(self):
        self.cuda = self
        self.log = []

    def Event(self, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace()
        event.record = lambda: (self.log.append("record"), setattr(event, "at", self.log.count("call")))
        event.synchronize = lambda: self.log.append("wait")
        event.elapsed_time = lambda end: float(end.at - event.at)
        return event

    def _sleep(self, cycles):
        self.log.append("spin" if cycles > 0 else "no spin")

    def synchronize(self):
        self.log.append("wait")

    def clock(self):
        self.log.append("clock")
        return self.log.count("call") * 1e-3  # every call takes a millisecond


def test_cuda_device_times_what_it_should(monkeypatch):
    pytest.importorskip("torch")
    device = timing.CudaDevice()
    device.torch = torch = FakeTorch()
    monkeypatch.setattr(timing.time, "perf_counter", torch.clock)

    def call():
        torch.log.append("call")

    assert device.burst(call, 3, warmup=2, head_start_ms=1.0) == pytest.approx((3.0, 3.0))
    assert torch.log == ["spin", "call", "call", "record", "clock", "call", "call", "call", "clock", "record", "wait"]
    torch.log.clear()
    assert device.burst(call, 1).gpu_ms == 1.0 and "spin" not in torch.log
    torch.log.clear()
    assert device.enqueue(call, 2) == pytest.approx(2.0)
    assert torch.log == ["wait", "clock", "call", "call", "clock", "wait"]  # the clock stops before the GPU is waited for


def cpu_tensors(point):
    device = CudaDevice()
    device.torch = types.SimpleNamespace(randn=lambda shape, device, dtype: torch.randn(shape, dtype=dtype))
    return device.tensors(point)


def test_tensors_of_a_point():
    point = Point(64, True, 2, 24, 16, 4, 2, "fp16")
    q, k, v, dout = cpu_tensors(point)
    assert dout is None and not (q.requires_grad or k.requires_grad or v.requires_grad)
    q, k, v, dout = cpu_tensors(dataclasses.replace(point, direction="bwd"))
    assert q.requires_grad and k.requires_grad and v.requires_grad and not dout.requires_grad
    assert q.shape == dout.shape == (2, 24, 4, 64) and k.shape == v.shape == (2, 16, 2, 64)
    assert {tensor.dtype for tensor in (q, k, v, dout)} == {torch.float16}


def test_providers_take_turns_in_changing_order():
    orders, turns = [], []

    def turn(name):
        turns.append(name)
        return float(len(turns))

    samples = timing.take_turns(["a", "b", "c"], 30, random.Random(1), turn, pytest.fail)
    for begin in range(0, 90, 3):
        orders.append(tuple(turns[begin : begin + 3]))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)  # everyone once a round
    assert len(set(orders)) == 6
    assert samples["a"] == [float(number) for number, name in enumerate(turns, 1) if name == "a"]


def test_who_fails_takes_no_further_turn():
    calls, failures = Counter(), []

    def turn(name):
        calls[name] += 1
        if name == "b" and calls["b"] == 3:
            raise RuntimeError("broke")
        return 1.0

    samples = timing.take_turns(["a", "b"], 5, random.Random(1), turn, lambda name, error: failures.append((name, str(error))))
    assert samples == {"a": [1.0] * 5}
    assert calls == {"a": 5, "b": 3} and failures == [("b", "broke")]


def test_dtypes_of_a_problem_take_turns(tmp_path):
    """In every round all of a problem's calls come before the next round's, whichever dtype they are of."""
    other = dataclasses.replace(SQUARE, seqlen_q=2 * SQUARE.seqlen_q, seqlen_k=2 * SQUARE.seqlen_k)
    points = [dataclasses.replace(point, dtype=dtype) for dtype in ("bf16", "fp16") for point in (SQUARE, other)]
    gpu_ms = {point: 0.5 + 0.25 * number for number, point in enumerate(points)}
    device = FakeDevice()
    data, _ = bench(tmp_path, [Fake("fa3", lambda p: Call(gpu_ms[p]))], points=points, device=device)
    turns = [call.gpu_ms for call, _, warmup, _ in device.bursts if warmup]
    together = [{0.5, 1.0, 1.5, 1.6}, {0.75, 1.25, 1.5, 1.6}]  # with the GEMMs of both dtypes
    rounds = len(turns) // 8
    assert [set(turns[i : i + 4]) for i in range(0, len(turns), 4)] == [each for each in together for _ in range(rounds)]
    for point, measured in results.by_problem(data).items():
        assert measured["fa3"]["median_ms"] == pytest.approx(gpu_ms[point[1]])
    lines = [line.split()[0] for line in shown(data).splitlines() if line.startswith((" bf16", " fp16"))]
    assert lines == ["bf16"] * 2 + ["fp16"] * 2


def test_fp16_points_meet_an_fp16_gemm(tmp_path):
    points = [SQUARE, dataclasses.replace(SQUARE, dtype="fp16")]
    data, _ = bench(tmp_path, [Fake("fa3", lambda p: Call(0.5)), Fake("cudnn", lambda p: Call(1.0))], points=points)
    for key, dtype, gpu_ms in (("gemm", "bf16", 1.5), ("gemm_fp16", "fp16", 1.6)):
        assert data[key]["dtype"] == dtype and data[key]["median_ms"] == pytest.approx(gpu_ms)
        assert f"{dtype} GEMM 8192^3 in this run: {data[key]['tflops']:.0f} TFLOP/s" in shown(data)
    data["gemm_fp16"]["median_ms"] = 0
    with pytest.raises(ValueError, match="gemm_fp16.median_ms must be a positive number"):
        results.check(data)


def test_a_run_measures_what_the_clock_says(tmp_path):
    device = FakeDevice(jitter=0.02)
    providers = [Fake("fa3", lambda p: Call(0.5), config="tile 128x176"), Fake("cudnn", lambda p: Call(1.0))]
    data, printed = bench(tmp_path, providers, device)
    assert data["complete"] and data["left_out"] == []
    assert [results.point_of(record) for record in data["records"]] == [SQUARE, CAUSAL]
    for record in data["records"]:
        assert list(record["results"]) == ["fa3", "cudnn"]
        for name, gpu_ms in (("fa3", 0.5), ("cudnn", 1.0)):
            measured = record["results"][name]
            assert len(measured["samples_ms"]) == 5
            assert measured["median_ms"] == sorted(measured["samples_ms"])[2] == pytest.approx(gpu_ms, rel=0.02)
            assert measured["spread"] == pytest.approx((max(measured["samples_ms"]) - min(measured["samples_ms"])) / measured["median_ms"])
            assert 0 < measured["spread"] <= 0.041
            assert measured["tflops"] == pytest.approx(record["flops"] / measured["median_ms"] / 1e9)
        assert record["results"]["fa3"]["config"] == "tile 128x176" and "config" not in record["results"]["cudnn"]
    assert data["gemm"]["tflops"] == pytest.approx(2 * 8192**3 / 1.5e-3 / 1e12, rel=0.02)
    assert len(data["gemm"]["samples_ms"]) == 2 * 5
    timed = [call.gpu_ms for call, _, warmup, _ in device.bursts if warmup]
    assert sorted(timed[:3]) == [0.5, 1.0, 1.5] and timed[:15] != 5 * timed[:3]  # it takes turns with the providers, in no fixed order
    assert "gemm_fp16" not in data
    fa3 = [launches for call, launches, warmup, _ in device.bursts if call.gpu_ms == 0.5 and warmup]
    assert len(fa3) == 10 and all(launches * 0.5 == pytest.approx(25, rel=0.03) for launches in fa3)
    assert "2/2 points" in printed


def test_who_raises_is_left_out_with_the_reason(tmp_path):
    def fa4(point):
        return RuntimeError("no [bold] kernel\nlong story") if point.causal else Call(1.0)

    providers = [Fake("fa3", lambda p: Call(0.5)), Fake("fa4", fa4), Fake("fa2", lambda p: Call(1.0, fails_after=40))]
    data, printed = bench(tmp_path, providers)
    assert [sorted(record["results"]) for record in data["records"]] == [["fa3", "fa4"], ["fa3"]]
    assert {"provider": "fa4", "point": CAUSAL.label(), "reason": "RuntimeError: no [bold] kernel"} in data["left_out"]
    assert [left["point"] for left in data["left_out"] if left["provider"] == "fa2"] == [SQUARE.label(), CAUSAL.label()]
    assert f"left out: fa4 at {CAUSAL.label()}: RuntimeError: no [bold] kernel" in printed
    assert printed.count("left out: fa2") == 1  # the same reason is told once; the file has it at every point


@pytest.mark.parametrize("output, differs", [(1.001, False), (1.5, True), (float("nan"), True)])
def test_a_wrong_output_is_flagged(tmp_path, output, differs):
    data, printed = bench(tmp_path, [Fake("fa3", lambda p: Call(0.5, output=(output, None))), Fake("cudnn", lambda p: Call(1.0))])
    measured = data["records"][0]["results"]
    assert ("differs" in measured["fa3"]) is differs and "differs" not in measured["cudnn"]
    assert ("WRONG?" in printed) is differs
    shown = io.StringIO()
    table.show(data, Console(file=shown))
    assert ("! the output of fa3 differs from that of cudnn" in shown.getvalue()) is differs


@pytest.mark.parametrize(
    "gradients, output",
    [
        ((1.001, 1, 1), None), ((1, 1, 1.5), "dv"), ((1.1, 1.2, 1), "dk"),
        ((1.5, float("nan"), 1), "dk"), ((float("nan"), 9, 1), "dq"),
    ],  # fmt: skip
)
def test_a_wrong_gradient_is_flagged_by_name(tmp_path, gradients, output):
    right = (1.0, 1.0, 1.0)
    providers = [Fake("fa3", lambda p: Call(0.5, output=gradients)), Fake("cudnn", lambda p: Call(1.0, output=right))]
    data, printed = bench(tmp_path, providers, points=[BACKWARD])
    differs = data["records"][0]["results"]["fa3"].get("differs")
    assert (differs and differs["output"]) == output
    assert (f"{output} of fa3 differs from that of cudnn" in printed) is (output is not None)
    assert (f"! {output} of fa3 differs from that of cudnn" in shown(data)) is (output is not None)


def test_a_backward_call_is_many_kernels(tmp_path):
    device = FakeDevice()
    bench(tmp_path, [Fake("fa3", lambda p: Call(0.02, host_ms=0.1, output=(1.0, 1.0, 1.0)))], device, points=[BACKWARD])
    bursts = [launches for call, launches, warmup, _ in device.bursts if call.gpu_ms == 0.02 and warmup]
    assert bursts == [62] * 5


def test_a_lost_gpu_ends_the_run_and_keeps_what_was_measured(tmp_path):
    device = FakeDevice()

    def fa3(point):
        device.lost = point.causal
        return RuntimeError("illegal memory access") if point.causal else Call(0.5)

    data, printed = bench(tmp_path, [Fake("fa3", fa3)], device)
    assert not data["complete"] and len(data["records"]) == 1
    assert "broke off: after fa3" in printed


def test_host_suite(tmp_path):
    providers = [Fake("fa3", lambda p: Call(0.004, host_ms=0.017)), Fake("cudnn", lambda p: Call(0.006, host_ms=0.051))]
    data, _ = bench(tmp_path, providers, suite="host", points=suites.HOST[:1])
    host, graph = data["records"]
    assert (host["measure"], graph["measure"]) == ("host", "graph") and data["gemm"] is None
    assert host["results"]["fa3"]["median_ms"] == pytest.approx(0.017) and len(host["results"]["fa3"]["samples_ms"]) == 20
    assert host["results"]["cudnn"]["median_ms"] == pytest.approx(0.051)
    assert graph["results"]["fa3"]["median_ms"] == pytest.approx(0.004)  # a call's share of the graph
    assert "tflops" not in host["results"]["fa3"]
    shown = io.StringIO()
    table.show(data, Console(file=shown))
    assert "17.0" in shown.getvalue() and "3.000" in shown.getvalue()


def test_host_suite_in_the_backward_direction_has_no_graph(tmp_path):
    provider = Fake("fa3", lambda p: Call(0.004, host_ms=0.017, output=(1.0, 1.0, 1.0)))
    data, _ = bench(tmp_path, [provider], suite="host", points=suites.select("host", direction="bwd"))
    assert [record["measure"] for record in data["records"]] == ["host", "host"]


# ---------------------------------------------------------------- peers


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert "pip install flash-attn-4" in peers.PROVIDERS["fa4"].available()
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", types.ModuleType("fa3_fwd_interface"))
    assert "no flash_attn_func" in peers.PROVIDERS["fa3-pypi"].available()


def test_package_calls_flash_attn_func(monkeypatch):
    stub = types.ModuleType("fa3")
    stub.flash_attn_func = lambda q, k, v, *, causal: (q, k, v, causal)
    monkeypatch.setitem(sys.modules, "fa3", stub)
    provider = peers.PROVIDERS["fa3"]
    tensors = peers.Tensors("q", "k", "v")
    assert provider.available() is None
    assert provider.make(CAUSAL, tensors)() == ("q", "k", "v", True)
    assert provider.config_line(CAUSAL, tensors) is None
    stub.explain = lambda q, k, v, *, causal: f"{q}{k}{v} causal={causal}"
    assert provider.config_line(SQUARE, tensors) == "qkv causal=False"


@pytest.mark.parametrize("provider, q, k", [("cudnn", 48, 48), ("fa2", 48, 48), ("fa2", 16, 48)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_computes_the_same_problem(provider, q, k, causal):
    """On the CPU, so by another backend; layout, mask alignment and grouped heads are what is checked."""
    torch = pytest.importorskip("torch")
    point = Point(64, causal, 2, q, k, 4, 2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, q, 4, 64), (2, k, 2, 64), (2, k, 2, 64)]
    tensors = peers.Tensors(*(torch.randn(shape, generator=generator) for shape in shapes))
    keys, values = (tensor.repeat_interleave(2, dim=2) for tensor in tensors[1:3])
    scores = torch.einsum("bqhd,bkhd->bhqk", tensors.q, keys) / 8
    if causal:
        scores += torch.full((q, k), float("-inf")).triu(k - q + 1)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    got = peers.PROVIDERS[provider].make(point, tensors)()
    assert timing.CudaDevice().relative_difference(got, expected) < 1e-5


@pytest.mark.parametrize("provider", ["fa3", "cudnn", "fa2"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_backward_gives_the_gradients_and_can_be_repeated(provider, causal, monkeypatch):
    """On the CPU: torch's other backends, and a stub that returns a tuple, as flash-attn-4 does."""
    monkeypatch.setattr(peers.ScaledDotProductAttention, "context", lambda self: nullcontext())
    stub, forwards = types.ModuleType("fa3"), []
    stub.flash_attn_func = lambda q, k, v, *, causal: forwards.append(1) or reference.attention(q, k, v, causal=causal)
    if provider == "fa3":
        monkeypatch.setitem(sys.modules, "fa3", stub)
    point = Point(64, causal, 2, 48, 48, 4, 2, direction="bwd")
    inputs = [torch.randn(2, 48, heads, 64, requires_grad=True) for heads in (4, 2, 2)]
    tensors = peers.Tensors(*inputs, torch.randn(2, 48, 4, 64))
    expected = torch.autograd.grad(reference.attention(*inputs, causal=causal)[0], inputs, tensors.dout)
    call = peers.PROVIDERS[provider].make(point, tensors)
    for _ in range(2):
        for got, wanted in zip(call(), expected, strict=True):
            assert got.shape == wanted.shape
            assert timing.CudaDevice().relative_difference(got, wanted) < 1e-5
    assert forwards == [1] * (provider == "fa3")  # it ran before, and is no part of the call
    assert all(tensor.grad is None for tensor in inputs)


def test_a_backward_runs_its_forward_in_the_providers_context():
    class Peer(peers.Provider):
        held = False

        @contextmanager
        def context(self):
            self.held = True
            yield
            self.held = False

        def forward(self, point, tensors):
            return lambda: tensors.q * tensors.k * tensors.v if self.held else pytest.fail("outside of the context")

    tensors = peers.Tensors(*(torch.tensor(number, requires_grad=True) for number in (2.0, 3.0, 5.0)), torch.tensor(10.0))
    assert Peer().make(BACKWARD, tensors)() == (150, 100, 60)


def test_a_forward_only_package_is_left_out_of_the_backward(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", types.SimpleNamespace(flash_attn_func=pytest.fail))
    with pytest.raises(peers.Unsupported, match="no backward"):
        peers.PROVIDERS["fa3-pypi"].make(BACKWARD, peers.Tensors("q", "k", "v", "dout"))
    providers = [Fake("fa3", lambda p: Call(0.5, output=(1.0, 1.0, 1.0))), peers.PROVIDERS["fa3-pypi"]]
    data, printed = bench(tmp_path, providers, points=[BACKWARD])
    assert list(data["records"][0]["results"]) == ["fa3"] and "no backward" in printed


def test_the_backwards_config_line_is_its_plan(monkeypatch):
    monkeypatch.setattr(attention, "device_of", lambda device: plan.Device())
    point = Point(128, True, 1, 512, 512, 16, 16, "fp16", "bwd")
    line = peers.PROVIDERS["fa3"].config_line(point, peers.Tensors(*[types.SimpleNamespace(device=None)] * 4))
    assert line.startswith("BackwardConfig(dtype='fp16', head_dim=128, mask='causal'") and "deterministic=False" in line
    line = peers.PROVIDERS["fa3-deterministic"].config_line(point, peers.Tensors(*[types.SimpleNamespace(device=None)] * 4))
    assert "deterministic=True" in line


def test_the_deterministic_backward_is_measured_where_it_is_asked_for(monkeypatch):
    stub, asked = types.ModuleType("fa3"), []
    stub.flash_attn_func = lambda q, k, v, **options: asked.append(options) or q * k * v
    monkeypatch.setitem(sys.modules, "fa3", stub)
    provider = peers.PROVIDERS["fa3-deterministic"]
    tensors = peers.Tensors(*(torch.tensor(number, requires_grad=True) for number in (2.0, 3.0, 5.0)), torch.tensor(10.0))
    assert provider.make(BACKWARD, tensors)() == (150, 100, 60)
    assert asked == [{"causal": False, "deterministic": True}]
    with pytest.raises(peers.Unsupported, match="forward is the same"):
        provider.make(SQUARE, tensors)
    asked_for = parser().parse_args(["run"]).providers
    assert provider.name not in asked_for and {*asked_for, provider.name} == peers.PROVIDERS.keys()


def test_cudnn_refuses_another_mask_alignment():
    with pytest.raises(peers.Unsupported, match="top left"):
        peers.PROVIDERS["cudnn"].mask(Point(64, True, 1, 128, 256, 4, 4))


def test_sdpa_is_held_to_one_backend():
    attention = pytest.importorskip("torch.nn.attention")
    for name in ("cudnn", "fa2"):
        with peers.PROVIDERS[name].context():
            enabled = attention._cur_sdpa_kernel_backends()
        assert enabled == [getattr(attention.SDPBackend, peers.PROVIDERS[name].backend)]


# ---------------------------------------------------------------- result files


def a_run(points=suites.PAPER, suite="paper", speeds=None, spread=0.005):
    """A complete run in which provider p takes flops / speeds[p]; a speed is TFLOP/s or a function of the point."""
    data = empty_run(suite, dtypes={point.dtype for point in points})
    data.update(complete=True, direction=points[0].direction)
    for point in points:
        measured = {}
        for name, speed in (speeds or {"fa3": 600, "fa4": 560, "cudnn": 500}).items():
            ms = point.flops() / (speed(point) if callable(speed) else speed) / 1e9
            measured[name] = results.measurement([ms * (1 - spread / 2), ms, ms * (1 + spread / 2)], 30, point.flops())
        data["records"].append(results.record("kernel", point, measured))
    data["gemm"] = {"size": 8192, "dtype": "bf16", **results.measurement([1.5, 1.5], 17, 2 * 8192**3)}
    return data


def saved(tmp_path, name, data):
    path = tmp_path / name
    results.write(path, data)
    return str(path)


def test_results_round_trip(tmp_path):
    data = a_run()
    again = results.read(saved(tmp_path, "run.json", data))
    assert again == data
    assert set(point for _, point in results.by_problem(again)) == set(suites.PAPER)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]  # no half-written file stays


def broken(change):
    data = a_run(suites.PAPER[:2])
    change(data)
    return json.dumps(data)


FOREIGN = {
    "not json": "{",
    "a list": "[]",
    "another project's": '{"points": []}',
    "another schema": broken(lambda d: d.update(schema="fa3-perf/0")),
    "no records": broken(lambda d: d.pop("records")),
    "a zero time": broken(lambda d: d["records"][0]["results"]["fa3"].update(median_ms=0)),
    "no samples": broken(lambda d: d["records"][0]["results"]["fa3"].update(samples_ms=[])),
    "a NaN": broken(lambda d: d["records"][0]["results"]["fa3"].update(tflops=float("nan"))),
    "an unknown point field": broken(lambda d: d["records"][0]["point"].update(window=3)),
    "an impossible point": broken(lambda d: d["records"][0]["point"].update(heads_kv=3)),
    "a repeated point": broken(lambda d: d["records"].append(d["records"][0])),
    "results that are a list": broken(lambda d: d["records"][0].update(results=[])),
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(tmp_path, text, capsys):
    good, bad = saved(tmp_path, "good.json", a_run()), tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(PerfError, match="bad.json"):
        results.read(bad)
    assert main(["compare", good, str(bad)]) == 2
    assert capsys.readouterr().err.startswith("perf: ")


def test_names_never_collide(tmp_path):
    data = a_run()
    names = []
    for _ in range(3):
        path = results.default_path(data, tmp_path)
        names.append(results.claim(path).name)
    assert names == ["2026-11-22-paper-fwd-h200.json", "2026-11-22-paper-fwd-h200-2.json", "2026-11-22-paper-fwd-h200-3.json"]
    with pytest.raises(PerfError, match="never overwritten"):
        results.claim(tmp_path / names[0])
    data["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    data["protocol"]["dtypes"] = ["bf16", "fp16"]
    assert results.default_path(data, tmp_path).name == "2026-11-22-paper-fwd-fp16-h100.json"
    backward = a_run(suites.select("paper", direction="bwd"))
    assert results.default_path(backward, tmp_path).name == "2026-11-22-paper-bwd-h200.json"


def test_fingerprint_follows_the_sources(tmp_path):
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "forward.py"
    source.write_text("a = 1\n")
    before = results.fingerprint(tmp_path / "kernels")
    assert results.fingerprint(tmp_path / "kernels") == before
    source.write_text("a = 2\n")
    assert results.fingerprint(tmp_path / "kernels") != before


# ---------------------------------------------------------------- compare


def compared(tmp_path, capsys, old, new, *options):
    code = main(["compare", saved(tmp_path, "old.json", old), saved(tmp_path, "new.json", new), *options])
    return code, capsys.readouterr().out


def only(point, factor, speed=600):
    return lambda p: speed * (factor if p == point else 1)


def test_the_same_run_twice_is_no_slide(tmp_path, capsys):
    code, printed = compared(tmp_path, capsys, a_run(), a_run())
    assert code == 0 and "36 points compared, nothing slid" in printed and "moved" not in printed.split("\n\n")[-1]


def test_one_point_that_slid_is_found(tmp_path, capsys):
    point = suites.PAPER[20]
    code, printed = compared(tmp_path, capsys, a_run(), a_run(speeds={"fa3": only(point, 0.96), "fa4": 560, "cudnn": 500}))
    assert code == 1 and "1 slid" in printed
    line = next(line for line in printed.splitlines() if line.startswith(point.label()))
    assert line.split()[-3:] == ["-4.0%", "-4.0%", "1.0%"]


def test_a_slide_of_under_two_percent_is_only_printed(tmp_path, capsys):
    point = suites.PAPER[20]
    code, printed = compared(tmp_path, capsys, a_run(), a_run(speeds={"fa3": only(point, 0.985), "fa4": 560, "cudnn": 500}))
    assert code == 0 and "moved beyond noise" in printed and point.label() in printed


def test_the_peers_movement_is_taken_out(tmp_path, capsys):
    slower = {"fa3": 540, "fa4": 504, "cudnn": 450}  # another machine: everyone at 90 %
    code, printed = compared(tmp_path, capsys, a_run(), a_run(speeds=slower))
    assert code == 0 and "geometric mean raw -10.0%, normalised -0.0%" in printed.replace("+0.0%", "-0.0%")
    # and a slide can't hide behind a faster machine: up 2 % where the peers gained 10 %
    faster = {"fa3": 612, "fa4": 616, "cudnn": 550}
    code, printed = compared(tmp_path, capsys, a_run(), a_run(speeds=faster))
    assert code == 1 and "36 slid" in printed


def test_without_a_common_peer_the_raw_movement_counts(tmp_path, capsys):
    old, new = a_run(speeds={"fa3": 600, "fa4": 560}), a_run(speeds={"fa3": 540, "cudnn": 450})
    code, printed = compared(tmp_path, capsys, old, new)
    assert code == 1 and "no peer is in both runs" in printed


def test_noise_is_no_slide_but_is_mentioned(tmp_path, capsys):
    point = suites.PAPER[3]
    new = a_run(speeds={"fa3": only(point, 0.95), "fa4": 560, "cudnn": 500})
    noisy = copy.deepcopy(new)
    measured = noisy["records"][3]["results"]["fa3"]
    measured["samples_ms"] = [measured["median_ms"] * factor for factor in (0.9, 0.94, 1.0, 1.06, 1.1)]
    assert compared(tmp_path, capsys, a_run(), new)[0] == 1
    code, printed = compared(tmp_path, capsys, a_run(), noisy)
    assert code == 0 and "within noise: measure again" in printed and point.label() in printed


def test_backward_runs_compare_with_backward_runs(tmp_path, capsys):
    points = suites.select("paper", direction="bwd")
    slower = {"fa3": only(points[20], 0.96), "fa4": 560, "cudnn": 500}
    code, printed = compared(tmp_path, capsys, a_run(points), a_run(points, speeds=slower))
    assert code == 1 and "36 points compared, 1 slid" in printed and points[20].label() in printed
    assert main(["compare", str(tmp_path / "old.json"), saved(tmp_path, "forward.json", a_run())]) == 2
    assert "no point in common" in capsys.readouterr().err


def test_many_small_slides_are_one(tmp_path, capsys):
    old, new = a_run(), a_run(speeds={"fa3": 582, "fa4": 560, "cudnn": 500})  # 3 % slower everywhere, each within noise
    for run in (old, new):
        for record in run["records"]:
            measured = record["results"]["fa3"]
            measured["samples_ms"] = [measured["median_ms"] * factor for factor in (0.92, 0.95, 1.0, 1.05, 1.08)]
    code, printed = compared(tmp_path, capsys, old, new)
    assert code == 1 and "0 slid" in printed and "all together slid" in printed


def test_a_point_that_no_longer_runs_is_lost(tmp_path, capsys):
    new = a_run()
    del new["records"][5]["results"]["fa3"]
    code, printed = compared(tmp_path, capsys, a_run(), new)
    assert code == 1 and f"LOST {suites.PAPER[5].label()}" in printed
    code, printed = compared(tmp_path, capsys, a_run(), a_run(suites.PAPER[:30]))  # not tried: a filter, no loss
    assert code == 0 and "6 points are in one of the runs only" in printed


def test_compare_another_provider(tmp_path, capsys):
    code, printed = compared(tmp_path, capsys, a_run(), a_run(speeds={"fa3": 600, "fa4": 500, "cudnn": 500}), "--provider", "fa4")
    assert code == 1 and "fa4: 36 points compared, 36 slid" in printed


def test_incomparable_runs_are_an_error(tmp_path, capsys):
    paper = saved(tmp_path, "paper.json", a_run())
    chunked = saved(tmp_path, "chunked.json", a_run(suites.CHUNKED_PREFILL, "chunked-prefill"))
    for arguments, message in (
        ([paper, chunked], "no point in common"),
        ([paper, paper, "--provider", "fa9"], "no measurement of fa9"),
        ([paper, str(tmp_path / "absent.json")], "cannot read"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- table and report


def shown(data):
    output = io.StringIO()
    table.show(data, Console(file=output))
    return output.getvalue()


def test_table_has_the_ratios_and_the_mark():
    marks = table.targets()
    point = Point(128, True, 4, 4096, 4096, 16, 16)
    data = a_run([point], speeds={"fa3": 700, "fa4": 560, "cudnn": 620, "fa3-pypi": 640})
    row = next(line for line in shown(data).splitlines() if "4096" in line)
    expected = f"{700 / 560 / marks[point]:.3f}"
    assert row.split() == ["128", "causal", "4", "4096", "16", "700", "560", "620", "640", "1.094", "1.250", expected, "ok"]
    data = a_run([point], speeds={"fa3": 560, "fa4": 560})
    assert shown(data).splitlines()[4].split()[-1] == "--"
    data["gemm"] = {"size": 8192, "dtype": "bf16", **results.measurement([2.0], 17, 2 * 8192**3)}  # 550 TFLOP/s
    assert shown(data).splitlines()[4].split()[-1] == "gemm"


def test_the_backwards_bars():
    marks, points = table.targets(), suites.select("paper", direction="bwd")

    def run(ours):
        return shown(a_run(points, speeds={"fa3": lambda p: 500 * ours(p), "fa4": 500})).splitlines()

    def words(lines):
        return Counter(line.split()[-1] for line in lines if line.split()[1:2] in (["full"], ["causal"]))

    well = run(lambda p: max(1.06 * marks[p], 1.36 if table.held_to_fa4(p) else 0))
    assert words(well) == {"ok": 36}
    assert "bar, mark 1.01: reached at 36 of 36 points" in well
    assert [line for line in well if line.startswith("bar, mark 1.05 in the geometric mean: reached, 1.0")]
    assert "bar, fa3/fa4 1.35 at head_dim 256 from 2048 up: reached at 8 of 8 points, lowest 1.360" in well
    level = run(lambda p: marks[p] * (1.005 if p == points[0] else 1.02))  # d 256: 1.31 x FA4 at most
    assert words(level) == {"ok": 27, "--": 9}
    assert "bar, mark 1.01: reached at 35 of 36 points" in level
    assert [line for line in level if line.startswith("bar, mark 1.05 in the geometric mean: not reached, 1.020")]
    assert [line for line in level if line.startswith("bar, fa3/fa4 1.35") and "reached at 0 of 8 points" in line]
    assert not [line for line in shown(a_run()).splitlines() if line.startswith("bar,")]
    assert max(len(line.rstrip()) for line in well + level) < 120


def test_table_means_and_widths():
    speeds = {"fa3": only(suites.PAPER[0], 2), "cudnn": 500, "fa2": 300, "fa4": 600, "fa3-pypi": 550}
    fp16 = suites.select("paper", dtypes=["bf16", "fp16"])
    text = shown(a_run(fp16, speeds=speeds))
    assert f"fa3/fa4 {2 ** (1 / 72):.3f} (of 72)" in text and f"fa3/fa4 {2 ** (1 / 36):.3f} (of 36)" in text
    assert "fa3/base 0." in text  # fp16 over bf16
    rows = [line for line in text.splitlines() if line.strip().startswith(("bf16", "fp16"))]
    assert sum("…" in row for row in rows) == 0 and len([row for row in rows if "causal" in row or "full" in row]) == 72
    for data in (a_run(suites.SUITES["shapes"], "shapes", speeds), a_run(fp16, speeds=speeds)):
        assert max(len(line.rstrip()) for line in shown(data).splitlines()) < 120


def test_table_without_this_project():
    assert "fa3/best" not in shown(a_run(speeds={"fa4": 560, "cudnn": 500}))


def test_odd_and_grouped_points_are_held_against_their_base():
    slow = lambda p: 540 if p.seqlen_q == 4097 else 600  # noqa: E731
    text = shown(a_run(suites.ODD_LENGTHS, "odd-lengths", {"fa3": slow, "fa4": 500}))
    assert "lowest fa3/base: 0.900 at fwd bf16 d64 full b4 s4097 h32" in text


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_report_draws_every_panel(tmp_path, direction):
    image = pytest.importorskip("PIL.Image")
    data = a_run(suites.select("paper", direction=direction))
    path, out = saved(tmp_path, "run.json", data), tmp_path / "charts"
    assert main(["report", path, "--out", str(out)]) == 0
    expected = {f"{direction}-bf16-d{d}-{mask}.png" for d in (64, 128, 256) for mask in ("causal", "full")} | {"overview.png"}
    assert {file.name for file in out.iterdir()} == expected
    for file in out.iterdir():
        with image.open(file) as drawn:
            drawn.load()
            assert drawn.format == "PNG" and drawn.width > 1000
            assert len(drawn.convert("RGB").resize((200, 100)).getcolors(20000)) > 20  # not a blank sheet


def test_report_titles():
    data = a_run()
    assert report.title_of(Point(128, True, 4, 4096, 4096, 16, 16), data) == "Forward, head dim 128, causal (H200, bf16)"
    assert report.title_of(dataclasses.replace(BACKWARD, dtype="fp16"), data) == "Backward, head dim 64, 4 heads (H200, fp16)"
    assert report.title_of(Point(128, True, 4, 4096, 4096, 32, 8), data) == "Forward, head dim 128, causal, 32:8 heads (H200, bf16)"


def test_report_refuses_what_has_no_rate(tmp_path, capsys):
    assert main(["report", saved(tmp_path, "run.json", empty_run("host"))]) == 2
    assert "no TFLOP/s to draw" in capsys.readouterr().err


# ---------------------------------------------------------------- the command line


def test_run_without_a_gpu(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "perf", "run", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("perf: run needs a Hopper GPU") and "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_run_on_another_gpu(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert main(["run"]) == 2
    assert "NVIDIA A100 has 8.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--providers", "fa3,fa5"], "unknown fa5"),
        (["--head-dim", "100"], "no [100]"),
        (["--dtype", "fp8"], "bf16, fp16"),
        (["--rounds", "0"], "positive integer"),
        (["--burst-ms", "0"], "positive number of milliseconds"),
        (["--burst-ms", "nan"], "positive number of milliseconds"),
        (["--suite", "host", "--direction", "bwd", "--rounds", "9"], "--rounds is for launches on the GPU"),
        (["--suite", "host", "--direction", "bwd", "--burst-ms", "9"], "--burst-ms is for launches on the GPU"),
        (["--direction", "both"], "invalid choice"),
        (["--seqlen", "1k"], "integers"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    try:
        code = main(["run", *arguments])
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


def test_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    """Everything but the GPU: filters, a missing provider, the file and the table."""
    monkeypatch.setattr(runner, "require_hopper", lambda: None)
    monkeypatch.setattr(results, "machine", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(timing, "CudaDevice", FakeDevice)
    absent = Fake("fa4", lambda p: Call(1.0))
    absent.available = lambda: "No module named 'flash_attn' (pip install flash-attn-4)"
    for provider in (Fake("fa3", lambda p: Call(0.5)), Fake("cudnn", lambda p: Call(0.75)), absent):
        monkeypatch.setitem(peers.PROVIDERS, provider.name, provider)
    out = tmp_path / "out.json"
    arguments = ["run", "--providers", "fa3,cudnn,fa4", "--head-dim", "128", "--causal", "--seqlen", "512,1024"]
    assert main([*arguments, "--rounds", "3", "--out", str(out), "--commit", "abc"]) == 0
    data = results.read(out)
    assert {(p.head_dim, p.causal, p.seqlen_q) for _, p in results.by_problem(data)} == {(128, True, 512), (128, True, 1024)}
    assert all(sorted(record["results"]) == ["cudnn", "fa3"] for record in data["records"])
    assert all(len(entry["samples_ms"]) == 3 for record in data["records"] for entry in record["results"].values())
    assert data["left_out"] == [{"provider": "fa4", "point": None, "reason": absent.available()}]
    assert data["complete"] and data["protocol"]["rounds"] == 3 and data["versions"]["cudnn"] == "1"
    printed = capsys.readouterr().out
    assert "left out: fa4" in printed and "1.500" in printed and str(out) in printed
    assert main([*arguments, "--out", str(out)]) == 2  # never overwritten
    monkeypatch.setitem(peers.PROVIDERS, "fa3", absent)
    assert main(["run", "--providers", "fa4", "--out", str(tmp_path / "none.json")]) == 2
    assert "none of the requested providers" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_run_of_a_direction(monkeypatch, tmp_path, direction):
    """Autograd is on in the backward direction only; the file's name has the direction."""
    monkeypatch.setattr(runner, "require_hopper", lambda: None)
    monkeypatch.setattr(results, "machine", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(results, "default_path", lambda data, path=results.default_path: path(data, tmp_path))
    monkeypatch.setattr(timing, "CudaDevice", FakeDevice)
    grad_enabled = []

    def make(point):
        grad_enabled.append(torch.is_grad_enabled())
        return Call(0.5, output=(1.0, 1.0, 1.0))

    monkeypatch.setitem(peers.PROVIDERS, "fa3", Fake("fa3", make))
    assert main(["run", "--direction", direction, "--providers", "fa3", "--head-dim", "128", "--rounds", "2", "--burst-ms", "8"]) == 0
    assert grad_enabled == [direction == "bwd"] * 12
    [path] = tmp_path.iterdir()
    data = results.read(path)
    assert f"-paper-{direction}-h200" in path.name and data["direction"] == direction
    assert {point.direction for _, point in results.by_problem(data)} == {direction}
    assert data["protocol"]["kernels_per_call"] == {"fwd": 2, "bwd": 8}[direction]
    assert (data["protocol"]["burst_ms"], data["protocol"]["warmup_ms"]) == (8.0, pytest.approx(6.4))


def test_a_given_commit_is_believed_over_the_copys_own_history(monkeypatch):
    monkeypatch.setattr(results, "git", lambda *arguments: "history" if arguments[0] == "rev-parse" else " M file")
    assert results.source("given") == {**results.source("given"), "commit": "given", "dirty": None}
    assert results.source() == {**results.source(), "commit": "history", "dirty": True}


def test_a_sweeps_point_is_all_combinations_that_a_gpu_could_run():
    head_dim, causal, variants = sweep.parse("128 causal: tile_n=128,256 q_in_registers=True,False heads=l2,all,4", "fp16")
    assert (head_dim, causal) == (128, True)
    assert {(v.config.tile_n, v.config.q_in_registers) for v in variants} == {(128, True), (128, False)}  # 256: too many registers
    assert len(variants) == 2 * 3 and {v.heads for v in variants} == {"l2", "all", 4}
    assert {(v.config.dtype, v.config.mask, v.config.scheduler) for v in variants} == {("fp16", "causal", "dynamic")}
    assert len({v.name for v in variants}) == len(variants)
    with pytest.raises(PerfError, match="no field tilen; there are dtype"):
        sweep.parse("64 none: tilen=128", "bf16")


def test_a_backward_sweeps_point():
    head_dim, causal, found = sweep.parse("128 causal: tile_m=48,64 deterministic=False,True", "fp16", "bwd")
    assert (head_dim, causal, len(found)) == (128, True, 4)
    assert {(v.config.tile_m, v.config.deterministic) for v in found} == {(m, d) for m in (48, 64) for d in (False, True)}
    assert {(v.config.dtype, v.config.mask) for v in found} == {("fp16", "causal")}
    tile = f"{BackwardConfig.tile_m}x{BackwardConfig.tile_n}"
    assert {f"{tile} deterministic=True", "48x128"} < {v.name for v in found} and len({v.name for v in found}) == 4
    for wrong in ("pingpong=True", "heads=all"):
        with pytest.raises(PerfError, match=f"no field {wrong.split('=')[0]}; there are dtype"):
            sweep.parse(f"64 none: {wrong}", "bf16", "bwd")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_backward_variant_calls_the_kernel_as_agreed(monkeypatch, deterministic):
    launches = []
    monkeypatch.setattr(jit, "get", lambda config: lambda *arguments: launches.append(arguments))
    monkeypatch.setattr(variants, "device_of", lambda device: plan.Device())
    point = Point(64, True, 2, 300, 200, 4, 2, direction="bwd")
    tensors = cpu_tensors(point)
    config = BackwardConfig(head_dim=64, mask="causal", tile_m=128, deterministic=deterministic)
    call = variants.BackwardVariant(config).make(point, tensors)
    returned = call()
    [(q, k, v, out, dout, lse, dq, dk, dv, dq_accum, lse_log2, delta, turns, scale, sms)] = launches
    assert sms == plan.Device().sms
    assert all(a.data_ptr() == b.data_ptr() and not a.requires_grad for a, b in zip((q, k, v, dout), tensors))
    expected_out, expected_lse = reference.attention(q, k, v, causal=True)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse) and scale == 64**-0.5
    assert all(a is b for a, b in zip(returned, (dq, dk, dv)))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert lse_log2.shape == delta.shape == (2, 4, 384) and dq_accum.numel() == 2 * 4 * 384 * 64
    assert {t.dtype for t in (lse, lse_log2, delta, dq_accum)} == {torch.float32}
    assert (turns is not None) is deterministic
    if deterministic:
        assert turns.dtype == torch.int32 and turns.shape == (2, 4, 3)
    call()
    assert launches[1][9] is dq_accum  # allocated once


def test_one_launch_of_a_backward_config(monkeypatch):
    launches = []
    monkeypatch.setattr(jit, "get", lambda config: lambda *arguments: launches.append((config, arguments)))
    short = types.SimpleNamespace(tensors=lambda point: cpu_tensors(dataclasses.replace(point, seqlen_q=9, seqlen_k=9)))
    monkeypatch.setattr(timing, "CudaDevice", lambda: short)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: launches.append("waited"))
    monkeypatch.setattr(variants, "device_of", lambda device: plan.Device())
    config = BackwardConfig(head_dim=64, mask="causal", dtype="fp16", tile_m=128)
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: once.main(*command[-2:]) or done)
    sweep.try_one(config)  # to the command line and back
    (launched, arguments), waited = launches
    assert launched == config and waited == "waited"
    assert arguments[0].dtype == torch.float16 and arguments[0].shape[2:] == (14, 64)


def test_a_forward_variant_launches_its_config(monkeypatch):
    launches = []
    monkeypatch.setattr(jit, "get", lambda config: lambda *arguments: launches.append((config, arguments)))
    monkeypatch.setattr(variants, "device_of", lambda device: plan.Device())
    for lse in (False, True):
        config = ForwardConfig(head_dim=64, mask="causal", lse=lse, scheduler="persistent")
        variants.ForwardVariant(config, "all").make(CAUSAL, cpu_tensors(CAUSAL))()
        launched, arguments = launches[-1]
        assert launched == config and (arguments[4] is not None) is lse
        assert arguments[6] == CAUSAL.heads * CAUSAL.batch  # the head group


def test_a_sweep_shows_its_variants_as_rows():
    data, output = empty_run("sweep"), io.StringIO()
    providers = [types.SimpleNamespace(name=name) for name in ("128x128", "fa4")]
    data["records"] = [results.record("kernel", SQUARE, {"fa4": {"tflops": 600.4}, "128x128": {"tflops": 699.6, "differs": {}}})]
    other = dataclasses.replace(SQUARE, seqlen_q=SQUARE.seqlen_q + 1)
    sweep.show(data, (128, False), providers, [SQUARE, other], Console(file=output, width=200))
    header, ours, peer = output.getvalue().strip().splitlines()
    assert header.split() == ["d", "128", "full", str(SQUARE.seqlen_q), str(other.seqlen_q)]
    assert (ours.split(), peer.split()) == (["128x128", "700!", "-"], ["fa4", "600", "-"])


# ---------------------------------------------------------------- stamps


def test_stamps_find_their_lines_in_the_kernel():
    source = (ROOT / "kernels" / "forward.py").read_text()
    copy = stamps.stamped(source)
    assert copy.count("        stamp(t, ") == len(stamps.MARKS)
    compile(copy, "forward.py", "exec")
    with pytest.raises(ValueError, match="issue_o"):
        stamps.stamped(source.replace("self.issue_o(", "self.other("))


def test_another_commit_is_a_package_beside_this_one():
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git history here")
    commit = head.stdout.strip()
    other = peers.OtherCommit(commit)
    assert other.available() is None and other.name == f"fa3 at {commit}"
    module = sys.modules[f"fa3_{commit}"]
    assert module.flash_attn_func is not importlib.import_module("fa3").flash_attn_func
    q = torch.randn(1, 5, 1, 64, dtype=torch.bfloat16)
    assert module.flash_attn_func(q, q, q).shape == q.shape
    assert "nothing" in peers.OtherCommit("nothing").available()  # git's own words


def test_another_folder_is_a_package_beside_this_one(tmp_path):
    for name in ("fa3", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "an-older.tree" / name)
    other = peers.OtherCommit(str(tmp_path / "an-older.tree"))
    assert other.available() is None and other.name == "fa3 at an-older.tree"
    assert sys.modules["fa3_an_older_tree"].flash_attn_func is not importlib.import_module("fa3").flash_attn_func
