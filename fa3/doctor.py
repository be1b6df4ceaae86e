"""python -m fa3 doctor: what is here, what is missing, and the command that mends it."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from . import toolkit

CU13_DRIVER = 580  # the oldest driver that runs CUDA 13's code (CUDA 13 release notes)
SIGNS = {"ok": "ok", "note": "--", "missing": "MISSING"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: "ok"; "note", fine without; or "missing", needed."""

    name: str
    found: str
    state: str = "ok"
    mend: str = ""  # a command


def run(as_json=False):
    """The exit code: 1 if something that is needed is missing."""
    findings = examine()
    missing = [f for f in findings if f.state == "missing"]
    if as_json:
        print(json.dumps({"ok": not missing, "findings": [asdict(f) for f in findings]}, indent=1))
        return int(bool(missing))
    width = max(len(f.name) for f in findings)
    for f in findings:
        print(f"{SIGNS[f.state]:<8}{f.name:<{width}}  {f.found}")
        if f.mend:
            print(f"{'':<{8 + width}}  -> {f.mend}")
    print(f"\n{len(missing)} missing" if missing else "\nnothing is missing")
    return int(bool(missing))


def examine():
    driver = driver_version()
    return [
        Finding("python", platform.python_version()),
        torch_here(driver),
        *gpus(),
        Finding("driver", driver or "none"),
        *dsl(driver),
        package("apache-tvm-ffi", "tvm_ffi"),
        package("cuda-bindings", "cuda.bindings.driver"),
        package("torch-c-dlpack-ext", None, needed=False),
        package("rich", "rich"),
        *map(tool, toolkit.TOOLS),
        *cache(),
    ]


def version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package(distribution, module, needed=True):
    """A Python package: installed, and its module can be imported."""
    found = version(distribution)
    mend = f"pip install {distribution}"
    if found is None:
        return Finding(distribution, "not installed", "missing" if needed else "note", mend)
    problem = import_problem(module) if module else None
    if problem:
        return Finding(distribution, f"{found}, but {problem}", "missing", f"pip install --force-reinstall {distribution}")
    return Finding(distribution, found)


def import_problem(module):
    """What goes wrong when a module is imported, in one line, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package can raise anything
        return f"importing {module} fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None


def driver_version():
    """The NVIDIA driver's version, "580.65.06"; None where there is none."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout.split()
        if said and said[0][0].isdigit():
            return said[0]
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def torch_here(driver):
    found = version("torch")
    if found is None:
        return Finding("torch", "not installed", "missing", "pip install torch")
    problem = import_problem("torch")
    if problem:
        return Finding("torch", f"{found}, but {problem}", "missing", "pip install --force-reinstall torch")
    import torch

    if torch.version.cuda:
        return Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    if driver is None:
        return Finding("torch", f"{torch.__version__}, built without CUDA: CPU tensors only")
    mend = "pip install --force-reinstall torch"  # PyPI's Linux builds have CUDA
    return Finding("torch", f"{torch.__version__}, built without CUDA, beside driver {driver}", "missing", mend)


def gpus():
    none = "none: kernels compile, CPU tensors run the reference"
    if version("torch") is None or import_problem("torch"):
        return [Finding("GPU", "unknown without torch", "note")]
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPU", none, "note")]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        name = f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs"
        hopper = (p.major, p.minor) == (9, 0)
        found.append(Finding(f"GPU {i}", name if hopper else f"{name}: not Hopper, the kernels don't run on it", "ok" if hopper else "note"))
    return found


def dsl(driver):
    """The CuTe DSL, and which of its code generators is in use."""
    name = "nvidia-cutlass-dsl"
    found = package(name, "cutlass")
    if found.state != "ok":
        return [found]
    flavours = [f for f in ("cu12", "cu13") if version(f"{name}-libs-{f}")]
    loaded = sys.modules.get("cutlass._mlir._mlir_libs._cutlass_ir")
    used = re.search(r"\.(cu\d+)\.", getattr(loaded, "__file__", None) or "")
    text = f"{used[1] if used else 'unknown'} in use; installed: {', '.join(flavours) or 'none'}"
    enough = driver is None or int(driver.split(".")[0]) >= CU13_DRIVER
    if used and used[1] == "cu13" and not enough:
        mend = f"pip uninstall {name}-libs-cu13"
        return [found, Finding("code generator", f"{text}; cu13 needs driver {CU13_DRIVER}, this is {driver}", "missing", mend)]
    if "cu13" not in flavours and enough and driver:
        return [found, Finding("code generator", f"{text}; driver {driver} can run cu13's code too", "note", "pip install 'fa3[cu13]'")]
    return [found, Finding("code generator", text)]


def tool(name):
    """A tool of `python -m fa3 inspect`."""
    copies = toolkit.places(name)
    if not copies:
        return Finding(name, "not found; only `python -m fa3 inspect` needs it", "note", toolkit.MEND)
    return Finding(name, f"{toolkit.version(copies[0]) or 'unknown version'}, {copies[0]}")


def cache():
    """The disk cache: where it is, whether it can be written, and what is in it."""
    try:
        from . import jit, plan
    except Exception as error:  # of a package that is reported above
        return [Finding("cache", f"unknown: {error}", "note")]
    directory = jit.cache_dir()
    if directory is None:
        return [Finding("cache", "turned off: every process compiles what it needs", "note", "unset FA3_CACHE")]
    if not writable(directory):
        mend = "export FA3_CACHE_DIR=... with a directory that can be written"
        return [Finding("cache", f"{directory} can't be written: every process compiles what it needs", "note", mend)]
    files = sorted(directory.glob("*.fa3"))
    size = sum(path.stat().st_size for path in files)
    ours = {f"{jit.key(config)}.fa3" for family in plan.FAMILIES for config in plan.shipped(family)}
    there = sum(path.name in ours for path in files)
    found = [
        Finding("cache", f"{directory}, {len(files)} kernels, {size / 2**20:.1f} MiB"),
        Finding("cached kernels", f"{there} of the {len(ours)} shipped ones", mend="" if there == len(ours) else "python -m fa3 compile"),
    ]
    if len(files) > there:
        text = f"{len(files) - there} kernels of other versions or of configs built by hand; they are never read by mistake"
        found.append(Finding("other kernels", text, "note", f"rm -r '{directory}' drops them all"))
    for path in files:
        if not jit.intact(path.read_bytes()):
            found.append(Finding("damaged kernel", f"{path}; it is dropped and rebuilt when it is needed", "note", f"rm '{path}'"))
    return found


def writable(directory):
    """Whether files can be made in a directory, which need not exist yet. Root may write everywhere, but not below a file."""
    nearest = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
