/* portable.h: any other CPU, by the vector extensions of gcc and clang: 4 lanes, in vectors where the CPU has them,
 * else one after the other. The vocabulary is told in simd.h.
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
#endif
#if defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define HELD     0
#define OVERLAPS 0
#define STREAMS  0
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vm __attribute__((vector_size(VL * 4)));
typedef vf vf_anywhere __attribute__((aligned(4), may_alias));
typedef int vt;

/* Returns the vector of an expression of i, the lane. */
#define LANES_UNROLLED _Pragma("GCC unroll 8")
#define RETURN_LANES(expression)                                                                                       \
    vf lanes = {0};                                                                                                    \
    LANES_UNROLLED for (int i = 0; i < VL; i++) lanes[i] = (expression);                                               \
    return lanes

INLINE vf vset1(float a) { return a - (vf){0}; } /* which keeps the sign of -0 */
INLINE vf vload(const float *p) { return *(const vf_anywhere *)p; }
INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vsub(vf a, vf b) { return a - b; }
INLINE vf vmul(vf a, vf b) { return a * b; }
INLINE vf vdiv(vf a, vf b) { return a / b; }
INLINE vf vscale(vf a, vf m) { return (vf)((vm)a + ((vm)m << 23)); }

#if defined(__VSX__) && !defined(__clang__)
INLINE vf vfma(vf a, vf b, vf c) { return __builtin_vsx_xvmaddsp(a, b, c); }
#elif defined(__FMA__) && !defined(__clang__)
INLINE vf vfma(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps256(a, b, c); }
#elif defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__powerpc__) ||             \
    defined(__riscv_flen) || defined(__s390x__) /* clang does not define the first */
INLINE vf vfma(vf a, vf b, vf c) { RETURN_LANES(__builtin_fmaf(a[i], b[i], c[i])); }
#else
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf vfnma(vf a, vf b, vf c) { return vfma(-a, b, c); }

INLINE vm vle(vf a, vf b) { return a <= b; }
INLINE vm vor(vm a, vm b) { return a | b; }
#if defined(VECTOR_REGISTER)
INLINE void vstore(float *p, vf a) { *(vf_anywhere *)p = a; }
INLINE vf vselect(vm m, vf yes, vf no) { return (vf)(((vm)yes & m) | ((vm)no & ~m)); }
INLINE vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vselect(a < b, a, b); }
#else /* lanes that are single numbers should not leave their registers for bits to be selected */
INLINE void vstore(float *p, vf a) { LANES_UNROLLED for (int i = 0; i < VL; i++) p[i] = a[i]; }
INLINE vf vselect(vm m, vf yes, vf no) { RETURN_LANES(m[i] ? yes[i] : no[i]); }
INLINE vf vmax(vf a, vf b) { RETURN_LANES(a[i] > b[i] ? a[i] : b[i]); }
INLINE vf vmin(vf a, vf b) { RETURN_LANES(a[i] < b[i] ? a[i] : b[i]); }
#endif
INLINE void vstream(float *p, vf a) { vstore(p, a); }
INLINE void vfence(void) {}

INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const float *p, vt t) { RETURN_LANES(i < t ? p[i] : 0.0f); }
INLINE void vstore_tail(float *p, vf a, vt t) { LANES_UNROLLED for (int i = 0; i < VL; i++) if (i < t) p[i] = a[i]; }
INLINE vm vlanes(vt t) {
    vm lanes = {0};
    LANES_UNROLLED for (int i = 0; i < VL; i++) lanes[i] = i;
    return lanes < t;
}
INLINE vf vjoin(vf a, vf b, vt t) { return vselect(vlanes(t), a, b); }
INLINE vf vkeep(vf a, vt t) { return vjoin(a, vset1(0), t); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vm){__VA_ARGS__})
#endif
#if VL == 8
INLINE vf add_halves_of(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE vf add_pairs_of(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vf add_neighbours_of(vf a, vf b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
INLINE vf vsums(const vf *v) {
    const vf a = add_pairs_of(add_halves_of(v[0], v[4]), add_halves_of(v[1], v[5]));
    const vf b = add_pairs_of(add_halves_of(v[2], v[6]), add_halves_of(v[3], v[7]));
    return add_neighbours_of(a, b);
}
#else
INLINE vf add_pairs_of(vf a, vf b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
INLINE vf vsums(const vf *v) {
    const vf a = add_pairs_of(v[0], v[1]), b = add_pairs_of(v[2], v[3]);
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
}
#endif
