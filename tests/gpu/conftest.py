"""Tests on a Hopper GPU. Without one every test here is skipped, and ../conftest.py says so at the end of the run."""

import pathlib

import pytest
import torch


def why_not():
    """Why the tests here can't run, or None."""
    if not torch.cuda.is_available():
        return "no Hopper GPU here: torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(0)
    if capability != (9, 0):
        return f"no Hopper GPU here: {torch.cuda.get_device_name(0)} has compute capability {capability}, not (9, 0)"
    return None


def needless(item):
    """Only head dim 64 has three sizes of tiles."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("kernels") == "middle tiles" and params.get("d", 64) != 64


def pytest_collection_modifyitems(items):
    reason = why_not()
    items[:] = [item for item in items if not needless(item)]
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same numbers whatever ran before, and references multiply in true fp32, not TF32."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    yield
    if torch.cuda.memory_reserved() > 8 << 30:  # the large tests' memory, for the other workers
        torch.cuda.empty_cache()
