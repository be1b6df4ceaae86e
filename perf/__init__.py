"""Measures this project beside its peers on a Hopper GPU: `python -m perf run | show | compare | report`.

Run from the repository root; it is not installed with the package.
"""


class PerfError(Exception):
    """A mistake in how perf was called, or a machine or file it can't work with: printed as one line, exit code 2."""
