"""Pascal VOC: an XML file for each image, with the corners of each object's box in pixels."""

from __future__ import annotations

import functools
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..annotations import Annotations
from .coco import coco_content
from .places import Split, folders_below, images_below, is_image, split_word, text_lines

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find_voc(root: Path) -> dict[str, list[Split]]:
    """Find the splits of a Pascal VOC dataset: those of ImageSets/Main, or folders of images and XML files.

    Raises:
        ValueError: an XML file cannot be read.
    """
    near = [path for folder in (root, *folders_below(root, 3)) for path in sorted(folder.iterdir())]
    files = [path for path in near if path.suffix.lower() == ".xml" and _is_voc(path)]
    if not files:
        return {}
    images: dict[str, list[Path]] = {}
    for path in images_below(root):
        images.setdefault(path.stem, []).append(path)
    pairs = {path: image for path in files if (image := _image_of(path, images.get(path.stem, [])))}
    if not pairs:
        example = files[0]
        raise ValueError(f"{example} is Pascal VOC, but there is no image {example.stem}.* below {root}; put it there")
    with ThreadPoolExecutor(8) as pool:
        objects = [x for xs in pool.map(read_objects, pairs) for x in xs]
    names = sorted({x.name for x in objects})
    from_one = not any(min(x.corners) < 1 for x in objects)

    groups: dict[str, list[Path]] = {}
    lists = [path for place in ("ImageSets/*.txt", "ImageSets/Main/*.txt") for path in sorted(root.rglob(place))]
    for word, path in {split_word(path.stem, whole=True): path for path in lists}.items():
        if word:
            lines = text_lines(path, "list of images")  # "photo", "photo.jpg" or "photo 1"; names may have spaces
            stems = {
                x.removesuffix(Path(x).suffix) if is_image(x) else x for line in lines for x in (line, line.split()[0])
            }
            groups[word] = [xml for xml in pairs if xml.stem in stems]
            if lines and not groups[word]:
                raise ValueError(f"{path}: none of its images ({lines[0]}, ...) has an XML file in {root}")
    if not groups:
        for xml in pairs:
            folders = reversed(xml.relative_to(root).parts[:-1])
            groups.setdefault(next((word for name in folders if (word := split_word(name))), ""), []).append(xml)
    first = next(iter(pairs)).relative_to(root)
    counted = "counted from 1, as VOC does" if from_one else "counted from 0, since one of them is below 1"
    how = f"{first}, ...: this is Pascal VOC, with pixels {counted}"
    return {word: [_split(root, xmls, pairs, names, from_one, how)] for word, xmls in groups.items() if xmls}


def _is_voc(path: Path) -> bool:
    """Tell whether an XML file is, or may have been, one of Pascal VOC: it is empty, or `annotation` is in its head."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return not head.strip() or b"<annotation" in head


def _image_of(xml: Path, images: list[Path]) -> Path | None:
    """Choose among images of an XML file's stem: beside it, else in a folder of the same parent, else any."""
    for near in (xml.parent, xml.parent.parent):
        for image in images:
            if image.parent == near or image.parent.parent == near:
                return image
    return images[0] if images else None


def _split(root: Path, xmls: list[Path], pairs: dict[Path, Path], names: list[str], from_one: bool, how: str) -> Split:
    found = sorted((pairs[xml].relative_to(root).as_posix(), xml.relative_to(root).as_posix()) for xml in xmls)
    read = functools.partial(read_voc, root, tuple(found), tuple(names), from_one)
    return Split(root, Annotations(Path(os.path.commonpath([xml.parent for xml in xmls])), read), how)


class VocObject(NamedTuple):
    """An object of an XML file."""

    name: str
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax as they are written; NaN where one is missing
    difficult: int


def read_objects(path: Path) -> list[VocObject]:
    """Read the objects of an XML file. Raises `ValueError` where the file is no XML; the message names it."""
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not an XML file ({error}); write it again, or remove it with its image") from error
    return [
        VocObject(
            (node.findtext("name") or "").strip() or "?",
            tuple(_number(node.findtext(f"bndbox/{key}")) for key in CORNERS),
            int((node.findtext("difficult") or "").strip() == "1"),
        )
        for node in tree.iter("object")
    ]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def read_voc(root: Path, files: Sequence[tuple[str, str]], names: Sequence[str], from_one: bool) -> dict:
    """Read XML files as the content of a COCO JSON file.

    Args:
        files: (image, XML file) as paths from `root`.
        names: the classes.
        from_one: corners are numbers of pixels that begin with 1 and belong to the box, as VOC's own are: the box of
            the pixels 1 .. 10 becomes 0 .. 10. Otherwise corners are coordinates that begin with 0.
    """
    xml_of, label_of = dict(files), {name: i for i, name in enumerate(names)}

    def objects(image: str, size: tuple[int, int]) -> list[dict]:
        rows = []
        for x in read_objects(root / xml_of[image]):
            left, top, right, bottom = x.corners
            left, top = left - from_one, top - from_one
            row = {"category_id": label_of.get(x.name, -1), "bbox": [left, top, right - left, bottom - top]}
            rows.append(row | ({"difficult": 1} if x.difficult else {}))
        return rows

    return coco_content(root, [image for image, _ in files], names, objects)
