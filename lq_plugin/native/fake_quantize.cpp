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

// Where the scales of a table's rows come from: one for all, one for each part of a row, or the part's own extremes.
enum Ranges { ONE = 0, GIVEN = 1, OWN = 2 };
// So many rows before its turn a row is asked of memory.
constexpr int64_t AHEAD = 8;
// The rows `index` [count] of table: [rows][parts][n].
struct Rows {
    const float* table;
    const int64_t* index;
    const float *scale, *zero_point;
    int64_t count, parts, n;
    Ranges ranges;
    bool learned;
};

// How the blocks of fake_quantize_blocks.h are quantized. The same numbers stand in kernels.py.
enum Family { MICROEXPONENTS = 0, OCP = 1, NVFP4 = 2, VECTORS = 3 };
enum Mode { FLOOR = 0, RCEIL = 1, CEIL = 2, EVEN = 3, LEAST_ERROR = 4 };
enum Target { SIX = 0, FOUR_OR_SIX = 1 };
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

// A learned scale acts by its magnitude, a learned zero point rounded.
inline Levels levels_of(float scale, float zero_point, int quant_min, int quant_max, bool learned = false) {
    const float least = static_cast<float>(quant_min), most = static_cast<float>(quant_max);
    if (learned) {
        scale = at_least(std::fabs(scale), MIN_SCALE);
        zero_point = at_most(at_least(std::nearbyintf(zero_point), least), most);
    }
    return {1.0f / scale, least - zero_point, most - zero_point, scale};
}

// Inverse, low and high of each scale.
struct Store {
    std::vector<float> values;
    int64_t count;
    Store(const float* scale, const float* zero_point, int64_t count, int quant_min, int quant_max, bool learned)
        : values(static_cast<size_t>(4 * count)), count(count) {
        for (int64_t k = 0; k < count; ++k) {
            const Levels levels = levels_of(scale[k], zero_point[k], quant_min, quant_max, learned);
            values[k] = levels.inverse;
            values[count + k] = levels.low;
            values[2 * count + k] = levels.high;
            values[3 * count + k] = levels.scale;
        }
    }
    Table table() const { return {&values[0], &values[count], &values[2 * count], &values[3 * count]}; }
};

namespace portable {
#include "fake_quantize_portable.h"
#include "fake_quantize_kernel.h"
#include "fake_quantize_loops.h"
#include "fake_quantize_blocks.h"
}  // namespace portable

#ifdef LQ_X86
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "fake_quantize_avx2.h"
#include "fake_quantize_kernel.h"
#include "fake_quantize_loops.h"
#include "fake_quantize_blocks.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "fake_quantize_avx512.h"
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

// y: [count][parts][n], the rows `index` [count] of table: [rows][parts][n], whose parts each have a scale. mask may be null.
// Returns whether each index is one of the table's; y is of no use otherwise.
int lq_fake_quantize_lookup(const float* table, const int64_t* index, float* y, uint16_t* mask, const float* scale, const float* zero_point,
                            int64_t rows, int64_t count, int64_t parts, int64_t n, int ranges, int quant_min, int quant_max, int affine,
                            int learned, int variant, int threads) {
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= rows) return 0;
    const Rows read{table, index, scale, zero_point, count, parts, n, static_cast<Ranges>(ranges), learned != 0};
    LQ_DISPATCH(lookup(read, y, mask, quant_min, quant_max, affine != 0, threads));
    return 1;
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
// result and zero_point_gradient may be null. rounded: see `Band` of lq_plugin/functional/lsq.py.
void lq_learned_backward(const float* x, const float* gradient, float* result, const float* scale, const float* zero_point,
                         double* scale_gradient, double* zero_point_gradient, int64_t repeats, int64_t outer, int64_t run, int quant_min,
                         int quant_max, int rounded, int variant, int threads) {
    const Store levels(scale, zero_point, outer, quant_min, quant_max, true);
    const int64_t parts = pieces(run, CHUNK);
    std::vector<Sums> found(static_cast<size_t>(repeats * outer * parts));
    const bool shift = zero_point_gradient != nullptr;
    const Shape shape{repeats, outer, run, 1};
    LQ_DISPATCH(learned_backward(x, gradient, result, levels.table(), found.data(), shape, shift, rounded != 0, threads));
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
