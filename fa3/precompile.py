"""python -m fa3 compile: fills the disk cache, so that no first call has to compile."""

import sys

from . import jit, plan
from .parallel import map_configs


def shipped(name, family="forward"):
    """The configs of a named set: every shipped one, or those of one head dim."""
    configs = plan.shipped(family)
    return configs if name == "all" else [c for c in configs if f"d{c.head_dim}" == name]


def run(name, jobs=None):
    """The exit code: 1 if a kernel failed to compile or could not be kept, 2 if there is no cache to fill."""
    directory = jit.cache_dir()
    if directory is None:
        print("FA3_CACHE=0 turns the disk cache off: nothing to fill; unset it", file=sys.stderr)
        return 2
    configs = dict.fromkeys(config for family in plan.FAMILIES for config in shipped(name, family))
    results = map_configs(build, configs, "compiling", jobs)
    failed = [(config, error) for config, error in results if isinstance(error, Exception)]
    for config, error in failed:
        print(f"FAILED {config}: {error}", file=sys.stderr)
    compiled = sum(result is True for _, result in results)
    there = sum(result is False for _, result in results)
    print(f"{compiled} compiled, {there} there already, {len(failed)} failed, in {directory}")
    return int(bool(failed))


def build(config):
    """Brings a config's kernel into the disk cache: True if it was compiled, False if it was there already."""
    before = jit.stats()["compiled"]
    jit.get(config)
    path = jit.cache_dir() / f"{jit.key(config)}.fa3"
    if not path.exists():
        raise OSError(f"the kernel could not be written to {path}; set FA3_CACHE_DIR to a directory that can be written")
    return jit.stats()["compiled"] > before
