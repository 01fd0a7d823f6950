"""Score a detector on a COCO-format dataset: `python recipes/eval_coco.py --model FOLDER_OR_NAME --data ROOT`.

Under torchrun the images are shared out over the processes. `--results FILE` scores detections that are there already.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from options import Range, check_options
from vovnet_zoo.commands import before_compiling, check_place, parse_command
from vovnet_zoo.config import Precision


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation has these settings."""

    model: str = ""
    """Folder, Hub name or name of list_detectors(pretrained=True) of a detector, or model.onnx, .xml or .pt2."""
    data: Path | None = None
    """Folder of the dataset: COCO, YOLO, Pascal VOC or Hugging Face; see recipes/guides/data.md."""
    split: str = "val"
    """The split of --data."""
    val: Path | None = None
    """COCO JSON file of the images, instead of --data."""
    val_images: Path | None = None
    """Folder of the images of --val; default: it is looked for near that file."""
    difficult_as_crowd: bool = False
    """Do not score on the objects that Pascal VOC calls difficult."""
    out: Path | None = None
    """Write the detections there, as COCO results JSON."""
    report: Path | None = None
    """Write a page there, such as report.html, that shows where the detector fails; it needs hotcoco installed."""
    save_thresholds: bool = False
    """Store the score of the best F1 of each class in the model's config.json, for predict; it needs hotcoco too."""
    size: int | None = None
    """Resize the shorter side to this many pixels; default: the size that the model's config names."""
    workers: int = 2
    """Threads per process that decode and resize images while the network computes."""
    batch_size: int = 1
    """Images that the network sees together, at most; the detections do not depend on it."""
    precision: Precision = "float32"
    """Precision of the network (autocast); float32 convolutions are of TF32 on an NVIDIA GPU, as torch's default is."""
    compile: bool = False
    """Compile the network with torch.compile, which takes minutes once."""
    tiles: int | None = None
    """Look at windows of this many pixels on each side too, so that small objects in large images are found."""
    overlap: float | None = None
    """Part of its side that a window shares with its neighbour, at least; default: 0.2."""
    flip: bool = False
    """Look at the mirrored image too."""
    scales: tuple[float, ...] = (1.0,)
    """Look at the image at these multiples of the model's size."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    engine: Literal["pycocotools", "faster"] = "pycocotools"
    """The package that computes the scores; "faster" gives the same numbers and needs hotcoco installed."""
    results: Path | None = None
    """COCO results JSON, of any detector, or a run folder, whose detections are scored instead of a model's."""


PARSE = functools.partial(tyro.cli, EvalConfig, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)


import torch

from reporting import find_train_set, save_thresholds, write_page
from runtime import Stopped, StopSignal, check_out, global_rank, log, process_group, run_command
from scoring import score_dataset
from vovnet_zoo import FCOS, load_detector
from vovnet_zoo.coco_eval import format_table, load_engine
from vovnet_zoo.config import OVERLAPS, SCALES, TILES
from vovnet_zoo.config import RANGES as MODEL_RANGES
from vovnet_zoo.data import CocoDataset, changed, difficult_as_crowd, without_classes
from vovnet_zoo.data.layouts import OTHER_SPLIT, choose_split
from vovnet_zoo.evaluation.analysis import analyse
from vovnet_zoo.evaluation.coco_eval import coco_metrics, load_hotcoco, with_texts
from vovnet_zoo.evaluation.runs import read_run, scored_ids
from vovnet_zoo.exported import ExportedDetector
from vovnet_zoo.files import write_whole
from vovnet_zoo.hub import CONFIG as MODEL_CONFIG
from vovnet_zoo.inference import check_views
from vovnet_zoo.words import counted

RANGES = {"size": Range(*MODEL_RANGES["min_size"][:2]), "workers": Range(0), "batch_size": Range(1)}
RANGES |= {"tiles": Range(*TILES), "overlap": Range(*OVERLAPS), "scales": Range(*SCALES)}


def main(config: EvalConfig) -> dict | None:
    """Score the detector; returns the metrics on rank 0, None on the others."""
    check_config(config)
    if config.results is not None:
        return score_results(config, config.results) if global_rank() == 0 else None
    with process_group(config.device) as (rank, world_size, device):
        if config.compile:
            before_compiling(device.type, log.info)
        if rank == 0 and config.out is not None:
            check_out(config.out, b"[")  # a place that cannot be written is reported now, not after the last image
        if rank == 0 and config.report is not None:
            check_out(config.report, b"<!DOCTYPE html>", "--report", "report.html")
        if rank == 0 and config.save_thresholds:
            check_place(Path(config.model), f"--save-thresholds: {Path(config.model, MODEL_CONFIG)}")
        model = load_detector(config.model).to(device)
        check_exported(model)
        if config.size is not None:
            if config.size > (limit := model.config["max_size"]):
                raise ValueError(
                    f"size={config.size}: the model limits the longer side to {limit}; give {limit} at most"
                )
            model.config["min_size"] = config.size
        dataset = open_dataset(config, model.config["class_names"] or ())
        check_classes(model, dataset)
        with StopSignal() as stop:
            try:
                results, metrics = score(config, model, dataset, rank, world_size, stop)
            except Stopped:
                log.warning("stopped by a signal; no scores, and no file is written")
                raise
        if rank == 0:
            print(format_table(metrics))
            if config.out is not None:
                write_whole(config.out, json.dumps(with_texts(results, dataset.annotations)).encode())
                log.info("%s in %s", counted(len(results), "detection"), config.out)
            if config.report is not None or config.save_thresholds:
                report(config, dataset, results)
        return metrics


def score(
    config: EvalConfig,
    model: FCOS | ExportedDetector,
    dataset: CocoDataset,
    rank: int,
    world_size: int,
    stop: StopSignal,
) -> tuple[list[dict], dict] | tuple[None, None]:
    """Run the detector on the images, and score it; returns what `score_dataset` does."""
    return score_dataset(
        model,
        dataset,
        rank,
        world_size,
        stop=stop,
        engine=config.engine,
        workers=config.workers,
        batch_size=config.batch_size,
        precision=config.precision,
        compile=config.compile,
        tiles=config.tiles,
        overlap=config.overlap,
        flip=config.flip,
        scales=config.scales,
    )


def score_results(config: EvalConfig, path: Path) -> dict:
    """Score the detections of a file or a run folder; returns the metrics."""
    if config.report is not None:
        check_out(config.report, b"<!DOCTYPE html>", "--report", "report.html")
    run, dataset = read_run(path), open_dataset(config, ())
    chosen = scored_ids(dataset, run.skipped)
    metrics = coco_metrics(dataset.annotations, run.results, image_ids=chosen, engine=config.engine)
    print(format_table(metrics))
    if config.report is not None:
        analysis = analyse(dataset.annotations, run.results, image_ids=chosen)
        write_page(config.report, analysis, str(path), dataset, find_train_set(config.data, dataset), is_model=False)
    return metrics


FOR_RESULTS = ("results", "data", "split", "val", "val_images", "difficult_as_crowd", "report", "engine")


def check_results(config: EvalConfig) -> None:
    """Raise `ValueError` unless there is either a model or a file of detections, without options of the other."""
    if bool(config.model) == (config.results is not None):
        both = ", and not both" if config.model else ""
        raise ValueError(f"give a detector as --model, or a file of its detections as --results{both}")
    of_models = [x for x in dataclasses.fields(config) if x.name not in FOR_RESULTS]
    given = ["--" + x.name.replace("_", "-") for x in of_models if getattr(config, x.name) != x.default]
    if config.results is not None and given:
        raise ValueError(f"--results {config.results}: its detections are there already; leave out {', '.join(given)}")
    if config.results is not None and not config.results.exists():
        raise ValueError(f"no such file or folder: {config.results}")


def check_config(config: EvalConfig) -> None:
    """Raise `ValueError` or `ImportError` where options are out of range, contradict each other, or need a package."""
    check_options(config, RANGES)
    check_results(config)
    check_views(config.tiles, config.overlap, config.flip, config.scales)
    if config.data is not None and config.val is not None:
        raise ValueError("--val says where the images are; leave --data out")
    if config.val is None and config.val_images is not None:
        raise ValueError(f"--val-images {config.val_images}: it goes with --val JSON; with --data, leave it out")
    if config.val is None and config.data is None:
        raise ValueError("give the dataset's folder as --data, or a COCO JSON file as --val")
    if config.val is not None and config.split != "val":
        raise ValueError(f"--split {config.split}: it is a split of --data; with --val, leave it out")
    load_engine(config.engine)
    if config.report is not None or config.save_thresholds:
        load_hotcoco()
    if config.save_thresholds and not Path(config.model).is_dir():
        raise ValueError(f"--save-thresholds: {config.model} is no folder of a saved model that could be changed")
    if config.save_thresholds and (config.size or config.tiles or config.flip or config.scales != (1.0,)):
        raise ValueError(
            "--save-thresholds is for scores as predict gives them; leave out --size, --tiles, --flip, --scales"
        )


def check_exported(model: FCOS | ExportedDetector) -> None:
    """Raise `ValueError` where an exported file keeps back detections of low scores, since the AP counts all."""
    if isinstance(model, ExportedDetector) and torch.as_tensor(model.thresholds.score_threshold).max() > 0:
        raise ValueError(
            f"{model.source} gives no detections below its score thresholds, and the AP counts all of them; score a "
            "file of vovnet-zoo export --score 0"
        )


def open_dataset(config: EvalConfig, known: Sequence[str]) -> CocoDataset:
    """Open the images to score, without the classes that a model does not know and that have no box.

    Args:
        known: the classes of the model; none where they are not known.
    """
    split = config.split if config.val is None else "val"
    found = choose_split(config.data, split, config.val, config.val_images, OTHER_SPLIT)
    for text in found.warnings:
        log.warning("%s", text)
    source = changed(found.source, difficult_as_crowd) if config.difficult_as_crowd else found.source
    dataset = CocoDataset(found.folder, source, known_classes=known)
    if unknown := unknown_classes(dataset, known):
        log.warning("the model does not know these classes, which have no box: %s", ", ".join(unknown))
        source = changed(source, functools.partial(without_classes, names=unknown))
        dataset = CocoDataset(found.folder, source, known_classes=known)
    images, classes = counted(len(dataset), "image"), counted(len(dataset.class_names), "class")
    log.info("%s; %s, %s", found.how, images, classes)
    if not dataset.num_boxes:
        log.warning("%s: no image has a box, so nothing can be scored", dataset.annotation_file)
    return dataset


def report(config: EvalConfig, dataset: CocoDataset, results: list[dict]) -> None:
    """Store thresholds in the model and write the page, as far as `config` asks for them."""
    analysis = analyse(dataset.annotations, results)
    if config.save_thresholds:
        save_thresholds(Path(config.model), analysis, dataset)
    if config.report is not None:
        write_page(config.report, analysis, config.model, dataset, find_train_set(config.data, dataset))


def unknown_classes(dataset: CocoDataset, known: Sequence[str]) -> list[str]:
    """List the classes of a dataset that a model does not know, and of which no image has a box.

    A model that was trained with --drop-empty-classes does not know them.
    """
    counts = zip(dataset.class_names, dataset.class_counts, strict=True)
    return [name for name, count in counts if known and not count and name not in known]


def check_classes(model: FCOS | ExportedDetector, dataset: CocoDataset) -> None:
    """Raise `ValueError` unless the model has the dataset's classes, in the same order."""
    names = model.config["class_names"]
    if names is not None and names != dataset.class_names:
        raise ValueError(
            f"the model knows the classes {names}, {dataset.annotation_file} has {dataset.class_names}; "
            "score it on a dataset with the classes it was trained on"
        )
    if names is None and model.config["num_classes"] != len(dataset.class_names):
        raise ValueError(
            f"the model has {counted(model.config['num_classes'], 'class')}, {dataset.annotation_file} has "
            f"{len(dataset.class_names)}"
        )


if __name__ == "__main__":
    run_command(main, CONFIG)
