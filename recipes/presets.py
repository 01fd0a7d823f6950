"""Presets are named training configurations. Each field of a preset can be changed on the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grouping import parse_grouped
from options import Range, check_options
from vovnet_zoo.config import RANGES as MODEL_RANGES
from vovnet_zoo.config import VARIANTS, Augmentation, VariantName
from vovnet_zoo.ledger import DETECTORS
from vovnet_zoo.words import counted


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Augmentation):
    """A training run is configured by these fields, and by those of `vovnet_zoo.config.Augmentation`.

    Sizes are in pixels; a step is one update of the weights.
    Of the options in `FITTED`, those that are None are chosen to fit the data and the machine, see `fitting`.
    """

    data: Path | None
    """Folder of the dataset: COCO, YOLO, Pascal VOC or Hugging Face; see recipes/guides/data.md. None with --train and
    --val."""
    out: Path
    """Run folder: best/, last/, metrics.jsonl, curves.png, detections.png."""
    train: Path | None = None
    """COCO JSON file of the training images, instead of what is found in --data."""
    train_images: Path | None = None
    """Folder of the images of --train; default: it is looked for near that file."""
    val: Path | None = None
    """COCO JSON file of the images to score on, instead of what is found in --data."""
    val_images: Path | None = None
    """Folder of the images of --val; default: it is looked for near that file."""
    val_fraction: float | None = None
    """Keep this share of the training images for scoring, by --seed; images that look alike stay together. The two
    parts are written to split/ in the run folder."""
    drop_empty_classes: bool = False
    """Leave out the classes of which no training image has a box."""
    difficult_as_crowd: bool = False
    """Neither train nor score on the objects that Pascal VOC calls difficult."""
    draw_shapes: bool = False
    """Draw a dataset of shapes into --data, if nothing is there."""

    model: str | None = None
    """A name of list_detectors(), or "fcos" with --backbone. None: fcos_vovnet39_fpn, or the network of --init."""
    backbone: str | None = None
    """Any timm model with feature maps at strides 8, 16, 32, or local-dir:FOLDER or hf-hub:NAME, a classifier to start
    from; for --model fcos only."""
    variant: VariantName | None = None
    """Conventions of data, model, loss and evaluation: "improved" (also None), "published" for the conventions of
    the 2019 detectors, or "torchvision". With --init the detector keeps its own conventions."""
    channels: int | None = None
    """Channels of FPN and head. None: 256, or what --init has."""
    num_convs: int | None = None
    """Convolutions in each of the head's towers. None: 4, or what --init has."""
    init: str | None = None
    """Start from this detector (folder, Hub name or a name of list_detectors(pretrained=True)). It keeps what it
    knows of classes of the same name, and its network: an option that says otherwise is refused."""
    pretrained_backbone: bool = False
    """Start from the backbone's ImageNet weights, through timm; not with --init."""
    frozen_norm: bool = False
    """Keep the backbone's batch norms fixed; recommended with pretrained weights and few images per device. Those that
    are fixed in --init stay so."""

    min_size: tuple[int, int] | None = Augmentation.min_size
    """Range of the shorter side in training; None: within a tenth of --test-size."""
    max_size: int | None = Augmentation.max_size
    """Limit of the longer side; None: twice --test-size."""
    test_size: int | None = 800
    """Shorter side in evaluation; it is saved with the model. None: the smaller the boxes, the larger."""
    augment_until: float = 1.0
    """Share of the steps after which images are only resized, and mirrored unless --augment is none."""
    repeat_rare: float = 0.0
    """Show images of a class more often if the class is in less than this share of the images (repeat factor sampling,
    arXiv 1908.03195): 4 times as often for a class that is in a sixteenth of this share."""
    drop_empty: bool = False
    """Leave out training images without boxes."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read or have another size than the JSON says, rather than stop."""
    batch_size: int | None = 16
    """Images per step, over all processes and accumulated parts. A preset is a schedule of images: with another batch
    than the preset's, what is not typed of lr, steps, milestones, warmup_steps and eval_every is scaled. None: by the
    cores, or by the memory of a GPU, which is tried out."""
    accum: int = 1
    """Parts into which each process's share of a batch is split, to save memory."""
    workers: int | None = 4
    """Data loading processes per training process; in evaluations, threads. None: by the cores."""

    steps: int | None = 90_000
    """Updates of the weights. None: by the number of training images."""
    epochs: float | None = None
    """In place of --steps: so often is each image shown; milestones keep their share of the steps."""
    minutes: float | None = None
    """In place of --steps: as many as fit into this time, evaluations included, by the speed of the first steps."""
    optimizer: str = "momentum"
    """A name of timm.optim.list_optimizers(); "momentum" is SGD without Nesterov."""
    lr: float | None = 0.01
    """Learning rate at its highest. None: by the batch size."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters but biases."""
    bias_lr_factor: float = 1.0
    """The learning rate of biases is lr times this."""
    decay_norms: bool = True
    """Apply weight decay to one-dimensional weights too (norms and level scales)."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """Course of the learning rate after the warm-up."""
    milestones: tuple[int, ...] = (60_000, 80_000)
    """Steps where multistep multiplies the learning rate by 0.1; cosine has none. They move with --steps."""
    warmup: Literal["constant", "linear"] = "linear"
    """Course of the learning rate in the warm-up."""
    warmup_steps: int | None = 500
    """Length of the warm-up. None: at most a tenth of the steps."""
    warmup_factor: float = 1 / 3
    """The learning rate of the first step is lr times this."""
    ema: float | None = None
    """Decay of a moving average of the weights; if given, the average is scored and saved."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    layer_decay: float | None = None
    """Each part of the backbone has the learning rate of the part above it, times this."""
    precision: Literal["float32", "bf16", "fp16"] | None = "float32"
    """Precision of the network (autocast), in evaluations too; losses are always float32. None: bf16 on a CPU that has
    units for it (AMX), else float32."""
    tf32: bool = True
    """On an NVIDIA GPU, float32 convolutions round their inputs to TF32, of 10 bits, as is also torch's default."""
    compile: bool = False
    """Compile network and losses with torch.compile, which fuses kernels, and the network in evaluations too."""
    cuda_graphs: bool = True
    """On an NVIDIA GPU, record the kernels of a step once for each size of images, and start them together from then
    on, so that the GPU does not wait for the host. It takes up to twice the memory, where the GPU has that. Not with
    --grad-checkpointing, and with --compile only where it is typed."""
    winograd: bool = True
    """On a CPU, compute 3x3 convolutions with a quarter of the multiplications where that gains (kernels/)."""
    grad_checkpointing: bool = False
    """Keep fewer activations for the backward pass and compute the others again; needs --frozen-norm."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""

    eval_every: int | None = None
    """Steps between evaluations; the last step is always followed by one."""
    evals: int | None = None
    """In place of --eval-every: so many evaluations in the run; 0 is ten, or as many as take 15 % of its time."""
    patience: int | None = None
    """End the run after this many evaluations in a row without a better AP."""
    seeds: int = 1
    """Train so many times, into seed0/, seed1/, ... of --out, and report mean and deviation of the AP. The seeds follow
    --seed; with --val-fraction, each has a split of its own."""
    loggers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get the numbers of the run too, beside TensorBoard, which gets them where it is installed."""
    checkpoint_minutes: float | None = 5.0
    """A killed run loses at most what it did in so many minutes. A checkpoint begins a tenth earlier, and is written
    while the training goes on."""
    checkpoint_every: int | None = None
    """A killed run also loses at most so many steps."""
    max_not_finite: int = 10
    """Stop after this many steps in a row whose loss is not finite; such a step is skipped."""
    allow_changes: bool = False
    """Go on from the checkpoints in --out although the configuration or the data has changed."""


# `--help` shows these options first, then groups that begin with a field of TrainConfig.
FIRST_OPTIONS = ("data", "out", "init", "epochs", "batch_size")
SECTIONS = {
    "train": "data",
    "model": "network",
    **dict.fromkeys(("min_size", "test_size"), "image"),
    "batch_size": "batch",
    "steps": "schedule",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "ema": "optimizer",
    "precision": "machine",
    "eval_every": "evaluation",
    "loggers": "run",
}

# These options decide the network. With --init they can only say what that detector is.
NETWORK = ("model", "backbone", "variant", "channels", "num_convs", "pretrained_backbone", "frozen_norm")
NETWORK_DEFAULTS = dict(model="fcos_vovnet39_fpn", channels=256, num_convs=4)  # without --init

STRONG = ("copy_paste", "mosaic", "mixup", "color", "blur", "jpeg")

# Where these are None, `fitting` chooses them; a run that goes on has those of its checkpoint.
FITTED = ("test_size", "min_size", "max_size", "precision", "batch_size", "steps", "lr", "warmup_steps")

RANGES = {
    **{name: Range(*MODEL_RANGES[name][:2]) for name in ("channels", "num_convs", "max_size")},
    **{name: Range(*MODEL_RANGES["min_size"][:2]) for name in ("min_size", "test_size")},
    **dict.fromkeys(("batch_size", "accum", "steps", "milestones"), Range(1)),
    **dict.fromkeys(("eval_every", "checkpoint_every", "max_not_finite", "patience", "seeds"), Range(1)),
    **dict.fromkeys(("epochs", "minutes"), Range(0, inside=True)),
    **dict.fromkeys(("workers", "warmup_steps", "weight_decay", "bias_lr_factor", "evals"), Range(0)),
    **dict.fromkeys(("lr", "clip_grad", "checkpoint_minutes"), Range(0, inside=True)),
    "zoom": Range(0, inside=True),
    **dict.fromkeys(("copy_paste", "mosaic", "mixup", "color", "blur", "jpeg", "repeat_rare"), Range(0, 1)),
    "augment_until": Range(0.01, 1),
    "val_fraction": Range(0, 1, inside=True),
    "warmup_factor": Range(0, 1),
    "ema": Range(0, 1, inside=True),
    "layer_decay": Range(1e-6, 1),
    "seed": Range(0, 2**63 - 1),
}


def check_config(config: TrainConfig) -> None:
    """Raise `ValueError`, naming the option, where one is out of its range or would have no effect."""
    check_options(config, RANGES)
    check_data_options(config)
    check_length(config)
    check_sizes(config)
    if config.zoom[0] > config.zoom[1]:
        raise ValueError(f"zoom={config.zoom}: give the lower end of the range first")
    if config.zoom != TrainConfig.zoom and config.augment != "jitter_crop":
        raise ValueError(f"zoom={config.zoom}: only --augment jitter_crop zooms; leave it out")
    strong = config.augment == "jitter_crop" or any(getattr(config, name) for name in STRONG)
    if config.augment_until < 1 and not strong:
        raise ValueError(
            f"augment_until={config.augment_until}: there is nothing to switch off; leave it out, or give "
            f"{', '.join('--' + name.replace('_', '-') for name in STRONG)} or --augment jitter_crop"
        )
    if list(config.milestones) != sorted(set(config.milestones)):
        raise ValueError(f"milestones={config.milestones}: give different steps, the first step first")
    if config.schedule == "cosine" and config.milestones != TrainConfig.milestones:
        raise ValueError(f"milestones={config.milestones}: the cosine schedule has none; leave them out")
    if config.model not in (None, "fcos", *DETECTORS):
        raise ValueError(f"model={config.model!r}: give fcos with a --backbone, or one of {', '.join(DETECTORS)}")
    if config.model == "fcos" and config.backbone is None and config.init is None:
        raise ValueError("model='fcos' needs a --backbone, the name of a timm model")
    if config.backbone is not None and config.model != "fcos" and config.init is None:
        raise ValueError(
            f"backbone={config.backbone!r} goes with --model fcos; {config.model or NETWORK_DEFAULTS['model']} has a "
            "backbone of its own"
        )
    if config.init is not None and config.pretrained_backbone:
        raise ValueError("pretrained_backbone=True: --init has a backbone with weights; leave out one of the two")


def check_sizes(config: TrainConfig) -> None:
    """Raise `ValueError` where the sizes of images, as far as they are known, contradict each other."""
    low, high = config.min_size or (0, 0)
    if low > high:
        raise ValueError(f"min_size={config.min_size}: give the lower end of the range first")
    if config.max_size and (size := max(high, config.test_size or 0)) > config.max_size:
        name = "min_size" if size == high else "test_size"
        raise ValueError(
            f"{name}={getattr(config, name)}: the shorter side cannot be longer than max_size={config.max_size}, the "
            f"limit of the longer side; raise --max-size, or lower --{name.replace('_', '-')}"
        )


def check_length(config: TrainConfig) -> None:
    """Raise `ValueError` where two options say how long the run is, or when it is scored."""
    if config.epochs is not None and config.minutes is not None:
        raise ValueError("--epochs and --minutes both say how long the run is; leave out one of the two")
    if config.steps is None and config.schedule == "multistep":
        raise ValueError("steps=None: milestones are counted in steps; give --steps, or --schedule cosine")
    if config.evals is not None and config.eval_every is not None:
        raise ValueError("--evals and --eval-every both say when the run is scored; leave out one of the two")


def check_data_options(config: TrainConfig) -> None:
    """Raise `ValueError` where the options of the data contradict each other, or name no data."""
    for name in ("train", "val"):
        if getattr(config, f"{name}_images") is not None and getattr(config, name) is None:
            raise ValueError(f"--{name}-images goes with --{name} JSON; with --data alone, leave it out")
    if config.val_fraction is not None and config.val is not None:
        raise ValueError("--val-fraction takes the images to score on from --train; leave out one of it and --val")
    if config.data is None and config.train is None:
        raise ValueError("give the dataset's folder as --data, or --train JSON and --val JSON")
    if config.data is None and config.val is None and config.val_fraction is None:
        raise ValueError("give --val JSON too, or --val-fraction 0.2 to keep a part of --train for scoring")
    if config.data is not None and config.train is not None and (config.val or config.val_fraction) is not None:
        raise ValueError("--train and --val (or --val-fraction) say where the data are; leave --data out")
    if config.draw_shapes and (config.data is None or config.train or config.val):
        raise ValueError("draw_shapes=True: it draws into --data; leave --train and --val out")


def is_recorded(config: TrainConfig, device_type: str) -> bool:
    """Say whether steps on a type of device are recorded as CUDA graphs.

    Checkpointing keeps the state of random numbers, which a graph cannot do.
    """
    return config.cuda_graphs and device_type == "cuda" and not config.grad_checkpointing


def with_defaults(config: TrainConfig) -> TrainConfig:
    """Fill in the network's options that are None, for a run without --init."""
    missing = {name: value for name, value in NETWORK_DEFAULTS.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def parse(args: Sequence[str] | None = None, description: str = "") -> TrainConfig:
    """Read a preset's name and the options after it, from the command line unless `args` are given.

    `finetune` has other defaults with --pretrained-backbone, see `FINETUNE_PRETRAINED`; options that are typed win.
    With --init, the preset's network steps back: only what was typed counts, and has to fit. The preset's zooming steps
    back too, see `without_zoom`.
    """
    args = sys.argv[1:] if args is None else args
    presets = presets_for(args)
    config = parse_grouped(presets, FIRST_OPTIONS, SECTIONS, args, description)
    preset, typed = presets[next(arg for arg in args if arg in presets)][1], typed_options(args)
    if len(lengths := sorted({"steps", "epochs", "minutes"} & typed)) > 1:
        raise ValueError(f"--{lengths[0]} and --{lengths[1]} both say how long the run is; leave out one of the two")
    if config.compile and "cuda_graphs" not in typed:  # compiled steps were never recorded on a real GPU
        config = dataclasses.replace(config, cuda_graphs=False)
    if config.cuda_graphs and config.grad_checkpointing and "cuda_graphs" in typed:
        raise ValueError("--cuda-graphs: steps with --grad-checkpointing cannot be recorded; leave out one of the two")
    if "eval_every" in typed:
        config = dataclasses.replace(config, evals=config.evals if "evals" in typed else None)
    if {"batch_size", "steps"} & typed and None not in (
        preset.batch_size,
        preset.steps,
        config.batch_size,
        config.steps,
    ):
        config = dataclasses.replace(config, **scale_schedule(config, preset, typed))
    if config.schedule == "cosine" and "milestones" not in typed:  # the preset's are of another schedule
        config = dataclasses.replace(config, milestones=TrainConfig.milestones)
    config = without_zoom(config, typed)
    if config.init is None:
        return config
    if "frozen_norm" in typed and not config.frozen_norm:
        raise ValueError("--no-frozen-norm: with --init, norms that are fixed there stay so; leave it out")
    return dataclasses.replace(config, **{name: getattr(TrainConfig, name) for name in NETWORK if name not in typed})


def typed_options(args: Sequence[str]) -> set[str]:
    """Return the names of the options that are among the arguments of a command."""
    names = {arg[2:].split("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    return {field.name for field in dataclasses.fields(TrainConfig) if {field.name, f"no_{field.name}"} & names}


def without_zoom(config: TrainConfig, typed: Collection[str]) -> TrainConfig:
    """Take back a preset's zooming, and what goes with it, where --augment says so, or where boxes may be in the
    published convention, which knows no zooming: with --init and with --variant published."""
    published = config.init is not None or config.variant == "published"
    if published and config.augment == "jitter_crop" and "augment" not in typed:
        config = dataclasses.replace(config, augment="flip")
    if config.augment == "jitter_crop":
        return config
    if "zoom" not in typed:
        config = dataclasses.replace(config, zoom=TrainConfig.zoom)
    if "augment_until" not in typed and not any(getattr(config, name) for name in STRONG):
        config = dataclasses.replace(config, augment_until=TrainConfig.augment_until)
    return config


LINEAR = ("momentum", "sgd")


def scale_schedule(config: TrainConfig, preset: TrainConfig, typed: Collection[str]) -> dict[str, Any]:
    """Return the schedule of a preset for the batch size and the steps of `config`; what was typed stays as it is.

    The run sees as many images as the preset's, also in its warm-up and between evaluations. The learning rate of SGD
    is proportional to the batch (linear scaling rule, arXiv 1706.02677), that of optimizers that normalize their
    updates to its square root (arXiv 2205.10287). Milestones stay at their share of all steps.
    """
    batches = max(config.batch_size, 1) / preset.batch_size  # a batch that is no number of images is refused later
    steps = config.steps if "steps" in typed else max(1, round(preset.steps / batches))
    milestones = sorted({max(1, round(step * steps / preset.steps)) for step in preset.milestones})
    values = dict(
        lr=preset.lr * (batches if config.optimizer in LINEAR else batches**0.5),
        steps=steps,
        milestones=tuple(milestones) if config.schedule == "multistep" else preset.milestones,
        warmup_steps=round(preset.warmup_steps / batches),
        eval_every=preset.eval_every and max(1, round(preset.eval_every / batches)),
    )
    return {name: value for name, value in values.items() if name not in typed}


def doubts(config: TrainConfig) -> list[str]:
    """Say what of a schedule has no effect, or hardly the one that was meant."""
    found = []
    if config.schedule == "multistep" and (late := [step for step in config.milestones if step >= config.steps]):
        found.append(
            f"the run ends after {counted(config.steps, 'step')}, before the milestones {late}, so the learning rate "
            "is not lowered there; give other --milestones"
        )
    if config.minutes is not None and config.steps < 100:
        found.append(
            f"only {counted(config.steps, 'step fits', 'steps fit')} into --minutes {config.minutes:g}; a detector "
            "learns little in so few"
        )
    if config.warmup_steps >= config.steps:
        found.append(
            f"the warm-up of {counted(config.warmup_steps, 'step')} does not end in a run of {config.steps}; give "
            "other --warmup-steps"
        )
    return found


_PUBLISHED = dict(
    data=None,
    variant="published",
    pretrained_backbone=True,
    frozen_norm=VARIANTS["published"]["frozen_norm"],
    drop_empty=True,
    bias_lr_factor=2.0,
    eval_every=15_000,
)
_PUBLISHED_2X = dict(_PUBLISHED, steps=180_000, milestones=(120_000, 160_000), warmup="linear")


class Published(NamedTuple):
    """The comparison of 2019 (FCOS with VoVNet) has these numbers of a detector."""

    model: str
    ap: float  # on COCO val2017, in percent
    milliseconds: float  # of an image on a TITAN Xp


# The rows of the comparison, by preset; R-50 is the row that times are compared with. maskrcnn-benchmark, on which that
# code stood, by default keeps a ResNet's stem and first stage fixed and starts from MSRA's weights; these presets train
# all of it, from torchvision's weights.
PUBLISHED = {
    "r50_1x": Published("fcos_resnet50_fpn", 37.5, 84),
    "v39_1x": Published("fcos_vovnet39_fpn", 37.7, 82),
    "r101_2x": Published("fcos_resnet101_fpn", 41.3, 104),
    "v57_2x": Published("fcos_vovnet57_fpn", 41.6, 91),
    "x101_2x": Published("fcos_resnext101_32x8d_fpn", 42.5, 171),
    "v93_2x": Published("fcos_vovnet93_fpn", 42.1, 113),
}


def _published(name: str) -> tuple[str, TrainConfig]:
    model, ap, _ = PUBLISHED[name]
    settings = dict(_PUBLISHED, warmup="constant") if name.endswith("1x") else _PUBLISHED_2X
    about = f"Published schedule of {model}, {name[-2:]} ({ap} AP on COCO, as published)."
    return about, TrainConfig(out=Path("runs") / name, model=model, **settings)


# A pretrained start is trained by AdamW with weight decay 0.05, but none for norms and biases, at a learning rate of
# 1e-4 to 2e-4 for 16 images. So were torchvision's RetinaNet on ResNet-50 (pytorch/vision, pull request 5756) and
# ConvNeXt in detectors of MMDetection, there with a decay of 0.7 from layer to layer of the backbone. Norms are frozen,
# because the few images of a device make poor statistics; then the number of processes does not change a run either.
_PRETRAINED = dict(
    pretrained_backbone=True,
    frozen_norm=True,
    optimizer="adamw",
    weight_decay=0.05,
    decay_norms=False,
    layer_decay=0.7,
    schedule="cosine",
    warmup_factor=0.01,
    clip_grad=10.0,
)
_COCO_EPOCH = 118_287 // 16  # steps


def _coco(epochs: int, model: str, zoom: tuple[float, float]) -> tuple[str, TrainConfig]:
    """Configure COCO for a number of epochs. A wide range of zoom gains in long trainings only (arXiv 2012.07177)."""
    name = f"coco_{epochs}e"
    return f"Modern recipe for COCO, {epochs} epochs from ImageNet weights; not measured yet.", TrainConfig(
        data=None,
        out=Path("runs") / name,
        model=model,
        variant="improved",
        min_size=(800, 800),
        augment="jitter_crop",
        zoom=zoom,
        steps=epochs * _COCO_EPOCH,
        lr=2e-4,
        warmup_steps=1000,
        ema=0.9998,
        precision="bf16",
        eval_every=2 * _COCO_EPOCH,
        **_PRETRAINED,
    )


_FROM_SCRATCH = dict(
    optimizer="muon",
    weight_decay=0.05,
    decay_norms=False,
    schedule="cosine",
    warmup_factor=0.01,
    clip_grad=10.0,
)


class Fit(NamedTuple):
    """What is chosen for a run follows from these numbers, which are those of batches of `batch_size` images."""

    lr: float
    epochs: float
    least_steps: int  # a detector of a few images needs these, too
    warmup_steps: int
    batch_size: int = 4


# From random weights, measured on the 205 photos of BCCD with batches of 4 (RESULTS.md): 240 steps gave AP 0.590, 600
# steps 0.620.
FIT = Fit(lr=2e-3, epochs=12, least_steps=600, warmup_steps=50)
# Pretrained features need fewer steps (arXiv 1811.08883). The new FPN and head have few steps to learn in, so the
# learning rate is above COCO's. These values are reasoned, not measured.
FIT_PRETRAINED = Fit(lr=5e-4, epochs=8, least_steps=400, warmup_steps=100)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "quickstart": (
        "Takes minutes on a CPU and draws its own dataset of shapes.",
        TrainConfig(
            data=Path("runs/shapes"),
            out=Path("runs/quickstart"),
            draw_shapes=True,
            batch_size=16,
            workers=1,
            steps=360,
            lr=2e-3,
            warmup_steps=20,
            ema=0.99,
            eval_every=180,
            model="fcos_vovnet27_slim_fpn",
            channels=64,
            num_convs=2,
            min_size=(128, 128),
            max_size=128,
            test_size=128,
            **_FROM_SCRATCH,
        ),
    ),
    "finetune": (
        "For your own small COCO-format dataset: from scratch, or from --init or --pretrained-backbone.",
        TrainConfig(
            data=None,
            out=Path("runs/finetune"),
            model="fcos_vovnet27_slim_fpn",
            channels=128,
            **dict.fromkeys((*FITTED, "workers")),
            evals=0,
            ema=0.995,
            augment="jitter_crop",  # of what was tried on BCCD (RESULTS.md), the cheapest of the two that gained most
            zoom=(0.7, 1.4),
            augment_until=0.85,
            **_FROM_SCRATCH,
        ),
    ),
    "coco_12e": _coco(12, "fcos_ese_vovnet19b_dw_fpn", zoom=(0.5, 2.0)),
    "coco_24e": _coco(24, "fcos_ese_vovnet39b_fpn", zoom=(0.5, 2.0)),
    "coco_36e": _coco(36, "fcos_ese_vovnet57b_fpn", zoom=(0.1, 2.0)),
    **{name: _published(name) for name in PUBLISHED},
}

# `finetune --pretrained-backbone` changes this: a backbone whose weights can be had, a learning rate that keeps what it
# knows (`FIT_PRETRAINED`), and frozen norms.
FINETUNE_PRETRAINED: dict[str, Any] = dict(_PRETRAINED, model="fcos_ese_vovnet19b_dw_fpn")


def presets_for(args: Sequence[str]) -> dict[str, tuple[str, TrainConfig]]:
    """Choose the presets' defaults by whether these arguments of a command ask for a pretrained backbone."""
    about, finetune = PRESETS["finetune"]
    if any(arg.replace("_", "-").split("=")[0] == "--pretrained-backbone" for arg in args):
        finetune = dataclasses.replace(finetune, **FINETUNE_PRETRAINED)
    return {**PRESETS, "finetune": (about, finetune)}
