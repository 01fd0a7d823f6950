"""Several runs of one configuration that differ in their seed say how far a score is luck."""

from __future__ import annotations

import dataclasses
import json
import statistics

from presets import TrainConfig
from runtime import log
from vovnet_zoo.evaluation.coco_eval import score_text
from vovnet_zoo.files import read_json, write_whole

FILE = "seeds.json"


def seed_configs(config: TrainConfig) -> list[TrainConfig]:
    """Make a configuration for each of `config.seeds` runs, with a folder of its own."""
    return [
        dataclasses.replace(config, seed=config.seed + i, out=config.out / f"seed{config.seed + i}", seeds=1)
        for i in range(config.seeds)
    ]


def check_seeds(config: TrainConfig) -> None:
    """Raise `ValueError` where a `seeds.json` is there whose results would be lost: of other seeds, or of the user."""
    path = config.out / FILE
    if config.seeds == 1 or not path.exists():
        return
    try:
        before = {int(name.removeprefix("seed")) for name in read_json(path)["AP"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is there already, and no file that this command wrote; give another --out") from error
    if lost := sorted(before - {*range(config.seed, config.seed + config.seeds)}):
        first, last = min(*before, config.seed), max(*before, config.seed + config.seeds - 1)
        raise ValueError(
            f"{path} has results of the seeds {', '.join(map(str, lost))}, which this command would write over; give "
            f"another --out, or --seed {first} --seeds {last - first + 1} for all of them"
        )


def compare_seeds(config: TrainConfig, scores: list[float]) -> dict:
    """Write the best AP of each seed, their mean and their sample standard deviation to `seeds.json`.

    An AP of -1 means that there is nothing to score; mean and deviation are None then.
    """
    names, scored = [one.out.name for one in seed_configs(config)], min(scores) >= 0
    found = {
        "AP": dict(zip(names, scores, strict=True)),
        "mean": statistics.mean(scores) if scored else None,
        "deviation": statistics.stdev(scores) if scored else None,
    }
    write_whole(config.out / FILE, json.dumps(found, indent=2).encode())
    each = ", ".join(map(score_text, scores))
    mean = f"{found['mean']:.3f} +- {found['deviation']:.3f}" if scored else "no mean, since there is nothing to score"
    print(f"best AP of {len(scores)} seeds: {mean} ({each})")
    log.info("the runs are in %s, and these numbers in %s", config.out, FILE)
    return found
