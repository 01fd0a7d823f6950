"""This max pooling has a backward pass on a GPU that is one kernel (`max_pool_triton`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import suits_kernels


class FusedMaxPool2d(nn.MaxPool2d):
    """This `nn.MaxPool2d` of 3x3 pixels with stride 2 trains faster on a GPU. It is for modules that `suits`."""

    stands_for = nn.MaxPool2d

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Tell whether a module is a max pooling that the kernels can do."""
        if type(module) is not nn.MaxPool2d or module.return_indices or both(module.dilation) != (1, 1):
            return False
        window = both(module.kernel_size), both(module.stride)
        return window == ((3, 3), (2, 2)) and both(module.padding) in ((0, 0), (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not suits_kernels(x) or not torch.is_grad_enabled():
            return super().forward(x)
        padding = both(self.padding)[0]
        height, width = (pooled_size(size, padding, int(self.ceil_mode)) for size in x.shape[2:])
        return max_pool(x, height, width, padding)[0]


def both(value: Any) -> tuple:
    """Return an option of torch for height and width."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def pooled_size(size: int, padding: int, ceil_mode: int) -> int:
    """Return the height or width of a map after the pooling."""
    return (size + 2 * padding - 3 + ceil_mode) // 2 + 1


@torch.library.custom_op("vovnet_zoo::max_pool", mutates_args=(), device_types="cuda")
def max_pool(x: Tensor, height: int, width: int, padding: int) -> tuple[Tensor, Tensor]:
    """Pool [B,C,H,W] to [B,C,height,width]: the result, and in uint8 the place of each maximum in its window."""
    from . import max_pool_triton

    return max_pool_triton.max_pool(x.contiguous(memory_format=torch.channels_last), height, width, padding)


@torch.library.custom_op("vovnet_zoo::max_pool_backward", mutates_args=(), device_types="cuda")
def max_pool_backward(dy: Tensor, place: Tensor, height: int, width: int, padding: int) -> Tensor:
    """Return the gradient [B,C,height,width] of the input."""
    from . import max_pool_triton

    dy = dy.contiguous(memory_format=torch.channels_last)
    return max_pool_triton.max_pool_backward(dy, place, height, width, padding)


@max_pool.register_fake
def _(x, height, width, padding):
    y = x.new_empty(x.shape[0], height, width, x.shape[1]).permute(0, 3, 1, 2)
    return y, torch.empty_like(y, dtype=torch.uint8)


@max_pool_backward.register_fake
def _(dy, place, height, width, padding):
    return dy.new_empty(dy.shape[0], height, width, dy.shape[1]).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output):
    x, _, _, padding = inputs
    ctx.height, ctx.width, ctx.padding = x.shape[2], x.shape[3], padding
    ctx.set_materialize_grads(False)  # none comes back for the places
    ctx.save_for_backward(output[1])


def _backward(ctx, dy, _):
    (place,) = ctx.saved_tensors
    return max_pool_backward(dy, place, ctx.height, ctx.width, ctx.padding), None, None, None


max_pool.register_autograd(_backward, setup_context=_setup_context)
