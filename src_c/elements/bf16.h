/* bf16.h: bfloat16 in memory, the upper half of a float32; float32 in the lanes.
 *
 * Rounded to nearest even by integers: the CPUs' own conversions flush denormal values. To a NaN nothing is added,
 * which could carry into its sign; what arithmetic makes has the bit that keeps it one in the upper half. */
#include "simd.h"

typedef uint16_t elem;
typedef float real;
#define FEW_INSTANCES
#define REAL_MAX FLT_MAX

INLINE vf from_halves(vh a) { return vfloat(vhraise(a)); }
INLINE vh to_halves(vf a) {
    const vi bits = vbits(a), half = viadd(viset1(0x7fff), viand(vishr(bits, 16), viset1(1)));
    return vhupper(viadd(bits, vbits(vselect(vle(a, a), vfloat(half), vset1(0)))));
}
INLINE real widen(elem a) {
    const uint32_t bits = (uint32_t)a << 16;
    real v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

#include "elements/halves.h"
