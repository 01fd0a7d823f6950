"""Hugging Face's `imagefolder`: a file metadata.jsonl beside the images, with a line for each image."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import read_bytes
from ..annotations import NUMBERS, Annotations
from .coco import coco_content
from .places import Split, folders_below, split_word

CLASS_COLUMNS = ("category", "categories", "label", "labels", "category_id", "class")
BOX_COLUMNS = ("bbox", "bboxes", "boxes")


def find_imagefolder(root: Path) -> dict[str, list[Split]]:
    """Find the splits of an `imagefolder`: folders with a file metadata.jsonl, whose lines have boxes.

    Raises:
        ValueError: a line is no JSON object, or has no `file_name`.
    """
    files = [path for folder in (root, *folders_below(root, 2)) for path in sorted(folder.glob("metadata.jsonl"))]
    tables = {path: read_lines(path) for path in files}
    tables = {path: rows for path, rows in tables.items() if any(objects_of_row(row) is not None for row in rows)}
    names = class_names([row for rows in tables.values() for row in rows], next(iter(tables), root))
    found: dict[str, list[Split]] = {}
    for path, rows in tables.items():
        for word in sorted({word_of(path, row, root) for row in rows}):
            source = Annotations(path, functools.partial(read_imagefolder, path, tuple(names), root, word))
            how = f"{path.relative_to(root)}: this is an imagefolder of Hugging Face"
            found.setdefault(word, []).append(Split(path.parent, source, how))
    return found


def word_of(path: Path, row: dict, root: Path) -> str:
    """Return the word of the split that a row belongs to: by the folder of its file, or of its image."""
    folders = [*path.parent.relative_to(root).parts, *Path(row["file_name"]).parts[:-1]]
    return next((word for name in reversed(folders) if (word := split_word(name))), "")


def read_imagefolder(path: Path, names: Sequence[str], root: Path, word: str) -> dict:
    """Read metadata.jsonl as the content of a COCO JSON file. Boxes are [left, top, width, height] in pixels.

    Args:
        names: the classes.
        word: the split whose rows are read, see `word_of`.
    """
    objects: dict[str, list[dict]] = {}  # of each image, which may have several lines
    label_of = {name: i for i, name in enumerate(names)}
    for row in read_lines(path):
        if word_of(path, row, root) == word:
            objects.setdefault(row["file_name"], []).extend(to_objects(row, label_of))
    return coco_content(path.parent, list(objects), names, lambda name, size: objects[name])


def read_lines(path: Path) -> list[dict]:
    """Read the JSON objects of a file, one on each line; each must have a `file_name`."""
    rows = []
    for number, line in enumerate(read_bytes(path, "metadata file").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{path}: line {number} is no object with a 'file_name'")
        rows.append(row)
    return rows


def objects_of_row(row: dict) -> dict | None:
    """Return the lists `bbox` and `category` of a row's objects; the second one only if there are classes.

    They are under `objects`, or in the row itself; None where there are no boxes. A row may have one box that is in no
    list, and one class for all of its boxes.
    """
    for place in (row.get("objects"), row):
        if isinstance(place, list):  # a list of objects instead of an object of lists
            keys = sorted({key for x in place if isinstance(x, dict) for key in x})
            place = {key: [x.get(key) for x in place if isinstance(x, dict)] for key in keys} or {"bbox": []}
        if isinstance(place, dict) and isinstance(boxes := column(place, BOX_COLUMNS), list):
            if boxes and all(type(x) in NUMBERS for x in boxes):
                boxes = [boxes]
            classes = column(place, CLASS_COLUMNS)
            if classes is not None and not isinstance(classes, list):
                classes = [classes] * len(boxes)
            return {"bbox": boxes} if classes is None else {"bbox": boxes, "category": classes}
    return None


def column(objects: dict, names: Sequence[str]) -> Any:
    """Return the first of some columns that is there."""
    return next((objects[name] for name in names if objects.get(name) is not None), None)


def class_names(rows: list[dict], path: Path) -> list[str]:
    """Collect the names of the classes: sorted, numbers as numbers. `ValueError` names `path`, where none has one."""
    objects = [x for x in map(objects_of_row, rows) if x is not None]
    found = {x for o in objects for x in o.get("category", ()) if isinstance(x, (str, int, float))}
    if not found and any(o["bbox"] for o in objects):
        raise ValueError(f"{path}: its boxes have no classes; write them beside 'bbox', as 'category'")
    numbers = sorted(x for x in found if isinstance(x, int))
    return [str(x) for x in [*numbers, *sorted(str(x) for x in found if not isinstance(x, int))]]


def to_objects(row: dict, label_of: dict[str, int]) -> list[dict]:
    """Turn the columns of a row into objects of a COCO JSON file; a box without a class has category -1."""
    objects = objects_of_row(row) or {}
    boxes, classes = objects.get("bbox", []), objects.get("category", [])
    classes = [*classes, *[None] * (len(boxes) - len(classes))]
    return [
        {
            "category_id": -1 if name is None else label_of.get(str(name), -1),
            "bbox": list(box) if isinstance(box, (list, tuple)) else None,
        }
        for box, name in zip(boxes, classes, strict=False)
    ]
