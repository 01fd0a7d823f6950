"""`find_targets` and `compute_losses` are a training step up to its losses.

They are two functions, since a loss is divided by a number that depends on the targets of the whole global batch. Both
consist of tensor operations only, so `compiled` can make one graph of each. `compile_step` chooses what to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vovnet_zoo import FCOS, FCOSLoss, Predictions
from vovnet_zoo.fcos import level_sizes, make_points
from vovnet_zoo.fused import normalize_images
from vovnet_zoo.loss import Targets
from vovnet_zoo.parts import MANY, compile_parts


def find_targets(
    model: FCOS, criterion: FCOSLoss, boxes: Tensor, labels: Tensor, height: int, width: int
) -> tuple[Targets, Tensor]:
    """Find what each location of B images of `height` x `width` pixels should learn.

    Args:
        boxes: [B,M,4] xyxy in pixels of the network input.
        labels: int64 [B,M], -1 for padding.

    Returns:
        The targets, and the numbers [3] that these images add to the normalizers of the global batch.
    """
    if boxes.device.type == "cuda":
        corner = model.config["points"] == "corner"
        points, strides = known_points(height, width, tuple(model.strides), corner, boxes.device)
    else:
        points, strides = model.make_points(level_sizes(height, width, model.strides), (height, width), boxes.device)
    targets = criterion.assign(points, strides, boxes, labels)
    return targets, criterion.normalizers(targets)


@functools.lru_cache(128)
def known_points(
    height: int, width: int, strides: tuple[int, ...], corner: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute what `FCOS.make_points` does. It is kept for steps of the same size: a GPU is given 50 kernels for it."""
    return make_points(level_sizes(height, width, strides), strides, device, (height, width) if corner else None)


def compute_losses(
    model: FCOS,
    criterion: FCOSLoss,
    images: Tensor,
    sizes: Tensor,
    targets: Targets,
    normalizers: Tensor,
    precision: str,
    compare: Callable[..., dict[str, Tensor]] = FCOSLoss.compare,
) -> dict[str, Tensor]:
    """Compute the three losses of B images, each a scalar: the network runs under autocast, the losses in float32.

    Args:
        images: uint8 [B,3,H,W].
        sizes: int [B,2], height and width of each image without its padding.
        targets: from `find_targets`.
        normalizers: [3], the sum over all parts of the global batch.
        precision: "float32", "bf16" or "fp16", of the network.
        compare: `FCOSLoss.compare`, or what the compiler made of it.
    """
    return compare(criterion, run_network(model, images, sizes, precision), targets, normalizers)


def run_network(model: FCOS, images: Tensor, sizes: Tensor, precision: str) -> Predictions:
    """Normalize images, uint8 [B,3,H,W], and run the network under autocast, unless `precision` is "float32"."""
    images = normalize_images(images, sizes, model.config["image_mean"], model.config["image_std"])
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    # Autocast keeps its casts of the weights for their next use. The second run of a checkpointed tower does not find
    # them there, while torch demands the same operations of both runs.
    keep_casts = not model.head.grad_checkpointing
    with torch.autocast(images.device.type, dtype, enabled=precision != "float32", cache_enabled=keep_casts):
        return model(images)


def compile_step(
    model: FCOS, *, backend: str = "inductor"
) -> tuple[Callable[..., tuple[Targets, Tensor]], Callable[..., dict[str, Tensor]]]:
    """Compile `find_targets` and `compute_losses`, and return them.

    On a CPU, each is one graph. On a GPU, the parts of the network (`vovnet_zoo.parts`) and the comparison are graphs
    for all sizes. `find_targets` is left as it is there: it is little work, and the compiler of torch 2.11 fails on it
    when sizes are variables.
    """
    if next(model.parameters()).device.type == "cpu" and backend == "inductor":
        return compiled(find_targets), compiled(compute_losses)
    # Without this, inductor looks at the strides of a convolution's gradient on a GPU, which fixes the width of the
    # images: each new width would be compiled again. The maps are channels-last anyway.
    torch._inductor.config.force_layout_optimization = True
    compile_parts(model, backend)
    compare = compiled(FCOSLoss.compare, dynamic=True, backend=backend)
    return find_targets, functools.partial(compute_losses, compare=compare)


@functools.cache
def compiled(function: Callable, dynamic: bool | None = None, backend: str = "inductor") -> Callable:
    """Compile `function` to one graph; torch raises an error where that is impossible.

    With `dynamic=None`, a size that differs between two calls becomes a variable of the graph, which is then
    compiled once more.
    """
    # The compiler chooses which activations the forward pass keeps for the backward pass, and these three rules make it
    # keep many. Without them it computes what is cheap again, above all GroupNorm and ReLU, which saves memory and
    # the time to write and read it. torch has no public switch for this.
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.ban_recompute_long_fusible_chains = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
