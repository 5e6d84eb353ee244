/* neon.h: NEON of AArch64: 4 lanes, 32 registers. The vocabulary is told in simd.h. */
#include <arm_neon.h>

#define VECTOR_REGISTER "w"
#define VL              4
#define HELD            0
#define OVERLAPS        0
#define STREAMS         0
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
INLINE vf vdiv(vf a, vf b) { return vdivq_f32(a, b); }
INLINE vf vscale(vf a, vf m) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(m), 23)));
}
INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vfnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
/* not vmaxq: it treats NaN and -0 otherwise than x86 does */
INLINE vf vmax(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vf vmin(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vm vle(vf a, vf b) { return vcleq_f32(a, b); }
INLINE vm vor(vm a, vm b) { return vorrq_u32(a, b); }
INLINE vf vselect(vm m, vf yes, vf no) { return vbslq_f32(m, yes, no); }
INLINE vm vmask(const unsigned char *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    const uint32x4_t b = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
    return vtstq_u32(b, b);
}
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

typedef uint16x4_t vh;
typedef uint32x4_t vi;
INLINE vh vhload(const uint16_t *p) { return vld1_u16(p); }
INLINE int vcount(vt t) { return t; }
INLINE void vhstore(uint16_t *p, vh a) { vst1_u16(p, a); }
INLINE void vhstream(uint16_t *p, vh a) { vhstore(p, a); }
INLINE vi vhraise(vh a) { return vshll_n_u16(a, 16); }
INLINE vh vhupper(vi a) { return vshrn_n_u32(a, 16); }
INLINE vf vfloat(vi a) { return vreinterpretq_f32_u32(a); }
INLINE vi vbits(vf a) { return vreinterpretq_u32_f32(a); }
INLINE vi viset1(uint32_t a) { return vdupq_n_u32(a); }
INLINE vi viadd(vi a, vi b) { return vaddq_u32(a, b); }
INLINE vi viand(vi a, vi b) { return vandq_u32(a, b); }
INLINE vi vior(vi a, vi b) { return vorrq_u32(a, b); }
INLINE vi vishl(vi a, int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
INLINE vi vishr(vi a, int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
#define F16_HARDWARE 1
INLINE float vf16_one(uint16_t a) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a))), 0); }
INLINE vf vf16(vh a) { return vcvt_f32_f16(vreinterpret_f16_u16(a)); }
INLINE vh vto_f16(vf a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
