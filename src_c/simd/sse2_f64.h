/* sse2_f64.h: SSE2 in float64: 2 lanes, 16 registers, no fused multiply-add: vfma rounds twice. The vocabulary is told
 * in simd.h. */
#include <emmintrin.h>

#define VECTOR_REGISTER "x"
#define VL              2
#define HELD            0
#define OVERLAPS        0
#define STREAMS         1
typedef __m128d vf;
typedef __m128d vm;
typedef int vt;
INLINE vf vset1(double a) { return _mm_set1_pd(a); }
INLINE vf vload(const double *p) { return _mm_loadu_pd(p); }
INLINE void vstore(double *p, vf a) { _mm_storeu_pd(p, a); }
INLINE void vstream(double *p, vf a) { _mm_stream_pd(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm_add_pd(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm_sub_pd(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm_mul_pd(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm_div_pd(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm_castsi128_pd(_mm_add_epi64(_mm_castpd_si128(a), _mm_slli_epi64(_mm_castpd_si128(m), 52)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm_add_pd(_mm_mul_pd(a, b), c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm_sub_pd(c, _mm_mul_pd(a, b)); }
INLINE vf vmax(vf a, vf b) { return _mm_max_pd(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm_min_pd(a, b); }
INLINE vm vle(vf a, vf b) { return _mm_cmple_pd(a, b); }
INLINE vm vor(vm a, vm b) { return _mm_or_pd(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm_or_pd(_mm_and_pd(m, yes), _mm_andnot_pd(m, no)); }
INLINE vm vmask(const unsigned char *p) { return _mm_castsi128_pd(_mm_set_epi64x(p[1] ? -1 : 0, p[0] ? -1 : 0)); }
INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const double *p, vt t) {
    return t == VL ? _mm_loadu_pd(p) : t == 1 ? _mm_load_sd(p) : _mm_setzero_pd();
}
INLINE void vstore_tail(double *p, vf a, vt t) {
    if (t == VL)
        _mm_storeu_pd(p, a);
    else if (t == 1)
        _mm_store_sd(p, a);
}
INLINE vf vjoin(vf a, vf b, vt t) { return t == VL ? a : t == 1 ? _mm_move_sd(b, a) : b; }
INLINE vf vkeep(vf a, vt t) { return vjoin(a, _mm_setzero_pd(), t); }
INLINE vf vsums(const vf *v) { return _mm_add_pd(_mm_unpacklo_pd(v[0], v[1]), _mm_unpackhi_pd(v[0], v[1])); }
