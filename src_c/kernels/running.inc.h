/* running.inc.h: running averages move towards a batch, in float64. */

/* Its many parameters are constants to the compiler where they come from, so that it takes several channels at a time.
 */
INLINE void move_towards(char *value, ptrdiff_t stride, char *exact, ptrdiff_t exact_stride, const double *batch,
                         const double *finite, ptrdiff_t c0, ptrdiff_t c1, double momentum, double factor) {
    for (ptrdiff_t c = c0; c < c1; c++) {
        if (finite && !(fabs(finite[c]) <= REAL_MAX))
            continue;
        float v = 0.0f;
        double a = 0.0;
        if (value) /* memcpy: aligned or not */
            memcpy(&v, value + c * stride, sizeof v);
        if (exact)
            memcpy(&a, exact + c * exact_stride, sizeof a);
        if (value)
            a = exact && (float)a == v ? a : v;
        a = (1.0 - momentum) * a + momentum * (batch[c] * factor);
        v = (float)a;
        if (value)
            memcpy(value + c * stride, &v, sizeof v);
        if (exact)
            memcpy(exact + c * exact_stride, &a, sizeof a);
    }
}

static void move_running(const bn_running *r, const double *batch, const double *finite, ptrdiff_t c0, ptrdiff_t c1,
                         double momentum, double factor) {
    if (finite || !r->value || r->stride != sizeof(float))
        move_towards(r->value, r->stride, r->exact, r->exact_stride, batch, finite, c0, c1, momentum, factor);
    else if (r->exact)
        move_towards(r->value, sizeof(float), r->exact, sizeof(double), batch, NULL, c0, c1, momentum, factor);
    else
        move_towards(r->value, sizeof(float), NULL, 0, batch, NULL, c0, c1, momentum, factor);
}
