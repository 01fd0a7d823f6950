"""`fit_sizes` chooses the sizes of training images by the boxes of a dataset: small objects ask for more pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LEAST_SIZE = 320  # pixels of the shorter side: enough for most sets, and trained on a CPU in minutes
MOST_SIZE = {"cpu": 640, "cuda": 800}  # on a CPU, 640 takes four times as long as 320; 800 is the published size
FOUND = 16  # pixels: a box covers two by two locations of the finest map, whose stride is 8


class Sizes(NamedTuple):
    """Images have these sizes, in pixels."""

    test_size: int  # shorter side in evaluation
    min_size: tuple[int, int]  # range of the shorter side in training
    max_size: int  # limit of the longer side


def fit_sizes(
    boxes: np.ndarray,
    image_sizes: np.ndarray,
    device: str,
    *,
    test_size: int | None = None,
    min_size: tuple[int, int] | None = None,
    max_size: int | None = None,
) -> tuple[Sizes, str]:
    """Choose the sizes of images, so that nine of ten boxes are larger than `FOUND` pixels.

    Args:
        boxes: [A,4] xyxy in pixels.
        image_sizes: [A,2] (height, width) of each box's image.
        device: type of the torch device that trains, such as "cpu" or "cuda".
        test_size, min_size, max_size: what is known already, see `Sizes`.

    Returns:
        The sizes, and why `test_size` is so; "" where it was known.
    """
    size, why = test_size, ""
    if size is None:
        size, why = size_for(boxes, image_sizes, MOST_SIZE.get(device, LEAST_SIZE))
        if max_size is not None and size > max_size:
            size, why = max_size, "as --max-size says"
    high = min(size * 11 // 10, max_size or size * 2)
    low, high = min_size or (min(size * 9 // 10, high), high)
    return Sizes(size, (low, high), max_size or max(2 * size, high)), why


def size_for(boxes: np.ndarray, image_sizes: np.ndarray, most: int) -> tuple[int, str]:
    """Return the shorter side for boxes [A,4] xyxy in images of `image_sizes` [A,2], and why it is so."""
    if not len(boxes):
        return LEAST_SIZE, "as no image has a box"
    short, long = np.sort(image_sizes, axis=1).T
    scale = np.minimum(LEAST_SIZE / short, 2 * LEAST_SIZE / long)
    small = float(np.percentile(np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) * scale, 10))
    own = 32 * math.ceil(float(np.median(short)) / 32)  # larger images would not show more
    wanted = 32 * math.ceil(LEAST_SIZE * FOUND / small / 32 - 1e-3)
    size = max(LEAST_SIZE, min(wanted, own, most))
    reason = f"where nine of ten boxes are larger than {small * size / LEAST_SIZE:.0f} px (to be found well, {FOUND})"
    return size, reason + (
        f", in {(size / LEAST_SIZE) ** 2:.1f} times the time of {LEAST_SIZE} px" if size > LEAST_SIZE else ""
    )
