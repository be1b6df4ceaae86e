"""The JSON file of a run: what is in it, how it is named, written and read.

    schema      "fa3-perf/1"
    suite, direction, date, complete (False while the run goes on, or when it broke off)
    machine     gpu, sms, memory_gb, driver, cuda, power_limit_w, cpu_count
    versions    python, torch, nvidia-cutlass-dsl, and one entry a provider
    source      commit, dirty (of the checkout, perf/results apart), fingerprint (of kernels/ and fa3/)
    protocol    rounds, burst_ms, ... as perf.timing has them, and the seed
    left_out    [{provider, point (a label, or null for the whole run), reason}]
    gemm        a measurement of the bf16 GEMM 8192^3, or null; gemm_fp16, where points are fp16, of that one
    records     [{measure: "kernel" | "host" | "graph", point: {Point's fields}, flops, tensor_bytes,
                  results: {provider: measurement}}]

A measurement is {median_ms, spread, samples_ms, launches}, with tflops where measure is "kernel", config (one line)
where the provider gives one, and differs: {from, output, relative} where an output isn't the other provider's (in older
files without which one: it is the forward's only one).
"""

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

from perf import PerfError
from perf.suites import ELEMENT_BYTES, Point

SCHEMA = "fa3-perf/1"
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "perf" / "results"
MEASURES = ("kernel", "host", "graph")


def measurement(samples_ms, launches, flops=None):
    median = statistics.median(samples_ms)
    entry = {
        "median_ms": median,
        "spread": (max(samples_ms) - min(samples_ms)) / median,
        "samples_ms": list(samples_ms),
        "launches": launches,
    }
    if flops is not None:
        entry["tflops"] = flops / median / 1e9
    return entry


def record(measure, point, results):
    return {
        "measure": measure,
        "point": asdict(point),
        "flops": point.flops(),
        "tensor_bytes": point.tensor_bytes(),
        "results": results,
    }


def point_of(record):
    return Point(**record["point"])


def by_problem(data):
    """{(measure, Point): results}."""
    return {(record["measure"], point_of(record)): record["results"] for record in data["records"]}


def machine():
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver, power_limit = nvidia_smi("driver_version", "power.limit")
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "power_limit_w": power_limit,
        "cpu_count": os.cpu_count(),
    }


def nvidia_smi(*fields):
    """nvidia-smi's fields for the machine's first GPU, each None where it can't be asked."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout.splitlines()[0].split(",")  # fmt: skip
        return [value.strip() for value in answer]
    except (OSError, subprocess.SubprocessError, IndexError):
        return [None] * len(fields)


def versions(providers):
    import torch

    try:
        dsl = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        dsl = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nvidia-cutlass-dsl": dsl,
        **{provider.name: provider.version() for provider in providers},
    }


def source(commit=None):
    """Which source this is. `commit`, where given, is believed: a copy's own git history may be another's, or none."""
    entry = {"commit": commit, "dirty": None, "fingerprint": fingerprint(ROOT / "kernels", ROOT / "fa3")}
    if commit is None:
        entry["commit"] = git("rev-parse", "HEAD")
        if entry["commit"] is not None:
            entry["dirty"] = bool(git("status", "--porcelain", "--", ".", ":!perf/results"))
    return entry


def git(*arguments):
    """git's answer about this checkout, or None where there is no git, no history or no commit."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def fingerprint(*folders):
    """A hash of the Python sources below these folders, names included."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def default_path(data, folder=FOLDER):
    """perf/results/2026-11-22-paper-fwd-h200.json, or the same with -2, -3, ... where that exists."""
    dtypes = {dtype for dtype in data["protocol"]["dtypes"] if dtype != "bf16"}
    gpu = re.sub(r"[^a-z0-9]+", "-", data["machine"]["gpu"].lower().replace("nvidia", "").strip()).split("-")[0]
    stem = "-".join([data["date"][:10], data["suite"], data["direction"], *sorted(dtypes), gpu])
    path, number = Path(folder) / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = Path(folder) / f"{stem}-{number}.json"
    return path


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def claim(path):
    """Creates the file, so that nothing is measured that can't be written, and nothing is overwritten."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
    except FileExistsError:
        raise PerfError(f"{path} exists already; results are never overwritten, name another file") from None
    except OSError as error:
        raise PerfError(f"cannot write {path}: {error}") from None
    return path


def write(path, data):
    """Replaces the file in one step: a reader sees the old or the new one, never half."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def read(path):
    """The run in this file; PerfError says what is wrong with a file that isn't one."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise PerfError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise PerfError(f"{path} is not JSON: {error}") from None
    try:
        check(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise PerfError(f"{path} is not a result file of python -m perf run: {what}") from None
    return data


def check(data):
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got a {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"schema is {data.get('schema')!r}, not {SCHEMA!r}")
    for key in ("suite", "direction", "date", "complete", "left_out", "gemm"):
        data[key]
    for key in ("machine", "versions", "source", "protocol"):
        if not isinstance(data[key], dict):
            raise ValueError(f"{key} must be an object")
    data["machine"]["gpu"]
    for key in map(gemm_key, ELEMENT_BYTES):
        if data.get(key) is not None:
            check_measurement(key, data[key])
    seen = set()
    for number, entry in enumerate(data["records"]):
        problem = (entry["measure"], point_of(entry))
        if entry["measure"] not in MEASURES:
            raise ValueError(f"records[{number}].measure is {entry['measure']!r}, not one of {', '.join(MEASURES)}")
        if problem in seen:
            raise ValueError(f"records[{number}] repeats {problem[1].label()}")
        seen.add(problem)
        for provider, measured in entry["results"].items():
            check_measurement(f"records[{number}].results[{provider!r}]", measured)
            if entry["measure"] == "kernel":
                check_positive(f"records[{number}].results[{provider!r}].tflops", measured["tflops"])


def gemm_key(dtype):
    """Where a run has the rate of the GEMM of a dtype, if it was measured."""
    return "gemm" if dtype == "bf16" else f"gemm_{dtype}"


def check_measurement(where, measured):
    check_positive(f"{where}.median_ms", measured["median_ms"])
    if not isinstance(measured["samples_ms"], list) or not measured["samples_ms"]:
        raise ValueError(f"{where}.samples_ms must be a list of times")
    for sample in measured["samples_ms"]:
        check_positive(f"{where}.samples_ms", sample)
    if not isinstance(measured["spread"], (int, float)) or not 0 <= measured["spread"] < math.inf:
        raise ValueError(f"{where}.spread must be a number from 0 up, got {measured['spread']!r}")


def check_positive(where, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where} must be a positive number, got {value!r}")
