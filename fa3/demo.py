"""python -m fa3 demo: one attention, checked and timed on a Hopper GPU; without one, compiled, inspected and run on the CPU."""

import time

import torch

from . import flash_attn_func, hopper, inspect, jit, plan, reference, timing, toolkit
from .parallel import map_configs
from .problem import Problem
from .terminal import show_table

BATCH, SEQLEN, HEADS, HEAD_DIM = 4, 4096, 16, 128
SLACK = 1e-5  # on twice plain attention's error


def run():
    """The exit code: 1 if something was wrong."""
    why_not = hopper.missing()
    if why_not:
        print(f"*** NO HOPPER GPU: {why_not}. ***")
        print("*** The kernels are compiled for Hopper here, and read, but not run; attention runs on the CPU. ***\n")
        wrong = compile_and_read()
        print()
        wrong |= check_on_cpu()
    else:
        wrong = check_and_time()
    print("backward: not there yet")
    return int(wrong)


def normal(batch, seqlen, heads, device):
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, seqlen, heads, HEAD_DIM)
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]


def errors(out, truth, q, k, v, causal):
    """(largest error of out, that of attention in plain PyTorch in q's dtype, whether the first is too large)."""
    ours = (out.float() - truth).abs().max().item()
    plain = (reference.plain_attention(q, k, v, causal).float() - truth).abs().max().item()
    return ours, plain, not ours <= 2 * plain + SLACK  # NaN is too large


def check_and_time():
    """On the GPU: the first call's time, errors against fp32 attention, and speed beside torch's. True if an error is too large."""
    shape = f"batch {BATCH}, seqlen {SEQLEN}, {HEADS} heads, head_dim {HEAD_DIM}, bf16"
    print(f"attention on {torch.cuda.get_device_name()}: {shape}")
    q, k, v = normal(BATCH, SEQLEN, HEADS, "cuda")
    precision = torch.get_float32_matmul_precision()
    rows, wrong = [], False
    for causal in (False, True):
        before, start = jit.stats(), time.perf_counter()
        out = flash_attn_func(q, k, v, causal=causal)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        source = "compiled" if jit.stats()["compiled"] > before["compiled"] else "from the disk cache"
        torch.set_float32_matmul_precision("highest")  # no TF32 in the reference
        truth, _ = reference.attention(q, k, v, causal=causal, out_dtype=torch.float32)
        torch.set_float32_matmul_precision(precision)
        ours, plain, too_large = errors(out, truth, q, k, v, causal)
        wrong |= too_large
        del truth
        ms = timing.milliseconds(
            {"fa3": lambda: flash_attn_func(q, k, v, causal=causal), "torch": timing.torch_sdpa(q, k, v, causal)}
        )
        rate = {name: f"{timing.tflops(q, k, causal, t):.0f}" for name, t in ms.items()}
        rows.append(
            ["causal" if causal else "full", f"{seconds:.2f} s ({source})", f"{ours:.2e}", f"{plain:.2e}"]
            + ["TOO LARGE" if too_large else "ok", f"{ms['fa3']:.3f}", rate["fa3"], f"{ms['torch']:.3f}", rate["torch"]]
        )
    headers = ["mask", "first call", "max error", "plain torch's", "", "ms", "TFLOP/s", "torch SDPA ms", "TFLOP/s"]
    show_table(headers, rows)
    print("errors against fp32 attention on the same inputs; allowed: twice plain bf16 attention's")
    return wrong


def compile_and_read():
    """Compiles the kernels that the demo's call would launch, and prints what is in them. True if that breaks a rule."""
    configs = [plan.plan_forward(problem(causal), plan.Device()).config for causal in (False, True)]
    try:
        return inspect.show(configs, inspect.inspect_all(configs))
    except toolkit.ToolError as error:
        print(f"the compiled kernels can't be read: {error}")
    failed = [(config, e) for config, e in map_configs(compiles, configs, "compiling") if isinstance(e, Exception)]
    for config, error in failed:
        print(f"FAILED {config}: {error}")
    print(f"{len(configs) - len(failed)} of {len(configs)} kernels compile")
    return bool(failed)


def compiles(config):
    jit.compile(config)


def problem(causal):
    """The demo's call, as planning sees it."""
    return Problem(
        dtype="bf16",
        batch=BATCH,
        seqlen_q=SEQLEN,
        seqlen_k=SEQLEN,
        heads=HEADS,
        heads_kv=HEADS,
        head_dim=HEAD_DIM,
        causal=causal,
        softmax_scale=HEAD_DIM**-0.5,
        lse=False,
        sm_margin=0,
    )


def check_on_cpu(batch=1, seqlen=512, heads=4):
    """The same call on CPU tensors, which run the reference, against torch's own attention. True if an error is too large."""
    print(f"on the CPU: batch {batch}, seqlen {seqlen}, {heads} heads, head_dim {HEAD_DIM}, bf16, by the reference")
    q, k, v = normal(batch, seqlen, heads, "cpu")
    rows, wrong = [], False
    for causal in (False, True):
        out = flash_attn_func(q, k, v, causal=causal)
        truth = timing.torch_sdpa(q.float(), k.float(), v.float(), causal)().transpose(1, 2)
        ours, plain, too_large = errors(out, truth, q, k, v, causal)
        wrong |= too_large
        rows.append(["causal" if causal else "full", f"{ours:.2e}", f"{plain:.2e}", "TOO LARGE" if too_large else "ok"])
    show_table(["mask", "max error", "plain torch's", ""], rows)
    print("errors against torch's scaled_dot_product_attention in fp32; allowed: twice plain bf16 attention's")
    return wrong
