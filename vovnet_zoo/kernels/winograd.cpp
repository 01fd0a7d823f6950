// 3x3 convolutions (stride 1, padding 1, dilation 1, one group) on a CPU with a quarter of the multiplications:
// Winograd's F(4x4,3x3), arXiv 1509.09308. Maps are float32 or bfloat16, arithmetic is float32.
//
// A map is cut into tiles of 4x4 outputs, which depend on 6x6 inputs d. The matrices B, G, A evaluate polynomials at
// the points 0, +-5/8, +-3/2 and infinity (0, +-1, +-2, the points of the paper, are 4 times less accurate). With a
// kernel g, the outputs are A' [(G g G') * (B' d B)] A. At each of the 36 places of the 6x6 matrices the product is one
// of matrices: [tiles, C] times [C, O].
//
// One source serves every instruction set: a `vec` is as wide as the registers of the set that the compiler may use.
// The operators are at the end of the file.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- vectors ---------------------------------------------------------------------------------------------------

#define INLINE __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a register
constexpr int ROWS = 14, GRADIENT_ROWS = 8;  // rows of a product whose sums stay in the registers
constexpr int LEAST_TILES = 28, MOST_TILES = 28;  // tiles that a thread takes at a time
constexpr int64_t CACHE = 3 << 17;  // floats that stay in the cache of a core (1.5 MiB)
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int ROWS = 6, GRADIENT_ROWS = 4;
constexpr int LEAST_TILES = ROWS, MOST_TILES = 56;
constexpr int64_t CACHE = 0;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int ROWS = 6, GRADIENT_ROWS = 4;
constexpr int LEAST_TILES = ROWS, MOST_TILES = 56;
constexpr int64_t CACHE = 0;
#else
constexpr int W = 4;
constexpr int ROWS = 2, GRADIENT_ROWS = 2;
constexpr int LEAST_TILES = ROWS, MOST_TILES = 56;
constexpr int64_t CACHE = 0;
#endif
constexpr int PANEL = 16;  // outputs whose weights lie side by side, and inputs of a tile that do
constexpr int COLUMNS = std::max(PANEL, 2 * W);  // outputs that a product computes at a time

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t bits __attribute__((vector_size(4 * W)));
typedef uint16_t half __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;

// `count` floats (at most W) from memory; the other places become 0.
inline INLINE vec load(const float* p, int64_t count = W) {
    vec v = {};
    if (count >= W) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, 4 * count);
    return v;
}

inline INLINE vec load(const bf16* p, int64_t count = W) {
    half h = {};
    if (count >= W) memcpy(&h, p, sizeof h);
    else memcpy(&h, p, 2 * count);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

inline INLINE void store(float* p, vec v, int64_t count = W) {
    if (count >= W) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, 4 * count);
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline INLINE void store(bf16* p, vec v, int64_t count = W) {
    bits u = (bits)v, is_number = (bits)(v == v);
    bits rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet_nan = u >> 16 | 0x40;
    half h = __builtin_convertvector((rounded & is_number) | (quiet_nan & ~is_number), half);
    if (count >= W) memcpy(p, &h, sizeof h);
    else memcpy(p, &h, 2 * count);
}

inline INLINE vec where_positive(vec condition, vec v) { return (vec)((bits)(condition > 0) & (bits)v); }

// Calls f(0), .. f(N - 1) with constants, so that the compiler unrolls the loop and knows each index.
template <int N, class F> inline INLINE void unroll(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) INLINE {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

// ---- the transforms ----------------------------------------------------------------------------------------------

template <int R_, int K_> struct Matrix {
    static constexpr int R = R_, K = K_;
    double at[R][K];

    constexpr Matrix<K, R> transpose() const {
        Matrix<K, R> t{};
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < K; ++k) t.at[k][r] = at[r][k];
        return t;
    }
};
constexpr double a = 5. / 8, b = 3. / 2, aa = a * a, bb = b * b;
constexpr double n0 = aa * bb, na = 2 * aa * (aa - bb), nb = 2 * bb * (bb - aa);
constexpr Matrix<6, 6> BT{{{n0, 0, -aa - bb, 0, 1, 0}, {0, -a * bb, -bb, a, 1, 0}, {0, a * bb, -bb, -a, 1, 0},
    {0, -b * aa, -aa, b, 1, 0}, {0, b * aa, -aa, -b, 1, 0}, {0, n0, 0, -aa - bb, 0, 1}}};
constexpr Matrix<6, 3> G{{{1 / n0, 0, 0}, {1 / na, a / na, aa / na}, {1 / na, -a / na, aa / na},
    {1 / nb, b / nb, bb / nb}, {1 / nb, -b / nb, bb / nb}, {0, 0, 1}}};
constexpr Matrix<4, 6> AT{{{1, 1, 1, 1, 1, 0}, {0, a, -a, b, -b, 0}, {0, aa, aa, bb, bb, 0},
    {0, a * aa, -a * aa, b * bb, -b * bb, 1}}};
constexpr Matrix<6, 4> A = AT.transpose();
constexpr Matrix<3, 6> GT = G.transpose();

// The sum over k of M[r][k] d[k], for the k that `FIRST`, `FIRST + STEP`, .. count. Zeros and ones of M cost nothing.
template <const auto& M, int r, int FIRST, int STEP> inline INLINE vec dot(const vec* d) {
    vec sum = {};
    unroll<M.K>([&](auto k) INLINE {
        constexpr float factor = M.at[r][k];
        if constexpr (factor != 0 && k >= FIRST && (k - FIRST) % STEP == 0) sum += factor == 1 ? d[k] : factor * d[k];
    });
    return sum;
}

// out = M d. Rows 1 and 2, and 3 and 4, of a matrix with 6 rows belong to points x and -x: they differ in the sign of
// the odd columns. So do the columns of a matrix with 6 columns and fewer rows, in the sign of the odd rows.
template <const auto& M> inline INLINE void multiply(const vec* d, vec* out) {
    if constexpr (M.R == 6) {
        out[0] = dot<M, 0, 0, 1>(d);
        out[5] = dot<M, 5, 0, 1>(d);
        unroll<2>([&](auto pair) INLINE {
            constexpr int r = 1 + 2 * pair;
            vec even = dot<M, r, 0, 2>(d), odd = dot<M, r, 1, 2>(d);
            out[r] = even + odd, out[r + 1] = even - odd;
        });
    } else {
        vec sums[6] = {d[0], d[1] + d[2], {}, d[3] + d[4], {}, d[5]};
        vec differences[6] = {d[0], d[1] - d[2], {}, d[3] - d[4], {}, d[5]};
        unroll<M.R>([&](auto r) INLINE {
            const vec* x = r % 2 ? differences : sums;
            constexpr float f0 = M.at[r][0], f1 = M.at[r][1], f3 = M.at[r][3], f5 = M.at[r][5];
            vec sum = f1 * x[1] + f3 * x[3];
            if constexpr (f0 != 0) sum += f0 * x[0];
            if constexpr (f5 != 0) sum += f5 * x[5];
            out[r] = sum;
        });
    }
}

// put(r, s, (M d M')[r][s]) of the matrix d[k][l] = get(k, l).
template <const auto& M, class Get, class Put> inline INLINE void sandwich(Get get, Put put) {
    vec columns[M.K][M.R];
    unroll<M.K>([&](auto l) INLINE {
        vec d[M.K];
        unroll<M.K>([&](auto k) INLINE { d[k] = get(k, l); });
        multiply<M>(d, columns[l]);
    });
    unroll<M.R>([&](auto r) INLINE {
        vec d[M.K], out[M.R];
        unroll<M.K>([&](auto l) INLINE { d[l] = columns[l][r]; });
        multiply<M>(d, out);
        unroll<M.R>([&](auto s) INLINE { put(r, s, out[s]); });
    });
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

struct Shape {
    int64_t B, H, W, C, O;
    int64_t x_step, y_step;  // elements from pixel to pixel
    int64_t rows = (H + 3) / 4, columns = (W + 3) / 4, tiles = B * rows * columns;
    int64_t groups = (C + PANEL - 1) / PANEL, panels = (O + PANEL - 1) / PANEL;
};

// Transforms the channels from c to `end` of tile t of a map [B,H,W], whose pixels lie `step` apart, to
// v[36, `place` apart][groups of PANEL channels, `group` apart][PANEL].
template <const auto& M, class T>
void tile_in(const T* map, const Shape& s, int64_t step, int64_t c, int64_t end, int64_t t, float* v, int64_t place,
             int64_t group) {
    constexpr int K = M.K, border = K == 6;  // the 6x6 inputs begin one pixel before the 4x4 outputs
    int64_t x0 = t % s.columns * 4 - border, y0 = t / s.columns % s.rows * 4 - border, image = t / s.columns / s.rows;
    const T* at[K][K];
    for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j) {
            int64_t y = y0 + i, x = x0 + j;
            bool inside = y >= 0 && y < s.H && x >= 0 && x < s.W;
            at[i][j] = inside ? map + ((image * s.H + y) * s.W + x) * step : nullptr;
        }
    for (int64_t first = c; c < end; c += W) {
        float* out = v + (c - first) / PANEL * group + (c - first) % PANEL;
        sandwich<M>([&](int i, int j) INLINE { return at[i][j] ? load(at[i][j] + c, end - c) : vec{}; },
                    [&](int i, int j, vec r) INLINE { store(out + (i * 6 + j) * place, r); });
        if (end - c < PANEL - (c - first) % PANEL)  // the rest of the last group is multiplied too
            for (int64_t rest = c + W; (rest - first) % PANEL; rest += W)
                for (int q = 0; q < 36; ++q) store(out + (rest - c) + q * place, vec{});
    }
}

// What becomes of an output after the convolution, in this order.
template <class T> struct Finish {
    const float* bias;  // [O] or null: is added
    bool relu;  // negatives become 0
    bool add;  // what is in the memory of the output is added
    const T* positive;  // null, or a map with pixels `step` apart: where it is not positive, the output becomes 0
    int64_t step;
};

// Transforms the products m[36, `place` apart] of the outputs o to o + W, and writes them to tile t of y [B,H,W,O].
template <class T>
void tile_out(const float* m, int64_t place, T* y, const Shape& s, int64_t t, int64_t o, const Finish<T>& f) {
    int64_t x0 = t % s.columns * 4, y0 = t / s.columns % s.rows * 4, image = t / s.columns / s.rows, n = s.O - o;
    int64_t pixel = (image * s.H + y0) * s.W + x0;
    vec bias = f.bias ? load(f.bias + o, n) : vec{};
    sandwich<AT>([&](int i, int j) INLINE { return load(m + (i * 6 + j) * place); },
                 [&](int i, int j, vec r) INLINE {
                     if (y0 + i >= s.H || x0 + j >= s.W) return;
                     int64_t at = pixel + i * s.W + j;
                     r += bias;
                     if (f.relu) r = r < 0 ? vec{} : r;  // NaN stays
                     if (f.add) r += load(y + at * s.y_step + o, n);
                     if (f.positive) r = where_positive(load(f.positive + at * f.step + o, n), r);
                     store(y + at * s.y_step + o, r, n);
                 });
}

// ---- products of matrices ------------------------------------------------------------------------------------------

// c[r][0 .. N*W) = (if ADD: +=) the sum over k of a[r * A_ROW + k * A_K] * b[k][0 .. N*W), in `groups` groups of `inner`
// values of k. A row of b has `b_k` floats; after PANEL columns b goes on `b_next` floats further. Unless ADD, b is large
// and is fetched into the cache two groups ahead; `next` is the b of the product that follows.
template <int R, int N, int A_ROW, int A_K, bool ADD>
void gemm(const float* a, int64_t a_group, const float* b, int64_t b_k, int64_t b_next, int64_t groups, int64_t inner,
          float* c, int64_t c_row, const float* next = nullptr) {
    vec sum[R][N] = {};
    if constexpr (ADD)
        unroll<R>([&](auto r) INLINE { unroll<N>([&](auto j) INLINE { sum[r][j] = load(c + r * c_row + j * W); }); });
    for (int64_t g = 0; g < groups; ++g, a += a_group) {
        const float* ahead = g + 2 < groups ? b + 2 * inner * b_k : next + (g + 2 - groups) * inner * b_k;
        for (int64_t k = 0; k < inner; ++k, b += b_k) {
            if constexpr (!ADD)
                unroll<N * W / PANEL>([&](auto j) INLINE { __builtin_prefetch(ahead + k * b_k + j * b_next); });
            vec row[N];
            unroll<N>([&](auto j) INLINE { row[j] = load(b + j * W / PANEL * b_next + j * W % PANEL); });
            unroll<R>([&](auto r) INLINE {
                vec x = a[r * A_ROW + k * A_K] - vec{};
                unroll<N>([&](auto j) INLINE { sum[r][j] += x * row[j]; });
            });
        }
    }
    unroll<R>([&](auto r) INLINE { unroll<N>([&](auto j) INLINE { store(c + r * c_row + j * W, sum[r][j]); }); });
}

// Products of 1 .. ROWS tiles with N vectors of outputs.
template <int N> constexpr auto FORWARD = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{gemm<I + 1, N, PANEL, 1, false>...};
}(std::make_integer_sequence<int, ROWS>{});

// ---- threads and their memory ----------------------------------------------------------------------------------------

// Memory of this thread, kept for its next call: a new one costs more than what is computed in it.
float* scratch(int slot, size_t floats) {
    struct Buffer {
        float* memory = nullptr;
        size_t size = 0;
        ~Buffer() { free(memory); }
    };
    static thread_local Buffer buffers[4];
    Buffer& x = buffers[slot];
    if (x.size < floats) {
        free(x.memory);
        x.size = (floats + 15) / 16 * 16;
        x.memory = (float*)aligned_alloc(64, x.size * 4);
        if (!x.memory) x.size = 0;
        STD_TORCH_CHECK(x.memory, "no memory for ", floats * 4, " bytes");
    }
    return x.memory;
}

// Calls work(0), .. work(count - 1). Thread i begins with item i, so that what it wrote in one call is in its cache in
// the next; then each thread takes the next item when it is free.
template <class F> void share_out(int64_t count, const F& work) {
    int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
    std::atomic<int64_t> next{threads};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(i);
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    });
}

// ---- the kernels -------------------------------------------------------------------------------------------------------

// y = the convolution of x with transformed weights u [36,panels,16*groups,16]. A thread takes a block of tiles, and a
// part of the panels if there are few tiles.
template <class T> void convolve(const T* x, const float* u, T* y, const Shape& s, const Finish<T>& finish) {
    if (!s.tiles) return;
    // A block reads all of u once, so the larger u is, the more tiles share a reading.
    int64_t depth = s.groups * PANEL, least = std::max<int64_t>(LEAST_TILES, (1 << 16) / (36 * depth));
    int64_t most = std::clamp<int64_t>(s.C * s.O / 1024, std::min<int64_t>(least, MOST_TILES), MOST_TILES);
    int64_t threads = torch::stable::get_num_threads();
    int64_t blocks = std::max((s.tiles + most - 1) / most, std::min(threads, (s.tiles + ROWS - 1) / ROWS));
    if (blocks >= threads) blocks = (blocks + threads - 1) / threads * threads;
    int64_t size = (s.tiles + blocks - 1) / blocks;
    blocks = (s.tiles + size - 1) / size;
    int64_t splits = std::min(s.panels, (threads + blocks - 1) / blocks);
    share_out(blocks * splits, [&](int64_t item) {
        int64_t first = item / splits * size, n = std::min(size, s.tiles - first), split = item % splits;
        int64_t p0 = split * s.panels / splits, p1 = (split + 1) * s.panels / splits;
        // If v stays in the cache, m does too where it is of few panels at a time. Else v is read once for all panels.
        int64_t wide = 36 * depth * (n + COLUMNS) <= CACHE ? COLUMNS / PANEL : p1 - p0;
        int64_t v_place = n * depth + 16, m_row = wide * PANEL, m_place = n * m_row + 16;
        float* v = scratch(0, 36 * v_place);  // [36,groups,n,16]; the 16 keep places from sharing cache lines
        float* m = scratch(1, 36 * m_place);  // [36,n,wide,16]
        for (int64_t t = 0; t < n; ++t)
            tile_in<BT>(x, s, s.x_step, 0, s.C, first + t, v + t * PANEL, v_place, n * PANEL);
        int64_t parts = (n + ROWS - 1) / ROWS, rows = (n + parts - 1) / parts;
        for (int64_t w0 = p0, w1; w0 < p1; w0 = w1) {
            w1 = std::min(p1, w0 + wide);
            for (int64_t q = 0; q < 36; ++q)
                for (int64_t p = w0, p_next; p < w1; p = p_next) {
                    p_next = p + COLUMNS / PANEL;
                    auto& products = p_next <= w1 ? FORWARD<COLUMNS / W> : FORWARD<PANEL / W>;
                    const float* b = u + (q * s.panels + p) * depth * PANEL;
                    int64_t after = p_next < w1 ? q * s.panels + p_next : (q + 1) * s.panels + w0;
                    for (int64_t r = 0; r < n; r += rows)
                        products[std::min(rows, n - r) - 1](
                            v + q * v_place + r * PANEL, n * PANEL, b, PANEL, depth * PANEL, s.groups, PANEL,
                            m + q * m_place + r * m_row + (p - w0) * PANEL, m_row, u + after * depth * PANEL);
                }
            for (int64_t t = 0; t < n; ++t)
                for (int64_t o = w0 * PANEL; o < std::min(s.O, w1 * PANEL); o += W)
                    tile_out(m + t * m_row + o - w0 * PANEL, m_place, y, s, first + t, o, finish);
        }
    });
}

// Transforms the weight [O,C,3,3], or with `transposed` the weight [C,O,3,3] turned by 180 degrees, to
// u [36,panels,16*groups,16], with zeros where O and C do not fill it.
void transform(const float* weight, float* u, int64_t C, int64_t O, bool transposed) {
    int64_t depth = (C + PANEL - 1) / PANEL * PANEL, panels = (O + PANEL - 1) / PANEL;
    int64_t c_step = transposed ? 9 * O : 9, o_step = transposed ? 9 : 9 * C;
    auto block = [&](int64_t item) {
        int64_t p = item / (depth / PANEL), c0 = item % (depth / PANEL) * PANEL;
        int64_t o0 = p * PANEL, c1 = std::min<int64_t>(PANEL, C - c0), o1 = std::min<int64_t>(PANEL, O - o0);
        const float* from = weight + c0 * c_step + o0 * o_step;
        float g[PANEL][9][PANEL] = {};
        if (transposed)  // either way the weight is read in the order of memory
            for (int64_t c = 0; c < c1; ++c)
                for (int64_t o = 0; o < o1; ++o)
                    for (int k = 0; k < 9; ++k) g[c][8 - k][o] = from[c * c_step + o * o_step + k];
        else
            for (int64_t o = 0; o < o1; ++o)
                for (int64_t c = 0; c < c1; ++c)
                    for (int k = 0; k < 9; ++k) g[c][k][o] = from[c * c_step + o * o_step + k];
        for (int64_t c = 0; c < PANEL; ++c)
            for (int o = 0; o < PANEL; o += W)
                sandwich<G>([&](int i, int j) INLINE { return load(g[c][i * 3 + j] + o); },
                            [&](int i, int j, vec r) INLINE {
                                store(u + (((i * 6 + j) * panels + p) * depth + c0 + c) * PANEL + o, r);
                            });
    };
    int64_t count = panels * depth / PANEL, threads = torch::stable::get_num_threads();
    share_out(threads, [&](int64_t part) {  // neighbours by one thread, as `convolve` reads them
        for (int64_t i = part * count / threads; i < (part + 1) * count / threads; ++i) block(i);
    });
}

constexpr int64_t SIDE = 64, STEP = 28;  // a thread sums the gradients of SIDE x SIDE channels, STEP tiles at a time

// The transpose of `convolve` in the weight: dw [splits,O,C,3,3], each split of a part of the tiles. The sums of a
// thread stay in its cache.
template <class T> void weight_gradient(const T* x, const T* dy, float* dw, const Shape& s, int64_t splits) {
    constexpr int64_t place = SIDE * STEP + 16, area = SIDE * SIDE;
    int64_t c_blocks = (s.C + SIDE - 1) / SIDE, o_blocks = (s.O + SIDE - 1) / SIDE;
    share_out(splits * c_blocks * o_blocks, [&](int64_t item) {
        int64_t o0 = item % o_blocks * SIDE, c0 = item / o_blocks % c_blocks * SIDE, split = item / o_blocks / c_blocks;
        int64_t c1 = std::min(s.C, c0 + SIDE), o1 = std::min(s.O, o0 + SIDE), n;
        float* v = scratch(0, 36 * place);  // [36,SIDE/16,n,16]
        float* d = scratch(1, 36 * place);  // [36,SIDE/16,n,16]
        float* u = scratch(2, 36 * area);  // [36,SIDE/COLUMNS,SIDE,COLUMNS]
        memset(u, 0, 36 * area * 4);
        memset(d, 0, 36 * place * 4);  // a product may read one group more than there is
        for (int64_t t0 = split * s.tiles / splits, end = (split + 1) * s.tiles / splits; t0 < end; t0 += n) {
            n = std::min(STEP, end - t0);
            for (int64_t t = 0; t < n; ++t) {
                tile_in<BT>(x, s, s.x_step, c0, c1, t0 + t, v + t * PANEL, place, n * PANEL);
                tile_in<A>(dy, s, s.y_step, o0, o1, t0 + t, d + t * PANEL, place, n * PANEL);
            }
            for (int64_t q = 0; q < 36; ++q)
                for (int64_t o = 0; o < o1 - o0; o += COLUMNS)
                    for (int64_t c = 0; c < c1 - c0; c += GRADIENT_ROWS)
                        gemm<GRADIENT_ROWS, COLUMNS / W, 1, PANEL, true>(
                            v + q * place + c / PANEL * n * PANEL + c % PANEL, 0, d + q * place + o * n, PANEL,
                            n * PANEL, 1, n, u + q * area + o * SIDE + c * COLUMNS, COLUMNS);
        }
        for (int64_t c = 0; c < c1 - c0; ++c)
            for (int64_t o = 0; o < o1 - o0; o += W) {
                float g[9][W];
                sandwich<GT>(
                    [&](int i, int j) INLINE {
                        return load(u + (i * 6 + j) * area + o / COLUMNS * COLUMNS * SIDE + c * COLUMNS + o % COLUMNS);
                    },
                    [&](int i, int j, vec r) INLINE { store(g[i * 3 + j], r); });
                for (int64_t k = 0; k < std::min<int64_t>(W, o1 - o0 - o); ++k)
                    for (int e = 0; e < 9; ++e) dw[((split * s.O + o0 + o + k) * s.C + c0 + c) * 9 + e] = g[e][k];
            }
    });
}

// ---- operators ---------------------------------------------------------------------------------------------------------

std::string describe(const Tensor& x) {
    std::string text = "[";
    for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
    return text + "]";
}

void check_map(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), name, " must be [B,C,H,W] on the CPU, is ", describe(x));
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, name,
                    " must be float32 or bfloat16");
}

// How many elements the pixels of a map [B,C,H,W] are apart in memory, if all have the same distance and the channels
// of a pixel lie side by side; else nothing.
std::optional<int64_t> pixel_step(const Tensor& x) {
    int64_t B = x.size(0), C = x.size(1), H = x.size(2), W_ = x.size(3);
    if (C > 1 && x.stride(1) != 1) return {};
    int64_t step = W_ > 1 ? x.stride(3) : H > 1 ? x.stride(2) : B > 1 ? x.stride(0) : C;
    bool even = (H == 1 || x.stride(2) == W_ * step) && (B == 1 || x.stride(0) == H * W_ * step);
    return even ? std::optional(step) : std::nullopt;
}

// A map whose pixels have a `pixel_step`: x itself, or a copy.
struct Pixels {
    Tensor map;
    int64_t step;

    explicit Pixels(const Tensor& x) : map(x), step(x.size(1)) {
        if (auto found = pixel_step(x)) step = *found;
        else map = torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
    }
};

Tensor empty_map(const Tensor& like, int64_t channels) {
    return torch::stable::empty({like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type(), std::nullopt,
                                like.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor as_float(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)); }

void check_weight(const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.is_cpu(),
                    "weight must be [O,C,3,3] on the CPU, is ", describe(weight));
}

std::array<int64_t, 4> transformed_size(int64_t C, int64_t O) {
    return {36, (O + PANEL - 1) / PANEL, (C + PANEL - 1) / PANEL * PANEL, PANEL};
}

Tensor transform_weight(const Tensor& weight) {
    check_weight(weight);
    Tensor w = as_float(weight);
    auto size = transformed_size(w.size(1), w.size(0));
    Tensor u = torch::stable::new_empty(w, {size.data(), size.size()});
    transform(w.const_data_ptr<float>(), u.mutable_data_ptr<float>(), w.size(1), w.size(0), false);
    return u;
}

template <class T>
void convolve_typed(const Tensor& y, const Pixels& x, const float* u, const float* bias, bool relu, bool add,
                    const std::optional<Tensor>& positive) {
    Shape s{x.map.size(0), x.map.size(2), x.map.size(3), x.map.size(1), y.size(1), x.step, *pixel_step(y)};
    Finish<T> finish{bias, relu, add, nullptr, 0};
    if (positive) finish.positive = (const T*)positive->const_data_ptr(), finish.step = *pixel_step(*positive);
    convolve((const T*)x.map.const_data_ptr(), u, (T*)y.mutable_data_ptr(), s, finish);
}

// `weight` is [O,C,3,3] ([C,O,3,3] if `transposed`), or has gone through `transform_weight`.
void conv3x3_out(const Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 bool transposed, bool relu, bool add, const std::optional<Tensor>& positive) {
    check_map(x, "x");
    int64_t C = x.size(1), O = y.size(1);
    STD_TORCH_CHECK(y.dim() == 4 && y.size(0) == x.size(0) && y.size(2) == x.size(2) && y.size(3) == x.size(3) &&
                    y.scalar_type() == x.scalar_type() && pixel_step(y),
                    "y must be [B,O,H,W] in channels_last of x's dtype, is ", describe(y), " for x ", describe(x));
    if (bias) STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == O, "bias must be [", O, "], is ", describe(*bias));
    if (positive)
        STD_TORCH_CHECK(describe(*positive) == describe(y) && positive->scalar_type() == y.scalar_type() &&
                        pixel_step(*positive), "positive must be like y ", describe(y), ", is ", describe(*positive));
    const float* u;
    auto size = transformed_size(C, O);
    if (weight.dim() == 4 && weight.size(0) == 36 && weight.size(3) == PANEL) {
        for (int i = 0; i < 4; ++i)
            STD_TORCH_CHECK(weight.size(i) == size[i], "the transformed weight must be [36, ", size[1], ", ", size[2],
                            ", 16] for ", C, " and ", O, " channels, is ", describe(weight));
        STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.is_cpu(),
                        "the transformed weight must be contiguous float32");
        u = weight.const_data_ptr<float>();
    } else {
        check_weight(weight);
        STD_TORCH_CHECK(weight.size(transposed ? 0 : 1) == C && weight.size(transposed ? 1 : 0) == O, "x has ", C,
                        " channels, which the weight ", describe(weight), " does not take");
        float* memory = scratch(3, size[0] * size[1] * size[2] * size[3]);
        transform(as_float(weight).const_data_ptr<float>(), memory, C, O, transposed);
        u = memory;
    }
    std::optional<Tensor> b;
    if (bias) b = as_float(*bias);
    const float* shift = b ? b->const_data_ptr<float>() : nullptr;
    Pixels pixels(x);
    if (x.scalar_type() == ScalarType::Float) convolve_typed<float>(y, pixels, u, shift, relu, add, positive);
    else convolve_typed<bf16>(y, pixels, u, shift, relu, add, positive);
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
    check_map(x, "x");
    check_weight(weight);
    Tensor y = empty_map(x, weight.size(transposed ? 1 : 0));
    conv3x3_out(y, x, weight, bias, transposed, false, false, {});
    return y;
}

Tensor conv3x3_frozen(const Tensor& x, const Tensor& transformed, int64_t out_channels,
                      const std::optional<Tensor>& bias, bool relu) {
    check_map(x, "x");
    Tensor y = empty_map(x, out_channels);
    conv3x3_out(y, x, transformed, bias, false, relu, false, {});
    return y;
}

Tensor conv3x3_weight_gradient(const Tensor& x, const Tensor& dy) {
    check_map(x, "x");
    STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == x.size(0) && dy.size(2) == x.size(2) && dy.size(3) == x.size(3),
                    "dy must be [B,O,H,W] for x ", describe(x), ", is ", describe(dy));
    Pixels given(x), gradient(torch::stable::to(dy, x.scalar_type()));
    int64_t C = x.size(1), O = dy.size(1);
    int64_t blocks = ((C + SIDE - 1) / SIDE) * ((O + SIDE - 1) / SIDE);  // few: each is split into parts of the tiles
    int64_t splits = (4 * torch::stable::get_num_threads() + blocks - 1) / blocks;
    Tensor dw = torch::stable::empty({splits, O, C, 3, 3}, ScalarType::Float, std::nullopt, x.device());
    Shape s{x.size(0), x.size(2), x.size(3), C, O, given.step, gradient.step};
    float* out = dw.mutable_data_ptr<float>();
    if (x.scalar_type() == ScalarType::Float)
        weight_gradient((const float*)given.map.const_data_ptr(), (const float*)gradient.map.const_data_ptr(), out, s,
                        splits);
    else
        weight_gradient((const bf16*)given.map.const_data_ptr(), (const bf16*)gradient.map.const_data_ptr(), out, s,
                        splits);
    int64_t first = 0;
    return torch::stable::sum(dw, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vovnet_zoo, m) {
    m.def("conv3x3_transform_weight(Tensor weight) -> Tensor");
    m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias=None, bool transposed=False) -> Tensor");
    m.def("conv3x3_frozen(Tensor x, Tensor transformed, int out_channels, Tensor? bias=None, bool relu=False) -> Tensor");
    m.def("conv3x3_out(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, bool transposed, bool relu, bool add, "
          "Tensor? positive) -> ()");
    m.def("conv3x3_weight_gradient(Tensor x, Tensor dy) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vovnet_zoo, CPU, m) {
    m.impl("conv3x3_transform_weight", TORCH_BOX(&transform_weight));
    m.impl("conv3x3", TORCH_BOX(&conv3x3));
    m.impl("conv3x3_frozen", TORCH_BOX(&conv3x3_frozen));
    m.impl("conv3x3_out", TORCH_BOX(&conv3x3_out));
    m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}
