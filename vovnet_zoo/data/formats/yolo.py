"""YOLO: a text file for each image, with a class and a box as fractions of the image on each line."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # timm needs it too

from ...files import read_bytes
from ..annotations import Annotations
from .coco import coco_content
from .places import (
    Split,
    folders_below,
    images_below,
    is_image,
    is_of_macos,
    numbered_lines,
    path_parts,
    split_word,
    text_lines,
)


def find_yolo(root: Path) -> dict[str, list[Split]]:
    """Find the splits of a YOLO dataset.

    They are those that data.yaml (or darknet's obj.data) names, folders `images` and `labels` side by side, or images
    with text files beside them.

    Raises:
        ValueError: data.yaml cannot be read, or names folders that are not there; or no file names the classes.
    """
    broken: ValueError | None = None
    usable: dict[Path, dict] = {}
    files = [path for ending in DATASET_FILES for path in root.glob(f"*{ending}") if os.path.isfile(path)]
    for path in sorted((path for path in files if not is_of_macos(path)), key=lambda path: (path.stem != "data", path)):
        try:
            about = _read_about(path)
        except ValueError as error:  # it may have nothing to do with the dataset
            broken = broken or error
            continue
        if about is not None:
            usable[path] = about
    if usable:
        path, *others = usable
        names = ", ".join(other.name for other in others)
        several = (f"{path} is taken, and not {names}; to use another, give that file as DATA",) if others else ()
        return _listed(path, usable[path], root, several)
    try:
        found = _side_by_side(root) or _together(root)
    except ValueError as error:
        raise ValueError(f"{error}; {broken}" if broken else str(error)) from error
    if broken and not found:
        raise broken
    return found


DATASET_FILES = (".yaml", ".yml", ".data")


def is_dataset_file(path: Path) -> bool:
    """Tell whether a path is a file that may describe a YOLO dataset: data.yaml, or darknet's obj.data."""
    return path.suffix.lower() in DATASET_FILES and os.path.isfile(path)


def find_yolo_of(path: Path) -> dict[str, list[Split]]:
    """Find the splits of the YOLO dataset that a file describes, see `is_dataset_file`.

    Raises:
        ValueError: the file cannot be read, describes no dataset, or names folders that are not there.
    """
    about = _read_about(path)
    if about is None:
        raise ValueError(f"{path} describes no YOLO dataset: write 'names', and folders of images as 'train', 'val'")
    return _listed(path, about, path.parent)


def _read_about(path: Path) -> dict | None:
    """Read a file that describes a dataset; None where it has no names of classes, or no split."""
    about = _read_darknet(path) if path.suffix.lower() == ".data" else _read_yaml(path)
    return about if isinstance(about, dict) and "names" in about and any(_word(key) for key in about) else None


def _read_yaml(path: Path) -> Any:
    data = read_bytes(path, "YAML file")
    try:
        about = yaml.safe_load(data)
        if isinstance(about, dict) and "names" in about:  # as texts: YAML takes the names no and off for false
            about["names"] = yaml.load(data, yaml.BaseLoader)["names"]
        return about
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no date
        raise ValueError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from error


def _read_darknet(path: Path) -> dict[str, Any]:
    """Read darknet's obj.data, as CVAT writes it: `key = value` lines; `names` is the path of a list of classes."""
    pairs = [line.split("=", 1) for line in text_lines(path, "list of files") if "=" in line]
    about: dict[str, Any] = {key.strip(): value.strip() for key, value in pairs}
    if "names" in about:
        places = _tails(about["names"], [path.parent])
        file = next((place for place in places if place.is_file()), places[0])
        about["names"] = text_lines(file, "list of classes")
    return about


def _listed(path: Path, about: dict, root: Path, remarks: tuple[str, ...] = ()) -> dict[str, list[Split]]:
    names = _numbered(about["names"]) if isinstance(about["names"], dict) else about["names"]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'names' must be a list of the classes' names, not {about['names']!r:.100}")
    remarks += tuple(f"{path}: {text}" for text in _doubts(about, len(names)))
    # where 'path' says; it may be of another machine, so that the folder of the file is next
    bases = [path.parent / str(about.get("path") or "."), path.parent, path.parent.parent]
    found: dict[str, list[Split]] = {}
    missing = []
    for word, places in {_word(key): value for key, value in about.items() if _word(key) and value}.items():
        folders = places if isinstance(places, list) else [places]
        images = [image for place in folders for image in _images(str(place), bases)]
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
    if missing:
        lost = tuple(f"{path}: no images are where it says {text}" for text in missing)
        first = next(iter(found))
        found[first] = [dataclasses.replace(split, left_out=(*split.left_out, *lost)) for split in found[first]]
    return {word: [dataclasses.replace(split, remarks=remarks) for split in splits] for word, splits in found.items()}


def _word(key: Any) -> str:
    """Return the word of the split of which a key of data.yaml is the name, and "" for other keys."""
    return split_word(key, whole=True) if isinstance(key, str) else ""


def _numbered(names: dict) -> list | None:
    """List names by their numbers, which may be texts; a number that is left out gets a name. None for other keys."""
    try:
        by_number = {int(key): name for key, name in names.items()}
    except (TypeError, ValueError):
        return None
    if not by_number or min(by_number) < 0 or max(by_number) >= MOST_CLASSES:
        return None
    return [by_number.get(i, f"class {i}") for i in range(max(by_number) + 1)]


MOST_CLASSES = 100_000


def _doubts(about: dict, count: int) -> Iterator[str]:
    """Say what about the names of `count` classes may be a mistake: a number without a name, or another count."""
    names = about["names"]
    number = str(about.get("nc", about.get("classes")))  # as data.yaml and obj.data call it
    if number.isdecimal() and int(number) not in (len(names), count):
        yield f"{'nc' if 'nc' in about else 'classes'} is {number}, but there are {len(names)} names"
    known = {int(key) for key in names} if isinstance(names, dict) else set(range(count))
    if unnamed := [str(i) for i in range(count) if i not in known]:
        what, more = ("class", " has") if len(unnamed) == 1 else ("classes", " have")
        yield f"{what} {', '.join(unnamed[:5])}{', ...' if len(unnamed) > 5 else ''}{more} no name"


def _images(place: str, bases: Sequence[Path]) -> list[Path]:
    """List the images of a folder, or of a text file with a path on each line, as data.yaml names it."""
    for option in _tails(place, bases):
        if option.is_dir() and (images := images_below(option)):
            return images
        if option.is_file():
            return [_image(line, [option.parent, *bases]) for line in text_lines(option, "list of images")]
    return []


def _image(name: str, bases: Sequence[Path]) -> Path:
    options = _tails(name, bases)
    return next((option for option in options if os.path.isfile(option)), options[0])


def _tails(place: str, bases: Sequence[Path]) -> list[Path]:
    """List where a path may lead: below each base, as it is and without its first parts, which were another machine's.

    Roboflow writes "../train/images" for "train/images". The word of a split, if there is one, is not left out, so that
    no split takes the images of another.
    """
    parts = path_parts(place)
    last = next((i for i, part in enumerate(parts) if split_word(os.path.splitext(part)[0])), len(parts) - 1)
    tails = [place.replace("\\", "/"), *("/".join(parts[i:]) for i in range(last + 1))]
    return [base / tail for tail in dict.fromkeys(tails) for base in bases]


def _side_by_side(root: Path) -> dict[str, list[Split]]:
    found: dict[str, list[Split]] = {}
    for labels in (path for path in [root, *folders_below(root, 2)] if path.name.lower() == "labels"):
        beside = labels.with_name(_as_written("images", labels.name))
        if not beside.is_dir() or next(_texts_below(labels), None) is None:
            continue
        inner = {
            split_word(path.name): path for path in sorted(beside.iterdir()) if path.is_dir() and split_word(path.name)
        }
        for word, folder in (
            inner or {split_word(labels.parent.name) if labels.parent != root else "": beside}
        ).items():
            if images := images_below(folder):
                names = _class_names([labels.parent, labels, root], root)
                how = f"{labels.relative_to(root)}/ beside images/: this is YOLO"
                found.setdefault(word, []).append(_split(labels, images, names, how, root))
    return found


def _together(root: Path) -> dict[str, list[Split]]:
    """Find folders in which each image has its text file beside it, as labelImg writes them."""
    found: dict[str, list[Split]] = {}
    for folder in [root, *folders_below(root, 2)]:
        images = sorted(path for path in folder.iterdir() if is_image(path))
        labels = next((file for image in images if text_of(file := _any_case(image.with_suffix(".txt")))), None)
        if labels is None or not LINE.match(text_of(labels)[0]):
            continue
        word = split_word(folder.name) if folder != root else ""
        how = f"{labels.relative_to(root)}, ... beside the images: this is YOLO"
        found.setdefault(word, []).append(_split(folder, images, _class_names([folder, root], root), how, root))
    return found


LINE = re.compile(r"\d+(\.0+)?(\s+[-+.\de]+){4,}$")


def labels_without_images(root: Path) -> str:
    """Say that there are label files without images, as Label Studio exports them; "" where there are none."""
    for labels in [root, *folders_below(root, 2)]:
        beside = labels.with_name(_as_written("images", labels.name))
        if labels.name.lower() == "labels" and not images_below(beside):
            for path in sorted(_texts_below(labels)):
                if LINE.match(next(iter(text_of(path)), "")):
                    return f"{path} is YOLO, but there are no images in {beside}; put them there"
    return ""


def _texts_below(folder: Path) -> Iterator[Path]:
    """List the text files in a folder and below."""
    return (path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and not is_of_macos(path))


def _class_names(folders: Sequence[Path], root: Path) -> list[str]:
    for folder in dict.fromkeys(folders):
        for name in ("classes.txt", "obj.names", "labels.txt", "_darknet.labels"):
            if (path := folder / name).is_file() and (names := text_lines(path, "list of classes")):
                return names
    raise ValueError(
        f"{root}: this is YOLO, but no file names the classes; write {root / 'classes.txt'} with the name of class 0 "
        "on the first line, and so on, or data.yaml with 'names'"
    )


def _split(file: Path, images: list[Path], names: list[str], how: str, root: Path, keypoints: bool = False) -> Split:
    """Make a split of images, with `file_name`s relative to the dataset's folder, or to the folder of all of them."""
    paths = [os.path.abspath(image) for image in images]
    folder = os.path.commonpath([os.path.abspath(root), *paths])
    relative = sorted(dict.fromkeys(os.path.relpath(path, folder).replace(os.sep, "/") for path in paths))
    shown = Path(folder) if folder != os.path.abspath(root) else root
    read = functools.partial(read_yolo, shown, tuple(relative), tuple(names), keypoints)
    source = Annotations(file, read, describe=functools.partial(line_of, shown))
    return Split(shown, source, how, left_out=tuple(_without_image(images)))


def _without_image(images: list[Path]) -> Iterator[str]:
    """Say which label files beside those of some images have no image."""
    folders: dict[Path, set[Path]] = {}
    for folder in {image.parent for image in images}:
        folders.setdefault(_label_file(folder / "0").parent, set()).add(folder)
    for labels, beside in folders.items():
        if not labels.is_dir():
            continue
        stems = {os.path.splitext(name)[0] for folder in beside for name in os.listdir(folder) if is_image(name)}
        for name in sorted(os.listdir(labels)):
            stem, ending = os.path.splitext(name)
            if ending.lower() != ".txt" or stem in stems or is_of_macos(name):
                continue
            if LINE.match(next(iter(text_of(labels / name)), "")):
                yield f"{labels / name}: there is no image {stem}.* that can be read"


def read_yolo(folder: Path, images: Sequence[str], names: Sequence[str], keypoints: bool = False) -> dict:
    """Read the label files of images as the content of a COCO JSON file.

    A line is `class cx cy width height`, as fractions of the image, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon, whose
    box is taken; with `keypoints`, what follows the box is left out, and so is a confidence after it. An image without
    a label file, or with an empty one, has no objects. A line that is neither has no usable box, and counts among the
    dataset's problems.

    Raises:
        ValueError: a label file cannot be read; no image has one; no line of all is one of these, then the message
            shows the first; or classes are counted from 1.
    """
    if not any(os.path.isfile(_label_file(folder / name)) for name in images):
        places = " or ".join(map(str, _label_places(folder / images[0])))
        raise ValueError(
            f"{folder / images[0]}: no label file is at {places}, nor for any other of {len(images)} images"
        )
    coco = coco_content(folder, images, names, lambda name, size: _read_labels(folder / name, size, keypoints))
    if (numbers := {row["category_id"] for row in coco["annotations"]}) and min(numbers) >= 1 and len(names) in numbers:
        raise ValueError(
            f"{_label_file(folder / images[0]).parent}: the lines have classes from {min(numbers)} to {max(numbers)}, "
            f"but the names ({names[0]}, ...) have the numbers 0 to {len(names) - 1}; count classes from 0"
        )
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}

    def usable(row: dict) -> bool:
        (width, height), box = sizes[row["image_id"]], row["bbox"]
        return 0 <= row["category_id"] < len(names) and box is not None and box[0] < width and box[1] < height

    if coco["annotations"] and not any(map(usable, coco["annotations"])):
        path = next(path for name in images if text_of(path := _label_file(folder / name)))
        raise ValueError(
            f"{path}: a line is {text_of(path)[0]!r:.80}, and all lines of the dataset are like it, where YOLO has "
            f"`class cx cy width height`: a class from 0 to {len(names) - 1}, and fractions of the image from 0 to 1"
        )
    return coco


def line_of(folder: Path, image: str, position: int) -> str:
    """Name the label file, the number and the text of the line of an image's object."""
    path = _label_file(folder / image)
    number, line = numbered_lines(path, "labels")[position]
    return f"{path}, line {number}: {line}"


def text_of(path: Path) -> list[str]:
    """Read the lines of a label file; none where there is no such file."""
    return text_lines(path, "labels") if os.path.isfile(path) else []


def _read_labels(image: Path, size: tuple[int, int], keypoints: bool) -> list[dict]:
    height, width = size
    rows = []
    for line in text_of(_label_file(image)):
        cells = line.split()
        try:
            label, numbers = float(cells[0]), np.array([float(cell) for cell in cells[1:]])
        except ValueError:
            label, numbers = -1.0, np.array([])
        row: dict = {"category_id": int(label) if label.is_integer() else -1, "bbox": None}
        if len(numbers) in (4, 5) or (keypoints and len(numbers) > 4):
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
    """Return the label file of an image: in the folder of labels, if there is one, or beside it."""
    places = _label_places(image)
    return _any_case(places[0] if places[0].parent.is_dir() else places[-1])


def _any_case(path: Path) -> Path:
    """Return the path of a text file as it is there: its ending may be .TXT or .Txt."""
    options = (path, path.with_suffix(".TXT"), path.with_suffix(".Txt"))
    return next((option for option in options if os.path.isfile(option)), path)


def _label_places(image: Path) -> list[Path]:
    """List where the label file of an image may be: in `labels` instead of the last `images` of its path, or beside."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].lower() == "images":
            moved = Path(*parts[:i], _as_written("labels", parts[i]), *parts[i + 1 :])
            return [moved.with_suffix(".txt"), image.with_suffix(".txt")]
    return [image.with_suffix(".txt")]


def _as_written(name: str, other: str) -> str:
    """Write a folder's name with the capitals that the folder beside it has: Images and Labels, IMAGES and LABELS."""
    return name.upper() if other.isupper() else name.capitalize() if other[0].isupper() else name
