"""Measure speed and memory beside torchvision's detectors and other runtimes: `python recipes/benchmark.py --help`.

Everything runs in one process, on the same uint8 images, one call of each contestant after the other, again and again;
the table has the median of each, its range, and its ratio to torchvision's FCOS on the same backbone in float32.
Inference is from uint8 to boxes, with the classes so probable that NMS gets all the candidates it takes; a training
step is loss, backward and SGD, fused in ours as in our recipe. Weights are random: no time depends on their values
otherwise.

On a CPU, OpenVINO, ONNX Runtime and ncnn run the same model in float32 (`benchmark_runtimes.py`). They run the network
alone, from normalised float32 images to logits, distances and centerness: that is less work than ours do, which start
from uint8 and end with boxes. How far their outputs are from PyTorch's is printed and stored beside the times.

`--table published` times the six detectors of the 2019 comparison instead, from uint8 to boxes, and prints their ratios
to R-50 beside the published ones.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import json
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import tyro

from vovnet_zoo.commands import check_compiler, make_folder, parse_command

RuntimeName = Literal["openvino", "onnxruntime", "ncnn"]


@dataclass(frozen=True)
class BenchmarkConfig:
    table: Literal["contestants", "published"] = "contestants"
    """Compare one detector with its contestants, or the six detectors of the 2019 comparison with each other."""
    model: str = "fcos_vovnet39_fpn"
    """A name of list_detectors(); not for the table "published"."""
    size: tuple[int, int] | None = None
    """Height and width of the images, multiples of 32; default: 640 640, for the table "published" 800 1088, as images
    of 480 640 pixels have in the published test."""
    batches: tuple[int, ...] | None = None
    """Images per call in inference; default: 1, and 16 too on a GPU, but not for the table "published"."""
    train_batch: int | None = None
    """Images per training step; default: 2, on a GPU 16."""
    what: tuple[Literal["inference", "training"], ...] = ("inference", "training")
    """Which tables to make."""
    precisions: tuple[Literal["float32", "tf32", "bf16"], ...] | None = None
    """Of the network; default: float32 and bf16, and tf32 on a GPU; for the table "published" float32."""
    rounds: int = 7
    """Timed calls of each contestant."""
    others: bool = True
    """Also torchvision's fcos_resnet50_fpn and retinanet_resnet50_fpn."""
    runtimes: tuple[RuntimeName, ...] | None = None
    """Other runtimes, in float32 inference on the CPU; default: all three, on a GPU none. They come with
    `pip install -e '.[bench]'`; what is not installed is left out."""
    exported: tuple[Path, ...] = ()
    """Also files that `vovnet-zoo export` wrote, on the CPU, from uint8 to boxes. Each has weights of its own, so that
    its NMS may have less to do."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    out: Path = Path("runs/benchmark")
    """Folder of benchmark.json and benchmark.png."""


PARSE = functools.partial(tyro.cli, BenchmarkConfig, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)


import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection as peers

from benchmark_runtimes import RUNTIMES, Network, compare_outputs, imported_versions, load_runtimes
from gradients import GradientSum
from memory import kept_by
from presets import PUBLISHED
from recorded import RecordedPasses
from runtime import environment, log, process_group, run_command, synchronize
from step import compile_step, compiled, compute_losses, find_targets
from vovnet_zoo import FCOS, FCOSLoss, compile_detector, create_detector, words
from vovnet_zoo.compiled import detect
from vovnet_zoo.data import normalize
from vovnet_zoo.export.runtimes import is_exported, load_exported
from vovnet_zoo.fcos import backbone_maps
from vovnet_zoo.fused import use_gpu_kernels
from vovnet_zoo.inference import Thresholds
from vovnet_zoo.kernels.osa import fuse_for_training
from vovnet_zoo.kernels.winograd import use_winograd

CLASSES = 80
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """This is a line of the table. Memory is the highest of a call, above what was there before it."""

    task: str
    name: str
    precision: str
    batch: int
    seconds: float  # median
    fastest: float
    slowest: float
    ratio: float  # to the first row of its task and batch
    images_per_s: float
    memory_mib: float  # nan for a CUDA graph
    kept_mib: float  # activations that a training step keeps for its backward pass; 0 in inference
    gflop: float  # of the contestant's own model, as direct convolutions and products have them
    of_peak: float  # gflop / seconds, as a part of the faster measured peak in this precision; int8: in float32


def main(config: BenchmarkConfig) -> list[Row]:
    with process_group(config.device) as (_, _, device):
        gpu, published = device.type == "cuda", config.table == "published"
        config = replace(config, size=config.size or ((800, 1088) if published else (640, 640)))
        precisions = config.precisions or (("float32", "tf32", "bf16") if gpu else ("float32", "bf16"))
        precisions = config.precisions or (("float32",) if published else precisions)
        if config.runtimes and (device.type != "cpu" or "float32" not in precisions):
            raise ValueError(
                f"--runtimes run in float32 on the CPU, and this is {', '.join(precisions)} on {device.type}; "
                "leave --runtimes out, or change --precisions or --device"
            )
        if config.exported and (gpu or published or "inference" not in config.what or "float32" not in precisions):
            raise ValueError(
                "--exported files are timed in inference on the CPU beside float32; leave --exported out, or change "
                "--device, --what, --precisions or --table"
            )
        check_compiler(device.type)
        make_folder(config.out, f"--out {config.out}")
        record = {
            "config": asdict(config),
            **environment(),
            "peak_gflops": {precision: measure_peak(precision, device) for precision in precisions},
            "parity": {},
        }
        for line in format_head(record):
            log.info(line)
        peaks = {precision: max(peak.values()) for precision, peak in record["peak_gflops"].items()}

        rows = []
        if published:
            for batch in config.batches or (1,):
                rows += compare(published_contestants(config, batch, precisions, device), config, batch, peaks, device)
        elif "inference" in config.what:
            model = crowd(create_detector(config.model, num_classes=CLASSES).to(device).eval())
            for batch in config.batches or ((1, 16) if gpu else (1,)):
                contestants = inference_contestants(model, config, batch, precisions, device)
                if device.type == "cpu" and "float32" in precisions:
                    found, record["parity"][batch] = runtime_contestants(model, config, batch)
                    contestants += found
                    record["versions"] |= imported_versions()
                contestants += exported_contestants(config, batch)
                rows += compare(contestants, config, batch, peaks, device)
        if "training" in config.what and not published:
            batch = config.train_batch or (16 if gpu else 2)
            rows += compare(training_contestants(config, batch, precisions, device), config, batch, peaks, device)
        facts = [asdict(row) for row in rows]
        record["rows"] = [{k: None if v != v else v for k, v in fact.items()} for fact in facts]  # JSON has no NaN

        print(*format_head(record), *format_parity(record["parity"]), *format_rows(rows), sep="\n")
        if published:
            record["published"] = {preset: row._asdict() for preset, row in PUBLISHED.items()}
            print(*format_published(rows), sep="\n")
        (config.out / "benchmark.json").write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
        draw_rows(rows, config.out / "benchmark.png")
        log.info("%s and benchmark.png beside it", config.out / "benchmark.json")
        return rows


# ---- contestants: (task, name, precision, call, eager call whose FLOPs are counted) ---------------------------------

RECORDED = "ours, CUDA graph", "ours, compiled, CUDA graph"
Contestant = tuple[str, str, str, Callable[[], object], Callable[[], object]]


def inference_contestants(
    ours: FCOS, config: BenchmarkConfig, batch: int, precisions: tuple[str, ...], device: torch.device
) -> list[Contestant]:
    images = torch.randint(0, 256, (batch, 3, *config.size), dtype=torch.uint8, device=device)
    sizes = torch.tensor([config.size] * batch, device=device)
    found = []

    def add_torchvision(name: str, model: nn.Module) -> None:
        crowd(model)
        model.to(device).eval()

        def run() -> object:
            return model([image.float() / 255 for image in images])

        for precision in precisions:
            found.append(("inference", f"torchvision {name}, eager", precision, within(precision, device, run), run))

    add_torchvision(f"FCOS on {ours.config['backbone']}", torchvision_fcos(ours, config.size))
    if config.others:
        for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn"):
            add_torchvision(name, torchvision_model(name, config.size))

    ours = copy.deepcopy(ours).to(memory_format=torch.channels_last)

    def eager() -> object:
        return detect(ours, images, sizes, Thresholds())

    for precision in precisions:
        found.append(("inference", "ours, eager", precision, within(precision, device, eager), eager))
    for mode in ("default", "reduce-overhead") if device.type == "cuda" else ("default",):
        for precision in precisions:
            fast = compile_detector(ours, config.size, DTYPES[precision], mode=mode)
            name = "ours, compiled" if mode == "default" else f"ours, compiled, {mode}"
            call = with_tf32(precision, lambda fast=fast: fast(images, sizes))
            found.append(("inference", name, precision, call, eager))
    return [(*row[:3], without_gradient(row[3]), without_gradient(row[4])) for row in found]


def published_contestants(
    config: BenchmarkConfig, batch: int, precisions: tuple[str, ...], device: torch.device
) -> list[Contestant]:
    """List the detectors of the 2019 comparison, eager and compiled, on the same images; R-50 comes first."""
    images = torch.randint(0, 256, (batch, 3, *config.size), dtype=torch.uint8, device=device)
    sizes = torch.tensor([config.size] * batch, device=device)
    found = []
    for row in PUBLISHED.values():
        model = crowd(create_detector(row.model, variant="published", num_classes=CLASSES).to(device).eval())
        model.to(memory_format=torch.channels_last)
        eager = functools.partial(detect, model, images, sizes, Thresholds())
        for precision in precisions:
            fast = functools.partial(compile_detector(model, config.size, DTYPES[precision]), images, sizes)
            found.append(("inference", f"{row.model}, eager", precision, within(precision, device, eager), eager))
            found.append(("inference", f"{row.model}, compiled", precision, with_tf32(precision, fast), eager))
    return [(*row[:3], without_gradient(row[3]), without_gradient(row[4])) for row in found]


def runtime_contestants(
    model: FCOS, config: BenchmarkConfig, batch: int
) -> tuple[list[Contestant], dict[str, dict[str, float]]]:
    """Let PyTorch and each of the runtimes run the network of `model` alone, in float32 on the CPU.

    Returns the contestants, and for each runtime the parity of its outputs: the largest absolute difference from eager
    PyTorch, relative to the largest absolute value. Both are empty where no runtime is installed.
    """
    images = torch.randint(0, 256, (batch, 3, *config.size), dtype=torch.uint8)
    sizes = torch.tensor([config.size] * batch)
    inputs = normalize(images, sizes, model.config["image_mean"], model.config["image_std"])  # float32 [B,3,H,W]
    network = Network(copy.deepcopy(model)).eval().requires_grad_(False)
    calls = load_runtimes(config.runtimes if config.runtimes is not None else tuple(RUNTIMES), network, inputs)
    if not calls:
        return [], {}

    network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # the faster one in PyTorch
    channels_last = inputs.contiguous(memory_format=torch.channels_last)
    eager = without_gradient(within("float32", torch.device("cpu"), lambda: network(channels_last)))
    expected = eager()
    found = [("inference", "ours, eager, network alone", "float32", eager, eager)]
    parity = {}
    for name, call in calls.items():
        title = RUNTIMES[name].title
        found.append(("inference", f"{title}, network alone", "float32", call, eager))
        parity[title] = compare_outputs(call(), expected)
    return found, parity


def exported_contestants(config: BenchmarkConfig, batch: int) -> list[Contestant]:
    """List the files of `--exported` on the same images; FLOPs are counted in a model of their configuration.

    Raises:
        ValueError: a file is none, or was exported for images of another size.
    """
    images = torch.randint(0, 256, (batch, 3, *config.size), dtype=torch.uint8)
    sizes = torch.tensor([config.size] * batch)
    found = []
    for path in config.exported:
        if not is_exported(path):
            raise ValueError(f"--exported {path} is no exported file; give model.onnx, model.xml or model.pt2")
        detector = load_exported(path)
        if detector.size not in (None, tuple(config.size)):
            raise ValueError(f"--exported {path} takes images of {detector.size}, and --size is {config.size}")
        model = FCOS(**detector.config).eval()
        call = functools.partial(detector, images, sizes)
        eager = without_gradient(functools.partial(detect, model, images, sizes, detector.thresholds))
        precision = "int8" if detector.precision == "int8" else "float32"  # in which it computes
        found.append(("inference", f"ours, exported, {path}", precision, call, eager))
    return found


def training_contestants(
    config: BenchmarkConfig, batch: int, precisions: tuple[str, ...], device: torch.device
) -> list[Contestant]:
    height, width = config.size
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
    sizes = torch.tensor([config.size] * batch, device=device)
    corners = torch.rand(batch, 8, 2) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat([corners, corners + 16 + torch.rand(batch, 8, 2) * min(height, width) / 2 - 16], dim=-1)
    boxes[..., 2:] += 16
    boxes, labels = boxes.to(device), torch.randint(0, CLASSES, (batch, 8), device=device)
    found = []

    def step(model: nn.Module, losses: Callable[[], dict[str, Tensor]], fused: bool) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=fused)

        def run() -> None:
            sum(losses().values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def add_torchvision(name: str, model: nn.Module) -> None:
        model.to(device).train()
        targets = [{"boxes": b, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)]  # 0 is background there

        for precision in precisions:
            losses = within(precision, device, lambda: model([x.float() / 255 for x in images], targets))
            run = with_tf32(precision, step(model, losses, fused=False))
            found.append(("training", f"torchvision {name}, eager", precision, run, run))

    ours = create_detector(config.model, num_classes=CLASSES, frozen_norm=True)
    add_torchvision(f"FCOS on {ours.config['backbone']}", torchvision_fcos(ours, config.size))
    if config.others:
        for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn"):
            add_torchvision(name, torchvision_model(name, config.size))

    ours.to(device, memory_format=torch.channels_last).train()
    criterion = FCOSLoss()
    fuse_for_training(ours)
    use_gpu_kernels(ours, device)
    use_gpu_kernels(criterion, device)
    sparing, fast = copy.deepcopy(ours), copy.deepcopy(ours)
    sparing.set_grad_checkpointing()
    if device.type == "cpu":
        use_winograd(fast)
    for name, model in {"eager": ours, "eager, checkpointing": sparing, "compiled": fast}.items():
        for precision in precisions:
            on_gpu = name == "compiled" and device.type == "cuda"
            parts = compile_step(model) if on_gpu else (find_targets, compute_losses)
            losses = training_losses(model, criterion, images, sizes, boxes, labels, precision, *parts)
            if name == "compiled" and not on_gpu:
                losses = compiled(losses, dynamic=False)
            run = with_tf32(precision, step(model, losses, fused=True))
            counted = found[-2 * len(precisions)][4] if name == "compiled" else run
            found.append(("training", f"ours, {name}", precision, run, counted))
    data = images, sizes, boxes, labels
    return found + (recorded_contestants(ours, criterion, data, precisions, found) if device.type == "cuda" else [])


def recorded_contestants(
    model: FCOS, criterion: FCOSLoss, data: tuple[Tensor, ...], precisions: tuple[str, ...], others: list[Contestant]
) -> list[Contestant]:
    """List steps of copies of `model` as CUDA graphs, as the recipe makes them by default, and compiled ones.

    The recipe makes compiled ones with --compile --cuda-graphs. All have as many FLOPs as the eager one among the
    others.
    """
    found = []
    for name in RECORDED:
        for precision in precisions:
            copied = copy.deepcopy(model)
            compute = compile_step(copied)[1] if "compiled" in name else compute_losses
            run = with_tf32(precision, recorded_step(copied, criterion, data, precision, compute))
            (counted,) = [row[4] for row in others if row[1:3] == ("ours, eager", precision)]
            found.append(("training", name, precision, run, counted))
    return found


def recorded_step(
    model: FCOS, criterion: FCOSLoss, data: tuple[Tensor, ...], precision: str, compute: Callable
) -> Callable[[], None]:
    """Make a step of the recipe whose forward and backward pass, by `compute`, are recorded in the second call."""
    images, sizes, boxes, labels = data
    trained = SimpleNamespace(
        config=SimpleNamespace(precision="bf16" if precision == "bf16" else "float32"),
        model=model,
        criterion=criterion,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True),
        scaler=torch.amp.GradScaler(images.device.type, enabled=False),
        device=images.device,
        gradients=GradientSum(nn.Module()),
    )
    passes = RecordedPasses(trained, compute)

    def run() -> None:
        targets, normalizers = find_targets(model, criterion, boxes, labels, *images.shape[-2:])
        passes.begin()
        passes(images, sizes, targets, normalizers, last=False)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)

    return run


def training_losses(
    model: FCOS,
    criterion: FCOSLoss,
    images: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    labels: Tensor,
    precision: str,
    find: Callable,
    compute: Callable,
) -> Callable[[], dict[str, Tensor]]:
    """Do the recipe's step up to the losses: assignment (`find`), network and comparison (`compute`)."""

    def losses() -> dict[str, Tensor]:
        targets, normalizers = find(model, criterion, boxes, labels, *images.shape[-2:])
        autocast = "bf16" if precision == "bf16" else "float32"
        return compute(model, criterion, images, sizes, targets, normalizers, autocast)

    return losses


class Pyramid(nn.Module):
    """This is backbone and FPN of a detector of ours, as torchvision's detectors take them."""

    def __init__(self, model: FCOS):
        super().__init__()
        self.backbone, self.fpn = copy.deepcopy(model.backbone), copy.deepcopy(model.fpn)
        self.out_channels = model.config["channels"]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict(zip(("c3", "c4", "c5"), backbone_maps(self.backbone, images), strict=True)))


def torchvision_fcos(model: FCOS, size: tuple[int, int]) -> nn.Module:
    """Build torchvision's FCOS on the backbone and FPN of `model`, with our thresholds."""
    return peers.FCOS(Pyramid(model), CLASSES + 1, score_thresh=0.05, nms_thresh=0.6, **_torchvision_sizes(size))


def torchvision_model(name: str, size: tuple[int, int]) -> nn.Module:
    """Build a detector of torchvision's, with random weights."""
    build = getattr(peers, name)
    return build(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **_torchvision_sizes(size))


def _torchvision_sizes(size: tuple[int, int]) -> dict:
    return {"min_size": min(size), "max_size": max(size)}


def crowd(model: nn.Module) -> nn.Module:
    """Make every class probable everywhere, and boxes a few strides large, so that NMS has all it can have to do."""
    for name, parameter in model.named_parameters():
        if name.endswith("cls_logits.bias"):
            nn.init.constant_(parameter, -2.0)
        if name.endswith(("box_distances.bias", "regression_head.bbox_reg.bias")) and len(parameter) == 4:
            nn.init.constant_(parameter, 1.0)
    return model


# ---- how a contestant is called -------------------------------------------------------------------------------------


def within(precision: str, device: torch.device, call: Callable) -> Callable:
    """Put `call` under autocast for bf16, and with or without TF32."""

    def run() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return call()

    return with_tf32(precision, run)


def with_tf32(precision: str, call: Callable) -> Callable:
    """Let `call` use TF32 in matrix products and convolutions for any precision but float32."""

    def run() -> object:
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        return call()

    return run


def without_gradient(call: Callable) -> Callable:
    return torch.no_grad()(call)


# ---- measuring ------------------------------------------------------------------------------------------------------


def compare(
    contestants: list[Contestant], config: BenchmarkConfig, batch: int, peaks: dict[str, float], device: torch.device
) -> list[Row]:
    """Time all contestants, interleaved."""
    flops: dict[Callable, float] = {}
    for task, name, precision, call, counted in contestants:
        began = time.perf_counter()
        for _ in range(3):  # compiles, and records CUDA graphs
            call()
        synchronize(device)
        log.info("%s, batch %d: %s, %s: ready in %.0f s", task, batch, name, precision, time.perf_counter() - began)
        if counted not in flops:
            with FlopCounterMode(display=False) as counter:
                counted()
            flops[counted] = counter.get_total_flops() / 1e9
    seconds = [[] for _ in contestants]
    for _ in range(config.rounds):
        for contestant, times in zip(contestants, seconds, strict=True):
            synchronize(device)
            began = time.perf_counter()
            contestant[3]()
            synchronize(device)
            times.append(time.perf_counter() - began)
    reference = statistics.median(seconds[0])
    rows = []
    for (task, name, precision, call, counted), times in zip(contestants, seconds, strict=True):
        median, gflop = statistics.median(times), flops[counted]
        graph = name in RECORDED  # which has its memory whether it is called or not
        rows.append(
            Row(
                task,
                name,
                precision,
                batch,
                median,
                min(times),
                max(times),
                median / reference,
                batch / median,
                math.nan if graph else memory_of(call, device),
                math.nan if graph else kept_by(call),
                gflop,
                gflop / median / peaks.get(precision, peaks.get("float32", math.nan)),
            )  # fmt: skip
        )
    return rows


def memory_of(call: Callable, device: torch.device) -> float:
    """Measure how many MiB a call takes at most: allocated memory of a GPU, else resident memory of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")  # only Linux counts this
    ctypes.CDLL(None).malloc_trim(0)  # what is free already goes back to the system, and counts again when used
    clear.write_text("5", encoding="utf-8")  # forgets the highest so far
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Read a line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 2**10
    raise KeyError(key)


def measure_peak(precision: str, device: torch.device, calls: int = 10) -> dict[str, float]:
    """Multiply large matrices, and convolve 256 channels with 3x3, in PyTorch; returns the GFLOP/s of each."""
    n, side = (8192, 100) if device.type == "cuda" else (2048, 80)
    dtype = DTYPES[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    x = torch.randn(16 if device.type == "cuda" else 1, 256, side, side, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    work = {
        "matrix product": (2 * n**3, lambda: a @ b),
        "3x3 convolution": (
            2 * 9 * 256 * 256 * side * side * len(x),
            lambda: nn.functional.conv2d(x, weight, padding=1),
        ),
    }
    peak = {}
    with torch.no_grad():
        for name, (flop, call) in work.items():
            call = with_tf32(precision, call)
            times = []
            for _ in range(calls):
                synchronize(device)
                began = time.perf_counter()
                call()
                synchronize(device)
                times.append(time.perf_counter() - began)
            peak[name] = flop / statistics.median(times[2:]) / 1e9
    return peak


# ---- what is shown --------------------------------------------------------------------------------------------------


def format_head(record: dict) -> list[str]:
    """Write the table's head, which names the machine, its CPU and the measured peaks."""
    cpu = record["cpu"]
    lines = [
        f"machine: {record['machine']}",
        f"CPU: {cpu['model']}, PyTorch uses {cpu['capability']} and {words.counted(cpu['threads'], 'thread')}; it has "
        f"{', '.join(cpu['features'])}",
    ]
    for precision, peak in record["peak_gflops"].items():
        speeds = ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in peak.items())
        lines.append(f"measured peak in {precision}: {speeds}")
    return lines


def format_parity(parity: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    """Say in a line for each runtime how far its outputs are from eager PyTorch's."""
    lines = []
    for batch, runtimes in parity.items():
        for title, differences in runtimes.items():
            values = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
            lines.append(
                f"{title}, batch {batch}, largest difference from eager relative to the largest value: {values}"
            )
    return lines


def format_rows(rows: list[Row]) -> list[str]:
    """Write the table, for a terminal."""
    lines = ["task      batch contestant                                   precision       ms (range)           ratio  "
             "images/s      MiB     kept   GFLOP of peak"]  # fmt: skip
    for r in rows:
        spread = f"{r.fastest * 1e3:.1f}..{r.slowest * 1e3:.1f}"
        lines.append(
            f"{r.task:9} {r.batch:5} {r.name:44} {r.precision:9} {r.seconds * 1e3:8.1f} {spread:17} {r.ratio:6.2f} "
            f"{r.images_per_s:9.2f} {r.memory_mib:8.0f} {r.kept_mib:8.0f} {r.gflop:7.0f} {r.of_peak:7.0%}"
        )
    return lines


def format_published(rows: list[Row]) -> list[str]:
    """Write a table of published and measured milliseconds, and ratios to R-50, for each batch and precision."""
    lines = []
    for batch, precision in dict.fromkeys((row.batch, row.precision) for row in rows):
        times = {row.name: row.seconds * 1e3 for row in rows if (row.batch, row.precision) == (batch, precision)}
        first = next(iter(PUBLISHED.values()))
        lines += [
            f"The comparison of 2019, batch {batch}, {precision}: milliseconds, and ratio to {first.model}",
            "preset   model                      published (TITAN Xp)           eager       compiled",
        ]
        for preset, row in PUBLISHED.items():
            line = f"{preset:8} {row.model:26} {row.milliseconds:13.0f} {row.milliseconds / first.milliseconds:6.2f}"
            for kind in ("eager", "compiled"):
                time, reference = times[f"{row.model}, {kind}"], times[f"{first.model}, {kind}"]
                line += f" {time:8.1f} {time / reference:5.2f}"
            lines.append(line)
    return lines


def draw_rows(rows: list[Row], path: Path) -> None:
    """Draw the times as bars, one panel for each task and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row.task, row.batch) for row in rows))
    heights = [sum((row.task, row.batch) == panel for row in rows) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, figsize=(10, 0.6 * len(panels) + 0.32 * sum(heights)),
        gridspec_kw={"height_ratios": heights}, constrained_layout=True,
    )  # fmt: skip
    for (task, batch), axis in zip(panels, axes[:, 0], strict=True):
        shown = [row for row in rows if (row.task, row.batch) == (task, batch)][::-1]
        middle = [row.seconds * 1e3 for row in shown]
        spread = [[m - row.fastest * 1e3 for m, row in zip(middle, shown, strict=True)],
                  [row.slowest * 1e3 - m for m, row in zip(middle, shown, strict=True)]]  # fmt: skip
        colors = ["tab:blue" if row.name.startswith("ours") else "tab:gray" for row in shown]
        bars = axis.barh([f"{row.name}, {row.precision}" for row in shown], middle, xerr=spread, color=colors)
        axis.bar_label(bars, [f"{m:.1f} ms, {row.ratio:.2f}" for m, row in zip(middle, shown, strict=True)], padding=4)
        axis.set(title=f"{task}, batch {batch}: milliseconds (median, range), ratio to the first")
        axis.margins(x=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main, CONFIG)
