"""VoVNet blocks in training: the same results, with less computed and less kept for the backward pass.

A one-shot aggregation block concatenates its input and the maps of its layers (arXiv 1904.09730, section 3), and
convolves them 1x1. The maps are kept in any case, each as the input of the next layer; kept too, the concatenation
doubles a block's memory. Here it is made again in the backward pass; on a CPU with Winograd convolutions it is never
made: layers write to, and read from, their part of one memory.

A frozen batch norm multiplies and adds to each map; here its factor goes into the convolution's weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, FrozenBatchNormAct2d
from timm.models.vovnet import OsaBlock
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .winograd import Float32Conv2d, WinogradConv2d, convolve_into, empty_output, weight_gradient, winograd_dtype

ROWS = 4096  # pixels that a CPU multiplies at a time, in float32


def fuse_for_training(model: nn.Module) -> int:
    """Turn, in place, the blocks of timm's VoVNets in `model` into the ones here; returns how many aggregate.

    Parameters, state dict and hooks of blocks stay as they are; results too, but for rounding.
    """
    for block in model.modules():
        if type(block) is ConvNormAct and type(block.bn) is FrozenBatchNormAct2d and isinstance(block.conv, nn.Conv2d):
            if block.conv.bias is None and block.aa is None:
                block.__class__ = FoldedConvNormAct
    blocks = [m for m in model.modules() if type(m) is OsaBlock]
    for block in blocks:
        block.__class__ = FusedOsaBlock
    return len(blocks)


class FoldedConvNormAct(ConvNormAct):
    """Convolution, frozen batch norm and activation; the norm's factor is in the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight, shift = self.fold()
        return self.bn.act(self.bn.drop(self.conv._conv_forward(x, weight, shift)))

    def fold(self) -> tuple[Tensor, Tensor]:
        """The convolution's weight and bias with the norm in them."""
        norm = self.bn
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class FusedOsaBlock(OsaBlock):
    """An `OsaBlock` in all but how it computes and what it keeps. Made by `fuse_for_training`."""

    def forward(self, x: Tensor) -> Tensor:
        first, last = x, self.conv_concat
        folded = isinstance(last, FoldedConvNormAct)
        weight, shift = last.fold() if folded else (last.conv.weight, None)
        if dtype := self.dtype_of_one_memory(x):
            weights, shifts = zip(*(layer.fold() for layer in self.conv_mid), strict=True)
            x, _ = aggregate(x.to(dtype), weights, shifts, weight)
        else:
            maps = [x]
            if self.conv_reduction is not None:
                x = self.conv_reduction(x)
            for layer in self.conv_mid:
                x = layer(x)
                maps.append(x)
            x = convolve_concatenated(maps, last.conv, weight)
        x = last.bn.act(last.bn.drop(x + shift.to(x.dtype)[:, None, None])) if folded else last.bn(x)
        if self.attn is not None:
            x = self.attn(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x + first if self.residual else x

    def dtype_of_one_memory(self, x: Tensor) -> torch.dtype | None:
        """That of the maps if `aggregate` computes this block, else None."""
        layers = [self.conv_concat, *self.conv_mid]
        simple = self.conv_reduction is None and all(
            isinstance(layer, FoldedConvNormAct) and type(layer.bn.act) is nn.ReLU and type(layer.bn.drop) is nn.Identity
            for layer in layers
        )
        if simple and all(isinstance(layer.conv, WinogradConv2d) for layer in self.conv_mid):
            return winograd_dtype(x)
        return None


def convolve_concatenated(maps: list[Tensor], conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """What `conv` makes of `torch.cat(maps, dim=1)`, if its weight [O,C,1,1] is `weight`: n maps [B,C_i,H,W] ->
    [B,O,H,W]."""
    device = maps[0].device.type
    if not torch.is_autocast_enabled(device):
        return _ConvolveConcatenated.apply(weight, *maps)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if device == "cpu" and isinstance(conv, Float32Conv2d):
            return _ConvolveConcatenated.apply(weight, *maps).to(dtype)
        return _ConvolveConcatenated.apply(weight.to(dtype), *(x.to(dtype) for x in maps))


class _ConvolveConcatenated(torch.autograd.Function):
    """The arithmetic has the dtype of the weight, the maps may have another."""

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
def aggregate(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """One-shot aggregation: n layers of 3x3 convolution and ReLU, and a 1x1 convolution of x and their maps.

    x [B,C,H,W] float32 or bfloat16; n `weights` [M,C or M,3,3] and `shifts` [M]; weight [O,C+n*M,1,1]. Returns the
    aggregation [B,O,H,W], and the maps [B,n*M,H,W] for the backward pass, in x's dtype; arithmetic is float32.
    Differentiable once in x and the weights.
    """
    maps = empty_output(x, sum(len(w) for w in weights))
    y, last = empty_output(x, len(weight)), x
    for w, shift, part in zip(weights, shifts, _parts(maps, len(weights)), strict=True):
        convolve_into(part, last, w, shift, relu=True)
        last = part
    of_x, of_maps = weight.flatten(1).float().split([x.shape[1], maps.shape[1]], dim=1)
    for (rows_x, rows_maps), (out,) in _blocks_of_rows([x, maps], [y]):
        torch.mm(rows_x, of_x.t(), out=out).addmm_(rows_maps, of_maps.t())
    return y, maps


@torch.library.custom_op("vovnet_zoo::aggregate_backward", mutates_args=(), device_types="cpu")
def _aggregate_backward(
    dy: Tensor, x: Tensor, maps: Tensor, weights: Sequence[Tensor], weight: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of x, of `weights`, of `weight`."""
    dx, dmaps = empty_output(x, x.shape[1]), empty_output(x, maps.shape[1])
    of_x, of_maps = weight.flatten(1).float().split([x.shape[1], maps.shape[1]], dim=1)
    dw_x, dw_maps = torch.zeros_like(of_x), torch.zeros_like(of_maps)
    width = len(weights[-1])
    for (rows_dy, rows_x, rows_maps), (out_x, out_maps) in _blocks_of_rows([dy, x, maps], [dx, dmaps]):
        torch.mm(rows_dy, of_x, out=out_x)
        torch.mm(rows_dy, of_maps, out=out_maps)
        last = out_maps[:, -width:]
        torch.ops.aten.threshold_backward.grad_input(last, rows_maps[:, -width:], 0, grad_input=last)  # ReLU; others below
        dw_x.addmm_(rows_dy.t(), rows_x)
        dw_maps.addmm_(rows_dy.t(), rows_maps)
    inputs = [x, *_parts(maps, len(weights))[:-1]]
    gradients = [dx, *_parts(dmaps, len(weights))]
    dws = []
    for i in reversed(range(len(weights))):
        dws.append(weight_gradient(inputs[i], gradients[i + 1]).to(weights[i].dtype))
        positive = inputs[i] if i else None
        convolve_into(gradients[i], gradients[i + 1], weights[i], transposed=True, add=True, positive=positive)
    return dx, dws[::-1], torch.cat([dw_x, dw_maps], dim=1).to(weight.dtype)[:, :, None, None]


@aggregate.register_fake
def _(x, weights, shifts, weight):
    return empty_output(x, len(weight)), empty_output(x, sum(len(w) for w in weights))


@_aggregate_backward.register_fake
def _(dy, x, maps, weights, weight):
    dweight = weight.new_empty(weight.shape)
    return empty_output(x, x.shape[1]), [w.new_empty(w.shape) for w in weights], dweight


@register_flop_formula(torch.ops.vovnet_zoo.aggregate)
def _(x, weights, shifts, weight, **_) -> int:  # shapes; of direct convolutions
    return 2 * sum(map(math.prod, [*weights, weight])) * x[0] * x[2] * x[3]


def _setup_context(ctx, inputs, output):
    x, weights, _, weight = inputs
    ctx.set_materialize_grads(False)  # none comes back for the maps
    ctx.count = len(weights)
    ctx.save_for_backward(x, output[1], weight, *weights)


def _backward(ctx, dy, _):
    x, maps, weight, *weights = ctx.saved_tensors
    dx, dws, dweight = _aggregate_backward(dy, x, maps, weights, weight)
    return dx, dws, [None] * ctx.count, dweight


aggregate.register_autograd(_backward, setup_context=_setup_context)


def _parts(maps: Tensor, count: int) -> list[Tensor]:
    return list(maps.chunk(count, dim=1))


def _blocks_of_rows(inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """`ROWS` pixels of maps [B,C,H,W] at a time, as float32 matrices [ROWS,C]; `outputs` take what is written to them."""
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
