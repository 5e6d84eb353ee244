/* kernels.inc.h: the kernels, once for every instruction set.
 *
 * Each kernels_*.c includes this after choosing the vocabulary of simd.h. Everything is static: two copies of one
 * inline function with external linkage would be merged by the linker, and the AVX copy might win on a CPU without.
 *
 * How sums are kept both fast and right. A tile's values are summed in float32 after a shift near their mean, in
 * LANES or SHORT_LANES (planes) or one a column (rows) partial sums, the same ones on every instruction set. The shift
 * is a median of nine values from all over the tile, which costs nearly nothing; when it was a bad guess, or float32
 * has not the range, the sums themselves tell, and the tile is summed again in float64. Tiles are pooled in float64.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "simd.h"

#define LANES         32         /* partial sums of a plane's values: with two sums, half of AVX2's registers */
#define SHORT_LANES   16         /* of short planes: adding up more would take longer than the values */
#define SHORT_BLOCK   64         /* channels whose short planes are gone through in memory's order */
#define ACC           4          /* vectors a loop keeps for each sum: again half of 16 registers */
#define PASS          (ACC * VL) /* lanes that one pass over a tile covers */
#define LINE          16         /* floats of a cache line */
#define PLANE_TILE    4096       /* values: 16 KB, twice in L1 for the backward pass; 128 for each lane */
#define PIECE         128        /* values of a long run that all passes take before they go on, in memory's order */
#define ROW_TILE      256        /* rows */
#define INTERLEAVE    64         /* values of each of two passes that are gone through in one loop */
#define CHAIN         64         /* values of rows and short planes that one float32 sum takes */
#define FOLDED        128        /* columns of folded rows at least */
#define PANEL         2048       /* columns at a time in sums over rows */
#define BLOCK         64         /* channels at a time in what is done once a channel */
#define WIDE          1024       /* columns whose coefficients and sums crowd L1 */
#define STATS_ROWS    8          /* rows at a time */
#define SUMS_ROWS     4
#define WORK_ROWS     4
#define FAR           (1 << 18) /* elements, 1 MB a tensor, from which on rows are prefetched */
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

/* ---- elementwise: forward and backward ---------------------------------------------------------------------- */

/* One channel's coefficients in all lanes (planes), or those of VL channels that follow one another (rows). */
typedef struct {
    vf mean, scale, shift, slope; /* what a direction does not use, the compiler drops */
    vf invstd, g_mean, g_proj, g_shift;
} vcoef;

/* Where a run of values lies in each operand. */
typedef struct {
    const float *x, *r, *dy;
    float *out, *gr;
    ptrdiff_t ahead; /* from x and dy to what will be read next; 0: unknown */
} cursor;

enum { FORWARD, BACKWARD };

INLINE vcoef coef_of_channel(const bn_problem *p, const bn_coef *k, ptrdiff_t c, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0.0f);
    const vcoef v = {
        vset1(k->mean[c]),
        vset1(k->scale[c]),
        vset1(k->shift[c]),
        vset1(p->negative_slope),
        b ? vset1(k->invstd[c]) : none,
        b ? vset1(k->g_mean[c]) : none,
        b ? vset1(k->g_proj[c]) : none,
        b ? vset1(k->g_shift[c]) : none,
    };
    return v;
}

INLINE vcoef coef_of_columns(const bn_problem *p, const bn_coef *k, ptrdiff_t c, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0.0f);
    const vcoef v = {
        vload(k->mean + c),
        vload(k->scale + c),
        vload(k->shift + c),
        vset1(p->negative_slope),
        b ? vload(k->invstd + c) : none,
        b ? vload(k->g_mean + c) : none,
        b ? vload(k->g_proj + c) : none,
        b ? vload(k->g_shift + c) : none,
    };
    return v;
}

/* g from d = x - mean; with the expression of the forward pass, so that both agree on which side of 0 z lies. */
INLINE vf masked_grad(const vcoef *k, vf d, vf r, vf dy, int act, int res) {
    if (act == BN_IDENTITY)
        return dy;
    const vf z = vfma(d, k->scale, k->shift);
    return activate_backward(dy, res ? vadd(z, r) : z, act, k->slope);
}

/* The elementwise work on the lanes of t at offset i. Where a whole vector is meant, `whole` is a constant 1 and t is
 * not looked at. */
INLINE void work_at(const vcoef *k, const cursor *a, ptrdiff_t i, vt t, int whole, int direction, int act, int res,
                    int stream) {
    const vf d = vsub(whole ? vload(a->x + i) : vload_tail(a->x + i, t), k->mean);
    vf r = d, v;
    if (res && (direction == FORWARD || act != BN_IDENTITY))
        r = whole ? vload(a->r + i) : vload_tail(a->r + i, t);
    if (direction == FORWARD) {
        const vf z = vfma(d, k->scale, k->shift);
        v = activate(res ? vadd(z, r) : z, act, k->slope);
    } else {
        const vf dy = whole ? vload(a->dy + i) : vload_tail(a->dy + i, t);
        const vf g = masked_grad(k, d, r, dy, act, res);
        v = vfma(vfma(d, k->g_proj, vsub(g, k->g_mean)), k->scale, k->g_shift);
        if (res) {
            if (whole)
                vstore(a->gr + i, g);
            else
                vstore_tail(a->gr + i, g, t);
        }
    }
    if (!whole)
        vstore_tail(a->out + i, v, t);
    else if (stream)
        vstream(a->out + i, v);
    else
        vstore(a->out + i, v);
}

#define LONG_RUN 128 /* values from which on a run is worth being aligned */

/* What lies `ahead` of offset i. It lets reads go on while streaming stores drain. */
INLINE void prefetch_at(const cursor *a, ptrdiff_t i, int direction) {
    vprefetch(a->x + i + a->ahead);
    if (direction == BACKWARD)
        vprefetch(a->dy + i + a->ahead);
}

/* Whether rows that are gone through several at a time, over so many columns, prefetch the next so many: in the order
 * of memory, which several rows at once hide from the hardware. */
INLINE int far_rows(const bn_problem *p, ptrdiff_t cols) { return p->N * p->S * p->C >= FAR && cols == p->C * p->fold; }

/* len values with the same coefficients. Streaming stores write whole lines; what is before the first and after the
 * last goes through the cache. */
INLINE void work_run(const vcoef *k, const cursor *a, ptrdiff_t len, int direction, int act, int res, int stream) {
    const vt all = vtail(VL);
    ptrdiff_t i = 0;
    if (stream || len >= LONG_RUN) {
        const ptrdiff_t head = min_z(len, (ptrdiff_t)((0 - (uintptr_t)a->out / sizeof(float)) % LINE));
        for (; i + VL <= head; i += VL)
            work_at(k, a, i, all, 1, direction, act, res, 0);
        if (i < head)
            work_at(k, a, i, vtail(head - i), 0, direction, act, res, 0);
        i = head;
    }
    for (; i + 4 * VL <= len; i += 4 * VL)
        for (int j = 0; j < 4 * VL; j += VL)
            work_at(k, a, i + j, all, 1, direction, act, res, stream);
    for (; i + LINE <= len; i += LINE)
        for (int j = 0; j < LINE; j += VL)
            work_at(k, a, i + j, all, 1, direction, act, res, stream);
    for (; i + VL <= len; i += VL)
        work_at(k, a, i, all, 1, direction, act, res, 0);
    if (i < len)
        work_at(k, a, i, vtail(len - i), 0, direction, act, res, 0);
}

INLINE cursor cursor_at(const bn_problem *p, ptrdiff_t outer, ptrdiff_t inner, ptrdiff_t i, int direction) {
    cursor a;
    const bn_operand *out = direction == FORWARD ? &p->y : &p->grad_input;
    a.x = p->x.data + outer * p->x.outer + inner * p->x.inner + i;
    a.out = out->data + outer * out->outer + inner * out->inner + i;
    a.r = p->residual.data ? p->residual.data + outer * p->residual.outer + inner * p->residual.inner + i : NULL;
    a.dy = NULL;
    a.gr = NULL;
    a.ahead = 0;
    if (direction == BACKWARD) {
        a.dy = p->grad_output.data + outer * p->grad_output.outer + inner * p->grad_output.inner + i;
        if (p->grad_residual.data)
            a.gr = p->grad_residual.data + outer * p->grad_residual.outer + inner * p->grad_residual.inner + i;
    }
    return a;
}

/* From offset s of a plane to the beginning of the next. */
INLINE void next_plane(const bn_problem *p, cursor *a, ptrdiff_t s, int direction, int res) {
    a->x += p->x.inner - s;
    if (res)
        a->r += p->residual.inner - s;
    if (direction == FORWARD)
        a->out += p->y.inner - s;
    else {
        a->out += p->grad_input.inner - s;
        a->dy += p->grad_output.inner - s;
        if (res)
            a->gr += p->grad_residual.inner - s;
    }
}

/* Column 0 of a row of the kernel's width: `fold` rows of memory, or one row anywhere. */
INLINE cursor row_cursor(const bn_problem *p, ptrdiff_t row, int direction) {
    if (p->fold > 1)
        return cursor_at(p, 0, 0, row * p->C * p->fold, direction);
    return p->N == 1 ? cursor_at(p, 0, row, 0, direction) : cursor_at(p, row / p->S, row % p->S, 0, direction);
}

INLINE vcoef join_coef(const vcoef *a, const vcoef *b, vt t) {
    const vcoef v = {
        vjoin(a->mean, b->mean, t),     vjoin(a->scale, b->scale, t),
        vjoin(a->shift, b->shift, t),   a->slope,
        vjoin(a->invstd, b->invstd, t), vjoin(a->g_mean, b->g_mean, t),
        vjoin(a->g_proj, b->g_proj, t), vjoin(a->g_shift, b->g_shift, t),
    };
    return v;
}

/* Short planes that follow one another, from offset s of channel c on: vectors keep to those of the output, across
 * planes, with the coefficients of both where they lie in two. Masked stores, one a plane, would take as long as all
 * the rest, and streamed planes would share lines. */
INLINE void work_short_planes(const bn_problem *p, const bn_coef *coef, const cursor *a, ptrdiff_t c, ptrdiff_t s,
                              ptrdiff_t len, int direction, int act, int res, int stream) {
    const vt all = vtail(VL);
    ptrdiff_t i = 0, end = p->S - s;                                                     /* of channel c */
    ptrdiff_t n = min_z(len, (ptrdiff_t)((0 - (uintptr_t)a->out / sizeof(float)) % VL)); /* before the first vector */
    vcoef k = coef_of_channel(p, coef, c, direction);
    for (;;) {
        if (n == 0) {
            for (; i + VL <= min_z(end, len); i += VL) {
                if (stream)
                    prefetch_at(a, i, direction);
                work_at(&k, a, i, all, 1, direction, act, res, stream);
            }
            n = min_z(VL, len - i);
        }
        if (n == 0)
            return;
        vcoef both = k;
        if (i + n > end) {
            const vcoef next = coef_of_channel(p, coef, ++c, direction);
            both = join_coef(&k, &next, vtail(end - i));
            k = next;
            end += p->S;
        }
        if (n == VL)
            work_at(&both, a, i, all, 1, direction, act, res, stream);
        else
            work_at(&both, a, i, vtail(n), 0, direction, act, res, 0);
        i += n;
        n = 0;
    }
}

INLINE void work_planes(const bn_problem *p, const bn_coef *coef, ptrdiff_t e0, ptrdiff_t e1, ptrdiff_t ahead,
                        int direction, int act, int res, int stream) {
    ptrdiff_t s = e0 % p->S, c = e0 / p->S % p->C, n = e0 / p->S / p->C;
    while (e0 < e1) {
        ptrdiff_t len = min_z((p->C - c) * p->S - s, e1 - e0);
        cursor a = cursor_at(p, n, c, s, direction);
        a.ahead = ahead;
        e0 += len;
        if (p->packed && p->S >= LINE && p->S <= BN_SHORT_PLANE)
            work_short_planes(p, coef, &a, c, s, len, direction, act, res, stream);
        else
            for (; len > 0; c++, s = 0) {
                const ptrdiff_t run = min_z(p->S - s, len);
                const vcoef k = coef_of_channel(p, coef, c, direction);
                work_run(&k, &a, run, direction, act, res, stream);
                next_plane(p, &a, s, direction, res);
                len -= run;
            }
        s = c = 0;
        n++;
    }
}

/* `rows` rows of the kernel's width. Those of a packed tensor may begin at any element (`from`): then every row is
 * seen rotated, so that its vectors keep to the lines of the output. */
typedef struct {
    ptrdiff_t from, rows, phase;
} rowset;

INLINE cursor row_of(const bn_problem *p, const rowset *b, ptrdiff_t r, int direction) {
    return p->packed ? cursor_at(p, 0, 0, b->from + r * p->C * p->fold, direction)
                     : row_cursor(p, b->from + r, direction);
}

/* Part of one row, in order. */
INLINE void work_part(const bn_problem *p, const bn_coef *coef, const cursor *a, ptrdiff_t c, ptrdiff_t end,
                      int direction, int act, int res) {
    for (; c + VL <= end; c += VL) {
        const vcoef k = coef_of_columns(p, coef, c, direction);
        work_at(&k, a, c, vtail(VL), 1, direction, act, res, 0);
    }
    if (c < end) {
        const vcoef k = coef_of_columns(p, coef, c, direction);
        work_at(&k, a, c, vtail(end - c), 0, direction, act, res, 0);
    }
}

/* Several rows at a time, at the distance of K in every operand: coefficients in memory cost more than what they are
 * applied to. From beyond the cache one row after the other, in memory's order: several at once are more than the
 * hardware prefetches well, and more than it combines streaming stores for. */
INLINE void work_some_rows(const bn_problem *p, const bn_coef *coef, const rowset *b, ptrdiff_t r, int rows, int far,
                           int direction, int act, int res, int stream) {
    const ptrdiff_t K = p->C * p->fold;
    cursor a = row_of(p, b, r, direction);
    a.ahead = rows * K;
    ptrdiff_t c = 0;
    for (; c + LINE <= K; c += LINE) {
        vcoef k[LINE / VL];
        for (int v = 0; v < LINE / VL; v++) {
            const ptrdiff_t at = b->phase + c + v * VL;
            k[v] = coef_of_columns(p, coef, at < K ? at : at - K, direction);
        }
        for (int j = 0; far && j < rows; j++) {
            const ptrdiff_t next = rows * c + j * LINE;
            prefetch_at(&a, next, direction);
            vprefetch(a.out + a.ahead + next);
            if (res)
                vprefetch(a.r + a.ahead + next);
        }
        for (int j = 0; j < rows; j++)
            for (int v = 0; v < LINE / VL; v++)
                work_at(&k[v], &a, j * K + c + v * VL, vtail(VL), 1, direction, act, res, stream);
    }
    for (int j = 0; c < K && j < rows; j++) {
        const cursor rest = row_of(p, b, r + j, direction);
        work_part(p, coef, &rest, c, K, direction, act, res);
    }
}

INLINE void work_rows(const bn_problem *problem, const bn_coef *coefficients, ptrdiff_t e0, ptrdiff_t e1, int direction,
                      int act, int res, int stream) {
    /* Copies: to the compiler a vector may be stored to whatever there is a pointer to, these included. */
    const bn_problem local = *problem, *const p = &local;
    const bn_coef local_coef = *coefficients, *const coef = &local_coef;
    const ptrdiff_t K = p->C * p->fold;
    const int rotate = p->packed && K % LINE == 0;
    const float *out = direction == FORWARD ? p->y.data : p->grad_input.data;
    while (e0 < e1) {
        const ptrdiff_t row = e0 / K, c = e0 % K;
        ptrdiff_t misfit = 0; /* elements before the first that may begin a row */
        if (rotate)
            misfit = (ptrdiff_t)((0 - (uintptr_t)(out + e0) / sizeof(float)) % LINE);
        else if (c)
            misfit = K - c;
        if (misfit || e1 - e0 < K) {
            const ptrdiff_t end = min_z(K, c + (misfit ? min_z(misfit, e1 - e0) : e1 - e0));
            const cursor a = row_cursor(p, row, direction);
            work_part(p, coef, &a, c, end, direction, act, res);
            e0 += end - c;
            continue;
        }
        const rowset b = {p->packed ? e0 : row, (e1 - e0) / K, c};
        ptrdiff_t r = 0;
        if (p->packed && !stream && far_rows(p, K))
            for (; r + WORK_ROWS <= b.rows; r += WORK_ROWS)
                work_some_rows(p, coef, &b, r, WORK_ROWS, 1, direction, act, res, 0);
        else if (p->packed && !stream)
            for (; r + WORK_ROWS <= b.rows; r += WORK_ROWS)
                work_some_rows(p, coef, &b, r, WORK_ROWS, 0, direction, act, res, 0);
        for (; r < b.rows; r++)
            if (stream && rotate)
                work_some_rows(p, coef, &b, r, 1, 0, direction, act, res, 1);
            else
                work_some_rows(p, coef, &b, r, 1, 0, direction, act, res, 0);
        e0 += b.rows * K;
    }
}

#define WORK(layout, direction, name)                                                                                  \
    static void name(const bn_problem *p, const bn_coef *k, ptrdiff_t e0, ptrdiff_t e1, ptrdiff_t ahead) {             \
        if (p->stream) {                                                                                               \
            SPECIALIZE(p, WORK_STREAM_##layout##_##direction);                                                         \
            vfence();                                                                                                  \
        } else {                                                                                                       \
            SPECIALIZE(p, WORK_CACHED_##layout##_##direction);                                                         \
        }                                                                                                              \
    }
#define WORK_STREAM_planes_FORWARD(act, res)  work_planes(p, k, e0, e1, ahead, FORWARD, act, res, 1)
#define WORK_CACHED_planes_FORWARD(act, res)  work_planes(p, k, e0, e1, ahead, FORWARD, act, res, 0)
#define WORK_STREAM_planes_BACKWARD(act, res) work_planes(p, k, e0, e1, ahead, BACKWARD, act, res, 1)
#define WORK_CACHED_planes_BACKWARD(act, res) work_planes(p, k, e0, e1, ahead, BACKWARD, act, res, 0)
#define WORK_STREAM_rows_FORWARD(act, res)    (void)ahead, work_rows(p, k, e0, e1, FORWARD, act, res, 1)
#define WORK_CACHED_rows_FORWARD(act, res)    (void)ahead, work_rows(p, k, e0, e1, FORWARD, act, res, 0)
#define WORK_STREAM_rows_BACKWARD(act, res)   (void)ahead, work_rows(p, k, e0, e1, BACKWARD, act, res, 1)
#define WORK_CACHED_rows_BACKWARD(act, res)   (void)ahead, work_rows(p, k, e0, e1, BACKWARD, act, res, 0)
WORK(planes, FORWARD, forward_planes)
WORK(planes, BACKWARD, backward_planes)
WORK(rows, FORWARD, forward_rows)
WORK(rows, BACKWARD, backward_rows)

/* ---- tiles --------------------------------------------------------------------------------------------------- */

/* A tile of planes: `runs` runs of len values, one in each of the planes n, n + 1, ... */
typedef struct {
    ptrdiff_t n, s, runs, len;
} tile;

/* A long plane is cut into pieces of about equal length, whole LANES but for the last. */
INLINE ptrdiff_t piece_length(ptrdiff_t S) {
    const ptrdiff_t pieces = (S + PLANE_TILE - 1) / PLANE_TILE, len = (S + pieces - 1) / pieces;
    return (len + LANES - 1) / LANES * LANES;
}

/* Planes of a tile at most: short ones are summed in fewer lanes, each of which takes CHAIN values. */
INLINE ptrdiff_t most_planes(ptrdiff_t S) {
    return S <= BN_SHORT_PLANE ? CHAIN / ((S + SHORT_LANES - 1) / SHORT_LANES) : PLANE_TILE / S;
}

/* Tiles of rows are of about equal height, and as many as divide among threads: a power of two or a multiple of 16. */
INLINE ptrdiff_t row_tiles(ptrdiff_t rows) {
    const ptrdiff_t least = (rows + ROW_TILE - 1) / ROW_TILE;
    ptrdiff_t n = least > 0;
    while (n < 16 && n < least)
        n *= 2;
    return n < least ? (least + 15) / 16 * 16 : n;
}

static ptrdiff_t tiles(const bn_problem *p) {
    if (p->layout == BN_ROWS)
        return row_tiles(p->N * p->S / p->fold) + (p->N * p->S % p->fold != 0);
    if (p->S < PLANE_TILE)
        return (p->N + most_planes(p->S) - 1) / most_planes(p->S);
    const ptrdiff_t len = piece_length(p->S);
    return p->N * ((p->S + len - 1) / len);
}

/* Whole lines, and enough vectors to keep a loop going, as long as that does not take too many columns; more of them
 * where there are so many rows that memory is what they wait for. Statistics want few columns: they pass 0 rows. */
static ptrdiff_t fold(ptrdiff_t C, ptrdiff_t rows) {
    const ptrdiff_t columns = rows > MANY / (C + 1) ? 4 * FOLDED : FOLDED;
    ptrdiff_t f = 1;
    if (C == 0)
        return 1;
    while (C * f % LINE)
        f *= 2;
    if (C * f > 32 * FOLDED)
        return 1;
    while (C * f < columns)
        f *= 2;
    return f;
}

INLINE tile plane_tile(const bn_problem *p, ptrdiff_t t) {
    tile a;
    if (p->S < PLANE_TILE) {
        const ptrdiff_t n = tiles(p);
        a.n = p->N * t / n;
        a.s = 0;
        a.runs = p->N * (t + 1) / n - a.n;
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
INLINE ptrdiff_t row_tile(const bn_problem *p, ptrdiff_t t, ptrdiff_t *row0) {
    const ptrdiff_t wide = p->N * p->S / p->fold, n = row_tiles(wide);
    if (t >= n) {
        *row0 = wide;
        return 0;
    }
    *row0 = wide * t / n;
    return wide * (t + 1) / n - *row0;
}

/* How many values of a channel a column of tile t holds, and in how many repetitions of the channels: in all of them,
 * but where the last rows do not fill a wide one. */
INLINE ptrdiff_t tile_repetitions(const bn_problem *p, ptrdiff_t t, double *values) {
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

/* ---- statistics ---------------------------------------------------------------------------------------------- */

#define TINY 1e-30 /* below this the squares have lost bits to underflow */

/* Whether the sums of n shifted values tell too little: float32 has not the range, or the shift was over two deviations
 * off the mean (the variance loses accuracy with the square of that). */
INLINE int unsound(double n, double sum, double sq) {
    return !(1.25 * (sum * (sum / n)) <= sq) | !(sq <= FLT_MAX) | ((sq < TINY) & (sum != 0.0));
}

/* Means and squared deviations of n values a column from their shifted sums. Returns whether any is unsound. */
static int settle(double n, ptrdiff_t cols, const float *shift, const double *sum, const double *sq, double *mean,
                  double *m2) {
    int any = 0;
    for (ptrdiff_t c = 0; c < cols; c++) {
        const double a = sum[c] / n, m = sq[c] - sum[c] * a;
        mean[c] = shift[c] + a;
        m2[c] = m > 0.0 ? m : 0.0;
        any |= unsound(n, sum[c], sq[c]);
    }
    return any;
}

/* In float64, twice over the values; eight partial sums, because one would wait for itself. */
static void exact_stats(const float *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, double *mean, double *m2) {
    double s[8] = {0.0}, q[8] = {0.0};
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++)
            s[i % 8] += x[r * stride + i];
    const double m = (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) / (double)(runs * len);
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++) {
            const double d = x[r * stride + i] - m;
            q[i % 8] += d * d;
        }
    *mean = m;
    *m2 = ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]));
}

/* From a tile to the one that is prefetched meanwhile: the next channel's, or the plane's own next piece where a
 * channel is so large that what is fetched of another would be gone from L2 by the time it is read. */
INLINE ptrdiff_t to_next_tile(const bn_problem *p, ptrdiff_t inner, ptrdiff_t len) {
    return p->S >= PLANE_TILE && p->N * p->S > LARGE_CHANNEL ? len : inner;
}

INLINE void add_halves(vf *v, int half) {
    for (int i = 0; i < half; i++)
        v[i] = vadd(v[i], v[i + half]);
}

/* Lanes to VL, the first steps of a tree that vsums goes on with. Not one loop over the halves: the compiler would keep
 * v in memory for it. */
INLINE vf add_vectors(vf *v, int lanes) {
    if (lanes / VL >= 16)
        add_halves(v, 8);
    if (lanes / VL >= 8)
        add_halves(v, 4);
    if (lanes / VL >= 4)
        add_halves(v, 2);
    if (lanes / VL >= 2)
        add_halves(v, 1);
    return v[0];
}

/* Adds (x - shift) and its square to sums of so many lanes; value i of a run goes to lane i % lanes. Each pass is
 * unrolled, so that its sums stay in registers. */
INLINE void add_shifted(const float *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, vf k, ptrdiff_t ahead,
                        int prefetch, int lanes, vf *s, vf *q) {
    const ptrdiff_t rest = len % lanes, full = len - rest;
    const int pass = lanes < PASS ? lanes : PASS;
    const vt t = vtail(rest % VL);
#pragma GCC unroll 4
    for (int lane = 0; lane < lanes; lane += pass) {
        vf *const sa = s + lane / VL, *const qa = q + lane / VL;
        for (ptrdiff_t r = 0; r < runs; r++) {
            const float *a = x + r * stride + lane;
            for (ptrdiff_t i = 0; i < full; i += lanes)
                for (int j = 0; j < pass / VL; j++) {
                    if (prefetch && j * VL % LINE == 0)
                        vprefetch(a + i + j * VL + ahead);
                    const vf d = vsub(vload(a + i + j * VL), k);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++) {
                if (rest <= lane + j * VL)
                    continue;
                const float *b = a + full + j * VL;
                if (prefetch && j * VL % LINE == 0)
                    vprefetch(b + ahead);
                const vf d = rest >= lane + (j + 1) * VL ? vsub(vload(b), k) : vkeep(vsub(vload_tail(b, t), k), t);
                sa[j] = vadd(sa[j], d);
                qa[j] = vfma(d, d, qa[j]);
            }
        }
    }
}

/* The sums of a tile, still in VL lanes. */
INLINE void shifted_sums(const float *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, vf k, ptrdiff_t ahead,
                         int prefetch, int lanes, vf *sum, vf *sq) {
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < lanes / VL; j++)
        s[j] = q[j] = vset1(0.0f);
    if (PASS >= lanes || len < 2 * PIECE)
        add_shifted(x, stride, runs, len, k, ahead, prefetch, lanes, s, q);
    else
        for (ptrdiff_t r = 0; r < runs; r++) {
            const float *a = x + r * stride;
            ptrdiff_t i = 0;
            for (; i + PIECE <= len; i += PIECE)
                add_shifted(a + i, 0, 1, PIECE, k, ahead, prefetch, lanes, s, q);
            if (i < len)
                add_shifted(a + i, 0, 1, len - i, k, ahead, prefetch, lanes, s, q);
        }
    *sum = add_vectors(s, lanes);
    *sq = add_vectors(q, lanes);
}

/* The shift is the median of the medians of three times three values from all over the tile (Tukey's ninther): one of
 * the values itself, so that a constant channel's variance is exactly 0, and not moved by a few outliers. */
#define SAMPLES    9
#define SMALL_TILE 256 /* values */

INLINE vf median3(vf a, vf b, vf c) { return vmax(vmin(a, b), vmin(vmax(a, b), c)); }

INLINE vf ninther(const vf v[SAMPLES]) {
    return median3(median3(v[0], v[3], v[6]), median3(v[1], v[4], v[7]), median3(v[2], v[5], v[8]));
}

/* The shifts of cols <= VL channels, and nothing of meaning behind them; step is a constant. */
INLINE void median_of_samples(const float *x, ptrdiff_t inner, const ptrdiff_t *sample, int step, ptrdiff_t cols,
                              float *shift) {
    float value[SAMPLES][VL];
    vf v[SAMPLES];
    for (ptrdiff_t c = 0; c < cols; c++)
        for (int i = 0; i < SAMPLES; i += step)
            value[i][c] = x[c * inner + sample[i]];
    for (int i = 0; i < SAMPLES; i += step)
        v[i] = vload(value[i]);
    vstore(shift, step == 1 ? ninther(v) : median3(v[0], v[3], v[6]));
}

INLINE void samples(const bn_problem *p, const tile *a, ptrdiff_t *at) {
    for (int i = 0; i < SAMPLES; i++)
        at[i] = i * a->runs / SAMPLES * p->x.outer + i * a->len / SAMPLES;
}

/* Of small tiles three values will do: the others would take as long as the sums. */
INLINE void plane_shifts(const float *x, ptrdiff_t inner, const ptrdiff_t *sample, int small, ptrdiff_t cols,
                         float *shift) {
    if (small)
        median_of_samples(x, inner, sample, 3, cols, shift);
    else
        median_of_samples(x, inner, sample, 1, cols, shift);
}

/* Of cols <= VL channels, from their sums in VL lanes. */
INLINE void settle_planes(const bn_problem *p, const tile *a, const float *x, ptrdiff_t cols, const float *shift, vf *s,
                          vf *q, double *mean, double *m2) {
    const double n = (double)(a->runs * a->len);
    float sum32[VL], sq32[VL];
    double sum[VL], sq[VL];
    for (ptrdiff_t j = cols; j < VL; j++)
        s[j] = q[j] = vset1(0.0f);
    vstore(sum32, vsums(s));
    vstore(sq32, vsums(q));
    for (int j = 0; j < VL; j++) {
        sum[j] = sum32[j];
        sq[j] = sq32[j];
    }
    if (settle(n, cols, shift, sum, sq, mean, m2))
        for (ptrdiff_t j = 0; j < cols; j++)
            if (unsound(n, sum[j], sq[j]))
                exact_stats(x + j * p->x.inner, p->x.outer, a->runs, a->len, &mean[j], &m2[j]);
}

/* A channel's partial sums, kept while others' values are gone through, as they lie in memory. */
INLINE void resume(const vf *kept, int begun, int n, vf *v) {
    for (int i = 0; i < n; i++)
        v[i] = begun ? kept[i] : vset1(0.0f);
}

INLINE void keep(const vf *v, int n, vf *kept) {
    for (int i = 0; i < n; i++)
        kept[i] = v[i];
}

/* Short planes of cols <= SHORT_BLOCK channels, batch by batch. */
INLINE void short_stats(const bn_problem *p, const tile *a, const float *x, ptrdiff_t cols, const ptrdiff_t *sample,
                        int small, double *mean, double *m2) {
    const ptrdiff_t inner = p->x.inner, outer = p->x.outer;
    float shift[SHORT_BLOCK];
    vf sum[SHORT_BLOCK][SHORT_LANES / VL], sq[SHORT_BLOCK][SHORT_LANES / VL];
    for (ptrdiff_t c = 0; c < cols; c += VL)
        plane_shifts(x + c * inner, inner, sample, small, min_z(VL, cols - c), shift + c);
    for (ptrdiff_t r = 0; r < a->runs; r++)
        for (ptrdiff_t c = 0; c < cols; c++) {
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum[c], r > 0, SHORT_LANES / VL, s);
            resume(sq[c], r > 0, SHORT_LANES / VL, q);
            add_shifted(x + r * outer + c * inner, 0, 1, a->len, vset1(shift[c]), outer, 1, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum[c]);
            keep(q, SHORT_LANES / VL, sq[c]);
        }
    for (ptrdiff_t c = 0; c < cols; c += VL) {
        vf s[VL], q[VL];
        for (ptrdiff_t j = 0; j < min_z(VL, cols - c); j++) {
            s[j] = add_vectors(sum[c + j], SHORT_LANES);
            q[j] = add_vectors(sq[c + j], SHORT_LANES);
        }
        settle_planes(p, a, x + c * inner, min_z(VL, cols - c), shift + c, s, q, mean + c, m2 + c);
    }
}

static void stats_planes(const bn_problem *p, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                         double *m2, ptrdiff_t ld) {
    const int is_short = p->S <= BN_SHORT_PLANE;
    const ptrdiff_t inner = p->x.inner, step = is_short && p->stream ? SHORT_BLOCK : VL;
    for (ptrdiff_t t = t0; t < t1; t++) {
        const tile a = plane_tile(p, t);
        const ptrdiff_t ahead = to_next_tile(p, inner, a.len);
        const int small = a.runs * a.len <= SMALL_TILE;
        ptrdiff_t sample[SAMPLES];
        samples(p, &a, sample);
        for (ptrdiff_t c = c0; c < c1; c += step) {
            const ptrdiff_t cols = min_z(step, c1 - c);
            const float *x = p->x.data + a.n * p->x.outer + a.s + c * inner;
            double *mean_t = mean + (t - t0) * ld + (c - c0), *m2_t = m2 + (t - t0) * ld + (c - c0);
            if (is_short && p->stream) {
                short_stats(p, &a, x, cols, sample, small, mean_t, m2_t);
                continue;
            }
            float shift[VL];
            vf s[VL], q[VL];
            plane_shifts(x, inner, sample, small, cols, shift);
            for (ptrdiff_t j = 0; j < cols; j++) {
                const float *plane = x + j * inner;
                const vf mid = vset1(shift[j]);
                if (is_short)
                    shifted_sums(plane, p->x.outer, a.runs, a.len, mid, 0, 0, SHORT_LANES, &s[j], &q[j]);
                else if (p->stream)
                    shifted_sums(plane, p->x.outer, a.runs, a.len, mid, ahead, 1, LANES, &s[j], &q[j]);
                else
                    shifted_sums(plane, p->x.outer, a.runs, a.len, mid, 0, 0, LANES, &s[j], &q[j]);
            }
            settle_planes(p, &a, x, cols, shift, s, q, mean_t, m2_t);
        }
    }
}

/* Column 0 of a row of x, of the kernel's width: `fold` rows of memory, or one row anywhere. */
INLINE const float *row_at(const bn_problem *p, ptrdiff_t row) { return row_cursor(p, row, FORWARD).x; }

/* Whether to add several rows at a time, because a sum in memory costs more than the value that is added to it. From
 * beyond the cache one row after the other, as the elementwise work, unless the sums themselves crowd L1. */
INLINE int several_rows(const bn_problem *p) { return p->packed && (!p->stream || p->C * p->fold > WIDE); }

/* Adds rows to the columns' sums, in order; the sums' arrays hold whole vectors. */
INLINE void add_rows(const float *x, ptrdiff_t stride, int rows, int far, ptrdiff_t cols, const float *shift, float *s,
                     float *q) {
    const vt t = vtail(cols % VL);
    ptrdiff_t c = 0;
    for (; c + VL <= cols; c += VL) {
        const vf k = vload(shift + c);
        vf sum = vload(s + c), sq = vload(q + c);
        for (int j = 0; far && j < rows * VL; j += LINE)
            vprefetch(x + rows * (stride + c) + j);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(vload(x + r * stride + c), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        vstore(s + c, sum);
        vstore(q + c, sq);
    }
    if (c < cols) {
        const vf k = vload(shift + c);
        vf sum = vload(s + c), sq = vload(q + c);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(vload_tail(x + r * stride + c, t), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        vstore(s + c, sum);
        vstore(q + c, sq);
    }
}

/* Starts partial sums of whole vectors. */
INLINE void clear(ptrdiff_t cols, float *s, float *q) {
    const size_t size = (size_t)((cols + VL - 1) / VL * VL) * sizeof *s;
    memset(s, 0, size);
    memset(q, 0, size);
}

/* Moves float32 partial sums to the float64 ones and starts them anew. */
INLINE void carry(ptrdiff_t cols, float *s, float *q, double *sum, double *sq) {
    for (ptrdiff_t c = 0; c < cols; c++) {
        sum[c] += s[c];
        sq[c] += q[c];
    }
    clear(cols, s, q);
}

/* Columns [c, c + cols) of a tile of rows. All the arrays hold whole vectors; s and q are 0 before and after. */
INLINE void tile_stats(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, ptrdiff_t cols, float *shift,
                       float *s, float *q, double *sum, double *sq, double *mean, double *m2) {
    const ptrdiff_t K = p->C * p->fold;
    const int several = several_rows(p), far = far_rows(p, cols);
    const float *x[SAMPLES];
    for (int i = 0; i < SAMPLES; i++)
        x[i] = row_at(p, row0 + i * rows / SAMPLES) + c;
    for (ptrdiff_t i = 0; i < cols; i += VL) {
        vf v[SAMPLES];
        for (int j = 0; j < SAMPLES; j++)
            v[j] = vload_tail(x[j] + i, vtail(cols - i));
        vstore(shift + i, ninther(v));
    }
    memset(sum, 0, (size_t)cols * sizeof *sum);
    memset(sq, 0, (size_t)cols * sizeof *sq);
    for (ptrdiff_t r = 0, n; r < rows; r += n) {
        n = min_z(CHAIN, rows - r);
        ptrdiff_t i = 0;
        for (; several && far && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 1, cols, shift, s, q);
        for (; several && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 0, cols, shift, s, q);
        for (; i < n; i++)
            add_rows(row_at(p, row0 + r + i) + c, K, 1, 0, cols, shift, s, q);
        carry(cols, s, q, sum, sq);
    }
    if (settle((double)rows, cols, shift, sum, sq, mean, m2))
        for (ptrdiff_t i = 0; i < cols; i++)
            if (unsound((double)rows, sum[i], sq[i])) {
                float v[ROW_TILE];
                for (ptrdiff_t r = 0; r < rows; r++)
                    v[r] = row_at(p, row0 + r)[c + i];
                exact_stats(v, 0, 1, rows, &mean[i], &m2[i]);
            }
}

static void stats_rows(const bn_problem *p, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                       double *m2, ptrdiff_t ld) {
    float shift[PANEL], s[PANEL], q[PANEL];
    double sum[PANEL], sq[PANEL];
    clear(min_z(PANEL, c1 - c0), s, q);
    for (ptrdiff_t t = t0; t < t1; t++) {
        ptrdiff_t row0;
        const ptrdiff_t rows = row_tile(p, t, &row0);
        if (rows == 0) { /* one value a column */
            const float *x = row_at(p, row0);
            for (ptrdiff_t c = c0; c < min_z(c1, p->N * p->S % p->fold * p->C); c++) {
                const double v = x[c];
                mean[(t - t0) * ld + c - c0] = v;
                m2[(t - t0) * ld + c - c0] = v - v; /* 0, or NaN for what is not finite */
            }
            continue;
        }
        for (ptrdiff_t c = c0; c < c1; c += PANEL) {
            const ptrdiff_t at = (t - t0) * ld + (c - c0);
            tile_stats(p, row0, rows, c, min_z(PANEL, c1 - c), shift, s, q, sum, sq, mean + at, m2 + at);
        }
    }
}

/* ---- the backward pass's sums -------------------------------------------------------------------------------- */

/* g and g * (x - mean) * invstd at offset i into the sums; in frozen mode grad_input and grad_residual too. */
INLINE void sum_at(const vcoef *k, const cursor *a, ptrdiff_t i, vt t, int whole, int frozen, int act, int res,
                   vf *g_sum, vf *gx_sum) {
    vf d = vsub(whole ? vload(a->x + i) : vload_tail(a->x + i, t), k->mean);
    if (!whole)
        d = vkeep(d, t); /* 0 * d must be 0 there */
    const vf dy = whole ? vload(a->dy + i) : vload_tail(a->dy + i, t);
    vf r = d;
    if (res && act != BN_IDENTITY)
        r = whole ? vload(a->r + i) : vload_tail(a->r + i, t);
    const vf g = masked_grad(k, d, r, dy, act, res);
    *g_sum = vadd(*g_sum, g);
    *gx_sum = vfma(g, vmul(d, k->invstd), *gx_sum);
    if (frozen) {
        const vf v = vmul(g, k->scale);
        if (whole)
            vstore(a->out + i, v);
        else
            vstore_tail(a->out + i, v, t);
        if (res) {
            if (whole)
                vstore(a->gr + i, g);
            else
                vstore_tail(a->gr + i, g, t);
        }
    }
}

/* To the same place of the plane behind the next n. */
INLINE void next_batch(const bn_problem *p, cursor *a, int frozen, int act, int res) {
    a->x += p->x.outer;
    a->dy += p->grad_output.outer;
    if (res && act != BN_IDENTITY)
        a->r += p->residual.outer;
    if (frozen)
        a->out += p->grad_input.outer;
    if (frozen && res)
        a->gr += p->grad_residual.outer;
}

/* As add_shifted does, from a cursor that it may move. */
INLINE void add_grads(const bn_problem *p, const vcoef *k, cursor from, ptrdiff_t runs, ptrdiff_t len, int frozen,
                      int act, int res, int lanes, vf *g, vf *gx) {
    const ptrdiff_t rest = len % lanes, full = len - rest;
    const int pass = lanes < PASS ? lanes : PASS;
    const vt t = vtail(rest % VL);
#pragma GCC unroll 4
    for (int lane = 0; lane < lanes; lane += pass) {
        vf ga[ACC], gxa[ACC];
        cursor a = from;
        for (int j = 0; j < pass / VL; j++) {
            ga[j] = g[lane / VL + j];
            gxa[j] = gx[lane / VL + j];
        }
        for (ptrdiff_t r = 0; r < runs; r++) {
            for (ptrdiff_t i = lane; i < full; i += lanes)
                for (int j = 0; j < pass / VL; j++)
                    sum_at(k, &a, i + j * VL, t, 1, frozen, act, res, &ga[j], &gxa[j]);
            for (int j = 0; j < pass / VL; j++) {
                if (rest <= lane + j * VL)
                    continue;
                const ptrdiff_t i = full + lane + j * VL;
                if (rest >= lane + (j + 1) * VL)
                    sum_at(k, &a, i, t, 1, frozen, act, res, &ga[j], &gxa[j]);
                else
                    sum_at(k, &a, i, t, 0, frozen, act, res, &ga[j], &gxa[j]);
            }
            next_batch(p, &a, frozen, act, res);
        }
        for (int j = 0; j < pass / VL; j++) {
            g[lane / VL + j] = ga[j];
            gx[lane / VL + j] = gxa[j];
        }
    }
}

/* The sums of one channel's tile, still in VL lanes. */
INLINE void sum_plane(const bn_problem *p, const bn_coef *coef, const tile *b, ptrdiff_t c, int frozen, int act,
                      int res, vf *g, vf *gx) {
    const vcoef k = coef_of_channel(p, coef, c, BACKWARD);
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < LANES / VL; j++)
        s[j] = q[j] = vset1(0.0f);
    if (PASS >= LANES || b->len < 2 * PIECE)
        add_grads(p, &k, cursor_at(p, b->n, c, b->s, BACKWARD), b->runs, b->len, frozen, act, res, LANES, s, q);
    else
        for (ptrdiff_t r = 0; r < b->runs; r++) {
            ptrdiff_t i = 0;
            for (; i + PIECE <= b->len; i += PIECE)
                add_grads(p, &k, cursor_at(p, b->n + r, c, b->s + i, BACKWARD), 1, PIECE, frozen, act, res, LANES, s,
                          q);
            if (i < b->len)
                add_grads(p, &k, cursor_at(p, b->n + r, c, b->s + i, BACKWARD), 1, b->len - i, frozen, act, res, LANES,
                          s, q);
        }
    *g = add_vectors(s, LANES);
    *gx = add_vectors(q, LANES);
}

/* Of cols <= VL channels, from VL lanes. */
INLINE void store_sums(ptrdiff_t cols, vf *s, vf *q, double *g, double *gx) {
    float g32[VL], gx32[VL];
    for (ptrdiff_t j = cols; j < VL; j++)
        s[j] = q[j] = vset1(0.0f);
    vstore(g32, vsums(s));
    vstore(gx32, vsums(q));
    for (ptrdiff_t j = 0; j < cols; j++) {
        g[j] = g32[j];
        gx[j] = gx32[j];
    }
}

/* As short_stats does. */
INLINE void short_sums(const bn_problem *p, const bn_coef *coef, const tile *b, ptrdiff_t c0, ptrdiff_t cols,
                       int frozen, int act, int res, double *g, double *gx) {
    vf sum[SHORT_BLOCK][SHORT_LANES / VL], sq[SHORT_BLOCK][SHORT_LANES / VL];
    for (ptrdiff_t r = 0; r < b->runs; r++) {
        cursor a = cursor_at(p, b->n + r, c0, 0, BACKWARD);
        for (ptrdiff_t c = 0; c < cols; c++) {
            const vcoef k = coef_of_channel(p, coef, c0 + c, BACKWARD);
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum[c], r > 0, SHORT_LANES / VL, s);
            resume(sq[c], r > 0, SHORT_LANES / VL, q);
            add_grads(p, &k, a, 1, b->len, frozen, act, res, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum[c]);
            keep(q, SHORT_LANES / VL, sq[c]);
            next_plane(p, &a, 0, BACKWARD, res);
        }
    }
    for (ptrdiff_t c = 0; c < cols; c += VL) {
        vf s[VL], q[VL];
        for (ptrdiff_t j = 0; j < min_z(VL, cols - c); j++) {
            s[j] = add_vectors(sum[c + j], SHORT_LANES);
            q[j] = add_vectors(sq[c + j], SHORT_LANES);
        }
        store_sums(min_z(VL, cols - c), s, q, g + c, gx + c);
    }
}

INLINE void sum_planes(const bn_problem *p, const bn_coef *coef, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0, ptrdiff_t c1,
                       double *g, double *gx, ptrdiff_t ld, int frozen, int act, int res) {
    const ptrdiff_t step = p->S <= BN_SHORT_PLANE ? SHORT_BLOCK : VL;
    for (ptrdiff_t t = t0; t < t1; t++) {
        const tile b = plane_tile(p, t);
        for (ptrdiff_t c = c0; c < c1; c += step) {
            const ptrdiff_t cols = min_z(step, c1 - c), at = (t - t0) * ld + (c - c0);
            if (p->S <= BN_SHORT_PLANE) {
                short_sums(p, coef, &b, c, cols, frozen, act, res, g + at, gx + at);
                continue;
            }
            vf s[VL], q[VL];
            for (ptrdiff_t j = 0; j < cols; j++)
                sum_plane(p, coef, &b, c + j, frozen, act, res, &s[j], &q[j]);
            store_sums(cols, s, q, g + at, gx + at);
        }
    }
}

/* As add_rows does. */
INLINE void sum_some_rows(const bn_problem *p, const bn_coef *coef, const cursor *a, int rows, int far, ptrdiff_t c,
                          ptrdiff_t cols, float *sum, float *sq, int frozen, int act, int res) {
    const ptrdiff_t K = p->C * p->fold;
    const vt tail = vtail(cols % VL);
    ptrdiff_t i = 0;
    for (; i + VL <= cols; i += VL) {
        const vcoef k = coef_of_columns(p, coef, c + i, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        for (int j = 0; far && j < rows * VL; j += LINE)
            prefetch_at(a, rows * i + j, BACKWARD);
        for (int r = 0; r < rows; r++)
            sum_at(&k, a, r * K + c + i, tail, 1, frozen, act, res, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
    }
    if (i < cols) {
        const vcoef k = coef_of_columns(p, coef, c + i, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        for (int r = 0; r < rows; r++)
            sum_at(&k, a, r * K + c + i, tail, 0, frozen, act, res, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
    }
}

/* As tile_stats. */
INLINE void tile_sums(const bn_problem *p, const bn_coef *coef, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c,
                      ptrdiff_t cols, float *sum, float *sq, int frozen, int act, int res, double *g, double *gx) {
    const int several = several_rows(p), far = far_rows(p, cols);
    memset(g, 0, (size_t)cols * sizeof *g);
    memset(gx, 0, (size_t)cols * sizeof *gx);
    for (ptrdiff_t r = 0; r < rows;) {
        const ptrdiff_t left = min_z(rows, r / CHAIN * CHAIN + CHAIN) - r;
        cursor a = row_cursor(p, row0 + r, BACKWARD);
        a.ahead = SUMS_ROWS * p->C * p->fold;
        if (several && far && left >= SUMS_ROWS) {
            sum_some_rows(p, coef, &a, SUMS_ROWS, 1, c, cols, sum, sq, frozen, act, res);
            r += SUMS_ROWS;
        } else if (several && left >= SUMS_ROWS) {
            sum_some_rows(p, coef, &a, SUMS_ROWS, 0, c, cols, sum, sq, frozen, act, res);
            r += SUMS_ROWS;
        } else {
            sum_some_rows(p, coef, &a, 1, 0, c, cols, sum, sq, frozen, act, res);
            r++;
        }
        if (r % CHAIN == 0 || r == rows)
            carry(cols, sum, sq, g, gx);
    }
}

INLINE void sum_rows(const bn_problem *problem, const bn_coef *coefficients, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0,
                     ptrdiff_t c1, double *g, double *gx, ptrdiff_t ld, int frozen, int act, int res) {
    const bn_problem local = *problem, *const p = &local; /* as in work_rows */
    const bn_coef local_coef = *coefficients, *const coef = &local_coef;
    float sum[PANEL], sq[PANEL];
    const ptrdiff_t rest = p->N * p->S % p->fold * p->C;
    clear(min_z(PANEL, c1 - c0), sum, sq);
    for (ptrdiff_t t = t0; t < t1; t++) {
        ptrdiff_t row0;
        const ptrdiff_t rows = row_tile(p, t, &row0), end = rows ? c1 : min_z(c1, rest);
        for (ptrdiff_t c = c0; c < end; c += PANEL) {
            const ptrdiff_t at = (t - t0) * ld + (c - c0);
            tile_sums(p, coef, row0, rows ? rows : 1, c, min_z(PANEL, end - c), sum, sq, frozen, act, res, g + at,
                      gx + at);
        }
    }
}

#define SUMS(layout, name)                                                                                             \
    static void name(const bn_problem *p, const bn_coef *k, int frozen, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0,      \
                     ptrdiff_t c1, double *g, double *gx, ptrdiff_t ld) {                                              \
        if (frozen) {                                                                                                  \
            SPECIALIZE(p, SUMS_FROZEN_##layout);                                                                       \
        } else {                                                                                                       \
            SPECIALIZE(p, SUMS_TRAINING_##layout);                                                                     \
        }                                                                                                              \
    }
#define SUMS_FROZEN_planes(act, res)   sum_planes(p, k, t0, t1, c0, c1, g, gx, ld, 1, act, res)
#define SUMS_TRAINING_planes(act, res) sum_planes(p, k, t0, t1, c0, c1, g, gx, ld, 0, act, res)
#define SUMS_FROZEN_rows(act, res)     sum_rows(p, k, t0, t1, c0, c1, g, gx, ld, 1, act, res)
#define SUMS_TRAINING_rows(act, res)   sum_rows(p, k, t0, t1, c0, c1, g, gx, ld, 0, act, res)
SUMS(planes, sums_planes)
SUMS(rows, sums_rows)

/* ---- the second pass of some channels, in one loop with the first pass of others -------------------------------- */

/* From beyond the cache, a pass that only reads leaves writing idle, and one that writes what is in L2 leaves reading
 * idle. Taken in turns of a few lines they overlap; in turns of a few hundred values they do not. */

/* Sums of INTERLEAVE values of another channel from offset i of `other` on, and the elementwise work on as many of this
 * one's. */
INLINE void interleave_at(const vcoef *k_other, const cursor *other, const vcoef *k, const cursor *here, ptrdiff_t i,
                          int direction, int act, int res, vf *s, vf *q) {
    const vt all = vtail(VL);
    const int pass = PASS < LANES ? PASS : LANES;
#pragma GCC unroll 4
    for (int lane = 0; lane < LANES; lane += pass) {
        vf sa[ACC], qa[ACC];
        for (int j = 0; j < pass / VL; j++) {
            sa[j] = s[lane / VL + j];
            qa[j] = q[lane / VL + j];
        }
#pragma GCC unroll 8
        for (ptrdiff_t b = i + lane; b < i + INTERLEAVE; b += LANES) {
            for (int j = 0; direction == FORWARD && j < pass; j += LINE)
                prefetch_at(other, b + j, direction);
            for (int j = 0; j < pass / VL; j++)
                if (direction == BACKWARD)
                    sum_at(k_other, other, b + j * VL, all, 1, 0, act, res, &sa[j], &qa[j]);
                else {
                    const vf d = vsub(vload(other->x + b + j * VL), k_other->mean);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++)
                work_at(k, here, b + j * VL, all, 1, direction, act, res, 1);
        }
        for (int j = 0; j < pass / VL; j++) {
            s[lane / VL + j] = sa[j];
            q[lane / VL + j] = qa[j];
        }
    }
}

/* A run of len values of both channels. */
INLINE void interleave_run(const bn_problem *p, ptrdiff_t n, ptrdiff_t begin, ptrdiff_t len, const vcoef *k_other,
                           ptrdiff_t c_other, const vcoef *k, ptrdiff_t c, int direction, int act, int res, vf *s,
                           vf *q) {
    cursor other = cursor_at(p, n, c_other, begin, direction);
    other.ahead = p->S < PLANE_TILE ? p->x.outer : 0; /* long planes the hardware prefetches better */
    const cursor first = cursor_at(p, n, c, begin, direction);
    const ptrdiff_t head = min_z(len, (ptrdiff_t)((0 - (uintptr_t)first.out / sizeof(float)) % LINE));
    const cursor here = cursor_at(p, n, c, begin + head, direction);
    ptrdiff_t i = 0;
    work_run(k, &first, head, direction, act, res, 1);
    for (; i + INTERLEAVE <= len - head; i += INTERLEAVE)
        interleave_at(k_other, &other, k, &here, i, direction, act, res, s, q);
    const cursor other_rest = cursor_at(p, n, c_other, begin + i, direction);
    const cursor rest = cursor_at(p, n, c, begin + head + i, direction);
    if (direction == BACKWARD)
        add_grads(p, k_other, other_rest, 1, len - i, 0, act, res, LANES, s, q);
    else
        add_shifted(other_rest.x, 0, 1, len - i, k_other->mean, 0, 0, LANES, s, q);
    work_run(k, &rest, len - head - i, direction, act, res, 1);
}

INLINE void interleave(const bn_problem *problem, const bn_coef *coefficients, ptrdiff_t c0, ptrdiff_t other,
                       ptrdiff_t channels, double *a, double *b, int direction, int act, int res) {
    const bn_problem local = *problem, *const p = &local; /* as in work_rows */
    const bn_coef local_coef = *coefficients, *const coef = &local_coef;
    const ptrdiff_t T = tiles(p);
    for (ptrdiff_t t = 0; t < T; t++) {
        const tile d = plane_tile(p, t), next = plane_tile(p, t + 1 < T ? t + 1 : t);
        ptrdiff_t sample[SAMPLES];
        samples(p, &d, sample);
        for (ptrdiff_t i = 0; i < channels; i += VL) {
            const ptrdiff_t cols = min_z(VL, channels - i), at = t * channels + i;
            const float *x = cursor_at(p, d.n, other + i, d.s, direction).x;
            float shift[VL];
            vf sum[VL][LANES / VL], sq[VL][LANES / VL], s[VL], q[VL];
            if (direction == FORWARD)
                plane_shifts(x, p->x.inner, sample, d.runs * d.len <= SMALL_TILE, cols, shift);
            for (ptrdiff_t j = 0; direction == FORWARD && j < cols; j++) /* the next tile's, of the same shape */
                for (int l = 0; l < SAMPLES; l++)
                    vprefetch(cursor_at(p, next.n, other + i + j, next.s, direction).x + sample[l]);
            for (ptrdiff_t r = 0; r < d.runs; r++)
                for (ptrdiff_t j = 0; j < cols; j++) {
                    const vcoef k = coef_of_channel(p, coef, c0 + i + j, direction);
                    vcoef k_other = k;
                    vf sums[LANES / VL], sqs[LANES / VL];
                    if (direction == BACKWARD)
                        k_other = coef_of_channel(p, coef, other + i + j, direction);
                    else
                        k_other.mean = vset1(shift[j]);
                    resume(sum[j], r > 0, LANES / VL, sums);
                    resume(sq[j], r > 0, LANES / VL, sqs);
                    interleave_run(p, d.n + r, d.s, d.len, &k_other, other + i + j, &k, c0 + i + j, direction, act, res,
                                   sums, sqs);
                    keep(sums, LANES / VL, sum[j]);
                    keep(sqs, LANES / VL, sq[j]);
                }
            for (ptrdiff_t j = 0; j < cols; j++) {
                s[j] = add_vectors(sum[j], LANES);
                q[j] = add_vectors(sq[j], LANES);
            }
            if (direction == FORWARD)
                settle_planes(p, &d, x, cols, shift, s, q, a + at, b + at);
            else
                store_sums(cols, s, q, a + at, b + at);
        }
    }
}

#define INTERLEAVED(direction, name)                                                                                   \
    static void name(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t other, ptrdiff_t channels,         \
                     double *a, double *b) {                                                                           \
        SPECIALIZE(p, INTERLEAVED_##direction);                                                                        \
        vfence();                                                                                                      \
    }
#define INTERLEAVED_FORWARD(act, res)  interleave(p, k, c0, other, channels, a, b, FORWARD, act, res)
#define INTERLEAVED_BACKWARD(act, res) interleave(p, k, c0, other, channels, a, b, BACKWARD, act, res)
INTERLEAVED(FORWARD, forward_and_stats)
INTERLEAVED(BACKWARD, backward_and_sums)

/* ---- pooling, coefficients: float64, a few operations a channel ----------------------------------------------- */

/* Chan, Golub and LeVeque (1983), for many groups at once: the pooled mean is the weighted mean of the tiles' means,
 * and a tile adds n * (its mean - the mean)^2 to its own squared deviations. Means are taken relative to the first
 * tile's, so that equal ones pool to exactly themselves. */
static void pool_stats(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *tile_mean, const double *tile_m2,
                       ptrdiff_t ld, double *mean, double *var) {
    const ptrdiff_t T = tiles(p);
    const double total = (double)(p->N * p->S);
    if (T == 1 && p->fold == 1) {
        for (ptrdiff_t c = c0; c < c1; c++) {
            mean[c] = tile_mean[c - c0];
            var[c] = tile_m2[c - c0] / total;
        }
        return;
    }
    for (ptrdiff_t cb = c0; cb < c1; cb += BLOCK) {
        const ptrdiff_t cols = min_z(BLOCK, c1 - cb);
        double m[BLOCK], q[BLOCK];
        for (ptrdiff_t c = 0; c < cols; c++)
            m[c] = q[c] = 0.0;
        for (ptrdiff_t t = 0; t < T; t++) {
            double w;
            const ptrdiff_t F = tile_repetitions(p, t, &w);
            for (ptrdiff_t f = 0; f < F; f++) {
                const double *tm = tile_mean + t * ld + f * p->C + (cb - c0);
                for (ptrdiff_t c = 0; c < cols; c++)
                    m[c] += w * (tm[c] - tile_mean[cb - c0 + c]);
            }
        }
        for (ptrdiff_t c = 0; c < cols; c++)
            m[c] = tile_mean[cb - c0 + c] + m[c] / total;
        for (ptrdiff_t t = 0; t < T; t++) {
            double w;
            const ptrdiff_t F = tile_repetitions(p, t, &w);
            for (ptrdiff_t f = 0; f < F; f++) {
                const double *tm = tile_mean + t * ld + f * p->C + (cb - c0);
                const double *tq = tile_m2 + t * ld + f * p->C + (cb - c0);
                for (ptrdiff_t c = 0; c < cols; c++) {
                    const double d = tm[c] - m[c];
                    q[c] += tq[c] + w * (d * d);
                }
            }
        }
        for (ptrdiff_t c = 0; c < cols; c++) {
            mean[cb + c] = m[c];
            var[cb + c] = q[c] / total;
        }
    }
}

/* Of g * xhat, where xhat = (x - mean) * invstd + offset, tiles hold all but the offset's part. */
static void pool_sums(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *tile_g,
                      const double *tile_gx, ptrdiff_t ld, double *g, double *gx) {
    const ptrdiff_t T = tiles(p);
    for (ptrdiff_t c = c0; c < c1; c++)
        g[c] = gx[c] = 0.0;
    for (ptrdiff_t t = 0; t < T; t++) {
        double values;
        const ptrdiff_t F = tile_repetitions(p, t, &values);
        for (ptrdiff_t f = 0; f < F; f++) {
            const ptrdiff_t at = t * ld + f * p->C - c0;
            for (ptrdiff_t c = c0; c < c1; c++) {
                g[c] += tile_g[at + c];
                gx[c] += tile_gx[at + c];
            }
        }
    }
    for (ptrdiff_t c = c0; c < c1; c++)
        gx[c] += g[c] * k->offset[c];
}

/* In every repetition of the channels, and in the LINE values behind the last, where the first follow again. */
static void repeat(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, float *v) {
    const ptrdiff_t width = p->C * p->fold + LINE;
    if (c0 == c1)
        return;
    if (c1 - c0 == p->C)
        for (ptrdiff_t n = p->C; n < width; n *= 2)
            memcpy(v + n, v, (size_t)min_z(n, width - n) * sizeof *v);
    else
        for (ptrdiff_t f = p->C; f < width; f += p->C)
            for (ptrdiff_t c = c0; c < min_z(c1, width - f); c++)
                v[f + c] = v[c];
}

/* 1 / sqrt(v), and 0 for 0: a float32 estimate and one step of Newton's are as good in the end as float64's own square
 * root and division, which take three times as long. */
INLINE void inverse_deviation(const double *v, ptrdiff_t n, double *r) {
    int beyond = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double a = 1.0f / sqrtf((float)v[i]);
        r[i] = a * (1.5 - 0.5 * v[i] * (a * a));
        beyond |= !(v[i] >= FLT_MIN) | !(v[i] <= FLT_MAX);
    }
    if (beyond)
        for (ptrdiff_t i = 0; i < n; i++)
            if (!(v[i] >= FLT_MIN && v[i] <= FLT_MAX))
                r[i] = v[i] == 0.0 ? 0.0 : 1.0 / sqrt(v[i]);
}

/* Of n <= BLOCK channels from cb on, from their means hi + lo and v = var + eps. */
INLINE void coef_block(ptrdiff_t cb, ptrdiff_t n, const float *hi, const double *lo, const double *v,
                       const float *weight, const float *bias, const bn_coef *k) {
    float *restrict mean = k->mean + cb, *restrict scale = k->scale + cb, *restrict shift = k->shift + cb;
    double invstd[BLOCK];
    inverse_deviation(v, n, invstd);
    for (ptrdiff_t c = 0; c < n; c++) {
        const double a = weight ? weight[cb + c] * invstd[c] : invstd[c];
        scale[c] = (float)a;
        shift[c] = (float)((bias ? bias[cb + c] : 0.0) - lo[c] * a);
    }
    for (ptrdiff_t c = 0; c < n; c++)
        mean[c] = hi[c];
    if (k->invstd)
        for (ptrdiff_t c = 0; c < n; c++) {
            k->invstd[cb + c] = (float)invstd[c];
            k->offset[cb + c] = (float)(-lo[c] * invstd[c]);
            /* no batch terms, unless backward_coef puts them in */
            k->g_mean[cb + c] = k->g_proj[cb + c] = k->g_shift[cb + c] = 0.0f;
        }
}

static void repeat_coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const bn_coef *k) {
    repeat(p, c0, c1, k->mean);
    repeat(p, c0, c1, k->scale);
    repeat(p, c0, c1, k->shift);
    if (k->invstd) {
        repeat(p, c0, c1, k->invstd);
        repeat(p, c0, c1, k->g_mean);
        repeat(p, c0, c1, k->g_proj);
        repeat(p, c0, c1, k->g_shift);
    }
}

static void coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *mean, const double *var,
                 const float *weight, const float *bias, double eps, const bn_coef *k) {
    for (ptrdiff_t cb = c0; cb < c1; cb += BLOCK) {
        const ptrdiff_t n = min_z(BLOCK, c1 - cb);
        double lo[BLOCK], v[BLOCK];
        float hi[BLOCK];
        for (ptrdiff_t c = 0; c < n; c++) {
            hi[c] = (float)mean[cb + c];
            lo[c] = mean[cb + c] - hi[c];
            v[c] = var[cb + c] + eps;
        }
        coef_block(cb, n, hi, lo, v, weight, bias, k);
    }
    repeat_coef(p, c0, c1, k);
}

static void running_coef(const bn_problem *p, const float *mean, const float *var, const float *weight,
                         const float *bias, double eps, const bn_coef *k) {
    const double lo[BLOCK] = {0.0};
    for (ptrdiff_t cb = 0; cb < p->C; cb += BLOCK) {
        const ptrdiff_t n = min_z(BLOCK, p->C - cb);
        double v[BLOCK];
        for (ptrdiff_t c = 0; c < n; c++)
            v[c] = var[cb + c] + eps;
        coef_block(cb, n, mean + cb, lo, v, weight, bias, k);
    }
    repeat_coef(p, 0, p->C, k);
}

static void backward_coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *g, const double *gx,
                          const bn_coef *k) {
    const float *restrict scale = k->scale, *restrict invstd = k->invstd, *restrict offset = k->offset;
    float *restrict mean = k->g_mean, *restrict proj = k->g_proj, *restrict shift = k->g_shift;
    const double share = 1.0 / (double)(p->N * p->S);
    for (ptrdiff_t c = c0; c < c1; c++) {
        const double g_mean = g[c] * share, gx_mean = gx[c] * share;
        mean[c] = (float)g_mean;
        proj[c] = (float)(-gx_mean * invstd[c]);
        shift[c] = (float)(-scale[c] * ((g_mean - mean[c]) + gx_mean * offset[c]));
    }
    repeat(p, c0, c1, k->g_mean);
    repeat(p, c0, c1, k->g_proj);
    repeat(p, c0, c1, k->g_shift);
}

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
        running_coef,                                                                                                  \
        backward_coef,                                                                                                 \
    };
