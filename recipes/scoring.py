"""`score_dataset` runs a detector over a dataset and computes its COCO metrics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import Stopped, StopSignal, all_reduce, gather
from vovnet_zoo import FCOS, predict
from vovnet_zoo.coco_eval import evaluate, gather_results
from vovnet_zoo.data import CocoDataset, Skipped
from vovnet_zoo.evaluation.coco_eval import fastest_engine
from vovnet_zoo.exported import ExportedDetector
from vovnet_zoo.inference import PredictOptions, padded_size
from vovnet_zoo.sources import Frame

LOOK_EVERY = 4  # images; so often do several processes tell each other of stop signals


def score_dataset(
    model: FCOS | ExportedDetector,
    dataset: CocoDataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    stop: StopSignal | None = None,
    note: Callable[[list[Skipped]], None] | None = None,
    engine: str | None = None,
    **options: Unpack[PredictOptions],
) -> tuple[list[dict], dict] | tuple[None, None]:
    """Run the detector on a dataset without transforms; returns COCO result rows and `coco_eval.evaluate`'s metrics.

    The images are sorted by size, so that batches are full, and shared out over the processes. `options` are options of
    `predict`, such as `batch_size` and `tiles`. Rank 0 gathers the results and scores them by `engine`, or if that is
    None by the fastest that is installed; the others return (None, None). `Stopped` is raised, in all processes, a few
    images after one of them received a stop signal.

    Where the dataset skips images that cannot be read, they are given to `note`, and the others are scored;
    `ValueError` if there are no others.
    """
    by_size = sorted(range(len(dataset)), key=lambda index: padded_size(*dataset.sizes[index].tolist(), model.config))
    mine = by_size[rank::world_size]
    share = len(range(0, len(dataset), world_size))  # of rank 0; other ranks may have one image less
    found = predict(
        model,
        (Frame(str(dataset.image_ids[index]), functools.partial(_read, dataset, index)) for index in mine),
        stream=True,
        on_error=functools.partial(_skip, note) if dataset.skip_bad_images and note else None,
        score_threshold=0.0,
        **options,
    )
    rows, image_ids = [], []
    with contextlib.closing(found):
        for i in tqdm(range(share), desc="evaluate", unit="image", disable=rank > 0 or None, leave=False):
            if stop and (world_size == 1 or i % LOOK_EVERY == 0) and (number := stop.agreed()):
                raise Stopped(128 + number)
            if (detection := next(found, None)) is not None:  # skipped images are not among them
                image_ids.append(int(detection.source))
                rows += detection.to_coco(image_ids[-1], dataset.category_ids)
    results, scored, metrics, stopped = gather_results(rows, image_ids), gather(image_ids), None, 0
    if not scored:
        raise ValueError(f"{dataset.images_dir}: none of its images ({len(dataset)}) could be read, nothing to score")
    if rank == 0:
        try:
            with stop.at_once() if stop else contextlib.nullcontext():
                chosen = scored if dataset.skip_bad_images else None
                metrics = evaluate(dataset.annotations, results, image_ids=chosen, engine=engine or fastest_engine())
        except Stopped as error:
            stopped = error.code
    if stop and (code := int(all_reduce(torch.tensor(stopped), torch.distributed.ReduceOp.MAX))):
        raise Stopped(code)  # in all processes
    return results, metrics


def _read(dataset: CocoDataset, index: int) -> Tensor:
    sample = dataset[index]
    if isinstance(sample, Skipped):
        raise ValueError(sample.reason)
    return sample[0].as_subclass(Tensor)


def _skip(note: Callable[[list[Skipped]], None], frame: Frame, error: ValueError) -> None:
    note([Skipped(int(frame.name), str(error))])
