// What fake_quantize_kernel.h asks of an instruction set, in AVX-512.

using V = __m512;
struct Q {
    V inverse, low, high, scale;
};
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V load(const BFloat* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
// See `narrowed` of common.h. The instruction of AVX512-BF16 takes subnormal numbers for 0.
inline void store(BFloat* p, V v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i upper = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}
inline V load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(Half* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline V load(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(uint8_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
inline V set(float x) { return _mm512_set1_ps(x); }
inline V quantized(V x, const Q& q, unsigned& bits) {
    const V r = _mm512_roundscale_ps(_mm512_mul_ps(x, q.inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    bits = static_cast<unsigned>(_mm512_cmp_ps_mask(r, q.low, _CMP_NLT_UQ) & _mm512_cmp_ps_mask(r, q.high, _CMP_NGT_UQ));
    return _mm512_mul_ps(_mm512_min_ps(q.high, _mm512_max_ps(q.low, r)), q.scale);
}
inline V plus(V a, V b) { return _mm512_add_ps(a, b); }
inline V times(V a, V b) { return _mm512_mul_ps(a, b); }
inline V lower(V a, V b) { return _mm512_min_ps(a, b); }
inline V upper(V a, V b) { return _mm512_max_ps(a, b); }
inline bool unordered(V x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
inline V kept(V x, unsigned bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x); }
inline void keep(const uint16_t* x, uint16_t* y, unsigned bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), x));
}
struct Totals {
    __m512d scale[2], zero_point[2];
    inline Totals() {
        for (int i = 0; i < 2; ++i) scale[i] = zero_point[i] = _mm512_setzero_pd();
    }
    // By halves, in the order of fake_quantize_portable.h.
    static double sum(const __m512d* parts) {
        const __m512d eight = _mm512_add_pd(parts[0], parts[1]);
        const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <bool SHIFT>
    Sums sums() const {
        return {sum(scale), SHIFT ? sum(zero_point) : 0.0};
    }
};
inline void add(__m512d* totals, V x) {
    totals[0] = _mm512_add_pd(totals[0], _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    totals[1] = _mm512_add_pd(totals[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
template <bool SHIFT, bool ROUNDED>
inline V learned(V x, V g, const Q& q, Totals& totals) {
    const V ratio = _mm512_mul_ps(x, q.inverse);
    const V rounded = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V level = _mm512_min_ps(q.high, _mm512_max_ps(q.low, rounded));
    const __mmask16 outside = ROUNDED ? _mm512_cmp_ps_mask(level, rounded, _CMP_NEQ_UQ)
                                      : _mm512_cmp_ps_mask(ratio, q.low, _CMP_NGT_UQ) | _mm512_cmp_ps_mask(ratio, q.high, _CMP_NLT_UQ);
    add(totals.scale, _mm512_mul_ps(g, _mm512_mask_mov_ps(_mm512_sub_ps(level, ratio), outside, level)));
    if (SHIFT) add(totals.zero_point, _mm512_maskz_mul_ps(outside, g, _mm512_sub_ps(_mm512_set1_ps(-0.0f), q.scale)));
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~outside), g);
}
template <bool ROUNDED>
inline void squared_error(V x, const Q& q, Totals& totals) {
    const V ratio = _mm512_mul_ps(x, q.inverse);
    const V rounded = ROUNDED ? _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : ratio;
    const V off = _mm512_sub_ps(_mm512_min_ps(q.high, _mm512_max_ps(q.low, rounded)), ratio);
    add(totals.scale, _mm512_mul_ps(off, off));
}
inline Spread spread(V low, V high, bool nan) {
    return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), nan};
}
