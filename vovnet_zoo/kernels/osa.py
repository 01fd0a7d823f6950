"""These VoVNet blocks compute and keep less than timm's, and give the same results, in training and in inference.

A one-shot aggregation block concatenates its input and the maps of its layers (arXiv 1904.09730, section 3), and
convolves the concatenation 1x1. The backward pass needs the maps anyway, because each is the input of the next layer;
keeping the concatenation too doubles the memory of a block. `FusedOsaBlock` concatenates again in the backward pass.
On a CPU with Winograd convolutions nothing is concatenated: each layer writes to its part of one memory, and the 1x1
convolution reads that memory (`aggregate`).

A frozen batch norm multiplies each map and adds to it. `FoldedConvNormAct` multiplies the convolution's weight instead.
With it, what stands between the convolutions is done on a GPU by kernels of our own (`osa_triton`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, FrozenBatchNormAct2d
from timm.models.vovnet import OsaBlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.flop_counter import register_flop_formula

from ..arguments import check_kind
from . import has_triton, suits_kernels
from .convolution import Float32Conv2d, use_fast_gradients
from .surgery import become
from .tensor_cores import MULTIPLE
from .winograd import (
    FrozenWinogradConv2d,
    WinogradConv2d,
    convolve_into,
    empty_output,
    is_eligible,
    weight_gradient,
    winograd_dtype,
)

ROWS = 4096  # pixels that a CPU multiplies at a time, in float32


def fuse_for_training(model: nn.Module) -> int:
    """Turn, in place, the blocks of timm's VoVNets in `model` into the ones here; returns how many aggregate.

    Convolutions become `CpuConv2d`. Parameters, state dict and hooks stay as they are; results too, but for rounding.
    `surgery.restore` undoes it.
    """
    check_kind("model", model, nn.Module, "an nn.Module")
    use_fast_gradients(model)
    for block in model.modules():
        if type(block) is ConvNormAct and type(block.bn) is FrozenBatchNormAct2d and isinstance(block.conv, nn.Conv2d):
            if block.conv.bias is None and block.aa is None:
                become(block, FoldedConvNormAct)
    blocks = [m for m in model.modules() if type(m) is OsaBlock]
    for block in blocks:
        become(block, FusedOsaBlock)
    return len(blocks)


class FoldedConvNormAct(ConvNormAct):
    """This is a convolution, a frozen batch norm and an activation; the norm's factor is in the weight."""

    stands_for = ConvNormAct

    def forward(self, x: Tensor) -> Tensor:
        weight, shift = self.fold()
        if x.device.type == "cuda" and self.conv.groups == 1 and (lacking := -x.shape[1] % MULTIPLE):
            x, weight = x.to(dtype_of_products(x)), F.pad(weight, (0, 0, 0, 0, 0, lacking))
            x = F.pad(x, (0, 0, 0, 0, 0, lacking))
        if self.has_relu() and on_gpu(x):
            from .osa_triton import shift_relu

            return shift_relu(self.conv._conv_forward(x, weight, None), shift)
        return self.bn.act(self.bn.drop(self.conv._conv_forward(x, weight, shift)))

    def has_relu(self) -> bool:
        """Tell whether a ReLU is all that follows the norm."""
        return type(self.bn.act) is nn.ReLU and type(self.bn.drop) is nn.Identity

    def fold(self) -> tuple[Tensor, Tensor]:
        """Return the convolution's weight and bias with the norm in them."""
        norm = self.bn
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class FusedOsaBlock(OsaBlock):
    """This `OsaBlock` keeps no concatenation for the backward pass. `fuse_for_training` makes it."""

    stands_for = OsaBlock

    def forward(self, x: Tensor) -> Tensor:
        first = x
        if dtype := self.dtype_of_one_memory(x):
            weights, shifts = zip(*(layer.fold() for layer in [*self.conv_mid, self.conv_concat]), strict=True)
            x, _ = aggregate(x.to(dtype), weights, shifts)
        elif self.is_simple() and on_gpu(x):
            layers: list[Any] = [*self.conv_mid, self.conv_concat]
            x = aggregate_on_gpu(x, layers)
        else:
            maps = [x]
            if self.conv_reduction is not None:
                x = self.conv_reduction(x)
            for layer in self.conv_mid:
                x = layer(x)
                maps.append(x)
            x = convolve_concatenated(maps, self.conv_concat)
        return _after_aggregation(self, x, first)

    def dtype_of_one_memory(self, x: Tensor) -> torch.dtype | None:
        """Return the dtype of the maps if `aggregate` computes this block, else None."""
        if self.is_simple() and all(isinstance(layer.conv, WinogradConv2d) for layer in self.conv_mid):
            return winograd_dtype(x)
        return None

    def is_simple(self) -> bool:
        """Tell whether the block consists of convolutions with frozen norms of one epsilon and ReLUs only."""
        layers: list[Any] = [self.conv_concat, *self.conv_mid]
        return (
            self.conv_reduction is None
            and all(isinstance(layer, FoldedConvNormAct) and layer.has_relu() for layer in layers)
            and len({layer.bn.eps for layer in layers}) == 1
        )


class FrozenOsaBlock(nn.Module):
    """This `OsaBlock` is for inference on a CPU; its layers are Winograd convolutions. `FrozenOsaBlock.of` makes it."""

    def __init__(self, layers: Sequence[FrozenWinogradConv2d], last: nn.Conv2d, attn: nn.Module | None, residual: bool):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.last = last
        self.attn = attn
        self.residual = residual

    @classmethod
    def of(cls, block: OsaBlock) -> FrozenOsaBlock:
        """Make the frozen form of a block that `suits`; batch norms are folded into the weights as they are now."""
        conv_mid: Any = block.conv_mid
        layers = [FrozenWinogradConv2d(fold(layer), relu=True) for layer in conv_mid]
        return cls(layers, fold(block.conv_concat), block.attn, block.residual)

    @staticmethod
    def suits(block: nn.Module) -> bool:
        """Tell whether `block` is an OsaBlock without a reduction, of eligible convolutions with batch norms and ReLUs.

        It may have an attention (eSE), which follows the aggregation. A block of depthwise convolutions does not suit.
        """
        if not isinstance(block, OsaBlock) or block.conv_reduction is not None:
            return False
        layers = [*block.conv_mid, block.conv_concat]
        if not all(can_fold(layer) and type(layer.bn.act) is nn.ReLU and layer.aa is None for layer in layers):
            return False
        return all(is_eligible(layer.conv) for layer in block.conv_mid)

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.layers
        first = x
        if layers[0].gains(x):
            weights, shifts = (
                [*(layer.transformed for layer in layers), self.last.weight],
                [layer.bias for layer in layers],
            )
            x, _ = aggregate(x, weights, [*shifts, self.last.bias])
        else:
            maps = [x]
            for layer in layers:
                maps.append(layer(maps[-1]))
            x = self.last(torch.cat(maps, dim=1)).relu()
        if self.attn is not None:
            x = self.attn(x)
        return x + first if self.residual else x


def can_fold(block: nn.Module) -> TypeGuard[ConvNormAct]:
    """Tell whether `block` is a timm ConvNormAct whose norm is a batch norm with statistics."""
    return isinstance(block, ConvNormAct) and isinstance(block.conv, nn.Conv2d) and hasattr(block.bn, "running_var")


def fold(block: ConvNormAct) -> nn.Conv2d:
    """Make a convolution with a bias that computes `block.conv`, then `block.bn` in inference, without activation."""
    conv, bn = copy.deepcopy(block.conv), block.bn
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return conv


def _after_aggregation(block: OsaBlock, x: Tensor, first: Tensor) -> Tensor:
    if block.attn is not None:
        x = block.attn(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    return x + first if block.residual else x


def on_gpu(x: Tensor) -> bool:
    """Tell whether the kernels of `osa_triton` take such a map, and no compiler looks for kernels itself."""
    if torch.compiler.is_compiling():
        return False
    return suits_kernels(x) and has_triton(x.device)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of x on a GPU multiplies."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def aggregate_on_gpu(x: Tensor, layers: Sequence[FoldedConvNormAct]) -> Tensor:
    """Aggregate x by `osa_triton`: [B,C,H,W] -> [B,O,H,W]; the last of the layers convolves all maps."""
    from . import osa_triton

    dtype, norms, convs = dtype_of_products(x), [layer.bn for layer in layers], [layer.conv for layer in layers]
    # as `fold` does, for all layers at once
    scales = torch._foreach_add([norm.running_var for norm in norms], norms[0].eps)
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [norm.weight for norm in norms])
    shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    shifts = torch._foreach_sub([norm.bias for norm in norms], shifts)
    geometry = [(conv.stride, conv.padding, conv.dilation, conv.groups) for conv in convs]
    with torch.autocast("cuda", enabled=False):
        return osa_triton.aggregate(x.to(dtype), [conv.weight for conv in convs], scales, shifts, geometry)


def convolve_concatenated(maps: list[Tensor], block: ConvNormAct) -> Tensor:
    """Compute `block(torch.cat(maps, dim=1))`, whose convolution is 1x1: n maps [B,C_i,H,W] -> [B,O,H,W]."""
    weight, shift = block.fold() if isinstance(block, FoldedConvNormAct) else (block.conv.weight, block.conv.bias)
    device = maps[0].device.type
    if not torch.is_autocast_enabled(device):
        x = _ConvolveConcatenated.apply(weight, *maps)
    else:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if device == "cpu" and isinstance(block.conv, Float32Conv2d):
                x = _ConvolveConcatenated.apply(weight, *maps).to(dtype)
            else:
                x = _ConvolveConcatenated.apply(weight.to(dtype), *(m.to(dtype) for m in maps))
    if shift is not None:
        x = x + shift.to(x.dtype)[:, None, None]
    return block.bn.act(block.bn.drop(x)) if isinstance(block, FoldedConvNormAct) else block.bn(x)


class _ConvolveConcatenated(torch.autograd.Function):
    """This computes in the dtype of the weight; the maps may have another dtype."""

    @staticmethod
    def forward(ctx, weight: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *maps)
        return F.conv2d(torch.cat(maps, dim=1).to(weight.dtype), weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *maps = ctx.saved_tensors
        x = torch.cat(maps, dim=1).to(weight.dtype)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        parts = dx.split([m.shape[1] for m in maps], dim=1)
        return dw, *(part.to(m.dtype) for part, m in zip(parts, maps, strict=True))


# ---- a block in one memory, on a CPU ---------------------------------------------------------------------------------


@torch.library.custom_op("vovnet_zoo::aggregate", mutates_args=(), device_types="cpu")
def aggregate(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Aggregate x: n layers of 3x3 convolution and ReLU, then x and their maps go through one layer of 1x1 and ReLU.

    x [B,C,H,W] float32 or bfloat16; weights n of [M,C or M,3,3] and the last [O,C+n*M,1,1]; shifts n of [M] and [O].
    Returns the aggregation [B,O,H,W], and the maps [B,n*M,H,W] for the backward pass, in x's dtype; arithmetic is
    float32. Differentiable once in x and the weights; not if the n have gone through `transform_weight`.
    """
    *layers, last = weights
    maps, y = empty_output(x, _width(shifts)), empty_output(x, len(last))
    parts = _parts(maps, len(layers))
    for given, part, weight, shift in zip([x, *parts], parts, layers, shifts, strict=False):
        convolve_into(part, given, weight, shift, relu=True)
    of_x, of_maps = last.flatten(1).float().split([x.shape[1], maps.shape[1]], dim=1)
    for (rows_x, rows_maps), (out,) in _blocks_of_rows([x, maps], [y]):
        torch.addmm(shifts[-1].float(), rows_x, of_x.t(), out=out).addmm_(rows_maps, of_maps.t()).relu_()
    return y, maps


@torch.library.custom_op("vovnet_zoo::aggregate_backward", mutates_args=(), device_types="cpu")
def _aggregate_backward(
    dy: Tensor, x: Tensor, maps: Tensor, y: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the gradients of x and of the weights from the gradient of y."""
    *layers, last = weights
    dx, dmaps = empty_output(x, x.shape[1]), empty_output(x, maps.shape[1])
    of_x, of_maps = last.flatten(1).float().split([x.shape[1], maps.shape[1]], dim=1)
    dw_x, dw_maps = torch.zeros_like(of_x), torch.zeros_like(of_maps)
    inputs, gradients = [x, *_parts(maps, len(layers))], [dx, *_parts(dmaps, len(layers))]
    width = inputs[-1].shape[1]
    relu_backward = torch.ops.aten.threshold_backward.grad_input
    before = dy.new_empty((ROWS, len(last)), dtype=torch.float32)  # the ReLU, and after the product
    for (d, rows_y, rows_x, rows_maps), (out_x, out_maps) in _blocks_of_rows([dy, y, x, maps], [dx, dmaps]):
        d = relu_backward(d, rows_y, 0, grad_input=before[: len(d)])
        torch.mm(d, of_x, out=out_x)
        torch.mm(d, of_maps, out=out_maps)
        relu_backward(out_maps[:, -width:], rows_maps[:, -width:], 0, grad_input=out_maps[:, -width:])
        dw_x.addmm_(d.t(), rows_x)
        dw_maps.addmm_(d.t(), rows_maps)
    dweights = [torch.cat([dw_x, dw_maps], dim=1).to(last.dtype)[:, :, None, None]]
    for i in reversed(range(len(layers))):  # the ReLU of the layer before is in the convolution
        dweights.append(weight_gradient(inputs[i], gradients[i + 1]).to(layers[i].dtype))
        positive = inputs[i] if i else None
        convolve_into(gradients[i], gradients[i + 1], layers[i], transposed=True, add=True, positive=positive)
    return dx, dweights[::-1]


@aggregate.register_fake
def _(x, weights, shifts):
    return empty_output(x, len(weights[-1])), empty_output(x, _width(shifts))


@_aggregate_backward.register_fake
def _(dy, x, maps, y, weights):
    return empty_output(x, x.shape[1]), [w.new_empty(w.shape) for w in weights]


@register_flop_formula(torch.ops.vovnet_zoo.aggregate)
def _(x, weights, shifts, **_) -> int:  # shapes; of direct convolutions
    widths = [x[1], *(width for (width,) in shifts[:-1])]
    weight = sum(9 * a * b for a, b in itertools.pairwise(widths)) + math.prod(weights[-1])
    return 2 * weight * x[0] * x[2] * x[3]


def _setup_context(ctx, inputs, output):
    x, weights, _ = inputs
    y, maps = output
    ctx.set_materialize_grads(False)  # none comes back for the maps
    ctx.save_for_backward(x, maps, y, *weights)


def _backward(ctx, dy, _):
    x, maps, y, *weights = ctx.saved_tensors
    dx, dweights = _aggregate_backward(dy, x, maps, y, weights)
    return dx, dweights, [None] * len(weights)


aggregate.register_autograd(_backward, setup_context=_setup_context)


def _width(shifts: Sequence[Tensor]) -> int:
    return sum(len(shift) for shift in shifts[:-1])


def _parts(maps: Tensor, count: int) -> list[Tensor]:
    return list(maps.chunk(count, dim=1))


def _blocks_of_rows(inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield `ROWS` pixels of maps [B,C,H,W] at a time, as float32 [ROWS,C]; `outputs` take what is written there."""
    inputs, outputs = ([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps] for maps in (inputs, outputs))
    copies = [x.new_empty((ROWS, x.shape[1]), dtype=torch.float32) for x in inputs + outputs]
    for i in range(0, len(inputs[0]), ROWS):
        blocks = [x[i : i + ROWS] for x in inputs + outputs]
        rows = [x if x.dtype == torch.float32 else y[: len(x)] for x, y in zip(blocks, copies, strict=True)]
        pairs = list(zip(blocks, rows, strict=True))
        for block, row in pairs[: len(inputs)]:
            if row is not block:
                row.copy_(block)
        yield rows[: len(inputs)], rows[len(inputs) :]
        for block, row in pairs[len(inputs) :]:
            if row is not block:
                block.copy_(row)
