"""Training of one-shot aggregation without a copy of its concatenation kept for the backward pass.

A block concatenates its input and the maps of its layers (arXiv 1904.09730, section 3), and convolves them 1x1. The
maps are kept in any case, each as the input of the next layer; kept too, the concatenation doubles a block's memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vovnet import OsaBlock
from torch import Tensor, nn

from .winograd import Float32Conv2d


def save_no_concatenation(model: nn.Module) -> int:
    """Turn, in place, every `OsaBlock` of timm's VoVNets in `model` into one that concatenates again in the backward
    pass; returns how many there are. Parameters and results stay as they are."""
    blocks = [m for m in model.modules() if type(m) is OsaBlock]
    for block in blocks:
        block.__class__ = SparingOsaBlock
    return len(blocks)


class SparingOsaBlock(OsaBlock):
    """An `OsaBlock` in all but what it keeps. Made by `save_no_concatenation`."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        if self.conv_reduction is not None:
            x = self.conv_reduction(x)
        for layer in self.conv_mid:
            x = layer(x)
            maps.append(x)
        aggregation = self.conv_concat  # ConvNormAct
        x = aggregation.bn(convolve_concatenated(maps, aggregation.conv))
        if self.attn is not None:
            x = self.attn(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x + maps[0] if self.residual else x


def convolve_concatenated(maps: list[Tensor], conv: nn.Conv2d) -> Tensor:
    """`conv(torch.cat(maps, dim=1))` for a 1x1 convolution without bias: n maps [B,C_i,H,W] -> [B,O,H,W]."""
    device = maps[0].device.type
    if not torch.is_autocast_enabled(device):
        return _ConvolveConcatenated.apply(conv.weight, *maps)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if device == "cpu" and isinstance(conv, Float32Conv2d):
            return _ConvolveConcatenated.apply(conv.weight, *maps).to(dtype)
        return _ConvolveConcatenated.apply(conv.weight.to(dtype), *(x.to(dtype) for x in maps))


class _ConvolveConcatenated(torch.autograd.Function):
    """The arithmetic has the dtype of the weight, the maps may have another."""

    @staticmethod
    def forward(ctx, weight: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *maps)
        return F.conv2d(torch.cat(maps, dim=1).to(weight.dtype), weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *maps = ctx.saved_tensors
        x = torch.cat(maps, dim=1).to(weight.dtype)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        parts = dx.split([m.shape[1] for m in maps], dim=1)
        return dw, *(part.to(m.dtype) for part, m in zip(parts, maps, strict=True))
