// The passes of fake_quantize.cpp over whole tensors, shared among threads; included behind fake_quantize_kernel.h.

inline void forward(const float* x, float* y, uint16_t* mask, const Table& table, const Shape& shape, int threads) {
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

inline void observed(const float* x, float* y, uint16_t* mask, const Levels& levels, int64_t n, Spread* found, int threads) {
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(n)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * CHUNK;
        found[part] = span_observed(x + first, y + first, mask ? mask + first / 16 : nullptr, std::min(CHUNK, n - first), levels);
    }
}

inline void rows_with_ranges(const float* x, float* y, uint16_t* mask, float* scale, float* zero_point, int64_t rows, int64_t n,
                             int quant_min, int quant_max, bool affine, int threads) {
    const int64_t words = pieces(n, 16);
    LQ_PARALLEL(rows * n)
    for (int64_t row = 0; row < rows; ++row) {
        const Spread found = extremes(x + row * n, n);
        scale[row] = scale_of(found.nan ? NAN : found.low, found.nan ? NAN : found.high, quant_min, quant_max, affine, zero_point[row]);
        const Levels levels = levels_of(scale[row], zero_point[row], quant_min, quant_max);
        span(x + row * n, y + row * n, mask ? mask + row * words : nullptr, n, levels);
    }
}

inline void lookup(const Rows& r, float* y, uint16_t* mask, int quant_min, int quant_max, bool affine, int threads) {
    const int64_t words = pieces(r.n, 16), length = r.parts * r.n;
    LQ_PARALLEL(r.count * length)
    for (int64_t i = 0; i < r.count; ++i) {
        if (i + AHEAD < r.count) {
            const int64_t next = r.index[i + AHEAD];
            for (int64_t at = 0; at < length; at += 16) __builtin_prefetch(r.table + next * length + at);
            if (r.ranges == GIVEN) __builtin_prefetch(r.scale + next * r.parts), __builtin_prefetch(r.zero_point + next * r.parts);
        }
        for (int64_t part = 0; part < r.parts; ++part) {
            const int64_t place = r.index[i] * r.parts + part, unit = i * r.parts + part, k = r.ranges == ONE ? 0 : place;
            const float* x = r.table + place * r.n;
            float s, z;
            if (r.ranges == OWN) {
                const Spread found = extremes(x, r.n);
                s = scale_of(found.nan ? NAN : found.low, found.nan ? NAN : found.high, quant_min, quant_max, affine, z);
            } else {
                s = r.scale[k], z = r.zero_point[k];
            }
            span(x, y + unit * r.n, mask ? mask + unit * words : nullptr, r.n, levels_of(s, z, quant_min, quant_max, r.learned));
        }
    }
}

inline void row_extremes(const float* x, float* low, float* high, int64_t rows, int64_t n, int threads) {
    LQ_PARALLEL(rows * n)
    for (int64_t row = 0; row < rows; ++row) {
        const Spread found = extremes(x + row * n, n);
        low[row] = found.nan ? NAN : found.low;
        high[row] = found.nan ? NAN : found.high;
    }
}

inline void mask_gradient(const float* gradient, float* result, const uint16_t* mask, int64_t runs, int64_t n, int threads) {
    const int64_t parts = pieces(n, CHUNK), words = pieces(n, 16);
    LQ_PARALLEL(runs * n)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, first = unit % parts * CHUNK;
        masked(gradient + row * n + first, result + row * n + first, mask + row * words + first / 16, std::min(CHUNK, n - first));
    }
}

inline void learned_backward(const float* x, const float* gradient, float* result, const Table& table, Sums* found, const Shape& shape,
                             bool shift, bool rounded, int threads) {
    const auto span = rounded ? shift ? learned_span<true, true> : learned_span<false, true>
                              : shift ? learned_span<true, false> : learned_span<false, false>;
    const int64_t parts = pieces(shape.run, CHUNK), runs = shape.repeats * shape.outer;
    LQ_PARALLEL(runs * shape.run)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, part = unit % parts * CHUNK, first = row * shape.run + part;
        const int64_t n = std::min(CHUNK, shape.run - part);
        float* inside = result ? result + first : nullptr;
        found[unit] = span(x + first, gradient + first, inside, n, table.at(row % shape.outer));
    }
}
