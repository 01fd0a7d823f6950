"""These functions write a detector's report, and store thresholds in its config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import environment, log
from vovnet_zoo.commands import command_line
from vovnet_zoo.data import CocoDataset, find_split, split_candidates
from vovnet_zoo.evaluation.analysis import Analysis, analyse
from vovnet_zoo.evaluation.coco_eval import load_hotcoco
from vovnet_zoo.evaluation.report import write_report
from vovnet_zoo.evaluation.runs import DETECTIONS, read_run, scored_ids
from vovnet_zoo.evaluation.thresholds import any_right
from vovnet_zoo.fcos import check_thresholds
from vovnet_zoo.files import read_json, write_whole
from vovnet_zoo.hub import CONFIG
from vovnet_zoo.words import counted


def report_run(folder: Path, rows: Sequence[dict], train_set: CocoDataset, val_set: CocoDataset) -> None:
    """Write `report.html` at the end of a run, and thresholds into the config of `best`.

    An error is logged, since the run is complete.
    """
    try:
        load_hotcoco()
        if not (folder / DETECTIONS).is_file():  # the best model is of a version that did not keep its detections
            log.warning("no report, since %s is not there; eval_coco.py --report FILE writes one", folder / DETECTIONS)
            return
        run = read_run(folder)
        analysis = analyse(val_set.annotations, run.results, image_ids=scored_ids(val_set, run.skipped))
        if any_right(analysis.matches):
            save_thresholds(folder / "best", analysis, val_set)
        write_page(folder / "report.html", analysis, str(folder / "best"), val_set, train_set, rows)
    except Exception as error:
        log.warning("the run is complete, but its report could not be written: %s", error)


def save_thresholds(folder: Path, analysis: Analysis, dataset: CocoDataset) -> None:
    """Store the threshold of each class in the config.json of a saved model, and how it was chosen beside it.

    Raises:
        ValueError: no detection is right, so that there is nothing to choose by; or the model has no class names.
    """
    if not any_right(analysis.matches):
        raise ValueError(
            f"{dataset.annotation_file}: no detection is right, so no thresholds can be chosen for {folder}"
        )
    matches, config = analysis.matches, read_json(folder / CONFIG)
    own = dict(zip(dataset.category_ids, dataset.class_names, strict=True))  # the model's classes
    chosen = {
        own[category_id]: analysis.thresholds[name]
        for category_id, name in zip(matches.category_ids, matches.class_names, strict=True)
        if category_id in own
    }
    config["thresholds"] = check_thresholds(chosen, config.get("class_names"), "thresholds")
    about = {
        "chosen": "for each class, the score with the best F1, at an IoU of 0.5",
        "file": dataset.annotation_file.name,
        "sha256": dataset.annotations_sha256,
        "images": len(matches.images),
        "precision": analysis.at_thresholds.precision,
        "recall": analysis.at_thresholds.recall,
        "f1": analysis.at_thresholds.f1,
        "thresholds": chosen,
    }
    write_whole(folder / CONFIG, json.dumps(config, sort_keys=True, indent=2).encode())
    write_whole(folder / "thresholds.json", json.dumps(about, indent=2).encode())
    number = counted(len(chosen), "class")
    log.info("thresholds of %s, with an F1 of %.3f, in %s", number, about["f1"], folder / CONFIG)


def write_page(
    path: Path,
    analysis: Analysis,
    model: str,
    dataset: CocoDataset,
    train_set: CocoDataset | None = None,
    rows: Sequence[dict] = (),
    is_model: bool = True,
) -> None:
    """Write the page of an analysis, with what was run and how to go on.

    Args:
        is_model: `model` names a detector, and not a file of its detections, with which nobody can go on.
    """
    run, name = environment(), command_line([model])
    facts = {
        "command": command_line(run["command"]),
        "time": run["time"],
        "model" if is_model else "detections": model,
        "data": f"{dataset.annotation_file} (SHA-256 {dataset.annotations_sha256[:16]}..)",
        "images": f"{len(analysis.matches.images)} of {dataset.images_dir}",
        "machine": f"{run['machine']}; {run['cpu']['model']}",
        "versions": ", ".join(f"{k} {v}" for k, v in {"python": run["python"], **run["versions"]}.items()),
        **({"commit": run["git"]} if run["git"] else {}),
    }
    code = f'model = vovnet_zoo.FCOS.from_pretrained({model!r})\nvovnet_zoo.predict(model, "photo.jpg")'
    commands = [
        ("Detect objects in a folder of images:", f"vovnet-zoo predict photos --model {name} --out found"),
        ("The same in Python:", f"import vovnet_zoo\n\n{code}"),
        ("Publish the model on the Hugging Face Hub:", f"vovnet-zoo publish {name} ORGANISATION/NAME"),
    ]
    options: dict[str, Any] = dict(train_set=train_set, rows=rows, facts=facts, commands=commands if is_model else ())
    write_report(path, analysis, dataset, title=model, **options)
    log.info("report: %s", path)


def find_train_set(data: Path | None, dataset: CocoDataset) -> CocoDataset | None:
    """Open the train split beside a scored dataset; None if there is none, or if it is what was scored."""
    if data is None or len(split_candidates(data, "train")) != 1:
        return None
    images_dir, source = find_split(data, "train")
    found = CocoDataset(images_dir, source, known_classes=dataset.class_names)
    same, other = ((x.annotation_file, x.images_dir, x.file_names.tolist()) for x in (found, dataset))
    return None if same == other else found
