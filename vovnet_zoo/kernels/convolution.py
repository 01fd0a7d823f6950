"""These convolutions use torch's operators on a CPU where these are fast, and else multiply matrices for a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import library
from .surgery import become

# With AVX2, oneDNN takes twice as long as matrix products for the weight gradient of a channels_last map, if its output
# pixels times its input channels are so many. With AVX-512 oneDNN is as fast.
PRODUCTS_ARE_FASTER = library.capability() == "AVX2"
LEAST_VALUES = 400_000
PIXELS_AT_A_TIME = 2048  # so that what is multiplied stays in the cache


class CpuConv2d(nn.Conv2d):
    """This nn.Conv2d computes the weight gradient of large maps by matrix products, where that is faster."""

    stands_for = nn.Conv2d

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if PRODUCTS_ARE_FASTER and self._is_slow(x):
            return _ConvolveForTraining.apply(x, weight, bias, self.stride, self.padding)
        return super()._conv_forward(x, weight, bias)

    def _is_slow(self, x: Tensor) -> bool:
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        pixels = (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        large = pixels * self.in_channels >= LEAST_VALUES and self.kernel_size != (1, 1)
        plain = plain and self.dilation == (1, 1) and x.dtype == self.weight.dtype
        return plain and large and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class Float32Conv2d(CpuConv2d):
    """This `CpuConv2d` computes in float32 on a CPU under autocast too; only its output is rounded.

    A CPU without AMX multiplies bfloat16 at half the rate of float32, or slower.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = super()._conv_forward(x.float(), weight, bias)
        return y.to(torch.get_autocast_dtype("cpu"))


def use_fast_gradients(model: nn.Module) -> None:
    """Turn, in place, every nn.Conv2d of `model` into a `CpuConv2d`; `surgery.restore` undoes it."""
    for conv in model.modules():
        if type(conv) is nn.Conv2d:
            become(conv, CpuConv2d)


@torch.library.custom_op("vovnet_zoo::weight_gradient_by_products", mutates_args=(), device_types="cpu")
def weight_gradient_by_products(
    x: Tensor, dy: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Compute the gradient of the weight of `F.conv2d(x, weight, stride=stride, padding=padding)`.

    For each place of the kernel it is the product of two matrices whose rows are pixels: the outputs' gradients, and
    the inputs that this place meets. The padded input is laid out so that these inputs are one piece of memory: apart
    for each place within a stride, and with the outputs' rows as long as the inputs'.

    Args:
        x: [B,C,H,W]; dy: [B,O,h,w] of the same dtype; kernel, stride, padding: (vertical, horizontal).

    Returns:
        [O,C,*kernel] of x's dtype.
    """
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    (batch, channels, height, width), (_, outputs, h, w) = x.shape, dy.shape
    rows, columns = -(-(height + 2 * ph) // sh) + 1, -(-(width + 2 * pw) // sw)  # one row more, to read past the end
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, columns * sw - width - pw, ph, rows * sh - height - ph))
    x = x.view(batch, rows, sh, columns, sw, channels).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, sh, sw, rows * columns, channels)
    dy = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, columns - w)).reshape(batch, h * columns, outputs)
    dw = x.new_zeros(kh, kw, outputs, channels)
    step = max(1, PIXELS_AT_A_TIME // columns) * columns
    for b in range(batch):
        for i in range(0, h * columns, step):
            gradient = dy[b, i : i + step]
            for y, z in itertools.product(range(kh), range(kw)):
                first = i + y // sh * columns + z // sw
                dw[y, z].addmm_(gradient.t(), x[b, y % sh, z % sw, first : first + len(gradient)])
    return dw.permute(2, 3, 0, 1).contiguous()


@weight_gradient_by_products.register_fake
def _(x, dy, kernel, stride, padding):
    return x.new_empty(dy.shape[1], x.shape[1], *kernel)


class _ConvolveForTraining(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = list(stride), list(padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            where = ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *where)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient_by_products(x, dy, list(weight.shape[2:]), ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None
