// Integers of a tensor and back, in one pass over memory each: levels as one byte, and what was not clipped as one bit an element
// (16-bit words, the first element lowest). The arithmetic is that of native/fake_quantize.cpp: r = round(x / s) half to even.
//
// Plain C interface without torch headers: it compiles in seconds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define LQ_X86 1
#define LQ_AVX2 __attribute__((target("avx2")))
#define LQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

namespace {

// Elements that one thread takes at a time; a multiple of 16.
constexpr int64_t CHUNK = 1 << 15;
constexpr float MIN_SCALE = 0x1p-100f;

enum Variant { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

struct Span {
    float low = INFINITY, high = -INFINITY;
    bool nan = false;
};

struct Grid {
    float inverse, low, high, shift;  // level = clip(round(x · inverse), low, high) + shift
};

inline float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

inline void add(Span& span, const Span& other) {
    span.low = std::min(span.low, other.low);
    span.high = std::max(span.high, other.high);
    span.nan |= other.nan;
}

Span quantize_scalar(const float* x, uint8_t* q, uint16_t* mask, int64_t n, const Grid& grid) {
    Span span;
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i];
        if (v < span.low) span.low = v;
        if (v > span.high) span.high = v;
        span.nan |= std::isnan(v);
        const float r = std::nearbyintf(v * grid.inverse);
        if (mask) {
            if (i % 16 == 0) mask[i / 16] = 0;
            mask[i / 16] |= static_cast<uint16_t>(!(r < grid.low || r > grid.high)) << (i % 16);
        }
        q[i] = static_cast<uint8_t>(static_cast<int>(std::isnan(r) ? 0.0f : clip(r, grid.low, grid.high) + grid.shift));
    }
    return span;
}

Span extremes_scalar(const float* x, int64_t n) {
    Span span;
    for (int64_t i = 0; i < n; ++i) {
        if (x[i] < span.low) span.low = x[i];
        if (x[i] > span.high) span.high = x[i];
        span.nan |= std::isnan(x[i]);
    }
    return span;
}

void dequantize_scalar(const uint8_t* q, float* y, int64_t n, float zero_point, float scale) {
    for (int64_t i = 0; i < n; ++i) y[i] = (static_cast<float>(q[i]) - zero_point) * scale;
}

void keep_scalar(float* gradient, const uint16_t* mask, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!(mask[i / 16] >> (i % 16) & 1)) gradient[i] = 0.0f;
}

#ifdef LQ_X86
struct Extremes {
    __m256 low, high, nan;
    LQ_AVX2 Extremes() : low(_mm256_set1_ps(INFINITY)), high(_mm256_set1_ps(-INFINITY)), nan(_mm256_setzero_ps()) {}
};

LQ_AVX2 inline void take(Extremes& all, __m256 v) {
    // The second operand comes back where one is a NaN.
    all.low = _mm256_min_ps(v, all.low);
    all.high = _mm256_max_ps(v, all.high);
    all.nan = _mm256_or_ps(all.nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

LQ_AVX2 inline Span span_of(const Extremes& all) {
    float low[8], high[8];
    _mm256_storeu_ps(low, all.low);
    _mm256_storeu_ps(high, all.high);
    return {*std::min_element(low, low + 8), *std::max_element(high, high + 8), _mm256_movemask_ps(all.nan) != 0};
}

// Levels of eight elements as 32-bit numbers whose low byte counts, and the bits of what was not clipped.
LQ_AVX2 inline __m256i levels_avx2(__m256 v, __m256 inverse, __m256 low, __m256 high, __m256i shift, unsigned& bits) {
    const __m256 r = _mm256_round_ps(_mm256_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 c = _mm256_min_ps(_mm256_max_ps(r, low), high);
    bits = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(c, r, _CMP_EQ_OQ)));
    return _mm256_and_si256(_mm256_add_epi32(_mm256_cvtps_epi32(c), shift), _mm256_set1_epi32(255));
}

LQ_AVX2 Span quantize_avx2(const float* x, uint8_t* q, uint16_t* mask, int64_t n, const Grid& grid) {
    const __m256 inverse = _mm256_set1_ps(grid.inverse), low = _mm256_set1_ps(grid.low), high = _mm256_set1_ps(grid.high);
    const __m256i shift = _mm256_set1_epi32(static_cast<int>(grid.shift));
    Extremes all;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        take(all, a);
        take(all, b);
        unsigned first, second;
        const __m256i p = levels_avx2(a, inverse, low, high, shift, first), r = levels_avx2(b, inverse, low, high, shift, second);
        if (mask) mask[i / 16] = static_cast<uint16_t>(first | second << 8);
        // Packing works on halves of registers: their order is put right in between.
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(p, r), 0xD8);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), bytes);
    }
    Span span = span_of(all);
    if (i < n) add(span, quantize_scalar(x + i, q + i, mask ? mask + i / 16 : nullptr, n - i, grid));
    return span;
}

LQ_AVX2 Span extremes_avx2(const float* x, int64_t n) {
    Extremes all;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) take(all, _mm256_loadu_ps(x + i));
    Span span = span_of(all);
    add(span, extremes_scalar(x + i, n - i));
    return span;
}

LQ_AVX2 void dequantize_avx2(const uint8_t* q, float* y, int64_t n, float zero_point, float scale) {
    const __m256 z = _mm256_set1_ps(zero_point), s = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i)));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(u), z), s));
    }
    dequantize_scalar(q + i, y + i, n - i, zero_point, scale);
}

LQ_AVX2 void keep_avx2(float* gradient, const uint16_t* mask, int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const unsigned clipped = static_cast<uint16_t>(~mask[i / 16]);
        // Where nothing was clipped nothing is written.
        for (int half = 0; clipped && half < 2; ++half) {
            const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(clipped >> 8 * half)), lanes);
            _mm256_maskstore_ps(gradient + i + 8 * half, _mm256_cmpeq_epi32(bits, lanes), _mm256_setzero_ps());
        }
    }
    if (i < n) keep_scalar(gradient + i, mask + i / 16, n - i);
}

LQ_AVX512 Span quantize_avx512(const float* x, uint8_t* q, uint16_t* mask, int64_t n, const Grid& grid) {
    const __m512 inverse = _mm512_set1_ps(grid.inverse), low = _mm512_set1_ps(grid.low), high = _mm512_set1_ps(grid.high);
    const __m512i shift = _mm512_set1_epi32(static_cast<int>(grid.shift));
    __m512 smallest = _mm512_set1_ps(INFINITY), largest = _mm512_set1_ps(-INFINITY);
    __mmask16 nan = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        // The second operand comes back where one is a NaN.
        smallest = _mm512_min_ps(v, smallest);
        largest = _mm512_max_ps(v, largest);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512 r = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 c = _mm512_min_ps(_mm512_max_ps(r, low), high);
        if (mask) mask[i / 16] = _mm512_cmp_ps_mask(c, r, _CMP_EQ_OQ);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(c), shift)));
    }
    Span span{_mm512_reduce_min_ps(smallest), _mm512_reduce_max_ps(largest), nan != 0};
    if (i < n) add(span, quantize_scalar(x + i, q + i, mask ? mask + i / 16 : nullptr, n - i, grid));
    return span;
}

LQ_AVX512 Span extremes_avx512(const float* x, int64_t n) {
    __m512 smallest = _mm512_set1_ps(INFINITY), largest = _mm512_set1_ps(-INFINITY);
    __mmask16 nan = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        smallest = _mm512_min_ps(v, smallest);
        largest = _mm512_max_ps(v, largest);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    Span span{_mm512_reduce_min_ps(smallest), _mm512_reduce_max_ps(largest), nan != 0};
    add(span, extremes_scalar(x + i, n - i));
    return span;
}

LQ_AVX512 void dequantize_avx512(const uint8_t* q, float* y, int64_t n, float zero_point, float scale) {
    const __m512 z = _mm512_set1_ps(zero_point), s = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(u), z), s));
    }
    dequantize_scalar(q + i, y + i, n - i, zero_point, scale);
}

LQ_AVX512 void keep_avx512(float* gradient, const uint16_t* mask, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __mmask16 clipped = static_cast<__mmask16>(~mask[i / 16]);
        // Where nothing was clipped nothing is written.
        if (clipped) _mm512_mask_storeu_ps(gradient + i, clipped, _mm512_setzero_ps());
    }
    if (i < n) keep_scalar(gradient + i, mask + i / 16, n - i);
}

const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
const int best = has_avx512 ? AVX512 : __builtin_cpu_supports("avx2") ? AVX2 : PORTABLE;
#define LQ_CALL(name, variant, ...) \
    (variant == AVX512 ? name##_avx512(__VA_ARGS__) : variant == AVX2 ? name##_avx2(__VA_ARGS__) : name##_scalar(__VA_ARGS__))
#else
const int best = PORTABLE;
#define LQ_CALL(name, variant, ...) name##_scalar(__VA_ARGS__)
#endif

inline int64_t pieces(int64_t n) { return (n + CHUNK - 1) / CHUNK; }
inline int64_t length(int64_t n, int64_t k) { return std::min(CHUNK, n - k * CHUNK); }

}  // namespace

extern "C" {

// The fastest variant this processor runs.
int lq_integer_best(void) { return best; }

// q[i] = clip(round(x[i] / scale), quant_min - z, quant_max - z) + z - quant_min, in 0..levels-1. mask may be null. low and high, where
// not null, take in the extremes of x. Returns whether x has a NaN; q is of no use then.
int lq_integer_quantize(const float* x, uint8_t* q, uint16_t* mask, int64_t n, float scale, float zero_point, int quant_min, int quant_max,
                        float* low, float* high, int variant, int threads) {
    const Grid grid{1.0f / scale, static_cast<float>(quant_min) - zero_point, static_cast<float>(quant_max) - zero_point,
                    zero_point - static_cast<float>(quant_min)};
    std::vector<Span> found(static_cast<size_t>(pieces(n)));
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k)
        found[k] = LQ_CALL(quantize, variant, x + k * CHUNK, q + k * CHUNK, mask ? mask + k * CHUNK / 16 : nullptr, length(n, k), grid);
    Span span;
    for (const Span& part : found) add(span, part);
    if (low && span.nan) *low = *high = NAN;  // torch's minimum and maximum pass it on, too
    if (low && span.low < *low) *low = span.low;
    if (high && span.high > *high) *high = span.high;
    return span.nan;
}

// w: [rows][n] on a grid with zero point 0. Where `live` each row's scale becomes that of its extremes, else it is given.
// Returns whether w has a NaN or an infinite scale; q is of no use then.
int lq_integer_quantize_rows(const float* w, int8_t* q, float* scale, int64_t rows, int64_t n, int quant_min, int quant_max, int live, int variant,
                             int threads) {
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) if (threads > 1 && rows * n > CHUNK)
    for (int64_t row = 0; row < rows; ++row) {
        const float* x = w + row * n;
        if (live) {
            const Span span = LQ_CALL(extremes, variant, x, n);
            float s = quant_max > 0 ? std::max(span.high, 0.0f) / static_cast<float>(quant_max) : 0.0f;
            if (quant_min < 0) s = std::max(s, std::min(span.low, 0.0f) / static_cast<float>(quant_min));
            scale[row] = std::max(s, MIN_SCALE);
        }
        bad |= !std::isfinite(scale[row]);
        const Grid grid{1.0f / scale[row], static_cast<float>(quant_min), static_cast<float>(quant_max), 0.0f};
        // The low byte of a level is the same, signed or not.
        bad |= LQ_CALL(quantize, variant, x, reinterpret_cast<uint8_t*>(q + row * n), nullptr, n, grid).nan;
    }
    return bad;
}

void lq_integer_dequantize(const uint8_t* q, float* y, int64_t n, float zero_point, float scale, int variant, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k) LQ_CALL(dequantize, variant, q + k * CHUNK, y + k * CHUNK, length(n, k), zero_point, scale);
}

// gradient = 0 where the bit is 0.
void lq_integer_keep(float* gradient, const uint16_t* mask, int64_t n, int variant, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k) LQ_CALL(keep, variant, gradient + k * CHUNK, mask + k * CHUNK / 16, length(n, k));
}
}
