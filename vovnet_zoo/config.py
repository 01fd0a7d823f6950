"""A detector has these settings; the table of variants says what "improved" and "published" mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

VariantName = Literal["improved", "published"]
Distance = Literal["relu", "exp"]
CenternessOn = Literal["box", "cls"]
BoxLoss = Literal["giou", "iou"]
Precision = Literal["float32", "bf16", "fp16"]  # of the network, under autocast
Pictures = Literal["jpg", "png", "none"]  # format of the pictures of detections
# The least and the most: side of a window in pixels, part of it that two windows share, scale of a view.
TILES, OVERLAPS, SCALES = (32, 1_000_000), (0, 0.99), (0.1, 10)

# Least and largest whole number; the largest are far beyond use, and keep a damaged file from taking memory.
RANGES = {
    "num_classes": (1, 100_000, "; a detector needs at least one foreground class"),
    "channels": (64, 8192, "; the head's GroupNorm has 32 groups of at least 2 channels"),
    "num_convs": (0, 64, ""),
    "min_size": (1, 65_535, ""),
    "max_size": (1, 65_535, ""),
}


class Variant(TypedDict):
    """A variant consists of these arguments of `FCOS`; those from `plus_one` on are also arguments of `FCOSLoss`."""

    distance: Distance
    centerness_on: CenternessOn
    frozen_norm: NotRequired[bool]
    plus_one: bool
    center_radius: float | None
    box_loss: BoxLoss
    add_images: bool


VARIANTS: dict[VariantName, Variant] = {
    # arXiv 2006.09214
    "improved": dict(
        distance="relu",
        centerness_on="box",
        plus_one=False,
        center_radius=1.5,
        box_loss="giou",
        add_images=False,
    ),
    # the detectors that were published in 2019 (arXiv 1904.01355)
    "published": dict(
        distance="exp",
        centerness_on="cls",
        frozen_norm=True,
        plus_one=True,
        center_radius=None,
        box_loss="iou",
        add_images=True,
    ),
}
DEFAULT_VARIANT: VariantName = "improved"
DEFAULTS = VARIANTS[DEFAULT_VARIANT]


class LossOptions(TypedDict, total=False):
    """These arguments of `FCOSLoss` are also in a detector's configuration."""

    plus_one: bool
    center_radius: float | None
    box_loss: BoxLoss
    add_images: bool


class DetectorOptions(TypedDict, total=False):
    """These arguments of `FCOS` can be given to `create_detector`, beside the number of classes."""

    add_images: bool
    backbone: str
    box_loss: BoxLoss
    center_radius: float | None
    centerness_on: CenternessOn
    channels: int
    class_names: Sequence[str] | None
    distance: Distance
    frozen_norm: bool
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    max_size: int
    min_size: int
    num_convs: int
    plus_one: bool
    prior: float
    thresholds: Mapping[str, float] | None


class DetectorConfig(TypedDict):
    """The configuration of a detector holds the value of every argument of `FCOS`, as `config.json` does."""

    backbone: str
    num_classes: int
    class_names: list[str] | None
    channels: int
    num_convs: int
    distance: Distance
    centerness_on: CenternessOn
    frozen_norm: bool
    prior: float
    image_mean: list[float]
    image_std: list[float]
    min_size: int
    max_size: int
    thresholds: dict[str, float] | None
    plus_one: bool
    center_radius: float | None
    box_loss: BoxLoss
    add_images: bool


class Thresholds(NamedTuple):
    """These numbers decide which predictions become detections (arXiv 1904.01355, section 4)."""

    score_threshold: float | Tensor = 0.0
    """A detection is returned if its score is at least this: one number, or a tensor [K] of one for each class."""
    candidate_threshold: float = 0.05
    """A class at a location is a candidate if its probability, without centerness, is higher."""
    nms_threshold: float = 0.6
    """A box is dropped if its IoU with a better box of its class is higher."""
    topk: int = 1000
    """Candidates kept per level and image, the best by class probability times centerness."""
    max_detections: int = 100
    """Detections kept per image."""
