"""`compare_runs` compares training runs, and writes the comparison as one page that needs no network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import CocoDataset, changed
from ..data import difficult_as_crowd as change_difficult
from ..data.layouts import OTHER_SPLIT, choose_split
from ..version import __version__
from .charts import Chart, line_chart
from .compare import Comparison, compare, format_comparison
from .galleries import MOST, Figure, Gallery, make_figure, photos
from .page import PHOTO_BYTES, load_jinja2, render_page
from .runs import Run, annotation_doubt, read_runs, scored_ids, scored_set
from .thresholds import curve, is_kept, mistakes

METRICS = ("AP50", "AP75", "APs", "APm", "APl", "AR100")


def compare_runs(
    paths: Sequence[Path],
    out: Path,
    *,
    data: Path | None = None,
    split: str = "val",
    val: Path | None = None,
    val_images: Path | None = None,
    difficult_as_crowd: bool = False,
) -> str:
    """Compare training runs, or files of detections, write the page `out`, and return the comparison as text.

    Args:
        paths: run folders, or COCO results files, of which the first is the one that others are compared with.
        out: the file to write; its folder is made.
        data, split: dataset and split that were scored. Without it and `val`, the runs say what was scored.
        val, val_images: COCO JSON file and folder of the images that were scored, instead of `data`.
        difficult_as_crowd: the objects of `data` that Pascal VOC calls difficult were not scored.

    Raises:
        ValueError: a run has no detections, or they are of other images.
        ImportError: jinja2 is not installed.
    """
    load_jinja2()
    runs = read_runs(paths)
    if data is None and val is None:
        dataset = scored_set(list(runs.values()))
    else:
        found = choose_split(data, split, val, val_images, OTHER_SPLIT)
        dataset = CocoDataset(
            found.folder, changed(found.source, change_difficult) if difficult_as_crowd else found.source
        )
    skipped = {image_id for run in runs.values() for image_id in run.skipped}
    results = {name: run.results for name, run in runs.items()}
    comparison = compare(dataset.annotations, results, image_ids=scored_ids(dataset, skipped))
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": f"{dataset.annotation_file} (SHA-256 {dataset.annotations_sha256[:16]}..)",
        "images": f"{len(comparison.models[0].matches.images)} of {dataset.images_dir}",
        "version": f"vovnet_zoo {__version__}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    doubt = annotation_doubt(runs, dataset)
    write_comparison(out, comparison, dataset, runs, facts, doubt)
    return format_comparison(comparison) + (f"\n! {doubt}" if doubt else "")


def write_comparison(
    path: Path,
    comparison: Comparison,
    dataset: CocoDataset,
    runs: Mapping[str, Run],
    facts: Mapping[str, str],
    doubt: str = "",
) -> None:
    """Write the page of a comparison: a single HTML file, for a browser with or without a network.

    Args:
        path: the file to write.
        comparison: of models on `dataset`.
        dataset: what was scored; its images are read for the gallery.
        runs: of the models, by name, for their curves and settings.
        facts: what was run: texts by name.
        doubt: a sentence about what the scores may not mean, see `annotation_doubt`.
    """
    first = comparison.models[0].matches
    chosen = [differing_images(comparison)]
    render_page(
        path,
        "compare.html",
        title=" and ".join(model.name for model in comparison.models),
        comparison=comparison,
        doubt=doubt,
        metrics=METRICS,
        classes=[
            {"label": label, "name": name, "objects": int((first.true_counts & (first.true_label == label)).sum())}
            for label, name in enumerate(first.class_names)
        ],
        charts=_charts(comparison, runs),
        settings=differing_settings(runs),
        galleries=chosen,
        photos=photos(chosen, dataset.read_image, PHOTO_BYTES),
        facts=dict(facts),
    )


def differing_images(comparison: Comparison) -> Gallery:
    """Choose the images in which the models' numbers of errors differ most, with a figure for each model."""
    errors = comparison.errors()  # [M,I]
    spread = errors.max(axis=0) - errors.min(axis=0)
    order = np.argsort(-spread, kind="stable")[: max(1, MOST // len(errors))]
    figures = []
    for image in order[spread[order] > 0].tolist():
        figures += _figures(comparison, image)
    return Gallery(
        "Images where they differ most",
        "The images whose numbers of errors differ most. Errors are missed objects and false detections, at each "
        "model's own thresholds and an IoU of 0.5; their boxes are thick.",
        figures,
    )


def differing_settings(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Collect the settings in which training runs differ: a text for each run, by the name of the setting."""
    known = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for settings in known for name in settings if name != "out")
    rows = {name: ["–" if name not in settings else str(settings[name]) for settings in known] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _figures(comparison: Comparison, image: int) -> list[Figure]:
    """Make a figure of an image for each model; a class filter shows all of them or none."""
    figures = []
    for model in comparison.models:
        matches, kept = model.matches, is_kept(model.matches, model.thresholds)
        missed, false = mistakes(matches, kept)
        missed, false = missed[matches.true_image[missed] == image], false[matches.det_image[false] == image]
        caption = f"{model.name}: {len(missed)} missed, {len(false)} false"
        figures.append(make_figure(matches, kept, image, missed.tolist(), false.tolist(), caption, whole=True))
    labels = sorted({label for figure in figures for label in figure.labels})
    return [figure._replace(labels=labels) for figure in figures]


def _charts(comparison: Comparison, runs: Mapping[str, Run]) -> list[Chart]:
    """Draw the curves of all models over each other, and the runs' AP and loss where they have a log."""
    curves = [(model.name, curve(model.matches)) for model in comparison.models]
    unit: dict[str, Any] = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
    charts = [
        line_chart(
            "Precision and recall of all classes, IoU 0.5",
            "recall",
            "precision",
            [(name, points.recall, points.precision, None) for name, points in curves],
            **unit,
        ),
        line_chart(
            "F1 at each threshold for all classes, IoU 0.5",
            "score threshold",
            "F1",
            [(name, points.score, points.f1, None) for name, points in curves],
            **unit,
        ),
    ]
    for title, key in (("AP in training", "AP"), ("Loss in training", "loss")):
        series = []
        for name, run in runs.items():
            points = np.array([(row["step"], row[key]) for row in run.log if isinstance(row.get(key), int | float)])
            series += [(name, points[:, 0], points[:, 1], None)] if len(points) > 1 else []
        if series:
            charts.append(line_chart(title, "step", key, series))
    return charts
