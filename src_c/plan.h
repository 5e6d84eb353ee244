/* plan.h: how an operation goes over its data, decided once for a call, from the problem and the machine. */
#ifndef FASTBN_PLAN_H
#define FASTBN_PLAN_H

#include "kernels.h"
#include "machine.h"
#include "tuning.h"

/* X(code, name, first pass, second pass) */
#define BN_OPERATIONS(X)                                                                                               \
    X(INFERENCE, "inference", NO_PASS, PASS_FORWARD)                                                                   \
    X(STATS, "stats", PASS_STATS, NO_PASS)                                                                             \
    X(TRAINING, "training", PASS_STATS, PASS_FORWARD)                                                                  \
    X(SUMS, "sums", PASS_SUMS, NO_PASS)                                                                                \
    X(BACKWARD, "backward", PASS_SUMS, PASS_BACKWARD)                                                                  \
    X(GRAD_INPUT, "grad_input", NO_PASS, PASS_BACKWARD)

#define BN_CODE(code, name, first, second) BN_##code,
enum bn_operation { BN_OPERATIONS(BN_CODE) BN_N_OPERATIONS };
#undef BN_CODE

/* What becomes of the channels: */
enum bn_way {
    BN_ELEMENTWISE, /* there is no first pass */
    BN_OWNED,       /* each group of channels has an owner, who takes it through both passes while it is in cache */
    BN_OVERLAPPED,  /* the same, the second pass of a group in one loop with the first of the next */
    BN_TILED        /* tiles are shared out, then channels, then elements, with all waiting for each other between */
};

/* Shares of the work: so many items, and what each is cut by. */
typedef struct {
    ptrdiff_t items;
    ptrdiff_t panels; /* of tiles: strips of columns; of elements behind owned channels: pieces of a sample */
} bn_shares;

/* Where, in bytes from a cache line on, a call keeps what it needs meanwhile. */
typedef struct {
    size_t bytes;
    size_t rooms, room_step;      /* of each member, for sums over rows */
    size_t owners, owner_step;    /* of each member: sums of tiles, of channels, and coefficients, of owned channels */
    size_t tile_a, tile_b, g, gx; /* of channels without one */
    size_t coef, coef_step;       /* and their coefficients, one array behind the other */
    size_t real;                  /* with a mask: how many positions of each tile are real */
    ptrdiff_t owner_channels;     /* that one share of them has at most */
    int chosen;                   /* whether rooms and coefficients begin where they are clear of rows */
} bn_scratch;

typedef struct {
    enum bn_operation op;
    int threads, class;
    ptrdiff_t T, width; /* tiles of each channel; columns: C, or C * fold in rows */
    int from_memory;    /* whether what is read comes from beyond the cache */
    int reversed;       /* the second pass goes from the end: what the first read last is still in cache */
    ptrdiff_t block;    /* elements it takes at a time then */
    int page_rows;      /* rows of whole pages, in the cache: their direction depends on where they lie */
    bn_pass sums, apply, overlap;

    enum bn_way way; /* of channels [0, owned); the others are tiled */
    ptrdiff_t owned;
    ptrdiff_t group, unit; /* channels that go through all passes together, and whose planes are whole lines */
    ptrdiff_t owner_items; /* groups to be shared out */

    int by_columns; /* rows of one tile: columns are shared out, and none waits before pooling */
    bn_shares tiles, coef, pool, elements;
    bn_scratch scratch;

    const char *why_way, *why_store, *why_rows; /* in words, for those who ask */
} bn_plan;

/* The threads that an operation on so many elements takes, of those that are there. */
int bn_plan_threads(ptrdiff_t elements, int threads, const bn_tuning *t);

void bn_make_plan(bn_plan *plan, const bn_problem *p, enum bn_operation op, const bn_machine *m, const bn_tuning *t,
                  int threads);

/* Whether an operation has a first pass, and a second one; its name. */
enum { BN_NO_PASS, BN_PASS_STATS, BN_PASS_SUMS, BN_PASS_FORWARD, BN_PASS_BACKWARD };
int bn_first_pass(enum bn_operation op);
int bn_second_pass(enum bn_operation op);
const char *bn_operation_name(enum bn_operation op);

#endif
