"""`hold_out` keeps a part of a dataset's images for scoring, and writes the two parts down as COCO JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import write_whole
from ..words import counted
from .annotations import NUMBERS, Annotations, Source, digest_of, entries_by_id, file_of, read_annotations
from .formats.places import Split
from .inspection import Inspection, image_jobs, inspect_job, run_parallel, usable_cores
from .near import COLUMNS, ROWS, groups_of, joining_pairs, near_rows, same_pairs

logger = logging.getLogger(__name__)
PARTS = ("train", "val")


def hold_out(
    whole: Split, fraction: float, seed: int, folder: Path, *, workers: int | None = None, replace: bool = True
) -> dict[str, tuple[Path, Source]]:
    """Divide a dataset into "train" and "val", as `folder`/train.json and `folder`/val.json say.

    Images that are identical, or look the same, go into the same part. The files are written unless they are there
    already and say the same fraction, seed and annotations.

    Args:
        whole: the dataset, see `layouts.unsplit`.
        fraction: share of the images in "val", above 0 and below 1; a little less where groups do not fit.
        seed: decides which images these are.
        workers: processes that look at the images; None is one per core.
        replace: write over files that say another fraction, seed or annotations.

    Raises:
        ValueError: all images look the same, or there is only one; or there are such files, without `replace`.
    """
    about = {"val_fraction": fraction, "seed": seed, "of": digest_of(whole.source)}
    paths = {part: folder / f"{part}.json" for part in PARTS}
    told = [_told(path) for path in paths.values()]
    if other := next((x for x in told if x and x != about), None) if not replace else None:
        changes = [f"{key}: was {other.get(key)}, now {about[key]}" for key in about if about[key] != other.get(key)]
        raise ValueError(
            f"{folder} holds another split, which a run scored ({'; '.join(changes)}); give another --out, or go on "
            "all the same with --allow-changes"
        )
    if any(x != about for x in told):
        coco = read_annotations(whole.source)
        images = entries_by_id(coco["images"], "images", "file_name", file_of(whole.source))
        groups = look_alike(whole, [image["file_name"] for image in images], workers)
        chosen = {images[i]["id"] for i in choose(groups, fraction, seed, str(file_of(whole.source)))}
        folder.mkdir(parents=True, exist_ok=True)
        for part, path in paths.items():
            content = subset(coco, {image["id"] for image in images if (image["id"] in chosen) == (part == "val")})
            write_whole(path, json.dumps({"info": about, **content}).encode())
        logger.info(
            "kept for scoring: %d of %s, see %s and %s; %s others, and stay with them",
            *(len(chosen), counted(len(images), "image"), paths["train"], paths["val"]),
            counted(sum(len(g) for g in groups if len(g) > 1), "image looks like", "images look like"),
        )
    return {part: (whole.folder, _source(path, whole.source)) for part, path in paths.items()}


def _source(path: Path, whole: Source) -> Source:
    if isinstance(whole, Annotations) and whole.read_image is not None:
        return dataclasses.replace(whole, file=path, read=functools.partial(read_annotations, path))
    return path


def _told(path: Path) -> dict | None:
    """Read what a part says of its split; None where there is no such file, or it is damaged."""
    try:
        info = json.loads(path.read_bytes()).get("info")
    except (OSError, ValueError, AttributeError):
        return None
    return info if isinstance(info, dict) else None


def look_alike(split: Split, names: list[str], workers: int | None = None) -> list[list[int]]:
    """Divide the images of a split into groups of those that are identical or look the same."""
    jobs = image_jobs(split.folder, split.source, names)
    results = run_parallel(inspect_job, jobs, usable_cores() if workers is None else workers)
    seen: list[Inspection | None] = [None] * len(jobs)
    for i, result in tqdm(results, desc="compare images", total=len(jobs), unit="image", leave=False, disable=None):
        seen[i] = result
    looks = {i: x.thumbnail for i, x in enumerate(seen) if x is not None and x.thumbnail is not None}
    whole, thumbnails = list(looks), np.array(list(looks.values()), dtype=np.float32).reshape(-1, ROWS, COLUMNS)
    pairs = [(whole[i], whole[j]) for i, j in joining_pairs(near_rows(thumbnails), len(whole))]
    return groups_of(len(jobs), pairs + same_pairs([x.digest if x and x.digest else None for x in seen]))


def choose(groups: list[list[int]], fraction: float, seed: int, name: str) -> list[int]:
    """Choose groups at random that hold about this share of all items."""
    if len(groups) < 2:
        what = "its images look all the same" if groups and len(groups[0]) > 1 else "it has one image"
        raise ValueError(f"{name}: {what}, so none can be kept for scoring; give --val JSON")
    target = max(1, round(fraction * sum(map(len, groups))))
    chosen: list[int] = []
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    for i in order:
        if len(chosen) + len(groups[i]) <= target:
            chosen += groups[i]
    return sorted(chosen or min((groups[i] for i in order), key=len))


def subset(coco: dict, image_ids: set[int]) -> dict:
    """Keep these images and their annotations."""
    return {
        "images": [image for image in coco["images"] if image["id"] in image_ids],
        "annotations": [a for a in coco["annotations"] if isinstance(a, dict) and _owner(a) in image_ids],
        "categories": coco["categories"],
    }


def _owner(annotation: dict) -> float | None:
    return image_id if type(image_id := annotation.get("image_id")) in NUMBERS else None  # 12.0 is the image 12
