"""Measure where a VoVNet backbone spends time and memory in training: `python recipes/profile_blocks.py`.

torch.profiler times timm's blocks with frozen batch norms and the blocks of `kernels.osa`, eager and compiled. The
table says how long concatenations, and norms with their ReLUs, take in the forward and in the backward pass, and how
much memory is kept in between. `--help` lists the options.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vovnet_zoo.commands import check_compiler, parse_command


@dataclass(frozen=True)
class ProfileConfig:
    backbone: str = "vovnet39"
    """A VoVNet of timm's or of this library."""
    size: tuple[int, int] = (640, 640)
    """Height and width of the images."""
    batch: int = 2
    """Images per pass."""
    precisions: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
    """Precision of the convolutions."""
    rounds: int = 3
    """Profiled passes of each model; the table shows medians."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    out: Path = Path("runs/profile_blocks.json")
    """The table as JSON."""


PARSE = functools.partial(tyro.cli, ProfileConfig, description=__doc__)
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)


import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch.profiler import profile

import vovnet_zoo  # noqa: F401  (registers the backbones)
from memory import kept_by
from runtime import check_out, environment, log, process_group, run_command, synchronize
from step import compiled
from vovnet_zoo.kernels.osa import fuse_for_training
from vovnet_zoo.kernels.winograd import use_winograd

GROUPS = {  # an operator or kernel belongs to the first group whose pattern is in its name
    "fused": r"cpp_fused|triton_",  # what inductor makes of all but convolutions
    "concatenation": r"aten::(cat|narrow|slice)|CatArray",
    "pooling": r"pool",
    "norms, ReLU": r"aten::(mul|add|add_|sub|relu|relu_|clamp_min|threshold_backward|rsqrt)$|elementwise",
}


def main(config: ProfileConfig) -> list[dict]:
    with process_group(config.device) as (_, _, device):
        check_compiler(device.type)
        check_out(config.out, b'{\n  "time"')
        torch._inductor.config.cpp.enable_kernel_profile = True  # on a CPU kernels have names then
        timms = freeze_batch_norm_2d(timm.create_model(config.backbone, features_only=True))
        timms.to(device, memory_format=torch.channels_last).train()
        ours = copy.deepcopy(timms)
        fuse_for_training(ours)
        fast = copy.deepcopy(ours)
        if device.type == "cpu":
            use_winograd(fast)
        models = {
            "timm's, eager": timms,
            "ours, eager": ours,
            "timm's, compiled": compiled(copy.deepcopy(timms), dynamic=False),
            "ours, compiled": compiled(fast, dynamic=False),
        }
        images = torch.randn(config.batch, 3, *config.size, device=device).to(memory_format=torch.channels_last)
        rows = []
        for precision in config.precisions:
            rows += measure(models, images, precision, config.rounds)
            log.info("%s: done", precision)
        print(format_rows(rows))
        config.out.write_text(json.dumps({**environment(), "rows": rows}, indent=2), encoding="utf-8")
        return rows


def measure(models: dict[str, Callable], images: torch.Tensor, precision: str, rounds: int) -> list[dict]:
    """Measure each model: milliseconds of each group in the forward and in the backward pass, and MiB kept.

    The rounds of the models are interleaved.
    """

    def forward(model: Callable) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            maps = model(images)
        return sum(x.float().mean() for x in maps)

    for model in models.values():
        for _ in range(2):  # compiles
            forward(model).backward()
    found = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            with profile() as first:
                loss = forward(model)
                synchronize(images.device)
            with profile() as second:
                loss.backward()
                synchronize(images.device)
            passes = {"forward": by_group(first), "backward": by_group(second)}
            found[name].append({f"{p}, {group}": ms for p, groups in passes.items() for group, ms in groups.items()})
    rows = []
    for name, model in models.items():
        medians = {key: round(statistics.median(row[key] for row in found[name]), 1) for key in found[name][0]}
        kept = round(kept_by(lambda model=model: forward(model)) / len(images), 1)
        rows.append({"blocks": name, "precision": precision, **medians, "kept MiB per image": kept})
    return rows


def by_group(trace: profile) -> dict[str, float]:
    """Sum the milliseconds on the device, of all operators and of each of `GROUPS`. Convolutions are in no group."""
    times = Counter(dict.fromkeys(["all", *GROUPS], 0.0))
    for event in trace.key_averages():
        ms = (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e3
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, event.key)), None)
        times["all"] += ms
        if group:
            times[group] += ms
    return times


def format_rows(rows: list[dict]) -> str:
    """Format the table for a terminal."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    lines = []
    for i, column in enumerate(columns):  # one line per quantity, one column per kind of block
        width = max(map(len, columns))
        lines.append(f"{column:{width}}" + "".join(f"{row[i]:>18}" for row in cells[1:]))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, CONFIG)
