"""This module computes COCO's average precision of boxes, from detections that may lie on several ranks."""

import contextlib
import gc
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..arguments import check_flag, check_kind, check_number
from ..data import (
    Annotations,
    annotation_problem,
    entries_by_id,
    file_of,
    idle_categories,
    ids_of_texts,
    is_crowd,
    read_annotations,
)
from ..results import check_ids
from ..results import to_coco_results as to_coco_results  # its place before there was `results`
from ..words import counted

logger = logging.getLogger(__name__)
ID_KEYS = ("image_id", "category_id")
_hotcoco_process: int | None = None  # the process that has used hotcoco


def coco_metrics(
    annotations: str | Path | Annotations | COCO,
    results: list[dict],
    *,
    image_ids: Sequence[int] | None = None,
    max_dets: int = 100,
    engine: str = "pycocotools",
) -> dict:
    """Compute the COCO box metrics of result rows, as pycocotools does, but without printing.

    The annotation file may lack `info`, `area` (taken as width * height), `iscrowd` (taken as 0) and annotation ids.
    Annotations without a known image, a known category or four finite numbers as box are left out, with a warning.

    Args:
        annotations: path of a COCO JSON, `Annotations` of another format, or an open `pycocotools.coco.COCO`, which is
            left unchanged.
        results: rows of `to_coco_results`; where the file's ids are texts, these or the integers that stand for them.
        image_ids: score these images only, and ignore rows of other images; None scores all images of the file.
        max_dets: best detections per image that count.
        engine: "pycocotools", or "faster", which computes the same numbers sooner, see `load_engine`.

    Returns:
        A dict of `AP` (mean over IoU 0.50:0.95), `AP50`, `AP75`, `APs`, `APm`, `APl` (objects below 32^2, between, and
        above 96^2 square pixels), `AR1`, `AR10`, `AR{max_dets}` (with so many detections per image), `ARs`, `ARm`,
        `ARl`, and `per_class`, the AP by class name. Values are in 0..1, or -1 where there is no ground truth. A
        category that is no class (see `idle_categories`) is left out, unless a result names it.

    Raises:
        ValueError: a result names an unknown image or category, or has a number that is not finite; the message names
            the file.
    """
    return summarize(run_engine(annotations, results, image_ids=image_ids, max_dets=max_dets, engine=engine))


class EngineRun(NamedTuple):
    """An engine has scored result rows, with positions in these lists, from 0, in place of the file's ids."""

    run: COCOeval
    class_names: list[str]  # unique, in the order of the category ids
    category_ids: list[int]
    images: list[dict]  # entries of all images, in the order of their ids
    scored: list[int]  # positions of the images that were scored, in their order
    truth: list[dict]  # usable annotations; the engine calls the first one 1, and the first result row too
    results: list[dict]  # the result rows, whose ids are integers


def run_engine(
    annotations: str | Path | Annotations | COCO,
    results: list[dict],
    *,
    image_ids: Sequence[int] | None = None,
    max_dets: int = 100,
    engine: str = "pycocotools",
) -> EngineRun:
    """Match and count result rows; the arguments and errors are as for `coco_metrics`."""
    make_index, make_run = load_engine(engine)
    check_kind("annotations", annotations, (str, os.PathLike, Annotations, COCO), "a path or a COCO object")
    check_number("max_dets", max_dets, 1, 1_000_000, whole=True)
    check_rows(results, texts=not isinstance(annotations, COCO))
    if image_ids is not None:
        check_ids("image_ids", image_ids)
        image_ids = [int(image_id) for image_id in image_ids]  # of a tensor, too
    if isinstance(annotations, COCO):
        name, coco = "the COCO object", _without_numpy(annotations.dataset)
    else:
        name, coco = str(file_of(annotations)), read_annotations(annotations)
        results = with_numbers(results, annotations)
    categories = entries_by_id(coco["categories"], "categories", "name", name)
    idle = idle_categories(categories, [*coco["annotations"], *results])  # Roboflow's group of all classes is none
    class_names = _class_names([category for category in categories if category not in idle])
    images = entries_by_id(coco["images"], "images", "file_name", name)
    # engines get positions instead of ids, which may be of any size
    image_index = {image["id"]: i for i, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(class_names)}
    _check_results(results, image_index, label_of, name)
    if image_ids is not None and (unknown := set(image_ids) - image_index.keys()):
        raise ValueError(f"{name}: has no images with the ids {sorted(unknown)[:5]} that are to be scored")

    truth = [row for row in coco["annotations"] if not annotation_problem(row, image_index, label_of)]
    if dropped := len(coco["annotations"]) - len(truth):
        logger.warning("%s: %s left out of the ground truth", name, counted(dropped, "unusable annotation"))
    scored = sorted(image_index.values() if image_ids is None else {image_index[image_id] for image_id in image_ids})
    with contextlib.redirect_stdout(io.StringIO()), without_gc():
        expected = _index(make_index(), truth if scored else [], _area, image_index, label_of)
        found = _index(make_index(), results if scored else [], _box_area, image_index, label_of)
        run = make_run(expected, found, "bbox")
        if scored:  # "faster" would take no images as all images
            run.params.imgIds = scored
        run.params.maxDets = [n for n in (1, 10) if n < max_dets] + [max_dets]
        run.evaluate()
        run.accumulate()
    return EngineRun(run, list(class_names.values()), list(class_names), images, scored, truth, results)


def load_engine(name: str) -> tuple[Callable[..., COCO], Callable[..., COCOeval]]:
    """Return the two classes of an engine that stand for pycocotools' `COCO` and `COCOeval`.

    The engine "faster" is the package hotcoco, whose numbers equal pycocotools' to 1e-12.

    Raises:
        ValueError: the name is neither "pycocotools" nor "faster".
        ImportError, RuntimeError: as for `load_hotcoco`.
    """
    if name == "pycocotools":
        return COCO, COCOeval
    if name != "faster":
        raise ValueError(f"the engine's name is 'pycocotools' or 'faster', not {name!r}")
    hotcoco = load_hotcoco()
    return hotcoco.COCO, hotcoco.COCOeval


def fastest_engine() -> str:
    """Name the fastest engine of `load_engine` that can be used here. All give the same numbers."""
    try:
        load_engine("faster")
    except (ImportError, RuntimeError):
        return "pycocotools"
    return "faster"


def load_hotcoco() -> Any:
    """Import the package hotcoco (MIT), which computes in threads of its own.

    Raises:
        ImportError: it is not installed.
        RuntimeError: this process is a copy, made by fork, of one that has used it. The copy lacks the threads, and
            hotcoco would wait for them without end.
    """
    global _hotcoco_process
    try:
        import hotcoco
    except ImportError as error:
        raise ImportError("the engine 'faster' and reports need a package: pip install 'hotcoco>=1.3,<2'") from error
    if _hotcoco_process not in (None, os.getpid()):
        raise RuntimeError(
            "hotcoco was used before this process was forked, and would hang here; start processes with 'spawn' or "
            "'forkserver', or use engine 'pycocotools'"
        )
    _hotcoco_process = os.getpid()
    return hotcoco


def gather_results(
    results: list[dict], image_ids: Sequence[int], group: dist.ProcessGroup | None = None
) -> list[dict] | None:
    """Gather the result rows of all ranks on rank 0; the other ranks get None.

    Every rank must call this function, with any number of rows, or none. Where several ranks scored the same image,
    as samplers that pad make them do, only the rows of the first of these ranks are kept. With NCCL, set the rank's
    device before. Without torch.distributed the function returns the rows of this process.

    Args:
        results: rows of `to_coco_results`.
        image_ids: the images that this rank scored, each once, including images without detections.
        group: process group that contains rank 0; None is the default group.

    Raises:
        ValueError: a rank lists an image twice, or has rows of an image that it does not list; on rank 0 only.
    """
    check_rows(results)
    check_ids("image_ids", image_ids)
    own = (results, [int(image_id) for image_id in image_ids])
    if not (dist.is_available() and dist.is_initialized()):
        return _merge([own])
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0, group=group)
    return None if parts is None else _merge(parts)


def format_table(metrics: dict, per_class: bool = False) -> str:
    """Format the numbers of `coco_metrics` as two aligned lines and, with `per_class`, one more line per class."""
    check_kind("metrics", metrics, dict, "a dict that coco_metrics returns")
    check_flag("per_class", per_class)
    for name, value in (metrics | (metrics.get("per_class", {}) if per_class else {})).items():
        check_kind(f"metrics[{name!r}]", value, dict if name == "per_class" else (int, float), "a number")
    overall = {name: value for name, value in metrics.items() if name != "per_class"}
    lines = ["  ".join(f"{name:>5}" for name in overall), "  ".join(f"{score_text(v):>5}" for v in overall.values())]
    if per_class:
        lines += [f"{score_text(value):>5}  {name}" for name, value in metrics["per_class"].items()]
    return "\n".join(lines)


def with_numbers(results: list[dict], annotations: str | Path | Annotations) -> list[dict]:
    """Replace ids that are texts by the integers of `read_annotations`.

    Raises:
        ValueError: the file has no such id.
    """
    if not any(isinstance(row[key], str) for row in results for key in ID_KEYS):
        return results
    numbers = ids_of_texts(annotations if isinstance(annotations, Annotations) else Path(annotations))
    for key in ID_KEYS:
        if unknown := {row[key] for row in results if isinstance(row[key], str)} - numbers[key].keys():
            what = "images" if key == "image_id" else "categories"
            raise ValueError(
                f"{file_of(annotations)}: has no {what} with the ids {sorted(unknown)[:5]} that results name"
            )
    return [row | {key: numbers[key].get(row[key], row[key]) for key in ID_KEYS} for row in results]


def with_texts(results: list[dict], annotations: Path | Annotations) -> list[dict]:
    """Write ids in result rows as the annotation file has them, where it has texts, so that other tools know them."""
    texts = {key: {number: text for text, number in ids.items()} for key, ids in ids_of_texts(annotations).items()}
    if not any(texts.values()):
        return results
    return [row | {key: texts[key].get(row[key], row[key]) for key in ID_KEYS} for row in results]


def check_rows(results: list[dict], texts: bool = False) -> None:
    """Raise `ValueError` unless result rows are as `to_coco_results` makes them; their ids may be `texts` too."""
    check_kind("results", results, list, "a list of rows that to_coco_results returns")
    for row in results:
        check_kind("results", row, dict, "a list of dicts")
        if missing := {"image_id", "category_id", "bbox", "score"} - row.keys():
            raise ValueError(f"results must have {', '.join(sorted(missing))}, this row has not: {row!r:.200}")
        box = row["bbox"]
        numbers = [*box, row["score"]] if isinstance(box, list | tuple) and len(box) == 4 else [None]
        if not all(isinstance(x, int | float) for x in numbers):
            raise ValueError(f"results must have a bbox of 4 numbers and a score, this row has not: {row!r:.200}")
        for name in ID_KEYS:
            if not (texts and isinstance(row[name], str)):
                check_kind(f"results' {name}", row[name], int, "a whole number")


def summarize(scored: EngineRun) -> dict:
    """Average an engine's results as `coco_metrics` returns them.

    COCOeval.summarize would know no other limit than 100 detections.
    """
    run, class_names = scored.run, scored.class_names
    precision = run.eval["precision"][..., -1]  # [IoU, recall, class, area], areas: all, small, medium, large
    recall = run.eval["recall"]  # [IoU, class, area, limit]
    metrics: dict[str, Any] = {
        "AP": _mean(precision[:, :, :, 0]),
        "AP50": _mean(precision[0, :, :, 0]),
        "AP75": _mean(precision[5, :, :, 0]),
        **{f"AP{size}": _mean(precision[:, :, :, i]) for i, size in enumerate("sml", start=1)},
        **{f"AR{n}": _mean(recall[:, :, 0, i]) for i, n in enumerate(run.params.maxDets)},
        **{f"AR{size}": _mean(recall[:, :, i, -1]) for i, size in enumerate("sml", start=1)},
    }
    metrics["per_class"] = {
        class_name: _mean(precision[:, :, label, 0]) for label, class_name in enumerate(class_names)
    }
    return metrics


def _merge(parts: list[tuple[list[dict], list[int]]]) -> list[dict]:
    merged, done = [], set()
    for rank, (rows, image_ids) in enumerate(parts):
        own = set(image_ids)
        if len(own) < len(image_ids):
            twice = [image_id for image_id, n in Counter(image_ids).items() if n > 1]
            raise ValueError(f"rank {rank} scored images more than once: ids {twice[:5]}; drop the repeated ones")
        if stray := {row["image_id"] for row in rows} - own:
            raise ValueError(f"rank {rank} has results of images it does not list: ids {sorted(stray)[:5]}")
        merged += [row for row in rows if row["image_id"] not in done]
        done |= own
    return merged


def _index(
    index: COCO,
    rows: list[dict],
    area_of: Callable[[dict], float],
    image_index: dict[int, int],
    label_of: dict[int, int],
) -> COCO:
    """Fill an engine's empty index with ground truth or result rows.

    COCO.loadRes would fail where there are no rows.
    """
    index.dataset = {
        "images": [{"id": i} for i in image_index.values()],
        "categories": [{"id": label, "name": str(label)} for label in label_of.values()],
        "annotations": [
            {  # other keys of the row are left out, because engines give a meaning to some
                "id": i,  # from 1: id 0 means "not matched"
                "image_id": image_index[row["image_id"]],
                "category_id": label_of[row["category_id"]],
                "bbox": row["bbox"],
                "score": row.get("score", 0),
                "area": area_of(row),
                "iscrowd": int(is_crowd(row)),
            }
            for i, row in enumerate(rows, start=1)
        ],
    }
    index.createIndex()
    return index


def _without_numpy(value: Any) -> Any:
    """Return annotations made in memory as a JSON file has them: Python's numbers for NumPy's, and lists for arrays and
    tuples. Segmentations are left out."""
    if isinstance(value, dict):
        return {key: _without_numpy(x) for key, x in value.items() if key != "segmentation"}
    if isinstance(value, list | tuple):
        return [_without_numpy(x) for x in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


@contextlib.contextmanager
def without_gc():
    """Stop Python's search for reference cycles, which takes longer than making 500,000 rows, and finds none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _area(row: dict) -> float:
    area: Any = row.get("area")
    # engines silently ignore a ground truth whose area is beyond these limits
    return area if type(area) in (int, float) and 0 <= area <= 1e10 else _box_area(row)


def _box_area(row: dict) -> float:
    return row["bbox"][2] * row["bbox"][3]


def _class_names(categories: list[dict]) -> dict[int, str]:
    """Give each category id a unique class name."""
    repeated = Counter(category["name"] for category in categories)
    return {c["id"]: c["name"] if repeated[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}


def _check_results(results: list[dict], image_ids: dict, category_ids: dict, name: str) -> None:
    if unknown := {row["image_id"] for row in results} - image_ids.keys():
        raise ValueError(f"{name}: has no images with the ids {sorted(unknown)[:5]} that results name")
    if unknown := {row["category_id"] for row in results} - category_ids.keys():
        raise ValueError(f"{name}: has no categories with the ids {sorted(unknown)[:5]} that results name")
    for row in results:
        if not all(map(math.isfinite, (*row["bbox"], row["score"]))):
            raise ValueError(f"result of image {row['image_id']} not finite: bbox {row['bbox']}, score {row['score']}")


def _mean(values: np.ndarray) -> float:
    """Average the values of the classes that have ground truth; -1 if no class has."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def score_text(value: float) -> str:
    """Write a score with three digits, and "-" for the -1 that means that there is nothing to score."""
    return "-" if value < 0 else f"{value:.3f}"
