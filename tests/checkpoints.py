"""The tests make checkpoints of every published form here, filled with drawn numbers, and compare models."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from packaging.version import Version
from torch import Tensor, nn
from torchvision_models import make_torchvision

from vovnet_zoo import convert, hub
from vovnet_zoo.detectors import archs

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from deterministic_weights import W, load_table, state_dict_from_table  # noqa: E402

ARCHS = archs()


OTHER = {"authors_v2": "vovnetv2_19_slim_dw", "torchvision_detector": "resnet50"}
SMALLEST = {form: OTHER.get(form, "vovnet27_slim") for form in convert.FORMS}


def published(form: str, arch: str | None = None) -> dict[str, Tensor]:
    """Make a state dict of a form, which is a key of `convert.FORMS`; by default of the smallest architecture."""
    arch = arch or SMALLEST[form]
    if form == "authors_detector":
        return dict(state_dict_from_table(load_table(GOLDEN / "keys_fcos_v27.json")))
    if form == "torchvision_detector":
        return make_torchvision().state_dict()
    net = timm.create_model(arch)
    ours = {key: W(key, x.shape, str(x.dtype)) for key, x in net.state_dict().items()}
    return {theirs: ours[name] for theirs, name in convert.names(form, ARCHS[arch]).items()}


def open_with_timm(folder: Path, **options: Any) -> nn.Module:
    """Build a saved classifier as timm does. Before 1.0.26 `local-dir:` reads no safetensors; `pretrained_cfg` does."""
    if Version(version("timm")) >= Version("1.0.26"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    config = json.loads((folder / hub.CONFIG).read_text())
    cfg = {**config["pretrained_cfg"], "file": str(folder / hub.WEIGHTS)}
    args = {"num_classes": config["num_classes"], **config.get("model_args", {}), **options}
    return timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=cfg, **args)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two models have equal tensors under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
