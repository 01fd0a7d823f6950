"""Presets are named training configurations. Each field of a preset can be changed on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vovnet_zoo.config import VARIANTS, VariantName


@dataclass(frozen=True)
class TrainConfig:
    """A training run is configured by these fields. Sizes are in pixels; a step is one update of the weights."""

    data: Path
    """COCO-format dataset: annotations/instances_{train,val}*.json beside the image folders."""
    out: Path
    """Run folder: best/, last/, metrics.jsonl, curves.png, detections.png."""
    draw_shapes: bool = False
    """Draw a dataset of shapes into --data, if nothing is there."""

    model: str = "fcos_vovnet39_fpn"
    """A name of list_detectors(), or "fcos" with --backbone."""
    backbone: str | None = None
    """Any timm model with feature maps at strides 8, 16, 32; use it with --model fcos."""
    variant: VariantName | None = None
    """Conventions of data, model, loss and evaluation: "improved" (the default), or "published" for the conventions of
    the 2019 detectors. With --init the detector keeps its own conventions."""
    channels: int = 256
    """Channels of FPN and head."""
    num_convs: int = 4
    """Convolutions in each of the head's towers."""
    init: str | None = None
    """Start from this detector (folder or Hub name); its head is kept if it has as many classes."""
    pretrained_backbone: bool = False
    """Start from the backbone's ImageNet weights, through timm."""
    frozen_norm: bool = False
    """Keep the backbone's batch norms fixed; recommended with pretrained weights and few images per device."""

    min_size: tuple[int, int] = (640, 800)
    """Range of the shorter side in training."""
    max_size: int = 1333
    """Limit of the longer side."""
    test_size: int = 800
    """Shorter side in evaluation; it is saved with the model."""
    augment: Literal["none", "flip", "jitter_crop"] = "flip"
    """Augmentation in training: none, mirroring, or mirroring with zooming and cropping."""
    drop_empty: bool = False
    """Leave out training images without boxes."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read or have another size than the JSON says, rather than stop."""
    batch_size: int = 16
    """Images per step, over all processes and accumulated parts."""
    accum: int = 1
    """Parts into which each process's share of a batch is split, to save memory."""
    workers: int = 4
    """Data loading processes per training process; in evaluations, threads."""

    steps: int = 90_000
    """Updates of the weights."""
    optimizer: str = "momentum"
    """A name of timm.optim.list_optimizers(); "momentum" is SGD without Nesterov."""
    lr: float = 0.01
    """Learning rate at its highest."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters but biases."""
    bias_lr_factor: float = 1.0
    """The learning rate of biases is lr times this."""
    decay_norms: bool = True
    """Apply weight decay to one-dimensional weights too (norms and level scales)."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """Course of the learning rate after the warm-up."""
    milestones: tuple[int, ...] = (60_000, 80_000)
    """Steps where multistep multiplies the learning rate by 0.1."""
    warmup: Literal["constant", "linear"] = "linear"
    """Course of the learning rate in the warm-up."""
    warmup_steps: int = 500
    """Length of the warm-up."""
    warmup_factor: float = 1 / 3
    """The learning rate of the first step is lr times this."""
    ema: float | None = None
    """Decay of a moving average of the weights; if given, the average is scored and saved."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    layer_decay: float | None = None
    """Each part of the backbone has the learning rate of the part above it, times this."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of the network (autocast); losses are always float32."""
    compile: bool = False
    """Compile network and losses to one graph with fused kernels (torch.compile)."""
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
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed run loses at most this many."""
    max_not_finite: int = 10
    """Stop after this many steps in a row whose loss is not finite; such a step is skipped."""
    allow_changes: bool = False
    """Go on from the checkpoints in --out although the configuration or the data has changed."""


_PUBLISHED = dict(
    data=tyro.MISSING,
    variant="published",
    pretrained_backbone=True,
    frozen_norm=VARIANTS["published"]["frozen_norm"],
    drop_empty=True,
    bias_lr_factor=2.0,
    eval_every=15_000,
)
_PUBLISHED_2X = dict(_PUBLISHED, steps=180_000, milestones=(120_000, 160_000), warmup="linear")

_FROM_SCRATCH = dict(
    workers=1,
    optimizer="muon",
    lr=2e-3,
    weight_decay=0.05,
    decay_norms=False,
    schedule="cosine",
    warmup_factor=0.01,
    clip_grad=10.0,
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "quickstart": (
        "Takes minutes on a CPU and draws its own dataset of shapes.",
        TrainConfig(
            data=Path("runs/shapes"),
            out=Path("runs/quickstart"),
            draw_shapes=True,
            batch_size=16,
            steps=360,
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
            data=tyro.MISSING,
            out=Path("runs/finetune"),
            model="fcos_vovnet27_slim_fpn",
            channels=128,
            min_size=(288, 352),
            max_size=640,
            test_size=320,
            batch_size=4,
            steps=600,
            warmup_steps=50,
            ema=0.995,
            checkpoint_every=100,
            **_FROM_SCRATCH,
        ),
    ),
    "v39_1x": (
        "Published schedule of FCOS V-39-FPN 1x (37.7 AP on COCO, as published).",
        TrainConfig(out=Path("runs/v39_1x"), model="fcos_vovnet39_fpn", warmup="constant", **_PUBLISHED),
    ),
    "v57_2x": (
        "Published schedule of FCOS V-57-FPN 2x multi-scale (41.6 AP on COCO, as published).",
        TrainConfig(out=Path("runs/v57_2x"), model="fcos_vovnet57_fpn", **_PUBLISHED_2X),
    ),
    "v93_2x": (
        "Published schedule of FCOS V-93-FPN 2x multi-scale (42.1 AP on COCO, as published).",
        TrainConfig(out=Path("runs/v93_2x"), model="fcos_vovnet93_fpn", **_PUBLISHED_2X),
    ),
}
