/* schedule.h: a call as its threads go through it, by its plan. */
#ifndef FASTBN_SCHEDULE_H
#define FASTBN_SCHEDULE_H

#include "plan.h"

typedef struct {
    const bn_kernels *K;
    bn_problem p;
    bn_plan plan;
    bn_source source;   /* what coefficients are made from; in training with the statistics of the batch instead */
    double *mean, *var; /* where those go; NULL: they are not wanted afterwards */
    bn_running running_mean, running_var; /* to be moved, if `update` */
    int update, skip_nonfinite;
    double momentum, unbiasing;
    double *dz, *dz_dev; /* the sums of g and of g * (x - mean), where they go or those that are given; or NULL */
    double count;        /* values of a channel that those for the second pass are over */
    void *grad_weight, *grad_bias; /* of what a lane computes in; NULL: not wanted */
    bn_coef k;                     /* coefficients of inference; others are made in scratch */
    void *memory;                  /* what scratch lies in, to be freed */
    char *scratch;                 /* plan.scratch.bytes from a cache line on; NULL: none are needed */
} bn_call;

/* One of the threads at a call, and how it waits for all the others; alone it need not. */
typedef struct {
    int member, team;
    void (*wait)(void *arg);
    void *arg;
} bn_member;

/* One member's share of the work. The team may be smaller than the plan's number of threads. */
void bn_do_share(const bn_call *call, const bn_member *me);

/* k's arrays from `at` on, so many bytes from one to the next. */
void bn_coef_at(bn_coef *k, char *at, size_t step, int backward);

/* Something that is gone through at the same time: addresses whole periods from its own are alike. */
typedef struct {
    const void *at;
    size_t period; /* bytes, a power of two */
} bn_neighbour;
bn_neighbour bn_rows_beside(const void *at, size_t bytes_of_row);

/* Where in the page from `memory` on something begins to be as far as can be, in the low bits of addresses, from all
 * its neighbours: what is loaded for the next columns would wait for what is stored to these, or both would crowd each
 * other out of a set of L1. Rows of few lines, or of an odd number, are near whatever there is. */
char *bn_clear_of(char *memory, const bn_neighbour *beside, int n);

#endif
