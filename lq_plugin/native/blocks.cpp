// Fake quantization of blocks along the channels, whose scales follow from the values: MX, OCP MX, NVFP4, two-level scales.
// The results are those of the same operations in torch; see fake_quantize.cpp, whose masks these are.

#include "common.h"

namespace {

// How the blocks of blocks.h are quantized. The same numbers stand in kernels.py.
enum Family { MICROEXPONENTS = 0, OCP = 1, NVFP4 = 2, VECTORS = 3 };
enum Mode { FLOOR = 0, RCEIL = 1, CEIL = 2, EVEN = 3, LEAST_ERROR = 4 };
enum Target { SIX = 0, FOUR_OR_SIX = 1 };
struct BlockRule {
    int family, block;
    // Elements that are integers.
    int quant_min, quant_max;
    // Elements that are floats of few bits, the exponent of the smallest normal and of the largest one.
    int mantissa_bits, min_exponent, max_exponent;
    // Of a pair's exponent (MICROEXPONENTS), of a block's scale (VECTORS).
    int scale_bits;
    int mode;
    float max_value;
    // The float above the scales of blocks (NVFP4, VECTORS).
    float coarse;
};
constexpr int LANES = 64, LINE = 256;
constexpr int32_t MAGNITUDE = 0x7FFFFFFF, EXPONENT_FIELD = 0x7F800000;

}  // namespace

#define LQ_KERNELS "blocks.h"
#include "variants.h"

extern "C" {

// x, y: [outer][channels][inner], blocks along the channels. Masks: runs of `inner`, or of `channels` where inner is 1, begin at a word
// each. mask may be null.
void lq_fake_quantize_blocks(int types, const void* x, void* y, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner,
                             const BlockRule* rule, int variant, int threads) {
    LQ_DISPATCH(blocks(types, x, y, mask, outer, channels, inner, *rule, threads));
}
}
