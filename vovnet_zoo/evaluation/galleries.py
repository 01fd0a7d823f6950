"""These functions choose the images of a report: worst misses and false detections, probable label errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..data import ImageError
from .analysis import Analysis
from .matches import Matches
from .thresholds import is_kept, mistakes

MOST = 18  # figures of a gallery
SIDES = (640, 480, 360, 256, 160, 96, 48)  # pixels of a photo's longer side, the first that fits its share of the page


class Box(NamedTuple):
    """A box on a figure, xywh in pixels of the image."""

    x: float
    y: float
    width: float
    height: float
    kind: str  # "true" for an annotation, "det" for a detection
    text: str
    is_subject: bool  # the figure is about this box


class Figure(NamedTuple):
    """A figure shows an image with its boxes; `labels` are the classes of the boxes that it is about."""

    image: int  # position in `Matches.images`
    file_name: str
    width: float
    height: float
    view: tuple[float, float, float, float]  # xywh of the part that the small picture shows
    boxes: list[Box]
    labels: list[int]
    caption: str


class Photo(NamedTuple):
    """An image's size in pixels, and a smaller copy of it as a JPEG in base64."""

    width: int
    height: int
    jpeg: str


class Gallery(NamedTuple):
    """A gallery has a title, a sentence that says how its figures were chosen, and figures."""

    title: str
    about: str
    figures: list[Figure]


def galleries(analysis: Analysis) -> list[Gallery]:
    """Choose the figures of the three galleries, the worst first, at most 18 of each."""
    matches = analysis.matches
    names, kept = matches.class_names, is_kept(matches, analysis.thresholds)
    missed, false = mistakes(matches, kept)
    missed = missed[np.argsort(-matches.true_box[missed, 2:].prod(axis=1), kind="stable")][:MOST]
    false = false[np.argsort(-matches.det_score[false], kind="stable")][:MOST]
    suspects = []
    for error in analysis.label_errors[:MOST]:
        what = f"{error.kind}, suspicion {error.suspicion:.2f}"
        if error.true is not None:
            what += f", labelled {names[matches.true_label[error.true]]}"
        if error.det is not None:
            what += f", detected {names[matches.det_label[error.det]]}"
        true, det = ([] if i is None else [i] for i in (error.true, error.det))
        suspects.append(make_figure(matches, kept, error.image, true, det, what))
    return [
        Gallery(
            "Worst misses",
            "Objects that no detection above its class's threshold found, the largest first.",
            [
                make_figure(matches, kept, int(matches.true_image[i]), [i], [], names[matches.true_label[i]])
                for i in missed
            ],
        ),
        Gallery(
            "Worst false detections",
            "Detections without an object of their class at an IoU of 0.5, the highest score first.",
            [
                make_figure(
                    matches,
                    kept,
                    int(matches.det_image[i]),
                    [],
                    [i],
                    f"{names[matches.det_label[i]]} {matches.det_score[i]:.2f}",
                )
                for i in false
            ],
        ),
        Gallery(
            "Probable label errors",
            "Detections without an annotation, annotations of another class than the detection, and annotations at "
            "which nothing was detected, the most suspicious of each kind first.",
            suspects,
        ),
    ]


def make_figure(
    matches: Matches,
    kept: np.ndarray,
    image: int,
    true: Collection[int],
    det: Collection[int],
    caption: str,
    *,
    whole: bool = False,
) -> Figure:
    """Make the figure of an image, about some of its objects and detections, with the other boxes around them.

    Args:
        kept: bool [D], detections that are drawn; those that the figure is about are drawn too.
        image: position in `Matches.images`.
        true: positions of objects.
        det: positions of detections.
        whole: the small picture shows the whole image, and otherwise the place of these objects and detections.
    """
    entry, names = matches.images[image], matches.class_names
    boxes = [
        _box(matches.true_box[i], "true", names[matches.true_label[i]], i in true)
        for i in np.flatnonzero(matches.true_image == image)
    ]
    boxes += [
        _box(matches.det_box[i], "det", f"{names[matches.det_label[i]]} {matches.det_score[i]:.2f}", i in det)
        for i in np.flatnonzero(matches.det_image == image)
        if kept[i] or i in det
    ]
    labels = {int(matches.true_label[i]) for i in true} | {int(matches.det_label[i]) for i in det}
    right = max((box.x + box.width for box in boxes), default=1)
    below = max((box.y + box.height for box in boxes), default=1)
    width, height = float(entry.get("width") or right), float(entry.get("height") or below)
    subjects = [Box(0, 0, width, height, "", "", True)] if whole else [box for box in boxes if box.is_subject]
    view = _view(subjects, width, height)
    return Figure(image, str(entry["file_name"]), width, height, view, boxes, sorted(labels), caption)


def photos(chosen: list[Gallery], read: Callable[[str], Tensor], limit: int) -> dict[int, Photo]:
    """Read the images of galleries as small JPEGs, by their position; an image that cannot be read is left out.

    Args:
        read: gives the pixels, uint8 [3,H,W], of an image's file name, as `CocoDataset.read_image` does.
        limit: bytes of all together, at most.
    """
    wanted = {figure.image: figure.file_name for gallery in chosen for figure in gallery.figures}
    found = {}
    for image, file_name in wanted.items():
        try:
            pixels = read(file_name)  # uint8 [3,H,W]
        except ImageError:
            continue
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for side in SIDES:
            small = picture.copy()
            small.thumbnail((side, side))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=75)
            text = base64.b64encode(buffer.getvalue()).decode()
            if len(text) <= limit / len(wanted):
                found[image] = Photo(*picture.size, text)
                break
    return found


def _box(xywh: np.ndarray, kind: str, text: str, is_subject: bool) -> Box:
    x, y, width, height = xywh.tolist()
    return Box(x, y, width, height, kind, text, is_subject)


def _view(boxes: list[Box], width: float, height: float) -> tuple[float, float, float, float]:
    """Choose a square around boxes, xywh, 2.5 times as large, and inside the image where that is possible."""
    x0, y0 = min(box.x for box in boxes), min(box.y for box in boxes)
    x1, y1 = max(box.x + box.width for box in boxes), max(box.y + box.height for box in boxes)
    side = min(max(2.5 * max(x1 - x0, y1 - y0), 0.3 * max(width, height)), max(width, height))
    x, y = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    x = min(max(x, 0), width - side) if side <= width else (width - side) / 2
    y = min(max(y, 0), height - side) if side <= height else (height - side) / 2
    return x, y, side, side
