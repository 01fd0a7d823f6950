"""Pascal VOC: an XML file for each image, with the corners of each object's box in pixels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..annotations import Annotations
from .coco import coco_content
from .places import Split, common_end, folders_below, images_below, is_image, is_of_macos, split_word, text_lines

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find_voc(root: Path) -> dict[str, list[Split]]:
    """Find the splits of a Pascal VOC dataset: those of ImageSets/Main, or folders of images and XML files.

    Raises:
        ValueError: an XML file cannot be read.
    """
    near = [path for folder in (root, *folders_below(root, 3)) for path in sorted(folder.iterdir())]
    files = [path for path in near if path.suffix.lower() == ".xml" and not is_of_macos(path) and _is_voc(path)]
    if not files:
        return {}
    pairs = pair(files, images_below(root))
    if not pairs:
        example = files[0]
        raise ValueError(f"{example} is Pascal VOC, but there is no image {example.stem}.* below {root}; put it there")
    with ThreadPoolExecutor(8) as pool:
        objects = [x for xs in pool.map(read_objects, pairs) for x in xs]
    names = sorted({x.name for x in objects})
    from_one, counted = count_of(objects)

    groups = _listed(root, files)
    if not groups:
        for xml in files:
            folders = reversed(xml.relative_to(root).parts[:-1])
            groups.setdefault(next((word for name in folders if (word := split_word(name))), ""), []).append(xml)
    first = next(iter(pairs)).relative_to(root)
    how = f"{first}, ...: this is Pascal VOC, with pixels {counted}"
    found = {}
    for word, xmls in groups.items():
        if used := [xml for xml in xmls if xml in pairs]:
            lost = [f"{xml}: there is no image {xml.stem}.* that can be read" for xml in xmls if xml not in pairs]
            split = _split(root, used, pairs, names, from_one, how)
            found[word] = [dataclasses.replace(split, left_out=tuple(lost))]
    return found


def _is_voc(path: Path) -> bool:
    """Tell whether an XML file is, or may have been, one of Pascal VOC: it is empty, or `annotation` is in its head."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return not head.strip() or re.search(rb"<annotation[\s>]", head) is not None


def pair(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path]:
    """Map XML files to the images of their stems. A file whose image is not there is left out.

    Where several folders have images of that stem, the folders decide that have most in common with the folder of the
    XML file, at the beginning and at the end of their paths: images/train/a.jpg belongs to annotations/train/a.xml.
    """
    by_stem: dict[str, list[Path]] = {}
    for image in images:
        by_stem.setdefault(image.stem, []).append(image)
    ranked = [
        (_agreement(xml.parent, image.parent), xml, image)
        for xml in files
        for image in _likely(xml, by_stem.get(xml.stem, []))
    ]
    found: dict[Path, Path] = {}
    taken = set()
    for _, xml, image in sorted(ranked, key=lambda entry: -entry[0]):
        if xml not in found and image not in taken:
            found[xml] = image
            taken.add(image)
    return {xml: found[xml] for xml in files if xml in found}


def _likely(xml: Path, images: list[Path]) -> list[Path]:
    """Take, of many images of a stem, those in a folder of the name of the XML file's folder, if there are any."""
    return [image for image in images if image.parent.name == xml.parent.name] or images if len(images) > 1 else images


def _agreement(a: Path, b: Path) -> int:
    """Count the parts of two folders' paths that agree at the beginning and at the end."""
    if a == b:
        return 2 * len(a.parts)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.parts, b.parts, strict=False)))
    return start + common_end(a.parts, b.parts)


def count_of(objects: Sequence[VocObject]) -> tuple[bool, str]:
    """Tell whether boxes' corners are numbers of pixels that begin with 1, and say why."""
    if any(min(x.corners) < 1 for x in objects):
        return False, "counted from 0, since one of them is below 1"
    if sum(x.decimal for x in objects) * 2 > len(objects):  # as CVAT writes them; a pixel's number is a whole one
        return False, "counted from 0, since they are written with a decimal point"
    return True, "counted from 1, as VOC does"


def _listed(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Read which XML files belong to which split from the lists in ImageSets and ImageSets/Main.

    A list of trainval stands for a list of train, where there is neither this nor a list of val.
    """
    lists = [path for place in ("ImageSets/*.txt", "ImageSets/Main/*.txt") for path in sorted(root.rglob(place))]
    by_word: dict[str, list[Path]] = {}
    for path in lists:
        word = "trainval" if path.stem.lower() == "trainval" else split_word(path.stem, whole=True)
        by_word.setdefault(word, []).append(path)
    whole = by_word.pop("trainval", [])
    if whole and not by_word.keys() & {"train", "val"}:
        by_word["train"] = whole
    groups = {}
    for word, paths in by_word.items():
        if not word:
            continue
        lines = [x for path in paths for x in text_lines(path, "list of images")]
        # "photo", "photo.jpg" or "photo 1"; names may have spaces, and folders before them
        texts = [x for line in lines for x in (line, line.split()[0])]
        entries = {x.removesuffix(Path(x).suffix) if is_image(x) else x for x in texts}
        groups[word] = [xml for xml in files if not entries.isdisjoint(_tails(xml.relative_to(root)))]
        if lines and not groups[word]:
            raise ValueError(f"{paths[0]}: none of its images ({lines[0]}, ...) has an XML file in {root}")
    return groups


def _tails(xml: Path) -> list[str]:
    """List the ways to name an XML file by the last parts of its path, without its ending."""
    parts = xml.with_suffix("").parts
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _split(root: Path, xmls: list[Path], pairs: dict[Path, Path], names: list[str], from_one: bool, how: str) -> Split:
    found = sorted((pairs[xml].relative_to(root).as_posix(), xml.relative_to(root).as_posix()) for xml in xmls)
    read = functools.partial(read_voc, root, tuple(found), tuple(names), from_one)
    place = Path(os.path.commonpath([xml.parent for xml in xmls]))
    return Split(root, Annotations(place, read, describe=functools.partial(describe_object, root, dict(found))), how)


class VocObject(NamedTuple):
    """An object of an XML file."""

    name: str
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax as they are written; NaN where one is missing
    difficult: int
    decimal: bool  # whether a corner is written with a decimal point


def read_objects(path: Path) -> list[VocObject]:
    """Read the objects of an XML file. Raises `ValueError` where the file is no XML; the message names it."""
    try:
        about = os.stat(path)
        return _read_objects(path, about.st_mtime_ns, about.st_size)
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not an XML file ({error}); write it again, or remove it with its image") from error


@functools.lru_cache(maxsize=50_000)  # a dataset is looked through several times
def _read_objects(path: Path, stamp: int, size: int) -> list[VocObject]:
    tree = ElementTree.parse(path).getroot()
    return [
        VocObject(
            (node.findtext("name") or "").strip() or "?",
            tuple(_number(node.findtext(f"bndbox/{key}")) for key in CORNERS),
            int((node.findtext("difficult") or "").strip() == "1"),
            any("." in (node.findtext(f"bndbox/{key}") or "") for key in CORNERS),
        )
        for node in tree.iter("object")
    ]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def describe_object(root: Path, xml_of: dict[str, str], image: str, position: int) -> str:
    """Name the XML file, the number and the content of an image's object."""
    path = root / xml_of[image]
    x = read_objects(path)[position]
    corners = ", ".join(f"{key} {value:g}" for key, value in zip(CORNERS, x.corners, strict=True))
    return f"{path}, object {position + 1}: {x.name}, {corners}"


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
