"""A quick time on the GPU, for the demo and the bench. (perf/, in the repository, is what measures for the record.)"""

import statistics

import torch

ROUNDS = 9
BURST_MS = 20.0  # of each call in each round, so that launches and the events' own time don't count


def milliseconds(calls):
    """{name: median ms of a call} of {name: function}: they take turns, so all meet the same clock and temperature."""
    launches = {}
    for name, call in calls.items():
        call()  # compiled and warm from here on
        launches[name] = min(500, max(3, round(BURST_MS / max(burst(call, 3), 1e-3))))
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(burst(call, launches[name]))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def burst(call, launches):
    """Milliseconds of a call, over so many of them in a row, between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / launches


def tflops(q, k, causal, ms):
    """TFLOP/s of a forward call: 4 · seqlen_q · seqlen_k · head_dim · heads · batch operations, half of them if causal."""
    batch, seqlen_q, heads, d = q.shape
    return 4 * seqlen_q * k.shape[1] * d * heads * batch / (2 if causal else 1) / (ms * 1e9)


def torch_sdpa(q, k, v, causal):
    """torch's own fused attention on the same tensors (batch, seqlen, heads, head_dim), as a function to call."""
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=causal)
