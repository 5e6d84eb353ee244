/* rows.c: the loops over rows. */
#include "kernels/loops.h"

#define PANEL      BN_PANEL /* columns at a time in sums over rows */
#define STATS_ROWS 8        /* rows at a time: a group, whose sums are kept apart */
#define SUMS_ROWS  4

/* Parts of this file, in an order in which each uses what those before it define. */
/* clang-format off */
#include "kernels/activations.inc.h"
#include "kernels/apply.inc.h"
#include "kernels/apply_rows.inc.h"
#include "kernels/shift.inc.h"
#include "kernels/stats_rows.inc.h"
#include "kernels/sums_rows.inc.h"
#include "kernels/masked.inc.h"
#include "kernels/masked_rows.inc.h"
#include "kernels/masked_rows_apply.inc.h"
/* clang-format on */

const bn_loops TABLE(bn_rows_) = {
    .stats = stats_rows,
    .sums = sums_rows,
    .forward = forward_rows,
    .backward = backward_rows,
};

const bn_loops TABLE(bn_masked_rows_) = {
    .stats = stats_masked_rows,
    .sums = sums_masked_rows,
    .forward = forward_masked_rows,
    .backward = backward_masked_rows,
};
