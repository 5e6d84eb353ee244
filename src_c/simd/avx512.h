/* avx512.h: AVX-512 F, BW, DQ and VL: 16 lanes, 32 registers. The vocabulary is told in simd.h. */
#include <immintrin.h>

#define VECTOR_REGISTER "v"
#define VL              16
#define HELD            8
#define OVERLAPS        1
#define STREAMS         1
typedef __m512 vf;
typedef __mmask16 vm;
typedef __mmask16 vt;
INLINE vf vset1(float a) { return _mm512_set1_ps(a); }
INLINE vf vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE void vstream(float *p, vf a) { _mm512_stream_ps(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(m), 23)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return (vm)(a | b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE vm vmask(const unsigned char *p) {
    const __m128i b = _mm_loadu_si128((const __m128i *)p);
    return _mm_test_epi8_mask(b, b);
}
INLINE vt vtail(ptrdiff_t n) { return (vt)(n >= VL ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u); }
INLINE vf vload_tail(const float *p, vt t) { return _mm512_maskz_loadu_ps(t, p); }
INLINE void vstore_tail(float *p, vf a, vt t) { _mm512_mask_storeu_ps(p, t, a); }
INLINE vf vkeep(vf a, vt t) { return _mm512_maskz_mov_ps(t, a); }
INLINE vf vjoin(vf a, vf b, vt t) { return _mm512_mask_blend_ps(t, b, a); }
INLINE vf vsums(const vf *v) {
    vf a[8], b[4];
    for (int i = 0; i < 8; i++) { /* halves: of v[i] and v[i + 4], of v[i + 8] and v[i + 12] */
        const vf x = v[i % 4 + i / 4 * 8], y = v[i % 4 + i / 4 * 8 + 4];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 4; i++) /* quarters */
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 4; i += 2) { /* pairs */
        const __m512d x = _mm512_castps_pd(b[i]), y = _mm512_castps_pd(b[i + 1]);
        a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(a[0], a[2], 0x88), _mm512_shuffle_ps(a[0], a[2], 0xdd));
}

typedef __m256i vh;
typedef __m512i vi;
INLINE vh vhload(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
#define TAILS_OF_HALVES
INLINE vh vhload_tail(const uint16_t *p, vt t) { return _mm256_maskz_loadu_epi16(t, p); }
INLINE void vhstore(uint16_t *p, vh a) { _mm256_storeu_si256((__m256i *)p, a); }
INLINE void vhstore_tail(uint16_t *p, vh a, vt t) { _mm256_mask_storeu_epi16(p, t, a); }
INLINE void vhstream(uint16_t *p, vh a) { _mm256_stream_si256((__m256i *)p, a); }
/* By one permutation each, where shifts and conversions would be three instructions. */
#define ODD(i)   2 * (i) + 1, 2 * (i) + 3, 2 * (i) + 5, 2 * (i) + 7
#define TWICE(i) (i), (i), (i) + 1, (i) + 1, (i) + 2, (i) + 2, (i) + 3, (i) + 3
INLINE vi vhraise(vh a) {
    static const uint16_t from[32] = {TWICE(0), TWICE(4), TWICE(8), TWICE(12)};
    return _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_loadu_si512(from), _mm512_castsi256_si512(a));
}
INLINE vh vhupper(vi a) {
    static const uint16_t from[32] = {ODD(0), ODD(4), ODD(8), ODD(12)}; /* of the others 0 */
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_loadu_si512(from), a));
}
INLINE vf vfloat(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi vbits(vf a) { return _mm512_castps_si512(a); }
INLINE vi viset1(uint32_t a) { return _mm512_set1_epi32((int)a); }
INLINE vi viadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi viand(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vior(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vishl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
INLINE vi vishr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
#define F16_HARDWARE 1
INLINE float vf16_one(uint16_t a) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a))); }
INLINE vf vf16(vh a) { return _mm512_cvtph_ps(a); }
INLINE vh vto_f16(vf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
