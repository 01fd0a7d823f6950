"""The table lists the detectors, and `create_detector` builds them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from . import hub, vovnet
from .backbone import create_backbone
from .config import DEFAULT_VARIANT, VARIANTS, DetectorOptions, VariantName
from .convert import BGR_MEAN, COCO_IDS, Converted, Layout, convert
from .fcos import FCOS
from .weights import Weights, available, fetch, find, read_checkpoint

NUM_CLASSES = 80  # as COCO has
VARIANT_OF: dict[str, VariantName] = {"authors_detector": "published", "torchvision_detector": "torchvision"}

DETECTORS = {
    "fcos_resnet50_fpn": dict(backbone="resnet50"),
    "fcos_resnet101_fpn": dict(backbone="resnet101"),
    "fcos_resnext101_32x8d_fpn": dict(backbone="resnext101_32x8d"),
    "fcos_ese_vovnet19b_dw_fpn": dict(backbone="ese_vovnet19b_dw"),
    "fcos_ese_vovnet39b_fpn": dict(backbone="ese_vovnet39b"),
    "fcos_ese_vovnet57b_fpn": dict(backbone="ese_vovnet57b"),
    "fcos_vovnet27_slim_fpn": dict(backbone="vovnet27_slim"),
    "fcos_vovnet39_fpn": dict(backbone="vovnet39"),
    "fcos_vovnet57_fpn": dict(backbone="vovnet57"),
    "fcos_vovnet75_fpn": dict(backbone="vovnet75"),
    "fcos_vovnet93_fpn": dict(backbone="vovnet93"),
    **{f"fcos_{name}_fpn": dict(backbone=name) for name in vovnet.v2_cfgs},
}

# `pretrained_backbone` starts these detectors from one of the weights that timm knows, whatever timm's first choice is:
# from torchvision's (BSD-3) for the detectors that were compared in 2019, and from timm's own (Apache-2.0).
STARTS = {
    "fcos_resnet50_fpn": "resnet50.tv_in1k",
    "fcos_resnet101_fpn": "resnet101.tv_in1k",
    "fcos_resnext101_32x8d_fpn": "resnext101_32x8d.tv_in1k",
    "fcos_ese_vovnet19b_dw_fpn": "ese_vovnet19b_dw.ra_in1k",
    "fcos_ese_vovnet39b_fpn": "ese_vovnet39b.ra_in1k",
    "fcos_ese_vovnet57b_fpn": "ese_vovnet57b.ra4_e3600_r256_in1k",
}


def _authors(file: str, ap: str) -> Weights:
    return Weights(
        "gone",
        f"https://dl.dropbox.com/s/{file}?dl=1",
        score=f"COCO val2017 AP {ap} (the authors' repository VoVNet-FCOS)",
        mean=tuple(mean / 255 for mean in reversed(BGR_MEAN)),
        std=(1 / 255,) * 3,
        size=(800, 1333),
    )


# The published schedules are 1x, 90,000 iterations; 2x, twice as many; ms, with the shorter side drawn from 640..800.
WEIGHTS = {
    "fcos_resnet50_fpn.tv_coco": Weights(
        "url",
        "https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth",
        sha256="99b0c9b7cfb1527d782db86b91d207f00547c792fb4103fc612b651d0a07b9e7",
        license="bsd-3-clause",
        score="COCO val2017 AP 39.2 (torchvision)",
        size=(800, 1333),
    ),
    "fcos_resnet50_fpn.fcos_1x_coco": Weights("unpublished"),
    "fcos_resnet101_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_resnext101_32x8d_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_ese_vovnet19b_dw_fpn.coco_12e": Weights("unpublished"),
    "fcos_ese_vovnet39b_fpn.coco_24e": Weights("unpublished"),
    "fcos_ese_vovnet57b_fpn.coco_36e": Weights("unpublished"),
    "fcos_vovnet27_slim_fpn.fcos_1x_coco": Weights("unpublished"),
    "fcos_vovnet39_fpn.fcos_1x_coco": _authors("8n0wyypfggliplw/FCOS-V-39-FPN-1x.pth", "37.7"),
    "fcos_vovnet57_fpn.fcos_2x_ms_coco": _authors("f1posfwebb2ynnp/FCOS-V-57-MS-FPN-2x.pth", "41.6"),
    "fcos_vovnet75_fpn.fcos_2x_ms_coco": Weights("unpublished"),
    "fcos_vovnet93_fpn.fcos_2x_ms_coco": _authors("2v7go4lenvvjd1s/FCOS-V-93-MS-FPN-2x.pth", "42.1"),
    **{f"fcos_{name}_fpn.coco_24e": Weights("unpublished") for name in vovnet.v2_cfgs},
}
HOW_TO_MAKE = f"{vovnet.HOW_TO_MAKE}, or train a preset (python recipes/train_coco.py --help lists them)"


def create_detector(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    variant: VariantName | None = None,
    num_classes: int | None = None,
    **kwargs: Unpack[DetectorOptions],
) -> FCOS:
    """Build a detector.

    Args:
        name: one of `list_detectors()`, with `pretrained` also "name.tag"; or "fcos" with `backbone=` any timm model
            that gives maps at strides 8, 16, 32.
        pretrained: load the detector's trained weights, with the settings they were trained with.
        pretrained_backbone: load the backbone's ImageNet weights through timm: the weights of `STARTS`, or where that
            table has none the weights that timm chooses. `config` gets the mean and std that they were trained with.
        variant: "improved", "published" or "torchvision", see `VARIANTS`; None is "improved", or with `pretrained`
            whatever the weights are.
        num_classes: foreground classes; None is 80, or with `pretrained` the number that the weights have.
        kwargs: further arguments of `FCOS`, see `DetectorOptions`; they win over the arguments of the variant.

    Raises:
        ValueError: the name or variant is unknown, or its weights are not published or do not fit the arguments.
        OSError: the weights' server cannot be reached, or refuses.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: one of {sorted(VARIANTS)}")
    base, _, tag = name.partition(".")
    if base == "fcos" and not tag and not pretrained:
        if "backbone" not in kwargs:
            raise ValueError("create_detector('fcos') needs backbone=, the name of a timm model")
        arch = {}
    elif base in DETECTORS and (not tag or (pretrained and name in WEIGHTS)):
        arch = DETECTORS[base]
    else:
        known = [*DETECTORS, *WEIGHTS] if pretrained else ["fcos", *DETECTORS]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no detector {name!r}; {hint}There are: {', '.join(sorted(known))}")
    if pretrained:
        return _load(name, variant, num_classes, kwargs)

    settings: dict[str, Any] = {"num_classes": NUM_CLASSES if num_classes is None else num_classes}
    settings |= {**VARIANTS[variant or DEFAULT_VARIANT], **arch, **kwargs}
    if pretrained_backbone:
        start = STARTS[base] if base in STARTS and settings["backbone"] == arch["backbone"] else settings["backbone"]
        body = create_backbone(start, pretrained=True)
        settings = {"image_mean": body.pretrained_cfg["mean"], "image_std": body.pretrained_cfg["std"], **settings}
    model = FCOS(**settings)
    if pretrained_backbone:
        weights = body.state_dict()
        if model.config["frozen_norm"]:
            weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        model.backbone.load_state_dict(weights, strict=True)
    return model


def load_detector(source: str) -> FCOS:
    """Load a trained detector: from a folder, from the Hub ("organisation/name"), or of the table ("name.tag").

    Raises:
        ValueError: see `FCOS.from_pretrained` and `create_detector`.
        OSError: see there.
    """
    if source.split(".")[0] in DETECTORS and not Path(source).is_dir():
        return create_detector(source, pretrained=True)
    return FCOS.from_pretrained(source)


def list_detectors(*, pretrained: bool = False) -> list[str]:
    """List the names of the detectors or, with `pretrained`, each `name.tag` whose weights can be downloaded."""
    return sorted(key for key in WEIGHTS if available(key, WEIGHTS)) if pretrained else sorted(DETECTORS)


def build_converted(converted: Converted, **kwargs: Unpack[DetectorOptions]) -> FCOS:
    """Build the detector of a published checkpoint, with its weights loaded; `kwargs` are arguments of `FCOS`."""
    known: dict[str, Any] = {**VARIANTS[VARIANT_OF[converted.form]], **converted.config}
    if known.get("category_ids") == COCO_IDS or (converted.form == "authors_detector" and known["num_classes"] == 80):
        known |= {"class_names": coco_class_names(), "category_ids": COCO_IDS}
    model = FCOS(**{**known, **kwargs})
    hub.load_strict(model, converted.state_dict, "the checkpoint")
    return model.eval()


def archs() -> dict[str, Layout]:
    """Map each backbone's name to its layout, as `convert` takes it."""
    return {name: vovnet.layout(cfg) for name, cfg in vovnet.model_cfgs.items()}


def coco_class_names() -> list[str]:
    """List COCO's 80 classes in the order of their ids; torchvision lists them among 91 places."""
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [names[i] for i in COCO_IDS]


def _load(name: str, variant: VariantName | None, num_classes: int | None, kwargs: DetectorOptions) -> FCOS:
    key, repo_id = find(name, WEIGHTS, HOW_TO_MAKE)
    if repo_id is None:
        row = WEIGHTS[key]
        converted = convert(read_checkpoint(fetch(row.url, row.sha1, sha256=row.sha256)), archs())
        if not converted.config:
            raise ValueError(f"{row.url} holds {converted.form}, not a detector")
        model = build_converted(converted, **kwargs)
    else:
        model = FCOS.from_pretrained(repo_id, **kwargs)
    wanted: dict[str, object] = {**DETECTORS[key.split(".")[0]], **(VARIANTS[variant] if variant else {})}
    config: Mapping[str, object] = model.config
    if num_classes is not None:
        wanted["num_classes"] = num_classes
    if wrong := [f"{k}={config[k]!r}, not {v!r}" for k, v in wanted.items() if config[k] != v]:
        raise ValueError(f"the weights {key} were trained with {', '.join(wrong)}; leave it out, or train your own")
    return model
