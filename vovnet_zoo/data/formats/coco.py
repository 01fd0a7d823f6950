"""`coco_content` writes the objects of images down as a COCO JSON file would have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..annotations import NUMBERS
from ..images import FORMATS, turned_size

WAIT = 3  # seconds without a word; 100,000 images take about half a minute
UNKNOWN = (1, 1)  # the size of an image that cannot be read; whoever reads it is told so


def coco_content(
    folder: Path,
    images: Sequence[str],
    names: Sequence[str],
    objects_of: Callable[[str, tuple[int, int]], list[dict]],
    size_of: Callable[[str], tuple[int, int]] | None = None,
) -> dict:
    """Make the content of a COCO JSON file. Ids of images begin with 1, ids of categories with 0.

    Every box gets the `area` that pycocotools asks for. Since it follows from the box, "derived" names it, and
    `digest_of_content` leaves it out.

    Args:
        images: paths of the images from `folder`, in the order of their ids.
        names: the classes.
        objects_of: gives the objects of an image of a (height, width) as dicts of `category_id`, `bbox` and more.
        size_of: gives the (height, width) of an image; default: its file is asked.
    """

    def read(name: str) -> tuple[tuple[int, int], list[dict]]:
        size = size_of(name) if size_of else image_size(folder / name)
        return size, objects_of(name, size)

    with ThreadPoolExecutor(8) as pool:
        told = tqdm(
            pool.map(read, images),
            desc="read annotations",
            total=len(images),
            unit="image",
            delay=WAIT,
            leave=False,
            disable=None,
        )
        found = list(told)
    rows: list[dict] = []
    for image_id, (_, objects) in enumerate(found, start=1):
        rows += [
            {"id": len(rows) + i, "image_id": image_id, "iscrowd": 0, **o, **_area(o.get("bbox"))}
            for i, o in enumerate(objects, start=1)
        ]
    entries = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, ((height, width), _)) in enumerate(zip(images, found, strict=True), start=1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return {"images": entries, "annotations": rows, "categories": categories, "derived": ["area"]}


def _area(box: Any) -> dict[str, float]:
    """Return the area of a box [left, top, width, height]; nothing where it is not four finite numbers."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in NUMBERS and math.isfinite(v) for v in box):
        return {}
    return {"area": box[2] * box[3]}


def image_size(path: Path) -> tuple[int, int]:
    """Read the (height, width) of an image, as its EXIF orientation turns it, from the header of its file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            height, width = turned_size(image)
            return height, width
    except Exception:  # on hostile bytes the decoders raise anything; the reader of the pixels says what is wrong
        return UNKNOWN


def lacks_size(image: dict) -> bool:
    """Tell whether a JSON image has neither width nor height, as some tools leave them out."""
    return image.get("width") is None and image.get("height") is None


def with_sizes(coco: dict, folder: Path) -> dict:
    """Give the images of a COCO JSON that lack a size the size of their files in `folder`."""

    def sized(image: Any) -> Any:
        if not isinstance(image, dict) or not lacks_size(image) or not isinstance(image.get("file_name"), str):
            return image
        height, width = image_size(folder / image["file_name"])
        return image | {"width": width, "height": height}

    with ThreadPoolExecutor(8) as pool:
        return coco | {"images": list(pool.map(sized, coco["images"]))}
