"""What several tests here share: the tools that read compiled kernels."""

import pytest

from fa3 import doctor, inspect, toolkit
from fa3.kernels.configs import ForwardConfig


@pytest.fixture(scope="session")
def tools():
    """Skips where compiled kernels can't be read; but where inspect's packages are installed, as in CI, they must do."""
    if doctor.version("nvidia-cuda-nvdisasm") and doctor.version("nvidia-cuda-cuobjdump"):
        return
    try:
        inspect.inspect(ForwardConfig(head_dim=64, tile_m=128, tile_n=32))
    except toolkit.ToolError as error:  # missing, or a CUDA toolkit's own that is older than the DSL's assembler
        pytest.skip(str(error))
