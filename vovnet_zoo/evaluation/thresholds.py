"""These functions choose score thresholds from matches: of the best F1, or of a wanted precision or recall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..arguments import check_number
from .matches import Matches

# An object counts as found at an IoU of 0.5; the threshold is compared with the score that `predict` returns.
AT_IOU_50 = 0


class Choice(NamedTuple):
    """A detection is kept if its score is at least `score`; this is what the kept ones are worth at an IoU of 0.5."""

    score: float
    precision: float
    recall: float
    f1: float


class Curve(NamedTuple):
    """Precision and recall change with the score threshold; N thresholds, each a score of a detection, falling."""

    score: np.ndarray  # float [N]
    right: np.ndarray  # int [N], detections that score at least this and are right
    kept: np.ndarray  # int [N], detections that score at least this and count
    objects: int  # that are to be found

    @property
    def precision(self) -> np.ndarray:
        """Return the share of kept detections that are right, float [N]."""
        return self.right / np.maximum(self.kept, 1)

    @property
    def recall(self) -> np.ndarray:
        """Return the share of objects that are found, float [N]."""
        return self.right / max(self.objects, 1)

    @property
    def f1(self) -> np.ndarray:
        """Return the harmonic mean of precision and recall, float [N]."""
        return 2 * self.right / np.maximum(self.kept + self.objects, 1)


def curve(matches: Matches, label: int | None = None, iou_index: int = AT_IOU_50) -> Curve:
    """Count the detections above each score, of one class or, where `label` is None, of all classes together."""
    order = matches.by_score(label) if label is not None else np.argsort(-matches.det_score, kind="stable")
    score = matches.det_score[order]
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(score) else np.zeros(0, dtype=int)
    right = np.cumsum(matches.is_right[iou_index, order])[last]
    kept = np.cumsum(matches.det_counts[iou_index, order])[last]
    of_class = matches.true_counts if label is None else matches.true_counts & (matches.true_label == label)
    return Curve(score[last], right, kept, int(of_class.sum()))


def best_f1(points: Curve) -> Choice | None:
    """Choose the threshold of the best F1, the highest one of several; None where no detection is right."""
    if not len(points.score) or points.right[-1] == 0:
        return None
    return _choice(points, int(points.f1.argmax()))


def for_precision(points: Curve, precision: float) -> Choice | None:
    """Choose the threshold that finds most objects with at least this precision; None where there is none."""
    check_number("precision", precision, 0, 1)
    fit = np.flatnonzero((points.precision >= precision) & (points.right > 0))
    return _choice(points, int(fit[points.right[fit].argmax()])) if len(fit) else None


def for_recall(points: Curve, recall: float) -> Choice | None:
    """Choose the highest threshold that finds at least this share of the objects; None where there is none."""
    check_number("recall", recall, 0, 1)
    fit = np.flatnonzero((points.recall >= recall) & (points.right > 0))
    return _choice(points, int(fit[0])) if len(fit) else None


def class_thresholds(matches: Matches) -> dict[str, float]:
    """Choose the threshold of the best F1 for each class.

    A class of which no detection is right gets the threshold of all classes together, and 0.5 where none is right.
    """
    overall = best_f1(curve(matches))
    chosen = {name: best_f1(curve(matches, label)) for label, name in enumerate(matches.class_names)}
    return {name: (choice or overall or Choice(0.5, 0, 0, 0)).score for name, choice in chosen.items()}


def any_right(matches: Matches) -> bool:
    """Say whether a detection is right, without which no threshold can be chosen."""
    return bool(matches.is_right[AT_IOU_50].any())


def is_kept(matches: Matches, thresholds: Mapping[str, float]) -> np.ndarray:
    """Say which detections `predict` returns with these thresholds, bool [D]; a class that is not named has none."""
    least = np.array([thresholds.get(name, 0.0) for name in matches.class_names], dtype=np.float32)
    return matches.det_score.astype(np.float32) >= least[matches.det_label]


def mistakes(matches: Matches, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the objects that none of the kept detections, bool [D], found, and the kept detections that found none."""
    right = matches.is_right[AT_IOU_50] & kept
    found = np.zeros(len(matches.true_label), dtype=bool)
    found[matches.det_true[AT_IOU_50][right]] = True
    missed = np.flatnonzero(matches.true_counts & ~found)
    return missed, np.flatnonzero(kept & matches.det_counts[AT_IOU_50] & ~right)


def at_thresholds(matches: Matches, thresholds: Mapping[str, float]) -> Choice:
    """Compute precision, recall and F1 of all classes together; `score` is the mean of the thresholds."""
    kept = is_kept(matches, thresholds)
    right, counted = (int((kept & x[AT_IOU_50]).sum()) for x in (matches.is_right, matches.det_counts))
    objects = int(matches.true_counts.sum())
    score = float(np.mean(list(thresholds.values()))) if thresholds else 0.0
    return Choice(score, right / max(counted, 1), right / max(objects, 1), 2 * right / max(counted + objects, 1))


def _choice(points: Curve, i: int) -> Choice:
    """Put the threshold between the last score that is kept and the next one, so that rounding changes nothing.

    `predict` compares in float32.
    """
    above = np.float32(points.score[i])
    below = np.float32(points.score[i + 1]) if i + 1 < len(points.score) else np.float32(0)
    middle = np.float32((above + below) / 2)
    score = float(middle if middle > below else above)
    return Choice(score, *(float(x[i]) for x in (points.precision, points.recall, points.f1)))
