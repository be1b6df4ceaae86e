"""python -m perf: the command line, and nothing else."""

import argparse
import math
import sys

from perf import PerfError, peers, suites, timing

ROUNDS = 5  # at each point, if not told otherwise


def words(text):
    return [word for word in text.split(",") if word]


def integers(text):
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def dtypes(text):
    unknown = [word for word in words(text) if word not in suites.ELEMENT_BYTES]
    if unknown or not words(text):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(suites.ELEMENT_BYTES)}, separated by commas, got {text!r}")
    return words(text)


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def milliseconds(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of milliseconds, got {text!r}")
    return value


def parser():
    top = argparse.ArgumentParser(prog="python -m perf", description="Measures this project beside its peers on a Hopper GPU.")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure a suite, print a table, write a result file")
    run.add_argument("--suite", choices=suites.SUITES, default="paper", help="default: paper")
    directions = suites.DIRECTION_FLOPS
    run.add_argument("--direction", choices=directions, default="fwd", help="fwd (default), or bwd: the backward alone")
    run.add_argument("--dtype", type=dtypes, default=["bf16"], metavar="DTYPE,...", help="bf16 (default), fp16")
    run.add_argument(
        "--providers", type=words, default=peers.DEFAULT, metavar="NAME,...",
        help=f"of {', '.join(peers.PROVIDERS)}; default: {','.join(peers.DEFAULT)}",
    )  # fmt: skip
    run.add_argument("--head-dim", type=integers, metavar="D,...", help="only these head dims")
    run.add_argument("--causal", action=argparse.BooleanOptionalAction, help="only causal points, or only the others")
    run.add_argument("--seqlen", type=integers, metavar="S,...", help="only these lengths of q")
    run.add_argument("--rounds", type=count, metavar="N", help=f"rounds at each point; default: {ROUNDS}")
    run.add_argument(
        "--burst-ms", type=milliseconds, metavar="MS",
        help=f"how long a burst of launches is; shorter ones, in more rounds, for a ratio of two kernels; default: {timing.BURST_MS:g}",
    )  # fmt: skip
    run.add_argument("--out", metavar="FILE", help="default: perf/results/DATE-SUITE-DIRECTION-GPU.json; nothing is overwritten")
    run.add_argument("--commit", metavar="HASH", help="the commit measured, where the tree was copied")
    run.add_argument(
        "--against", action="append", default=[], metavar="COMMIT", help="this project at another commit too, or a folder with its sources"
    )

    show = commands.add_parser("show", help="print a result file's table")
    show.add_argument("file")

    compare = commands.add_parser("compare", help="what moved between two result files; exit code 1 if a point slid by over 2 %%")
    compare.add_argument("old")
    compare.add_argument("new")
    compare.add_argument("--provider", default="fa3", help="whose movement is judged; default: fa3")

    report = commands.add_parser("report", help="draw a result file as bar charts (PNG)")
    report.add_argument("file")
    report.add_argument("--out", metavar="DIR", help="default: report/NAME OF THE FILE")
    return top


def dispatch(options):
    if options.command == "compare":
        from perf import compare

        return compare.run(options.old, options.new, options.provider)
    if options.command == "report":
        from perf import report

        return report.run(options.file, options.out)

    from rich.console import Console

    console = Console()
    if options.command == "show":
        from perf import results, table

        table.show(results.read(options.file), console)
        return 0

    from perf import runner

    if (options.suite, options.direction) == ("host", "bwd"):
        for option, given in (("--rounds", options.rounds), ("--burst-ms", options.burst_ms)):
            if given is not None:
                raise PerfError(f"{option} is for launches on the GPU; suite host times only the host in the backward direction: leave it out")
    filters = {
        "head_dims": options.head_dim,
        "causal": options.causal,
        "seqlens": options.seqlen,
        "dtypes": options.dtype,
        "direction": options.direction,
    }
    return runner.run(
        suite=options.suite,
        filters=filters,
        providers=[*peers.providers(options.providers), *map(peers.OtherCommit, options.against)],
        rounds=ROUNDS if options.rounds is None else options.rounds,
        burst_ms=timing.BURST_MS if options.burst_ms is None else options.burst_ms,
        out=options.out,
        commit=options.commit,
        console=console,
    )


def main(arguments=None):
    try:
        return dispatch(parser().parse_args(arguments))
    except PerfError as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
