// The loops of trained.cpp, compiled once for each instruction set (variants.h).

#include "fake_quantize_kernel.h"

// Up to 16 elements as floats, with 0 in the lanes after them.
template <class X>
inline void widen(const X* x, int64_t n, float* lanes) {
    store(lanes, n == 16 ? load(x) : load_part(x, n));
}
template <class Y>
inline void narrow(const float* lanes, Y* y, int64_t n) {
    if (n == 16)
        store(y, load(lanes));
    else
        store_part(y, load(lanes), n);
}
inline double sum_of(const double* lanes) {
    double all = 0.0;
    for (int k = 0; k < 16; ++k) all += lanes[k];
    return all;
}

// result = gradient in [0, alpha), else 0; returns the sum of the gradient from alpha on.
template <class X, class Y>
inline double pact_span(const X* x, const Y* gradient, X* result, int64_t n, float alpha) {
    double totals[16] = {};
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t size = std::min<int64_t>(16, n - i);
        float v[16], g[16], inside[16];
        widen(x + i, size, v);
        widen(gradient + i, size, g);
        for (int k = 0; k < 16; ++k) {
            const bool above = v[k] >= alpha;
            totals[k] += static_cast<double>(above ? g[k] : 0.0f);
            inside[k] = above || v[k] < 0.0f ? 0.0f : g[k];
        }
        if (result) narrow(inside, result + i, size);
    }
    return sum_of(totals);
}

template <class X, class Y>
inline void pact_backward_of(const void* x_at, const void* gradient_at, void* result_at, const float* alpha, double* found, int64_t runs,
                             int64_t outer, int64_t run, int threads) {
    const X* x = static_cast<const X*>(x_at);
    const Y* gradient = static_cast<const Y*>(gradient_at);
    X* result = static_cast<X*>(result_at);
    const int64_t parts = pieces(run, CHUNK);
    LQ_PARALLEL(runs * run)
    for (int64_t unit = 0; unit < runs * parts; ++unit) {
        const int64_t row = unit / parts, part = unit % parts * CHUNK, first = row * run + part;
        X* inside = result ? result + first : nullptr;
        found[unit] = pact_span(x + first, gradient + first, inside, std::min(CHUNK, run - part), alpha[row % outer]);
    }
}
inline void pact_backward(int types, const void* x, const void* gradient, void* result, const float* alpha, double* found, int64_t runs,
                          int64_t outer, int64_t run, int threads) {
    LQ_BY_TYPES(types, pact_backward_of, x, gradient, result, alpha, found, runs, outer, run, threads);
}

// One run of weights with its Δ, Wp and Wn.
struct Ternary {
    float threshold, positive, negative;
};

template <class X, class Y>
inline void ternary_span(const X* x, Y* y, int64_t n, const Ternary& t) {
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t size = std::min<int64_t>(16, n - i);
        float v[16], w[16];
        widen(x + i, size, v);
        for (int k = 0; k < 16; ++k) w[k] = v[k] > t.threshold ? t.positive : v[k] < -t.threshold ? -t.negative : 0.0f;
        narrow(w, y + i, size);
    }
}

// Sums of the gradient above Δ and below -Δ; result may be null.
template <class X, class Y>
inline Sums ternary_backward_span(const X* x, const Y* gradient, X* result, int64_t n, const Ternary& t) {
    double above[16] = {}, below[16] = {};
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t size = std::min<int64_t>(16, n - i);
        float v[16], g[16], inside[16];
        widen(x + i, size, v);
        widen(gradient + i, size, g);
        for (int k = 0; k < 16; ++k) {
            const bool over = v[k] > t.threshold, under = v[k] < -t.threshold;
            above[k] += static_cast<double>(over ? g[k] : 0.0f);
            below[k] += static_cast<double>(under ? g[k] : 0.0f);
            inside[k] = (over ? t.positive : under ? t.negative : 1.0f) * g[k];
        }
        if (result) narrow(inside, result + i, size);
    }
    return {sum_of(above), sum_of(below)};
}

template <class X, class Y>
inline void ternary_of(const void* x_at, void* y_at, const float* threshold, const float* positive, const float* negative, int64_t rows,
                       int64_t n, int threads) {
    const X* x = static_cast<const X*>(x_at);
    Y* y = static_cast<Y*>(y_at);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(rows * n)
    for (int64_t unit = 0; unit < rows * parts; ++unit) {
        const int64_t row = unit / parts, part = unit % parts * CHUNK, first = row * n + part;
        ternary_span(x + first, y + first, std::min(CHUNK, n - part), {threshold[row], positive[row], negative[row]});
    }
}
inline void ternary(int types, const void* x, void* y, const float* threshold, const float* positive, const float* negative, int64_t rows,
                    int64_t n, int threads) {
    LQ_BY_TYPES(types, ternary_of, x, y, threshold, positive, negative, rows, n, threads);
}

template <class X, class Y>
inline void ternary_backward_of(const void* x_at, const void* gradient_at, void* result_at, const float* threshold, const float* positive,
                                const float* negative, Sums* found, int64_t rows, int64_t n, int threads) {
    const X* x = static_cast<const X*>(x_at);
    const Y* gradient = static_cast<const Y*>(gradient_at);
    X* result = static_cast<X*>(result_at);
    const int64_t parts = pieces(n, CHUNK);
    LQ_PARALLEL(rows * n)
    for (int64_t unit = 0; unit < rows * parts; ++unit) {
        const int64_t row = unit / parts, part = unit % parts * CHUNK, first = row * n + part;
        const Ternary t{threshold[row], positive[row], negative[row]};
        X* inside = result ? result + first : nullptr;
        found[unit] = ternary_backward_span(x + first, gradient + first, inside, std::min(CHUNK, n - part), t);
    }
}
inline void ternary_backward(int types, const void* x, const void* gradient, void* result, const float* threshold, const float* positive,
                             const float* negative, Sums* found, int64_t rows, int64_t n, int threads) {
    LQ_BY_TYPES(types, ternary_backward_of, x, gradient, result, threshold, positive, negative, found, rows, n, threads);
}
