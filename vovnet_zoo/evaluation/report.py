"""`write_report` writes an analysis as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import CocoDataset
from .analysis import Analysis
from .charts import Chart, line_chart
from .galleries import galleries, photos
from .page import PHOTO_BYTES, render_page
from .statistics import dataset_statistics
from .thresholds import Choice, best_f1, curve, for_precision, for_recall

METRICS = ("AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def write_report(
    path: Path,
    analysis: Analysis,
    dataset: CocoDataset,
    *,
    title: str,
    train_set: CocoDataset | None = None,
    rows: Sequence[dict] = (),
    facts: Mapping[str, str] | None = None,
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page of an analysis: a single HTML file of less than 8 MB, for a browser with or without a network.

    Args:
        path: the file to write.
        analysis: of a detector's results on `dataset`.
        dataset: what was scored; its images are read for the galleries.
        title: of the page, such as the name of the model.
        train_set: what the detector was trained on, for the table of the datasets.
        rows: of the training run's `metrics.jsonl`, for its curves.
        facts: what was run: texts by name.
        commands: (what it does, the command line) of what can be done next.
    """
    chosen = galleries(analysis)
    splits = {"scored": dataset_statistics(dataset)}
    if train_set is not None:
        splits = {"trained on": dataset_statistics(train_set), **splits}
    render_page(
        path,
        "report.html",
        title=title,
        analysis=analysis,
        metrics=[(name, analysis.metrics[name]) for name in METRICS if name in analysis.metrics],
        classes=_classes(analysis),
        charts=_charts(analysis, rows),
        overall=_overall(analysis),
        galleries=chosen,
        photos=photos(chosen, dataset.read_image, PHOTO_BYTES),
        splits=splits,
        facts=dict(facts or {}),
        commands=commands,
    )


def _classes(analysis: Analysis) -> list[dict[str, Any]]:
    """Collect what the table of classes shows, a dict for each class."""
    matches, table = analysis.matches, []
    for label, name in enumerate(matches.class_names):
        points = curve(matches, label)
        best = best_f1(points)
        table.append(
            {
                "label": label,
                "name": name,
                "objects": points.objects,
                "interval": analysis.class_ap[name],
                "threshold": analysis.thresholds[name],
                **matches.class_metrics[name],
                **{key: getattr(best, key) if best else 0.0 for key in ("precision", "recall", "f1")},
            }
        )
    return table


def _overall(analysis: Analysis) -> list[tuple[str, Choice | None]]:
    """Choose thresholds for all classes together, for several wishes."""
    points = curve(analysis.matches)
    return [
        ("best F1, one threshold for each class", analysis.at_thresholds),
        ("best F1, one threshold for all", best_f1(points)),
        ("precision of 0.9", for_precision(points, 0.9)),
        ("precision of 0.95", for_precision(points, 0.95)),
        ("recall of 0.8", for_recall(points, 0.8)),
        ("recall of 0.9", for_recall(points, 0.9)),
    ]


def _charts(analysis: Analysis, rows: Sequence[dict]) -> list[Chart]:
    """Draw precision over recall, F1 over the threshold, calibration and, where there are rows, the run's curves."""
    matches, bins = analysis.matches, analysis.calibration
    curves = [(name, curve(matches, label), label) for label, name in enumerate(matches.class_names)]
    filled = [i for i, count in enumerate(bins.detections) if count]
    unit = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
    charts = [
        line_chart(
            "Precision and recall, IoU 0.5",
            "recall",
            "precision",
            [(name, points.recall, points.precision, label) for name, points, label in curves],
            **unit,
        ),
        line_chart(
            "F1 at each threshold, IoU 0.5",
            "score threshold",
            "F1",
            [(name, points.score, points.f1, label) for name, points, label in curves],
            **unit,
        ),
        line_chart(
            "Calibration",
            "mean score",
            "share that is right",
            [
                ("ideal", [0, 1], [0, 1], None),
                ("detections", [bins.score[i] for i in filled], [bins.right[i] for i in filled], None),
            ],
            **unit,
        ),
    ]
    for title, names in (("Losses of the run", ("loss", "loss_cls", "loss_box", "loss_ctr")), ("AP", ("AP", "AP50"))):
        series = []
        for name in names:
            points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float).reshape(-1, 2)
            series += [(name, points[:, 0], points[:, 1], None)] if len(points) > 1 else []
        if series:
            charts.append(line_chart(title, "step", title.split()[0].lower() if title != "AP" else "AP", series))
    return charts
