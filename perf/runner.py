"""The loop of `python -m perf run`: every point, every provider, one result file that is complete after each point."""

import math
import os
import random
import time
from collections import defaultdict
from contextlib import nullcontext

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perf import PerfError, results, suites, timing
from perf.peers import reason
from perf.timing import Runnable

HOPPER = (9, 0)
GEMM = "gemm"  # its name among the providers of a point
HOST_CHUNKS = 20  # of timing.CALLS_PER_CHUNK calls, for each provider
# Two right bf16 forwards differ by about 3e-3; another mask, scale or an unwritten tile by far more
AGREEMENT = 2e-2
OUTPUTS = {"fwd": ("the output",), "bwd": ("dq", "dk", "dv")}  # of a call, which may return more


class DeviceLost(Exception):
    """A provider's kernel failed in a way that takes every later CUDA call of the process with it."""


def run(*, suite, filters, providers, rounds, burst_ms, out=None, commit=None, console):
    """Measures, writes the result file, prints the table; returns the exit code."""
    points = suites.select(suite, **filters)
    require_hopper()
    import torch

    header = new_run(suite, points, providers, rounds, commit, burst_ms)
    present = [provider for provider in providers if provider.name not in {left["provider"] for left in header["left_out"]}]
    for left in header["left_out"]:
        plain(console, f"left out: {left['provider']}: {left['reason']}")
    if not present:
        raise PerfError("none of the requested providers can be measured here")
    for provider in present:
        provider.prepare()
    path = results.claim(out if out is not None else results.default_path(header))
    with torch.set_grad_enabled(header["direction"] == "bwd"):
        Bench(header, path, present, timing.CudaDevice(), console).measure(points)
    return finish(header, path, console)


def require_hopper():
    import torch

    if not torch.cuda.is_available():
        raise PerfError("run needs a Hopper GPU (H100, H200; compute capability 9.0), and torch sees no CUDA device here")
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        raise PerfError(
            f"run needs a Hopper GPU (H100, H200; compute capability 9.0); "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )


def new_run(suite, points, providers, rounds, commit, burst_ms=timing.BURST_MS):
    """The result file's contents before the first measurement; providers that are missing stand in left_out."""
    missing = {provider.name: provider.available() for provider in providers}
    return {
        "schema": results.SCHEMA,
        "suite": suite,
        "direction": points[0].direction,
        "date": results.now(),
        "complete": False,
        "machine": results.machine(),
        "versions": results.versions([provider for provider in providers if missing[provider.name] is None]),
        "source": results.source(commit),
        "protocol": {
            "rounds": rounds,
            "burst_ms": burst_ms,
            "warmup_ms": timing.WARMUP * burst_ms,
            "min_launches": timing.MIN_LAUNCHES,
            "max_launches": timing.MAX_LAUNCHES,
            "queued_kernels": timing.QUEUED_KERNELS,
            "kernels_per_call": timing.KERNELS_PER_CALL[points[0].direction],
            "host_chunks": HOST_CHUNKS,
            "calls_per_chunk": timing.CALLS_PER_CHUNK,
            "calls_per_graph": timing.CALLS_PER_GRAPH,
            "order": "random in each round",
            "inputs": "normal(0, 1), fresh at each point",
            "l2_flush": False,
            "dtypes": sorted({point.dtype for point in points}),
            "seed": int.from_bytes(os.urandom(4), "little"),
        },
        "left_out": [
            {"provider": name, "point": None, "reason": why} for name, why in missing.items() if why is not None
        ],
        "gemm": None,
        "records": [],
    }


class Bench:
    """One run on one device, into one result file."""

    def __init__(self, data, path, providers, device, console):
        self.data = data
        self.path = path
        self.providers = providers
        self.device = device
        self.console = console
        self.rounds = data["protocol"]["rounds"]
        self.burst_ms = data["protocol"]["burst_ms"]
        self.rng = random.Random(data["protocol"]["seed"])
        self.told = set()  # (provider, reason) already printed
        self.gemms = {}  # dtype: Gemm

    def measure(self, points):
        """Measures every point. Whatever stops it, what was measured before is in the file."""
        host = self.data["suite"] == "host"
        measure_group = self.host_and_graph if host else self.kernel
        groups = [[point] for point in points] if host else suites.across_dtypes(points)
        try:
            for group in progress(groups, self.console):
                measure_group(*group)
                self.device.release()
                results.write(self.path, self.data)
            self.data["complete"] = True
        except DeviceLost as error:
            plain(self.console, f"broke off: {error}")
        finally:
            results.write(self.path, self.data)

    def kernel(self, *points):
        """Points that differ in dtype alone take turns too, so that their ratio is of the same clocks and temperatures."""
        runnables, entries = {}, {}
        for point in points:
            if point.dtype not in self.gemms:
                self.gemms[point.dtype] = Gemm(self.device, point.dtype)
            calls, entries[point] = self.prepare(point)
            calls = {GEMM: self.gemms[point.dtype].runnable, **calls}
            runnables |= {(point, name): call for name, call in calls.items()}

        def failed(at, error):
            point, name = at
            self.failed_at(point)(name, error)

        timed = timing.gpu_times(runnables, self.device, self.rounds, self.rng, failed, burst_ms=self.burst_ms)
        for point in points:
            of_point = {name: taken for (at, name), taken in timed.items() if at == point}
            if GEMM in of_point:
                self.data[results.gemm_key(point.dtype)] = self.gemms[point.dtype].take_in(*of_point.pop(GEMM))
            self.keep("kernel", point, of_point, entries[point], point.flops())

    def host_and_graph(self, point):
        runnables, entries = self.prepare(point)
        timed = timing.host_times(runnables, self.device, HOST_CHUNKS, self.rng, self.failed_at(point))
        self.keep("host", point, timed, entries)
        if point.direction == "bwd":  # autograd launches on its forward's stream, which isn't the one that is captured
            return

        failed = self.failed_at(point, "CUDA graph: ")
        replays = {}
        for name, runnable in runnables.items():
            try:
                with runnable.context():
                    replays[name] = Runnable(self.device.capture(runnable.call, timing.CALLS_PER_GRAPH), nullcontext)
            except Exception as error:
                failed(name, error)
        timed = timing.gpu_times(replays, self.device, self.rounds, self.rng, failed, timing.CALLS_PER_GRAPH, self.burst_ms)
        self.keep("graph", point, timed, entries)

    def prepare(self, point):
        """Runs every provider once on the point's tensors, which also compiles what has to be compiled.

        Returns the runnables and what is known of each before timing: its config line, and which of its outputs differs
        most from the reference's, if it does; the reference is the first other provider that runs.
        """
        tensors = self.device.tensors(point)
        failed = self.failed_at(point)
        runnables, entries, reference = {}, {}, None
        for provider in sorted(self.providers, key=lambda provider: provider.name == "fa3"):  # this project is judged, so last
            try:
                call = provider.make(point, tensors)
                with provider.context():
                    returned = call()
                outputs = returned if isinstance(returned, (tuple, list)) else [returned]
                self.device.synchronize()
                entry = {}
                if reference is None:
                    reference = (provider.name, outputs)
                else:
                    output, relative = self.largest_difference(OUTPUTS[point.direction], outputs, reference[1])
                    if not relative <= AGREEMENT:  # NaN differs too
                        finite = relative if math.isfinite(relative) else None
                        entry["differs"] = {"from": reference[0], "output": output, "relative": finite}
                        what = f"{output} of {provider.name} differs from that of {reference[0]}"
                        plain(self.console, f"WRONG? {what} by {relative:.2g} at {point.label()}")
                line = self.config_line(provider, point, tensors)
                if line is not None:
                    entry["config"] = line
            except Exception as error:
                failed(provider.name, error)
                continue
            runnables[provider.name] = Runnable(call, provider.context, timing.KERNELS_PER_CALL[point.direction])
            entries[provider.name] = entry
        return runnables, entries

    def largest_difference(self, names, outputs, reference):
        """(name, relative difference) of the output that differs most from the reference's; NaN is the most."""
        differences = [(name, self.device.relative_difference(*pair)) for name, *pair in zip(names, outputs, reference)]
        return max(differences, key=lambda found: math.inf if math.isnan(found[1]) else found[1])

    def config_line(self, provider, point, tensors):
        try:
            return provider.config_line(point, tensors)
        except Exception as error:  # it runs, it only can't say how: no reason to leave it out
            return f"unknown: {reason(error)}"

    def keep(self, measure, point, timed, entries, flops=None):
        measured = {
            provider.name: {**results.measurement(*timed[provider.name], flops), **entries[provider.name]}
            for provider in self.providers
            if provider.name in timed
        }
        self.data["records"].append(results.record(measure, point, measured))

    def failed_at(self, point, prefix=""):
        """What take_turns and its like call when a provider raised at this point."""

        def failed(name, error):
            why = prefix + reason(error)
            self.data["left_out"].append({"provider": name, "point": point.label(), "reason": why})
            if (name, why) not in self.told:
                self.told.add((name, why))
                plain(self.console, f"left out: {name} at {point.label()}: {why}")
            try:
                self.device.synchronize()
            except Exception as lost:
                raise DeviceLost(f"after {name} at {point.label()} the GPU answers nothing but {reason(lost)}") from error

        return failed


class Gemm:
    """The run's GEMM rate. It takes turns with the providers at every point, so that it meets their clocks and temperatures:
    before a point, when the GPU has been idle for as long as its tensors take, a GEMM runs up to a tenth faster.
    """

    def __init__(self, device, dtype):
        self.dtype = dtype
        self.runnable = Runnable(device.gemm(dtype), nullcontext)
        self.samples = []

    def take_in(self, samples, launches):
        """The measurement of all points so far."""
        self.samples += samples
        return {
            "size": timing.GEMM_SIZE,
            "dtype": self.dtype,
            **results.measurement(self.samples, launches, 2 * timing.GEMM_SIZE**3),
        }


def progress(groups, console):
    """Yields groups of points behind a progress bar; where the output isn't a terminal, a line after every tenth of the points."""
    total = sum(map(len, groups))
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            for group in groups:
                bar.update(task, description=group[0].label())
                yield group
                bar.advance(task, len(group))
        return
    began = time.monotonic()
    step = math.ceil(total / 10)
    done = 0
    for group in groups:
        yield group
        tenths, done = done // step, done + len(group)
        if done // step > tenths or done == total:
            plain(console, f"{done}/{total} points, {time.monotonic() - began:.0f} s")


def finish(data, path, console):
    from perf import table

    table.show(data, console)
    grouped = defaultdict(list)
    for left in data["left_out"]:
        grouped[left["provider"], left["reason"]].append(left["point"])
    for (provider, why), labels in grouped.items():
        where = "everywhere" if labels == [None] else f"at {len(labels)} points ({labels[0]}{', ...' if len(labels) > 1 else ''})"
        plain(console, f"left out: {provider} {where}: {why}")
    plain(console, f"written: {path}" + ("" if data["complete"] else " (incomplete)"))
    return 0 if data["complete"] else 1


def plain(console, text):
    """One line as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
