"""Train a classifier on ImageNet or your own images: `python recipes/train_imagenet.py PRESET --data ROOT [--lr ...]`.

Under torchrun (`torchrun --nproc-per-node 8 recipes/train_imagenet.py rsb_a3 --model vovnet75 --data ROOT`) the batch
is shared out over the processes. Batch norms see the images of their own process, as is usual for classifiers; with
--frozen-norm the result does not depend on the number of processes. When a run was stopped, for whatever reason, the
same command goes on with it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path

from grouping import parse_grouped
from imagenet_presets import FIRST_OPTIONS, PRESETS, SECTIONS, ClassifierConfig, check_config
from vovnet_zoo.commands import before_compiling, leave_interrupts, parse_command

PARSE = functools.partial(parse_grouped, PRESETS, FIRST_OPTIONS, SECTIONS, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)
elif __name__ == "__mp_main__":  # a data loading worker of macOS or Windows, which runs this file once more
    leave_interrupts()

import torch
from torch import Tensor, nn

from classifier_run import set_up
from image_data import eval_batches, train_batches
from loading import Ahead
from loggers import check_loggers
from memory import peak_memory
from optim import set_lr
from run_folder import RunLog, locked
from runtime import Stopped, StopSignal, all_reduce, average, log, process_group, run_command, to_device
from step import compiled
from training_loop import clip_gradients, log_graphs, log_step, note_score, seed_of, show_progress, stopped, update
from training_run import Run, batch_statistics, is_due, is_trusted, note_statistics, save, save_finished, save_if_due
from vovnet_zoo.classifiers import save_classifier
from vovnet_zoo.fused import normalize_images
from vovnet_zoo.words import counted


def main(config: ClassifierConfig) -> dict | None:
    """Train as `config` says; returns the last evaluation on rank 0, None on the others."""
    check_config(config)
    check_loggers(config.loggers)
    with process_group(config.device) as (rank, world_size, device), StopSignal() as stop:
        if config.compile:
            before_compiling(device.type, log.info)
        with locked(config.out, rank):
            return train_once(config, rank, world_size, device, stop)


def train_once(
    config: ClassifierConfig, rank: int, world_size: int, device: torch.device, stop: StopSignal
) -> dict | None:
    """Build the run, train it, and return its last evaluation."""
    with stop.at_once("while the run was prepared; the same command begins again"):
        run = set_up(config, rank, world_size, device)
    with (
        contextlib.closing(RunLog(config.out, run.config, rank, run.progress.step, run.progress.scored)) as rows,
        contextlib.closing(run.saver),
    ):
        try:
            train(run, rows, stop)
        except Exception:
            save_finished(run)
            raise
        if rank == 0:
            summarize(run)
    return run.progress.metrics


def train(run: Run, run_log: RunLog, stop: StopSignal) -> None:
    """Do the steps that are left of a run, with the checkpoints and evaluations that are due."""
    config, progress, cfg = run.config, run.progress, run.model_config["pretrained_cfg"]
    compute, statistics = compiled(compute_loss) if config.compile else compute_loss, batch_statistics(run.model)
    score_if_due(run, run_log, stop)  # the run may have been stopped between a checkpoint and its evaluation
    num_classes = len(run.model_config["class_names"])
    batches = Ahead(
        train_batches(config, run.train_set, num_classes, progress.step, run.rank, run.world_size, stop, run.device)
    )
    bar = show_progress(run)
    began = time.perf_counter()
    for step in bar:
        # Data: this process's share of the batch, in parts that are computed one after the other to save memory.
        parts = next_parts(run, batches)
        data_wait, stopping = time.perf_counter() - began, stop.agreed()

        # Forward and backward, part by part; autograd adds up the gradients of the parts. Each part counts by its share
        # of the global batch, so that gradients add up over the processes too. The seed of drop path depends on the
        # step only, so that a resumed run draws the same numbers.
        torch.manual_seed(seed_of(config.seed, step, run.rank))
        note_statistics(run, statistics)
        total = torch.zeros(1, device=run.device)
        for part in parts:
            loss = compute(run.model, run.criterion, part["images"], part["labels"], cfg, config.precision)
            loss = loss * (len(part["images"]) / config.batch_size)
            if part is parts[-1]:
                run.gradients.start()  # each gradient that this backward pass completes is sent at once
            run.scaler.scale(loss).backward()
            total += loss.detach()

        # One gradient everywhere, and the batch norms' statistics are averaged: every process has the same model.
        counts = run.gradients.finish()
        average([x for x, _ in run.statistics])
        lr = set_lr(run.optimizer, config, step)
        numbers = torch.cat([all_reduce(total), clip_gradients(run)[None], *counts])
        if not stopping:
            batches.fetch(run.device)  # while a GPU computes
        total, grad_norm = run.gradients.check(numbers.tolist())
        losses, data_wait = {"loss": total}, data_wait + batches.idle()
        update(run, step, parts, losses, grad_norm)
        seconds = time.perf_counter() - began
        progress.train_seconds += seconds
        log_step(run, run_log, bar, step, losses, seconds, lr=lr, grad_norm=grad_norm, data_wait_s=data_wait)

        # Save, then score: the evaluation takes long and can fail, and no finished step is to be lost.
        save_if_due(run, stopping)
        if stopping:
            raise stopped(run, bar, stopping)
        score_if_due(run, run_log, stop)
        began = time.perf_counter()
    run.saver.wait()


def next_parts(run: Run, batches: Iterator[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Move this process's next share of a batch, in parts, to its device."""
    try:
        parts = next(batches)
    except Stopped:  # the batch did not come
        save(run)
        raise
    return [to_device(part, run.device) for part in parts]


def compute_loss(
    model: nn.Module, criterion: nn.Module, images: Tensor, labels: Tensor, cfg: dict, precision: str
) -> Tensor:
    """Compute the mean loss of images, uint8 [B,3,H,W]: the network runs under autocast, the loss in float32."""
    logits = compute_logits(model, images, cfg, precision)
    return criterion(logits.float(), labels)


def compute_logits(model: nn.Module, images: Tensor, cfg: dict, precision: str) -> Tensor:
    """Compute the logits [B,K] of images, uint8 [B,3,H,W]."""
    height, width = images.shape[-2:]
    sizes = torch.stack([torch.full((len(images),), side, device=images.device) for side in (height, width)], dim=1)
    images = normalize_images(images, sizes, cfg["mean"], cfg["std"])
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype, enabled=precision != "float32"):
        return model(images)


def score_if_due(run: Run, run_log: RunLog, stop: StopSignal) -> None:
    """Score the model if this is due and was not done yet; write `last/`, and `best/` if there was no better one."""
    config, progress = run.config, run.progress
    if progress.scored == progress.step or not is_due(config.eval_every, run) or not is_trusted(run):
        return
    try:
        metrics = score(run, stop)
    except Stopped:
        log.warning("stopped by a signal in the evaluation after step %d; the same command repeats it", progress.step)
        raise
    progress.scored = progress.step
    if run.rank == 0:
        run_log.write(progress.step, **metrics)
        log.info("step %d: top-1 %.4f, top-5 %.4f", progress.step, metrics["top1"], metrics["top5"])
        save_model(run, config.out / "last")
        if metrics["top1"] >= progress.best:
            save_model(run, config.out / "best")
        note_score(progress, metrics["top1"], metrics)
    save(run)


@torch.no_grad()
def score(run: Run, stop: StopSignal) -> dict[str, float]:
    """Compute the accuracies top-1 and top-5 on all held-out images, shared out over the processes.

    `Stopped` is raised, in all processes, one batch after one of them received a stop signal.
    """
    model, cfg = run.averaged, run.model_config["pretrained_cfg"]
    training, counts = model.training, torch.zeros(3, device=run.device)  # right, right in 5, all
    model.eval()
    batches = eval_batches(run.config, run.val_set, run.rank, run.world_size, stop)
    while True:
        batch = next(batches, None)
        state = torch.tensor([batch is not None, stop.received])
        more, received = all_reduce(state, torch.distributed.ReduceOp.MAX).tolist()
        if received:
            raise Stopped(128 + received)
        if not more:
            break
        if batch is not None:
            batch = to_device(batch, run.device)
            images, labels = batch["images"], batch["labels"]
            logits = compute_logits(model, images, cfg, run.config.precision)
            right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            counts += torch.stack([right[:, 0].sum(), right.sum(), torch.full((), len(labels), device=run.device)])
    model.train(training)
    top1, top5, count = all_reduce(counts).tolist()
    return {"top1": top1 / count, "top5": top5 / count}


def save_model(run: Run, folder: Path) -> None:
    """Save the classifier in timm's form, with what its images have to look like."""
    about = run.model_config
    save_classifier(
        run.averaged, about["architecture"], folder, class_names=about["class_names"], cfg=about["pretrained_cfg"]
    )


def summarize(run: Run) -> None:
    """Print the last evaluation, the speed, and what to do with the model."""
    config, metrics, seconds = run.config, run.progress.metrics, run.progress.train_seconds
    images = counted(len(run.val_set), "held-out image")
    print(f"top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f} on {images}")
    rate = config.steps * config.batch_size / seconds
    peak = peak_memory(run.device)
    memory = f", peak {peak:.2f} GiB" if peak is not None else ""
    log.info("trained %.0f s, %.2f images/s%s", seconds, rate, memory)
    if config.compile:
        log_graphs()
    best = config.out / "best"
    log.info("best model: %s (top-1 %.4f); a detector starts from it with", best, run.progress.best)
    start = f"--model fcos --backbone local-dir:{best} --pretrained-backbone"
    log.info("python recipes/train_coco.py finetune %s --data ROOT", start)


if __name__ == "__main__":
    run_command(main, CONFIG)
