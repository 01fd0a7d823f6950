"""`count_work` counts what a training step of a configuration has to do, without doing it.

The real step runs on fake tensors, which have shapes but no numbers: it takes seconds, and no memory.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable

import numpy as np
import timm.optim.muon
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from average import MovingAverage
from build import build_model, load_start, prepare_for_training
from gradients import limit_norm
from memory import kept_by
from optim import create_optimizer, replaced
from presets import TrainConfig
from step import compute_losses, find_targets
from vovnet_zoo import FCOS, FCOSLoss
from vovnet_zoo.data import train_transforms
from vovnet_zoo.kernels.osa import FusedOsaBlock
from vovnet_zoo.planning import StepWork

CLASSES = 80  # of COCO
BOXES = 16  # of an image with its padding
# Heights, widths and shares of the commonest sizes of COCO's images
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (500, 375))
SHARES = (0.42, 0.16, 0.17, 0.06, 0.11, 0.08)
MULTIPLE = 32  # batches are padded to a multiple of this, see `vovnet_zoo.data.collate`

# An operation is one kernel, but for these on a GPU: a bias is added by a kernel of its own, and its gradient is a sum.
KERNELS = {
    "aten::convolution": 2,
    "aten::convolution_backward": 3,
    "aten::native_group_norm": 3,
    "aten::native_group_norm_backward": 5,
}
# On a GPU, kernels of our own (`vovnet_zoo.fused`, `vovnet_zoo.kernels.osa`) do in one what a CPU does in several
# operations. So many launches less, in float32 and under autocast, have the forward and the backward pass of a layer of
# a tower on five levels, of a layer of a VoVNet block with frozen norms, and of the rest; they were counted on a driver
# that computes nothing.
SAVED = {
    "tower": {False: (27, 48), True: (33, 56)},
    "block": {False: (5, 0), True: (5, 0)},
    "rest": {False: (158, 35), True: (161, 40)},
}
NO_KERNELS = ("prim::", "profiler::", "aten::empty", "aten::_unsafe_view", "aten::lift_fresh", "aten::scalar_tensor")


class CountKernels(TorchDispatchMode):
    """Within this context, `launches` counts the kernels that a GPU would be given, one by one."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True  # there is no number: labels, which are all that a step asks for, are right
        name = function.name().split(".")[0]
        if not function.is_view and not name.startswith(NO_KERNELS):
            self.launches += KERNELS.get(name, 1)
        return function(*args, **(kwargs or {}))


def count_work(config: TrainConfig) -> StepWork:
    """Count the work of a training step of one image of the size that images have on average.

    `config` decides model, optimizer, sizes and precision. A model is built, with the weights of `init` only.
    """
    config = dataclasses.replace(config, pretrained_backbone=False, winograd=False)
    names = [str(i) for i in range(CLASSES)]
    model = build_model(config, names, list(range(CLASSES)), load_start(config))
    prepare_for_training(model, config, torch.device("cpu"))
    pixels, (height, width) = padded_pixels(config, config.batch_size), largest_size(config)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # by the copy of the average
        model.to_empty(device="cpu")  # where autocast works without a GPU
        update_launches, state_bytes = count_update(model, config)
        criterion = FCOSLoss.of(model)
        images, sizes = torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([[height, width]])
        boxes, labels = torch.zeros(1, BOXES, 4), torch.zeros(1, BOXES, dtype=torch.int64)
        losses = {}

        def forward() -> None:
            targets, normalizers = find_targets(model, criterion, boxes, labels, height, width)
            losses.update(compute_losses(model, criterion, images, sizes, targets, normalizers, config.precision))

        with CountKernels() as kernels, FlopCounterMode(display=False) as counter:
            kept = kept_by(forward) * 2**20
            forward_launches, forward_flops = kernels.launches, counter.get_total_flops()
            sum(losses.values()).backward()
        scale = pixels / (height * width)
        saved_forward, saved_backward = saved_launches(model, config.precision != "float32")
        return StepWork(
            flops=counter.get_total_flops() * scale,
            forward_flops=forward_flops * scale,
            launches=kernels.launches + update_launches - saved_forward - saved_backward,
            forward_launches=forward_launches - saved_forward,
            kept_bytes=kept,
            weight_bytes=bytes_of(model.state_dict().values()),
            gradient_bytes=bytes_of(x for x in model.parameters() if x.requires_grad),
            state_bytes=state_bytes,
            pixels=pixels,
            most_pixels=height * width,
        )


def saved_launches(model: FCOS, autocast: bool) -> tuple[int, int]:
    """Count the launches that our own kernels for a GPU save in the forward and in the backward pass."""
    blocks = [x for x in model.modules() if isinstance(x, FusedOsaBlock) and x.is_simple()]
    counts = {
        "tower": sum(len(tower) // 3 for tower in (model.head.cls_tower, model.head.box_tower)),
        "block": sum(len(block.conv_mid) + 1 for block in blocks),
        "rest": 1,
    }
    forward, backward = (sum(SAVED[name][autocast][i] * count for name, count in counts.items()) for i in (0, 1))
    return forward, backward


def count_update(model: FCOS, config: TrainConfig) -> tuple[int, int]:
    """Count the kernels of an update of fake weights, and the bytes of the states that it keeps.

    An optimizer takes many tensors at a time (foreach), as is usual on a GPU.
    """
    optimizer = create_optimizer(model, config)
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    average = MovingAverage(model, config.ema) if config.ema else None
    adamw = timm.optim.muon.adamw  # which Muon calls for what is no matrix
    for _ in range(2):  # the first update makes the states
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        together = replaced("adamw", lambda *tensors, **options: adamw(*tensors, **{**options, "foreach": True}))
        with CountKernels() as kernels, together:
            limit_norm(model, config.clip_grad, foreach=True)
            optimizer.step()
            if average:
                average.update(model, step=1)
    model.zero_grad(set_to_none=True)
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return kernels.launches, bytes_of(states) + (bytes_of(model.state_dict().values()) if average else 0)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def padded_pixels(config: TrainConfig, batch_size: int, batches: int = 100) -> float:
    """Return the pixels of an image of COCO with its padding, on average over batches of this size.

    A batch has wide images or tall ones, and all are padded to the largest.
    """
    rng, total = np.random.default_rng(0), 0
    sizes = draw_sizes(config, batches * batch_size, rng)
    for batch in sizes.reshape(batches, batch_size, 2):
        total += math.prod(padded(batch))
    return total / batches


def largest_size(config: TrainConfig) -> tuple[int, int]:
    """Return height and width of the largest wide image of COCO with its padding."""
    return padded(draw_sizes(config, 1000, np.random.default_rng(0)))


def padded(sizes: np.ndarray) -> tuple[int, int]:
    """Return the height and width of a batch of images of these sizes [N,2]."""
    height, width = (-(-sizes.max(0) // MULTIPLE) * MULTIPLE).tolist()
    return height, width


def draw_sizes(config: TrainConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw sizes (height, width) [N,2] of COCO's wide images after the transforms; tall ones have as many pixels."""
    transforms = train_transforms(config.min_size, config.max_size, config.augment, scale=config.zoom)
    resize = transforms.transforms[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = []
        for kind in rng.choice(len(SIZES), count, p=SHARES):
            image = torch.empty(3, *sorted(SIZES[kind]), device="meta")
            found.append(resize.make_params([image])["size"])
    return np.array(found)
