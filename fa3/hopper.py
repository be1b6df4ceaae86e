"""Is there a GPU here that the kernels run on?"""

import torch

CAPABILITY = (9, 0)


def missing():
    """Why the kernels can't run here, in words; None where the current CUDA device is a Hopper GPU."""
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        return f"torch sees no CUDA device{built}"
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, not 9.0"
    return None
