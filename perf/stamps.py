"""When each warpgroup does what, by clock stamps in a copy of the forward kernel: `python -m perf.stamps --point "128 causal 1024"`.

The kernel has no stamps. This puts them into a copy of its source: after (or before) the first line of a method that starts
with a given text, see MARKS. Each stamp is one store by one thread of a warpgroup, to memory that takes the place of the
LSE; it costs 20 to 40 cycles, so differences between lines count, not their sums.
"""

import argparse
import ast
import re
import tempfile

from perf import peers

KEPT = 2048  # stamps a warpgroup
MARKS = [  # method, line, where, what it says
    ("consume", "t.turns.begin", "before", "start"),
    ("overlapped_step", "t.k_ring.consumer_wait", "before", "step"),
    ("overlapped_step", "t.k_ring.consumer_wait", "after", "K"),
    ("overlapped_step", "self.issue_s", "after", "S issued"),
    ("overlapped_step", "t.v_ring.consumer_wait", "after", "V"),
    ("overlapped_step", "self.issue_o", "after", "O issued"),
    ("overlapped_step", "wgmma.wait(1)", "after", "S"),
    ("overlapped_step", "t.softmax.second_row", "after", "softmax"),
    ("overlapped_step", "wgmma.wait(0)", "after", "O"),
    ("overlapped_step", "t.softmax.rescale", "after", "P"),
    ("presumed_p", "l_tile, holds", "after", "softmax"),
    ("presumed_p", "t.v_ring.consumer_release", "after", "O"),
    ("presumed_p", "t.softmax.take_in", "after", "P"),
    ("consume", "finished =", "before", "end of tile"),
    ("consume", "going_on = c.overlap", "before", "next tile"),
    ("consume", "t.v_ring.consumer_wait(v_at)", "after", "Q, V"),
    ("consume", "self.issue_o", "after", "O issued"),
    ("start_tile", "t.q_ring.consumer_wait", "after", "Q"),
    ("start_tile", "self.issue_s", "before", "K"),
    ("start_tile", "self.issue_s", "after", "S issued"),
    ("consume", "wgmma.wait(1)", "after", "O"),
    ("epilogue", "t.softmax.finish", "after", "O / l"),
    ("epilogue", "output.write", "before", "place for O"),
    ("consume", "self.epilogue", "after", "epilogue"),
    ("p_alone", "wgmma.wait(0)", "after", "S"),
    ("p_alone", "round_into", "after", "P"),
    ("consume", "output.finish", "after", "end"),
]
STAMP = """
from cutlass import Int64
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import T


@cute.jit
def stamp(t, code: Constexpr[int]):
    now = Int32(nvvm.read_ptx_sreg_clock(T.i32()))
    cute.arch.inline_ptx(
        "{.reg .pred p; setp.eq.s32 p, {$r0}, 0; @p st.global.v2.u32 [{$r1}], {{$r2}, CODE};}".replace("CODE", str(code)),
        read_only_args=[t.thread, t.stamps + Int64(t.stamped[0]) * 8, now],
    )
    t.stamped[0] = min(t.stamped[0] + 1, KEPT - 1)


"""


def stamped(source):
    """The forward kernel's source with stamps. ValueError where a line of MARKS isn't there any more."""
    for code, (method, line, where, _) in enumerate(MARKS):
        source = marked(source, method, line, where, code)
    for before, after in (
        ("@dataclass(frozen=True)\nclass Consumer:", STAMP.replace("KEPT", str(KEPT)) + "@dataclass(frozen=True)\nclass Consumer:"),
        ("    O: cute.Tensor\n\n\nclass", "    O: cute.Tensor\n    stamps: Int64\n    stamped: cute.Tensor\n\n\nclass"),
        ("loads, mQ, mK, queries_per_kv):", "loads, mQ, mK, queries_per_kv, LSE):"),
        ("loads, mQ, mK, queries_per_kv)\n", "loads, mQ, mK, queries_per_kv, LSE)\n        t.stamped[0] = Int32(0)\n"),
        (
            "(ROWS, c.head_dim)), Float32),\n",
            "(ROWS, c.head_dim)), Float32),\n"
            f"            stamps=LSE.iterator.toint() + Int64(cute.arch.block_idx()[0] * c.consumer_warpgroups + index) * {8 * KEPT},\n"
            "            stamped=cute.make_rmem_tensor(1, Int32),\n",
        ),
        ("if cutlass.const_expr(LSE is not None):", "if cutlass.const_expr(False):"),
    ):
        if source.count(before) != 1:
            raise ValueError(f"forward.py has {before!r} {source.count(before)} times, once expected")
        source = source.replace(before, after)
    return source


def marked(source, method, line, where, code):
    found = re.search(rf"    def {method}\(.*?(?=\n    (?:@|def )|\Z)", source, re.DOTALL)
    at = found and re.search(rf"^( +){re.escape(line)}.*\n", found[0], re.MULTILINE)
    if not at:
        raise ValueError(f"no line starts with {line!r} in forward.py's {method}")
    start = found.start() + (at.start() if where == "before" else at.end())
    return source[:start] + f"{at[1]}stamp(t, {code})\n" + source[start:]


def measure(head_dim, causal, seqlen, changes, ctas, show):
    """Runs a point of the paper's grid and prints, for these CTAs, the stamps around some changes of tiles."""
    import torch
    from fa3stamped.attention import Launch, device_of
    from fa3stamped.kernels.configs import ForwardConfig
    from fa3stamped.plan import FORWARD, planned
    from fa3stamped.problem import Problem

    batch, heads, mask = 16384 // seqlen, 2048 // head_dim, "causal" if causal else "none"
    config = ForwardConfig(head_dim=head_dim, mask=mask, **{**FORWARD[head_dim, mask], **changes})
    q, k, v = (torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    problem = Problem.of(q, k, v, softmax_scale=None, causal=causal, sm_margin=0, lse=True, unsupported={})
    launch = Launch(problem, planned(config, problem, device_of(q.device)), [None, None, None])
    memory = torch.zeros(132 * config.consumer_warpgroups * KEPT * 2 + batch * heads * seqlen, device="cuda")
    lse = memory[: batch * heads * seqlen].view(batch, heads, seqlen)
    out, launches = torch.empty_like(q), 100
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for i in range(2 * launches):  # the first half warms up
        if i == launches:
            began.record()
        launch.kernel(q, k, v, out, lse, *launch.arguments, launch.counter(q.device))
    ended.record()
    torch.cuda.synchronize()
    all_stamps = memory.view(torch.int32)[: 132 * config.consumer_warpgroups * KEPT * 2].view(-1, KEPT, 2).cpu().tolist()
    print(f"{config}\n{began.elapsed_time(ended) / launches * 1e3:.1f} us a launch (with the stamps)")
    summarise(all_stamps[: launch.arguments[2] * config.consumer_warpgroups])
    for cta in ctas:
        for w in range(config.consumer_warpgroups):
            show_one(f"CTA {cta} warpgroup {w}", all_stamps[cta * config.consumer_warpgroups + w], show)


def summarise(all_stamps):
    """The mean over all warpgroups of the cycles that end at each stamp, and how often one passes it."""
    cycles, times, spans = [0] * len(MARKS), [0] * len(MARKS), []
    for stamps in all_stamps:
        count = next(i for i, (_, code) in enumerate(stamps) if MARKS[code][3] == "end") + 1
        if count == KEPT:
            print(f"more than KEPT = {KEPT} stamps: what follows is missing, and counts as the last one's")
            return
        spans.append((stamps[count - 1][0] - stamps[0][0]) % 2**32)
        for (before, _), (after, code) in zip(stamps, stamps[1:count]):
            cycles[code] += (after - before) % 2**32
            times[code] += 1
    print(f"from start to end {min(spans)} {sum(spans) / len(spans):.0f} {max(spans)} (least, mean, most)")
    for code, (method, _, _, what) in enumerate(MARKS):
        if times[code]:
            print(f"   {method:16s} {what:10s} {cycles[code] / len(spans):9.0f} {times[code] / len(spans):7.2f} x {cycles[code] / times[code]:7.0f}")


def show_one(name, stamps, show):
    names = [what for *_, what in MARKS]
    passed = lambda i: (stamps[i][0] - stamps[i - 1][0]) % 2**32  # noqa: E731
    ends = [i for i, (_, code) in enumerate(stamps[:-2]) if names[code] == "end of tile"]
    print(f"{name}: cycles a tile", *((stamps[b][0] - stamps[a][0]) % 2**32 for a, b in zip(ends, ends[1:])))
    for i in range(ends[2], ends[min(2 + show, len(ends) - 1)] if len(ends) > 3 else 0):
        line = "\n   " if names[stamps[i][1]] in ("step", "end of tile") else " "
        print(f"{line}{names[stamps[i][1]]} {passed(i)}", end="")
    print()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--point", action="append", required=True, help='"HEAD_DIM MASK SEQLEN field=value ...", MASK none or causal')
    parser.add_argument("--ctas", default="7", help="comma-separated; default: %(default)s")
    parser.add_argument("--tiles", type=int, default=3, help="how many tiles to print; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        forward = peers.package(peers.ROOT, directory, "fa3stamped") / "kernels" / "forward.py"
        forward.write_text(stamped(forward.read_text()))
        for text in args.point:
            head_dim, mask, seqlen, *fields = text.split()
            changes = {name: ast.literal_eval(value) for name, value in (field.split("=") for field in fields)}
            measure(int(head_dim), mask == "causal", int(seqlen), changes, [int(c) for c in args.ctas.split(",")], args.tiles)


if __name__ == "__main__":
    main()
