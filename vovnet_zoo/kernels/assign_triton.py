"""This Triton kernel gives each location the box that it learns. Import this where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 128, 4  # locations of a program


def assign(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    center_radius: float | None,
    plus_one: bool,
    torchvision: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `vovnet_zoo.loss.assign_targets` does, bit by bit, in one kernel.

    Args:
        points: float32 [P,2]; strides: float32 [P].
        boxes: float32 [B,M,4] xyxy; labels: int64 [B,M], -1 for padding.
        center_radius, plus_one: as of `assign_targets`; torchvision: whether its `matching` is that.

    Returns:
        labels int64 [B,P], distances float32 [B,P,4] and centerness float32 [B,P].
    """
    points, strides = points.contiguous(), strides.contiguous()
    boxes, labels = boxes.contiguous(), labels.contiguous()
    (batch, most), count = labels.shape, len(points)
    label = labels.new_empty(batch, count)
    distances, centerness = boxes.new_empty(batch, count, 4), boxes.new_empty(batch, count)
    if label.numel():
        smallest, largest = strides.aminmax()
        with torch.cuda.device_of(boxes):
            choose[(triton.cdiv(count, BLOCK), batch)](
                points, strides, smallest, largest, boxes, labels, label, distances, centerness, count, most,
                center_radius or 0.0, float(plus_one),
                CENTER=center_radius is not None, TORCHVISION=torchvision, BLOCK=BLOCK, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return label, distances, centerness


@triton.jit(do_not_specialize=["P", "M"])
def choose(
    points,  # float32 [P,2]
    strides, smallest, largest,  # float32 [P] and one each
    boxes,  # float32 [B,M,4]
    labels,  # int64 [B,M]
    label,  # int64 [B,P], filled
    distances,  # float32 [B,P,4], filled
    centerness,  # float32 [B,P], filled
    P, M,
    radius, extent,  # in strides; what is added to widths and heights
    CENTER: tl.constexpr, TORCHVISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the box of some locations, and say what they learn of it."""
    image = tl.program_id(1).to(tl.int64)
    location = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = location < P
    x = tl.load(points + location * 2, mask=there, other=0.0)
    y = tl.load(points + location * 2 + 1, mask=there, other=0.0)
    stride = tl.load(strides + location, mask=there, other=1.0)
    low = tl.where(stride == tl.load(smallest), 0.0, 4 * stride)
    high = tl.where(stride == tl.load(largest), float("inf"), 8 * stride)
    reach = stride * radius
    boxes += image * M * 4
    labels += image * M

    least = tl.full((BLOCK,), float("inf"), tl.float32)
    chosen = tl.full((BLOCK,), 0, tl.int32)
    for i in range(M):
        x1, y1 = tl.load(boxes + i * 4), tl.load(boxes + i * 4 + 1)
        x2, y2 = tl.load(boxes + i * 4 + 2), tl.load(boxes + i * 4 + 3)
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        candidate = (left > 0) & (top > 0) & (right > 0) & (bottom > 0)
        if CENTER:
            candidate &= (tl.abs(x - (x1 + x2) * 0.5) < reach) & (tl.abs(y - (y1 + y2) * 0.5) < reach)
        furthest = tl.maximum(tl.maximum(left, right), tl.maximum(top, bottom))
        if TORCHVISION:
            candidate &= (furthest > low) & (furthest < high)
        else:
            candidate &= (furthest >= low) & (furthest <= high)
        area = (x2 - x1 + extent) * (y2 - y1 + extent)
        if TORCHVISION:
            area = -(1e8 - area)
        area = tl.where(tl.load(labels + i) >= 0, area, float("inf"))
        better = candidate & (area < least)  # of equal boxes the first stays
        least = tl.where(better, area, least)
        chosen = tl.where(better, i, chosen)

    positive = least < float("inf")
    known = there & positive
    box = boxes + chosen * 4
    left = tl.where(positive, x - tl.load(box, mask=known, other=0.0), 0.0)
    top = tl.where(positive, y - tl.load(box + 1, mask=known, other=0.0), 0.0)
    right = tl.where(positive, tl.load(box + 2, mask=known, other=0.0) - x, 0.0)
    bottom = tl.where(positive, tl.load(box + 3, mask=known, other=0.0) - y, 0.0)
    horizontal = tl.div_rn(tl.minimum(left, right), tl.where(positive, tl.maximum(left, right), 1.0))
    vertical = tl.div_rn(tl.minimum(top, bottom), tl.where(positive, tl.maximum(top, bottom), 1.0))
    place = image * P + location
    tl.store(label + place, tl.load(labels + chosen, mask=known, other=-1), mask=there)
    tl.store(distances + place * 4, left, mask=there)
    tl.store(distances + place * 4 + 1, top, mask=there)
    tl.store(distances + place * 4 + 2, right, mask=there)
    tl.store(distances + place * 4 + 3, bottom, mask=there)
    tl.store(centerness + place, tl.sqrt_rn(horizontal * vertical), mask=there)
