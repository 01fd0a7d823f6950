"""`calibrate` measures training steps and the loader on this machine, and keeps the numbers for later plans.

It starts the real command, `train_coco.py`, for a few seconds with each number of images, and reads the log of the run:
what is measured is the training loop itself, not a copy of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from build import build_datasets, build_loader, find_splits
from presets import TrainConfig, typed_options
from quickstart_data import background
from runtime import StopSignal, environment
from step_work import CLASSES, SHARES, SIZES, padded_pixels
from vovnet_zoo.commands import CommandError
from vovnet_zoo.config import DEFAULT_VARIANT, VARIANTS
from vovnet_zoo.files import cache_folder, read_json
from vovnet_zoo.planning import Calibration, Measured
from vovnet_zoo.words import counted

log = logging.getLogger("vovnet_zoo")
HERE = Path(__file__).resolve().parent

STEPS = 25  # that are measured at least, after the first ones
FIRST, LEAST = 30, 8  # steps before them, in which kernels are chosen or compiled for each new size; on a slow machine
FIRST_S = 20.0  # so many seconds of them will do
SECONDS = 4.0  # likewise
MOST_STEPS = 10_000  # after which a run ends by itself
WAIT_S = 900.0  # for a run: graphs of large models take minutes to compile
SLOW = 3.0  # a step that takes so many times the median compiled a graph, and is left out
POLL_S = 0.2
LOADED, PREFETCHED, LOADER_S = 4, 2, 5.0  # images of a batch, batches that a worker loads ahead, seconds to measure
NOISE = 23.0  # in values of a pixel: a file is about as long as COCO's then

# These options do not change how long a step takes.
FREE = ("data", "out", "train", "train_images", "val", "val_images", "val_fraction", "drop_empty_classes")
FREE += ("difficult_as_crowd", "draw_shapes", "drop_empty", "skip_bad_images", "batch_size", "workers", "steps", "lr")
FREE += ("weight_decay", "schedule", "milestones", "warmup", "warmup_steps", "warmup_factor", "seed", "eval_every")
FREE += ("epochs", "minutes", "evals", "patience", "seeds", "loggers", "checkpoint_minutes", "checkpoint_every")
FREE += ("max_not_finite", "allow_changes", "pretrained_backbone", "test_size", "bias_lr_factor")


def calibrate(
    preset: str, options: Sequence[str], config: TrainConfig, images: Sequence[int], device: torch.device
) -> Calibration:
    """Measure steps of these numbers of images, and the loader; the result is also written to the cache.

    Args:
        preset, options: of the command line of `train_coco.py`.
        config: what they mean. Its data are read; without any, photos of COCO's sizes are drawn.

    Raises:
        CommandError: a run failed; the message has its last lines.
    """
    with StopSignal() as stop, stop.at_once(), tempfile.TemporaryDirectory() as folder:
        if config.data is None and config.train is None:
            config = dataclasses.replace(config, data=draw_photos(Path(folder) / "photos"))
            options = [*options, "--data", str(config.data)]
        found, start_s = [], 0.0
        for count in sorted(set(images), reverse=True):
            measured, start_s = measure_steps(preset, options, config, count, Path(folder) / f"run{count}")
            found.append(measured)
        rate = loader_rate(config, Path(folder) / "loader")
    calibration = Calibration(device_name(device), tuple(found), rate, start_s)
    path = cache_path(config, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"config": dataclasses.asdict(config), **environment()}
    kept = {"calibration": dataclasses.asdict(calibration), "about": about}
    path.write_text(json.dumps(kept, indent=1, default=str), encoding="utf-8")
    log.info("kept in %s", path)
    return calibration


def load_calibration(config: TrainConfig, device: torch.device) -> Calibration | None:
    """Return what was measured with such a configuration on such a device; None where nothing was."""
    path = cache_path(config, device)
    if not path.is_file():
        return None
    kept = read_json(path)["calibration"]
    return Calibration(**{**kept, "steps": tuple(Measured(*row) for row in kept["steps"])})


def cache_path(config: TrainConfig, device: torch.device) -> Path:
    """Name the file of a calibration by the device, torch's version and every option that changes a step."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    key = [device_name(device), torch.__version__, {**fields, "device": None}]
    digest = hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()[:16]
    return plans_folder() / f"{digest}.json"


def plans_folder() -> Path:
    """Return the folder in which calibrations are kept."""
    return cache_folder() / "plans"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else counted(os.cpu_count() or 1, "CPU core")


# ---- steps ----------------------------------------------------------------------------------------------------------


def measure_steps(
    preset: str, options: Sequence[str], config: TrainConfig, count: int, out: Path
) -> tuple[Measured, float]:
    """Train with `count` images a step until enough steps are measured; also returns the seconds of the start.

    The start is from the command to the first step, and what the first steps take longer than others.

    The learning rate is so small that weights from chance stay finite.
    """
    line = [sys.executable, str(HERE / "train_coco.py"), preset, *options, "--out", str(out)]
    line += ["--batch-size", str(count), "--lr", "1e-9", "--steps", str(MOST_STEPS), "--eval-every", str(MOST_STEPS)]
    line += ["--checkpoint-every", str(MOST_STEPS)] + (["--no-pretrained-backbone"] if config.init is None else [])
    for name in {"test_size", "min_size", "max_size"} - typed_options(options):  # of the plan, whatever the data are
        line += [f"--{name.replace('_', '-')}", *map(str, np.atleast_1d(getattr(config, name)))]
    began, start_s, rows = time.monotonic(), 0.0, []
    with open(out.with_suffix(".log"), "w+b") as printed:
        run = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while not enough(split(step_seconds(rows, count))[1]):
                if run.poll() is not None:
                    printed.seek(0)
                    last = printed.read().decode(errors="replace").strip().splitlines()[-3:]
                    raise CommandError("the training that was to be measured has ended: " + " / ".join(last))
                if time.monotonic() > began + WAIT_S:
                    raise CommandError(f"no {STEPS} steps at an even pace in {WAIT_S:.0f} s; is the machine busy?")
                time.sleep(POLL_S)
                rows = [row for row in read_rows(out / "metrics.jsonl") if "data_wait_s" in row]
                start_s = start_s or (time.monotonic() - began if rows else 0.0)
        finally:
            run.terminate()  # it finishes its step
            run.wait()
    first, others = split(step_seconds(rows, count))
    seconds = statistics.fmean(steady(others))
    start_s += sum(first[1:]) - seconds * len(first)  # all steps are counted with the time of a later one
    memory = max(row["peak_memory_gib"] or 0 for row in rows) * 2**30
    log.info("%s: %.4f s a step without the wait for data", counted(count, "image"), seconds)
    return Measured(count, padded_pixels(config, count), seconds, memory), start_s


def step_seconds(rows: list[dict], count: int) -> list[float]:
    """Return how long each step took, without its wait for data."""
    return [count / row["images_per_s"] - row["data_wait_s"] for row in rows]


def split(times: list[float]) -> tuple[list[float], list[float]]:
    """Split the times of a run's steps into its first ones, and those that are like all that follow."""
    first = next((i for i in range(LEAST, FIRST) if sum(times[:i]) > FIRST_S), FIRST)
    return times[:first], times[first:]


def enough(times: list[float]) -> bool:
    """Say whether the steps are many and long enough to measure, and none of the last ones compiled a graph."""
    last = times[-STEPS:]
    return len(last) == STEPS and sum(times) >= SECONDS and len(steady(last)) == STEPS


def steady(times: list[float]) -> list[float]:
    """Leave out the steps that took far longer than most."""
    most = SLOW * statistics.median(times)
    return [seconds for seconds in times if seconds <= most]


def read_rows(path: Path) -> list[dict]:
    """Read the whole lines of a log that is still written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---- data -----------------------------------------------------------------------------------------------------------


def loader_rate(config: TrainConfig, out: Path) -> float:
    """Return the images that one core loads in a second: decoded, resized, augmented and in a batch."""
    conventions = VARIANTS[config.variant or DEFAULT_VARIANT]
    config = dataclasses.replace(config, out=out, workers=1, batch_size=LOADED, accum=1)
    dataset, _ = build_datasets(config, find_splits(config, 0), conventions["plus_one"], conventions["resize"])
    batches = build_loader(config, dataset, 0, 0, 1, torch.device("cpu"))
    for _ in range(2 + PREFETCHED):  # the start of the worker, and what it loads ahead
        next(batches)
    began = time.perf_counter()
    count = sum(LOADED for _ in itertools.takewhile(lambda _: time.perf_counter() < began + LOADER_S, batches))
    return count / (time.perf_counter() - began)


def draw_photos(root: Path, count: int = 48) -> Path:
    """Draw a COCO-format dataset of JPEGs with the sizes of COCO's photos in pixels and bytes; returns `root`."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(background(rng, max(map(max, SIZES))))
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            height, width = SIZES[rng.choice(len(SIZES), p=SHARES)]
            noisy = smooth[:height, :width] + rng.normal(0, NOISE, size=(height, width, 3))
            name = f"{i:06d}.jpg"
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(root / split / name, quality=90)
            images.append({"id": i, "file_name": name, "width": width, "height": height})
            for _ in range(rng.integers(1, 15)):  # 7 on average, as in COCO
                x, y = rng.uniform(0, width * 0.7), rng.uniform(0, height * 0.7)
                box = [x, y, rng.uniform(0.05, 0.3) * width, rng.uniform(0.05, 0.3) * height]
                what = {"category_id": int(rng.integers(1, CLASSES + 1)), "area": box[2] * box[3], "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": i, "bbox": box, **what})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root
