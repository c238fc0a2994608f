// What fake_quantize_kernel.h asks of an instruction set, in AVX2: two registers hold 16 floats.

struct V {
    __m256 a, b;
};
struct Q {
    V inverse, low, high, scale;
};
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const V& v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline V load(const BFloat* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i a = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), b = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
// The upper halves of the rounded bits, see `narrowed` of common.h.
inline __m256i upper_halves(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
}
inline void store(BFloat* p, const V& v) {
    // Packed in each half of a register: the second and third quarters change places.
    const __m256i packed = _mm256_packus_epi32(upper_halves(v.a), upper_halves(v.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline V load(const Half* p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
inline void store(Half* p, const V& v) {
    __m128i* at = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(at, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(at + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
inline V load(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
inline void store(uint8_t* p, const V& v) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i a = _mm256_and_si256(_mm256_cvtps_epi32(v.a), byte), b = _mm256_and_si256(_mm256_cvtps_epi32(v.b), byte);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m256 half(__m256 x, __m256 inverse, __m256 low, __m256 high, __m256 scale, unsigned& bits) {
    const __m256 r = _mm256_round_ps(_mm256_mul_ps(x, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 outside = _mm256_or_ps(_mm256_cmp_ps(r, low, _CMP_LT_OQ), _mm256_cmp_ps(r, high, _CMP_GT_OQ));
    bits = ~static_cast<unsigned>(_mm256_movemask_ps(outside)) & 255u;
    // Of a NaN and a number, max and min give the second.
    return _mm256_mul_ps(_mm256_min_ps(high, _mm256_max_ps(low, r)), scale);
}
inline V quantized(const V& x, const Q& q, unsigned& bits) {
    unsigned first, second;
    const V y{half(x.a, q.inverse.a, q.low.a, q.high.a, q.scale.a, first), half(x.b, q.inverse.b, q.low.b, q.high.b, q.scale.b, second)};
    bits = first | second << 8;
    return y;
}
inline V plus(const V& a, const V& b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline V times(const V& a, const V& b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline V lower(const V& a, const V& b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
inline V upper(const V& a, const V& b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline bool unordered(const V& x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) != 0; }
inline V kept(const V& x, unsigned bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i a = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    const __m256i b = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits >> 8)), lanes);
    return {_mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, lanes))),
            _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, lanes)))};
}
inline void keep(const uint16_t* x, uint16_t* y, unsigned bits) {
    const __m256i lanes = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i there = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), lanes);
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_and_si256(value, _mm256_cmpeq_epi16(there, lanes)));
}
struct Totals {
    __m256d scale[4], zero_point[4];
    inline Totals() {
        for (int i = 0; i < 4; ++i) scale[i] = zero_point[i] = _mm256_setzero_pd();
    }
    // By halves, in the order of fake_quantize_portable.h.
    static double sum(const __m256d* parts) {
        const __m256d four = _mm256_add_pd(_mm256_add_pd(parts[0], parts[2]), _mm256_add_pd(parts[1], parts[3]));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <bool SHIFT>
    Sums sums() const {
        return {sum(scale), SHIFT ? sum(zero_point) : 0.0};
    }
};
inline void add(__m256d* totals, __m256 x) {
    totals[0] = _mm256_add_pd(totals[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    totals[1] = _mm256_add_pd(totals[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
template <bool SHIFT, bool ROUNDED>
inline __m256 learned_half(__m256 x, __m256 g, __m256 inverse, __m256 low, __m256 high, __m256 scale, __m256d* scales, __m256d* shifts) {
    const __m256 ratio = _mm256_mul_ps(x, inverse);
    const __m256 rounded = _mm256_round_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 level = _mm256_min_ps(high, _mm256_max_ps(low, rounded));
    const __m256 outside = ROUNDED ? _mm256_cmp_ps(level, rounded, _CMP_NEQ_UQ)
                                   : _mm256_or_ps(_mm256_cmp_ps(ratio, low, _CMP_NGT_UQ), _mm256_cmp_ps(ratio, high, _CMP_NLT_UQ));
    add(scales, _mm256_mul_ps(g, _mm256_blendv_ps(_mm256_sub_ps(level, ratio), level, outside)));
    if (SHIFT) add(shifts, _mm256_and_ps(outside, _mm256_mul_ps(g, _mm256_sub_ps(_mm256_set1_ps(-0.0f), scale))));
    return _mm256_andnot_ps(outside, g);
}
template <bool SHIFT, bool ROUNDED>
inline V learned(const V& x, const V& g, const Q& q, Totals& totals) {
    const __m256 a = learned_half<SHIFT, ROUNDED>(x.a, g.a, q.inverse.a, q.low.a, q.high.a, q.scale.a, totals.scale, totals.zero_point);
    return {a, learned_half<SHIFT, ROUNDED>(x.b, g.b, q.inverse.b, q.low.b, q.high.b, q.scale.b, totals.scale + 2, totals.zero_point + 2)};
}
template <bool ROUNDED>
inline __m256 error_of_half(__m256 x, __m256 inverse, __m256 low, __m256 high) {
    const __m256 ratio = _mm256_mul_ps(x, inverse);
    const __m256 rounded = ROUNDED ? _mm256_round_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : ratio;
    const __m256 off = _mm256_sub_ps(_mm256_min_ps(high, _mm256_max_ps(low, rounded)), ratio);
    return _mm256_mul_ps(off, off);
}
template <bool ROUNDED>
inline void squared_error(const V& x, const Q& q, Totals& totals) {
    add(totals.scale, error_of_half<ROUNDED>(x.a, q.inverse.a, q.low.a, q.high.a));
    add(totals.scale + 2, error_of_half<ROUNDED>(x.b, q.inverse.b, q.low.b, q.high.b));
}
inline Spread spread(const V& low, const V& high, bool nan) {
    float a[8], b[8];
    _mm256_storeu_ps(a, _mm256_min_ps(low.a, low.b));
    _mm256_storeu_ps(b, _mm256_max_ps(high.a, high.b));
    for (int half = 4; half; half /= 2)
        for (int i = 0; i < half; ++i) a[i] = std::min(a[i], a[i + half]), b[i] = std::max(b[i], b[i + half]);
    return {a[0], b[0], nan};
}
