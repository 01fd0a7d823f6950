"""These functions count and weigh a detector's errors, with the package hotcoco: kinds, confusions, calibration.

hotcoco (MIT, needs only numpy) computes what TIDE defines (arXiv 2008.08115), and its AP equals pycocotools' to
the last bit; tidecv would bring OpenCV, pandas and seaborn.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .coco_eval import load_hotcoco
from .matches import Matches
from .thresholds import AT_IOU_50, is_kept

KINDS = {  # hotcoco's names of the kinds
    "Cls": "classification",  # IoU of at least 0.5 with an object of another class
    "Loc": "localisation",  # IoU of 0.1 to 0.5 with an object of its class
    "Both": "both",  # IoU of 0.1 to 0.5 with an object of another class
    "Dupe": "duplicate",  # of an object that a better detection has found
    "Bkg": "background",  # IoU below 0.1 with all objects
    "Miss": "missed",  # an object that no error of the kinds above is at
}


class Kind(NamedTuple):
    """A kind of error occurs so often, and AP50 would rise by `ap_lost` if it never did."""

    errors: int
    ap_lost: float


class Calibration(NamedTuple):
    """A detector is calibrated if, among detections of a score, the share that is right (IoU 0.5) equals the score.

    `error` is the expected calibration error: the mean distance of both, over all detections. The other fields list,
    for each tenth of the scores, the mean score, the share that is right, and the number of detections.
    """

    error: float
    score: list[float]
    right: list[float]
    detections: list[int]


def error_kinds(matches: Matches) -> dict[str, Kind]:
    """Sort all false detections and missed objects into the six kinds of TIDE, at an IoU of 0.5."""
    found = _run(matches, np.ones(len(matches.det_score), dtype=bool)).tide_errors(pos_thr=0.5, bg_thr=0.1)
    return {
        name: Kind(int(found["counts"].get(key, 0)), float(found["delta_ap"].get(key, 0.0)))
        for key, name in KINDS.items()
    }


def confusion_matrix(matches: Matches, thresholds: Mapping[str, float]) -> np.ndarray:
    """Count which class is taken for which, at an IoU of 0.5, among the detections that `thresholds` keep.

    Returns:
        int64 [K+1,K+1]; rows are the classes of objects, columns the classes of detections. The last column counts
        objects that nothing found, the last row detections where no object is. Detections in crowd regions are left
        out.
    """
    chosen = is_kept(matches, thresholds) & matches.det_counts[AT_IOU_50]
    found = _run(matches, chosen).confusion_matrix(iou_thr=0.5)
    return np.asarray(found["matrix"]).astype(np.int64)


def calibration(matches: Matches) -> Calibration:
    """Compare the scores of all detections with the share of them that is right, at an IoU of 0.5."""
    found = _run(matches, np.ones(len(matches.det_score), dtype=bool)).calibration(n_bins=10, iou_threshold=0.5)
    columns = [[row[key] for row in found["bins"]] for key in ("avg_confidence", "avg_accuracy", "count")]
    return Calibration(float(found["ece"]), *columns)


def _run(matches: Matches, chosen: np.ndarray) -> Any:
    """Evaluate some detections, bool [D], with hotcoco, which gets positions in place of ids."""
    hotcoco = load_hotcoco()
    truth = {
        "images": [{"id": i + 1, "width": 1, "height": 1} for i in range(len(matches.images))],
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(matches.class_names)],
        "annotations": [
            {
                **{"id": i + 1, "image_id": int(image) + 1, "category_id": int(label) + 1},
                **{"bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": int(not counts)},
            }
            for i, (image, label, box, counts) in enumerate(
                zip(matches.true_image, matches.true_label, matches.true_box, matches.true_counts, strict=True)
            )
        ],
    }
    rows = [
        {
            **{"image_id": int(matches.det_image[i]) + 1, "category_id": int(matches.det_label[i]) + 1},
            **{"bbox": matches.det_box[i].tolist(), "score": float(matches.det_score[i])},
        }
        for i in np.flatnonzero(chosen)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = hotcoco.COCO(truth)
        run = hotcoco.COCOeval(expected, expected.load_res(rows), "bbox")
        run.evaluate()
        run.accumulate()
    return run
