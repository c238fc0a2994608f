// The loops of integer.cpp, compiled once for each instruction set (native/variants.h).

#include "../../native/fake_quantize_kernel.h"

// q = clip(round(x · inverse), low, high) + shift, as bytes.
template <class X>
inline Spread to_bytes(const X* x, uint8_t* q, uint16_t* mask, int64_t n, const Levels& levels, float shift) {
    const Q steps{set(levels.inverse), set(levels.low), set(levels.high), set(1.0f)};
    const V above = set(shift);
    Extremes extremes;
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        const V v = load(x + i);
        extremes.take(v);
        store(q + i, plus(quantized(v, steps, bits), above));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        extremes.take_part(x + i, n - i);
        store_part(q + i, plus(quantized(load_part(x + i, n - i), steps, bits), above), n - i);
        if (mask) mask[i / 16] = bits_part(bits, n - i);
    }
    return extremes.found();
}

template <class X>
inline void quantize_of(const void* x_at, uint8_t* q, uint16_t* mask, int64_t n, const Levels& levels, float shift, Spread* found,
                        int threads) {
    const X* x = static_cast<const X*>(x_at);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * CHUNK;
        found[part] = to_bytes(x + first, q + first, mask ? mask + first / 16 : nullptr, std::min(CHUNK, n - first), levels, shift);
    }
}
inline void quantize(int type, const void* x, uint8_t* q, uint16_t* mask, int64_t n, const Levels& levels, float shift, Spread* found,
                     int threads) {
    LQ_BY_TYPE(type, quantize_of, x, q, mask, n, levels, shift, found, threads);
}

// bad: [rows], whether a row has a NaN or a scale that is no number.
template <class X>
inline void quantize_rows_of(const void* w, int8_t* q, float* scale, uint8_t* bad, int64_t rows, int64_t n, int quant_min, int quant_max,
                             bool live, int threads) {
    LQ_PARALLEL(rows * n)
    for (int64_t row = 0; row < rows; ++row) {
        const X* x = static_cast<const X*>(w) + row * n;
        if (live) {
            const Spread found = extremes(x, n);
            float none;
            scale[row] = scale_of(found.nan ? NAN : found.low, found.nan ? NAN : found.high, quant_min, quant_max, false, none);
        }
        const Levels levels{1.0f / scale[row], static_cast<float>(quant_min), static_cast<float>(quant_max), 1.0f};
        bad[row] = to_bytes(x, reinterpret_cast<uint8_t*>(q + row * n), nullptr, n, levels, 0.0f).nan || !std::isfinite(scale[row]);
    }
}
inline void quantize_rows(int type, const void* w, int8_t* q, float* scale, uint8_t* bad, int64_t rows, int64_t n, int quant_min,
                          int quant_max, bool live, int threads) {
    LQ_BY_TYPE(type, quantize_rows_of, w, q, scale, bad, rows, n, quant_min, quant_max, live, threads);
}

template <class Y>
inline void dequantize_of(const uint8_t* q, void* y_at, int64_t n, float zero_point, float scale, int threads) {
    Y* y = static_cast<Y*>(y_at);
    const V below = set(-zero_point), step = set(scale);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t end = std::min(n, (part + 1) * CHUNK);
        int64_t i = part * CHUNK;
        for (; i + 16 <= end; i += 16) store(y + i, times(plus(load(q + i), below), step));
        if (i < end) store_part(y + i, times(plus(load_part(q + i, end - i), below), step), end - i);
    }
}
inline void dequantize(int type, const uint8_t* q, void* y, int64_t n, float zero_point, float scale, int threads) {
    LQ_BY_TYPE(type, dequantize_of, q, y, n, zero_point, scale, threads);
}
