"""These Triton kernels compute group norm and ReLU of the five maps of a pyramid. Import this where Triton is.

The maps are channels-last, so a pixel's channels lie side by side. All five go through one kernel at a time, because
the kernels for the small ones would end before the host has started the next. A map is read twice in the forward pass:
once for its statistics, once to be normalized. Sums are taken in a fixed order, so that results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 5
CHUNK, ROWS = 256, 16  # pixels that one program handles, and how many of them it loads at a time
PARTS = 16  # chunks that are added up together
GROUPS = 4  # groups of which one program adds up the chunks
WARPS = 4


def group_norm_relu(
    maps: Sequence[Tensor], shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> list[Tensor]:
    """Compute `relu(group_norm(x + shift))` of each of five maps, differentiable once.

    `shift` is the bias of the convolution that made the maps, which then need not add it.

    Args:
        maps: five [B,C,H,W], float32, bfloat16 or float16; channels-last ones are not copied.
        shift, weight, bias: float32 [C].
        groups, eps: as of `nn.GroupNorm`.

    Returns:
        Five maps of the same shapes and dtype, channels-last. Arithmetic is float32.
    """
    assert len(maps) == LEVELS
    return list(_GroupNormRelu.apply(groups, eps, shift, weight, bias, *maps))


class _GroupNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: int, eps: float, shift: Tensor, weight: Tensor, bias: Tensor, *maps: Tensor):
        maps = tuple(x.contiguous(memory_format=torch.channels_last) for x in maps)
        shift, weight, bias = shift.contiguous(), weight.contiguous(), bias.contiguous()
        batch, channels = maps[0].shape[:2]
        pixels = [x.shape[2] * x.shape[3] for x in maps]
        chunks = sum(triton.cdiv(count, CHUNK) for count in pixels)
        in_group = channels // groups
        blocks = dict(C=channels, BLOCK=triton.next_power_of_2(channels), CHUNK=CHUNK, ROWS=ROWS)
        sums = dict(C=channels, GROUPS=GROUPS, IN_GROUP=in_group, WIDTH=triton.next_power_of_2(in_group))
        grid_of_sums = (batch * LEVELS, triton.cdiv(groups, GROUPS))
        parts = weight.new_empty(2, batch, chunks, channels)
        factors = weight.new_empty(2, batch, LEVELS, channels)
        whole, results = room_for(maps)
        with torch.cuda.device_of(weight):
            measure[(chunks, batch)](*maps, *pixels, parts, **blocks, num_warps=WARPS)
            combine[grid_of_sums](
                *pixels, parts, shift, factors, batch, groups, eps, CHUNK=CHUNK, PARTS=PARTS, **sums, num_warps=WARPS
            )
            normalize[(chunks, batch)](*maps, *pixels, factors, weight, bias, whole, **blocks, num_warps=WARPS)
        ctx.save_for_backward(factors, weight, bias, *maps)
        ctx.blocks, ctx.sums, ctx.pixels, ctx.chunks, ctx.groups = blocks, sums, pixels, chunks, groups
        ctx.grid_of_sums = grid_of_sums
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        factors, weight, bias, *maps = ctx.saved_tensors
        given = zip(gradients, maps, strict=True)
        dys = [dy.to(x.dtype).contiguous(memory_format=torch.channels_last) for dy, x in given]
        batch, channels = maps[0].shape[:2]
        parts = weight.new_empty(3, batch, ctx.chunks, channels)
        means = weight.new_empty(2, batch, LEVELS, channels)
        small = weight.new_empty(3, batch * LEVELS, channels)  # gradients of shift, weight and bias, to be added up
        whole, results = room_for(maps)
        with torch.cuda.device_of(weight):
            measure_gradients[(ctx.chunks, batch)](
                *maps, *dys, *ctx.pixels, factors, weight, bias, parts, **ctx.blocks, num_warps=WARPS
            )
            combine_gradients[ctx.grid_of_sums](
                *ctx.pixels, parts, factors, weight, means, small, batch, ctx.groups,
                CHUNK=CHUNK, PARTS=PARTS, **ctx.sums, num_warps=WARPS,
            )  # fmt: skip
            go_back[(ctx.chunks, batch)](
                *maps, *dys, *ctx.pixels, factors, weight, bias, means, whole, **ctx.blocks, num_warps=WARPS
            )
        return None, None, *small.sum(1), *results


def room_for(maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Make one memory for five maps like these, channels-last one after the other; returns it and the maps in it."""
    whole = torch.empty(sum(x.numel() for x in maps), dtype=maps[0].dtype, device=maps[0].device)
    found = []
    for x, part in zip(maps, whole.split([x.numel() for x in maps]), strict=True):
        b, c, h, w = x.shape
        found.append(part.view(b, h, w, c).permute(0, 3, 1, 2))
    return whole, found


GEOMETRY = ["n0", "n1", "n2", "n3", "n4"]  # pixels of a map, whose special values are no reason to compile again


@triton.jit
def locate(chunk, n0, n1, n2, n3, n4, CHUNK: tl.constexpr):
    """Find the level of a chunk, its pixels, the chunk's first pixel, and how many pixels the levels before have."""
    level, count, first, before = chunk * 0, n0, chunk * CHUNK, n0 * 0
    passed = tl.cdiv(n0, CHUNK)
    if chunk >= passed:
        level, count, first, before = chunk * 0 + 1, n1, (chunk - passed) * CHUNK, n0
    passed += tl.cdiv(n1, CHUNK)
    if chunk >= passed:
        level, count, first, before = chunk * 0 + 2, n2, (chunk - passed) * CHUNK, n0 + n1
    passed += tl.cdiv(n2, CHUNK)
    if chunk >= passed:
        level, count, first, before = chunk * 0 + 3, n3, (chunk - passed) * CHUNK, n0 + n1 + n2
    passed += tl.cdiv(n3, CHUNK)
    if chunk >= passed:
        level, count, first, before = chunk * 0 + 4, n4, (chunk - passed) * CHUNK, n0 + n1 + n2 + n3
    return level, count, first, before


@triton.jit
def chosen(level, x0, x1, x2, x3, x4):
    """Return the pointer of a level."""
    x = x0
    if level == 1:
        x = x1
    if level == 2:
        x = x2
    if level == 3:
        x = x3
    if level == 4:
        x = x4
    return x


@triton.jit
def load_pair(values, place, half, inside):
    """Load from a place of the first and of the second half of a memory."""
    return tl.load(values + place, mask=inside, other=0.0), tl.load(values + half + place, mask=inside, other=0.0)


@triton.jit(do_not_specialize=GEOMETRY)
def measure(
    x0, x1, x2, x3, x4,  # [B,H,W,C]
    n0, n1, n2, n3, n4,
    parts,  # float32 [2,B,chunks,C], filled: mean, and sum of squared distances from it
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute mean and deviation of each channel over the pixels of a chunk."""
    chunk, image = tl.program_id(0), tl.program_id(1)
    level, count, first, _ = locate(chunk, n0, n1, n2, n3, n4, CHUNK)
    x = chosen(level, x0, x1, x2, x3, x4) + image.to(tl.int64) * count * C
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    # distances from a value of the channel are as small as its deviation, so that their squares lose nothing
    pivot = tl.load(x + first.to(tl.int64) * C + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)
        known = (row < count)[:, None] & inside[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * C + channel[None, :], mask=known, other=0.0).to(tl.float32)
        value = tl.where(known, value - pivot[None, :], 0.0)
        total += value
        squares += value * value
    size = tl.minimum(CHUNK, count - first).to(tl.float32)
    sums = tl.sum(total, axis=0)
    mean = sums / size
    parts += (image.to(tl.int64) * tl.num_programs(0) + chunk) * C + channel
    tl.store(parts, pivot + mean, mask=inside)
    other = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * C
    tl.store(parts + other, tl.sum(squares, axis=0) - sums * mean, mask=inside)


@triton.jit
def chunks_of(level, n0, n1, n2, n3, n4, CHUNK: tl.constexpr):
    """Return pixels and first chunk of a level, and the number of all chunks."""
    c0, c1, c2 = tl.cdiv(n0, CHUNK), tl.cdiv(n1, CHUNK), tl.cdiv(n2, CHUNK)
    c3, c4 = tl.cdiv(n3, CHUNK), tl.cdiv(n4, CHUNK)
    count, first = n0, 0
    if level == 1:
        count, first = n1, c0
    if level == 2:
        count, first = n2, c0 + c1
    if level == 3:
        count, first = n3, c0 + c1 + c2
    if level == 4:
        count, first = n4, c0 + c1 + c2 + c3
    return count, first, c0 + c1 + c2 + c3 + c4


@triton.jit
def channels_of(part, groups, GROUPS: tl.constexpr, IN_GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channels of some groups, each group with room for WIDTH of them, and which of these there are."""
    column = tl.arange(0, GROUPS * WIDTH)
    group = part * GROUPS + column // WIDTH
    return group * IN_GROUP + column % WIDTH, (group < groups) & (column % WIDTH < IN_GROUP)


@triton.jit
def of_groups(values, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Add up the channels of each group, and give every channel its group's sum: [GROUPS*WIDTH] -> the same."""
    sums = tl.sum(tl.reshape(values, (GROUPS, WIDTH)), axis=1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))


@triton.jit(do_not_specialize=[*GEOMETRY, "batch"])
def combine(
    n0, n1, n2, n3, n4,
    parts,  # float32 [2,B,chunks,C], from `measure`
    shift,  # float32 [C]
    factors,  # float32 [2,B,levels,C], filled: x * first + second is normalized
    batch, groups, eps,
    CHUNK: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, GROUPS: tl.constexpr, IN_GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute, for some groups of a level of an image, how its values are normalized."""
    image, level = tl.program_id(0) // 5, tl.program_id(0) % 5
    count, first, chunks = chunks_of(level, n0, n1, n2, n3, n4, CHUNK)
    channel, inside = channels_of(tl.program_id(1), groups, GROUPS, IN_GROUP, WIDTH)
    parts += (image.to(tl.int64) * chunks + first) * C
    other = batch.to(tl.int64) * chunks * C
    level_chunks = tl.cdiv(count, CHUNK)

    total = tl.zeros((PARTS, GROUPS * WIDTH), tl.float32)
    for start in range(0, level_chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        known = (part < level_chunks)[:, None] & inside[None, :]
        mean = tl.load(parts + part[:, None] * C + channel[None, :], mask=known, other=0.0)
        total += mean * tl.minimum(CHUNK, count - part * CHUNK).to(tl.float32)[:, None]
    own = tl.load(shift + channel, mask=inside, other=0.0)
    mean = tl.where(inside, tl.sum(total, axis=0) / count + own, 0.0)
    mean = of_groups(mean, GROUPS, WIDTH) / IN_GROUP

    total = tl.zeros((PARTS, GROUPS * WIDTH), tl.float32)
    for start in range(0, level_chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        known = (part < level_chunks)[:, None] & inside[None, :]
        place = parts + part[:, None] * C + channel[None, :]
        away = tl.load(place, mask=known, other=0.0) + own[None, :] - mean[None, :]
        away = away * away * tl.minimum(CHUNK, count - part * CHUNK).to(tl.float32)[:, None]
        total += tl.where(known, away + tl.load(place + other, mask=known, other=0.0), 0.0)
    variance = of_groups(tl.sum(total, axis=0), GROUPS, WIDTH) / (count * IN_GROUP).to(tl.float32)
    scale = 1.0 / tl.sqrt(variance + eps)
    factors += tl.program_id(0) * C + channel
    tl.store(factors, scale, mask=inside)
    tl.store(factors + batch * 5 * C, (own - mean) * scale, mask=inside)


@triton.jit(do_not_specialize=GEOMETRY)
def normalize(
    x0, x1, x2, x3, x4,  # [B,H,W,C]
    n0, n1, n2, n3, n4,
    factors,  # float32 [2,B,levels,C], from `combine`
    weight, bias,  # float32 [C]
    results,  # one memory of five [B,H,W,C], filled
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalize the pixels of a chunk, and apply weight, bias and ReLU."""
    chunk, image, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    level, count, first, before = locate(chunk, n0, n1, n2, n3, n4, CHUNK)
    base = image.to(tl.int64) * count * C
    x = chosen(level, x0, x1, x2, x3, x4) + base
    results += before.to(tl.int64) * batch * C + base
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    scale, offset = load_pair(factors, (image * 5 + level) * C + channel, batch * 5 * C, inside)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    b = tl.load(bias + channel, mask=inside, other=0.0)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)
        known = (row < count)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * C + channel[None, :]
        value = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
        value = (value * scale[None, :] + offset[None, :]) * w[None, :] + b[None, :]
        value = tl.where(value < 0, 0.0, value)  # a NaN stays one
        tl.store(results + place, value.to(results.dtype.element_ty), mask=known)


@triton.jit
def before_relu(x, dy, known, scale, offset, w, b):
    """Return normalized values of some pixels, and their gradients before the ReLU; 0 is the gradient of no pixel."""
    value = tl.load(x, mask=known, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    d = tl.load(dy, mask=known, other=0.0).to(tl.float32)
    return value, tl.where(value * w[None, :] + b[None, :] <= 0, 0.0, d)


@triton.jit(do_not_specialize=GEOMETRY)
def measure_gradients(
    x0, x1, x2, x3, x4, dy0, dy1, dy2, dy3, dy4,  # [B,H,W,C]
    n0, n1, n2, n3, n4,
    factors,  # float32 [2,B,levels,C]
    weight, bias,  # float32 [C]
    parts,  # float32 [3,B,chunks,C], filled: sums of dz, of dz times z, of z, with z normalized
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up, over the pixels of a chunk, what the gradient needs of each channel; dz is that before the ReLU."""
    chunk, image, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    level, count, first, _ = locate(chunk, n0, n1, n2, n3, n4, CHUNK)
    base = image.to(tl.int64) * count * C
    x = chosen(level, x0, x1, x2, x3, x4) + base
    dy = chosen(level, dy0, dy1, dy2, dy3, dy4) + base
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    scale, offset = load_pair(factors, (image * 5 + level) * C + channel, batch * 5 * C, inside)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    b = tl.load(bias + channel, mask=inside, other=0.0)
    of_gradient = tl.zeros((ROWS, BLOCK), tl.float32)
    of_product = tl.zeros((ROWS, BLOCK), tl.float32)
    of_value = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)
        known = (row < count)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * C + channel[None, :]
        value, d = before_relu(x + place, dy + place, known, scale, offset, w, b)
        value = tl.where(known, value, 0.0)
        of_gradient += d
        of_product += d * value
        of_value += value
    parts += (image.to(tl.int64) * tl.num_programs(0) + chunk) * C + channel
    other = batch.to(tl.int64) * tl.num_programs(0) * C
    tl.store(parts, tl.sum(of_gradient, axis=0), mask=inside)
    tl.store(parts + other, tl.sum(of_product, axis=0), mask=inside)
    tl.store(parts + 2 * other, tl.sum(of_value, axis=0), mask=inside)


@triton.jit(do_not_specialize=[*GEOMETRY, "batch"])
def combine_gradients(
    n0, n1, n2, n3, n4,
    parts,  # float32 [3,B,chunks,C], from `measure_gradients`
    factors,  # float32 [2,B,levels,C]
    weight,  # float32 [C]
    means,  # float32 [2,B,levels,C], filled: means over a group of dz and of dz times z, with the weight
    small,  # float32 [3,B*levels,C], filled: gradients of shift, weight and bias
    batch, groups,
    CHUNK: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, GROUPS: tl.constexpr, IN_GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute, for some groups of a level of an image, what its values' gradients have in common."""
    image, level = tl.program_id(0) // 5, tl.program_id(0) % 5
    count, first, chunks = chunks_of(level, n0, n1, n2, n3, n4, CHUNK)
    channel, inside = channels_of(tl.program_id(1), groups, GROUPS, IN_GROUP, WIDTH)
    parts += (image.to(tl.int64) * chunks + first) * C
    other = batch.to(tl.int64) * chunks * C
    level_chunks = tl.cdiv(count, CHUNK)
    of_gradient = tl.zeros((PARTS, GROUPS * WIDTH), tl.float32)
    of_product = tl.zeros((PARTS, GROUPS * WIDTH), tl.float32)
    of_value = tl.zeros((PARTS, GROUPS * WIDTH), tl.float32)
    for start in range(0, level_chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        known = (part < level_chunks)[:, None] & inside[None, :]
        place = parts + part[:, None] * C + channel[None, :]
        of_gradient += tl.load(place, mask=known, other=0.0)
        of_product += tl.load(place + other, mask=known, other=0.0)
        of_value += tl.load(place + 2 * other, mask=known, other=0.0)
    gradient, product = tl.sum(of_gradient, axis=0), tl.sum(of_product, axis=0)
    value = tl.sum(of_value, axis=0)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    scale = tl.load(factors + tl.program_id(0) * C + channel, mask=inside, other=0.0)
    size = (count * IN_GROUP).to(tl.float32)
    mean_gradient = of_groups(gradient * w, GROUPS, WIDTH) / size
    mean_product = of_groups(product * w, GROUPS, WIDTH) / size
    means += tl.program_id(0) * C + channel
    tl.store(means, mean_gradient, mask=inside)
    tl.store(means + batch * 5 * C, mean_product, mask=inside)
    small += tl.program_id(0) * C + channel
    of_shift = scale * (gradient * w - mean_gradient * count - mean_product * value)
    tl.store(small, of_shift, mask=inside)
    tl.store(small + batch * 5 * C, product, mask=inside)
    tl.store(small + 2 * batch * 5 * C, gradient, mask=inside)


@triton.jit(do_not_specialize=GEOMETRY)
def go_back(
    x0, x1, x2, x3, x4, dy0, dy1, dy2, dy3, dy4,  # [B,H,W,C]
    n0, n1, n2, n3, n4,
    factors,  # float32 [2,B,levels,C]
    weight, bias,  # float32 [C]
    means,  # float32 [2,B,levels,C], from `combine_gradients`
    results,  # one memory of five [B,H,W,C], filled with the gradients of the maps
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the pixels of a chunk."""
    chunk, image, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    level, count, first, before = locate(chunk, n0, n1, n2, n3, n4, CHUNK)
    base = image.to(tl.int64) * count * C
    x = chosen(level, x0, x1, x2, x3, x4) + base
    dy = chosen(level, dy0, dy1, dy2, dy3, dy4) + base
    results += before.to(tl.int64) * batch * C + base
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    own, half = (image * 5 + level) * C + channel, batch * 5 * C
    scale, offset = load_pair(factors, own, half, inside)
    mean_gradient, mean_product = load_pair(means, own, half, inside)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    b = tl.load(bias + channel, mask=inside, other=0.0)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)
        known = (row < count)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * C + channel[None, :]
        value, d = before_relu(x + place, dy + place, known, scale, offset, w, b)
        dx = scale[None, :] * (d * w[None, :] - mean_gradient[None, :] - value * mean_product[None, :])
        tl.store(results + place, dx.to(results.dtype.element_ty), mask=known)
