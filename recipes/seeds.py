"""Several runs of one configuration that differ in their seed say how far a score is luck."""

from __future__ import annotations

import dataclasses
import json
import statistics

from presets import TrainConfig
from run_folder import write_whole
from runtime import log


def seed_configs(config: TrainConfig) -> list[TrainConfig]:
    """Make a configuration for each of `config.seeds` runs, with a folder of its own."""
    return [
        dataclasses.replace(config, seed=config.seed + i, out=config.out / f"seed{config.seed + i}", seeds=1)
        for i in range(config.seeds)
    ]


def compare_seeds(config: TrainConfig, scores: list[float]) -> dict:
    """Write the best AP of each seed, their mean and their sample standard deviation to `seeds.json`."""
    names = [one.out.name for one in seed_configs(config)]
    found = {
        "AP": dict(zip(names, scores, strict=True)),
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores),
    }
    write_whole(config.out / "seeds.json", json.dumps(found, indent=2).encode())
    each = ", ".join(f"{score:.3f}" for score in scores)
    print(f"best AP of {len(scores)} seeds: {found['mean']:.3f} +- {found['deviation']:.3f} ({each})")
    log.info("the runs are in %s, and these numbers in seeds.json", config.out)
    return found
