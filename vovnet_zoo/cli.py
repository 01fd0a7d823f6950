"""The command `vovnet-zoo` parses its arguments and calls the library, nothing more.

Torch takes seconds to import, so that each command imports what it needs only after its arguments have been checked.
"""

from __future__ import annotations

import difflib
import functools
import glob
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from . import ledger
from .commands import (
    before_compiling,
    check_completion,
    check_first,
    check_place,
    expand_home,
    find_device,
    run_reporting,
    take_debug,
    told,
)
from .config import (
    OVERLAPS,
    SCALES,
    TILES,
    ExportFormat,
    ExportPrecision,
    Pictures,
    Precision,
    ThresholdOptions,
)
from .version import __version__
from .web import is_url
from .words import counted

EXPORTED = (".onnx", ".xml", ".pt2")  # the endings of files that `export` writes


def named(name: str) -> Any:
    """Name a positional argument in the help, which says PATH or STR otherwise."""
    return tyro.conf.arg(metavar=name)


@dataclass(frozen=True)
class Predict:
    """Detect objects in images, and write a picture of each image and detections.jsonl, one line for each image.

    A video becomes a video. An image that cannot be used is reported and left out, and the exit status is 1."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, named("IMAGE [IMAGE ...]")]
    """Images, folders, patterns ("photos/*.jpg" in quotes), .txt lists, videos (extra `video`), cameras, such as 0."""
    model: str
    """Folder of a saved detector, a name on the Hub or of `vovnet-zoo list`, or an exported .onnx, .xml or .pt2."""
    out: Path
    """Folder for the results."""
    score: float | None = None
    """Leave out detections that score less; default: the thresholds in the model's config, else 0.3."""
    nms_threshold: float | None = None
    """Leave out a box whose IoU with a better box of its class is higher; default: what the model's config says."""
    max_detections: int | None = None
    """Detections per image, at most (with --tiles, per window); default: what the model's config says."""
    batch_size: int = 1
    """Images that the network sees together, at most; the detections do not depend on it."""
    precision: Precision = "float32"
    """Precision of the network (autocast)."""
    compile: bool = False
    """Compile the network with torch.compile, which takes minutes once."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    tiles: int | None = None
    """Look at windows of this many pixels on each side too, so that small objects in large images are found."""
    overlap: float | None = None
    """Part of its side that a window shares with its neighbour, at least; default: 0.2."""
    flip: bool = False
    """Look at the mirrored image too."""
    scales: tuple[float, ...] = ()
    """Look at the image at these multiples of the model's size; default: 1."""
    recursive: bool = False
    """Look for images in the folders below a folder too."""
    allow_urls: bool = False
    """Read images from http:// and https:// addresses."""
    save_pictures: Pictures = "jpg"
    """Format of the pictures of the detections, or none, also of videos."""
    crops: bool = False
    """Write each object as a picture: OUT/crops/CLASS/NAME_0.jpg and so on."""
    labels: bool = False
    """Write YOLO label files: OUT/labels/NAME.txt, and the class names in OUT/classes.txt."""
    coco: Path | None = None
    """Write all detections as COCO results JSON there too; the image ids are in detections.jsonl then."""
    overwrite: bool = False
    """Write over files that are in OUT already; never over an image that is read."""


@dataclass(frozen=True)
class CheckData:
    """Find all that is wrong with a dataset; the exit status is 1 if something would stop a training.

    COCO, YOLO, Pascal VOC and Hugging Face are recognised."""

    root: Annotated[Path | None, tyro.conf.Positional, named("[DATA]")] = None
    """The dataset's folder, or the .yaml file of a YOLO dataset."""
    train: Path | None = None
    """COCO JSON file of the training images, instead of what is found in DATA."""
    train_images: Path | None = None
    """Folder of the images of --train."""
    val: Path | None = None
    """COCO JSON file of the images to score on, instead of what is found in DATA."""
    val_images: Path | None = None
    """Folder of the images of --val."""
    val_fraction: float | None = None
    """Check a dataset of which the training keeps this share for scoring."""
    min_size: int | None = None
    """Smallest shorter side in pixels; default: the size that finetune would choose for this dataset and machine."""
    max_size: int | None = None
    """Limit of the longer side in pixels; default: likewise."""
    workers: int | None = None
    """Processes that decode images; default: one per core."""
    json: Path | None = None
    """Write the whole report there, over an earlier report only."""


@dataclass(frozen=True)
class ShowData:
    """Draw images as a training sees them, augmented and with boxes, side by side into one PNG.

    The sheet shows the first images of the training, in the order of the training. All options of the training may
    follow the folder, such as --mosaic 0.5 or --test-size 512; `python recipes/train_coco.py PRESET --help` lists them.
    The presets are in a clone of the repository."""

    root: Annotated[Path | None, tyro.conf.Positional, named("[DATA]")] = None
    """The dataset's folder, or the .yaml file of a YOLO dataset."""
    preset: str = "finetune"
    """The preset of recipes/train_coco.py that trains."""
    out: Path = Path("samples.png")
    """The picture; one of an earlier show-data is replaced, other files are not."""
    count: int = 16
    """Images on the picture."""


@dataclass(frozen=True)
class ConvertData:
    """Write a dataset of any known format as COCO JSON: FOLDER/annotations/instances_{split}.json and the images."""

    source: Annotated[Path, tyro.conf.Positional, named("DATA")]
    """The dataset's folder, or the .yaml file of a YOLO dataset."""
    target: Annotated[Path, tyro.conf.Positional, named("FOLDER")]
    """Folder to make."""
    difficult_as_crowd: bool = False
    """Write the objects that Pascal VOC calls difficult as crowd regions."""


@dataclass(frozen=True)
class Convert:
    """Convert a published checkpoint (.pth) to safetensors, a configuration and a model card, and verify it."""

    file: Annotated[Path, tyro.conf.Positional, named("FILE")]
    """A detector, classifier or VoVNetV2 body of the authors, torchvision's FCOS or a classifier of pytorchcv."""
    out: Annotated[Path, tyro.conf.Positional, named("FOLDER")]
    """Folder to make."""
    part: Literal["all", "backbone"] = "all"
    """Convert every tensor, or take a VoVNetV2 body and leave out the tensors beside it, which are listed."""
    overwrite: bool = False
    """Write over a model that is in FOLDER already; never over FILE."""


@dataclass(frozen=True)
class Publish:
    """Verify a detector or backbone, and push it to the Hub with a model card."""

    source: Annotated[Path, tyro.conf.Positional, named("SOURCE")]
    """Folder of a saved model, or a published checkpoint (.pth), which is converted first."""
    repo_id: Annotated[str, tyro.conf.Positional, named("ORGANISATION/NAME")]
    """The repository on the Hub; made if it is not there."""
    run: Path | None = None
    """Folder of the training run, for the card; default: the folder around SOURCE, if it is one."""
    license: str | None = None
    """License of the weights, as the Hub abbreviates it; default: the license that is known, if any."""
    private: bool = False
    """Push to a private repository, and refuse one that is public."""
    token: str | None = None
    """Access token; default: the token of `hf auth login` or HF_TOKEN."""
    branch: str | None = None
    """Branch to push to, which is made if it is not there; default: main."""
    create_pr: bool = False
    """Open a pull request instead."""
    space: bool = False
    """Push a Space of the same name too: a page to try the model in, which is checked here first (extra `demo`)."""


@dataclass(frozen=True)
class Export:
    """Write a detector as one file from uint8 images to boxes, and certify that it computes what PyTorch computes."""

    model: Annotated[str, tyro.conf.Positional, named("MODEL")]
    """Folder of a saved detector, or a name on the Hub or of `vovnet-zoo list`."""
    out: Path
    """Folder for the file, its certificate and a page about both."""
    format: ExportFormat = "onnx"
    """A file for ONNX Runtime, OpenVINO or torch (pt2, by AOTInductor). executorch is refused with the reason."""
    size: tuple[int, int] | None = None
    """Height and width of all images, multiples of 32; default: each call has its own."""
    batch: int | None = None
    """Number of images of each call; default: each call has its own."""
    precision: ExportPrecision = "float32"
    """float16 stores weights so, and computes in float32. int8 needs --images, to measure ranges on, and --data."""
    raw: bool = False
    """Write the network alone, from normalised images to logits, distances and centerness."""
    images: Path | None = None
    """Image, folder or pattern of the images that are compared; default: pictures that are drawn."""
    data: Path | None = None
    """Folder of a dataset; the AP on its val split is measured with the file and with PyTorch."""
    max_ap_difference: float | None = None
    """How far the two APs may lie apart; default: 0.001, with float16 0.005, with int8 0.01."""
    score: float | None = None
    """The exported file leaves out detections that score less; default: the thresholds in the model's config."""
    nms_threshold: float | None = None
    """The file leaves out a box whose IoU with a better box of its class is higher; default: as the config says."""
    max_detections: int | None = None
    """Detections per image that the file gives; default: what the model's config says."""
    overwrite: bool = False
    """Write over an earlier export in OUT."""


@dataclass(frozen=True)
class Compare:
    """Compare models on the same images: differences of AP with intervals, curves, and where the models differ most.

    Prints a table, and writes a page that needs no network."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, named("RUN [RUN ...]")]
    """Folders of training runs, or files of recipes/eval_coco.py --out; the others are compared with the first."""
    out: Path = Path("compare.html")
    """File of the page."""
    data: Path | None = None
    """Folder of the dataset that was scored; default: what the runs say."""
    split: str = "val"
    """The split of --data."""
    val: Path | None = None
    """COCO JSON file of the images that were scored, instead of --data."""
    val_images: Path | None = None
    """Folder of the images of --val; default: it is looked for near that file."""
    difficult_as_crowd: bool = False
    """The objects that Pascal VOC calls difficult were not scored; it goes with --data."""
    overwrite: bool = False
    """Write over a file that is there already."""


@dataclass(frozen=True)
class Demo:
    """Serve a page to try a detector in, with images or a camera, until Ctrl-C (extra `demo`)."""

    model: Annotated[str, tyro.conf.Positional, named("MODEL")]
    """Folder of a saved detector, a name on the Hub or of `vovnet-zoo list`, or an exported .onnx, .xml or .pt2."""
    device: str | None = None
    """torch device; default: the GPU where there is one."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is seen by this machine only, 0.0.0.0 is seen by others too."""
    port: int | None = None
    """Port to listen at; default: the first free one from 7860 on."""
    open: bool = False
    """Open the page in a browser."""


@dataclass(frozen=True)
class ListModels:
    """List the weights of backbones and detectors: which can be had, from where, with which scores and licenses."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, named("[NAME ...]")] = ()
    """Only names that contain one of these texts; default: all."""
    json: bool = False
    """Print everything that is known of each, as JSON."""
    markdown: bool = False
    """Print a table in Markdown: all weights that are published."""


@dataclass(frozen=True)
class Plan:
    """Forecast what the training of a preset takes and costs on 1, 2, 4, 8 GPUs: time, memory, loader, disk, money.

    The preset's own options may follow, such as --data DATA or --batch-size 32; `python recipes/train_coco.py PRESET
    --help` lists them. The presets are in a clone of the repository."""

    preset: Annotated[str, tyro.conf.Positional, named("PRESET")]
    """A preset of recipes/train_coco.py."""
    gpus: int | None = None
    """Largest number of GPUs; default: 8, or as many as the batch can be shared out over."""
    gpu: str | None = None
    """h100, h200, a100, v100, l40s, l4, a10, t4, rtx4090, rtx3090, or here (CPU too); default: GPU here, else h100."""
    price_per_gpu_hour: float | None = None
    """Price of one GPU for one hour, in any currency."""
    images: int | None = None
    """Training images; default: as many as --data has, else COCO's 118,287, for the small presets a few hundred."""
    calibrate: bool = False
    """Measure this machine first, about a minute; longer with --compile. Later plans of the preset use the numbers."""
    json: bool = False
    """Print everything as JSON."""


def main() -> None:
    """Run the command. An error of the user goes to stderr in one line, and the exit status is 2."""
    arguments, debug = take_debug(expand_home(sys.argv[1:]))
    run_reporting("vovnet-zoo", lambda: run_command(arguments, debug), debug)


COMMANDS: dict[str, type] = {
    "predict": Predict,
    "check-data": CheckData,
    "show-data": ShowData,
    "convert-data": ConvertData,
    "convert": Convert,
    "publish": Publish,
    "export": Export,
    "compare": Compare,
    "demo": Demo,
    "list": ListModels,
    "plan": Plan,
}


def run_command(arguments: list[str], debug: bool) -> None:
    """Parse the arguments, and run the command that comes first."""
    if arguments == ["--version"]:
        print(f"vovnet-zoo {__version__}")
        return
    check_completion(arguments)
    check_first(arguments, COMMANDS, "command")
    typed = arguments[1:]
    if arguments[:1] in (["check-data"], ["convert-data"]):
        arguments = arguments[:1] + data_first(typed)
    if arguments[:1] == ["show-data"]:
        arguments = ["show-data", *split_arguments(typed)[0]]
    planning = arguments[:1] == ["plan"]
    options: dict[str, Any] = {"return_unknown_args": True} if planning else {}  # of the preset, which has its own
    kinds: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007
    parsed: Any = tyro.cli(
        kinds,
        prog="vovnet-zoo",
        description="VoVNet backbones and FCOS detectors. --version prints the version, --debug an error's traceback.",
        args=arguments,
        **options,
    )
    command = parsed[0] if planning else parsed
    run: dict[type, Callable[[Any], None]] = {
        Predict: run_predict,
        CheckData: run_check_data,
        ShowData: lambda _: run_recipe("show_data", typed, debug),
        ConvertData: run_convert_data,
        Convert: run_convert,
        Publish: run_publish,
        Export: run_export,
        Compare: run_compare,
        Demo: run_demo,
        ListModels: run_list,
        Plan: lambda _: run_recipe("plan", typed, debug),
    }
    run[type(command)](command)


def data_first(typed: list[str]) -> list[str]:
    """Put the dataset's folder first, where it was typed as for a training: `--data DATA` or `--data=DATA`."""
    for i, text in enumerate(typed):
        if text == "--data" and i + 1 < len(typed):
            return [typed[i + 1], *typed[:i], *typed[i + 2 :]]
        if text.startswith("--data="):
            return [text.removeprefix("--data="), *typed[:i], *typed[i + 1 :]]
    return typed


def run_predict(command: Predict) -> None:
    check_predict(command)
    texts = (text for text in command.images if not (is_url(text) or glob.has_magic(text) or text.isdecimal()))
    refuse_missing(*map(Path, texts))
    for text in command.images:
        if glob.has_magic(text) and not is_url(text) and next(glob.iglob(text, recursive=True), None) is None:
            raise ValueError(f"{text}: no image matches this pattern")
    check_place(command.out, f"--out {command.out}")
    if command.coco is not None:
        check_place(command.coco.parent, f"--coco {command.coco}")
    refuse_model(command.model)
    from PIL import Image

    from . import inference
    from .load import load_detector
    from .predict_files import predict_files

    # a user's own photo may have 100 megapixels; Pillow refuses twice its limit, about 179 megapixels, all the same
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    device = find_device(command.device)
    if command.compile:
        before_compiling(device.type, functools.partial(print, file=sys.stderr))
    model = load_detector(command.model)
    model.to(device)
    options: inference.PredictOptions = dict(
        recursive=command.recursive,
        urls=command.allow_urls,
        tiles=command.tiles,
        overlap=command.overlap,
        flip=command.flip,
        batch_size=command.batch_size,
        precision=command.precision,
        compile=command.compile,
    )
    set_thresholds(options, command)
    if command.scales:
        options["scales"] = command.scales
    try:
        bad = predict_files(
            model,
            command.images,
            command.out,
            pictures=command.save_pictures,
            crops=command.crops,
            labels=command.labels,
            coco=command.coco,
            overwrite=command.overwrite,
            **options,
        )
    except KeyboardInterrupt:
        print(f"vovnet-zoo: interrupted; what was found until now is in {command.out}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(1 if bad else 0)


def check_predict(command: Predict) -> None:
    """Raise `ValueError` where there is no image, an address is not allowed, or a number is out of its range."""
    if not command.images:
        raise ValueError("predict needs the name of an image, or several")
    if not command.allow_urls and (urls := [text for text in command.images if is_url(text)]):
        raise ValueError(f"{urls[0]}: images come from a server only with --allow-urls")
    if command.tiles is None and command.overlap is not None:
        raise ValueError(f"--overlap {command.overlap}: windows overlap, and there are none; give --tiles too")
    for option, value, least, most in (
        ("--score", command.score, 0, 1),
        ("--nms-threshold", command.nms_threshold, 0, 1),
        ("--tiles", command.tiles, *TILES),
        ("--overlap", command.overlap, *OVERLAPS),
        *(("--scales", scale, *SCALES) for scale in command.scales),
    ):
        if value is not None and not least <= value <= most:
            raise ValueError(f"{option} {value}: give a number from {least:g} to {most:g}")
    for option, number in (("--max-detections", command.max_detections), ("--batch-size", command.batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{option} {number}: give 1 or more")


def run_check_data(command: CheckData) -> None:
    if command.workers is not None and command.workers < 0:
        raise ValueError(f"--workers {command.workers}: give 0 or more")
    files = (command.root, command.train, command.train_images, command.val, command.val_images)
    refuse_missing(*(path for path in files if path is not None))
    check_data_files(command)
    if command.json is not None:
        check_place(command.json.parent, f"--json {command.json}")
    from .data import check
    from .files import read_json

    if command.json is not None and command.json.exists():
        try:
            ours = {"ok", "findings"} <= read_json(command.json).keys()
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(f"{command.json} is there already, and no report of check-data; choose another file")
    options = {name: value for name, value in vars(command).items() if name not in ("root", "json")}
    sys.exit(check.main(command.root, json_out=command.json, progress=sys.stderr.isatty(), **options))


def check_data_files(command: CheckData) -> None:
    """Raise `ValueError` where the options name no data, or contradict each other."""
    if command.root is None and command.train is None:
        raise ValueError("give the dataset's folder, or --train JSON and --val JSON")
    for split, file, images in (
        ("train", command.train, command.train_images),
        ("val", command.val, command.val_images),
    ):
        if file is None and images is not None:
            raise ValueError(f"--{split}-images {images}: it goes with --{split} JSON; with DATA, leave it out")
    if command.val_fraction is not None and command.val is not None:
        raise ValueError("--val-fraction takes the images to score on from the training images; leave out --val")
    if command.val_fraction is not None and not 0 < command.val_fraction < 1:
        raise ValueError(f"--val-fraction {command.val_fraction}: give a number between 0 and 1")
    for option, size in (("--min-size", command.min_size), ("--max-size", command.max_size)):
        if size is not None and size < 1:
            raise ValueError(f"{option} {size}: give a number of pixels")
    if command.min_size is not None and command.max_size is not None and command.max_size < command.min_size:
        raise ValueError(
            f"--min-size {command.min_size} --max-size {command.max_size}: the shorter side cannot be longer"
        )


def run_convert_data(command: ConvertData) -> None:
    refuse_missing(command.source)
    check_place(command.target.parent, str(command.target))
    from .data.conversion import convert_data

    files = convert_data(command.source, command.target, difficult_is_crowd=command.difficult_as_crowd)
    for split, file in files.items():
        print(f"{split}: {file}")


def run_convert(command: Convert) -> None:
    refuse_missing(command.file)
    check_place(command.out, str(command.out))
    from . import hub, publish

    left_out = publish.convert_file(command.file, command.out, part=command.part, overwrite=command.overwrite)
    if left_out:
        names = [f"{name:.200}" for name in left_out]
        print(f"left out {counted(len(names), 'tensor')} beside the backbone:", *names, sep="\n  ")
    print(f"{command.out}: converted, loaded and run; its card is {command.out / hub.CARD}")


def run_publish(command: Publish) -> None:
    refuse_missing(command.source, *([] if command.run is None else [command.run]))
    from . import publish

    url = publish.publish_model(
        command.source,
        command.repo_id,
        run=command.run,
        license=command.license,
        private=command.private,
        token=command.token,
        branch=command.branch,
        create_pr=command.create_pr,
        space=command.space,
    )
    print(url)


def run_export(command: Export) -> None:
    check_place(command.out, f"--out {command.out}")
    refuse_model(command.model)
    if Path(command.model).is_file():
        raise ValueError(f"{command.model} is an exported file already; give the model that it was made of")
    if command.images is not None and not glob.has_magic(str(command.images)):
        refuse_missing(command.images)
    from .export import FORMATS, export_detector
    from .export.card import summary
    from .fcos import FCOS
    from .load import load_detector

    model = load_detector(command.model)
    assert isinstance(model, FCOS)
    options: ThresholdOptions = {}
    set_thresholds(options, command)
    with told("vovnet_zoo.export"):
        made = export_detector(
            model,
            command.out,
            format=command.format,
            size=command.size,
            batch=command.batch,
            precision=command.precision,
            raw=command.raw,
            images=command.images,
            data=command.data,
            max_ap_difference=command.max_ap_difference,
            overwrite=command.overwrite,
            **options,
        )
    words = "; ".join(f"{name}: {value}" for name, value in summary(made).items())
    print(f"{command.out / FORMATS[command.format].files[0]}; {words}")


def set_thresholds(options: ThresholdOptions, command: Predict | Export) -> None:
    """Put the thresholds that were typed into `options`; the model's config has the others."""
    if command.score is not None:
        options["score_threshold"] = command.score
    if command.nms_threshold is not None:
        options["nms_threshold"] = command.nms_threshold
    if command.max_detections is not None:
        options["max_detections"] = command.max_detections


def run_compare(command: Compare) -> None:
    check_compare(command)
    from .evaluation.compare_page import compare_runs

    options = {name: value for name, value in vars(command).items() if name not in ("runs", "out", "overwrite")}
    print(compare_runs(command.runs, command.out, **options))
    print(f"\npage: {command.out}")


def check_compare(command: Compare) -> None:
    """Raise `ValueError` where there is nothing to compare, options contradict each other, or OUT is there already."""
    if len(command.runs) < 2:
        raise ValueError(
            "compare needs two run folders or result files, or more; give one twice to see what is no difference; "
            "python recipes/eval_coco.py --results FILE scores one"
        )
    files = (*command.runs, command.data, command.val, command.val_images)
    refuse_missing(*(path for path in files if path is not None))
    if command.data is not None and command.val is not None:
        raise ValueError("--val says where the images are; leave --data out")
    if command.data is None and command.split != "val":
        raise ValueError(f"--split {command.split}: it is a split of --data; give it too")
    if command.val is None and command.val_images is not None:
        raise ValueError(f"--val-images {command.val_images}: it goes with --val JSON")
    if command.difficult_as_crowd and command.data is None:
        raise ValueError("--difficult-as-crowd goes with --data; what the runs say is followed without it")
    if command.out.is_dir():
        raise ValueError(f"--out {command.out} is a folder; give the name of a file, such as {command.out / 'a.html'}")
    if command.out.exists() and not command.overwrite:
        raise ValueError(f"{command.out} is there already; give --overwrite, or another --out")
    check_place(command.out.parent, f"--out {command.out}")


def run_demo(command: Demo) -> None:
    if command.port is not None and not 1 <= command.port <= 65_535:
        raise ValueError(f"--port {command.port}: give a number from 1 to 65535")
    refuse_model(command.model)
    from .demo import load_gradio, serve, title
    from .load import load_detector

    load_gradio()
    device = find_device(command.device)
    model = load_detector(command.model)
    model.to(device)
    serve(model, title(command.model), host=command.host, port=command.port, open=command.open)


def run_list(command: ListModels) -> None:
    if command.markdown and (command.names or command.json):
        other = "--json" if command.json else " ".join(command.names)
        raise ValueError(f"--markdown prints the table of all published weights; leave {other} out")
    if command.markdown:
        print(ledger.markdown())
        return
    rows = [row for row in ledger.rows() if not command.names or any(name in row["name"] for name in command.names)]
    if not rows:
        raise ValueError(f"no weights have {' or '.join(map(repr, command.names))} in their name; vovnet-zoo list")
    print(json.dumps(rows, indent=1) if command.json else "\n".join(map(ledger.describe, rows)))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments of show-data into its own ones and the options of the training.

    The dataset's folder is a word that no option of the training can have as its value.
    """
    names = {f"--{field.name}" for field in fields(ShowData)} - {"--root"} | {"--help", "-h"}
    own: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name in names:
            own += [argument, *([] if value or name in ("--help", "-h") else [x for x in [next(rest, None)] if x])]
        elif others or argument.startswith("-"):
            others.append(argument)
        else:
            own.append(argument)
    return own, others


def run_recipe(name: str, arguments: list[str], debug: bool) -> None:
    """Run a recipe, which knows the presets; it is beside this package in a clone."""
    script = Path(__file__).resolve().parents[1] / "recipes" / f"{name}.py"
    if not script.is_file():
        raise ValueError(
            "the presets are in the repository's folder recipes/, which an installed package does not have; clone the "
            f"repository, and type there: python recipes/{name}.py {' '.join(arguments)}"
        )
    sys.exit(subprocess.run([sys.executable, script, *arguments, *["--debug"] * debug]).returncode)


def refuse_missing(*paths: Path) -> None:
    """Raise ValueError, with all their names, if there are paths without a file or folder."""
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"no such file or folder: {', '.join(missing)}")


def refuse_model(name: str) -> None:
    """Raise ValueError if `name` can be no folder, no exported file, no repository on the Hub and no known weights."""
    path = Path(name)
    if path.is_dir():
        return
    if name.split(".")[0] in ledger.DETECTORS and not path.is_file():
        ledger.find(name, ledger.DETECTOR_WEIGHTS, ledger.HOW_TO_MAKE_DETECTORS)
    elif path.suffix in EXPORTED:
        refuse_missing(path)
    elif "/" in name or path.exists():
        ledger.check_name(name)
    else:
        near = difflib.get_close_matches(name, [*ledger.DETECTORS, *ledger.DETECTOR_WEIGHTS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ", and no detector that `vovnet-zoo list` knows"
        raise ValueError(f"{name!r} is no folder here, and no 'organisation/name' on the Hub{hint}")


if __name__ == "__main__":
    main()
