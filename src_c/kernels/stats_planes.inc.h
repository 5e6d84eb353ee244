/* stats_planes.inc.h: each tile's mean and squared deviations, of planes. */

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
INLINE void add_shifted(const elem *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, vf k, ptrdiff_t ahead,
                        int prefetch, int lanes, vf *s, vf *q) {
    const ptrdiff_t rest = len % lanes, full = len - rest;
    const int pass = lanes < PASS ? lanes : PASS;
    const vt t = vtail(rest % VL);
#pragma GCC unroll 4
    for (int lane = 0; lane < lanes; lane += pass) {
        vf *const sa = s + lane / VL, *const qa = q + lane / VL;
        for (ptrdiff_t r = 0; r < runs; r++) {
            const elem *a = x + r * stride + lane;
            for (ptrdiff_t i = 0; i < full; i += lanes)
                for (int j = 0; j < pass / VL; j++) {
                    if (prefetch && j * VL % LINE == 0)
                        vprefetch(a + i + j * VL + ahead, TO_L2);
                    const vf d = vsub(xload(a + i + j * VL), k);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++) {
                if (rest <= lane + j * VL)
                    continue;
                const elem *b = a + full + j * VL;
                if (prefetch && j * VL % LINE == 0)
                    vprefetch(b + ahead, TO_L2);
                const vf d = rest >= lane + (j + 1) * VL ? vsub(xload(b), k) : vkeep(vsub(xload_tail(b, t), k), t);
                sa[j] = vadd(sa[j], d);
                qa[j] = vfma(d, d, qa[j]);
            }
        }
    }
}

/* How many of the values left of a run all passes take before they go on, in memory's order. */
INLINE ptrdiff_t piece(ptrdiff_t left) { return left < 2 * PIECE ? left : PIECE; }

/* The sums of a tile, still in VL lanes. */
INLINE void shifted_sums(const elem *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len, vf k, ptrdiff_t ahead,
                         int prefetch, int lanes, vf *sum, vf *sq) {
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < lanes / VL; j++)
        s[j] = q[j] = vset1(0);
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

/* The sums of cols <= VL channels, from VL lanes; 0 for the others. */
INLINE void add_lanes(ptrdiff_t cols, vf *s, real *sum) {
    for (ptrdiff_t j = cols; j < VL; j++)
        s[j] = vset1(0);
    vstore(sum, vsums(s));
}

static int alike(const elem *x, ptrdiff_t stride, ptrdiff_t runs, ptrdiff_t len) {
    const real first = widen(*x);
    int differ = 0;
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t i = 0; i < len; i++)
            differ |= widen(x[r * stride + i]) != first;
    return !differ;
}

/* Once more a tile whose sums were unsound, from cache: about the mean that they told, which is as good as a guess can
 * be, or where that does not help in float64. */
static void settle_again(const bn_problem *p, const tile *a, const elem *x, double *mean, double *m2) {
    const real shift = (real)*mean;
    vf s[VL], q[VL];
    real sum32[VL], sq32[VL];
    shifted_sums(x, p->x.outer, a->runs, a->len, vset1(shift), 0, 0, LANES, s, q);
    add_lanes(1, s, sum32);
    add_lanes(1, q, sq32);
    const double sum = sum32[0], sq = sq32[0];
    if (settle((double)(a->runs * a->len), PLANES_OFF, 1, &shift, &sum, &sq, mean, m2))
        exact_stats(x, p->x.outer, a->runs, a->len, mean, m2);
}

/* Of cols <= VL planes, or tiles of them of equal size, from their sums in VL lanes. */
INLINE void settle_planes(const bn_problem *p, const tile *a, const elem *const *x, ptrdiff_t cols, const real *shift,
                          vf *s, vf *q, double *mean, double *m2) {
    const double n = (double)(a->runs * a->len);
    real sum32[VL], sq32[VL];
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
        v[i] = begun ? kept[i] : vset1(0);
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
INLINE void short_stats(const bn_problem *p, const tile *a, const elem *x, ptrdiff_t cols, const ptrdiff_t *sample,
                        double *mean, double *m2) {
    const ptrdiff_t inner = p->x.inner, outer = p->x.outer;
    const elem *plane[SHORT_BLOCK];
    real shift[SHORT_BLOCK];
    vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
    for (ptrdiff_t c = 0; c < cols; c++) {
        plane[c] = x + c * inner;
        shift[c] = plane_shift(plane[c], sample, a->runs * a->len <= SMALL_TILE);
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

/* cols <= VL channels, one after the other. */
INLINE void some_stats(const bn_problem *p, const tile *a, const elem *x, ptrdiff_t cols, const ptrdiff_t *sample,
                       ptrdiff_t ahead, double *mean, double *m2) {
    const elem *plane[VL];
    real shift[VL];
    vf s[VL], q[VL];
    for (ptrdiff_t j = 0; j < cols; j++) {
        plane[j] = x + j * p->x.inner;
        shift[j] = plane_shift(plane[j], sample, a->runs * a->len <= SMALL_TILE);
        const vf mid = vset1(shift[j]);
        if (p->S <= BN_SHORT_PLANE)
            shifted_sums(plane[j], p->x.outer, a->runs, a->len, mid, 0, 0, SHORT_LANES, &s[j], &q[j]);
        else if (ahead)
            shifted_sums(plane[j], p->x.outer, a->runs, a->len, mid, ahead, 1, LANES, &s[j], &q[j]);
        else
            shifted_sums(plane[j], p->x.outer, a->runs, a->len, mid, 0, 0, LANES, &s[j], &q[j]);
    }
    settle_planes(p, a, plane, cols, shift, s, q, mean, m2);
}

static void stats_planes(const bn_problem *p, const bn_pass *how, const bn_tiles *to) {
    const ptrdiff_t step = how->by_batch ? SHORT_BLOCK : VL;
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        const tile a = plane_tile(p, t);
        ptrdiff_t sample[SAMPLES];
        samples(p, &a, sample);
        for (ptrdiff_t c = to->c0; c < to->c1; c += step) {
            const ptrdiff_t cols = min_z(step, to->c1 - c), at = (t - to->t0) * to->ld + (c - to->c0);
            const elem *x = AT(p->x, a.n, c, a.s);
            if (how->by_batch)
                short_stats(p, &a, x, cols, sample, to->a + at, to->b + at);
            else
                some_stats(p, &a, x, cols, sample, how->ahead, to->a + at, to->b + at);
        }
    }
}
