"""Non-maximum suppression: as many boxes as are left (`class_nms`), and a fixed shape for a graph (`nms_fixed`)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms


def class_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool = False
) -> Tensor:
    """Indices of boxes [N,4] (xyxy) that no better one of their class overlaps, best first, at most `max_detections`.

    An IoU above `threshold` suppresses. With `plus_one` (the published convention) a box covers the pixels x1..x2, and
    an IoU equal to `threshold` suppresses too. Equal scores: the first wins.
    """
    # One NMS for all classes: each class on a plane of its own, in float64 so that the shift rounds nothing away.
    corners = boxes.to(torch.float64, copy=True)
    if plus_one:
        corners[:, 2:] += 1
        threshold = math.nextafter(threshold, 0)
    if len(boxes):
        corners += labels[:, None] * (corners.max() + 1)
    order = scores.argsort(descending=True, stable=True)
    looked_at = 4 * max_detections  # its time grows with the square; worse boxes do not matter to better ones
    while True:
        best = order[:looked_at]
        keep = best[nms(corners[best], scores[best].double(), threshold)]
        if len(keep) >= max_detections or looked_at >= len(order):
            return keep[:max_detections]
        looked_at *= 4


def nms_fixed(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool = False
) -> Tensor:
    """`class_nms` of B images at once: indices [B,max_detections], best first, then -1.

    Its shape depends on no value, so it is one node of a compiled graph, and on a GPU it can be part of a CUDA graph.

    Args:
        boxes: float32 [B,N,4] xyxy; scores: float32 [B,N], negative where there is no box; labels: int64 [B,N].
    """
    if boxes.dtype != torch.float32 or boxes.shape != (*scores.shape, 4) or labels.shape != scores.shape:
        raise ValueError(
            "boxes must be float32 [B,N,4] with scores and labels [B,N], got "
            f"{boxes.dtype} {list(boxes.shape)}, {list(scores.shape)}, {list(labels.shape)}"
        )
    return _nms_fixed(boxes, scores, labels, threshold, max_detections, plus_one)


@torch.library.custom_op("vovnet_zoo::nms_fixed", mutates_args=(), device_types="cpu")
def _nms_fixed(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    kept = []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        candidate = (score >= 0).nonzero().squeeze(1)
        found = box[candidate], score[candidate], label[candidate]
        keep = candidate[class_nms(*found, threshold, max_detections, plus_one)]
        kept.append(F.pad(keep, (0, max_detections - len(keep)), value=-1))
    return torch.stack(kept) if kept else labels.new_zeros(0, max_detections)


@_nms_fixed.register_fake
def _(boxes, scores, labels, threshold, max_detections, plus_one):
    return labels.new_empty(len(boxes), max_detections)


@_nms_fixed.register_kernel("cuda")
def _nms_fixed_cuda(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    """One program per image picks `max_detections` times the best box left, and drops what it suppresses."""
    import triton

    count = scores.shape[1]
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).contiguous()
    labels, alive = labels.gather(1, order), (scores >= 0).to(torch.int8)
    picked = torch.empty(len(boxes), max_detections, dtype=torch.int64, device=boxes.device)
    if plus_one:
        threshold = math.nextafter(threshold, 0)
    if count and len(boxes):
        limit = boxes.new_full((1,), threshold, dtype=torch.float64)
        block = triton.next_power_of_2(count)
        _kernel()[(len(boxes),)](
            boxes, labels, alive, picked, limit, count, int(plus_one), max_detections, block,
            num_warps=min(32, max(4, block // 256)),
        )  # fmt: skip
        return torch.where(picked < count, order.gather(1, picked.clamp(max=count - 1)), -1)
    return picked.fill_(-1)


@functools.cache
def _kernel():
    """The Triton kernel. Triton comes with torch's CUDA builds, and is imported where it is used."""
    import triton
    import triton.language as tl

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

    return pick
