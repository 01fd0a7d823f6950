"""`near_rows` finds images that look the same: re-encoded, scaled, brighter, noisy, slightly cropped or mirrored.

The difference hash (dHash) is ten lines, so that no package is needed for it: each bit says whether a cell of a grey
thumbnail is brighter than the cell at its left. A second look compares the thumbnails themselves, since images without
structure have equal bits. Of the 76,000 pairs of different photos in 128 + 128 of COCO and 292 of BCCD, none is as
near as `BITS` asks, and copies are at least that near; see tests/test_data_near.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

ROWS, COLUMNS = 16, 17
BITS = 0.775  # this share of the bits must be equal
CORRELATION = 0.8  # of the thumbnails, without their means
BLOCK = 512


def thumbnail(image: Tensor) -> np.ndarray:
    """Average a uint8 image [3, H, W] to a grey thumbnail, float32 [16, 17]."""
    grey = image.float().mean(dim=0, keepdim=True)  # [1, H, W]
    return torch.nn.functional.adaptive_avg_pool2d(grey, (ROWS, COLUMNS))[0].numpy()


def near_rows(thumbnails: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield for each image that has any the later images that look the same or mirrored: i and int64 [M], ascending.

    The frames of a fixed camera all look the same, so that all pairs at once would not fit into memory.

    Args:
        thumbnails: float32 [N, 16, 17], see `thumbnail`.
    """
    bits, cells = _bits(thumbnails), _cells(thumbnails)  # [N, 256], [N, 272]
    views = [(_bits(turned), _cells(turned)) for turned in (thumbnails, thumbnails[:, :, ::-1])]
    for start in range(0, len(bits), BLOCK):
        block = slice(start, start + BLOCK)
        near = np.zeros((len(bits[block]), len(bits) - start), dtype=bool)
        for other_bits, other_cells in views:
            share = (1 + bits[block] @ other_bits[start:].T / bits.shape[1]) / 2  # [BLOCK, N - start]
            alike = np.triu(share >= BITS, 1)
            if alike.any():
                near |= alike & (cells[block] @ other_cells[start:].T >= CORRELATION)
        for i in np.flatnonzero(near.any(axis=1)):
            yield start + int(i), np.flatnonzero(near[i]) + start


def joining_pairs(rows: Iterable[tuple[int, np.ndarray]], count: int) -> Iterator[tuple[int, int]]:
    """Yield, of the pairs in `near_rows`, as many as join the same groups of 0 .. count-1: fewer than `count`."""
    group = np.arange(count)  # the group of an item is called after one of its items
    for i, later in rows:
        for other in np.unique(group[later]):
            if other != group[i]:
                yield i, int(other)
                group[group == other] = group[i]


def _bits(thumbnails: np.ndarray) -> np.ndarray:
    """Compute the difference hashes as float32 [N, 256] of -1 and 1, whose products count equal bits."""
    return np.where(np.diff(thumbnails, axis=2) > 0, np.float32(1), np.float32(-1)).reshape(-1, ROWS * (COLUMNS - 1))


def _cells(thumbnails: np.ndarray) -> np.ndarray:
    """Take the mean from each thumbnail, and divide it by its norm: [N, 272]; one of a single grey becomes zero."""
    rows = thumbnails.reshape(-1, ROWS * COLUMNS)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > ROWS, rows / np.maximum(norms, 1), 0)  # about one grey level


def groups_of(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Divide 0 .. count-1 into groups so that the two of each pair are in one group; groups and items ascend."""
    group = list(range(count))
    for i, j in pairs:
        while group[i] != i:
            i = group[i]
        while group[j] != j:
            j = group[j]
        group[max(i, j)] = min(i, j)
    found: dict[int, list[int]] = {}
    for item in range(count):
        first = item
        while group[first] != first:
            first = group[first]
        found.setdefault(first, []).append(item)
    return list(found.values())


def same_pairs(keys: Sequence[Hashable]) -> list[tuple[int, int]]:
    """List the pairs (first, later) of items with equal keys; items whose key is None are equal to none."""
    first: dict[Hashable, int] = {}
    return [(first[key], i) for i, key in enumerate(keys) if key is not None and first.setdefault(key, i) != i]
