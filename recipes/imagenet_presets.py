"""Presets are named training configurations of classifiers. Each field can be changed on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from options import Range, check_options


@dataclass(frozen=True)
class ClassifierConfig:
    """A training run is configured by these fields. Sizes are in pixels; an epoch is as many images as the set has."""

    data: Path
    """Folder with train/ and val/, each with a folder of images per class, or with train.tar and val.tar of such
    folders; with --dataset wds/, the folder of the shards; with hfds/, the cache of downloads."""
    out: Path
    """Run folder: best/, last/, metrics.jsonl, checkpoints/."""
    dataset: str = ""
    """Another kind of dataset, by timm's name: wds/ (WebDataset) or hfds/NAME (Hugging Face)."""
    train_split: str = "train"
    """Name of the training split; for wds/ also the shards and the number of images: train-{0000..1023}.tar|1281167."""
    val_split: str = "val"
    """Name of the validation split."""

    model: str = "vovnet39"
    """A model of timm's registry."""
    init: str | None = None
    """Start from this classifier (a folder, or hf-hub:NAME); its last layer is kept if it has as many classes."""
    frozen_norm: bool = False
    """Keep the batch norms fixed; the result then does not depend on the number of processes."""
    drop_path: float = 0.0
    """Probability of leaving out a block for an image (stochastic depth)."""

    train_size: int = 224
    """Width and height of training images."""
    test_size: int = 224
    """Width and height in evaluation; it is saved with the model."""
    crop_pct: float = 0.875
    """In evaluation, the shorter side is resized to test_size / crop_pct, and the middle cropped."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation in evaluation; it is saved with the model."""
    train_interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """Interpolation in training."""
    min_scale: float = 0.08
    """A training image is a crop of at least this part of the area."""
    hflip: float = 0.5
    """Probability of mirroring an image; 0 for digits and letters."""
    color_jitter: float | None = None
    """Change brightness, contrast and saturation by up to this factor."""
    auto_augment: str | None = None
    """Policy of timm such as rand-m7-mstd0.5-inc1, or ta_wide (torchvision's TrivialAugmentWide)."""
    erase: float = 0.0
    """Probability of erasing a rectangle."""
    repeats: int = 1
    """Show an image so many times in a row, augmented differently, and so many fewer images in an epoch."""
    mixup: float = 0.0
    """Alpha of Mixup; 0 is no Mixup."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is no CutMix. With both, each pair of images has one of them."""
    smoothing: float = 0.0
    """Label smoothing."""
    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    """Cross entropy, or binary cross entropy of each class."""
    target_threshold: float | None = None
    """With the binary loss, a class whose part of a mixed image is larger counts in full."""

    batch_size: int = 256
    """Images per step, over all processes and accumulated parts."""
    accum: int = 1
    """Parts into which each process's share of a batch is split, to save memory."""
    workers: int = 8
    """Data loading processes per training process."""
    epochs: int = 90
    """Length of the training."""
    optimizer: str = "momentum"
    """A name of timm.optim.list_optimizers(); "momentum" is SGD without Nesterov."""
    lr: float = 0.1
    """Learning rate at its highest."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters but biases."""
    decay_norms: bool = True
    """Apply weight decay to the weights of norms too."""
    schedule: Literal["multistep", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    milestone_epochs: tuple[int, ...] = (30, 60)
    """Epochs after which multistep multiplies the learning rate by 0.1."""
    warmup: Literal["constant", "linear"] = "linear"
    """Course of the learning rate in the warm-up."""
    warmup_epochs: float = 0.0
    """Length of the warm-up."""
    warmup_factor: float = 0.01
    """The learning rate of the first step is lr times this."""
    ema: float | None = None
    """Decay of a moving average of the weights; if given, the average is scored and saved."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of the network (autocast); the loss is always float32."""
    compile: bool = False
    """Compile network and loss to one graph (torch.compile)."""
    winograd: bool = True
    """On a CPU, compute 3x3 convolutions with a quarter of the multiplications where that gains (kernels/)."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""

    eval_epochs: int = 1
    """Epochs between evaluations; the last step is always followed by one."""
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

    # a detector's training has options for these
    bias_lr_factor: ClassVar[float] = 1.0
    layer_decay: ClassVar[float | None] = None
    patience: ClassVar[int | None] = None


RANGES = {
    **dict.fromkeys(("train_size", "test_size"), Range(1, 4096)),
    **dict.fromkeys(("batch_size", "accum", "repeats", "epochs", "milestone_epochs"), Range(1)),
    **dict.fromkeys(("eval_epochs", "checkpoint_every", "max_not_finite"), Range(1)),
    **dict.fromkeys(("workers", "weight_decay", "warmup_epochs", "color_jitter", "mixup", "cutmix"), Range(0)),
    **dict.fromkeys(("lr", "clip_grad"), Range(0, inside=True)),
    **dict.fromkeys(("crop_pct", "min_scale"), Range(0.01, 1)),
    **dict.fromkeys(("hflip", "erase", "warmup_factor"), Range(0, 1)),
    **dict.fromkeys(("drop_path", "smoothing"), Range(0, 0.99)),
    **dict.fromkeys(("ema", "target_threshold"), Range(0, 1, inside=True)),
    "seed": Range(0, 2**63 - 1),
}


def check_config(config: ClassifierConfig) -> None:
    """Raise `ValueError`, naming the option, where one is out of its range or would have no effect."""
    check_options(config, RANGES)
    if list(config.milestone_epochs) != sorted(set(config.milestone_epochs)):
        raise ValueError(f"milestone_epochs={config.milestone_epochs}: give different epochs, the first epoch first")
    if config.schedule == "cosine" and config.milestone_epochs != ClassifierConfig.milestone_epochs:
        raise ValueError(f"milestone_epochs={config.milestone_epochs}: the cosine schedule has none; leave them out")
    if config.target_threshold is not None and config.loss != "binary":
        raise ValueError(
            f"target_threshold={config.target_threshold}: only --loss binary has one; give --target-threshold None"
        )


@dataclass(frozen=True)
class ScheduledConfig(ClassifierConfig):
    """This is the same configuration, with its epochs counted in steps, which are updates of the weights."""

    steps: int = 0
    warmup_steps: int = 0
    milestones: tuple[int, ...] = ()
    eval_every: int = 0


def count_steps(config: ClassifierConfig, steps_per_epoch: float) -> ScheduledConfig:
    """Count the epochs of a configuration in steps."""

    def steps(epochs: float) -> int:
        return max(1, int(epochs * steps_per_epoch))

    return ScheduledConfig(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(ClassifierConfig)},
        steps=steps(config.epochs),
        warmup_steps=steps(config.warmup_epochs) if config.warmup_epochs else 0,
        milestones=tuple(map(steps, config.milestone_epochs)) if config.schedule == "multistep" else (),
        eval_every=steps(config.eval_epochs),
    )


# `--help` shows these options first, then groups that begin with a field of ClassifierConfig.
FIRST_OPTIONS = ("data", "out", "model", "epochs", "batch_size")
SECTIONS = {
    "dataset": "data",
    "init": "network",
    "train_size": "image",
    "smoothing": "loss",
    "accum": "batch",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "ema": "optimizer",
    "precision": "machine",
    "eval_epochs": "run",
}

# "ResNet strikes back", arXiv 2110.00476, table 2, and `--bce-target-thresh 0.2` of timm's command for it. timm ends
# the cosine at a learning rate of 1e-6, which is 0 here; clips the gradient to norm 1 inside LAMB, as here; and draws
# Mixup once for the images of each GPU, here once for each pair of images.
_RSB = dict(
    data=tyro.MISSING,
    interpolation="bicubic",
    train_interpolation="random",
    crop_pct=0.95,
    mixup=0.1,
    cutmix=1.0,
    loss="binary",
    target_threshold=0.2,
    batch_size=2048,
    optimizer="lamb",
    weight_decay=0.02,
    decay_norms=False,
    warmup_epochs=5,
    precision="bf16",
)

PRESETS: dict[str, tuple[str, ClassifierConfig]] = {
    "small": (
        "For your own small folder of images: minutes on a CPU, from scratch or from --init.",
        ClassifierConfig(
            data=tyro.MISSING,
            out=Path("runs/small"),
            model="vovnet27_slim",
            train_size=64,
            test_size=64,
            crop_pct=1.0,
            min_scale=0.5,
            batch_size=64,
            workers=1,
            epochs=15,
            optimizer="muon",
            lr=2e-3,
            weight_decay=0.05,
            decay_norms=False,
            warmup_epochs=0.5,
            smoothing=0.1,
            ema=0.99,
            clip_grad=10.0,
        ),
    ),
    "rsb_a3": (
        "ResNet strikes back, procedure A3: 100 epochs at 160 pixels (78.1 top-1 with ResNet-50, as published).",
        ClassifierConfig(
            out=Path("runs/rsb_a3"), train_size=160, auto_augment="rand-m6-mstd0.5-inc1", epochs=100, lr=8e-3, **_RSB
        ),
    ),
    "rsb_a2": (
        "ResNet strikes back, procedure A2: 300 epochs at 224 pixels (79.8 top-1 with ResNet-50, as published).",
        ClassifierConfig(
            out=Path("runs/rsb_a2"),
            auto_augment="rand-m7-mstd0.5-inc1",
            repeats=3,
            drop_path=0.05,
            epochs=300,
            lr=5e-3,
            **_RSB,
        ),
    ),
    # The PyTorch blog, "How to Train State-Of-The-Art Models Using TorchVision's Latest Primitives" (2021). Its average
    # has a decay of 0.99998, which its code changes to 1 - 2e-5 * 1024 * 32 / 600 and applies every 32 steps: that is
    # 0.999966 for each step. Its last layer's bias is decayed, here no bias is.
    "tv2": (
        "torchvision's new recipe: 600 epochs at 176 pixels (80.9 top-1 with ResNet-50, as published).",
        ClassifierConfig(
            data=tyro.MISSING,
            out=Path("runs/tv2"),
            train_size=176,
            crop_pct=224 / 232,
            auto_augment="ta_wide",
            erase=0.1,
            repeats=4,
            mixup=0.2,
            cutmix=1.0,
            smoothing=0.1,
            batch_size=1024,
            epochs=600,
            lr=0.5,
            weight_decay=2e-5,
            decay_norms=False,
            warmup_epochs=5,
            ema=0.999966,
            precision="bf16",
        ),
    ),
    # The VoVNet authors publish 90 epochs and a step schedule (23.23 % top-1 error with VoVNet-39, 22.27 % with 57).
    # The other numbers are from PyTorch's ImageNet example, the usual meaning of such a schedule: SGD with momentum
    # 0.9 and weight decay 1e-4 of all weights, learning rate 0.1 for 256 images, divided by 10 every 30 epochs, crops
    # and mirroring. (No bias is decayed here.)
    "authors": (
        "The VoVNet authors' schedule: 90 epochs at 224 pixels (76.77 top-1 with VoVNet-39, as published).",
        ClassifierConfig(data=tyro.MISSING, out=Path("runs/authors"), schedule="multistep"),
    ),
}
