"""`MovingAverage` keeps a moving average of a model's weights."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import nn


class MovingAverage(ModelEmaV3):
    """This is timm's average with a warm-up, to the bit, but the tensors of both models are listed once.

    timm's makes two state dicts in each step, which takes a host longer than to start the kernels that average.
    Parameters and buffers have to stay the same tensors, on one device, and float32 where they are floating-point.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, decay=decay, use_warmup=True)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards the model that it was made for; the update without `exclude_buffers` calls this."""
        averages, values = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, values, weight=1.0 - decay)
        for mine, theirs in self.copied:
            mine.copy_(theirs)
