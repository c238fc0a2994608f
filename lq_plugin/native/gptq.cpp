// GPTQ within a block of columns, in which each column waits for the one before it; see lq_plugin/functional/gptq.py. The numbers are
// those of the same operations in torch, rounded after each of them.
//
// Plain C interface without torch headers: it compiles in seconds.

#include "common.h"

namespace {

namespace portable {
#include "fake_quantize_portable.h"
#include "gptq.h"
}  // namespace portable

#ifdef LQ_X86
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace avx2 {
#include "fake_quantize_avx2.h"
#include "gptq.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "fake_quantize_avx512.h"
#include "gptq.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

extern "C" {

// The fastest variant this processor runs.
int lq_gptq_best(void) { return best_variant(); }

// w: [columns][rows], which stays as it is; done and errors likewise: what each weight is rounded to once the columns before it are, and
// (w - done) / factor[j][j]. factor: upper triangular, its rows `stride` apart; scale, zero_point: [columns][rows].
void lq_gptq_block(const double* w, float* done, double* errors, const double* factor, int64_t stride, const float* scale,
                   const float* zero_point, int64_t columns, int64_t rows, int quant_min, int quant_max, int variant, int threads) {
    LQ_DISPATCH(gptq_block(w, done, errors, factor, stride, scale, zero_point, columns, rows, quant_min, quant_max, threads));
}
}
