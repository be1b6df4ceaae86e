"""Who is measured: this project and its peers, one small object each.

A provider says why it can't be measured (available), which version it is, and makes, from a point and its tensors,
a callable that runs one forward, or one backward. To add one, write a class and put it into PROVIDERS.
"""

import importlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from perf import PerfError


ROOT = Path(__file__).resolve().parents[1]


class Tensors(NamedTuple):
    """q and dout (batch, seqlen_q, heads, head_dim); k and v (batch, seqlen_k, heads_kv, head_dim).

    In the backward direction q, k and v require grad, and dout is the gradient of the output; in the forward it is None.
    """

    q: object
    k: object
    v: object
    dout: object = None


class Unsupported(Exception):
    """The provider can't compute this point; the message says why."""


class Provider:
    name: str
    forward_only = None  # or the reason why it has no backward

    def available(self):
        """None, or the reason why this provider can't be measured here."""
        raise NotImplementedError

    def version(self):
        raise NotImplementedError

    def prepare(self):
        """What takes long and can be done in parallel before the first `make`, such as compiling."""

    def make(self, point, tensors):
        """A callable without arguments: what is timed at this point.

        In the forward direction it runs one forward and returns its output (or a tuple that starts with it). In the backward
        direction it runs the backward alone and returns (dq, dk, dv): the forward ran here, once, and its graph is kept.
        Whatever the provider needs prepared is prepared here, outside of the timing.
        """
        if point.direction == "fwd":
            return self.forward(point, tensors)
        if self.forward_only is not None:
            raise Unsupported(self.forward_only)
        from torch.autograd import grad

        forward = self.forward(point, tensors)
        with self.context():
            out = forward()
        out = out[0] if isinstance(out, (tuple, list)) else out
        inputs = tensors.q, tensors.k, tensors.v
        return lambda: grad(out, inputs, tensors.dout, retain_graph=True)

    def forward(self, point, tensors):
        """A callable without arguments that runs one forward and returns its output (or a tuple that starts with it)."""
        raise NotImplementedError

    def context(self):
        """Entered around every burst of launches, outside of the timing."""
        return nullcontext()

    def config_line(self, point, tensors):
        """One line that says which kernel and configuration the provider runs at this point, or None."""
        return None


class Package(Provider):
    """A provider that is a function `flash_attn_func(q, k, v, causal=...)` in an importable package."""

    options = {}  # what flash_attn_func is called with besides

    def __init__(self, name, module, distribution, hint, forward_only=None):
        self.name = name
        self.module = module
        self.distribution = distribution
        self.hint = hint
        self.forward_only = forward_only

    def available(self):
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"{error} ({self.hint})"
        except Exception as error:  # a wheel built for another torch or CUDA fails in its own way
            return f"import {self.module} failed: {reason(error)}"
        if not hasattr(module, "flash_attn_func"):
            return f"{self.module} has no flash_attn_func"
        return None

    def version(self):
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} (version unknown: imported, but not installed)"

    def forward(self, point, tensors):
        flash_attn_func = importlib.import_module(self.module).flash_attn_func
        q, k, v = tensors[:3]
        options = {"causal": point.causal, **self.options}
        return lambda: flash_attn_func(q, k, v, **options)


class ThisProject(Package):
    def config_line(self, point, tensors):
        if point.direction == "bwd":
            return self.backward_line(point, tensors.q.device)
        explain = getattr(importlib.import_module(self.module), "explain", None)
        return None if explain is None else str(explain(*tensors[:3], causal=point.causal))

    def backward_line(self, point, device):
        from fa3 import attention, plan
        from fa3.problem import Problem

        problem = Problem(
            dtype=point.dtype,
            batch=point.batch,
            seqlen_q=point.seqlen_q,
            seqlen_k=point.seqlen_k,
            heads=point.heads,
            heads_kv=point.heads_kv,
            head_dim=point.head_dim,
            causal=point.causal,
            softmax_scale=point.head_dim**-0.5,
            lse=True,
            sm_margin=0,
            **self.options,
        )
        return str(plan.plan_backward(problem, attention.device_of(device)))


class Deterministic(ThisProject):
    """This project with deterministic=True: beside `fa3` alone, "fa3/best" is how many times as long that takes."""

    options = {"deterministic": True}

    def forward(self, point, tensors):
        if point.direction == "fwd":
            raise Unsupported("the forward is the same with and without deterministic=True")
        return super().forward(point, tensors)


class OtherCommit(Package):
    """This project at another commit, or as it lies in another folder, as a package beside itself.

    Its kernels get cache keys of their own. A folder is for where the history isn't: it has what `git archive` gives.
    """

    def __init__(self, commit):
        name = Path(commit).name
        super().__init__(f"fa3 at {name}", "fa3_" + re.sub(r"\W", "_", name), "fa3", "")
        self.commit = commit
        self.directory = tempfile.TemporaryDirectory(prefix="fa3-at-")

    def available(self):
        if self.module not in sys.modules:
            root = Path(self.commit)
            if not root.is_dir():
                try:
                    archive = subprocess.run(["git", "-C", ROOT, "archive", self.commit, "fa3", "kernels"], capture_output=True)
                except OSError as error:
                    return reason(error)
                if archive.returncode:
                    return archive.stderr.decode().strip() or "git archive failed"
                root = Path(self.directory.name)
                with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                    tar.extractall(root, filter="data")
            package(root, self.directory.name, self.module)
        return super().available()

    def version(self):
        return f"commit {self.commit}"

    def prepare(self):
        paths = [self.directory.name, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, "-W", "ignore", "-m", self.module, "compile"], env=environment, stdout=subprocess.DEVNULL)


def package(root, directory, name):
    """The project whose sources lie in root, as an importable package of this name in directory; returns its folder."""
    copy = Path(directory) / name
    shutil.copytree(root / "fa3", copy)
    shutil.copytree(root / "kernels", copy / "kernels")
    sys.path.insert(0, str(directory))
    return copy


class ScaledDotProductAttention(Provider):
    """torch's scaled_dot_product_attention, held to one backend."""

    backend: str

    def context(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self.backend))

    def mask(self, point):
        """scaled_dot_product_attention's mask arguments; its is_causal is aligned to the top left, ours to the bottom right."""
        if point.causal and point.seqlen_q != point.seqlen_k:
            raise Unsupported("SDPA's is_causal is aligned to the top left, so seqlen_q != seqlen_k isn't the same problem")
        return {"is_causal": point.causal}

    def forward(self, point, tensors):
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (tensor.transpose(1, 2) for tensor in tensors[:3])  # views: (batch, heads, seqlen, head_dim)
        arguments = self.mask(point)
        if point.heads != point.heads_kv:
            arguments["enable_gqa"] = True
        return lambda: scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)


class Cudnn(ScaledDotProductAttention):
    name = "cudnn"
    backend = "CUDNN_ATTENTION"

    def available(self):
        import torch

        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"

    def version(self):
        import torch

        return f"cuDNN {torch.backends.cudnn.version()} in torch {torch.__version__}"


class FlashAttention2(ScaledDotProductAttention):
    name = "fa2"
    backend = "FLASH_ATTENTION"

    def available(self):
        import torch

        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without FlashAttention"

    def version(self):
        import torch

        return f"FlashAttention-2 in torch {torch.__version__}"

    def mask(self, point):
        if point.causal and point.seqlen_q != point.seqlen_k:
            from torch.nn.attention.bias import causal_lower_right

            return {"attn_mask": causal_lower_right(point.seqlen_q, point.seqlen_k)}
        return {"is_causal": point.causal}


PROVIDERS = {
    provider.name: provider
    for provider in (
        ThisProject("fa3", "fa3", "fa3", "pip install -e ."),
        Deterministic("fa3-deterministic", "fa3", "fa3", "pip install -e ."),
        Cudnn(),
        FlashAttention2(),
        Package("fa4", "flash_attn.cute", "flash-attn-4", "pip install flash-attn-4"),
        Package("fa3-pypi", "fa3_fwd_interface", "fa3-fwd", "pip install fa3-fwd", forward_only="fa3-fwd has no backward"),
    )
}

DEFAULT = [name for name in PROVIDERS if name != "fa3-deterministic"]


def providers(names):
    """The providers of these names, in this order."""
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise PerfError(f"--providers: unknown {', '.join(unknown)}; known are {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in dict.fromkeys(names)]


def reason(error):
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
