"""Kernel configs as providers, so that they are measured like any other: what perf.sweep and perf.once run."""

from dataclasses import dataclass, fields, replace

import torch

import fa3
from fa3 import jit
from fa3.attention import Launch, device_of
from fa3.kernels.configs import BackwardConfig, ForwardConfig
from fa3.launch import allocated
from fa3.plan import planned, planned_backward
from fa3.problem import Problem
from perf import peers


class Variant(peers.Provider):
    def available(self):
        return None

    def version(self):
        return "this tree"

    def config_line(self, point, tensors):
        return repr(self.config)


@dataclass(frozen=True)
class ForwardVariant(Variant):
    """A config and how many heads are worked on together: "l2" as planned, "all", or a number."""

    config: ForwardConfig
    heads: str | int = "l2"

    @property
    def name(self):
        c = self.config
        flags = ("P" if c.pingpong else "-") + ("O" if c.overlap else "-") + c.scheduler[0]  # s, p or d
        flags += ("q" if c.q_in_registers else "-") + f"{c.rescale_from:g}" + "l" * c.late_release
        flags += "!" * c.presume + "-ws" * (not c.warp_specialised)
        return f"{c.tile_m}x{c.tile_n}s{c.stages}{c.k_stages}{c.q_slots}{flags}:{self.heads}"

    def make(self, point, tensors):
        q, k, v = tensors[:3]
        lse = self.config.lse
        problem = Problem.of(q, k, v, softmax_scale=None, causal=point.causal, sm_margin=0, lse=lse, unsupported={})
        plan = planned(self.config, problem, device_of(q.device))
        if self.heads != "l2":
            plan = replace(plan, head_group=point.heads * point.batch if self.heads == "all" else self.heads)
        launch = Launch(problem, plan, [None, None, None])
        return lambda: launch(q, k, v)


@dataclass(frozen=True)
class BackwardVariant(Variant):
    """A config, launched without autograd: the forward's results, the workspace and the gradients are allocated once."""

    config: BackwardConfig

    @property
    def name(self):
        """The tile, and every other field that isn't its default."""
        c = self.config
        others = [f for f in fields(c) if f.name not in ("dtype", "head_dim", "mask", "tile_m", "tile_n")]
        changed = [f"{f.name}={getattr(c, f.name)}" for f in others if getattr(c, f.name) != f.default]
        return " ".join([f"{c.tile_m}x{c.tile_n}", *changed])

    def make(self, point, tensors):
        q, k, v, dout = (tensor.detach() for tensor in tensors)
        out, lse = fa3.flash_attn_func(q, k, v, causal=point.causal, return_attn_probs=True)
        gradients = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        plan = planned_backward(self.config, point, device_of(q.device))
        workspace = [None if needed is None else allocated(*needed, q.device) for needed in plan.workspace.values()]
        scale = point.head_dim**-0.5
        kernel = jit.get(self.config)

        def launch():
            kernel(q, k, v, out, dout, lse, *gradients, *workspace, scale, plan.sms)
            return gradients

        return launch


CONFIGS = {"fwd": ForwardConfig, "bwd": BackwardConfig}
VARIANTS = {ForwardConfig: ForwardVariant, BackwardConfig: BackwardVariant}
