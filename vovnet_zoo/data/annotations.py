"""COCO JSON as usable boxes: find the file, read it, and say what of it cannot be used.

Boxes are xyxy in pixels, labels 0..K-1 (foreground only).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from pathlib import Path, PurePath

import numpy as np

from ..files import read_bytes


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """`(images_dir, annotation_file)` of a split ("train", "val", ...) below `root`.

    Known layouts, YEAR being any number or nothing:
        root/annotations/instances_{split}{YEAR}.json with root/{split}{YEAR}/ or root/images/{split}{YEAR}/
        root/{split}/_annotations.coco.json beside its images ("valid" also stands for "val")

    Raises ValueError if none or several are there, saying which.
    """
    root, found = Path(root), split_candidates(root, split)
    if len(found) == 1:
        return found[0]
    if found:
        pairs = "; ".join(f"{file} with {folder}" for folder, file in found)
        raise ValueError(f"{root}: several '{split}' splits, remove or rename all but one: {pairs}")
    there = [str(path.relative_to(root)) for path in sorted([*root.iterdir(), *root.glob("annotations/*")])]
    raise ValueError(
        f"{root}: no '{split}' split; looked for annotations/instances_{split}[YEAR].json with {split}[YEAR]/ or "
        f"images/{split}[YEAR]/, and for {split}/_annotations.coco.json; there is: {', '.join(there[:20]) or 'nothing'}"
        f"{', ...' if len(there) > 20 else ''}"
    )


def split_candidates(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """All that `find_split` could mean. Raises ValueError if `root` is no folder."""
    root, found = Path(root), []
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for file in sorted((root / "annotations").glob(f"instances_{split}*.json")):
        if re.fullmatch(rf"instances_{re.escape(split)}\d*", file.stem):
            name = file.stem.removeprefix("instances_")
            found += [(folder, file) for folder in (root / name, root / "images" / name) if folder.is_dir()]
    for name in (split, "valid") if split == "val" else (split,):
        file = root / name / "_annotations.coco.json"
        found += [(root / name, file)] if file.is_file() else []
    return found


def read_annotations(path: str | Path) -> dict:
    """The parsed COCO JSON. Raises ValueError, naming the file, unless it has images, annotations and categories."""
    data = read_bytes(path, "annotation file")
    try:
        coco = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path}: not COCO format: a JSON {type(coco).__name__} where an object should be")
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{path}: not COCO format: there is no list '{key}' in it")
    return coco


def entries_by_id(entries: list, key: str, text: str, path: str | Path) -> list[dict]:
    """The JSON's images or categories in the order of their ids, each with an own integer id and a text."""
    for i, entry in enumerate(entries):
        if problem := entry_problem(entry, text):
            raise ValueError(f"{path}: {key}[{i}] {problem}")
    if twice := repeated(entry["id"] for entry in entries):
        raise ValueError(f"{path}: {key} must have different ids, but these occur more than once: {twice[:5]}")
    if not entries:
        raise ValueError(f"{path}: the list '{key}' is empty")
    return sorted(entries, key=lambda entry: entry["id"])


def entry_problem(entry, text: str) -> str | None:
    """Why a JSON image or category has no usable id or `text`, None if it has."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or abs(entry["id"]) >= 2**63:
        return "has no integer 'id'"
    if not isinstance(entry.get(text), str) or not entry[text].strip():
        return f"(id {entry['id']}) has no '{text}'"
    return None


def image_problem(image: dict) -> str | None:
    """What makes a JSON image with id and file name unusable, None if nothing does."""
    name, size = image["file_name"], (image.get("height"), image.get("width"))
    if len(name) > 4096 or "\0" in name:
        return f"image {image['id']} has a 'file_name' of {len(name)} characters that is no path: {name[:50]!r}"
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return f"image {image['id']} ({name}) must have a 'file_name' below the folder of images, without '..'"
    if not all(type(side) in (int, float) and 1 <= side < 2**31 and side == int(side) for side in size):
        return f"image {image['id']} ({name}) needs a whole positive width and height, not {size[1]!r} and {size[0]!r}"
    return None


def usable_boxes(
    annotations: list, image_index: dict[int, int], label_of: dict[int, int], sizes: np.ndarray, plus_one: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Image index int64 [A], label int64 [A] and xyxy box float32 [A, 4] of each usable annotation that is no crowd.

    Last, by kind of problem, the positions in `annotations` of those left out or changed.
    """
    problems = defaultdict(list)
    owners, labels, rows, positions = [], [], [], []
    for i, annotation in enumerate(annotations):
        if problem := annotation_problem(annotation, image_index, label_of):
            problems[problem].append(i)
        elif not is_crowd(annotation):
            owners.append(image_index[annotation["image_id"]])
            labels.append(label_of[annotation["category_id"]])
            rows.append(annotation["bbox"])
            positions.append(i)
    owners, labels = np.array(owners, dtype=np.int64), np.array(labels, dtype=np.int64)
    positions, xywh = np.array(positions, dtype=np.int64), np.array(rows, dtype=np.float64).reshape(-1, 4)
    limit = sizes[owners][:, ::-1]  # [A, 2] width, height
    boxes, keep = coco_to_xyxy(xywh, limit[:, 1], limit[:, 0], plus_one)

    start, extent = xywh[:, :2], xywh[:, 2:]
    outside = ((start >= limit) | (start + extent <= 0)).any(axis=1) & (extent > 0).all(axis=1)
    beyond = ((start < -1) | (start + extent > limit + 1)).any(axis=1)
    problems["empty box"] = positions[~keep & ~outside].tolist()
    problems["box outside the image"] = positions[~keep & outside].tolist()
    problems["box clipped to the image"] = positions[keep & beyond].tolist()
    return owners[keep], labels[keep], boxes[keep], {kind: where for kind, where in problems.items() if where}


def annotation_problem(annotation, image_ids: Container[int], category_ids: Container[int]) -> str | None:
    """What makes a JSON annotation unusable whatever its image's size, None if nothing does."""
    if not isinstance(annotation, dict):
        return "not an object"
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if type(annotation.get(key)) not in (int, float) or annotation[key] not in known:
            return f"unknown {key}"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e30 for v in box)):
        return "box is not 4 finite numbers"
    return None


def is_crowd(annotation: dict) -> bool:
    """Whether a JSON annotation is a crowd region."""
    return annotation.get("iscrowd") in (1, "1")


def coco_to_xyxy(xywh, height, width, plus_one: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """COCO boxes to clipped corners.

    Args:
        xywh: [N, 4] left, top, width, height in pixels.
        height, width: of the image in pixels, numbers or [N].
        plus_one: the published convention: `x2 = x + max(w - 1, 0)`, clipped to [0, width - 1] (likewise y);
            otherwise `x2 = x + w`, clipped to [0, width].

    Returns:
        boxes: float32 [N, 4] xyxy; keep: bool [N], where something is left of the box (False for NaN).
    """
    one = int(plus_one)
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    limit = np.stack(np.broadcast_arrays(width, height), axis=-1) - one  # [2] or [N, 2]
    start, extent = xywh[:, :2], xywh[:, 2:]
    end = start + (np.maximum(extent - 1, 0) if plus_one else extent)
    boxes = np.concatenate([np.clip(start, 0, limit), np.clip(end, 0, limit)], axis=1).astype(np.float32)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def are_fractions(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes [A, 4] can only be fractions of the images, of (height, width) [N, 2]."""
    return len(boxes) > 0 and boxes.max() <= 1 and sizes.min() > 1


def repeated(values: Iterable) -> list:
    """Those that occur more than once."""
    return [value for value, n in Counter(values).items() if n > 1]
