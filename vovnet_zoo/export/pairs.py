"""`match` pairs the detections of a file with PyTorch's, and `Bounds` say how far apart they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..results import Detections

LEAST_IOU = 0.5  # of two boxes that are the same detection


@dataclass(frozen=True)
class Bounds:
    """An exported file is refused if it is further from PyTorch than these numbers; None is no bound."""

    matched: float | None  # least share of detections that both have
    box: float | None  # largest difference of a corner, in pixels of the network input
    score: float | None  # largest difference of a score
    output: float  # largest difference of an output of the network, relative to its largest value
    layer: float | None  # of a layer's map, likewise; tells where it went wrong
    ap: float  # largest difference of the AP, where a dataset is given


BOUNDS = {
    "float32": Bounds(matched=1.0, box=0.05, score=1e-4, output=1e-4, layer=1e-3, ap=0.001),
    "float16": Bounds(matched=0.98, box=1.0, score=0.02, output=0.02, layer=0.02, ap=0.005),
    "int8": Bounds(matched=None, box=None, score=None, output=1.0, layer=None, ap=0.01),
}


def is_within(bounds: Bounds, matched: float, largest: Mapping[str, float]) -> bool:
    """Tell whether the share of matched detections and the largest differences are in bounds; NaN is not."""
    limits = [(largest["box"], bounds.box), (largest["score"], bounds.score)]
    few = bounds.matched is not None and matched < bounds.matched
    return not few and all(limit is None or value <= limit for value, limit in limits)


def first(found: Detections) -> Detections:
    """Return the detections of the first image, without empty places: boxes [N,4], scores [N], labels [N]."""
    count = int(found.count[0])
    return Detections(found.boxes[0, :count], found.scores[0, :count], found.labels[0, :count], found.count[0])


def differences(want: Detections, got: Detections, bounds: Bounds | None = None) -> tuple[int, dict[str, float]]:
    """Count the detections of one image that both have, and compute the largest difference of a box and of a score.

    With `bounds`, a pair that is further apart is none.
    """
    found = [
        {
            "box": float((want.boxes[i] - got.boxes[j]).abs().max()),
            "score": float((want.scores[i] - got.scores[j]).abs()),
        }
        for i, j in match(want, got)
    ]
    found = [pair for pair in found if bounds is None or is_within(bounds, 1.0, pair)]
    return len(found), {key: max((pair[key] for pair in found), default=0.0) for key in ("box", "score")}


def match(want: Detections, got: Detections) -> list[tuple[int, int]]:
    """Pair detections of one class that overlap, the nearest boxes first; each is in one pair at most."""
    distance = (want.boxes[:, None] - got.boxes).abs().amax(-1).numpy().copy()  # [N,M]
    same = (want.labels[:, None] == got.labels) & (overlap(want.boxes, got.boxes) >= LEAST_IOU)
    distance[~same.numpy()] = np.inf
    pairs = []
    while distance.size and np.isfinite(nearest := distance.min()):
        i, j = np.argwhere(distance == nearest)[0]
        pairs.append((int(i), int(j)))
        distance[i], distance[:, j] = np.inf, np.inf
    return pairs


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU [N,M] of boxes [N,4] and [M,4], xyxy; a box without pixels has 1 with itself."""
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clamp(min=0) + 1e-3 for x in (a, b))
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=-1e-3) + 1e-3
    shared = sides.prod(-1)
    return shared / (area_a.prod(-1)[:, None] + area_b.prod(-1) - shared)
