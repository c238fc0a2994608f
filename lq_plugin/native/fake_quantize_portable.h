// What fake_quantize_kernel.h asks of an instruction set, in plain loops.

struct V {
    float lane[16];
};
struct Q {
    V inverse, low, high, scale;
};
template <class X>
inline V load(const X* p) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = widened(p[i]);
    return v;
}
template <class Y>
inline void store(Y* p, const V& v) {
    for (int i = 0; i < 16; ++i) narrowed(v.lane[i], p[i]);
}
inline V set(float x) {
    V v;
    for (float& lane : v.lane) lane = x;
    return v;
}
inline V quantized(const V& x, const Q& q, unsigned& bits) {
    V y;
    bits = 0;
    for (int i = 0; i < 16; ++i) {
        const float r = std::nearbyintf(x.lane[i] * q.inverse.lane[i]);
        bits |= static_cast<unsigned>(!(r < q.low.lane[i] || r > q.high.lane[i])) << i;
        y.lane[i] = at_most(at_least(r, q.low.lane[i]), q.high.lane[i]) * q.scale.lane[i];
    }
    return y;
}
inline V plus(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] + b.lane[i];
    return v;
}
inline V times(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] * b.lane[i];
    return v;
}
inline V lower(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
}
inline V upper(const V& a, const V& b) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
}
inline bool unordered(const V& x) {
    bool nan = false;
    for (float lane : x.lane) nan |= std::isnan(lane);
    return nan;
}
inline V kept(const V& x, unsigned bits) {
    V v;
    for (int i = 0; i < 16; ++i) v.lane[i] = bits >> i & 1 ? x.lane[i] : 0.0f;
    return v;
}
inline void keep(const uint16_t* x, uint16_t* y, unsigned bits) {
    for (int i = 0; i < 16; ++i) y[i] = bits >> i & 1 ? x[i] : 0;
}
struct Totals {
    double scale[16] = {}, zero_point[16] = {};
    static double sum(const double* parts) {
        double lane[16];
        std::copy_n(parts, 16, lane);
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
        return lane[0];
    }
    template <bool SHIFT>
    Sums sums() const {
        return {sum(scale), SHIFT ? sum(zero_point) : 0.0};
    }
};
// The gradient of x, and the terms of those of scale and zero point added to `totals`.
template <bool SHIFT, bool ROUNDED>
inline V learned(const V& x, const V& gradient, const Q& q, Totals& totals) {
    V inside;
    for (int i = 0; i < 16; ++i) {
        const float ratio = x.lane[i] * q.inverse.lane[i], rounded = std::nearbyintf(ratio), g = gradient.lane[i];
        const float level = at_most(at_least(rounded, q.low.lane[i]), q.high.lane[i]);
        const bool outside = ROUNDED ? level != rounded : !(ratio > q.low.lane[i] && ratio < q.high.lane[i]);
        const float term = g * (outside ? level : level - ratio), shift = outside ? g * -q.scale.lane[i] : 0.0f;
        totals.scale[i] += term;
        if (SHIFT) totals.zero_point[i] += shift;
        inside.lane[i] = outside ? 0.0f : g;
    }
    return inside;
}
// The square of what rounding and clipping, or clipping alone, do to x · inverse, added to `totals.scale`.
template <bool ROUNDED>
inline void squared_error(const V& x, const Q& q, Totals& totals) {
    for (int i = 0; i < 16; ++i) {
        const float ratio = x.lane[i] * q.inverse.lane[i];
        const float rounded = ROUNDED ? std::nearbyintf(ratio) : ratio;
        const float off = at_most(at_least(rounded, q.low.lane[i]), q.high.lane[i]) - ratio;
        totals.scale[i] += off * off;
    }
}
inline Spread spread(const V& low, const V& high, bool nan) {
    return {*std::min_element(low.lane, low.lane + 16), *std::max_element(high.lane, high.lane + 16), nan};
}
