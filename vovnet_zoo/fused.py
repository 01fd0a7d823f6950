"""`use_gpu_kernels` makes a detector train faster on a GPU, by kernels that Triton compiles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork

from .data import normalize
from .fcos import FCOSHead, Tower
from .kernels import has_triton, suits_kernels
from .kernels.max_pool import FusedMaxPool2d
from .kernels.surgery import become
from .kernels.tensor_cores import MULTIPLE
from .kernels.upsample import add_upsampled
from .loss import FCOSLoss, Targets, check_boxes, check_points


def use_gpu_kernels(model: nn.Module, device: torch.device) -> None:
    """Change, in place, how the FPN, the head and the max poolings of `model`, or a loss, compute on a GPU.

    Only rounding changes. Parameters and state dict stay as they are, and `kernels.surgery.restore` undoes it. Nothing
    is changed for a device that Triton does not know.
    """
    if not has_triton(device):
        return
    for module in model.modules():
        if FusedMaxPool2d.suits(module):
            become(module, FusedMaxPool2d)
        if type(module) is FeaturePyramidNetwork:
            become(module, FusedPyramid)
        if type(module) is FCOSHead:
            become(module, FusedHead)
        if type(module) is Tower and FusedTower.suits(module):
            become(module, FusedTower)
        if type(module) is FCOSLoss:
            become(module, FusedLoss)


def normalize_images(images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Do `data.normalize` to a channels-last result, as networks are fast with, on a GPU in one kernel."""
    if images.shape[1] == len(mean) == len(std) == 3 and not torch.compiler.is_compiling():
        if has_triton(images.device):
            from .kernels.normalize_triton import normalize as normalize_at_once

            return normalize_at_once(images, sizes, mean, std)
    return normalize(images, sizes, mean, std).contiguous(memory_format=torch.channels_last)


class FusedPyramid(FeaturePyramidNetwork):
    """This is torchvision's FPN, but it doubles a map and adds it to the next one in one kernel."""

    stands_for = FeaturePyramidNetwork

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        sizes = [tuple(y.shape[2:]) for y in maps]
        doubled = all((2 * h, 2 * w) == large for large, (h, w) in itertools.pairwise(sizes))
        if not suits_kernels(maps[0]) or not doubled:
            return super().forward(x)
        inner = self.inner_blocks[-1](maps[-1])
        results = [self.layer_blocks[-1](inner)]
        for i in reversed(range(len(maps) - 1)):
            inner = add_upsampled(self.inner_blocks[i](maps[i]), inner)
            results.insert(0, self.layer_blocks[i](inner))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return dict(zip(names, results, strict=True))


class FusedHead(FCOSHead):
    """This head computes the centerness by the convolution that has the same input."""

    stands_for = FCOSHead

    def outputs(
        self, cls_maps: Sequence[Tensor], box_maps: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        if cls_maps[0].device.type != "cuda":
            return super().outputs(cls_maps, box_maps)
        if self.centerness_on == "box":
            raw, ctr = self.with_centerness(self.box_distances, box_maps)
            return [self.cls_logits(x) for x in cls_maps], raw, ctr
        cls, ctr = self.with_centerness(self.cls_logits, cls_maps)
        return cls, [self.box_distances(x) for x in box_maps], ctr

    def with_centerness(self, conv: nn.Conv2d, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Apply `conv` and the centerness's convolution to maps, as one with a multiple of 8 outputs."""
        count = conv.out_channels
        lacking = -(count + 1) % MULTIPLE
        weight = F.pad(torch.cat([conv.weight, self.centerness.weight]), (0, 0, 0, 0, 0, 0, 0, lacking))
        biases: list[Any] = [conv.bias, self.centerness.bias]
        bias = F.pad(torch.cat(biases), (0, lacking))
        both = [F.conv2d(x, weight, bias, padding=1).split([count, 1, lacking], dim=1) for x in maps]
        return [x[0] for x in both], [x[1] for x in both]


class FusedTower(Tower):
    """This tower runs on all levels at once: bias, group norm and ReLU are three kernels forward and three back."""

    stands_for = Tower

    @staticmethod
    def suits(tower: Tower) -> bool:
        """Tell whether the tower still has the layers that it was built with."""
        layers = list(tower)
        return (
            all(isinstance(conv, nn.Conv2d) and conv.bias is not None for conv in layers[::3])
            and all(type(norm) is nn.GroupNorm and norm.affine for norm in layers[1::3])
            and all(type(relu) is nn.ReLU for relu in layers[2::3])
        )

    def forward_levels(self, maps: Sequence[Tensor], recompute: bool) -> Sequence[Tensor]:
        if not suits_kernels(maps[0]) or torch.compiler.is_compiling():
            return super().forward_levels(maps, recompute)
        return checkpoint(self.run, *maps, use_reentrant=False) if recompute else self.run(*maps)

    def run(self, *maps: Tensor) -> Sequence[Tensor]:
        from .kernels.group_norm_triton import group_norm_relu

        found: Sequence[Tensor] = maps
        layers: list[Any] = list(self)
        for conv, norm in zip(layers[::3], layers[1::3], strict=True):
            found = [conv._conv_forward(x, conv.weight, None) for x in found]
            found = group_norm_relu(found, conv.bias, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return found


class FusedLoss(FCOSLoss):
    """This loss assigns boxes in one kernel; its largest part, the focal loss of the classes, is one forward and one
    back."""

    stands_for = FCOSLoss

    def assign(self, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor) -> Targets:
        check_points(points, strides)
        check_boxes(boxes, labels)
        float32 = {x.dtype for x in (points, strides, boxes)} == {torch.float32} and labels.dtype == torch.int64
        if not float32 or not suits_kernels(boxes) or torch.compiler.is_compiling():
            return super().assign(points, strides, boxes, labels)
        from .kernels.assign_triton import assign

        how = self.center_radius, self.plus_one, self.matching == "torchvision"
        return Targets(*assign(points, strides, boxes, labels, *how))

    def _add_class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not suits_kernels(logits) or torch.compiler.is_compiling():
            return super()._add_class_losses(logits, labels)
        from .kernels.focal_triton import focal_loss

        return focal_loss(logits, labels, self.alpha, self.gamma)
