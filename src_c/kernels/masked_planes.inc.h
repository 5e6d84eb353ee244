/* masked_planes.inc.h: planes where some positions are not real: sums and elementwise passes. */

/* As add_shifted, of the real values of a run. */
INLINE void add_real(const elem *x, const unsigned char *m, ptrdiff_t len, vf k, int lanes, vf *s, vf *q) {
    const vf none = vset1(0);
    ptrdiff_t i = 0;
    for (; i + lanes <= len; i += lanes)
        UNROLLED for (int j = 0; j < lanes / VL; j++) {
            const vf d = vselect(vmask(m + i + j * VL), vsub(xload(x + i + j * VL), k), none);
            s[j] = vadd(s[j], d);
            q[j] = vfma(d, d, q[j]);
        }
    UNROLLED for (int j = 0; j < lanes / VL; j++) {
        const ptrdiff_t left = len - i - j * VL;
        if (left <= 0)
            continue;
        const vt t = vtail(left);
        const vf v = vsub(xload_tail(x + i + j * VL, t), k), d = vkeep(vselect(vmask(m + i + j * VL), v, none), t);
        s[j] = vadd(s[j], d);
        q[j] = vfma(d, d, q[j]);
    }
}

INLINE void real_sums(const bn_problem *p, const tile *a, const elem *x, const unsigned char *m, vf k, vf *sum,
                      vf *sq) {
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < LANES / VL; j++)
        s[j] = q[j] = vset1(0);
    for (ptrdiff_t r = 0; r < a->runs; r++)
        add_real(x + r * p->x.outer, m + r * mask_pitch(p), a->len, k, LANES, s, q);
    *sum = add_vectors(s, LANES);
    *sq = add_vectors(q, LANES);
}

/* Short planes of cols <= SHORT_BLOCK channels, batch by batch. */
INLINE void short_real_sums(const bn_problem *p, const tile *a, const elem *const *x, const unsigned char *m,
                            ptrdiff_t cols, const real *shift, vf *sum, vf *sq) {
    for (ptrdiff_t r = 0; r < a->runs; r++)
        for (ptrdiff_t c = 0; c < cols; c++) {
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, s);
            resume(sq + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, q);
            add_real(x[c] + r * p->x.outer, m + r * mask_pitch(p), a->len, vset1(shift[c]), SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum + c * SHORT_LANES / VL);
            keep(q, SHORT_LANES / VL, sq + c * SHORT_LANES / VL);
        }
    add_kept(cols, sum);
    add_kept(cols, sq);
}

/* Of the real values of a plane's tile: in float64, some at a time. All are alike if they are the first. */
static void exact_real_plane(const bn_problem *p, const tile *a, const unsigned char *m, const elem *x, double *mean,
                             double *m2) {
    elem v[PIECE];
    double done = 0.0;
    ptrdiff_t k = 0;
    for (ptrdiff_t r = 0; r < a->runs; r++)
        for (ptrdiff_t i = 0; i < a->len; i++) {
            if (m[r * mask_pitch(p) + i])
                v[k++] = x[r * p->x.outer + i];
            if (k == PIECE || (k && r + 1 == a->runs && i + 1 == a->len)) {
                double more, more_m2;
                exact_stats(v, 0, 1, k, &more, &more_m2);
                pool_more(1, done, (double)k, &more, &more_m2, mean, m2);
                done += (double)k;
                k = 0;
            }
        }
}

static int real_alike(const bn_problem *p, const tile *a, const unsigned char *m, const elem *x, real first) {
    int differ = 0;
    for (ptrdiff_t r = 0; r < a->runs; r++)
        for (ptrdiff_t i = 0; i < a->len; i++)
            differ |= m[r * mask_pitch(p) + i] && widen(x[r * p->x.outer + i]) != first;
    return !differ;
}

/* Where the sums of a plane's n real values about `shift`, one of them, tell too little: as settle_planes. */
static void settle_real_again(const bn_problem *p, const tile *a, const unsigned char *m, double n, const elem *x,
                              real shift, double *mean, double *m2) {
    if (*m2 == UNSOUND) {
        const real told = (real)*mean;
        vf s[VL], q[VL];
        real sum32[VL], sq32[VL];
        real_sums(p, a, x, m, vset1(told), s, q);
        add_lanes(1, s, sum32);
        add_lanes(1, q, sq32);
        const double sum = sum32[0], sq = sq32[0];
        if (settle(n, PLANES_OFF, 1, &told, &sum, &sq, mean, m2))
            exact_real_plane(p, a, m, x, mean, m2);
    } else if (real_alike(p, a, m, x, shift))
        *m2 = 0.0;
    else
        exact_real_plane(p, a, m, x, mean, m2);
}

INLINE void settle_real(const bn_problem *p, const tile *a, const unsigned char *m, double n, const elem *const *x,
                        ptrdiff_t cols, const real *shift, vf *s, vf *q, double *mean, double *m2) {
    real sum32[VL], sq32[VL];
    double sum[VL], sq[VL];
    add_lanes(cols, s, sum32);
    add_lanes(cols, q, sq32);
    for (int j = 0; j < VL; j++) {
        sum[j] = sum32[j];
        sq[j] = sq32[j];
    }
    if (settle(n, PLANES_OFF, cols, shift, sum, sq, mean, m2))
        for (ptrdiff_t j = 0; j < cols; j++)
            if (m2[j] == UNSOUND || m2[j] == FLAT)
                settle_real_again(p, a, m, n, x[j], shift[j], &mean[j], &m2[j]);
}

static void stats_masked_planes(const bn_problem *p, const bn_pass *how, const bn_tiles *to) {
    const ptrdiff_t step = p->S <= BN_SHORT_PLANE ? SHORT_BLOCK : VL;
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        const tile a = plane_tile(p, t);
        const ptrdiff_t n = p->real[t], at = (t - to->t0) * to->ld;
        if (n == a.runs * a.len) {
            const bn_tiles one = {t, t + 1, to->c0, to->c1, to->ld, to->a + at, to->b + at, to->room};
            stats_planes(p, how, &one);
        }
        if (n == 0 || n == a.runs * a.len)
            continue; /* of none nothing is pooled */
        const unsigned char *m = mask_of(p, a.n) + a.s;
        ptrdiff_t sample[SAMPLES];
        real_samples(m, mask_pitch(p), a.runs, a.len, a.len < BN_LINE ? n : min_z(n, NEAR), p->x.outer, sample);
        for (ptrdiff_t c = to->c0; c < to->c1; c += step) {
            const ptrdiff_t cols = min_z(step, to->c1 - c);
            double *const mean = to->a + at + (c - to->c0), *const m2 = to->b + at + (c - to->c0);
            const elem *x[SHORT_BLOCK];
            real shift[SHORT_BLOCK];
            vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
            for (ptrdiff_t j = 0; j < cols; j++) {
                x[j] = AT(p->x, a.n, c + j, a.s);
                shift[j] = plane_shift(x[j], sample, n <= SMALL_TILE);
            }
            if (p->S <= BN_SHORT_PLANE)
                short_real_sums(p, &a, x, m, cols, shift, sum, sq);
            else
                for (ptrdiff_t j = 0; j < cols; j++)
                    real_sums(p, &a, x[j], m, vset1(shift[j]), &sum[j], &sq[j]);
            for (ptrdiff_t j = 0; j < cols; j += VL)
                settle_real(p, &a, m, (double)n, x + j, min_z(VL, cols - j), shift + j, sum + j, sq + j, mean + j,
                            m2 + j);
        }
    }
}

/* As add_grads does, of one run. */
INLINE void add_real_grads(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a,
                           const unsigned char *m, ptrdiff_t len, int lanes, vf *g, vf *gx) {
    const int n = lanes / VL < 4 ? lanes / VL : 4;
    ptrdiff_t i = 0;
    for (; i + lanes <= len; i += lanes)
        UNROLLED for (int j = 0; j < lanes / VL; j += n) {
            vm real[4];
            UNROLLED for (int v = 0; v < n; v++) real[v] = vmask(m + i + (j + v) * VL);
            real_sums_at(p, act, k, a, i + j * VL, whole_vectors(n, VL), ALONG, real, g + j, gx + j);
        }
    UNROLLED for (int j = 0; j < lanes / VL; j++) {
        const ptrdiff_t left = len - i - j * VL;
        if (left <= 0)
            continue;
        const vm real = vmask(m + i + j * VL);
        real_sums_at(p, act, k, a, i + j * VL, part_of_vector(vtail(left)), ALONG, &real, g + j, gx + j);
    }
}

/* The sums of one channel's tile, still in VL lanes. */
INLINE void sum_masked_plane(const bn_problem *p, const vact *act, const coefs *coef, const tile *b, ptrdiff_t c, vf *g,
                             vf *gx) {
    const vcoef k = coef_of_channel(coef, c, BACKWARD);
    vf s[LANES / VL], q[LANES / VL];
    for (int j = 0; j < LANES / VL; j++)
        s[j] = q[j] = vset1(0);
    for (ptrdiff_t r = 0; r < b->runs; r++) {
        const cursor a = cursor_at(p, b->n + r, c, b->s, BACKWARD);
        add_real_grads(p, act, &k, &a, mask_of(p, b->n + r) + b->s, b->len, LANES, s, q);
    }
    *g = add_vectors(s, LANES);
    *gx = add_vectors(q, LANES);
}

/* As short_sums does. */
INLINE void short_masked_sums(const bn_problem *p, const vact *act, const coefs *coef, const tile *b, ptrdiff_t c0,
                              ptrdiff_t cols, double *g, double *gx) {
    vf sum[SHORT_BLOCK * SHORT_LANES / VL], sq[SHORT_BLOCK * SHORT_LANES / VL];
    for (ptrdiff_t r = 0; r < b->runs; r++)
        for (ptrdiff_t c = 0; c < cols; c++) {
            const vcoef k = coef_of_channel(coef, c0 + c, BACKWARD);
            const cursor a = cursor_at(p, b->n + r, c0 + c, 0, BACKWARD);
            vf s[SHORT_LANES / VL], q[SHORT_LANES / VL];
            resume(sum + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, s);
            resume(sq + c * SHORT_LANES / VL, r > 0, SHORT_LANES / VL, q);
            add_real_grads(p, act, &k, &a, mask_of(p, b->n + r), b->len, SHORT_LANES, s, q);
            keep(s, SHORT_LANES / VL, sum + c * SHORT_LANES / VL);
            keep(q, SHORT_LANES / VL, sq + c * SHORT_LANES / VL);
        }
    add_kept(cols, sum);
    add_kept(cols, sq);
    for (ptrdiff_t c = 0; c < cols; c += VL)
        store_sums(min_z(VL, cols - c), sum + c, sq + c, g + c, gx + c);
}

static void sums_masked_planes(const bn_problem *p, const bn_coef *coefficients, const bn_pass *how,
                               const bn_tiles *to) {
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const ptrdiff_t step = p->S <= BN_SHORT_PLANE ? SHORT_BLOCK : VL;
    const vact act = activation_of(p);
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        const tile b = plane_tile(p, t);
        const ptrdiff_t at = (t - to->t0) * to->ld;
        if (p->real[t] == b.runs * b.len) {
            const bn_tiles one = {t, t + 1, to->c0, to->c1, to->ld, to->a + at, to->b + at, to->room};
            sums_planes(p, coefficients, how, &one);
            continue;
        }
        for (ptrdiff_t c = to->c0; c < to->c1; c += step) {
            const ptrdiff_t cols = min_z(step, to->c1 - c);
            double *const g = to->a + at + (c - to->c0), *const gx = to->b + at + (c - to->c0);
            if (p->S <= BN_SHORT_PLANE) {
                short_masked_sums(p, &act, coef, &b, c, cols, g, gx);
                continue;
            }
            vf s[VL], q[VL];
            for (ptrdiff_t j = 0; j < cols; j++)
                sum_masked_plane(p, &act, coef, &b, c + j, &s[j], &q[j]);
            store_sums(cols, s, q, g, gx);
        }
    }
}

/* As apply_short does, from offset s of channel c on, with the mask m of the sample: across planes only if they follow
 * one another, and are not shorter than a vector. */
INLINE void apply_masked_run(const bn_problem *p, const vact *act, const coefs *coef, const cursor *a,
                             const unsigned char *m, ptrdiff_t c, ptrdiff_t s, ptrdiff_t len, instance of) {
    ptrdiff_t i = 0, end = p->S - s;                    /* of channel c */
    ptrdiff_t n = min_z(len, before_line(a->out) % VL); /* before the first vector */
    vcoef k = coef_of_channel(coef, c, of.direction);
    instance cached = of;
    cached.store = BN_CACHED;
    m += s;
    for (;;) {
        if (n == 0) {
            vm real[4];
            for (; i + 4 * VL <= min_z(end, len); i += 4 * VL) {
                UNROLLED for (int v = 0; v < 4; v++) real[v] = vmask(m + i + v * VL);
                apply_masked_at(p, act, &k, a, i, whole_vectors(4, VL), real, of);
            }
            for (; i + VL <= min_z(end, len); i += VL) {
                real[0] = vmask(m + i);
                apply_masked_at(p, act, &k, a, i, whole_vectors(1, 0), real, of);
            }
            n = min_z(VL, len - i);
        }
        if (n == 0)
            return;
        const vm real = vmask(m + i);
        vcoef both = k;
        if (i + n > end) {
            const vcoef next = coef_of_channel(coef, ++c, of.direction);
            both = join_coef(&k, &next, vtail(end - i));
            k = next;
            end += p->S;
            m -= p->S;
        }
        if (n == VL)
            apply_masked_at(p, act, &both, a, i, whole_vectors(1, 0), &real, of);
        else
            apply_masked_at(p, act, &both, a, i, part_of_vector(vtail(n)), &real, cached);
        i += n;
        n = 0;
    }
}

INLINE void apply_masked_planes(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how,
                                ptrdiff_t e0, ptrdiff_t e1, instance of) {
    const bn_problem local = *problem, *const p = &local; /* as in apply_rows */
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const vact act = activation_of(p);
    (void)how;
    while (e0 < e1) {
        const ptrdiff_t s = e0 % p->S, c = e0 / p->S % p->C, n = e0 / p->S / p->C;
        const ptrdiff_t end = p->packed && p->S >= LINE ? (p->C - c) * p->S - s : p->S - s;
        const ptrdiff_t len = min_z(end, e1 - e0);
        const cursor a = cursor_at(p, n, c, s, of.direction);
        apply_masked_run(p, &act, coef, &a, mask_of(p, n), c, s, len, of);
        e0 += len;
    }
}

APPLY_MIXED(FORWARD, forward_mixed_planes)
APPLY_MIXED(BACKWARD, backward_mixed_planes)
APPLY_MASKED(FORWARD, forward_masked_planes, forward_mixed_planes, forward_planes)
APPLY_MASKED(BACKWARD, backward_masked_planes, backward_mixed_planes, backward_planes)
