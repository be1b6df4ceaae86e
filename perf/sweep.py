"""Times kernel variants against each other in one process: `python -m perf.sweep`, on the GPU machine.

Variants are compiled in parallel processes into the disk cache first; then each point runs them interleaved.
"""

import argparse
import itertools
import json
import statistics
import time
from dataclasses import dataclass

import torch

from fa3 import jit
from fa3.attention import device_of
from fa3.kernels.configs import ConfigError, ForwardConfig
from fa3.parallel import map_configs
from fa3.plan import head_group
from fa3.problem import Problem
from fa3.timing import burst, torch_sdpa


@dataclass(frozen=True)
class Variant:
    """A config and how many heads are worked on together: "l2" as planned, "all", or a number."""

    config: ForwardConfig
    heads: str | int = "l2"

    def label(self):
        c = self.config
        flags = ("P" if c.pingpong else "-") + ("O" if c.overlap else "-") + c.scheduler[0]  # s, p or d
        flags += ("q" if c.q_in_registers else "-") + f"{c.rescale_from:g}c{c.max_chains}" + "l" * c.late_release
        return f"{c.tile_m}x{c.tile_n}s{c.stages}{flags}:{self.heads}"


def parse(text, head_dim, mask, dtype):
    """Variants from "tile_m=128,192 tile_n=128,160 scheduler=persistent,single heads=l2,all": the product of all lists."""
    fields = dict(part.split("=") for part in text.split())
    heads = fields.pop("heads", "l2").split(",")
    names = list(fields)
    found = []
    for values in itertools.product(*(fields[n].split(",") for n in names)):
        kinds = ForwardConfig.__dataclass_fields__
        typed = {n: v if kinds[n].type in (str, "str") else eval(v) for n, v in zip(names, values)}
        if typed.get("tile_m") == 64:
            typed["pingpong"] = False
        try:
            config = ForwardConfig(dtype=dtype, head_dim=head_dim, mask=mask, lse=False, **typed)
        except ConfigError:
            continue
        found += [Variant(config, int(h) if h.isdigit() else h) for h in heads]
    return found


def compile_one(config):
    jit.get(config)  # into the disk cache; a kernel can't be sent back


def launch(variant, q, k, v, out, causal):
    b, s, h, d = q.shape
    problem = Problem(variant.config.dtype, b, s, k.shape[1], h, k.shape[2], d, causal, d**-0.5, False, 0)
    device = device_of(q.device)
    group = {"l2": lambda: head_group(problem, device), "all": lambda: h * b}.get(variant.heads, lambda: variant.heads)()
    tiles = -(-s // variant.config.tile_m) * h * b
    kernel, scale = jit.get(variant.config), d**-0.5
    counter = torch.zeros(2, dtype=torch.int32, device="cuda") if variant.config.scheduler == "dynamic" else None
    return lambda: kernel(q, k, v, out, None, scale, group, min(device.sms, tiles), counter)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--point", action="append", required=True, help='"HEAD_DIM MASK: variants", see parse()')
    parser.add_argument("--seqlens", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--fa4", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--milliseconds", type=float, default=12)
    parser.add_argument("--cool", type=float, default=0, help="seconds of rest before each burst")
    parser.add_argument("--out")
    args = parser.parse_args()
    groups = {}
    for point in args.point:
        head, variants = point.split(":", 1)
        head_dim, mask = head.split()
        groups.setdefault((int(head_dim), mask), []).extend(parse(variants, int(head_dim), mask, args.dtype))
    configs = {v.config for variants in groups.values() for v in variants}
    t = time.time()
    for config, error in map_configs(compile_one, configs, "compiling"):
        if isinstance(error, Exception):  # a variant that doesn't compile is a result too
            print("FAILED", config, error)
    print(f"{len(configs)} configs compiled in {time.time() - t:.0f} s", flush=True)
    if args.fa4:
        from flash_attn.cute import flash_attn_func as fa4
    seqlens = [int(s) for s in args.seqlens.split(",")]
    results = []
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    for (d, mask), variants in groups.items():
        causal, table = mask == "causal", {}
        for s in seqlens:
            b, h = max(1, 16384 // s), 2048 // d
            q, k, v = (torch.randn(b, s, h, d, device="cuda", dtype=dtype) for _ in range(3))
            truth = torch_sdpa(q, k, v, causal)().transpose(1, 2)
            runs, wrong = {}, set()
            for variant in variants:
                out = torch.full_like(q, float("nan"))
                try:
                    run = launch(variant, q, k, v, out, causal)
                    run()
                    torch.cuda.synchronize()
                except Exception as error:
                    print("FAILED", variant.label(), str(error)[:100])
                    continue
                runs[variant.label()] = run
                if not (out.float() - truth.float()).abs().max() < 0.04:
                    wrong.add(variant.label())
            if args.fa4:
                runs["fa4"] = lambda: fa4(q, k, v, causal=causal)
            flops = 4 * s * s * d * h * b * (0.5 if causal else 1)
            counts, times = {}, {name: [] for name in runs}
            for name, run in runs.items():
                run()
                counts[name] = max(2, int(args.milliseconds / burst(run, 2)))
            names = list(runs)
            for r in range(args.rounds):
                for name in names[r % len(names) :] + names[: r % len(names)]:
                    time.sleep(args.cool)
                    times[name].append(burst(runs[name], counts[name]))
            for name, samples in times.items():
                rate = flops / statistics.median(samples) / 1e9
                table.setdefault(name, []).append(f"{rate:5.0f}" + ("!" if name in wrong else " "))
                results.append(dict(head_dim=d, mask=mask, seqlen=s, variant=name, tflops=rate, wrong=name in wrong))
        print(f"\nd {d} {mask:7s} {'':14s}" + " ".join(f"{s:6d}" for s in seqlens))
        for name, row in table.items():
            print(f"{name:28s}" + " ".join(row), flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
