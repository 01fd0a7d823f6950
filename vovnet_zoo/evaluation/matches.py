"""`match` says which detection found which object, as pycocotools matched them, in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from ..data import Annotations, is_crowd
from .coco_eval import fastest_engine, run_engine, summarize, without_gc

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = ("s", "m", "l")  # below 32^2, between, and above 96^2 square pixels


@dataclass(frozen=True)
class Matches:
    """The matches of detections and objects at 10 IoU thresholds, 0.50 to 0.95.

    I images, K classes, G objects ("true_"), D detections ("det_"). Boxes are xywh in pixels of the image. A crowd
    region is no object to be found, and a detection in it is neither right nor wrong: both do not count.
    """

    class_names: list[str]  # K
    category_ids: list[int]  # K, of the annotation file
    images: list[dict]  # I entries of the annotation file, only images that were scored
    true_image: np.ndarray  # int [G], 0..I-1
    true_label: np.ndarray  # int [G], 0..K-1
    true_box: np.ndarray  # float [G,4]
    true_counts: np.ndarray  # bool [G], False for a crowd region
    det_image: np.ndarray  # int [D]
    det_label: np.ndarray  # int [D]
    det_box: np.ndarray  # float [D,4]
    det_score: np.ndarray  # float [D]
    det_true: np.ndarray  # int [10,D], the object that the detection found, or -1
    det_counts: np.ndarray  # bool [10,D]
    metrics: dict  # of `coco_metrics`
    class_metrics: dict[str, dict[str, float]]  # AP, AP50, APs, APm, APl, AR of each class; -1 without objects

    @property
    def is_right(self) -> np.ndarray:
        """Say for each IoU threshold and detection whether it found an object that counts, bool [10,D]."""
        return (self.det_true >= 0) & self.det_counts

    def by_score(self, label: int) -> np.ndarray:
        """Return the positions of the detections of a class, the best score first, in pycocotools' order."""
        of_class = np.flatnonzero(self.det_label == label)
        return of_class[np.argsort(-self.det_score[of_class], kind="stable")]


def match(
    annotations: str | Path | Annotations | COCO,
    results: list[dict],
    *,
    image_ids: Sequence[int] | None = None,
    max_dets: int = 100,
) -> Matches:
    """Match result rows with the objects of an annotation file; arguments and errors are as for `coco_metrics`."""
    engine = fastest_engine()
    scored = run_engine(annotations, results, image_ids=image_ids, max_dets=max_dets, engine=engine)
    run, truth, chosen = scored.run, scored.truth, scored.scored
    image_of = {image["id"]: i for i, image in enumerate(scored.images)}
    label_of = {category_id: label for label, category_id in enumerate(scored.category_ids)}
    place = np.full(len(scored.images), -1)  # of each image among the scored ones
    place[chosen] = np.arange(len(chosen))

    # Objects of images that were not scored are left out.
    owner = np.array([place[image_of[row["image_id"]]] for row in truth], dtype=np.int64)
    kept = np.flatnonzero(owner >= 0)
    objects = [truth[i] for i in kept]
    true_of = np.full(len(truth) + 1, -1)  # by the engine's number of an object, which is 0 for none
    true_of[kept + 1] = np.arange(len(kept))

    # The engine lists its matches by class, image and object size, in an order of its own; the first size is any.
    metrics, precision, recall = summarize(scored), run.eval["precision"][..., -1], run.eval["recall"][..., -1]
    any_size = list(run.params.areaRng[0])
    if engine == "faster":  # its lists of all sizes would take 8 GiB for COCO's val
        run.params.areaRng = [any_size]
        run.evaluate()
    with without_gc():
        parts = [
            entry for entry in run.evalImgs if entry is not None and entry["dtIds"] and list(entry["aRng"]) == any_size
        ]
    parts.sort(key=itemgetter("category_id", "image_id"))
    rows = [scored.results[int(number) - 1] for entry in parts for number in entry["dtIds"]]
    empty = [np.zeros((len(IOU_THRESHOLDS), 0))]
    matched = np.concatenate([entry["dtMatches"] for entry in parts] or empty, axis=1).astype(np.int64)
    ignored = np.concatenate([entry["dtIgnore"] for entry in parts] or empty, axis=1).astype(bool)
    return Matches(
        class_names=scored.class_names,
        category_ids=scored.category_ids,
        images=[scored.images[i] for i in chosen],
        true_image=owner[kept],
        true_label=np.array([label_of[row["category_id"]] for row in objects], dtype=np.int64),
        true_box=np.array([row["bbox"] for row in objects], dtype=np.float64).reshape(-1, 4),
        true_counts=np.array([not is_crowd(row) for row in objects], dtype=bool),
        det_image=np.array([place[image_of[row["image_id"]]] for row in rows], dtype=np.int64),
        det_label=np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
        det_box=np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        det_score=np.array([row["score"] for row in rows], dtype=np.float64),
        det_true=true_of[matched],
        det_counts=~ignored,
        metrics=metrics,
        class_metrics=_class_metrics(precision, recall, scored.class_names),
    )


def _class_metrics(
    precision: np.ndarray, recall: np.ndarray, class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Average the engine's precision [IoU,recall,K,size] and recall [IoU,K,size] for each class."""
    return {
        name: {
            "AP": float(precision[:, :, label, 0].mean()),
            "AP50": float(precision[0, :, label, 0].mean()),
            **{f"AP{size}": float(precision[:, :, label, i].mean()) for i, size in enumerate(SIZES, start=1)},
            "AR": float(recall[:, label, 0].mean()),
        }
        for label, name in enumerate(class_names)
    }
