"""A run as a table in the terminal: a row for each point, a column for each provider, and what the bars ask for.

fa3/best  this project's speed over the best peer's in this run
fa3/fa4   this project's speed over FlashAttention-4's in this run
mark      (fa3/fa4) / best_over_fa4: the speed over the best of all peers in perf/targets.json, whether or not they are
          in this run. "ok" from 1.02 up, "gemm" where the point runs at this run's GEMM rate, else "--". Backward: "ok" from
          1.01 up, where at head_dim 256 from seqlen 2k up fa3/fa4 must be 1.35 too
fa3/base  this project's rate (TFLOP/s) at this point over its own at the point that this one is held against:
          MHA for grouped-query points, the nearest round length for odd ones, bf16 for fp16
"""

import json
import math
import statistics
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from perf import results, suites

TARGETS = Path(__file__).with_name("targets.json")
OURS = "fa3"
MARK = {"fwd": 1.02, "bwd": 1.01}  # at every point
BACKWARD_MEAN = 1.05  # of the marks, geometric
BACKWARD_D256 = 1.35  # fa3/fa4, at head_dim 256 from seqlen SHORT up
SHORT = 2048  # seqlens up to here have a mean of their own
UNITS = {"kernel": "TFLOP/s", "host": "host time, µs a call", "graph": "replay in a CUDA graph, µs a call"}
RATIOS = ("fa3/best", "fa3/fa4", "mark", "fa3/base")


def targets(path=TARGETS):
    """{Point: best_over_fa4} of the paper's grid; empty where there is no such file."""
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    marks = {}
    for entry in data["points"]:
        d, s, heads = entry["head_dim"], entry["seqlen"], suites.PAPER_HIDDEN // entry["head_dim"]
        point = suites.Point(d, entry["causal"], entry["batch"], s, s, heads, heads, data["dtype"], entry["direction"])
        marks[point] = entry["best_over_fa4"]
    return marks


def ratios(point, measured, marks):
    """{name of the ratio: its value} for one record; a ratio whose parts weren't measured is absent."""
    times = {name: entry["median_ms"] for name, entry in measured.items()}
    ours = times.pop(OURS, None)
    if ours is None or not times:
        return {}
    found = {"fa3/best": min(times.values()) / ours}
    if "fa4" in times:
        found["fa3/fa4"] = times["fa4"] / ours
        if point in marks:
            found["mark"] = found["fa3/fa4"] / marks[point]
    return found


def held_to_fa4(point):
    """Whether the point has a bar of its own for fa3/fa4, BACKWARD_D256."""
    return point.direction == "bwd" and point.head_dim == 256 and point.seqlen_q >= SHORT


def reached(point, found):
    """Whether a point with a mark is where the bars want it."""
    return found["mark"] >= MARK[point.direction] and (not held_to_fa4(point) or found["fa3/fa4"] >= BACKWARD_D256)


def geometric_mean(values):
    return math.exp(statistics.fmean(math.log(value) for value in values))


def show(data, console):
    """Prints a table for each kind of measurement in the run, each with its means and remarks below it."""
    for measure in results.MEASURES:
        records = [record for record in data["records"] if record["measure"] == measure]
        if records:
            Sheet(measure, records, data).show(console)


class Sheet:
    """The records of one kind of measurement."""

    def __init__(self, measure, records, data):
        self.measure = measure
        self.data = data
        marks = targets() if measure == "kernel" else {}
        by_point = {results.point_of(record): record["results"] for record in records}
        by_point = dict(sorted(by_point.items(), key=lambda item: item[0].dtype))  # dtypes took turns, rows of one stand together
        self.rows = [(point, measured, ratios(point, measured, marks)) for point, measured in by_point.items()]
        for point, measured, found in self.rows:
            base = by_point.get(suites.held_against(point), {})
            if measure == "kernel" and OURS in measured and OURS in base:
                found["fa3/base"] = measured[OURS]["tflops"] / base[OURS]["tflops"]
        present = {name: None for _, measured, _ in self.rows for name in measured}
        self.providers = sorted(present, key=lambda name: name != OURS)
        self.ratios = [name for name in RATIOS if any(name in found for _, _, found in self.rows)]

    def show(self, console):
        table = self.table()
        # at the table's own width, or rich cuts digits away to fit the terminal (80 columns where there is none)
        needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        wide = Console(file=console.file, force_terminal=console.is_terminal, width=max(console.width, needed))
        wide.print(table)
        for line in self.means() + self.bars() + self.remarks():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self):
        several_dtypes = len({point.dtype for point, _, _ in self.rows}) > 1
        title = f"{self.data['suite']}, {self.data['direction']}, {self.data['machine']['gpu']}: {UNITS[self.measure]}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        if several_dtypes:
            table.add_column("dtype", no_wrap=True)
        for name in ("d", "mask", "batch", "seqlen", "heads"):
            table.add_column(name, justify="left" if name == "mask" else "right", no_wrap=True)
        for name in self.providers:
            table.add_column(name, justify="right", no_wrap=True, style="bold" if name == OURS else None)
        for name in self.ratios:
            table.add_column(name, justify="left" if name == "mark" else "right", no_wrap=True)
        group = None
        for point, measured, found in self.rows:
            if group not in (None, panel(point)):
                table.add_section()
            group = panel(point)
            row = [point.dtype] if several_dtypes else []
            row += [str(point.head_dim), point.mask_label(), str(point.batch), point.seqlen_label(), point.heads_label()]
            row += [self.speed(measured.get(name)) for name in self.providers]
            row += [self.verdict(point, found, measured) if name == "mark" else number(found.get(name)) for name in self.ratios]
            table.add_row(*row)
        return table

    def speed(self, entry):
        if entry is None:
            return "-"
        text = f"{entry['tflops']:.0f}" if self.measure == "kernel" else f"{entry['median_ms'] * 1e3:.1f}"
        return text + ("!" if "differs" in entry else "")

    def verdict(self, point, found, measured):
        if "mark" not in found:
            return "-"
        gemm = self.data.get(results.gemm_key(point.dtype))
        if reached(point, found):
            word = "ok"
        elif gemm is not None and measured[OURS]["tflops"] >= gemm["tflops"]:
            word = "gemm"
        else:
            word = "--"
        return f"{found['mark']:.3f} {word}"

    def means(self):
        groups = [("geomean", self.rows)]
        short = [row for row in self.rows if row[0].seqlen_q <= SHORT]
        if 0 < len(short) < len(self.rows):
            groups.append((f"geomean, seqlen <= {SHORT}", short))
        lines = []
        for title, rows in groups:
            parts = []
            for name in self.ratios:
                values = [found[name] for _, _, found in rows if name in found]
                if values:
                    parts.append(f"{name} {geometric_mean(values):.3f} (of {len(values)})")
            if parts:
                lines.append(f"{title}: {', '.join(parts)}")
        for name in self.ratios:
            point, lowest = min(((p, f[name]) for p, _, f in self.rows if name in f), key=lambda pair: pair[1])
            lines.append(f"lowest {name}: {lowest:.3f} at {point.label()}")
        return lines

    def bars(self):
        """What the backward has to reach, and where it stands."""
        rows = [(point, found) for point, _, found in self.rows if point.direction == "bwd" and "mark" in found]
        if not rows:
            return []
        points = sum(found["mark"] >= MARK["bwd"] for _, found in rows)
        mean = geometric_mean(found["mark"] for _, found in rows)
        verdict = "reached" if mean >= BACKWARD_MEAN else "not reached"
        lines = [
            f"bar, mark {MARK['bwd']}: reached at {points} of {len(rows)} points",
            f"bar, mark {BACKWARD_MEAN} in the geometric mean: {verdict}, {mean:.3f}",
        ]
        large = [found["fa3/fa4"] for point, found in rows if held_to_fa4(point)]
        if large:
            ahead = sum(ratio >= BACKWARD_D256 for ratio in large)
            lines.append(
                f"bar, fa3/fa4 {BACKWARD_D256} at head_dim 256 from {SHORT} up: reached at {ahead} of {len(large)} points, "
                f"lowest {min(large):.3f}"
            )
        return lines

    def remarks(self):
        spreads = [(entry["spread"], name, point) for point, found, _ in self.rows for name, entry in found.items()]
        lines = []
        if spreads:
            largest, name, point = max(spreads, key=lambda entry: entry[0])
            median = statistics.median(entry[0] for entry in spreads)
            lines.append(f"spread over the rounds: median {median:.1%}, largest {largest:.1%} ({name} at {point.label()})")
        for dtype in suites.ELEMENT_BYTES:
            gemm = self.data.get(results.gemm_key(dtype))
            if gemm is not None and self.measure == "kernel":
                lines.append(f"{dtype} GEMM {gemm['size']}^3 in this run: {gemm['tflops']:.0f} TFLOP/s (spread {gemm['spread']:.1%})")
        for point, measured, _ in self.rows:
            for name, entry in measured.items():
                if "differs" in entry:
                    by, reference = entry["differs"]["relative"], entry["differs"]["from"]
                    output = entry["differs"].get("output", "the output")
                    size = "in NaN or infinity" if by is None else f"by {by:.2g}"
                    lines.append(f"! {output} of {name} differs from that of {reference} {size} at {point.label()}")
        return lines


def panel(point):
    """Points with the same panel belong together: between two panels the table has a line, and a chart ends."""
    chunked = point.seqlen_q != point.seqlen_k
    paper_heads = point.heads == point.heads_kv and point.heads * point.head_dim == suites.PAPER_HIDDEN
    heads = None if paper_heads and not chunked else (point.heads, point.heads_kv)
    return (point.direction, point.dtype, point.head_dim, point.causal, heads, chunked)


def number(ratio):
    return "-" if ratio is None else f"{ratio:.3f}"
