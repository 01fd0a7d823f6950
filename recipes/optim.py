"""These functions make the optimizer of a `TrainConfig` and set its learning rates."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import Tensor, nn

from presets import TrainConfig
from vovnet_zoo import FCOS
from vovnet_zoo.backbone import depth_below_top
from vovnet_zoo.precision import multiplies_bfloat16


def create_optimizer(model: FCOS, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer, with one group for each combination of weight decay and learning rate.

    A bias is a parameter with "bias" in its name, as in the published training. Groups carry `lr_factor`, which
    `set_lr` multiplies by the schedule.
    """
    depth = depth_below_top(model.backbone) if config.layer_decay is not None else {}
    takes_fused = "fused" in inspect.signature(get_optimizer_class(config.optimizer, bind_defaults=False)).parameters
    # torch's fused SGD leaves its momentum uninitialized where GradScaler skips the first step, as float16 makes it do.
    takes_fused = takes_fused and config.precision != "fp16"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_bias = "bias" in name
        undecayed = is_bias or (parameter.ndim <= 1 and not config.decay_norms)
        lr_factor = config.bias_lr_factor if is_bias else 1.0
        if config.layer_decay is not None and name.startswith("backbone."):
            lr_factor *= config.layer_decay ** depth[name.removeprefix("backbone.")]
        groups.setdefault((0.0 if undecayed else config.weight_decay, lr_factor), []).append(parameter)
    optimizer = create_optimizer_v2(
        [{"params": p, "weight_decay": decay, "lr_factor": factor} for (decay, factor), p in groups.items()],
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **({"fused": True} if takes_fused else {}),
    )
    if type(optimizer) is timm.optim.Muon:
        on_cpu = next(model.parameters()).device.type == "cpu"
        optimizer.__class__ = Float32Muon if on_cpu and not multiplies_bfloat16() else BatchedMuon
    return optimizer


def load_changed(optimizer: torch.optim.Optimizer, names: list[str], saved: dict, saved_names: list[str]) -> None:
    """Load the state that each parameter has in `saved`, a state dict of the same kind of optimizer whose groups may be
    others. The groups, with weight decay and learning rate, stay as they are.

    Args:
        names, saved_names: of the parameters, in the order of the groups.
    """
    states = {name: saved["state"][i] for i, name in enumerate(saved_names) if i in saved["state"]}
    state = {i: states[name] for i, name in enumerate(names) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class BatchedMuon(timm.optim.Muon):
    """This timm Muon orthogonalizes all matrices of one shape together, and does all else for all weights at once.

    A GPU is given 40 % of the kernels, which are so small that starting them takes longest; a CPU is faster, too. A
    matrix has temporary memory for the time that its shape takes.
    """

    def step(self, closure: Callable | None = None):
        with replaced("muon", step_matrices):
            return super().step(closure)


class Float32Muon(BatchedMuon):
    """This `BatchedMuon` orthogonalizes updates in float32 instead of bfloat16.

    timm's function for this takes a dtype, but its optimizer has no way to pass one.
    """

    def step(self, closure: Callable | None = None):
        original = timm.optim.muon.zeropower_via_newtonschulz
        with replaced("zeropower_via_newtonschulz", functools.partial(original, dtype=torch.float32)):
            return super().step(closure)


@contextlib.contextmanager
def replaced(name: str, function: Callable) -> Iterator[None]:
    """Replace a function of timm's Muon within this context."""
    original = getattr(timm.optim.muon, name)
    setattr(timm.optim.muon, name, function)
    try:
        yield
    finally:
        setattr(timm.optim.muon, name, original)


def step_matrices(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_bufs: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    adjust_lr_fn: str | None,
    ns_coefficients: Any,
    conv_mode: str,
    eps: float,
    safety_factor: float,
    **unused: Any,
) -> None:
    """Do what timm's `muon` does, with as many kernels as there are shapes of matrices, not matrices."""
    assert conv_mode == "flatten" and not unused.get("scale_eps"), "timm's defaults, which no option changes"
    coefficients = timm.optim.muon.resolve_ns_coefficients(ns_coefficients, timm.optim.muon._COEFFICIENTS)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(momentum_bufs, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, momentum_bufs, momentum) if nesterov else momentum_bufs
    by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for param, update in zip(params, updates, strict=True):
        pair = as_matrix(param, param), as_matrix(update, param)
        by_shape.setdefault((pair[0].shape, param.dtype), []).append(pair)
    for (shape, dtype), pairs in by_shape.items():
        matrices, same = zip(*pairs, strict=True)
        stacked = torch.stack(same) if len(same) > 1 else same[0]  # [N,out,in]; one matrix is [out,in]
        stacked = timm.optim.muon.zeropower_via_newtonschulz(
            stacked, ns_steps, coefficients, eps=eps, safety_factor=safety_factor
        ).to(dtype)
        scale = timm.optim.muon.get_lr_scale(shape, adjust_lr_fn) if adjust_lr_fn else 1.0
        torch._foreach_add_(matrices, stacked.view(-1, *shape).unbind(), alpha=-lr * scale)


def as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x`, of the shape of `weight` [out,in,...], as a matrix [out,in*...]; a view if it has the same strides.

    Columns are in the order of the memory of `weight`: an orthogonalization does not depend on their order.
    """
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.view(len(x), -1) if x is weight else x.reshape(len(x), -1)


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Set the learning rates of step `step`, counted from 0; returns the rate of a group with factor 1."""
    lr = config.lr * lr_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def lr_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of the schedule at step `step`, counted from 0, which multiplies the learning rate."""
    if config.schedule == "multistep":
        factor = 0.1 ** sum(step >= milestone for milestone in config.milestones)
    else:
        progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if step < config.warmup_steps:
        done = step / config.warmup_steps if config.warmup == "linear" else 0.0
        factor *= config.warmup_factor * (1 - done) + done
    return factor
