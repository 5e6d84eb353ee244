/* statistics.inc.h: each tile's means and squared deviations. */

#define TINY 1e-30 /* below this the squares have lost bits to underflow */

/* In place of squared deviations, where the sums of shifted values tell too little: */
#define UNSOUND -1.0 /* float32 has not the range, or the shift was too far off the mean */
#define FLAT    -2.0 /* either all values are alike, or their squares have underflowed */

/* The variance loses accuracy with the square of the deviations that the shift was off the mean. Columns, which are
 * gathered to be summed again, may be two off; planes, whose shift may be the median of three values, 1.4. */
#define ROWS_OFF   1.25
#define PLANES_OFF 1.5

/* Means and squared deviations of n values a column from their shifted sums, which may be in the same place. Returns
 * whether any sums tell too little. */
static int settle(double n, double off, ptrdiff_t cols, const float *shift, const double *sum, const double *sq,
                  double *mean, double *m2) {
    int any = 0;
    for (ptrdiff_t c = 0; c < cols; c++) {
        const double s = sum[c], q = sq[c], a = s / n, m = q - s * a;
        const int unsound = !(off * (s * a) <= q) | !(q <= FLT_MAX), flat = q < TINY;
        mean[c] = shift[c] + a;
        m2[c] = unsound ? UNSOUND : flat ? FLAT : m > 0.0 ? m : 0.0;
        any |= unsound | flat;
    }
    return any;
}

static int alike(const float *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len) {
    const float first = *x;
    int differ = 0;
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++)
            differ |= x[r * stride + i] != first;
    return !differ;
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
                        vprefetch(a + i + j * VL + ahead, TO_L2);
                    const vf d = vsub(vload(a + i + j * VL), k);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++) {
                if (rest <= lane + j * VL)
                    continue;
                const float *b = a + full + j * VL;
                if (prefetch && j * VL % LINE == 0)
                    vprefetch(b + ahead, TO_L2);
                const vf d = rest >= lane + (j + 1) * VL ? vsub(vload(b), k) : vkeep(vsub(vload_tail(b, t), k), t);
                sa[j] = vadd(sa[j], d);
                qa[j] = vfma(d, d, qa[j]);
            }
        }
    }
}

/* How many of the values left of a run all passes take before they go on, in memory's order. */
INLINE ptrdiff_t piece(ptrdiff_t left) { return left < 2 * PIECE ? left : PIECE; }

/* The sums of a tile, still in VL lanes. */
INLINE void shifted_sums(const float *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, vf k, ptrdiff_t ahead,
                         int prefetch, int lanes, vf *sum, vf *sq) {
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < lanes / VL; j++)
        s[j] = q[j] = vset1(0.0f);
    if (PASS >= lanes)
        add_shifted(x, stride, runs, len, k, ahead, prefetch, lanes, s, q);
    else
        for (ptrdiff_t r = 0; r < runs; r++)
            for (ptrdiff_t i = 0, n; i < len; i += n) {
                n = piece(len - i);
                add_shifted(x + r * stride + i, 0, 1, n, k, ahead, prefetch, lanes, s, q);
            }
    *sum = add_vectors(s, lanes);
    *sq = add_vectors(q, lanes);
}

/* The shift is the median of the medians of three times three values of the tile (Tukey's ninther): one of the values
 * itself, so that a constant channel's variance is exactly 0, and not moved by a few outliers. Planes have them from
 * the beginning of the tile, where it is read first: in their long runs of memory anything else holds prefetching up.
 * A border, or a first image unlike the others, can make it a bad guess, which costs one more pass from cache. */
#define SAMPLES    9
#define NEAR       128 /* values of a plane that samples are from */
#define SMALL_TILE 256 /* values */

INLINE float median3(float a, float b, float c) {
    const float low = a < b ? a : b, high = a > b ? a : b, next = high < c ? high : c;
    return low > next ? low : next;
}

INLINE vf vmedian3(vf a, vf b, vf c) { return vmax(vmin(a, b), vmin(vmax(a, b), c)); }

/* Runs of less than a line have too few values for that. */
INLINE void samples(const bn_problem *p, const tile *a, ptrdiff_t *at) {
    for (int i = 0; i < SAMPLES; i++)
        at[i] = i * min_z(a->len, NEAR) / SAMPLES + (a->len < LINE ? i * a->runs / SAMPLES * p->x.outer : 0);
}

/* Of small tiles three values will do: the others would take as long as the sums. One channel after the other: vectors
 * of several channels' values would have to be put together in memory, and waited for. */
INLINE float plane_shift(const float *x, const ptrdiff_t *sample, int small) {
    float m[3];
    if (small)
        return median3(x[sample[0]], x[sample[3]], x[sample[6]]);
    for (int i = 0; i < 3; i++)
        m[i] = median3(x[sample[i]], x[sample[i + 3]], x[sample[i + 6]]);
    return median3(m[0], m[1], m[2]);
}

/* The sums of cols <= VL channels, from VL lanes; 0 for the others. */
INLINE void add_lanes(ptrdiff_t cols, vf *s, float *sum) {
    for (ptrdiff_t j = cols; j < VL; j++)
        s[j] = vset1(0.0f);
    vstore(sum, vsums(s));
}

/* Once more a tile whose sums were unsound, from cache: about the mean that they told, which is as good as a guess can
 * be, or where that does not help in float64. */
static void settle_again(const bn_problem *p, const tile *a, const float *x, double *mean, double *m2) {
    const float shift = (float)*mean;
    vf s[VL], q[VL];
    float sum32[VL], sq32[VL];
    shifted_sums(x, p->x.outer, a->runs, a->len, vset1(shift), 0, 0, LANES, s, q);
    add_lanes(1, s, sum32);
    add_lanes(1, q, sq32);
    const double sum = sum32[0], sq = sq32[0];
    if (settle((double)(a->runs * a->len), PLANES_OFF, 1, &shift, &sum, &sq, mean, m2))
        exact_stats(x, p->x.outer, a->runs, a->len, mean, m2);
}

/* Of cols <= VL planes, or tiles of them of equal size, from their sums in VL lanes. */
INLINE void settle_planes(const bn_problem *p, const tile *a, const float *const *x, ptrdiff_t cols, const float *shift,
                          vf *s, vf *q, double *mean, double *m2) {
    const double n = (double)(a->runs * a->len);
    float sum32[VL], sq32[VL];
    double sum[VL], sq[VL];
    add_lanes(cols, s, sum32);
    add_lanes(cols, q, sq32);
    for (int j = 0; j < VL; j++) {
        sum[j] = sum32[j];
        sq[j] = sq32[j];
    }
    if (settle(n, PLANES_OFF, cols, shift, sum, sq, mean, m2))
        for (ptrdiff_t j = 0; j < cols; j++) {
            if (m2[j] == UNSOUND)
                settle_again(p, a, x[j], &mean[j], &m2[j]);
            else if (m2[j] == FLAT && alike(x[j], p->x.outer, a->runs, a->len))
                m2[j] = 0.0;
            else if (m2[j] == FLAT)
                exact_stats(x[j], p->x.outer, a->runs, a->len, &mean[j], &m2[j]);
        }
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

/* One vector a channel of what was kept, in place: a copy would be a memcpy, which takes as long as many planes. */
INLINE void add_kept(ptrdiff_t cols, vf *kept) {
    for (ptrdiff_t c = 0; c < cols && SHORT_LANES > VL; c++)
        kept[c] = add_vectors(kept + c * (SHORT_LANES / VL), SHORT_LANES);
}

/* Short planes of cols <= SHORT_BLOCK channels, batch by batch. */
INLINE void short_stats(const bn_problem *p, const tile *a, const float *x, ptrdiff_t cols, const ptrdiff_t *sample,
                        int small, double *mean, double *m2) {
    const ptrdiff_t inner = p->x.inner, outer = p->x.outer;
    const float *plane[SHORT_BLOCK];
    float shift[SHORT_BLOCK];
    vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
    for (ptrdiff_t c = 0; c < cols; c++) {
        plane[c] = x + c * inner;
        shift[c] = plane_shift(plane[c], sample, small);
    }
    for (ptrdiff_t r = 0; r < a->runs; r++)
        for (ptrdiff_t c = 0; c < cols; c++) {
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, s);
            resume(sq + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, q);
            add_shifted(plane[c] + r * outer, 0, 1, a->len, vset1(shift[c]), outer, 1, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum + c * SHORT_LANES / VL);
            keep(q, SHORT_LANES / VL, sq + c * SHORT_LANES / VL);
        }
    add_kept(cols, sum);
    add_kept(cols, sq);
    for (ptrdiff_t c = 0; c < cols; c += VL)
        settle_planes(p, a, plane + c, min_z(VL, cols - c), shift + c, sum + c, sq + c, mean + c, m2 + c);
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
            const float *plane[VL];
            float shift[VL];
            vf s[VL], q[VL];
            for (ptrdiff_t j = 0; j < cols; j++) {
                plane[j] = x + j * inner;
                shift[j] = plane_shift(plane[j], sample, small);
                const vf mid = vset1(shift[j]);
                if (is_short)
                    shifted_sums(plane[j], p->x.outer, a.runs, a.len, mid, 0, 0, SHORT_LANES, &s[j], &q[j]);
                else if (p->stream)
                    shifted_sums(plane[j], p->x.outer, a.runs, a.len, mid, ahead, 1, LANES, &s[j], &q[j]);
                else
                    shifted_sums(plane[j], p->x.outer, a.runs, a.len, mid, 0, 0, LANES, &s[j], &q[j]);
            }
            settle_planes(p, &a, plane, cols, shift, s, q, mean_t, m2_t);
        }
    }
}

/* Column 0 of a row of x, of the kernel's width: `fold` rows of memory, or one row anywhere. */
INLINE const float *row_at(const bn_problem *p, ptrdiff_t row) { return row_cursor(p, row, FORWARD).x; }

INLINE int beyond_cache(const bn_problem *p) { return p->packed && p->stream == 2; }

/* Whether to add several rows at a time, because a sum in memory costs more than the value that is added to it. From
 * beyond the cache one row after the other, as the elementwise work, unless the sums themselves crowd L1. */
INLINE int several_rows(const bn_problem *p) { return p->packed && (p->stream < 2 || p->C * p->fold >= WIDE); }

/* The sums of columns, PANEL values in each: of up to STATS_ROWS rows, and of all the groups of so many before. One
 * long chain of float32 would lose three times as much. */
typedef struct {
    float *shift, *group, *group_sq, *s, *q;
} row_sums;

INLINE void load_group(const row_sums *a, ptrdiff_t c, int first, vf *sum, vf *sq) {
    *sum = first ? vset1(0.0f) : vload(a->group + c);
    *sq = first ? vset1(0.0f) : vload(a->group_sq + c);
}

INLINE void store_group(const row_sums *a, ptrdiff_t c, int last, vf sum, vf sq) {
    vstore((last ? a->s : a->group) + c, last ? vadd(vload(a->s + c), sum) : sum);
    vstore((last ? a->q : a->group_sq) + c, last ? vadd(vload(a->q + c), sq) : sq);
}

/* Adds rows to the columns' sums, in order; they may be the first or the last of a group. The sums' arrays hold whole
 * vectors. What comes so far `ahead` is prefetched in memory's order, unless that is 0. */
INLINE void add_rows(const float *x, ptrdiff_t stride, int rows, int first, int last, ptrdiff_t ahead, ptrdiff_t cols,
                     const row_sums *a) {
    const vt t = vtail(cols % VL);
    ptrdiff_t c = 0;
    vf sum, sq;
    for (; c + VL <= cols; c += VL) {
        const vf k = vload(a->shift + c);
        load_group(a, c, first, &sum, &sq);
        if (ahead && (rows > 1 || c % LINE == 0))
            for (int j = 0; j < rows * VL; j += LINE)
                vprefetch(x + ahead + rows * c + j, rows > 1 ? nearest(cols) : TO_L2);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(vload(x + r * stride + c), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        store_group(a, c, last, sum, sq);
    }
    if (c < cols) {
        const vf k = vload(a->shift + c);
        load_group(a, c, first, &sum, &sq);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(vload_tail(x + r * stride + c, t), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        store_group(a, c, last, sum, sq);
    }
}

/* As add_rows, for a group of a strip's width, whose sums stay in registers: in memory's order, as the hardware
 * prefetches best. */
INLINE void add_strip(const float *x, const row_sums *a) {
    vf k[STRIP / VL], sum[STRIP / VL], sq[STRIP / VL];
    for (int j = 0; j < STRIP / VL; j++) {
        k[j] = vload(a->shift + j * VL);
        load_group(a, j * VL, 1, &sum[j], &sq[j]);
    }
    for (int r = 0; r < STATS_ROWS; r++)
        for (int j = 0; j < STRIP / VL; j++) {
            const vf d = vsub(vload(x + r * STRIP + j * VL), k[j]);
            sum[j] = vadd(sum[j], d);
            sq[j] = vfma(d, d, sq[j]);
        }
    for (int j = 0; j < STRIP / VL; j++)
        store_group(a, j * VL, 1, sum[j], sq[j]);
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

INLINE const float *sample_row(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, int i) {
    return row_at(p, row0 + i * rows / SAMPLES);
}

/* What the shifts of tile t will wait for. */
INLINE void prefetch_samples(const bn_problem *p, ptrdiff_t t, ptrdiff_t c, ptrdiff_t cols) {
    ptrdiff_t row0;
    const ptrdiff_t rows = row_tile(p, t, &row0);
    for (int i = 0; i < SAMPLES; i++) {
        const float *const x = sample_row(p, row0, rows, i) + c;
        for (ptrdiff_t j = 0; j < cols; j += LINE)
            vprefetch(x + j, TO_L2);
    }
}

static void exact_column(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, double *mean, double *m2) {
    float v[ROW_TILE];
    for (ptrdiff_t r = 0; r < rows; r++)
        v[r] = row_at(p, row0 + r)[c];
    exact_stats(v, 0, 1, rows, mean, m2);
}

/* VL columns of a tile at a time, one more pass over those that may be constant, as channels are that a ReLU has
 * killed: their values one after the other would take ten times as long. */
static void settle_flat(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, ptrdiff_t cols, double *mean,
                        double *m2) {
    for (ptrdiff_t i = 0; i < cols; i += VL) {
        const ptrdiff_t n = min_z(VL, cols - i);
        const vt t = vtail(n);
        float low[VL], high[VL];
        int flat = 0;
        for (ptrdiff_t j = 0; j < n; j++)
            flat |= m2[i + j] == FLAT;
        if (!flat)
            continue;
        vf least = vload_tail(row_at(p, row0) + c + i, t), most = least;
        for (ptrdiff_t r = 1; r < rows; r++) {
            const vf v = vload_tail(row_at(p, row0 + r) + c + i, t);
            least = vmin(least, v);
            most = vmax(most, v);
        }
        vstore(low, least);
        vstore(high, most);
        for (ptrdiff_t j = 0; j < n; j++)
            if (m2[i + j] == FLAT && low[j] == high[j])
                m2[i + j] = 0.0;
            else if (m2[i + j] == FLAT)
                exact_column(p, row0, rows, c + i + j, &mean[i + j], &m2[i + j]);
    }
}

/* Columns [c, c + cols) of a tile of rows. The arrays of sums hold whole vectors; s and q are 0 before and after. */
INLINE void tile_stats(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, ptrdiff_t cols,
                       const row_sums *a, double *mean, double *m2) {
    const ptrdiff_t K = p->C * p->fold;
    const int in_strip = VL == LINE && p->packed && K == STRIP && cols == STRIP, far = far_rows(p, cols);
    const ptrdiff_t ahead = !beyond_cache(p) ? 0 : cols == K ? STATS_AHEAD : K;
    const int several = several_rows(p) && !(VL == LINE && ahead); /* sums hold up narrower vectors more than memory */
    const int half = half_as_many(cols, 2, far);                   /* the sums are like an operand */
    const float *x[SAMPLES];
    for (int i = 0; i < SAMPLES; i++)
        x[i] = sample_row(p, row0, rows, i) + c;
    for (ptrdiff_t i = 0; i < cols; i += VL) {
        vf v[SAMPLES];
        for (int j = 0; j < SAMPLES; j++)
            v[j] = vload_tail(x[j] + i, vtail(cols - i));
        for (int j = 0; j < 3; j++)
            v[j] = vmedian3(v[j], v[j + 3], v[j + 6]);
        vstore(a->shift + i, vmedian3(v[0], v[1], v[2]));
    }
    double *const sum = mean, *const sq = m2; /* until they are settled */
    memset(sum, 0, (size_t)cols * sizeof *sum);
    memset(sq, 0, (size_t)cols * sizeof *sq);
    for (ptrdiff_t r = 0, n; r < rows; r += n) {
        n = min_z(CHAIN, rows - r);
        ptrdiff_t i = 0;
        for (; in_strip && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_strip(row_at(p, row0 + r + i), a);
        for (; several && far && half && i + STATS_ROWS <= n; i += STATS_ROWS) {
            const float *const next = row_at(p, row0 + r + i) + c;
            add_rows(next, K, STATS_ROWS / 2, 1, 0, STATS_ROWS / 2 * K, cols, a);
            add_rows(next + STATS_ROWS / 2 * K, K, STATS_ROWS / 2, 0, 1, STATS_ROWS / 2 * K, cols, a);
        }
        for (; several && !far && half && i + STATS_ROWS <= n; i += STATS_ROWS) {
            const float *const next = row_at(p, row0 + r + i) + c;
            add_rows(next, K, STATS_ROWS / 2, 1, 0, 0, cols, a);
            add_rows(next + STATS_ROWS / 2 * K, K, STATS_ROWS / 2, 0, 1, 0, cols, a);
        }
        for (; several && far && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 1, 1, STATS_ROWS * K, cols, a);
        for (; several && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 1, 1, 0, cols, a);
        for (; i < n; i++) {
            const int first = i % STATS_ROWS == 0, last = i % STATS_ROWS == STATS_ROWS - 1 || i == n - 1;
            if (ahead)
                add_rows(row_at(p, row0 + r + i) + c, K, 1, first, last, ahead, cols, a);
            else
                add_rows(row_at(p, row0 + r + i) + c, K, 1, first, last, 0, cols, a);
        }
        carry(cols, a->s, a->q, sum, sq);
    }
    if (!settle((double)rows, ROWS_OFF, cols, a->shift, sum, sq, mean, m2))
        return;
    for (ptrdiff_t i = 0; i < cols; i++)
        if (m2[i] == UNSOUND)
            exact_column(p, row0, rows, c + i, &mean[i], &m2[i]);
    settle_flat(p, row0, rows, c, cols, mean, m2);
}

/* How far two addresses are from each other in their low bits: PAGE / 2 if half a period. */
INLINE ptrdiff_t apart(const float *a, const float *b, ptrdiff_t period) {
    const ptrdiff_t d = (ptrdiff_t)((uintptr_t)a - (uintptr_t)b) & (period - 1);
    return min_z(d, period - d) * (PAGE / period);
}

#define PLACES 8                                 /* that clear_of has to choose from */
#define ROOM   (PAGE / (ptrdiff_t)sizeof(float)) /* what it may leave out */

/* Where from `room` on the sums of columns begin: as far as can be, in the low bits of addresses, from all that is
 * loaded beside them. What is loaded for the next columns would wait for what is stored to these, or both would crowd
 * each other out of a set of L1. These are packed rows, from each of `rows` on, and n arrays at one distance, from
 * `columns` on. Rows of few lines, or of an odd number, are near whatever there is. */
INLINE float *clear_of(const bn_problem *p, float *room, const float *const rows[2], const float *columns,
                       ptrdiff_t distance, int n) {
    const ptrdiff_t bytes = p->C * p->fold * (ptrdiff_t)sizeof(float), period = min_z(PAGE, bytes & -bytes);
    ptrdiff_t most = -1;
    float *best = room;
    if (!p->packed || p->N * p->S * p->C < FEW)
        return room;
    for (float *at = room; at < room + ROOM; at += ROOM / PLACES) {
        ptrdiff_t least = PAGE;
        for (int i = 0; i < 2 && period > PAGE / PLACES; i++)
            least = min_z(least, apart(at, rows[i], period));
        for (int i = 0; i < n; i++)
            least = min_z(least, apart(at, columns + i * distance, PAGE));
        if (least > most) {
            most = least;
            best = at;
        }
    }
    return best;
}

static void stats_rows(const bn_problem *p, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                       double *m2, ptrdiff_t ld) {
    const float *const first = row_at(p, 0) + c0, *const rows_of[] = {first, first};
    float *const room = clear_of(p, p->room, rows_of, NULL, 0, 0);
    const row_sums a = {room, room + PANEL, room + 2 * PANEL, room + 3 * PANEL, room + 4 * PANEL};
    clear(min_z(PANEL, c1 - c0), a.s, a.q);
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
            const ptrdiff_t at = (t - t0) * ld + (c - c0), cols = min_z(PANEL, c1 - c);
            if (beyond_cache(p) && t + 1 < t1)
                prefetch_samples(p, t + 1, c, cols);
            tile_stats(p, row0, rows, c, cols, &a, mean + at, m2 + at);
        }
    }
}
