/* avx512_f64.h: AVX-512 in float64: 8 lanes, 32 registers. The vocabulary is told in simd.h. */
#include <immintrin.h>

#define VECTOR_REGISTER "v"
#define VL              8
#define HELD            8
#define OVERLAPS        1
#define STREAMS         1
typedef __m512d vf;
typedef __mmask8 vm;
typedef __mmask8 vt;
INLINE vf vset1(double a) { return _mm512_set1_pd(a); }
INLINE vf vload(const double *p) { return _mm512_loadu_pd(p); }
INLINE void vstore(double *p, vf a) { _mm512_storeu_pd(p, a); }
INLINE void vstream(double *p, vf a) { _mm512_stream_pd(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm512_add_pd(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm512_sub_pd(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm512_mul_pd(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm512_div_pd(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(a), _mm512_slli_epi64(_mm512_castpd_si512(m), 52)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_pd(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_pd(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_pd(a, b); }
INLINE vm vle(vf a, vf b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return (vm)(a | b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm512_mask_blend_pd(m, no, yes); }
INLINE vm vmask(const unsigned char *p) {
    const __m128i b = _mm_loadl_epi64((const __m128i *)p);
    return (vm)_mm_test_epi8_mask(b, b);
}
INLINE vt vtail(ptrdiff_t n) { return (vt)(n >= VL ? 0xffu : n <= 0 ? 0u : (1u << n) - 1u); }
INLINE vf vload_tail(const double *p, vt t) { return _mm512_maskz_loadu_pd(t, p); }
INLINE void vstore_tail(double *p, vf a, vt t) { _mm512_mask_storeu_pd(p, t, a); }
INLINE vf vkeep(vf a, vt t) { return _mm512_maskz_mov_pd(t, a); }
INLINE vf vjoin(vf a, vf b, vt t) { return _mm512_mask_blend_pd(t, b, a); }
INLINE vf vsums(const vf *v) {
    vf a[4];
    for (int i = 0; i < 4; i++) /* halves: of v[i] and v[i + 4] */
        a[i] = _mm512_add_pd(_mm512_shuffle_f64x2(v[i], v[i + 4], 0x44), _mm512_shuffle_f64x2(v[i], v[i + 4], 0xee));
    for (int i = 0; i < 2; i++) /* quarters */
        a[i] = _mm512_add_pd(_mm512_shuffle_f64x2(a[i], a[i + 2], 0x88), _mm512_shuffle_f64x2(a[i], a[i + 2], 0xdd));
    return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7),
                                 _mm512_add_pd(_mm512_unpacklo_pd(a[0], a[1]), _mm512_unpackhi_pd(a[0], a[1])));
}
