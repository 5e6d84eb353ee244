/* sums_rows.inc.h: each tile's sums for the backward pass, of rows. */

/* n columns on. Compilers would make every address from a base and an index, and keep them all; those that are moved
 * take fewer registers. */
INLINE void move_on(cursor *a, ptrdiff_t n, instance of) {
    a->x = vaddress(a->x + n);
    a->dy = vaddress(a->dy + n);
    if (of.res && a->r)
        a->r += n;
}

/* As add_rows does; with `ahead`, the next so many rows are prefetched. */
INLINE void sum_some_rows(const bn_problem *p, const vact *act, const coefs *coef, const cursor *a, int rows, int ahead,
                          ptrdiff_t c, ptrdiff_t cols, real *sum, real *sq, instance of) {
    const ptrdiff_t K = p->C * p->fold;
    const vt tail = vtail(cols % VL);
    cursor here = *a, next = *a;
    ptrdiff_t i = 0;
    move_on(&here, c, of);
    move_on(&next, rows * K, of);
    for (; i + VL <= cols; i += VL) {
        const vcoef k = coef_of_columns(coef, c + i, tail, 1, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        for (int j = 0; ahead && j < rows * VL; j += LINE) {
            vprefetch(next.x + j, cols <= NARROW ? TO_L1 : TO_L2);
            vprefetch(next.dy + j, cols <= NARROW ? TO_L1 : TO_L2);
        }
        for (int r = 0; r < rows; r++)
            sum_at(p, act, &k, &here, r * K, whole_vectors(1, 0), of, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
        move_on(&here, VL, of);
        if (ahead)
            move_on(&next, rows * VL, of);
    }
    if (i < cols) {
        const vcoef k = coef_of_columns(coef, c + i, tail, 0, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        for (int r = 0; r < rows; r++)
            sum_at(p, act, &k, a, r * K + c + i, part_of_vector(tail), of, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
    }
}

/* As tile_stats. */
INLINE void tile_sums(const bn_problem *p, const vact *act, const coefs *coef, const bn_pass *how, ptrdiff_t row0,
                      ptrdiff_t rows, ptrdiff_t c, ptrdiff_t cols, real *sum, real *sq, instance of, double *g,
                      double *gx) {
    memset(g, 0, (size_t)cols * sizeof *g);
    memset(gx, 0, (size_t)cols * sizeof *gx);
    for (ptrdiff_t r = 0; r < rows;) {
        const ptrdiff_t left = min_z(rows, r / CHAIN * CHAIN + CHAIN) - r;
        const cursor a = row_cursor(p, row0 + r, BACKWARD);
        if (how->rows == SUMS_ROWS && how->ahead && left >= SUMS_ROWS) {
            sum_some_rows(p, act, coef, &a, SUMS_ROWS, 1, c, cols, sum, sq, of);
            r += SUMS_ROWS;
        } else if (how->rows == SUMS_ROWS && left >= SUMS_ROWS) {
            sum_some_rows(p, act, coef, &a, SUMS_ROWS, 0, c, cols, sum, sq, of);
            r += SUMS_ROWS;
        } else {
            sum_some_rows(p, act, coef, &a, 1, 0, c, cols, sum, sq, of);
            r++;
        }
        if (r % CHAIN == 0 || r == rows)
            carry(cols, sum, sq, g, gx);
    }
}

INLINE void sum_rows(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how, const bn_tiles *to,
                     instance of) {
    const bn_problem local = *problem, *const p = &local; /* as in apply_rows */
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const vact act = activation_of(p);
    real *const sum = (real *)to->room, *const sq = sum + PANEL;
    const ptrdiff_t rest = p->N * p->S % p->fold * p->C;
    clear(min_z(PANEL, to->c1 - to->c0), sum, sq);
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        ptrdiff_t row0;
        const ptrdiff_t rows = row_tile(p, t, &row0), end = rows ? to->c1 : min_z(to->c1, rest);
        for (ptrdiff_t c = to->c0; c < end; c += PANEL) {
            const ptrdiff_t at = (t - to->t0) * to->ld + (c - to->c0);
            tile_sums(p, &act, coef, how, row0, rows ? rows : 1, c, min_z(PANEL, end - c), sum, sq, of, to->a + at,
                      to->b + at);
        }
    }
}

#define SUMS_rows(act, res) SUMS_AS(rows, act, res)
static void sums_rows(const bn_problem *p, const bn_coef *k, const bn_pass *how, const bn_tiles *to) {
    SPECIALIZE_SUMS(p, SUMS_rows);
}
