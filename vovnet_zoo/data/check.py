"""This check finds everything that is wrong with a COCO-format dataset, in one pass, before a training."""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import tempfile
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .annotations import (
    are_fractions,
    entry_problem,
    idle_categories,
    image_problem,
    is_crowd,
    read_annotations,
    repeated,
    usable_boxes,
)
from .dataset import find_split, split_candidates
from .images import FORMATS, ImageError, ImageWarning, check_size, decode_image, open_image, read_image_bytes
from .transforms import resize_size

# error: the training stops, or annotations refer to nothing; warning: the training runs, but maybe not as the user
# meant; info: good to know
KINDS = {  # kind: (severity, what to do)
    "no dataset": ("error", "see there for the layouts that are known"),
    "annotation file": ("error", "write it again as COCO JSON"),
    "category entry": ("error", "give every category an integer 'id' and a 'name'"),
    "image entry": ("error", "give every image 'id', 'file_name', 'width', 'height'"),
    "repeated category id": ("error", "number the categories differently"),
    "repeated image id": ("error", "number the images differently, annotations too"),
    "classes differ": ("error", "use the same categories in both files"),
    "not an object": ("error", "correct or remove it; training drops it"),
    "unknown image_id": ("error", "use an id (a number) of 'images'; training drops it"),
    "unknown category_id": ("error", "use an id (a number) of 'categories'; training drops it"),
    "box is not 4 finite numbers": ("error", "write [left, top, width, height]; training drops it"),
    "no usable box": ("error", "annotate something"),
    "only crowd regions": ("error", "write 'iscrowd': 0 for single objects; training stops"),
    "boxes as fractions": ("error", "write pixels: [left, top, width, height]"),
    "missing image file": ("error", "put the file there, or remove its entry"),
    "unreadable image file": ("error", "replace the file, or remove its entry"),
    "empty image file": ("error", "replace the file, or remove its entry"),
    "not an image": ("error", "replace or convert the file, or remove its entry"),
    "damaged image": ("error", "replace the file, or remove its entry"),
    "crashing image": ("error", "replace the file, or remove its entry"),
    "size unlike the JSON": ("error", "correct the JSON's size and boxes, or the file"),
    "mostly crowd regions": ("warning", "write 'iscrowd': 0 for single objects"),
    "no val split": ("warning", "add one, or score on other data"),
    "empty box": ("warning", "correct or remove it; training drops it"),
    "box outside the image": ("warning", "correct or remove it; training drops it"),
    "box clipped to the image": ("warning", "correct it; are these corners? write width and height"),
    "box below one pixel": ("warning", "correct or remove it; are these fractions? write pixels"),
    "box that vanishes": ("warning", "train at a larger size; training drops it"),
    "repeated box": ("warning", "keep one of them"),
    "repeated annotation id": ("warning", "number the annotations differently"),
    "repeated class name": ("warning", "merge the categories, or rename one"),
    "repeated file name": ("warning", "merge the entries: each has the boxes of a part"),
    "same image twice": ("warning", "keep one, with the boxes of both"),
    "same image in train and val": ("warning", "remove it from one: val would score what was learnt"),
    "pixels in doubt": ("warning", "look at it: the decoder complained; replace the file"),
    "rotation in doubt": ("warning", "see that the boxes fit the image as EXIF turns it"),
    "panorama": ("info", "cut it into parts if its objects are small"),
    "tiny image": ("info", "leave it out if it shows nothing"),
    "image without boxes": ("info", "used as background; drop_empty leaves it out"),
    "class without boxes": ("info", "cannot be learnt, or scored"),
    "category that is no class": ("info", "left out: it groups others, or is the background"),
    "crowd region": ("info", "not trained on"),
    "format unlike the name": ("info", "rename it, if other tools are to read it"),
    "file without entry": ("info", "not used"),
}
SEVERITIES = ("error", "warning", "info")
CHUNK = 16  # images per message to a worker


def main(root: Path, *, workers: int | None = None, json_out: Path | None = None) -> int:
    """Print the report on a dataset, write it to `json_out`, and return the exit status: 1 if there are errors."""
    report = check_dataset(root, workers=workers)
    print(report)
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    return 0 if report.ok else 1


def check_dataset(
    root: str | Path,
    *,
    workers: int | None = None,
    progress: bool = True,
    min_size: int = 640,
    max_size: int = 1333,
) -> "Report":
    """Check the annotations and decode every image of the train and val splits below `root`, see `find_split`.

    Args:
        workers: processes that decode; None is one per core; 0 decodes in this process, which a faulty image may end.
        progress: show a progress bar on stderr.
        min_size, max_size: smallest training size in pixels, see `train_transforms`; a box below one pixel at this size
            vanishes.

    The report holds every problem of the data; none of them is raised as an error. An argument that is out of range
    raises a ValueError.
    """
    for name, value, least in (("workers", workers, 0), ("min_size", min_size, 1), ("max_size", max_size, 1)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}={value!r}: give a whole number of {least} or more")
    root = Path(root)
    notes: dict[tuple[str, str], list[str]] = defaultdict(list)  # (split, kind): examples
    splits: list[_Split] = []
    for name in ("train", "val"):
        if found := _find(root, name, notes):
            known = {text for split in splits for _, text in split.classes}
            splits += [split] if (split := _check_annotations(name, *found, known, notes)) else []
    for split in splits:
        _check_training_size(split, min_size, max_size, notes)
        _check_folder(split, notes)
    _check_images(splits, _usable_cores() if workers is None else workers, progress, notes)
    if len({tuple(split.classes) for split in splits}) > 1:
        only = [f"only in {a.name}: {_list(set(a.classes) - set(b.classes))}" for a, b in (splits, splits[::-1])]
        notes["", "classes differ"].append("; ".join(only))

    # the report names the folder once, below the table
    here = re.compile(rf"(?<!\S){re.escape(str(root))}({re.escape(os.sep)}|: )")
    findings = [
        Finding(KINDS[kind][0], split, kind, len(items), KINDS[kind][1], [here.sub("", item) for item in items])
        for (split, kind), items in notes.items()
    ]
    order = list(KINDS)
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.split, order.index(finding.kind)))
    counts = {s.name: {"images": len(s.names), "boxes": len(s.boxes), "classes": len(s.classes)} for s in splits}
    return Report(str(root), counts, findings)


@dataclass(frozen=True)
class Finding:
    """A finding holds all problems of one kind in one split ("" for all splits)."""

    severity: str  # one of SEVERITIES
    split: str
    kind: str  # one of KINDS
    count: int
    advice: str  # what to do
    items: list[str]  # one text for each problem


@dataclass(frozen=True)
class Report:
    """The report lists the findings of `check_dataset`, the worst first.

    `str(report)` is a table, and `dataclasses.asdict(report)` can be written as JSON.
    """

    root: str
    splits: dict[str, dict[str, int]]  # numbers of images, usable boxes and classes of each split
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """This is True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def __str__(self) -> str:
        rows = [("severity", "split", "kind", "count", "example", "what to do")] if self.findings else []
        rows += [
            (f.severity, f.split or "-", f.kind, str(f.count), _printable(f.items[0], 70), f.advice)
            for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i == 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        sums: Counter[str] = Counter()
        for finding in self.findings:
            sums[finding.severity] += finding.count
        found = [", ".join(f"{n} {unit}" for unit, n in counts.items()) for counts in self.splits.values()]
        lines += [f"{_printable(self.root)}: {name}: {text}" for name, text in zip(self.splits, found, strict=True)]
        lines.append(
            f"{_printable(self.root)}: {sums['error']} errors, {sums['warning']} warnings, {sums['info']} notes"
        )
        return "\n".join(lines)


# ---- annotations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """A split holds everything usable of one annotation file."""

    name: str
    folder: Path
    file: Path
    names: list[str]  # file name of each image
    sizes: np.ndarray  # int64 [N, 2] (height, width)
    classes: list[tuple[int, str]]  # id and name
    owners: np.ndarray  # int64 [A], image of each box
    boxes: np.ndarray  # float32 [A, 4] xyxy
    mentioned: set[str]  # file names, including those of entries that cannot be used


def _find(root: Path, name: str, notes: dict) -> tuple[Path, Path] | None:
    try:
        missing = name == "val" and not split_candidates(root, name)
        return find_split(root, name)
    except ValueError as error:
        if not root.is_dir():
            notes["", "no dataset"] = [str(error)]
        else:
            notes[name, "no val split" if missing else "no dataset"].append(str(error))
        return None


def _check_annotations(name: str, folder: Path, file: Path, known: set[str], notes: dict) -> _Split | None:
    try:
        coco = read_annotations(file)
    except ValueError as error:
        notes[name, "annotation file"].append(str(error))
        return None
    categories, bad_categories = _entries(coco["categories"], "category", "name", name, notes)
    idle = idle_categories(categories, coco["annotations"], known)
    categories = [category for category in categories if category not in idle]
    images, bad_images = _entries(coco["images"], "image", "file_name", name, notes)
    names = [image["file_name"] for image in images]
    sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2)

    # annotations of a bad image or category entry are not judged until the entry is corrected
    annotations = coco["annotations"]
    waiting = [
        isinstance(a, dict) and (_id(a.get("image_id")) in bad_images or _id(a.get("category_id")) in bad_categories)
        for a in annotations
    ]
    positions = [i for i, waits in enumerate(waiting) if not waits]
    owners, labels, boxes, problems = usable_boxes(
        [annotations[i] for i in positions],
        {image["id"]: i for i, image in enumerate(images)},
        {category["id"]: label for label, category in enumerate(categories)},
        sizes,
    )
    for kind, where in problems.items():
        notes[name, kind] += [_describe(annotations, positions[i]) for i in where]

    def note(kind, items):
        if items := list(items):
            notes[name, kind] += items

    note("category that is no class", (f"{category['name']} (id {category['id']})" for category in idle))
    crowds = [_describe(annotations, i) for i in positions if _is_crowd(annotations[i])]
    note("crowd region", crowds)
    if len(crowds) > len(boxes):
        kind = "mostly crowd regions" if len(boxes) else "only crowd regions"
        note(kind, [f"{file}: {len(crowds)} of {len(annotations)} annotations"])
    ids = [a.get("id") for a in annotations if isinstance(a, dict)]
    note("repeated annotation id", map(str, repeated(i for i in ids if type(i) in (int, float, str))))
    note("repeated class name", repeated(category["name"] for category in categories))
    note("repeated file name", repeated(map(os.path.normpath, names)))
    note("image without boxes", (names[i] for i in np.flatnonzero(np.bincount(owners, minlength=len(names)) == 0)))
    per_class = np.bincount(labels, minlength=len(categories))
    note("class without boxes", (categories[i]["name"] for i in np.flatnonzero(per_class == 0)))
    rows, counts = np.unique(np.column_stack([owners, labels, boxes]), axis=0, return_counts=True)
    note("repeated box", (f"{names[int(row[0])]}: {_xyxy(row[2:])}" for row in rows[counts > 1]))
    if are_fractions(boxes, sizes):
        note("boxes as fractions", [f"{file}: all boxes lie in the first pixel"])
    else:
        thin = (boxes[:, 2:] - boxes[:, :2] < 1).any(axis=1)
        note("box below one pixel", (f"{names[owners[i]]}: {_xyxy(boxes[i])}" for i in np.flatnonzero(thin)))
    note("no usable box", [f"{file}: of {len(annotations)} annotations"] if len(boxes) == len(crowds) == 0 else [])
    classes = [(category["id"], category["name"]) for category in categories]
    mentioned = {os.path.normpath(name) for name in map(_file_name, coco["images"]) if name}
    return _Split(name, folder, file, names, sizes, classes, owners, boxes, mentioned)


def _entries(entries: list, what: str, text: str, split: str, notes: dict) -> tuple[list[dict], set[int]]:
    """Collect the usable images or categories in the order of their ids, and the ids of the others."""
    good: dict[int, dict] = {}
    bad: set[int] = set()
    for i, entry in enumerate(entries):
        problem = entry_problem(entry, text)
        entry_id = _id(entry.get("id")) if isinstance(entry, dict) else None
        if problem:
            problem = f"{'images' if what == 'image' else 'categories'}[{i}] {problem}"
        elif what == "image":
            problem = image_problem(entry)
        if problem or entry_id is None:
            notes[split, f"{what} entry"].append(problem)
            if entry_id is not None:
                bad.add(entry_id)
        elif entry_id in good:
            notes[split, f"repeated {what} id"].append(f"{entry_id}: {good[entry_id][text]}, {entry[text]}")
        else:
            good[entry_id] = entry
    if not entries:
        notes[split, f"{what} entry"].append("there is none")
    return [good[i] for i in sorted(good)], bad - good.keys()


def _check_training_size(split: _Split, min_size: int, max_size: int, notes: dict) -> None:
    sides = [resize_size(height, width, min_size, max_size) for height, width in split.sizes.tolist()]
    resized = np.array(sides, dtype=np.int64).reshape(-1, 2)
    scale = (resized / split.sizes)[split.owners][:, ::-1]  # [A, 2] in x, y
    gone = ((split.boxes[:, 2:] - split.boxes[:, :2]) * scale < 1).any(axis=1)  # as v2.SanitizeBoundingBoxes
    for i in np.flatnonzero(gone):
        owner = split.owners[i]
        height, width = resized[owner]
        item = f"{split.names[owner]}: {_xyxy(split.boxes[i])}, below a pixel at {width}x{height}"
        notes[split.name, "box that vanishes"].append(item)
    for kind, chosen in (
        ("panorama", resized.min(axis=1, initial=max_size) * 4 < min_size),
        ("tiny image", split.sizes.min(axis=1, initial=2**31) < 32),
    ):
        for i in np.flatnonzero(chosen):
            (height, width), (to_height, to_width) = split.sizes[i], resized[i]
            item = f"{split.names[i]}: {width}x{height}, trained at {to_width}x{to_height}"
            notes[split.name, kind].append(item)


# ---- images ---------------------------------------------------------------------------------------------------------


def _check_folder(split: _Split, notes: dict) -> None:
    endings = {ending for ending, format in Image.registered_extensions().items() if format in FORMATS}
    for folder, _, files in os.walk(split.folder):
        for file in sorted(files):
            path = os.path.relpath(os.path.join(folder, file), split.folder)
            if path not in split.mentioned and os.path.splitext(file)[1].lower() in endings:
                notes[split.name, "file without entry"].append(path)


def _check_images(splits: list[_Split], workers: int, progress: bool, notes: dict) -> None:
    paths = {
        split.name: [os.path.join(split.folder, os.path.normpath(name)) for name in split.names] for split in splits
    }
    jobs = sorted({path for of_split in paths.values() for path in of_split})
    results = run_parallel(inspect_image, jobs, workers)
    bar = tqdm(results, desc="images", total=len(jobs), unit="image", disable=not progress, dynamic_ncols=True)
    found = {jobs[i]: result for i, result in bar}

    same: dict[bytes, dict[str, str]] = defaultdict(dict)  # content: {path: split}
    for split in splits:
        for path, size in zip(paths[split.name], split.sizes.tolist(), strict=True):
            if (seen := found[path]) is None:
                notes[split.name, "crashing image"].append(f"{path}: decoding it ends the process")
            elif seen.problem:
                notes[split.name, seen.kind].append(seen.problem)
            else:
                try:
                    check_size(path, seen.size, tuple(size), split.file)
                except ImageError as error:
                    notes[split.name, error.kind].append(str(error))
                else:
                    # the size of an image that is square, or turned by 180 degrees, does not tell whether the boxes
                    # were turned too
                    if seen.orientation in (2, 3, 4) or (seen.orientation > 4 and size[0] == size[1]):
                        item = f"{path}: EXIF orientation {seen.orientation}"
                        notes[split.name, "rotation in doubt"].append(item)
                if seen.complaint:
                    notes[split.name, "pixels in doubt"].append(f"{path}: {seen.complaint}")
                expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
                if expected in FORMATS and expected != seen.format:
                    notes[split.name, "format unlike the name"].append(f"{path}: it is {seen.format}")
                same[seen.digest].setdefault(path, split.name)
    for where in same.values():
        for name in paths:
            if len(twice := [path for path, split in where.items() if split == name]) > 1:
                notes[name, "same image twice"].append(" = ".join(twice))
        if len(set(where.values())) > 1:
            notes["", "same image in train and val"].append(" = ".join(where))


class Inspection(NamedTuple):
    """An inspection holds the facts of one image file, or its problem."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)  # height, width
    format: str = ""
    orientation: int = 1  # the EXIF orientation
    problem: str = ""
    kind: str = ""  # the kind of the problem, one of KINDS
    complaint: str = ""  # the decoder's message about pixels that it had to make up


def inspect_image(path: str) -> Inspection:
    """Read and decode one file. This function runs in worker processes."""
    with warnings.catch_warnings(record=True) as warned:  # most are about metadata; missing pixels are errors
        warnings.simplefilter("always")
        try:
            data = read_image_bytes(path)
            with _c_stderr() as written:
                height, width = decode_image(data, path).shape[-2:]
        except ImageError as error:
            return Inspection(problem=str(error), kind=error.kind)
        with open_image(data) as image:
            format = "JPEG" if image.format == "MPO" else image.format
            digest, orientation = hashlib.blake2b(data, digest_size=16).digest(), _orientation(image)
        complaints = [line for line in written if "JPEG" in line]  # lines about TIFF concern metadata
        complaints += [str(x.message).removeprefix(f"{path}: ") for x in warned if x.category is ImageWarning]
        complaint = next(iter(complaints), "")
        return Inspection(digest, (height, width), format or "", orientation, complaint=complaint)


@contextlib.contextmanager
def _c_stderr() -> Iterator[list[str]]:
    """Collect the lines that C code writes to stderr: libjpeg reports damage in no other way.

    The list is empty until the context ends.
    """
    lines: list[str] = []
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata raises all kinds of errors
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def run_parallel(function: Callable, jobs: list, workers: int) -> Iterator[tuple[int, object]]:
    """Yield (position, `function(job)`) of each job as soon as it is done; None for a job that ends its process.

    A process that dies ends its whole pool, so the unfinished jobs of the pool are done again, one by one.
    """
    if workers == 0:
        yield from ((i, function(job)) for i, job in enumerate(jobs))
        return
    todo = deque(range(start, min(start + CHUNK, len(jobs))) for start in range(0, len(jobs), CHUNK))
    while todo:
        running: dict[Future, range] = {}
        try:
            with _pool(min(workers, len(todo))) as pool:
                while todo or running:
                    while todo and len(running) < 2 * workers:
                        future = pool.submit(_map, function, [jobs[i] for i in todo[0]])
                        running[future] = todo.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        results = future.result()
                        yield from zip(running.pop(future), results, strict=True)
        except BrokenProcessPool:
            suspects = deque(i for chunk in running.values() for i in chunk)
            while suspects:
                with _pool(1) as pool:
                    try:
                        while suspects:
                            result = pool.submit(function, jobs[suspects[0]]).result()
                            yield suspects.popleft(), result
                    except BrokenProcessPool:
                        yield suspects.popleft(), None


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def _map(function: Callable, jobs: list) -> list:
    return [function(job) for job in jobs]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- text -----------------------------------------------------------------------------------------------------------


def _describe(annotations: list, i: int) -> str:
    a = annotations[i]
    if not isinstance(a, dict):
        return f"annotations[{i}] is {reprlib.repr(a)}"
    parts = [f"{key} {reprlib.repr(a.get(key))}" for key in ("image_id", "category_id", "bbox")]
    return f"annotations[{i}]: {', '.join(parts)}"


def _printable(text: str, width: int | None = None) -> str:
    """Escape the characters that could confuse a terminal, and cut the text to `width` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if width is None or len(text) <= width else text[: width - 3] + "..."


def _xyxy(box: np.ndarray) -> str:
    return "box " + ", ".join(f"{v:.6g}" for v in box)


def _list(classes: set[tuple[int, str]]) -> str:
    return ", ".join(f"{name} ({i})" for i, name in sorted(classes)) or "none"


def _is_crowd(annotation: Any) -> bool:
    return isinstance(annotation, dict) and is_crowd(annotation)


def _file_name(entry: Any) -> str | None:
    return name if isinstance(entry, dict) and isinstance(name := entry.get("file_name"), str) else None


def _id(value: Any) -> int | None:
    return value if type(value) is int else None
