"""A detector and its training images have these settings, and tables name those that belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

VariantName = Literal["improved", "published", "torchvision"]
Distance = Literal["relu", "exp"]
CenternessOn = Literal["box", "cls"]
BoxLoss = Literal["giou", "iou"]
Matching = Literal["paper", "torchvision"]
Points = Literal["center", "corner"]
Resize = Literal["antialias", "torchvision"]
Mirroring = Literal["none", "flip", "jitter_crop"]
Precision = Literal["float32", "bf16", "fp16"]  # of the network, under autocast
ExportFormat = Literal["onnx", "openvino", "pt2", "executorch"]
ExportPrecision = Literal["float32", "float16", "int8"]  # of the weights in an exported file
Pictures = Literal["jpg", "png", "none"]  # format of the pictures of detections
# The least and the most: side of a window in pixels, part of it that two windows share, scale of a view.
TILES, OVERLAPS, SCALES = (32, 1_000_000), (0, 0.9), (0.1, 10)

# Least and largest whole number; the largest are far beyond use, and keep a damaged file from taking memory.
RANGES = {
    "num_classes": (1, 100_000, "; a detector needs at least one foreground class"),
    "channels": (64, 8192, "; the head's GroupNorm has 32 groups of at least 2 channels"),
    "num_convs": (0, 64, ""),
    "min_size": (1, 65_535, ""),
    "max_size": (1, 65_535, ""),
    "topk": (1, 1_000_000, ""),
    "max_detections": (1, 1_000_000, ""),
}


class Variant(TypedDict):
    """A variant consists of these arguments of `FCOS`; `LossOptions` names the ones that `FCOSLoss` has too."""

    distance: Distance
    centerness_on: CenternessOn
    frozen_norm: NotRequired[bool]
    points: Points
    resize: Resize
    keep_empty: bool
    candidate_threshold: NotRequired[float]
    score_threshold: NotRequired[float]
    plus_one: bool
    center_radius: float | None
    matching: Matching
    box_loss: BoxLoss
    weigh_boxes: bool
    add_images: bool


VARIANTS: dict[VariantName, Variant] = {
    # arXiv 2006.09214
    "improved": dict(
        distance="relu",
        centerness_on="box",
        points="center",
        resize="antialias",
        keep_empty=False,
        plus_one=False,
        center_radius=1.5,
        matching="paper",
        box_loss="giou",
        weigh_boxes=True,
        add_images=False,
    ),
    # the detectors that were published in 2019 (arXiv 1904.01355)
    "published": dict(
        distance="exp",
        centerness_on="cls",
        frozen_norm=True,
        points="center",
        resize="antialias",
        keep_empty=False,
        plus_one=True,
        center_radius=None,
        matching="paper",
        box_loss="iou",
        weigh_boxes=True,
        add_images=True,
    ),
    # torchvision.models.detection.fcos_resnet50_fpn
    "torchvision": dict(
        distance="relu",
        centerness_on="box",
        frozen_norm=True,
        points="corner",
        resize="torchvision",
        keep_empty=True,
        candidate_threshold=0.0,
        score_threshold=0.2,
        plus_one=False,
        center_radius=1.5,
        matching="torchvision",
        box_loss="giou",
        weigh_boxes=False,
        add_images=False,
    ),
}
DEFAULT_VARIANT: VariantName = "improved"
DEFAULTS = VARIANTS[DEFAULT_VARIANT]


class LossOptions(TypedDict, total=False):
    """These arguments of `FCOSLoss` are also in a detector's configuration."""

    plus_one: bool
    center_radius: float | None
    matching: Matching
    box_loss: BoxLoss
    weigh_boxes: bool
    add_images: bool


class DetectorOptions(TypedDict, total=False):
    """These arguments of `FCOS` can be given to `create_detector`, beside the number of classes."""

    add_images: bool
    backbone: str
    box_loss: BoxLoss
    candidate_threshold: float
    category_ids: Sequence[int] | None
    center_radius: float | None
    centerness_on: CenternessOn
    channels: int
    class_names: Sequence[str] | None
    distance: Distance
    frozen_norm: bool
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    keep_empty: bool
    matching: Matching
    max_detections: int
    max_size: int
    min_size: int
    nms_threshold: float
    num_convs: int
    plus_one: bool
    points: Points
    prior: float
    resize: Resize
    score_threshold: float
    thresholds: Mapping[str, float] | None
    topk: int
    weigh_boxes: bool


class DetectorConfig(TypedDict):
    """The configuration of a detector holds the value of every argument of `FCOS`, as `config.json` does."""

    backbone: str
    num_classes: int
    class_names: list[str] | None
    category_ids: list[int] | None
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
    resize: Resize
    points: Points
    plus_one: bool
    keep_empty: bool
    candidate_threshold: float
    score_threshold: float
    nms_threshold: float
    topk: int
    max_detections: int
    center_radius: float | None
    matching: Matching
    box_loss: BoxLoss
    weigh_boxes: bool
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


THRESHOLDS = Thresholds()


class ThresholdOptions(TypedDict, total=False):
    """These options of `predict`, `postprocess` and `compile_detector` are the fields of `Thresholds`.

    `predict` and `compile_detector` know the model, so there `score_threshold` can also map class names to numbers.
    """

    score_threshold: float | Mapping[str, float] | Tensor
    candidate_threshold: float
    nms_threshold: float
    topk: int
    max_detections: int


@dataclass(frozen=True)
class Augmentation:
    """Training images are resized and augmented so. Sizes are in pixels."""

    min_size: tuple[int, int] = (640, 800)
    """Range of the shorter side."""
    max_size: int = 1333
    """Limit of the longer side."""
    augment: Mirroring = "flip"
    """Augmentation in training: none, mirroring, or mirroring with zooming and cropping."""
    zoom: tuple[float, float] = (0.5, 2.0)
    """Range of the zoom of jitter_crop."""
    copy_paste: float = 0.0
    """Probability that an image gets objects of another image; each class is as likely to be pasted."""
    mosaic: float = 0.0
    """Probability that an image becomes a mosaic, in which four images meet at a random point."""
    mixup: float = 0.0
    """Probability that an image is blended with another, about half and half."""
    color: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    blur: float = 0.0
    """Probability of a slight blur."""
    jpeg: float = 0.0
    """Probability of a JPEG compression, of a quality of 30 to 90."""
