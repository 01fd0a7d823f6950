"""A `Run` holds the parts of a training run; `set_up` builds it, from its newest checkpoint if there is one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from average import MovingAverage
from build import (
    build_datasets,
    build_loss,
    build_model,
    check_batch,
    check_start,
    check_weights,
    conventions_of,
    find_splits,
    load_start,
    log_start,
    prepare_for_training,
)
from fitting import fit_precision, fit_schedule, fit_size, kept
from gradients import GradientSum
from image_notes import ImageNotes
from optim import create_optimizer, load_changed
from presets import TrainConfig
from run_folder import describe_run, load_checkpoint, refuse_changes, was_bad
from runtime import StopSignal, broadcast_weights, log
from saving import BackgroundSaver
from trial import Trial
from vovnet_zoo.commands import describe
from vovnet_zoo.data import CocoDataset
from vovnet_zoo.fcos import batch_norms
from vovnet_zoo.precision import DTYPES, warn_of_slow_precision
from vovnet_zoo.words import counted


@dataclass
class Progress:
    """A checkpoint holds these numbers, so that a run that was stopped can go on."""

    step: int = 0  # steps done
    scored: int = 0  # steps that were done at the last evaluation
    best: float = -1.0  # the highest score, AP for a detector
    stale: int = 0  # the last evaluations, in a row, whose score was no better
    metrics: dict | None = None  # of the last evaluation
    train_seconds: float = 0.0
    not_finite: int = 0  # the last steps that were skipped, in a row


@dataclass
class Run:
    """A run has these parts. A checkpoint holds `identity`, `progress` and the states of the parts in `stateful`."""

    config: Any  # a TrainConfig, or another recipe's configuration
    rank: int
    world_size: int
    device: torch.device
    train_set: Any
    val_set: Any
    model: Any
    model_config: Mapping  # builds the model without what it started from
    ema: MovingAverage | None
    criterion: nn.Module
    gradients: GradientSum
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: dict[str, str]  # a run goes on only from checkpoints with its own identity
    progress: Progress
    saver: BackgroundSaver
    notes: ImageNotes | None = None  # on rank 0
    # These say whether the run can be saved after an error in the middle of a step.
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # buffers that the step changes, and before
    updating: bool = False  # the weights are about to change

    @property
    def averaged(self) -> Any:
        """Return the model to score and publish: with the moving average of the weights, if the run keeps one."""
        return self.ema.module if self.ema else self.model

    @property
    def stateful(self) -> dict:
        """Return the parts that have a `state_dict`, by their names in a checkpoint."""
        ema = {"ema": self.averaged} if self.ema else {}
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, **ema}


def set_up(
    config: TrainConfig, rank: int, world_size: int, device: torch.device, stop: StopSignal | None = None
) -> Run:
    """Build a run. If `config.out` has a checkpoint, the run goes on from there.

    Args:
        stop: if given, data loading workers leave stop signals to this process.
    """
    torch.backends.cudnn.allow_tf32 = config.tf32
    saved = load_checkpoint(config.out / "checkpoints")
    known = saved.get("config") if saved else None  # earlier checkpoints do not hold it
    config = kept(config, saved["run"]) if saved else config
    if not known:
        check_weights(config)
    torch.manual_seed(config.seed)
    start = None if known else load_start(config)
    if known and config.init is not None:
        check_start(config, known)
    conventions = conventions_of(config, start, known)
    plus_one, resize = conventions["plus_one"], conventions["resize"]
    known_classes = known["class_names"] or () if known else ()
    places = find_splits(config, rank, goes_on=saved is not None)
    config, sizes = fit_size(config, places["train"][1], device)
    config, precision = fit_precision(config, device)
    train_set, val_set = build_datasets(config, places, plus_one, resize, known_classes)
    try_out = functools.partial(Trial, train_set=train_set, start=start, known=known, device=device, stop=stop)
    config, schedule = fit_schedule(config, train_set, val_set, device, world_size, try_out, saved)
    check_batch(config, world_size)
    log_chosen(sizes + precision + schedule, goes_on=saved is not None)
    identity = describe_run(config, train_set, val_set)
    changed = refuse_changes(saved["run"], identity, config) if saved else []
    if saved:
        refuse_other_classes(saved["model"], known, train_set.class_names, config)
    model = build_model(config, train_set.class_names, train_set.category_ids, start, known)
    assert (model.config["plus_one"], model.config["resize"]) == (plus_one, resize)
    prepare_for_training(model, config, device)
    names = train_set.class_names
    log.info(
        *("%s to train on, %d to score on, %s: %s", counted(len(train_set), "image"), len(val_set)),
        counted(len(names), "class"),
        ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else ""),
    )
    if start is not None:
        log_start(config, start, names)
    notes = note_images(config, {"train": train_set, "val": val_set}, saved is not None) if rank == 0 else None
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
        model_config=model.config,
        criterion=build_loss(model, device),
        identity=identity,
        notes=notes,
    )


def log_chosen(reasons: list[str], goes_on: bool) -> None:
    """Say what was chosen for the data and the machine, and why."""
    if reasons and not goes_on:
        log.info("chosen, since not typed: %s", "; ".join(reasons))


def assemble(saved: dict | None, changed: list[str], *, config: Any, model: nn.Module, **parts: Any) -> Run:
    """Add the average, the optimizer and what else follows from the configuration to the parts of a run, and load what
    its checkpoint `saved` holds, if there is one.

    Args:
        changed: the names of what has changed in the configuration since the checkpoint.
    """
    # earlier checkpoints do not say `scored`: they were written after the evaluation of their step
    progress = Progress(**{"scored": saved["progress"]["step"], **saved["progress"]}) if saved else Progress()
    folder, limits = config.out / "checkpoints", (config.checkpoint_every, config.checkpoint_minutes)
    device = parts["device"]
    warn_of_slow_precision(device, DTYPES[config.precision], config.winograd)
    run = Run(
        config=config,
        model=model,
        ema=MovingAverage(model, config.ema) if config.ema else None,
        gradients=GradientSum(model),
        optimizer=create_optimizer(model, config),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        progress=progress,
        saver=BackgroundSaver(folder, *limits, progress.step, active=parts["rank"] == 0),
        **parts,
    )
    if saved:
        load_states(run, saved, changed)
        log.info("going on after step %d of %s", run.progress.step, config.out)
    else:
        broadcast_weights(model)
    return run


def refuse_other_classes(weights: dict, known: dict | None, class_names: list[str], config: TrainConfig) -> None:
    """Raise a `ValueError` if the data have another number of classes than the checkpoint, whose network has one output
    for each class; other names are logged."""
    before, now = len(weights["head.cls_logits.bias"]), len(class_names)
    names = known["class_names"] if known else None
    if before != now:
        raise ValueError(
            f"the checkpoints in {config.out} are of a detector of {counted(before, 'class')}"
            f"{f' ({names})' if names else ''}, {config.data or config.train} has {now} ({class_names}); a run that "
            f"goes on keeps its classes: give another --out, with --init {config.out / 'last'} to start from these "
            "weights"
        )
    if names is not None and names != class_names:
        log.warning("the classes were %s and are now %s", names, class_names)


def note_images(config: TrainConfig, datasets: dict[str, CocoDataset], goes_on: bool) -> ImageNotes:
    """Begin to note which images the run has; `ValueError`, unless `config.allow_changes`, where one was replaced.

    An image that could not be read may be repaired.
    """
    notes = ImageNotes(config.out / "images.json", datasets, goes_on)
    if changed := [name for name in notes.changed() if not was_bad(config.out, notes.places[name])]:
        are = counted(len(changed), "image file is another", "image files are others")
        what = f"{are} than when the run began: {', '.join(changed[:5])}"
        if not config.allow_changes:
            raise ValueError(f"{what}; put them back, give another --out, or go on all the same with --allow-changes")
        log.warning("going on with changes: %s", what)
    notes.start()
    return notes


def load_states(run: Run, saved: dict, changed: list[str]) -> None:
    """Load what a checkpoint holds. Where the configuration has changed, a part that is new to the run starts now."""
    run.model.load_state_dict(saved["model"])
    if run.ema:
        if "ema" not in saved:
            log.warning("the moving average of the weights starts now")
        run.ema.module.load_state_dict(saved.get("ema", saved["model"]))
    if saved["scaler"]:  # it is empty if the checkpoint was not of float16
        run.scaler.load_state_dict(saved["scaler"])
    if not changed:
        run.optimizer.load_state_dict(saved["optimizer"])
    elif "parameters" not in saved or "optimizer" in changed:
        log.warning("the optimizer's state starts anew")
    else:
        load_changed(run.optimizer, parameter_names(run), saved["optimizer"], saved["parameters"])


def parameter_names(run: Run) -> list[str]:
    """Return the names of the optimizer's parameters, in the order of its state."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    return [names[parameter] for group in run.optimizer.param_groups for parameter in group["params"]]


def is_due(every: int | None, run: Run) -> bool:
    """Say whether the steps done are a multiple of `every`, or all steps."""
    return run.progress.step == run.config.steps or bool(every and run.progress.step % every == 0)


def is_trusted(run: Run) -> bool:
    """Say whether the weights may be saved: the last step was finite, or it was the run's last and they are finite."""
    if run.progress.not_finite == 0:
        return True
    return run.progress.step == run.config.steps and are_finite(run.averaged)


def are_finite(model: nn.Module) -> bool:
    """Say whether all parameters and buffers of a model are finite."""
    return all(x.isfinite().all().item() for x in model.state_dict().values())


def save_if_due(run: Run, stopping: int = 0) -> None:
    """After a step, begin a checkpoint if its interval or an evaluation is due, or the run is `stopping`.

    On a GPU, the memory of the checkpoints is reserved as soon as the optimizer has its state.
    """
    due = run.saver.is_due(run.progress.step) and is_trusted(run)
    if stopping or due or is_due(run.config.eval_every, run):
        save(run)
    elif run.device.type == "cuda" and run.optimizer.state and not run.saver.reserved:
        run.saver.reserve(state_of(run))
    run.saver.keep_up(run.progress.step)


def save(run: Run) -> None:
    """Begin to write a checkpoint, on rank 0; not while steps are not finite, so that the good ones before it stay."""
    if not is_trusted(run):
        log.warning("not saved after step %d, since the last step was not finite", run.progress.step)
        return
    run.saver.save(run.progress.step, state_of(run) if run.rank == 0 else {})


def state_of(run: Run) -> dict:
    """Collect what a checkpoint holds."""
    state = {"run": run.identity, "progress": dataclasses.asdict(run.progress)}
    state |= {name: part.state_dict() for name, part in run.stateful.items()}
    return state | {"config": dict(run.model_config), "parameters": parameter_names(run)}


def batch_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers of all batch norms, each with memory for a copy of its value."""
    return [(x, torch.empty_like(x)) for norm in batch_norms(model) for x in norm.buffers()]


def note_statistics(run: Run, statistics: list[tuple[Tensor, Tensor]]) -> None:
    """Note the values that these buffers have before a step; all of a dtype are copied at once."""
    for dtype in {x.dtype for x, _ in statistics}:
        values, copies = zip(*(pair for pair in statistics if pair[0].dtype == dtype), strict=True)
        torch._foreach_copy_(copies, values)
    run.statistics = statistics


def put_back(run: Run) -> None:
    """Give the statistics of batch norms the values that they had before the step that is not finished."""
    for x, before in run.statistics:
        x.copy_(before)
    run.statistics = []


def save_finished(run: Run) -> None:
    """After an error, save the finished steps that no checkpoint has, and say how to go on. Rank 0 does so alone.

    A second error is logged, so that the first is the one that the user sees at the end.
    """
    if run.rank > 0:
        return
    put_back(run)
    try:
        run.saver.wait()
    except Exception as error:
        log.error("%s", describe(error))
    try:
        if run.saver.saved < run.progress.step and not run.updating:
            save(run)
            run.saver.wait()
    except Exception as error:
        log.error("the finished steps could not be saved: %s", describe(error))
    log.error(
        "stopped by an error after step %d; %s saved, and the same command goes on from there",
        run.progress.step,
        counted(run.saver.saved, "step is", "steps are"),
    )
