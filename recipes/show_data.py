"""Draw images as a training sees them: `vovnet-zoo show-data DATA --preset finetune`, or `python recipes/show_data.py`.

All options of a training may follow, and do what they do in `train_coco.py`: the data are found, sizes are fitted, and
images are augmented and come in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from presets import PRESETS, TrainConfig, check_config, parse
from vovnet_zoo.cli import ShowData, refuse_missing, split_arguments
from vovnet_zoo.commands import check_place, parse_command


def parse_show(args: Sequence[str]) -> tuple[ShowData, TrainConfig]:
    """Read the options of the picture and of the preset."""
    own, options = split_arguments(args)
    command = tyro.cli(ShowData, args=own, description=__doc__)
    if command.preset not in PRESETS:
        raise ValueError(f"--preset {command.preset}: give one of {', '.join(PRESETS)}")
    data = [] if command.root is None else ["--data", str(command.root)]
    config = parse([command.preset, *data, *options])
    refuse_missing(*(path for path in (command.root, config.train, config.train_images) if path is not None))
    if config.data is None and config.train is not None and config.val is None and config.val_fraction is None:
        config = dataclasses.replace(config, val=config.train, val_images=config.train_images)  # it is not shown
    check_config(config)
    return command, config


PARSE = parse_show
if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
    CONFIG = parse_command(PARSE)

from build import build_sampler, build_train_set, conventions_of, find_splits, load_start
from fitting import fit_length, fit_size
from runtime import process_group, run_command
from vovnet_zoo.arguments import check_number
from vovnet_zoo.show_data import check_sheet, show_data
from vovnet_zoo.words import counted


def main(arguments: tuple[ShowData, TrainConfig]) -> None:
    """Draw the samples, and say their sizes."""
    command, config = arguments
    check_number("count", command.count, 1, 1000, whole=True)
    check_sheet(command.out)
    check_place(command.out.parent, f"--out {command.out}")
    with process_group(config.device) as (rank, _, device), tempfile.TemporaryDirectory() as folder:
        conventions = conventions_of(config, load_start(config))
        # The parts of --val-fraction are the same as in the run folder, and are not kept.
        (place,) = find_splits(dataclasses.replace(config, out=Path(folder)), rank, ["train"]).values()
        config, why = fit_size(config, place[1], device)
        train_set = build_train_set(config, place, conventions["plus_one"], conventions["resize"])
        config = fit_length(config, len(train_set), device)
        keys = itertools.chain.from_iterable(build_sampler(config, train_set))
        shown = show_data(train_set, itertools.islice(keys, command.count), command.out)
    low, high = config.min_size
    print(
        f"{command.out}: the first {counted(shown, 'sample')} of {counted(len(train_set), 'image')}, as "
        f"{command.preset} sees them: shorter side {low} to {high} px, longer side at most {config.max_size} px, "
        f"batches of {config.batch_size}"
    )
    print(*why, sep="\n", end="\n" if why else "")


if __name__ == "__main__":
    run_command(main, CONFIG)
