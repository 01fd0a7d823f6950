"""Train a detector on a COCO-format dataset: `python recipes/train_coco.py PRESET --data ROOT [--lr ...]`.

Under torchrun (`torchrun --nproc-per-node 8 recipes/train_coco.py v39_1x --data ROOT`) the batch is shared out over
the processes; the result does not depend on how many there are. A run that was stopped, by whatever, goes on when the
same command is typed again.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import tyro
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import load_checkpoint, save_checkpoint
from eval_coco import evaluate
from optim import create_optimizer, set_lr
from presets import PRESETS, TrainConfig
from runtime import (
    RunLog,
    StopSignal,
    all_reduce,
    all_reduce_gradients,
    barrier,
    ignore_stop_signals,
    log,
    peak_memory,
    process_group,
)
from same_run import describe_run, refuse_changes
from shapes import make_shapes
from vovnet_zoo import FCOS, FCOSLoss, create_detector
from vovnet_zoo.coco_eval import format_table
from vovnet_zoo.data import CocoDataset, Skipped, TrainSampler, collate, find_split, normalize, train_transforms
from vovnet_zoo.fcos import level_sizes, make_points
from vovnet_zoo.loss import Targets
from vovnet_zoo.kernels.osa import fuse_for_training
from vovnet_zoo.kernels.winograd import use_winograd


def main(config: TrainConfig) -> dict | None:
    """Run `config`; returns the last evaluation on rank 0, None on the others."""
    with process_group(config.device) as (rank, world_size, device), StopSignal() as stop:
        return train(config, rank, world_size, device, stop)


def train(config: TrainConfig, rank: int, world_size: int, device: torch.device, stop: StopSignal) -> dict | None:
    if config.draw_shapes:
        if rank == 0:
            make_shapes(config.data)
        barrier()
    transforms = train_transforms(config.min_size, config.max_size, config.augment)
    train_set = CocoDataset(
        *find_split(config.data, "train"),
        transforms=transforms,
        drop_empty=config.drop_empty,
        skip_bad_images=config.skip_bad_images,
    )
    val_set = CocoDataset(*find_split(config.data, "val"))
    check_config(config, train_set, val_set, world_size)

    torch.manual_seed(config.seed)
    model = build_model(config, train_set.class_names)
    model.to(device, memory_format=torch.channels_last).train()
    fuse_for_training(model)
    if config.winograd:
        use_winograd(model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    criterion = FCOSLoss(config.variant)
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
    averaged = ema.module if ema else model  # what is scored and saved
    optimizer = create_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler, **({"ema": averaged} if ema else {})}

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = [x for m in norms for x in m.buffers()]  # which a forward pass changes

    # `progress` and the states of `stateful` are all that a run remembers
    progress = {"step": 0, "best": -1.0, "metrics": None, "train_seconds": 0.0, "not_finite": 0}
    this_run = describe_run(config, train_set, val_set)
    if saved := load_checkpoint(config.out / "checkpoints"):
        refuse_changes(saved["run"], this_run, config)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        progress = saved["progress"]
        log.info("going on after step %d of %s", progress["step"], config.out)
    else:
        for x in model.state_dict().values():  # the same start everywhere
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(x, src=0)

    run = RunLog(config.out, config, rank, progress["step"])
    log.info("%d images, %d classes: %s", len(train_set), len(train_set.class_names), ", ".join(train_set.class_names))
    batches = iter(train_loader(config, train_set, progress["step"], rank, world_size, device))
    bar = tqdm(total=config.steps, initial=progress["step"], unit="step", disable=rank > 0, dynamic_ncols=True)
    began = time.perf_counter()
    for step in range(progress["step"], config.steps):
        parts = next(batches)
        data_wait = time.perf_counter() - began
        note_skipped([image for part in parts for image in part.pop("skipped", [])], step, run)
        parts = [{name: x.to(device, non_blocking=True) for name, x in part.items()} for part in parts]
        lr = set_lr(optimizer, config, step)
        torch.manual_seed(seed_of(config.seed, step, rank))  # drop path and the like: without history

        kept = [x.clone() for x in statistics]
        losses, stopping = backward(model, criterion, scaler, parts, config, stop)
        all_reduce_gradients(model)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or float("inf")).item()
        finite = all(np.isfinite(x) for x in losses.values()) and (scaler.is_enabled() or np.isfinite(grad_norm))
        if finite:
            scaler.step(optimizer)
            if ema:
                ema.update(model, step=step + 1)
            progress["not_finite"] = 0
        else:
            for x, before in zip(statistics, kept, strict=True):
                x.copy_(before)
            skip_step(config, step, rank, parts, losses, grad_norm, progress)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - began
        progress["step"] = step + 1
        progress["train_seconds"] += seconds
        rate = config.batch_size / seconds
        run.write(
            step, loss=sum(losses.values()), **losses, lr=lr, grad_norm=grad_norm, images_per_s=rate,
            data_wait_s=data_wait, peak_memory_gib=peak_memory(device),
        )  # fmt: skip
        bar.set_postfix_str(f"loss {sum(losses.values()):.3f}, lr {lr:.2g}, {rate:.1f} images/s")
        bar.update()

        finished = step + 1 == config.steps
        if finished or (config.eval_every and (step + 1) % config.eval_every == 0):
            _, metrics = evaluate(averaged, val_set, rank, world_size, workers=config.workers)
            if rank == 0:
                overall = {name: value for name, value in metrics.items() if name != "per_class"}
                run.write(step, **overall)
                log.info("step %d: AP %.3f, AP50 %.3f", step + 1, metrics["AP"], metrics["AP50"])
                averaged.save_pretrained(config.out / "last")
                if metrics["AP"] >= progress["best"]:
                    averaged.save_pretrained(config.out / "best")
                progress |= {"best": max(progress["best"], metrics["AP"]), "metrics": metrics}
        if rank == 0 and (finished or stopping or (step + 1) % config.checkpoint_every == 0):
            states = {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(config.out / "checkpoints", step + 1, {"run": this_run, "progress": progress, **states})
        if stopping and not finished:
            bar.close()
            run.close()
            log.warning("stopped by a signal after step %d, saved; the same command goes on from there", step + 1)
            sys.exit(128 + stopping)
        began = time.perf_counter()
    bar.close()
    if config.compile:
        log_graphs()

    if rank == 0:
        from pictures import draw_comparison, draw_curves  # matplotlib takes a second

        draw_curves(run.rows(), config.out / "curves.png")
        draw_comparison(averaged, val_set, config.out / "detections.png")
        print(format_table(progress["metrics"], per_class=True))
        rate = config.steps * config.batch_size / progress["train_seconds"]
        log.info("trained %.0f s, %.2f images/s, peak %.2f GiB", progress["train_seconds"], rate, peak_memory(device))
        log.info("best model: %s; pictures: curves.png and detections.png in %s", config.out / "best", config.out)
    run.close()
    return progress["metrics"]


def backward(
    model: FCOS,
    criterion: FCOSLoss,
    scaler: torch.amp.GradScaler,
    parts: list[dict[str, Tensor]],
    config: TrainConfig,
    stop: StopSignal,
) -> tuple[dict[str, float], int]:
    """Add the gradient of one step to the parameters; returns the global batch's losses and whether to stop after it
    (the number of the signal that any process received, or 0).

    What the losses are divided by, and the size images are padded to (GroupNorm sees the padding), are those of the
    global batch, so that neither the number of processes nor that of parts changes the result.
    """
    device = parts[0]["images"].device
    sizes = [(*part["images"].shape[-2:], stop.received) for part in parts]
    largest = all_reduce(torch.tensor(sizes, device=device).amax(0), torch.distributed.ReduceOp.MAX)
    height, width, stopping = largest.tolist()

    assign, compare = (compiled(f) if config.compile else f for f in (assign_part, compare_part))
    targets, normalizers = zip(
        *(assign(model, criterion, part["boxes"], part["labels"], height, width) for part in parts), strict=True
    )
    normalizer = all_reduce(sum(normalizers))

    totals = torch.zeros(3, device=device)
    for part, target in zip(parts, targets, strict=True):
        images = nn.functional.pad(
            part["images"], (0, width - part["images"].shape[-1], 0, height - part["images"].shape[-2])
        )
        losses = compare(model, criterion, images, part["sizes"], target, normalizer, config.precision)
        scaler.scale(sum(losses.values())).backward()
        totals += torch.stack([x.detach() for x in losses.values()])
    return dict(zip(losses, all_reduce(totals).tolist(), strict=True)), stopping


def assign_part(
    model: FCOS, criterion: FCOSLoss, boxes: Tensor, labels: Tensor, height: int, width: int
) -> tuple[Targets, Tensor]:
    """What each location should learn of boxes [B,M,4], and what this adds to the global batch's normalizers [3]."""
    points, strides = make_points(level_sizes(height, width, model.strides), model.strides, boxes.device)
    targets = criterion.assign(points, strides, boxes, labels)
    return targets, criterion.normalizers(targets)


def compare_part(
    model: FCOS,
    criterion: FCOSLoss,
    images: Tensor,
    sizes: Tensor,
    targets: Targets,
    normalizers: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    """Losses of uint8 images [B,3,H,W]: the network under autocast, its losses in float32."""
    images = normalize(images, sizes, model.config["image_mean"], model.config["image_std"])
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype, enabled=precision != "float32"):
        preds = model(images.contiguous(memory_format=torch.channels_last))
    return criterion.compare(preds, targets, normalizers)


@functools.cache
def compiled(function: Callable, dynamic: bool | None = None) -> Callable:
    """`function` as one graph; it fails where that is impossible. A size that changes becomes a variable of it.

    What is cheap is computed again in the backward pass rather than kept, GroupNorm and ReLU before all.
    """
    for limit in ("materialized_backward", "used_far_apart", "long_fusible_chains"):
        setattr(torch._functorch.config, f"ban_recompute_{limit}", False)
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def log_graphs() -> None:
    """How often torch.compile compiled, and how many graphs that made."""
    stats = torch._dynamo.utils.counters["stats"]
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    log.info("torch.compile made %d graphs, with %d breaks", stats["unique_graphs"], breaks)


def skip_step(
    config: TrainConfig, step: int, rank: int, parts: list[dict], losses: dict, grad_norm: float, progress: dict
) -> None:
    """Note a step whose loss or gradient is not finite, and its images; `RuntimeError` after too many in a row."""
    progress["not_finite"] += 1
    folder = config.out / "not_finite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step{step:08d}-rank{rank}.json"
    batch = [
        {name: x.tolist() for name, x in part.items() if name != "images"} | {"shape": list(part["images"].shape)}
        for part in parts
    ]
    path.write_text(json.dumps({"losses": losses, "grad_norm": grad_norm, "batch": batch}))
    log.warning("step %d skipped: losses %s, gradient norm %s; its batch is in %s", step, losses, grad_norm, path)
    if progress["not_finite"] >= config.max_not_finite:
        raise RuntimeError(
            f"{progress['not_finite']} steps in a row were not finite, the last batch is in {path}; "
            "lower --lr, set --clip-grad, or look at the images and boxes named there"
        )


def note_skipped(skipped: list[Skipped], step: int, run: RunLog) -> None:
    """Log each image that could not be read; `skipped.txt` in the run folder of every rank lists them."""
    for image in skipped:
        log.warning("step %d: image %d skipped: %s", step, image.image_id, image.reason)
    if skipped:
        run.folder.mkdir(parents=True, exist_ok=True)  # another node's
        with open(run.folder / "skipped.txt", "a") as file:
            file.writelines(f"step {step}, image {image.image_id}: {image.reason}\n" for image in skipped)


def build_model(config: TrainConfig, class_names: list[str]) -> FCOS:
    """The detector to train, for these classes."""
    kwargs = dict(
        num_classes=len(class_names), class_names=class_names, min_size=config.test_size, max_size=config.max_size
    )
    if config.init is None:
        if config.backbone is not None:
            kwargs["backbone"] = config.backbone
        return create_detector(
            config.model,
            variant=config.variant,
            pretrained_backbone=config.pretrained_backbone,
            frozen_norm=config.frozen_norm,
            channels=config.channels,
            num_convs=config.num_convs,
            **kwargs,
        )
    start = FCOS.from_pretrained(config.init)
    model = FCOS(**{**start.config, **kwargs})
    weights = start.state_dict()
    if start.config["class_names"] != class_names:  # a new class layer
        weights |= {k: v for k, v in model.state_dict().items() if k.startswith("head.cls_logits.")}
    model.load_state_dict(weights, strict=True)
    return model


def train_loader(
    config: TrainConfig, dataset: CocoDataset, start_step: int, rank: int, world_size: int, device: torch.device
) -> DataLoader:
    """For each step from `start_step` on, this process's share of the batch, as `accum` collated parts."""
    sampler = TrainSampler(
        dataset.aspect_ratios,
        config.batch_size,
        num_steps=config.steps,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=functools.partial(collate_parts, count=config.accum),
        num_workers=config.workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
    )


def collate_parts(samples: list, count: int) -> list[dict[str, Tensor]]:
    """`count` batches of equal size."""
    size = len(samples) // count
    return [collate(samples[i * size : (i + 1) * size]) for i in range(count)]


def check_config(config: TrainConfig, train_set: CocoDataset, val_set: CocoDataset, world_size: int) -> None:
    """`ValueError` where configuration and data do not go together."""
    if (train_set.category_ids, train_set.class_names) != (val_set.category_ids, val_set.class_names):
        raise ValueError(
            f"{config.data}: the splits have different classes: train {train_set.class_names} with ids "
            f"{train_set.category_ids}, val {val_set.class_names} with ids {val_set.category_ids}"
        )
    if config.batch_size % (world_size * config.accum):
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared out over {world_size} processes x {config.accum} parts"
        )
    if config.steps < 1:
        raise ValueError(f"steps is {config.steps}; training needs at least 1")


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
