"""These functions build what a `TrainConfig` names: the data, its loader and the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loading import Batches
from presets import TrainConfig, with_defaults
from quickstart_data import make_shapes
from runtime import StopSignal, barrier, log
from vovnet_zoo import FCOS, FCOSLoss, create_detector
from vovnet_zoo.backbone import create_backbone
from vovnet_zoo.classifiers import SOURCES
from vovnet_zoo.config import (
    DEFAULT_VARIANT,
    DEFAULTS,
    THRESHOLDS,
    VARIANTS,
    DetectorConfig,
    DetectorOptions,
    Resize,
)
from vovnet_zoo.data import (
    CocoDataset,
    Source,
    TrainSampler,
    augment_training,
    changed,
    collate,
    difficult_as_crowd,
    repeat_factors,
    without_classes,
)
from vovnet_zoo.data.layouts import choose_split, choose_whole
from vovnet_zoo.data.splitting import hold_out
from vovnet_zoo.detectors import DETECTORS, STARTS, load_detector
from vovnet_zoo.fcos import shared_classes
from vovnet_zoo.fused import use_gpu_kernels
from vovnet_zoo.kernels.osa import fuse_for_training
from vovnet_zoo.kernels.winograd import has_amx, use_winograd
from vovnet_zoo.words import counted


def load_start(config: TrainConfig) -> FCOS | None:
    """Load the detector that the training starts from, which `config.init` names; None where it names none.

    Raises:
        ValueError: an option contradicts that detector, see `check_start`.
    """
    if config.init is None:
        return None
    start = load_detector(config.init)
    check_start(config, start.config)
    return start


def check_start(config: TrainConfig, start: DetectorConfig) -> None:
    """Raise `ValueError` where an option says that the detector of `config.init` is another than it is."""
    known: dict[str, Any] = {**DEFAULTS, **THRESHOLDS._asdict(), **start}  # an older run's config says less
    backbone = config.backbone or DETECTORS.get(config.model or "", {}).get("backbone")
    wanted: dict[str, dict[str, Any]] = {  # by option
        f"--model {config.model}" if config.backbone is None else f"--backbone {config.backbone}": {
            "backbone": backbone
        },
        f"--channels {config.channels}": {"channels": config.channels},
        f"--num-convs {config.num_convs}": {"num_convs": config.num_convs},
        f"--variant {config.variant}": {**VARIANTS[config.variant]} if config.variant else {},
    }
    for option, settings in wanted.items():
        settings.pop("frozen_norm", None)  # an option of its own, which is followed
        if wrong := [f"{k}={known[k]!r}, not {v!r}" for k, v in settings.items() if v is not None and known[k] != v]:
            raise ValueError(
                f"{option} does not fit --init {config.init}, which has {', '.join(wrong)}; a detector keeps its "
                f"network and conventions: leave {option.split()[0]} out (in Python, None)"
            )


def check_weights(config: TrainConfig) -> None:
    """Fetch the backbone's pretrained weights, if a run starts from them, before it does what takes longer.

    Raises:
        ValueError: they cannot be had; the message says what to type instead.
    """
    if not config.pretrained_backbone or (config.backbone or "").startswith(SOURCES):  # build_model reads a classifier
        return
    config = with_defaults(config)
    name = config.backbone or STARTS.get(config.model) or DETECTORS[config.model]["backbone"]
    try:
        create_backbone(name, pretrained=True)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}. The training starts from these weights of the backbone of {config.model}: to start from a "
            "detector that you have, type --init FOLDER --no-pretrained-backbone; to start without any, type "
            "--no-pretrained-backbone --no-frozen-norm, and it learns more slowly"
        ) from error


def build_datasets(
    config: TrainConfig,
    places: dict[str, tuple[Path, Source]],
    plus_one: bool,
    resize: Resize,
    known: Sequence[str] = (),
) -> tuple[CocoDataset, CocoDataset]:
    """Open the training and the validation set; `ValueError` where they do not fit each other.

    Arguments as for `build_train_set`, but the places of both, from `find_splits`.
    """
    train_set = build_train_set(config, places["train"], plus_one, resize, known)
    val_set = CocoDataset(
        *places["val"],
        plus_one=plus_one,
        skip_bad_images=config.skip_bad_images,
        known_classes=train_set.class_names,
    )
    check_data(config, train_set, val_set)
    return train_set, val_set


def build_train_set(
    config: TrainConfig, place: tuple[Path, Source], plus_one: bool, resize: Resize, known: Sequence[str] = ()
) -> CocoDataset:
    """Open the training set, which augments its images as the configuration says.

    Boxes follow the published pixel convention with `plus_one`, and images are resized by the rule `resize`. A run that
    goes on knows its classes (`known`).
    """
    train_set = CocoDataset(
        *place,
        drop_empty=config.drop_empty,
        plus_one=plus_one,
        skip_bad_images=config.skip_bad_images,
        known_classes=known,
    )
    augment_training(train_set, config, resize)
    return train_set


def conventions_of(config: TrainConfig, start: FCOS | None, known: DetectorConfig | None = None) -> dict[str, Any]:
    """Return the conventions of a run: those of the checkpoint that it goes on from, of `start`, or of its variant."""
    return {**DEFAULTS, **(known or (start.config if start else VARIANTS[config.variant or DEFAULT_VARIANT]))}


def find_splits(
    config: TrainConfig, rank: int, splits: Sequence[str] = ("train", "val"), goes_on: bool = False
) -> dict[str, tuple[Path, Source]]:
    """Find the images and annotations of "train" and "val", changed as the configuration says, or draw them.

    A run that goes on keeps its own split of one dataset, unless `config.allow_changes`.

    Args:
        splits: those that are looked for; "train" is one of them.
    """
    if config.draw_shapes:
        if rank == 0:
            make_shapes(config.data)
        barrier()
    files = {"train": (config.train, config.train_images), "val": (config.val, config.val_images)}
    if config.val_fraction is None:
        found = [choose_split(config.data, split, *files[split]) for split in splits]
        places = {split: (x.folder, x.source) for split, x in zip(splits, found, strict=True)}
    else:
        found = [choose_whole(config.data, *files["train"])]
        if rank > 0:  # rank 0 writes the two parts
            barrier()
        keep = goes_on and not config.allow_changes
        parts = hold_out(found[0], config.val_fraction, config.seed, config.out / "split", replace=not keep)
        places = {split: parts[split] for split in splits}
        if rank == 0:
            barrier()
    for x in found:
        log.info("%s", x.how)
    for text in dict.fromkeys(text for x in found for text in x.warnings):  # of both splits, or of their common file
        log.warning("%s", text)
    if config.difficult_as_crowd:
        places = {split: (folder, changed(source, difficult_as_crowd)) for split, (folder, source) in places.items()}
    if config.drop_empty_classes and (empty := classes_without_boxes(*places["train"])):
        log.warning("these classes have no box, and are left out: %s", ", ".join(empty))
        change = functools.partial(without_classes, names=tuple(empty))
        places = {split: (folder, changed(source, change)) for split, (folder, source) in places.items()}
    return places


def classes_without_boxes(folder: Path, source: Source) -> list[str]:
    """List the classes of which no image has a usable box."""
    dataset = CocoDataset(folder, source)
    return [name for name, count in zip(dataset.class_names, dataset.class_counts, strict=True) if not count]


def check_data(config: TrainConfig, train_set: CocoDataset, val_set: CocoDataset) -> None:
    """Raise `ValueError` where the two sets do not go together."""
    if train_set.class_names != val_set.class_names:
        raise ValueError(
            f"{config.data or config.train}: the splits have different classes: train {train_set.class_names} with ids "
            f"{train_set.category_ids}, val {val_set.class_names} with ids {val_set.category_ids}; "
            "list the same classes in both, also those without a box there"
        )
    if train_set.category_ids != val_set.category_ids:
        log.warning(
            "the splits number the classes differently (train %s, val %s); they are matched by name",
            *(train_set.category_ids, val_set.category_ids),
        )
    for dataset, what in ((train_set, "only background is learnt"), (val_set, "nothing can be scored")):
        if not dataset.num_boxes:
            log.warning("%s: no image has a box, so %s", dataset.annotation_file, what)
    if empty := [name for name, n in zip(train_set.class_names, train_set.class_counts, strict=True) if not n]:
        log.warning(
            "these classes have no box in training: %s; --drop-empty-classes leaves them out", ", ".join(empty[:20])
        )


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Raise `ValueError` where a batch cannot be shared out."""
    if config.batch_size % (world_size * config.accum):
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared out over {counted(world_size, 'process')} x "
            f"{counted(config.accum, 'part')}"
        )


def build_model(
    config: TrainConfig,
    class_names: list[str],
    category_ids: list[int],
    start: FCOS | None,
    saved: DetectorConfig | None = None,
) -> FCOS:
    """Create the detector that is to learn these classes: a new one, or one that begins with the weights of `start`.

    For a run that goes on, `saved` is the model's config in its checkpoint. The checkpoint holds the weights too, so
    neither `start` nor pretrained weights are needed again.
    """
    num_classes = len(class_names)
    options: DetectorOptions = dict(
        class_names=class_names,
        category_ids=category_ids,
        min_size=config.test_size,
        max_size=config.max_size,
        thresholds=None,
    )
    if saved is not None:
        return FCOS(**{**saved, "num_classes": num_classes, **options})
    if start is None:
        config = with_defaults(config)
        if config.backbone is not None:
            options["backbone"] = config.backbone
        return create_detector(
            config.model,
            variant=config.variant,
            pretrained_backbone=config.pretrained_backbone,
            num_classes=num_classes,
            frozen_norm=config.frozen_norm,
            channels=config.channels,
            num_convs=config.num_convs,
            **options,
        )
    frozen_norm = start.config["frozen_norm"] or config.frozen_norm
    model = FCOS(**{**start.config, "num_classes": num_classes, "frozen_norm": frozen_norm, **options})
    weights = start.state_dict()
    if frozen_norm:  # fixed batch norms do not count batches
        weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    rows = shared_classes(start.class_names, class_names)
    for name, new in model.state_dict().items():
        if name.startswith("head.cls_logits."):  # its first dimension is the classes'
            old, weights[name] = weights[name], new
            new[[now for now, _ in rows]] = old[[before for _, before in rows]]
    model.load_state_dict(weights, strict=True)
    return model


def log_start(config: TrainConfig, start: FCOS, class_names: Sequence[str]) -> None:
    """Say which classes begin with what the detector of `config.init` knows of them."""
    known = {now for now, _ in shared_classes(start.class_names, class_names)}
    new = [name for i, name in enumerate(class_names) if i not in known]
    log.info(
        "starting from %s, which knows %d of %s%s",
        *(config.init, len(known), counted(len(class_names), "class")),
        f"; these are new to it: {', '.join(new[:20])}" if new else "",
    )


def prepare_for_training(model: FCOS, config: TrainConfig, device: torch.device) -> None:
    """Move the model to the device, and make its training faster or its memory smaller as `config` says.

    The model computes the same as before, apart from rounding.
    """
    prepare_blocks(model, config, device)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()


def prepare_blocks(model: nn.Module, config: Any, device: torch.device) -> None:
    """Move any model to the device, and put the faster blocks in that fit it; only rounding changes."""
    model.to(device, memory_format=torch.channels_last).train()
    fuse_for_training(model)
    use_gpu_kernels(model, device)
    if config.winograd and device.type == "cpu" and config.precision != "fp16":
        if config.precision == "float32" or not has_amx():
            use_winograd(model)


def build_loss(model: FCOS, device: torch.device) -> FCOSLoss:
    """Create the loss of a detector, on a GPU with a kernel of its own."""
    criterion = FCOSLoss.of(model)
    use_gpu_kernels(criterion, device)
    return criterion


def build_sampler(
    config: TrainConfig, dataset: CocoDataset, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> TrainSampler:
    """Create the sampler that chooses this process's images of each step from `start_step` on."""
    return TrainSampler(
        dataset.aspect_ratios,
        config.batch_size,
        num_steps=config.steps,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        factors=repeat_factors(dataset, config.repeat_rare) if config.repeat_rare else None,
        late_from=round(config.augment_until * config.steps) if config.augment_until < 1 else None,
    )


def build_loader(
    config: TrainConfig,
    dataset: CocoDataset,
    start_step: int,
    rank: int,
    world_size: int,
    device: torch.device,
    stop: StopSignal | None = None,
) -> Batches:
    """Create a loader that gives, for each step from `start_step` on, this process's share of the batch in parts.

    An item of the loader is a list of `config.accum` dicts, see `vovnet_zoo.data.collate`.
    """
    sampler = build_sampler(config, dataset, start_step, rank, world_size)
    return Batches(
        dataset,
        workers=config.workers,
        collate_fn=functools.partial(
            collate_parts, count=config.accum, collate=functools.partial(collate, num_classes=len(dataset.class_names))
        ),
        stop=stop,
        batch_sampler=sampler,
        pin_memory=device.type == "cuda",
    )


def collate_parts(samples: list, count: int, collate: Callable) -> list[dict[str, Tensor]]:
    """Make `count` batches of equal size from a list of samples."""
    size = len(samples) // count
    return [collate(samples[i * size : (i + 1) * size]) for i in range(count)]
