"""3x3 convolutions on the CPU with a quarter of the multiplications: Winograd F(4x4,3x3) (arXiv 1509.09308).

    use_winograd(model)                               # training, inference: same parameters, same state dict
    FrozenWinogradConv2d(conv, relu=True)             # inference: the weight is transformed once
    conv3x3(x, weight, bias)                          # the function, differentiable
    conv3x3_frozen(x, transform_weight(weight), out_channels, bias, relu=True)

A convolution of stride 1, padding 1, dilation 1, one group. Maps are float32 or bfloat16, any strides in,
channels_last out; arithmetic is float32 throughout.

The map is cut into tiles: 4x4 outputs, from 6x6 inputs d. With matrices B, G, A (they evaluate polynomials at the
points 0, +-5/8, +-3/2, infinity; the points 0, +-1, +-2 of the paper are 4 times less accurate) the outputs are
`A'[(G g G') * (B' d B)]A`: at each of the 36 places a product of matrices, tiles x C times C x O.

The kernels are C++ compiled at first use, and kept in ~/.cache/vovnet_zoo.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


class Float32Conv2d(nn.Conv2d):
    """An nn.Conv2d whose arithmetic is float32 on a CPU under autocast too, which only rounds what comes out.

    Without AMX a CPU multiplies bfloat16 at half the rate of float32. Made by `use_winograd`.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = super()._conv_forward(x.float(), weight, bias)
        return y.to(torch.get_autocast_dtype("cpu"))


class WinogradConv2d(Float32Conv2d):
    """A `Float32Conv2d` in all but the forward of large enough maps on a CPU. Made by `use_winograd`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = winograd_dtype(x)
        if dtype is None:
            return super()._conv_forward(x, weight, bias)
        return conv3x3(x.to(dtype), weight, bias)


class FrozenWinogradConv2d(nn.Module):
    """`conv`, then ReLU if `relu`, for inference: [B,C,H,W] -> [B,O,H,W] of the same dtype.

    Its state dict is empty: the weight is `conv`'s at this moment.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        super().__init__()
        if not is_eligible(conv):
            raise ValueError(f"{conv} is not 3x3 of stride 1, padding 1, dilation 1, one group, 32 channels or more")
        self.relu = relu
        self.out_channels = conv.out_channels
        self.register_buffer("weight", conv.weight.detach().clone(), persistent=False)  # for maps too small to gain
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone(), persistent=False)
        self.transformed = transform_weight(self.weight)  # no buffer: it stays float32 and on the CPU

    def forward(self, x: Tensor) -> Tensor:
        if self.gains(x):
            return conv3x3_frozen(x, self.transformed, self.out_channels, self.bias, self.relu)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = F.conv2d(x, self.weight.to(x.dtype), bias, padding=1)
        return F.relu(x) if self.relu else x

    def gains(self, x: Tensor) -> bool:
        """Whether Winograd computes maps x."""
        return _gains(x, 9)


def use_winograd(model: nn.Module) -> int:
    """Turns, in place, every eligible nn.Conv2d of `model` into a `WinogradConv2d`, and every other into a
    `Float32Conv2d`; returns how many were eligible.

    Parameters, state dict and hooks stay as they are. Not for bfloat16 on a CPU with AMX (`has_amx`): it multiplies
    that many times faster than float32.
    """
    count = 0
    for conv in model.modules():
        if type(conv) is nn.Conv2d:
            conv.__class__ = WinogradConv2d if is_eligible(conv) else Float32Conv2d
            count += is_eligible(conv)
    return count


def has_amx() -> bool:
    """Whether this CPU has units for products of bfloat16 matrices."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def is_eligible(conv: nn.Conv2d) -> bool:
    """Whether Winograd computes this convolution, and it has channels enough to gain."""
    wanted = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == wanted and min(conv.in_channels, conv.out_channels) >= 32


def winograd_dtype(x: Tensor) -> torch.dtype | None:
    """That of the maps if Winograd computes a training convolution of `x`, under the autocast there is; else None."""
    autocast = torch.is_autocast_enabled("cpu")
    if not _gains(x, 48) or (autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return None
    return torch.bfloat16 if autocast else x.dtype


def _gains(x: Tensor, least: int) -> bool:
    """Whether Winograd computes maps `x`, and they have tiles enough to gain over conv2d.

    `least` was measured on two AVX-512 cores: 48 tiles make up for transforming the weight, 9 where that is done.
    """
    batch, _, height, width = x.shape
    tiles = batch * ((height + 3) // 4) * ((width + 3) // 4)
    return x.device.type == "cpu" and x.dtype in DTYPES and tiles >= least


DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # of maps


# ---- operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("vovnet_zoo::conv3x3", mutates_args=(), device_types="cpu")
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)`, or with `transposed` `F.conv_transpose2d` of the same arguments.

    x [B,C,H,W] float32 or bfloat16; weight [O,C,3,3] ([C,O,3,3] if transposed); bias [O]. Returns [B,O,H,W]
    channels_last of x's dtype. Differentiable once; keeps x and weight for backward, nothing else.
    """
    y = empty_output(x, weight.shape[1 if transposed else 0])
    convolve_into(y, x, weight, bias, transposed=transposed)
    return y


@torch.library.custom_op("vovnet_zoo::conv3x3_frozen", mutates_args=(), device_types="cpu")
def conv3x3_frozen(
    x: Tensor, transformed: Tensor, out_channels: int, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`conv3x3`, with ReLU on top if `relu`, of a weight gone through `transform_weight`. Not differentiable."""
    y = empty_output(x, out_channels)
    convolve_into(y, x, transformed, bias, relu)
    return y


@torch.library.custom_op("vovnet_zoo::conv3x3_weight_gradient", mutates_args=(), device_types="cpu")
def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient [O,C,3,3] float32 of the weight, given x [B,C,H,W] and the gradient dy [B,O,H,W] of the output."""
    (batch, channels, height, width), outputs = x.shape, dy.shape[1]
    x, dy = _by_pixel(x), _by_pixel(dy.to(x.dtype))
    blocks = -(-channels // 64) * -(-outputs // 64)  # what a thread sums at a time; few: split the tiles as well
    splits = -(-4 * torch.get_num_threads() // blocks)
    dw = x.new_empty((splits, outputs, channels, 3, 3), dtype=torch.float32)
    sizes = batch, height, width, channels, outputs, x.stride(3), dy.stride(3)
    _call(f"weight_gradient_{DTYPES[x.dtype]}", x, dy, dw, *sizes, splits)
    return dw.sum(0)


def transform_weight(weight: Tensor) -> Tensor:
    """[O,C,3,3] -> `G g G'` [ceil(O/32),36,16*ceil(C/16),32] float32, zeros where O and C do not fill it."""
    out = weight.new_empty(_transformed_size(weight.shape[1], weight.shape[0]), dtype=torch.float32)
    _transform(weight, out, False)
    return out


@conv3x3.register_fake
def _(x, weight, bias=None, transposed=False):
    return empty_output(x, weight.shape[1 if transposed else 0])


@conv3x3_frozen.register_fake
def _(x, transformed, out_channels, bias=None, relu=False):
    return empty_output(x, out_channels)


@weight_gradient.register_fake
def _(x, dy):
    return x.new_empty((dy.shape[1], x.shape[1], 3, 3), dtype=torch.float32)


@register_flop_formula(torch.ops.vovnet_zoo.conv3x3)
def _(x, weight, *_, **__) -> int:  # shapes; of a direct convolution
    return 2 * math.prod(weight) * x[0] * x[2] * x[3]


@register_flop_formula(torch.ops.vovnet_zoo.conv3x3_frozen)
def _(x, transformed, out_channels, *_, **__) -> int:
    return 2 * 9 * out_channels * math.prod(x)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = conv3x3(dy, weight, None, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dw = weight_gradient(dy, x) if ctx.transposed else weight_gradient(x, dy)
        dw = dw.to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:  # shorter where defaults end the arguments
        db = dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db, None


conv3x3.register_autograd(_backward, setup_context=_setup_context)


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
    """`conv3x3` to memory y [B,O,H,W], whose dtype is x's; then ReLU if `relu`.

    The weight may have gone through `transform_weight`. y, x and `positive` may be channels of larger channels_last
    maps. With `add` the result is added to y; where `positive` [B,O,H,W] is not, y becomes 0.
    """
    if x.ndim != 4 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [B,C,H,W] float32 or bfloat16, is {list(x.shape)} {x.dtype}")
    batch, channels, height, width = x.shape
    outputs = y.shape[1]
    size = _transformed_size(channels, outputs)
    if weight.ndim == 4 and weight.shape[3] == 32:  # transformed
        if weight.shape != size or weight.dtype != torch.float32:
            raise ValueError(f"transformed must be {list(size)} float32, is {list(weight.shape)} {weight.dtype}")
        u = weight
    else:
        if weight.ndim == 4 and (takes := weight.shape[0 if transposed else 1]) != channels:
            raise ValueError(f"x has {channels} channels, the weight {list(weight.shape)} takes {takes}")
        u = _call("workspace", math.prod(size))  # kept: a new one costs more than this
        _transform(weight, u, transposed)
    x = _by_pixel(x)
    assert y.dtype == x.dtype and y.stride() == _by_pixel(y).stride()
    assert positive is None or (positive.shape, positive.dtype) == (y.shape, y.dtype) and positive.stride(1) == 1
    bias = None if bias is None else bias.float().contiguous()
    sizes = batch, height, width, channels, outputs, x.stride(3), y.stride(3)
    step = 0 if positive is None else positive.stride(3)
    _call(f"forward_{DTYPES[x.dtype]}", x, u, bias, y, *sizes, positive, step, relu, add)


def _transform(weight: Tensor, out: Tensor | int, transposed: bool) -> None:
    """`weight` to memory `out`; `transposed` swaps O with C, and turns the kernel by 180 degrees."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.device.type != "cpu":
        raise ValueError(f"weight must be [O,C,3,3] on the CPU, is {list(weight.shape)} on {weight.device}")
    weight = weight.detach().float().contiguous()
    sizes, steps = [weight.shape[1], weight.shape[0]], [9, weight.shape[1] * 9]
    if transposed:
        sizes, steps = sizes[::-1], steps[::-1]
    _call("transform_weight", weight, out, *sizes, *steps, -1 if transposed else 1)


def _transformed_size(channels: int, outputs: int) -> tuple[int, int, int, int]:
    return -(-outputs // 32), 36, -(-channels // 16) * 16, 32


def _by_pixel(x: Tensor) -> Tensor:
    """x [B,C,H,W], its pixels at equal distances in memory, the channels of each side by side; copied if need be."""
    distance = x.stride(3)
    if x.stride() == (x.shape[2] * x.shape[3] * distance, 1, x.shape[3] * distance, distance):
        return x
    x = x.permute(0, 2, 3, 1).contiguous()
    return x.view(-1).view(x.shape).permute(0, 3, 1, 2)  # strides of dimensions of size 1 could be any


def empty_output(x: Tensor, outputs: int) -> Tensor:
    shape = (x.shape[0], outputs, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# ---- C++ -------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments: Tensor | int | None) -> int | None:
    """Calls a C++ function with a number of threads, then pointers and integers."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in (torch.get_num_threads(), *arguments)]
    function = getattr(_library(), name)
    function.restype = ctypes.c_ssize_t  # as wide as a pointer
    return function(*map(ctypes.c_ssize_t, values))


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or else compiled (some seconds). `RuntimeError` without a compiler."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    try:  # the macros say which compiler it is, and what "native" means on this machine
        macros = subprocess.run([*command, "-dM", "-E", "-xc++", os.devnull], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"Winograd convolutions need a C++ compiler with OpenMP, and {command[0]!r} is none ({error}); "
            "install g++ (apt install g++), or name one in the environment variable CXX"
        ) from error
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vovnet_zoo"
    path = cache / f"winograd-{hashlib.sha256(SOURCE.encode() + macros).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # other processes may be at it as well
            built = Path(folder) / path.name
            build = subprocess.run([*command, "-xc++", "-", "-o", built], input=SOURCE, capture_output=True, text=True)
            if build.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{build.stderr}")
            built.replace(path)
    return ctypes.CDLL(str(path))  # its OpenMP is torch's, whose symbols are global


SOURCE = r"""
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define INLINE __attribute__((always_inline))
typedef float vec __attribute__((vector_size(64)));  // 16 channels
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t bf16;
typedef bf16 half __attribute__((vector_size(32)));

#ifdef __AVX512F__
constexpr long ROWS = 14, GRADIENT_ROWS = 8;  // of 32 floats each, that the registers hold
#else
constexpr long ROWS = 3, GRADIENT_ROWS = 2;
#endif
constexpr long CACHE = 1 << 17;  // floats of transformed input that a core works on at a time
constexpr long SIDE = 64, STEP = 28;  // a core sums the gradients of SIDE x SIDE channels, STEP tiles at a time
constexpr long PAD = 16;  // floats between matrices, lest powers of two make them share cache lines

// ---- the transforms of input, weight, output, and their transposes for the gradients

template <int R_, int K_> struct Matrix {
    static constexpr int R = R_, K = K_;
    float at[R][K];
    constexpr Matrix<K, R> transpose() const {
        Matrix<K, R> t{};
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < K; ++k) t.at[k][r] = at[r][k];
        return t;
    }
};
constexpr double a = 5. / 8, b = 3. / 2, aa = a * a, bb = b * b, n0 = aa * bb, na = 2 * aa * (aa - bb),
    nb = 2 * bb * (bb - aa);
constexpr Matrix<6, 6> BT{{{n0, 0, -aa - bb, 0, 1, 0}, {0, -a * bb, -bb, a, 1, 0}, {0, a * bb, -bb, -a, 1, 0},
    {0, -b * aa, -aa, b, 1, 0}, {0, b * aa, -aa, -b, 1, 0}, {0, n0, 0, -aa - bb, 0, 1}}};
constexpr Matrix<6, 3> G{{{1 / n0, 0, 0}, {1 / na, a / na, aa / na}, {1 / na, -a / na, aa / na},
    {1 / nb, b / nb, bb / nb}, {1 / nb, -b / nb, bb / nb}, {0, 0, 1}}};
constexpr Matrix<4, 6> AT{{{1, 1, 1, 1, 1, 0}, {0, a, -a, b, -b, 0}, {0, aa, aa, bb, bb, 0},
    {0, a * aa, -a * aa, b * bb, -b * bb, 1}}};
constexpr Matrix<6, 4> A = AT.transpose();
constexpr Matrix<3, 6> GT = G.transpose();

// store(r, s, (M d M')[r][s]) of d[k][l] = load(k, l). Zeros and ones of M cost nothing: all is unrolled.
template <const auto& M, class Load, class Store> static inline INLINE void sandwich(Load load, Store store) {
    constexpr int R = M.R, K = M.K;
    vec t[R][K];
    auto dot = [](int r, auto get) INLINE {
        vec sum = {};
        bool first = true;
        #pragma GCC unroll 6
        for (int k = 0; k < K; ++k)
            if (M.at[r][k] != 0) {
                sum = first ? M.at[r][k] * get(k) : sum + M.at[r][k] * get(k);
                first = false;
            }
        return sum;
    };
    #pragma GCC unroll 6
    for (int l = 0; l < K; ++l) {
        vec d[K];
        #pragma GCC unroll 6
        for (int k = 0; k < K; ++k) d[k] = load(k, l);
        #pragma GCC unroll 6
        for (int r = 0; r < R; ++r) t[r][l] = dot(r, [&](int k) INLINE { return d[k]; });
    }
    #pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
        #pragma GCC unroll 6
        for (int s = 0; s < R; ++s) store(r, s, dot(s, [&](int l) INLINE { return t[r][l]; }));
}

// ---- 16 channels from and to memory; n: how many there are

static inline INLINE vec load(const float* p, long n = 16) {
    vec v = {};
    if (n >= 16) memcpy(&v, p, 64);
    else memcpy(&v, p, 4 * n);
    return v;
}
static inline INLINE vec load(const bf16* p, long n = 16) {
    half h = {};
    if (n >= 16) memcpy(&h, p, 32);
    else memcpy(&h, p, 2 * n);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}
static inline INLINE void store(float* p, vec v, long n = 16) {
    if (n >= 16) memcpy(p, &v, 64);
    else memcpy(p, &v, 4 * n);
}
static inline INLINE void store(bf16* p, vec v, long n = 16) {  // to the nearest, ties to even; NaN stays NaN
    bits u = (bits)v;
    half h = __builtin_convertvector(v == v ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40, half);
    if (n >= 16) memcpy(p, &h, 32);
    else memcpy(p, &h, 2 * n);
}

// Memory of this thread, kept for its next call.
static float* scratch(int slot, size_t floats) {
    struct Buffer {
        float* memory = nullptr;
        size_t size = 0;
        ~Buffer() { free(memory); }
    };
    static thread_local Buffer buffers[4];
    Buffer& x = buffers[slot];
    if (x.size < floats) {
        free(x.memory);
        x.memory = (float*)aligned_alloc(64, (x.size = (floats + 15) / 16 * 16) * 4);
        if (!x.memory) abort();
    }
    return x.memory;
}

// ---- the steps

struct Shape {
    long B, H, W, C, O, x_step, y_step;  // from pixel to pixel
    long rows = (H + 3) / 4, columns = (W + 3) / 4, tiles = B * rows * columns;
    long groups = (C + 15) / 16, panels = (O + 31) / 32;  // of 16 inputs, of 32 outputs
};

// Tile t of map [B,H,W] of pixels `step` apart, its channels from c to `end`, transformed,
// to v[36 of stride `place`][groups of 16 of stride `group`][16].
template <const auto& M, class T>
static void tile_in(const T* map, const Shape& s, long step, long c, long end, long t, float* v, long place,
                    long group) {
    constexpr int K = M.K, border = K == 6;  // 6x6 inputs begin one before the 4x4 outputs
    long x0 = t % s.columns * 4 - border, y0 = t / s.columns % s.rows * 4 - border, image = t / s.columns / s.rows;
    const T* at[K][K];
    for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j) {
            long y = y0 + i, x = x0 + j;
            bool inside = y >= 0 && y < s.H && x >= 0 && x < s.W;
            at[i][j] = inside ? map + ((image * s.H + y) * s.W + x) * step : nullptr;
        }
    for (; c < end; c += 16, v += group)
        sandwich<M>([&](int i, int j) INLINE {
                        if (!at[i][j]) return vec{};
                        if (j >= K - 4) __builtin_prefetch(at[i][j] + 4 * step + c);  // of the next tile
                        return load(at[i][j] + c, end - c);
                    },
                    [&](int i, int j, vec r) INLINE { store(v + (i * 6 + j) * place, r); });
}

// What becomes of outputs: `bias` (or null) is added, negatives become 0 if `relu`, what is in y is added if `add`, and
// where `positive` (or null, pixels `step` apart) is not, they become 0.
template <class T> struct Finish {
    const float* bias;
    bool relu, add;
    const T* positive;
    long step;
};

// Products m[36 of stride `place`] of 16 outputs from o on, transformed, to tile t of y [B,H,W,O].
template <class T>
static void tile_out(const float* m, long place, T* y, const Shape& s, long t, long o, const Finish<T>& f) {
    long x0 = t % s.columns * 4, y0 = t / s.columns % s.rows * 4, image = t / s.columns / s.rows, n = s.O - o;
    long pixel = (image * s.H + y0) * s.W + x0;
    vec bias = f.bias ? load(f.bias + o, n) : vec{};
    sandwich<AT>([&](int i, int j) INLINE { return load(m + (i * 6 + j) * place); },
                 [&](int i, int j, vec r) INLINE {
                     if (y0 + i >= s.H || x0 + j >= s.W) return;
                     long at = pixel + i * s.W + j;
                     r += bias;
                     if (f.relu) r = r < 0 ? vec{} : r;
                     if (f.add) r += load(y + at * s.y_step + o, n);
                     if (f.positive) r = load(f.positive + at * f.step + o, n) > 0 ? r : vec{};
                     store(y + at * s.y_step + o, r, n);
                 });
}

// c[r][0..31] = (or if ADD +=) sum over k of a[r * AR + k * AK] * b[k][0..31], r < R, in `groups` of `inner` k each.
template <int R, int AR, int AK, bool ADD>
static void gemm(const float* a, long a_group, const float* b, long b_k, long b_next, long groups, long inner,
                 float* c) {
    vec sum[R][2] = {};
    if (ADD)
        for (int r = 0; r < R; ++r) sum[r][0] = load(c + r * 32), sum[r][1] = load(c + r * 32 + 16);
    for (long g = 0; g < groups; ++g, a += a_group)
        for (long k = 0; k < inner; ++k, b += b_k) {
            vec b0 = load(b), b1 = load(b + b_next);
            if (!ADD) __builtin_prefetch(b + 32 * 32), __builtin_prefetch(b + 32 * 32 + 16);
            #pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                vec x = a[r * AR + k * AK] - vec{};
                sum[r][0] += x * b0, sum[r][1] += x * b1;
            }
        }
    for (int r = 0; r < R; ++r) store(c + r * 32, sum[r][0]), store(c + r * 32 + 16, sum[r][1]);
}
template <size_t... I> static constexpr auto gemms(std::index_sequence<I...>) {
    return std::array{gemm<I + 1, 16, 1, false>...};
}
static constexpr auto GEMM = gemms(std::make_index_sequence<ROWS>());  // of 1 .. ROWS rows

// Each thread takes a block of tiles, and if there are few, a part of the outputs.
template <class T>
static void forward(long threads, const T* x, const float* u, T* y, const Shape& s, const Finish<T>& finish) {
    if (!s.tiles) return;
    long most = std::clamp(CACHE / (36 * 16 * s.groups), ROWS, 4 * ROWS);
    long blocks = (s.tiles + most - 1) / most, splits = 1;
    if (blocks >= threads) blocks = (blocks + threads - 1) / threads * threads;
    else splits = std::min(s.panels, (threads + blocks - 1) / blocks);
    long size = (s.tiles + blocks - 1) / blocks;
    #pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long block = 0; block < blocks; ++block)
        for (long split = 0; split < splits; ++split) {
            long first = block * size, n = std::min(size, s.tiles - first);
            if (n <= 0) continue;
            long v_place = s.groups * n * 16 + PAD, m_place = n * 32 + PAD;
            float* v = scratch(0, 36 * v_place);  // [36,groups,n,16]
            float* m = scratch(1, 36 * m_place);  // [36,n,32]
            for (long t = 0; t < n; ++t)
                tile_in<BT>(x, s, s.x_step, 0, s.C, first + t, v + t * 16, v_place, n * 16);
            long parts = (n + ROWS - 1) / ROWS, rows = (n + parts - 1) / parts;
            for (long p = split * s.panels / splits; p < (split + 1) * s.panels / splits; ++p) {
                for (long q = 0; q < 36; ++q)
                    for (long r = 0; r < n; r += rows)
                        GEMM[std::min(rows, n - r) - 1](
                            v + q * v_place + r * 16, n * 16, u + (p * 36 + q) * s.groups * 16 * 32, 32, 16,
                            s.groups, 16, m + q * m_place + r * 32);
                for (long t = 0; t < n; ++t)
                    for (long o = p * 32; o < std::min(s.O, p * 32 + 32); o += 16)
                        tile_out(m + t * 32 + o % 32, m_place, y, s, first + t, o, finish);
            }
        }
}

// weight [o * o_step + c * c_step + k * step] (k < 9, backwards if step is -1) to u [panels,36,16*groups,32]
static void transform(long threads, const float* w, float* u, long C, long O, long c_step, long o_step,
                             long step) {
    long rows = (C + 15) / 16 * 16;
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long p = 0; p < (O + 31) / 32; ++p)
        for (long c = 0; c < rows; ++c) {
            float g[9][32] = {};
            if (c < C)
                for (long o = 0; o < std::min(32L, O - p * 32); ++o)
                    for (int k = 0; k < 9; ++k)
                        g[k][o] = w[(p * 32 + o) * o_step + c * c_step + (step > 0 ? k : 8 - k)];
            for (int o = 0; o < 32; o += 16)
                sandwich<G>([&](int i, int j) INLINE { return load(g[i * 3 + j] + o); },
                            [&](int i, int j, vec r) INLINE {
                                store(u + ((p * 36 + i * 6 + j) * rows + c) * 32 + o, r);
                            });
        }
}

// The transpose of `forward` in the weight: dw [splits,O,C,9], each split of a part of the tiles.
// Each thread takes SIDE x SIDE channels, whose sums stay in its cache.
template <class T>
static void weight_gradient(long threads, const T* x, const T* dy, float* dw, const Shape& s, long splits) {
    constexpr long place = SIDE * STEP + PAD, area = SIDE * SIDE;
    #pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
    for (long split = 0; split < splits; ++split)
        for (long c0 = 0; c0 < s.C; c0 += SIDE)
            for (long o0 = 0; o0 < s.O; o0 += SIDE) {
                long c1 = std::min(s.C, c0 + SIDE), o1 = std::min(s.O, o0 + SIDE), n;
                float* v = scratch(0, 36 * place);  // [36,SIDE/16,n,16]
                float* d = scratch(1, 36 * place);  // [36,SIDE/16,n,16]
                float* u = scratch(2, 36 * area);  // [36,SIDE/32,SIDE,32]
                memset(u, 0, 36 * area * 4);
                for (long t0 = split * s.tiles / splits, end = (split + 1) * s.tiles / splits; t0 < end; t0 += n) {
                    n = std::min(STEP, end - t0);
                    for (long t = 0; t < n; ++t) {
                        tile_in<BT>(x, s, s.x_step, c0, c1, t0 + t, v + t * 16, place, n * 16);
                        tile_in<A>(dy, s, s.y_step, o0, o1, t0 + t, d + t * 16, place, n * 16);
                    }
                    for (long q = 0; q < 36; ++q)
                        for (long o = 0; o < o1 - o0; o += 32)
                            for (long c = 0; c < c1 - c0; c += GRADIENT_ROWS)
                                gemm<GRADIENT_ROWS, 1, 16, true>(
                                    v + q * place + c / 16 * n * 16 + c % 16, 0, d + q * place + o * n, 16, n * 16,
                                    1, n, u + q * area + o * SIDE + c * 32);
                }
                for (long c = 0; c < c1 - c0; ++c)
                    for (long o = 0; o < o1 - o0; o += 16) {
                        float g[9][16];
                        sandwich<GT>(
                            [&](int i, int j) INLINE {
                                return load(u + (i * 6 + j) * area + o / 32 * 32 * SIDE + c * 32 + o % 32);
                            },
                            [&](int i, int j, vec r) INLINE { store(g[i * 3 + j], r); });
                        for (long k = 0; k < std::min(16L, o1 - o0 - o); ++k)
                            for (int e = 0; e < 9; ++e)
                                dw[((split * s.O + o0 + o + k) * s.C + c0 + c) * 9 + e] = g[e][k];
                    }
            }
}

extern "C" {
#define FOR_MAPS_OF(T) \
    void forward_##T(long threads, const T* x, const float* u, const float* bias, T* y, long B, long H, long W, \
                     long C, long O, long x_step, long y_step, const T* positive, long step, long relu, long add) { \
        forward(threads, x, u, y, {B, H, W, C, O, x_step, y_step}, Finish<T>{bias, !!relu, !!add, positive, step}); } \
    void weight_gradient_##T(long threads, const T* x, const T* dy, float* dw, long B, long H, long W, long C, \
                             long O, long x_step, long y_step, long splits) { \
        weight_gradient(threads, x, dy, dw, {B, H, W, C, O, x_step, y_step}, splits); }
FOR_MAPS_OF(float)
FOR_MAPS_OF(bf16)
void transform_weight(long threads, const float* w, float* u, long C, long O, long c_step, long o_step, long step) {
    transform(threads, w, u, C, O, c_step, o_step, step);
}
float* workspace(long, long floats) { return scratch(3, floats); }
}
"""
