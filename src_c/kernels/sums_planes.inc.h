/* sums_planes.inc.h: each tile's sums for the backward pass, of planes. */

/* As add_shifted does, from a cursor that it may move. */
INLINE void add_grads(const bn_problem *p, const vact *act, const vcoef *k, cursor from, ptrdiff_t runs, ptrdiff_t len,
                      instance of, int lanes, vf *g, vf *gx) {
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
                if (of.act == ANY) /* looked up once for all */
                    sum_at(p, act, k, &a, i, whole_vectors(pass / VL, VL), of, ga, gxa);
                else
                    for (int j = 0; j < pass / VL; j++)
                        sum_at(p, act, k, &a, i + j * VL, whole_vectors(1, 0), of, &ga[j], &gxa[j]);
            for (int j = 0; j < pass / VL; j++) {
                if (rest <= lane + j * VL)
                    continue;
                const ptrdiff_t i = full + lane + j * VL;
                if (rest >= lane + (j + 1) * VL)
                    sum_at(p, act, k, &a, i, whole_vectors(1, 0), of, &ga[j], &gxa[j]);
                else
                    sum_at(p, act, k, &a, i, part_of_vector(t), of, &ga[j], &gxa[j]);
            }
            move(&a, p->x.outer, p->residual.outer, p->grad_output.outer, 0, 0, of);
        }
        for (int j = 0; j < pass / VL; j++) {
            g[lane / VL + j] = ga[j];
            gx[lane / VL + j] = gxa[j];
        }
    }
}

/* The sums of one channel's tile, still in VL lanes. */
INLINE void sum_plane(const bn_problem *p, const vact *act, const coefs *coef, const tile *b, ptrdiff_t c, instance of,
                      vf *g, vf *gx) {
    const vcoef k = coef_of_channel(coef, c, BACKWARD);
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < LANES / VL; j++)
        s[j] = q[j] = vset1(0);
    if (PASS >= LANES)
        add_grads(p, act, &k, cursor_at(p, b->n, c, b->s, BACKWARD), b->runs, b->len, of, LANES, s, q);
    else
        for (ptrdiff_t r = 0; r < b->runs; r++)
            for (ptrdiff_t i = 0, n; i < b->len; i += n) {
                n = piece(b->len - i);
                add_grads(p, act, &k, cursor_at(p, b->n + r, c, b->s + i, BACKWARD), 1, n, of, LANES, s, q);
            }
    *g = add_vectors(s, LANES);
    *gx = add_vectors(q, LANES);
}

/* Of cols <= VL channels, from VL lanes. */
INLINE void store_sums(ptrdiff_t cols, vf *s, vf *q, double *g, double *gx) {
    real g32[VL], gx32[VL];
    add_lanes(cols, s, g32);
    add_lanes(cols, q, gx32);
    for (ptrdiff_t j = 0; j < cols; j++) {
        g[j] = g32[j];
        gx[j] = gx32[j];
    }
}

/* As short_stats does; the next sample's run is prefetched if there is something `ahead`. */
INLINE void short_sums(const bn_problem *p, const vact *act, const coefs *coef, const tile *b, ptrdiff_t c0,
                       ptrdiff_t cols, int ahead, instance of, double *g, double *gx) {
    vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
    for (ptrdiff_t r = 0; r < b->runs; r++) {
        cursor a = cursor_at(p, b->n + r, c0, 0, BACKWARD);
        for (ptrdiff_t c = 0; c < cols; c++) {
            const vcoef k = coef_of_channel(coef, c0 + c, BACKWARD);
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, s);
            resume(sq + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, q);
            for (ptrdiff_t i = 0; ahead && i < b->len; i += LINE) {
                vprefetch(a.x + p->x.outer + i, TO_L2);
                vprefetch(a.dy + p->grad_output.outer + i, TO_L2);
            }
            add_grads(p, act, &k, a, 1, b->len, of, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum + c * SHORT_LANES / VL);
            keep(q, SHORT_LANES / VL, sq + c * SHORT_LANES / VL);
            move(&a, p->x.inner, p->residual.inner, p->grad_output.inner, 0, 0, of);
        }
    }
    add_kept(cols, sum);
    add_kept(cols, sq);
    for (ptrdiff_t c = 0; c < cols; c += VL)
        store_sums(min_z(VL, cols - c), sum + c, sq + c, g + c, gx + c);
}

INLINE void sum_planes(const bn_problem *p, const bn_coef *coefficients, const bn_pass *how, const bn_tiles *to,
                       instance of) {
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const ptrdiff_t step = p->S <= BN_SHORT_PLANE ? SHORT_BLOCK : VL;
    const vact act = activation_of(p);
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        const tile b = plane_tile(p, t);
        for (ptrdiff_t c = to->c0; c < to->c1; c += step) {
            const ptrdiff_t cols = min_z(step, to->c1 - c), at = (t - to->t0) * to->ld + (c - to->c0);
            if (p->S <= BN_SHORT_PLANE) {
                short_sums(p, &act, coef, &b, c, cols, how->ahead != 0, of, to->a + at, to->b + at);
                continue;
            }
            vf s[VL], q[VL];
            for (ptrdiff_t j = 0; j < cols; j++)
                sum_plane(p, &act, coef, &b, c + j, of, &s[j], &q[j]);
            store_sums(cols, s, q, to->a + at, to->b + at);
        }
    }
}

#define SUMS_planes(act, res) SUMS_AS(planes, act, res)
static void sums_planes(const bn_problem *p, const bn_coef *k, const bn_pass *how, const bn_tiles *to) {
    SPECIALIZE_SUMS(p, SUMS_planes);
}
