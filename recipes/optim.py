"""These functions make the optimizer of a `TrainConfig` and set its learning rates."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import nn

from presets import TrainConfig
from vovnet_zoo import FCOS


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
            lr_factor *= config.layer_decay ** depth[name.split(".")[1]]
        groups.setdefault((0.0 if undecayed else config.weight_decay, lr_factor), []).append(parameter)
    optimizer = create_optimizer_v2(
        [{"params": p, "weight_decay": decay, "lr_factor": factor} for (decay, factor), p in groups.items()],
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **({"fused": True} if takes_fused else {}),
    )
    on_cpu = next(model.parameters()).device.type == "cpu"
    if type(optimizer) is timm.optim.Muon and on_cpu and not multiplies_bfloat16():
        optimizer.__class__ = Float32Muon
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


class Float32Muon(timm.optim.Muon):
    """timm's Muon, but it orthogonalizes its updates in float32 instead of bfloat16.

    timm's function for this takes a dtype, but its optimizer has no way to pass one.
    """

    def step(self, closure: Callable | None = None):
        original = timm.optim.muon.zeropower_via_newtonschulz
        timm.optim.muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            timm.optim.muon.zeropower_via_newtonschulz = original


def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices on this CPU with instructions made for it.

    Without them a product of bfloat16 matrices takes tens of times longer than one of float32.
    """
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and "avx2" in torch.cpu.get_capabilities():
        return False  # torch uses no more than AVX2 of this x86-64 CPU, and bfloat16 needs more
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is Arm's


def depth_below_top(backbone: nn.Module) -> dict[str, int]:
    """Return how far each part of a timm feature extractor is below the head: 1 for the last part."""
    parts = [name for name, _ in backbone.named_children()]
    return {name: len(parts) - i for i, name in enumerate(parts)}


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
