"""Times kernel variants against each other and the peers: `python -m perf.sweep --point "128 causal: stages=2,3"`.

Variants are compiled in parallel processes into the disk cache first. Then they are measured on the paper's grid as
`python -m perf run` measures providers (--suite: on another one): the same turns in random order, the same check of outputs,
the same file. In the backward direction the peers are called through autograd, and variants without it.
"""

import argparse
import ast
import itertools
import json
import subprocess
import sys
from dataclasses import asdict

import torch
from rich.console import Console

from fa3 import jit
from fa3.kernels.configs import ConfigError
from fa3.parallel import map_configs
from perf import PerfError, peers, results, suites, timing
from perf.runner import Bench, new_run, plain, require_hopper
from perf.variants import CONFIGS, BackwardVariant, ForwardVariant

ONCE_SECONDS = 25  # for a process that starts, loads a kernel and launches it; 15 beside each other


def parse(text, dtype, direction="fwd"):
    """(head_dim, causal, variants) of "128 causal: tile_n=128,160 scheduler=dynamic,single heads=l2,all": all combinations.

    Combinations that no GPU could run are left out. heads is not a field of the config, and for the forward only.
    """
    where, lists = text.split(":", 1)
    head_dim, mask = where.split()
    choices = dict(part.split("=") for part in lists.split())
    forward = direction == "fwd"
    heads = [value(h) for h in choices.pop("heads", "l2").split(",")] if forward else []
    known = CONFIGS[direction].__dataclass_fields__
    unknown = choices.keys() - known.keys()
    if unknown:
        raise PerfError(f"--point: no field {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    found = []
    for values in itertools.product(*([value(v) for v in listed.split(",")] for listed in choices.values())):
        fields = dict(zip(choices, values))
        if forward:
            fields.setdefault("lse", False)
            if fields.get("tile_m") == 64:
                fields["pingpong"] = False
        try:
            config = CONFIGS[direction](dtype=dtype, head_dim=int(head_dim), mask=mask, **fields)
        except ConfigError:
            continue
        found += [ForwardVariant(config, h) for h in heads] if forward else [BackwardVariant(config)]
    return int(head_dim), mask == "causal", found


def value(text):
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def try_one(config):
    """Compiles a config into the disk cache (a kernel can't be sent back), and has it run once, so that one that hangs is left out."""
    jit.get(config)
    direction = next(name for name, kind in CONFIGS.items() if kind is type(config))
    once = [sys.executable, "-W", "ignore", "-m", "perf.once", direction, json.dumps(asdict(config))]
    try:
        ran = subprocess.run(once, capture_output=True, text=True, timeout=ONCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise PerfError(f"no end after {ONCE_SECONDS} s") from None
    if ran.returncode:
        raise PerfError(ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else f"exit status {ran.returncode}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--point", action="append", required=True, help='"HEAD_DIM MASK: field=value,value ...", see parse()')
    parser.add_argument("--direction", choices=CONFIGS, default="fwd", help="default: %(default)s")
    parser.add_argument("--suite", default="paper", help="whose shapes; default: %(default)s")
    parser.add_argument("--seqlens", help="of the suite's, comma-separated; default: all")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--providers", default="fa4", help="peers beside the variants; default: %(default)s")
    parser.add_argument("--against", metavar="COMMIT", help="this project at another commit too, or a folder with its sources")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", metavar="HASH", help="the commit measured, where the tree was copied")
    parser.add_argument("--out", help="default: perf/results/DATE-sweep-DIRECTION-GPU.json")
    args = parser.parse_args()
    console = Console()
    require_hopper()
    groups = {}
    for text in args.point:
        head_dim, causal, variants = parse(text, args.dtype, args.direction)
        groups.setdefault((head_dim, causal), {}).update(dict.fromkeys(variants))  # each once
    configs = {variant.config for variants in groups.values() for variant in variants}
    for config, error in map_configs(try_one, configs, "compiling"):
        if isinstance(error, Exception):  # a variant that doesn't compile is a result too
            plain(console, f"FAILED {config}: {error}")
            groups = {group: {v: None for v in variants if v.config != config} for group, variants in groups.items()}

    others = peers.providers(args.providers.split(",")) + ([peers.OtherCommit(args.against)] if args.against else [])
    missing = [(provider.name, why) for provider in others if (why := provider.available()) is not None]
    for name, why in missing:
        plain(console, f"left out: {name}: {why}")
    others = [provider for provider in others if provider.name not in dict(missing)]
    for provider in others:
        provider.prepare()
    seqlens = [int(s) for s in args.seqlens.split(",")] if args.seqlens else None
    asked = {"seqlens": seqlens, "dtypes": [args.dtype], "direction": args.direction}
    points = {(d, causal): suites.select(args.suite, head_dims=[d], causal=causal, **asked) for d, causal in groups}
    data = new_run("sweep", [p for of_group in points.values() for p in of_group], others, args.rounds, args.commit)
    path = results.claim(args.out or results.default_path(data))
    for group, variants in groups.items():
        with torch.set_grad_enabled(args.direction == "bwd"):
            Bench(data, path, [*others, *variants], timing.CudaDevice(), console).measure(points[group])
        show(data, group, [*variants, *others], points[group], console)
    plain(console, f"written: {path}")


def show(data, group, providers, points, console):
    """A row for each provider, a column for each length; "!" where an output differs from the first peer's."""
    measured = {results.point_of(record): record["results"] for record in data["records"]}
    names = dict.fromkeys(provider.name for provider in providers)
    width = max([25, *map(len, names)])
    title = f"d {group[0]} {'causal' if group[1] else 'full'}"
    plain(console, f"\n{title:{width}s}" + "".join(f"{p.seqlen_q:8d}" for p in points))
    for name in names:
        entries = [measured.get(point, {}).get(name) for point in points]
        cells = ["-" if e is None else f"{e['tflops']:.0f}" + "!" * ("differs" in e) for e in entries]
        plain(console, f"{name:{width}s}" + "".join(f"{cell:>8s}" for cell in cells))


if __name__ == "__main__":
    try:
        main()
    except PerfError as error:
        sys.exit(f"perf.sweep: {error}")
