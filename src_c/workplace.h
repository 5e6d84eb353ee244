/* workplace.h: where in a call's memory each thread finds what it needs meanwhile. */
#ifndef FASTBN_WORKPLACE_H
#define FASTBN_WORKPLACE_H

#include "schedule.h"

/* What some channels are worked on with: their sums, or those of one owner. All but the tiles are indexed by channel,
 * so that the arrays of an owner begin before its memory does, where nothing is touched. */
typedef struct {
    double *tile_a, *tile_b;
    double *mean, *var, *g, *gx;
    bn_coef k;
    void *room;
} bn_workplace;

/* What a call with a mask needs to know of it, into its scratch: before any member begins. */
void bn_count_mask(bn_call *call);

/* Of all channels without an owner; the room for sums is this member's. */
bn_workplace bn_shared_place(const bn_call *call, const bn_member *me);

/* A member's own, for one share of the owned channels after the other, and as it is for those from `first` on. */
bn_workplace bn_own_place(const bn_call *call, const bn_member *me);
bn_workplace bn_for_channels_from(const bn_call *call, const bn_workplace *own, ptrdiff_t first);

#endif
