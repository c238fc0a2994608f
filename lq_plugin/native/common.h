// What the sources of kernels share.
//
// In memory elements are float, bfloat16 or IEEE half. Arithmetic is that of float; a result is rounded to the nearest
// element, ties to even, as torch's casts do it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define LQ_X86 1
#endif

namespace {

enum Variant { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// Elements that one thread takes at a time; a multiple of 16.
constexpr int64_t CHUNK = 1 << 15;
constexpr float MIN_SCALE = 0x1p-100f;

struct BFloat {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// Elements of x and of y: of an operand and its result, or of the gradients of both. The same numbers stand in kernels.py.
enum Types { FLOATS = 0, BFLOATS = 1, HALVES = 2, FLOAT_TO_BFLOAT = 3, FLOAT_TO_HALF = 4 };
#define LQ_BY_TYPES(types, function, ...)                                             \
    (types == BFLOATS           ? function<BFloat, BFloat>(__VA_ARGS__)               \
     : types == HALVES          ? function<Half, Half>(__VA_ARGS__)                   \
     : types == FLOAT_TO_BFLOAT ? function<float, BFloat>(__VA_ARGS__)                \
     : types == FLOAT_TO_HALF   ? function<float, Half>(__VA_ARGS__)                  \
                                : function<float, float>(__VA_ARGS__))

struct Levels {
    float inverse, low, high, scale;
};
struct Table {
    const float *inverse, *low, *high, *scale;
    Levels at(int64_t k) const { return {inverse[k], low[k], high[k], scale[k]}; }
};

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

#define LQ_STRING(text) _Pragma(#text)
#ifdef _OPENMP
#define LQ_PARALLEL(elements) LQ_STRING(omp parallel for num_threads(threads) if (threads > 1 && (elements) > CHUNK))
#else
#define LQ_PARALLEL(elements)
#endif

inline float at_least(float x, float bound) { return x < bound ? bound : x; }  // a NaN stays
inline float at_most(float x, float bound) { return x > bound ? bound : x; }

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float from_bits(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float widened(float x) { return x; }
inline float widened(BFloat x) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }
inline float widened(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
    // 2^112 moves the exponent from one bias to the other, also of what is subnormal; infinities and NaNs keep all ones.
    const float scaled = from_bits(static_cast<int32_t>(magnitude)) * 0x1p112f;
    const uint32_t bits = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : static_cast<uint32_t>(bits_of(scaled));
    return from_bits(static_cast<int32_t>(bits | sign));
}

inline void narrowed(float x, float& y) { y = x; }
inline void narrowed(float x, BFloat& y) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x));
    // Half of the last place less one, and one more where that place is odd.
    y.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline void narrowed(float x, Half& y) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x)), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t result;
    if (magnitude > 0x7F800000u) {
        result = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // 65520: from here on the nearest is infinity
        result = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below the smallest normal: the sum with 0.5 leaves whole multiples of 2^-24
        result = static_cast<uint32_t>(bits_of(from_bits(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3F000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    }
    y.bits = static_cast<uint16_t>(sign | result);
}
// Of an integer of 8 bits, signed or not: its byte is the same.
inline void narrowed(float x, uint8_t& y) { y = static_cast<uint8_t>(x != x ? 0 : static_cast<int>(x)); }

// The smallest scale that reaches both bounds with levels on both sides of 0. No branches: loops over it are vectors.
inline float symmetric_scale(float minimum, float maximum, int quant_min, int quant_max) {
    const float above = at_least(maximum, 0.0f) / static_cast<float>(quant_max);
    const float below = at_most(minimum, 0.0f) / static_cast<float>(quant_min);
    return at_least(below != below || below > above ? below : above, MIN_SCALE);
}

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
    if (quant_min < 0 && quant_max > 0) return symmetric_scale(minimum, maximum, quant_min, quant_max);
    const float scale = quant_max > 0 ? maximum / static_cast<float>(quant_max) : minimum / static_cast<float>(quant_min);
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

// Of 16 numbers in any order.
struct Spread {
    float low, high;
    bool nan;
};
struct Sums {
    double scale, zero_point;
};

// The fastest variant this processor runs.
inline Variant best_variant() {
#ifdef LQ_X86
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    // Not every compiler knows F16C by name there.
    if (!__builtin_cpu_supports("avx2") || !__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return AVX2;
#else
    return PORTABLE;
#endif
}

}  // namespace
