/* overlap.inc.h: the elementwise pass of some channels, in one loop with the statistics or sums of others.
 *
 * From beyond the cache, a pass that only reads leaves writing idle, and one that writes what is in L2 leaves reading
 * idle. Taken in turns of a few lines they overlap; in turns of a few hundred values they do not. */

/* Sums of OVERLAP values of another channel from offset i of `other` on, and the elementwise work on as many of this
 * one's. */
INLINE void overlap_at(const bn_problem *p, const vact *act, const vcoef *k_other, const cursor *other, const vcoef *k,
                       const cursor *here, ptrdiff_t i, instance of, vf *s, vf *q) {
    const int pass = PASS < LANES ? PASS : LANES;
#pragma GCC unroll 4
    for (int lane = 0; lane < LANES; lane += pass) {
        vf sa[ACC], qa[ACC];
        for (int j = 0; j < pass / VL; j++) {
            sa[j] = s[lane / VL + j];
            qa[j] = q[lane / VL + j];
        }
#pragma GCC unroll 8
        for (ptrdiff_t b = i + lane; b < i + OVERLAP; b += LANES) {
            for (int j = 0; other->ahead && j < pass; j += LINE)
                prefetch_at(other, b + j, TO_L2, of.direction);
            for (int j = 0; j < pass / VL; j++)
                if (of.direction == BACKWARD)
                    sum_at(p, act, k_other, other, b + j * VL, whole_vectors(1, 0), of, &sa[j], &qa[j]);
                else {
                    const vf d = vsub(xload(other->x + b + j * VL), k_other->mean);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++)
                apply_at(p, act, k, here, b + j * VL, whole_vectors(1, 0), of);
        }
        for (int j = 0; j < pass / VL; j++) {
            s[lane / VL + j] = sa[j];
            q[lane / VL + j] = qa[j];
        }
    }
}

/* A run of len values of two channels, from `begin` of sample n on. */
typedef struct {
    ptrdiff_t n, begin, len, c, c_other;
} run_of_two;

INLINE void overlap_run(const bn_problem *p, const vact *act, const run_of_two *r, ptrdiff_t ahead,
                        const vcoef *k_other, const vcoef *k, instance of, vf *s, vf *q) {
    cursor other = cursor_at(p, r->n, r->c_other, r->begin, of.direction);
    other.ahead = ahead;
    const cursor first = cursor_at(p, r->n, r->c, r->begin, of.direction);
    const ptrdiff_t head = min_z(r->len, before_line(first.out));
    const cursor here = cursor_at(p, r->n, r->c, r->begin + head, of.direction);
    ptrdiff_t i = 0;
    apply_few(p, act, k, &first, 0, head, of);
    for (; i + OVERLAP <= r->len - head; i += OVERLAP)
        overlap_at(p, act, k_other, &other, k, &here, i, of, s, q);
    const cursor rest = cursor_at(p, r->n, r->c_other, r->begin + i, of.direction);
    if (of.direction == BACKWARD)
        add_grads(p, act, k_other, rest, 1, r->len - i, of, LANES, s, q);
    else
        add_shifted(rest.x, 0, 1, r->len - i, k_other->mean, 0, 0, LANES, s, q);
    apply_lines(p, act, k, &here, i, r->len - head, of);
}

/* Planes, or tiles of them, whose lanes are added up together: of few channels, several each. */
typedef struct {
    const elem *plane[VL];
    real shift[VL];
    vf s[VL], q[VL];
    tile of;
    ptrdiff_t n, done; /* in these, and before them */
} waiting;

static void settle_waiting(const bn_problem *p, waiting *w, const bn_tiles *to, int direction) {
    if (direction == FORWARD)
        settle_planes(p, &w->of, w->plane, w->n, w->shift, w->s, w->q, to->a + w->done, to->b + w->done);
    else
        store_sums(w->n, w->s, w->q, to->a + w->done, to->b + w->done);
    w->done += w->n;
    w->n = 0;
}

/* Tile d of cols <= VL channels from `other` on, and the elementwise pass of those from c on. */
INLINE void overlap_tile(const bn_problem *p, const vact *act, const coefs *coef, const bn_pass *how, const tile *d,
                         ptrdiff_t c, ptrdiff_t other, ptrdiff_t cols, instance of, waiting *w) {
    vf sum[VL][LANES / VL], sq[VL][LANES / VL];
    ptrdiff_t sample[SAMPLES];
    samples(p, d, sample);
    for (ptrdiff_t j = 0; of.direction == FORWARD && j < cols; j++) {
        w->plane[w->n + j] = AT(p->x, d->n, other + j, d->s);
        w->shift[w->n + j] = plane_shift(w->plane[w->n + j], sample, d->runs * d->len <= SMALL_TILE);
    }
    for (ptrdiff_t r = 0; r < d->runs; r++)
        for (ptrdiff_t j = 0; j < cols; j++) {
            const vcoef k = coef_of_channel(coef, c + j, of.direction);
            const run_of_two run = {d->n + r, d->s, d->len, c + j, other + j};
            vcoef k_other = k;
            vf s[LANES / VL], q[LANES / VL];
            if (of.direction == BACKWARD)
                k_other = coef_of_channel(coef, other + j, of.direction);
            else
                k_other.mean = vset1(w->shift[w->n + j]);
            resume(sum[j], r > 0, LANES / VL, s);
            resume(sq[j], r > 0, LANES / VL, q);
            overlap_run(p, act, &run, how->ahead, &k_other, &k, of, s, q);
            keep(s, LANES / VL, sum[j]);
            keep(q, LANES / VL, sq[j]);
        }
    for (ptrdiff_t j = 0; j < cols; j++) {
        w->s[w->n + j] = add_vectors(sum[j], LANES);
        w->q[w->n + j] = add_vectors(sq[j], LANES);
    }
    w->n += cols;
    w->of = *d;
}

INLINE void overlap(const bn_problem *problem, const bn_coef *coefficients, const bn_pass *how, ptrdiff_t done,
                    const bn_tiles *to, instance of) {
    const bn_problem local = *problem, *const p = &local; /* as in apply_rows */
    const coefs local_coef = coefs_of(coefficients), *const coef = &local_coef;
    const vact act = activation_of(p);
    const ptrdiff_t channels = to->c1 - to->c0;
    waiting w;
    w.n = w.done = 0;
    for (ptrdiff_t t = to->t0; t < to->t1; t++) {
        const tile d = plane_tile(p, t);
        for (ptrdiff_t i = 0, cols; i < channels; i += cols) {
            cols = min_z(VL, channels - i);
            if (w.n && (w.n + cols > VL || d.runs * d.len != w.of.runs * w.of.len))
                settle_waiting(p, &w, to, of.direction);
            overlap_tile(p, &act, coef, how, &d, done + i, to->c0 + i, cols, of, &w);
        }
    }
    if (w.n)
        settle_waiting(p, &w, to, of.direction);
}

#define OVERLAPPED(direction, specialize, name)                                                                        \
    static void name(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t done, const bn_tiles *to) {  \
        specialize(p, OVERLAPPED_##direction);                                                                         \
        vfence();                                                                                                      \
    }
#define OVERLAPPED_FORWARD(act, res)  overlap(p, k, how, done, to, (instance){FORWARD, act, res, BN_STREAMED})
#define OVERLAPPED_BACKWARD(act, res) overlap(p, k, how, done, to, (instance){BACKWARD, act, res, BN_STREAMED})
OVERLAPPED(FORWARD, SPECIALIZE_FORWARD, forward_and_stats)
OVERLAPPED(BACKWARD, SPECIALIZE_BACKWARD, backward_and_sums)
