// GPTQ within a block of columns, in which each column waits for the one before it; see lq_plugin/functional/gptq.py. The numbers are
// those of the same operations in torch, rounded after each of them.
//
// Plain C interface without torch headers: it compiles in seconds.

#define LQ_KERNELS "gptq.h"
#include "variants.h"

extern "C" {

// w: [columns][rows], which stays as it is; done and errors likewise: what each weight is rounded to once the columns before it are, and
// (w - done) / factor[j][j]. factor: upper triangular, its rows `stride` apart; scale, zero_point: [columns][rows].
void lq_gptq_block(const double* w, float* done, double* errors, const double* factor, int64_t stride, const float* scale,
                   const float* zero_point, int64_t columns, int64_t rows, int quant_min, int quant_max, int variant, int threads) {
    LQ_DISPATCH(gptq_block(w, done, errors, factor, stride, scale, zero_point, columns, rows, quant_min, quant_max, threads));
}
}
