"""A classifier in a folder or Hub repository has a `config.json` of timm's form, and its weights beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import hub, vovnet
from .files import read_json, read_safetensors, read_shapes, staged, write_safetensors
from .ledger import Weights

TIMM_NAME = "vovnet39a"  # timm's own name of the class that every published V1 backbone is built from
SOURCES = ("local-dir:", "hf-hub:", "hf_hub:")  # timm's words for a folder and a Hub repository, and its old word
MAX_SIDE = 1024  # of the images of a classifier that is made for one size


def save_classifier(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    cfg: dict[str, Any] | None = None,
    **metadata: str,
) -> None:
    """Save a classifier, so that every file in `folder` is whole at any time.

    `vovnet-zoo publish` pushes the folder, `create_detector(..., pretrained_backbone=folder)` starts a detector from
    it, and timm 1.0.26 or later opens it as `create_model("local-dir:FOLDER", pretrained=True)`, a VoVNet V1 also where
    this package is not installed.

    Args:
        model: what `timm.create_model(name, num_classes=..)` builds.
        class_names: the names of the classes, in label order; None where unknown.
        cfg: fields of timm's `pretrained_cfg` that differ from `name`'s, such as `mean`, `std`, `input_size`.
        metadata: facts for the model card.

    Raises:
        ValueError: timm has no model `name`, or `model` has tensors of other names.
    """
    num_classes: Any = model.num_classes
    names = {"label_names": list(class_names)} if class_names else {}
    config = timm_config(name, num_classes, {**(cfg or {}), **names})
    whole = hub.build_empty(lambda: timm.create_model(name, num_classes=num_classes)).state_dict()
    # a batch norm that was fixed in training does not count batches
    counts = {key: torch.tensor(0) for key in whole if key.endswith("num_batches_tracked")}
    weights = {**counts, **model.state_dict()}
    if other := sorted(weights.keys() ^ whole.keys()):
        raise ValueError(f"name={name!r}: the model is no {name}; one has a tensor {other[0]}, and the other has not")
    with staged(folder, keep=[hub.CARD]) as staging:
        (staging / hub.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(weights, staging / hub.WEIGHTS, **metadata)


def load_classifier(source: str | Path) -> tuple[nn.Module, str, dict]:
    """Load a classifier strictly; returns it with its name in timm's registry and its `pretrained_cfg`.

    The files need not be trusted: no code in them runs, and nothing else is downloaded.

    Args:
        source: a folder, also as "local-dir:FOLDER", or "hf-hub:organisation/name", which `save_classifier`,
            `vovnet-zoo convert`, or timm's `save_for_hf` or `push_to_hf_hub` wrote, with safetensors.

    Raises:
        ValueError: there is no such folder, or its classifier cannot be loaded; the message says why.
        OSError: the Hub cannot be reached, or refuses.
    """
    text = str(source).removeprefix("local-dir:").replace("hf_hub:", "hf-hub:", 1)
    if text.startswith("hf-hub:"):
        repo_id, _, revision = text.removeprefix("hf-hub:").partition("@")
        config_file = hub.download(repo_id, hub.CONFIG, revision=revision or None)
        hub.download(repo_id, hub.WEIGHTS, revision=config_file.parent.name)  # the same commit, so the same folder
        folder = config_file.parent
    else:
        folder = Path(text)
        if not folder.is_dir():
            raise ValueError(
                f"{folder} has no {hub.CONFIG}: give the folder of a saved classifier, or hf-hub:organisation/name"
            )
        hub.find_files(folder)
    model, name = load_for_timm(folder)
    return model, name, read_json(folder / hub.CONFIG, hub.MAX_CONFIG_BYTES).get("pretrained_cfg") or {}


def build_for_timm(name: str, state_dict: dict[str, Tensor]) -> tuple[nn.Module, dict]:
    """Build a backbone and the `config.json` with which timm builds it, V1 also without this package.

    V1 is timm's own class with other arguments. V2 is a class of this package, and its config names the model here.

    Args:
        name: one of `vovnet.model_cfgs`.
        state_dict: the tensors under timm's names; without a classifier the model gives features.
    """
    num_classes = state_dict["head.fc.bias"].numel() if "head.fc.bias" in state_dict else 0
    args, architecture = vovnet.model_cfgs[name], timm_name(name)
    # the checkpoint may ask for any number of classes
    skeleton = hub.build_empty(lambda: timm.create_model(architecture, num_classes=num_classes, **args))
    hub.check_fit(skeleton, {key: list(x.shape) for key, x in state_dict.items()}, "the checkpoint")
    model = timm.create_model(architecture, num_classes=num_classes, **args)
    hub.load_strict(model, state_dict, "the checkpoint")
    return model.eval(), timm_config(name, num_classes)


def timm_name(name: str) -> str:
    """Tell under which name timm builds a model of `vovnet.model_cfgs`, given its arguments."""
    return name if name in vovnet.v2_cfgs else TIMM_NAME


def timm_config(name: str, num_classes: int, cfg: dict[str, Any] | None = None) -> dict:
    """Write the `config.json` of a classifier as timm reads it.

    Args:
        name: of the model in timm's registry. One of `vovnet.model_cfgs` is written with its arguments.
        cfg: fields of `pretrained_cfg` that differ from `name`'s.
    """
    config: dict[str, Any]
    if name in vovnet.model_cfgs:
        args = vovnet.model_cfgs[name]
        known = {**vovnet.timm_cfg(Weights("hub", license="other")), "tag": name}
        del known["url"], known["license"], known["notes"]
        config = {"architecture": timm_name(name), "num_features": args["stage_out_chs"][-1], "model_args": args}
    else:
        keys = ("mean", "std", "input_size", "interpolation", "crop_pct", "pool_size", "first_conv", "classifier")
        given = timm.get_pretrained_cfg(name)
        if given is None:
            raise ValueError(f"name={name!r}: timm has no such model; timm.list_models() names all")
        known = {key: value for key, value in given.to_dict().items() if key in keys}
        config = {"architecture": name}
    known |= {"num_classes": num_classes, **(cfg or {})}
    return {**config, "num_classes": num_classes, "pretrained_cfg": known}


def load_for_timm(folder: Path) -> tuple[nn.Module, str]:
    """Load the classifier in a folder that `load_classifier` takes, and tell its name in the registry.

    timm's "local-dir:" loads it too, but in older releases reads no safetensors, and does whatever `model_args` say.

    Raises:
        ValueError: the config describes another model than these functions write, or a tensor does not fit.
    """
    file, weights = folder / hub.CONFIG, folder / hub.WEIGHTS
    config = read_json(file, hub.MAX_CONFIG_BYTES)
    num_classes, architecture, given = config.get("num_classes"), config.get("architecture"), config.get("model_args")
    given = given or {}
    if type(num_classes) is not int or not 0 <= num_classes <= 100_000 or not isinstance(given, dict):
        raise ValueError(f"{file} describes no classifier of timm: it has num_classes={num_classes!r:.50}; train again")
    args, rest = common_args(given, num_classes)
    for name, own in vovnet.model_cfgs.items():
        if architecture == timm_name(name) and rest == json.loads(json.dumps(own)):
            return load_built(timm_name(name), weights, num_classes=num_classes, **args, **own), name
    if not rest and isinstance(architecture, str) and ":" not in architecture and timm.is_model(architecture):
        return load_built(architecture, weights, num_classes=num_classes, **args), architecture
    why = (
        f"its model_args have {', '.join(f'{key}={value!r:.50}' for key, value in rest.items())!s:.300}" if rest else ""
    )
    raise ValueError(
        f"{file} describes no classifier of timm's registry with the usual arguments "
        f"({why or f'its architecture is {architecture!r:.100}'}); convert the checkpoint, or train, again"
    )


def common_args(given: dict[str, Any], num_classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `model_args` into the arguments that timm's `save_for_hf` writes for every model, and the others.

    An argument that a backbone of RGB images cannot have is one of the others.
    """
    usual: dict[str, Callable[[Any], bool]] = {
        "num_classes": lambda x: x == num_classes,
        "in_chans": lambda x: x == 3,
        "global_pool": lambda x: isinstance(x, str),
        "img_size": lambda x: (
            isinstance(x, list) and len(x) == 2 and all(type(n) is int and 0 < n <= MAX_SIDE for n in x)
        ),
    }
    rest = {key: value for key, value in given.items() if key not in usual or not usual[key](value)}
    return {key: given[key] for key in ("global_pool", "img_size") if key in given and key not in rest}, rest


def load_built(name: str, weights: Path, **args: Any) -> nn.Module:
    """Build a model of timm, and load its weights strictly. A model that does not fit takes no memory."""
    try:
        skeleton = hub.build_empty(lambda: timm.create_model(name, **args))
    except Exception as error:  # timm's models refuse in many ways
        raise ValueError(f"{weights.parent / hub.CONFIG}: timm cannot build this {name} ({error})") from error
    hub.check_fit(skeleton, read_shapes(weights), str(weights))
    model = timm.create_model(name, **args).eval()
    hub.load_strict(model, read_safetensors(weights), str(weights))
    return model
