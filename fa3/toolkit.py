"""NVIDIA's tools that read compiled kernels, cuobjdump and nvdisasm: where they are, and running one that is new enough.

A tool older than the assembler inside the CuTe DSL may not read what that wrote, so every copy that is found is tried.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

TOOLS = ("cuobjdump", "nvdisasm")
MEND = "pip install 'fa3[inspect]'"


class ToolError(RuntimeError):
    """A tool that is needed is missing, or no copy of it reads the file; the message has the command that mends it."""


def places(tool):
    """Every copy of a tool on this machine: from PyPI's nvidia packages, triton's wheel, $PATH, and CUDA's own folders."""
    found = []
    for root in packages("nvidia"):
        found += sorted(root.glob(f"*/bin/{tool}"), reverse=True)  # cu13 before cu12
    found += [root / "backends/nvidia/bin" / tool for root in packages("triton")]
    found += [Path(p) for p in (shutil.which(tool),) if p]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found += [Path(home) / "bin" / tool for home in homes if home]
    return list(dict.fromkeys(path for path in found if os.access(path, os.X_OK)))


def packages(name):
    """The folders of an installed package, which is not imported; none where it isn't installed."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def require():
    """Raises ToolError for a tool of which there is no copy at all."""
    for tool in TOOLS:
        if not places(tool):
            raise ToolError(f"{tool} was not found (python packages, triton, PATH, /usr/local/cuda): {MEND}")


def read(tool, *arguments):
    """What a tool prints, by the first copy of it that runs without an error."""
    require()
    errors = []
    for path in places(tool):
        try:
            done = subprocess.run([path, *arguments], capture_output=True, text=True, errors="replace")
        except OSError as error:
            errors.append(f"{path}: {error}")
            continue
        if done.returncode == 0 and done.stdout:
            return done.stdout
        said = (done.stderr or done.stdout).strip().splitlines()
        errors.append(f"{path}: {said[0] if said else f'exit code {done.returncode}'}")
    raise ToolError(f"no {tool} here reads the compiled kernel: {MEND}\n  " + "\n  ".join(errors))


def version(path):
    """The release of the CUDA toolkit that a tool is from, "13.4"; None where it doesn't say."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    _, found, after = said.partition("release ")
    return after.split(",")[0].strip() if found else None
