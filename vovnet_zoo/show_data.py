"""`show_data` draws the images of a dataset as a training sees them, with their boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from .arguments import check_kind
from .data import CocoDataset, Skipped
from .draw import draw_detections

CELL = 480  # pixels; no picture on the sheet is wider or higher
GAP = 8
SOFTWARE = "vovnet-zoo show-data"  # a sheet says so of itself, and nothing else is written over


def show_data(dataset: CocoDataset, keys: Iterable, out: Path) -> int:
    """Draw samples of a dataset, as its transforms make them, into one PNG, in rows from left to right.

    Args:
        dataset: with the transforms of a training, see `augment_training`.
        keys: of the samples, such as a `TrainSampler` gives.
        out: the PNG; an earlier sheet is replaced, and its folder is made.

    Returns:
        How many samples were drawn; an image that the dataset skips is none.

    Raises:
        ValueError: an image cannot be used, there is nothing to draw, or `out` is another file.
    """
    check_kind("dataset", dataset, CocoDataset, "a CocoDataset")
    out = Path(out)
    check_sheet(out)
    pictures = []
    for sample in map(dataset.__getitem__, keys):
        if isinstance(sample, Skipped):
            continue
        image, target = sample
        truth = {name: target[name].as_subclass(Tensor) for name in ("boxes", "labels")}
        picture = draw_detections(image.as_subclass(Tensor), truth, dataset.class_names)
        picture.thumbnail((CELL, CELL))
        pictures.append(picture)
    if not pictures:
        raise ValueError(f"{dataset.annotation_file}: there is no sample to draw")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    make_sheet(pictures).save(out, pnginfo=about)
    return len(pictures)


def check_sheet(out: Path) -> None:
    """Raise `ValueError` where a name does not end with .png, or a file is there that show-data did not write."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: give a name that ends with .png")
    if out.exists() and not is_sheet(out):
        raise ValueError(f"{out} is there already, and no picture of show-data; choose another file")


def make_sheet(pictures: list[Image.Image]) -> Image.Image:
    """Lay pictures on a white sheet with about as many columns as rows."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = (max(picture.size[axis] for picture in pictures) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width - GAP, math.ceil(len(pictures) / columns) * height - GAP), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet


def is_sheet(path: Path) -> bool:
    """Tell whether a file is a picture of `show_data`."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False
