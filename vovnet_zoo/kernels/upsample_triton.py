"""These Triton kernels double a channels-last map and add it to another. Import this where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS, WARPS = 32, 128, 4  # of a program


def add_upsampled(x: Tensor, small: Tensor) -> Tensor:
    """See `upsample.add_upsampled`; both maps are channels-last."""
    b, c, h, w = x.shape
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            add[grid(b * h * w, c)](x, small, y, b * h * w, w, h * w, c, PIXELS, CHANNELS, num_warps=WARPS)
    return y


def sum_fours(dy: Tensor) -> Tensor:
    """Add up each square of four pixels of a channels-last map."""
    b, c, h, w = dy.shape
    dx = dy.new_empty((b, h // 2, w // 2, c)).permute(0, 3, 1, 2)
    count = b * (h // 2) * (w // 2)
    if dx.numel():
        with torch.cuda.device_of(dy):
            sum_four[grid(count, c)](dy, dx, count, w // 2, c, PIXELS, CHANNELS, num_warps=WARPS)
    return dx


def grid(pixels: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS)


@triton.jit(do_not_specialize=["count", "w", "size"])
def add(x, small, y, count, w, size, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """See `add_upsampled`; size is h * w."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < count)[:, None] & (channel < C)[None, :]
    row, column = pixel % size // w, pixel % w
    source = pixel // size * (size // 4) + row // 2 * (w // 2) + column // 2
    place = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(small + source.to(tl.int64)[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "w"])
def sum_four(dy, dx, count, w, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """See `sum_fours`; w is the width of dx."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < count)[:, None] & (channel < C)[None, :]
    source = (pixel // w).to(tl.int64) * 4 * w + pixel % w * 2
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in tl.static_range(4):
        at = source + i // 2 * 2 * w + i % 2
        total += tl.load(dy + at[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + pixel.to(tl.int64)[:, None] * C + channel[None, :], total.to(dx.dtype.element_ty), mask=inside)
