"""`nms` is non-maximum suppression as one Triton kernel. Import this where Triton is: torch's CUDA builds bring it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK = 32, 128  # scores that are compared with each other at a time
MOST_COMPARISONS = 2**28  # more take longer than torch's sort, which takes 0.05 ms for 5,000 scores
TILE = 64  # boxes that are compared at a time; so many bits has the word that says which of them are left


def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool = False
) -> Tensor:
    """Do `class_nms` for B images: return int64 [B,max_detections], the boxes that are kept, best first, then -1.

    One program for each image looks at one tile of boxes after the other, the best first, and ends when it has kept
    `max_detections` boxes or no box is left. No decision is made by the host, so that a CUDA graph can hold it.

    Args:
        boxes: float32 [B,N,4] xyxy; scores: float32 [B,N], negative where there is no box; labels: int64 [B,N].
        threshold, max_detections, plus_one: see `class_nms`.
    """
    extent, batch, count = int(plus_one), *scores.shape
    if plus_one:
        threshold = math.nextafter(threshold, 0)
    kept = torch.empty(batch, max_detections, dtype=torch.int64, device=boxes.device)
    if not count or not batch:
        return kept.fill_(-1)
    limit = boxes.new_full((1,), threshold, dtype=torch.float64)  # as a number it might be rounded to float32
    with torch.cuda.device_of(boxes):  # Triton starts kernels on the current GPU, wherever the tensors are
        scores, order = sort(scores.contiguous())
        keep[(batch,)](
            boxes.contiguous(), scores, labels.contiguous(), order, kept, limit, count, extent, max_detections, TILE,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return kept


def sort(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sort [B,N], the highest first, equal ones and those below 0 by their places; returns them and their places."""
    batch, count = scores.shape
    if batch * count**2 > MOST_COMPARISONS:
        return torch.where(scores >= 0, scores, -1.0).sort(dim=1, descending=True, stable=True)
    in_order, order = torch.empty_like(scores), torch.empty_like(scores, dtype=torch.int64)
    rank[(batch, triton.cdiv(count, ROWS))](scores, in_order, order, count, ROWS, BLOCK)
    return in_order, order


@triton.jit
def rank(
    scores,  # float32 [B,N]
    in_order,  # float32 [B,N], filled by this kernel
    order,  # int64 [B,N], filled by this kernel
    N,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count for each score of some rows those that come before it."""
    first = tl.program_id(0).to(tl.int64) * N
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    score = tl.load(scores + first + row, mask=row < N, other=-1.0)
    score = tl.where(score >= 0, score, -1.0)
    counts = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other = tl.load(scores + first + column, mask=column < N, other=-1.0)
        other = tl.where(other >= 0, other, -1.0)[None, :]
        before = (other > score[:, None]) | ((other == score[:, None]) & (column[None, :] < row[:, None]))
        counts += before.to(tl.int32)
    place = tl.sum(counts, axis=1)
    tl.store(in_order + first + place, score, mask=row < N)
    tl.store(order + first + place, row.to(tl.int64), mask=row < N)


@triton.jit
def keep(
    boxes,  # float32 [B,N,4]
    scores,  # float32 [B,N], descending
    labels,  # int64 [B,N]
    order,  # int64 [B,N], the box of each score
    kept,  # int64 [B,D], filled by this kernel
    limit,  # float64 [1]
    N,
    extent,  # is added to widths and heights, 1 or 0
    D,
    TILE: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    boxes += image * N * 4
    labels += image * N
    scores += image * N
    order += image * N
    kept += image * D
    threshold = tl.load(limit)
    row = tl.arange(0, TILE)
    found = 0
    start = 0
    while start < N:
        place = start + row
        inside = place < N
        score = tl.load(scores + place, mask=inside, other=-1.0)
        index = tl.load(order + place, mask=inside, other=0)
        x1, y1, x2, y2, label = load_boxes(boxes, labels, index)
        left = inside & (score >= 0)

        # what the boxes kept before suppress
        for first in range(0, found, TILE):
            hit = overlaps(boxes, labels, kept + first, found - first, x1, y1, x2, y2, label, threshold, extent, TILE)
            left = left & (tl.max(hit.to(tl.int32), axis=0) == 0)

        # what boxes of the tile suppress
        if tl.max(left.to(tl.int32)) == 1:
            hit = overlaps(boxes, labels, order + start, N - start, x1, y1, x2, y2, label, threshold, extent, TILE)
            left = settle(hit & (row[:, None] < row[None, :]), left, TILE)

        number = found + tl.cumsum(left.to(tl.int32), axis=0) - 1
        tl.store(kept + number, index, mask=left & (number < D))
        found = tl.minimum(found + tl.sum(left.to(tl.int32), axis=0), D)
        tl.debug_barrier()  # the next tile reads what was stored
        # scores descend, so nothing is left after a negative one
        over = (found == D) | (tl.max((score < 0).to(tl.int32), axis=0) == 1)
        start = tl.where(over, N, start + TILE)
    for first in range(found, D, TILE):
        tl.store(kept + first + row, -1, mask=first + row < D)


@triton.jit
def settle(hit, left, TILE: tl.constexpr):
    """Say which boxes of a tile are left at the end, where hit[i,j] says that box i, if it is left, suppresses box j.

    Bit i of a box's word is hit[i]. Boxes are asked again and again whether a better one that is left suppresses them.
    After the first round this is settled for the first box, after the second for the second, and so on: nothing changes
    any more after TILE rounds at most, and mostly after a few.
    """
    row = tl.arange(0, TILE)
    bit = tl.full((TILE,), 1, tl.int64) << row.to(tl.int64)
    word = tl.sum(tl.where(hit, bit[:, None], 0), axis=0)
    before = tl.full((), 0, tl.int64)
    now = tl.sum(tl.where(left, bit, 0), axis=0)
    while now != before:
        before = now
        now = tl.sum(tl.where(left & ((word & before) == 0), bit, 0), axis=0)
    return left & ((now & bit) != 0)


@triton.jit
def load_boxes(boxes, labels, index):
    """Load the corners and the classes of the boxes at these indices."""
    x1 = tl.load(boxes + index * 4)
    y1 = tl.load(boxes + index * 4 + 1)
    x2 = tl.load(boxes + index * 4 + 2)
    y2 = tl.load(boxes + index * 4 + 3)
    return x1, y1, x2, y2, tl.load(labels + index).to(tl.int32)


@triton.jit
def overlaps(boxes, labels, better, count, x1, y1, x2, y2, label, threshold, extent, TILE: tl.constexpr):
    """Say which of the first boxes of the list `better`, of `count` boxes, suppress which boxes of a tile: [TILE,TILE].

    float32 decides where its error cannot matter, and float64 decides on all pairs if one is too close.
    """
    row = tl.arange(0, TILE)
    index = tl.load(better + row, mask=row < count, other=0)
    px1, py1, px2, py2, own = load_boxes(boxes, labels, index)
    asked = (row < count)[:, None] & (own[:, None] == label[None, :])
    a, b = area(px1, py1, px2, py2, extent)[:, None], area(x1, y1, x2, y2, extent)[None, :]
    width = tl.minimum(px2[:, None], x2[None, :]) - tl.maximum(px1[:, None], x1[None, :])
    height = tl.minimum(py2[:, None], y2[None, :]) - tl.maximum(py1[:, None], y1[None, :])
    shared = tl.maximum(width + extent, 0.0) * tl.maximum(height + extent, 0.0)
    # Each rounding is of 2^-24. All of them, in areas, union and excess, make less than 16 of these, relative to the
    # sum of both areas. The last number covers underflow.
    error = (a + b) * 2**-19 + 1e-30
    union = a + b - shared
    excess = shared - threshold.to(tl.float32) * union
    above = (excess > error) & (union > error)
    below = (excess < -error) | (width < -extent) | (height < -extent)
    hit = asked & above
    if tl.max((asked & ~above & ~below).to(tl.int32)) == 1:
        for i in range(tl.minimum(count, TILE)):
            exact = overlaps_exactly(boxes + tl.load(better + i) * 4, x1, y1, x2, y2, threshold, extent)
            hit = tl.where(row[:, None] == i, asked & exact[None, :], hit)
    return hit


@triton.jit
def area(x1, y1, x2, y2, extent):
    """Compute areas in float32; NaN where a box ends before it begins, so that float64 decides on it."""
    width, height = x2 - x1, y2 - y1
    return tl.where((width >= 0) & (height >= 0), (width + extent) * (height + extent), float("nan"))


@triton.jit
def overlaps_exactly(box, x1, y1, x2, y2, threshold, extent):
    """Say with which of some boxes one box has an IoU above the threshold: by the operations of `class_nms`."""
    px1, py1 = tl.load(box).to(tl.float64), tl.load(box + 1).to(tl.float64)
    px2, py2 = tl.load(box + 2).to(tl.float64), tl.load(box + 3).to(tl.float64)
    x1, y1, x2, y2 = x1.to(tl.float64), y1.to(tl.float64), x2.to(tl.float64), y2.to(tl.float64)
    width = tl.minimum(x2, px2) + extent - tl.maximum(x1, px1)
    height = tl.minimum(y2, py2) + extent - tl.maximum(y1, py1)
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area = (x2 + extent - x1) * (y2 + extent - y1)
    union = area + (px2 + extent - px1) * (py2 + extent - py1) - shared
    return (union != 0.0) & (shared / union > threshold)  # 0 / 0 of two empty boxes is not above it
