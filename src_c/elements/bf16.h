/* bf16.h: bfloat16 in memory, the upper half of a float32; float32 in the lanes.
 *
 * Rounded to nearest even by integers: the CPUs' own conversions flush denormal values. */
#include "simd.h"

typedef uint16_t elem;
typedef float real;
#define FEW_INSTANCES
#define REAL_MAX FLT_MAX

INLINE vf from_halves(vh a) { return vfloat(vishl(vhwiden(a), 16)); }
INLINE vh to_halves(vf a) {
    const vi bits = vbits(a), high = vishr(bits, 16);
    const vi rounded = vishr(viadd(viadd(bits, viset1(0x7fff)), viand(high, viset1(1))), 16);
    const vi quiet = vior(high, viset1(0x40));
    return vhnarrow(vbits(vselect(vle(a, a), vfloat(rounded), vfloat(quiet))));
}
INLINE real widen(elem a) {
    const uint32_t bits = (uint32_t)a << 16;
    real v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

#include "elements/halves.h"
