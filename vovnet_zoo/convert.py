"""These pure maps turn published checkpoints into our state dicts: names and tensors, no files."""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMS = {
    "authors": "the authors' classifier",
    "authors_detector": "the authors' FCOS detector",
    "torchvision_detector": "torchvision's FCOS detector",
    "pytorchcv": "pytorchcv's classifier",
    "timm": "timm's VovNet",
    "authors_v2": "the authors' VoVNetV2 body",
}
PARTS = ("all", "backbone")
LEVELS = 5  # P3..P7
# The authors' detectors take BGR pixels in 0..255 less this mean (BGR order), divided by 1.
BGR_MEAN = (102.9801, 115.9465, 122.7717)
# COCO numbers its 80 classes so. torchvision's detector of COCO has a class slot for each number from 0 to 90; slot 0
# is the background, and the slots of other numbers that are missing here stand for nothing.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
DEPTH = 8  # of checkpoints in checkpoints, and of prefixes
MAX_CHANNELS = 16_384  # of a norm; the published ones have at most 1024
FROZEN_EPS = 1e-5  # added to the variance by timm's frozen norm, not by the authors'
FIRST = "stem.stem_1/conv.weight"  # the authors' name of the first convolution
BODY = r"(stem|stage[2-5])\."  # the authors' names of a body's tensors begin with this, after the prefix
LAST = "stages.3.blocks.0.conv_concat.conv.weight"


class Layout(NamedTuple):
    """The tensors of a VovNet follow from these numbers."""

    blocks: Sequence[int]  # of each stage
    layers: int = 5  # convolutions of a block before the aggregation
    depthwise: bool = False  # each 3x3 convolution but the first is a depthwise and a 1x1 convolution
    reduced: Sequence[bool] = (False, False, False, False)  # a stage's first block reduces its input's channels
    ese: bool = False  # each block has an effective squeeze-excitation, as in V2
    width: int | None = None  # channels of the last stage; tells apart two bodies whose tensors have the same names


class Converted(NamedTuple):
    """A published checkpoint becomes these tensors and settings."""

    form: str  # a key of FORMS
    arch: str  # the backbone's name
    state_dict: dict[str, Tensor]  # of timm's VovNet, or of FCOS for a detector
    config: dict  # arguments of FCOS that the tensors tell; {} for a classifier
    left_out: Sequence[str] = ()  # names of tensors beside a backbone


def convert(checkpoint: Mapping, archs: Mapping[str, Layout], part: str = "all") -> Converted:
    """Rename every tensor of a checkpoint, and change the detectors' tensors so that outputs stay the same.

    The authors' detectors get RGB input and norms with eps. torchvision's detector loses the classes of no object: slot
    0, which is the background, and with 91 slots, as for COCO, the slots of unused ids.

    Args:
        checkpoint: a state dict, or a training checkpoint with one under "model" or "state_dict"; names may all begin
            with "module." or "model.", and all names of a VoVNetV2 body with any other prefix.
        archs: the layout of each backbone that may be meant.
        part: "all" converts every tensor; "backbone" takes a VoVNetV2 body and leaves out the tensors beside it, such
            as a detector's other parts.

    Raises:
        ValueError: a tensor is missing, unexpected, not float32 or not finite (each is named), or the names are those
            of no known format, or `part` is "backbone" and the backbone is no VoVNetV2 body. Shapes are left to the
            model that loads the result.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}: one of {', '.join(PARTS)}")
    weights = unwrap(checkpoint)
    if not isinstance(archs, Mapping) or not archs or not all(isinstance(x, Layout) for x in archs.values()):
        raise ValueError(f"archs must map names of backbones to their Layout, got {reprlib.repr(archs)}")
    body, beside = split_body(weights)
    if part == "backbone" and not body:
        raise ValueError("part='backbone' takes the VoVNetV2 body out of a checkpoint, and this one holds not one body")
    if body and beside and part == "all":
        shown = ", ".join(_short(name) for name in beside[:20])
        raise ValueError(
            f"unexpected: {len(beside)} tensors beside a VoVNetV2 body ({shown}); to leave them out: --part backbone"
        )
    weights = body or weights
    choices = [(f, a) for f, a in itertools.product(FORMS, archs) if f == "timm" or archs[a].ese == (f == "authors_v2")]
    tables = {(form, arch): names(form, archs[arch]) for form, arch in choices if form != "torchvision_detector"}
    tables["torchvision_detector", "resnet50"] = dict(_torchvision_names())

    def distance(choice: tuple[str, str]) -> tuple[int, bool]:
        """Count the names that differ; of bodies with the same names the one of the same width is nearer."""
        last = [weights[name] for name, ours in tables[choice].items() if ours == LAST and name in weights]
        widths = [len(x) for x in last if _is_plain(x) and x.ndim]
        return len(weights.keys() ^ tables[choice].keys()), widths != [
            archs[choice[1]].width if choice[1] in archs else 0
        ]

    form, arch = min(tables, key=distance)
    table = tables[form, arch]
    if not weights.keys() & table.keys():
        first = [_short(name) for name in itertools.islice(weights, 3)]
        raise ValueError(f"no known format: expected {', '.join(FORMS.values())}; the names begin {first}")

    missing = table.keys() - weights.keys()
    for optional in ("head.fc.", "num_batches_tracked"):  # a checkpoint may lack all of these tensors, but not some
        group = {name for name, ours in table.items() if optional in ours}
        if group <= missing:
            missing -= group
    problems = [f"missing: {name} (ours: {table[name]})" for name in missing]
    problems += [f"unexpected: {name:.200}" for name in weights.keys() - table.keys()]
    problems += [f"not a plain tensor: {name:.200}" for name, tensor in weights.items() if not _is_plain(tensor)]
    for name, tensor in weights.items():
        wanted = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        if tensor.dtype != wanted:
            problems.append(f"dtype: {name:.200} is {tensor.dtype}, expected {wanted}")
    problems = problems or [f"not finite: {name}" for name, tensor in weights.items() if not tensor.isfinite().all()]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"not a whole checkpoint of {FORMS[form]}, {arch}:\n  {shown}{more}")

    ours = {table[name]: tensor for name, tensor in weights.items()}
    if form not in FOLDS:
        for name in [name for name in ours if name.endswith("running_var")]:
            ours.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
        return Converted(form, arch, ours, {}, beside if body else [])

    try:
        config = FOLDS[form](ours)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"not the shapes of {FORMS[form]}: {error}") from error
    return Converted(form, arch, ours, {"backbone": arch, **config})


def _fold_detector(ours: dict[str, Tensor]) -> dict:
    """Change a detector's tensors in place to RGB input, one tensor of scales and norms with eps; return the config."""
    ours["head.scales"] = torch.cat([ours.pop(f"head.scales.{level}") for level in range(LEVELS)])
    ours["backbone.stem_0.conv.weight"] = ours["backbone.stem_0.conv.weight"].flip(1)  # BGR -> RGB
    for name in [name for name in ours if name.endswith("running_var")]:
        scale = name.replace("running_var", "weight")
        ours[scale], ours[name] = fold_eps(ours[scale], ours[name], name)
    return dict(
        num_classes=len(ours["head.cls_logits.bias"]),
        image_mean=[mean / 255 for mean in reversed(BGR_MEAN)],
        image_std=[1 / 255] * 3,
    )


def split_body(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Split a checkpoint into a VoVNetV2 body, without the common prefix of its names, and the names beside it.

    The body is empty if there is none, or more than one.
    """
    prefixes = [name.removesuffix(FIRST) for name in weights if name.endswith(FIRST)]
    if len(prefixes) != 1 or f"{prefixes[0]}stage2.OSA2_1.ese.fc.weight" not in weights:
        return {}, list(weights)
    inside = {name: name.removeprefix(prefixes[0]) for name in weights if name.startswith(prefixes[0])}
    inside = {name: short for name, short in inside.items() if re.match(BODY, short)}
    return {short: weights[name] for name, short in inside.items()}, [name for name in weights if name not in inside]


def _fold_torchvision(ours: dict[str, Tensor]) -> dict:
    """Change the tensors of torchvision's detector in place to foreground classes only; return the config."""
    for name in [name for name in ours if name.endswith("num_batches_tracked")]:
        del ours[name]  # a frozen norm has none
    slots = len(ours["head.cls_logits.bias"])
    kept = COCO_IDS if slots == COCO_IDS[-1] + 1 else list(range(1, slots))
    for part in ("weight", "bias"):
        ours[f"head.cls_logits.{part}"] = ours[f"head.cls_logits.{part}"][kept]
    ours["head.scales"] = torch.ones(LEVELS)
    return dict(
        num_classes=len(kept),
        category_ids=list(kept),
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


FOLDS = {"authors_detector": _fold_detector, "torchvision_detector": _fold_torchvision}


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """Take the state dict out of a training checkpoint, and "module." or "model." off its names if all begin with it.

    Raises:
        ValueError: the checkpoint holds no state dict, or holds tensors elsewhere that are not the optimizer's or the
            scheduler's.
    """
    beside = ("optimizer", "scheduler", "lr_scheduler")
    for _ in range(DEPTH):
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"a checkpoint is a dict of tensors, not a {type(checkpoint).__name__}")
        key = next((key for key in ("model", "state_dict") if isinstance(checkpoint.get(key), Mapping)), None)
        if key is None:
            break
        others = [other for other in checkpoint if other != key and other not in beside]
        if extra := [_short(other) for other in others if _holds_tensors(checkpoint[other])]:
            raise ValueError(f"tensors beside {key!r} that nothing uses: {', '.join(extra[:20])}")
        checkpoint = checkpoint[key]
    else:
        raise ValueError(f"more than {DEPTH} checkpoints, one in the other")
    if wrong := [reprlib.repr(key) for key in checkpoint if not isinstance(key, str)]:
        raise ValueError(f"a state dict has names as keys, not {', '.join(wrong[:20])}")
    if wrong := [_short(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"a state dict holds tensors only, but these are none: {', '.join(wrong[:20])}")
    weights = dict(checkpoint)
    for _ in range(DEPTH):
        for prefix in ("module.", "model."):
            if weights and all(name.startswith(prefix) for name in weights):
                weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _short(key: object) -> str:
    return key[:200] if isinstance(key, str) else reprlib.repr(key)


def _holds_tensors(value: object) -> bool:
    """Look for a tensor in nested dicts and lists, which may be nested in themselves."""
    todo: list[Any] = [value]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, Mapping) else value
    return False


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether each number of a tensor is a number of the file, so that the file's size bounds the memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def names(form: str, layout: Layout) -> dict[str, str]:
    """Map the published name of every tensor to our name.

    Args:
        form: a key of `FORMS`.
        layout: of the backbone; torchvision's detector has always the same.
    """
    if form == "torchvision_detector":
        return dict(_torchvision_names())
    table: dict[str, str] = {}
    for layer in _layers(layout):
        authors, pytorchcv, ours = layer.authors, layer.pytorchcv, layer.ours
        convs = {f"{authors}/conv": f"{ours}.conv"}
        norm = f"{authors}/norm"
        if layer.depthwise:
            convs = {f"{authors}/dw_conv3x3": f"{ours}.conv_dw", f"{authors}/pw_conv1x1": f"{ours}.conv_pw"}
            norm = f"{authors}/pw_norm"
        if form == "pytorchcv":
            convs, norm = {f"{pytorchcv}.conv": f"{ours}.conv"}, f"{pytorchcv}.bn"
        elif form == "timm":
            convs, norm = {name: name for name in convs.values()}, f"{ours}.bn"
        table |= {f"{theirs}.weight": f"{name}.weight" for theirs, name in convs.items()}
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if form != "authors_detector" or part != "num_batches_tracked":
                table[f"{norm}.{part}"] = f"{ours}.bn.{part}"
    if layout.ese:
        for authors, ours in _blocks(layout):
            for part in ("weight", "bias"):
                table[f"{ours}.attn.fc.{part}" if form == "timm" else f"{authors}.ese.fc.{part}"] = (
                    f"{ours}.attn.fc.{part}"
                )
    if form == "authors_v2":
        return table
    if form == "authors_detector":
        table = {f"backbone.body.{theirs}": f"backbone.{feature_name(ours)}" for theirs, ours in table.items()}
        return table | dict(_detector_names())
    classifier = {"authors": "classifier", "pytorchcv": "output", "timm": "head.fc"}[form]
    return table | {f"{classifier}.{part}": f"head.fc.{part}" for part in ("weight", "bias")}


def feature_name(name: str) -> str:
    """Map timm's name of a classifier's tensor to its name in `create_model(..., features_only=True)`."""
    return re.sub(r"^(stem|stages)\.(\d)", r"\1_\2", name)


class _Layer(NamedTuple):
    """A convolution with its norm has these names."""

    authors: str
    pytorchcv: str
    ours: str
    depthwise: bool  # it is a depthwise and a 1x1 convolution, then the norm


def _layers(layout: Layout) -> Iterator[_Layer]:
    """Yield each convolution with its norm, from the stem on; pytorchcv's names are of V1 only."""
    for i in range(3):
        pytorchcv = f"features.init_block.conv{i + 1}"
        yield _Layer(f"stem.stem_{i + 1}", pytorchcv, f"stem.{i}", layout.depthwise and i > 0)
    for authors, ours in _blocks(layout):
        osa = authors.split(".")[1]
        stage, block = (int(number) for number in re.findall(r"\d+", osa))
        pytorchcv = f"features.stage{stage - 1}.unit{block}"
        if block == 1 and layout.reduced[stage - 2]:
            yield _Layer(f"{authors}.conv_reduction.{osa}_reduction_0", "", f"{ours}.conv_reduction", False)
        for i in range(layout.layers):
            yield _Layer(
                f"{authors}.layers.{i}.{osa}_{i}",
                f"{pytorchcv}.branches.branch{i + 1}",
                f"{ours}.conv_mid.{i}",
                layout.depthwise,
            )
        yield _Layer(f"{authors}.concat.{osa}_concat", f"{pytorchcv}.concat_conv", f"{ours}.conv_concat", False)


def _blocks(layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the authors' and timm's name of each one-shot aggregation block."""
    for stage, count in enumerate(layout.blocks):
        for block in range(count):
            yield f"stage{stage + 2}.OSA{stage + 2}_{block + 1}", f"stages.{stage}.blocks.{block}"


def _detector_names() -> Iterator[tuple[str, str]]:
    """Yield the published name and our name of each tensor of the detectors' FPN and head, and of each single scale."""
    modules = {}
    for i in range(3):
        modules[f"backbone.fpn.fpn_inner{i + 2}"] = f"fpn.inner_blocks.{i}.0"
        modules[f"backbone.fpn.fpn_layer{i + 2}"] = f"fpn.layer_blocks.{i}.0"
    for p in ("p6", "p7"):
        modules[f"backbone.fpn.top_blocks.{p}"] = f"fpn.extra_blocks.{p}"
    for i in range(4):
        for layer in (3 * i, 3 * i + 1):  # convolution, GroupNorm
            modules[f"rpn.head.cls_tower.{layer}"] = f"head.cls_tower.{layer}"
            modules[f"rpn.head.bbox_tower.{layer}"] = f"head.box_tower.{layer}"
    modules["rpn.head.cls_logits"] = "head.cls_logits"
    modules["rpn.head.bbox_pred"] = "head.box_distances"
    modules["rpn.head.centerness"] = "head.centerness"
    for theirs, ours in modules.items():
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", f"{ours}.{part}"
    for level in range(LEVELS):
        yield f"rpn.head.scales.{level}.scale", f"head.scales.{level}"


def _torchvision_names() -> Iterator[tuple[str, str]]:
    """Yield torchvision's name and our name of each tensor of its FCOS on ResNet-50; ours alone has scales."""
    norms = {"bn1": "conv1"}
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            norms |= {f"{at}.bn{i}": f"{at}.conv{i}" for i in (1, 2, 3)}
        norms[f"layer{layer}.0.downsample.1"] = f"layer{layer}.0.downsample.0"
    for norm, conv in norms.items():
        yield f"backbone.body.{conv}.weight", f"backbone.{conv}.weight"
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"backbone.body.{norm}.{part}", f"backbone.{norm}.{part}"
    modules = {
        f"backbone.fpn.{kind}_blocks.{i}.0": f"fpn.{kind}_blocks.{i}.0" for kind in ("inner", "layer") for i in range(3)
    }
    for p in ("p6", "p7"):
        modules[f"backbone.fpn.extra_blocks.{p}"] = f"fpn.extra_blocks.{p}"
    for i in range(4):
        for layer in (3 * i, 3 * i + 1):  # convolution, GroupNorm
            modules[f"head.classification_head.conv.{layer}"] = f"head.cls_tower.{layer}"
            modules[f"head.regression_head.conv.{layer}"] = f"head.box_tower.{layer}"
    modules["head.classification_head.cls_logits"] = "head.cls_logits"
    modules["head.regression_head.bbox_reg"] = "head.box_distances"
    modules["head.regression_head.bbox_ctrness"] = "head.centerness"
    for theirs, ours in modules.items():
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", f"{ours}.{part}"


def fold_eps(weight: Tensor, var: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Change a norm's weight and variance [C] so that a norm with eps computes the same scale as one without.

    The scale is `weight / sqrt(var)`. Subtracting eps from the variance, and rounding, would change the scale by about
    1e-7. Any variance will do if the weight fits, so each channel takes, among the 1001 float32 numbers nearest to
    `var - eps`, the one whose weight changes least when rounded to float32. The scale is then right to about 1e-10,
    and training in float64 follows the published numbers.
    """
    if var.ndim != 1 or var.shape != weight.shape or len(var) > MAX_CHANNELS:
        raise ValueError(f"{name}: shape {list(var.shape)}, and {list(weight.shape)} of the weight, are no norm's")
    if (var <= 0).any():
        raise ValueError(f"{name}: a norm without eps needs variances above 0, the least is {var.min().item()}")
    near = (var.double() - FROZEN_EPS).clamp(min=FROZEN_EPS).float()
    neighbours = (near.view(torch.int32)[:, None] + torch.arange(-500, 501, dtype=torch.int32)).view(torch.float32)
    exact = weight.double()[:, None] * ((neighbours.double() + FROZEN_EPS) / var.double()[:, None]).sqrt()  # [C,1001]
    best = (exact.float() - exact).abs().argmin(1, keepdim=True)
    return exact.gather(1, best)[:, 0].float(), neighbours.gather(1, best)[:, 0]
