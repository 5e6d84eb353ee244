/* masked_rows_apply.inc.h: sums for the backward pass and elementwise passes, of rows where some positions are not
 * real. */

/* Of rows of the kernel's width which positions are real: others than folded ones are so or not, folded ones have a
 * byte a column, of a window from some column on. */
typedef struct {
    ptrdiff_t from;
    vm whole[4];
    unsigned char bytes[4 * BYTES];
} row_masks;

/* Of row j of those that masks are of, from column c on. */
INLINE void mask_row(const bn_problem *p, ptrdiff_t row, int j, ptrdiff_t c, row_masks *to) {
    const unsigned char *const m = p->mask + row * p->fold;
    to->from = c;
    if (p->fold > 1)
        spread(m, min_z(p->fold, p->N * p->S - row * p->fold), p->C, c, to->bytes + j * BYTES);
    else
        to->whole[j] = vle(vset1(*m ? 0 : 1), vset1(0));
}

INLINE void masks_of_columns(const row_masks *of, int rows, int folded, ptrdiff_t c, vm *m) {
    UNROLLED for (int j = 0; j < rows; j++) m[j] =
        folded ? vmask(of->bytes + j * BYTES + (c - of->from)) : of->whole[j];
}

/* As sum_some_rows, of columns [c + from, c + end). */
INLINE void sum_masked_rows(const bn_problem *p, const vact *act, const coefs *coef, const cursor *a,
                            const row_masks *of, int rows, int folded, ptrdiff_t c, ptrdiff_t from, ptrdiff_t end,
                            real *sum, real *sq) {
    vm m[4];
    for (ptrdiff_t i = from; i < end; i += VL) {
        const int whole = i + VL <= end;
        const vcoef k = coef_of_columns(coef, c + i, vtail(end - i), whole, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        masks_of_columns(of, rows, folded, c + i, m);
        if (whole)
            real_sums_at(p, act, &k, a, c + i, whole_vectors(rows, 0), ACROSS, m, &s, &q);
        else
            for (int j = 0; j < rows; j++)
                real_sums_at(p, act, &k, a + j, c + i, part_of_vector(vtail(end - i)), ACROSS, m + j, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
    }
}

/* Those of the listed rows that are real throughout, as without a mask. */
static void sum_whole_rows(const bn_problem *p, const vact *act, const coefs *coef, const row_list *list, ptrdiff_t c,
                           ptrdiff_t cols, real *sum, real *sq, double *g, double *gx) {
    const instance of = masked(BACKWARD, BN_CACHED);
    for (ptrdiff_t r = 0; r < list->whole;) {
        const cursor a = row_cursor(p, list->row[r], BACKWARD);
        const ptrdiff_t left = min_z(list->whole, r / CHAIN * CHAIN + CHAIN) - r;
        if (p->packed && left >= SUMS_ROWS && list->row[r + SUMS_ROWS - 1] == list->row[r] + SUMS_ROWS - 1) {
            sum_some_rows(p, act, coef, &a, SUMS_ROWS, 0, c, cols, sum, sq, of);
            r += SUMS_ROWS;
        } else {
            sum_some_rows(p, act, coef, &a, 1, 0, c, cols, sum, sq, of);
            r++;
        }
        if (r % CHAIN == 0 || r == list->whole)
            carry(cols, sum, sq, g, gx);
    }
}

INLINE void sum_listed(const bn_problem *p, const vact *act, const coefs *coef, const row_list *list, int folded,
                       ptrdiff_t c, ptrdiff_t cols, real *sum, real *sq, double *g, double *gx) {
    row_masks masks;
    cursor a[4];
    for (ptrdiff_t r = list->whole; r < list->n;) {
        const int rows = list->n - r >= SUMS_ROWS ? SUMS_ROWS : 1;
        for (int j = 0; j < rows; j++)
            a[j] = row_cursor(p, list->row[r + j], BACKWARD);
        for (ptrdiff_t i = 0, end; i < cols; i = end) {
            end = folded ? min_z(i + WINDOW, cols) : cols;
            for (int j = 0; j < rows; j++)
                mask_row(p, list->row[r + j], j, c + i, &masks);
            if (rows == SUMS_ROWS)
                sum_masked_rows(p, act, coef, a, &masks, SUMS_ROWS, folded, c, i, end, sum, sq);
            else
                sum_masked_rows(p, act, coef, a, &masks, 1, folded, c, i, end, sum, sq);
        }
        r += rows;
        if ((r - list->whole) % CHAIN == 0 || r == list->n)
            carry(cols, sum, sq, g, gx);
    }
}

static void sums_masked_rows(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how,
                             const bn_tiles *to) {
    const bn_problem local = *problem, *const p = &local; /* as in apply_rows */
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const vact act = activation_of(p);
    real *const sum = (real *)to->room, *const sq = sum + PANEL;
    row_list list;
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        ptrdiff_t first;
        const ptrdiff_t all = row_positions(p, t, &first), at = (t - to->t0) * to->ld;
        if (p->real[t] == all) {
            const bn_tiles one = {t, t + 1, to->c0, to->c1, to->ld, to->a + at, to->b + at, to->room};
            sums_rows(p, coefficients, how, &one);
            continue;
        }
        list_rows(p, t, !p->mask_output, &list);
        clear(PANEL, sum, sq);
        const ptrdiff_t end = list.reps < p->fold ? min_z(to->c1, list.reps * p->C) : to->c1;
        for (ptrdiff_t c = to->c0; c < end; c += PANEL) {
            const ptrdiff_t cols = min_z(PANEL, end - c);
            double *const g = to->a + at + (c - to->c0), *const gx = to->b + at + (c - to->c0);
            memset(g, 0, (size_t)cols * sizeof *g);
            memset(gx, 0, (size_t)cols * sizeof *gx);
            sum_whole_rows(p, &act, coef, &list, c, cols, sum, sq, g, gx);
            sum_listed(p, &act, coef, &list, p->fold > 1, c, cols, sum, sq, g, gx);
        }
    }
}

/* Columns [c, end) of several rows at one distance in every operand, or of one. */
INLINE void apply_masked_columns(const bn_problem *p, const vact *act, const coefs *coef, ptrdiff_t row, int rows,
                                 ptrdiff_t c, ptrdiff_t end, instance of) {
    const ptrdiff_t distance = p->pitch * p->fold;
    const cursor a = row_cursor(p, row, of.direction);
    row_masks masks;
    vm m[4];
    masks.from = -WINDOW;
    while (c < end) {
        if (c >= masks.from + WINDOW)
            for (int j = 0; j < rows; j++)
                mask_row(p, row + j, j, c, &masks);
        const ptrdiff_t n = min_z(VL, end - c);
        const vcoef k = coef_of_columns(coef, c, vtail(VL), 1, of.direction); /* BN_LINE follow the last */
        masks_of_columns(&masks, rows, p->fold > 1, c, m);
        if (n == VL)
            apply_masked_at(p, act, &k, &a, c, whole_vectors(rows, distance), m, of);
        else
            for (int j = 0; j < rows; j++)
                apply_masked_at(p, act, &k, &a, c + j * distance, part_of_vector(vtail(n)), m + j, of);
        c += n;
    }
}

#define ALONE 32 /* channels from which on rows are full enough without being folded: a row is then real or not */

/* Through the cache, wherever the rest is written. */
INLINE void apply_mixed_rows(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how, ptrdiff_t e0,
                             ptrdiff_t e1, int direction) {
    const instance of = masked(direction, BN_CACHED);
    bn_problem local = *problem; /* as in apply_rows */
    const bn_problem *const p = &local;
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    if (p->C >= ALONE)
        local.fold = 1;
    const ptrdiff_t K = p->C * p->fold;
    const int rows = p->pitch && how->rows > 1 ? 4 : 1;
    const vact act = activation_of(p);
    while (e0 < e1) {
        const ptrdiff_t row = e0 / K, c = e0 % K;
        if (rows == 4 && c == 0 && e1 - e0 >= 4 * K) {
            apply_masked_columns(p, &act, coef, row, 4, 0, K, of);
            e0 += 4 * K;
        } else {
            const ptrdiff_t end = min_z(K, c + e1 - e0);
            apply_masked_columns(p, &act, coef, row, 1, c, end, of);
            e0 += end - c;
        }
    }
}

static void forward_mixed_rows(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {
    apply_mixed_rows(p, k, how, e0, e1, FORWARD);
}
static void backward_mixed_rows(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {
    apply_mixed_rows(p, k, how, e0, e1, BACKWARD);
}

#define ALIKE 256 /* values from which on it pays to go through positions that are alike without looking at each */

/* Elements that are not real put out 0. */
static void put_nothing(const bn_problem *p, ptrdiff_t e0, ptrdiff_t e1, int direction) {
    for (ptrdiff_t n; e0 < e1; e0 += n) {
        const ptrdiff_t row = e0 / p->C, c = e0 % p->C;
        n = p->packed ? e1 - e0 : min_z(p->C - c, e1 - e0);
        const cursor a = cursor_at(p, row / p->S, row % p->S, c, direction);
        memset(a.out, 0, (size_t)n * sizeof *a.out);
        if (a.gr)
            memset(a.gr, 0, (size_t)n * sizeof *a.gr);
    }
}

typedef void apply_kernel(const bn_problem *, const bn_coef *, const bn_pass *, ptrdiff_t, ptrdiff_t);

/* Many positions that are alike go as without a mask, put out nothing, or have a gradient that does not go through the
 * statistics, as if those were fixed. */
static void apply_by_runs(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1,
                          int direction) {
    apply_kernel *const unmasked = direction == FORWARD ? forward_rows : backward_rows;
    apply_kernel *const mixed = direction == FORWARD ? forward_mixed_rows : backward_mixed_rows;
    const unsigned char *const m = p->mask;
    const ptrdiff_t many = (ALIKE + p->C - 1) / p->C, end = (e1 - 1) / p->C + 1;
    bn_problem fixed = *p;
    fixed.fixed = 1;
    ptrdiff_t mixed_from = e0;
    for (ptrdiff_t i = e0 / p->C; i + many <= end;) {
        ptrdiff_t first = i + many - 1; /* back from there, so that most of a mixture is never looked at */
        while (first > i && m[first - 1] == m[i + many - 1])
            first--;
        if (first > i) {
            i = first;
            continue;
        }
        const unsigned char *const other = memchr(m + i, !m[i], (size_t)(end - i));
        const ptrdiff_t next = other ? other - m : end;
        const ptrdiff_t from = max_z(e0, i * p->C), to = min_z(e1, next * p->C);
        if (mixed_from < from)
            mixed(p, k, how, mixed_from, from);
        if (!m[i] && p->mask_output)
            put_nothing(p, from, to, direction);
        else
            unmasked(m[i] ? p : &fixed, k, how, from, to);
        mixed_from = to;
        i = next;
    }
    if (mixed_from < e1)
        mixed(p, k, how, mixed_from, e1);
}

INLINE void forward_by_runs(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {
    apply_by_runs(p, k, how, e0, e1, FORWARD);
}
INLINE void backward_by_runs(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {
    apply_by_runs(p, k, how, e0, e1, BACKWARD);
}

APPLY_MASKED(FORWARD, forward_masked_rows, forward_by_runs, forward_rows)
APPLY_MASKED(BACKWARD, backward_masked_rows, backward_by_runs, backward_rows)
