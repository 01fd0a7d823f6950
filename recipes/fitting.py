"""These functions choose the options that a configuration leaves open, as `finetune` does, by the data and the machine.

Each returns the configuration, and what was chosen and why, for the log. An option that is not None stays as it is.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist

from presets import FIT, FIT_PRETRAINED, FITTED, LINEAR, Fit, TrainConfig, check_sizes
from runtime import all_reduce
from trial import GpuMemory, Trial, blank_batch, largest_input
from vovnet_zoo.data import CocoDataset, Source
from vovnet_zoo.data.index import open_index
from vovnet_zoo.data.sizes import LEAST_SIZE, Sizes, fit_sizes
from vovnet_zoo.kernels.winograd import has_amx
from vovnet_zoo.words import counted

LEAST_BATCH, MOST_BATCH = 4, 16  # 16 is the batch of the published schedules
MOST_STEPS = {"cpu": 6000, "cuda": 90_000}  # about 3 hours on 2 cores; the published schedule of COCO
MOST_WORKERS = {"cpu": 4, "cuda": 8}  # on a CPU, the network needs the cores
MOST_EVALS = 10  # that are not typed
EVAL_SHARE = 0.15  # of a run's time at most is for its evaluations, where their number is not typed
EVAL_COST = 1 / 3  # of the time of an image that is trained on, an image that is scored takes about a third
TRIAL_SHARE = 0.05  # of the time of a run is for its trial
WARM_STEPS, TIMED_STEPS = 2, 10
MARGIN = 0.85  # of the free memory of a GPU may be used, since images of many shapes leave gaps between its blocks

Chosen = tuple[TrainConfig, list[str]]


def kept(config: TrainConfig, saved: Mapping[str, str]) -> TrainConfig:
    """Fill in what a run that goes on has chosen at its start; `saved` is the `describe_run` of its checkpoint."""
    values = {name: saved[name] for name in FITTED if getattr(config, name) is None and name in saved}
    if config.minutes is not None and saved.get("minutes") == repr(config.minutes):
        values |= {name: saved[name] for name in ("steps", "milestones")}
    if config.evals is not None and "minutes" not in saved:  # of earlier checkpoints, which knew no --evals
        values["eval_every"], config = saved["eval_every"], dataclasses.replace(config, evals=None)
    return dataclasses.replace(config, **{name: ast.literal_eval(text) for name, text in values.items()})


def fit_size(config: TrainConfig, source: Source | None, device: torch.device) -> Chosen:
    """Choose the sizes of images that are open by the boxes of `source`, see `fit_sizes`."""
    boxes = sizes = np.zeros((0, 4))
    if config.test_size is None:
        index = open_index(source)
        owners, _, boxes, _ = index.usable_boxes([category["id"] for category in index.categories])
        sizes = index.sizes[owners]
    known = {name: getattr(config, name) for name in Sizes._fields}
    found, reason = fit_sizes(boxes, sizes, device.type, **known)
    config = dataclasses.replace(config, **found._asdict())
    check_sizes(config)
    return config, [f"images of {found.test_size} px, {reason}"] if reason else []


def fit_precision(config: TrainConfig, device: torch.device) -> Chosen:
    """Choose bf16 if this is a CPU that multiplies it faster; all processes choose the same."""
    if config.precision is not None:
        return config, []
    amx = bool(all_reduce(torch.tensor(int(device.type == "cpu" and has_amx())), dist.ReduceOp.MIN))
    why = ["bf16 (this CPU has AMX)"] if amx else []
    return dataclasses.replace(config, precision="bf16" if amx else "float32"), why


def fit_of(config: TrainConfig) -> Fit:
    """Return the numbers from which a schedule follows."""
    return FIT_PRETRAINED if config.pretrained_backbone else FIT


def fit_schedule(
    config: TrainConfig,
    train_set: CocoDataset,
    val_set: CocoDataset,
    device: torch.device,
    world_size: int,
    try_out: Callable[[TrainConfig], Trial],
    saved: dict | None = None,
) -> Chosen:
    """Choose the processes that load data, the batch, the number of steps, learning rate, warm-up and evaluations.

    Args:
        try_out: builds the network, which is trained for a few steps and thrown away.
        saved: the checkpoint of a run that goes on.
    """
    fit, began = fit_of(config), time.monotonic()
    config, workers = fit_workers(config, device)
    config, batch = fit_batch(config, train_set, device, world_size, try_out)
    if config.minutes is not None and (saved is None or saved["run"].get("minutes") != repr(config.minutes)):
        config, length = fit_minutes(config, val_set, world_size, try_out, began, saved)
    else:
        config, length = fit_steps(config, len(train_set), device, fit)
    config = fit_rest(config, fit, len(val_set))
    return config, [reason for reason in (batch, length, workers) if reason]


def fit_plan(config: TrainConfig, num_images: int, device: torch.device, source: Source | None = None) -> TrainConfig:
    """Choose for a plan: as for a GPU with enough memory and, without data, for boxes that are not small."""
    if source is None:
        config = dataclasses.replace(config, test_size=config.test_size or LEAST_SIZE)
    config, _ = fit_size(config, source, device)
    config, _ = fit_precision(config, device)
    config, _ = fit_workers(config, device)
    config = fit_length(config, num_images, device)
    return fit_rest(config, fit_of(config), num_val=0)


def fit_length(config: TrainConfig, num_images: int, device: torch.device) -> TrainConfig:
    """Choose batch and steps without a trial: for a GPU with enough memory, and not by --minutes."""
    if config.batch_size is None:
        config = dataclasses.replace(
            config, batch_size=MOST_BATCH if device.type == "cuda" else batch_for(count_cores())
        )
    return fit_steps(config, num_images, device, fit_of(config))[0]


def fit_rest(config: TrainConfig, fit: Fit, num_val: int) -> TrainConfig:
    """Choose learning rate, warm-up and evaluations for a number of steps."""
    config = fit_rate(config, fit)
    if config.warmup_steps is None:
        config = dataclasses.replace(config, warmup_steps=min(fit.warmup_steps, config.steps // 10))
    if config.evals is not None:
        config = dataclasses.replace(config, eval_every=math.ceil(config.steps / num_evals(config, num_val)))
    return config


def fit_workers(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, str]:
    """Choose the number of data loading processes: a quarter of a CPU's cores, or all cores beside a GPU."""
    if config.workers is not None:
        return config, ""
    cores = count_cores()
    share = cores if device.type == "cuda" else cores // 4
    count = max(1, min(share, MOST_WORKERS.get(device.type, 1)))
    return dataclasses.replace(config, workers=count), f"data loaded by {count} of {counted(cores, 'core')}"


def count_cores() -> int:
    """Return the number of cores that each of the processes on this machine may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def fit_batch(
    config: TrainConfig,
    train_set: CocoDataset,
    device: torch.device,
    world_size: int,
    try_out: Callable[[TrainConfig], Trial],
) -> tuple[TrainConfig, str]:
    """Choose the batch size: the largest power of two that fits into a GPU's memory, or that suits a CPU's cores."""
    if config.batch_size is not None:
        return config, ""
    parts = world_size * config.accum
    if device.type == "cuda":
        memory = GpuMemory(device)
        share, reason = probe_batch(config, train_set, try_out, memory, max(1, MOST_BATCH // parts))
        memory.give_back()
    else:
        cores = count_cores() * world_size
        share, reason = math.ceil(batch_for(cores) / parts), counted(cores, "core")
    share = int(all_reduce(torch.tensor(share), dist.ReduceOp.MIN))  # the machines may differ
    return dataclasses.replace(config, batch_size=share * parts), f"{counted(share * parts, 'image')} a step ({reason})"


def batch_for(cores: int) -> int:
    """Return the largest power of two for which each image has a core, within bounds."""
    return 2 ** int(math.log2(max(LEAST_BATCH, min(cores, MOST_BATCH))))


def probe_batch(
    config: TrainConfig,
    train_set: CocoDataset,
    try_out: Callable[[TrainConfig], Trial],
    memory: GpuMemory,
    most: int,
) -> tuple[int, str]:
    """Find the largest power of two up to `most` of images of the largest size whose training step fits into a GPU.

    Real steps are done, with the network, its gradients, the optimizer's state and the average of the weights.

    Raises:
        ValueError: the smallest batch does not fit.
    """
    count = best = 0
    height, width = largest_input(train_set.sizes, config)
    try:
        trial, count = try_out(config), 1 if config.frozen_norm else 2  # a batch norm that learns needs two
        most = max(most, count)
        while count <= most:
            trial.step([blank_batch(count, height, width)])
            if memory.peak() > MARGIN * memory.free:
                break
            best, used, count = count, memory.peak(), 2 * count
    except torch.OutOfMemoryError:
        pass
    free = memory.free / 2**30
    if not best:
        raise ValueError(
            f"a training step of {counted(count, 'image')} of {width}x{height} pixels does not fit into the {free:.1f} "
            "GiB of memory that are free on the GPU; lower --test-size, or add --precision bf16, --frozen-norm or "
            "--grad-checkpointing"
        )
    return best, f"which take {used / 2**30:.1f} GiB of the {free:.1f} GiB that are free on the GPU"


def fit_rate(config: TrainConfig, fit: Fit) -> TrainConfig:
    """Choose the learning rate for the batch, by the rule of `presets.scale_schedule`."""
    if config.lr is not None:
        return config
    batches = config.batch_size / fit.batch_size
    return dataclasses.replace(config, lr=fit.lr * (batches if config.optimizer in LINEAR else batches**0.5))


def fit_steps(config: TrainConfig, num_images: int, device: torch.device, fit: Fit) -> tuple[TrainConfig, str]:
    """Choose the number of steps by the number of training images."""
    epoch = num_images / config.batch_size
    if config.epochs is not None:
        return with_steps(config, max(1, round(config.epochs * epoch))), ""
    if config.steps is not None:
        return config, ""
    wanted, most = round(fit.epochs * epoch), MOST_STEPS.get(device.type, MOST_STEPS["cpu"])
    steps = max(fit.least_steps, min(wanted, most))
    images = counted(num_images, "image")
    reason = f"{counted(fit.epochs, 'epoch', form='g')} of {images}"
    if steps > wanted:
        reason = f"the fewest that a detector learns in, {counted(steps / epoch, 'epoch', form='.0f')} of {images}"
    elif steps < wanted:
        reason = f"the most without --steps, {steps / epoch:.1f} epochs of {images}"
    return dataclasses.replace(config, steps=steps), f"{counted(steps, 'step')} ({reason})"


def fit_minutes(
    config: TrainConfig,
    val_set: CocoDataset,
    world_size: int,
    try_out: Callable[[TrainConfig], Trial],
    began: float,
    saved: dict | None,
) -> tuple[TrainConfig, str]:
    """Choose the number of steps by the time that some of them take here.

    Args:
        began: the value of `time.monotonic()` from which on the time counts.
        saved: the checkpoint of a run that goes on; the time of its steps counts.
    """
    budget, trial = 60 * config.minutes, try_out(config)
    limit = TRIAL_SHARE * budget
    step_s = trial.step_seconds(world_size, WARM_STEPS, TIMED_STEPS, limit)
    eval_s = trial.eval_seconds(val_set, config.batch_size // (world_size * config.accum)) * len(val_set) / world_size
    step_s, eval_s = all_reduce(torch.tensor([step_s, eval_s]), dist.ReduceOp.MAX).tolist()
    done, spent = (saved["progress"]["step"], saved["progress"]["train_seconds"]) if saved else (0, 0.0)
    left = budget - spent - (time.monotonic() - began)
    steps = done + max(1, int(left / step_s))
    for _ in range(3):  # the number of evaluations depends on the number of steps
        evals = num_evals(dataclasses.replace(config, steps=steps), len(val_set))
        steps = done + max(1, int((left - evals * eval_s) / step_s))
    steps = int(all_reduce(torch.tensor(steps), dist.ReduceOp.MIN))
    minutes, scored = counted(config.minutes, "minute", form="g"), counted(evals, "evaluation")
    reason = f"{minutes} at {step_s:.2f} s a step, and {scored} of {eval_s:.0f} s"
    return with_steps(config, steps), f"{counted(steps, 'step')} ({reason})"


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Change the number of steps; milestones stay at their share of all steps."""
    milestones = config.milestones
    if config.schedule == "multistep":
        milestones = tuple(sorted({max(1, round(step * steps / config.steps)) for step in milestones}))
    return dataclasses.replace(config, steps=steps, milestones=milestones)


def num_evals(config: TrainConfig, num_val: int) -> int:
    """Return the number of evaluations; if it is open, as many as take `EVAL_SHARE` of the time of training."""
    if config.evals is None:
        return 1 if config.eval_every is None else math.ceil(config.steps / config.eval_every)
    cheap = int(EVAL_SHARE / EVAL_COST * config.steps * config.batch_size / max(1, num_val))
    return min(config.evals or max(1, min(cheap, MOST_EVALS)), config.steps)
