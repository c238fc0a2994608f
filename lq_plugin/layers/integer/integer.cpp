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
#define LQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

namespace {

// Elements that one thread takes at a time; a multiple of 16.
constexpr int64_t CHUNK = 1 << 15;
constexpr float MIN_SCALE = 0x1p-100f;

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
#define LQ_CALL(name, fast, ...) (fast && has_avx512 ? name##_avx512(__VA_ARGS__) : name##_scalar(__VA_ARGS__))
#else
#define LQ_CALL(name, fast, ...) name##_scalar(__VA_ARGS__)
#endif

inline int64_t pieces(int64_t n) { return (n + CHUNK - 1) / CHUNK; }
inline int64_t length(int64_t n, int64_t k) { return std::min(CHUNK, n - k * CHUNK); }

}  // namespace

extern "C" {

// q[i] = clip(round(x[i] / scale), quant_min - z, quant_max - z) + z - quant_min, in 0..levels-1. mask may be null. low and high, where
// not null, take in the extremes of x. Returns whether x has a NaN; q is of no use then.
int lq_integer_quantize(const float* x, uint8_t* q, uint16_t* mask, int64_t n, float scale, float zero_point, int quant_min, int quant_max,
                        float* low, float* high, int fast, int threads) {
    const Grid grid{1.0f / scale, static_cast<float>(quant_min) - zero_point, static_cast<float>(quant_max) - zero_point,
                    zero_point - static_cast<float>(quant_min)};
    std::vector<Span> found(static_cast<size_t>(pieces(n)));
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k)
        found[k] = LQ_CALL(quantize, fast, x + k * CHUNK, q + k * CHUNK, mask ? mask + k * CHUNK / 16 : nullptr, length(n, k), grid);
    Span span;
    for (const Span& part : found) add(span, part);
    if (low && span.nan) *low = *high = NAN;  // torch's minimum and maximum pass it on, too
    if (low && span.low < *low) *low = span.low;
    if (high && span.high > *high) *high = span.high;
    return span.nan;
}

// w: [rows][n] on a grid with zero point 0. Where `live` each row's scale becomes that of its extremes, else it is given.
// Returns whether w has a NaN or an infinite scale; q is of no use then.
int lq_integer_quantize_rows(const float* w, int8_t* q, float* scale, int64_t rows, int64_t n, int quant_min, int quant_max, int live, int fast,
                             int threads) {
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) if (threads > 1 && rows * n > CHUNK)
    for (int64_t row = 0; row < rows; ++row) {
        const float* x = w + row * n;
        if (live) {
            const Span span = LQ_CALL(extremes, fast, x, n);
            float s = quant_max > 0 ? std::max(span.high, 0.0f) / static_cast<float>(quant_max) : 0.0f;
            if (quant_min < 0) s = std::max(s, std::min(span.low, 0.0f) / static_cast<float>(quant_min));
            scale[row] = std::max(s, MIN_SCALE);
        }
        bad |= !std::isfinite(scale[row]);
        const Grid grid{1.0f / scale[row], static_cast<float>(quant_min), static_cast<float>(quant_max), 0.0f};
        // The low byte of a level is the same, signed or not.
        bad |= LQ_CALL(quantize, fast, x, reinterpret_cast<uint8_t*>(q + row * n), nullptr, n, grid).nan;
    }
    return bad;
}

void lq_integer_dequantize(const uint8_t* q, float* y, int64_t n, float zero_point, float scale, int fast, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k) LQ_CALL(dequantize, fast, q + k * CHUNK, y + k * CHUNK, length(n, k), zero_point, scale);
}

// gradient = 0 where the bit is 0.
void lq_integer_keep(float* gradient, const uint16_t* mask, int64_t n, int fast, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > CHUNK)
    for (int64_t k = 0; k < pieces(n); ++k) LQ_CALL(keep, fast, gradient + k * CHUNK, mask + k * CHUNK / 16, length(n, k));
}
}
