/* neon_f64.h: NEON of AArch64 in float64: 2 lanes, 32 registers. The vocabulary is told in simd.h. */
#include <arm_neon.h>

#define VECTOR_REGISTER "w"
#define VL              2
#define HELD            0
#define OVERLAPS        0
#define STREAMS         0
typedef float64x2_t vf;
typedef uint64x2_t vm;
typedef int vt;
INLINE vf vset1(double a) { return vdupq_n_f64(a); }
INLINE vf vload(const double *p) { return vld1q_f64(p); }
INLINE void vstore(double *p, vf a) { vst1q_f64(p, a); }
INLINE void vstream(double *p, vf a) { vst1q_f64(p, a); }
INLINE void vfence(void) {}
INLINE vf vadd(vf a, vf b) { return vaddq_f64(a, b); }
INLINE vf vsub(vf a, vf b) { return vsubq_f64(a, b); }
INLINE vf vmul(vf a, vf b) { return vmulq_f64(a, b); }
INLINE vf vdiv(vf a, vf b) { return vdivq_f64(a, b); }
INLINE vf vscale(vf a, vf m) {
    return vreinterpretq_f64_s64(vaddq_s64(vreinterpretq_s64_f64(a), vshlq_n_s64(vreinterpretq_s64_f64(m), 52)));
}
INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f64(c, a, b); }
INLINE vf vfnma(vf a, vf b, vf c) { return vfmsq_f64(c, a, b); }
INLINE vf vmax(vf a, vf b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
INLINE vf vmin(vf a, vf b) { return vbslq_f64(vcltq_f64(a, b), a, b); }
INLINE vm vle(vf a, vf b) { return vcleq_f64(a, b); }
INLINE vm vor(vm a, vm b) { return vorrq_u64(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return vbslq_f64(m, yes, no); }
INLINE vm vmask(const unsigned char *p) {
    return vcombine_u64(vcreate_u64(p[0] ? ~UINT64_C(0) : 0), vcreate_u64(p[1] ? ~UINT64_C(0) : 0));
}
INLINE vt vtail(ptrdiff_t n) { return n >= VL ? VL : n <= 0 ? 0 : (vt)n; }
INLINE vf vload_tail(const double *p, vt t) {
    const vf z = vdupq_n_f64(0.0);
    return t == VL ? vld1q_f64(p) : t == 1 ? vld1q_lane_f64(p, z, 0) : z;
}
INLINE void vstore_tail(double *p, vf a, vt t) {
    if (t == VL)
        vst1q_f64(p, a);
    else if (t == 1)
        vst1q_lane_f64(p, a, 0);
}
INLINE vf vjoin(vf a, vf b, vt t) { return t == VL ? a : t == 1 ? vcopyq_laneq_f64(b, 0, a, 0) : b; }
INLINE vf vkeep(vf a, vt t) { return vjoin(a, vdupq_n_f64(0.0), t); }
INLINE vf vsums(const vf *v) { return vpaddq_f64(v[0], v[1]); }
