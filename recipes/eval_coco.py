"""Score a detector on a COCO-format dataset: `python recipes/eval_coco.py --model FOLDER_OR_NAME --data ROOT`.

Under torchrun the images are shared out over the processes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from runtime import log, process_group
from vovnet_zoo import FCOS, predict
from vovnet_zoo.coco_eval import evaluate as score
from vovnet_zoo.coco_eval import format_table, gather_results, load_engine, to_coco_results
from vovnet_zoo.data import CocoDataset, find_split


@dataclass(frozen=True)
class EvalConfig:
    model: str
    """Folder or Hub name of a detector."""
    data: Path
    """COCO-format dataset: annotations/instances_{split}*.json beside the image folders."""
    split: str = "val"
    out: Path | None = None
    """Write the detections there, as COCO results JSON."""
    size: int | None = None
    """Resize the shorter side to this many pixels, instead of what the model remembers."""
    workers: int = 2
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    plus_one: bool = False
    """The published pixel convention, for the published weights."""
    engine: Literal["pycocotools", "faster"] = "pycocotools"
    """What computes the scores; "faster" gives the same numbers and needs `pip install faster-coco-eval`."""


def main(config: EvalConfig) -> dict | None:
    load_engine(config.engine)  # if it is not installed, say so now and not after the last image
    with process_group(config.device) as (rank, world_size, device):
        model = FCOS.from_pretrained(config.model).to(device)
        if config.size is not None:
            model.config["min_size"] = config.size
        dataset = CocoDataset(*find_split(config.data, config.split))
        check_classes(model, dataset)
        results, metrics = evaluate(
            model,
            dataset,
            rank,
            world_size,
            workers=config.workers,
            plus_one=config.plus_one,
            engine=config.engine,
        )
        if rank == 0:
            print(format_table(metrics))
            if config.out is not None:
                config.out.parent.mkdir(parents=True, exist_ok=True)
                config.out.write_text(json.dumps(results))
                log.info("%d detections in %s", len(results), config.out)
        return metrics


def evaluate(
    model: FCOS,
    dataset: CocoDataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    workers: int = 2,
    plus_one: bool = False,
    engine: str = "pycocotools",
) -> tuple[list[dict], dict] | tuple[None, None]:
    """COCO results and metrics of a dataset without transforms; (None, None) on ranks other than 0."""
    mine = range(rank, len(dataset), world_size)
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers)
    rows, image_ids = [], []
    for image, target in tqdm(loader, desc="evaluate", unit="image", disable=rank > 0, leave=False):
        detections = predict(model, image.as_subclass(torch.Tensor), plus_one=plus_one)
        rows += to_coco_results(detections, [target["image_id"]], dataset.category_ids, plus_one=plus_one)
        image_ids.append(target["image_id"])
    results = gather_results(rows, image_ids)
    if rank > 0:
        return None, None
    return results, score(dataset.annotation_file, results, engine=engine)


def check_classes(model: FCOS, dataset: CocoDataset) -> None:
    """`ValueError` unless the model's classes are the dataset's, in its order."""
    names = model.config["class_names"]
    if names is not None and names != dataset.class_names:
        raise ValueError(
            f"the model knows the classes {names}, {dataset.annotation_file} has {dataset.class_names}; "
            "score it on a dataset with the classes it was trained on"
        )
    if names is None and model.config["num_classes"] != len(dataset.class_names):
        raise ValueError(
            f"the model has {model.config['num_classes']} classes, {dataset.annotation_file} {len(dataset.class_names)}"
        )


if __name__ == "__main__":
    main(tyro.cli(EvalConfig, description=__doc__))
