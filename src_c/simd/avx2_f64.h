/* avx2_f64.h: AVX2 and FMA in float64: 4 lanes, 16 registers. The vocabulary is told in simd.h. */
#include <immintrin.h>

#define VECTOR_REGISTER "x"
#define VL              4
#define HELD            0
#define OVERLAPS        1
#define STREAMS         1
typedef __m256d vf;
typedef __m256d vm;
typedef __m256i vt;
INLINE vf vset1(double a) { return _mm256_set1_pd(a); }
INLINE vf vload(const double *p) { return _mm256_loadu_pd(p); }
INLINE void vstore(double *p, vf a) { _mm256_storeu_pd(p, a); }
INLINE void vstream(double *p, vf a) { _mm256_stream_pd(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm256_add_pd(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm256_sub_pd(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm256_mul_pd(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm256_div_pd(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a), _mm256_slli_epi64(_mm256_castpd_si256(m), 52)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_pd(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_pd(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_pd(a, b); }
INLINE vm vle(vf a, vf b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return _mm256_or_pd(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm256_blendv_pd(no, yes, m); }
INLINE vm vmask(const unsigned char *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m256i b = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(b, _mm256_setzero_si256()));
}
INLINE vt vtail(ptrdiff_t n) {
    const int k = n >= VL ? VL : n <= 0 ? 0 : (int)n;
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(k), _mm256_setr_epi64x(0, 1, 2, 3));
}
INLINE vf vload_tail(const double *p, vt t) { return _mm256_maskload_pd(p, t); }
INLINE void vstore_tail(double *p, vf a, vt t) { _mm256_maskstore_pd(p, t, a); }
INLINE vf vkeep(vf a, vt t) { return _mm256_and_pd(a, _mm256_castsi256_pd(t)); }
INLINE vf vjoin(vf a, vf b, vt t) { return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(t)); }
INLINE vf vsums(const vf *v) {
    vf a[2];
    for (int i = 0; i < 2; i++) /* halves: of v[i] and v[i + 2] */
        a[i] =
            _mm256_add_pd(_mm256_permute2f128_pd(v[i], v[i + 2], 0x20), _mm256_permute2f128_pd(v[i], v[i + 2], 0x31));
    return _mm256_hadd_pd(a[0], a[1]);
}
