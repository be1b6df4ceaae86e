"""One launch of a config on a small problem, in a process of its own: `python -m perf.once fwd '{"head_dim": 64, ...}'`.

A kernel that never ends takes its process with it, and nothing else: perf.sweep tries its variants so before it measures them.
"""

import json
import sys


def main(direction, config):
    import torch

    from perf import suites, timing, variants

    config = variants.CONFIGS[direction](**json.loads(config))
    # more tiles than SMs, whatever tile_m and tile_n, and a last one that isn't full
    point = suites.Point(config.head_dim, config.mask == "causal", 3, 1000, 1000, 14, 14, config.dtype, direction)
    variants.VARIANTS[type(config)](config).make(point, timing.CudaDevice().tensors(point))()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
