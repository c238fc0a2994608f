// Products of -1 and +1 as exclusive or and bit counts: dot(a, b) = K - 2 * popcount(a ^ b).
//
// A bit is 1 for +1. Rows x: [rows][words], 64 elements a word, element k in bit k % 64 of word k / 64.
// Weights w: [ceil(outputs / 8)][words][8]: word k of eight outputs side by side, so that one 512-bit register holds
// eight outputs and no sum runs across a register. Bits that pad the last word are 0 in both.
//
// Plain C interface without torch headers: it compiles in a second.

#include <cstdint>
#include <cstddef>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define LQ_X86 1
#endif

namespace {

constexpr int LANES = 8;

enum Variant { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// Outputs of one group of eight for one row; scale and bias may be null.
inline void store(const int64_t* counts, int lanes, int64_t elements, const float* scale, const float* bias, float* y) {
    for (int lane = 0; lane < lanes; ++lane) {
        // Two roundings, as torch does them (compiled with -ffp-contract=off).
        float value = static_cast<float>(elements - 2 * counts[lane]);
        if (scale) value *= scale[lane];
        if (bias) value += bias[lane];
        y[lane] = value;
    }
}

struct Task {
    const uint64_t* x;
    const uint64_t* w;
    const float* scale;
    const float* bias;
    float* y;
    int64_t rows, words, outputs, elements;

    int lanes(int64_t group) const {
        int64_t left = outputs - group * LANES;
        return left < LANES ? static_cast<int>(left) : LANES;
    }
    const uint64_t* weights(int64_t group) const { return w + group * words * LANES; }
    void finish(const int64_t* counts, int64_t row, int64_t group) const {
        int64_t first = group * LANES;
        store(counts, lanes(group), elements, scale ? scale + first : nullptr, bias ? bias + first : nullptr, y + row * outputs + first);
    }
};

void portable(const Task& task, int64_t group) {
    const uint64_t* w = task.weights(group);
    for (int64_t row = 0; row < task.rows; ++row) {
        const uint64_t* x = task.x + row * task.words;
        int64_t counts[LANES] = {};
        for (int64_t word = 0; word < task.words; ++word)
            for (int lane = 0; lane < LANES; ++lane) counts[lane] += __builtin_popcountll(x[word] ^ w[word * LANES + lane]);
        task.finish(counts, row, group);
    }
}

#ifdef LQ_X86

#define LQ_256 __attribute__((target("avx2")))

// Bits of each byte by two lookups (W. Muła), summed into 64-bit lanes.
LQ_256 inline __m256i popcount256(__m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sums = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                                   _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
    return _mm256_sad_epu8(sums, _mm256_setzero_si256());
}

// a + b + c of each bit: the sum's lower bit in a, its higher one comes back (carry-save adder).
LQ_256 inline __m256i carry(__m256i& a, __m256i b, __m256i c) {
    const __m256i either = _mm256_xor_si256(a, b), both = _mm256_and_si256(a, b);
    a = _mm256_xor_si256(either, c);
    return _mm256_or_si256(both, _mm256_and_si256(either, c));
}

// Different bits of a row and four outputs. Eight words are added bit by bit first, so that one count stands for eight (Harley-Seal;
// Muła, Kurz, Lemire, "Faster Population Counts Using AVX2 Instructions", 2018).
LQ_256 inline __m256i count256(const uint64_t* x, const __m256i* w, int64_t words) {
    __m256i total = _mm256_setzero_si256(), ones = total, twos = total, fours = total;
    const auto different = [&](int64_t word) LQ_256 {
        return _mm256_xor_si256(_mm256_set1_epi64x(static_cast<int64_t>(x[word])), _mm256_loadu_si256(w + 2 * word));
    };
    int64_t word = 0;
    for (; word + 8 <= words; word += 8) {
        const __m256i a = carry(ones, different(word), different(word + 1)), b = carry(ones, different(word + 2), different(word + 3));
        const __m256i c = carry(twos, a, b);
        const __m256i d = carry(ones, different(word + 4), different(word + 5)), e = carry(ones, different(word + 6), different(word + 7));
        const __m256i f = carry(twos, d, e);
        total = _mm256_add_epi64(total, popcount256(carry(fours, c, f)));
    }
    total = _mm256_add_epi64(_mm256_slli_epi64(total, 1), popcount256(fours));
    total = _mm256_add_epi64(_mm256_slli_epi64(total, 1), popcount256(twos));
    total = _mm256_add_epi64(_mm256_slli_epi64(total, 1), popcount256(ones));
    for (; word < words; ++word) total = _mm256_add_epi64(total, popcount256(different(word)));
    return total;
}

LQ_256 void avx2(const Task& task, int64_t group) {
    const __m256i* w = reinterpret_cast<const __m256i*>(task.weights(group));
    for (int64_t row = 0; row < task.rows; ++row) {
        const uint64_t* x = task.x + row * task.words;
        alignas(32) int64_t counts[LANES];
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts), count256(x, w, task.words));
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts + 4), count256(x, w + 1, task.words));
        task.finish(counts, row, group);
    }
}

#define LQ_512 __attribute__((target("avx512f,avx512vpopcntdq,avx2")))

template <int ROWS>
LQ_512 inline void avx512_rows(const Task& task, int64_t group, int64_t row) {
    const uint64_t* w = task.weights(group);
    const uint64_t* x = task.x + row * task.words;
    __m512i sums[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_si512();
    for (int64_t word = 0; word < task.words; ++word) {
        __m512i weights = _mm512_loadu_si512(w + word * LANES);
        for (int r = 0; r < ROWS; ++r) {
            __m512i bits = _mm512_set1_epi64(static_cast<int64_t>(x[r * task.words + word]));
            sums[r] = _mm512_add_epi64(sums[r], _mm512_popcnt_epi64(_mm512_xor_si512(bits, weights)));
        }
    }
    const int64_t first = group * LANES;
    for (int r = 0; r < ROWS; ++r) {
        if (task.lanes(group) == LANES) {
            // The same as `store`, eight at a time.
            __m256i twice = _mm256_slli_epi32(_mm512_cvtepi64_epi32(sums[r]), 1);
            __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(task.elements)), twice));
            if (task.scale) value = _mm256_mul_ps(value, _mm256_loadu_ps(task.scale + first));
            if (task.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(task.bias + first));
            _mm256_storeu_ps(task.y + (row + r) * task.outputs + first, value);
        } else {
            alignas(64) int64_t counts[LANES];
            _mm512_store_si512(counts, sums[r]);
            task.finish(counts, row + r, group);
        }
    }
}

LQ_512 void avx512(const Task& task, int64_t group) {
    int64_t row = 0;
    for (; row + 8 <= task.rows; row += 8) avx512_rows<8>(task, group, row);
    for (; row + 2 <= task.rows; row += 2) avx512_rows<2>(task, group, row);
    for (; row < task.rows; ++row) avx512_rows<1>(task, group, row);
}

LQ_256 void pack256(const float* x, uint64_t* bits, int64_t elements) {
    const __m256 zero = _mm256_setzero_ps();
    for (int64_t word = 0; word < elements / 64; ++word) {
        uint64_t value = 0;
        for (int part = 0; part < 64; part += 8) {
            const __m256 positive = _mm256_cmp_ps(_mm256_loadu_ps(x + word * 64 + part), zero, _CMP_GE_OQ);
            value |= static_cast<uint64_t>(_mm256_movemask_ps(positive)) << part;
        }
        bits[word] = value;
    }
}

__attribute__((target("avx512f"))) void pack512(const float* x, uint64_t* bits, int64_t elements) {
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t first = 0; first < elements; first += 64) {
        uint64_t value = 0;
        for (int64_t part = first; part < first + 64 && part < elements; part += 16) {
            int64_t left = elements - part;
            __mmask16 real = static_cast<__mmask16>(left < 16 ? (1u << left) - 1u : 0xFFFFu);
            uint64_t positive = _mm512_mask_cmp_ps_mask(real, _mm512_maskz_loadu_ps(real, x + part), zero, _CMP_GE_OQ);
            value |= positive << (part - first);
        }
        bits[first / 64] = value;
    }
}

#endif

void pack_row(const float* x, uint64_t* bits, int64_t elements, int variant) {
#ifdef LQ_X86
    if (variant == AVX512) return pack512(x, bits, elements);
    if (variant == AVX2) pack256(x, bits, elements);
#endif
    for (int64_t first = variant == AVX2 ? elements / 64 * 64 : 0; first < elements; first += 64) {
        uint64_t value = 0;
        int64_t left = elements - first;
        for (int64_t bit = 0; bit < (left < 64 ? left : 64); ++bit) value |= static_cast<uint64_t>(x[first + bit] >= 0.0f) << bit;
        bits[first / 64] = value;
    }
}

}  // namespace

extern "C" {

// The fastest variant this processor runs.
int lq_best_variant(void) {
#ifdef LQ_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PORTABLE;
}

// x: [rows][elements]; bits: [rows][words], words = ceil(elements / 64).
void lq_xnor_pack(const float* x, uint64_t* bits, int64_t rows, int64_t elements, int variant) {
    int64_t words = (elements + 63) / 64;
    for (int64_t row = 0; row < rows; ++row) pack_row(x + row * elements, bits + row * words, elements, variant);
}

// y[row][output] = (elements - 2 * popcount(x ^ w)) * scale[output] + bias[output]; scale and bias may be null.
void lq_xnor_matmul(const uint64_t* x, const uint64_t* w, const float* scale, const float* bias, float* y, int64_t rows, int64_t words,
                    int64_t outputs, int64_t elements, int variant, int threads) {
    const Task task{x, w, scale, bias, y, rows, words, outputs, elements};
    const int64_t groups = (outputs + LANES - 1) / LANES;
    void (*kernel)(const Task&, int64_t) = portable;
#ifdef LQ_X86
    if (variant == AVX512) kernel = avx512;
    if (variant == AVX2) kernel = avx2;
#endif
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int64_t group = 0; group < groups; ++group) kernel(task, group);
}

// Packs x: [rows][elements], then multiplies.
void lq_xnor_linear(const float* x, const uint64_t* w, const float* scale, const float* bias, float* y, int64_t rows, int64_t elements,
                    int64_t outputs, int variant, int threads) {
    int64_t words = (elements + 63) / 64;
    std::vector<uint64_t> bits(static_cast<size_t>(rows * words));
    lq_xnor_pack(x, bits.data(), rows, elements, variant);
    lq_xnor_matmul(bits.data(), w, scale, bias, y, rows, words, outputs, elements, variant, threads);
}
}
