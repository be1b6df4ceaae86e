"""python -m fa3 demo: one attention, checked and timed on a Hopper GPU; without one, compiled, inspected and run on the CPU."""

import time

import torch

from . import flash_attn_func, hopper, inspect, jit, plan, reference, timing, toolkit
from .parallel import map_configs
from .problem import Problem
from .terminal import show_table

BATCH, SEQLEN, HEADS, HEAD_DIM = 4, 4096, 16, 128
SLACK = 1e-5  # on twice plain attention's error
BACKWARD_FLOPS = 2.5  # of a forward's: five products in place of two


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
    return int(wrong)


def normal(batch, seqlen, heads, device):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, seqlen, heads, HEAD_DIM)
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4)]


def leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def gradients(attend, dout, *tensors):
    """Those of attend(q, k, v) by autograd."""
    q, k, v = leaves(*tensors)
    return torch.autograd.grad(attend(q, k, v), (q, k, v), dout)


def errors(found, truth, plain):
    """[largest error of what was found, that of attention in plain PyTorch, "ok" or "TOO LARGE"]: of the worst tensor."""
    rows = []
    for ours, true, yardstick in zip(found, truth, plain):
        error, plain_error = ((x.float() - true).abs().max().item() for x in (ours, yardstick))
        rows.append((error <= 2 * plain_error + SLACK, plain_error - error, error, plain_error))  # NaN is too large
    right, _, error, plain_error = min(rows)
    return [f"{error:.2e}", f"{plain_error:.2e}", "ok" if right else "TOO LARGE"]


def check_and_time():
    """On the GPU: first calls' times, errors against fp32 attention, speed beside torch's. True if an error is too large."""
    shape = f"batch {BATCH}, seqlen {SEQLEN}, {HEADS} heads, head_dim {HEAD_DIM}, bf16"
    print(f"attention on {torch.cuda.get_device_name()}: {shape}")
    *qkv, dout = normal(BATCH, SEQLEN, HEADS, "cuda")
    precision = torch.get_float32_matmul_precision()
    rows = []
    for causal in (False, True):
        attend = lambda q, k, v: flash_attn_func(q, k, v, causal=causal)
        plain = lambda q, k, v: reference.plain_attention(q, k, v, causal)
        torch.set_float32_matmul_precision("highest")  # no TF32 in the reference
        truth, _ = reference.attention(*qkv, causal=causal, out_dtype=torch.float32)
        true_gradients = reference.gradients(dout, *qkv, causal=causal, out_dtype=torch.float32)
        torch.set_float32_matmul_precision(precision)

        out, first = timed_first_call(lambda: attend(*qkv))
        right = errors([out], [truth], [plain(*qkv)])
        ms = timing.milliseconds({"fa3": lambda: attend(*qkv), "torch": timing.torch_sdpa(*qkv, causal)})
        rows.append(["forward", mask_name(causal), first, *right, *rates(qkv, causal, ms, 1)])

        found, first = timed_first_call(lambda: gradients(attend, dout, *qkv))
        right = errors(found, true_gradients, gradients(plain, dout, *qkv))
        ms = timing.milliseconds(
            {"fa3": backward_alone(attend, dout, qkv), "torch": backward_alone(torch_attention(causal), dout, qkv)}
        )
        rows.append(["backward", mask_name(causal), first, *right, *rates(qkv, causal, ms, BACKWARD_FLOPS)])
    headers = ["", "mask", "first call", "max error", "plain torch's", "", "ms", "TFLOP/s", "torch SDPA ms", "TFLOP/s"]
    show_table(headers, rows)
    print("errors against fp32 attention on the same inputs, of gradients the worst; allowed: twice plain bf16 attention's")
    return any("TOO LARGE" in row for row in rows)


def mask_name(causal):
    return "causal" if causal else "full"


def timed_first_call(call):
    """What the call returns, and how long it took and what that went into, in words."""
    before, start = jit.stats(), time.perf_counter()
    returned = call()
    torch.cuda.synchronize()
    source = "compiled" if jit.stats()["compiled"] > before["compiled"] else "from the disk cache"
    return returned, f"{time.perf_counter() - start:.2f} s ({source})"


def torch_attention(causal):
    """torch's own attention of (batch, seqlen, heads, head_dim)."""
    return lambda q, k, v: timing.torch_sdpa(q, k, v, causal)().transpose(1, 2)


def backward_alone(attend, dout, tensors):
    """The backward of attend(q, k, v), as a function to call as often as one likes."""
    tensors = leaves(*tensors)
    out = attend(*tensors)
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def rates(tensors, causal, ms, flops):
    """[ms and TFLOP/s of each of ms]. flops: a forward's."""
    q, k, _ = tensors
    return [cell for t in ms.values() for cell in (f"{t:.3f}", f"{flops * timing.tflops(q, k, causal, t):.0f}")]


def compile_and_read():
    """Compiles the demo's kernels, forward and backward, and prints what is in them. True if that breaks a rule."""
    families = [
        [planned(problem(causal), plan.Device()).config for causal in (False, True)]
        for planned in (plan.plan_forward, plan.plan_backward)
    ]
    configs = [config for family in families for config in family]
    try:
        reports = dict(zip(configs, inspect.inspect_all(configs)))
        return any([inspect.show(family, [reports[config] for config in family]) for family in families])
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
    """The same calls on CPU tensors, which run the reference, against torch's own attention. True if an error is too large."""
    print(f"on the CPU: batch {batch}, seqlen {seqlen}, {heads} heads, head_dim {HEAD_DIM}, bf16, by the reference")
    *qkv, dout = normal(batch, seqlen, heads, "cpu")
    wide = [x.float() for x in qkv]
    rows = []
    for causal in (False, True):
        attend = lambda q, k, v: flash_attn_func(q, k, v, causal=causal)
        plain = lambda q, k, v: reference.plain_attention(q, k, v, causal)
        exact = torch_attention(causal)
        right = errors([attend(*qkv)], [exact(*wide)], [plain(*qkv)])
        rows.append(["forward", mask_name(causal), *right])
        true_gradients = gradients(exact, dout.float(), *wide)
        right = errors(gradients(attend, dout, *qkv), true_gradients, gradients(plain, dout, *qkv))
        rows.append(["backward", mask_name(causal), *right])
    show_table(["", "mask", "max error", "plain torch's", ""], rows)
    print("errors against torch's scaled_dot_product_attention in fp32; allowed: twice plain bf16 attention's")
    return any("TOO LARGE" in row for row in rows)
