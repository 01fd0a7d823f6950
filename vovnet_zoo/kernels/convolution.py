"""Convolutions by torch's operators on a CPU, in the precision and the memory layout in which these are fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import library
from .surgery import become

# With AVX2, oneDNN's weight gradient of a large channels_last map takes more than twice as long as that of a contiguous
# one; with AVX-512 it does not. From so many pixels of an output map, and so many channels, this pays for the copies.
CONTIGUOUS_IS_FASTER = library.capability() == "AVX2"
CONTIGUOUS_PIXELS, CONTIGUOUS_CHANNELS = 2500, 128


class CpuConv2d(nn.Conv2d):
    """An nn.Conv2d that computes the weight gradient of large maps from contiguous copies, where that is faster."""

    stands_for = nn.Conv2d

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if CONTIGUOUS_IS_FASTER and self._is_slow(x):
            return _ContiguousWeightGradient.apply(x, weight, bias, self.stride, self.padding, self.dilation)
        return super()._conv_forward(x, weight, bias)

    def _is_slow(self, x: Tensor) -> bool:
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        pixels = (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        channels = min(self.in_channels, self.out_channels)
        large = self.kernel_size != (1, 1) and pixels >= CONTIGUOUS_PIXELS and channels >= CONTIGUOUS_CHANNELS
        return plain and large and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class Float32Conv2d(CpuConv2d):
    """A `CpuConv2d` whose arithmetic is float32 on a CPU under autocast too; only its output is rounded.

    A CPU without AMX multiplies bfloat16 at half the rate of float32, or slower.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = super()._conv_forward(x.float(), weight, bias)
        return y.to(torch.get_autocast_dtype("cpu"))


def use_fast_layout(model: nn.Module) -> None:
    """Turn, in place, every nn.Conv2d of `model` into a `CpuConv2d`; `surgery.restore` undoes it."""
    for conv in model.modules():
        if type(conv) is nn.Conv2d:
            become(conv, CpuConv2d)


class _ContiguousWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.where = list(stride), list(padding), list(dilation), False, [0, 0], 1
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        gradient = torch.ops.aten.convolution_backward
        if ctx.needs_input_grad[0]:
            dx, _, _ = gradient(dy, x, weight, None, *ctx.where, [True, False, False])
        if ctx.needs_input_grad[1]:
            maps = dy.contiguous(), x.contiguous()
            _, dw, _ = gradient(*maps, weight.contiguous(), None, *ctx.where, [False, True, False])
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None, None
