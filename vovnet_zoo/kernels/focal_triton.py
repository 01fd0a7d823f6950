"""These Triton kernels compute the focal loss of classes (arXiv 1708.02002). Import this where Triton is.

torch's operators write some forty maps as large as the logits in both passes. Here the logits are read once for the
loss and once for their gradient. Sums are taken in a fixed order, so that results repeat bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK, WARPS = 2048, 4  # logits of a program


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Add up torchvision's `sigmoid_focal_loss` of all logits, differentiable once.

    Args:
        logits: [...,K], float32, bfloat16 or float16; the gradient has their dtype. Arithmetic is float32.
        labels: int64 [...], 0..K-1, -1 for background.
        alpha, gamma: as of `FCOSLoss`.

    Returns:
        The sum, a float32 scalar.
    """
    return _FocalLoss.apply(logits, labels, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float):
        logits, labels = logits.contiguous(), labels.contiguous()
        count, classes = logits.numel(), logits.shape[-1]
        ctx.save_for_backward(logits, labels)
        ctx.numbers = count, alpha, 1 - alpha
        ctx.options = dict(K=classes, GAMMA=float(gamma), BLOCK=BLOCK, num_warps=WARPS)
        sums = logits.new_empty(triton.cdiv(count, BLOCK), dtype=torch.float32)
        if count:
            with torch.cuda.device_of(logits):
                add_up[(len(sums),)](logits, labels, sums, *ctx.numbers, **ctx.options)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        if logits.numel():
            with torch.cuda.device_of(logits):
                go_back[(triton.cdiv(logits.numel(), BLOCK),)](
                    logits, labels, dy, gradient, *ctx.numbers, **ctx.options
                )
        return gradient, None, None, None


@triton.jit
def load(logits, labels, count, of_class, of_rest, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return the places of some logits from the program's first one on, which there are, the sign and the weight of
    each, and its value times its sign: the larger it is, the better."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    column = (first % K).to(tl.int32) + tl.arange(0, BLOCK)
    place = first + tl.arange(0, BLOCK)
    inside = place < count
    label = tl.load(labels + first // K + column // K, mask=inside, other=-1)
    is_class = label == column % K
    value = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    sign = tl.where(is_class, 1.0, -1.0)
    return place, inside, sign, tl.where(is_class, of_class, of_rest), value * sign


@triton.jit
def entropy_and_miss(value, GAMMA: tl.constexpr):
    """Return `-log(p)`, `1 - p`, and its power of gamma, for `p = sigmoid(value)`; none of them loses digits."""
    e = tl.exp(-tl.abs(value))
    sum_ = 1.0 + e
    log1p = tl.where(sum_ == 1.0, e, tl.log(sum_) * (e / (sum_ - 1.0)))
    entropy = tl.maximum(-value, 0.0) + log1p
    miss = tl.where(value >= 0, e, 1.0) / sum_
    if GAMMA == 0.0:
        power = miss * 0.0 + 1.0
    elif GAMMA == 1.0:
        power = miss
    elif GAMMA == 2.0:
        power = miss * miss
    else:
        power = tl.exp(-GAMMA * (tl.maximum(value, 0.0) + log1p))
    return entropy, miss, power


@triton.jit(do_not_specialize=["count"])
def add_up(
    logits,  # [count]
    labels,  # int64 [count/K]
    sums,  # float32, one for each program, filled
    count, of_class, of_rest,
    K: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the losses of some logits."""
    _, inside, _, weight, value = load(logits, labels, count, of_class, of_rest, K, BLOCK)
    entropy, _, power = entropy_and_miss(value, GAMMA)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, weight * power * entropy, 0.0), axis=0))


@triton.jit(do_not_specialize=["count"])
def go_back(
    logits,  # [count]
    labels,  # int64 [count/K]
    dy,  # float32, one number
    gradient,  # [count], filled
    count, of_class, of_rest,
    K: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of some logits."""
    place, inside, sign, weight, value = load(logits, labels, count, of_class, of_rest, K, BLOCK)
    entropy, miss, power = entropy_and_miss(value, GAMMA)
    slope = -sign * weight * power * (GAMMA * (1.0 - miss) * entropy + miss)
    tl.store(gradient + place, (slope * tl.load(dy)).to(gradient.dtype.element_ty), mask=inside)
