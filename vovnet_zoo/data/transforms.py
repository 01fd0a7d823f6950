"""These transforms resize and augment images together with their boxes.

Each transform takes and returns `(image, target)`, as samples of `CocoDataset` are.
"""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..arguments import check_number
from ..config import Resize
from .boxes import are_visible


def train_transforms(
    min_size: tuple[int, int] = (640, 800),
    max_size: int = 1333,
    augment: str = "flip",
    *,
    flip: float = 0.5,
    scale: tuple[float, float] = (0.5, 2.0),
    color: float = 0.0,
    plus_one: bool = False,
    resize: Resize = "antialias",
) -> v2.Compose:
    """Make the augmentation for training; afterwards each box is inside the image and at least one pixel wide and high.

    Args:
        min_size: range (inclusive) of the shorter side in pixels, drawn per image.
        max_size: limit of the longer side in pixels.
        augment: "none" resizes; "flip" also mirrors; "jitter_crop" also zooms and crops, see `RandomScaleCrop`.
        flip: probability that an image is mirrored.
        scale: range of the zoom of "jitter_crop".
        color: largest relative change of brightness, contrast and saturation, 0 for none.
        plus_one: mirror in the published convention and, like the published code, neither clip nor drop boxes; not
            for "jitter_crop".
        resize: how images are resized, see `resize_image` and `resize_size`.

    Raises:
        ValueError: `augment` is unknown, or a range is empty or not positive.
    """
    if augment not in ("none", "flip", "jitter_crop"):
        raise ValueError(f"augment is one of 'none', 'flip', 'jitter_crop', not {augment!r}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip!r}: give a probability from 0 to 1")
    if plus_one and augment == "jitter_crop":
        raise ValueError("plus_one goes with augment 'none' or 'flip': the published models know no 'jitter_crop'")
    steps = []
    if augment == "jitter_crop":
        steps.append(RandomScaleCrop(min_size, max_size, scale, resize))
    else:
        steps.append(RandomShortestSide(min_size, max_size, resize))
    if augment != "none":
        steps.append(_RandomPlusOneFlip(flip) if plus_one else v2.RandomHorizontalFlip(flip))
    steps += photometric(color)
    if not plus_one:
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose(steps)


def photometric(color: float = 0.0, blur: float = 0.0, jpeg: float = 0.0) -> list[v2.Transform]:
    """List the transforms that change colours and sharpness, and no box; none for 0.

    Args:
        color: largest relative change of brightness, contrast and saturation.
        blur: probability of a Gaussian blur of 0.3 to 1.5 pixels.
        jpeg: probability of a compression to a JPEG quality of 30 to 90.

    Raises:
        ValueError: a number is not from 0 to 1.
    """
    for name, value in (("color", color), ("blur", blur), ("jpeg", jpeg)):
        check_number(name, value, 0, 1)
    steps: list[v2.Transform] = []
    if color:
        steps.append(v2.ColorJitter(brightness=color, contrast=color, saturation=color))
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size=7, sigma=(0.3, 1.5))], p=blur))
    if jpeg:
        steps.append(v2.RandomApply([v2.JPEG(quality=(30, 90))], p=jpeg))
    return steps


def eval_transforms(min_size: int = 800, max_size: int = 1333) -> v2.Compose:
    """Make the transforms for evaluation, which resize by the published rule, see `resize_size`."""
    sizes = (_positive("min_size", min_size), min_size)
    return v2.Compose([RandomShortestSide(sizes, max_size), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


class RandomShortestSide(v2.Transform):
    """Resize the shorter side to a size drawn from `min_sizes` (low, high; inclusive), by the rule of `resize_size`."""

    def __init__(self, min_sizes: tuple[int, int], max_size: int, resize: Resize = "antialias"):
        super().__init__()
        self.min_sizes, self.max_size, self.resize = _int_range(min_sizes), _positive("max_size", max_size), resize

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        return {"size": resize_size(height, width, randint(*self.min_sizes), self.max_size, self.resize)}

    def transform(self, inpt: Any, params: dict) -> Any:
        return F.resize(inpt, list(params["size"]), antialias=self.resize == "antialias")


class RandomScaleCrop(v2.Transform):
    """Zoom by a random factor around the size that `RandomShortestSide` gives, and crop to at most that size.

    The factor is log-uniform in the range `scale`. With a factor above 1, a random window is cut out and enlarged; with
    a factor below 1, the whole image becomes smaller. A box that the window cuts is clipped; if less than a quarter of
    its area is left, it becomes empty, so that `ClampBoundingBoxes` and `SanitizeBoundingBoxes` must follow.
    """

    def __init__(
        self, min_sizes: tuple[int, int], max_size: int, scale: tuple[float, float], resize: Resize = "antialias"
    ):
        super().__init__()
        if _pair(scale, Real) is None:
            raise ValueError(f"scale is (low, high) with 0 < low <= high, not {scale}")
        self.min_sizes, self.max_size = _int_range(min_sizes), _positive("max_size", max_size)
        self.scale, self.resize = scale, resize

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        target = resize_size(height, width, randint(*self.min_sizes), self.max_size, self.resize)
        low, high = np.log(self.scale)
        zoom = float(np.exp(low + (high - low) * torch.rand(()).item()))
        window = [max(1, round(side / max(zoom, 1))) for side in (height, width)]
        return {
            "top": randint(0, height - window[0]),
            "left": randint(0, width - window[1]),
            "height": window[0],
            "width": window[1],
            "size": [max(1, round(side * min(zoom, 1))) for side in target],
        }

    def transform(self, inpt: Any, params: dict) -> Any:
        cut = F.resized_crop(inpt, **params, antialias=self.resize == "antialias")
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            x, y = params["left"], params["top"]
            window = (x, y, x + params["width"], y + params["height"])
            visible = are_visible(inpt.as_subclass(Tensor), window)
            return tv_tensors.wrap(cut.as_subclass(Tensor).masked_fill(~visible[:, None], 0), like=cut)
        return cut


class _RandomPlusOneFlip(v2.RandomHorizontalFlip):
    """Mirror the image, and its boxes in the published convention."""

    def transform(self, inpt: Any, params: dict) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            boxes = hflip_boxes(inpt.as_subclass(Tensor), inpt.canvas_size[1], plus_one=True)
            return tv_tensors.wrap(boxes, like=inpt)
        return super().transform(inpt, params)


def resize_size(height: int, width: int, min_size: int, max_size: int, resize: Resize = "antialias") -> tuple[int, int]:
    """Compute the `(height, width)` in pixels to which an image is resized, both at least 1.

    By the published rule ("antialias"), the shorter side becomes `min_size`. Where the longer side would then exceed
    `max_size`, the shorter side becomes the rounded number for which the longer side is `max_size`. The longer side is
    computed from the shorter one and truncated, so it can exceed `max_size` by up to half the aspect ratio.

    By the rule of torchvision's detectors ("torchvision"), both sides are multiplied by the same factor, and truncated.
    """
    if resize == "torchvision":
        factor = min(min_size / min(height, width), max_size / max(height, width))
        return max(1, math.floor(height * factor)), max(1, math.floor(width * factor))
    short, long = sorted((height, width))
    size = min_size
    if long / short * size > max_size:
        size = round(max_size * short / long)
    if size == 0:  # the rule gives 0 for an aspect ratio above 2 * max_size
        size, other = 1, max_size
    else:
        other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def resize_image(image: Tensor, size: tuple[int, int], resize: Resize = "antialias") -> Tensor:
    """Resize an image, uint8 [3,H,W], to `size` (height, width), bilinearly.

    "antialias" averages over all pixels that a new pixel covers, as Pillow does, and gives uint8. "torchvision" does as
    torchvision's detectors do: it weighs the four nearest pixels, and gives float32 in 0..255, not rounded.
    """
    if resize == "antialias":
        return F.resize(image, list(size), antialias=True)
    return F.resize(image.float(), list(size), antialias=False)


def hflip_boxes(boxes: Tensor, width: int, plus_one: bool = False) -> Tensor:
    """Mirror xyxy boxes [..., 4] in an image of `width` pixels; with `plus_one` (published) `x1' = width - x2 - 1`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    one = int(plus_one)
    return torch.stack([width - x2 - one, y1, width - x1 - one, y2], dim=-1)


def randint(low: int, high: int) -> int:
    """Draw a whole number uniformly, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _pair(value: Any, kind: type) -> tuple[Any, Any] | None:
    """Return `value` as (low, high), two numbers of a kind with 0 < low <= high; None if it is something else."""
    try:
        low, high = value
        right = 0 < low <= high and isinstance(low, kind) and isinstance(high, kind)
    except (TypeError, ValueError):  # no two values
        return None
    return (low, high) if right else None


def _int_range(sizes: tuple[int, int]) -> tuple[int, int]:
    if (pair := _pair(sizes, Integral)) is None:
        wanted = "a range (low, high) of whole numbers with 0 < low <= high, such as (640, 800)"
        raise ValueError(f"the shorter side is {wanted}, not {sizes}")
    return pair


def _positive(name: str, size: int) -> int:
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f"{name}={size!r}: give a whole number of 1 or more")
    return size
