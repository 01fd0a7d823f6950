"""This module reads annotations, of a COCO JSON file or of what stands for one, as usable boxes.

Boxes are xyxy in pixels, labels 0..K-1 (foreground only).
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..files import read_bytes
from .parse import parse_json


@dataclass(frozen=True)
class Annotations:
    """Annotations of any format stand for a COCO JSON file, in all places where its path could be given.

    The content is read when it is needed, and not kept, as the content of a file is. `read` is a function of a module,
    or a `functools.partial` of one, so that the object can go to other processes.
    """

    file: Path  # the file or folder that messages name
    # A function gives the content of a COCO JSON: images, annotations, categories.
    read: Callable[[], dict] = field(repr=False)  # it may hold the names of all images
    # Another gives an image's bytes by its `file_name`; None: the image is a file.
    read_image: Callable[[str], bytes] | None = field(default=None, repr=False)
    image_files: tuple[Path, ...] = field(default=(), repr=False)  # the files from which `read_image` reads
    # Another says where the i-th object of an image is written, and how.
    describe: Callable[[str, int], str] | None = field(default=None, repr=False)


Source = Path | Annotations
REFERENCES = {"images": "image_id", "categories": "category_id"}  # the key by which an annotation names such an entry


def file_of(source: str | Path | Annotations) -> Path:
    """Return the file that messages about a source of annotations name."""
    return source.file if isinstance(source, Annotations) else Path(source)


def read_annotations(path: str | Path | Annotations) -> dict:
    """Read the content of a COCO JSON file, or of annotations of another format that stand for one.

    Polygons of a file are left out, so a `segmentation` is an empty list or a run-length encoding. An annotation
    without a `bbox` gets the box around its segmentation. An image without a `file_name` gets the folder and the name
    of its `coco_url`, as LVIS means them. Ids of images or categories that are texts or decimals become
    integers: the number that each is (VIA writes the `image_id` of its boxes so), or the position of a text. A class
    whose name is a number has its digits as name.

    Raises:
        ValueError: the file is not JSON, or lacks images, annotations or categories; the message names the file.
    """
    if isinstance(path, Annotations):
        return path.read()
    return parse_annotations(read_bytes(path, "annotation file"), path)


def parse_annotations(data: bytes, path: str | Path, replace: Callable[[dict], Any] | None = None) -> dict:
    """Parse the content of the COCO JSON file `path`; see `read_annotations`, and `parse_json` for `replace`."""
    try:
        coco = parse_json(data, replace)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path}: not COCO format: a JSON {type(coco).__name__} where an object should be")
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{path}: not COCO format: there is no list '{key}' in it")
    rows = coco["annotations"]
    places = [i for i, row in enumerate(rows) if isinstance(row, dict)]  # few, where `replace` has taken the others
    if lacking := [i for i in places if _lacks_box(rows[i])]:
        whole = json.loads(data)["annotations"]  # with the polygons
        for i in lacking:
            rows[i] = rows[i] | {"bbox": _segmentation_box(whole[i]["segmentation"])}
    coco["images"] = [e | {"file_name": _end_of(e["coco_url"])} if _lacks_name(e) else e for e in coco["images"]]
    for key, reference in REFERENCES.items():
        numbers = _numbers_of(coco[key])
        if numbers:
            coco[key] = [e | {"id": numbers.get(e.get("id"), e["id"])} if _has_id(e) else e for e in coco[key]]
        for i in places:
            if isinstance(text := rows[i].get(reference), str):
                number = numbers.get(text, int(text) if _is_number(text) else text)
                rows[i] = rows[i] | {reference: number}
    coco["categories"] = [
        c | {"name": str(c["name"])} if isinstance(c, dict) and type(c.get("name")) is int else c
        for c in coco["categories"]
    ]
    return coco


def _numbers_of(entries: list) -> dict[Any, int]:
    """Map the ids of entries that are texts or decimals to integers: to the numbers that they are.

    Ids that are all texts, and not all numbers, become their positions. An id that is missing from the result stays.
    """
    ids: list = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if all(isinstance(text, str) for text in ids) and not all(map(_is_number, ids)):
        return {text: i for i, text in enumerate(dict.fromkeys(ids), start=1)}
    return {x: int(x) for x in ids if type(x) in (str, float) and _is_number(x)}


def ids_of_texts(source: Source) -> dict[str, dict[str, int]]:
    """Map the ids of a COCO JSON file that are texts to the integers by which `read_annotations` replaces them.

    Returns:
        A mapping for "image_id" and one for "category_id"; both are empty for annotations of another format.
    """
    while isinstance(source, Annotations) and isinstance(source.read, Changed):
        source = source.read.source
    found: dict[str, dict[str, int]] = {reference: {} for reference in REFERENCES.values()}
    if not isinstance(source, Annotations):
        coco = parse_json(read_bytes(source, "annotation file"))
        for key, reference in REFERENCES.items():
            found[reference] = {text: i for text, i in _numbers_of(coco[key]).items() if isinstance(text, str)}
    return found


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) in (str, int, float)


def _is_number(x: str | float) -> bool:
    """Tell whether an id stands for an integer, as "12" and 12.0 do."""
    if isinstance(x, str):
        return x.isascii() and x.isdigit() and len(x) < 19
    return x.is_integer() and abs(x) < 2**53


def _lacks_name(image: Any) -> bool:
    return isinstance(image, dict) and not image.get("file_name") and isinstance(image.get("coco_url"), str)


def _end_of(url: str) -> str:
    """Return the last two parts of an address, such as "val2017/000000000139.jpg"."""
    return "/".join(url.split("/")[-2:])


def _lacks_box(row: dict) -> bool:
    return not row.get("bbox") and isinstance(row.get("segmentation"), (list, dict))


def _segmentation_box(segmentation: Any) -> list[float] | None:
    """Return the box [left, top, width, height] around polygons or a run-length encoding; None where it is neither."""
    if isinstance(segmentation, dict):
        from pycocotools import mask  # torch.hub's users may lack it

        try:
            height, width = segmentation["size"]
            counts = segmentation["counts"]
            runs = mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
            return [float(v) for v in mask.toBbox(runs)]
        except Exception:  # of a damaged encoding, any
            return None
    polygons = segmentation if segmentation and isinstance(segmentation[0], list) else [segmentation]
    numbers = [x for polygon in polygons if isinstance(polygon, list) for x in polygon]
    if len(numbers) < 4 or len(numbers) % 2 or not all(type(x) in NUMBERS for x in numbers):
        return None
    left, top, right, bottom = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    return [left, top, right - left, bottom - top]


def digest_of(source: Source) -> str:
    """Compute the SHA-256 of annotations: of the bytes of a COCO JSON file, or of the content that stands for them."""
    if isinstance(source, Annotations):
        return digest_of_content(source.read())
    return hashlib.sha256(read_bytes(source, "annotation file")).hexdigest()


def digest_of_content(coco: dict) -> str:
    """Compute the SHA-256 of the content of a COCO JSON, whatever the order of its keys.

    What "derived" names in the annotations, see `coco_content`, is left out.
    """
    if derived := coco.get("derived"):
        rows = [{key: value for key, value in row.items() if key not in derived} for row in coco["annotations"]]
        coco = {key: value for key, value in coco.items() if key != "derived"} | {"annotations": rows}
    return hashlib.sha256(json.dumps(coco, sort_keys=True).encode()).hexdigest()


# ---- changes of what a source gives ---------------------------------------------------------------------------------


def changed(source: Source, change: Callable[[dict], dict]) -> Annotations:
    """Return annotations whose content is `change` of the content of `source`."""
    if isinstance(source, Annotations):
        return replace(source, read=Changed(source, change))
    return Annotations(file_of(source), Changed(source, change))


@dataclass(frozen=True)
class Changed:
    """This function reads a source, and changes what it gives."""

    source: Source
    change: Callable[[dict], dict]

    def __call__(self) -> dict:
        return self.change(read_annotations(self.source))


def without_classes(coco: dict, names: Collection[str]) -> dict:
    """Leave out the categories of these names, and their annotations."""
    gone = {category["id"] for category in coco["categories"] if category["name"] in names}
    kept = [a for a in coco["annotations"] if not (isinstance(a, dict) and _hashable(a.get("category_id")) in gone)]
    return coco | {"annotations": kept, "categories": [c for c in coco["categories"] if c["id"] not in gone]}


def difficult_as_crowd(coco: dict) -> dict:
    """Make crowd regions of the objects that Pascal VOC calls difficult: they are neither trained on nor scored."""
    rows = coco["annotations"]
    return coco | {"annotations": [a | {"iscrowd": 1} if _is_difficult(a) else a for a in rows]}


def _is_difficult(annotation: Any) -> bool:
    return isinstance(annotation, dict) and annotation.get("difficult") in (1, True, "1")


def _hashable(value: Any) -> Any:
    return value if type(value) in NUMBERS else None


# ---- from the content to boxes --------------------------------------------------------------------------------------


def entries_by_id(entries: list, key: str, text: str, path: str | Path) -> list[dict]:
    """Sort the images or categories of a COCO JSON by their ids.

    Args:
        entries: the list under `key` ("images" or "categories").
        text: the key that each entry needs beside its id: "file_name" or "name".
        path: the file, for the error messages.

    Raises:
        ValueError: the list is empty, an entry has no integer id or no text, or two entries have the same id.
    """
    for i, entry in enumerate(entries):
        if problem := entry_problem(entry, text):
            raise ValueError(f"{path}: {key}[{i}] {problem}")
    if twice := repeated(entry["id"] for entry in entries):
        raise ValueError(f"{path}: {key} must have different ids, but these occur more than once: {twice[:5]}")
    if not entries:
        raise ValueError(f"{path}: the list '{key}' is empty")
    return sorted(entries, key=lambda entry: entry["id"])


def idle_categories(categories: list[dict], annotations: list, known: Collection[str] = ()) -> list[dict]:
    """List the categories that no annotation refers to and that are hardly meant as classes.

    They group other categories, whose `supercategory` is their name (Roboflow writes one of id 0), or stand for the
    background (as labelme's exporter writes it). A category whose name is among the `known` classes is none of them.
    """
    used = {a.get("category_id") for a in annotations if isinstance(a, dict) and type(a.get("category_id")) in NUMBERS}

    def groups(category: dict) -> bool:
        return any(c.get("supercategory") == category["name"] for c in categories if c is not category)

    candidates = [c for c in categories if c["id"] not in used and c["name"] not in known]
    idle = [c for c in candidates if c["name"].casefold() in BACKGROUND or groups(c)]
    return idle if len(idle) < len(categories) else []


NUMBERS = (int, float)
PLAIN_NAME = re.compile(r"[\w-]+\.\w+").fullmatch
BACKGROUND = ("background", "_background_", "__background__", "__ignore__")


def entry_problem(entry: Any, text: str) -> str | None:
    """Say why the id or the `text` of a JSON image or category cannot be used; None if both can."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or abs(entry["id"]) >= 2**63:
        return "has no integer 'id'"
    if not isinstance(entry.get(text), str) or not entry[text].strip():
        return f"(id {entry['id']}) has no '{text}'"
    return None


def image_problem(image: dict) -> str | None:
    """Say why the file name or the size of a JSON image cannot be used; None if both can."""
    name: str = image["file_name"]
    size: list[Any] = [image.get("height"), image.get("width")]
    if len(name) > 4096 or "\0" in name:
        return f"image {image['id']} has a 'file_name' of {len(name)} characters that is no path: {name[:50]!r}"
    # A name of letters, digits and a suffix needs no closer look, which takes half a second for COCO's.
    if not PLAIN_NAME(name) and ((path := PurePath(name)).anchor or ".." in path.parts):
        return f"image {image['id']} ({name}) must have a 'file_name' below the folder of images, without '..'"
    if not all(type(side) in (int, float) and 1 <= side < 2**31 and side == int(side) for side in size):
        return f"image {image['id']} ({name}) needs a whole positive width and height, not {size[1]!r} and {size[0]!r}"
    return None


def usable_boxes(
    annotations: list, image_index: dict[int, int], label_of: dict[int, int], sizes: np.ndarray, plus_one: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Collect the usable annotations that are no crowd regions, with their boxes clipped to the images.

    Args:
        annotations: the list of the COCO JSON.
        image_index: position in `sizes` of each image id.
        label_of: label of each category id.
        sizes: int64 [N, 2] (height, width) of the images in pixels.
        plus_one: boxes in the published convention, see `coco_to_xyxy`.

    Returns:
        owners: int64 [A], position in `sizes` of the image of each usable annotation.
        labels: int64 [A].
        boxes: float32 [A, 4] xyxy in pixels.
        problems: positions in `annotations` that were left out or changed, by kind of problem.
    """
    problems = defaultdict(list)
    owner_list, label_list, rows, position_list = [], [], [], []
    for i, annotation in enumerate(annotations):
        if problem := annotation_problem(annotation, image_index, label_of):
            problems[problem].append(i)
        elif not is_crowd(annotation):
            owner_list.append(image_index[annotation["image_id"]])
            label_list.append(label_of[annotation["category_id"]])
            rows.append(annotation["bbox"])
            position_list.append(i)
    owners, labels, positions = (np.array(x, dtype=np.int64) for x in (owner_list, label_list, position_list))
    xywh = np.array(rows, dtype=np.float64).reshape(-1, 4)
    boxes, keep, more = clip_boxes(xywh, owners, positions, sizes, plus_one)
    return owners[keep], labels[keep], boxes[keep], {k: where for k, where in (problems | more).items() if where}


def clip_boxes(
    xywh: np.ndarray, owners: np.ndarray, positions: np.ndarray, sizes: np.ndarray, plus_one: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Clip the COCO boxes of many images; returns the boxes [A, 4] xyxy, which to keep [A], and `positions` by problem.

    Arguments as in `usable_boxes`, all of length A but `sizes`.
    """
    limit = sizes[owners][:, ::-1]  # [A, 2] width, height
    boxes, keep = coco_to_xyxy(xywh, limit[:, 1], limit[:, 0], plus_one)

    start, extent = xywh[:, :2], xywh[:, 2:]
    outside = ((start >= limit) | (start + extent <= 0)).any(axis=1) & (extent > 0).all(axis=1)
    beyond = ((start < -1) | (start + extent > limit + 1)).any(axis=1)
    problems = {
        "empty box": positions[~keep & ~outside].tolist(),
        "box outside the image": positions[~keep & outside].tolist(),
        "box clipped to the image": positions[keep & beyond].tolist(),
    }
    return boxes, keep, problems


def annotation_problem(annotation: Any, image_ids: Container[int], category_ids: Container[int]) -> str | None:
    """Say why a JSON annotation cannot be used, apart from the size of its image; None if it can."""
    if not isinstance(annotation, dict):
        return "not an object"
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if type(annotation.get(key)) not in NUMBERS or annotation[key] not in known:
            return f"unknown {key}"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e30 for v in box)):
        return "box is not 4 finite numbers"
    return None


def is_crowd(annotation: dict) -> bool:
    """Tell whether a JSON annotation is a crowd region."""
    return annotation.get("iscrowd") in (1, "1")


def coco_to_xyxy(
    xywh: ArrayLike, height: ArrayLike, width: ArrayLike, plus_one: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Turn COCO boxes into corners that are clipped to the image.

    Args:
        xywh: [N, 4] left, top, width, height in pixels.
        height, width: size of the image in pixels, as numbers or [N].
        plus_one: the published convention: `x2 = x + max(w - 1, 0)`, clipped to [0, width - 1] (likewise y);
            otherwise `x2 = x + w`, clipped to [0, width].

    Returns:
        boxes: float32 [N, 4] xyxy.
        keep: bool [N], False where nothing is left of the box, or where it holds NaN.
    """
    one = int(plus_one)
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    limit = np.stack(np.broadcast_arrays(width, height), axis=-1) - one  # [2] or [N, 2]
    start, extent = xywh[:, :2], xywh[:, 2:]
    end = start + (np.maximum(extent - 1, 0) if plus_one else extent)
    boxes = np.concatenate([np.clip(start, 0, limit), np.clip(end, 0, limit)], axis=1).astype(np.float32)
    return boxes, np.all(boxes[:, 2:] > boxes[:, :2], axis=1)


def are_fractions(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Tell whether boxes [A, 4] must be fractions of the image: all lie in the first pixel of larger images.

    Args:
        boxes: xyxy.
        sizes: [N, 2] (height, width) of the images in pixels.
    """
    return len(boxes) > 0 and boxes.max() <= 1 and sizes.min() > 1


def repeated(values: Iterable) -> list:
    """List the values that occur more than once."""
    return [value for value, n in Counter(values).items() if n > 1]
