/* activations.inc.h: what each activation of BN_ACTIVATIONS does to z, and to the gradient that reaches z.
 *
 * forward_CODE(z, a) and gradient_CODE(dy, z, a), with what `a` holds of the call. A NaN in z stays one; to it the
 * gradient passes as in PyTorch: whole through relu, relu6 and hardswish, times the slope through leaky_relu, as NaN
 * through silu. */

typedef struct {
    vf slope; /* of leaky_relu */
    vf cap;   /* 6 for relu6; NaN for relu, which nothing is larger or smaller than: one code for both */
} vact;

INLINE vf forward_IDENTITY(vf z, const vact *a) {
    (void)a;
    return z;
}
INLINE vf gradient_IDENTITY(vf dy, vf z, const vact *a) {
    (void)z, (void)a;
    return dy;
}

INLINE vf forward_clipped(vf z, const vact *a) { return vmin(a->cap, vmax(vset1(0), z)); }
INLINE vf gradient_clipped(vf dy, vf z, const vact *a) {
    return vselect(vor(vle(z, vset1(0)), vle(a->cap, z)), vset1(0), dy);
}
#define forward_RELU   forward_clipped
#define gradient_RELU  gradient_clipped
#define forward_RELU6  forward_clipped
#define gradient_RELU6 gradient_clipped

INLINE vf forward_LEAKY_RELU(vf z, const vact *a) { return vselect(vle(z, vset1(0)), vmul(z, a->slope), z); }
/* Of a NaN, which vmax makes 0 of, PyTorch takes the slope. */
INLINE vf gradient_LEAKY_RELU(vf dy, vf z, const vact *a) {
    return vselect(vle(vmax(z, vset1(0)), vset1(0)), vmul(dy, a->slope), dy);
}

#define BELOW_3 (sizeof(real) == 4 ? (real)2.99999976 : (real)2.9999999999999996)

/* Howard et al. (2019): z * relu6(z + 3) / 6. At its kinks the gradient is PyTorch's. */
INLINE vf forward_HARDSWISH(vf z, const vact *a) {
    (void)a;
    return vmul(z, vmul(vmin(vset1(6), vmax(vset1(0), vadd(z, vset1(3)))), vset1((real)1 / 6)));
}
INLINE vf gradient_HARDSWISH(vf dy, vf z, const vact *a) {
    (void)a;
    const vf between = vmul(dy, vfma(z, vset1((real)1 / 3), vset1((real)0.5)));
    return vselect(vle(z, vset1(-3)), vset1(0), vselect(vle(z, vset1(BELOW_3)), between, dy));
}

/* Elfwing, Uchibe and Doya (2018): z / (1 + exp(-z)). Beyond these the sigmoid is 0 or 1 but for 1e-37, in
 * float64 1e-307. */
#define SILU_LOW  (sizeof(real) == 4 ? (real)-88.25 : (real)-708)
#define SILU_HIGH (sizeof(real) == 4 ? (real)87 : (real)708)
INLINE vf forward_SILU(vf z, const vact *a) {
    (void)a;
    const vf low = vmax(vset1(SILU_LOW), z);
    return vdiv(low, vadd(vset1(1), vexp_minus(vmin(vset1(SILU_HIGH), low))));
}
INLINE vf gradient_SILU(vf dy, vf z, const vact *a) {
    (void)a;
    const vf one = vset1(1), inside = vmin(vset1(SILU_HIGH), vmax(vset1(SILU_LOW), z));
    const vf s = vdiv(one, vadd(one, vexp_minus(inside)));
    return vmul(dy, vmul(s, vfma(inside, vsub(one, s), one)));
}

/* In an instance of a kernel an activation is PLAIN (none), CLIPPED (forward: relu and relu6), RECTIFIED (backward:
 * relu alone, as a second comparison costs an eighth of the pass), SILU (forward), or looked up for each few vectors.
 * The last two want registers. */
enum { PLAIN, CLIPPED, RECTIFIED, SILU, ANY };

INLINE int forward_kind(const bn_problem *p) {
    return p->activation == BN_IDENTITY ? PLAIN : p->activation == BN_RELU || p->activation == BN_RELU6 ? CLIPPED : ANY;
}

INLINE int backward_kind(const bn_problem *p) {
    return p->activation == BN_IDENTITY ? PLAIN : p->activation == BN_RELU ? RECTIFIED : ANY;
}

INLINE vact activation_of(const bn_problem *p) {
    const vact a = {vset1((real)p->negative_slope), vset1(p->activation == BN_RELU6 ? 6 : NAN)};
    return a;
}

INLINE void activate(const bn_problem *p, const vact *a, int act, int n, vf *z) {
    if (act == CLIPPED)
        UNROLLED for (int j = 0; j < n; j++) z[j] = forward_clipped(z[j], a);
    if (act == SILU)
        UNROLLED for (int j = 0; j < n; j++) z[j] = forward_SILU(z[j], a);
    if (act != ANY)
        return;
#define CASE(code, name)                                                                                               \
    case BN_##code: UNROLLED for (int j = 0; j < n; j++) z[j] = forward_##code(z[j], a); break;
    switch (p->activation) { BN_ACTIVATIONS(CASE) }
#undef CASE
}

/* dy becomes the gradient that reaches z. */
INLINE void pass_gradient(const bn_problem *p, const vact *a, int act, int n, const vf *z, vf *dy) {
    if (act == RECTIFIED)
        UNROLLED for (int j = 0; j < n; j++) dy[j] = vselect(vle(z[j], vset1(0)), vset1(0), dy[j]);
    if (act != ANY)
        return;
#define CASE(code, name)                                                                                               \
    case BN_##code: UNROLLED for (int j = 0; j < n; j++) dy[j] = gradient_##code(dy[j], z[j], a); break;
    switch (p->activation) { BN_ACTIVATIONS(CASE) }
#undef CASE
}

/* Calls body(act, residual) as an instance: with these as constants the compiler drops what is not needed. Residual: 0,
 * 1, or MAYBE, which looks at each vector anew. What is rarer than PLAIN and `often` is looked up. */
#define MAYBE 2
#ifdef FEW_INSTANCES /* of all elements but float32 */
#define SILU_APART 0
#define SPECIALIZE_AS(kind, often, plain_has, often_has, present, body)                                                \
    if ((kind) == PLAIN && !(plain_has)) {                                                                             \
        body(PLAIN, 0);                                                                                                \
    } else {                                                                                                           \
        body(ANY, MAYBE);                                                                                              \
    }
#else
#if defined(__SSE2__) && !defined(__AVX2__)
#define SILU_APART 0 /* for a smaller wheel */
#else
#define SILU_APART 1
#endif
#define SPECIALIZE_AS(kind, often, plain_has, often_has, present, body)                                                \
    switch (kind) {                                                                                                    \
    case PLAIN:                                                                                                        \
        if (plain_has) {                                                                                               \
            body(PLAIN, present);                                                                                      \
        } else {                                                                                                       \
            body(PLAIN, 0);                                                                                            \
        }                                                                                                              \
        break;                                                                                                         \
    case often:                                                                                                        \
        if (often_has) {                                                                                               \
            body(often, present);                                                                                      \
        } else {                                                                                                       \
            body(often, 0);                                                                                            \
        }                                                                                                              \
        break;                                                                                                         \
    default: body(ANY, MAYBE);                                                                                         \
    }
#endif
#define HAS(operand) ((operand).data != NULL)
#define SPECIALIZE_FORWARD(p, body)                                                                                    \
    SPECIALIZE_AS(forward_kind(p), CLIPPED, HAS((p)->residual), HAS((p)->residual), 1, body)
#define SPECIALIZE(p, body)                                                                                            \
    if (SILU_APART && (p)->activation == BN_SILU) {                                                                    \
        body(SILU, MAYBE);                                                                                             \
    } else {                                                                                                           \
        SPECIALIZE_FORWARD(p, body)                                                                                    \
    }
/* Sums look at no residual where there is no activation. */
#define SPECIALIZE_SUMS(p, body) SPECIALIZE_AS(backward_kind(p), RECTIFIED, 0, HAS((p)->residual), 1, body)
/* The backward pass has a residual or its gradient, one of them or both. */
#define SPECIALIZE_BACKWARD(p, body)                                                                                   \
    SPECIALIZE_AS((p)->fixed ? ANY : backward_kind(p), RECTIFIED, HAS((p)->residual) || HAS((p)->grad_residual),       \
                  HAS((p)->residual) || HAS((p)->grad_residual), MAYBE, body)
