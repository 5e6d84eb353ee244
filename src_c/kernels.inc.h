/* kernels.inc.h: the kernels, once for every instruction set.
 *
 * Each kernels_*.c includes this after choosing the vocabulary of simd.h. Everything is static: two copies of one
 * inline function with external linkage would be merged by the linker, and the AVX copy might win on a CPU without.
 *
 * What the parts share is here; each part is a file, included below.
 *
 * How sums are kept both fast and right. A tile's values are summed in float32 after a shift near their mean, in
 * LANES or SHORT_LANES (planes) or one a column (rows) partial sums, the same ones on every instruction set. The shift
 * is a median of nine values of the tile, which costs nearly nothing; when it was a bad guess, or float32 has not the
 * range, the sums themselves tell, and the tile is summed again, in float64 if need be. Tiles are pooled in float64.
 */
#if !defined(__clang__) && __GNUC__ >= 13
/* gcc would go on with what is specialized here already: a fifth more code, 1 to 3 % faster, and a wheel above 1 MB. */
#pragma GCC optimize("no-unswitch-loops")
#endif

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "simd.h"

#define LANES         32         /* partial sums of a plane's values: with two sums, half of AVX2's registers */
#define SHORT_LANES   16         /* of short planes: adding up more would take longer than the values */
#define SHORT_BLOCK   32         /* channels whose short planes are gone through in memory's order */
#define ACC           4          /* vectors a loop keeps for each sum: again half of 16 registers */
#define PASS          (ACC * VL) /* lanes that one pass over a tile covers */
#define LINE          16         /* floats of a cache line */
#define PLANE_TILE    4096       /* values: 16 KB, twice in L1 for the backward pass; 128 for each lane */
#define PIECE         128        /* values: see piece() */
#define ROW_TILE      256        /* rows */
#define INTERLEAVE    64         /* values of each of two passes that are gone through in one loop */
#define CHAIN         64         /* values of rows and short planes that one float32 sum takes */
#define FOLDED        128        /* columns of folded rows at least */
#define PANEL         BN_PANEL   /* columns at a time in sums over rows */
#define BLOCK         64         /* channels at a time in what is done once a channel */
#define WIDE          1024       /* columns whose coefficients and sums crowd L1 */
#define STATS_ROWS    8          /* rows at a time: a group, whose sums are kept apart */
#define SUMS_ROWS     4
#define WORK_ROWS     4
#define STRIP         128  /* columns whose statistics AVX-512's registers hold */
#define STATS_AHEAD   2048 /* values, 8 KB: how far ahead rows from beyond the cache are prefetched for statistics */
#define PLANES_AHEAD  512  /* values, 2 KB: the same of planes beside the second pass; more is slower in short runs */
#define STREAM_AHEAD  256  /* values, 1 KB: the same of rows that are streamed */
#define FEW           (1 << 13) /* elements below which it costs more than it brings to look where sums are best kept */
#define FAR           (1 << 18) /* elements, 1 MB a tensor, from which on rows are prefetched */
#define NARROW        320       /* columns: eight rows of two operands are 20 KB */
#define MANY          (1 << 21) /* elements from which on inference folds more rows */
#define LARGE_CHANNEL (1 << 18) /* values: 1 MB, an L2 */

/* With the activation and the presence of a residual as constants, the compiler drops what is not needed. */
#define SPECIALIZE(p, body)                                                                                            \
    switch ((p)->activation * 2 + ((p)->residual.data != NULL)) {                                                      \
    case 0: body(BN_IDENTITY, 0); break;                                                                               \
    case 1: body(BN_IDENTITY, 1); break;                                                                               \
    case 2: body(BN_RELU, 0); break;                                                                                   \
    case 3: body(BN_RELU, 1); break;                                                                                   \
    case 4: body(BN_RELU6, 0); break;                                                                                  \
    case 5: body(BN_RELU6, 1); break;                                                                                  \
    case 6: body(BN_LEAKY_RELU, 0); break;                                                                             \
    default: body(BN_LEAKY_RELU, 1); break;                                                                            \
    }

/* Which pass is which, for macros that are told. Backward by the output is one more case, with any activation, because
 * it is seldom wanted: at run time it costs a comparison. */
#define BY_OUTPUT          -1
#define SPECIALIZE_FORWARD SPECIALIZE
#define SPECIALIZE_BACKWARD(p, body)                                                                                   \
    if ((p)->by_output) {                                                                                              \
        body(BY_OUTPUT, 1);                                                                                            \
    } else {                                                                                                           \
        SPECIALIZE(p, body)                                                                                            \
    }

INLINE ptrdiff_t min_z(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

INLINE vf activate(vf z, int activation, vf slope) {
    const vf zero = vset1(0.0f);
    if (activation == BN_RELU)
        return vmax(zero, z);
    if (activation == BN_RELU6)
        return vmin(vset1(6.0f), vmax(zero, z));
    if (activation == BN_LEAKY_RELU)
        return vselect(vle(z, zero), vmul(z, slope), z);
    return z;
}

/* The gradient that reaches z; a NaN in z lets it pass, as in PyTorch. */
INLINE vf activate_backward(vf dy, vf z, int activation, vf slope) {
    const vf zero = vset1(0.0f);
    if (activation == BN_RELU)
        return vselect(vle(z, zero), zero, dy);
    if (activation == BN_RELU6)
        return vselect(vor(vle(z, zero), vle(vset1(6.0f), z)), zero, dy);
    if (activation == BN_LEAKY_RELU)
        return vselect(vle(z, zero), vmul(dy, slope), dy);
    return dy;
}

/* Parts of this file, in an order in which each uses what those before it define. */
/* clang-format off */
#include "elementwise.inc.h"
#include "tiles.inc.h"
#include "statistics.inc.h"
#include "gradient_sums.inc.h"
#include "interleave.inc.h"
#include "coefficients.inc.h"
/* clang-format on */

#define TABLE(isa)                                                                                                     \
    const bn_kernels bn_kernels_##isa = {                                                                              \
        #isa,                                                                                                          \
        tiles,                                                                                                         \
        fold,                                                                                                          \
        {stats_planes, stats_rows},                                                                                    \
        {forward_planes, forward_rows},                                                                                \
        {sums_planes, sums_rows},                                                                                      \
        {backward_planes, backward_rows},                                                                              \
        forward_and_stats,                                                                                             \
        backward_and_sums,                                                                                             \
        pool_stats,                                                                                                    \
        pool_sums,                                                                                                     \
        coef,                                                                                                          \
        move_running,                                                                                                  \
        running_coef,                                                                                                  \
        backward_coef,                                                                                                 \
    };
