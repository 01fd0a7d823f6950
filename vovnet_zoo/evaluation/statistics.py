"""`dataset_statistics` counts what a dataset consists of: boxes of each class, their sizes and places."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data import CocoDataset

GRID = 12  # cells of the map of places, each way


class Statistics(NamedTuple):
    """A dataset with K classes consists of these boxes; crowd regions and unusable annotations are left out."""

    images: int
    empty: int  # images without a box
    class_names: list[str]  # K
    boxes: list[int]  # [K]
    images_of_class: list[int]  # [K]
    sizes: list[int]  # [3], boxes below 32^2, between, and above 96^2 square pixels
    places: np.ndarray  # int [GRID,GRID], boxes whose centre lies in a cell of the image, row by row


def dataset_statistics(dataset: CocoDataset) -> Statistics:
    """Count the boxes of a dataset; no image is read."""
    owners, label, boxes = dataset.all_boxes()
    boxes = boxes + np.array([0, 0, 1, 1], boxes.dtype) * dataset.plus_one  # from edge to edge
    count = len(dataset.class_names)
    width_height = dataset.sizes[owners][:, ::-1]  # [A,2]
    cell = ((boxes[:, :2] + boxes[:, 2:]) / 2 / width_height * GRID).astype(int).clip(0, GRID - 1)
    pairs = np.unique(np.stack([owners, label], axis=1), axis=0)  # each image and class once
    sides = boxes[:, 2:] - boxes[:, :2]
    size = np.searchsorted([32**2, 96**2], sides.prod(axis=1), side="right")
    return Statistics(
        images=len(dataset),
        empty=len(dataset) - len(np.unique(owners)),
        class_names=list(dataset.class_names),
        boxes=np.bincount(label, minlength=count).tolist(),
        images_of_class=np.bincount(pairs[:, 1], minlength=count).tolist(),
        sizes=np.bincount(size, minlength=3).tolist(),
        places=np.bincount(cell[:, 1] * GRID + cell[:, 0], minlength=GRID * GRID).reshape(GRID, GRID),
    )
