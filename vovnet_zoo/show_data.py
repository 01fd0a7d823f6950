"""`show_data` draws the images of a dataset as a training sees them, with their boxes."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from .arguments import check_kind, check_number
from .config import Augmentation
from .data import CocoDataset, Skipped, Source, TrainSampler, augment_training
from .draw import draw_detections

CELL = 480  # pixels; no picture on the sheet is wider or higher
GAP = 8
SOFTWARE = "vovnet-zoo show-data"  # a sheet says so of itself, and nothing else is written over


def show_data(
    images_dir: Path, source: Source, out: Path, augmentation: Augmentation, *, count: int = 16, seed: int = 0
) -> CocoDataset:
    """Draw the first `count` samples of a training into one PNG, in rows from left to right.

    Args:
        images_dir, source: of the training images, as `find_split` returns them.
        out: the PNG; an earlier sheet is replaced, and its folder is made.
        augmentation: sizes, probabilities and strengths; `AUGMENTATIONS` holds those of the presets.
        count: samples, 1 to 1000.
        seed: of the order of the images and of the augmentation, as in a training.

    Returns:
        The dataset.

    Raises:
        ValueError: the annotations or an image cannot be used, a number is out of range, or `out` is another file.
    """
    check_number("count", count, 1, 1000, whole=True)
    check_number("seed", seed, 0, 2**63 - 1, whole=True)
    check_kind("augmentation", augmentation, Augmentation, "an Augmentation")
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: give a name that ends with .png")
    if out.exists() and not is_sheet(out):
        raise ValueError(f"{out} is there already, and no picture of show-data; choose another file")
    dataset = CocoDataset(images_dir, source)
    augment_training(dataset, augmentation)
    pictures = []
    for (key,) in TrainSampler(dataset.aspect_ratios.tolist(), 1, num_steps=count, seed=seed):
        sample = dataset[key]
        assert not isinstance(sample, Skipped)  # an image that cannot be used raises an error here
        image, target = sample
        truth = {name: target[name].as_subclass(Tensor) for name in ("boxes", "labels")}
        picture = draw_detections(image.as_subclass(Tensor), truth, dataset.class_names)
        picture.thumbnail((CELL, CELL))
        pictures.append(picture)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    make_sheet(pictures).save(out, pnginfo=about)
    return dataset


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
