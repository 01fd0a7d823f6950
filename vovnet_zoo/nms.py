"""`class_nms` keeps the best of overlapping boxes, and `nms_fixed` returns them in a fixed shape, for a graph."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from .arguments import check_flag, check_number, check_tensor
from .kernels import has_triton


def class_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool = False
) -> Tensor:
    """Return the indices of the boxes that NMS keeps, best first.

    Of the boxes [N,4] (xyxy) it keeps those that no better box of their class overlaps, at most `max_detections`. An
    IoU above `threshold` suppresses. With `plus_one` (the published convention) a box covers the pixels x1..x2, and an
    IoU equal to `threshold` suppresses too. Equal scores: the first wins.

    Raises:
        ValueError: a tensor has another shape or kind, or a number is out of range; the message names it.
    """
    check_tensor("boxes", boxes, ("N", 4), "")
    check_tensor("scores", scores, (len(boxes),))
    check_tensor("labels", labels, (len(boxes),), "whole")
    check_limits(threshold, max_detections, plus_one)
    limits = threshold, max_detections, plus_one
    if boxes.dtype != torch.float64 and has_triton(boxes.device):
        return _class_nms_cuda(boxes, scores, labels, *limits)
    # Apple's GPUs have no float64, and on Nvidia's torchvision rounds the threshold to float32.
    if boxes.device.type in ("mps", "cuda"):
        return class_nms(boxes.cpu(), scores.cpu(), labels.cpu(), *limits).to(boxes.device)
    # One NMS for all classes: each class on a plane of its own, in float64 so that the shift rounds nothing away.
    corners = boxes.to(torch.float64, copy=True)
    if plus_one:
        corners[:, 2:] += 1
        threshold = math.nextafter(threshold, 0)
    if len(boxes):
        corners += labels[:, None] * (corners.max() - corners.min().clamp(max=0) + 1)
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
    """Do `class_nms` for B images at once: return indices [B,max_detections], best first, then -1.

    Its shape depends on no value, so it is one node of a compiled graph, and on a GPU it can be part of a CUDA graph.

    Args:
        boxes: float32 [B,N,4] xyxy; scores: float32 [B,N], negative where there is no box; labels: int64 [B,N].

    Raises:
        ValueError: a tensor has another shape or kind, or a number is out of range; the message names it.
    """
    check_tensor("boxes", boxes, ("B", "N", 4))
    check_tensor("scores", scores, ("B", "N"))
    check_tensor("labels", labels, ("B", "N"), "whole")
    check_limits(threshold, max_detections, plus_one)
    if boxes.dtype != torch.float32 or boxes.shape != (*scores.shape, 4) or labels.shape != scores.shape:
        raise ValueError(
            "boxes must be float32 [B,N,4] with scores and labels [B,N], got "
            f"{boxes.dtype} {list(boxes.shape)}, {list(scores.shape)}, {list(labels.shape)}"
        )
    return _nms_fixed(boxes, scores, labels, threshold, max_detections, plus_one)


def check_limits(threshold: float, max_detections: int, plus_one: bool) -> None:
    """Raise `ValueError` unless the options of `class_nms` are in range."""
    check_number("threshold", threshold, 0, 1)
    check_number("max_detections", max_detections, 1, 1_000_000, whole=True)
    check_flag("plus_one", plus_one)


@torch.library.custom_op("vovnet_zoo::nms_fixed", mutates_args=(), device_types=("cpu", "mps"))
def _nms_fixed(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    return _nms_each(boxes, scores, labels, threshold, max_detections, plus_one)


def _nms_each(
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
    return labels.new_empty(boxes.shape[0], max_detections)


@_nms_fixed.register_kernel("cuda")
def _nms_fixed_cuda(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    if not has_triton(boxes.device):
        return _nms_each(boxes, scores, labels, threshold, max_detections, plus_one)
    from .kernels.nms_triton import nms

    return nms(boxes, scores, labels, threshold, max_detections, plus_one)


def _class_nms_cuda(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    from .kernels.nms_triton import nms

    order = scores.argsort(descending=True, stable=True)
    most = max(1, min(max_detections, len(order)))
    equal = torch.zeros_like(order, dtype=torch.float32)  # the kernel leaves out scores below 0, and these may be
    keep = nms(boxes[order].float()[None], equal[None], labels[order][None], threshold, most, plus_one)[0]
    return order[keep[keep >= 0]]
