"""YOLO: a text file for each image, with a class and a box as fractions of the image on each line."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # timm needs it too

from ...files import read_bytes
from ..annotations import Annotations
from .coco import coco_content
from .places import Split, folders_below, images_below, split_word


def find_yolo(root: Path) -> dict[str, list[Split]]:
    """Find the splits of a YOLO dataset: those that data.yaml names, or folders `images` and `labels` side by side.

    Raises:
        ValueError: data.yaml cannot be read, or names folders that are not there; or no file names the classes.
    """
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        about = _read_yaml(path)
        if isinstance(about, dict) and "names" in about and {"train", "val", "valid", "test"} & about.keys():
            return _listed(path, about, root)
    return _side_by_side(root)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_bytes(path, "YAML file"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from error


def _listed(path: Path, about: dict, root: Path) -> dict[str, list[Split]]:
    names = about["names"]
    names = [names[key] for key in sorted(names)] if isinstance(names, dict) else names
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'names' must be a list of the classes' names, not {names!r:.100}")
    bases = [path.parent, path.parent / str(about.get("path") or "."), path.parent.parent]
    found: dict[str, list[Split]] = {}
    missing = []
    for word, keys in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        places = next((about[key] for key in keys if about.get(key)), None)
        if places is None:
            continue
        images = [
            image for place in ([places] if isinstance(places, str) else places) for image in _images(str(place), bases)
        ]
        if images:
            labels = (
                f"{path.name} and {'labels/' if _label_file(images[0]).parent != images[0].parent else 'text files'}"
            )
            keypoints = "kpt_shape" in about
            found[word] = [_split(path, images, [str(x) for x in names], f"{labels}: this is YOLO", root, keypoints)]
        else:
            missing.append(f"{word}: {places}")
    if missing and not found:
        raise ValueError(f"{path}: no images where it says ({'; '.join(missing)}); correct its 'path', or its folders")
    return found


def _images(place: str, bases: Sequence[Path]) -> list[Path]:
    """List the images of a folder, or of a text file with a path on each line, as data.yaml names it.

    Roboflow writes "../train/images" for "train/images".
    """
    options = [base / name for name in (place, re.sub(r"^(\.\./)+", "", place)) for base in bases]
    for option in options:
        if option.is_dir() and (images := images_below(option)):
            return images
        if option.is_file():
            lines = [line.strip() for line in read_bytes(option, "list of images").decode().splitlines()]
            paths = [
                next((b / x for b in (option.parent, *bases) if os.path.isfile(b / x)), option.parent / x)
                for x in lines
                if x
            ]
            return paths
    return []


def _side_by_side(root: Path) -> dict[str, list[Split]]:
    found: dict[str, list[Split]] = {}
    for labels in (path for path in [root, *folders_below(root, 2)] if path.name.lower() == "labels"):
        beside = labels.with_name("images")
        if not beside.is_dir() or next(labels.rglob("*.txt"), None) is None:
            continue
        inner = {
            split_word(path.name): path for path in sorted(beside.iterdir()) if path.is_dir() and split_word(path.name)
        }
        for word, folder in (
            inner or {split_word(labels.parent.name) if labels.parent != root else "": beside}
        ).items():
            if images := images_below(folder):
                names = _class_names(labels, root)
                how = f"{labels.relative_to(root)}/ beside images/: this is YOLO"
                found.setdefault(word, []).append(_split(labels, images, names, how, root))
    return found


def _class_names(labels: Path, root: Path) -> list[str]:
    for folder in dict.fromkeys([labels.parent, labels, root]):
        for name in ("classes.txt", "obj.names", "labels.txt"):
            if (path := folder / name).is_file():
                lines = read_bytes(path, "list of classes").decode().splitlines()
                return [line.strip() for line in lines if line.strip()]
    raise ValueError(
        f"{root}: this is YOLO, but no file names the classes; write data.yaml, or {root / 'classes.txt'} with the "
        "name of class 0 on the first line, and so on"
    )


def _split(file: Path, images: list[Path], names: list[str], how: str, root: Path, keypoints: bool = False) -> Split:
    """Make a split of images, with `file_name`s relative to the dataset's folder, or to the folder of all of them."""
    paths = [os.path.abspath(image) for image in images]
    folder = os.path.commonpath([os.path.abspath(root), *paths])
    relative = sorted(dict.fromkeys(os.path.relpath(path, folder).replace(os.sep, "/") for path in paths))
    shown = Path(folder) if folder != os.path.abspath(root) else root
    read = functools.partial(read_yolo, shown, tuple(relative), tuple(names), keypoints)
    return Split(shown, Annotations(file, read), how)


def read_yolo(folder: Path, images: Sequence[str], names: Sequence[str], keypoints: bool = False) -> dict:
    """Read the label files of images as the content of a COCO JSON file.

    A line is `class cx cy width height`, as fractions of the image, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon, whose
    box is taken; with `keypoints`, what follows the box is left out. An image without a label file, or with an empty
    one, has no objects. A line that is neither has no usable box, and counts among the dataset's problems.
    """
    return coco_content(folder, images, names, lambda name, size: _read_labels(folder / name, size, keypoints))


def _read_labels(image: Path, size: tuple[int, int], keypoints: bool) -> list[dict]:
    height, width = size
    try:
        text = _label_file(image).read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{_label_file(image)}: cannot read the labels: {error}") from error
    rows = []
    for line in text.splitlines():
        if not (cells := line.split()):
            continue
        try:
            label, numbers = float(cells[0]), np.array([float(cell) for cell in cells[1:]])
        except ValueError:
            label, numbers = -1.0, np.array([])
        row: dict = {"category_id": int(label) if label.is_integer() else -1, "bbox": None}
        if len(numbers) == 4 or (keypoints and len(numbers) > 4):
            center, extent = numbers[:2], numbers[2:4]
            row["bbox"] = [*((center - extent / 2) * (width, height)), *(extent * (width, height))]
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            points = numbers.reshape(-1, 2) * (width, height)  # [N, 2] x, y
            row["bbox"] = [*points.min(axis=0), *(points.max(axis=0) - points.min(axis=0))]
        if row["bbox"] is not None:
            row["bbox"] = [float(v) for v in row["bbox"]]
        rows.append(row)
    return rows


def _label_file(image: Path) -> Path:
    """Return the label file of an image: in `labels` instead of the last `images` of its path, or beside it."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].lower() == "images":
            path = Path(*parts[:i], "labels", *parts[i + 1 :]).with_suffix(".txt")
            return path if path.parent.is_dir() else image.with_suffix(".txt")
    return image.with_suffix(".txt")
