"""`name_format` recognises annotations that are not read, so that their owner learns what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..parse import parse_json
from .places import folders_below

FILES = 20  # JSON files that are looked into
MOST_BYTES = 50_000_000  # of such a file
EXPORT = "export the dataset as COCO, YOLO or Pascal VOC"


def name_format(root: Path) -> str:
    """Name the format of annotations below `root` that are not read, and say what to do; "" where none is known."""
    for path in files_below(root):
        ending = path.suffix.lower()
        if path.name == "metadata.csv":
            return f"{path} is a table of images, and boxes do not fit into it; write metadata.jsonl, or {EXPORT}"
        if ending in (".tfrecord", ".record"):
            return f"{path} is a TFRecord, which is not read; {EXPORT}"
        if ending == ".csv" and "xmin" in first_line(path):
            return f"{path} is a table of boxes (CSV), which is not read; {EXPORT}"
    for path in [path for path in files_below(root) if path.suffix.lower() == ".json"][:FILES]:
        try:
            content = parse_json(path.read_bytes()) if path.stat().st_size < MOST_BYTES else None
        except (OSError, ValueError, RecursionError):
            continue
        if tool := tool_of(content):
            return f"{path} is a file of {tool}, which is not read; {EXPORT}"
    return ""


def tool_of(content: Any) -> str:
    """Name the tool that wrote the content of a JSON file; "" where it is not known."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        keys = content[0].keys()
        if {"image", "annotations"} <= keys:
            return "CreateML"
        return "Label Studio (its own JSON)" if {"data", "annotations"} <= keys else ""
    if not isinstance(content, dict):
        return ""
    if {"shapes", "imagePath"} <= content.keys():
        return "labelme (labelme2coco makes COCO of them)"
    values = list((content.get("_via_img_metadata") or content).values()) if content else []
    return "VIA (its own JSON)" if values and isinstance(values[0], dict) and "regions" in values[0] else ""


def first_line(path: Path) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.readline(1000).lower()
    except OSError:
        return ""


def files_below(root: Path) -> Iterator[Path]:
    """List the files of a folder and of three levels below."""
    for folder in (root, *folders_below(root, 3)):
        yield from sorted(path for path in folder.iterdir() if os.path.isfile(path))
