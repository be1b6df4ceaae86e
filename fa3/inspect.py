"""config -> Report: what the compiler made of a kernel, read from its machine code. Needs no GPU.

>>> from fa3.inspect import inspect, problems
>>> from fa3.kernels.configs import ForwardConfig
>>> report = inspect(ForwardConfig(tile_m=192, tile_n=80))
>>> report.stack, report.counts["HGMMA"], problems(report)

`problems` is the rule that every shipped config is held to: no spills, no matrix instructions but the expected ones, TMA
in and out, registers and shared memory as the config predicted, and WGMMAs that stay in flight.
"""

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import jit, toolkit
from .parallel import map_configs
from .terminal import show_table

# Instructions of interest (the first parts of a SASS mnemonic); matrix instructions are counted apart from these.
COUNTED = ("UTMALDG", "UTMASTG", "REDG", "MUFU.EX2", "LDL", "STL", "USETMAXREG", "WARPGROUP.DEPBAR", "R2P")
WGMMA = ("HGMMA", "QGMMA")  # Hopper's matrix instructions: fp16 and bf16; fp8
MATRIX = {"fp16": ("HGMMA", "HMMA"), "bf16": ("HGMMA", "HMMA")}  # dtype -> matrix instructions of a warpgroup and of a warp
MMA_K = {"fp16": 16, "bf16": 16}  # what one of them sums over (PTX ISA, wgmma.mma_async and mma.sync shapes)
CUDA_SHARED_MEMORY = 1024  # bytes of static shared memory that CUDA itself takes of a block on Hopper
LAUNCH = "!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>"  # cudaLaunchConfig_t in the host code's IR


@dataclass(frozen=True)
class Predicted:
    """What a config says of its own code."""

    matrix: dict  # matrix instruction -> how many, for a warpgroup's, which does the work, and for a warp's
    registers: int  # of a thread at entry
    setmaxnreg: tuple  # registers of a (producer, consumer) thread afterwards
    shared: int  # bytes of dynamic shared memory
    threads: int
    adds: str | None  # the instruction by which threads add to what other CTAs have summed up in memory

    @classmethod
    def of(cls, config):
        return cls(
            matrix=dict(zip(MATRIX[config.dtype], (expected_wgmmas(config), expected_warp_mmas(config)))),
            registers=config.entry_registers,
            setmaxnreg=tuple(config.registers),
            shared=config.shared_memory,
            threads=config.threads,
            adds="REDG" if config.family == "backward" else None,
        )


@dataclass(frozen=True)
class Report:
    """What the compiler made of one config."""

    config: str  # the config, as it prints
    predicted: Predicted
    registers: int  # of a thread at entry
    setmaxnreg: tuple  # the values setmaxnreg sets, in rising order: (producer's, consumers')
    stack: int  # bytes a thread
    local: int  # bytes a thread of local memory
    shared: int | None  # bytes of dynamic shared memory the launch asks for; None if the host code doesn't show it
    shared_static: int  # bytes, CUDA's own 1024 among them
    shared_fits: bool  # the kernel's own allocations fit into what the launch asks for
    threads: int
    matrix: dict  # matrix instruction -> how many: HGMMA, QGMMA, and whatever else there is (HMMA, IMMA, ...)
    counts: dict  # instruction -> how many, for each of COUNTED
    instructions: int

    def as_json(self):
        return {**asdict(self), "problems": problems(self)}


def expected_wgmmas(config):
    """WGMMAs in a kernel's code.

    Forward: S = Q Kᵀ sums over head_dim, O += P V over tile_n. S stands there for a tile's first keys and in the loop, O in the loop and for a tile's last keys. With overlap, both once
    more for the passage from one tile to the next, where a CTA has several, and for the loop over the keys that a causal mask cuts.
    Backward: S and dP sum over head_dim, dV and dK over tile_m, each part of dQ over tile_n, and all stand there once; dQ once
    more, over half of tile_n, where the other half may be hidden and is left out. In clusters, half of dQ over both CTAs' keys is as much. At head_dim 256 they stand there for a CTA's first tile of queries and in
    the loop, but that dQ follows a tile later, so in the loop and at the end; each warpgroup has a part of the code of its own, but at
    the end, and dQ stands everywhere for the keys of each CTA of a cluster.
    """
    k = MMA_K[config.dtype]
    if config.family == "backward" and config.wide:
        return 4 * (config.head_dim // k + config.tile_m // k) + 3 * config.cluster * config.tile_n // k
    if config.family == "backward":
        hidden = config.half_hidden and not config.in_pairs
        return 2 * (config.head_dim // k + config.tile_m // k) + (config.dq_parts + hidden) * config.tile_n // k
    copies = 2 + (config.overlap and config.scheduler != "single") + (config.overlap and config.mask == "causal")
    return copies * (config.head_dim // k + config.tile_n // k)


def expected_warp_mmas(config):
    """Matrix instructions of single warps (HMMA, 16 × 8) in a kernel's code: S once more where a forward kernel presumes maxima.

    Over head_dim that is a loop.
    """
    return config.presume * config.tile_n // 8 if config.family == "forward" else 0


def inspect(config):
    """Compiles a config for Hopper, with or without a GPU, and reads the machine code. toolkit.ToolError without tools."""
    with tempfile.TemporaryDirectory(prefix="fa3-inspect-") as directory:
        kernel = jit.compile(config, "--keep-cubin", "--keep-ptx", f"--dump-dir '{directory}'")
        (cubin,), (ptx,) = Path(directory).glob("*.cubin"), Path(directory).glob("*.ptx")
        return read_report(
            config,
            usage=toolkit.read("cuobjdump", "-res-usage", cubin),
            sass=toolkit.read("nvdisasm", "-c", cubin),
            ptx=ptx.read_text(),
            host=str(kernel.ir_module),
        )


def inspect_all(configs, jobs=None):
    """The reports of many configs, in order, made in parallel processes. A config that fails raises, with its name."""
    toolkit.require()
    reports = []
    for config, report in map_configs(inspect, configs, "inspecting", jobs):
        if isinstance(report, toolkit.ToolError):
            raise report
        if isinstance(report, Exception):
            raise RuntimeError(f"{config} can't be inspected: {report}") from report
        reports.append(report)
    return reports


def read_report(config, usage, sass, ptx, host):
    """The report of a config from what cuobjdump and nvdisasm print, its PTX, and the IR of its host code.

    Where a call is several kernels, instructions are all of them's, and of all else the report has the most that one uses: that
    is the kernel with the matrix instructions, the others are small; but whose spills they are doesn't matter.
    """
    used = defaultdict(int)
    for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage):
        used[name] = max(used[name], int(value))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    matrix = Counter(dict.fromkeys(WGMMA, 0))
    for opcode, count in opcodes.items():
        if opcode.split(".")[0].endswith("MMA"):
            matrix[opcode.split(".")[0]] += count
    setmaxnreg = {int(value, 16) for value in re.findall(r"\bUSETMAXREG\.[^;]*?(0x[0-9a-f]+)", sass)}
    return Report(
        config=repr(config),
        predicted=Predicted.of(config),
        registers=used["REG"],
        setmaxnreg=tuple(sorted(setmaxnreg)),
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=launched_shared_memory(host),
        shared_static=used["SHARED"],
        shared_fits=not overruns(host),
        threads=max(int(n) for n in re.findall(r"^\.reqntid (\d+)", ptx, re.MULTILINE)),
        matrix=dict(matrix),
        counts={name: sum(n for op, n in opcodes.items() if f"{op}.".startswith(f"{name}.")) for name in COUNTED},
        instructions=sum(opcodes.values()),
    )


def launched_shared_memory(host):
    """The dynamic shared memory in the host code's launch, or in the one that has most, in bytes; None where none can be found."""
    found = []
    for function in host.split("llvm.func @"):  # names like %17 are a function's own
        for slot in re.findall(rf"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : [^\n]*{re.escape(LAUNCH)}", function):
            stored = re.search(rf"llvm\.store (%\w+), {slot} : i64", function)
            value = stored and re.search(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", function)
            if value:
                found.append(int(value[1]))
    return max(found, default=None)


def overruns(host):
    """Whether the DSL left its check for a launch with too little shared memory in the host code: it folds a needless one away."""
    messages = re.findall(r'@(\w+)\("[^\n]*may exceed available memory set in kernel launch', host)
    return any(re.search(rf"addressof @{message}\b", host) for message in messages)


def problems(report):
    """What breaks the rules for a shipped kernel, one line each with the numbers; an empty list where nothing does."""
    found, want, n = [], report.predicted, report.counts
    if report.stack or report.local or n["LDL"] or n["STL"]:
        found.append(
            f"registers spill: {report.stack} bytes of stack, {report.local} of local memory, "
            f"{n['LDL']} loads (LDL) and {n['STL']} stores (STL)"
        )
    for name in {**want.matrix, **report.matrix}:
        count, expected = report.matrix.get(name, 0), want.matrix.get(name, 0)
        if count != expected:
            found.append(f"{count} {name}, expected {expected}")
    wgmma = next(iter(want.matrix))
    wgmmas = report.matrix.get(wgmma, 0)
    if wgmmas and 2 * n["WARPGROUP.DEPBAR"] >= wgmmas:
        found.append(
            f"WGMMAs are serialised: {n['WARPGROUP.DEPBAR']} waits (WARPGROUP.DEPBAR) for {wgmmas} {wgmma}, "
            "so that the tensor cores idle after each"
        )
    if not n["UTMALDG"]:
        found.append("no TMA load (UTMALDG)")
    if not n["UTMASTG"]:
        found.append("no TMA store (UTMASTG)")
    if want.adds and not n[want.adds]:
        found.append(f"no addition to memory ({want.adds})")
    if report.registers > want.registers or (want.setmaxnreg and report.registers < want.registers):
        at_most = "" if want.setmaxnreg else "at most "
        found.append(f"{report.registers} registers at entry, the config predicted {at_most}{want.registers}")
    if report.setmaxnreg != want.setmaxnreg:
        found.append(f"setmaxnreg to {list(report.setmaxnreg)} registers, the config predicted {list(want.setmaxnreg)}")
    if report.threads != want.threads:
        found.append(f"{report.threads} threads, the config predicted {want.threads}")
    if report.shared != want.shared:
        found.append(f"the launch asks for {report.shared} bytes of shared memory, the config predicted {want.shared}")
    if report.shared_static != CUDA_SHARED_MEMORY:
        found.append(f"{report.shared_static} bytes of static shared memory, {CUDA_SHARED_MEMORY} (CUDA's own) expected")
    if not report.shared_fits:
        found.append(f"the kernel allocates more shared memory than the {report.shared} bytes that the launch asks for")
    return found


COLUMNS = {  # of the table: header -> what stands there
    "registers": lambda r: r.registers,
    "setmaxnreg": lambda r: "/".join(map(str, r.setmaxnreg)),
    "threads": lambda r: r.threads,
    "shared": lambda r: r.shared,
    "stack": lambda r: r.stack,
    "local": lambda r: r.local,
    "LDL/STL": lambda r: f"{r.counts['LDL']}/{r.counts['STL']}",
    "matrix": lambda r: " ".join(f"{count} {name}" for name, count in r.matrix.items() if count),
    "DEPBAR": lambda r: r.counts["WARPGROUP.DEPBAR"],
    "UTMALDG": lambda r: r.counts["UTMALDG"],
    "UTMASTG": lambda r: r.counts["UTMASTG"],
    "REDG": lambda r: r.counts["REDG"],
    "EX2": lambda r: r.counts["MUFU.EX2"],
    "R2P": lambda r: r.counts["R2P"],
    "instructions": lambda r: r.instructions,
}


def show(configs, reports):
    """Prints the reports as a table, the fields in which the configs differ in front; returns whether there are problems."""
    names = [f.name for f in fields(configs[0])]
    differ = [name for name in names if len({getattr(c, name) for c in configs}) > 1]
    print(f"{len(configs)} {configs[0].family} kernels for {jit.ARCHITECTURE}")
    alike = [f"{name}={getattr(configs[0], name)}" for name in names if name not in differ]
    if alike:
        print(f"{'all: ' if len(configs) > 1 else ''}{' '.join(alike)}")
    rows = [
        [*(str(getattr(c, name)) for name in differ), *(cell(r) for cell in COLUMNS.values())]
        for c, r in zip(configs, reports)
    ]
    show_table([*differ, *COLUMNS], rows)
    found = [(report, problem) for report in reports for problem in problems(report)]
    for report, problem in found:
        print(f"PROBLEM {report.config}: {problem}")
    if not found:
        print("no problems: no spills, the expected WGMMAs and no other matrix instruction, all else as predicted")
    return bool(found)


def run(configs, as_json=False, jobs=None):
    """python -m fa3 inspect: the exit code."""
    reports = inspect_all(configs, jobs)
    if not as_json:
        return int(show(configs, reports))
    json.dump([report.as_json() for report in reports], sys.stdout, indent=1)
    print()
    return int(any(problems(report) for report in reports))
