"""The command `vovnet-zoo` parses its arguments and calls the library, nothing more."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import hub, inference, publish
from .data import check
from .detectors import DETECTORS, create_detector
from .draw import draw_detections
from .fcos import FCOS
from .files import free_to_write, read_json, write_whole

DEFAULTS = inference.Thresholds()


@dataclass(frozen=True)
class Predict:
    """Detect objects in images, and write a picture of each image and one detections.json."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    model: str
    """Folder of a saved detector, its name on the Hub, or a name of create_detector(..., pretrained=True)."""
    out: Path
    """Folder for the results."""
    score: float = 0.3
    """Leave out detections that score less."""
    nms_threshold: float = DEFAULTS.nms_threshold
    """Leave out a box whose IoU with a better box of its class is higher."""
    max_detections: int = DEFAULTS.max_detections
    """Detections per image, at most."""
    device: str = "cpu"
    """torch device."""
    overwrite: bool = False
    """Write over files that are in OUT already; never over an image that is read."""


@dataclass(frozen=True)
class CheckData:
    """Find all that is wrong with a COCO-format dataset; the exit status is 1 if something would stop a training."""

    root: tyro.conf.Positional[Path]
    """The dataset's folder."""
    workers: int | None = None
    """Processes that decode images; default: one per core."""
    json: Path | None = None
    """Write the whole report there, over an earlier report only."""


@dataclass(frozen=True)
class Convert:
    """Convert a published checkpoint (.pth) to safetensors, a configuration and a model card, and verify it."""

    file: tyro.conf.Positional[Path]
    """A detector, classifier or VoVNetV2 body of the authors, or a classifier of pytorchcv, also in a zip."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    part: Literal["all", "backbone"] = "all"
    """Convert every tensor, or take a VoVNetV2 body and leave out the tensors beside it, which are listed."""
    overwrite: bool = False
    """Write over a model that is in OUT already; never over FILE."""


@dataclass(frozen=True)
class Publish:
    """Verify a detector or backbone, and push it to the Hub with a model card."""

    source: tyro.conf.Positional[Path]
    """Folder of a saved model, or a published checkpoint (.pth), which is converted first."""
    repo_id: tyro.conf.Positional[str]
    """organisation/name; made if it is not there."""
    run: Path | None = None
    """Folder of the training run, for the card; default: the folder around SOURCE, if it is one."""
    license: str | None = None
    """License of the weights, as the Hub abbreviates it; default: the license that is known, if any."""
    private: bool = False
    """Push to a private repository, and refuse one that is public."""
    token: str | None = None
    """Access token; default: the token of `hf auth login` or HF_TOKEN."""
    branch: str | None = None
    """Branch to push to; default: main."""
    create_pr: bool = False
    """Open a pull request instead."""


def main() -> None:
    """Run the command. An error of the user goes to stderr without a traceback, and the exit status is 2."""
    command = tyro.cli(
        Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[CheckData, tyro.conf.subcommand("check-data")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Publish, tyro.conf.subcommand("publish")],
        prog="vovnet-zoo",
        description="VoVNet backbones and FCOS detectors.",
    )
    try:
        run: dict[type, Callable[[Any], None]] = {
            Predict: run_predict,
            CheckData: run_check_data,
            Convert: run_convert,
            Publish: run_publish,
        }
        run[type(command)](command)
    except (ValueError, OSError) as error:
        print(f"vovnet-zoo: {error}", file=sys.stderr)
        sys.exit(2)


def run_predict(command: Predict) -> None:
    taken: set[str] = set()
    pictures = [command.out / f"{unique(path.stem, taken)}.png" for path in command.images]
    free_to_write([*pictures, command.out / "detections.json"], command.images, command.overwrite)
    if command.model.split(".")[0] in DETECTORS and not Path(command.model).is_dir():
        model = create_detector(command.model, pretrained=True)
    else:
        model = FCOS.from_pretrained(command.model)
    model.to(command.device)
    names = model.config["class_names"]

    command.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for path, picture in zip(command.images, pictures, strict=True):
        image = inference.to_rgb(path)
        # a score is the root of class probability times centerness, so a lower class probability cannot reach it
        (found,) = inference.predict(
            model,
            [image],
            score_threshold=command.score**2,
            nms_threshold=command.nms_threshold,
            max_detections=command.max_detections,
        )
        found = {key: value[found["scores"] >= command.score] for key, value in found.items()}
        buffer = io.BytesIO()
        draw_detections(image, found, names, command.score).save(buffer, "PNG")
        write_whole(picture, buffer.getvalue())
        rows.append({"image": str(path), "picture": picture.name, **{key: x.tolist() for key, x in found.items()}})
        if names:
            rows[-1]["names"] = [names[label] for label in rows[-1]["labels"]]
        print(f"{path}: {len(found['scores'])} detections, {picture}")
    write_whole(command.out / "detections.json", (json.dumps(rows, indent=1) + "\n").encode())


def unique(stem: str, taken: set[str]) -> str:
    """Return `stem`, with a number behind it if it is taken, and add the result to the taken names.

    Names that differ only in the case of letters are the same on some file systems.
    """
    name, number = stem, 2
    while name.casefold() in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name.casefold())
    return name


def run_check_data(command: CheckData) -> None:
    if command.json is not None and command.json.exists():
        try:
            ours = {"ok", "findings"} <= read_json(command.json).keys()
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(f"{command.json} is there already, and no report of check-data; choose another file")
    sys.exit(check.main(command.root, workers=command.workers, json_out=command.json))


def run_convert(command: Convert) -> None:
    left_out = publish.convert_file(command.file, command.out, part=command.part, overwrite=command.overwrite)
    if left_out:
        names = [f"{name:.200}" for name in left_out]
        print(f"left out {len(names)} tensors beside the backbone:", *names, sep="\n  ")
    print(f"{command.out}: converted, loaded and run; its card is {command.out / hub.CARD}")


def run_publish(command: Publish) -> None:
    url = publish.publish_model(
        command.source,
        command.repo_id,
        run=command.run,
        license=command.license,
        private=command.private,
        token=command.token,
        branch=command.branch,
        create_pr=command.create_pr,
    )
    print(url)


if __name__ == "__main__":
    main()
