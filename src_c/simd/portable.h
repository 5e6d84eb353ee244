/* portable.h: any other CPU, by the vector extensions of gcc and clang: 16 bytes at a time, as vectors where the CPU
 * has them, else one lane after the other. The vocabulary is told in simd.h.
 *
 * vfma rounds once where the CPU that is compiled for has a fused multiply-add, which gives the bits of AVX2; else
 * twice, which gives those of SSE2. FASTBN_PORTABLE takes it on x86-64 too, to compare it with what was written for
 * that. */
#if !defined(__GNUC__)
#error "on this CPU fastbn takes gcc or clang"
#elif defined(__arm__) && defined(__ARM_NEON) && defined(__clang__)
#error                                                                                                                 \
    "NEON of 32-bit ARM makes 0 of small numbers, and clang would take it for vectors: add -mfpu=vfpv3-d16, or take gcc"
#endif

#if defined(__SSE__)
#define VECTOR_REGISTER "x"
#elif defined(__VSX__)
#define VECTOR_REGISTER "wa"
#elif defined(__VX__)
#define VECTOR_REGISTER "v"
#endif
#if defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define HELD     0
#define OVERLAPS 0
#define STREAMS  0

#ifdef REAL_IS_FLOAT64
#define VL       (VECTOR_BYTES / 8)
#define MANTISSA 52
typedef double lane;
typedef int64_t lane_bits;
#else
#define VL       (VECTOR_BYTES / 4)
#define MANTISSA 23
typedef float lane;
typedef int32_t lane_bits;
#endif
typedef lane vf __attribute__((vector_size(VECTOR_BYTES)));
typedef lane_bits vm __attribute__((vector_size(VECTOR_BYTES)));
typedef vf vf_anywhere __attribute__((aligned(sizeof(lane)), may_alias));
typedef int vt;

/* Returns the vector of an expression of i, the lane. */
#define RETURN_LANES(expression)                                                                                       \
    vf lanes = {0};                                                                                                    \
    UNROLLED for (int i = 0; i < VL; i++) lanes[i] = (expression);                                                     \
    return lanes

INLINE vf vset1(lane a) { return a - (vf){0}; } /* which keeps the sign of -0 */
INLINE vf vload(const lane *p) { return *(const vf_anywhere *)p; }
INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vsub(vf a, vf b) { return a - b; }
INLINE vf vmul(vf a, vf b) { return a * b; }
INLINE vf vdiv(vf a, vf b) { return a / b; }
INLINE vf vscale(vf a, vf m) { return (vf)((vm)a + ((vm)m << MANTISSA)); }

/* gcc has functions of vectors for it; clang makes them of those of lanes, but does not define __FP_FAST_FMA. */
#if defined(__VSX__) && !defined(REAL_IS_FLOAT64)
/* Told which: gcc takes AltiVec's instruction at times, which makes 0 of denormal values. */
INLINE vf vfma(vf a, vf b, vf c) {
    __asm__("xvmaddasp %x0,%x1,%x2" : "+wa"(c) : "wa"(a), "wa"(b));
    return c;
}
#elif defined(__VSX__) && !defined(__clang__)
INLINE vf vfma(vf a, vf b, vf c) { return __builtin_vsx_xvmadddp(a, b, c); }
#elif !defined(__clang__) && defined(__FMA__) && defined(REAL_IS_FLOAT64)
INLINE vf vfma(vf a, vf b, vf c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
#elif !defined(__clang__) && defined(__FMA__)
INLINE vf vfma(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps256(a, b, c); }
#elif defined(__FP_FAST_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__powerpc__) ||              \
    defined(__riscv_flen) || defined(__s390x__)
INLINE lane fused(lane a, lane b, lane c) {
    return sizeof(lane) == 8 ? (lane)__builtin_fma(a, b, c) : (lane)__builtin_fmaf((float)a, (float)b, (float)c);
}
INLINE vf vfma(vf a, vf b, vf c) { RETURN_LANES(fused(a[i], b[i], c[i])); }
#else
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf vfnma(vf a, vf b, vf c) { return vfma(-a, b, c); }

INLINE vm vle(vf a, vf b) { return a <= b; }
INLINE vm vor(vm a, vm b) { return a | b; }
#if defined(VECTOR_REGISTER)
INLINE void vstore(lane *p, vf a) { *(vf_anywhere *)p = a; }
INLINE vf vselect(vm m, vf yes, vf no) { return (vf)(((vm)yes & m) | ((vm)no & ~m)); }
INLINE vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vselect(a < b, a, b); }
#else /* single numbers should not leave their registers for bits to be selected */
INLINE void vstore(lane *p, vf a) { UNROLLED for (int i = 0; i < VL; i++) p[i] = a[i]; }
INLINE vf vselect(vm m, vf yes, vf no) { RETURN_LANES(m[i] ? yes[i] : no[i]); }
INLINE vf vmax(vf a, vf b) { RETURN_LANES(a[i] > b[i] ? a[i] : b[i]); }
INLINE vf vmin(vf a, vf b) { RETURN_LANES(a[i] < b[i] ? a[i] : b[i]); }
#endif
INLINE void vstream(lane *p, vf a) { vstore(p, a); }
INLINE void vfence(void) {}

INLINE vm vmask(const unsigned char *p) {
    vm m = {0};
    UNROLLED for (int i = 0; i < VL; i++) m[i] = p[i] ? -1 : 0;
    return m;
}
INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const lane *p, vt t) { RETURN_LANES(i < t ? p[i] : 0); }
INLINE void vstore_tail(lane *p, vf a, vt t) { UNROLLED for (int i = 0; i < VL; i++) if (i < t) p[i] = a[i]; }
INLINE vm vlanes(vt t) {
    vm lanes = {0};
    UNROLLED for (int i = 0; i < VL; i++) lanes[i] = i;
    return lanes < (lane_bits)t;
}
INLINE vf vjoin(vf a, vf b, vt t) { return vselect(vlanes(t), a, b); }
INLINE vf vkeep(vf a, vt t) { return vjoin(a, vset1(0), t); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vm){__VA_ARGS__})
#endif
#if VECTOR_BYTES == 16 && defined(REAL_IS_FLOAT64)
INLINE vf vsums(const vf *v) { return SHUFFLE(v[0], v[1], 0, 2) + SHUFFLE(v[0], v[1], 1, 3); }
#elif VECTOR_BYTES == 16 || defined(REAL_IS_FLOAT64)
INLINE vf add_pairs(vf a, vf b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
INLINE vf vsums(const vf *v) {
    const vf a = add_pairs(v[0], v[1]), b = add_pairs(v[2], v[3]);
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
}
#else
INLINE vf add_halves_of(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE vf add_pairs(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vf vsums(const vf *v) {
    const vf a = add_pairs(add_halves_of(v[0], v[4]), add_halves_of(v[1], v[5]));
    const vf b = add_pairs(add_halves_of(v[2], v[6]), add_halves_of(v[3], v[7]));
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
#endif

#ifndef REAL_IS_FLOAT64
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint32_t vi __attribute__((vector_size(4 * VL)));
typedef vh vh_anywhere __attribute__((aligned(2), may_alias));
INLINE vh vhload(const uint16_t *p) { return *(const vh_anywhere *)p; }
INLINE int vcount(vt t) { return t; }
INLINE void vhstore(uint16_t *p, vh a) { *(vh_anywhere *)p = a; }
INLINE void vhstream(uint16_t *p, vh a) { vhstore(p, a); }
INLINE vi vhwiden(vh a) { return __builtin_convertvector(a, vi); }
INLINE vh vhnarrow(vi a) { return __builtin_convertvector(a, vh); }
INLINE vi vhraise(vh a) { return vhwiden(a) << 16; }
INLINE vh vhupper(vi a) { return vhnarrow(a >> 16); }
INLINE vf vfloat(vi a) { return (vf)a; }
INLINE vi vbits(vf a) { return (vi)a; }
INLINE vi viset1(uint32_t a) { return a + (vi){0}; }
INLINE vi viadd(vi a, vi b) { return a + b; }
INLINE vi viand(vi a, vi b) { return a & b; }
INLINE vi vior(vi a, vi b) { return a | b; }
INLINE vi vishl(vi a, int n) { return a << n; }
INLINE vi vishr(vi a, int n) { return a >> n; }
#endif
