/* shift.inc.h: the value near a tile's mean that its values are summed from, and what becomes of the shifted sums. */

/* Below this the squares have lost bits to underflow. */
#define TINY (sizeof(real) == 4 ? 1e-30 : 1e-280)

/* In place of squared deviations, where the sums of shifted values tell too little: */
#define UNSOUND -1.0 /* the lanes have not the range, or the shift was too far off the mean */
#define FLAT    -2.0 /* either all values are alike, or their squares have underflowed */

/* The variance loses accuracy with the square of the deviations that the shift was off the mean. Columns, which are
 * gathered to be summed again, may be two off; planes, whose shift may be the median of three values, 1.4. */
#define ROWS_OFF   1.25
#define PLANES_OFF 1.5

/* Means and squared deviations of n values a column from their shifted sums, which may be in the same place. Returns
 * whether any sums tell too little. */
static int settle(double n, double off, ptrdiff_t cols, const real *shift, const double *sum, const double *sq,
                  double *mean, double *m2) {
    int any = 0;
    for (ptrdiff_t c = 0; c < cols; c++) {
        const double s = sum[c], q = sq[c], a = s / n, m = q - s * a;
        const int unsound = !(off * (s * a) <= q) | !(q <= REAL_MAX), flat = q < TINY;
        mean[c] = shift[c] + a;
        m2[c] = unsound ? UNSOUND : flat ? FLAT : m > 0.0 ? m : 0.0;
        any |= unsound | flat;
    }
    return any;
}

/* In float64, twice over the values; eight partial sums, because one would wait for itself. */
static void exact_stats(const elem *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, double *mean, double *m2) {
    double s[8] = {0.0}, q[8] = {0.0};
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++)
            s[i % 8] += widen(x[r * stride + i]);
    const double m = (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) / (double)(runs * len);
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++) {
            const double d = widen(x[r * stride + i]) - m;
            q[i % 8] += d * d;
        }
    *mean = m;
    *m2 = ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]));
}

/* The shift is the median of the medians of three times three values of the tile (Tukey's ninther): one of the values
 * itself, so that a constant channel's variance is exactly 0, and not moved by a few outliers. Planes have them from
 * the beginning of the tile, where it is read first: in their long runs of memory anything else holds prefetching up.
 * A border, or a first image unlike the others, can make it a bad guess, which costs one more pass from cache. */
#define SAMPLES    9
#define NEAR       128 /* values of a plane that samples are from */
#define SMALL_TILE 256 /* values */

INLINE real median3(real a, real b, real c) {
    const real low = a < b ? a : b, high = a > b ? a : b, next = high < c ? high : c;
    return low > next ? low : next;
}

INLINE vf vmedian3(vf a, vf b, vf c) { return vmax(vmin(a, b), vmin(vmax(a, b), c)); }

/* Runs of less than a line have too few values for that. */
INLINE void samples(const bn_problem *p, const tile *a, ptrdiff_t *at) {
    for (int i = 0; i < SAMPLES; i++)
        at[i] = i * min_z(a->len, NEAR) / SAMPLES + (a->len < BN_LINE ? i * a->runs / SAMPLES * p->x.outer : 0);
}

/* Of small tiles three values will do: the others would take as long as the sums. One channel after the other: vectors
 * of several channels' values would have to be put together in memory, and waited for. */
INLINE real plane_shift(const elem *x, const ptrdiff_t *sample, int small) {
    real m[3];
    if (small)
        return median3(widen(x[sample[0]]), widen(x[sample[3]]), widen(x[sample[6]]));
    for (int i = 0; i < 3; i++)
        m[i] = median3(widen(x[sample[i]]), widen(x[sample[i + 3]]), widen(x[sample[i + 6]]));
    return median3(m[0], m[1], m[2]);
}
