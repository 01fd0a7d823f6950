"""Winograd's F(4x4,3x3) computes 3x3 convolutions on a CPU with a quarter of the multiplications (arXiv 1509.09308).

    use_winograd(model)                               # training and inference: same parameters, same state dict
    FrozenWinogradConv2d(conv, relu=True)             # inference: the weight is transformed once
    conv3x3(x, weight, bias)                          # the function, differentiable

The convolutions have stride 1, padding 1, dilation 1 and one group. Maps are float32 or bfloat16 with any strides, and
channels_last ones come out; arithmetic is float32 throughout. `winograd.cpp` explains the arithmetic.

The operators are in a C++ library (`library.load`). Without it every module here computes with torch's own convolution.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ..arguments import check_flag, check_kind, check_number, check_tensor
from . import library
from .convolution import CpuConv2d, Float32Conv2d
from .surgery import become

log = logging.getLogger("vovnet_zoo")

DTYPES = (torch.float32, torch.bfloat16)  # of maps
TRAINING_TILES, FROZEN_TILES = 36, 9  # from which Winograd gains: with a weight to transform, and without


class WinogradConv2d(Float32Conv2d):
    """This `Float32Conv2d` computes large enough maps on a CPU by Winograd. `use_winograd` makes it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = winograd_dtype(x)
        if dtype is None:
            return super()._conv_forward(x, weight, bias)
        return torch.ops.vovnet_zoo.conv3x3(x.to(dtype), weight, bias)


class FrozenWinogradConv2d(nn.Module):
    """This computes `conv`, then ReLU if `relu`, for inference: [B,C,H,W] -> [B,O,H,W] of the same dtype.

    Its state dict is empty: the weight is `conv`'s at this moment. `ValueError` for a convolution that Winograd does
    not compute, `RuntimeError` where the kernels cannot be used (`kernels.available()` says so beforehand).
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        super().__init__()
        check_kind("conv", conv, nn.Conv2d, "an nn.Conv2d")
        check_flag("relu", relu)
        if not is_eligible(conv):
            raise ValueError(f"{conv} is not 3x3 of stride 1, padding 1, dilation 1, one group, 32 channels or more")
        self.relu = relu
        self.weight: Tensor
        self.bias: Tensor | None
        self.out_channels = conv.out_channels
        self.register_buffer("weight", conv.weight.detach().clone(), persistent=False)  # for maps too small to gain
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone(), persistent=False)
        self.transformed = transform_weight(self.weight)  # no buffer: it stays float32 and on the CPU

    def forward(self, x: Tensor) -> Tensor:
        if self.gains(x):
            return torch.ops.vovnet_zoo.conv3x3_frozen(x, self.transformed, self.out_channels, self.bias, self.relu)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = F.conv2d(x, self.weight.to(x.dtype), bias, padding=1)
        return F.relu(x) if self.relu else x

    def gains(self, x: Tensor) -> bool:
        """Tell whether Winograd computes maps x."""
        return _gains(x, FROZEN_TILES)


def use_winograd(model: nn.Module) -> int:
    """Turn, in place, every eligible nn.Conv2d of `model` into a `WinogradConv2d`, and every other into a
    `Float32Conv2d`; returns how many were eligible, 0 with a line in the log if the kernels cannot be used.

    Parameters, state dict and hooks stay as they are; `surgery.restore` undoes it. Not for bfloat16 on a CPU with AMX
    (`has_amx`), which multiplies bfloat16 many times faster than float32.
    """
    check_kind("model", model, nn.Module, "an nn.Module")
    if reason := why_not():
        log.warning("Winograd convolutions are not used: %s", reason)
        return 0
    count = 0
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and type(conv) in (nn.Conv2d, CpuConv2d):
            become(conv, WinogradConv2d if is_eligible(conv) else Float32Conv2d)
            count += is_eligible(conv)
    return count


def why_not() -> str:
    """Say why Winograd does not gain over torch's convolutions on this CPU, or "" if it does."""
    if reason := _load():
        return reason
    if library.capability() == "DEFAULT" and library.platform.machine() in ("x86_64", "AMD64"):
        return "this CPU has no AVX2, or ATEN_CPU_CAPABILITY declines it"
    return ""


def has_amx() -> bool:
    """Tell whether torch uses units of this CPU for products of bfloat16 matrices (AMX)."""
    return library.capability() == "AVX512" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def is_eligible(conv: nn.Conv2d) -> bool:
    """Tell whether Winograd computes this convolution, and it has enough channels to gain."""
    check_kind("conv", conv, nn.Conv2d, "an nn.Conv2d")
    wanted = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == wanted and min(conv.in_channels, conv.out_channels) >= 32


def winograd_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of the maps if Winograd computes a training convolution of `x` in this autocast, else None."""
    autocast = torch.is_autocast_enabled("cpu")
    if not _gains(x, TRAINING_TILES) or (autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return None
    return torch.bfloat16 if autocast else x.dtype


def _gains(x: Tensor, least: int) -> bool:
    """Tell whether Winograd computes maps `x` [B,C,H,W], which need at least `least` tiles of 4x4."""
    batch, _, height, width = x.shape
    tiles = batch * ((height + 3) // 4) * ((width + 3) // 4)
    return _loaded and x.device.type == "cpu" and x.dtype in DTYPES and tiles >= least


# ---- operators -------------------------------------------------------------------------------------------------

_loaded = False  # a plain name, which a compiled graph can look at


@functools.cache
def _load() -> str:
    """Load the operators, and tell torch their shapes and gradients; returns "" or why that is impossible."""
    global _loaded
    if reason := library.load():
        return reason
    register = torch.library.register_fake
    register("vovnet_zoo::conv3x3_transform_weight", lambda w: w.new_empty(transformed_size(w.shape[1], w.shape[0])))
    register("vovnet_zoo::conv3x3", _fake_conv3x3)
    register("vovnet_zoo::conv3x3_frozen", lambda x, transformed, out, bias=None, relu=False: empty_output(x, out))
    register("vovnet_zoo::conv3x3_weight_gradient", _fake_weight_gradient)
    register("vovnet_zoo::conv3x3_out", lambda y, x, weight, bias, transposed, relu, add, positive: None)
    torch.library.register_autograd("vovnet_zoo::conv3x3", _backward, setup_context=_setup_context)
    register_flop_formula(torch.ops.vovnet_zoo.conv3x3)(_flop_conv3x3)
    register_flop_formula(torch.ops.vovnet_zoo.conv3x3_frozen)(_flop_conv3x3_frozen)
    _loaded = True
    return ""


def _operators():
    if reason := _load():
        raise RuntimeError(f"the Winograd kernels cannot be used: {reason}")
    return torch.ops.vovnet_zoo


def _call(name: str, *arguments):
    """Call an operator; what it refuses is an error of its caller."""
    operator = getattr(_operators(), name)
    try:
        return operator(*arguments)
    except (RuntimeError, TypeError) as error:
        if "no memory" in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from error


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """Compute `F.conv2d(x, weight, bias, padding=1)`, or with `transposed` `F.conv_transpose2d` of the same arguments.

    Differentiable once; x and weight are kept for the backward pass, nothing else.

    Args:
        x: float32 or bfloat16 [B,C,H,W] on the CPU.
        weight: [O,C,3,3], or [C,O,3,3] if transposed.
        bias: [O].

    Returns:
        [B,O,H,W], channels_last, of x's dtype.

    Raises:
        ValueError: shapes or dtypes are others.
        RuntimeError: the kernels cannot be used.
    """
    check_flag("transposed", transposed)
    return _call("conv3x3", x, weight, bias, transposed)


def conv3x3_frozen(
    x: Tensor, transformed: Tensor, out_channels: int, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Do `conv3x3`, then ReLU if `relu`, with a weight that `transform_weight` made. It is not differentiable."""
    check_tensor("transformed", transformed, (36, "O/16", "C", 16))
    check_number("out_channels", out_channels, 1, 16 * transformed.shape[1], whole=True)
    check_flag("relu", relu)
    return _call("conv3x3_frozen", x, transformed, out_channels, bias, relu)


def transform_weight(weight: Tensor) -> Tensor:
    """Turn [O,C,3,3] into `G g G'` float32 [36,ceil(O/16),16*ceil(C/16),16], filled up with zeros."""
    check_tensor("weight", weight, ("O", "C", 3, 3))
    return _call("conv3x3_transform_weight", weight.detach())


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Compute the weight's gradient float32 [O,C,3,3] from x [B,C,H,W] and the output's gradient dy [B,O,H,W]."""
    return _call("conv3x3_weight_gradient", x, dy)


def convolve_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    *,
    transposed: bool = False,
    add: bool = False,
    positive: Tensor | None = None,
) -> None:
    """Write `conv3x3`, then ReLU if `relu`, to memory y [B,O,H,W], whose dtype is x's.

    The weight may have gone through `transform_weight`. y, x and `positive` may be channels of larger channels_last
    maps. With `add` the result is added to y; where `positive` [B,O,H,W] is not positive, y becomes 0.
    """
    torch.ops.vovnet_zoo.conv3x3_out(y, x, weight, bias, transposed, relu, add, positive)


def transformed_size(channels: int, outputs: int) -> tuple[int, int, int, int]:
    return 36, (outputs + 15) // 16, (channels + 15) // 16 * 16, 16


def empty_output(x: Tensor, outputs: int) -> Tensor:
    shape = (x.shape[0], outputs, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_conv3x3(x, weight, bias=None, transposed=False):
    return empty_output(x, weight.shape[1 if transposed else 0])


def _fake_weight_gradient(x, dy):
    return x.new_empty((dy.shape[1], x.shape[1], 3, 3), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.vovnet_zoo.conv3x3(dy, weight, None, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dw = torch.ops.vovnet_zoo.conv3x3_weight_gradient(*((dy, x) if ctx.transposed else (x, dy))).to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:  # shorter where defaults end the arguments
        db = dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db, None


def _flop_conv3x3(x, weight, *_, **__) -> int:  # shapes; of a direct convolution
    return 2 * math.prod(weight) * x[0] * x[2] * x[3]


def _flop_conv3x3_frozen(x, transformed, out_channels, *_, **__) -> int:
    return 2 * 9 * out_channels * math.prod(x)
