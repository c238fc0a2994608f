// Fake quantization of blocks along the channels, whose scales follow from the values; compiled once for each instruction set (variants.h).
// Plain loops over lanes that stand side by side, which the compiler turns into the instructions of the namespace.
//
// An operand is seen as [outer][channels][inner]; a block is `rule.block` channels of one (outer, inner). A tile is some of them next
// to each other: `rows` channels by at most LANES blocks.

// Of numbers that are not negative; from 2^23 on, which every caller clips, it may be off.
inline float rounded(float x) { return (x + 0x1p23f) - 0x1p23f; }

// The nearest element below or at the largest one (round_to_minifloat of lq_plugin/functional/minifloat.py), for x that is not negative.
inline float cast(float x, int mantissa_bits, int32_t min_power, float max_value) {
    x = at_most(x, max_value);
    int32_t power = bits_of(x) & EXPONENT_FIELD;
    power = power < min_power ? min_power : power;
    // 2^-e and 2^e of the step 2^e, from the bits.
    return rounded(x * from_bits(((254 + mantissa_bits) << 23) - power)) * from_bits(power - (mantissa_bits << 23));
}

// One row of integers; pass is 1 where nothing is clipped.
inline void integer_row(const float* __restrict x, float* __restrict y, uint8_t* __restrict pass, const float* __restrict inverse,
                        const float* __restrict scale, int lanes, float low, float high) {
    for (int i = 0; i < lanes; ++i) {
        const float ratio = x[i] * inverse[i], level = std::copysign(rounded(std::fabs(ratio)), ratio);
        pass[i] = !(level < low) & !(level > high);
        y[i] = at_most(at_least(level, low), high) * scale[i];
    }
}

// The same of elements that are floats of few bits.
inline void float_row(const float* __restrict x, float* __restrict y, uint8_t* __restrict pass, const float* __restrict inverse,
                      const float* __restrict scale, int lanes, int mantissa_bits, int32_t min_power, float max_value, float inverse_step,
                      float steps) {
    for (int i = 0; i < lanes; ++i) {
        const float ratio = x[i] * inverse[i], size = std::fabs(ratio);
        pass[i] = !(rounded(size * inverse_step) > steps);
        y[i] = std::copysign(cast(size, mantissa_bits, min_power, max_value), ratio) * scale[i];
    }
}

// mx_scale of lq_plugin/functional/ocp_mx.py from the bits of the largest magnitude, `shift` exponents above it.
inline float ocp_scale(int32_t largest, int shift, const BlockRule& rule) {
    float amax = from_bits(largest);
    if (std::isnan(amax)) return amax;
    if (amax == 0.0f) return 0x1p-127f;
    int exponent, unused;
    const float m = std::frexp(at_most(amax, std::numeric_limits<float>::max()), &exponent);
    exponent += shift - 1 - rule.max_exponent;
    if (rule.mode == RCEIL) exponent += m > std::frexp(rule.max_value, &unused);
    if (rule.mode == CEIL) exponent += m > 0.5f;
    if (rule.mode == EVEN) exponent += m >= 1.0f - std::ldexp(1.0f, -(rule.mantissa_bits + 2));
    return std::ldexp(1.0f, std::min(std::max(exponent, -127), 127));
}

// How many scales a block chooses from; the first one is preferred.
template <int FAMILY>
inline int candidates(const BlockRule& rule) {
    if (FAMILY == OCP) return rule.mode == LEAST_ERROR ? 3 : 1;
    return FAMILY == NVFP4 && rule.mode == FOUR_OR_SIX ? 2 : 1;
}

// Scale of a block of floats and what its elements are multiplied with, from the bits of the largest magnitude.
template <int FAMILY>
inline float block_scale(int32_t largest, int candidate, const BlockRule& rule, float& inverse) {
    if (FAMILY == OCP) {
        const float scale = ocp_scale(largest, candidate == 0 ? 0 : candidate == 1 ? -1 : 1, rule);
        inverse = 1.0f / scale;
        return scale;
    }
    // nvfp4_scales of lq_plugin/functional/nvfp4.py: an E4M3 number under one float.
    const float element = candidate == 0 ? rule.max_value : 4.0f;
    const float block = at_least(cast(from_bits(largest) / element / rule.coarse, 3, (127 - 6) << 23, 448.0f), 0x1p-9f);
    inverse = 1.0f / rule.coarse / block;
    return block * rule.coarse;
}

// The same of integers, from the extremes, as VectorActivationQuantizer.vector_scale does it.
inline float vector_scale(float low, float high, bool nan, const BlockRule& rule, float& inverse) {
    float unused;
    const float wanted = nan ? NAN : scale_of(low, high, rule.quant_min, rule.quant_max, false, unused);
    const float most = static_cast<float>((1 << rule.scale_bits) - 1);
    const float scale = at_most(at_least(std::nearbyintf(wanted / rule.coarse), 1.0f), most) * rule.coarse;
    inverse = 1.0f / scale;
    return scale;
}

// mx_step of lq_plugin/functional/mx.py from the bits of the largest magnitudes of a block and of a pair.
inline float pair_scale(int32_t largest, int32_t pair, int32_t finest, int32_t mantissa_bits) {
    const int32_t field = largest >> 23, top = field > 254 ? 254 : field;
    int32_t shift = top - (pair >> 23);
    shift = shift > finest ? finest : shift;  // a pair of zeros is zero whatever its step
    const int32_t step = top - shift - (mantissa_bits - 1);
    return from_bits((step < 1 ? 1 : step) << 23);
}

inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t magnitude(float x) { return bits_of(x) & MAGNITUDE; }

template <int FAMILY>
inline void row(const float* x, float* y, uint8_t* pass, const float* inverse, const float* scale, int lanes, const BlockRule& rule) {
    if (FAMILY == MICROEXPONENTS || FAMILY == VECTORS) {
        integer_row(x, y, pass, inverse, scale, lanes, static_cast<float>(rule.quant_min), static_cast<float>(rule.quant_max));
        return;
    }
    const float step = std::ldexp(1.0f, rule.max_exponent - rule.mantissa_bits);
    float_row(x, y, pass, inverse, scale, lanes, rule.mantissa_bits, (127 + rule.min_exponent) << 23, rule.max_value, 1.0f / step,
              rule.max_value / step);
}

// Elements of the largest block that chooses among scales.
constexpr int CHOOSING = 32;

// One element of least_error in lq_plugin/functional/block_choice.py.
inline float squared_error(float x, float inverse, float scale, float unit, int mantissa_bits, int32_t min_power, float max_value) {
    const float ratio = x * inverse;
    const float error = (std::copysign(cast(std::fabs(ratio), mantissa_bits, min_power, max_value), ratio) * scale - x) * unit;
    return error * error;
}

// Errors of each lane's block into `total`, summed halves on halves.
inline void lane_errors(const float* x, int64_t x_row, int64_t rows, int lanes, const float* inverse, const float* scale, const float* unit,
                        const BlockRule& rule, float* total) {
    float errors[CHOOSING * LANES];
    const int32_t min_power = (127 + rule.min_exponent) << 23;
    for (int64_t k = 0; k < rows; ++k)
        for (int i = 0; i < lanes; ++i)
            errors[k * LANES + i] =
                squared_error(x[k * x_row + i], inverse[i], scale[i], unit[i], rule.mantissa_bits, min_power, rule.max_value);
    std::fill(errors + rows * LANES, errors + rule.block * LANES, 0.0f);
    for (int half = rule.block / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k)
            for (int i = 0; i < lanes; ++i) errors[k * LANES + i] += errors[(k + half) * LANES + i];
    std::copy(errors, errors + lanes, total);
}

// The same of one block of neighbours.
inline float neighbours_error(const float* x, int length, float inverse, float scale, float unit, const BlockRule& rule) {
    float errors[CHOOSING];
    const int32_t min_power = (127 + rule.min_exponent) << 23;
    for (int i = 0; i < length; ++i)
        errors[i] = squared_error(x[i], inverse, scale, unit, rule.mantissa_bits, min_power, rule.max_value);
    std::fill(errors + length, errors + rule.block, 0.0f);
    for (int half = rule.block / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) errors[i] += errors[i + half];
    return errors[0];
}

// Blocks side by side, channels one below the other.
template <int FAMILY>
inline void tile(const float* x, int64_t x_row, float* y, int64_t y_row, uint8_t* pass, int64_t rows, int lanes, const BlockRule& rule) {
    float inverse[LANES], scale[LANES];
    const auto quantize = [&](int64_t k) {
        row<FAMILY>(x + k * x_row, y + k * y_row, pass + k * LANES, inverse, scale, lanes, rule);
    };
    if (FAMILY == VECTORS) {
        float low[LANES] = {}, high[LANES] = {};  // 0 is in every range
        int32_t nan[LANES] = {};
        for (int64_t k = 0; k < rows; ++k)
            for (int i = 0; i < lanes; ++i) {
                const float value = x[k * x_row + i];
                low[i] = value < low[i] ? value : low[i];
                high[i] = value > high[i] ? value : high[i];
                nan[i] |= value != value;
            }
        for (int i = 0; i < lanes; ++i) scale[i] = vector_scale(low[i], high[i], nan[i], rule, inverse[i]);
        for (int64_t k = 0; k < rows; ++k) quantize(k);
        return;
    }
    int32_t largest[LANES] = {};
    for (int64_t k = 0; k < rows; ++k)
        for (int i = 0; i < lanes; ++i) largest[i] = larger(largest[i], magnitude(x[k * x_row + i]));
    if (FAMILY == MICROEXPONENTS) {
        for (int64_t k = 0; k < rows; k += 2) {
            const float *first = x + k * x_row, *second = k + 1 < rows ? first + x_row : first;
            for (int i = 0; i < lanes; ++i) {
                scale[i] = pair_scale(largest[i], larger(magnitude(first[i]), magnitude(second[i])), (1 << rule.scale_bits) - 1, rule.mantissa_bits);
                inverse[i] = 1.0f / scale[i];
            }
            quantize(k);
            if (k + 1 < rows) quantize(k + 1);
        }
        return;
    }
    for (int i = 0; i < lanes; ++i) scale[i] = block_scale<FAMILY>(largest[i], 0, rule, inverse[i]);
    if (candidates<FAMILY>(rule) > 1) {
        float unit[LANES], least[LANES], error[LANES], other_inverse[LANES], other_scale[LANES];
        std::copy(inverse, inverse + lanes, unit);
        lane_errors(x, x_row, rows, lanes, inverse, scale, unit, rule, least);
        for (int candidate = 1; candidate < candidates<FAMILY>(rule); ++candidate) {
            for (int i = 0; i < lanes; ++i) other_scale[i] = block_scale<FAMILY>(largest[i], candidate, rule, other_inverse[i]);
            lane_errors(x, x_row, rows, lanes, other_inverse, other_scale, unit, rule, error);
            for (int i = 0; i < lanes; ++i) {
                const bool better = error[i] < least[i];
                scale[i] = better ? other_scale[i] : scale[i];
                inverse[i] = better ? other_inverse[i] : inverse[i];
                least[i] = better ? error[i] : least[i];
            }
        }
    }
    for (int64_t k = 0; k < rows; ++k) quantize(k);
}

// Channels side by side, block after block.
template <int FAMILY>
inline void line(const float* x, float* y, uint8_t* pass, int lanes, const BlockRule& rule) {
    float inverse[LINE], scale[LINE];
    if (FAMILY == MICROEXPONENTS) {
        const int pairs = (lanes + 1) / 2, finest = (1 << rule.scale_bits) - 1;
        int32_t pair[LINE / 2], largest[LINE / 2];
        float steps[LINE / 2];
        for (int j = 0; j < lanes / 2; ++j) pair[j] = larger(magnitude(x[2 * j]), magnitude(x[2 * j + 1]));
        if (lanes % 2) pair[pairs - 1] = magnitude(x[lanes - 1]);
        for (int first = 0; first < pairs; first += rule.block / 2) {
            const int last = std::min(first + rule.block / 2, pairs);
            std::fill(largest + first, largest + last, *std::max_element(pair + first, pair + last));
        }
        for (int j = 0; j < pairs; ++j) steps[j] = pair_scale(largest[j], pair[j], finest, rule.mantissa_bits);
        for (int j = 0; j < pairs; ++j) {
            scale[2 * j] = scale[2 * j + 1] = steps[j];
            inverse[2 * j] = inverse[2 * j + 1] = 1.0f / steps[j];
        }
        return row<FAMILY>(x, y, pass, inverse, scale, lanes, rule);
    }
    for (int first = 0; first < lanes; first += rule.block) {
        const int last = std::min(first + rule.block, lanes);
        float factor, its_scale;
        if (FAMILY == VECTORS) {
            float low = 0.0f, high = 0.0f;
            int32_t nan = 0;
            for (int i = first; i < last; ++i) {
                low = x[i] < low ? x[i] : low;
                high = x[i] > high ? x[i] : high;
                nan |= x[i] != x[i];
            }
            its_scale = vector_scale(low, high, nan, rule, factor);
        } else {
            int32_t largest = 0;
            for (int i = first; i < last; ++i) largest = larger(largest, magnitude(x[i]));
            its_scale = block_scale<FAMILY>(largest, 0, rule, factor);
            if (candidates<FAMILY>(rule) > 1) {
                const float unit = factor;
                float least = neighbours_error(x + first, last - first, factor, its_scale, unit, rule);
                for (int candidate = 1; candidate < candidates<FAMILY>(rule); ++candidate) {
                    float other_factor;
                    const float other_scale = block_scale<FAMILY>(largest, candidate, rule, other_factor);
                    const float error = neighbours_error(x + first, last - first, other_factor, other_scale, unit, rule);
                    if (error < least) least = error, its_scale = other_scale, factor = other_factor;
                }
            }
        }
        std::fill(scale + first, scale + last, its_scale);
        std::fill(inverse + first, inverse + last, factor);
    }
    row<FAMILY>(x, y, pass, inverse, scale, lanes, rule);
}

inline void packed(const uint8_t* pass, uint16_t* mask, int64_t n) {
    int64_t i = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; i + 16 <= n; i += 16) {
        // Byte j of eight moves to bit 56 + j.
        uint64_t halves[2];
        std::memcpy(halves, pass + i, sizeof halves);
        for (uint64_t& half : halves) half = half * 0x0102040810204080u >> 56;
        mask[i / 16] = static_cast<uint16_t>(halves[0] | halves[1] << 8);
    }
#endif
    for (; i < n; i += 16) {
        unsigned word = 0;
        for (int64_t j = std::min<int64_t>(n, i + 16) - 1; j >= i; --j) word = word << 1 | pass[j];
        mask[i / 16] = static_cast<uint16_t>(word);
    }
}

// Compiled once for each family, not for each type of elements.
inline auto tile_of(const BlockRule& rule) {
    return rule.family == MICROEXPONENTS ? tile<MICROEXPONENTS> : rule.family == OCP ? tile<OCP> : rule.family == NVFP4 ? tile<NVFP4> : tile<VECTORS>;
}
inline auto line_of(const BlockRule& rule) {
    return rule.family == MICROEXPONENTS ? line<MICROEXPONENTS> : rule.family == OCP ? line<OCP> : rule.family == NVFP4 ? line<NVFP4> : line<VECTORS>;
}

// Elements of another type go through floats; what is float already stays where it is.
template <class X>
inline void widen(const X* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = widened(x[i]);
}
template <class Y>
inline void narrow(const float* in, Y* y, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, load(in + i));
    for (; i < n; ++i) narrowed(in[i], y[i]);
}

// Blocks whose channels lie far apart: tiles in place.
template <class X, class Y>
inline void wide_blocks(const X* x, Y* y, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner, const BlockRule& rule,
                        int threads) {
    constexpr bool WIDENS = !std::is_same<X, float>::value, NARROWS = !std::is_same<Y, float>::value;
    const int64_t groups = pieces(channels, rule.block), words = pieces(inner, 16);
    LQ_PARALLEL(outer * channels * inner)
    for (int64_t block = 0; block < outer * groups; ++block) {
        const size_t size = static_cast<size_t>(rule.block * LANES);
        std::vector<uint8_t> pass(size);
        std::vector<float> in(WIDENS ? size : 0), out(NARROWS ? size : 0);
        const int64_t first = block / groups * channels + block % groups * rule.block;
        const int64_t rows = std::min<int64_t>(rule.block, channels - block % groups * rule.block);
        for (int64_t column = 0; column < inner; column += LANES) {
            const int64_t at = first * inner + column, lanes = std::min<int64_t>(LANES, inner - column);
            const float* from;
            float* to;
            if constexpr (WIDENS) {
                for (int64_t k = 0; k < rows; ++k) widen(x + at + k * inner, &in[k * LANES], lanes);
                from = in.data();
            } else {
                from = x + at;
            }
            if constexpr (NARROWS) {
                to = out.data();
            } else {
                to = y + at;
            }
            tile_of(rule)(from, WIDENS ? LANES : inner, to, NARROWS ? LANES : inner, pass.data(), rows, static_cast<int>(lanes), rule);
            if constexpr (NARROWS)
                for (int64_t k = 0; k < rows; ++k) narrow(&out[k * LANES], y + at + k * inner, lanes);
            for (int64_t k = 0; mask && k < rows; ++k) packed(&pass[k * LANES], mask + (first + k) * words + column / 16, lanes);
        }
    }
}

// Blocks whose channels lie a few elements apart: several are gathered side by side.
template <class X, class Y>
inline void narrow_blocks(const X* x, Y* y, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner, const BlockRule& rule,
                          int threads) {
    const int64_t groups = pieces(channels, rule.block), blocks = outer * groups, together = LANES / inner;
    LQ_PARALLEL(outer * channels * inner)
    for (int64_t start = 0; start < blocks; start += together) {
        const size_t size = static_cast<size_t>(rule.block * LANES);
        std::vector<float> in(size), out(size);
        std::vector<uint8_t> pass(size);
        const int64_t count = std::min(together, blocks - start);
        // Each row of each block: where it lies in the tensor, and in the tile.
        const auto each_row = [&](auto&& visit) {
            for (int64_t u = 0; u < count; ++u) {
                const int64_t group = (start + u) % groups, first = (start + u) / groups * channels + group * rule.block;
                for (int64_t k = 0; k < std::min<int64_t>(rule.block, channels - group * rule.block); ++k) visit(first + k, k * LANES + u * inner);
            }
        };
        each_row([&](int64_t from, int64_t to) {
            for (int64_t j = 0; j < inner; ++j) in[to + j] = widened(x[from * inner + j]);
        });
        tile_of(rule)(in.data(), LANES, out.data(), LANES, pass.data(), rule.block, static_cast<int>(count * inner), rule);
        each_row([&](int64_t to, int64_t from) {
            for (int64_t j = 0; j < inner; ++j) narrowed(out[from + j], y[to * inner + j]);
            if (mask) packed(&pass[from], mask + to, inner);
        });
    }
}

// Blocks of neighbours.
template <class X, class Y>
inline void lines(const X* x, Y* y, uint16_t* mask, int64_t outer, int64_t channels, const BlockRule& rule, int threads) {
    constexpr bool WIDENS = !std::is_same<X, float>::value, NARROWS = !std::is_same<Y, float>::value;
    const int64_t length = LINE / rule.block * rule.block, words = pieces(channels, 16);
    LQ_PARALLEL(outer * channels)
    for (int64_t row = 0; row < outer; ++row) {
        uint8_t pass[LINE];
        float in[WIDENS ? LINE : 1], out[NARROWS ? LINE : 1];
        for (int64_t first = 0; first < channels; first += length) {
            const int64_t at = row * channels + first, lanes = std::min(length, channels - first);
            const float* from;
            float* to;
            if constexpr (WIDENS) {
                widen(x + at, in, lanes);
                from = in;
            } else {
                from = x + at;
            }
            if constexpr (NARROWS) {
                to = out;
            } else {
                to = y + at;
            }
            line_of(rule)(from, to, pass, static_cast<int>(lanes), rule);
            if constexpr (NARROWS) narrow(out, y + at, lanes);
            if (mask) packed(pass, mask + row * words + first / 16, lanes);
        }
    }
}

template <class X, class Y>
inline void blocks_of(const void* x_at, void* y_at, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner,
                      const BlockRule& rule, int threads) {
    const X* x = static_cast<const X*>(x_at);
    Y* y = static_cast<Y*>(y_at);
    if (inner == 1) return lines(x, y, mask, outer, channels, rule, threads);
    const auto pass = inner < 16 ? narrow_blocks<X, Y> : wide_blocks<X, Y>;
    pass(x, y, mask, outer, channels, inner, rule, threads);
}

inline void blocks(int types, const void* x, void* y, uint16_t* mask, int64_t outer, int64_t channels, int64_t inner,
                   const BlockRule& rule, int threads) {
    LQ_BY_TYPES(types, blocks_of, x, y, mask, outer, channels, inner, rule, threads);
}
