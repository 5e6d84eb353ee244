/* apply_rows.inc.h: the elementwise passes over rows. */

/* Column 0 of a row of the kernel's width: `fold` rows of memory, or one row anywhere. */
INLINE cursor row_cursor(const bn_problem *p, ptrdiff_t row, int direction) {
    if (p->fold > 1)
        return cursor_at(p, 0, 0, row * p->C * p->fold, direction);
    return p->N == 1 ? cursor_at(p, 0, row, 0, direction) : cursor_at(p, row / p->S, row % p->S, 0, direction);
}

/* `rows` rows of the kernel's width. Streamed rows are packed ones of whole lines. Those of a packed tensor may begin
 * at any element (`from`): then every row is seen rotated, so that its vectors keep to the lines of the output. */
typedef struct {
    ptrdiff_t from, rows, phase;
} rowset;

INLINE cursor row_of(const bn_problem *p, const rowset *b, ptrdiff_t r, int direction) {
    return p->packed ? cursor_at(p, 0, 0, b->from + r * p->C * p->fold, direction)
                     : row_cursor(p, b->from + r, direction);
}

/* Part of one row, in order. */
INLINE void apply_part(const bn_problem *p, const vact *act, const coefs *coef, const cursor *a, ptrdiff_t c,
                       ptrdiff_t end, instance of) {
    of.store = BN_CACHED;
    for (; c + VL <= end; c += VL) {
        const vcoef k = coef_of_columns(coef, c, vtail(VL), 1, of.direction);
        apply_at(p, act, &k, a, c, whole_vectors(1, 0), of);
    }
    if (c < end) {
        const vcoef k = coef_of_columns(coef, c, vtail(VL), 1, of.direction); /* BN_LINE follow the last */
        apply_at(p, act, &k, a, c, part_of_vector(vtail(end - c)), of);
    }
}

/* Offset i, with addresses that compilers do not know to be sums: they would keep the sums for all lines in registers,
 * those of vectors too. */
INLINE cursor held_at(const cursor *a, ptrdiff_t i, instance of) {
    cursor b = *a;
    b.x = vaddress(a->x + i);
    b.out = (elem *)vaddress(a->out + i);
    if (of.direction == BACKWARD)
        b.dy = vaddress(a->dy + i);
    if (of.res)
        b.r = vaddress(a->r ? a->r + i : a->x + i);
    return b;
}

#define NARROW 320 /* columns: eight rows of two operands are 20 KB, which L1 holds */

/* Several rows at a time, at one distance in every operand: coefficients in memory cost more than what they are
 * applied to. With `ahead`, the next so many rows are prefetched in the order of memory, which several rows at once
 * hide from the hardware. */
INLINE void apply_some_rows(const bn_problem *p, const vact *act, const coefs *coef, const rowset *b, ptrdiff_t r,
                            int rows, int ahead, int from_end, instance of) {
    const ptrdiff_t K = p->C * p->fold, distance = p->pitch * p->fold;
    cursor a = row_of(p, b, r, of.direction);
    for (ptrdiff_t c = 0; c + LINE <= K; c += LINE) {
        const ptrdiff_t i = from_end ? K - LINE - c : c;
        vcoef k[LINE / VL];
        for (int v = 0; v < LINE / VL; v++) {
            const ptrdiff_t at = b->phase + i + v * VL;
            k[v] = coef_of_columns(coef, at < K ? at : at - K, vtail(VL), 1, of.direction);
        }
        if (ahead) {
            const cursor next = held_at(&a, rows * (K + i), of);
            const int cache = K <= NARROW ? TO_L1 : TO_L2;
            UNROLLED for (int j = 0; j < rows; j++) {
                vprefetch(next.x + j * LINE, cache);
                if (of.direction == BACKWARD)
                    vprefetch(next.dy + j * LINE, cache);
                if (of.store == BN_CACHED)
                    vprefetch(next.out + j * LINE, cache);
                if (of.res)
                    vprefetch(next.r + j * LINE, cache);
            }
        }
        for (int v = 0; v < LINE / VL; v++)
            apply_at(p, act, &k[v], &a, i + v * VL, whole_vectors(rows, distance), of);
    }
    for (int j = 0; K % LINE && j < rows; j++) {
        const cursor rest = row_of(p, b, r + j, of.direction);
        apply_part(p, act, coef, &rest, K - K % LINE, K, of);
    }
}

/* So many at a time from row r on; returns the row after them. */
INLINE ptrdiff_t apply_rows_by(const bn_problem *p, const vact *act, const coefs *coef, const rowset *b, ptrdiff_t r,
                               int rows, int ahead, int from_end, instance of) {
    for (; r + rows <= b->rows; r += rows)
        apply_some_rows(p, act, coef, b, r, rows, ahead, from_end, of);
    return r;
}

/* Packed rows in memory's order, from a line of the output on: the coefficients of so many vectors, after which the
 * channels begin again, stay in registers. Returns where whole periods end. */
INLINE ptrdiff_t apply_periods(const bn_problem *p, const coefs *coef, ptrdiff_t e0, ptrdiff_t e1, int vectors,
                               instance of) {
    const ptrdiff_t K = p->C * p->fold, period = vectors * VL, len = (e1 - e0) / period * period;
    const cursor a = cursor_at(p, 0, 0, e0, of.direction);
    const vact act = activation_of(p);
    const int share = vectors > 4 ? vectors / 2 : vectors;
    ptrdiff_t at = e0 % K;
    vcoef k[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        k[v] = coef_of_columns(coef, at, vtail(VL), 1, of.direction);
        at += at + VL < K ? VL : VL - K; /* K may be less than a period, where rows were not folded */
    }
    for (ptrdiff_t i = 0; i < len; i += period) {
#pragma GCC unroll 2
        for (int from = 0; from < vectors; from += share) {
            vf z[4], g[4];
            const batch b = whole_vectors(share, VL);
            values_at(p, &act, &k[from], 1, &a, i + from * VL, b, of, z, g);
            store_at(&a, i + from * VL, b, of, z, g);
        }
    }
    return e0 + len;
}

#define LEAST_PERIODS (8 * LINE) /* values from which on it pays to load them */

INLINE void apply_rows(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how, ptrdiff_t e0,
                       ptrdiff_t e1, instance of) {
    /* Copies: to the compiler a vector may be stored to whatever there is a pointer to, these included. */
    const bn_problem local = *problem, *const p = &local;
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const bn_pass local_pass = *how, *const pass = &local_pass;
    const ptrdiff_t K = p->C * p->fold;
    const int rotate = p->packed && K % LINE == 0;
    const elem *out = of.direction == FORWARD ? p->y.data : p->grad_input.data;
    /* vectors whose coefficients registers hold; some activations would need these */
    const int whole = of.act >= SILU ? 0 : of.direction == FORWARD ? HELD : HELD / 2;
    const vact act = activation_of(p);
    while (e0 < e1) {
        const ptrdiff_t row = e0 / K, c = e0 % K;
        ptrdiff_t misfit = 0; /* elements before the first that may begin a row */
        if (rotate)
            misfit = before_line(out + e0);
        else if (c)
            misfit = K - c;
        if (whole && !misfit && e1 - e0 >= LEAST_PERIODS && (pass->period == whole || pass->period == whole * 3 / 4)) {
            if (pass->period == whole)
                e0 = apply_periods(p, coef, e0, e1, whole, of);
            else
                e0 = apply_periods(p, coef, e0, e1, whole * 3 / 4, of);
            continue;
        }
        if (misfit || e1 - e0 < K) {
            const ptrdiff_t end = min_z(K, c + (misfit ? min_z(misfit, e1 - e0) : e1 - e0));
            const cursor a = row_cursor(p, row, of.direction);
            apply_part(p, &act, coef, &a, c, end, of);
            e0 += end - c;
            continue;
        }
        const rowset b = {p->packed ? e0 : row, (e1 - e0) / K, c};
        ptrdiff_t r = 0;
        if (of.store == BN_STREAMED) {
            if (pass->rows == 4 && LINE / VL <= 2) /* else never planned: no code for it */
                r = apply_rows_by(p, &act, coef, &b, r, 4, 1, 0, of);
        } else if (pass->rows == 4 && pass->ahead)
            r = apply_rows_by(p, &act, coef, &b, r, 4, 1, 0, of);
        else if (pass->rows == 4)
            r = apply_rows_by(p, &act, coef, &b, r, 4, 0, pass->from_end, of);
        else if (pass->rows == 2)
            r = apply_rows_by(p, &act, coef, &b, r, 2, 1, 0, of);
        r = apply_rows_by(p, &act, coef, &b, r, 1, 0, of.store == BN_CACHED && pass->from_end, of);
        e0 += r * K;
    }
}

#define APPLY_STREAMED_rows_FORWARD(act, res)  APPLY_AS(rows, FORWARD, act, res, BN_STREAMED)
#define APPLY_CACHED_rows_FORWARD(act, res)    APPLY_AS(rows, FORWARD, act, res, BN_CACHED)
#define APPLY_STREAMED_rows_BACKWARD(act, res) APPLY_AS(rows, BACKWARD, act, res, BN_STREAMED)
#define APPLY_CACHED_rows_BACKWARD(act, res)   APPLY_AS(rows, BACKWARD, act, res, BN_CACHED)
APPLY(rows, FORWARD, SPECIALIZE, forward_rows)
APPLY(rows, BACKWARD, SPECIALIZE_BACKWARD, backward_rows)
