// The loops of fake_quantize.cpp, compiled once for each instruction set: included in a namespace of its own that has defined
//
//   V                      16 floats
//   load, store            unaligned, from and to elements of each type, and of integers as bytes
//   set(float)             the same in all lanes
//   quantized(x, q, bits)  clip(round(x · inverse), low, high) · scale; bit i is 1 where nothing was clipped
//   plus(a, b), times     rounded each
//   lower(a, b), upper     of two, a NaN in `a` passed over
//   unordered(x)           whether any lane is a NaN
//   kept(x, bits)          x where the bit is 1, else 0
//   keep(x, y, bits)       the same from 16 elements of 16 bits to others, in memory
//   learned(...), Totals   LSQ's backward pass; what passes is what lies strictly between low and high, or ROUNDED: rounds to within
//   squared_error(...)     what rounding and clipping, or clipping alone, do to a value, for a sum of squares
//   spread(low, high, nan) over the lanes

// The last elements of a run, n < 16; the lanes after them are 0.
template <class X>
inline V load_part(const X* x, int64_t n) {
    X part[16] = {};
    std::memcpy(part, x, n * sizeof(X));
    return load(part);
}
template <class Y>
inline void store_part(Y* y, const V& v, int64_t n) {
    Y part[16];
    store(part, v);
    std::memcpy(y, part, n * sizeof(Y));
}
inline uint16_t bits_part(unsigned bits, int64_t n) { return static_cast<uint16_t>(bits & ((1u << n) - 1u)); }

// One run of n elements with the same qparams.
template <class X, class Y>
inline void span(const X* x, Y* y, uint16_t* mask, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        store(y + i, quantized(load(x + i), q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        store_part(y + i, quantized(load_part(x + i, n - i), q, bits), n - i);
        if (mask) mask[i / 16] = bits_part(bits, n - i);
    }
}

// The extremes of what is taken in.
struct Extremes {
    V low, high;
    bool nan;
    inline Extremes() : low(set(INFINITY)), high(set(-INFINITY)), nan(false) {}
    inline void take(const V& v) {
        low = lower(v, low);
        high = upper(v, high);
        nan |= unordered(v);
    }
    // The last elements; the lanes after them hold the first of them again.
    template <class X>
    inline void take_part(const X* x, int64_t n) {
        X part[16];
        for (int64_t k = 0; k < 16; ++k) part[k] = x[k < n ? k : 0];
        take(load(part));
    }
    inline Spread found() const { return spread(low, high, nan); }
};

// The same, and the extremes of x on the way.
template <class X, class Y>
inline Spread span_observed(const X* x, Y* y, uint16_t* mask, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    Extremes extremes;
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        const V v = load(x + i);
        extremes.take(v);
        store(y + i, quantized(v, q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        extremes.take_part(x + i, n - i);
        store_part(y + i, quantized(load_part(x + i, n - i), q, bits), n - i);
        if (mask) mask[i / 16] = bits_part(bits, n - i);
    }
    return extremes.found();
}

// AHEAD: so many elements ahead memory is asked for, where a run goes on and on: a processor by itself stops at the end of a page.
template <int64_t AHEAD = 0, class X>
inline Spread extremes(const X* x, int64_t n) {
    Extremes found;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        if (AHEAD) __builtin_prefetch(x + i + AHEAD);
        found.take(load(x + i));
    }
    if (i < n) found.take_part(x + i, n - i);
    return found.found();
}

// One run of n elements, each with qparams of its own.
template <class X, class Y>
inline void columns(const X* x, Y* y, uint16_t* mask, int64_t n, const Table& table, int64_t first) {
    unsigned bits;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const int64_t k = first + i;
        const Q q{load(table.inverse + k), load(table.low + k), load(table.high + k), load(table.scale + k)};
        store(y + i, quantized(load(x + i), q, bits));
        if (mask) mask[i / 16] = static_cast<uint16_t>(bits);
    }
    if (i < n) {
        const int64_t k = first + i, rest = n - i;
        const Q q{load_part(table.inverse + k, rest), load_part(table.low + k, rest), load_part(table.high + k, rest),
                  load_part(table.scale + k, rest)};
        store_part(y + i, quantized(load_part(x + i, rest), q, bits), rest);
        if (mask) mask[i / 16] = bits_part(bits, rest);
    }
}

template <class X, class Y>
inline void masked(const Y* gradient, X* result, const uint16_t* mask, int64_t n) {
    int64_t i = 0;
    if constexpr (std::is_same<X, Y>::value && sizeof(X) == 2) {
        // They stay what they are: nothing is widened.
        for (; i + 16 <= n; i += 16) keep(&gradient[i].bits, &result[i].bits, mask[i / 16]);
    } else {
        for (; i + 16 <= n; i += 16) store(result + i, kept(load(gradient + i), mask[i / 16]));
    }
    if (i < n) store_part(result + i, kept(load_part(gradient + i, n - i), mask[i / 16]), n - i);
}

// The same in place: where nothing was clipped nothing is read or written.
template <class Y>
inline void cleared(Y* gradient, const uint16_t* mask, int64_t n) {
    int64_t i = 0;
    while (i < n) {
        uint64_t four = 0;
        if (i + 64 <= n) std::memcpy(&four, mask + i / 16, sizeof four);
        if (four == ~uint64_t{0}) {
            i += 64;
            continue;
        }
        const int64_t size = std::min<int64_t>(16, n - i);
        if (mask[i / 16] != bits_part(0xFFFFu, size)) masked(gradient + i, gradient + i, mask + i / 16, size);
        i += 16;
    }
}

template <class X, class Y>
inline void passed(const X* x, const Y* gradient, X* result, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    int64_t i = 0;
    unsigned bits;
    for (; i + 16 <= n; i += 16) {
        quantized(load(x + i), q, bits);
        store(result + i, kept(load(gradient + i), bits));
    }
    if (i < n) {
        quantized(load_part(x + i, n - i), q, bits);
        store_part(result + i, kept(load_part(gradient + i, n - i), bits), n - i);
    }
}

// The sum over n elements of (clip(round(x · inverse), low, high) - x · inverse)², in double; not ROUNDED: without the rounding.
template <bool ROUNDED>
inline double error_of_grid(const float* x, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(1.0f)};
    Totals totals;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) squared_error<ROUNDED>(load(x + i), q, totals);
    // Of the padding nothing is added: zero is a level.
    if (i < n) squared_error<ROUNDED>(load_part(x + i, n - i), q, totals);
    return totals.sums<false>().scale;
}

// LSQ's backward pass over n elements that share a scale; result may be null. Sums in double, 16 lanes, then lane by lane.
template <bool SHIFT, bool ROUNDED, class X, class Y>
inline Sums learned_span(const X* x, const Y* gradient, X* result, int64_t n, const Levels& levels) {
    const Q q{set(levels.inverse), set(levels.low), set(levels.high), set(levels.scale)};
    Totals totals;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        V inside = learned<SHIFT, ROUNDED>(load(x + i), load(gradient + i), q, totals);
        if (result) store(result + i, inside);
    }
    if (i < n) {
        // Of the padding, whose gradient is 0, nothing is added.
        V inside = learned<SHIFT, ROUNDED>(load_part(x + i, n - i), load_part(gradient + i, n - i), q, totals);
        if (result) store_part(result + i, inside, n - i);
    }
    return totals.sums<SHIFT>();
}
