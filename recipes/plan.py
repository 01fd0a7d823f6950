"""Forecast a training: `vovnet-zoo plan PRESET --gpus 8 --gpu h100`, or `python recipes/plan.py` with the same options.

The work of a step is counted from the model, and how fast a machine does it follows from data sheets and measured
efficiencies (vovnet_zoo/planning.py), or from a measurement of this machine (`--calibrate`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from presets import PRESETS, TrainConfig, check_config, is_recorded, parse
from vovnet_zoo.cli import Plan
from vovnet_zoo.commands import OMIT_COMPILE, check_compiler, check_place, parse_command
from vovnet_zoo.gpus import GPUS

HERE, DEFAULT_GPU = "here", "h100"
IMAGES = {"quickstart": 500, "finetune": 300}
COCO_IMAGES = 118_287
MOST_GPUS = 8


def parse_plan(args: Sequence[str]) -> tuple[Plan, TrainConfig, list[str]]:
    """Read the options of a plan and of its preset; also returns the options of the preset as they were typed."""
    plan, options = tyro.cli(Plan, args=list(args), description=__doc__, return_unknown_args=True)
    if plan.preset not in PRESETS:
        raise ValueError(f"{plan.preset!r} is no preset; give one of {', '.join(PRESETS)}")
    return plan, parse([plan.preset, *options]), options


PARSE = parse_plan
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)

import numpy as np
import torch

from build import find_splits
from calibration import calibrate, device_name, load_calibration, plans_folder
from fitting import MOST_WORKERS, count_cores, fit_plan
from runtime import process_group, run_command
from step_work import count_work
from vovnet_zoo.data import Source
from vovnet_zoo.data.index import open_index
from vovnet_zoo.gpus import find_gpu
from vovnet_zoo.planning import Assumption, Row, Schedule, StepWork, assumptions, check_counts, forecast
from vovnet_zoo.words import counted


def main(command: tuple[Plan, TrainConfig, list[str]]) -> list[Row]:
    """Print the forecast as a table or as JSON; returns its rows."""
    plan, config, options = command
    check_plan(plan, config)
    with process_group(config.device) as (_, _, device):
        if plan.calibrate:
            check_place(plans_folder(), f"--calibrate: {plans_folder()}")
        if plan.calibrate and config.compile:
            check_compiler(device.type, OMIT_COMPILE)
        here = find_gpu(device_name(device))
        kind = plan.gpu or (HERE if device.type == "cuda" or plan.calibrate else DEFAULT_GPU)
        gpu = GPUS.get((here or "") if kind == HERE else kind)
        if gpu is None and (plan.gpus or 1) > 1:
            raise ValueError(
                f"--gpus {plan.gpus}: no data sheet describes this machine ({device_name(device)}), so nothing is "
                "known of several; leave --gpus out"
            )
        if config.workers is None and kind != HERE:
            config = dataclasses.replace(config, workers=MOST_WORKERS["cuda"])  # not by the cores of this machine
        planned = torch.device("cuda") if gpu else device
        config, images = fit(plan, config, planned)
        schedule = schedule_of(config, images, planned.type)
        counts = gpu_counts(plan.gpus, schedule) if gpu else [1]
        check_counts(schedule, counts or [1])
        calibration = load_calibration(config, device) if kind in (HERE, here) else None
        if plan.calibrate:
            shares = [config.batch_size // count for count in counts]
            calibration = calibrate(plan.preset, options, config, shares, device)
        if gpu is None and calibration is None:
            raise ValueError(f"no data sheet describes this machine ({device_name(device)}); measure it: --calibrate")
        work = count_work(config)
    rows = forecast(work, schedule, counts, gpu, calibration, plan.price_per_gpu_hour)
    found = assumptions(schedule, gpu, calibration)
    title = gpu.title if gpu else device_name(device)
    if plan.json:
        facts = {"preset": plan.preset, "gpu": title, "calibrated": calibration is not None}
        facts |= {"rows": [row._asdict() for row in rows], "work": vars(work), "schedule": vars(schedule)}
        facts |= {"assumptions": {name: row._asdict() for name, row in found.items()}}
        print(json.dumps(facts, indent=1))
    else:
        loading = loader_advice(rows, schedule.workers, count_cores() if kind == HERE else math.inf)
        print(*head(plan.preset, title, work, schedule), *table(rows), *loading, "", *sources(found), sep="\n")
    return rows


def check_plan(plan: Plan, config: TrainConfig) -> None:
    """Raise `ValueError` where an option is out of its range, or would have no effect."""
    data = config.data or (None if config.train else Path("DATA"))  # a plan needs no data
    check_config(dataclasses.replace(config, data=data))
    if plan.gpu not in (None, HERE, *GPUS):
        raise ValueError(f"--gpu {plan.gpu}: give here, or one of {', '.join(GPUS)}")
    if plan.calibrate and plan.gpu not in (None, HERE):
        raise ValueError(f"--calibrate measures this machine; leave --gpu {plan.gpu} out")
    if plan.gpus is not None and not 1 <= plan.gpus <= MOST_GPUS:
        raise ValueError(
            f"--gpus {plan.gpus}: give 1 to {MOST_GPUS}, of one machine; recipes/guides/scale.md is about several"
        )
    if config.minutes is not None or config.seeds > 1:
        raise ValueError("a plan is of one training of so many steps; leave --minutes and --seeds out")
    if plan.images is not None and plan.images < 1:
        raise ValueError(f"--images {plan.images}: give 1 or more")
    if plan.price_per_gpu_hour is not None and not 0 <= plan.price_per_gpu_hour < math.inf:
        raise ValueError(f"--price-per-gpu-hour {plan.price_per_gpu_hour}: give a number of 0 or more")


def gpu_counts(most: int | None, schedule: Schedule) -> list[int]:
    """List the powers of two up to a number of GPUs, and that number; None is as many as share out the batch."""
    if most is None:
        return [count for count in (1, 2, 4, 8) if schedule.batch_size % (count * schedule.accum) == 0]
    return [*(count for count in (1, 2, 4, 8) if count < most), most]


def fit(plan: Plan, config: TrainConfig, device: torch.device) -> tuple[TrainConfig, int]:
    """Choose what the configuration leaves open, by the data if there are some; also returns the number of images."""
    if config.draw_shapes or not (config.data or config.train):
        images = plan.images or IMAGES.get(plan.preset, COCO_IMAGES)
        return fit_plan(config, images, device), images
    with tempfile.TemporaryDirectory() as folder:  # for the two parts of a split
        _, source = find_splits(dataclasses.replace(config, out=Path(folder)), 0)["train"]
        images = plan.images or count_images(config, source)
        return fit_plan(config, images, device, source), images


def count_images(config: TrainConfig, source: Source) -> int:
    """Count the images of a dataset that are trained on."""
    index = open_index(source)
    if not config.drop_empty:
        return len(index.sizes)
    owners, *_ = index.usable_boxes([category["id"] for category in index.categories])
    return len(np.unique(owners))


def schedule_of(config: TrainConfig, images: int, device_type: str) -> Schedule:
    """Collect what a configuration says of the whole training on a type of device."""
    return Schedule(
        steps=config.steps,
        batch_size=config.batch_size,
        accum=config.accum,
        workers=config.workers,
        precision=config.precision,
        compiled=config.compile,
        recorded=is_recorded(config, device_type),
        evaluations=-(-config.steps // config.eval_every) if config.eval_every else 1,
        images=images,
    )


# ---- what is shown --------------------------------------------------------------------------------------------------


def head(preset: str, title: str, work: StepWork, schedule: Schedule) -> list[str]:
    """Say what is planned, and what a step has to do."""
    epochs = schedule.steps * schedule.batch_size / schedule.images
    kind = f"{'compiled' if schedule.compiled else 'eager'}{', CUDA graphs' * schedule.recorded}, {schedule.precision}"
    parts = f" in {schedule.accum} parts" if schedule.accum > 1 else ""
    steps, images = counted(schedule.steps, "step", form=","), counted(schedule.images, "image", form=",")
    return [
        f"{preset} on {title}: {steps} of {counted(schedule.batch_size, 'image')}{parts} ({kind}),",
        f"{epochs:.1f} epochs of {images}, {counted(schedule.evaluations, 'evaluation')}",
        f"an image: {work.pixels:,.0f} pixels with its padding, {work.flops / 1e9:,.0f} GFLOP forward and backward",
        f"a step: {work.launches:,} launches of kernels (eager), {work.gradient_bytes / 1e6:.0f} MB of gradients",
        "step = max(launches x time per launch, FLOPs / (peak x efficiency)) + synchronisation + exposed all-reduce",
        "",
    ]


HEADS = ("", "images", "step", "images", "", "bound", "memory", "workers", "CPU", "")
UNDER = ("GPUs", "per GPU", "ms", "per s", "time", "by", "per GPU", "needed", "cores", "disk")
BOUNDS = {
    "launches": "the host, which starts one kernel after the other",
    "compute": "the GPU",
    "loader": "the processes that load images",
}


def table(rows: list[Row]) -> list[str]:
    """Write a line for each number of GPUs, and what its words mean."""
    has_price = any(row.money is not None for row in rows)
    cells = [(*HEADS, "") if has_price else HEADS, (*UNDER, "money") if has_price else UNDER, *map(row_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]
    bounds = [bound for bound in BOUNDS if any(row.bound == bound for row in rows)]
    lines.append("a step waits for: " + "; ".join(f"{bound}: {BOUNDS[bound]}" for bound in bounds))
    lines.append("workers needed: by each GPU, to load its images while it computes; cores: for these and the training")
    if not all(row.fits for row in rows):
        lines.append("! more than the GPU has; --accum 2 halves the activations, --grad-checkpointing keeps fewer")
    return lines


def loader_advice(rows: list[Row], workers: int, cores: float) -> list[str]:
    """Say how many workers are to be given where a GPU waits for its images, if the machine has the cores for them.

    Args:
        workers: of each GPU, with which the rows were computed.
        cores: of the machine.
    """
    slow = [row for row in rows if row.bound == "loader"]
    if not slow:
        return []
    said = f"the loader is too slow with --workers {workers}"
    if ready := [row for row in slow if row.cores <= cores]:
        return [f"{said}; give --workers {max(row.workers for row in ready)} where there are cores"]
    least = min(slow, key=lambda row: row.cores)
    return [f"{said}; {least.workers} need {least.cores} cores, here are {cores}"]


def row_cells(row: Row) -> tuple[str, ...]:
    """Write the cells of a line of the table."""
    hours, minutes = divmod(round(row.hours * 60), 60)
    memory = f"{row.memory_gib:.1f} GiB" + (" " if row.fits else "!")
    disk = f"{row.disk_gb:.1f} GB" if row.disk_gb < 10 else f"{row.disk_gb:.0f} GB"
    cells = (str(row.gpus), str(row.images_per_gpu), f"{row.step_s * 1e3:.1f}", f"{row.images_per_s:.1f}")
    cells += (f"{hours} h {minutes:02} min", row.bound, memory, str(row.workers), str(row.cores), disk)
    return cells if row.money is None else (*cells, f"{row.money:,.2f}")


def sources(found: dict[str, Assumption]) -> list[str]:
    """Write what the forecast rests on."""
    return ["assumptions:", *(f"  {name}: {quantity(x.value, x.unit)} ({x.source})" for name, x in found.items())]


SCALES = {"s": ((1e-3, "us", 1e6), (1, "ms", 1e3)), "bytes": ((1e6, "kB", 1e-3), (1e10, "MB", 1e-6))}


def quantity(value: float, unit: str) -> str:
    """Write a number with its unit; small times and many bytes have units of their own."""
    name, *rest = unit.split(" ", 1)
    for below, short, factor in SCALES.get(name, ()):
        if 0 < value < below:
            value, name = value * factor, short
            break
    return " ".join([f"{value:.4g}", name, *rest])


if __name__ == "__main__":
    run_command(main, CONFIG)
