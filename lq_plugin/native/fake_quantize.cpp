// Fake quantization in one pass over memory: x̂ = clip(round(x / s), low, high) · s with low = quant_min - z, high = quant_max - z.
//
// An operand is seen as [repeats][outer][run][inner] with one scale for each pair (outer, inner): a whole tensor is
// [1][1][n][1], channels of an image [N][C][H W][1], channels in the last dim [1][1][rows][C], groups of a weight
// [1][O G][g][k]. Masks have one bit an element, 1 where the gradient passes, in 16-bit words; runs (inner = 1), or rows of inner,
// begin at a word each.
//
// Every result is that of the same operations in torch, in the same order, rounded after each of them
// (compiled with -ffp-contract=off). Plain C interface without torch headers: it compiles in seconds. Operands come with their `types`.

#include "common.h"

namespace {

struct Shape {
    int64_t repeats, outer, run, inner;
};

// Inverse, low and high of each scale.
struct Store {
    std::vector<float> values;
    int64_t count;
    Store(const float* scale, const float* zero_point, int64_t count, int quant_min, int quant_max, bool learned)
        : values(static_cast<size_t>(4 * count)), count(count) {
        for (int64_t k = 0; k < count; ++k) {
            const Levels levels = levels_of(scale[k], zero_point[k], quant_min, quant_max, learned);
            values[k] = levels.inverse;
            values[count + k] = levels.low;
            values[2 * count + k] = levels.high;
            values[3 * count + k] = levels.scale;
        }
    }
    Table table() const { return {&values[0], &values[count], &values[2 * count], &values[3 * count]}; }
};

}  // namespace

#define LQ_KERNELS "fake_quantize_loops.h"
#include "variants.h"

extern "C" {

// x, y: [repeats][outer][run][inner]; scale, zero_point: [outer][inner]. mask may be null.
void lq_fake_quantize(int types, const void* x, void* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t repeats,
                      int64_t outer, int64_t run, int64_t inner, int quant_min, int quant_max, int learned, int variant, int threads) {
    if (repeats * outer * run == 1) {
        LQ_DISPATCH(elements(types, x, y, mask, scale, zero_point, inner, quant_min, quant_max, learned != 0, threads));
        return;
    }
    const Store levels(scale, zero_point, outer * inner, quant_min, quant_max, learned != 0);
    const Shape shape{repeats, outer, run, inner};
    LQ_DISPATCH(forward(types, x, y, mask, levels.table(), shape, threads));
}

// The same for one scale, and the running extremes low[0], high[0] moved to take in those of x.
void lq_fake_quantize_observed(int types, const void* x, void* y, uint16_t* mask, const float* scale, const float* zero_point, int64_t n,
                               int quant_min, int quant_max, float* low, float* high, int variant, int threads) {
    std::vector<Spread> found(static_cast<size_t>(pieces(n, CHUNK)));
    LQ_DISPATCH(observed(types, x, y, mask, levels_of(*scale, *zero_point, quant_min, quant_max), n, found.data(), threads));
    for (const Spread& spread : found) {
        // A NaN stays: torch's minimum and maximum pass it on.
        if (spread.nan) *low = *high = NAN;
        if (spread.low < *low) *low = spread.low;
        if (spread.high > *high) *high = spread.high;
    }
}

// x, y: [rows][n], each row with the range of its own extremes, which scale, zero_point: [rows] take. mask may be null.
void lq_fake_quantize_rows(int types, const void* x, void* y, uint16_t* mask, float* scale, float* zero_point, int64_t rows, int64_t n,
                           int quant_min, int quant_max, int affine, int variant, int threads) {
    LQ_DISPATCH(rows_with_ranges(types, x, y, mask, scale, zero_point, rows, n, quant_min, quant_max, affine != 0, threads));
}

// low, high: [rows], the extremes of each row of x: [rows][n].
void lq_row_extremes(int types, const void* x, float* low, float* high, int64_t rows, int64_t n, int variant, int threads) {
    LQ_DISPATCH(row_extremes(types, x, low, high, rows, n, threads));
}

// errors: [rows][candidates], the means over each row of x: [rows][n] of the squared errors of fake quantization, for as many grids a row,
// all of which have a level of 0; without `rounded` what clipping alone costs. zero_point may be null: all are 0.
void lq_grid_errors(const float* x, const float* scale, const float* zero_point, double* errors, int64_t rows, int64_t n,
                    int64_t candidates, int quant_min, int quant_max, int rounded, int variant, int threads) {
    LQ_DISPATCH(grid_errors(x, scale, zero_point, errors, rows, n, candidates, quant_min, quant_max, rounded != 0, threads));
}

// scale[0], zero_point[0]: those of the extremes of x: [n].
void lq_qparams(int types, const void* x, float* scale, float* zero_point, int64_t n, int quant_min, int quant_max, int affine, int variant,
                int threads) {
    std::vector<Spread> found(static_cast<size_t>(pieces(n, CHUNK)));
    LQ_DISPATCH(parts_extremes(types, x, found.data(), n, threads));
    Spread all = found[0];
    for (const Spread& part : found) {
        all.low = std::min(all.low, part.low);
        all.high = std::max(all.high, part.high);
        all.nan |= part.nan;
    }
    *scale = scale_of(all.nan ? NAN : all.low, all.nan ? NAN : all.high, quant_min, quant_max, affine != 0, *zero_point);
}

// result = gradient where the bit is 1, else 0; the gradient is of y's type, the result of x's.
void lq_mask_gradient(int types, const void* gradient, void* result, const uint16_t* mask, int64_t runs, int64_t n, int variant, int threads) {
    LQ_DISPATCH(mask_gradient(types, gradient, result, mask, runs, n, threads));
}

// gradient = 0 where the bit is 0, in place; the gradient is of y's type.
void lq_keep(int types, void* gradient, const uint16_t* mask, int64_t runs, int64_t n, int variant, int threads) {
    LQ_DISPATCH(keep_gradient(types, gradient, mask, runs, n, threads));
}

// result = gradient where x: [n] is not clipped with one scale, else 0.
void lq_passed_gradient(int types, const void* x, const void* gradient, void* result, const float* scale, const float* zero_point, int64_t n,
                        int quant_min, int quant_max, int variant, int threads) {
    LQ_DISPATCH(passed_gradient(types, x, gradient, result, levels_of(*scale, *zero_point, quant_min, quant_max), n, threads));
}

// LSQ's backward pass for inner = 1; result, [outer] scale_gradient and zero_point_gradient without the factor g.
// result and zero_point_gradient may be null. rounded: see `Band` of lq_plugin/functional/lsq.py.
void lq_learned_backward(int types, const void* x, const void* gradient, void* result, const float* scale, const float* zero_point,
                         double* scale_gradient, double* zero_point_gradient, int64_t repeats, int64_t outer, int64_t run, int quant_min,
                         int quant_max, int rounded, int variant, int threads) {
    const Store levels(scale, zero_point, outer, quant_min, quant_max, true);
    const int64_t parts = pieces(run, CHUNK);
    std::vector<Sums> found(static_cast<size_t>(repeats * outer * parts));
    const bool shift = zero_point_gradient != nullptr;
    const Shape shape{repeats, outer, run, 1};
    LQ_DISPATCH(learned_backward(types, x, gradient, result, levels.table(), found.data(), shape, shift, rounded != 0, threads));
    std::fill(scale_gradient, scale_gradient + outer, 0.0);
    if (zero_point_gradient) std::fill(zero_point_gradient, zero_point_gradient + outer, 0.0);
    // In the order of memory, so that the number of threads changes nothing.
    for (size_t unit = 0; unit < found.size(); ++unit) {
        const int64_t channel = static_cast<int64_t>(unit) / parts % outer;
        scale_gradient[channel] += found[unit].scale;
        if (zero_point_gradient) zero_point_gradient[channel] += found[unit].zero_point;
    }
}
}
