/* masked.inc.h: what the kernels do where some positions are not real, in either layout.
 *
 * What is not real is selected away, never multiplied by 0, so that not even a NaN there leaves a trace. The tiles are
 * those without a mask, and one that is real throughout is summed as without one. Activation and residual are looked up
 * for each few vectors. */

/* The mask from sample n on. */
INLINE const unsigned char *mask_of(const bn_problem *p, ptrdiff_t n) { return p->mask + n * mask_pitch(p); }

/* Where samples for the shift are: spread over the first `near` real values of some runs; `pitch` and `outer` are from
 * one run to the next, in the mask and of values. */
static void real_samples(const unsigned char *m, ptrdiff_t pitch, ptrdiff_t runs, ptrdiff_t len, ptrdiff_t near,
                         ptrdiff_t outer, ptrdiff_t *at) {
    ptrdiff_t seen = 0;
    int i = 0;
    for (ptrdiff_t r = 0; r < runs; r++)
        for (ptrdiff_t s = 0; s < len && i < SAMPLES;) {
            const unsigned char *here = m + r * pitch + s;
            const ptrdiff_t step = min_z(8, len - s), real = count_real(here, step);
            if (seen + real <= i * near / SAMPLES) {
                seen += real;
                s += step;
                continue;
            }
            for (; *here && i < SAMPLES && i * near / SAMPLES == seen; i++)
                at[i] = r * outer + s;
            seen += *here;
            s++;
        }
}

/* ---- the backward pass */

enum { ALONG, ACROSS }; /* a batch lies along one run of values, or is of several rows */

INLINE instance masked(int direction, int store) {
    const instance of = {direction, ANY, MAYBE, store};
    return of;
}

/* g and g * (x - mean) * invstd of a batch, into as many sums of each, or of several rows into one. Only what is real
 * counts where 0 was put out elsewhere; otherwise all that has put out a number. */
INLINE void real_sums_at(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i, batch b,
                         int way, const vm *m, vf *g_sum, vf *gx_sum) {
    const instance of = masked(BACKWARD, BN_CACHED);
    const vf none = vset1(0);
    vf d[4], z[4], g[4];
    UNROLLED for (int j = 0; j < b.n; j++) {
        const cursor *const from = way == ACROSS ? &a[j] : a;
        const ptrdiff_t at = i + j * b.distance;
        d[j] = vsub(element_at(from->x + at, b.t, b.whole), k->mean);
        if (!b.whole)
            d[j] = vkeep(d[j], b.t);
        g[j] = vhold(element_at(from->dy + at, b.t, b.whole));
        z[j] = z_at(p, k, from, at, d[j], b.t, b.whole, of);
    }
    pass_gradient(p, act, ANY, b.n, z, g);
    UNROLLED for (int j = 0; j < b.n; j++) {
        const int to = way == ACROSS ? 0 : j;
        const vf xhat = vmul(d[j], k->invstd), gx = vmul(g[j], xhat);
        vm counts = m[j];
        if (!p->mask_output) /* a - a is NaN unless a is finite */
            counts = vor(counts, vle(vadd(vsub(gx, gx), vsub(g[j], g[j])), none));
        const vf dz = vselect(counts, g[j], none);
        g_sum[to] = vadd(g_sum[to], dz);
        gx_sum[to] = vfma(dz, vselect(counts, xhat, none), gx_sum[to]);
    }
}

/* ---- elementwise */

/* What apply_at does. What is not real puts out 0, or has a gradient that does not go through the statistics. */
INLINE void apply_masked_at(const bn_problem *p, const vact *act, const vcoef *k, const cursor *a, ptrdiff_t i, batch b,
                            const vm *m, instance of) {
    const vf none = vset1(0);
    vf v[4], g[4];
    values_at(p, act, k, 0, a, i, b, of, v, g);
    UNROLLED for (int j = 0; j < b.n; j++) {
        if (of.direction == BACKWARD && !p->mask_output) {
            v[j] = vselect(m[j], v[j], vmul(g[j], k->scale));
            continue;
        }
        v[j] = vselect(m[j], v[j], none);
        if (of.direction == BACKWARD)
            g[j] = vselect(m[j], g[j], none);
    }
    store_at(a, i, b, of, v, g);
}

/* Whether the elementwise pass has anything to do with the mask. */
INLINE int looks_at_mask(const bn_problem *p, int direction) {
    return p->mask_output || (direction == BACKWARD && !p->fixed);
}

/* Defines a kernel of planes from an inline function, streamed and not. */
#define APPLY_MIXED(direction, name)                                                                                   \
    static void name(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {          \
        if (how->store == BN_STREAMED) {                                                                               \
            apply_masked_planes(p, k, how, e0, e1, masked(direction, BN_STREAMED));                                    \
            vfence();                                                                                                  \
        } else                                                                                                         \
            apply_masked_planes(p, k, how, e0, e1, masked(direction, BN_CACHED));                                      \
    }

/* Defines a kernel that leaves to another what has nothing to do with the mask. */
#define APPLY_MASKED(direction, name, mixed, unmasked)                                                                 \
    static void name(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {          \
        if (looks_at_mask(p, direction))                                                                               \
            mixed(p, k, how, e0, e1);                                                                                  \
        else                                                                                                           \
            unmasked(p, k, how, e0, e1);                                                                               \
    }
