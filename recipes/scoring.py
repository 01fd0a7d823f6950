"""`score_dataset` runs a detector over a dataset and computes its COCO metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from runtime import Stopped, StopSignal, all_reduce, gather, ignore_stop_signals
from vovnet_zoo import FCOS, predict
from vovnet_zoo.coco_eval import evaluate, gather_results, to_coco_results
from vovnet_zoo.data import CocoDataset, Skipped

LOOK_EVERY = 4  # images; so often do several processes tell each other of stop signals


def score_dataset(
    model: FCOS,
    dataset: CocoDataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    stop: StopSignal | None = None,
    note: Callable[[list[Skipped]], None] | None = None,
    workers: int = 2,
    engine: str = "pycocotools",
) -> tuple[list[dict], dict] | tuple[None, None]:
    """Run the detector on a dataset without transforms; returns COCO result rows and `coco_eval.evaluate`'s metrics.

    The images are shared out over the processes. Rank 0 gathers the results; the others return (None, None).
    `Stopped` is raised, in all processes, a few images after one of them received a stop signal.

    Where the dataset skips images that cannot be read, they are given to `note`, and the others are scored;
    `ValueError` if there are no others.
    """
    device = next(model.parameters()).device
    mine = range(rank, len(dataset), world_size)
    share = len(range(0, len(dataset), world_size))  # of rank 0; other ranks may have one image less
    # the workers ignore stop signals only where `stop` takes care of them, see `StopSignal.__exit__`
    start_worker = ignore_stop_signals if stop else None
    samples = iter(DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers, worker_init_fn=start_worker))
    rows, image_ids = [], []
    for i in tqdm(range(share), desc="evaluate", unit="image", disable=rank > 0, leave=False):
        if stop and (world_size == 1 or i % LOOK_EVERY == 0) and (number := stop.agreed(device)):
            raise Stopped(128 + number)
        if i < len(mine):
            sample = next(samples)
            if isinstance(sample, Skipped):
                note([sample])
                continue
            image, target = sample
            detections = predict(model, image.as_subclass(torch.Tensor), score_threshold=0.0)
            rows += to_coco_results(detections, [target["image_id"]], dataset.category_ids, model.config["plus_one"])
            image_ids.append(target["image_id"])
    results, scored, metrics, stopped = gather_results(rows, image_ids), gather(image_ids), None, 0
    if not scored:
        raise ValueError(f"{dataset.images_dir}: none of the {len(dataset)} images could be read, nothing to score")
    if rank == 0:
        try:
            with stop.at_once() if stop else contextlib.nullcontext():
                chosen = scored if dataset.skip_bad_images else None
                metrics = evaluate(dataset.annotation_file, results, image_ids=chosen, engine=engine)
        except Stopped as error:
            stopped = error.code
    if stop and (code := int(all_reduce(torch.tensor(stopped, device=device), torch.distributed.ReduceOp.MAX))):
        raise Stopped(code)  # in all processes
    return results, metrics
