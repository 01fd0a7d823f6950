"""The AP of an exported file on a dataset is compared with PyTorch's, on the same images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Thresholds
from ..data import CocoDataset, Skipped
from ..data.layouts import locate
from ..evaluation.bootstrap import bootstrap_ap, interval, weighted_ap
from ..evaluation.matches import Matches, match
from ..exported import ExportedDetector
from ..fcos import FCOS
from ..inference import Prepared, detect_batch, evaluating, prepare, run_network
from ..results import Detections, ImageDetections
from ..sources import Frame
from .blame import blame
from .pairs import Bounds, overlap
from .pairs import match as match_alike
from .registry import Written
from .runtimes import load_exported

log = logging.getLogger("vovnet_zoo")


def open_dataset(data: str | os.PathLike, model: FCOS) -> CocoDataset:
    """Open the val split below a folder, for a model that knows its classes.

    Raises:
        ValueError: there is no such split, or it has other classes than the model, or no box.
    """
    found = locate(Path(data), "val", "give a dataset that has one")
    for text in found.warnings:
        log.warning("%s: %s", data, text)
    names = model.config["class_names"]
    dataset = CocoDataset(found.folder, found.source, known_classes=names or ())
    if len(dataset.class_names) != model.num_classes or names not in (None, dataset.class_names):
        raise ValueError(f"{dataset.annotation_file} has the classes {dataset.class_names}, and the model {names}")
    if not dataset.num_boxes:
        raise ValueError(f"{dataset.annotation_file}: no image has a box, so there is no AP")
    return dataset


@dataclass(frozen=True)
class Comparison:
    """PyTorch and exported files detect objects in the images of a dataset, resized and padded alike."""

    model: FCOS
    dataset: CocoDataset
    thresholds: Thresholds
    size: tuple[int, int] | None  # of all images, where the file has one
    least_side: int = 32  # pixels; a smaller image is padded

    def detect(self, detector: FCOS | ExportedDetector, indices: Iterable[int]) -> list[ImageDetections]:
        """Detect objects in some images of the dataset."""
        found = []
        for index in indices:
            found += detect_batch(detector, [self.prepare(index)], self.thresholds, run_network)
        return found

    def prepare(self, index: int) -> Prepared:
        """Read an image of the dataset, and resize and pad it."""
        sample = self.dataset[index]
        assert not isinstance(sample, Skipped)
        image = sample[0].as_subclass(Tensor)
        frame = Frame(str(self.dataset.image_ids[index]), image)
        item = prepare(frame, self.model.config, fixed=self.size, least=self.least_side)
        assert isinstance(item, Prepared)
        return item

    def score(self, found: list[ImageDetections]) -> Matches:
        """Match the detections in all images with the objects of the dataset."""
        ids, categories = self.dataset.image_ids.tolist(), self.dataset.category_ids
        rows = [row for each, i in zip(found, ids, strict=True) for row in each.to_coco(i, categories)]
        return match(self.dataset.annotations, rows, image_ids=ids)

    @cached_property
    def wanted(self) -> list[ImageDetections]:
        """Return PyTorch's detections in all images."""
        with evaluating(self.model):
            return self.detect(self.model, range(len(self.dataset)))

    @cached_property
    def ap(self) -> float:
        """Return PyTorch's AP."""
        return self.score(self.wanted).metrics["AP"]

    def certify(self, written: Written, bounds: Bounds) -> dict[str, Any]:
        """Compare the AP of a file with PyTorch's, and return both, and their difference with its 95% interval.

        Raises:
            ValueError: the APs differ by more than the bound; the message names the image whose own AP changes most,
                and layers.
        """
        found = self.detect(load_exported(written.file), range(len(self.dataset)))
        want, got = self.score(self.wanted), self.score(found)
        difference = got.metrics["AP"] - want.metrics["AP"]
        low, high, confidence = interval(bootstrap_ap(got).overall.minus(bootstrap_ap(want).overall))
        if not abs(difference) <= bounds.ap:
            worst = worst_image(want, got)
            raise ValueError(
                f"the file has an AP of {got.metrics['AP']:.4f} and PyTorch {want.metrics['AP']:.4f} on "
                f"{self.dataset.annotation_file}, so it was deleted: they may differ by {bounds.ap:g} "
                f"(--max-ap-difference); worst image: {self.dataset.file_names[worst]}; "
                f"{blame(written, self.prepare(worst), bounds)}"
            )
        return {
            "data": str(self.dataset.annotation_file),
            "data_images": len(self.dataset),
            "AP": got.metrics["AP"],
            "AP_torch": want.metrics["AP"],
            "AP_difference": difference,
            "AP_difference_interval": [low, high],
            "confidence": confidence,
            "AP_bound": bounds.ap,
        }


def worst_image(want: Matches, got: Matches) -> int:
    """Find the image whose own AP changes most, in the direction in which the AP of all images changes."""
    each = np.eye(len(want.images), dtype=np.int64)  # one set of images for each of them
    change = weighted_ap(got, each).overall - weighted_ap(want, each).overall  # NaN where an image has no object
    return int(np.nanargmax(change * np.sign(got.metrics["AP"] - want.metrics["AP"])))


def alike(want: ImageDetections, got: ImageDetections) -> float:
    """Compute how alike two lists of detections of an image are, 0..1; scores weigh them, and IoUs of pairs count."""
    a, b = (Detections(x["boxes"], x["scores"], x["labels"], torch.tensor(0)) for x in (want, got))
    total = float(a.scores.sum() + b.scores.sum())
    ious = overlap(a.boxes, b.boxes)
    shared = sum(float(ious[i, j] * 2 * min(a.scores[i], b.scores[j])) for i, j in match_alike(a, b))
    return shared / total if total else 1.0
