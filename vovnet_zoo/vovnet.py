"""This module registers the VoVNet backbones (arXiv 1904.09730) with timm, on timm's own `VovNet` class.

timm's `vovnet39a`/`vovnet57a` have the same tensors but no identity connections (`residual=False`), so the published
weights load there and give wrong outputs. The models here are the published models: the second and later one-shot
aggregation blocks of a stage add their input after the aggregation's ReLU.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vovnet import VovNet

from . import hub
from .convert import convert
from .weights import Weights, fetch, find

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


def _pytorchcv(file: str, sha1: str, top5: str) -> Weights:
    url = f"https://github.com/osmr/imgclsmob/releases/download/{file}"
    return Weights("url", url, sha1, license="mit", score=f"ImageNet top-5 error {top5} % (in the name of the file)")


def _authors(file: str, score: str = "") -> Weights:
    return Weights("gone", f"https://dl.dropbox.com/s/{file}?dl=1", score=score)


# `authors_in1k` are the authors' classifiers. `authors_det` are the ImageNet classifiers from which the authors'
# detectors were trained; whether these took RGB with mean and std or BGR in 0..255 is not documented.
WEIGHTS = {
    "vovnet27_slim.pytorchcv_in1k": _pytorchcv(
        "v0.0.551/vovnet27s-0997-b7a5bf67.pth.zip", "b7a5bf677bd3431bbed44b439fde7a01d699ace1", "9.97"
    ),
    "vovnet39.pytorchcv_in1k": _pytorchcv(
        "v0.0.493/vovnet39-0564-63bfa613.pth.zip", "63bfa613870b37bd4fb5b71412e7875392aa4f66", "5.64"
    ),
    "vovnet39.authors_in1k": _authors(
        "1lnzsgnixd8gjra/vovnet39_torchvision.pth", "ImageNet top-1 error 23.23 % (the authors, 90 epochs)"
    ),
    "vovnet39.authors_det": _authors("s7f4vyfybyc9qpr/vovnet39_statedict_norm.pth"),
    "vovnet57.pytorchcv_in1k": _pytorchcv(
        "v0.0.505/vovnet57-0518-c080e471.pth.zip", "c080e47169a176043f298b1e909ddd8776d5aa76", "5.18"
    ),
    "vovnet57.authors_in1k": _authors(
        "6bfu9gstbwfw31m/vovnet57_torchvision.pth", "ImageNet top-1 error 22.27 % (the authors, 90 epochs)"
    ),
    "vovnet57.authors_det": _authors("b826phjle6kbamu/vovnet57_statedict_norm.pth"),
    "vovnet75.in1k": Weights("unpublished"),
    "vovnet75.authors_det": _authors("ve1h1ol2ge7yfta/vovnet75_statedict_norm.pth.tar"),
    "vovnet93.in1k": Weights("unpublished"),
    "vovnet93.authors_det": _authors("qtly316zv1isn0t/vovnet93_statedict_norm.pth.tar"),
}
HOW_TO_MAKE = "convert a checkpoint that you have (vovnet-zoo convert FILE.pth FOLDER)"


def timm_cfg(weights: Weights) -> dict:
    """Translate a row of the table into timm's terms."""
    return dict(
        url=weights.url if weights.state == "url" else "",  # timm lists tags with a url as pretrained, and prefers them
        license=weights.license,
        notes=(weights.score,),
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
        VovNet,
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
    stages: Any = model.stages
    converted = convert(state_dict, {"of this depth": [len(stage.blocks) for stage in stages]})
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
        return {**overlay, "file": str(fetch(WEIGHTS[key].url, WEIGHTS[key].sha1, cache_dir))}
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
    """VoVNet-93: blocks per stage 1, 3, 8, 3."""
    return _create("vovnet93", pretrained, **kwargs)
