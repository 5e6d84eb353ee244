/* apply.inc.h: what the passes make of a few vectors, forward and backward, from their coefficients. */

enum { FORWARD, BACKWARD };

/* The constants of an instance. */
typedef struct {
    int direction, act, res, store;
} instance;

/* One channel's coefficients in all lanes (planes), or those of VL channels that follow one another (rows). */
typedef struct {
    vf mean, scale, shift; /* what a direction does not use, the compiler drops */
    vf invstd, g_mean, g_proj, g_shift;
} vcoef;

/* Where a run of values lies in each operand. */
typedef struct {
    const elem *x, *r, *dy;
    elem *out, *gr;  /* gr: NULL where grad_residual is not asked for, */
    ptrdiff_t ahead; /* from x and dy to what is prefetched; 0: nothing is */
} cursor;

#define AT(o, outer_, inner_, i)                                                                                       \
    ((o).data ? (elem *)(o).data + (outer_) * (o).outer + (inner_) * (o).inner + (i) : NULL)

INLINE cursor cursor_at(const bn_problem *p, ptrdiff_t outer, ptrdiff_t inner, ptrdiff_t i, int direction) {
    cursor a;
    a.x = AT(p->x, outer, inner, i);
    a.r = AT(p->residual, outer, inner, i);
    a.dy = direction == BACKWARD ? AT(p->grad_output, outer, inner, i) : NULL;
    a.gr = direction == BACKWARD ? AT(p->grad_residual, outer, inner, i) : NULL;
    a.out = direction == BACKWARD ? AT(p->grad_input, outer, inner, i) : AT(p->y, outer, inner, i);
    a.ahead = 0;
    return a;
}

/* n values on, in all operands that an instance looks at. */
INLINE void move(cursor *a, ptrdiff_t x, ptrdiff_t r, ptrdiff_t dy, ptrdiff_t out, ptrdiff_t gr, instance of) {
    a->x += x;
    if (of.res && a->r)
        a->r += r;
    if (of.direction == BACKWARD)
        a->dy += dy;
    if (a->out)
        a->out += out;
    if (of.direction == BACKWARD && of.res && a->gr)
        a->gr += gr;
}

INLINE vcoef coef_of_channel(const coefs *k, ptrdiff_t c, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0);
    const vcoef v = {
        vset1(k->mean[c]),
        vset1(k->scale[c]),
        vset1(k->shift[c]),
        b ? vset1(k->invstd[c]) : none,
        b ? vset1(k->g_mean[c]) : none,
        b ? vset1(k->g_proj[c]) : none,
        b ? vset1(k->g_shift[c]) : none,
    };
    return v;
}

INLINE vf of_columns(const real *v, vt t, int whole) { return whole ? vload(v) : vload_tail(v, t); }

/* Of t alone unless a whole vector is meant, because the others may be another thread's, and being written. */
INLINE vcoef coef_of_columns(const coefs *k, ptrdiff_t c, vt t, int whole, int direction) {
    const int b = direction == BACKWARD;
    const vf none = vset1(0);
    const vcoef v = {
        of_columns(k->mean + c, t, whole),
        of_columns(k->scale + c, t, whole),
        of_columns(k->shift + c, t, whole),
        b ? of_columns(k->invstd + c, t, whole) : none,
        b ? of_columns(k->g_mean + c, t, whole) : none,
        b ? of_columns(k->g_proj + c, t, whole) : none,
        b ? of_columns(k->g_shift + c, t, whole) : none,
    };
    return v;
}

INLINE vcoef join_coef(const vcoef *a, const vcoef *b, vt t) {
    const vcoef v = {
        vjoin(a->mean, b->mean, t),       vjoin(a->scale, b->scale, t),   vjoin(a->shift, b->shift, t),
        vjoin(a->invstd, b->invstd, t),   vjoin(a->g_mean, b->g_mean, t), vjoin(a->g_proj, b->g_proj, t),
        vjoin(a->g_shift, b->g_shift, t),
    };
    return v;
}

INLINE vf element_at(const elem *p, vt t, int whole) { return whole ? xload(p) : xload_tail(p, t); }

/* z of d = x - mean, before the activation: with one expression in all passes, which then agree on which side of 0 it
 * lies; or the forward call's y, which lies on the same side. */
INLINE vf z_at(const bn_problem *p, const vcoef *k, const cursor *a, ptrdiff_t i, vf d, vt t, int whole, instance of) {
    if (of.res && of.direction == BACKWARD && p->from_output)
        return element_at(a->r + i, t, whole);
    const vf z = vfma(d, k->scale, k->shift);
    return of.res == 1 || (of.res && a->r) ? vadd(z, element_at(a->r + i, t, whole)) : z;
}

/* n <= 4 vectors, or the lanes of t of one. `whole` is a constant; where it is 1, t is not looked at. */
typedef struct {
    int n, whole;
    vt t;
    ptrdiff_t distance; /* from one to the next */
} batch;

INLINE batch whole_vectors(int n, ptrdiff_t distance) {
    const batch b = {n, 1, vtail(VL), distance};
    return b;
}

INLINE batch part_of_vector(vt t) {
    const batch b = {1, 0, t, 0};
    return b;
}

/* What the elementwise work makes of a batch at offset i, with the coefficients k[j * step], and the gradient g. */
INLINE void values_at(const bn_problem *p, const vact *act, const vcoef *k, int step, const cursor *a, ptrdiff_t i,
                      batch b, instance of, vf *v, vf *g) {
    vf d[4];
    const int at_once = of.act >= SILU ? b.n : 1; /* one after the other takes fewer registers */
    UNROLLED for (int first = 0; first < b.n; first += at_once) {
        UNROLLED for (int j = first; j < first + at_once; j++) {
            const ptrdiff_t at = i + j * b.distance;
            d[j] = vsub(element_at(a->x + at, b.t, b.whole), k[j * step].mean);
            if (of.direction == FORWARD || of.act != PLAIN)
                v[j] = z_at(p, &k[j * step], a, at, d[j], b.t, b.whole, of);
            if (of.direction == BACKWARD)
                g[j] = element_at(a->dy + at, b.t, b.whole);
        }
        if (of.direction == FORWARD) {
            activate(p, act, of.act, at_once, v + first);
            continue;
        }
        pass_gradient(p, act, of.act, at_once, v + first, g + first);
        UNROLLED for (int j = first; j < first + at_once; j++) {
            const vcoef *c = &k[j * step];
            if (of.act == ANY && p->fixed)
                v[j] = vmul(g[j], c->scale);
            else
                v[j] = vfma(vfma(d[j], c->g_proj, vsub(g[j], c->g_mean)), c->scale, c->g_shift);
        }
    }
}

INLINE void store_at(const cursor *a, ptrdiff_t i, batch b, instance of, const vf *v, const vf *g) {
    UNROLLED for (int j = 0; j < b.n; j++) {
        elem *const to = a->out + i + j * b.distance;
        if (!b.whole)
            xstore_tail(to, v[j], b.t);
        else if (of.store == BN_STREAMED)
            xstream(to, v[j]);
        else
            xstore(to, v[j]);
    }
    if (of.direction == BACKWARD && of.res && a->gr)
        UNROLLED for (int j = 0; j < b.n; j++) {
            elem *const to = a->gr + i + j * b.distance;
            if (b.whole)
                xstore(to, g[j]);
            else
                xstore_tail(to, g[j], b.t);
        }
}

/* All are loaded before any is stored: a load waits for a store before it to an address with the same low 12 bits, such
 * as the same column of another row, or what allocators give for an output of the same size, a line above the input. */
INLINE void apply_at(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i, batch b,
                     instance of) {
    vf v[4], g[4];
    values_at(p, act, k, 0, a, i, b, of, v, g);
    store_at(a, i, b, of, v, g);
}

/* g and g * (x - mean) * invstd of a batch at offset i, into as many sums of each. */
INLINE void sum_at(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i, batch b,
                   instance of, vf *g_sum, vf *gx_sum) {
    vf d[4], z[4], g[4];
    UNROLLED for (int j = 0; j < b.n; j++) {
        const ptrdiff_t at = i + j * b.distance;
        d[j] = vsub(element_at(a->x + at, b.t, b.whole), k->mean);
        if (!b.whole)
            d[j] = vkeep(d[j], b.t); /* 0 * d must be 0 there */
        g[j] = vhold(element_at(a->dy + at, b.t, b.whole));
        if (of.act != PLAIN)
            z[j] = z_at(p, k, a, at, d[j], b.t, b.whole, of);
    }
    pass_gradient(p, act, of.act, b.n, z, g);
    UNROLLED for (int j = 0; j < b.n; j++) {
        g_sum[j] = vadd(g_sum[j], g[j]);
        gx_sum[j] = vfma(g[j], vmul(d[j], k->invstd), gx_sum[j]);
    }
}

/* What lies `ahead` of offset i. It lets reads go on while streaming stores drain. */
INLINE void prefetch_at(const cursor *a, ptrdiff_t i, int cache, int direction) {
    vprefetch(a->x + i + a->ahead, cache);
    if (direction == BACKWARD)
        vprefetch(a->dy + i + a->ahead, cache);
}

/* How many values there are before a line of the output begins. */
INLINE ptrdiff_t before_line(const elem *out) {
    return (ptrdiff_t)((0 - (uintptr_t)out / sizeof(elem)) % (uintptr_t)LINE);
}

/* Defines a kernel of `direction` from an inline function, streamed and not. */
#define APPLY(layout, direction, specialize, name)                                                                     \
    static void name(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {          \
        if (STREAMS && how->store == BN_STREAMED) {                                                                    \
            specialize(p, APPLY_STREAMED_##layout##_##direction);                                                      \
            vfence();                                                                                                  \
        } else {                                                                                                       \
            specialize(p, APPLY_CACHED_##layout##_##direction);                                                        \
        }                                                                                                              \
    }
#define APPLY_AS(layout, direction, act, res, store)                                                                   \
    apply_##layout(p, k, how, e0, e1, (instance){direction, act, res, store})
#define SUMS_AS(layout, act, res) sum_##layout(p, k, how, to, (instance){BACKWARD, act, res, BN_CACHED})
