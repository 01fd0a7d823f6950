"""`label_errors` lists annotations that are probably wrong, by what a detector sees otherwise."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pycocotools import mask

from .matches import Matches

SAME = 0.5  # boxes with at least this IoU are of one object
APART = 0.3  # boxes with less than this IoU are of different objects
PRIOR = 5.0  # an image counts as if it had so many more detections with an annotation


class LabelError(NamedTuple):
    """An annotation is probably missing, of another class, or of no object."""

    kind: Literal["no annotation", "other class", "nothing found"]
    suspicion: float  # 0..1, to be compared within a kind
    image: int  # position in `Matches.images`
    true: int | None  # position of the object in `Matches`
    det: int | None  # position of the detection


class Places(NamedTuple):
    """These arrays say where detections are, bool [D]."""

    best: np.ndarray  # no better detection, of any class, is of the same object
    labelled: np.ndarray  # an object of any class is annotated there
    free: np.ndarray  # nothing is annotated near


def label_errors(matches: Matches, most: int = 100) -> list[LabelError]:
    """List probable label errors, `most` of them: the most suspicious of each kind, and so on.

    A detection where no object is annotated may be an object that was forgotten: its suspicion is the share of
    detections like it that have an annotation, see `_expected`. A detection on an object of another class may know
    better than the label: its suspicion is its score, minus the best score of the labelled class there. An object at
    which there is no detection of any class may be none: its suspicion is the share of its class's objects that are
    found. Small and hidden objects are not found either, so this kind has its turn a fifth as often.
    """
    found: list[LabelError] = []
    rate = [_rate(matches, label) for label in range(len(matches.class_names))]
    true_order, true_of = _groups(matches.true_image, len(matches.images))
    det_order, det_of = _groups(matches.det_image, len(matches.images))
    places = Places(*np.zeros((3, len(matches.det_score)), dtype=bool))
    for image in range(len(matches.images)):
        truths = true_order[true_of[image] : true_of[image + 1]]  # [G]
        dets = det_order[det_of[image] : det_of[image + 1]]  # [D]
        dets = dets[np.argsort(-matches.det_score[dets], kind="stable")]
        iou = _iou(matches.det_box[dets], matches.true_box[truths], ~matches.true_counts[truths])  # [D,G]
        places.best[dets] = _best(matches.det_box[dets])
        places.labelled[dets] = (iou >= SAME).any(axis=1)
        places.free[dets] = (iou < APART).all(axis=1)
        for column, true in enumerate(truths):
            if matches.true_counts[true]:
                found += _doubtful(matches, image, int(true), dets[iou[:, column] >= SAME], rate)
    expected = _expected(matches, places)
    for det in np.flatnonzero(places.best & places.free).tolist():
        found.append(LabelError("no annotation", float(expected[det]), int(matches.det_image[det]), None, det))
    turns: list[tuple[float, LabelError]] = []
    for kind, every in (("other class", 1), ("no annotation", 1), ("nothing found", 5)):
        own = sorted((error for error in found if error.kind == kind), key=lambda error: -error.suspicion)
        turns += [(every * (rank + 1), error) for rank, error in enumerate(own)]
    return [error for _, error in sorted(turns, key=lambda turn: turn[0])][:most]


def _best(boxes: np.ndarray) -> np.ndarray:
    """Say which boxes [N,4], best first, are the best of their object, bool [N]."""
    overlap = _iou(boxes, boxes, np.zeros(len(boxes), dtype=bool))
    best = np.zeros(len(boxes), dtype=bool)
    for i in range(len(boxes)):
        best[i] = not (overlap[i, :i][best[:i]] >= SAME).any()
    return best


def _expected(matches: Matches, places: Places) -> np.ndarray:
    """Say how probable it is that there is an annotation at each detection, float [D].

    This is the share of detections of the class, of about the same score, that have one, lowered in images of which
    other detections lack theirs: where an annotator left out many objects, or had a rule to leave them out, one more
    is no surprise. A forgotten object in an image that is complete otherwise comes first.
    """
    share = np.zeros(len(matches.det_score))
    for label in range(len(matches.class_names)):
        own = matches.det_label == label
        share[own] = _share(matches.det_score, own & places.best, places.labelled)[own]
    count, owner = len(matches.images), matches.det_image
    labelled = np.bincount(owner[places.best], places.labelled[places.best], minlength=count)  # [I]
    wanted = np.bincount(owner[places.best], share[places.best], minlength=count)  # [I]
    others = wanted[owner] - np.where(places.best, share, 0)  # [D], without the detection itself
    return share * np.minimum(1, (labelled[owner] + PRIOR) / (others + PRIOR))


def _share(score: np.ndarray, chosen: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Fit the share of the chosen detections, bool [D], that is right, over the score, float [D].

    The fit is a logistic regression on the logit of the score; its prior says that scores are calibrated.
    """
    score = np.clip(score, 1e-6, 1 - 1e-6)
    x = np.stack([np.ones(len(score)), np.log(score / (1 - score))], axis=1)  # [D,2]
    calibrated = np.array([0.0, 1.0])
    weights = calibrated.copy()
    for _ in range(20):  # Newton's steps
        p = _logistic(x[chosen] @ weights)
        gradient = x[chosen].T @ (right[chosen] - p) - (weights - calibrated)
        curvature = (x[chosen] * (p * (1 - p))[:, None]).T @ x[chosen] + np.eye(2)
        weights = weights + np.linalg.solve(curvature, gradient)
    return _logistic(x @ weights)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


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
