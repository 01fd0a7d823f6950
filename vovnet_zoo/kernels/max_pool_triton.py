"""These Triton kernels pool channels-last maps, 3x3 pixels with stride 2. Import this where Triton is.

torch's own backward pass adds up in memory, and inductor's looks at each window again; this one reads, for each pixel
of the input, the at most four windows that it is in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS, WARPS = 16, 128, 4  # of a program


def max_pool(x: Tensor, height: int, width: int, padding: int) -> tuple[Tensor, Tensor]:
    """Pool a channels-last map [B,C,H,W] to [B,C,height,width], as `F.max_pool2d` with kernel 3 and stride 2 does.

    Returns the result, and in uint8 of the same shape which of the 9 pixels of its window, row by row, is its maximum.
    """
    b, c, h, w = x.shape
    y = x.new_empty((b, height, width, c)).permute(0, 3, 1, 2)
    place = torch.empty_like(y, dtype=torch.uint8)
    grid = (triton.cdiv(b * height * width, PIXELS), triton.cdiv(c, CHANNELS))
    if x.numel():
        with torch.cuda.device_of(x):
            pool[grid](
                x, y, place, b * height * width, h, w, height, width, c, padding, PIXELS, CHANNELS, num_warps=WARPS
            )
    return y, place


def max_pool_backward(dy: Tensor, place: Tensor, height: int, width: int, padding: int) -> Tensor:
    """Return the gradient [B,C,height,width] of the input of `max_pool`; `dy` and `place` are channels-last."""
    b, c, h, w = dy.shape
    dx = dy.new_empty((b, height, width, c)).permute(0, 3, 1, 2)
    grid = (triton.cdiv(b * height * width, PIXELS), triton.cdiv(c, CHANNELS))
    if dy.numel():
        with torch.cuda.device_of(dy):
            unpool[grid](
                dy, place, dx, b * height * width, height, width, h, w, c, padding, PIXELS, CHANNELS, num_warps=WARPS
            )
    return dx


SIZES = ["count", "h", "w", "height", "width"]


@triton.jit(do_not_specialize=SIZES)
def pool(
    x,  # [B,h,w,C]
    y,  # [B,height,width,C], filled
    place,  # uint8 [B,height,width,C], filled
    count,  # B*height*width
    h, w, height, width, C, padding: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Find the maximum of each window, and its place."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < count)[:, None] & (channel < C)[None, :]
    row, column = pixel // width % height * 2 - padding, pixel % width * 2 - padding
    x += (pixel // (width * height)).to(tl.int64)[:, None] * h * w * C + channel[None, :]
    best = tl.full((PIXELS, CHANNELS), float("-inf"), tl.float32)
    chosen = tl.full((PIXELS, CHANNELS), 255, tl.int32)  # none
    for i in tl.static_range(9):
        r, c = row + i // 3, column + i % 3
        known = inside & ((r >= 0) & (r < h) & (c >= 0) & (c < w))[:, None]
        value = tl.load(x + (r.to(tl.int64) * w + c)[:, None] * C, mask=known, other=float("-inf")).to(tl.float32)
        better = known & ((value > best) | (value != value) | (chosen == 255))  # the first of equal ones; a NaN wins
        best = tl.where(better, value, best)
        chosen = tl.where(better, i, chosen)
    to = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(y + to, best.to(y.dtype.element_ty), mask=inside)
    tl.store(place + to, chosen.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def unpool(
    dy,  # [B,height,width,C]
    place,  # uint8 [B,height,width,C]
    dx,  # [B,h,w,C], filled
    count,  # B*h*w
    h, w, height, width, C, padding: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Give each pixel the gradients of the windows whose maximum it is."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < count)[:, None] & (channel < C)[None, :]
    row, column = pixel // w % h + padding, pixel % w + padding
    base = (pixel // (w * h)).to(tl.int64) * height * width
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in tl.static_range(4):  # from the first window on, so that the sum has the order of the windows
        r, c = row // 2 - 1 + i // 2, column // 2 - 1 + i % 2
        up, left = row - 2 * r, column - 2 * c
        known = inside & ((r >= 0) & (r < height) & (up < 3) & (c >= 0) & (c < width) & (left < 3))[:, None]
        at = (base + r * width + c)[:, None] * C + channel[None, :]
        own = tl.load(place + at, mask=known, other=255).to(tl.int32) == (up * 3 + left)[:, None]
        total += tl.load(dy + at, mask=known & own, other=0.0).to(tl.float32)
    tl.store(dx + pixel.to(tl.int64)[:, None] * C + channel[None, :], total.to(dx.dtype.element_ty), mask=inside)
