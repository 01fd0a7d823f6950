"""Is the run in a folder the one that is being asked for?"""

from __future__ import annotations

import dataclasses
import hashlib

from presets import TrainConfig
from runtime import log
from vovnet_zoo.data import CocoDataset

# Fields that do not change what is computed, beyond rounding.
FREE = {"out", "data", "workers", "accum", "device", "compile", "checkpoint_every", "max_not_finite", "allow_changes"}


def describe_run(config: TrainConfig, train_set: CocoDataset, val_set: CocoDataset) -> dict[str, str]:
    """What decides a run's result: the configuration and the annotations."""
    about = {k: repr(v) for k, v in dataclasses.asdict(config).items() if k not in FREE}
    for name, dataset in (("train annotations", train_set), ("val annotations", val_set)):
        about[name] = hashlib.sha256(dataset.annotation_file.read_bytes()).hexdigest()
    return about


def refuse_changes(saved: dict[str, str], asked: dict[str, str], config: TrainConfig) -> None:
    """`ValueError` naming what differs between the checkpoint's run and this one, unless `allow_changes`."""
    changes = [
        f"{name}: was {saved.get(name)}, now {asked.get(name)}"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]
    if not changes:
        return
    what = "; ".join(changes)
    if config.allow_changes:
        log.warning("going on with changes: %s", what)
        return
    raise ValueError(
        f"the checkpoints in {config.out} are of another run ({what}); "
        "give another --out, remove that folder, or go on all the same with --allow-changes"
    )
