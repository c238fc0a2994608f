// The passes of fake_quantize.cpp over whole tensors, shared among threads, compiled once for each instruction set (variants.h). Those
// that take `types` choose the template of the same name with the elements' types.

#include "fake_quantize_kernel.h"

template <class X, class Y>
inline void forward_of(const void* x_at, void* y_at, uint16_t* mask, const Table& table, const Shape& shape, int threads) {
    const X* x = static_cast<const X*>(x_at);
    Y* y = static_cast<Y*>(y_at);
    if (shape.inner == 1) {
        const int64_t parts = pieces(shape.run, CHUNK), words = pieces(shape.run, 16), runs = shape.repeats * shape.outer;
        LQ_PARALLEL(runs * shape.run)
        for (int64_t unit = 0; unit < runs * parts; ++unit) {
            const int64_t row = unit / parts, first = unit % parts * CHUNK, n = std::min(CHUNK, shape.run - first);
            uint16_t* bits = mask ? mask + row * words + first / 16 : nullptr;
            span(x + row * shape.run + first, y + row * shape.run + first, bits, n, table.at(row % shape.outer));
        }
        return;
    }
    const int64_t words = pieces(shape.inner, 16), rows = shape.repeats * shape.outer * shape.run;
    LQ_PARALLEL(rows * shape.inner)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = row / shape.run % shape.outer * shape.inner;
        columns(x + row * shape.inner, y + row * shape.inner, mask ? mask + row * words : nullptr, shape.inner, table, first);
    }
}
inline void forward(int types, const void* x, void* y, uint16_t* mask, const Table& table, const Shape& shape, int threads) {
    LQ_BY_TYPES(types, forward_of, x, y, mask, table, shape, threads);
}

// Each scale is for one element (MX): a table at a time that stays in the cache.
template <class X, class Y>
inline void elements_of(const void* x, void* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t n, int quant_min,
                        int quant_max, bool learned, int threads) {
    constexpr int64_t PART = 4096;
    LQ_PARALLEL(n)
    for (int64_t first = 0; first < n; first += PART) {
        const int64_t size = std::min(PART, n - first);
        const Store levels(scale + first, zero_point + first, size, quant_min, quant_max, learned);
        columns(static_cast<const X*>(x) + first, static_cast<Y*>(y) + first, mask ? mask + first / 16 : nullptr, size, levels.table(), 0);
    }
}
inline void elements(int types, const void* x, void* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t n,
                     int quant_min, int quant_max, bool learned, int threads) {
    LQ_BY_TYPES(types, elements_of, x, y, mask, scale, zero_point, n, quant_min, quant_max, learned, threads);
}

template <class X, class Y>
inline void observed_of(const void* x_at, void* y_at, uint16_t* mask, const Levels& levels, int64_t n, Spread* found, int threads) {
    const X* x = static_cast<const X*>(x_at);
    Y* y = static_cast<Y*>(y_at);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * CHUNK;
        found[part] = span_observed(x + first, y + first, mask ? mask + first / 16 : nullptr, std::min(CHUNK, n - first), levels);
    }
}
inline void observed(int types, const void* x, void* y, uint16_t* mask, const Levels& levels, int64_t n, Spread* found, int threads) {
    LQ_BY_TYPES(types, observed_of, x, y, mask, levels, n, found, threads);
}

template <class X, class Y>
inline void rows_with_ranges_of(const void* x_at, void* y_at, uint16_t* mask, float* scale, float* zero_point, int64_t rows, int64_t n,
                                int quant_min, int quant_max, bool affine, int threads) {
    const X* x = static_cast<const X*>(x_at);
    Y* y = static_cast<Y*>(y_at);
    const int64_t words = pieces(n, 16);
    LQ_PARALLEL(rows * n)
    for (int64_t row = 0; row < rows; ++row) {
        const Spread found = extremes(x + row * n, n);
        scale[row] = scale_of(found.nan ? NAN : found.low, found.nan ? NAN : found.high, quant_min, quant_max, affine, zero_point[row]);
        const Levels levels = levels_of(scale[row], zero_point[row], quant_min, quant_max);
        span(x + row * n, y + row * n, mask ? mask + row * words : nullptr, n, levels);
    }
}
inline void rows_with_ranges(int types, const void* x, void* y, uint16_t* mask, float* scale, float* zero_point, int64_t rows, int64_t n,
                             int quant_min, int quant_max, bool affine, int threads) {
    LQ_BY_TYPES(types, rows_with_ranges_of, x, y, mask, scale, zero_point, rows, n, quant_min, quant_max, affine, threads);
}

template <class X, class Y>
inline void row_extremes_of(const void* x, float* low, float* high, int64_t rows, int64_t n, int threads) {
    LQ_PARALLEL(rows * n)
    for (int64_t row = 0; row < rows; ++row) {
        const Spread found = extremes(static_cast<const X*>(x) + row * n, n);
        low[row] = found.nan ? NAN : found.low;
        high[row] = found.nan ? NAN : found.high;
    }
}
inline void row_extremes(int types, const void* x, float* low, float* high, int64_t rows, int64_t n, int threads) {
    LQ_BY_TYPES(types, row_extremes_of, x, low, high, rows, n, threads);
}

inline void grid_errors(const float* x, const float* scale, const float* zero_point, double* errors, int64_t rows, int64_t n,
                        int64_t candidates, int quant_min, int quant_max, bool rounded, int threads) {
    const float least = static_cast<float>(quant_min), most = static_cast<float>(quant_max);
    LQ_PARALLEL(rows * n * candidates)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = row * candidates; k < (row + 1) * candidates; ++k) {
            const float z = zero_point ? zero_point[k] : 0.0f;
            const Levels levels{1.0f / scale[k], least - z, most - z, 1.0f};
            const double sum = rounded ? error_of_grid<true>(x + row * n, n, levels) : error_of_grid<false>(x + row * n, n, levels);
            const double step = scale[k];
            errors[k] = sum * (step * step) / static_cast<double>(n);
        }
}

template <class X, class Y>
inline void parts_extremes_of(const void* x, Spread* found, int64_t n, int threads) {
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * CHUNK;
        found[part] = extremes<4096>(static_cast<const X*>(x) + first, std::min(CHUNK, n - first));
    }
}
inline void parts_extremes(int types, const void* x, Spread* found, int64_t n, int threads) {
    LQ_BY_TYPES(types, parts_extremes_of, x, found, n, threads);
}

template <class X, class Y>
inline void mask_gradient_of(const void* gradient_at, void* result_at, const uint16_t* mask, int64_t runs, int64_t n, int threads) {
    const Y* gradient = static_cast<const Y*>(gradient_at);
    X* result = static_cast<X*>(result_at);
    const int64_t parts = pieces(n, CHUNK), words = pieces(n, 16);
    LQ_PARALLEL(runs * n)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, first = unit % parts * CHUNK;
        masked(gradient + row * n + first, result + row * n + first, mask + row * words + first / 16, std::min(CHUNK, n - first));
    }
}
inline void mask_gradient(int types, const void* gradient, void* result, const uint16_t* mask, int64_t runs, int64_t n, int threads) {
    LQ_BY_TYPES(types, mask_gradient_of, gradient, result, mask, runs, n, threads);
}

template <class X, class Y>
inline void keep_gradient_of(void* gradient_at, const uint16_t* mask, int64_t runs, int64_t n, int threads) {
    Y* gradient = static_cast<Y*>(gradient_at);
    const int64_t parts = pieces(n, CHUNK), words = pieces(n, 16);
    LQ_PARALLEL(runs * n)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, first = unit % parts * CHUNK;
        cleared(gradient + row * n + first, mask + row * words + first / 16, std::min(CHUNK, n - first));
    }
}
inline void keep_gradient(int types, void* gradient, const uint16_t* mask, int64_t runs, int64_t n, int threads) {
    LQ_BY_TYPES(types, keep_gradient_of, gradient, mask, runs, n, threads);
}

template <class X, class Y>
inline void passed_gradient_of(const void* x_at, const void* gradient_at, void* result_at, const Levels& levels, int64_t n, int threads) {
    const X* x = static_cast<const X*>(x_at);
    const Y* gradient = static_cast<const Y*>(gradient_at);
    X* result = static_cast<X*>(result_at);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * CHUNK;
        passed(x + first, gradient + first, result + first, std::min(CHUNK, n - first), levels);
    }
}
inline void passed_gradient(int types, const void* x, const void* gradient, void* result, const Levels& levels, int64_t n, int threads) {
    LQ_BY_TYPES(types, passed_gradient_of, x, gradient, result, levels, n, threads);
}

template <class X, class Y>
inline void learned_backward_of(const void* x_at, const void* gradient_at, void* result_at, const Table& table, Sums* found,
                                const Shape& shape, bool shift, bool rounded, int threads) {
    const X* x = static_cast<const X*>(x_at);
    const Y* gradient = static_cast<const Y*>(gradient_at);
    X* result = static_cast<X*>(result_at);
    const auto span = rounded ? shift ? learned_span<true, true, X, Y> : learned_span<false, true, X, Y>
                              : shift ? learned_span<true, false, X, Y> : learned_span<false, false, X, Y>;
    const int64_t parts = pieces(shape.run, CHUNK), runs = shape.repeats * shape.outer;
    LQ_PARALLEL(runs * shape.run)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, part = unit % parts * CHUNK, first = row * shape.run + part;
        const int64_t n = std::min(CHUNK, shape.run - part);
        X* inside = result ? result + first : nullptr;
        found[unit] = span(x + first, gradient + first, inside, n, table.at(row % shape.outer));
    }
}
inline void learned_backward(int types, const void* x, const void* gradient, void* result, const Table& table, Sums* found,
                             const Shape& shape, bool shift, bool rounded, int threads) {
    LQ_BY_TYPES(types, learned_backward_of, x, gradient, result, table, found, shape, shift, rounded, threads);
}
