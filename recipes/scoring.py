"""`score_dataset` runs a detector over a dataset and computes its COCO metrics."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vovnet_zoo import FCOS, predict
from vovnet_zoo.coco_eval import evaluate, gather_results, to_coco_results
from vovnet_zoo.data import CocoDataset


def score_dataset(
    model: FCOS,
    dataset: CocoDataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    workers: int = 2,
    engine: str = "pycocotools",
) -> tuple[list[dict], dict] | tuple[None, None]:
    """Run the detector on a dataset without transforms; returns COCO result rows and `coco_eval.evaluate`'s metrics.

    The images are shared out over the processes. Rank 0 gathers the results; the others return (None, None).
    """
    mine = range(rank, len(dataset), world_size)
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers)
    rows, image_ids = [], []
    for image, target in tqdm(loader, desc="evaluate", unit="image", disable=rank > 0, leave=False):
        detections = predict(model, image.as_subclass(torch.Tensor))
        rows += to_coco_results(detections, [target["image_id"]], dataset.category_ids, model.config["plus_one"])
        image_ids.append(target["image_id"])
    results = gather_results(rows, image_ids)
    if rank > 0:
        return None, None
    return results, evaluate(dataset.annotation_file, results, engine=engine)
