"""`set_up` builds the run of a classifier's training, from its newest checkpoint if there is one."""

from __future__ import annotations

import dataclasses
import difflib

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from build import prepare_blocks
from image_data import (
    Stream,
    check_data,
    class_names_of,
    describe_split,
    eval_transform,
    open_split,
    steps_per_epoch,
    train_transform,
)
from imagenet_presets import ClassifierConfig, count_steps
from run_folder import FREE, load_checkpoint, refuse_changes
from runtime import log
from training_run import Run, assemble
from vovnet_zoo.classifiers import load_classifier
from vovnet_zoo.words import counted


def set_up(config: ClassifierConfig, rank: int, world_size: int, device: torch.device) -> Run:
    """Build a run. If `config.out` has a checkpoint, the run goes on from there."""
    saved = load_checkpoint(config.out / "checkpoints")
    start, cfg = find_start(config) if saved is None else (None, saved["config"]["pretrained_cfg"])
    cfg |= {key: getattr(config, key) for key in ("crop_pct", "interpolation")}
    cfg |= {"input_size": [3, config.test_size, config.test_size]}

    # Data, and the length of the run in steps.
    train_set = open_split(config, config.train_split, train_transform(config, cfg["mean"]), world_size)
    val_set = open_split(config, config.val_split, eval_transform(config), world_size)
    check_data(config, train_set, val_set, world_size)
    class_names = class_names_of(train_set)
    images, classes = counted(len(train_set), "image"), counted(len(class_names), "class")
    log.info("%s of %s, %d held out", images, classes, len(val_set))
    config = count_steps(config, steps_per_epoch(config, train_set))
    identity = {name: repr(value) for name, value in dataclasses.asdict(config).items() if name not in FREE}
    identity |= {"train": describe_split(train_set), "val": describe_split(val_set)}
    if isinstance(train_set, Stream):  # the order of a stream depends on who reads it
        identity["readers"] = f"{world_size} processes x {config.workers} workers"
    changed = refuse_changes(saved["run"], identity, config) if saved else []

    torch.manual_seed(config.seed)
    model = build_model(config, len(class_names), start)
    prepare_blocks(model, config, device)
    return assemble(
        saved,
        changed,
        config=config,
        rank=rank,
        world_size=world_size,
        device=device,
        train_set=train_set,
        val_set=val_set,
        model=model,
        model_config={"architecture": config.model, "class_names": class_names, "pretrained_cfg": cfg},
        criterion=create_loss(config),
        identity=identity,
    )


def find_start(config: ClassifierConfig) -> tuple[nn.Module | None, dict]:
    """Load the classifier that the training starts from, if there is one, with its mean and std or the model's own.

    `ValueError` where timm has no such model, or the classifier is of another architecture.
    """
    if not timm.is_model(config.model) or "." in config.model:
        near = ", ".join(difflib.get_close_matches(config.model, timm.list_models(), n=3))
        raise ValueError(
            f"model={config.model!r}: timm has no such model" + (f"; did you mean {near}?" if near else "")
        )
    start, cfg = None, timm.get_pretrained_cfg(config.model).to_dict()
    if config.init is not None:
        start, name, cfg = load_classifier(config.init)
        if name != config.model:
            raise ValueError(f"--init {config.init} is a {name}, not a {config.model}: give --model {name}")
    return start, {key: list(cfg[key]) for key in ("mean", "std")}


def build_model(config: ClassifierConfig, num_classes: int, start: nn.Module | None) -> nn.Module:
    """Create the classifier, with the weights of `start` as far as they fit; only its last layer may not."""
    options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    model = timm.create_model(config.model, num_classes=num_classes, **options)
    if start is not None:
        weights = start.state_dict()
        if start.num_classes != num_classes:
            last = timm.get_pretrained_cfg(config.model).classifier
            weights |= {key: x for key, x in model.state_dict().items() if key.startswith(f"{last}.")}
        model.load_state_dict(weights)
    return freeze_batch_norm_2d(model) if config.frozen_norm else model


def create_loss(config: ClassifierConfig) -> nn.Module:
    """Create timm's loss of logits [B,K], and labels [B], or [B,K] where images are mixed; it is a mean over images."""
    if config.loss == "binary":
        return BinaryCrossEntropy(config.smoothing, config.target_threshold)
    return SoftTargetCrossEntropy() if config.mixup or config.cutmix else LabelSmoothingCrossEntropy(config.smoothing)
