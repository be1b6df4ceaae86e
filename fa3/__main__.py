"""python -m fa3: the command line, and nothing else."""

import argparse
import sys

SETS = ("all", "d64", "d128", "d256")  # of shipped kernels, by head dim


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def parser():
    top = argparse.ArgumentParser(prog="python -m fa3", description="FlashAttention-3 for Hopper GPUs in CuTe DSL.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    commands.add_parser("demo", help="one attention, checked and timed; without a Hopper GPU compiled, read and run on the CPU")

    doctor = commands.add_parser("doctor", help="what is here, what is missing, and the command that mends it")
    doctor.add_argument("--json", action="store_true", help="for programs")

    precompile = commands.add_parser("compile", help="compile kernels into the disk cache, in parallel; needs no GPU")
    precompile.add_argument("--set", choices=SETS, default="all", help="which kernels; default: all that planning can choose")
    precompile.add_argument("--jobs", type=count, metavar="N", help="processes; default: one a core")

    report = commands.add_parser(
        "inspect", help="registers, spills, shared memory and instructions of each kernel; needs no GPU"
    )
    report.add_argument("--family", default="forward", metavar="NAME", help="forward or backward; default: forward")
    report.add_argument("--set", choices=SETS, default="all", help="which kernels; default: all that planning can choose")
    report.add_argument("--json", action="store_true", help="a list of reports, for programs")
    report.add_argument("--jobs", type=count, metavar="N", help="processes; default: one a core")

    bench = commands.add_parser("bench", help="a quick table of the forward's speed beside torch's; needs a Hopper GPU")
    bench.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128, 256), default=[128], metavar="D", help="default: 128")
    bench.add_argument("--seqlen", type=count, nargs="+", default=[1024, 4096, 16384], metavar="S", help="default: 1024 4096 16384")
    bench.add_argument("--causal", choices=("no", "yes", "both"), default="both", help="default: both")
    bench.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="default: bf16")
    return top


def dispatch(options):
    """Runs a command; what it needs is imported here, so that `doctor` works where that is missing."""
    if options.command == "doctor":
        from . import doctor

        return doctor.run(options.json)
    if options.command == "demo":
        from . import demo

        return demo.run()
    if options.command == "compile":
        from . import precompile

        return precompile.run(options.set, options.jobs)
    if options.command == "inspect":
        from . import inspect, precompile, toolkit

        try:
            return inspect.run(precompile.shipped(options.set, options.family), options.json, options.jobs)
        except (toolkit.ToolError, ValueError) as error:
            print(f"inspect: {error}", file=sys.stderr)
            return 2
    from . import bench

    masks = {"no": [False], "yes": [True], "both": [False, True]}[options.causal]
    return bench.run(options.head_dim, options.seqlen, masks, options.dtype)


def main(arguments=None):
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.print_help()
        return 0
    try:
        return dispatch(options)
    except ImportError as error:
        print(f"{options.command}: {error}; `python -m fa3 doctor` says what is missing", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
