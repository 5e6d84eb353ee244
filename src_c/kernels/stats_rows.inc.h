/* stats_rows.inc.h: each tile's mean and squared deviations, of rows. */

/* Column 0 of a row of x, of the kernel's width: `fold` rows of memory, or one row anywhere. */
INLINE const elem *row_at(const bn_problem *p, ptrdiff_t row) { return row_cursor(p, row, FORWARD).x; }

/* The sums of columns, PANEL values in each: of up to STATS_ROWS rows, and of all the groups of so many before. One
 * long chain of float32 would lose three times as much. */
typedef struct {
    real *shift, *group, *group_sq, *s, *q;
} row_sums;

INLINE void load_group(const row_sums *a, ptrdiff_t c, int first, vf *sum, vf *sq) {
    *sum = first ? vset1(0) : vload(a->group + c);
    *sq = first ? vset1(0) : vload(a->group_sq + c);
}

INLINE void store_group(const row_sums *a, ptrdiff_t c, int last, vf sum, vf sq) {
    vstore((last ? a->s : a->group) + c, last ? vadd(vload(a->s + c), sum) : sum);
    vstore((last ? a->q : a->group_sq) + c, last ? vadd(vload(a->q + c), sq) : sq);
}

/* Adds rows to the columns' sums, in order; they may be the first or the last of a group. The sums' arrays hold whole
 * vectors. What comes so far `ahead` is prefetched in memory's order, unless that is 0. */
INLINE void add_rows(const elem *x, ptrdiff_t stride, int rows, int first, int last, ptrdiff_t ahead, ptrdiff_t cols,
                     const row_sums *a) {
    const vt t = vtail(cols % VL);
    ptrdiff_t c = 0;
    vf sum, sq;
    for (; c + VL <= cols; c += VL) {
        const vf k = vload(a->shift + c);
        load_group(a, c, first, &sum, &sq);
        if (ahead && (rows > 1 || c % LINE == 0))
            for (int j = 0; j < rows * VL; j += LINE)
                vprefetch(x + ahead + rows * c + j, rows > 1 && cols <= NARROW ? TO_L1 : TO_L2);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(xload(x + r * stride + c), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        store_group(a, c, last, sum, sq);
    }
    if (c < cols) {
        const vf k = vload(a->shift + c);
        load_group(a, c, first, &sum, &sq);
        for (int r = 0; r < rows; r++) {
            const vf d = vsub(xload_tail(x + r * stride + c, t), k);
            sum = vadd(sum, d);
            sq = vfma(d, d, sq);
        }
        store_group(a, c, last, sum, sq);
    }
}

/* Starts partial sums of whole vectors. */
INLINE void clear(ptrdiff_t cols, real *s, real *q) {
    const size_t size = (size_t)((cols + VL - 1) / VL * VL) * sizeof *s;
    memset(s, 0, size);
    memset(q, 0, size);
}

/* Moves partial sums to the float64 ones and starts them anew. */
INLINE void carry(ptrdiff_t cols, real *s, real *q, double *sum, double *sq) {
    for (ptrdiff_t c = 0; c < cols; c++) {
        sum[c] += s[c];
        sq[c] += q[c];
    }
    clear(cols, s, q);
}

static void exact_column(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, double *mean, double *m2) {
    elem v[ROW_TILE];
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
        real low[VL], high[VL];
        int flat = 0;
        for (ptrdiff_t j = 0; j < n; j++)
            flat |= m2[i + j] == FLAT;
        if (!flat)
            continue;
        vf least = xload_tail(row_at(p, row0) + c + i, t), most = least;
        for (ptrdiff_t r = 1; r < rows; r++) {
            const vf v = xload_tail(row_at(p, row0 + r) + c + i, t);
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

INLINE void row_shifts(const bn_problem *p, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c, ptrdiff_t cols, real *shift) {
    const elem *x[SAMPLES];
    for (int i = 0; i < SAMPLES; i++)
        x[i] = row_at(p, row0 + i * rows / SAMPLES) + c;
    for (ptrdiff_t i = 0; i < cols; i += VL) {
        vf v[SAMPLES];
        for (int j = 0; j < SAMPLES; j++)
            v[j] = element_at(x[j] + i, vtail(cols - i), i + VL <= cols);
        for (int j = 0; j < 3; j++)
            v[j] = vmedian3(v[j], v[j + 3], v[j + 6]);
        vstore(shift + i, vmedian3(v[0], v[1], v[2]));
    }
}

/* Columns [c, c + cols) of a tile of rows. The arrays of sums hold whole vectors; s and q are 0 before and after. */
INLINE void tile_stats(const bn_problem *p, const bn_pass *how, ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t c,
                       ptrdiff_t cols, const row_sums *a, double *mean, double *m2) {
    const ptrdiff_t K = p->C * p->fold, ahead = how->ahead;
    double *const sum = mean, *const sq = m2; /* until they are settled */
    row_shifts(p, row0, rows, c, cols, a->shift);
    memset(sum, 0, (size_t)cols * sizeof *sum);
    memset(sq, 0, (size_t)cols * sizeof *sq);
    for (ptrdiff_t r = 0, n; r < rows; r += n) {
        n = min_z(CHAIN, rows - r);
        ptrdiff_t i = 0;
        for (; how->rows == 4 && i + STATS_ROWS <= n; i += STATS_ROWS) {
            const elem *const next = row_at(p, row0 + r + i) + c;
            add_rows(next, K, STATS_ROWS / 2, 1, 0, ahead, cols, a);
            add_rows(next + STATS_ROWS / 2 * K, K, STATS_ROWS / 2, 0, 1, ahead, cols, a);
        }
        for (; how->rows == STATS_ROWS && ahead && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 1, 1, ahead, cols, a);
        for (; how->rows == STATS_ROWS && i + STATS_ROWS <= n; i += STATS_ROWS)
            add_rows(row_at(p, row0 + r + i) + c, K, STATS_ROWS, 1, 1, 0, cols, a);
        for (; i < n; i++) {
            const int first = i % STATS_ROWS == 0, last = i % STATS_ROWS == STATS_ROWS - 1 || i == n - 1;
            if (how->rows == 1 && ahead)
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

/* The rows that do not fill a wide one: one value a column. */
static void stats_of_rest(const bn_problem *p, ptrdiff_t row, ptrdiff_t c0, ptrdiff_t c1, double *mean, double *m2) {
    const elem *x = row_at(p, row);
    for (ptrdiff_t c = c0; c < min_z(c1, p->N * p->S % p->fold * p->C); c++) {
        const double v = widen(x[c]);
        mean[c - c0] = v;
        m2[c - c0] = v - v; /* 0, or NaN for what is not finite */
    }
}

static void stats_rows(const bn_problem *p, const bn_pass *how, const bn_tiles *to) {
    real *const room = (real *)to->room;
    const row_sums a = {room, room + PANEL, room + 2 * PANEL, room + 3 * PANEL, room + 4 * PANEL};
    clear(min_z(PANEL, to->c1 - to->c0), a.s, a.q);
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        double *const mean = to->a + (t - to->t0) * to->ld, *const m2 = to->b + (t - to->t0) * to->ld;
        ptrdiff_t row0;
        const ptrdiff_t rows = row_tile(p, t, &row0);
        if (rows == 0) {
            stats_of_rest(p, row0, to->c0, to->c1, mean, m2);
            continue;
        }
        for (ptrdiff_t c = to->c0; c < to->c1; c += PANEL)
            tile_stats(p, how, row0, rows, c, min_z(PANEL, to->c1 - c), &a, mean + (c - to->c0), m2 + (c - to->c0));
    }
}
