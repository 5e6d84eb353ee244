/* avx2.h: AVX2 and FMA: 8 lanes, 16 registers. The vocabulary is told in simd.h. */
#include <immintrin.h>

#define VECTOR_REGISTER "x"
#define VL              8
#define HELD            0
#define OVERLAPS        1
#define STREAMS         1
typedef __m256 vf;
typedef __m256 vm;
typedef __m256i vt;
INLINE vf vset1(float a) { return _mm256_set1_ps(a); }
INLINE vf vload(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE void vstream(float *p, vf a) { _mm256_stream_ps(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(m), 23)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return _mm256_or_ps(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
INLINE vm vmask(const unsigned char *p) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, _mm256_setzero_si256()));
}
INLINE vt vtail(ptrdiff_t n) {
    const int k = n >= VL ? VL : n <= 0 ? 0 : (int)n;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf vload_tail(const float *p, vt t) { return _mm256_maskload_ps(p, t); }
INLINE void vstore_tail(float *p, vf a, vt t) { _mm256_maskstore_ps(p, t, a); }
INLINE vf vkeep(vf a, vt t) { return _mm256_and_ps(a, _mm256_castsi256_ps(t)); }
INLINE vf vjoin(vf a, vf b, vt t) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(t)); }
INLINE vf vsums(const vf *v) {
    vf a[4];
    for (int i = 0; i < 4; i++) /* halves */
        a[i] =
            _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    for (int i = 0; i < 4; i += 2) { /* pairs */
        const __m256d x = _mm256_castps_pd(a[i]), y = _mm256_castps_pd(a[i + 1]);
        a[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(a[0], a[2], 0x88), _mm256_shuffle_ps(a[0], a[2], 0xdd));
}

typedef __m128i vh;
typedef __m256i vi;
INLINE vh vhload(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE void vhstore(uint16_t *p, vh a) { _mm_storeu_si128((__m128i *)p, a); }
/* There are masks of 32 bits: pairs go by them, and what is left over by itself. */
#define TAILS_OF_HALVES
INLINE int vcount(vt t) { /* without popcnt, which the dispatcher does not ask for */
    int n = _mm256_movemask_ps(_mm256_castsi256_ps(t));
    n -= n >> 1 & 0x55;
    n = (n & 0x33) + (n >> 2 & 0x33);
    return (n + (n >> 4)) & 0xf;
}
INLINE vh lanes_of_halves(vt t) { return _mm_packs_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1)); }
INLINE vh vhload_tail(const uint16_t *p, vt t) {
    const int n = vcount(t);
    const vh lanes = lanes_of_halves(t), pairs = _mm_srai_epi32(lanes, 16),
             v = _mm_maskload_epi32((const int *)p, pairs);
    if (n % 2 == 0)
        return v;
    return _mm_or_si128(v, _mm_and_si128(_mm_andnot_si128(pairs, lanes), _mm_set1_epi16((short)p[n - 1])));
}
INLINE void vhstore_tail(uint16_t *p, vh a, vt t) {
    const int n = vcount(t);
    uint16_t b[VL];
    _mm_maskstore_epi32((int *)p, _mm_srai_epi32(lanes_of_halves(t), 16), a);
    if (n % 2 == 1) {
        vhstore(b, a);
        p[n - 1] = b[n - 1];
    }
}
INLINE void vhstream(uint16_t *p, vh a) { _mm_stream_si128((__m128i *)p, a); }
INLINE vi vhraise(vh a) { /* both halves of a vector have all of them: a load brings that */
    const vi from = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10,
                                     11, -1, -1, 12, 13, -1, -1, 14, 15);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(a), from);
}
INLINE vh vhupper(vi a) {
    const vi from = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11, 14,
                                     15, -1, -1, -1, -1, -1, -1, -1, -1);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, from), 0x08));
}
INLINE vf vfloat(vi a) { return _mm256_castsi256_ps(a); }
INLINE vi vbits(vf a) { return _mm256_castps_si256(a); }
INLINE vi viset1(uint32_t a) { return _mm256_set1_epi32((int)a); }
INLINE vi viadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi viand(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vior(vi a, vi b) { return _mm256_or_si256(a, b); }
INLINE vi vishl(vi a, int n) { return _mm256_slli_epi32(a, n); }
INLINE vi vishr(vi a, int n) { return _mm256_srli_epi32(a, n); }
#define F16_HARDWARE 1
INLINE float vf16_one(uint16_t a) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a))); }
INLINE vf vf16(vh a) { return _mm256_cvtph_ps(a); }
INLINE vh vto_f16(vf a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
