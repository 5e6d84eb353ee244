/* apply_planes.inc.h: the elementwise passes over planes. */

#define LONG_RUN 128 /* values from which on a run is worth being aligned */

/* Values [i, end) with the same coefficients, through the cache. */
INLINE void apply_few(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i, ptrdiff_t end,
                      instance of) {
    of.store = BN_CACHED;
    for (; i + VL <= end; i += VL)
        apply_at(p, act, k, a, i, whole_vectors(1, 0), of);
    if (i < end)
        apply_at(p, act, k, a, i, part_of_vector(vtail(end - i)), of);
}

/* The same with whole lines streamed, if that is asked for: then one begins at i. */
INLINE void apply_lines(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i,
                        ptrdiff_t end, instance of) {
    for (; i + LINE <= end; i += LINE)
        for (int j = 0; j < LINE; j += VL)
            apply_at(p, act, k, a, i + j, whole_vectors(1, 0), of);
    apply_few(p, act, k, a, i, end, of);
}

/* len values with the same coefficients. Streaming stores write whole lines; what is before the first and after the
 * last goes through the cache. */
INLINE void apply_run(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t len,
                      instance of) {
    ptrdiff_t i = 0;
    if (of.store == BN_STREAMED || len >= LONG_RUN) {
        i = min_z(len, before_line(a->out));
        apply_few(p, act, k, a, 0, i, of);
    }
    for (; i + 4 * VL <= len; i += 4 * VL)
        apply_at(p, act, k, a, i, whole_vectors(4, VL), of);
    apply_lines(p, act, k, a, i, len, of);
}

/* Short planes that follow one another, from offset s of channel c on: vectors keep to those of the output, across
 * planes, with the coefficients of both where they lie in two. Masked stores, one a plane, would take as long as all
 * the rest, and streamed planes would share lines. */
INLINE void apply_short(const bn_problem *p, const vact *act, const coefs *coef, const cursor *a, ptrdiff_t c,
                        ptrdiff_t s, ptrdiff_t len, instance of) {
    const batch one = whole_vectors(1, 0), two = whole_vectors(2, VL);
    ptrdiff_t i = 0, end = p->S - s;                    /* of channel c */
    ptrdiff_t n = min_z(len, before_line(a->out) % VL); /* before the first vector */
    vcoef k = coef_of_channel(coef, c, of.direction);
    instance cached = of;
    cached.store = BN_CACHED;
    for (;;) {
        if (n == 0) {
            for (; of.store == BN_CACHED && i + 2 * VL <= min_z(end, len); i += 2 * VL)
                apply_at(p, act, &k, a, i, two, of);
            for (; i + VL <= min_z(end, len); i += VL) {
                if (of.store == BN_STREAMED)
                    prefetch_at(a, i, TO_L2, of.direction);
                apply_at(p, act, &k, a, i, one, of);
            }
            n = min_z(VL, len - i);
        }
        if (n == 0)
            return;
        vcoef both = k;
        if (i + n > end) {
            const vcoef next = coef_of_channel(coef, ++c, of.direction);
            both = join_coef(&k, &next, vtail(end - i));
            k = next;
            end += p->S;
        }
        if (n == VL)
            apply_at(p, act, &both, a, i, one, of);
        else
            apply_at(p, act, &both, a, i, part_of_vector(vtail(n)), cached);
        i += n;
        n = 0;
    }
}

INLINE void apply_planes(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how, ptrdiff_t e0,
                         ptrdiff_t e1, instance of) {
    const bn_problem local = *problem, *const p = &local; /* as in apply_rows */
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const bn_operand out = of.direction == FORWARD ? p->y : p->grad_input;
    const vact act = activation_of(p);
    ptrdiff_t s = e0 % p->S, c = e0 / p->S % p->C, n = e0 / p->S / p->C;
    while (e0 < e1) {
        ptrdiff_t len = min_z((p->C - c) * p->S - s, e1 - e0);
        cursor a = cursor_at(p, n, c, s, of.direction);
        a.ahead = how->ahead;
        e0 += len;
        if (p->packed && p->S >= LINE && p->S <= BN_SHORT_PLANE)
            apply_short(p, &act, coef, &a, c, s, len, of);
        else
            for (; len > 0; c++, s = 0) {
                const ptrdiff_t run = min_z(p->S - s, len);
                const vcoef k = coef_of_channel(coef, c, of.direction);
                apply_run(p, &act, &k, &a, run, of);
                move(&a, p->x.inner - s, p->residual.inner - s, p->grad_output.inner - s, out.inner - s,
                     p->grad_residual.inner - s, of);
                len -= run;
            }
        s = c = 0;
        n++;
    }
}

#define APPLY_STREAMED_planes_FORWARD(act, res)  APPLY_AS(planes, FORWARD, act, res, BN_STREAMED)
#define APPLY_CACHED_planes_FORWARD(act, res)    APPLY_AS(planes, FORWARD, act, res, BN_CACHED)
#define APPLY_STREAMED_planes_BACKWARD(act, res) APPLY_AS(planes, BACKWARD, act, res, BN_STREAMED)
#define APPLY_CACHED_planes_BACKWARD(act, res)   APPLY_AS(planes, BACKWARD, act, res, BN_CACHED)
APPLY(planes, FORWARD, SPECIALIZE, forward_planes)
APPLY(planes, BACKWARD, SPECIALIZE_BACKWARD, backward_planes)
