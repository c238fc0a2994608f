// The loops of lookup.cpp, compiled once for each instruction set (variants.h).

#include "fake_quantize_kernel.h"

// The place among all parts of a table of each part that is read, one after another.
struct Places {
    const Rows& rows;
    int64_t row, part;
    inline Places(const Rows& rows, int64_t unit) : rows(rows), row(unit / rows.parts), part(unit % rows.parts) {}
    inline int64_t next() {
        const int64_t place = rows.index[row] * rows.parts + part;
        if (++part == rows.parts) part = 0, ++row;
        return place;
    }
};

template <class X, class>
inline void lookup_of(const void* table_at, const Rows& r, const Grid& grid, void* y_at, uint16_t* mask, const Taken& taken, int threads) {
    const X* table = static_cast<const X*>(table_at);
    X* y = static_cast<X*>(y_at);
    X* copy = static_cast<X*>(taken.rows);
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(X));
    const int64_t words = pieces(r.n, 16), units = r.count * r.parts;
    const bool symmetric = !grid.affine && grid.quant_min < 0 && grid.quant_max > 0;
    LQ_PARALLEL(units * r.n)
    for (int64_t first = 0; first < units; first += BATCH) {
        const int64_t size = std::min(BATCH, units - first), behind = std::min(BATCH, units - first - size);
        int64_t place[BATCH];
        float scale[BATCH] = {}, zero_point[BATCH] = {};
        Levels levels[BATCH];
        Places read(r, first), ahead(r, first + size);
        for (int64_t k = 0; k < size; ++k) place[k] = read.next();
        for (int64_t k = 0; k < behind; ++k) {
            const int64_t next = ahead.next();
            for (int64_t at = 0; at < r.n; at += line) __builtin_prefetch(table + next * r.n + at);
            if (grid.ranges == GIVEN) {
                __builtin_prefetch(grid.scale + next);
                if (grid.zero_point) __builtin_prefetch(grid.zero_point + next);
            }
        }
        if (grid.ranges == OWN) {
            float low[BATCH] = {}, high[BATCH] = {};
            for (int64_t k = 0; k < size; ++k) {
                const Spread found = extremes(table + place[k] * r.n, r.n);
                low[k] = found.nan ? NAN : found.low;
                high[k] = found.nan ? NAN : found.high;
            }
            if (symmetric)
                for (int64_t k = 0; k < BATCH; ++k) scale[k] = symmetric_scale(low[k], high[k], grid.quant_min, grid.quant_max);
            else
                for (int64_t k = 0; k < size; ++k)
                    scale[k] = scale_of(low[k], high[k], grid.quant_min, grid.quant_max, grid.affine, zero_point[k]);
        } else {
            for (int64_t k = 0; k < size; ++k) {
                const int64_t at = grid.ranges == ONE ? 0 : place[k];
                scale[k] = grid.scale[at];
                if (grid.zero_point) zero_point[k] = grid.zero_point[at];
            }
        }
        for (int64_t k = 0; k < BATCH; ++k)
            levels[k] = levels_of(scale[k], zero_point[k], grid.quant_min, grid.quant_max, grid.learned);
        for (int64_t k = 0; k < size; ++k) {
            const X* x = table + place[k] * r.n;
            const int64_t unit = first + k;
            if (mask)
                span(x, y + unit * r.n, mask + unit * words, r.n, levels[k]);
            else
                span(x, y + unit * r.n, static_cast<uint16_t*>(nullptr), r.n, levels[k]);
            if (copy) std::memcpy(copy + unit * r.n, x, r.n * sizeof(X));
            if (taken.scale) taken.scale[unit] = scale[k];
            if (taken.zero_point) taken.zero_point[unit] = zero_point[k];
        }
    }
}
inline void lookup(int types, const void* table, const Rows& rows, const Grid& grid, void* y, uint16_t* mask, const Taken& taken,
                   int threads) {
    LQ_BY_TYPES(types, lookup_of, table, rows, grid, y, mask, taken, threads);
}

// sums += gradient, where the bit is 1.
template <class X>
inline void add_span(const X* gradient, const uint16_t* mask, X* sums, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        store(sums + i, plus(load(sums + i), kept(load(gradient + i), mask ? mask[i / 16] : 0xFFFFu)));
    if (i < n) {
        const V more = kept(load_part(gradient + i, n - i), mask ? mask[i / 16] : 0xFFFFu);
        store_part(sums + i, plus(load_part(sums + i, n - i), more), n - i);
    }
}

template <class X, class>
inline void add_rows_of(const void* gradient_at, const Rows& r, const uint16_t* mask, void* sums_at, int64_t padding, int threads) {
    const X* gradient = static_cast<const X*>(gradient_at);
    X* sums = static_cast<X*>(sums_at);
    const int64_t words = pieces(r.n, 16), length = r.parts * r.n;
    // Each thread has rows of its own, so that each sum is taken in one order.
    const int64_t shares = r.count * length > CHUNK ? threads : 1;
    LQ_PARALLEL(r.count * length)
    for (int64_t share = 0; share < shares; ++share)
        for (int64_t i = 0; i < r.count; ++i) {
            const int64_t row = r.index[i];
            if (row == padding || (shares > 1 && row % shares != share)) continue;
            for (int64_t part = 0; part < r.parts; ++part) {
                const int64_t unit = i * r.parts + part;
                add_span(gradient + unit * r.n, mask ? mask + unit * words : nullptr, sums + row * length + part * r.n, r.n);
            }
        }
}
inline void add_rows(int types, const void* gradient, const Rows& rows, const uint16_t* mask, void* sums, int64_t padding, int threads) {
    LQ_BY_TYPES(types, add_rows_of, gradient, rows, mask, sums, padding, threads);
}

// Of one run: the gradient that passes goes to `inside` (which may be null), n at most CHUNK at a time.
template <bool SHIFT, bool ROUNDED, class X>
inline Sums learned_run(const Learned& l, const X* x, const X* gradient, X* inside, int64_t n, int64_t unit) {
    const float zero_point = l.zero_point ? l.zero_point[unit] : 0.0f;
    const Levels levels = levels_of(l.scale[unit], zero_point, l.quant_min, l.quant_max, true);
    Sums sums{0.0, 0.0};
    for (int64_t i = 0; i < n; i += CHUNK) {
        const Sums part = learned_span<SHIFT, ROUNDED>(x + i, gradient + i, inside ? inside + i : nullptr, std::min(CHUNK, n - i), levels);
        sums.scale += part.scale;
        sums.zero_point += part.zero_point;
    }
    return sums;
}

template <bool SHIFT, bool ROUNDED, class X>
inline void learned_rows_as(const X* gradient, const Rows& r, const Learned& l, X* result, int threads) {
    const X* rows = static_cast<const X*>(l.rows);
    const float factor = static_cast<float>(l.factor);
    std::vector<Sums> shared(static_cast<size_t>(l.one ? r.count : 0), Sums{0.0, 0.0});
    const int64_t shares = r.count * r.parts * r.n > CHUNK ? threads : 1;
    LQ_PARALLEL(r.count * r.parts * r.n)
    for (int64_t share = 0; share < shares; ++share) {
        std::vector<X> inside(static_cast<size_t>(result && l.dense ? r.n : 0));
        for (int64_t i = 0; i < r.count; ++i) {
            const int64_t row = r.index[i];
            if (shares > 1 && row % shares != share) continue;
            for (int64_t part = 0; part < r.parts; ++part) {
                const int64_t unit = i * r.parts + part, place = row * r.parts + part, to = l.dense_ranges ? place : unit;
                if (row == l.padding) {
                    if (result && !l.dense) std::memset(static_cast<void*>(result + unit * r.n), 0, r.n * sizeof(X));
                    if (!l.one && !l.dense_ranges) {
                        l.scale_result[to] = 0.0f;
                        if (l.zero_point_result) l.zero_point_result[to] = 0.0f;
                    }
                    continue;
                }
                X* passed = !result ? nullptr : l.dense ? inside.data() : result + unit * r.n;
                const Sums sums = learned_run<SHIFT, ROUNDED>(l, rows + unit * r.n, gradient + unit * r.n, passed, r.n, unit);
                if (result && l.dense) add_span(passed, static_cast<uint16_t*>(nullptr), result + place * r.n, r.n);
                if (l.one) {
                    shared[i] = sums;
                    continue;
                }
                const float by = l.scale[unit] < 0.0f ? -factor : factor, slope = static_cast<float>(sums.scale) * by;
                l.scale_result[to] = l.dense_ranges ? l.scale_result[to] + slope : slope;
                if (!l.zero_point_result) continue;
                const float shift = static_cast<float>(sums.zero_point) * factor;
                l.zero_point_result[to] = l.dense_ranges ? l.zero_point_result[to] + shift : shift;
            }
        }
    }
    if (!l.one) return;
    Sums all{0.0, 0.0};
    for (const Sums& sums : shared) all.scale += sums.scale, all.zero_point += sums.zero_point;
    *l.scale_result = static_cast<float>(all.scale) * (*l.scale < 0.0f ? -factor : factor);
    if (l.zero_point_result) *l.zero_point_result = static_cast<float>(all.zero_point) * factor;
}
template <class X, class>
inline void learned_rows_of(const void* gradient_at, const Rows& r, const Learned& l, void* result_at, int threads) {
    const auto rows = l.rounded ? l.zero_point_result ? learned_rows_as<true, true, X> : learned_rows_as<false, true, X>
                                : l.zero_point_result ? learned_rows_as<true, false, X> : learned_rows_as<false, false, X>;
    rows(static_cast<const X*>(gradient_at), r, l, static_cast<X*>(result_at), threads);
}
inline void learned_rows(int types, const void* gradient, const Rows& rows, const Learned& learned, void* result, int threads) {
    LQ_BY_TYPES(types, learned_rows_of, gradient, rows, learned, result, threads);
}

template <class X, class>
inline int rows_known_of(const void* table, const Rows& r, const float* low, const float* high) {
    for (int64_t i = 0; i < r.count; ++i) {
        const int64_t row = r.index[i];
        const Spread found = extremes(static_cast<const X*>(table) + row * r.n, r.n);
        if (found.nan || found.low != low[row] || found.high != high[row]) return 0;
    }
    return 1;
}
inline int rows_known(int types, const void* table, const Rows& rows, const float* low, const float* high) {
    return LQ_BY_TYPES(types, rows_known_of, table, rows, low, high);
}

// One of the two extremes of all rows, by what its rows become; those of high are negative.
struct Bound {
    float value, reached;
    bool let_go = false;
    explicit inline Bound(float value) : value(value), reached(value) {}
    inline void take(float former, float now) {
        // A row that held the extreme, or a NaN, does so no longer.
        let_go |= !(former > value) && !(now <= value);
        if (now < reached || now != now) reached = now;
    }
};

template <class X, class>
inline int follow_rows_of(const void* table, const Rows& r, int64_t rows, float* low, float* high, float* bounds) {
    Bound least(bounds[0]), most(-bounds[1]);
    for (int64_t i = 0; i < r.count; ++i) {
        const int64_t row = r.index[i];
        const Spread found = extremes(static_cast<const X*>(table) + row * r.n, r.n);
        const float now_low = found.nan ? NAN : found.low, now_high = found.nan ? NAN : found.high;
        least.take(low[row], now_low);
        most.take(-high[row], -now_high);
        low[row] = now_low;
        high[row] = now_high;
    }
    const float former_low = bounds[0], former_high = bounds[1];
    bounds[0] = least.reached;
    bounds[1] = -most.reached;
    if (least.let_go) {
        const Spread all = extremes(low, rows);
        bounds[0] = all.nan ? NAN : all.low;
    }
    if (most.let_go) {
        const Spread all = extremes(high, rows);
        bounds[1] = all.nan ? NAN : all.high;
    }
    return !(bounds[0] == former_low && bounds[1] == former_high);
}
inline int follow_rows(int types, const void* table, const Rows& rows, int64_t all, float* low, float* high, float* bounds) {
    return LQ_BY_TYPES(types, follow_rows_of, table, rows, all, low, high, bounds);
}
