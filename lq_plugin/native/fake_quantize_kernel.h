// The loops of fake_quantize.cpp, compiled once for each instruction set: included in a namespace of its own that has defined
//
//   V                      16 floats
//   load, store            unaligned
//   set(float)             the same in all lanes
//   quantized(x, q, bits)  clip(round(x · inverse), low, high) · scale; bit i is 1 where nothing was clipped
//   lower(a, b), upper     of two, a NaN in `a` passed over
//   unordered(x)           whether any lane is a NaN
//   kept(x, bits)          x where the bit is 1, else 0
//   learned(...), Totals   LSQ's backward pass; what passes is what lies strictly between low and high, or ROUNDED: rounds to within
//   spread(low, high, nan) over the lanes

// One run of n elements with the same qparams.
inline void span(const float* x, float* y, uint16_t* mask, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        store(y + i, quantized(load(x + i), q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        float part[16] = {};
        std::memcpy(part, x + i, (n - i) * sizeof(float));
        store(part, quantized(load(part), q, bits));
        std::memcpy(y + i, part, (n - i) * sizeof(float));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits & ((1u << (n - i)) - 1u));
    }
}

// The same, and the extremes of x on the way.
inline Spread span_observed(const float* x, float* y, uint16_t* mask, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    V low = set(INFINITY), high = set(-INFINITY);
    bool nan = false;
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        V v = load(x + i);
        low = lower(v, low);
        high = upper(v, high);
        nan |= unordered(v);
        store(y + i, quantized(v, q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        float part[16];
        for (int64_t k = 0; k < 16; ++k) part[k] = x[i + k < n ? i + k : i];
        V v = load(part);
        low = lower(v, low);
        high = upper(v, high);
        nan |= unordered(v);
        store(part, quantized(v, q, bits));
        std::memcpy(y + i, part, (n - i) * sizeof(float));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits & ((1u << (n - i)) - 1u));
    }
    return spread(low, high, nan);
}

inline Spread extremes(const float* x, int64_t n) {
    V low = set(INFINITY), high = set(-INFINITY);
    bool nan = false;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        V v = load(x + i);
        low = lower(v, low);
        high = upper(v, high);
        nan |= unordered(v);
    }
    if (i < n) {
        float part[16];
        for (int64_t k = 0; k < 16; ++k) part[k] = x[i + k < n ? i + k : i];
        V v = load(part);
        low = lower(v, low);
        high = upper(v, high);
        nan |= unordered(v);
    }
    return spread(low, high, nan);
}

// One run of n elements, each with qparams of its own.
inline void columns(const float* x, float* y, uint16_t* mask, int64_t n, const Table& table, int64_t first) {
    unsigned bits;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const int64_t k = first + i;
        const Q q{load(table.inverse + k), load(table.low + k), load(table.high + k), load(table.scale + k)};
        store(y + i, quantized(load(x + i), q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        float part[5][16] = {};
        const float* sources[5] = {x + i, table.inverse + first + i, table.low + first + i, table.high + first + i, table.scale + first + i};
        for (int k = 0; k < 5; ++k) std::memcpy(part[k], sources[k], (n - i) * sizeof(float));
        const Q q{load(part[1]), load(part[2]), load(part[3]), load(part[4])};
        store(part[0], quantized(load(part[0]), q, bits));
        std::memcpy(y + i, part[0], (n - i) * sizeof(float));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits & ((1u << (n - i)) - 1u));
    }
}

inline void masked(const float* gradient, float* result, const uint16_t* mask, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(result + i, kept(load(gradient + i), mask[i / 16]));
    for (; i < n; ++i) result[i] = mask[i / 16] >> (i % 16) & 1 ? gradient[i] : 0.0f;
}

// LSQ's backward pass over n elements that share a scale; result may be null. Sums in double, 16 lanes, then lane by lane.
template <bool SHIFT, bool ROUNDED>
inline Sums learned_span(const float* x, const float* gradient, float* result, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    Totals totals;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        V inside = learned<SHIFT, ROUNDED>(load(x + i), load(gradient + i), q, totals);
        if (result) store(result + i, inside);
    }
    if (i < n) {
        // Of the padding, whose gradient is 0, nothing is added.
        float value[16] = {}, slope[16] = {};
        std::memcpy(value, x + i, (n - i) * sizeof(float));
        std::memcpy(slope, gradient + i, (n - i) * sizeof(float));
        V inside = learned<SHIFT, ROUNDED>(load(value), load(slope), q, totals);
        store(slope, inside);
        if (result) std::memcpy(result + i, slope, (n - i) * sizeof(float));
    }
    return totals.sum();
}
