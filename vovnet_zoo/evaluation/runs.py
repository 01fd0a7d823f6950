"""These functions read what training runs left: the detections of their best model, their log, and what was scored."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import CocoDataset, Source, changed, difficult_as_crowd, without_classes
from ..data.layouts import choose_split, choose_whole
from ..files import read_json
from ..words import counted
from .coco_eval import check_rows

DETECTIONS = "best_detections.json"  # of the best model of a run, as COCO results
SKIPPED = "best_skipped.json"  # ids of the images that could not be read then, which were not scored
DATA = ("data", "val", "val_images", "val_fraction", "difficult_as_crowd", "drop_empty_classes")  # what was scored
SPLIT = ("train", "train_images", "seed")  # which images these are too, where a share of the training images is scored


TRAINED, VALIDATED = "train annotations", "val annotations"  # what run.json calls them


class Run(NamedTuple):
    """A run has result rows; a file of them has no log and no settings."""

    path: Path
    results: list[dict]
    log: list[dict]  # of metrics.jsonl
    settings: dict[str, Any]  # of run.json
    skipped: list[int]  # ids of images that were not scored
    annotations: str = ""  # that it was scored on, see `describe_annotations`; "" where they are not known


def read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Read run folders, or COCO results files, by a name that each has alone.

    Raises:
        ValueError: there is no such folder or file, or it holds something else.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        name, number = str(path), 1
        while name in runs:
            number += 1
            name = f"{path} ({number})"
        runs[name] = read_run(path)
    return runs


def read_run(path: Path) -> Run:
    """Read a run folder, or a COCO results file; the errors are as for `read_runs`."""
    if path.is_file():
        return Run(path, _read_results(path), [], {}, [])
    found = path / DETECTIONS
    if not found.is_file():
        inside = path.parent if (path.parent / DETECTIONS).is_file() else None
        hint = f"; {inside} has" if inside else ", so it is no folder of a training run with a report"
        raise ValueError(f"{path} has no {DETECTIONS}{hint}; eval_coco.py --out FILE writes the detections of a model")
    about = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    skipped = _read_skipped(path / SKIPPED) if (path / SKIPPED).is_file() else []
    annotations = (about.get("data") or {}).get(VALIDATED) or _of_thresholds(path / "best" / "thresholds.json")
    log, settings = read_log(path / "metrics.jsonl"), about.get("config") or {}
    return Run(path, _read_results(found), log, settings, skipped, annotations)


def _read_skipped(path: Path) -> list[int]:
    """Read the ids of the images that a run could not use."""
    try:
        ids = json.loads(path.read_bytes())
        if not isinstance(ids, list):
            raise ValueError(f"it holds a JSON {type(ids).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is no list of image ids: {error}; score the run again") from error
    return ids


def _of_thresholds(path: Path) -> str:
    """Describe the annotations by which thresholds were chosen; "" where there are none."""
    chosen = read_json(path) if path.is_file() else {}
    return f"{chosen['sha256']} {counted(chosen['images'], 'image')} of {chosen['file']}" if "sha256" in chosen else ""


def describe_annotations(dataset: CocoDataset) -> str:
    """Write the SHA-256 of a dataset's annotations, and in words what they are."""
    words = f"{counted(len(dataset), 'image')} and {counted(dataset.num_boxes, 'box')} of {dataset.annotation_file}"
    return f"{dataset.annotations_sha256} {words}"


HASH = re.compile("([0-9a-f]{64})( .*)?", re.DOTALL)  # with what it is of, which runs of earlier versions do not say


def decisive(text: str | None) -> str | None:
    """Return the part of a text about a run that must not change: of a hash and words, the hash."""
    found = HASH.fullmatch(text or "")
    return found[1] if found else text


def shown(text: str | None) -> str:
    """Write a text about a run for people: of a hash, its words and first digits."""
    found = HASH.fullmatch(text or "")
    if not found:
        return str(text)
    digits = f"SHA-256 {found[1][:8]}.."
    return f"{found[2].strip()} ({digits})" if found[2] else digits


def annotation_doubt(runs: Mapping[str, Run], dataset: CocoDataset) -> str:
    """Say on which annotations runs were scored, where these are not the ones of `dataset`; "" where all are."""
    known: dict[str, list[str]] = {}  # the names of the runs that were scored on the same annotations
    for name, run in runs.items():
        if run.annotations:
            known.setdefault(run.annotations, []).append(name)
    now = describe_annotations(dataset)
    if all(decisive(text) == decisive(now) for text in known):
        return ""
    each = "; ".join(f"{' and '.join(names)} scored on {shown(text)}" for text, names in known.items())
    return f"The annotations have changed: {each}. All models are scored here on {shown(now)}."


def scored_ids(dataset: CocoDataset, skipped: Collection[int]) -> list[int] | None:
    """List the ids of a dataset's images that are not among the skipped ones; None stands for all."""
    return [i for i in dataset.image_ids.tolist() if i not in skipped] if skipped else None


def read_log(path: Path) -> list[dict]:
    """Read the rows of a run's `metrics.jsonl`; a damaged line, like the last one of a killed run, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) and "step" in row else []
    return rows


def scored_set(runs: Sequence[Run]) -> CocoDataset:
    """Open the images on which all runs scored their models, as their run.json say.

    Raises:
        ValueError: a run does not say it, two runs say different images, or the images are not there any more.
    """
    for run in runs:
        if not run.settings:
            raise ValueError(f"{run.path} does not say which images were scored; give --data FOLDER or --val JSON")
        if (other := _scored(run)) != (first := _scored(runs[0])):
            differ = [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other.get(key)]
            raise ValueError(
                f"{runs[0].path} and {run.path} were scored on different images ({'; '.join(differ)}); where all "
                "detections are of the same images, name these by --data FOLDER or --val JSON"
            )
    try:
        return CocoDataset(*_place(runs[0]))
    except ValueError as error:
        raise ValueError(f"{runs[0].path / 'run.json'} names these images: {error}; or give --data or --val") from error


def _scored(run: Run) -> dict[str, Any]:
    """Collect the settings that say which images a run scores."""
    keys = DATA + (SPLIT if run.settings.get("val_fraction") is not None else ())
    return {key: run.settings.get(key) for key in keys}


def _place(run: Run) -> tuple[Path, Source]:
    """Find the folder and the annotations of the images that a run scores."""
    settings = run.settings
    data, val, val_images, train, train_images = (
        Path(settings[key]) if settings.get(key) else None
        for key in ("data", "val", "val_images", "train", "train_images")
    )
    folder: Path
    source: Source
    if settings.get("val_fraction") is None:
        found = choose_split(data, "val", val, val_images, "put the dataset back")
        folder, source = found.folder, found.source
    else:
        folder, source = choose_whole(data, train, train_images).folder, run.path / "split" / "val.json"
    if settings.get("difficult_as_crowd"):
        source = changed(source, difficult_as_crowd)
    if settings.get("drop_empty_classes"):
        known = read_json(run.path / "best" / "config.json").get("class_names") or []
        unknown = tuple(name for name in CocoDataset(folder, source).class_names if name not in known)
        source = changed(source, functools.partial(without_classes, names=unknown)) if unknown else source
    return folder, source


def _read_results(path: Path) -> list[dict]:
    """Read a COCO results file."""
    try:
        rows = json.loads(path.read_bytes())
        if isinstance(rows, Mapping):
            raise ValueError("it holds one object, as a file of annotations does, and no list")
        check_rows(rows, texts=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of detections in COCO's results format: {error}") from error
    return rows
