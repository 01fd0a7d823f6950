"""Any timm model can be a backbone that gives feature maps at strides 8, 16 and 32."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers.format import Format
from timm.models import group_parameters
from torch import Tensor, nn

from . import hub

STRIDES = (8, 16, 32)
Backbone = Any  # a module that timm builds with features_only=True; timm does not declare the attributes of all kinds


def create_backbone(name: str, pretrained: bool = False, weights: Mapping[str, Tensor] | None = None) -> Backbone:
    """Build the feature extractor of a timm model.

    Args:
        name: of timm's registry.
        pretrained: load the weights that timm knows under this name.
        weights: load these tensors of the whole classifier instead.

    Raises:
        ValueError: timm has no such model or cannot extract its feature maps, or some of `STRIDES` are missing.
        OSError: the weights cannot be had.
    """
    if ":" in name:  # in timm's terms a folder or a repository, which a detector's config must not depend on
        raise ValueError(
            f"backbone {name!r} is no name of timm's registry; create_detector('fcos', backbone=) also takes "
            "'local-dir:FOLDER' and 'hf-hub:organisation/name', and starts a detector from the weights there"
        )
    if "/" in name:
        raise ValueError(
            f"timm has no model {name!r}, which shall be the backbone; create_detector('fcos', "
            f"backbone='hf-hub:{name}') takes a repository of the Hub, and 'local-dir:{name}' a folder"
        )
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"timm has no model {name!r}, which shall be the backbone{hint}")
    options: dict[str, Any] = {}
    if weights is not None:
        pretrained, options = True, {"pretrained_cfg_overlay": {"state_dict": dict(weights), "num_classes": -1}}
    elif pretrained and (file := _hub_file(name)):
        options = {"pretrained_cfg_overlay": {"file": file}}
    body = _features(name, pretrained, **options)
    reductions = body.feature_info.reduction()
    if missing := [stride for stride in STRIDES if stride not in reductions]:
        raise ValueError(
            f"backbone {name!r} gives maps at strides {reductions}, none at {missing}; FCOS needs 8, 16, 32"
        )
    # timm's window transformers fix the input size unless told otherwise
    if any(getattr(module, "strict_img_size", False) for module in body.modules()):
        try:
            body = timm.create_model(name, pretrained, features_only=True, strict_img_size=False, **options)
        except TypeError as error:  # as for CoaT and Visformer
            raise ValueError(f"backbone {name!r} takes images of one size only; FCOS needs any size") from error
    return body


def _hub_file(name: str) -> str | None:
    """Download the weights that timm has on the Hub, and return the file's path; None if timm keeps them elsewhere.

    timm itself tries for 50 seconds where the Hub cannot be reached, also if the file is in the cache.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename or cfg.custom_load or cfg.source:
        return None
    file = hub.download_weights(cfg.hf_hub_id)
    return None if file is None else str(file)


def _features(name: str, pretrained: bool, **options: Any) -> Backbone:
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except Exception as error:  # timm's models refuse in many ways
        if pretrained or isinstance(error, MemoryError):
            raise
        raise ValueError(f"timm cannot extract feature maps from {name!r} ({error}); FCOS needs them") from error


def backbone_maps(body: Backbone, images: Tensor) -> list[Tensor]:
    """Run a feature extractor on images [B,3,H,W], and return its deepest map [B,C,h,w] at each of `STRIDES`.

    Images 32 pixels wide are computed in float32 on a CPU, also under autocast, since there oneDNN does not write the
    whole result of a bfloat16 convolution with stride 2 that makes a map 1 wide of one 2 wide (see `ExtraLevels`).
    """
    reductions = body.feature_info.reduction()
    if images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and images.shape[-1] < 64:
        with torch.autocast("cpu", enabled=False):
            maps = body(images.to(next(body.parameters()).dtype))
    else:
        maps = body(images)
    maps = [maps[len(reductions) - 1 - reductions[::-1].index(stride)] for stride in STRIDES]
    if getattr(body, "output_fmt", Format.NCHW) == Format.NHWC:
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    return maps


WIDE = 32, 800  # pixels, high and wide; timm's models with tables were made for images of 224 to 384 pixels


def has_tables(body: Backbone) -> bool:
    """Say whether a module other than a convolution or a linear layer has a matrix, as one of positions has."""
    return any(
        sum(size > 1 for size in parameter.shape) > 1
        for module in body.modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        for parameter in module.parameters(recurse=False)
    )


def probe_channels(body: Backbone, name: str) -> list[int]:
    """Count the channels of the three maps by running a small image, and leave the backbone in training mode.

    timm's feature_info tells the channels too, but not that a model takes images of one fixed size only. MViTv2 takes
    small images, but its tables of relative positions end where the images that it was made for do; so models that
    have tables run a wide image too.

    Raises:
        ValueError: the backbone does not take such an image, or its maps are not at the strides it claims.
    """
    height, width = 96, 160
    try:
        with torch.no_grad():
            maps = backbone_maps(body.eval(), torch.zeros(1, 3, height, width))
            if has_tables(body):
                backbone_maps(body, torch.zeros(1, 3, *WIDE))
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"backbone {name!r} does not take images of any size, as FCOS needs: {reason}") from error
    sizes = [tuple(x.shape[-2:]) for x in maps]
    if sizes != (wanted := [(height // s, width // s) for s in STRIDES]):
        raise ValueError(f"backbone {name!r} turns a {height}x{width} image into maps {sizes}; FCOS needs {wanted}")
    body.train()
    return [x.shape[1] for x in maps]


def depth_below_top(backbone: nn.Module) -> dict[str, int]:
    """Return how far each parameter of a timm feature extractor is below the head: 1 in the last part.

    A part has weights of a convolution or of a linear layer; a norm belongs to the part before it. Where timm wraps the
    whole model, as for Twins, the model's own stages are the parts.
    """
    model: Any = getattr(backbone, "model", None)
    if hasattr(model, "group_matcher"):
        layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        return {f"model.{name}": max(layers.values()) + 1 - layer for name, layer in layers.items()}
    depths: dict[str, int] = {}
    depth = 0
    for prefix, part in reversed(_parts_of(backbone)):
        parameters = dict(part.named_parameters(prefix))
        is_norm = all(p.ndim <= 1 for p in parameters.values())
        depths |= dict.fromkeys(parameters, depth + 1)
        depth += not is_norm
    return depths


def _parts_of(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the parts of a timm feature extractor by name, the first one first: its children.

    EfficientNets and their like have nearly all weights in one child; its children, the stages, take its place.
    """
    whole, parts = _number_of_weights(backbone), []
    for name, child in backbone.named_children():
        if isinstance(child, nn.Sequential) and _number_of_weights(child) > 0.9 * whole:
            parts += [(f"{name}.{place}", stage) for place, stage in child.named_children()]
        else:
            parts.append((name, child))
    return parts


def _number_of_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
