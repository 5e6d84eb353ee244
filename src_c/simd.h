/* simd.h: one vocabulary of float32 vector operations for SSE2, AVX2+FMA, AVX-512 and NEON.
 *
 * Every operation is defined lane by lane, so that a kernel written against it gives the same bits on every
 * instruction set with a fused multiply-add; on SSE2 vfma rounds twice.
 *
 *   vf, VL          a vector and its number of lanes
 *   vm              a comparison's result, for vselect
 *   vt              the first n lanes of a vector (n may be 0 or VL), for the ends of runs
 *   vmax(a, b)      a > b ? a : b    both give b where one is a NaN, so vmax(zero, z) keeps a NaN in z
 *   vmin(a, b)      a < b ? a : b
 *   vfma(a, b, c)   a * b + c        vfnma(a, b, c)   c - a * b
 *   vjoin(a, b, t)  a in the lanes of t, b in the others
 *   vsums(v)        in lane i the sum of the lanes of v[i], for VL vectors, as a tree: lane j + lane j + VL / 2, ...
 *   vhold(a)        a in a register: where a value from memory has two uses, compilers load it twice
 *   vaddress(p)     p in a register: not to be computed anew, nor from what is near it
 *   vprefetch(p, cache)   the line of p to that cache, and no fault wherever p points
 */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <stddef.h>
#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

enum { TO_L1, TO_L2 };

#if defined(FASTBN_SIMD_AVX512)

#include <immintrin.h>
#define VECTOR_REGISTER "v"
#define VL              16
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
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return (vm)(a | b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
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

#elif defined(FASTBN_SIMD_AVX2)

#include <immintrin.h>
#define VECTOR_REGISTER "x"
#define VL              8
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
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE vm vor(vm a, vm b) { return _mm256_or_ps(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
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

#elif defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>
#define VECTOR_REGISTER "w"
#define VL              4
typedef float32x4_t vf;
typedef uint32x4_t vm;
typedef int vt;
INLINE vf vset1(float a) { return vdupq_n_f32(a); }
INLINE vf vload(const float *p) { return vld1q_f32(p); }
INLINE void vstore(float *p, vf a) { vst1q_f32(p, a); }
INLINE void vstream(float *p, vf a) { vst1q_f32(p, a); } /* A64 has only a hint, on pairs: not worth it */
INLINE void vfence(void) {}
INLINE vf vadd(vf a, vf b) { return vaddq_f32(a, b); }
INLINE vf vsub(vf a, vf b) { return vsubq_f32(a, b); }
INLINE vf vmul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vfnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
/* not vmaxq: it treats NaN and -0 otherwise than x86 does */
INLINE vf vmax(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vf vmin(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vm vle(vf a, vf b) { return vcleq_f32(a, b); }
INLINE vm vor(vm a, vm b) { return vorrq_u32(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return vbslq_f32(m, yes, no); }
INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const float *p, vt t) {
    const vf z = vdupq_n_f32(0.0f);
    switch (t) {
    case 0: return z;
    case 1: return vld1q_lane_f32(p, z, 0);
    case 2: return vcombine_f32(vld1_f32(p), vget_low_f32(z));
    case 3: return vld1q_lane_f32(p + 2, vcombine_f32(vld1_f32(p), vget_low_f32(z)), 2);
    default: return vld1q_f32(p);
    }
}
INLINE void vstore_tail(float *p, vf a, vt t) {
    if (t == VL) {
        vst1q_f32(p, a);
        return;
    }
    if (t >= 2)
        vst1_f32(p, vget_low_f32(a));
    if (t == 1)
        vst1q_lane_f32(p, a, 0);
    else if (t == 3)
        vst1q_lane_f32(p + 2, a, 2);
}
INLINE vm vlanes(vt t) {
    const int32_t iota[4] = {0, 1, 2, 3};
    return vcgtq_s32(vdupq_n_s32(t), vld1q_s32(iota));
}
INLINE vf vjoin(vf a, vf b, vt t) { return vbslq_f32(vlanes(t), a, b); }
INLINE vf vkeep(vf a, vt t) { return vjoin(a, vdupq_n_f32(0.0f), t); }
INLINE vf vsums(const vf *v) {
    float32x2_t a[4];
    for (int i = 0; i < 4; i++)
        a[i] = vadd_f32(vget_low_f32(v[i]), vget_high_f32(v[i]));
    return vpaddq_f32(vcombine_f32(a[0], a[1]), vcombine_f32(a[2], a[3]));
}

#else /* SSE2, which every x86-64 has */

#include <emmintrin.h>
#define VECTOR_REGISTER "x"
#define VL              4
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
INLINE vf vfma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
INLINE vf vfnma(vf a, vf b, vf c) { return _mm_sub_ps(c, _mm_mul_ps(a, b)); }
INLINE vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm_min_ps(a, b); }
INLINE vm vle(vf a, vf b) { return _mm_cmple_ps(a, b); }
INLINE vm vor(vm a, vm b) { return _mm_or_ps(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return _mm_or_ps(_mm_and_ps(m, yes), _mm_andnot_ps(m, no)); }
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

#endif

#if defined(__GNUC__)
INLINE vf vhold(vf a) {
    __asm__("" : "+" VECTOR_REGISTER(a));
    return a;
}
INLINE const float *vaddress(const float *p) {
    __asm__("" : "+r"(p));
    return p;
}
INLINE void vprefetch(const float *p, int cache) {
    if (cache == TO_L1)
        __builtin_prefetch(p, 0, 3);
    else
        __builtin_prefetch(p, 0, 2);
}
#else
INLINE vf vhold(vf a) { return a; }
INLINE const float *vaddress(const float *p) { return p; }
INLINE void vprefetch(const float *p, int cache) {
#if defined(_M_X64)
    if (cache == TO_L1)
        _mm_prefetch((const char *)p, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)p, _MM_HINT_T1);
#else
    (void)p;
    (void)cache;
#endif
}
#endif

#endif
