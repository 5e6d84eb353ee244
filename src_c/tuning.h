/* tuning.h: every threshold that a plan compares with, a row for each class of machines.
 *
 * The measurements behind them are in docs/design/decisions.md, under the name of the field. */
#ifndef FASTBN_TUNING_H
#define FASTBN_TUNING_H

#include "machine.h"

typedef struct {
    ptrdiff_t serial;        /* elements up to which one thread works: waking others costs more than it brings */
    ptrdiff_t serial_pool;   /* tiles times columns up to which one thread pools them */
    int write_64ths;         /* of the cache: tensors beyond are written past it, */
    int read_64ths;          /* and found there no more by the next pass or call */
    int alone_64ths;         /* in place of both for one thread, which waits for memory longer */
    int less_64ths;          /* taken from write_64ths for each thread, of which no more than 16 were measured */
    int own_l2;              /* whether all threads' L2 counts in place of the last-level cache */
    ptrdiff_t held;          /* bytes of x at least that a group of channels may have, if L2 / 2 is less */
    ptrdiff_t run;           /* bytes: memory is read in runs of this length, if the cache has room for such a group */
    ptrdiff_t overlap_run;   /* the same where two groups are under way */
    int group_of_cache;      /* of a thread's part of the cache a group takes 1 / so many at most, */
    int overlap_of_cache;    /* or, where two are under way, 1 / so many */
    int sample_of_l2;        /* of L2 a group of a single sample's channels takes 1 / so many */
    ptrdiff_t block;         /* elements that a pass in reverse order takes at a time */
    ptrdiff_t few;           /* elements below which it costs more than it brings to look where things lie best */
    ptrdiff_t far;           /* elements of packed rows from which on what comes next is prefetched */
    ptrdiff_t wide;          /* columns whose coefficients and sums crowd L1 */
    ptrdiff_t stats_ahead;   /* bytes that statistics of rows from memory prefetch ahead */
    ptrdiff_t overlap_ahead; /* the same of overlapped planes; more is slower in short runs */
    ptrdiff_t cache, group;  /* bytes in place of the machine's caches, and of a group of channels; 0: as above */
} bn_tuning;

#define BN_ROW_OF_CORES                                                                                                \
    .serial = 65536, .serial_pool = 4096, .write_64ths = 48, .read_64ths = 64, .alone_64ths = 32, .held = 1 << 19,     \
    .run = 12 << 10, .overlap_run = 48 << 10, .group_of_cache = 4, .overlap_of_cache = 10, .sample_of_l2 = 4,          \
    .block = 16384, .few = 1 << 13, .far = 1 << 18, .wide = 1024, .stats_ahead = 8192, .overlap_ahead = 2048

static const bn_tuning bn_tunings[BN_N_CLASSES] = {
    [BN_CORES] = {BN_ROW_OF_CORES},
    [BN_SLICED] = {.serial = 65536,
                   .serial_pool = 4096,
                   .write_64ths = 64,
                   .read_64ths = 64,
                   .alone_64ths = 64,
                   .less_64ths = 1,
                   .own_l2 = 1,
                   .held = 1 << 19,
                   .run = 12 << 10,
                   .overlap_run = 48 << 10,
                   .group_of_cache = 4,
                   .overlap_of_cache = 10,
                   .sample_of_l2 = 4,
                   .block = 16384,
                   .few = 1 << 13,
                   .far = 1 << 18,
                   .wide = 1024,
                   .stats_ahead = 8192,
                   .overlap_ahead = 2048},
    [BN_BOARD] = {BN_ROW_OF_CORES}, /* not measured on a board */
};

#endif
