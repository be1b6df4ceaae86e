"""A run as the paper's bar charts: one PNG for each head dim and mask, and one overview of all of them."""

import re
from pathlib import Path

from perf import PerfError, results, suites
from perf.table import panel

DIRECTIONS = {"fwd": "Forward", "bwd": "Backward"}
# title and colour of each provider, in the order of the bars
PROVIDERS = {
    "fa2": ("FlashAttention-2 (torch)", "#b8bec7"),
    "cudnn": ("cuDNN (torch)", "#8fb26b"),
    "fa3-pypi": ("FlashAttention-3 (fa3-fwd)", "#e3a857"),
    "fa4": ("FlashAttention-4", "#5b8cc0"),
    "fa3": ("this project", "#c8385a"),
}
OTHER_COLOURS = ("#8a6fb0", "#4aa3a2", "#7d6b5d")
DPI = 160
PANEL_WIDTH = 7.6  # inches, in the overview


def run(path, out=None):
    """Writes the charts and says where; returns the exit code."""
    written = draw(results.read(path), Path(out) if out is not None else results.ROOT / "report" / Path(path).stem)
    for file in written:
        print(f"written: {file}")
    return 0


def draw(data, folder):
    """The paths of the charts drawn into this folder, the overview last."""
    panels = {}
    for record in data["records"]:
        if record["measure"] == "kernel" and record["results"]:
            point = results.point_of(record)
            panels.setdefault(panel(point), []).append((point, record["results"]))
    if not panels:
        raise PerfError(f"the run has no TFLOP/s to draw (suite {data['suite']}); python -m perf show prints it as a table")
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    present = {name for rows in panels.values() for _, measured in rows for name in measured}
    styles = style(present)
    panels = sorted(panels.values(), key=lambda rows: (rows[0][0].dtype, rows[0][0].causal))  # rows of the overview: masks
    written = []

    for rows in panels:
        width = max(9.5, 0.3 * len(rows) * len(styles))
        figure, axes = plt.subplots(figsize=(width, 4.8), layout="constrained")
        bars(axes, rows, styles, data, width)
        legend(figure, axes, columns=3)
        written.append(folder / f"{file_stem(rows)}.png")
        figure.savefig(written[-1], dpi=DPI)
        plt.close(figure)

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(PANEL_WIDTH * columns, 4.0 * lines + 0.5), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, rows in zip(grid.flat, panels):
        bars(axes, rows, styles, data, PANEL_WIDTH)
    legend(figure, grid.flat[0], columns=2 * columns)
    written.append(folder / "overview.png")
    figure.savefig(written[-1], dpi=DPI)
    plt.close(figure)
    return written


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise PerfError("report draws with matplotlib, which isn't installed: pip install 'fa3[perf]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def style(present):
    """{provider: (title, colour)} in the order of the bars; this project comes last."""
    strangers = sorted(present - PROVIDERS.keys())
    styles = {name: (name, OTHER_COLOURS[number % len(OTHER_COLOURS)]) for number, name in enumerate(strangers)}
    return {**styles, **{name: look for name, look in PROVIDERS.items() if name in present}}


def bars(axes, rows, styles, data, inches):
    """One chart, so many inches wide: a group of bars for each point, a bar for each provider, its TFLOP/s above it."""
    width = 0.84 / len(styles)
    label_size = min(8.0, 0.46 * width * 72 * 0.88 * inches / len(rows))  # three digits fit over a bar
    for number, (name, (title, colour)) in enumerate(styles.items()):
        offset = (number - (len(styles) - 1) / 2) * width
        drawn = [(place + offset, measured[name]["tflops"]) for place, (_, measured) in enumerate(rows) if name in measured]
        axes.bar([x for x, _ in drawn], [rate for _, rate in drawn], width * 0.94, label=title, color=colour, zorder=2)
        ours = name == "fa3"
        if label_size < 4.5 and not ours:
            continue  # crowded: only this project's bars get their number
        for x, rate in drawn:
            axes.annotate(
                f"{rate:.0f}", (x, rate), xytext=(0, 1.5), textcoords="offset points", ha="center", va="bottom",
                fontsize=max(label_size, 5.5), fontweight="bold" if ours else "normal", zorder=4,
            )  # fmt: skip
    highest = max(entry["tflops"] for _, measured in rows for entry in measured.values())
    gemm = data.get(results.gemm_key(rows[0][0].dtype))
    if gemm is not None:
        label = f"{gemm['dtype']} GEMM {gemm['size']}³, {gemm['tflops']:.0f}"
        axes.axhline(gemm["tflops"], color="#555555", linestyle=":", linewidth=1, zorder=1, label=label)
        highest = max(highest, gemm["tflops"])
    axes.set_ylim(0, highest * 1.08)
    axes.set_xticks(range(len(rows)), [tick(point, rows) for point, _ in rows], fontsize=8)
    axes.set_xlabel("sequence length")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title_of(rows[0][0], data), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#e6e6e6", zorder=0)
    axes.set_axisbelow(True)


def legend(figure, axes, columns):
    handles, titles = axes.get_legend_handles_labels()
    order = sorted(range(len(titles)), key=lambda number: "GEMM" in titles[number])
    handles, titles = [handles[number] for number in order], [titles[number] for number in order]
    figure.legend(handles, titles, loc="outside lower center", ncols=min(columns, len(titles)), frameon=False, fontsize=9)


def tick(point, rows):
    """The sequence length; with the batch where that isn't what the token count says anyway."""
    length = short(point.seqlen_q)
    if point.seqlen_q != point.seqlen_k:
        length += f" × {short(point.seqlen_k)}"
    one_token_count = len({other.batch * other.seqlen_q for other, _ in rows}) == 1
    one_batch = len({other.batch for other, _ in rows}) == 1
    return length if one_token_count or one_batch else f"{length}\nbatch {point.batch}"


def short(seqlen):
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def title_of(point, data):
    gpu = data["machine"]["gpu"].replace("NVIDIA ", "")
    parts = [DIRECTIONS[point.direction], f"head dim {point.head_dim}"]
    if point.causal:
        parts.append("causal")
    if panel(point)[4] is not None:
        parts.append(f"{point.heads_label()} heads")
    return f"{', '.join(parts)} ({gpu}, {point.dtype})"


def file_stem(rows):
    point = rows[0][0]
    parts = [point.direction, point.dtype, f"d{point.head_dim}", point.mask_label()]
    if panel(point)[4] is not None:
        parts.append(f"h{point.heads_label()}")
    if point.seqlen_q != point.seqlen_k:
        parts.append("chunked")
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts))


assert set(DIRECTIONS) == set(suites.DIRECTION_FLOPS)
