"""`freeze` makes a model faster for inference: it folds batch norms, and transforms weights once."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..arguments import check_flag, check_kind
from .osa import FrozenOsaBlock, can_fold, fold
from .winograd import FrozenWinogradConv2d, is_eligible


def freeze(model: nn.Module, winograd: bool) -> nn.Module:
    """Replace, in place, each part of `model` that has a faster form for inference; returns `model`.

    `model` is in evaluation mode, and no module in it has another class than it was built with (`surgery.restore`).
    timm's convolution blocks lose their batch norms, which torch.compile does for all others. With `winograd`, on a
    CPU, eligible 3x3 convolutions become `FrozenWinogradConv2d`, and VoVNet blocks `FrozenOsaBlock`.
    """
    check_kind("model", model, nn.Module, "an nn.Module")
    check_flag("winograd", winograd)
    for name, child in model.named_children():
        setattr(model, name, _frozen(child, winograd))
    return model


def _frozen(module: Any, winograd: bool) -> nn.Module:
    """Return the module that replaces `module`."""
    if winograd and FrozenOsaBlock.suits(module):
        return FrozenOsaBlock.of(module)
    if can_fold(module):
        relu = type(module.bn.act) is nn.ReLU
        folded, rest = fold(module), [] if relu and winograd and is_eligible(module.conv) else [module.bn.act]
        conv = FrozenWinogradConv2d(folded, relu) if winograd and is_eligible(folded) else folded
        return nn.Sequential(conv, *rest, *([] if module.aa is None else [module.aa]))
    if winograd and type(module) is nn.Conv2d and is_eligible(module):
        return FrozenWinogradConv2d(module)
    return freeze(module, winograd)
