/* terms.c: pools tiles and makes coefficients, in float64, a few operations a channel. Compiled for one element of each
 * type that lanes compute in. */
#include "kernels/loops.h"

#define BLOCK 64 /* channels at a time */

#include "kernels/running.inc.h"

/* Chan, Golub and LeVeque (1983), for many groups at once: the pooled mean is the weighted mean of the tiles' means,
 * and a tile adds n * (its mean - the mean)^2 to its own squared deviations. Means are taken relative to the first
 * tile's, so that equal ones pool to exactly themselves. Of n <= BLOCK channels, `at` after the first of `from`. */
static void pool_block(const bn_problem *p, const bn_tiles *from, ptrdiff_t at, ptrdiff_t n, double *mean,
                       double *var) {
    const ptrdiff_t T = from->t1;
    const double total = (double)(p->N * p->S);
    const double *const first = from->a + at;
    double m[BLOCK], q[BLOCK];
    for (ptrdiff_t c = 0; c < n; c++)
        m[c] = q[c] = 0.0;
    for (ptrdiff_t t = 0; t < T; t++) {
        double w;
        const ptrdiff_t F = tile_repetitions(p, t, &w);
        for (ptrdiff_t f = 0; f < F; f++) {
            const double *tm = first + t * from->ld + f * p->C;
            for (ptrdiff_t c = 0; c < n; c++)
                m[c] += w * (tm[c] - first[c]);
        }
    }
    for (ptrdiff_t c = 0; c < n; c++)
        m[c] = first[c] + m[c] / total;
    for (ptrdiff_t t = 0; t < T; t++) {
        double w;
        const ptrdiff_t F = tile_repetitions(p, t, &w);
        for (ptrdiff_t f = 0; f < F; f++) {
            const double *tm = first + t * from->ld + f * p->C;
            const double *tq = from->b + at + t * from->ld + f * p->C;
            for (ptrdiff_t c = 0; c < n; c++) {
                const double d = tm[c] - m[c];
                q[c] += tq[c] + w * (d * d);
            }
        }
    }
    for (ptrdiff_t c = 0; c < n; c++) {
        mean[c] = m[c];
        var[c] = q[c] / total;
    }
}

static void pool_stats(const bn_problem *p, const bn_tiles *from, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                       double *var) {
    const double total = (double)(p->N * p->S);
    if (from->t1 == 1 && p->fold == 1)
        for (ptrdiff_t c = c0; c < c1; c++) {
            mean[c] = from->a[c - from->c0];
            var[c] = from->b[c - from->c0] / total;
        }
    else
        for (ptrdiff_t c = c0; c < c1; c += BLOCK)
            pool_block(p, from, c - from->c0, min_z(BLOCK, c1 - c), mean + c, var + c);
}

static void pool_masked(const bn_problem *p, const bn_tiles *from, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                        double *var) {
    double n = 0.0;
    for (ptrdiff_t t = 0; t < from->t1; t++) {
        double values;
        const ptrdiff_t reps = tile_repetitions(p, t, &values);
        const int whole = p->real[t] == (double)reps * values;
        const double w = whole ? values : p->real[t];
        for (ptrdiff_t f = 0; f < (whole ? reps : w > 0.0); f++, n += w) {
            const ptrdiff_t at = t * from->ld + f * p->C + (c0 - from->c0);
            pool_more(c1 - c0, n, w, from->a + at, from->b + at, mean + c0, var + c0);
        }
    }
    for (ptrdiff_t c = c0; c < c1; c++)
        var[c] /= n;
}

/* Of g * xhat, where xhat = (x - mean) * invstd + offset, tiles hold all but the offset's part. */
static void pool_sums(const bn_problem *p, const bn_coef *k, const bn_tiles *from, ptrdiff_t c0, ptrdiff_t c1,
                      double *restrict g, double *restrict gx) {
    const real *offset = k->offset;
    const int alone = from->t1 == 1 && p->fold == 1; /* the first tile is all there is */
    for (ptrdiff_t c = c0; c < c1; c++)
        g[c] = alone ? from->a[c - from->c0] : 0.0;
    for (ptrdiff_t c = c0; c < c1; c++)
        gx[c] = alone ? from->b[c - from->c0] : 0.0;
    for (ptrdiff_t t = 0; t < from->t1 && !alone; t++) {
        double values;
        const ptrdiff_t F = tile_repetitions(p, t, &values);
        for (ptrdiff_t f = 0; f < F; f++) {
            const ptrdiff_t at = t * from->ld + f * p->C - from->c0;
            for (ptrdiff_t c = c0; c < c1; c++) {
                g[c] += from->a[at + c];
                gx[c] += from->b[at + c];
            }
        }
    }
    for (ptrdiff_t c = c0; c < c1; c++)
        gx[c] += g[c] * offset[c];
}

/* In every repetition of the channels, and in the BN_LINE values behind the last, where the first follow again. Planes
 * want none of it, and there an owner may have its coefficients. */
static void repeat(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, real *v) {
    const ptrdiff_t width = p->C * p->fold + BN_LINE;
    if (c0 == c1 || p->layout == BN_PLANES)
        return;
    if (c1 - c0 == p->C)
        for (ptrdiff_t n = p->C; n < width; n *= 2)
            memcpy(v + n, v, (size_t)min_z(n, width - n) * sizeof *v);
    else
        for (ptrdiff_t f = p->C; f < width; f += p->C)
            for (ptrdiff_t c = c0; c < min_z(c1, width - f); c++)
                v[f + c] = v[c];
}

static void without_invstd(const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *gx, double *dz_dev) {
    const real *invstd = k->invstd;
    for (ptrdiff_t c = c0; c < c1; c++)
        dz_dev[c] = invstd[c] != 0 ? gx[c] / invstd[c] : 0.0;
}

static void with_invstd(const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *dz_dev, double *gx) {
    const real *invstd = k->invstd;
    for (ptrdiff_t c = c0; c < c1; c++)
        gx[c] = dz_dev[c] * invstd[c];
}

static void to_gradient(const double *sum, ptrdiff_t c0, ptrdiff_t c1, void *gradient) {
    real *to = gradient;
    for (ptrdiff_t c = c0; c < c1; c++)
        to[c] = (real)sum[c];
}

/* 1 / sqrt(v), and 0 for 0. For lanes of float32 a float32 estimate and one step of Newton's are as good in the end as
 * float64's own square root and division, which take three times as long. */
INLINE void inverse_deviation(const double *v, ptrdiff_t n, double *r) {
    int beyond = 0;
    for (ptrdiff_t i = 0; sizeof(real) == sizeof(double) && i < n; i++)
        r[i] = v[i] == 0.0 ? 0.0 : 1.0 / sqrt(v[i]);
    if (sizeof(real) == sizeof(double))
        return;
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

/* The largest value of a lane in place of an infinity: times x - mean, which may be 0, that would be NaN. Only of what
 * is finite in float64, and apart from the conversions, which are then made of several at a time. */
INLINE void keep_finite(ptrdiff_t n, const double *a, real *b) {
    int beyond = 0;
    for (ptrdiff_t c = 0; c < n; c++)
        beyond |= !(b[c] <= REAL_MAX) | !(b[c] >= -REAL_MAX);
    for (ptrdiff_t c = 0; beyond && c < n; c++)
        if (fabs(b[c]) > REAL_MAX && fabs(a[c]) <= DBL_MAX)
            b[c] = b[c] < 0 ? -REAL_MAX : REAL_MAX;
}

/* Of n <= BLOCK channels from cb on, from their means hi + lo, or hi alone, and v = var + eps. */
INLINE void coef_block(ptrdiff_t cb, ptrdiff_t n, const real *hi, const double *lo, const double *v,
                       const bn_source *from, const coefs *k) {
    real *restrict mean = k->mean + cb, *restrict scale = k->scale + cb, *restrict shift = k->shift + cb;
    const real *weight = from->weight, *bias = from->bias;
    double invstd[BLOCK], a[BLOCK];
    inverse_deviation(v, n, invstd);
    for (ptrdiff_t c = 0; c < n; c++) {
        a[c] = weight ? weight[cb + c] * invstd[c] : invstd[c];
        scale[c] = (real)a[c];
        const double b = bias ? bias[cb + c] : 0.0;
        shift[c] = (real)(lo ? b - lo[c] * a[c] : b);
    }
    keep_finite(n, a, scale);
    for (ptrdiff_t c = 0; c < n; c++)
        mean[c] = hi[c];
    if (k->invstd) {
        for (ptrdiff_t c = 0; c < n; c++) {
            k->invstd[cb + c] = (real)invstd[c];
            k->offset[cb + c] = (real)(lo ? -lo[c] * invstd[c] : 0.0);
        }
        keep_finite(n, invstd, k->invstd + cb);
    }
}

static void repeat_coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const coefs *k) {
    repeat(p, c0, c1, k->mean);
    repeat(p, c0, c1, k->scale);
    repeat(p, c0, c1, k->shift);
    if (k->invstd)
        repeat(p, c0, c1, k->invstd);
}

static void coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const bn_source *from, const bn_coef *coefficients) {
    const coefs k = coefs_of(coefficients);
    for (ptrdiff_t cb = c0; cb < c1; cb += BLOCK) {
        const ptrdiff_t n = min_z(BLOCK, c1 - cb);
        double lo[BLOCK], v[BLOCK];
        real hi[BLOCK];
        for (ptrdiff_t c = 0; c < n; c++) {
            hi[c] = (real)from->mean[cb + c];
            lo[c] = from->mean[cb + c] - hi[c];
            v[c] = from->var[cb + c] + from->eps;
        }
        coef_block(cb, n, hi, lo, v, from, &k);
    }
    repeat_coef(p, c0, c1, &k);
}

static void running_coef(const bn_problem *p, const void *running_mean, const void *running_var, const bn_source *from,
                         const bn_coef *coefficients) {
    const coefs k = coefs_of(coefficients);
    const real *mean = running_mean, *var = running_var;
    for (ptrdiff_t cb = 0; cb < p->C; cb += BLOCK) {
        const ptrdiff_t n = min_z(BLOCK, p->C - cb);
        double v[BLOCK];
        for (ptrdiff_t c = 0; c < n; c++)
            v[c] = var[cb + c] + from->eps;
        coef_block(cb, n, mean + cb, NULL, v, from, &k);
    }
    repeat_coef(p, 0, p->C, &k);
}

/* Of n <= BLOCK channels from cb on: in loops of little each, which is what compilers make vectors of. */
INLINE void backward_coef_block(ptrdiff_t cb, ptrdiff_t n, double share, const double *g, const double *gx,
                                const coefs *k) {
    const real *scale = k->scale + cb, *invstd = k->invstd + cb, *offset = k->offset + cb;
    real *restrict mean = k->g_mean + cb, *restrict proj = k->g_proj + cb, *restrict shift = k->g_shift + cb;
    double g_mean[BLOCK], gx_mean[BLOCK], slope[BLOCK], low[BLOCK];
    for (ptrdiff_t c = 0; c < n; c++) {
        g_mean[c] = g[cb + c] * share;
        gx_mean[c] = gx[cb + c] * share;
    }
    for (ptrdiff_t c = 0; c < n; c++)
        mean[c] = (real)g_mean[c];
    for (ptrdiff_t c = 0; c < n; c++)
        slope[c] = -gx_mean[c] * invstd[c];
    for (ptrdiff_t c = 0; c < n; c++)
        proj[c] = (real)slope[c];
    keep_finite(n, slope, proj);
    for (ptrdiff_t c = 0; c < n; c++)
        low[c] = (g_mean[c] - mean[c]) + gx_mean[c] * offset[c];
    for (ptrdiff_t c = 0; c < n; c++)
        shift[c] = (real)(-scale[c] * low[c]);
}

static void backward_coef(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *g, const double *gx,
                          double count, const bn_coef *coefficients) {
    const coefs k = coefs_of(coefficients);
    const double share = 1.0 / count;
    for (ptrdiff_t cb = c0; cb < c1; cb += BLOCK)
        backward_coef_block(cb, min_z(BLOCK, c1 - cb), share, g, gx, &k);
    repeat(p, c0, c1, k.g_mean);
    repeat(p, c0, c1, k.g_proj);
    repeat(p, c0, c1, k.g_shift);
}

const bn_terms TABLE(bn_terms_) = {
    .lanes = VL,
    .held = HELD,
    .overlaps = OVERLAPS,
    .pool_stats = {pool_stats, pool_masked},
    .pool_sums = pool_sums,
    .without_invstd = without_invstd,
    .with_invstd = with_invstd,
    .coef = coef,
    .running_coef = running_coef,
    .backward_coef = backward_coef,
    .round = to_gradient,
    .move_running = move_running,
};
