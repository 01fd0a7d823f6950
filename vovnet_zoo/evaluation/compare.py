"""`compare` says by how much models differ on the same images, and whether it may be luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO

from ..data import Annotations
from ..words import counted
from .bootstrap import Interval, Resampled, ResampledAP, ap_interval, bootstrap_ap, interval
from .matches import Matches, match
from .thresholds import Choice, at_thresholds, class_thresholds, is_kept, mistakes


class Difference(NamedTuple):
    """This is the AP of a model minus the AP of the first model, with the interval of this difference."""

    value: float
    interval: Interval

    @property
    def is_known(self) -> bool:
        """Say whether the interval tells anything: an unknown one goes from -1 to 1."""
        return self.interval.low > -1 or self.interval.high < 1

    @property
    def may_be_luck(self) -> bool:
        """Say whether the interval holds 0."""
        return self.interval.low <= 0 <= self.interval.high


@dataclass(frozen=True)
class Compared:
    """This is what is known of one of the models, on a dataset with K classes."""

    name: str
    matches: Matches
    thresholds: dict[str, float]  # of the best F1 of each class, at an IoU of 0.5
    at_thresholds: Choice  # of all classes together
    ap: Interval  # of the mean AP
    difference: Difference | None  # of the mean AP; None where no image has an object
    class_differences: list[Difference | None]  # K


@dataclass(frozen=True)
class Comparison:
    """This is a comparison of models; all others are compared with the first."""

    models: list[Compared]
    resamples: int

    def errors(self) -> np.ndarray:
        """Count the missed objects and false detections of each model in each image, int [M,I], at its thresholds."""
        count = len(self.models[0].matches.images)
        found = []
        for model in self.models:
            missed, false = mistakes(model.matches, is_kept(model.matches, model.thresholds))
            owners = np.concatenate([model.matches.true_image[missed], model.matches.det_image[false]])
            found.append(np.bincount(owners, minlength=count))
        return np.stack(found)


def compare(
    annotations: str | Path | Annotations | COCO,
    results: Mapping[str, list[dict]],
    *,
    image_ids: Sequence[int] | None = None,
    resamples: int = 1000,
) -> Comparison:
    """Compare the result rows of models, by name; the other arguments and the errors are as for `analyse`.

    The bootstrap draws the same images for all models, so that an image that is hard for all of them does not count:
    the interval of a difference is narrower than the intervals of both APs suggest.
    """
    if len(results) < 2:
        raise ValueError(f"results has {counted(len(results), 'model')}: give two or more to compare")
    found = {name: match(annotations, rows, image_ids=image_ids) for name, rows in results.items()}
    samples = {name: bootstrap_ap(matches, resamples) for name, matches in found.items()}
    first = next(iter(found))
    return Comparison(
        [_compared(name, found[name], found[first], samples[name], samples[first]) for name in found], resamples
    )


def format_comparison(comparison: Comparison) -> str:
    """Format a comparison as lines of text: a table of the models, one of each pair's classes, and what they say."""
    first, *others = comparison.models
    width = max(len(name) for name in (*(model.name for model in comparison.models), *first.matches.class_names))
    titles = f"{'difference':>10}  {'95 % of it':>16}"
    lines = [f"{'':{width}}  {'AP':>5}  {'95 %':>11}  {'AP50':>5}  {'F1':>5}  {titles}"]
    for model in comparison.models:
        metrics = model.matches.metrics
        numbers = f"{_number(metrics['AP'])}  {_between(model.ap)}  {_number(metrics['AP50'])}"
        difference = f"{'first':>10}" if model is first else _signed(model.difference)
        lines.append(f"{model.name:{width}}  {numbers}  {_number(model.at_thresholds.f1)}  {difference}")
    for other in others:
        lines += ["", f"AP of each class, {first.name} -> {other.name}"]
        for label, name in enumerate(first.matches.class_names):
            before, after = (_number(model.matches.class_metrics[name]["AP"]) for model in (first, other))
            lines.append(f"{name:{width}}  {before:>11} -> {after}  {_signed(other.class_differences[label])}")
    lines += ["", f"A difference is to {first.name}. Where its interval holds 0, or is unknown (-), it may be luck."]
    return "\n".join(lines)


def _compared(name: str, own: Matches, other: Matches, samples: ResampledAP, first: ResampledAP) -> Compared:
    """Put together what is known of a model, whose own samples are drawn with the images of the first one's."""
    thresholds = class_thresholds(own)
    return Compared(
        name=name,
        matches=own,
        thresholds=thresholds,
        at_thresholds=at_thresholds(own, thresholds),
        ap=ap_interval(samples.overall),
        difference=_subtract(own.metrics["AP"], other.metrics["AP"], samples.overall, first.overall),
        class_differences=[
            _subtract(
                own.class_metrics[name]["AP"],
                other.class_metrics[name]["AP"],
                samples.per_class[label],
                first.per_class[label],
            )
            for label, name in enumerate(own.class_names)
        ],
    )


def _subtract(ap: float, first_ap: float, samples: Resampled, first: Resampled) -> Difference | None:
    """Subtract APs; None where nothing is to be found."""
    return None if ap < 0 else Difference(ap - first_ap, interval(samples.minus(first)))


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return f"{'-':>10}  {'-':>16}"
    between = f"{difference.interval.low:+.3f} to {difference.interval.high:+.3f}" if difference.is_known else "-"
    return f"{difference.value:+10.3f}  {between:>16}"


def _number(value: float) -> str:
    return f"{value:5.3f}" if value >= 0 else f"{'-':>5}"


def _between(found: Interval) -> str:
    return f"{found.low:.3f}-{found.high:.3f}" if found.low >= 0 else f"{'-':>11}"
