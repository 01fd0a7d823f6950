"""An exported file, opened by its own runtime, is a detector that `predict` takes; no torch model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import DetectorConfig, Precision, ThresholdOptions, Thresholds
from .fcos import check_ranges, check_thresholds
from .results import Detections
from .words import counted_classes


class ExportedDetector(nn.Module):
    """An exported file, opened by `load_detector`, computes `detect` in another runtime than torch.

    Attributes:
        source: the path of the file.
        config: the configuration of the model that was exported.
        thresholds: the thresholds that the file keeps.
        size: (H, W) that all images must have; None where it takes any multiples of 32.
        batch: the number of images of each call of `run`; None where it takes any.
        precision: what `export_detector` was asked for.
        least_side: pixels; `predict` pads smaller images, since the runtime cannot compute them.
    """

    def __init__(
        self,
        source: str,
        config: DetectorConfig,
        thresholds: Thresholds,
        size: tuple[int, int] | None,
        batch: int | None,
        precision: str,
        run: Callable[[np.ndarray, np.ndarray], list[np.ndarray]],
        least_side: int = 32,
    ):
        super().__init__()
        self.source, self.config, self.thresholds = source, config, thresholds
        self.size, self.batch, self.precision, self.run = size, batch, precision, run
        self.least_side = least_side

    def __repr__(self) -> str:
        classes = counted_classes(self.num_classes, self.class_names)
        size, batch = self.size or "any size", self.batch or "any"
        return f"ExportedDetector({self.source}, {classes}, {self.precision}, images of {size}, {batch} at a time)"

    @property
    def class_names(self) -> list[str] | None:
        """Return the K names in label order; None where unknown."""
        return self.config["class_names"]

    @property
    def num_classes(self) -> int:
        """Return the number of foreground classes, K."""
        return self.config["num_classes"]

    def forward(self, images: Tensor, sizes: Tensor, thresholds: Thresholds | None = None) -> Detections:
        """Detect objects in uint8 images [B,3,H,W] of `sizes` [B,2] (h, w), see `choose_thresholds`."""
        thresholds = thresholds or self.thresholds
        parts, step = [], self.batch or max(1, len(images))
        for start in range(0, len(images), step):
            group, group_sizes = images[start : start + step], sizes[start : start + step].long()
            count = len(group)
            lacking = (self.batch or count) - count  # a file of a fixed batch gets the last image again
            group = torch.cat([group, group[-1:].expand(lacking, -1, -1, -1)])
            group_sizes = torch.cat([group_sizes, group_sizes[-1:].expand(lacking, -1)])
            arrays = self.run(group.numpy(), group_sizes.numpy())
            parts.append([torch.from_numpy(x)[:count] for x in arrays])
        boxes, scores, labels, _ = (torch.cat(column) for column in zip(*parts, strict=True))
        boxes, scores, labels = (x[:, : thresholds.max_detections] for x in (boxes, scores, labels))
        least = thresholds.score_threshold
        found = (labels >= 0) & (scores >= (least[labels.clamp(min=0)] if isinstance(least, Tensor) else least))
        return Detections(
            boxes=torch.where(found[..., None], boxes, 0.0),
            scores=torch.where(found, scores, 0.0),
            labels=torch.where(found, labels, -1),
            count=found.sum(1),
        )

    def choose_thresholds(self, options: ThresholdOptions, precision: Precision, compile: bool) -> Thresholds:
        """Complete the options of `predict` by the thresholds of the file.

        Raises:
            ValueError: an option cannot be followed, since the file keeps another: only `score_threshold` may be
                higher, and `max_detections` lower.
        """
        if precision != "float32" or compile:
            raise ValueError(f"{self.source} was exported, so precision and compile are as they are; leave them out")
        own = self.thresholds
        given: dict[str, Any] = dict(options)
        if isinstance(least := given.get("score_threshold"), Mapping):
            scores = check_thresholds(least, self.class_names, "score_threshold")
            given["score_threshold"] = torch.tensor([scores.get(name, 0.0) for name in self.class_names or ()])
        wanted = own._replace(**given)
        check_ranges(wanted)
        for name, value in given.items():
            kept = getattr(own, name)
            if name == "score_threshold":  # one for all classes, or one of each
                right = bool((torch.as_tensor(value) >= torch.as_tensor(kept)).all())
            else:
                right = value <= kept if name == "max_detections" else value == kept
            if not right:
                values = f"{name}={_shown(value)}: {self.source} was exported with {_shown(kept)}"
                raise ValueError(f"{values}; export it again with another {name}, or leave it out")
        return wanted


def _shown(value: Any) -> str:
    return str([round(x, 3) for x in value.tolist()]) if isinstance(value, Tensor) else str(value)
