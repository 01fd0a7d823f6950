"""This module registers the VoVNet backbones with timm: V1 (arXiv 1904.09730) and V2 (arXiv 1911.06667).

V1 is timm's own `VovNet` class. timm's `vovnet39a`/`vovnet57a` have the same tensors but no identity connections
(`residual=False`), so the published weights load there and give wrong outputs. The models here are the published
models: the second and later one-shot aggregation blocks of a stage add their input after the aggregation's ReLU.

V2 adds a channel attention (eSE) to every block, before the identity is added. timm's `ese_vovnet*` have eSE in the
last block of a stage only, so they are other networks, with weights of their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import create_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vovnet import VovNet
from torch import nn

from . import hub
from .convert import Layout, convert
from .ledger import BACKBONE_WEIGHTS, Weights, find
from .ledger import HOW_TO_MAKE_BACKBONES as HOW_TO_MAKE
from .weights import fetch, fetch_row

__all__: list[str] = []  # register_model adds each entry point


def _arch(stage_conv_chs: list[int], stage_out_chs: list[int], block_per_stage: list[int]) -> dict:
    return dict(
        stem_chs=[64, 64, 128],
        stage_conv_chs=stage_conv_chs,
        stage_out_chs=stage_out_chs,
        block_per_stage=block_per_stage,
        layer_per_block=5,
        residual=True,
        depthwise=False,
        attn="",
    )


_SLIM = ([64, 80, 96, 112], [128, 256, 384, 512])
_FULL = ([128, 160, 192, 224], [256, 512, 768, 1024])

# Arguments of timm's VovNet (arXiv 1904.09730, table 1; 75 and 93 as in the published detectors).
model_cfgs = {
    "vovnet27_slim": _arch(*_SLIM, [1, 1, 1, 1]),
    "vovnet39": _arch(*_FULL, [1, 1, 2, 2]),
    "vovnet57": _arch(*_FULL, [1, 1, 4, 3]),
    "vovnet75": _arch(*_FULL, [1, 2, 6, 3]),
    "vovnet93": _arch(*_FULL, [1, 3, 8, 3]),
}


class VovNetV2(VovNet):
    """This is timm's VovNet with effective squeeze-excitation (arXiv 1911.06667, section 3.2) in every block."""

    def __init__(self, cfg: dict, **kwargs: Any):
        super().__init__(cfg, **kwargs)
        stages: Any = self.stages
        place = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
        for stage in stages:
            for block in stage.blocks:
                if block.attn is None:  # timm has put one into the last block
                    block.attn = create_attn("ese", block.conv_concat.out_channels, **place)
                    nn.init.kaiming_normal_(block.attn.fc.weight, mode="fan_out", nonlinearity="relu")


def _arch_v2(slim: bool, depthwise: bool, layer_per_block: int, block_per_stage: list[int]) -> dict:
    stage_conv_chs, stage_out_chs = ([64, 80, 96, 112], [112, 256, 384, 512]) if slim else _FULL
    return dict(
        _arch(stage_conv_chs, stage_out_chs, block_per_stage),
        stem_chs=[64, 64, 64 if depthwise else 128],
        layer_per_block=layer_per_block,
        depthwise=depthwise,
        attn="ese",
    )


# The bodies of the authors' detectors (arXiv 1911.06667).
v2_cfgs = {
    "vovnetv2_19_slim_dw": _arch_v2(True, True, 3, [1, 1, 1, 1]),
    "vovnetv2_19_dw": _arch_v2(False, True, 3, [1, 1, 1, 1]),
    "vovnetv2_19_slim": _arch_v2(True, False, 3, [1, 1, 1, 1]),
    "vovnetv2_19": _arch_v2(False, False, 3, [1, 1, 1, 1]),
    "vovnetv2_39": _arch_v2(False, False, 5, [1, 1, 2, 2]),
    "vovnetv2_57": _arch_v2(False, False, 5, [1, 1, 4, 3]),
    "vovnetv2_99": _arch_v2(False, False, 5, [1, 3, 9, 3]),
}
model_cfgs |= v2_cfgs


def layout(cfg: Mapping[str, Any]) -> Layout:
    """Tell `convert` which tensors a VovNet of these arguments has."""
    inputs = [*cfg["stem_chs"][-1:], *cfg["stage_out_chs"][:-1]]
    return Layout(
        blocks=cfg["block_per_stage"],
        layers=cfg["layer_per_block"],
        depthwise=cfg["depthwise"],
        reduced=[cfg["depthwise"] and a != b for a, b in zip(inputs, cfg["stage_conv_chs"], strict=True)],
        ese=cfg["attn"] == "ese",
        width=cfg["stage_out_chs"][-1],
    )


def layout_of(model: VovNet) -> Layout:
    """Tell `convert` which tensors this VovNet has."""
    stages: Any = model.stages
    blocks = [list(stage.blocks) for stage in stages]
    first = blocks[0][0]
    return Layout(
        blocks=[len(stage) for stage in blocks],
        layers=len(first.conv_mid),
        depthwise=first.depthwise,
        reduced=[stage[0].conv_reduction is not None for stage in blocks],
        ese=first.attn is not None,
        width=model.num_features,
    )


WEIGHTS = {key: row for key, row in BACKBONE_WEIGHTS.items() if key.split(".")[0] in model_cfgs}  # not timm's own


def timm_cfg(weights: Weights) -> dict:
    """Translate a row of the table into timm's terms."""
    return dict(
        url=weights.url if weights.state == "url" else "",  # timm lists tags with a url as pretrained, and prefers them
        license=weights.license,
        notes=(f"{weights.score} ({weights.publisher})",) if weights.score else (),
        mean=weights.mean,
        std=weights.std,
        input_size=(3, *weights.size),
        interpolation=weights.interpolation,
        crop_pct=0.875,
        num_classes=1000,
        pool_size=(7, 7),
        first_conv="stem.0.conv",
        classifier="head.fc",
        label_offset=0,
    )


default_cfgs = generate_default_cfgs({name: timm_cfg(weights) for name, weights in WEIGHTS.items()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VovNet:
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = _locate(variant, **kwargs)
    return build_model_with_cfg(
        VovNetV2 if variant in v2_cfgs else VovNet,
        variant,
        pretrained,
        model_cfg=model_cfgs[variant],
        feature_cfg=dict(flatten_sequential=True),
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def checkpoint_filter_fn(state_dict: dict, model: VovNet) -> dict:
    """Rename weights of any known form to timm's names; timm calls this function before it loads weights.

    timm itself would load strictly only where the number of classes stays the same.

    Raises:
        ValueError: the weights are not all the weights of a classifier with as many blocks as `model`.
    """
    converted = convert(state_dict, {"of this depth": layout_of(model)})
    if converted.config:
        raise ValueError("these are weights of a detector, not of a classifier: vovnet-zoo convert FILE FOLDER")
    return converted.state_dict


def _locate(
    variant: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict | None = None,
    cache_dir: str | Path | None = None,
    **_: Any,
) -> dict:
    """Download and check the weights that timm is about to load, and name the local file in timm's overlay.

    Weights that are already a file, a state dict, or on the Hub are left to timm.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if isinstance(pretrained_cfg, str) and f"{variant}.{pretrained_cfg}" not in WEIGHTS:
        find(f"{variant}.{pretrained_cfg}", WEIGHTS, HOW_TO_MAKE)  # raises the error that names the tags
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.source or cfg.file or cfg.state_dict or cfg.hf_hub_id:
        return overlay
    name = f"{variant}.{cfg.tag}"
    explicit = overlay.get("url") or (pretrained_cfg and not isinstance(pretrained_cfg, str))
    url = cfg.url if isinstance(cfg.url, str) else ""
    if url and (explicit or name not in WEIGHTS or url != WEIGHTS[name].url):  # a url that the caller gave
        known = {weights.url: weights.sha1 for weights in WEIGHTS.values()}
        return {**overlay, "file": str(fetch(url, known.get(url, ""), cache_dir))}
    key, repo_id = find(name, WEIGHTS, HOW_TO_MAKE)
    if repo_id is None:
        return {**overlay, "file": str(fetch_row(key, WEIGHTS, HOW_TO_MAKE, cache_dir))}
    return {**overlay, "file": str(hub.download(repo_id, hub.WEIGHTS, cache_dir=cache_dir))}


@register_model
def vovnet27_slim(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNet-27-slim: 3.5 M parameters, 2.2 GMACs at 224x224."""
    return _create("vovnet27_slim", pretrained, **kwargs)


@register_model
def vovnet39(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNet-39: 22.6 M parameters, 7.1 GMACs at 224x224."""
    return _create("vovnet39", pretrained, **kwargs)


@register_model
def vovnet57(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNet-57: 36.6 M parameters, 8.9 GMACs at 224x224."""
    return _create("vovnet57", pretrained, **kwargs)


@register_model
def vovnet75(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNet-75: 46.9 M parameters, 12.3 GMACs at 224x224."""
    return _create("vovnet75", pretrained, **kwargs)


@register_model
def vovnet93(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNet-93: 57.2 M parameters, 15.7 GMACs at 224x224."""
    return _create("vovnet93", pretrained, **kwargs)


@register_model
def vovnetv2_19_slim_dw(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-19-slim with depthwise convolutions: 1.9 M parameters."""
    return _create("vovnetv2_19_slim_dw", pretrained, **kwargs)


@register_model
def vovnetv2_19_dw(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-19 with depthwise convolutions: 6.5 M parameters."""
    return _create("vovnetv2_19_dw", pretrained, **kwargs)


@register_model
def vovnetv2_19_slim(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-19-slim: 3.2 M parameters."""
    return _create("vovnetv2_19_slim", pretrained, **kwargs)


@register_model
def vovnetv2_19(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-19: 11.2 M parameters."""
    return _create("vovnetv2_19", pretrained, **kwargs)


@register_model
def vovnetv2_39(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-39: 26.2 M parameters."""
    return _create("vovnetv2_39", pretrained, **kwargs)


@register_model
def vovnetv2_57(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-57: 42.5 M parameters."""
    return _create("vovnetv2_57", pretrained, **kwargs)


@register_model
def vovnetv2_99(pretrained: bool = False, **kwargs: Any) -> VovNet:
    """VoVNetV2-99: 70.6 M parameters; the body of many camera-based 3D detectors."""
    return _create("vovnetv2_99", pretrained, **kwargs)
