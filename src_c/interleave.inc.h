/* interleave.inc.h: the elementwise pass of some channels, in one loop with the statistics or sums of others.
 *
 * From beyond the cache, a pass that only reads leaves writing idle, and one that writes what is in L2 leaves reading
 * idle. Taken in turns of a few lines they overlap; in turns of a few hundred values they do not.
 *
 * CPUs with AVX-512 are faster when what comes next is prefetched too. One without was slower, but for statistics of
 * short planes, whose next sample the hardware does not find.
 */

/* Sums of INTERLEAVE values of another channel from offset i of `other` on, and the elementwise work on as many of this
 * one's. */
INLINE void interleave_at(const vcoef *k_other, const cursor *other, const vcoef *k, const cursor *here, ptrdiff_t i,
                          int direction, int act, int res, vf *s, vf *q) {
    const vt all = vtail(VL);
    const int pass = PASS < LANES ? PASS : LANES;
#pragma GCC unroll 4
    for (int lane = 0; lane < LANES; lane += pass) {
        vf sa[ACC], qa[ACC];
        for (int j = 0; j < pass / VL; j++) {
            sa[j] = s[lane / VL + j];
            qa[j] = q[lane / VL + j];
        }
#pragma GCC unroll 8
        for (ptrdiff_t b = i + lane; b < i + INTERLEAVE; b += LANES) {
            for (int j = 0; (VL == LINE || direction == FORWARD) && j < pass; j += LINE)
                prefetch_at(other, b + j, TO_L2, direction);
            for (int j = 0; j < pass / VL; j++)
                if (direction == BACKWARD)
                    sum_at(k_other, other, b + j * VL, all, 1, 0, act, res, &sa[j], &qa[j]);
                else {
                    const vf d = vsub(vload(other->x + b + j * VL), k_other->mean);
                    sa[j] = vadd(sa[j], d);
                    qa[j] = vfma(d, d, qa[j]);
                }
            for (int j = 0; j < pass / VL; j++)
                work_at(k, here, b + j * VL, all, 1, direction, act, res, 1);
        }
        for (int j = 0; j < pass / VL; j++) {
            s[lane / VL + j] = sa[j];
            q[lane / VL + j] = qa[j];
        }
    }
}

/* A run of len values of both channels. */
INLINE void interleave_run(const bn_problem *p, ptrdiff_t n, ptrdiff_t begin, ptrdiff_t len, const vcoef *k_other,
                           ptrdiff_t c_other, const vcoef *k, ptrdiff_t c, int direction, int act, int res, vf *s,
                           vf *q) {
    cursor other = cursor_at(p, n, c_other, begin, direction);
    other.ahead = VL == LINE ? PLANES_AHEAD : p->S < PLANE_TILE ? p->x.outer : 0;
    const cursor first = cursor_at(p, n, c, begin, direction);
    const ptrdiff_t head = min_z(len, before_line(first.out));
    const cursor here = cursor_at(p, n, c, begin + head, direction);
    ptrdiff_t i = 0;
    work_few(k, &first, 0, head, direction, act, res);
    for (; i + INTERLEAVE <= len - head; i += INTERLEAVE)
        interleave_at(k_other, &other, k, &here, i, direction, act, res, s, q);
    const cursor other_rest = cursor_at(p, n, c_other, begin + i, direction);
    if (direction == BACKWARD)
        add_grads(p, k_other, other_rest, 1, len - i, 0, act, res, LANES, s, q);
    else
        add_shifted(other_rest.x, 0, 1, len - i, k_other->mean, 0, 0, LANES, s, q);
    work_lines(k, &here, i, len - head, direction, act, res, 1);
}

static void settle_kept(const bn_problem *p, const tile *d, const float *const *plane, ptrdiff_t kept,
                        const float *shift, vf *s, vf *q, double *a, double *b, int direction) {
    if (direction == FORWARD)
        settle_planes(p, d, plane, kept, shift, s, q, a, b);
    else
        store_sums(kept, s, q, a, b);
}

INLINE void interleave(const bn_problem *problem, const bn_coef *coefficients, ptrdiff_t c0, ptrdiff_t other,
                       ptrdiff_t channels, double *a, double *b, int direction, int act, int res) {
    const bn_problem local = *problem, *const p = &local; /* as in work_rows */
    const bn_coef local_coef = *coefficients, *const coef = &local_coef;
    const ptrdiff_t T = tiles(p);
    const float *plane[VL]; /* or tiles of them, whose lanes are added up together: of few channels, several each */
    float shift[VL];
    vf s[VL], q[VL];
    ptrdiff_t kept = 0, done = 0;
    tile of = plane_tile(p, 0);
    for (ptrdiff_t t = 0; t < T; t++) {
        const tile d = plane_tile(p, t), next = plane_tile(p, t + 1 < T ? t + 1 : t);
        ptrdiff_t sample[SAMPLES];
        samples(p, &d, sample);
        for (ptrdiff_t i = 0, cols; i < channels; i += cols) {
            cols = min_z(VL, channels - i);
            if (kept + cols > VL || d.runs * d.len != of.runs * of.len) {
                settle_kept(p, &of, plane, kept, shift, s, q, a + done, b + done, direction);
                done += kept;
                kept = 0;
            }
            of = d;
            vf sum[VL][LANES / VL], sq[VL][LANES / VL];
            for (ptrdiff_t j = 0; direction == FORWARD && j < cols; j++) {
                plane[kept + j] = cursor_at(p, d.n, other + i + j, d.s, direction).x;
                shift[kept + j] = plane_shift(plane[kept + j], sample, d.runs * d.len <= SMALL_TILE);
                for (int l = 0; l < SAMPLES; l++) /* the next tile's, of the same shape */
                    vprefetch(cursor_at(p, next.n, other + i + j, next.s, direction).x + sample[l], TO_L2);
            }
            for (ptrdiff_t r = 0; r < d.runs; r++)
                for (ptrdiff_t j = 0; j < cols; j++) {
                    const vcoef k = coef_of_channel(p, coef, c0 + i + j, direction);
                    vcoef k_other = k;
                    vf sums[LANES / VL], sqs[LANES / VL];
                    if (direction == BACKWARD)
                        k_other = coef_of_channel(p, coef, other + i + j, direction);
                    else
                        k_other.mean = vset1(shift[kept + j]);
                    resume(sum[j], r > 0, LANES / VL, sums);
                    resume(sq[j], r > 0, LANES / VL, sqs);
                    interleave_run(p, d.n + r, d.s, d.len, &k_other, other + i + j, &k, c0 + i + j, direction, act, res,
                                   sums, sqs);
                    keep(sums, LANES / VL, sum[j]);
                    keep(sqs, LANES / VL, sq[j]);
                }
            for (ptrdiff_t j = 0; j < cols; j++) {
                s[kept + j] = add_vectors(sum[j], LANES);
                q[kept + j] = add_vectors(sq[j], LANES);
            }
            kept += cols;
        }
    }
    settle_kept(p, &of, plane, kept, shift, s, q, a + done, b + done, direction);
}

#define INTERLEAVED(direction, name)                                                                                   \
    static void name(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t other, ptrdiff_t channels,         \
                     double *a, double *b) {                                                                           \
        SPECIALIZE_##direction(p, INTERLEAVED_##direction);                                                            \
        vfence();                                                                                                      \
    }
#define INTERLEAVED_FORWARD(act, res)  interleave(p, k, c0, other, channels, a, b, FORWARD, act, res)
#define INTERLEAVED_BACKWARD(act, res) interleave(p, k, c0, other, channels, a, b, BACKWARD, act, res)
INTERLEAVED(FORWARD, forward_and_stats)
INTERLEAVED(BACKWARD, backward_and_sums)
