/* backoff.h: whether a call's work is shared out among threads, learned from what that brought the calls before.
 *
 * Where other processes keep the CPUs busy, or the threads have gone to sleep since the last call, a thread may come
 * so late that the caller would have been done alone. Such calls are counted as debts and those that gained as
 * payments. With too much debt, the next calls go alone: at first a few of them, more after every further loss, and
 * always so many and for so long that what the tries lose stays below a hundredth of the calls and a twentieth of the
 * time. Calls of about the same size learn together. How the work is cut does not depend on who does it, and so no
 * result does. */
#ifndef FASTBN_BACKOFF_H
#define FASTBN_BACKOFF_H

#include <stdint.h>

enum { BN_BACKOFF_CLASSES = 64 };

typedef struct {
    double debt;   /* in units of what a call takes alone */
    double pauses; /* that have doubled since it began to lose; wins take from it */
    int64_t alone; /* calls that go alone from now on, */
    int64_t until; /* and the time before which all do, in nanoseconds */
    int paused;    /* whether none was shared out since */
} bn_backoff;

typedef struct {
    int64_t shared, alone,
        lost; /* calls shared out, calls that went alone instead, calls shared out that took longer */
} bn_backoff_counts;

/* Whether a call of so many elements is to go alone now; counts it. */
int bn_backoff_alone(int64_t elements, int64_t now);

/* What a call that was shared out took: `wall` in all, of which the caller worked `own`, with so many threads. */
void bn_backoff_judge(int64_t elements, int threads, int64_t own, int64_t wall, int64_t now);

bn_backoff_counts bn_backoff_report(void);

/* All as at the start. */
void bn_backoff_forget(void);

#endif
