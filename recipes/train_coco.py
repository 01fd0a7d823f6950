"""Train a detector on a COCO-format dataset: `python recipes/train_coco.py PRESET --data ROOT [--lr ...]`.

Under torchrun (`torchrun --nproc-per-node 8 recipes/train_coco.py v39_1x --data ROOT`) the batch is shared out over
the processes; the result does not depend on their number. When a run was stopped, for whatever reason, the same
command goes on with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from types import ModuleType

from presets import TrainConfig, check_config, doubts, is_recorded, parse
from vovnet_zoo.commands import before_compiling, leave_interrupts, parse_command

PARSE = functools.partial(parse, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)
elif __name__ == "__mp_main__":  # a data loading worker of macOS or Windows, which runs this file once more
    leave_interrupts()

import torch
from torch import Tensor, nn

from build import build_loader
from loading import Ahead
from loggers import check_loggers
from memory import peak_memory
from optim import set_lr
from recorded import Passes, RecordedPasses
from reporting import report_run
from run_folder import (
    RunLog,
    draw_pictures,
    import_pictures,
    locked,
    longer,
    note_bad_image,
    note_skipped,
)
from runtime import Stopped, StopSignal, all_reduce, average, gather, log, process_group, run_command, to_device
from scoring import score_dataset
from seeds import check_seeds, compare_seeds, seed_configs
from step import compile_step, compute_losses, find_targets
from training_loop import (
    clip_gradients,
    log_graphs,
    log_plan,
    log_step,
    note_score,
    seed_of,
    share_stale,
    show_progress,
    stopped,
    update,
)
from training_run import (
    Progress,
    Run,
    batch_statistics,
    is_due,
    is_trusted,
    note_statistics,
    save,
    save_finished,
    save_if_due,
    set_up,
)
from vovnet_zoo.coco_eval import format_table
from vovnet_zoo.data import Skipped
from vovnet_zoo.evaluation.coco_eval import score_text
from vovnet_zoo.evaluation.runs import DETECTIONS, SKIPPED
from vovnet_zoo.fcos import batch_norms
from vovnet_zoo.files import write_whole
from vovnet_zoo.parts import compile_parts


def main(config: TrainConfig) -> dict | None:
    """Train as `config` says; returns the last evaluation on rank 0, None on the others.

    With several seeds, returns the AP of each, their mean and their deviation.
    """
    check_config(config)
    check_loggers(config.loggers)
    check_seeds(config)
    with process_group(config.device) as (rank, world_size, device), StopSignal() as stop:
        if config.compile:
            before_compiling(device.type, log.info)
        if config.seeds == 1:
            return train_once(config, rank, world_size, device, stop).metrics
        runs = []
        for one in seed_configs(config):
            log.info("training %d of %d, of seed %d, in %s", len(runs) + 1, config.seeds, one.seed, one.out)
            runs.append(train_once(one, rank, world_size, device, stop))
        return compare_seeds(config, [run.best for run in runs]) if rank == 0 else None


def train_once(config: TrainConfig, rank: int, world_size: int, device: torch.device, stop: StopSignal) -> Progress:
    """Train with one seed; returns what was reached."""
    with locked(config.out, rank):
        pictures = import_pictures() if rank == 0 else None
        with stop.at_once("while the run was prepared; the same command begins again"):
            run = set_up(config, rank, world_size, device, stop)
        config = run.config
        log_plan(run)
        for doubt in doubts(config):
            log.warning("%s", doubt)
        with (
            contextlib.closing(
                RunLog(config.out, config, rank, run.progress.step, run.progress.scored, run.identity)
            ) as run_log,
            contextlib.closing(run.notes) if run.notes else contextlib.nullcontext(),
            contextlib.closing(run.saver),
        ):
            try:
                train(run, run_log, stop)
            except Exception as error:
                note_bad_image(config.out, run.progress.step, error)
                save_finished(run)
                raise
            if rank == 0:
                with stop.at_once("after the last step; all is saved, and the same command writes the report"):
                    summarize(run, run_log, pictures)
        return run.progress


def train(run: Run, run_log: RunLog, stop: StopSignal) -> None:
    """Do the steps that are left of a run, with the checkpoints and evaluations that are due."""
    config, model, criterion, progress = run.config, run.model, run.criterion, run.progress
    (find, passes), statistics = step_functions(run), batch_statistics(model)
    score_if_due(run, run_log, stop)  # the run may have been stopped between a checkpoint and its evaluation
    batches = Ahead(build_loader(config, run.train_set, progress.step, run.rank, run.world_size, run.device, stop))
    bar = show_progress(run)
    began = time.perf_counter()
    for step in bar:
        # Data: this process's share of the batch, in parts that are computed one after the other to save memory.
        parts = next_parts(run, step, batches)
        data_wait = time.perf_counter() - began

        # Targets and normalizers of the global batch. All processes divide their losses by the same normalizers and pad
        # their images to the same size (GroupNorm sees the padding), so that neither the number of processes nor the
        # number of parts changes the result. With the size they learn whether one of them received a stop signal.
        height, width, stopping = common_size(model, parts, stop.received)
        assigned = [find(model, criterion, part["boxes"], part["labels"], height, width) for part in parts]
        normalizers = all_reduce(sum(n for _, n in assigned))

        # Forward and backward, part by part; autograd adds up the gradients of the parts. The seed for drop path and
        # the like depends on the step only, so that a resumed run draws the same numbers.
        torch.manual_seed(seed_of(config.seed, step, run.rank))
        note_statistics(run, statistics)
        totals = torch.zeros(3, device=run.device)
        passes.begin()
        for part, (targets, _) in zip(parts, assigned, strict=True):
            images = pad_images(part["images"], height, width)
            losses = passes(images, part["sizes"], targets, normalizers, last=part is parts[-1])
            totals += torch.stack(list(losses.values()))

        # One gradient everywhere: gradients are summed over the processes, and so are the losses for the log. The batch
        # norms' statistics are averaged, so that every process has the model that rank 0 saves.
        counts = run.gradients.finish()
        average([x for x, _ in run.statistics])

        # One update of the weights, unless a loss or the gradient is not finite: such a step changes nothing. A GPU is
        # waited for once a step, when losses and norm are read; before that, the next batch is fetched.
        lr = set_lr(run.optimizer, config, step)
        numbers = torch.cat([all_reduce(totals), clip_gradients(run)[None], *counts])
        if not stopping:
            batches.fetch(run.device)
        *totals, grad_norm = run.gradients.check(numbers.tolist())
        losses, data_wait = dict(zip(losses, totals, strict=True)), data_wait + batches.idle()
        update(run, step, parts, losses, grad_norm)

        # Log: a row of numbers.
        seconds = time.perf_counter() - began
        progress.train_seconds += seconds
        log_step(run, run_log, bar, step, losses, seconds, lr=lr, grad_norm=grad_norm, data_wait_s=data_wait)

        # Save. This comes before the evaluation, which takes long and can fail, so that no finished step is lost.
        save_if_due(run, stopping)
        if stopping:
            raise stopped(run, bar, stopping)

        # Score, and save the best model.
        score_if_due(run, run_log, stop)
        began = time.perf_counter()
    run.saver.wait()


def step_functions(run: Run) -> tuple[Callable, Passes]:
    """Return `find_targets` and the passes of a step, compiled and recorded if the configuration says so."""
    config, find, compute = run.config, find_targets, compute_losses
    if config.compile:
        if run.ema and run.device.type == "cuda":
            compile_parts(run.averaged)  # for evaluations, as the model's own parts are
        find, compute = compile_step(run.model)
    return find, (RecordedPasses if is_recorded(config, run.device.type) else Passes)(run, compute)


def next_parts(run: Run, step: int, batches: Iterator[list[dict]]) -> list[dict[str, Tensor]]:
    """Move this process's next share of a batch, in parts, to its device; notes images that could not be read."""
    try:
        parts = next(batches)
    except Stopped:  # the batch did not come
        save(run)
        raise
    skipped = [image for part in parts for image in part.get("skipped", [])]
    note_skipped(run.config.out, step + 1, skipped)
    return [to_device(part, run.device) for part in parts]


def common_size(model: nn.Module, parts: list[dict[str, Tensor]], received: int) -> tuple[int, int, int]:
    """Return the height and width to pad images to, at least the largest of all parts and processes, and the number of
    the signal that a process received, or 0. These numbers stay on the CPU, so that no GPU is waited for."""
    sizes = torch.tensor([(*part["images"].shape[-2:], received) for part in parts])
    height, width, stopping = all_reduce(sizes.amax(0), torch.distributed.ReduceOp.MAX).tolist()
    return *room_for_norms(model, parts, height, width), stopping


def room_for_norms(model: nn.Module, parts: list[dict[str, Tensor]], height: int, width: int) -> tuple[int, int]:
    """Return the size to pad images to, at which a batch norm that learns sees more than one value of each channel.

    A batch of which no image could be read is padded further. `ValueError` where one small image is all there is.
    """
    smallest = min(parts, key=lambda part: len(part["images"]))
    count = len(smallest["images"]) * -(-height // 32) * -(-width // 32)  # values at stride 32
    if count > 1 or not batch_norms(model):
        return height, width
    if smallest["image_ids"].tolist() == [-1]:  # the blank image of `collate`
        return height + 32, width
    raise ValueError(
        f"one image of {width}x{height} pixels leaves a batch norm one value of each channel, and it needs two to "
        "learn; use --frozen-norm, a larger --batch-size, a smaller --accum, or a larger --min-size"
    )


def pad_images(images: Tensor, height: int, width: int) -> Tensor:
    """Pad images [B,3,h,w] below and at the right; images of that size already are not copied."""
    if images.shape[-2:] == (height, width):
        return images
    return nn.functional.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def score_if_due(run: Run, run_log: RunLog, stop: StopSignal) -> None:
    """Score the model if this is due and was not done yet; write `last/`, and `best/` if there was no better one."""
    config, progress = run.config, run.progress
    if progress.scored == progress.step or not is_due(config.eval_every, run) or not is_trusted(run):
        return
    skipped: list[Skipped] = []

    def note(images: list[Skipped]) -> None:
        note_skipped(config.out, progress.step, images)
        skipped.extend(images)

    try:
        results, metrics = score_dataset(
            run.averaged,
            run.val_set,
            run.rank,
            run.world_size,
            stop=stop,
            note=note,
            workers=config.workers,
            batch_size=max(1, config.batch_size // (run.world_size * config.accum)),  # fits, as a training step did
            precision=config.precision,
            compile=config.compile and run.device.type == "cpu",  # on a GPU its parts are compiled
        )
    except Stopped:
        log.warning("stopped by a signal in the evaluation after step %d; the same command repeats it", progress.step)
        raise
    skipped_ids = gather([image.image_id for image in skipped])
    progress.scored = progress.step
    if run.rank == 0:
        overall = {name: value for name, value in metrics.items() if name != "per_class"}
        run_log.write(progress.step, **overall)
        ap, ap50 = score_text(metrics["AP"]), score_text(metrics["AP50"])
        log.info("step %d: AP %s, AP50 %s", progress.step, ap, ap50)
        run.averaged.save_pretrained(config.out / "last")
        if metrics["AP"] >= progress.best:
            write_whole(config.out / DETECTIONS, json.dumps(results).encode())
            write_whole(config.out / SKIPPED, json.dumps(skipped_ids).encode())
            run.averaged.save_pretrained(config.out / "best")
        note_score(progress, metrics["AP"], metrics)
    share_stale(run)
    save(run)


def summarize(run: Run, run_log: RunLog, pictures: ModuleType | None) -> None:
    """Print the last evaluation and the speed, write the report of the best model, and draw what it finds."""
    config, seconds = run.config, run.progress.train_seconds
    log.info("the last evaluation, after step %d:", run.progress.scored)
    print(format_table(run.progress.metrics, per_class=True))
    rate, peak = run.progress.step * config.batch_size / seconds, peak_memory(run.device)
    memory = f", peak {peak:.2f} GiB" if peak is not None else ""
    log.info("trained %.0f s, %.2f images/s%s", seconds, rate, memory)
    if config.compile:
        log_graphs()
    best = score_text(run.progress.best)
    log.info("best model: %s (AP %s); to train longer: %s", config.out / "best", best, longer(config))
    report_run(config.out, run_log.rows(), run.train_set, run.val_set)
    draw_pictures(pictures, config.out, run_log.rows(), run.val_set, run.device)


if __name__ == "__main__":
    run_command(main, CONFIG)
