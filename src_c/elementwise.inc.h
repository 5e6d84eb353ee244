/* elementwise.inc.h: the forward and the backward pass over elements, from each channel's coefficients. */

/* One channel's coefficients in all lanes (planes), or those of VL channels that follow one another (rows). */
typedef struct {
    vf mean, scale, shift, slope, limit; /* what a direction does not use, the compiler drops */
    vf invstd, g_mean, g_proj, g_shift;
} vcoef;

/* Where a run of values lies in each operand. */
typedef struct {
    const float *x, *r, *dy;
    float *out, *gr;
    ptrdiff_t ahead; /* from x and dy to what will be read next; 0: unknown */
} cursor;

enum { FORWARD, BACKWARD };

/* Where y is cut from above: a NaN, which nothing is above, if it is not. */
INLINE float limit_of(const bn_problem *p) { return p->activation == BN_RELU6 ? 6.0f : NAN; }

INLINE vcoef coef_of_channel(const bn_problem *p, const bn_coef *k, ptrdiff_t c, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0.0f);
    const vcoef v = {
        vset1(k->mean[c]),
        vset1(k->scale[c]),
        vset1(k->shift[c]),
        vset1(p->negative_slope),
        vset1(limit_of(p)),
        b ? vset1(k->invstd[c]) : none,
        b ? vset1(k->g_mean[c]) : none,
        b ? vset1(k->g_proj[c]) : none,
        b ? vset1(k->g_shift[c]) : none,
    };
    return v;
}

INLINE vf of_columns(const float *v, vt t, int whole) { return whole ? vload(v) : vload_tail(v, t); }

/* Of t alone unless a whole vector is meant, because the others may be another thread's, and being written. */
INLINE vcoef coef_of_columns(const bn_problem *p, const bn_coef *k, ptrdiff_t c, vt t, int whole, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0.0f);
    const vcoef v = {
        of_columns(k->mean + c, t, whole),
        of_columns(k->scale + c, t, whole),
        of_columns(k->shift + c, t, whole),
        vset1(p->negative_slope),
        vset1(limit_of(p)),
        b ? of_columns(k->invstd + c, t, whole) : none,
        b ? of_columns(k->g_mean + c, t, whole) : none,
        b ? of_columns(k->g_proj + c, t, whole) : none,
        b ? of_columns(k->g_shift + c, t, whole) : none,
    };
    return v;
}

/* g from y, which is on the same side of 0 and 6 as z is: of any activation that is cut there. Of LeakyReLU alone is
 * the slope not 0; in place of a product with 0, +0. */
INLINE vf grad_by_output(const vcoef *k, vf dy, vf y) {
    const vf zero = vset1(0.0f);
    const vf below = vselect(vle(k->slope, zero), zero, vmul(dy, k->slope));
    return vselect(vle(y, zero), below, vselect(vle(k->limit, y), zero, dy));
}

/* g from d = x - mean; with the expression of the forward pass, so that both agree on which side of 0 z lies. */
INLINE vf masked_grad(const vcoef *k, vf d, vf r, vf dy, int act, int res) {
    if (act == BN_IDENTITY)
        return dy;
    if (act == BY_OUTPUT)
        return grad_by_output(k, dy, r);
    const vf z = vfma(d, k->scale, k->shift);
    return activate_backward(dy, res ? vadd(z, r) : z, act, k->slope);
}

/* What the elementwise work makes of the lanes of t at offset i, and g where that is grad_residual. Where a whole
 * vector is meant, `whole` is a constant 1 and t is not looked at. */
INLINE vf value_at(const vcoef *k, const cursor *a, ptrdiff_t i, vt t, int whole, int direction, int act, int res,
                   vf *g) {
    const vf d = vsub(whole ? vload(a->x + i) : vload_tail(a->x + i, t), k->mean);
    vf r = d;
    *g = d; /* forward has none */
    if (res && (direction == FORWARD || act != BN_IDENTITY))
        r = whole ? vload(a->r + i) : vload_tail(a->r + i, t);
    if (direction == FORWARD) {
        const vf z = vfma(d, k->scale, k->shift);
        return activate(res ? vadd(z, r) : z, act, k->slope);
    }
    const vf dy = whole ? vload(a->dy + i) : vload_tail(a->dy + i, t);
    *g = masked_grad(k, d, r, dy, act, res);
    return vfma(vfma(d, k->g_proj, vsub(*g, k->g_mean)), k->scale, k->g_shift);
}

INLINE void store_at(const cursor *a, ptrdiff_t i, vt t, int whole, int direction, int res, int stream, vf v, vf g) {
    if (direction == BACKWARD && res) {
        if (whole)
            vstore(a->gr + i, g);
        else
            vstore_tail(a->gr + i, g, t);
    }
    if (!whole)
        vstore_tail(a->out + i, v, t);
    else if (stream)
        vstream(a->out + i, v);
    else
        vstore(a->out + i, v);
}

INLINE void work_at(const vcoef *k, const cursor *a, ptrdiff_t i, vt t, int whole, int direction, int act, int res,
                    int stream) {
    vf g;
    const vf v = value_at(k, a, i, t, whole, direction, act, res, &g);
    store_at(a, i, t, whole, direction, res, stream, v, g);
}

/* n <= 4 whole vectors, so many values apart. All are loaded before any is stored: a load waits for a store before it
 * to an address with the same low 12 bits, such as the same column of another row, or what allocators give for an
 * output of the same size, a line above the input. */
INLINE void work_vectors(const vcoef *k, const cursor *a, ptrdiff_t i, ptrdiff_t distance, int n, int direction,
                         int act, int res, int stream) {
    vf v[4], g[4];
    for (int j = 0; j < n; j++)
        v[j] = value_at(k, a, i + j * distance, vtail(VL), 1, direction, act, res, &g[j]);
    for (int j = 0; j < n; j++)
        store_at(a, i + j * distance, vtail(VL), 1, direction, res, stream, v[j], g[j]);
}

#define LONG_RUN 128 /* values from which on a run is worth being aligned */

/* What lies `ahead` of offset i. It lets reads go on while streaming stores drain. */
INLINE void prefetch_at(const cursor *a, ptrdiff_t i, int cache, int direction) {
    vprefetch(a->x + i + a->ahead, cache);
    if (direction == BACKWARD)
        vprefetch(a->dy + i + a->ahead, cache);
}

/* Whether rows that are gone through several at a time, over so many columns, prefetch the next so many: in the order
 * of memory, which several rows at once hide from the hardware. */
INLINE int far_rows(const bn_problem *p, ptrdiff_t cols) { return p->N * p->S * p->C >= FAR && cols == p->C * p->fold; }

/* Whether half as many go at a time, nearer to memory's order: with AVX-512, where two rows of all operands take no
 * more than half of L1. Rows that are not far, and do not prefetch, only where four of them take more. */
INLINE int half_as_many(ptrdiff_t cols, int operands, int far) {
    return VL == LINE && cols * operands <= 2 * WIDE && (far || cols * operands > WIDE);
}

/* To where: L1 holds several rows of two operands, if they are narrow. */
INLINE int nearest(ptrdiff_t cols) { return cols <= NARROW ? TO_L1 : TO_L2; }

/* Values [i, end) with the same coefficients, through the cache. */
INLINE void work_few(const vcoef *k, const cursor *a, ptrdiff_t i, ptrdiff_t end, int direction, int act, int res) {
    for (; i + VL <= end; i += VL)
        work_at(k, a, i, vtail(VL), 1, direction, act, res, 0);
    if (i < end)
        work_at(k, a, i, vtail(end - i), 0, direction, act, res, 0);
}

/* The same with whole lines streamed, if that is asked for: then one begins at i. */
INLINE void work_lines(const vcoef *k, const cursor *a, ptrdiff_t i, ptrdiff_t end, int direction, int act, int res,
                       int stream) {
    for (; i + LINE <= end; i += LINE)
        for (int j = 0; j < LINE; j += VL)
            work_at(k, a, i + j, vtail(VL), 1, direction, act, res, stream);
    work_few(k, a, i, end, direction, act, res);
}

/* How many values there are before a line of the output begins. */
INLINE ptrdiff_t before_line(const float *out) { return (ptrdiff_t)((0 - (uintptr_t)out / sizeof(float)) % LINE); }

/* len values with the same coefficients. Streaming stores write whole lines; what is before the first and after the
 * last goes through the cache. */
INLINE void work_run(const vcoef *k, const cursor *a, ptrdiff_t len, int direction, int act, int res, int stream) {
    ptrdiff_t i = 0;
    if (stream || len >= LONG_RUN) {
        i = min_z(len, before_line(a->out));
        work_few(k, a, 0, i, direction, act, res);
    }
    for (; i + 4 * VL <= len; i += 4 * VL)
        work_vectors(k, a, i, VL, 4, direction, act, res, stream);
    work_lines(k, a, i, len, direction, act, res, stream);
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
        vjoin(a->mean, b->mean, t),
        vjoin(a->scale, b->scale, t),
        vjoin(a->shift, b->shift, t),
        a->slope,
        a->limit,
        vjoin(a->invstd, b->invstd, t),
        vjoin(a->g_mean, b->g_mean, t),
        vjoin(a->g_proj, b->g_proj, t),
        vjoin(a->g_shift, b->g_shift, t),
    };
    return v;
}

/* Short planes that follow one another, from offset s of channel c on: vectors keep to those of the output, across
 * planes, with the coefficients of both where they lie in two. Masked stores, one a plane, would take as long as all
 * the rest, and streamed planes would share lines. */
INLINE void work_short_planes(const bn_problem *p, const bn_coef *coef, const cursor *a, ptrdiff_t c, ptrdiff_t s,
                              ptrdiff_t len, int direction, int act, int res, int stream) {
    const vt all = vtail(VL);
    ptrdiff_t i = 0, end = p->S - s;                    /* of channel c */
    ptrdiff_t n = min_z(len, before_line(a->out) % VL); /* before the first vector */
    vcoef k = coef_of_channel(p, coef, c, direction);
    for (;;) {
        if (n == 0) {
            for (; !stream && i + 2 * VL <= min_z(end, len); i += 2 * VL)
                work_vectors(&k, a, i, VL, 2, direction, act, res, 0);
            for (; i + VL <= min_z(end, len); i += VL) {
                if (stream)
                    prefetch_at(a, i, TO_L2, direction);
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
        const vcoef k = coef_of_columns(p, coef, c, vtail(VL), 1, direction);
        work_at(&k, a, c, vtail(VL), 1, direction, act, res, 0);
    }
    if (c < end) {
        const vcoef k = coef_of_columns(p, coef, c, vtail(VL), 1, direction); /* LINE follow the last */
        work_at(&k, a, c, vtail(end - c), 0, direction, act, res, 0);
    }
}

/* What lies `ahead` of offset i, with addresses that compilers do not know to be sums: they would keep the sums for all
 * lines in registers, those of vectors too. */
INLINE cursor held_ahead(const cursor *a, ptrdiff_t i, int direction, int res) {
    cursor b = *a;
    b.x = vaddress(a->x + a->ahead + i);
    b.out = (float *)vaddress(a->out + a->ahead + i);
    if (direction == BACKWARD)
        b.dy = vaddress(a->dy + a->ahead + i);
    if (res)
        b.r = vaddress(a->r + a->ahead + i);
    b.ahead = 0;
    return b;
}

#define PAGE ((ptrdiff_t)4096) /* bytes: addresses whole pages apart are alike to a load that comes after a store */

/* How far `out` is above `in` in the low 12 bits of their addresses, less one. */
INLINE ptrdiff_t above(const float *out, const float *in) {
    return (ptrdiff_t)((uintptr_t)out - (uintptr_t)in - 1) & (PAGE - 1);
}

/* Whether to go through rows of whole pages from their end, because the output is nearer above an input than below one:
 * there a load would wait for what was stored to the column before, as in work_vectors, and for long, because rows at
 * such distances fall into the same sets of L1. From beyond L2 nothing is as fast as memory's order. */
INLINE int from_the_end(const cursor *a, int direction, int res) {
    ptrdiff_t up = above(a->out, a->x), down = above(a->x, a->out);
    if (direction == BACKWARD) {
        up = min_z(up, above(a->out, a->dy));
        down = min_z(down, above(a->dy, a->out));
    }
    if (res) {
        up = min_z(up, above(a->out, a->r));
        down = min_z(down, above(a->r, a->out));
    }
    return up < down;
}

/* Several rows at a time, at one distance in every operand: coefficients in memory cost more than what they are
 * applied to. */
INLINE void work_some_rows(const bn_problem *p, const bn_coef *coef, const rowset *b, ptrdiff_t r, int rows, int far,
                           int direction, int act, int res, int stream) {
    const ptrdiff_t K = p->C * p->fold, distance = p->pitch * p->fold;
    cursor a = row_of(p, b, r, direction);
    a.ahead = rows > 1 ? rows * K : STREAM_AHEAD;
    const int pages = p->pitch && K % LINE == 0 && distance * (ptrdiff_t)sizeof(float) % PAGE == 0;
    const int reverse = !far && !stream && pages && from_the_end(&a, direction, res);
    for (ptrdiff_t i = 0; i + LINE <= K; i += LINE) {
        const ptrdiff_t c = reverse ? K - LINE - i : i;
        vcoef k[LINE / VL];
        for (int v = 0; v < LINE / VL; v++) {
            const ptrdiff_t at = b->phase + c + v * VL;
            k[v] = coef_of_columns(p, coef, at < K ? at : at - K, vtail(VL), 1, direction);
        }
        if (VL == LINE && rows == 1 && stream && !res)
            prefetch_at(&a, c, TO_L2, direction);
        if (far) {
            const cursor next = held_ahead(&a, rows * c, direction, res);
            for (int j = 0; j < rows * LINE; j += LINE) {
                prefetch_at(&next, j, nearest(K), direction);
                if (!stream)
                    vprefetch(next.out + j, nearest(K));
                if (res)
                    vprefetch(next.r + j, nearest(K));
            }
        }
        for (int v = 0; v < LINE / VL; v++)
            work_vectors(&k[v], &a, c + v * VL, distance, rows, direction, act, res, stream);
    }
    for (int j = 0; K % LINE && j < rows; j++) {
        const cursor rest = row_of(p, b, r + j, direction);
        work_part(p, coef, &rest, K - K % LINE, K, direction, act, res);
    }
}

/* So many at a time from row r on; returns the row after them. */
INLINE ptrdiff_t work_rows_by(const bn_problem *p, const bn_coef *coef, const rowset *b, ptrdiff_t r, int rows, int far,
                              int direction, int act, int res, int stream) {
    for (; r + rows <= b->rows; r += rows)
        work_some_rows(p, coef, b, r, rows, far, direction, act, res, stream);
    return r;
}

/* Packed rows in memory's order, from a line of the output on: the coefficients of so many vectors, after which the
 * channels begin again, stay in registers. Returns where whole periods end. */
INLINE ptrdiff_t work_periods(const bn_problem *p, const bn_coef *coef, ptrdiff_t e0, ptrdiff_t e1, int vectors,
                              int direction, int act, int res) {
    const ptrdiff_t K = p->C * p->fold, period = vectors * VL, len = (e1 - e0) / period * period;
    cursor a = cursor_at(p, 0, 0, e0, direction);
    const int stream = p->stream, part = vectors > 4 ? vectors / 2 : vectors;
    a.ahead = STREAM_AHEAD;
    ptrdiff_t at = e0 % K;
    vcoef k[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        k[v] = coef_of_columns(p, coef, at, vtail(VL), 1, direction);
        at += at + VL < K ? VL : VL - K; /* K may be less than a period, where rows were not folded */
    }
    for (ptrdiff_t i = 0; i < len; i += period) {
        for (int v = 0; !res && stream && v < vectors; v++)
            prefetch_at(&a, i + v * VL, TO_L2, direction);
#pragma GCC unroll 2
        for (int from = 0; from < vectors; from += part) {
            vf z[4], g[4];
#pragma GCC unroll 4
            for (int v = 0; v < part; v++) /* all loads before the stores, as in work_vectors */
                z[v] = value_at(&k[from + v], &a, i + (from + v) * VL, vtail(VL), 1, direction, act, res, &g[v]);
            if (stream)
#pragma GCC unroll 4
                for (int v = 0; v < part; v++)
                    store_at(&a, i + (from + v) * VL, vtail(VL), 1, direction, res, 1, z[v], g[v]);
            else
#pragma GCC unroll 4
                for (int v = 0; v < part; v++)
                    store_at(&a, i + (from + v) * VL, vtail(VL), 1, direction, res, 0, z[v], g[v]);
        }
    }
    return e0 + len;
}

#define PERIOD (8 * LINE) /* values after which few channels begin again, at most */

/* After how many vectors channels begin again whose coefficients 32 registers hold; 0: there are too many. */
INLINE int period_of(const bn_problem *p, int direction) {
    const int most = direction == FORWARD ? 8 : 4;
    return VL < LINE ? 0 : most * LINE % p->C == 0 ? most : most * 3 / 4 * LINE % p->C == 0 ? most * 3 / 4 : 0;
}

#define FORWARD_8(act, res)  return work_periods(p, k, e0, e1, 8, FORWARD, act, res)
#define FORWARD_6(act, res)  return work_periods(p, k, e0, e1, 6, FORWARD, act, res)
#define BACKWARD_4(act, res) return work_periods(p, k, e0, e1, 4, BACKWARD, act, res)
#define BACKWARD_3(act, res) return work_periods(p, k, e0, e1, 3, BACKWARD, act, res)
static ptrdiff_t work_few_channels(const bn_problem *p, const bn_coef *k, ptrdiff_t e0, ptrdiff_t e1, int vectors) {
    switch (vectors) {
    case 8: SPECIALIZE(p, FORWARD_8);
    case 6: SPECIALIZE(p, FORWARD_6);
    case 4: SPECIALIZE_BACKWARD(p, BACKWARD_4);
    default: SPECIALIZE_BACKWARD(p, BACKWARD_3);
    }
}

/* Whether rows of K columns are streamed several at a time, with what comes next prefetched in memory's order. The
 * hardware does that better for one row after the other, but not by as much as coefficients cost that crowd L1, or
 * those of the backward pass where x and dy come from the cache. More than two stores a line would not be combined. */
INLINE int several_streamed(const bn_problem *p, ptrdiff_t K, int direction) {
    const int costly = K >= WIDE || (direction == BACKWARD && p->stream == 1);
    return p->packed && K % LINE == 0 && LINE / VL <= 2 && costly;
}

INLINE void work_rows(const bn_problem *problem, const bn_coef *coefficients, ptrdiff_t e0, ptrdiff_t e1, int direction,
                      int act, int res, int stream) {
    /* Copies: to the compiler a vector may be stored to whatever there is a pointer to, these included. */
    const bn_problem local = *problem, *const p = &local;
    const bn_coef local_coef = *coefficients, *const coef = &local_coef;
    const ptrdiff_t K = p->C * p->fold;
    const int rotate = p->packed && K % LINE == 0, operands = (direction == FORWARD ? 2 : 3) + res;
    const float *out = direction == FORWARD ? p->y.data : p->grad_input.data;
    while (e0 < e1) {
        const ptrdiff_t row = e0 / K, c = e0 % K;
        ptrdiff_t misfit = 0; /* elements before the first that may begin a row */
        if (rotate)
            misfit = before_line(out + e0);
        else if (c)
            misfit = K - c;
        if (rotate && !misfit && e1 - e0 >= PERIOD && period_of(p, direction)) {
            e0 = work_few_channels(problem, coefficients, e0, e1, period_of(p, direction));
            continue;
        }
        if (misfit || e1 - e0 < K) {
            const ptrdiff_t end = min_z(K, c + (misfit ? min_z(misfit, e1 - e0) : e1 - e0));
            const cursor a = row_cursor(p, row, direction);
            work_part(p, coef, &a, c, end, direction, act, res);
            e0 += end - c;
            continue;
        }
        const rowset b = {p->packed ? e0 : row, (e1 - e0) / K, c};
        const int far = p->packed && far_rows(p, K), half = half_as_many(K, operands, far);
        ptrdiff_t r = 0;
        if (stream && several_streamed(p, K, direction)) /* asks for rotate too: no code for a remainder */
            r = work_rows_by(p, coef, &b, r, WORK_ROWS, 1, direction, act, res, 1);
        else if (p->pitch && !stream && far && half)
            r = work_rows_by(p, coef, &b, r, WORK_ROWS / 2, 1, direction, act, res, 0);
        else if (p->pitch && !stream && far)
            r = work_rows_by(p, coef, &b, r, WORK_ROWS, 1, direction, act, res, 0);
        else if (p->pitch && !stream && half)
            r = work_rows_by(p, coef, &b, r, WORK_ROWS / 2, 0, direction, act, res, 0);
        else if (p->pitch && !stream)
            r = work_rows_by(p, coef, &b, r, WORK_ROWS, 0, direction, act, res, 0);
        if (stream && rotate)
            r = work_rows_by(p, coef, &b, r, 1, 0, direction, act, res, 1);
        else
            r = work_rows_by(p, coef, &b, r, 1, 0, direction, act, res, 0);
        e0 += r * K;
    }
}

#define WORK(layout, direction, name)                                                                                  \
    static void name(const bn_problem *p, const bn_coef *k, ptrdiff_t e0, ptrdiff_t e1, ptrdiff_t ahead) {             \
        if (p->stream) {                                                                                               \
            SPECIALIZE_##direction(p, WORK_STREAM_##layout##_##direction);                                             \
            vfence();                                                                                                  \
        } else {                                                                                                       \
            SPECIALIZE_##direction(p, WORK_CACHED_##layout##_##direction);                                             \
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
