"""Convolutions get multiples of 8 channels, which a GPU's tensor cores want in bfloat16 and float16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 8


def align_channels(model: Any) -> None:
    """Change, in place, a frozen detector (`freeze`) so that tensor cores compute its first and its last convolutions.

    Zeros are added where channels lack, and the centerness becomes an output of the convolution that shares its input.
    """
    for name, module in list(model.backbone.named_modules()):
        if type(module) is nn.Conv2d and module.groups == 1 and module.in_channels % MULTIPLE:
            model.backbone.set_submodule(name, PaddedConv2d(module))
    head = model.head
    name = "box_distances" if model.config["centerness_on"] == "box" else "cls_logits"
    parts = getattr(head, name), head.centerness
    shared = join(parts)
    setattr(head, name, Outputs(shared, 0, parts[0].out_channels))
    head.centerness = Outputs(shared, parts[0].out_channels, parts[0].out_channels + 1)


class PaddedConv2d(nn.Module):
    """This convolution without groups pads its input channels by zeros to a multiple of 8."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.lacking = -conv.in_channels % MULTIPLE
        self.conv = copy_of(conv, conv.in_channels + self.lacking, conv.out_channels)
        with torch.no_grad():
            self.conv.weight.zero_()[:, : conv.in_channels] = conv.weight
            if conv.bias is not None:
                self.conv.get_parameter("bias").copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, 0, self.lacking)))


class Outputs(nn.Module):
    """This returns some outputs of a convolution that several modules share; a compiled graph computes it once."""

    def __init__(self, conv: nn.Conv2d, start: int, stop: int):
        super().__init__()
        self.conv, self.start, self.stop = conv, start, stop

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, self.start : self.stop]


def join(convs: tuple[nn.Conv2d, ...]) -> nn.Conv2d:
    """Make one convolution of several that differ in their outputs only, and all have biases; its outputs are theirs,
    one after the other, and zeros up to a multiple of 8."""
    count = sum(conv.out_channels for conv in convs)
    joined = copy_of(convs[0], convs[0].in_channels, count + -count % MULTIPLE)
    with torch.no_grad():
        joined.weight.zero_()[:count] = torch.cat([conv.weight for conv in convs])
        joined.get_parameter("bias").zero_()[:count] = torch.cat([conv.get_parameter("bias") for conv in convs])
    return joined


def copy_of(conv: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    """Make a convolution like `conv`, without groups, with other numbers of channels and with weights of any value."""
    assert conv.groups == 1
    how: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    how |= {"padding_mode": conv.padding_mode, "bias": conv.bias is not None}
    where = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    copied = nn.Conv2d(in_channels, out_channels, tuple(conv.kernel_size), **how, **where)  # type: ignore[arg-type]
    return copied.requires_grad_(False).to(memory_format=torch.channels_last)
