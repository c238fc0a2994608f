// Kernels compiled once for each instruction set, in a namespace of its own, and the choice among them at run time.
// A source defines LQ_KERNELS, the header of its kernels, and includes this file; LQ_DISPATCH calls the chosen variant.
// A header of kernels finds 16 floats and what is done with them (fake_quantize_kernel.h lists it); it has no guard.

#include "common.h"

namespace {

namespace portable {
#include "fake_quantize_portable.h"
#include LQ_KERNELS
}  // namespace portable

#ifdef LQ_X86
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace avx2 {
#include "fake_quantize_avx2.h"
#include LQ_KERNELS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "fake_quantize_avx512.h"
#include LQ_KERNELS
}  // namespace avx512
#pragma GCC pop_options

#define LQ_DISPATCH(call) (variant == AVX512 ? avx512::call : variant == AVX2 ? avx2::call : portable::call)
#else
#define LQ_DISPATCH(call) (portable::call)
#endif

}  // namespace

// The fastest variant this processor runs.
extern "C" int lq_best_variant(void) { return best_variant(); }
