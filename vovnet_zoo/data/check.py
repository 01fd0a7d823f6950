"""This check finds everything that is wrong with a COCO-format dataset, in one pass, before a training."""

import json
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..words import counted
from .annotations import (
    Annotations,
    are_fractions,
    entry_problem,
    file_of,
    idle_categories,
    image_problem,
    is_crowd,
    read_annotations,
    repeated,
    usable_boxes,
)
from .dataset import in_order
from .formats.places import Split, is_image
from .formats.yolo import is_dataset_file
from .images import FORMATS, ImageError, check_size
from .inspection import Inspection, image_jobs, inspect_job, run_parallel, usable_cores
from .inspection import inspect_image as inspect_image  # its place before there was `inspection`
from .layouts import advice, candidates, choose_split, choose_whole
from .near import COLUMNS, ROWS, near_rows
from .sizes import Sizes, fit_sizes
from .transforms import resize_size

# error: the training stops; warning: the training runs, but maybe not as the user meant; info: good to know
KINDS = {  # kind: (severity, what to do)
    "no dataset": ("error", "see there for the layouts that are known"),
    "annotation file": ("error", "correct it; the whole message is below"),
    "category entry": ("error", "give every category an integer 'id' and a 'name'"),
    "image entry": ("error", "give every image 'id', 'file_name', 'width', 'height'"),
    "repeated category id": ("error", "number the categories differently"),
    "repeated image id": ("error", "number the images differently, annotations too"),
    "classes differ": ("error", "use the same names of classes in both"),
    "not split": ("error", "type --val-fraction 0.2, or name two files"),
    "no val split": ("error", "add one, or type --val-fraction 0.2"),
    "not an object": ("warning", "correct or remove it; training drops it"),
    "unknown image_id": ("warning", "use an id (a number) of 'images'; training drops it"),
    "unknown category_id": ("warning", "use an id (a number) of 'categories'; training drops it"),
    "box is not 4 finite numbers": ("warning", "write [left, top, width, height]; training drops it"),
    "no usable box": ("error", "correct the annotations: training can use none"),
    "no annotations": ("warning", "annotate something; only background is learnt"),
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
    "test in place of val": ("warning", "add a val split; it chooses the best model"),
    "dataset file in doubt": ("warning", "correct the file, or give another as DATA"),
    "left out": ("warning", "put its image there (HEIC: convert it), or remove it"),
    "empty box": ("warning", "correct or remove it; training drops it, a score counts it as missed"),
    "box outside the image": ("warning", "correct or remove it; training drops it, a score counts it as missed"),
    "box clipped to the image": ("warning", "correct it; are these corners? write width and height"),
    "box below one pixel": ("warning", "correct or remove it; are these fractions? write pixels"),
    "box that vanishes": ("warning", "train at a larger size; training drops it"),
    "repeated box": ("warning", "keep one of them"),
    "repeated annotation id": ("warning", "number the annotations differently"),
    "repeated class name": ("warning", "merge the categories, or rename one"),
    "repeated file name": ("warning", "merge the entries: each has the boxes of a part"),
    "same image twice": ("warning", "keep one, with the boxes of both"),
    "same image in train and val": ("warning", "remove it from one: val would score what was learnt"),
    "near copies": ("warning", "keep one, if they show the same objects"),
    "near copies in train and val": ("warning", "move them to one split: val would score what was learnt"),
    "pixels in doubt": ("warning", "look at it: the decoder complained; replace the file"),
    "rotation in doubt": ("warning", "see that the boxes fit the image as EXIF turns it"),
    "panorama": ("info", "cut it into parts if its objects are small"),
    "tiny image": ("info", "leave it out if it shows nothing"),
    "image without boxes": ("info", "used as background; --drop-empty leaves it out"),
    "class without boxes": ("info", "cannot be learnt, or scored; --drop-empty-classes leaves it out"),
    "classes numbered differently": ("info", "training matches them by name"),
    "category that is no class": ("info", "left out: it groups others, or is the background"),
    "crowd region": ("info", "not trained on"),
    "format unlike the name": ("info", "rename it, if other tools are to read it"),
    "file without entry": ("info", "not used"),
}
IN_FILES = {  # what to do instead, where each image has a file with its objects, as in YOLO and Pascal VOC
    "unknown category_id": "correct it there: no class is meant; training drops it",
    "box is not 4 finite numbers": "correct it there; training drops it",
    "boxes as fractions": "write pixels",
    "box clipped to the image": "correct it there",
    "box below one pixel": "correct or remove it",
}
EXAMPLE = 70  # characters in the table
CLASSES = 30  # lines of the table of classes
UNITS = {"images": "image", "boxes": "box", "classes": "class"}
SEVERITIES = ("error", "warning", "info")


def main(root: Path | None, *, json_out: Path | None = None, **options: Any) -> int:
    """Print the report on a dataset, write it to `json_out`, and return the exit status: 1 if there are errors.

    The options are arguments of `check_dataset`.
    """
    report = check_dataset(root, **options)
    print(report)
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps({"ok": report.ok, **asdict(report)}, indent=2), encoding="utf-8")
    return 0 if report.ok else 1


def check_dataset(
    root: str | Path | None,
    *,
    train: Path | None = None,
    train_images: Path | None = None,
    val: Path | None = None,
    val_images: Path | None = None,
    val_fraction: float | None = None,
    workers: int | None = None,
    progress: bool = True,
    min_size: int | None = None,
    max_size: int | None = None,
) -> "Report":
    """Check the annotations and decode every image of the splits that a training would use.

    Args:
        root: the dataset's folder or data.yaml, see `find_split`; None with `train` and `val`.
        train, train_images, val, val_images: a COCO JSON file for a split, and the folder of its images.
        val_fraction: check the whole dataset, of which a training with this option keeps a part for scoring.
        workers: processes that decode; None is one per core; 0 decodes in this process, which a faulty image may end.
        progress: show a progress bar on stderr.
        min_size, max_size: smallest shorter side and limit of the longer side in training, in pixels, see
            `train_transforms`; a box below one pixel at this size vanishes. None is what the preset `finetune` chooses
            for these boxes on this machine, see `fit_sizes`.

    The report holds every problem of the data; none of them is raised as an error. An argument that is out of range
    raises a ValueError; a RuntimeError says that no process could be started.
    """
    for name, value, least in (("workers", workers, 0), ("min_size", min_size, 1), ("max_size", max_size, 1)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}={value!r}: give a whole number of {least} or more")
    root = None if root is None else Path(root)
    notes: dict[tuple[str, str], list[str]] = defaultdict(list)  # (split, kind): examples
    files = {"train": (train, train_images), "val": (val, val_images)}
    splits: list[_Split] = []
    if val_fraction is None and root is not None and train is None and (text := _not_split(root)):
        notes["", "not split"].append(text)
    whole = val_fraction is not None or ("", "not split") in notes
    for name in ("train",) if whole else ("train", "val"):
        if found := _find(root, name, *files[name], whole, notes):
            known = [text for split in splits for _, text in split.classes]
            splits += [split] if (split := _check_annotations(name, found, known, notes)) else []
    sizes, why = _training_sizes(splits, min_size, max_size)
    for split in splits:
        _check_training_size(split, sizes.min_size[0], sizes.max_size, notes)
        if split.found.folder.is_dir():
            _check_folder(split, splits, notes)
    _check_images(splits, usable_cores() if workers is None else workers, progress, notes)
    if len(splits) > 1:
        _compare_classes(splits[0], splits[1], notes)

    # the report names the folder once, below the table
    folder = root.parent if root is not None and is_dataset_file(root) else root
    here = re.compile(rf"(?<!\S){re.escape(str(folder))}({re.escape(os.sep)}|: )")
    findings = [
        Finding(KINDS[kind][0], name, kind, len(items), _advice(kind, name, splits), [here.sub("", x) for x in items])
        for (name, kind), items in notes.items()
    ]
    order = list(KINDS)
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.split, order.index(finding.kind)))
    counts = {s.name: {"images": len(s.names), "boxes": len(s.boxes), "classes": len(s.classes)} for s in splits}
    return Report(
        str(root if root is not None else train),
        counts,
        findings,
        {s.name: here.sub("", s.found.how) for s in splits},
        {s.name: _class_counts(s) for s in splits},
        {s.name: _relative_sizes(s) for s in splits},
        why if splits else "",
    )


def _advice(kind: str, name: str, splits: list["_Split"]) -> str:
    """Say what to do about a kind of problem of a split, in words that fit the split and its format."""
    if (name, kind) == ("val", "no annotations"):
        return "annotate something; without boxes nothing can be scored"
    sources = [split.found.source for split in splits if split.name == name]
    in_files = any(isinstance(source, Annotations) and source.describe for source in sources)
    return IN_FILES.get(kind, KINDS[kind][1]) if in_files else KINDS[kind][1]


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
    recognised: dict[str, str] = field(default_factory=dict)  # how each split was recognised
    classes: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # split: class: its boxes, its images
    sizes: dict[str, list[float]] = field(default_factory=dict)  # split: see `_relative_sizes`
    trained: str = ""  # the sizes of images for which boxes were judged

    @property
    def ok(self) -> bool:
        """This is True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def __str__(self) -> str:
        rows = [("severity", "split", "kind", "count", "example", "what to do")] if self.findings else []
        rows += [
            (f.severity, f.split or "-", f.kind, str(f.count), _printable(f.items[0], EXAMPLE), f.advice)
            for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i == 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        cut = [f for f in self.findings if len(f.items[0]) > EXAMPLE]
        lines += [f"{f.severity}, {f.kind}: {_printable(f.items[0])}" for f in cut]
        lines += self._class_table()
        sums: Counter[str] = Counter()
        for finding in self.findings:
            sums[finding.severity] += finding.count
        found = [", ".join(counted(n, UNITS[unit]) for unit, n in counts.items()) for counts in self.splits.values()]
        for (name, how), text in zip(self.recognised.items(), found, strict=True):
            lines.append(f"{_printable(self.root)}: {name}: {text} ({_printable(how)})")
            if sizes := self.sizes[name]:
                small, middle, large = (f"{100 * size:.3g} %" for size in sizes)
                lines.append(
                    f"  box sides: 10 % are below {small} of the image's, 50 % below {middle}, 90 % below {large}"
                )
        lines += [f"{_printable(self.root)}: {self.trained}"] if self.trained else []
        summary = [
            counted(sums[name], noun) for name, noun in zip(SEVERITIES, ("error", "warning", "note"), strict=True)
        ]
        more = "; --json FILE lists each of them" if any(f.count > 1 for f in self.findings) else ""
        lines.append(f"{_printable(self.root)}: {', '.join(summary)}{more}")
        return "\n".join(lines)

    def _class_table(self) -> list[str]:
        """Write a line for each class: its boxes and images in each split; of many classes, those of fewest boxes."""
        names = list(dict.fromkeys(name for counts in self.classes.values() for name in counts))
        first = next(iter(self.classes.values()), {})
        shown = names if len(names) <= CLASSES else sorted(names, key=lambda name: first.get(name, [0, 0]))[:CLASSES]
        rows = [("class", *(f"{split} {what}" for split in self.classes for what in ("boxes", "images")))]
        rows += [
            (_printable(name, 40), *(str(n) for counts in self.classes.values() for n in counts.get(name, [0, 0])))
            for name in shown
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        left_out = len(names) - len(shown)
        return (lines if names else []) + (
            [f"... and {counted(left_out, 'class')} with more boxes"] if left_out else []
        )


# ---- annotations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """A split holds everything usable of its annotations."""

    name: str
    found: Split
    names: list[str]  # file name of each image
    sizes: np.ndarray  # int64 [N, 2] (height, width)
    classes: list[tuple[int, str]]  # id and name
    owners: np.ndarray  # int64 [A], image of each box
    labels: np.ndarray  # int64 [A], position in `classes`
    boxes: np.ndarray  # float32 [A, 4] xyxy
    mentioned: set[str]  # file names, including those of entries that cannot be used


def _find(
    root: Path | None, name: str, file: Path | None, images: Path | None, whole: bool, notes: dict
) -> Split | None:
    try:
        found = choose_whole(root, file, images) if whole else choose_split(root, name, file, images)
    except ValueError as error:
        if root is not None and not root.is_dir() and not is_dataset_file(root):
            notes["", "no dataset"] = [str(error)]
        elif ("", "no dataset") not in notes:
            notes[name, "no val split" if name == "val" else "no dataset"].append(str(error))
        return None
    if found.doubt:
        notes[name, "test in place of val"].append(found.doubt)
    if found.remarks:
        notes["", "dataset file in doubt"] = list(found.remarks)  # of train and val, they are the same
    if found.left_out:
        notes[name, "left out"] += found.left_out
    return found


def _not_split(root: Path) -> str | None:
    """Say that a dataset has no splits, and what to type; None if it has some, or nothing is found."""
    try:
        if not candidates(root, "") or any(candidates(root, split) for split in ("train", "val", "test")):
            return None
    except ValueError:  # which the search for "train" reports
        return None
    return f"no splits; {advice(root, 'train')}"


def _check_annotations(name: str, found: Split, known: list[str], notes: dict) -> _Split | None:
    file = file_of(found.source)
    try:
        coco = read_annotations(found.source)
    except ValueError as error:
        notes[name, "annotation file"].append(str(error))
        return None
    categories, bad_categories = _entries(coco["categories"], "category", "name", name, notes)
    idle = idle_categories(categories, coco["annotations"], known)
    categories = in_order([category for category in categories if category not in idle], known)
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
    describe = _describer(found, coco)
    for kind, where in problems.items():
        notes[name, kind] += [describe(positions[i]) for i in where]

    def note(kind, items):
        if items := list(items):
            notes[name, kind] += items

    note("category that is no class", (f"{category['name']} (id {category['id']})" for category in idle))
    crowds = [describe(i) for i in positions if _is_crowd(annotations[i])]
    note("crowd region", crowds)
    if len(crowds) > len(boxes):
        kind = "mostly crowd regions" if len(boxes) else "only crowd regions"
        note(kind, [f"{file}: {len(crowds)} of {counted(len(annotations), 'annotation')}"])
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
    if len(boxes) == len(crowds) == 0:
        kind = "no usable box" if annotations else "no annotations"
        note(kind, [f"{file}: of {counted(len(annotations), 'annotation')}"])
    classes = [(category["id"], category["name"]) for category in categories]
    mentioned = {os.path.normpath(name) for name in map(_file_name, coco["images"]) if name}
    return _Split(name, found, names, sizes, classes, owners, labels, boxes, mentioned)


def _compare_classes(train: _Split, val: _Split, notes: dict) -> None:
    if [text for _, text in train.classes] != [text for _, text in val.classes]:
        only = [f"only in {a.name}: {_list(set(a.classes) - set(b.classes))}" for a, b in ((train, val), (val, train))]
        notes["", "classes differ"].append("; ".join(only))
    elif train.classes != val.classes:
        twice = [f"{text}: {a} and {b}" for (a, text), (b, _) in zip(train.classes, val.classes, strict=True) if a != b]
        notes["", "classes numbered differently"].append("; ".join(twice))


def _class_counts(split: _Split) -> dict[str, list[int]]:
    boxes = np.bincount(split.labels, minlength=len(split.classes))
    pairs = np.unique(np.column_stack([split.labels, split.owners]), axis=0)
    images = np.bincount(pairs[:, 0], minlength=len(split.classes))
    twice = repeated(name for _, name in split.classes)
    names = [f"{name} ({i})" if name in twice else name for i, name in split.classes]  # as a score's classes are called
    return {name: [int(boxes[i]), int(images[i])] for i, name in enumerate(names)}


def _relative_sizes(split: _Split) -> list[float]:
    """Return the size of boxes as a share of their images' sides (roots of areas): 10 %, 50 % and 90 % quantiles."""
    if not len(split.boxes):
        return []
    areas = (split.boxes[:, 2:] - split.boxes[:, :2]).prod(axis=1) / split.sizes[split.owners].prod(axis=1)
    return [float(size) for size in np.quantile(np.sqrt(areas), [0.1, 0.5, 0.9])]


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


def _training_sizes(splits: list[_Split], min_size: int | None, max_size: int | None) -> tuple[Sizes, str]:
    """Choose the sizes of images in training, and say them in words."""
    known = None if min_size is None else (min_size, min_size)
    train = splits[0] if splits else None
    boxes, sizes = (train.boxes, train.sizes[train.owners]) if train else (np.zeros((0, 4)), np.zeros((0, 2)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, why = fit_sizes(boxes, sizes, device, min_size=known, max_size=max_size)
    low, high = found.min_size
    chosen = f", as the preset finetune trains here: {why}" if known is None else ""  # then `why` decides nothing
    text = f"boxes were judged for images of {low if low == high else f'{low} to {high}'} px on the shorter side"
    return found, f"{text} and at most {found.max_size} px on the longer one{chosen}"


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


def _check_folder(split: _Split, splits: list[_Split], notes: dict) -> None:
    """Note the image files that no split of the same folder mentions.

    A COCO JSON's folder of images is searched. For other formats, the folders that hold images of a split are, since
    all that these have in common may be the disk.
    """
    folder = split.found.folder
    beside = [other for other in splits if other.found.folder == folder]
    if split is not beside[-1]:
        return
    mentioned = set().union(*(other.mentioned for other in beside))
    places = {folder}
    if not all(isinstance(other.found.source, Path) for other in beside):
        places = {folder / os.path.dirname(name) for other in beside for name in other.names}
    for place in sorted(x for x in places if places.isdisjoint(x.parents)):
        for at, _, files in os.walk(place):
            for file in sorted(files):
                path = os.path.relpath(os.path.join(at, file), folder)
                if path not in mentioned and is_image(file):
                    notes[split.name, "file without entry"].append(path)


def _check_images(splits: list[_Split], workers: int, progress: bool, notes: dict) -> None:
    listed = {split.name: image_jobs(split.found.folder, split.found.source, split.names) for split in splits}
    paths = {name: [path for _, _, path in jobs] for name, jobs in listed.items()}
    by_path = {path: (read, name, path) for jobs in listed.values() for read, name, path in jobs}
    jobs = [by_path[path] for path in sorted(by_path)]
    results = run_parallel(inspect_job, jobs, workers)
    bar = tqdm(
        results, desc="images", total=len(jobs), unit="image", disable=not (progress and jobs), dynamic_ncols=True
    )
    found = {jobs[i][2]: result for i, result in bar}

    same: dict[bytes, dict[str, list[str]]] = defaultdict(dict)  # content: {path: its splits}
    for split in splits:
        for path, size in zip(paths[split.name], split.sizes.tolist(), strict=True):
            if (seen := found[path]) is None:
                notes[split.name, "crashing image"].append(f"{path}: decoding it ends the process")
            elif seen.problem:
                notes[split.name, seen.kind].append(seen.problem)
            else:
                try:
                    check_size(path, seen.size, tuple(size), file_of(split.found.source))
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
                same[seen.digest].setdefault(path, []).append(split.name)
    for where in same.values():
        for name in paths:
            if len(twice := [path for path, of in where.items() if name in of]) > 1:
                notes[name, "same image twice"].append(" = ".join(twice))
        if len({name for of in where.values() for name in of}) > 1:
            text = " = ".join(where)
            notes["", "same image in train and val"].append(text if len(where) > 1 else f"{text}: it is in both")
    # of identical images, the first stands for all
    _check_near(found, {path: of[0] for where in same.values() for path, of in list(where.items())[:1]}, notes)


def _check_near(found: dict[str, Inspection], split_of: dict[str, str], notes: dict) -> None:
    """Note each image that is a near copy once in its split, and once if there is one in the other split."""
    paths = sorted(path for path in split_of if found[path].thumbnail is not None)
    thumbnails = np.array([found[path].thumbnail for path in paths], dtype=np.float32).reshape(-1, ROWS, COLUMNS)
    in_val = np.array([split_of[path] == "val" for path in paths], dtype=bool)
    first = np.full((2, len(paths)), -1)  # of each image, the first near copy in its own and in the other split
    for i, later in near_rows(thumbnails):
        same = in_val[later] == in_val[i]
        for place, copies in ((0, later[same]), (1, later[~same])):
            fresh = copies[first[place, copies] < 0]
            first[place, fresh] = i
        if in_val[i] and first[1, i] < 0 and not same.all():  # the other split is noted by its images in val
            first[1, i] = later[~same][0]
    for j, path in enumerate(paths):
        if first[0, j] >= 0:
            notes[split_of[path], "near copies"].append(f"{paths[first[0, j]]} ~ {path}")
        if in_val[j] and first[1, j] >= 0:
            a, b = sorted((paths[first[1, j]], path))
            notes["", "near copies in train and val"].append(f"{a} ~ {b}")


# ---- text -----------------------------------------------------------------------------------------------------------


def _describer(found: Split, coco: dict) -> Callable[[int], str]:
    """Return the function that describes the annotation at a position, and names its image, or its own file."""
    annotations = coco["annotations"]
    images = [image for image in coco["images"] if isinstance(image, dict) and type(image.get("id")) is int]
    names = {image["id"]: _file_name(image) for image in images}
    own = found.source.describe if isinstance(found.source, Annotations) else None
    first: dict[int, int] = {}  # of each image, the position of its first object; the others follow it
    for i, a in enumerate(annotations if own else []):
        first.setdefault(a["image_id"], i)

    def describe(i: int) -> str:
        a = annotations[i]
        if not isinstance(a, dict):
            return f"annotations[{i}] is {reprlib.repr(a)}"
        name = names.get(image_id) if (image_id := _id(a.get("image_id"))) is not None else None
        if own and name:
            return own(name, i - first[a["image_id"]])
        parts = [f"{key} {reprlib.repr(a.get(key))}" for key in ("image_id", "category_id", "bbox")]
        return f"{f'{name}: ' if name else ''}annotations[{i}]: {', '.join(parts)}"

    return describe


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
