"""Measure the images per second of one data loading worker: `python recipes/benchmark_data.py --data ROOT`.

Two loaders are compared: ours (decode, resize, flip, pad to a uint8 batch, which is normalized on the device), and
torchvision's detection reference (decode with Pillow, flip, convert to floating point; its models then resize,
normalize and pad). Each is a DataLoader with one worker process of one thread, and reads the same images in the same
order; the rounds are interleaved.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from vovnet_zoo.commands import parse_command


@dataclass(frozen=True)
class BenchmarkConfig:
    data: Path
    """COCO-format dataset: annotations/instances_{split}*.json beside the image folders."""
    split: str = "train"
    """The split of --data whose images are loaded."""
    images: int = 128
    """At most this many images with boxes; they should fit into the system's file cache."""
    batch_size: int = 8
    """Images in a batch."""
    rounds: int = 7
    """How often each loader reads the images; the median time counts."""
    min_size: int = 800
    """Shorter side of the images for the network, in pixels."""
    max_size: int = 1333
    """Limit of the longer side, in pixels."""
    out: Path | None = None
    """Write the numbers there, as JSON."""


PARSE = functools.partial(tyro.cli, BenchmarkConfig, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)


import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from runtime import check_out, run_command
from vovnet_zoo.data import CocoDataset, collate, train_transforms
from vovnet_zoo.data.layouts import choose_split


def main(config: BenchmarkConfig) -> dict:
    if config.out is not None:
        check_out(config.out, b'{\n  "images/s of one worker"')
    torch.set_num_threads(1)  # as in the worker
    found = choose_split(config.data, config.split, instead="give another --split")
    folder, file = found.folder, found.source
    transforms = train_transforms((config.min_size, config.min_size), config.max_size, "flip")
    resize, *others = transforms.transforms
    ours = CocoDataset(folder, file, transforms=transforms, drop_empty=True)
    unresized = CocoDataset(folder, file, transforms=v2.Compose(others), drop_empty=True)
    theirs = torchvision_dataset(folder, file, ours.image_ids.tolist())
    model_transform = GeneralizedRCNNTransform(
        config.min_size, config.max_size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    loaders = {
        "ours": (ours, collate),
        "ours without the resize": (unresized, collate),
        "torchvision, then its model's transform": (theirs, functools.partial(model_batch, model_transform)),
        "torchvision, the loader alone": (theirs, list_batch),
    }
    indices = range(min(config.images, len(ours)))
    steps = {
        "read and decode": CocoDataset(folder, file, drop_empty=True).__getitem__,
        "resize": lambda sample: resize(*sample),
        "flip, clamp and filter boxes": lambda sample: v2.Compose(others)(*sample),
    }
    rates, parts = {}, {}
    for i in range(-1, config.rounds):  # round -1 fills the file cache
        for name, (dataset, collate_fn) in loaders.items():
            rate = images_per_second(Subset(dataset, indices), config.batch_size, collate_fn)
            rates.setdefault(name, []).extend([rate] if i >= 0 else [])
        for name, milliseconds in time_parts(steps, indices, config.batch_size).items():
            parts.setdefault(name, []).extend([milliseconds] if i >= 0 else [])
    report = {
        "images/s of one worker": {name: summary(values) for name, values in rates.items()},
        "ms per image of ours, in one process": {name: summary(values) for name, values in parts.items()},
        "settings": {
            "images": len(indices),
            "batch_size": config.batch_size,
            "rounds": config.rounds,
            "min_size": config.min_size,
            "max_size": config.max_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cores": os.cpu_count(),
        },
    }
    print(format_report(report))
    if config.out is not None:
        config.out.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def torchvision_dataset(folder: Path, file: Path, image_ids: list[int]) -> Dataset:
    """Open the images of these ids with torchvision's dataset and the transforms of its references/detection."""
    transforms = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDetection(folder, file, transforms=transforms)
    dataset.ids = image_ids
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))


def list_batch(samples: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Collate samples as torchvision's models take them: float32 images [3, H, W] of different sizes, and targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def model_batch(transform: GeneralizedRCNNTransform, samples: list) -> tuple[Tensor, list[dict]]:
    """Collate samples as torchvision's backbones take them: float32 [B, 3, H, W], resized, normalized and padded."""
    images, targets = transform(*list_batch(samples))
    return images.tensors, targets


def images_per_second(dataset: Dataset, batch_size: int, collate_fn: Callable) -> float:
    """Time a loader on all batches but the first, whose time is mostly the start of the worker."""
    batches = iter(DataLoader(dataset, batch_size, collate_fn=collate_fn, num_workers=1, drop_last=True))
    next(batches)
    began = time.perf_counter()
    count = sum(batch_size for _ in batches)
    return count / (time.perf_counter() - began)


def time_parts(steps: dict[str, Callable], indices: range, batch_size: int) -> dict[str, float]:
    """Time the `steps`, each applied to the results of the step before it, and collate; in milliseconds per image."""
    seconds = dict.fromkeys([*steps, "collate"], 0.0)
    for start in range(0, len(indices), batch_size):
        samples = indices[start : start + batch_size]
        for name, step in steps.items():
            began = time.perf_counter()
            samples = [step(sample) for sample in samples]
            seconds[name] += time.perf_counter() - began
        began = time.perf_counter()
        collate(samples)
        seconds["collate"] += time.perf_counter() - began
    return {name: 1000 * total / len(indices) for name, total in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_report(report: dict) -> str:
    lines = []
    for title in list(report)[:2]:
        lines.append(f"{title:42}{'median':>8}{'min':>8}{'max':>8}")
        lines += [f"  {name:40}" + "".join(f"{x:8.2f}" for x in row.values()) for name, row in report[title].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, CONFIG)
