"""A `Trial` trains a network for a few steps, to see what time and memory they take, and is thrown away."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from average import MovingAverage
from build import build_loader, build_loss, build_model, prepare_for_training
from gradients import GradientSum, limit_norm
from optim import create_optimizer
from presets import TrainConfig, is_recorded
from recorded import Passes, RecordedPasses
from runtime import StopSignal, synchronize, to_device
from step import compile_step, compute_losses, find_targets
from vovnet_zoo import FCOS, predict
from vovnet_zoo.config import DetectorConfig
from vovnet_zoo.data import CocoDataset, Skipped, resize_size

MOST_RECORDED = 300  # steps, to find some whose size came before
BOXES = 50  # of an image of a `blank_batch`; assigning them takes memory, too


class Trial:
    """The copy of a run has its network, its optimizer and its average.

    Args:
        train_set, start, known: as for `build_model`.
        stop: as for `build_loader`.
    """

    def __init__(
        self,
        config: TrainConfig,
        train_set: CocoDataset,
        start: FCOS | None,
        known: DetectorConfig | None,
        device: torch.device,
        stop: StopSignal | None = None,
    ):
        self.config = config = dataclasses.replace(
            config, pretrained_backbone=False, lr=1e-6
        )  # the weights hardly move
        self.train_set, self.device, self.stop = train_set, device, stop
        with torch.random.fork_rng(devices=[]):
            self.model = build_model(config, train_set.class_names, train_set.category_ids, start, known)
        prepare_for_training(self.model, config, device)
        self.criterion, self.optimizer = build_loss(self.model, device), create_optimizer(self.model, config)
        self.ema = MovingAverage(self.model, config.ema) if config.ema else None
        self.find, self.compute = compile_step(self.model) if config.compile else (find_targets, compute_losses)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.gradients = GradientSum(nn.Module())  # of nothing: a trial has one process
        self.passes = Passes(self, self.compute)

    def step(self, parts: list[dict[str, Tensor]]) -> None:
        """Do one step: forward, backward and update, as `train_coco.train` does for one process."""
        self.passes.begin()
        for part in parts:
            part = to_device(part, self.device)
            height, width = part["images"].shape[-2:]
            targets, normalizers = self.find(self.model, self.criterion, part["boxes"], part["labels"], height, width)
            self.passes(part["images"], part["sizes"], targets, normalizers, last=False)
        self.scaler.unscale_(self.optimizer)
        limit_norm(self.model, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, step=1)
        self.optimizer.zero_grad(set_to_none=True)

    def step_seconds(self, world_size: int, warm: int, count: int, limit: float) -> float:
        """Return the mean time of a step, loading of images included, over `count` steps after `warm` slower ones.

        After `limit` seconds, the steps until then count, at least one of them. Where steps are recorded, only those
        count that were replayed, as nearly all of a run are.
        """
        recorded = is_recorded(self.config, self.device.type)
        if recorded:
            self.passes = RecordedPasses(self, self.compute)
        config = dataclasses.replace(self.config, steps=MOST_RECORDED if recorded else warm + count)
        began, times, replays = time.perf_counter(), [], []
        with torch.random.fork_rng(devices=[]):
            for parts in build_loader(config, self.train_set, 0, 0, world_size, self.device, self.stop):
                self.step(parts)
                synchronize(self.device)
                times.append(time.perf_counter())
                if self.passes.replayed and len(times) > 1:
                    replays.append(times[-1] - times[-2])
                if (times[-1] - began > limit and len(times) > 1) or len(replays) == count:
                    break
        self.passes = Passes(self, self.compute)
        if len(replays) == count:
            return sum(replays) / count
        warm = min(warm, len(times) - 1)
        return (times[-1] - times[warm - 1]) / (len(times) - warm) if warm else (times[-1] - began) / len(times)

    def eval_seconds(self, dataset: CocoDataset, batch_size: int, count: int = 4) -> float:
        """Return the mean time in which one of `dataset`'s images is scored, from its first `count` images."""
        samples = [dataset[i] for i in range(min(count, len(dataset)))]
        images = [sample[0].as_subclass(Tensor) for sample in samples if not isinstance(sample, Skipped)]
        began = time.perf_counter()
        predict(self.model, images, score_threshold=0.0, batch_size=batch_size)
        synchronize(self.device)
        return (time.perf_counter() - began) / max(1, len(images))


class GpuMemory:
    """This knows the memory of a GPU, in bytes: how much was `free` at first, and the `peak` used since then."""

    def __init__(self, device: torch.device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.device, self.before = device, torch.cuda.memory_allocated(device)
        self.free = torch.cuda.mem_get_info(device)[0]

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def give_back(self) -> None:
        """Free what no tensor uses any more, and forget the peak, which is not one of the run."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def largest_input(sizes: np.ndarray, config: TrainConfig) -> tuple[int, int]:
    """Return the largest height and width of a batch, whose images are all wide or all tall, see `TrainSampler`.

    Args:
        sizes: [N,2] height and width of all images.
    """
    resized = [resize_size(*size, config.min_size[1], config.max_size) for size in np.unique(sizes, axis=0).tolist()]
    groups = [[size for size in resized if (size[0] >= size[1]) == tall] for tall in (False, True)]
    padded = [[32 * math.ceil(max(side) / 32) for side in zip(*group, strict=True)] for group in groups if group]
    height, width = max(padded, key=math.prod)
    return height, width


def blank_batch(count: int, height: int, width: int) -> dict[str, Tensor]:
    """Make a batch of `count` images without content, each with `BOXES` boxes."""
    boxes = torch.tensor([0.0, 0.0, width / 2, height / 2]).expand(count, BOXES, 4)
    return {
        "images": torch.zeros(count, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        "sizes": torch.tensor([height, width]).expand(count, 2),
        "boxes": boxes,
        "labels": torch.zeros(count, BOXES, dtype=torch.int64),
    }
