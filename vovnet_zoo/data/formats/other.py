"""`name_format` recognises annotations that are not read, so that their owner learns what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..parse import parse_json
from .places import folders_below
from .yolo import labels_without_images

FILES = 20  # JSON files that are looked into
MOST_BYTES = 50_000_000  # of such a file
EXPORT = "export the dataset as COCO, YOLO or Pascal VOC"


def name_format(root: Path) -> str:
    """Name the format of annotations below `root` that are not read, and say what to do; "" where none is known."""
    for path in files_below(root):
        ending = path.suffix.lower()
        if path.name in ("metadata.csv", "metadata.parquet"):
            return f"{path} is a table of images, and boxes are read from metadata.jsonl; write this, or {EXPORT}"
        if ending in (".tfrecord", ".record"):
            return f"{path} is a TFRecord, which is not read; {EXPORT}"
        if ending == ".csv" and ("xmin" in first_line(path) or path.name == "_annotations.csv"):
            return f"{path} is a table of boxes (CSV), which is not read; {EXPORT}"
        if ending == ".xml" and "<annotations>" in head(path):
            return f"{path} is of CVAT's own format (for images or video), which is not read; {EXPORT}"
    for path in [path for path in files_below(root) if path.suffix.lower() == ".json"][:FILES]:
        try:
            content = parse_json(path.read_bytes()) if path.stat().st_size < MOST_BYTES else None
        except (OSError, ValueError, RecursionError):
            continue
        if tool := tool_of(content):
            return f"{path} is a file of {tool}, which is not read; {EXPORT}"
    return labels_without_images(root)


def tool_of(content: Any) -> str:
    """Name the tool that wrote the content of a JSON file; "" where it is not known."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        keys = content[0].keys()
        if {"image", "annotations"} <= keys:
            return "CreateML"
        studio = {"data", "annotations"} <= keys or {"annotator", "annotation_id"} & keys  # JSON or JSON-MIN
        return "Label Studio (its own JSON)" if studio else ""
    if not isinstance(content, dict):
        return ""
    if {"shapes", "imagePath"} <= content.keys():
        return "labelme (labelme2coco makes COCO of them)"
    if {"classes", "labels"} <= content.keys() or isinstance(content.get("samples"), list):
        return "FiftyOne (its own JSON)"
    values = list((content.get("_via_img_metadata") or content).values()) if content else []
    return "VIA (its own JSON)" if values and isinstance(values[0], dict) and "regions" in values[0] else ""


def first_line(path: Path) -> str:
    return (head(path).splitlines() or [""])[0].lower()


def head(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1000)
    except OSError:
        return ""


def files_below(root: Path) -> Iterator[Path]:
    """List the files of a folder and of three levels below."""
    for folder in (root, *folders_below(root, 3)):
        yield from sorted(path for path in folder.iterdir() if os.path.isfile(path))
