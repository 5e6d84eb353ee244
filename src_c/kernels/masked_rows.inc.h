/* masked_rows.inc.h: each tile's mean and squared deviations, of rows where some positions are not real.
 *
 * Of folded rows, a tile that is not real throughout has for all columns of a channel one shift, and the sums of all of
 * them in the first. */

#define WINDOW 256           /* columns of folded rows whose masks are spread at a time */
#define BYTES  (WINDOW + 64) /* a byte each, the vector that begins in the last, and what spread() writes beyond */

/* Rows of a tile that are to be looked at, of the kernel's width: first those that are real throughout. */
typedef struct {
    ptrdiff_t n, whole, reps; /* rows of memory in each: `fold`, but where the last do not fill a wide one */
    ptrdiff_t row[ROW_TILE];
} row_list;

/* All rows of tile t, or those of which something is real. */
static void list_rows(const bn_problem *p, ptrdiff_t t, int all, row_list *list) {
    ptrdiff_t row0, rows = row_tile(p, t, &row0);
    list->reps = rows ? p->fold : p->N * p->S % p->fold;
    list->n = 0;
    for (int partly = 0; partly < 2; partly++) {
        for (ptrdiff_t r = row0; r < row0 + max_z(1, rows); r++) {
            const ptrdiff_t real = count_real(p->mask + r * p->fold, list->reps);
            if (partly ? real < list->reps && (real || all) : real == list->reps)
                list->row[list->n++] = r;
        }
        if (!partly)
            list->whole = list->n;
    }
}

/* A byte a column from a byte a row of memory, of up to WINDOW + VL columns from c on: eight at a time, and so beyond
 * the last. */
static void spread(const unsigned char *m, ptrdiff_t reps, ptrdiff_t C, ptrdiff_t c, unsigned char *to) {
    const ptrdiff_t n = min_z(WINDOW + VL, reps * C - c), first = c / C, last = (c + n - 1) / C;
    if (!memcmp(m + first, m + first + 1, (size_t)(last - first))) {
        memset(to, m[first], (size_t)n);
        return;
    }
    ptrdiff_t f = first, i = 0;
    if (C <= 8)
        for (; f < last; f++) {
            const uint64_t eight = m[f] * UINT64_C(0x0101010101010101);
            memcpy(to + i, &eight, 8);
            i += f == first ? (first + 1) * C - c : C;
        }
    for (; f <= last; f++) {
        const ptrdiff_t end = min_z(n, (f + 1) * C - c);
        const uint64_t eight = m[f] * UINT64_C(0x0101010101010101);
        for (; i < end; i += 8)
            memcpy(to + i, &eight, 8);
        i = end;
    }
}

enum { SUMS, RANGE };

/* A vector of columns from c on, of `rows` rows with their masks from there on: adds their shifted values and the
 * squares to what s and q of `a` hold; or takes the least and the largest to what group and group_sq do. */
INLINE void add_columns(const elem *const *x, const unsigned char *m, int rows, int masked, int what, ptrdiff_t c, vt t,
                        int whole, const row_sums *a) {
    const vf k = vload(a->shift + c), none = vset1(0);
    vf s = what == RANGE ? vload(a->group + c) : none, q = what == RANGE ? vload(a->group_sq + c) : none;
    for (int r = 0; r < rows; r++) {
        const vf v = element_at(x[r] + c, t, whole);
        if (what == RANGE) {
            const vf u = masked ? vselect(vmask(m + r * BYTES), v, k) : v;
            s = vmin(u, s);
            q = vmax(u, q);
        } else {
            const vf d = masked ? vselect(vmask(m + r * BYTES), vsub(v, k), none) : vsub(v, k);
            s = vadd(s, d);
            q = vfma(d, d, q);
        }
    }
    vstore((what == RANGE ? a->group : a->s) + c, what == RANGE ? s : vadd(vload(a->s + c), s));
    vstore((what == RANGE ? a->group_sq : a->q) + c, what == RANGE ? q : vadd(vload(a->q + c), q));
}

/* Columns [from, end). */
INLINE void add_some_rows(const elem *const *x, const unsigned char *m, int rows, int masked, int what, ptrdiff_t from,
                          ptrdiff_t end, const row_sums *a) {
    ptrdiff_t c = from;
    for (; c + VL <= end; c += VL)
        add_columns(x, m + (c - from), rows, masked, what, c, vtail(VL), 1, a);
    if (c < end)
        add_columns(x, m + (c - from), rows, masked, what, c, vtail(end - c), 0, a);
}

/* Columns [c, c + cols) of the listed rows, a group after the other. */
INLINE void add_listed(const bn_problem *p, const row_list *list, int what, ptrdiff_t c, ptrdiff_t cols,
                       const row_sums *a, double *sum, double *sq) {
    unsigned char bytes[STATS_ROWS * BYTES];
    const elem *x[STATS_ROWS];
    for (ptrdiff_t r = 0; r < list->n; r += STATS_ROWS) {
        const int rows = (int)min_z(STATS_ROWS, list->n - r);
        const int masked = r + rows > list->whole;
        for (int j = 0; j < rows; j++)
            x[j] = row_at(p, list->row[r + j]) + c;
        for (ptrdiff_t i = 0; masked && i < cols; i += WINDOW) {
            for (int j = 0; j < rows; j++)
                spread(p->mask + list->row[r + j] * p->fold, list->reps, p->C, c + i, bytes + j * BYTES);
            add_some_rows(x, bytes, rows, 1, what, i, min_z(i + WINDOW, cols), a);
        }
        if (!masked && rows == STATS_ROWS)
            add_some_rows(x, bytes, STATS_ROWS, 0, what, 0, cols, a);
        else if (!masked)
            add_some_rows(x, bytes, rows, 0, what, 0, cols, a);
        if (what == SUMS && ((r + STATS_ROWS) % CHAIN == 0 || r + STATS_ROWS >= list->n))
            carry(cols, a->s, a->q, sum, sq);
    }
}

/* Channel 0 of a row of memory. */
INLINE const elem *position_at(const bn_problem *p, ptrdiff_t i) {
    return p->fold > 1 ? cursor_at(p, 0, 0, i * p->C, FORWARD).x : row_at(p, i);
}

/* Of w channels from c on, from values at these rows of memory. */
INLINE void real_shifts(const bn_problem *p, const ptrdiff_t *sample, ptrdiff_t c, ptrdiff_t w, real *shift) {
    for (ptrdiff_t i = 0; i < w; i += VL) {
        vf v[SAMPLES];
        for (int j = 0; j < SAMPLES; j++)
            v[j] = element_at(position_at(p, sample[j]) + c + i, vtail(w - i), i + VL <= w);
        for (int j = 0; j < 3; j++)
            v[j] = vmedian3(v[j], v[j + 3], v[j + 6]);
        vstore(shift + i, vmedian3(v[0], v[1], v[2]));
    }
}

/* Columns [j, j + cols) have the shifts of w channels in turn. */
INLINE void repeat_shifts(const real *shift, ptrdiff_t w, ptrdiff_t j, ptrdiff_t cols, real *to) {
    for (ptrdiff_t i = 0, c = j % w; i < cols; i++, c = c + 1 == w ? 0 : c + 1)
        to[i] = shift[c];
}

/* Of the real ones among n positions of channel c from `first` on: in float64, some at a time. */
static void exact_real(const bn_problem *p, ptrdiff_t first, ptrdiff_t n, ptrdiff_t c, double *mean, double *m2) {
    elem v[ROW_TILE];
    ptrdiff_t k = 0;
    double done = 0.0;
    for (ptrdiff_t i = first; i < first + n; i++) {
        if (p->mask[i])
            v[k++] = position_at(p, i)[c];
        if (k == ROW_TILE || (k && i + 1 == first + n)) {
            double more, more_m2;
            exact_stats(v, 0, 1, k, &more, &more_m2);
            pool_more(1, done, (double)k, &more, &more_m2, mean, m2);
            done += (double)k;
            k = 0;
        }
    }
}

/* Channels [c, c + w) of a tile, where the sums of some tell too little. All values are alike if they are the shift. */
static void settle_real_rows(const bn_problem *p, ptrdiff_t t, const row_list *list, ptrdiff_t c, ptrdiff_t w,
                             const real *shift, const row_sums *a, double *mean, double *m2) {
    ptrdiff_t first;
    const ptrdiff_t n = row_positions(p, t, &first);
    int flat = 0;
    for (ptrdiff_t i = 0; i < w; i++)
        flat |= m2[i] == FLAT;
    for (ptrdiff_t j = 0; flat && j < w * list->reps; j += PANEL) {
        const ptrdiff_t cols = min_z(PANEL, w * list->reps - j);
        repeat_shifts(shift, w, j, cols, a->shift);
        memcpy(a->group, a->shift, (size_t)cols * sizeof *a->shift);
        memcpy(a->group_sq, a->shift, (size_t)cols * sizeof *a->shift);
        add_listed(p, list, RANGE, c + j, cols, a, NULL, NULL);
        for (ptrdiff_t i = 0; i < cols; i++)
            if (m2[(j + i) % w] == FLAT && !(a->group[i] == a->shift[i] && a->group_sq[i] == a->shift[i]))
                m2[(j + i) % w] = UNSOUND;
    }
    for (ptrdiff_t i = 0; i < w; i++)
        if (m2[i] == UNSOUND)
            exact_real(p, first, n, c + i, &mean[i], &m2[i]);
        else if (m2[i] == FLAT)
            m2[i] = 0.0;
}

static void stats_masked_rows(const bn_problem *p, const bn_pass *how, const bn_tiles *to) {
    real *const room = (real *)to->room, *const shift = room + 5 * PANEL;
    const row_sums a = {room, room + PANEL, room + 2 * PANEL, room + 3 * PANEL, room + 4 * PANEL};
    const ptrdiff_t end = p->fold > 1 ? p->C : to->c1; /* folded: all columns at once */
    row_list list;
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        ptrdiff_t first, sample[SAMPLES];
        const ptrdiff_t n = p->real[t], all = row_positions(p, t, &first), at = (t - to->t0) * to->ld;
        if (n == all) {
            const bn_tiles one = {t, t + 1, to->c0, to->c1, to->ld, to->a + at, to->b + at, to->room};
            stats_rows(p, how, &one);
        }
        if (n == 0 || n == all)
            continue;
        list_rows(p, t, 0, &list);
        real_samples(p->mask + first, 0, 1, all, n, 0, sample);
        for (int i = 0; i < SAMPLES; i++)
            sample[i] += first;
        clear(PANEL, a.s, a.q);
        for (ptrdiff_t c = to->c0; c < end; c += PANEL) {
            const ptrdiff_t w = min_z(PANEL, end - c), width = w * list.reps;
            double *const mean = to->a + at + (c - to->c0), *const m2 = to->b + at + (c - to->c0);
            real_shifts(p, sample, c, w, shift);
            memset(mean, 0, (size_t)width * sizeof *mean);
            memset(m2, 0, (size_t)width * sizeof *m2);
            for (ptrdiff_t j = 0; j < width; j += PANEL) {
                const ptrdiff_t cols = min_z(PANEL, width - j);
                repeat_shifts(shift, w, j, cols, a.shift);
                add_listed(p, &list, SUMS, c + j, cols, &a, mean + j, m2 + j);
            }
            for (ptrdiff_t f = 1; f < list.reps; f++)
                for (ptrdiff_t i = 0; i < w; i++) {
                    mean[i] += mean[f * w + i];
                    m2[i] += m2[f * w + i];
                }
            if (settle((double)n, ROWS_OFF, w, shift, mean, m2, mean, m2))
                settle_real_rows(p, t, &list, c, w, shift, &a, mean, m2);
        }
    }
}
