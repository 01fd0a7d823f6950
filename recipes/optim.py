"""These functions make the optimizer of a `TrainConfig` and set its learning rates."""

from __future__ import annotations

import inspect
import math

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
    depth = depth_below_top(model.backbone)
    takes_fused = "fused" in inspect.signature(get_optimizer_class(config.optimizer, bind_defaults=False)).parameters
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_bias = "bias" in name
        undecayed = is_bias or (parameter.ndim <= 1 and not config.decay_norms)
        lr_factor = config.bias_lr_factor if is_bias else 1.0
        if config.layer_decay is not None and name.startswith("backbone."):
            lr_factor *= config.layer_decay ** depth[name.split(".")[1]]
        groups.setdefault((0.0 if undecayed else config.weight_decay, lr_factor), []).append(parameter)
    return create_optimizer_v2(
        [{"params": p, "weight_decay": decay, "lr_factor": factor} for (decay, factor), p in groups.items()],
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **({"fused": True} if takes_fused else {}),
    )


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
