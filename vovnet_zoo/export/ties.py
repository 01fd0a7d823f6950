"""`is_right` tells whether detections are what PyTorch finds, where rounding may decide a tie the other way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..config import DetectorConfig, Thresholds
from ..fcos import Predictions
from ..inference import decode
from ..results import Detections

IOU = 1e-4  # an IoU that is this near the threshold may suppress or not
MORE = 100  # candidates of each level that are looked at beyond the best `topk`


class Candidates(NamedTuple):
    """These are PyTorch's candidates for the NMS of one image, and boxes that only rounding may make candidates."""

    boxes: Tensor  # [N,4] xyxy
    scores: Tensor  # [N]
    labels: Tensor  # [N]
    sure: Tensor  # bool [N]; False where rounding decides whether this is a candidate


def is_right(
    preds: Predictions,
    size: tuple[int, int],
    got: Detections,
    config: DetectorConfig,
    thresholds: Thresholds,
    box_bound: float,
    score_bound: float,
) -> bool:
    """Tell whether `got` is a result that NMS can have on PyTorch's predictions, up to rounding.

    Rounding may decide the order of scores within `score_bound` of each other, the place of a score within
    `score_bound` of a border (a threshold, the best `topk` of a level, the last of `max_detections`), and whether an
    IoU within `IOU` of `nms_threshold` suppresses. Everything else is demanded:

    - each detection is a candidate of its own, with its box up to `box_bound` and its score up to `score_bound`;
    - two detections of one class do not overlap more than `nms_threshold` allows;
    - a candidate that is not detected is suppressed by a detection that is as good, or comes after the last place.

    Args:
        preds: PyTorch's predictions for one image, on the CPU.
        size: (h, w) of the image in the network input, without the padding.
        got: boxes [D,4] xyxy in pixels of the network input, scores [D] and labels [D], without empty places.
        config: the model's.
        box_bound: pixels.
    """
    found = find_candidates(preds, size, config, thresholds, box_bound, score_bound)
    chosen = identify(got, found, box_bound, score_bound)
    if chosen is None:
        return False
    boxes = found.boxes.double()
    boxes[:, 2:] += int(config["plus_one"])
    ious = torch.where(found.labels[:, None] == found.labels[chosen], box_iou(boxes, boxes[chosen]), 0.0)  # [N,D]
    if (ious[chosen].fill_diagonal_(0) > thresholds.nms_threshold + IOU).any():
        return False
    as_good = found.scores[chosen] >= found.scores[:, None] - score_bound  # [N,D]
    explained = ((ious >= thresholds.nms_threshold - IOU) & as_good).any(1)
    explained[chosen] = True
    if len(chosen) == thresholds.max_detections:
        explained |= found.scores <= found.scores[chosen].min() + score_bound
    return bool((explained | ~found.sure).all())


def identify(got: Detections, found: Candidates, box_bound: float, score_bound: float) -> Tensor | None:
    """Find the candidate that each detection is; returns different indices [D], or None where there are none."""
    distance = (found.boxes[:, None] - got.boxes).abs().amax(-1)  # [N,D]
    alike = (found.labels[:, None] == got.labels) & (distance <= box_bound)
    alike &= (found.scores[:, None] - got.scores).abs() <= score_bound
    distance[~alike] = math.inf
    chosen = torch.zeros(len(got.scores), dtype=torch.int64)
    for i, of_candidates in enumerate(distance.unbind(1)):
        if not (of_candidates < math.inf).any():
            return None
        chosen[i] = of_candidates.argmin()
        distance[chosen[i]] = math.inf
    return chosen


def find_candidates(
    preds: Predictions,
    size: tuple[int, int],
    config: DetectorConfig,
    thresholds: Thresholds,
    box_bound: float,
    score_bound: float,
) -> Candidates:
    """Compute what may be a candidate if scores move by `score_bound`, and tell what is one even then."""
    topk = thresholds.topk
    places = torch.unique_consecutive(preds.strides, return_counts=True)[1].tolist()
    counts = [min(topk + MORE, n * config["num_classes"]) for n in places]

    def decode_with(shift: float) -> tuple[Tensor, Tensor, Tensor]:
        moved = thresholds._replace(
            score_threshold=move(thresholds.score_threshold, shift),
            candidate_threshold=float(move(thresholds.candidate_threshold, shift)),
            topk=topk + MORE,
        )
        boxes, scores, labels = decode(preds, torch.tensor([size]), moved, config["plus_one"], True, places)
        return boxes[0], scores[0], labels[0]

    boxes, scores, labels = decode_with(-score_bound)  # of each level, best first
    above = set(rows(*decode_with(score_bound)))
    sure = torch.tensor([row in above for row in rows(boxes, scores, labels)], dtype=torch.bool) & (scores >= 0)
    possible = scores >= 0
    for level in torch.arange(len(scores)).split(counts):
        if len(level) > topk:
            possible[level] &= scores[level] >= scores[level[topk - 1]] - score_bound
            sure[level] &= scores[level] > scores[level[topk]] + score_bound
    if not (config["plus_one"] or config["keep_empty"]):  # empty boxes are no candidates
        side = (boxes[:, 2:] - boxes[:, :2]).amin(-1)
        possible &= side > 0
        sure &= side > box_bound
    return Candidates(boxes[possible], scores[possible], labels[possible], sure[possible])


def move(threshold: float | Tensor, shift: float) -> float | Tensor:
    """Move a threshold, one number or a tensor [K], by `shift`; 0 stays, since nothing scores less."""
    if isinstance(threshold, Tensor):
        return torch.where(threshold > 0, threshold + shift, threshold)
    return threshold + shift if threshold > 0 else threshold


def rows(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
    """Return the numbers of each candidate."""
    return [
        (*box, score, label) for box, score, label in zip(*map(Tensor.tolist, (boxes, scores, labels)), strict=True)
    ]
