"""Non-maximum suppression as one Triton kernel. Import it where Triton is: torch's CUDA builds bring it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, extent: int) -> Tensor:
    """Indices int64 [B,max_detections] of the boxes that are kept, best first, then -1.

    One program for each image picks `max_detections` times the best box left, and drops what it suppresses.

    Args:
        boxes: float32 [B,N,4] xyxy; scores: float32 [B,N], negative where there is no box; labels: int64 [B,N].
        threshold: an IoU above it suppresses a box of the same class.
        extent: is added to widths and heights, 0 or 1.
    """
    count = scores.shape[1]
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).contiguous()
    labels, alive = labels.gather(1, order), (scores >= 0).to(torch.int8)
    picked = torch.empty(len(boxes), max_detections, dtype=torch.int64, device=boxes.device)
    if not count or not len(boxes):
        return picked.fill_(-1)
    limit = boxes.new_full((1,), threshold, dtype=torch.float64)
    block = triton.next_power_of_2(count)
    pick[(len(boxes),)](
        boxes, labels, alive, picked, limit, count, extent, max_detections, block,
        num_warps=min(32, max(4, block // 256)),
    )  # fmt: skip
    return torch.where(picked < count, order.gather(1, picked.clamp(max=count - 1)), -1)


@triton.jit
def pick(
    boxes,  # float32 [B,N,4], best first
    labels,  # int64 [B,N]
    alive,  # int8 [B,N]
    picked,  # int64 [B,D]: places in 0..N-1, N where nothing is left
    limit,  # float64 [1], the threshold: as a number it might be rounded to float32
    N,
    extent,  # 1 or 0
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    boxes += image * N * 4
    labels += image * N
    threshold = tl.load(limit)
    place = tl.arange(0, BLOCK)
    inside = place < N
    x1 = tl.load(boxes + place * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes + place * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes + place * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(boxes + place * 4 + 3, mask=inside, other=0.0)
    label = tl.load(labels + place, mask=inside, other=-1)
    left = tl.load(alive + image * N + place, mask=inside, other=0) != 0
    for i in range(D):
        first = tl.min(tl.where(left, place, N), axis=0)
        tl.store(picked + image * D + i, first.to(tl.int64))
        there = first < N
        # products of differences of float32 numbers are exact in float64, as in `class_nms`
        px1 = tl.load(boxes + first * 4, mask=there, other=0.0).to(tl.float64)
        py1 = tl.load(boxes + first * 4 + 1, mask=there, other=0.0).to(tl.float64)
        px2 = tl.load(boxes + first * 4 + 2, mask=there, other=0.0).to(tl.float64)
        py2 = tl.load(boxes + first * 4 + 3, mask=there, other=0.0).to(tl.float64)
        own = tl.load(labels + first, mask=there, other=-2)
        width = tl.minimum(x2.to(tl.float64), px2) + extent - tl.maximum(x1.to(tl.float64), px1)
        height = tl.minimum(y2.to(tl.float64), py2) + extent - tl.maximum(y1.to(tl.float64), py1)
        shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        area = (x2.to(tl.float64) + extent - x1) * (y2.to(tl.float64) + extent - y1)
        union = area + (px2 + extent - px1) * (py2 + extent - py1) - shared
        # as division has it, but for the 0 / 0 of two empty boxes
        left = left & (place != first) & ((label != own) | (union == 0.0) | (shared / union <= threshold))
