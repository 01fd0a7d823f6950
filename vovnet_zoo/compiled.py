"""A detector as one compiled graph: uint8 images in, detections of fixed shape out."""

from __future__ import annotations

import contextlib
import copy
import logging
import reprlib
import types
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from .arguments import check_choice, check_flag, check_model, check_number
from .commands import check_compiler, reporting_compiler
from .config import ThresholdOptions
from .fcos import FCOS
from .inference import choose_thresholds, detect, sizes_of
from .kernels.freeze import freeze
from .kernels.surgery import restore
from .kernels.tensor_cores import align_channels
from .kernels.winograd import has_amx, why_not
from .precision import warn_of_slow_precision
from .results import Detections as Detections

log = logging.getLogger("vovnet_zoo")


def compile_detector(
    model: FCOS,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    winograd: bool | None = None,
    mode: str = "default",
    backend: str = "inductor",
    **options: Unpack[ThresholdOptions],
) -> Callable[..., Detections]:
    """Compile normalising, network, decoding and NMS to a single graph, for images of one size.

    The graph is compiled in the first call, and again for each other number of images. It has its own copy of the
    weights, with batch norms folded into convolutions, so that later changes of `model` have no effect.

    Args:
        model: a detector, on the device it shall run on.
        size: (H, W) of the images, multiples of 32.
        dtype: of the network's convolutions: float32 (TF32 on an NVIDIA GPU, see `predict`), or bfloat16 or float16 by
            autocast. On a CPU, float16 is slower than float32, and a line of the log says so.
        winograd: on a CPU, compute 3x3 convolutions by Winograd, and VoVNet blocks in one memory. None does so where
            the kernels can be used and gain, else uses torch's convolutions and logs one line that says why. True
            demands the kernels, False declines them. Under bfloat16 they store bfloat16 maps, and multiply in float32.
        mode: of torch.compile; "reduce-overhead" replays CUDA graphs, "max-autotune" also tries out kernels. With
            either, results are overwritten by the next call: copy what is to be kept.
        backend: of torch.compile; "eager" checks that there is one graph, and compiles nothing.
        options: fields of `Thresholds`, as `predict` has them: `score_threshold` (one score, or a mapping of class
            names to scores; default: the config's `thresholds`), `candidate_threshold`, `nms_threshold`, `topk`,
            `max_detections`; for those not given, the config's.

    Returns:
        A function of images, uint8 [B,3,H,W] (RGB), and optionally of their sizes, int [B,2] or B pairs, (h, w) without
        the padding at bottom and right; it returns the `Detections` that `postprocess(model(images), sizes)` finds.

    Raises:
        ValueError: `size` is not of multiples of 32, `dtype` is not one of the three, `winograd=True` cannot be
            followed, the model is in a wrapper, has no class of a name in `score_threshold`, or its weights are not
            float32, or another argument is out of range; from the function: images of another size, dtype or device.
        RuntimeError: torch.compile finds no compiler; the message says which one, and how to install it.
    """
    check_model("model", model, FCOS)
    height, width = check_size(size)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: torch.float32, torch.bfloat16 or torch.float16")
    if wrong := {x.dtype for x in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"model has weights of {', '.join(map(str, wrong))}; give model.float(), and say by dtype={dtype} in what "
            "the convolutions are computed"
        )
    if winograd is not None:
        check_flag("winograd", winograd)
    if not callable(backend):
        check_choice("backend", backend, torch.compiler.list_backends(exclude_tags=()))
    how = compile_options(mode, backend)
    thresholds = choose_thresholds(model, options)
    device = next(model.parameters()).device
    winograd = decide_winograd(winograd, device, dtype)
    if backend == "inductor" and device.type == "cpu":  # on a GPU, graphs that were compiled before need no compiler
        check_compiler("cpu")
    warn_of_slow_precision(device, dtype, winograd)
    fast = fast_copy(model, winograd)
    if device.type == "cuda" and dtype != torch.float32:
        align_channels(fast)

    def graph(images: Tensor, sizes: Tensor) -> Detections:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return detect(fast, images, sizes, thresholds)

    graphs: dict[int, Callable[..., Detections]] = {}  # by the number of images
    whole: dict[int, Tensor] = {}  # the sizes of so many images without padding

    def run(images: Tensor, sizes: Tensor | None = None) -> Detections:
        check_images(images, height, width, device)
        count = len(images)
        if sizes is None and count not in whole:
            whole[count] = torch.tensor([height, width], device=device).repeat(count, 1)
        sizes = whole[count] if sizes is None else sizes_of(count, sizes, device)
        known = graphs.get(count)
        compiled = known or torch.compile(with_own_code(graph), fullgraph=True, dynamic=False, **how)
        constants = contextlib.nullcontext() if known else weights_as_constants(device)
        with torch.no_grad(), reporting_compiler(), constants:
            found = compiled(images, sizes)
        graphs[count] = compiled  # after its first call, which may be interrupted
        return found

    return run


def with_own_code(function: Callable) -> Callable:
    """Copy a function. torch compiles the same code only 8 times, and keeps the graphs of all copies apart."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of images; `ValueError` unless they are two multiples of 32."""
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"size={reprlib.repr(size)}: give (height, width)")
    for length in size:
        check_number("size", length, 32, 65_536, whole=True)
        if length % 32:
            raise ValueError(f"size={tuple(size)}: (height, width) must be multiples of 32; pad the images to one")
    return size[0], size[1]


def fast_copy(model: FCOS, winograd: bool) -> FCOS:
    """Copy a detector for inference: batch norms become part of convolutions, and weights lie channels last."""
    fast = copy.deepcopy(model)
    freeze(restore(fast).eval().requires_grad_(False), winograd)
    return fast.to(memory_format=torch.channels_last)


def compile_options(mode: str, backend: str) -> dict[str, Any]:
    """Choose the arguments of torch.compile."""
    if backend != "inductor":
        check_choice("mode", mode, ["default"])
        return {"backend": backend}
    check_choice("mode", mode, torch._inductor.list_mode_options())
    return {"options": {**torch._inductor.list_mode_options(mode), "freezing": True}}


def weights_as_constants(device: torch.device) -> contextlib.AbstractContextManager:
    """Within this context, "inductor" makes weights constants of a graph for a GPU, so that it folds batch norms, and
    rounds weights to bfloat16 once instead of in each call.

    The option of `compile_options` does not suffice, since it does not hold yet while the graph is traced. What this
    would change on a CPU was not measured.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch._inductor.config.patch(freezing=True)


def check_images(images: Tensor, height: int, width: int, device: torch.device) -> None:
    """Raise `ValueError` unless images are uint8 [B,3,height,width] on the device."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a uint8 tensor [B,3,{height},{width}], got {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(
            f"images must be uint8 [B,3,{height},{width}], got {images.dtype} {list(images.shape)}; "
            "this graph was compiled for that size"
        )
    if images.device != device:
        raise ValueError(f"images are on {images.device}, the detector is on {device}; move them there")


def decide_winograd(wanted: bool | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `compile_detector` uses the Winograd kernels. `ValueError` if they are demanded and cannot be used."""
    if wanted is False or (wanted is None and device.type != "cpu"):
        return False
    if device.type != "cpu":
        reason = f"the model is on {device}, and they are for a CPU"
    elif dtype == torch.float16:
        reason = "they compute float32 and bfloat16"
    elif dtype == torch.bfloat16 and has_amx():
        reason = "this CPU multiplies bfloat16 faster by itself (AMX)"
    else:
        reason = why_not()
    if reason and wanted:
        raise ValueError(f"winograd=True, but the kernels cannot be used: {reason}")
    if reason:
        log.warning("compile_detector uses torch's convolutions instead of Winograd's: %s", reason)
    return not reason
