/* sse2.h: SSE2, which every x86-64 has: 4 lanes, 16 registers, no fused multiply-add: vfma rounds twice. The vocabulary
 * is told in simd.h. */
#include <emmintrin.h>

#define VECTOR_REGISTER "x"
#define VL              4
#define HELD            0
#define OVERLAPS        0
#define STREAMS         1
typedef __m128 vf;
typedef __m128 vm;
typedef int vt;
INLINE vf vset1(float a) { return _mm_set1_ps(a); }
INLINE vf vload(const float *p) { return _mm_loadu_ps(p); }
INLINE void vstore(float *p, vf a) { _mm_storeu_ps(p, a); }
INLINE void vstream(float *p, vf a) { _mm_stream_ps(p, a); }
INLINE void vfence(void) { _mm_sfence(); }
INLINE vf vadd(vf a, vf b) { return _mm_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm_div_ps(a, b); }
INLINE vf vscale(vf a, vf m) {
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_slli_epi32(_mm_castps_si128(m), 23)));
}
INLINE vf vfma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm_sub_ps(c, _mm_mul_ps(a, b)); }
INLINE vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm_cmple_ps(a, b); }
INLINE vm vor(vm a, vm b) { return _mm_or_ps(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm_or_ps(_mm_and_ps(m, yes), _mm_andnot_ps(m, no)); }
INLINE vm vmask(const unsigned char *p) {
    const __m128i z = _mm_setzero_si128();
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m128i b = _mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), z), z);
    return _mm_castsi128_ps(_mm_cmpgt_epi32(b, z));
}
INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const float *p, vt t) {
    const vf z = _mm_setzero_ps();
    switch (t) {
    case 0: return z;
    case 1: return _mm_load_ss(p);
    case 2: return _mm_loadl_pi(z, (const __m64 *)p);
    case 3: return _mm_movelh_ps(_mm_loadl_pi(z, (const __m64 *)p), _mm_load_ss(p + 2));
    default: return _mm_loadu_ps(p);
    }
}
INLINE void vstore_tail(float *p, vf a, vt t) {
    if (t == VL) {
        _mm_storeu_ps(p, a);
        return;
    }
    if (t >= 2)
        _mm_storel_pi((__m64 *)p, a);
    if (t == 1)
        _mm_store_ss(p, a);
    else if (t == 3)
        _mm_store_ss(p + 2, _mm_movehl_ps(a, a));
}
INLINE vm vlanes(vt t) { return _mm_castsi128_ps(_mm_cmpgt_epi32(_mm_set1_epi32(t), _mm_setr_epi32(0, 1, 2, 3))); }
INLINE vf vjoin(vf a, vf b, vt t) { return vselect(vlanes(t), a, b); }
INLINE vf vkeep(vf a, vt t) { return _mm_and_ps(a, vlanes(t)); }
INLINE vf vsums(const vf *v) {
    const vf a = _mm_add_ps(_mm_movelh_ps(v[0], v[1]), _mm_movehl_ps(v[1], v[0]));
    const vf b = _mm_add_ps(_mm_movelh_ps(v[2], v[3]), _mm_movehl_ps(v[3], v[2]));
    return _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xdd));
}

typedef __m128i vh; /* its lower half */
typedef __m128i vi;
INLINE vh vhload(const uint16_t *p) { return _mm_loadl_epi64((const __m128i *)p); }
INLINE int vcount(vt t) { return t; }
INLINE void vhstore(uint16_t *p, vh a) { _mm_storel_epi64((__m128i *)p, a); }
INLINE void vhstream(uint16_t *p, vh a) { _mm_stream_si64((long long *)p, _mm_cvtsi128_si64(a)); }
INLINE vi vhwiden(vh a) { return _mm_unpacklo_epi16(a, _mm_setzero_si128()); }
INLINE vh vhnarrow(vi a) { /* the pack there is saturates signed values */
    return _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(a, 16), 16), _mm_setzero_si128());
}
INLINE vi vhraise(vh a) { return _mm_unpacklo_epi16(_mm_setzero_si128(), a); }
INLINE vh vhupper(vi a) { return _mm_packs_epi32(_mm_srai_epi32(a, 16), _mm_setzero_si128()); }
INLINE vf vfloat(vi a) { return _mm_castsi128_ps(a); }
INLINE vi vbits(vf a) { return _mm_castps_si128(a); }
INLINE vi viset1(uint32_t a) { return _mm_set1_epi32((int)a); }
INLINE vi viadd(vi a, vi b) { return _mm_add_epi32(a, b); }
INLINE vi viand(vi a, vi b) { return _mm_and_si128(a, b); }
INLINE vi vior(vi a, vi b) { return _mm_or_si128(a, b); }
INLINE vi vishl(vi a, int n) { return _mm_slli_epi32(a, n); }
INLINE vi vishr(vi a, int n) { return _mm_srli_epi32(a, n); }
