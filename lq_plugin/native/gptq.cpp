// GPTQ within a block of columns, in which each column waits for the one before it; see lq_plugin/functional/gptq.py. The numbers are
// those of the same operations in torch, rounded after each of them.
//
// Plain C interface without torch headers: it compiles in seconds.

#define LQ_KERNELS "gptq.h"
#include "variants.h"

extern "C" {

// Columns are taken from the last to the first. w: [columns][rows], becomes what rounding takes off it; y: likewise, for each column the sum
// of d[k] R[k] over the columns k outside the block that are done; done: what each weight is rounded to. total: [rows], squared errors
// are added to it. turned: the block of the factor, upper triangular, its rows `stride` apart; scale, zero_point: [columns][rows].
void lq_gptq_block(double* w, const double* y, float* done, double* total, const double* turned, int64_t stride, const float* scale,
                   const float* zero_point, int64_t columns, int64_t rows, int quant_min, int quant_max, int variant, int threads) {
    LQ_DISPATCH(gptq_block(w, y, done, total, turned, stride, scale, zero_point, columns, rows, quant_min, quant_max, threads));
}
}
