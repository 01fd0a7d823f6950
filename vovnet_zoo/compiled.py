"""A detector as one compiled graph: uint8 images in, detections of fixed shape out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .data import normalize
from .fcos import FCOS, level_sizes
from .inference import decode, postprocess, sizes_of
from .nms import nms_fixed
from .osa import fuse_for_inference
from .winograd import FrozenWinogradConv2d, WinogradConv2d, has_amx, is_eligible, use_winograd


class Detections(NamedTuple):
    """What was found in B images, best first, in D places each; those from `count` on are empty."""

    boxes: Tensor  # float32 [B,D,4] xyxy in pixels of the network input; 0 where empty
    scores: Tensor  # float32 [B,D]; 0 where empty
    labels: Tensor  # int64 [B,D] 0..K-1; -1 where empty
    count: Tensor  # int64 [B]


def compile_detector(
    model: FCOS,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    mode: str = "default",
    backend: str = "inductor",
    **options,
) -> Callable[..., Detections]:
    """A fast copy of `model` for images of one size: normalising, network, decoding and NMS as a single graph.

    Batch norms are folded into convolutions and weights are made constants of the graph, so later changes of `model`
    are not seen. It is compiled in the first call, and again for each other number of images. On a CPU, 3x3
    convolutions become Winograd ones (`winograd.py`), and VoVNet's blocks concatenate nothing (`osa.py`); a CPU
    without AMX only stores maps in bfloat16, and multiplies in float32.

    Args:
        model: a detector, on the device it shall run on.
        size: (H, W) of the images, multiples of 32.
        dtype: of the network's convolutions: float32, or bfloat16 or float16 by autocast.
        mode: of torch.compile; "reduce-overhead" replays CUDA graphs, "max-autotune" also tries out kernels. With
            either, results are overwritten by the next call: copy what is to be kept.
        backend: of torch.compile; "eager" checks that there is one graph, and compiles nothing.
        options: `score_threshold`, `nms_threshold`, `topk`, `max_detections`, `plus_one` of `postprocess`.

    Returns:
        A function of images, uint8 [B,3,H,W] (RGB), and optionally of their sizes, int [B,2] or B pairs, (h, w) without
        the padding at bottom and right; it returns the `Detections` that `postprocess(model(images), sizes)` finds.

    Raises:
        ValueError: `size` is not of multiples of 32, or `dtype` is not one of the three; from the function: images of
            another size, dtype or device.
    """
    height, width = size
    if height % 32 or width % 32 or min(height, width) < 32:
        raise ValueError(f"size={tuple(size)}: (height, width) must be multiples of 32; pad the images to one")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: torch.float32, torch.bfloat16 or torch.float16")
    if unknown := options.keys() - postprocess.__kwdefaults__.keys():
        raise TypeError(f"compile_detector has no option {sorted(unknown)}")
    options = postprocess.__kwdefaults__ | options
    device = next(model.parameters()).device
    fast = fold_batch_norms(copy.deepcopy(model).eval().requires_grad_(False))
    fast = fast.to(memory_format=torch.channels_last)
    if device.type == "cpu" and (dtype == torch.float32 or dtype == torch.bfloat16 and not has_amx()):
        freeze_winograd(fast)

    def graph(images: Tensor, sizes: Tensor) -> Detections:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return detect(fast, images, sizes, **options)

    how = {"mode": mode} if backend == "inductor" else {"backend": backend}
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, **how)

    def run(images: Tensor, sizes: Tensor | None = None) -> Detections:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(
                f"images must be uint8 [B,3,{height},{width}], got {images.dtype} {list(images.shape)}; "
                "this graph was compiled for that size"
            )
        if images.device != device:
            raise ValueError(f"images are on {images.device}, the detector is on {device}; move them there")
        if sizes is None:
            sizes = torch.tensor([[height, width]], device=device).expand(len(images), 2).contiguous()
        sizes = sizes_of(len(images), sizes, device)
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # weights become constants
            return compiled(images, sizes)

    return run


def detect(
    model: FCOS,
    images: Tensor,
    sizes: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    topk: int,
    max_detections: int,
    plus_one: bool,
) -> Detections:
    """`postprocess` of `model`'s predictions for uint8 images [B,3,H,W] of `sizes` [B,2], without a shape that depends
    on a value. 32 divides H and W."""
    inputs = normalize(images, sizes, model.config["image_mean"], model.config["image_std"])
    preds = model(inputs.contiguous(memory_format=torch.channels_last))
    locations = [math.prod(size) for size in level_sizes(*images.shape[-2:], model.strides)]
    boxes, scores, labels = decode(preds, sizes, score_threshold, topk, plus_one, locations)
    keep = nms_fixed(boxes, scores, labels, nms_threshold, max_detections, plus_one)  # [B,D]
    found = keep >= 0
    keep = keep.clamp(min=0)
    return Detections(
        boxes=torch.where(found[..., None], boxes.gather(1, keep[..., None].expand(-1, -1, 4)), 0.0),
        scores=torch.where(found, scores.gather(1, keep), 0.0),
        labels=torch.where(found, labels.gather(1, keep), -1),
        count=found.sum(1),
    )


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Merge each batch norm of timm's convolution blocks into the convolution before it, in place, for inference.

    inductor's freezing folds the others.
    """
    for block in model.modules():
        if isinstance(block, ConvNormAct) and hasattr(block.bn, "running_var"):
            conv, bn = block.conv, block.bn
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            block.bn = nn.Sequential(bn.drop, bn.act)
            block.__class__ = ConvNormAct  # of a model in training it is another (osa.py)
    return model


def freeze_winograd(model: nn.Module) -> None:
    """`use_winograd`, in place, with weights transformed now, and in folded blocks with the ReLU after it; then
    `fuse_for_inference`."""
    for block in model.modules():
        if isinstance(block, ConvNormAct) and is_eligible(block.conv) and isinstance(block.bn, nn.Sequential):
            relu = isinstance(block.bn[-1], nn.ReLU)
            block.conv = FrozenWinogradConv2d(block.conv, relu)
            block.bn = nn.Identity() if relu else block.bn
    use_winograd(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WinogradConv2d):
                setattr(parent, name, FrozenWinogradConv2d(child))
    fuse_for_inference(model)
