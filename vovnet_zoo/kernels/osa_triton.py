"""These Triton kernels compute one-shot aggregation blocks of channels-last maps. Import this where Triton is.

What stands between the convolutions is done in as few passes over memory as possible: a bias and a ReLU are one, and so
are the sum of a map's two gradients and the ReLU before it. The concatenation is not kept for the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PIXELS, CHANNELS, WARPS = 64, 64, 4  # of a program
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


def aggregate(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    geometry: Sequence[Geometry],
) -> Tensor:
    """Aggregate x: n convolutions with ReLUs, then x and their maps go through one more. It is differentiable once.

    Args:
        x: [B,C,H,W], float32, bfloat16 or float16, in which the convolutions multiply.
        weights: n + 1 of [O,I,kH,kW], float32.
        scales, shifts: n + 1 of [O], float32, without gradients; a weight is multiplied, a convolution's result added
            to.
        geometry: of each convolution; all keep height and width.

    Returns:
        The aggregation [B,O,H,W], channels-last.
    """
    return _Aggregate.apply(geometry, tuple(scales), tuple(shifts), x, *weights)


def shift_relu(x: Tensor, shift: Tensor) -> Tensor:
    """Compute `relu(x + shift)` of a map [B,C,H,W], in place if it is channels-last; `shift` [C] gets no gradient."""
    return _ShiftRelu.apply(x, shift)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: Any, scales: Sequence[Tensor], shifts: Any, x: Tensor, *weights: Tensor):
        x = channels_last(x)
        weights = tuple(scaled(weight, scale, x.dtype) for weight, scale in zip(weights, scales, strict=True))
        *layers, last = weights
        whole = empty_for(x, last.shape[1])
        copy_part(whole, 0, x)
        maps, offset = [x], x.shape[1]
        for weight, shift, how in zip(layers, shifts, geometry, strict=False):
            maps.append(channels_last(F.conv2d(maps[-1], weight, None, *how)))
            shift_relu_(maps[-1], shift, whole, offset)
            offset += len(weight)
        y = channels_last(F.conv2d(whole, last, None, *geometry[-1]))
        shift_relu_(y, shifts[-1])
        ctx.geometry, ctx.scales = geometry, scales
        ctx.save_for_backward(y, *maps, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        y, *saved = ctx.saved_tensors
        maps, weights = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        offsets = [0, *itertools.accumulate(x.shape[1] for x in maps)]
        of_x, *of_layers, of_last = ctx.needs_input_grad[3:]
        of_maps = of_x or any(of_layers)

        gradient = torch.empty_like(y)
        add_part(gradient, None, 0, channels_last(dy), y)
        if of_last:
            whole = empty_for(y, offsets[-1])
            for x, offset in zip(maps, offsets, strict=False):
                copy_part(whole, offset, x)
        else:
            whole = empty_for(y, 1).expand(-1, offsets[-1], -1, -1)  # only its shape is looked at
        dweights: list[Tensor | None] = [None] * len(weights)
        parts, dweights[-1] = convolution_backward(gradient, whole, weights[-1], ctx.geometry[-1], of_maps, of_last)
        del whole
        d: Tensor | None = None
        for i in reversed(range(len(of_layers))) if of_maps else ():
            # the map of layer i is read by the next layer, whose gradient d is, and by the last convolution
            gradient = d if d is not None else torch.empty_like(maps[i + 1])
            add_part(gradient, parts, offsets[i + 1], d, maps[i + 1])
            of_map = of_x or any(of_layers[:i])
            d, dweights[i] = convolution_backward(gradient, maps[i], weights[i], ctx.geometry[i], of_map, of_layers[i])
        if d is not None:
            add_part(d, parts, 0, d, None)
        pairs = zip(dweights, ctx.scales, strict=True)
        dweights = [None if dw is None else scaled(dw, scale, scale.dtype) for dw, scale in pairs]
        return None, None, None, d, *dweights


class _ShiftRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor):
        y = channels_last(x)
        if y is x:
            ctx.mark_dirty(x)
        shift_relu_(y, shift)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        add_part(dx, None, 0, channels_last(dy), y)
        return dx, None


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a weight [O,I,kH,kW], or its gradient, by a scale [O], in float32, to be of a dtype; in one kernel."""
    return torch.mul(weight, scale[:, None, None, None], out=torch.empty_like(weight, dtype=dtype))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_for(x: Tensor, channels: int) -> Tensor:
    """Make a channels-last map like x with so many channels."""
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).permute(0, 3, 1, 2)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x, channels-last, and of the weight, those that are asked for."""
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, zeros, groups, [of_x, of_weight, False]
    )
    return channels_last(dx) if of_x else None, dw


def shift_relu_(x: Tensor, shift: Tensor, whole: Tensor | None = None, offset: int = 0) -> None:
    """Compute `relu(x + shift)` in place, and also write it to the channels of `whole` from `offset` on."""
    rows, channels, total = sizes(x, whole)
    if x.numel():
        with torch.cuda.device_of(x):
            shift_and_relu[grid(rows, channels)](
                x, shift.contiguous(), whole, rows, channels, total, offset, PIXELS, CHANNELS, num_warps=WARPS
            )


def copy_part(whole: Tensor, offset: int, x: Tensor) -> None:
    """Write x to the channels of `whole` from `offset` on."""
    rows, channels, total = sizes(x, whole)
    if x.numel():
        with torch.cuda.device_of(x):
            copy[grid(rows, channels)](x, whole, rows, channels, total, offset, PIXELS, CHANNELS, num_warps=WARPS)


def add_part(out: Tensor, whole: Tensor | None, offset: int, d: Tensor | None, y: Tensor | None) -> None:
    """Write to `out`, which may be d, the sum of d and the channels of `whole` from `offset` on, 0 where y is 0."""
    rows, channels, total = sizes(out, whole)
    if out.numel():
        with torch.cuda.device_of(out):
            add[grid(rows, channels)](
                out, whole, d, y, rows, channels, total, offset, PIXELS, CHANNELS, num_warps=WARPS
            )


def sizes(x: Tensor, whole: Tensor | None) -> tuple[int, int, int]:
    """Count the pixels of a map, its channels, and the channels of the concatenation."""
    return x.numel() // max(1, x.shape[1]), x.shape[1], x.shape[1] if whole is None else whole.shape[1]


def grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, PIXELS), triton.cdiv(channels, CHANNELS)


@triton.jit(do_not_specialize=["rows"])
def shift_and_relu(x, shift, whole, rows, C, total, offset, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """See `shift_relu_`; maps are [pixels,channels]."""
    row = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(shift + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    value = tl.where(value < 0, 0.0, value).to(x.dtype.element_ty)  # a NaN stays one
    tl.store(x + place, value, mask=inside)
    if whole is not None:
        tl.store(whole + row[:, None] * total + (offset + channel)[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def copy(x, whole, rows, C, total, offset, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """See `copy_part`."""
    row = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x + row[:, None] * C + channel[None, :], mask=inside)
    tl.store(whole + row[:, None] * total + (offset + channel)[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add(out, whole, d, y, rows, C, total, offset, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """See `add_part`."""
    row = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    value = tl.zeros((PIXELS, CHANNELS), tl.float32)
    if d is not None:
        value += tl.load(d + place, mask=inside, other=0.0).to(tl.float32)
    if whole is not None:
        value += tl.load(whole + row[:, None] * total + (offset + channel)[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    if y is not None:
        value = tl.where(tl.load(y + place, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
