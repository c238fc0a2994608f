// Passes of formats with trained levels: the gradients of PACT's bound, and TTQ's three levels. The numbers are those of the same
// operations in torch (lq_plugin/functional/pact.py, ttq.py); sums are in double, in the order of memory.
//
// Plain C interface without torch headers: it compiles in seconds. Operands come with their `types`.

#define LQ_KERNELS "trained.h"
#include "variants.h"

extern "C" {

// x, gradient, result: [repeats][outer][run]; alpha, slope: [outer], the sums of the gradient from alpha on. result may be null.
void lq_pact_backward(int types, const void* x, const void* gradient, void* result, const float* alpha, double* slope, int64_t repeats,
                      int64_t outer, int64_t run, int variant, int threads) {
    const int64_t parts = pieces(run, CHUNK);
    std::vector<double> found(static_cast<size_t>(repeats * outer * parts));
    LQ_DISPATCH(pact_backward(types, x, gradient, result, alpha, found.data(), repeats * outer, outer, run, threads));
    std::fill(slope, slope + outer, 0.0);
    // In the order of memory, so that the number of threads changes nothing.
    for (size_t unit = 0; unit < found.size(); ++unit) slope[static_cast<int64_t>(unit) / parts % outer] += found[unit];
}

// x, y: [rows][n]; threshold, positive, negative: [rows].
void lq_ternary(int types, const void* x, void* y, const float* threshold, const float* positive, const float* negative, int64_t rows,
                int64_t n, int variant, int threads) {
    LQ_DISPATCH(ternary(types, x, y, threshold, positive, negative, rows, n, threads));
}

// The sums of the gradient over the weights above the threshold, and below its negative, [rows] each. result may be null.
void lq_ternary_backward(int types, const void* x, const void* gradient, void* result, const float* threshold, const float* positive,
                         const float* negative, double* above, double* below, int64_t rows, int64_t n, int variant, int threads) {
    const int64_t parts = pieces(n, CHUNK);
    std::vector<Sums> found(static_cast<size_t>(rows * parts));
    LQ_DISPATCH(ternary_backward(types, x, gradient, result, threshold, positive, negative, found.data(), rows, n, threads));
    std::fill(above, above + rows, 0.0);
    std::fill(below, below + rows, 0.0);
    for (size_t unit = 0; unit < found.size(); ++unit) {
        above[static_cast<int64_t>(unit) / parts] += found[unit].scale;
        below[static_cast<int64_t>(unit) / parts] += found[unit].zero_point;
    }
}
}
