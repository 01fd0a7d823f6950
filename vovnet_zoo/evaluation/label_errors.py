"""`label_errors` lists annotations that are probably wrong, by what a detector sees otherwise."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pycocotools import mask

from .matches import Matches

SAME = 0.5  # boxes with at least this IoU are of one object
APART = 0.3  # boxes with less than this IoU are of different objects


class LabelError(NamedTuple):
    """An annotation is probably missing, of another class, or of no object."""

    kind: Literal["no annotation", "other class", "nothing found"]
    suspicion: float  # 0..1, to be compared within a kind
    image: int  # position in `Matches.images`
    true: int | None  # position of the object among those of `Matches`
    det: int | None  # position of the detection


def label_errors(matches: Matches, most: int = 100) -> list[LabelError]:
    """List probable label errors, `most` of them: the most suspicious of each kind, and so on.

    A detection with a high score where no object is annotated may be an object that was forgotten: its suspicion is
    the score. A detection on an object of another class may know better than the label: its suspicion is its score,
    minus the best score of the labelled class there. An object at which there is no detection of any class may be none:
    its suspicion is the share of its class's objects that are found. Small and hidden objects are not found either, so
    this kind has its turn a third as often.
    """
    found: list[LabelError] = []
    rate = [_rate(matches, label) for label in range(len(matches.class_names))]
    true_order, true_of = _groups(matches.true_image, len(matches.images))
    det_order, det_of = _groups(matches.det_image, len(matches.images))
    for image in range(len(matches.images)):
        truths = true_order[true_of[image] : true_of[image + 1]]  # [G]
        dets = det_order[det_of[image] : det_of[image + 1]]  # [D]
        dets = dets[np.argsort(-matches.det_score[dets], kind="stable")]
        iou = _iou(matches.det_box[dets], matches.true_box[truths], ~matches.true_counts[truths])  # [D,G]
        found += _forgotten(matches, image, dets, iou)
        for column, true in enumerate(truths):
            if matches.true_counts[true]:
                found += _doubtful(matches, image, int(true), dets[iou[:, column] >= SAME], rate)
    turns: list[tuple[float, LabelError]] = []
    for kind, every in (("other class", 1), ("no annotation", 1), ("nothing found", 3)):
        own = sorted((error for error in found if error.kind == kind), key=lambda error: -error.suspicion)
        turns += [(every * (rank + 1), error) for rank, error in enumerate(own)]
    return [error for _, error in sorted(turns, key=lambda turn: turn[0])][:most]


def _forgotten(matches: Matches, image: int, dets: np.ndarray, iou: np.ndarray) -> list[LabelError]:
    """List detections, the best of each place, at which no object is annotated."""
    free = dets[(iou < APART).all(axis=1)] if len(dets) else dets
    overlap = _iou(matches.det_box[free], matches.det_box[free], np.zeros(len(free), dtype=bool))
    chosen: list[int] = []
    for i in range(len(free)):
        if all(overlap[i, j] < SAME for j in chosen):
            chosen.append(i)
    scores = matches.det_score[free]
    return [LabelError("no annotation", float(scores[i]), image, None, int(free[i])) for i in chosen]


def _doubtful(matches: Matches, image: int, true: int, dets: np.ndarray, rate: list[float]) -> list[LabelError]:
    """List an object if the detections at its place, best first, are of another class, or if there are none."""
    label, scores = matches.true_label[true], matches.det_score[dets]
    if not len(dets):
        return [LabelError("nothing found", rate[label], image, true, None)]
    own = matches.det_label[dets] == label
    if own.all():
        return []
    suspicion = scores[~own][0] - scores[own].max(initial=0)
    return [LabelError("other class", float(suspicion), image, true, int(dets[~own][0]))] if suspicion > 0 else []


def _rate(matches: Matches, label: int) -> float:
    """Return the share of a class's objects that a detection found, of any score."""
    counts = matches.true_counts & (matches.true_label == label)
    hits = matches.det_true[0][matches.is_right[0] & (matches.det_label == label)]
    return len(hits) / max(int(counts.sum()), 1)


def _groups(owner: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort positions by their owner, 0..count-1; returns them and where each owner's begin, int [count+1]."""
    return np.argsort(owner, kind="stable"), np.append(0, np.cumsum(np.bincount(owner, minlength=count)))


def _iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Compute the IoU [N,M] of boxes xywh [N,4] and [M,4] as pycocotools does."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    return np.asarray(mask.iou(a, b, crowd.astype(int).tolist()))
