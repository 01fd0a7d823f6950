"""`add_upsampled` doubles a map and adds it to another, in one kernel on a GPU (`upsample_triton`)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("vovnet_zoo::add_upsampled", mutates_args=(), device_types="cuda")
def add_upsampled(x: Tensor, small: Tensor) -> Tensor:
    """Compute `x + F.interpolate(small, scale_factor=2)`: [B,C,2h,2w], [B,C,h,w] -> [B,C,2h,2w], in x's dtype.

    Neighbours in a square of four get the same value (mode "nearest"). Differentiable once.
    """
    from . import upsample_triton

    channels_last = torch.channels_last
    return upsample_triton.add_upsampled(
        x.contiguous(memory_format=channels_last), small.contiguous(memory_format=channels_last)
    )


@torch.library.custom_op("vovnet_zoo::sum_fours", mutates_args=(), device_types="cuda")
def _sum_fours(dy: Tensor) -> Tensor:
    """Add up each square of four: [B,C,2h,2w] -> [B,C,h,w]."""
    from . import upsample_triton

    return upsample_triton.sum_fours(dy.contiguous(memory_format=torch.channels_last))


@add_upsampled.register_fake
def _(x, small):
    return torch.empty_like(x, memory_format=torch.channels_last)


@_sum_fours.register_fake
def _(dy):
    b, c, h, w = dy.shape
    return dy.new_empty(b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[1].dtype


def _backward(ctx, dy):
    return dy, _sum_fours(dy).to(ctx.dtype)


add_upsampled.register_autograd(_backward, setup_context=_setup_context)
