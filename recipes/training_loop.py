"""These functions are the parts of a training loop that do not depend on what is trained."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memory import peak_memory
from run_folder import RunLog, note_not_finite
from runtime import Stopped, log
from training_run import Run, are_finite, put_back
from vovnet_zoo.commands import CommandError


def clip_gradients(run: Run) -> Tensor:
    """Undo the scaling of the gradients, limit their norm if the configuration says so, and return the norm before."""
    run.scaler.unscale_(run.optimizer)
    return nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_grad or float("inf"))


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
    path = note_not_finite(run.config.out, step, run.rank, parts, losses, grad_norm)
    too_many = run.progress.not_finite >= run.config.max_not_finite
    if too_many or (step + 1 == run.config.steps and not are_finite(run.averaged)):
        raise CommandError(
            f"{run.progress.not_finite} steps in a row were not finite, the last batch is in {path}; "
            "lower --lr, set --clip-grad, or look at the images and boxes named there"
        )


def log_step(
    run: Run, run_log: RunLog, bar: tqdm, step: int, losses: dict[str, float], seconds: float, **values: float
) -> None:
    """Write a row of the log, and show the most important numbers beside the progress bar."""
    loss, rate = sum(losses.values()), run.config.batch_size / seconds
    memory = peak_memory(run.device)
    run_log.write(step, **{"loss": loss, **losses}, **values, images_per_s=rate, peak_memory_gib=memory)
    bar.set_postfix_str(f"loss {loss:.3f}, lr {values['lr']:.2g}, {rate:.1f} images/s")


def stopped(run: Run, bar: tqdm, number: int) -> Stopped:
    """Wait for the last checkpoint, and say that a signal stopped the run; returns what is to be raised."""
    bar.close()
    run.saver.wait()
    log.warning("stopped by a signal; %d steps are saved, and the same command goes on from there", run.saver.saved)
    return Stopped(128 + number)


def log_graphs() -> None:
    """Say how many graphs torch.compile made, and how often it had to break one."""
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    log.info("torch.compile made %d graphs, with %d breaks", counters["stats"]["unique_graphs"], breaks)


def seed_of(*numbers: int) -> int:
    """Make one seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
