"""`analyse` computes all that a report says of a detector's results on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from ..data import Annotations
from .bootstrap import Interval, ap_interval, bootstrap_ap
from .errors import Calibration, Kind, calibration, confusion_matrix, error_kinds
from .label_errors import LabelError, label_errors
from .matches import Matches, match
from .thresholds import Choice, at_thresholds, class_thresholds


@dataclass(frozen=True)
class Analysis:
    """This is the analysis of one detector on one dataset with K classes."""

    matches: Matches
    ap: Interval  # of the mean AP
    class_ap: dict[str, Interval]
    thresholds: dict[str, float]  # of the best F1 of each class, at an IoU of 0.5
    at_thresholds: Choice  # of all classes together
    kinds: dict[str, Kind]
    confusion: np.ndarray  # int [K+1,K+1], see `confusion_matrix`
    calibration: Calibration
    label_errors: list[LabelError]
    resamples: int

    @property
    def metrics(self) -> dict:
        """Return the metrics of `coco_metrics`."""
        return self.matches.metrics


def analyse(
    annotations: str | Path | Annotations | COCO,
    results: list[dict],
    *,
    image_ids: Sequence[int] | None = None,
    resamples: int = 1000,
) -> Analysis:
    """Analyse result rows; `annotations`, `results`, `image_ids` and the errors are as for `coco_metrics`.

    Args:
        resamples: sets of images that the bootstrap draws for the intervals.

    Raises:
        ImportError: hotcoco is not installed.
    """
    matches = match(annotations, results, image_ids=image_ids)
    samples, thresholds = bootstrap_ap(matches, resamples), class_thresholds(matches)
    return Analysis(
        matches=matches,
        ap=ap_interval(samples.overall),
        class_ap={name: ap_interval(found) for name, found in zip(matches.class_names, samples.per_class, strict=True)},
        thresholds=thresholds,
        at_thresholds=at_thresholds(matches, thresholds),
        kinds=error_kinds(matches),
        confusion=confusion_matrix(matches, thresholds),
        calibration=calibration(matches),
        label_errors=label_errors(matches),
        resamples=resamples,
    )
