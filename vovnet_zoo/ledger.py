"""The ledger says of each backbone and detector what is known without building it, and where its weights are.

A name has one line among the architectures, and each of its sets of weights, `name.tag`, has one line among the
weights. The command `vovnet-zoo list`, the downloads, the model cards and the table of recipes/guides/weights.md read
these lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

ORGANISATION, ORGANISATION_VARIABLE = "vovnet-zoo", "VOVNET_ZOO_ORG"
CODE_LICENSE = "apache-2.0"  # of this library, and of timm, which has the backbones' classes
STATES = {
    "hub": "can be had",  # in a repository of ORGANISATION
    "url": "can be had",  # at `url`
    "timm": "can be had",  # in timm's repository of the same name
    "gone": "reported gone",  # `url` answers 403, as third parties say
    "unpublished": "not published",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture has a size, with its default arguments. One multiplication and addition are 2 FLOPs."""

    text: str
    parameters: int
    gflops: float  # of one image of `size`
    size: tuple[int, int] = (224, 224)  # height and width


@dataclass(frozen=True)
class Measured:
    """These scores were measured with this library."""

    dataset: str
    metrics: Mapping[str, float]
    command: str

    def __str__(self) -> str:
        """Write the scores, as "AP 0.377, AP50 0.580"."""
        return ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())


@dataclass(frozen=True)
class Weights:
    """A row of a weight table says what is known of the weights called `name.tag`."""

    state: Literal["hub", "url", "timm", "gone", "unpublished"]  # see STATES
    url: str = ""
    sha1: str = ""  # hash of the .pth file, which may come in a zip
    sha256: str = ""  # another hash of the same file, where its publisher tells this one
    license: str = "not stated"
    score: str = ""  # the published score
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of a classifier; per RGB channel, for pixels in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] = (224, 224)  # of a classifier; height and width
    interpolation: str = "bilinear"  # of a classifier
    data: str = ""  # what the weights were trained on
    publisher: str = ""  # who published the weights and the score
    measured: Measured | None = None


HOW_TO_MAKE_BACKBONES = (
    "convert a checkpoint that you have (vovnet-zoo convert FILE.pth FOLDER), or train a classifier "
    "(python recipes/train_imagenet.py rsb_a3 --model NAME --data ROOT)"
)
HOW_TO_MAKE_DETECTORS = (
    "convert a checkpoint that you have (vovnet-zoo convert FILE.pth FOLDER), or train a preset "
    "(python recipes/train_coco.py --help lists them)"
)

# ---- backbones, ImageNet-1k classifiers with 1,000 classes

BACKBONES = {
    "vovnet27_slim": Architecture("VoVNet-27-slim", 3_525_736, 4.35),
    "vovnet39": Architecture("VoVNet-39", 22_600_296, 14.14),
    "vovnet57": Architecture("VoVNet-57", 36_640_296, 17.86),
    "vovnet75": Architecture("VoVNet-75", 46_943_080, 24.64),
    "vovnet93": Architecture("VoVNet-93", 57_245_864, 31.41),
    "vovnetv2_19_slim_dw": Architecture("VoVNetV2-19-slim-dw", 1_897_752, 0.8),
    "vovnetv2_19_dw": Architecture("VoVNetV2-19-dw", 6_543_080, 2.67),
    "vovnetv2_19_slim": Architecture("VoVNetV2-19-slim", 3_166_136, 3.36),
    "vovnetv2_19": Architecture("VoVNetV2-19", 11_205_416, 8.24),
    "vovnetv2_39": Architecture("VoVNetV2-39", 26_209_128, 14.15),
    "vovnetv2_57": Architecture("VoVNetV2-57", 42_479_912, 17.87),
    "vovnetv2_99": Architecture("VoVNetV2-99", 70_548_520, 32.99),
    "ese_vovnet19b_dw": Architecture("timm's eSE-VoVNet-19-dw", 6_543_080, 2.67),
    "ese_vovnet39b": Architecture("timm's eSE-VoVNet-39", 24_568_936, 14.15),
    "ese_vovnet57b": Architecture("timm's eSE-VoVNet-57", 38_608_936, 17.86),
}


def _pytorchcv(file: str, sha1: str, top5: str) -> Weights:
    return Weights(
        "url",
        f"https://github.com/osmr/imgclsmob/releases/download/{file}",
        sha1,
        license="mit",
        score=f"top-5 error {top5} %",
        data="ImageNet-1k",
        publisher="pytorchcv, in the name of the file",
    )


def _authors(file: str, score: str = "") -> Weights:
    url = f"https://dl.dropbox.com/s/{file}?dl=1"
    return Weights("gone", url, score=score, data="ImageNet-1k", publisher="the authors")


def _timm(top1: str) -> Weights:
    score = f"top-1 accuracy {top1} %"
    return Weights("timm", license="apache-2.0", score=score, data="ImageNet-1k", publisher="timm")


# `authors_in1k` are the authors' classifiers. `authors_det` are the ImageNet classifiers from which the authors'
# detectors were trained; whether these took RGB with mean and std or BGR in 0..255 is not documented.
BACKBONE_WEIGHTS = {
    "vovnet27_slim.pytorchcv_in1k": _pytorchcv(
        "v0.0.551/vovnet27s-0997-b7a5bf67.pth.zip", "b7a5bf677bd3431bbed44b439fde7a01d699ace1", "9.97"
    ),
    "vovnet39.pytorchcv_in1k": _pytorchcv(
        "v0.0.493/vovnet39-0564-63bfa613.pth.zip", "63bfa613870b37bd4fb5b71412e7875392aa4f66", "5.64"
    ),
    "vovnet39.authors_in1k": _authors("1lnzsgnixd8gjra/vovnet39_torchvision.pth", "top-1 error 23.23 %"),
    "vovnet39.authors_det": _authors("s7f4vyfybyc9qpr/vovnet39_statedict_norm.pth"),
    "vovnet57.pytorchcv_in1k": _pytorchcv(
        "v0.0.505/vovnet57-0518-c080e471.pth.zip", "c080e47169a176043f298b1e909ddd8776d5aa76", "5.18"
    ),
    "vovnet57.authors_in1k": _authors("6bfu9gstbwfw31m/vovnet57_torchvision.pth", "top-1 error 22.27 %"),
    "vovnet57.authors_det": _authors("b826phjle6kbamu/vovnet57_statedict_norm.pth"),
    "vovnet75.in1k": Weights("unpublished"),
    "vovnet75.authors_det": _authors("ve1h1ol2ge7yfta/vovnet75_statedict_norm.pth.tar"),
    "vovnet93.in1k": Weights("unpublished"),
    "vovnet93.authors_det": _authors("qtly316zv1isn0t/vovnet93_statedict_norm.pth.tar"),
    # Third parties report that the authors' files of V2 answer 403; `vovnet-zoo convert` reads a copy of one.
    "vovnetv2_19_slim_dw.in1k": Weights("unpublished"),
    "vovnetv2_19_dw.in1k": Weights("unpublished"),
    "vovnetv2_19_slim.in1k": Weights("unpublished"),
    "vovnetv2_19.in1k": Weights("unpublished"),
    "vovnetv2_39.in1k": Weights("unpublished"),
    "vovnetv2_57.in1k": Weights("unpublished"),
    "vovnetv2_99.in1k": Weights("unpublished"),
    "ese_vovnet19b_dw.ra_in1k": _timm("76.8"),
    "ese_vovnet39b.ra_in1k": _timm("79.3"),
    "ese_vovnet57b.ra4_e3600_r256_in1k": _timm("82.5"),
}

# ---- detectors, with COCO's 80 classes


def _fcos(backbone: str, parameters: int, gflops: float) -> Architecture:
    return Architecture(f"FCOS with a feature pyramid on {backbone}", parameters, gflops, (800, 1344))


DETECTORS = {
    "fcos_resnet50_fpn": _fcos("resnet50", 32_297_370, 429.46),
    "fcos_resnet101_fpn": _fcos("resnet101", 51_289_498, 588.56),
    "fcos_resnext101_32x8d_fpn": _fcos("resnext101_32x8d", 95_531_674, 957.67),
    "fcos_ese_vovnet19b_dw_fpn": _fcos("ese_vovnet19b_dw", 13_979_738, 310.22),
    "fcos_ese_vovnet39b_fpn": _fcos("ese_vovnet39b", 32_005_594, 556.25),
    "fcos_ese_vovnet57b_fpn": _fcos("ese_vovnet57b", 46_045_594, 635.88),
    "fcos_vovnet27_slim_fpn": _fcos("vovnet27_slim", 11_179_482, 343.16),
    "fcos_vovnet39_fpn": _fcos("vovnet39", 30_036_954, 556.25),
    "fcos_vovnet57_fpn": _fcos("vovnet57", 44_076_954, 635.87),
    "fcos_vovnet75_fpn": _fcos("vovnet75", 54_379_738, 781.07),
    "fcos_vovnet93_fpn": _fcos("vovnet93", 64_682_522, 926.26),
    "fcos_vovnetv2_19_slim_dw_fpn": _fcos("vovnetv2_19_slim_dw", 9_551_498, 266.91),
    "fcos_vovnetv2_19_dw_fpn": _fcos("vovnetv2_19_dw", 13_979_738, 310.22),
    "fcos_vovnetv2_19_slim_fpn": _fcos("vovnetv2_19_slim", 10_819_882, 321.86),
    "fcos_vovnetv2_19_fpn": _fcos("vovnetv2_19", 18_642_074, 429.73),
    "fcos_vovnetv2_39_fpn": _fcos("vovnetv2_39", 33_645_786, 556.26),
    "fcos_vovnetv2_57_fpn": _fcos("vovnetv2_57", 49_916_570, 635.88),
    "fcos_vovnetv2_99_fpn": _fcos("vovnetv2_99", 77_985_178, 959.72),
}


def _authors_fcos(file: str, ap: str) -> Weights:
    url, score = f"https://dl.dropbox.com/s/{file}?dl=1", f"COCO val2017 AP {ap}"
    return Weights("gone", url, score=score, data="ImageNet-1k, then COCO train2017", publisher="the authors")


# The published schedules are 1x, 90,000 iterations; 2x, twice as many; ms, with the shorter side drawn from 640..800.
DETECTOR_WEIGHTS = {
    "fcos_resnet50_fpn.tv_coco": Weights(
        "url",
        "https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth",
        sha256="99b0c9b7cfb1527d782db86b91d207f00547c792fb4103fc612b651d0a07b9e7",
        license="bsd-3-clause",
        score="COCO val2017 AP 39.2",
        data="ImageNet-1k, then COCO train2017",
        publisher="torchvision",
    ),
    "fcos_resnet50_fpn.fcos_1x_coco": Weights("unpublished"),
    "fcos_resnet101_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_resnext101_32x8d_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_ese_vovnet19b_dw_fpn.coco_12e": Weights("unpublished"),
    "fcos_ese_vovnet39b_fpn.coco_24e": Weights("unpublished"),
    "fcos_ese_vovnet57b_fpn.coco_36e": Weights("unpublished"),
    "fcos_vovnet27_slim_fpn.fcos_1x_coco": Weights("unpublished"),
    "fcos_vovnet39_fpn.fcos_1x_coco": _authors_fcos("8n0wyypfggliplw/FCOS-V-39-FPN-1x.pth", "37.7"),
    "fcos_vovnet57_fpn.fcos_2x_ms_coco": _authors_fcos("f1posfwebb2ynnp/FCOS-V-57-MS-FPN-2x.pth", "41.6"),
    "fcos_vovnet75_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_vovnet93_fpn.fcos_2x_ms_coco": _authors_fcos("2v7go4lenvvjd1s/FCOS-V-93-MS-FPN-2x.pth", "42.1"),
    "fcos_vovnetv2_19_slim_dw_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_19_dw_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_19_slim_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_19_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_39_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_57_fpn.coco_24e": Weights("unpublished"),
    "fcos_vovnetv2_99_fpn.coco_24e": Weights("unpublished"),
}

# ---- what the rows say


def rows() -> list[dict[str, Any]]:
    """List all that is known of each `name.tag`, for `vovnet-zoo list --json`; the keys are the same in each row.

    What an organisation of one's own has (VOVNET_ZOO_ORG) is not in it.
    """
    return [
        {"name": key, "kind": kind, **_facts(key, architectures[key.split(".")[0]], row)}
        for kind, architectures, table in (
            ("backbone", BACKBONES, BACKBONE_WEIGHTS),
            ("detector", DETECTORS, DETECTOR_WEIGHTS),
        )
        for key, row in table.items()
    ]


def _facts(key: str, architecture: Architecture, row: Weights) -> dict[str, Any]:
    return {
        "architecture": architecture.text,
        "parameters": architecture.parameters,
        "gflops": architecture.gflops,
        "gflops_at": list(architecture.size),
        "state": STATES[row.state],
        "source": source(key, row),
        "sha1": row.sha1,
        "sha256": row.sha256,
        "weights_license": row.license,
        "code_license": CODE_LICENSE,
        "training_data": row.data,
        "published_score": row.score,
        "publisher": row.publisher,
        "measured": row.measured and {**asdict(row.measured), "text": str(row.measured)},
    }


def source(key: str, row: Weights) -> str:
    """Return the address of the weights `key`; "" if they are not published."""
    repository = {"hub": f"{ORGANISATION}/{key}", "timm": f"timm/{key}"}.get(row.state)
    return f"https://huggingface.co/{repository}" if repository else row.url


def describe(row: Mapping[str, Any]) -> str:
    """Write one of `rows()` as a few lines of text."""
    height, width = row["gflops_at"]
    hashes = ", ".join(f"{name} {row[name]}" for name in ("sha1", "sha256") if row[name]) or "hash not known"
    lines = [
        f"{row['name']}: {row['state']}",
        f"{row['architecture']}; {row['parameters']:,} parameters, {row['gflops']} GFLOPs at {height}x{width}",
    ]
    if row["state"] != STATES["unpublished"]:
        measured = row["measured"]
        lines += [
            f"{row['source']} ({hashes})",
            f"trained on {row['training_data']}; license of the weights: {row['weights_license']}, "
            f"of the code: {row['code_license']}",
            f"published: {row['published_score'] or 'no score'} ({row['publisher']}); measured here: "
            + (f"{measured['text']} on {measured['dataset']} ({measured['command']})" if measured else "no"),
        ]
    return "\n    ".join(lines)


def markdown() -> str:
    """Write the table of recipes/guides/weights.md: the weights that are published."""
    lines = [
        "| weights | parameters | GFLOPs | state | published score | license | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        if row["state"] != STATES["unpublished"]:
            host = urlparse(row["source"]).hostname
            score = f"{row['published_score'] or '-'} ({row['publisher']})"
            lines.append(
                f"| `{row['name']}` | {row['parameters'] / 1e6:.1f} M | {row['gflops']:.4g} | {row['state']} "
                f"| {score} | {row['weights_license']} | [{host}]({row['source']}) |"
            )
    return "\n".join(lines)


# ---- who can be had


def find(name: str, table: Mapping[str, Weights], how_to_make: str) -> tuple[str, str | None]:
    """Find the key of `table` that `name`, with or without a tag, stands for, and the Hub repository of these weights.

    The repository is None if the weights come from their url. The url of a "gone" row is tried only if `name` has the
    tag. If the environment variable VOVNET_ZOO_ORG names an organisation, all weights come from its repositories.

    Args:
        how_to_make: how a user gets such weights otherwise, for the error message.

    Raises:
        ValueError: the weights are not published; the message lists weights that are, and says how to make these.
    """
    base, _, tag = name.partition(".")
    keys = [key for key in table if name in (key, key.split(".")[0])]
    if keys and (organisation := os.environ.get(ORGANISATION_VARIABLE)):
        return keys[0], f"{organisation}/{keys[0]}"
    for key in keys:
        if table[key].state == "hub":
            return key, f"{ORGANISATION}/{key}"
        if table[key].state == "url" or (table[key].state == "gone" and key == name):
            return key, None
    tags = {key: STATES[row.state] for key, row in table.items() if key.split(".")[0] == base}
    if tag and tags and not keys:
        known = ", ".join(f"{key} ({state})" for key, state in tags.items())
        raise ValueError(f"{base!r} has no weights called {tag!r}; there are {known}")
    gone = [key for key in tags if table[key].state == "gone"]
    hint = f" ({', '.join(gone)}: reported gone, and still tried if asked for by this name)" if gone else ""
    raise ValueError(
        f"no weights of {name!r} can be had{hint}: {instead(name, table, how_to_make)}, "
        f"or set {ORGANISATION_VARIABLE} to the organisation that has yours"
    )


def instead(name: str, table: Mapping[str, Weights], how_to_make: str) -> str:
    """Say in one clause what can be had instead of the weights `name`, and how to get these."""
    there = [key for key in table if available(key, table) and key != name]
    how_to_make = how_to_make.replace("NAME", name.partition(".")[0])
    return f"take {', '.join(there)}, or {how_to_make}" if there else how_to_make


def available(key: str, table: Mapping[str, Weights]) -> bool:
    """Tell whether `find` gives a source for a key of `table`, other than a url that is known to refuse."""
    return bool(os.environ.get(ORGANISATION_VARIABLE)) or STATES[table[key].state] == "can be had"


def check_name(source: str) -> None:
    """Refuse, without asking the Hub, what is no "organisation/name" but the path of a folder that is not there.

    A revision may follow the name: "organisation/name@revision".

    Raises:
        ValueError: the message names the part of the path that is missing.
    """
    path = Path(source)
    if source.split(".")[0] in DETECTORS and not path.exists():
        raise ValueError(
            f"{source!r} is a name of the library's table: vovnet_zoo.create_detector({source!r}, pretrained=True)"
        )
    if source.startswith("~"):
        raise ValueError(f"{source!r:.300}: Python does not replace ~ by your folder; os.path.expanduser(path) does")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", source, re.ASCII) and not path.exists():
        return
    if path.exists():
        raise ValueError(
            f"{source!r:.300} is a file; give the folder of a saved model, or 'organisation/name' on the Hub; of a "
            "checkpoint that others published, `vovnet-zoo convert FILE FOLDER` makes such a folder"
        )
    there = next((parent for parent in path.parents if parent.is_dir()), None)
    where = f": {there} is there, {path.relative_to(there).parts[0]} in it is not" if there else ""
    raise ValueError(f"{source!r:.300} is no folder here, and no 'organisation/name' on the Hub{where}")
