"""`forecast` says how long a training takes on 1, 2, 4, 8 GPUs, and what it needs: a model of a step in a few lines.

    step = max(host, gpu) + sync + exposed
    host = launches x time per launch               Python and the driver start one kernel after the other
    gpu = FLOPs / (peak of the data sheet x efficiency)
    sync = what the host does while the GPU has nothing to do, since the host waits for the GPU once a step
    exposed = the part of the all-reduce of gradients that the backward pass does not hide

Where the host starts the kernels one by one, a few images on each GPU are bound by it: then a step takes as long with
one image as with two. CUDA graphs start most of them together. A calibration replaces host, gpu and sync by measured
times. Times are in seconds, memory and files in bytes, a step is one update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .gpus import Gpu
from .words import counted

GIB = 2**30


class Assumption(NamedTuple):
    """A forecast rests on such a number, which comes from a source."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class StepWork:
    """A training step has this work, which is counted from the model and does not depend on the machine."""

    flops: float  # of forward and backward pass, of an image of `pixels`; a multiplication and an addition are 2
    forward_flops: float
    launches: int  # kernels of a whole step, eager; they do not depend on the number of images
    forward_launches: int
    kept_bytes: float  # of activations that an image of `most_pixels` keeps for its backward pass, eager
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int  # of the optimizer and of the moving average
    pixels: float  # of an image with its padding, on average over the global batches
    most_pixels: int  # of the largest image with its padding


@dataclass(frozen=True)
class Schedule:
    """A training has these numbers."""

    steps: int
    batch_size: int  # images of a step, over all GPUs
    accum: int
    workers: int  # data loading processes of each GPU
    precision: str
    compiled: bool
    evaluations: int
    images: int  # of the training set
    recorded: bool = False  # as CUDA graphs


class Measured(NamedTuple):
    """One GPU did steps of so many images of so many pixels, in seconds without the wait for data."""

    images: int
    pixels: float  # of an image with its padding, on average
    seconds: float
    memory_bytes: float  # that torch had allocated at most


@dataclass(frozen=True)
class Calibration:
    """A machine was measured with a preset."""

    device: str
    steps: tuple[Measured, ...]  # of different numbers of images
    loader_images_per_s: float  # of one core
    start_s: float  # to the first step, and what the first steps take longer than others: kernels, compilation


class StepModel(NamedTuple):
    """A step on one GPU has these parts, in seconds."""

    host: float
    gpu_per_pixel: float
    sync: float


class Row(NamedTuple):
    """A training on so many GPUs takes and needs this."""

    gpus: int
    images_per_gpu: int
    step_s: float
    images_per_s: float
    hours: float  # training, evaluations and the start
    bound: str  # what a step waits for: "launches", "compute" or "loader"
    exposed_s: float  # of the all-reduce, in `step_s`
    memory_gib: float  # of each GPU
    fits: bool
    workers: int  # data loading processes that each GPU needs so that it does not wait
    cores: int  # of the whole machine: the workers, and one for each GPU's own process
    disk_gb: float
    money: float | None


# Efficiencies are parts of the dense peak of the data sheet that a whole training step reaches where it is bound by
# the GPU. They were measured on one kind of GPU; on another they are a guess, which a calibration replaces. GPUs whose
# peak is low for their memory's bandwidth, as a T4 in float32, reach more.
MEASURED = "an H200, RESULTS.md, planner: v39_1x, 2 and 16 images, CUDA graphs; on other GPUs a guess"
EFFICIENCY = {
    "float32": Assumption(
        0.25, "of the peak", "an H200, RESULTS.md, planner: measured before our own kernels for a GPU; now higher"
    ),
    "bf16": Assumption(0.43, "of the peak", MEASURED),
    "fp16": Assumption(0.43, "of the peak", "as bf16"),
}
LAUNCH = Assumption(30e-6, "s per launch", "an H200, RESULTS.md, planner: v39_1x, 2 images, without CUDA graphs")
COMPILED_LAUNCHES = Assumption(0.8, "of the eager launches", "counted for v39_1x on a GPU that computes nothing")
RECORDED_LAUNCHES = Assumption(
    0.12, "of the eager launches", "counted likewise, when assigning boxes took 120 kernels: what CUDA graphs leave"
)
SYNC = Assumption(12e-3, "s per step", MEASURED)
COMPILED_KEPT = Assumption(0.7, "of the eager activations", "RESULTS.md, memory at 800x1333: 824 of 1195 MiB")
LINK = Assumption(0.5, "of the link's bandwidth", "guess for messages of 25 MiB; nccl-tests measures it (busbw)")
BACKWARD = Assumption(2 / 3, "of the GPU's time", "the backward pass has twice the FLOPs of the forward pass")
LAST_BUCKET = Assumption(25 * 2**20, "bytes", "recipes/gradients.py: the last bucket is sent when all else is done")
DECODE = Assumption(5.0e-3, "s per image", "RESULTS.md, loading: a core reads 200 images/s of COCO without the resize")
RESIZE = Assumption(6.0e-9, "s per pixel", "RESULTS.md, loading: 98.6 images/s resized to 800x1067")
CONTEXT = Assumption(1.0 * GIB, "bytes", "guess for the CUDA context and the libraries' workspaces")
SCORING = Assumption(40 / 5000, "s per image", "pycocotools, measured 31 to 40 s for 5,000 images; hotcoco takes 3.4 s")
SCORED = Assumption(5000, "images at most", "COCO val2017; of a smaller dataset a fifth")
START = Assumption(60, "s", "guess: imports, the dataset, the first steps; compiled, some minutes")
IMAGE_FILE = Assumption(163e3, "bytes per image", "COCO train2017: 19.3 GB of 118,287 files")
CHECKPOINTS = Assumption(3, "files", "recipes/run_folder.py keeps two, and writes the next one beside them")


def forecast(
    work: StepWork,
    schedule: Schedule,
    counts: Sequence[int],
    gpu: Gpu | None,
    calibration: Calibration | None = None,
    price: float | None = None,
) -> list[Row]:
    """Forecast a training on each of these numbers of GPUs of one machine.

    Args:
        counts: numbers of GPUs; each shares out the batch without a rest.
        gpu: None for a machine that no data sheet describes: it needs a calibration, and `counts` is (1,).
        price: of a GPU for an hour, in any currency.

    Raises:
        ValueError: the GPU does not compute in that precision, or a number of GPUs does not share out the batch.
    """
    model = measured_model(calibration) if calibration else model_of(work, schedule, gpu)
    rate = calibration.loader_images_per_s if calibration else 1 / (DECODE.value + RESIZE.value * work.pixels)
    check_counts(schedule, counts)
    rows = []
    for count in counts:
        images = schedule.batch_size // count
        gpu_s = model.gpu_per_pixel * images * work.pixels
        busy = max(model.host, gpu_s)
        exposed = exposed_seconds(work, schedule, count, gpu_s, gpu)
        step = busy + model.sync + exposed
        wanted = math.ceil(images / step / rate)
        # without workers, the process that computes loads the images too
        loading = images / (schedule.workers * rate) if schedule.workers else step + images / rate
        bound = "loader" if loading > step else "launches" if model.host > gpu_s else "compute"
        step = max(step, loading)
        seconds = schedule.steps * step + evaluation_seconds(work, schedule, count, model, images)
        seconds += calibration.start_s if calibration else START.value
        memory = memory_bytes(work, schedule, images, calibration)
        rows.append(
            Row(
                gpus=count,
                images_per_gpu=images,
                step_s=step,
                images_per_s=schedule.batch_size / step,
                hours=seconds / 3600,
                bound=bound,
                exposed_s=exposed,
                memory_gib=memory / GIB,
                fits=gpu is None or memory <= gpu.memory_gb * 1e9,
                workers=wanted,
                cores=count * (wanted + 1),
                disk_gb=disk_bytes(work, schedule) / 1e9,
                money=None if price is None else price * count * seconds / 3600,
            )
        )
    return rows


def check_counts(schedule: Schedule, counts: Sequence[int]) -> None:
    """Raise `ValueError` unless each number of GPUs shares out the batch without a rest."""
    for count in counts:
        if schedule.batch_size % (count * schedule.accum):
            parts = f" x --accum {schedule.accum}" if schedule.accum > 1 else ""
            raise ValueError(
                f"--batch-size {schedule.batch_size} cannot be shared out over {counted(count, 'GPU')}{parts}; "
                f"give another {'--accum' if schedule.accum > 1 else '--gpus'} or --batch-size"
            )


def model_of(work: StepWork, schedule: Schedule, gpu: Gpu | None) -> StepModel:
    """Model a step from the work that was counted and the GPU's data sheet."""
    if gpu is None:
        raise ValueError("no data sheet describes this machine; measure it with --calibrate")
    if schedule.precision not in gpu.tflops:
        there = " or ".join(gpu.tflops)
        raise ValueError(f"--precision {schedule.precision}: a {gpu.title} does not compute in it; give {there}")
    efficiency = EFFICIENCY[schedule.precision].value
    launches = work.launches * schedule.accum * launched_share(schedule).value
    per_image = work.flops / (gpu.tflops[schedule.precision] * 1e12 * efficiency)
    return StepModel(launches * LAUNCH.value, per_image / work.pixels, SYNC.value)


def launched_share(schedule: Schedule) -> Assumption:
    """Say which part of the eager launches the host makes."""
    if schedule.recorded:
        return RECORDED_LAUNCHES
    return COMPILED_LAUNCHES if schedule.compiled else Assumption(1.0, "of the eager launches", "not compiled")


def measured_model(calibration: Calibration) -> StepModel:
    """Fit the model of a step to the times that were measured.

    The two largest batches give the GPU's time for a pixel and what comes on top of it, the smallest gives the host's.
    """
    points = sorted((m.images * m.pixels, m.seconds) for m in calibration.steps)
    (most, longest), (less, shorter) = points[-1], points[-2] if len(points) > 1 else (0.0, 0.0)
    slope = (longest - shorter) / (most - less)
    sync = longest - slope * most
    if slope <= 0 or sync < 0:  # all bound by the host, or noise
        slope, sync = longest / most, 0.0
    return StepModel(points[0][1] - sync, slope, sync)


def exposed_seconds(work: StepWork, schedule: Schedule, count: int, gpu_s: float, gpu: Gpu | None) -> float:
    """Return the time of the all-reduce that no computation hides.

    Gradients are sent while the backward pass still runs, and the last bucket remains. A backward pass that is compiled
    or a part of a CUDA graph hands over all gradients at its end.
    """
    if count == 1 or gpu is None:
        return 0.0
    bandwidth = gpu.link_gb_s * 1e9 * LINK.value
    whole = ring_seconds(work.gradient_bytes, count, bandwidth)
    if schedule.compiled or schedule.recorded:
        return whole
    last = ring_seconds(min(LAST_BUCKET.value, work.gradient_bytes), count, bandwidth)
    return max(last, whole - BACKWARD.value * gpu_s)


def ring_seconds(size: float, count: int, bandwidth: float) -> float:
    """Return the time of a ring all-reduce of `size` bytes over `count` members, at `bandwidth` bytes a second.

    Each member sends 2 (count - 1) / count times the message (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    return 2 * (count - 1) / count * size / bandwidth


def evaluation_seconds(work: StepWork, schedule: Schedule, count: int, model: StepModel, images: int) -> float:
    """Return the time of all evaluations: the network on each GPU's share of the images, then COCO's scores on one."""
    scored = min(SCORED.value, schedule.images / 5)
    host = model.host * work.forward_launches / work.launches / images
    if schedule.recorded:  # which evaluations are not
        host = work.forward_launches * LAUNCH.value / images
    gpu = model.gpu_per_pixel * work.pixels * work.forward_flops / work.flops
    return schedule.evaluations * scored * (max(host, gpu) / count + SCORING.value)


def memory_bytes(work: StepWork, schedule: Schedule, images: int, calibration: Calibration | None) -> float:
    """Return what a GPU needs for its share of the batch: weights, gradients, states, activations, context."""
    measured = {m.images: m.memory_bytes for m in calibration.steps} if calibration else {}
    if measured.get(images):
        return measured[images] + CONTEXT.value
    kept = work.kept_bytes * images / schedule.accum * (COMPILED_KEPT.value if schedule.compiled else 1)
    return work.weight_bytes + work.gradient_bytes + work.state_bytes + kept + CONTEXT.value


def disk_bytes(work: StepWork, schedule: Schedule) -> float:
    """Return what images and checkpoints take; best/ and last/ are two more models."""
    checkpoints = CHECKPOINTS.value * (work.weight_bytes + work.state_bytes) + 2 * work.weight_bytes
    return schedule.images * IMAGE_FILE.value + checkpoints


def assumptions(schedule: Schedule, gpu: Gpu | None, calibration: Calibration | None) -> dict[str, Assumption]:
    """List what a forecast rests on, by name."""
    found: dict[str, Assumption] = {}
    if gpu is not None:
        peak = gpu.tflops.get(schedule.precision, math.nan)
        found |= {
            f"peak of {gpu.title} in {schedule.precision}": Assumption(
                peak, "TFLOP/s", f"{gpu.source}, dense; float32 with TF32 where the GPU has it"
            ),
            f"memory of {gpu.title}": Assumption(gpu.memory_gb, "GB", gpu.source),
            f"{gpu.link}, one direction": Assumption(gpu.link_gb_s, "GB/s", gpu.source),
        }
    if calibration is None:
        found |= {
            "efficiency": EFFICIENCY[schedule.precision],
            "time per launch": LAUNCH,
            "synchronisation": SYNC,
            "decoding": DECODE,
            "resizing": RESIZE,
            "start": START,
        }
        if schedule.recorded or schedule.compiled:
            found["launches that are left"] = launched_share(schedule)
        if schedule.compiled:
            found["compiled memory"] = COMPILED_KEPT
    else:
        model, source = measured_model(calibration), f"calibration on {calibration.device}"
        found |= {
            "host": Assumption(model.host, "s per step", source),
            "GPU": Assumption(model.gpu_per_pixel * 1e6, "s per million pixels", source),
            "synchronisation": Assumption(model.sync, "s per step", source),
            "loader": Assumption(calibration.loader_images_per_s, "images/s per core", source),
            "start": Assumption(calibration.start_s, "s", source),
        }
    found |= {
        "all-reduce": LINK,
        "backward pass": BACKWARD,
        "last bucket": LAST_BUCKET,
        "context": CONTEXT,
        "scored images": SCORED,
        "scoring": SCORING,
        "image file": IMAGE_FILE,
        "checkpoints": CHECKPOINTS,
    }
    return found
