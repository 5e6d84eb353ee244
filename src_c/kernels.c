/* kernels.c: the kernels, compiled once for every instruction set, each time with that set's flags and FASTBN_ISA.
 *
 * Everything but the table is static: two copies of one inline function with external linkage would be merged by the
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

#include "simd.h"

#include "elements/f32.h"

#define LINE        ((ptrdiff_t)(64 / sizeof(elem))) /* elements of a cache line */
#define SHORT_BLOCK 32         /* channels whose short planes are gone through in memory's order */
#define ACC         4          /* vectors a loop keeps for each sum: again half of 16 registers */
#define PASS        (ACC * VL) /* lanes that one pass over a tile covers */
#define PIECE       128        /* values: see piece() */
#define OVERLAP     64         /* values of each of two passes that are gone through in one loop */
#define PANEL       BN_PANEL   /* columns at a time in sums over rows */
#define BLOCK       64         /* channels at a time in what is done once a channel */
#define STATS_ROWS  8          /* rows at a time: a group, whose sums are kept apart */
#define SUMS_ROWS   4

/* Parts of this file, in an order in which each uses what those before it define. */
/* clang-format off */
#include "kernels/activations.inc.h"
#include "kernels/apply.inc.h"
#include "kernels/apply_planes.inc.h"
#include "kernels/apply_rows.inc.h"
#include "kernels/shift.inc.h"
#include "kernels/stats_planes.inc.h"
#include "kernels/stats_rows.inc.h"
#include "kernels/sums_planes.inc.h"
#include "kernels/sums_rows.inc.h"
#if OVERLAPS
#include "kernels/overlap.inc.h"
#endif
#include "kernels/coefficients.inc.h"
#include "kernels/masked.inc.h"
#include "kernels/masked_planes.inc.h"
#include "kernels/masked_rows.inc.h"
#include "kernels/masked_rows_apply.inc.h"
/* clang-format on */

#define JOIN_(a, b) a##b
#define JOIN(a, b)  JOIN_(a, b)
#define STRING_(a)  #a
#define STRING(a)   STRING_(a)

const bn_kernels JOIN(bn_kernels_, FASTBN_ISA) = {
    .name = STRING(FASTBN_ISA),
    .lanes = VL,
    .held = HELD,
    .overlaps = OVERLAPS,
    .stats = {stats_planes, stats_rows, stats_masked_planes, stats_masked_rows},
    .sums = {sums_planes, sums_rows, sums_masked_planes, sums_masked_rows},
    .forward = {forward_planes, forward_rows, forward_masked_planes, forward_masked_rows},
    .backward = {backward_planes, backward_rows, backward_masked_planes, backward_masked_rows},
#if OVERLAPS
    .forward_and_stats = forward_and_stats,
    .backward_and_sums = backward_and_sums,
#endif
    .pool_stats = {pool_stats, pool_masked},
    .pool_sums = pool_sums,
    .coef = coef,
    .running_coef = running_coef,
    .backward_coef = backward_coef,
    .move_running = move_running,
};
