"""These functions are the parts of a training loop that do not depend on what is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gradients import limit_norm
from memory import peak_memory
from run_folder import RunLog, note_not_finite
from runtime import Stopped, all_reduce, log
from training_run import Progress, Run, are_finite, put_back
from vovnet_zoo.commands import CommandError
from vovnet_zoo.evaluation.coco_eval import score_text
from vovnet_zoo.words import counted

LINE_EVERY, LINES = 50, 20  # without a progress bar: a line every 50 steps, or 20 in a short run


def clip_gradients(run: Run) -> Tensor:
    """Undo the scaling of the gradients, limit their norm if the configuration says so, and return the norm before."""
    run.scaler.unscale_(run.optimizer)
    return limit_norm(run.model, run.config.clip_grad)


def update(run: Run, step: int, parts: list[dict], losses: dict[str, float], grad_norm: float) -> None:
    """Change the weights by their gradients, and clear these.

    A step whose loss or gradient is not finite is skipped instead, and the statistics of batch norms are put back. With
    float16, a gradient that overflows is no such case: GradScaler leaves out the change of the weights and lowers its
    scale.
    """
    if all(map(math.isfinite, losses.values())) and (run.scaler.is_enabled() or math.isfinite(grad_norm)):
        run.updating = True
        run.scaler.step(run.optimizer)
        if run.ema and math.isfinite(grad_norm):  # otherwise GradScaler left out the change
            run.ema.update(run.model, step=step + 1)
        run.progress.not_finite = 0
    else:
        put_back(run)
        skip_step(run, step, parts, losses, grad_norm)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step, run.statistics, run.updating = step + 1, [], False  # the step is finished


def skip_step(run: Run, step: int, parts: list[dict], losses: dict[str, float], grad_norm: float) -> None:
    """Note a step that is skipped, with its images.

    `CommandError` after too many in a row, or if the weights themselves are not finite at the end of the run.
    """
    run.progress.not_finite += 1
    path = note_not_finite(run.config.out, step + 1, run.rank, parts, losses, grad_norm)
    too_many = run.progress.not_finite >= run.config.max_not_finite
    if too_many or (step + 1 == run.config.steps and not are_finite(run.averaged)):
        steps = counted(run.progress.not_finite, "step was", "steps in a row were")
        raise CommandError(
            f"{steps} not finite, the last batch is in {path}; "
            "lower --lr, set --clip-grad, or look at the images and boxes named there"
        )


def log_step(
    run: Run, run_log: RunLog, bar: tqdm, step: int, losses: dict[str, float], seconds: float, **values: float
) -> None:
    """Write a row of the log, and show the most important numbers: beside the progress bar, or as a line now and then
    where there is none."""
    loss, rate, done, total = sum(losses.values()), run.config.batch_size / seconds, step + 1, run.config.steps
    memory = peak_memory(run.device)
    run_log.write(done, **{"loss": loss, **losses}, **values, images_per_s=rate, peak_memory_gib=memory)
    score = f", best {score_name(run)} {score_text(run.progress.best)}" if run.progress.scored else ""
    shown = f"loss {loss:.3f}, lr {values['lr']:.2g}, {rate:.1f} images/s{score}"
    bar.set_postfix_str(shown, refresh=False)  # tqdm draws it ten times a second at most
    if bar.disable and run.rank == 0 and (done == total or done % min(LINE_EVERY, -(-total // LINES)) == 0):
        left = run.progress.train_seconds / done * (total - done)
        text = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        log.info("step %d of %d: %s, %s left", done, total, shown, text)


def score_name(run: Run) -> str:
    """Return the name of the score by which models are compared."""
    return "top-1" if "top1" in (run.progress.metrics or ()) else "AP"


def show_progress(run: Run) -> tqdm:
    """Make a progress bar over the steps that are left; it is not shown where stderr is no terminal."""
    hidden, done = run.rank > 0 or None, run.progress.step  # None leaves it to tqdm, which looks for a terminal
    return tqdm(steps_left(run), total=run.config.steps, initial=done, unit="step", disable=hidden, dynamic_ncols=True)


def steps_left(run: Run) -> Iterator[int]:
    """Give the steps until the run is complete, counted from 0; each has to be done before the next is asked for."""
    while run.progress.step < run.config.steps and not has_stalled(run):
        yield run.progress.step


def log_plan(run: Run) -> None:
    """Say what is trained, on what, and how long."""
    config, network = run.config, run.model.config
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else threads
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    processes = f", {run.world_size} processes" if run.world_size > 1 else ""
    log.info(
        *("FCOS on %s, %.1f M parameters, %s, on %s (%s)%s", network["backbone"], size, config.precision),
        *(run.device, name, processes),
    )
    epochs = config.steps * config.batch_size / len(run.train_set)
    evals = f", scored every {counted(config.eval_every, 'step')}" if config.eval_every else ""
    log.info(
        *("%s of %s (%s), learning rate %.3g%s", counted(config.steps, "step"), counted(config.batch_size, "image")),
        *(counted(epochs, "epoch", form=".3g"), config.lr, evals),
    )
    if run.progress.step >= config.steps or has_stalled(run):
        log.info("nothing is left to train: the run ended after step %d", run.progress.step)


def note_score(progress: Progress, score: float, metrics: dict) -> None:
    """Note the metrics of an evaluation, on rank 0. One in which there was nothing to score is not counted as worse."""
    if score >= 0:
        progress.stale = 0 if score > progress.best else progress.stale + 1
    progress.best, progress.metrics = max(progress.best, score), metrics


def share_stale(run: Run) -> None:
    """Tell all processes how long the score has been no better, so that they end together."""
    run.progress.stale = int(all_reduce(torch.tensor(run.progress.stale if run.rank == 0 else 0)))
    if has_stalled(run) and run.rank == 0:
        stale, step = run.progress.stale, run.progress.step
        log.info("the run ends after step %d: %s in a row gave no better AP", step, counted(stale, "evaluation"))


def has_stalled(run: Run) -> bool:
    """Say whether `patience` ends the run."""
    return run.config.patience is not None and run.progress.stale >= run.config.patience


def stopped(run: Run, bar: tqdm, number: int) -> Stopped:
    """Wait for the last checkpoint, and say that a signal stopped the run; returns what is to be raised."""
    bar.close()
    run.saver.wait()
    saved = counted(run.saver.saved, "step is", "steps are")
    log.warning("stopped by a signal; %s saved, and the same command goes on from there", saved)
    return Stopped(128 + number)


def log_graphs() -> None:
    """Say how many graphs torch.compile made, and how often it had to break one."""
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    graphs = counted(counters["stats"]["unique_graphs"], "graph")
    log.info("torch.compile made %s, with %s", graphs, counted(breaks, "break"))


def seed_of(*numbers: int) -> int:
    """Make one seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
