// Fake quantization in one pass over memory: x̂ = clip(round(x / s), low, high) · s with low = quant_min - z, high = quant_max - z.
//
// An operand is seen as [repeats][outer][run][inner] with one scale for each pair (outer, inner): a whole tensor is
// [1][1][n][1], channels of an image [N][C][H W][1], channels in the last dim [1][1][rows][C], groups of a weight
// [1][O G][g][k]. Masks have one bit an element, 1 where the gradient passes, in 16-bit words; runs (inner = 1), or rows of inner,
// begin at a word each.
//
// Every result is that of the same operations in torch, in the same order, rounded after each of them
// (compiled with -ffp-contract=off). Plain C interface without torch headers: it compiles in seconds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define LQ_X86 1
#endif

namespace {

enum Variant { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// Elements that one thread takes at a time; a multiple of 16.
constexpr int64_t CHUNK = 1 << 15;
constexpr float MIN_SCALE = 0x1p-100f;

struct Levels {
    float inverse, low, high, scale;
};

struct Table {
    const float *inverse, *low, *high, *scale;
    Levels at(int64_t k) const { return {inverse[k], low[k], high[k], scale[k]}; }
};

struct Sums {
    double scale, zero_point;
};

struct Shape {
    int64_t repeats, outer, run, inner;
};

struct Spread {
    float low, high;
    bool nan;
};

// How the blocks of fake_quantize_blocks.h are quantized. The same numbers stand in kernels.py.
enum Family { MICROEXPONENTS = 0, OCP = 1, NVFP4 = 2, VECTORS = 3 };
enum Mode { FLOOR = 0, RCEIL = 1, CEIL = 2, EVEN = 3 };
struct BlockRule {
    int family, block;
    // Elements that are whole numbers.
    int quant_min, quant_max;
    // Elements that are floats of few bits, the exponent of the smallest normal and of the largest one.
    int mantissa_bits, min_exponent, max_exponent;
    // Of a pair's exponent (MICROEXPONENTS), of a block's scale (VECTORS).
    int scale_bits;
    int mode;
    float max_value;
    // The float above the scales of blocks (NVFP4, VECTORS).
    float coarse;
};
constexpr int LANES = 64, LINE = 256;
constexpr int32_t MAGNITUDE = 0x7FFFFFFF, EXPONENT_FIELD = 0x7F800000;

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

#define LQ_STRING(text) _Pragma(#text)
#ifdef _OPENMP
#define LQ_PARALLEL(elements) LQ_STRING(omp parallel for num_threads(threads) if (threads > 1 && (elements) > CHUNK))
#else
#define LQ_PARALLEL(elements)
#endif

inline float at_least(float x, float bound) { return x < bound ? bound : x; }  // a NaN stays
inline float at_most(float x, float bound) { return x > bound ? bound : x; }

// qparams_from_bounds of lq_plugin/functional/affine.py.
inline float scale_of(float minimum, float maximum, int quant_min, int quant_max, bool affine, float& zero_point) {
    minimum = at_most(minimum, 0.0f);
    maximum = at_least(maximum, 0.0f);
    if (affine) {
        const float steps = static_cast<float>(quant_max - quant_min), low = static_cast<float>(quant_min);
        const float scale = at_least(maximum / steps - minimum / steps, MIN_SCALE);
        zero_point = at_most(at_least(low - std::nearbyintf(minimum / scale), low), static_cast<float>(quant_max));
        return scale;
    }
    zero_point = 0.0f;
    float scale = 0.0f;
    if (quant_max > 0) scale = maximum / static_cast<float>(quant_max);
    if (quant_min < 0) {
        const float other = minimum / static_cast<float>(quant_min);
        scale = std::isnan(other) || other > scale ? other : scale;
    }
    return at_least(scale, MIN_SCALE);
}

inline Levels levels_of(float scale, float zero_point, int quant_min, int quant_max) {
    return {1.0f / scale, static_cast<float>(quant_min) - zero_point, static_cast<float>(quant_max) - zero_point, scale};
}

// Inverse, low and high of each scale. A learned scale acts by its magnitude, a learned zero point rounded.
struct Store {
    std::vector<float> values;
    int64_t count;
    Store(const float* scale, const float* zero_point, int64_t count, int quant_min, int quant_max, bool learned)
        : values(static_cast<size_t>(4 * count)), count(count) {
        for (int64_t k = 0; k < count; ++k) {
            float s = scale[k], z = zero_point[k];
            if (learned) {
                s = at_least(std::fabs(s), MIN_SCALE);
                z = at_most(at_least(std::nearbyintf(z), static_cast<float>(quant_min)), static_cast<float>(quant_max));
            }
            const Levels levels = levels_of(s, z, quant_min, quant_max);
            values[k] = levels.inverse;
            values[count + k] = levels.low;
            values[2 * count + k] = levels.high;
            values[3 * count + k] = levels.scale;
        }
    }
    Table table() const { return {&values[0], &values[count], &values[2 * count], &values[3 * count]}; }
};

namespace portable {
struct V {
    float lane[16];
};
struct Q {
    V inverse, low, high, scale;
};
inline V load(const float* p) {
    V v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
}
inline void store(float* p, const V& v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline V set(float x) {
    V v;
    for (float& lane : v.lane) lane = x;
    return v;
}
inline V quantized(const V& x, const Q& q, unsigned& bits) {
    V y;
    bits = 0;
    for (int i = 0; i < 16; ++i) {
        const float r = std::nearbyintf(x.lane[i] * q.inverse.lane[i]);
        bits |= static_cast<unsigned>(!(r < q.low.lane[i] || r > q.high.lane[i])) << i;
        y.lane[i] = at_most(at_least(r, q.low.lane[i]), q.high.lane[i]) * q.scale.lane[i];
    }
    return y;
}
inline V lower(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
}
inline V upper(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
}
inline bool unordered(const V& x) {
    bool nan = false;
    for (float lane : x.lane) nan |= std::isnan(lane);
    return nan;
}
inline V kept(const V& x, unsigned bits) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = bits >> i & 1 ? x.lane[i] : 0.0f;
    return v;
}
struct Totals {
    double scale[16] = {}, zero_point[16] = {};
    Sums sum() const {
        Sums all{0.0, 0.0};
        for (int i = 0; i < 16; ++i) all.scale += scale[i], all.zero_point += zero_point[i];
        return all;
    }
};
// The gradient of x, and the terms of those of scale and zero point added to `totals`.
template <bool SHIFT>
inline V learned(const V& x, const V& gradient, const Q& q, Totals& totals) {
    V inside;
    for (int i = 0; i < 16; ++i) {
        const float ratio = x.lane[i] * q.inverse.lane[i], rounded = std::nearbyintf(ratio), g = gradient.lane[i];
        const float level = at_most(at_least(rounded, q.low.lane[i]), q.high.lane[i]);
        const bool outside = level != rounded;
        const float term = g * (outside ? level : level - ratio), shift = outside ? g * -q.scale.lane[i] : 0.0f;
        totals.scale[i] += term;
        if (SHIFT) totals.zero_point[i] += shift;
        inside.lane[i] = outside ? 0.0f : g;
    }
    return inside;
}
inline Spread spread(const V& low, const V& high, bool nan) {
    return {*std::min_element(low.lane, low.lane + 16), *std::max_element(high.lane, high.lane + 16), nan};
}
#include "fake_quantize_kernel.h"
#include "fake_quantize_loops.h"
#include "fake_quantize_blocks.h"
}  // namespace portable

#ifdef LQ_X86
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
struct V {
    __m256 a, b;
};
struct Q {
    V inverse, low, high, scale;
};
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const V& v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m256 half(__m256 x, __m256 inverse, __m256 low, __m256 high, __m256 scale, unsigned& bits) {
    const __m256 r = _mm256_round_ps(_mm256_mul_ps(x, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 outside = _mm256_or_ps(_mm256_cmp_ps(r, low, _CMP_LT_OQ), _mm256_cmp_ps(r, high, _CMP_GT_OQ));
    bits = ~static_cast<unsigned>(_mm256_movemask_ps(outside)) & 255u;
    // Of a NaN and a number, max and min give the second.
    return _mm256_mul_ps(_mm256_min_ps(high, _mm256_max_ps(low, r)), scale);
}
inline V quantized(const V& x, const Q& q, unsigned& bits) {
    unsigned first, second;
    const V y{half(x.a, q.inverse.a, q.low.a, q.high.a, q.scale.a, first), half(x.b, q.inverse.b, q.low.b, q.high.b, q.scale.b, second)};
    bits = first | second << 8;
    return y;
}
inline V lower(const V& a, const V& b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
inline V upper(const V& a, const V& b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline bool unordered(const V& x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) != 0; }
inline V kept(const V& x, unsigned bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i a = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    const __m256i b = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits >> 8)), lanes);
    return {_mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, lanes))),
            _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, lanes)))};
}
struct Totals {
    __m256d scale[4], zero_point[4];
    inline Totals() {
        for (int i = 0; i < 4; ++i) scale[i] = zero_point[i] = _mm256_setzero_pd();
    }
    static double sum(const __m256d* parts) {
        double lane[16], all = 0.0;
        for (int i = 0; i < 4; ++i) _mm256_storeu_pd(lane + 4 * i, parts[i]);
        for (double value : lane) all += value;
        return all;
    }
    Sums sum() const { return {sum(scale), sum(zero_point)}; }
};
inline void add(__m256d* totals, __m256 x) {
    totals[0] = _mm256_add_pd(totals[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    totals[1] = _mm256_add_pd(totals[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
template <bool SHIFT>
inline __m256 learned_half(__m256 x, __m256 g, __m256 inverse, __m256 low, __m256 high, __m256 scale, __m256d* scales, __m256d* shifts) {
    const __m256 ratio = _mm256_mul_ps(x, inverse);
    const __m256 rounded = _mm256_round_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 level = _mm256_min_ps(high, _mm256_max_ps(low, rounded));
    const __m256 outside = _mm256_cmp_ps(level, rounded, _CMP_NEQ_UQ);
    add(scales, _mm256_mul_ps(g, _mm256_blendv_ps(_mm256_sub_ps(level, ratio), level, outside)));
    if (SHIFT) add(shifts, _mm256_and_ps(outside, _mm256_mul_ps(g, _mm256_sub_ps(_mm256_set1_ps(-0.0f), scale))));
    return _mm256_andnot_ps(outside, g);
}
template <bool SHIFT>
inline V learned(const V& x, const V& g, const Q& q, Totals& totals) {
    const __m256 a = learned_half<SHIFT>(x.a, g.a, q.inverse.a, q.low.a, q.high.a, q.scale.a, totals.scale, totals.zero_point);
    return {a, learned_half<SHIFT>(x.b, g.b, q.inverse.b, q.low.b, q.high.b, q.scale.b, totals.scale + 2, totals.zero_point + 2)};
}
inline Spread spread(const V& low, const V& high, bool nan) {
    float a[16], b[16];
    store(a, low);
    store(b, high);
    return {*std::min_element(a, a + 16), *std::max_element(b, b + 16), nan};
}
#include "fake_quantize_kernel.h"
#include "fake_quantize_loops.h"
#include "fake_quantize_blocks.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
using V = __m512;
struct Q {
    V inverse, low, high, scale;
};
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set(float x) { return _mm512_set1_ps(x); }
inline V quantized(V x, const Q& q, unsigned& bits) {
    const V r = _mm512_roundscale_ps(_mm512_mul_ps(x, q.inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    bits = static_cast<unsigned>(_mm512_cmp_ps_mask(r, q.low, _CMP_NLT_UQ) & _mm512_cmp_ps_mask(r, q.high, _CMP_NGT_UQ));
    return _mm512_mul_ps(_mm512_min_ps(q.high, _mm512_max_ps(q.low, r)), q.scale);
}
inline V lower(V a, V b) { return _mm512_min_ps(a, b); }
inline V upper(V a, V b) { return _mm512_max_ps(a, b); }
inline bool unordered(V x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
inline V kept(V x, unsigned bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x); }
struct Totals {
    __m512d scale[2], zero_point[2];
    inline Totals() {
        for (int i = 0; i < 2; ++i) scale[i] = zero_point[i] = _mm512_setzero_pd();
    }
    static double sum(const __m512d* parts) {
        double lane[16], all = 0.0;
        for (int i = 0; i < 2; ++i) _mm512_storeu_pd(lane + 8 * i, parts[i]);
        for (double value : lane) all += value;
        return all;
    }
    Sums sum() const { return {sum(scale), sum(zero_point)}; }
};
inline void add(__m512d* totals, V x) {
    totals[0] = _mm512_add_pd(totals[0], _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    totals[1] = _mm512_add_pd(totals[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
template <bool SHIFT>
inline V learned(V x, V g, const Q& q, Totals& totals) {
    const V ratio = _mm512_mul_ps(x, q.inverse);
    const V rounded = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V level = _mm512_min_ps(q.high, _mm512_max_ps(q.low, rounded));
    const __mmask16 outside = _mm512_cmp_ps_mask(level, rounded, _CMP_NEQ_UQ);
    add(totals.scale, _mm512_mul_ps(g, _mm512_mask_mov_ps(_mm512_sub_ps(level, ratio), outside, level)));
    if (SHIFT) add(totals.zero_point, _mm512_maskz_mul_ps(outside, g, _mm512_sub_ps(_mm512_set1_ps(-0.0f), q.scale)));
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~outside), g);
}
inline Spread spread(V low, V high, bool nan) {
    float a[16], b[16];
    store(a, low);
    store(b, high);
    return {*std::min_element(a, a + 16), *std::max_element(b, b + 16), nan};
}
#include "fake_quantize_kernel.h"
#include "fake_quantize_loops.h"
#include "fake_quantize_blocks.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

#ifdef LQ_X86
#define LQ_DISPATCH(call) (variant == AVX512 ? avx512::call : variant == AVX2 ? avx2::call : portable::call)
#else
#define LQ_DISPATCH(call) (portable::call)
#endif

extern "C" {

// The fastest variant this processor runs.
int lq_fake_quantize_best(void) {
#ifdef LQ_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PORTABLE;
}

// x, y: [repeats][outer][run][inner]; scale, zero_point: [outer][inner]. mask may be null.
void lq_fake_quantize(const float* x, float* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t repeats, int64_t outer,
                      int64_t run, int64_t inner, int quant_min, int quant_max, int learned, int variant, int threads) {
    if (repeats * outer * run == 1) {
        // Each scale is for one element (MX): a table at a time that stays in the cache.
        constexpr int64_t PART = 4096;
#pragma omp parallel for num_threads(threads) if (threads > 1 && inner > PART)
        for (int64_t first = 0; first < inner; first += PART) {
            const int64_t n = std::min(PART, inner - first);
            const Store levels(scale + first, zero_point + first, n, quant_min, quant_max, learned != 0);
            LQ_DISPATCH(forward(x + first, y + first, mask ? mask + first / 16 : nullptr, levels.table(), Shape{1, 1, 1, n}, 1));
        }
        return;
    }
    const Store levels(scale, zero_point, outer * inner, quant_min, quant_max, learned != 0);
    const Shape shape{repeats, outer, run, inner};
    LQ_DISPATCH(forward(x, y, mask, levels.table(), shape, threads));
}

// The same for one scale, and the running extremes low[0], high[0] moved to take in those of x.
void lq_fake_quantize_observed(const float* x, float* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t n,
                               int quant_min, int quant_max, float* low, float* high, int variant, int threads) {
    std::vector<Spread> found(static_cast<size_t>(pieces(n, CHUNK)));
    LQ_DISPATCH(observed(x, y, mask, levels_of(*scale, *zero_point, quant_min, quant_max), n, found.data(), threads));
    for (const Spread& spread : found) {
        // A NaN stays: torch's minimum and maximum pass it on.
        if (spread.nan) *low = *high = NAN;
        if (spread.low < *low) *low = spread.low;
        if (spread.high > *high) *high = spread.high;
    }
}

// x, y: [rows][n], each row with the range of its own extremes, which scale, zero_point: [rows] take. mask may be null.
void lq_fake_quantize_rows(const float* x, float* y, uint16_t* mask, float* scale, float* zero_point, int64_t rows, int64_t n, int quant_min,
                           int quant_max, int affine, int variant, int threads) {
    LQ_DISPATCH(rows_with_ranges(x, y, mask, scale, zero_point, rows, n, quant_min, quant_max, affine != 0, threads));
}

// low, high: [rows], the extremes of each row of x: [rows][n].
void lq_row_extremes(const float* x, float* low, float* high, int64_t rows, int64_t n, int variant, int threads) {
    LQ_DISPATCH(row_extremes(x, low, high, rows, n, threads));
}

// x, y: [outer][channels][inner], blocks along the channels. Masks: runs of `inner`, or of `channels` where inner is 1, begin at a word
// each. mask may be null.
void lq_fake_quantize_blocks(const float* x, float* y, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner, const BlockRule* rule,
                             int variant, int threads) {
    LQ_DISPATCH(blocks(x, y, mask, outer, channels, inner, *rule, threads));
}

// result = gradient where the bit is 1, else 0; result may be gradient itself.
void lq_mask_gradient(const float* gradient, float* result, const uint16_t* mask, int64_t runs, int64_t n, int variant, int threads) {
    LQ_DISPATCH(mask_gradient(gradient, result, mask, runs, n, threads));
}

// LSQ's backward pass for inner = 1; result, [outer] scale_gradient and zero_point_gradient without the factor g.
// result and zero_point_gradient may be null.
void lq_learned_backward(const float* x, const float* gradient, float* result, const float* scale, const float* zero_point,
                         double* scale_gradient, double* zero_point_gradient, int64_t repeats, int64_t outer, int64_t run, int quant_min,
                         int quant_max, int variant, int threads) {
    const Store levels(scale, zero_point, outer, quant_min, quant_max, true);
    const int64_t parts = pieces(run, CHUNK);
    std::vector<Sums> found(static_cast<size_t>(repeats * outer * parts));
    LQ_DISPATCH(learned_backward(x, gradient, result, levels.table(), found.data(), Shape{repeats, outer, run, 1}, zero_point_gradient != nullptr, threads));
    std::fill(scale_gradient, scale_gradient + outer, 0.0);
    if (zero_point_gradient) std::fill(zero_point_gradient, zero_point_gradient + outer, 0.0);
    // In the order of memory, so that the number of threads changes nothing.
    for (size_t unit = 0; unit < found.size(); ++unit) {
        const int64_t channel = static_cast<int64_t>(unit) / parts % outer;
        scale_gradient[channel] += found[unit].scale;
        if (zero_point_gradient) zero_point_gradient[channel] += found[unit].zero_point;
    }
}
}
