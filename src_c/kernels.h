/* kernels.h: what a kernel is given, and the one list of kernels.
 *
 * A kernel is a serial C function over a range of the work. It knows nothing of threads or Python, allocates
 * nothing and keeps no state. A tensor is walked in one of two ways:
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

enum { BN_PLANES, BN_ROWS };
#define BN_SHORT_PLANE 256                   /* values */
#define BN_PANEL       2048                  /* columns at a time in sums over rows */
#define BN_ROOM        (1024 + 5 * BN_PANEL) /* floats: their shifts and sums, and where they may begin */
enum { BN_IDENTITY, BN_RELU, BN_RELU6, BN_LEAKY_RELU };

typedef struct {
    float *data; /* NULL: absent */
    ptrdiff_t outer, inner;
} bn_operand;

typedef struct {
    int layout, activation;
    int stream;    /* write outputs past the cache; 2: inputs come from beyond it */
    int packed;    /* no gaps in any operand: rows have N == 1 and inner == C, planes inner == S */
    int by_output; /* backward: y stands in place of the residual, and tells where its activation was cut */
    float negative_slope;
    ptrdiff_t N, C, S;
    ptrdiff_t fold;
    ptrdiff_t pitch; /* of rows, in every operand: C if packed, more for columns of such rows; 0: they differ */
    bn_operand x, residual, grad_output;     /* read */
    bn_operand y, grad_input, grad_residual; /* written */
    float *room; /* BN_ROOM floats from a cache line on, of this thread alone, for stats and sums over rows */
} bn_problem;

/* Per-channel coefficients, float32. For rows C * fold of them (of offset C), then 16 more that begin again with the
 * first; for planes C.
 *   forward:   z = (x - mean) * scale + shift
 *   backward:  xhat = (x - mean) * invstd + offset
 *              dx = ((g - g_mean) + (x - mean) * g_proj) * scale + g_shift */
typedef struct {
    float *mean, *scale, *shift; /* pointers to float alone: owners move all of them by one distance */
    float *invstd, *offset, *g_mean, *g_proj, *g_shift;
} bn_coef;

/* Running averages of all channels: float32 values, float64 ones, or float32 ones with what each was rounded from,
 * which counts for as long as it rounds to that value. NULL: none. So many bytes apart, at any address. */
typedef struct {
    char *value, *exact;
    ptrdiff_t stride, exact_stride;
} bn_running;

typedef struct {
    const char *name;

    /* The number of tiles of each channel. */
    ptrdiff_t (*tiles)(const bn_problem *p);
    /* How many rows BN_ROWS folds into one, of so many of C channels; with more rows it is the same or a multiple.
     * Tiles are those of 0 rows. */
    ptrdiff_t (*fold)(ptrdiff_t C, ptrdiff_t rows);
    /* For tiles [t0, t1) of channels (rows: columns) [c0, c1): the mean and the sum of squared deviations, written
     * at [(t - t0) * ld + (c - c0)]. Indexed by layout, as are the three below. */
    void (*stats[2])(const bn_problem *p, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0, ptrdiff_t c1, double *mean,
                     double *m2, ptrdiff_t ld);
    /* y = activation((x - mean) * scale + shift + residual) on elements [e0, e1). Planes that are streamed prefetch
     * x[i + ahead] on the way. */
    void (*forward[2])(const bn_problem *p, const bn_coef *k, ptrdiff_t e0, ptrdiff_t e1, ptrdiff_t ahead);
    /* Like stats: sums of g = grad_output * activation'(z), and of g * (x - mean) * invstd. With frozen != 0 it also
     * writes grad_input = g * scale and grad_residual = g, and that is the whole backward pass. */
    void (*sums[2])(const bn_problem *p, const bn_coef *k, int frozen, ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t c0,
                    ptrdiff_t c1, double *g, double *gx, ptrdiff_t ld);
    /* grad_input (and grad_residual) on elements [e0, e1). */
    void (*backward[2])(const bn_problem *p, const bn_coef *k, ptrdiff_t e0, ptrdiff_t e1, ptrdiff_t ahead);
    /* Planes of more than BN_SHORT_PLANE values, streamed: forward on channels [c0, c0 + channels) and, in the same
     * loop, stats of all tiles of [other, other + channels), with ld == channels; or backward and sums. */
    void (*forward_and_stats)(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t other, ptrdiff_t channels,
                              double *mean, double *m2);
    void (*backward_and_sums)(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t other, ptrdiff_t channels,
                              double *g, double *gx);

    /* Pools what stats wrote for all tiles of channels [c0, c1) into mean[c] and the biased variance var[c]. The
     * tiles' arrays begin at channel c0 and are ld wide. */
    void (*pool_stats)(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *tile_mean, const double *tile_m2,
                       ptrdiff_t ld, double *mean, double *var);
    /* Adds up what sums wrote, to those of g and of g * xhat, which are the gradients of bias and weight. */
    void (*pool_sums)(const bn_problem *p, const bn_coef *k, ptrdiff_t c0, ptrdiff_t c1, const double *tile_g,
                      const double *tile_gx, ptrdiff_t ld, double *g, double *gx, float *grad_weight, float *grad_bias);
    /* The coefficients of channels [c0, c1) from float64 statistics; weight and bias may be NULL. */
    void (*coef)(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *mean, const double *var,
                 const float *weight, const float *bias, double eps, const bn_coef *k);
    /* running = (1 - momentum) * running + momentum * (batch * factor) in float64, of channels [c0, c1). A channel
     * where `finite`, if that is not NULL, is beyond float32 stays as it is. */
    void (*move_running)(const bn_running *running, const double *batch, const double *finite, ptrdiff_t c0,
                         ptrdiff_t c1, double momentum, double factor);
    /* The coefficients of all channels from float32 running statistics. */
    void (*running_coef)(const bn_problem *p, const float *mean, const float *var, const float *weight,
                         const float *bias, double eps, const bn_coef *k);
    /* Puts the batch terms of the backward pass in, after coef, from the pooled sums. */
    void (*backward_coef)(const bn_problem *p, ptrdiff_t c0, ptrdiff_t c1, const double *g, const double *gx,
                          const bn_coef *k);
} bn_kernels;

extern const bn_kernels bn_kernels_baseline;
#ifdef FASTBN_HAVE_AVX2
extern const bn_kernels bn_kernels_avx2;
#endif
#ifdef FASTBN_HAVE_AVX512
extern const bn_kernels bn_kernels_avx512;
#endif

/* The kernels this CPU can run, the best last; returns their number. */
int bn_supported(const bn_kernels *tables[3]);

#endif
