/* f16.h: float16 (IEEE 754 binary16) in memory, float32 in the lanes; rounded to nearest even. */
#include "simd.h"

typedef uint16_t elem;
typedef float real;
#define FEW_INSTANCES
#define REAL_MAX FLT_MAX

#ifdef F16_HARDWARE
INLINE vf from_halves(vh a) { return vf16(a); }
INLINE vh to_halves(vf a) { return vto_f16(a); }
INLINE real widen(elem a) { return vf16_one(a); }
#else
/* Not inlined: of a few dozen instructions each, a third of a megabyte in all. */
#if defined(_MSC_VER) && !defined(__clang__)
#define APART static __declspec(noinline)
#else
#define APART static __attribute__((noinline))
#endif

/* Exponents are moved by 112; where there is none, a value with the least one is taken off: denormal float32 values on
 * the way would be lost if the caller has them flushed. */
APART vf from_halves(vh a) {
    const vi h = vhwiden(a), move = viset1(112u << 23), least = viset1(113u << 23);
    const vi sign = vishl(viand(h, viset1(0x8000)), 16), magnitude = vishl(viand(h, viset1(0x7fff)), 13);
    const vf normal = vfloat(viadd(magnitude, move)), denormal = vsub(vfloat(viadd(magnitude, least)), vfloat(least));
    const vf special = vfloat(viadd(vbits(normal), move));
    const vf finite = vselect(vle(vfloat(least), normal), normal, denormal);
    return vfloat(vior(sign, vbits(vselect(vle(vset1(65536.0f), normal), special, finite))));
}
/* Denormal results are rounded by adding 0.5, whose last bit is their last one. */
APART vh to_halves(vf a) {
    const vi bits = vbits(a), u = viand(bits, viset1(0x7fffffff)), half = viset1(126u << 23);
    const vf magnitude = vfloat(u);
    const vi even = viand(vishr(u, 13), viset1(1));
    const vi normal = vishr(viadd(viadd(u, viset1(0u - (112u << 23) + 0xfff)), even), 13);
    const vi denormal = viadd(vbits(vadd(magnitude, vfloat(half))), viset1(0u - (126u << 23)));
    const vi nan = vior(viand(vishr(u, 13), viset1(0x3ff)), viset1(0x7e00));
    vf r = vselect(vle(vset1(6.103515625e-05f), magnitude), vfloat(normal), vfloat(denormal));
    r = vselect(vle(vset1(65520.0f), magnitude), vfloat(viset1(0x7c00)), r);
    r = vselect(vle(a, a), r, vfloat(nan));
    return vhnarrow(vior(vbits(r), viand(vishr(bits, 16), viset1(0x8000))));
}
INLINE real widen(elem a) {
    const uint32_t move = 112u << 23, least = 113u << 23, magnitude = (a & 0x7fffu) << 13;
    uint32_t bits = magnitude + (magnitude < 1u << 23 ? least : magnitude < 31u << 23 ? move : 2 * move);
    real v, denormal;
    memcpy(&v, &bits, sizeof v);
    memcpy(&denormal, &least, sizeof denormal);
    if (magnitude < 1u << 23)
        v -= denormal;
    return a & 0x8000 ? -v : v;
}
#endif

#include "elements/halves.h"
