// Integers of a tensor and back, in one pass over memory each: levels as one byte, and what was not clipped as one bit an element
// (16-bit words, the first element lowest). The arithmetic is that of native/fake_quantize.cpp: r = round(x / s) half to even. `type` is
// that of what is quantized, or given back: 0 float, 1 bfloat16, 2 IEEE half.
//
// Plain C interface without torch headers: it compiles in seconds.

#define LQ_BY_TYPE(type, function, ...) \
    (type == BFLOATS ? function<BFloat>(__VA_ARGS__) : type == HALVES ? function<Half>(__VA_ARGS__) : function<float>(__VA_ARGS__))

#define LQ_KERNELS "../layers/integer/integer.h"
#include "../../native/variants.h"

extern "C" {

// q[i] = clip(round(x[i] / scale), quant_min - z, quant_max - z) + z - quant_min, in 0..levels-1. mask may be null. low and high, where
// not null, take in the extremes of x. Returns whether x has a NaN; q is of no use then.
int lq_integer_quantize(int type, const void* x, uint8_t* q, uint16_t* mask, int64_t n, float scale, float zero_point, int quant_min,
                        int quant_max, float* low, float* high, int variant, int threads) {
    const float least = static_cast<float>(quant_min), most = static_cast<float>(quant_max);
    const Levels levels{1.0f / scale, least - zero_point, most - zero_point, 1.0f};
    std::vector<Spread> found(static_cast<size_t>(pieces(n, CHUNK)));
    LQ_DISPATCH(quantize(type, x, q, mask, n, levels, zero_point - least, found.data(), threads));
    Spread all{INFINITY, -INFINITY, false};
    for (const Spread& part : found) {
        all.low = std::min(all.low, part.low);
        all.high = std::max(all.high, part.high);
        all.nan |= part.nan;
    }
    if (low && all.nan) *low = *high = NAN;  // torch's minimum and maximum pass it on
    if (low && all.low < *low) *low = all.low;
    if (high && all.high > *high) *high = all.high;
    return all.nan;
}

// w: [rows][n] on a grid with zero point 0. Where `live` each row's scale becomes that of its extremes, else it is given.
// Returns whether w has a NaN or an infinite scale; q is of no use then.
int lq_integer_quantize_rows(int type, const void* w, int8_t* q, float* scale, int64_t rows, int64_t n, int quant_min, int quant_max,
                             int live, int variant, int threads) {
    std::vector<uint8_t> bad(static_cast<size_t>(rows));
    LQ_DISPATCH(quantize_rows(type, w, q, scale, bad.data(), rows, n, quant_min, quant_max, live != 0, threads));
    return std::any_of(bad.begin(), bad.end(), [](uint8_t row) { return row != 0; });
}

// y = (q - zero_point) · scale.
void lq_integer_dequantize(int type, const uint8_t* q, void* y, int64_t n, float zero_point, float scale, int variant, int threads) {
    LQ_DISPATCH(dequantize(type, q, y, n, zero_point, scale, threads));
}
}
