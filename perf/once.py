"""One launch of a config on a small problem, in a process of its own: `python -m perf.once '{"head_dim": 64, ...}'`.

A kernel that never ends takes its process with it, and nothing else: perf.sweep tries its variants so before it measures them.
"""

import json
import sys


def main(fields):
    import torch

    from fa3.attention import Launch, device_of
    from fa3.kernels.configs import ForwardConfig
    from fa3.plan import planned
    from fa3.problem import Problem

    config = ForwardConfig(**json.loads(fields))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    # more tiles than SMs, whatever tile_m, and a last one that isn't full
    q, k, v = (torch.randn(3, 1000, 14, config.head_dim, device="cuda", dtype=dtype) for _ in range(3))
    problem = Problem.of(q, k, v, softmax_scale=None, causal=config.mask == "causal", sm_margin=0, lse=config.lse, unsupported={})
    Launch(problem, planned(config, problem, device_of(q.device)), [None, None, None])(q, k, v)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
