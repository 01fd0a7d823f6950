"""An `Index` holds what a dataset needs of a COCO JSON file. That of a large file is kept on the disk, to be mapped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import cache_folder, read_bytes, staged
from .annotations import (
    NUMBERS,
    Annotations,
    annotation_problem,
    clip_boxes,
    digest_of_content,
    entries_by_id,
    image_problem,
    is_crowd,
    parse_annotations,
)

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

KEPT_BYTES = 4_000_000  # a smaller file is parsed each time, which takes less than a second
KEPT_FILES = 8  # so many indices, those that were used last
VERSION = 2  # of the files of an index; to be raised when their meaning changes
CLOCK_NS = 2_000_000_000  # time stamps of files may be as coarse as this
BLOCK = 20_000  # annotations whose arrays fit into a CPU's cache
CROWD, NO_OBJECT = 1, 2


@dataclass(frozen=True)
class Index:
    """The categories, images and annotations of a COCO JSON file, as arrays.

    N images are in the order of their ids. A annotations are in the order of their images, those of one image in the
    order of the file.
    """

    sha256: str  # of the file
    categories: list[dict]  # in the order of their ids
    image_ids: np.ndarray  # int64 [N]
    file_names: np.ndarray  # str [N]
    sizes: np.ndarray  # int64 [N, 2] (height, width) in pixels
    owners: np.ndarray  # int32 [A], position of the annotation's image; -1 if there is no such image
    groups: np.ndarray  # int32 [A], position of the annotation's category; -1 if there is no such category
    xywh: np.ndarray  # float64 [A, 4] left, top, width, height in pixels; NaN if it is not four finite numbers
    kinds: np.ndarray  # uint8 [A], CROWD for a crowd region, NO_OBJECT for what is no JSON object, 0 otherwise

    @property
    def num_crowds(self) -> int:
        """The number of crowd regions, usable or not."""
        return int((self.kinds == CROWD).sum())

    def used_categories(self) -> list[dict]:
        """List one annotation for each category that has any, with nothing but its `category_id`."""
        return [{"category_id": self.categories[i]["id"]} for i in np.flatnonzero(np.bincount(self.groups + 1)[1:])]

    def usable_boxes(
        self, category_ids: list[int], plus_one: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, list[int]]]:
        """Collect the usable annotations as `annotations.usable_boxes` does, which see for what is returned.

        Positions of problems are those in this index.

        Args:
            category_ids: the category of each label; a category without annotations may be missing.
        """
        label_of = {category_id: label for label, category_id in enumerate(category_ids)}
        labels = np.array([label_of.get(category["id"], -1) for category in self.categories], dtype=np.int64)
        conditions = {
            "not an object": self.kinds == NO_OBJECT,
            "unknown image_id": self.owners < 0,
            "unknown category_id": self.groups < 0,
            "box is not 4 finite numbers": np.isnan(self.xywh[:, 0]),
        }
        good, problems = np.ones(len(self.owners), dtype=bool), {}
        for kind, condition in conditions.items():
            if len(found := np.flatnonzero(condition & good)):
                problems[kind] = found.tolist()
                good &= ~condition
        positions = np.flatnonzero(good & (self.kinds != CROWD))
        parts = []
        for begin in range(0, max(1, len(positions)), BLOCK):
            block = positions[begin : begin + BLOCK]
            owners, xywh = self.owners[block].astype(np.int64), self.xywh[block]
            boxes, keep, more = clip_boxes(xywh, owners, block, self.sizes, plus_one)
            parts.append((owners[keep], labels[self.groups[block[keep]]], boxes[keep]))
            for kind, where in more.items():
                problems.setdefault(kind, []).extend(where)
        owners, found, boxes = map(np.concatenate, zip(*parts, strict=True))
        return owners, found, boxes, {kind: where for kind, where in problems.items() if where}


def open_index(path: str | Path | Annotations) -> Index:
    """Return the index of annotations. That of a large COCO JSON file is mapped from the cache, if it is there already.

    The cache is the folder `vovnet_zoo/annotations` in XDG_CACHE_HOME or `~/.cache`. It is keyed by the content of the
    file, which is read again if the file's size or a time stamp has changed. Of several processes that ask at the same
    time, one parses the file.

    Raises:
        ValueError: the file as a whole, or an image or category in it, cannot be used; the message names the file.
    """
    if isinstance(path, Annotations):
        coco = path.read()
        return build_index(coco, Taken(), path.file, digest_of_content(coco))
    path = Path(path)
    if not path.is_file() or path.stat().st_size < KEPT_BYTES:
        return make_index(read_bytes(path, "annotation file"), path)
    try:
        cache = cache_folder() / "annotations"
    except OSError as error:
        logger.info("%s is parsed at each start: %s", path, error)
        return make_index(read_bytes(path, "annotation file"), path)
    note = cache / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}.json"
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(locked(note))
        except OSError as error:
            logger.info("%s cannot be written (%s), so %s is parsed at each start", cache, error.strerror, path)
            return make_index(read_bytes(path, "annotation file"), path)
        status = status_of(path)
        if (digest := noted(file, status)) and (index := read_index(cache, digest)):
            return index
        data = read_bytes(path, "annotation file")
        digest = hashlib.sha256(data).hexdigest()
        index = read_index(cache, digest) or make_index(data, path, digest)
        del data
        try:
            write_index(cache, index)
            if status_of(path) == status:  # as it was before it was read
                write_note(file, status, index.sha256)
        except OSError as error:
            logger.info("%s cannot be kept in %s (%s)", path, cache, error.strerror)
        return read_index(cache, index.sha256) or index


# ---- from the file to the index -------------------------------------------------------------------------------------


def make_index(data: bytes, path: Path, digest: str | None = None) -> Index:
    """Parse the content of the COCO JSON file `path`. Its SHA-256 may be given, which takes long to compute."""
    taken = Taken()
    coco = parse_annotations(data, path, taken)
    if coco["annotations"].count(TAKEN) != len(taken.images):  # something else in the file looks like an annotation
        coco = parse_annotations(data, path)
        taken = Taken()
    return build_index(coco, taken, path, digest or hashlib.sha256(data).hexdigest())


def build_index(coco: dict, taken: Taken, path: Path, digest: str) -> Index:
    """Turn the content of a COCO JSON into an index; `taken` holds the annotations in whose place `TAKEN` stands."""
    rows: list[Any] = coco["annotations"]
    categories = entries_by_id(coco["categories"], "categories", "name", path)
    images = entries_by_id(coco["images"], "images", "file_name", path)
    for image in images:
        if problem := image_problem(image):
            raise ValueError(f"{path}: {problem}")
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    category_ids = np.array([category["id"] for category in categories], dtype=np.int64)

    # Annotations that were taken are arrays already; the others are looked at one by one.
    owners, groups = np.full(len(rows), -1, dtype=np.int32), np.full(len(rows), -1, dtype=np.int32)
    xywh, kinds = np.full((len(rows), 4), np.nan), np.zeros(len(rows), dtype=np.uint8)
    others = [i for i, row in enumerate(rows) if row is not TAKEN]
    where = np.ones(len(rows), dtype=bool)
    where[others] = False
    owners[where] = find_all(image_ids, taken.images)
    groups[where] = find_all(category_ids, taken.categories)
    xywh[where] = np.frombuffer(taken.boxes, dtype=np.float64).reshape(-1, 4)
    kinds[where] = np.frombuffer(taken.crowds, dtype=np.uint8) * CROWD
    owner_of = {image_id: i for i, image_id in enumerate(image_ids.tolist())}
    group_of = {category_id: i for i, category_id in enumerate(category_ids.tolist())}
    for i in others:
        row = rows[i]
        if not isinstance(row, dict):
            kinds[i] = NO_OBJECT
            continue
        owners[i] = owner_of.get(value, -1) if type(value := row.get("image_id")) in NUMBERS else -1
        groups[i] = group_of.get(value, -1) if type(value := row.get("category_id")) in NUMBERS else -1
        if annotation_problem(row | {"image_id": 0, "category_id": 0}, (0,), (0,)) is None:
            xywh[i] = row["bbox"]
        kinds[i] = CROWD * is_crowd(row)

    names = np.array([image["file_name"] for image in images])
    sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64)
    kept = [{k: c[k] for k in ("id", "name", "supercategory") if k in c} for c in categories]
    order = np.argsort(owners, kind="stable")
    return Index(digest, kept, image_ids, names, sizes, owners[order], groups[order], xywh[order], kinds[order])


TAKEN = object()  # takes the place of an annotation


class Taken:
    """This function takes annotations, in the order of the file, into arrays, and leaves `TAKEN` in their place.

    It leaves every other object, and annotations that have anything unusual, as they are.
    """

    def __init__(self) -> None:
        self.images, self.categories, self.boxes, self.crowds = array("q"), array("q"), array("d"), bytearray()

    def __call__(self, entry: dict) -> Any:  # called 860,000 times for COCO, so each look-up counts
        box, image, category = entry.get("bbox"), entry.get("image_id"), entry.get("category_id")
        if type(image) is not int or type(category) is not int or type(box) is not list or len(box) != 4:
            return entry
        x, y, w, h = box
        if type(x) not in NUMBERS or type(y) not in NUMBERS or type(w) not in NUMBERS or type(h) not in NUMBERS:
            return entry
        if not (-1e30 < x < 1e30 and -1e30 < y < 1e30 and -1e30 < w < 1e30 and -1e30 < h < 1e30):
            return entry
        if not (-(2**63) <= image < 2**63 and -(2**63) <= category < 2**63):
            return entry
        self.images.append(image)
        self.categories.append(category)
        self.boxes.extend(box)
        self.crowds.append(is_crowd(entry))
        return TAKEN


def find_all(ids: np.ndarray, wanted: array) -> np.ndarray:
    """Return the position [A] of each wanted id in the ascending ids, or -1."""
    values = np.frombuffer(wanted, dtype=np.int64)
    places = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
    return np.where(ids[places] == values, places, -1)


# ---- the cache ------------------------------------------------------------------------------------------------------

ARRAYS = tuple(field.name for field in dataclasses.fields(Index) if field.name not in ("sha256", "categories"))


def read_index(cache: Path, digest: str) -> Index | None:
    """Map the index of a file with this SHA-256; None if the cache does not have it, or not undamaged."""
    folder = cache / f"{digest}-{VERSION}"
    try:
        about = json.loads((folder / "about.json").read_bytes())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        if about["checksums"] != {name: checksum(values) for name, values in arrays.items()}:
            raise ValueError("its checksums are others")
        with contextlib.suppress(PermissionError):  # of another user
            os.utime(folder)  # it was used
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is written anew", folder, error)
        arrays = {}  # Windows removes no file that is mapped
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Index(digest, about["categories"], **{name: np.asarray(values) for name, values in arrays.items()})


def write_index(cache: Path, index: Index) -> None:
    """Keep an index, and remove those that were not used for the longest time."""
    folder = cache / f"{index.sha256}-{VERSION}"
    if not folder.exists():
        with staged(folder) as new:
            arrays = {name: getattr(index, name) for name in ARRAYS}
            for name, values in arrays.items():
                np.save(new / f"{name}.npy", values)
            checksums = {name: checksum(values) for name, values in arrays.items()}
            about = {"categories": index.categories, "checksums": checksums}
            (new / "about.json").write_text(json.dumps(about), encoding="utf-8")
    used = {path: path.stat().st_mtime_ns for path in cache.glob(f"{'?' * 64}-*")}
    for old in sorted(used, key=used.__getitem__)[:-KEPT_FILES]:
        shutil.rmtree(old, ignore_errors=True)


def checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data)


@contextlib.contextmanager
def locked(note: Path) -> Iterator[IO[str]]:
    """Open the note on a file, and lock it against other processes, where the disk has locks."""
    with open(note, "a+", encoding="utf-8") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def status_of(path: Path) -> list[int]:
    """Return what changes when a file changes. A program can set the first time stamp back, but not the second."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def noted(file: IO[str], status: list[int]) -> str | None:
    """Return the SHA-256 that a note gives for a file of this status; None if it was written for another status."""
    file.seek(0)
    try:
        note = json.loads(file.read())
        return note["sha256"] if note["status"] == status else None
    except (ValueError, KeyError, TypeError):
        return None


def write_note(file: IO[str], status: list[int], digest: str) -> None:
    """Note the SHA-256 of a file, unless the file is so new that another change might leave its time stamps alike."""
    file.seek(0)
    file.truncate()
    if time.time_ns() - max(status[3:]) > CLOCK_NS:
        file.write(json.dumps({"status": status, "sha256": digest}))
        file.flush()
