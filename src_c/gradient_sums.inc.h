/* gradient_sums.inc.h: each tile's sums for the backward pass. */

/* g and g * (x - mean) * invstd at offset i into the sums; in frozen mode grad_input and grad_residual too. */
INLINE void sum_at(const vcoef *k, const cursor *a, ptrdiff_t i, vt t, int whole, int frozen, int act, int res,
                   vf *g_sum, vf *gx_sum) {
    vf d = vsub(whole ? vload(a->x + i) : vload_tail(a->x + i, t), k->mean);
    if (!whole)
        d = vkeep(d, t); /* 0 * d must be 0 there */
    const vf dy = vhold(whole ? vload(a->dy + i) : vload_tail(a->dy + i, t));
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
    if (PASS >= LANES)
        add_grads(p, &k, cursor_at(p, b->n, c, b->s, BACKWARD), b->runs, b->len, frozen, act, res, LANES, s, q);
    else
        for (ptrdiff_t r = 0; r < b->runs; r++)
            for (ptrdiff_t i = 0, n; i < b->len; i += n) {
                n = piece(b->len - i);
                add_grads(p, &k, cursor_at(p, b->n + r, c, b->s + i, BACKWARD), 1, n, frozen, act, res, LANES, s, q);
            }
    *g = add_vectors(s, LANES);
    *gx = add_vectors(q, LANES);
}

/* Of cols <= VL channels, from VL lanes. */
INLINE void store_sums(ptrdiff_t cols, vf *s, vf *q, double *g, double *gx) {
    float g32[VL], gx32[VL];
    add_lanes(cols, s, g32);
    add_lanes(cols, q, gx32);
    for (ptrdiff_t j = 0; j < cols; j++) {
        g[j] = g32[j];
        gx[j] = gx32[j];
    }
}

/* As short_stats does. */
INLINE void short_sums(const bn_problem *p, const bn_coef *coef, const tile *b, ptrdiff_t c0, ptrdiff_t cols,
                       int frozen, int act, int res, double *g, double *gx) {
    vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
    for (ptrdiff_t r = 0; r < b->runs; r++) {
        cursor a = cursor_at(p, b->n + r, c0, 0, BACKWARD);
        for (ptrdiff_t c = 0; c < cols; c++) {
            const vcoef k = coef_of_channel(p, coef, c0 + c, BACKWARD);
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, s);
            resume(sq + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, q);
            for (ptrdiff_t i = 0; p->stream && i < b->len; i += LINE) { /* the next run's */
                vprefetch(a.x + p->x.outer + i, TO_L2);
                vprefetch(a.dy + p->grad_output.outer + i, TO_L2);
            }
            add_grads(p, &k, a, 1, b->len, frozen, act, res, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum + c * SHORT_LANES / VL);
            keep(q, SHORT_LANES / VL, sq + c * SHORT_LANES / VL);
            next_plane(p, &a, 0, BACKWARD, res);
        }
    }
    add_kept(cols, sum);
    add_kept(cols, sq);
    for (ptrdiff_t c = 0; c < cols; c += VL)
        store_sums(min_z(VL, cols - c), sum + c, sq + c, g + c, gx + c);
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

/* n columns on. Compilers would make every address from a base and an index, and keep them all; those that are moved
 * take fewer registers. */
INLINE void move_on(cursor *a, ptrdiff_t n, int frozen, int act, int res) {
    a->x = vaddress(a->x + n);
    a->dy = vaddress(a->dy + n);
    if (res && act != BN_IDENTITY)
        a->r += n;
    if (frozen)
        a->out += n;
    if (frozen && res)
        a->gr += n;
}

/* As add_rows does. */
INLINE void sum_some_rows(const bn_problem *p, const bn_coef *coef, const cursor *a, int rows, int far, ptrdiff_t c,
                          ptrdiff_t cols, float *sum, float *sq, int frozen, int act, int res) {
    const ptrdiff_t K = p->C * p->fold;
    const vt tail = vtail(cols % VL);
    cursor here = *a, next = *a;
    ptrdiff_t i = 0;
    move_on(&here, c, frozen, act, res);
    move_on(&next, a->ahead, 0, act, 0);
    next.ahead = 0;
    for (; i + VL <= cols; i += VL) {
        const vcoef k = coef_of_columns(p, coef, c + i, tail, 1, BACKWARD);
        vf s = vload(sum + i), q = vload(sq + i);
        for (int j = 0; far && j < rows * VL; j += LINE)
            prefetch_at(&next, j, nearest(cols), BACKWARD);
        for (int r = 0; r < rows; r++)
            sum_at(&k, &here, r * K, tail, 1, frozen, act, res, &s, &q);
        vstore(sum + i, s);
        vstore(sq + i, q);
        move_on(&here, VL, frozen, act, res);
        move_on(&next, rows * VL, 0, act, 0);
    }
    if (i < cols) {
        const vcoef k = coef_of_columns(p, coef, c + i, tail, 0, BACKWARD);
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
    const cursor a = row_cursor(p, 0, BACKWARD);
    const float *const rows_of[] = {a.x + c0, a.dy + c0};
    float *const sum = clear_of(p, p->room, rows_of, coef->mean + c0, coef->scale - coef->mean, 4);
    float *const sq = sum + PANEL;
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
            SPECIALIZE_BACKWARD(p, SUMS_FROZEN_##layout);                                                              \
        } else {                                                                                                       \
            SPECIALIZE_BACKWARD(p, SUMS_TRAINING_##layout);                                                            \
        }                                                                                                              \
    }
#define SUMS_FROZEN_planes(act, res)   sum_planes(p, k, t0, t1, c0, c1, g, gx, ld, 1, act, res)
#define SUMS_TRAINING_planes(act, res) sum_planes(p, k, t0, t1, c0, c1, g, gx, ld, 0, act, res)
#define SUMS_FROZEN_rows(act, res)     sum_rows(p, k, t0, t1, c0, c1, g, gx, ld, 1, act, res)
#define SUMS_TRAINING_rows(act, res)   sum_rows(p, k, t0, t1, c0, c1, g, gx, ld, 0, act, res)
SUMS(planes, sums_planes)
SUMS(rows, sums_rows)
