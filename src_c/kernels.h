/* kernels.h: what a kernel is given, and the lists of instruction sets, elements, activations and kernels.
 *
 * A kernel is a serial C function over a range of the work. It knows nothing of threads or Python, allocates nothing,
 * keeps no state and decides nothing: a bn_pass tells it how to go. A tensor is walked in one of two ways:
 *
 *   BN_PLANES   (N, C, S): element (n, c, s) lies at data[n * outer + c * inner + s]       NCHW
 *   BN_ROWS     (N, S, C): element (n, s, c) lies at data[n * outer + s * inner + c]       channels-last, (N, C)
 *
 * Elements are numbered in that order (planes: (n * C + c) * S + s; rows: (n * S + s) * C + c), so that a range of
 * element numbers [e0, e1) names a share of the elementwise work in both.
 *
 * With few channels in BN_ROWS, `fold` rows that follow one another in memory make one wide row of C * fold
 * columns, so that vectors are full whatever C is; column j then belongs to channel j % C. All per-channel
 * coefficients are repeated `fold` times. It needs operands without gaps (inner == C, N == 1).
 *
 * Statistics are taken over tiles, numbered from 0 for each channel. Tiles depend on N, C, S and the layout alone,
 * never on threads or instruction set: that is what makes results reproducible.
 */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include <stddef.h>

/* Instruction sets, the best last: X(name). Each has a vocabulary in simd/. */
#ifdef FASTBN_HAVE_BASELINE
#define BN_BASELINE(X) X(baseline)
#else
#define BN_BASELINE(X)
#endif
#ifdef FASTBN_HAVE_AVX2
#define BN_AVX2(X) X(avx2)
#else
#define BN_AVX2(X)
#endif
#ifdef FASTBN_HAVE_AVX512
#define BN_AVX512(X) X(avx512)
#else
#define BN_AVX512(X)
#endif
#define BN_ISAS(X) BN_BASELINE(X) BN_AVX2(X) BN_AVX512(X)

/* Elements, which is what lies in memory: X(code, name in Python, bytes, bytes of what a lane computes in). Each has a
 * file in elements/. Coefficients and partial sums are what a lane computes in. */
#define BN_ELEMENTS(X)                                                                                                 \
    X(f32, "float32", 4, 4)                                                                                            \
    X(f64, "float64", 8, 8)                                                                                            \
    X(f16, "float16", 2, 4)                                                                                            \
    X(bf16, "bfloat16", 2, 4)

#define BN_CODE(code, name, bytes, real_bytes) BN_##code,
enum { BN_ELEMENTS(BN_CODE) BN_N_ELEMENTS };
#undef BN_CODE

/* Activations: X(code, name in Python). What each does is in activations.inc.h. */
#define BN_ACTIVATIONS(X)                                                                                              \
    X(IDENTITY, NULL)                                                                                                  \
    X(RELU, "relu")                                                                                                    \
    X(RELU6, "relu6")                                                                                                  \
    X(LEAKY_RELU, "leaky_relu")                                                                                        \
    X(SILU, "silu")                                                                                                    \
    X(HARDSWISH, "hardswish")

#define BN_CODE(code, name) BN_##code,
enum { BN_ACTIVATIONS(BN_CODE) BN_N_ACTIVATIONS };
#undef BN_CODE

enum { BN_PLANES, BN_ROWS, BN_MASKED, BN_LOOPS = 2 * BN_MASKED };
enum { BN_CACHED, BN_STREAMED };

/* Of the arithmetic, which bits depend on. */
#define BN_LINE        16             /* float32 values of a cache line, and how many coefficients follow the last */
#define BN_SHORT_PLANE 256            /* values up to which a plane is summed in fewer lanes */
#define BN_PANEL       2048           /* columns at a time in sums over rows */
#define BN_ROOM        (6 * BN_PANEL) /* values: their shifts and sums, and with a mask those of channels */

typedef struct {
    void *data; /* NULL: absent */
    ptrdiff_t outer, inner;
} bn_operand;

/* What is to be done, whatever the machine: the operands that are there tell which operation it is. */
typedef struct {
    int layout, element, activation;
    int packed;      /* no gaps in any operand: rows have N == 1 and inner == C, planes inner == S */
    int fixed;       /* statistics are constants: the gradient does not go through them */
    int from_output; /* `residual` holds the forward call's y, which tells what the activation let pass */
    double negative_slope;
    ptrdiff_t N, C, S;
    ptrdiff_t fold;
    ptrdiff_t pitch;                         /* of rows, in every operand: C if packed; 0: they differ */
    bn_operand x, residual, grad_output;     /* read */
    bn_operand y, grad_input, grad_residual; /* written */
    /* Of each position 1 where it is real, else 0: statistics are over the real ones. Rows of memory have one after the
     * other; of planes those of a sample are followed by BN_LINE more that begin again with the first. NULL: all are.
     */
    const unsigned char *mask;
    const int *real; /* how many positions of each tile are; looked at in the first pass */
    int mask_output; /* 0 is put out at the others, where the gradient then counts as 0, too */
} bn_problem;

/* How a pass goes over its elements. */
typedef struct {
    int rows;        /* of BN_ROWS at a time: 1, 2, 4 or 8 */
    int store;       /* BN_CACHED, BN_STREAMED: written past the cache */
    int from_end;    /* rows: from the last column to the first */
    int by_batch;    /* short planes: all channels of a sample before the next sample */
    int period;      /* vectors after which coefficients begin again that registers hold; 0: too many */
    ptrdiff_t ahead; /* elements from what is read to what is prefetched meanwhile; 0: nothing is */
} bn_pass;

/* Per-channel coefficients, of what a lane computes in. For rows C * fold of them (of offset C), then BN_LINE more that
 * begin again with the first; for planes C. forward:   z = (x - mean) * scale + shift backward:  xhat = (x - mean) *
 * invstd + offset dx = ((g - g_mean) + (x - mean) * g_proj) * scale + g_shift */
typedef struct {
    void *mean, *scale, *shift;
    void *invstd, *offset, *g_mean, *g_proj, *g_shift; /* NULL: forward */
} bn_coef;
enum { BN_COEF_FORWARD = 3, BN_COEF_BACKWARD = 8 };

/* Tiles [t0, t1) of channels (rows: columns) [c0, c1), and where their two sums of each go: to [(t - t0) * ld + c -
 * c0]. `room` is this thread's alone, for sums over rows: BN_ROOM values from a cache line on. */
typedef struct {
    ptrdiff_t t0, t1, c0, c1, ld;
    double *a, *b;
    void *room;
} bn_tiles;

/* Running averages of all channels: float32 values, float64 ones, or float32 ones with what each was rounded from,
 * which counts for as long as it rounds to that value. NULL: none. So many bytes apart, at any address. */
typedef struct {
    char *value, *exact;
    ptrdiff_t stride, exact_stride;
} bn_running;

/* What coefficients are made from; weight and bias, of what a lane computes in, may be NULL. */
typedef struct {
    const double *mean, *var;
    const void *weight, *bias;
    double eps;
} bn_source;

/* The loops over elements of one kind in one layout. */
typedef struct {
    /* The sums of each tile; of x - shift and its square, which give mean and squared deviations, or of g = grad_output
     * * activation'(z) and g * (x - mean) * invstd. */
    void (*stats)(const bn_problem *p, const bn_pass *how, const bn_tiles *to);
    void (*sums)(const bn_problem *p, const bn_coef *k, const bn_pass *how, const bn_tiles *to);
    /* y = activation((x - mean) * scale + shift + residual) on elements [e0, e1); grad_input and grad_residual. */
    void (*forward)(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1);
    void (*backward)(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1);
    /* If the instruction set overlaps, planes of more than BN_SHORT_PLANE values, streamed: forward on channels from
     * `done` on and, in the same loop, stats of all tiles of as many others; or backward and sums. */
    void (*forward_and_stats)(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t done,
                              const bn_tiles *to);
    void (*backward_and_sums)(const bn_problem *p, const bn_coef *k, const bn_pass *how, ptrdiff_t done,
                              const bn_tiles *to);
} bn_loops;

/* What is done once a channel, where a lane computes in float32 or float64; and what the instruction set is. */
typedef struct {
    int lanes;    /* of a vector */
    int held;     /* vectors of coefficients that registers hold beside what a pass needs; 0: too few to try */
    int overlaps; /* whether two passes go in one loop: only where that was measured to be faster */

    /* Pools all tiles of channels [c0, c1) of `from`, whose arrays begin at channel `first`, into mean[c] and the
     * biased variance var[c], without a mask and with one; or into the sums of g and of g * xhat, the gradients of bias
     * and weight. */
    void (*pool_stats[2])(const bn_problem *p, const bn_tiles *from, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                          double *var);
    void (*pool_sums)(const bn_problem *p, const bn_coef *k, const bn_tiles *from, ptrdiff_t c0, ptrdiff_t c1,
                      double *g, double *gx);
    /* Of channels [c0, c1) from such a sum of g * xhat that of g * (x - mean); and back. */
    void (*without_invstd)(const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *gx, double *dz_dev);
    void (*with_invstd)(const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *dz_dev, double *gx);
    /* The coefficients of channels [c0, c1): of the forward pass, from running statistics of what a lane computes in,
     * too; and the batch terms of the backward pass, from pooled sums over so many values. */
    void (*coef)(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const bn_source *from, const bn_coef *k);
    void (*running_coef)(const bn_problem *p, const void *mean, const void *var, const bn_source *from,
                         const bn_coef *k);
    void (*backward_coef)(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *g, const double *gx,
                          double count, const bn_coef *k);
    /* gradient = (what a lane computes in) sum, of channels [c0, c1) */
    void (*round)(const double *sum, ptrdiff_t c0, ptrdiff_t c1, void *gradient);
    /* running = (1 - momentum) * running + momentum * (batch * factor) in float64, of channels [c0, c1). A channel
     * where `finite`, if that is not NULL, is beyond what a lane computes in stays as it is. */
    void (*move_running)(const bn_running *running, const double *batch, const double *finite, ptrdiff_t c0,
                         ptrdiff_t c1, double momentum, double factor);
} bn_terms;

typedef struct {
    const char *name;
    const bn_loops *loops[BN_N_ELEMENTS][BN_LOOPS]; /* planes and rows, and both with a mask */
    const bn_terms *terms[BN_N_ELEMENTS];
} bn_kernels;

/* The kernels this CPU can run, the best last; returns their number. */
enum { BN_MAX_ISAS = 3 };
int bn_supported(const bn_kernels *tables[BN_MAX_ISAS]);

/* Rows that are folded into one, of C channels. */
ptrdiff_t bn_fold(ptrdiff_t C);

/* What an activation is called in Python, NULL for none; and an element. */
const char *bn_activation_name(int code);
const char *bn_element_name(int element);

/* Bytes of an element, and of what a lane computes in. */
ptrdiff_t bn_element_bytes(int element);
ptrdiff_t bn_real_bytes(int element);

#endif
