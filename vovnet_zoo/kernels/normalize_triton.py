"""This Triton kernel normalizes images for a network, in one pass. Import this where Triton is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, WARPS = 1024, 4  # of a program


def normalize(images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Do what `vovnet_zoo.data.normalize` does, bit by bit as torch does it on a GPU, to a channels-last result.

    Args:
        images: uint8 [B,3,H,W]; sizes: int [B,2], height and width without padding; mean, std: 3 numbers.

    Returns:
        float32 [B,3,H,W], channels-last.
    """
    images, sizes = images.contiguous(), sizes.contiguous()
    b, c, h, w = images.shape
    assert c == len(mean) == len(std) == 3
    found = images.new_empty((b, h, w, c), dtype=torch.float32).permute(0, 3, 1, 2)
    # torch divides by a number on a GPU by multiplying with its inverse, in float32
    numbers = [255 * m for m in mean] + [(1 / torch.tensor(255 * s, dtype=torch.float32)).item() for s in std]
    if images.numel():
        with torch.cuda.device_of(images):
            scale[(triton.cdiv(h * w, PIXELS), b)](images, sizes, found, h * w, w, *numbers, PIXELS, num_warps=WARPS)
    return found


@triton.jit(do_not_specialize=["size", "width"])
def scale(
    images,  # uint8 [B,3,size]
    sizes,  # int [B,2]
    found,  # float32 [B,size,3], filled
    size, width, mean0, mean1, mean2, inverse0, inverse1, inverse2,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Normalize some pixels of an image; what lies outside of its size becomes 0."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = pixel < size
    inside = (pixel // width < tl.load(sizes + image * 2)) & (pixel % width < tl.load(sizes + image * 2 + 1))
    for channel in tl.static_range(3):
        mean = mean0 if channel == 0 else (mean1 if channel == 1 else mean2)
        inverse = inverse0 if channel == 0 else (inverse1 if channel == 1 else inverse2)
        value = tl.load(images + (image * 3 + channel) * size + pixel, mask=there, other=0).to(tl.float32)
        value = tl.where(inside, (value - mean) * inverse, 0.0)
        tl.store(found + (image * size + pixel) * 3 + channel, value, mask=there)
