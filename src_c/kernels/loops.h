/* loops.h: what planes.c, rows.c and terms.c begin with. Each is compiled once for every instruction set and element,
 * with that set's flags, FASTBN_ISA, FASTBN_ELEMENT and that element's FASTBN_ELEMENT_FILE.
 *
 * Functions that are inlined into every loop have many parameters: each is a register or a constant there, where a
 * struct of them would lie in memory, and be loaded anew after each store.
 *
 * Everything but the tables is static: two copies of one inline function with external linkage would be merged by the
 * linker, and the AVX copy might win on a CPU without. */
#if !defined(__clang__) && __GNUC__ >= 13
/* gcc would go on with what is specialized here already: a fifth more code, for 1 to 3 %. */
#pragma GCC optimize("no-unswitch-loops")
#endif

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "tiles.h"

#define JOIN_(a, b, c) a##b##_##c
#define JOIN(a, b, c)  JOIN_(a, b, c)

#include FASTBN_ELEMENT_FILE

#define TABLE(part) JOIN(part, FASTBN_ISA, FASTBN_ELEMENT)
#define LINE        ((ptrdiff_t)(64 / sizeof(elem))) /* elements of a cache line */
#define ACC         4                                /* vectors a loop keeps for each sum: again half of 16 registers */
#define PASS        (ACC * VL)                       /* lanes that one pass over a tile covers */

#if defined(__GNUC__)
INLINE const elem *vaddress(const elem *p) {
    __asm__("" : "+r"(p));
    return p;
}
#else
INLINE const elem *vaddress(const elem *p) { return p; }
#endif

/* A bn_coef as it is here. */
typedef struct {
    real *mean, *scale, *shift;
    real *invstd, *offset, *g_mean, *g_proj, *g_shift;
} coefs;

INLINE coefs coefs_of(const bn_coef *k) {
    const coefs a = {k->mean, k->scale, k->shift, k->invstd, k->offset, k->g_mean, k->g_proj, k->g_shift};
    return a;
}
