/* planes.c: the loops over planes. */
#include "kernels/loops.h"

#define SHORT_BLOCK ((ptrdiff_t)(128 / sizeof(real))) /* channels whose short planes go in memory's order */
#define PIECE       128                               /* values: see piece() */
#define OVERLAP     64                                /* values of each of two passes that go in one loop */

/* Parts of this file, in an order in which each uses what those before it define. */
/* clang-format off */
#include "kernels/activations.inc.h"
#include "kernels/apply.inc.h"
#include "kernels/apply_planes.inc.h"
#include "kernels/shift.inc.h"
#include "kernels/stats_planes.inc.h"
#include "kernels/sums_planes.inc.h"
#if OVERLAPS
#include "kernels/overlap.inc.h"
#endif
#include "kernels/masked.inc.h"
#include "kernels/masked_planes.inc.h"
/* clang-format on */

const bn_loops TABLE(bn_planes_) = {
    .stats = stats_planes,
    .sums = sums_planes,
    .forward = forward_planes,
    .backward = backward_planes,
#if OVERLAPS
    .forward_and_stats = forward_and_stats,
    .backward_and_sums = backward_and_sums,
#endif
};

const bn_loops TABLE(bn_masked_planes_) = {
    .stats = stats_masked_planes,
    .sums = sums_masked_planes,
    .forward = forward_masked_planes,
    .backward = backward_masked_planes,
};
