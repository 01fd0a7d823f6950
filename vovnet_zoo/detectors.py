"""The table lists the detectors, and `create_detector` builds them."""

from __future__ import annotations

import difflib
import fnmatch
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from . import hub, vovnet
from .arguments import check_choice, check_flag, check_kind
from .backbone import create_backbone
from .classifiers import SOURCES, load_classifier
from .config import DEFAULT_VARIANT, VARIANTS, DetectorOptions, VariantName
from .convert import COCO_IDS, Converted, Layout, convert
from .fcos import FCOS
from .ledger import DETECTOR_WEIGHTS as WEIGHTS
from .ledger import HOW_TO_MAKE_DETECTORS as HOW_TO_MAKE
from .ledger import available, find
from .results import coco_class_names
from .weights import fetch_row, read_checkpoint

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


def create_detector(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool | str | Path = False,
    variant: VariantName | None = None,
    num_classes: int | None = None,
    **kwargs: Unpack[DetectorOptions],
) -> FCOS:
    """Build a detector, in train mode; with `pretrained`, in eval mode.

    Args:
        name: one of `list_detectors()`, with `pretrained` also "name.tag"; or "fcos" with `backbone=` any timm model
            that gives maps at strides 8, 16, 32.
        pretrained: load the detector's trained weights, with the settings they were trained with.
        pretrained_backbone: load the backbone's ImageNet weights through timm: the weights of `STARTS`, or where that
            table has none the weights that timm chooses; or, where this names a folder of a saved classifier or
            "hf-hub:organisation/name", the weights there. `backbone="local-dir:FOLDER"` or "hf-hub:..." does the same.
            `config` gets the mean and std that they were trained with, and the name of the architecture only.
        variant: "improved", "published" or "torchvision", see `VARIANTS`; None is "improved", or with `pretrained`
            whatever the weights are.
        num_classes: foreground classes; None is 80, or with `pretrained` the number that the weights have.
        kwargs: further arguments of `FCOS`, see `DetectorOptions`; they win over the arguments of the variant.

    Raises:
        ValueError: the name or variant is unknown, `pretrained` and `pretrained_backbone` are both given, or the
            weights are not published or do not fit the arguments.
        OSError: the weights' server cannot be reached, or refuses.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={reprlib.repr(name)}: give a text, one of list_detectors()")
    if variant is not None:
        check_choice("variant", variant, VARIANTS)
    check_flag("pretrained", pretrained)
    if not isinstance(pretrained_backbone, str | Path):
        check_flag("pretrained_backbone", pretrained_backbone)
    if unknown := kwargs.keys() - DetectorOptions.__annotations__.keys():
        known = [*(create_detector.__kwdefaults__ or {}), *DetectorOptions.__annotations__]
        raise ValueError(f"unknown {sorted(unknown)}: create_detector has {', '.join(known)}")
    if pretrained and pretrained_backbone:
        raise ValueError(
            "pretrained=True: the detector's weights include the backbone's; leave pretrained_backbone out"
        )
    base, _, tag = name.partition(".")
    if base == "fcos" and not tag and not pretrained:
        if "backbone" not in kwargs and isinstance(pretrained_backbone, bool):
            raise ValueError("create_detector('fcos') needs backbone=, the name of a timm model")
        arch = {}
    elif base in DETECTORS:
        arch = DETECTORS[base]
        if tag and not pretrained:
            raise ValueError(f"name={name!r} is a name of weights: add pretrained=True, or leave {'.' + tag!r} out")
    else:
        known = [*DETECTORS, *WEIGHTS] if pretrained else ["fcos", *DETECTORS]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if Path(name).is_dir() or set("/:") & set(name):
            hint = "vovnet_zoo.load_detector loads a folder or 'organisation/name'. "
        raise ValueError(f"no detector {name!r}; {hint}there are: {', '.join(sorted(known))}")
    if pretrained:
        return _load(name, variant, num_classes, kwargs)

    start, arch, kwargs = _find_start(pretrained_backbone, arch, kwargs)
    settings: dict[str, Any] = {"num_classes": NUM_CLASSES if num_classes is None else num_classes}
    settings |= {**VARIANTS[variant or DEFAULT_VARIANT], **arch, **kwargs}
    body = None
    if start is not None:
        body = create_backbone(settings["backbone"], weights=start)
    elif pretrained_backbone:
        tagged = STARTS[base] if base in STARTS and settings["backbone"] == arch["backbone"] else settings["backbone"]
        body = create_backbone(tagged, pretrained=True)
        settings = {"image_mean": body.pretrained_cfg["mean"], "image_std": body.pretrained_cfg["std"], **settings}
    model = FCOS(**settings)
    if body is not None:
        weights = body.state_dict()
        if model.config["frozen_norm"]:
            weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        model.backbone.load_state_dict(weights, strict=True)
    return model


def load_detector(source: str, **options: Unpack[hub.HubOptions]) -> FCOS:
    """Load a trained detector: of a folder, the Hub ("organisation/name[@revision]"), or the table ("name.tag").

    `options` are passed to `FCOS.from_pretrained`; the table has none but `map_location`.

    Raises:
        ValueError: see `FCOS.from_pretrained` and `create_detector`.
        OSError: see there.
    """
    if source.split(".")[0] in DETECTORS and not Path(source).is_dir():
        device = hub.as_device(options.pop("map_location", "cpu"))
        hub.refuse_options(source, options, "a name in the table of weights")
        return create_detector(source, pretrained=True).to(device)
    return FCOS.from_pretrained(source, **options)


def list_detectors(filter: str = "*", *, pretrained: bool = False) -> list[str]:
    """List the names of the detectors or, with `pretrained`, each `name.tag` whose weights can be downloaded.

    `filter` is a pattern of the names, such as "*vovnet*", as `timm.list_models` takes it.
    """
    check_kind("filter", filter, str, "a pattern as text, such as '*vovnet*'")
    check_flag("pretrained", pretrained)
    names = [key for key in WEIGHTS if available(key, WEIGHTS)] if pretrained else [*DETECTORS]
    return sorted(fnmatch.filter(names, filter))


def build_converted(converted: Converted, **kwargs: Unpack[DetectorOptions]) -> FCOS:
    """Build the detector of a published checkpoint, with its weights loaded; `kwargs` are arguments of `FCOS`."""
    settings: dict[str, Any] = {**VARIANTS[VARIANT_OF[converted.form]], **converted.config}
    of_coco = converted.form == "authors_detector" and settings["num_classes"] == NUM_CLASSES
    if of_coco or settings.get("category_ids") == COCO_IDS:
        settings |= {"class_names": coco_class_names(), "category_ids": COCO_IDS}
    settings |= kwargs
    skeleton = hub.build_empty(lambda: FCOS(**settings))  # the checkpoint may ask for any number of classes
    hub.check_fit(skeleton, {key: list(x.shape) for key, x in converted.state_dict.items()}, "the checkpoint")
    model = FCOS(**settings)
    hub.load_strict(model, converted.state_dict, "the checkpoint")
    return model.eval()


def archs() -> dict[str, Layout]:
    """Map each backbone's name to its layout, as `convert` takes it."""
    return {name: vovnet.layout(cfg) for name, cfg in vovnet.model_cfgs.items()}


def _find_start(
    source: bool | str | Path, arch: dict[str, str], kwargs: DetectorOptions
) -> tuple[dict[str, Tensor] | None, dict[str, str], DetectorOptions]:
    """Load the classifier that the backbone starts from, if `source` or `backbone` tells its folder or repository.

    Returns:
        Its tensors, or None; `arch` with the name of its architecture; `kwargs` without the folder or repository, and
        with the mean and std that the classifier was trained with.

    Raises:
        ValueError: the classifier cannot be loaded, or is of another architecture than asked for.
    """
    rest: Any = dict(kwargs)
    asked, option = rest.pop("backbone", arch.get("backbone")), "pretrained_backbone"
    if isinstance(asked, str) and asked.startswith(SOURCES):
        if not isinstance(source, bool):
            raise ValueError(f"backbone={asked!r} and pretrained_backbone={str(source)!r}: give one of them")
        source, option, asked = asked, "backbone", arch.get("backbone")
    if isinstance(source, bool):
        return None, arch, kwargs
    try:
        classifier, name, cfg = load_classifier(source)
    except ValueError as error:
        raise ValueError(f"{option}={str(source)!r}: {error}") from error
    if asked not in (None, name):
        raise ValueError(f"{source} holds a {name}, not a {asked}; to use it, give create_detector('fcos', backbone=)")
    rest = {"image_mean": cfg.get("mean"), "image_std": cfg.get("std"), **rest}
    return classifier.state_dict(), {"backbone": name}, rest


def _load(name: str, variant: VariantName | None, num_classes: int | None, kwargs: DetectorOptions) -> FCOS:
    key, repo_id = find(name, WEIGHTS, HOW_TO_MAKE)
    if repo_id is None:
        converted = convert(read_checkpoint(fetch_row(key, WEIGHTS, HOW_TO_MAKE)), archs())
        if not converted.config:
            raise ValueError(f"{WEIGHTS[key].url} holds {converted.form}, not a detector")
        model = build_converted(converted, **kwargs)
    else:
        model = FCOS.from_pretrained(repo_id, **kwargs)
    wanted: dict[str, object] = {**DETECTORS[key.split(".")[0]], **(VARIANTS[variant] if variant else {})}
    config: Mapping[str, object] = model.config
    if num_classes is not None:
        wanted["num_classes"] = num_classes
    if wrong := [f"{k}={config[k]!r}, not {v!r}" for k, v in wanted.items() if config[k] != v]:
        hint = "leave it out, or train your own"
        if len(wrong) == 1 and num_classes not in (None, config["num_classes"]):
            hint = "leave it out, and model.reset_classifier(num_classes) lets the model learn others"
        raise ValueError(f"the weights {key} were trained with {', '.join(wrong)}; {hint}")
    return model
