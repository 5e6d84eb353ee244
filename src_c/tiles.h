/* tiles.h: the tiles over which sums are taken, and how rows are folded. Both depend on N, C, S and the layout alone.
 *
 * How sums are kept both fast and right. A tile's values are summed in float32 after a shift near their mean, in
 * LANES or SHORT_LANES (planes) or one a column (rows) partial sums, the same ones on every instruction set. The shift
 * is a median of nine values of the tile, which costs nearly nothing; when it was a bad guess, or float32 has not the
 * range, the sums themselves tell, and the tile is summed again, in float64 if need be. Tiles are pooled in float64. */
#ifndef FASTBN_TILES_H
#define FASTBN_TILES_H

#include <stdint.h>

#include "kernels.h"

#define LANES       32   /* partial sums of a plane's values: with two sums, half of AVX2's registers */
#define SHORT_LANES 16   /* of short planes: adding up more would take longer than the values */
#define PLANE_TILE  4096 /* values: 16 KB, twice in L1 for the backward pass; 128 for each lane */
#define ROW_TILE    256  /* rows */
#define CHAIN       64   /* values of rows and short planes that one float32 sum takes */
#define FOLDED      128  /* columns of folded rows at least */

/* A tile of planes: `runs` runs of len values, one in each of the planes n, n + 1, ... */
typedef struct {
    ptrdiff_t n, s, runs, len;
} tile;

static inline ptrdiff_t min_z(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t max_z(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

/* A long plane is cut into pieces of about equal length, whole LANES but for the last. */
static inline ptrdiff_t piece_length(ptrdiff_t S) {
    const ptrdiff_t pieces = (S + PLANE_TILE - 1) / PLANE_TILE, len = (S + pieces - 1) / pieces;
    return (len + LANES - 1) / LANES * LANES;
}

/* Planes of a tile at most: short ones are summed in fewer lanes, each of which takes CHAIN values. */
static inline ptrdiff_t most_planes(ptrdiff_t S) {
    return S <= BN_SHORT_PLANE ? CHAIN / ((S + SHORT_LANES - 1) / SHORT_LANES) : PLANE_TILE / S;
}

/* Tiles of rows are of about equal height, and as many as divide among threads: a power of two or a multiple of 16. */
static inline ptrdiff_t row_tiles(ptrdiff_t rows) {
    const ptrdiff_t least = (rows + ROW_TILE - 1) / ROW_TILE;
    ptrdiff_t n = least > 0;
    while (n < 16 && n < least)
        n *= 2;
    return n < least ? (least + 15) / 16 * 16 : n;
}

/* Of each channel. */
static inline ptrdiff_t number_of_tiles(const bn_problem *p) {
    if (p->layout == BN_ROWS)
        return row_tiles(p->N * p->S / p->fold) + (p->N * p->S % p->fold != 0);
    if (p->S < PLANE_TILE)
        return (p->N + most_planes(p->S) - 1) / most_planes(p->S);
    const ptrdiff_t len = piece_length(p->S);
    return p->N * ((p->S + len - 1) / len);
}

/* Whole lines, and enough vectors to keep a loop going, as long as that does not take too many columns. */
static inline ptrdiff_t rows_folded(ptrdiff_t C) {
    ptrdiff_t f = 1;
    if (C == 0)
        return 1;
    while (C * f % BN_LINE)
        f *= 2;
    if (C * f > 32 * FOLDED)
        return 1;
    while (C * f < FOLDED)
        f *= 2;
    return f;
}

/* total * i / n without the product, which has not the range. */
static inline ptrdiff_t part(ptrdiff_t total, ptrdiff_t i, ptrdiff_t n) {
    return total / n * i + (ptrdiff_t)((int64_t)(total % n) * i / n);
}

static inline tile plane_tile(const bn_problem *p, ptrdiff_t t) {
    tile a;
    if (p->S < PLANE_TILE) {
        const ptrdiff_t n = number_of_tiles(p);
        a.n = part(p->N, t, n);
        a.s = 0;
        a.runs = part(p->N, t + 1, n) - a.n;
        a.len = p->S;
    } else {
        const ptrdiff_t len = piece_length(p->S), pieces = (p->S + len - 1) / len;
        a.n = t / pieces;
        a.s = t % pieces * len;
        a.runs = 1;
        a.len = min_z(len, p->S - a.s);
    }
    return a;
}

/* Values in column j of tile t of rows; the rows that do not fill a wide one make a last tile of their own. */
static inline ptrdiff_t row_tile(const bn_problem *p, ptrdiff_t t, ptrdiff_t *row0) {
    const ptrdiff_t wide = p->N * p->S / p->fold, n = row_tiles(wide);
    if (t >= n) {
        *row0 = wide;
        return 0;
    }
    *row0 = part(wide, t, n);
    return part(wide, t + 1, n) - *row0;
}

/* How many values of a channel a column of tile t holds, and in how many repetitions of the channels: in all of them,
 * but where the last rows do not fill a wide one. */
static inline ptrdiff_t tile_repetitions(const bn_problem *p, ptrdiff_t t, double *values) {
    if (p->layout == BN_PLANES) {
        const tile a = plane_tile(p, t);
        *values = (double)(a.runs * a.len);
        return 1;
    }
    ptrdiff_t row0;
    const ptrdiff_t rows = row_tile(p, t, &row0);
    *values = rows ? (double)rows : 1.0;
    return rows ? p->fold : p->N * p->S % p->fold;
}

/* Bytes of the mask from one sample to the next. */
static inline ptrdiff_t mask_pitch(const bn_problem *p) { return p->layout == BN_PLANES ? p->S + BN_LINE : p->S; }

static inline ptrdiff_t count_real(const unsigned char *mask, ptrdiff_t n) {
    ptrdiff_t real = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        real += mask[i];
    return real;
}

/* The positions of tile t of rows, which follow one another. */
static inline ptrdiff_t row_positions(const bn_problem *p, ptrdiff_t t, ptrdiff_t *first) {
    ptrdiff_t row0;
    const ptrdiff_t rows = row_tile(p, t, &row0);
    *first = row0 * p->fold;
    return rows ? rows * p->fold : p->N * p->S % p->fold;
}

/* How many positions of tile t are real. */
static inline ptrdiff_t real_of_tile(const bn_problem *p, ptrdiff_t t) {
    ptrdiff_t first, real = 0;
    if (p->layout == BN_ROWS) {
        const ptrdiff_t n = row_positions(p, t, &first);
        return count_real(p->mask + first, n);
    }
    const tile a = plane_tile(p, t);
    for (ptrdiff_t r = 0; r < a.runs; r++)
        real += count_real(p->mask + (a.n + r) * mask_pitch(p) + a.s, a.len);
    return real;
}

/* Chan's formula: w more values a channel, which is not 0, to the n that mean and m2 are of. */
static inline void pool_more(ptrdiff_t cols, double n, double w, const double *more, const double *more_m2,
                             double *mean, double *m2) {
    const double share = w / (n + w), both = n * share;
    for (ptrdiff_t c = 0; c < cols; c++) {
        const double d = more[c] - mean[c];
        mean[c] = n > 0.0 ? mean[c] + d * share : more[c];
        m2[c] = n > 0.0 ? m2[c] + (more_m2[c] + both * (d * d)) : more_m2[c];
    }
}

#endif
