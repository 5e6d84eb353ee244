/* backoff.c: see backoff.h. Not locked: one call at a time. */
#include "backoff.h"

#include <string.h>

/* Debt from which calls go alone, and what calls that gained can pay in advance. A machine where one call in a
 * hundred is late by a little gains from sharing; one that lasted a scheduler's slice is beyond all credit. */
static const double MOST_DEBT = 1.0, MOST_CREDIT = 10.0;
/* A call that gained pays at most so much, or one lucky call would stand for many late ones. */
static const double MOST_PAID = 0.5;
/* Calls of the first pause, how much longer each further one is, and the longest: beyond it the tries' share of the
 * calls is far below a hundredth. */
static const int64_t FIRST_PAUSE = 8, LONGER = 4, LONGEST_PAUSE = 8192;
/* Wins that shorten the next pause by one step: fewer, and a machine where one call in a hundred is late would be
 * tried too often. */
static const double WINS_A_STEP = 256.0;
/* A pause lasts so many times what was lost, at most; the first one lasts as long as that. */
static const int64_t TIMES_THE_LOSS = 20;

/* The first call after a pause wakes the threads and tells nothing of those that follow it, unless it took so many
 * times what a call takes alone. */
static const int64_t FAR_TOO_LATE = 10;

static bn_backoff classes[BN_BACKOFF_CLASSES];
static bn_backoff_counts counts;

static bn_backoff *of_size(int64_t elements) {
    int i = 0;
    while (elements >>= 1)
        i++;
    return &classes[i];
}

int bn_backoff_alone(int64_t elements, int64_t now) {
    bn_backoff *b = of_size(elements);
    int alone = b->alone > 0 || now < b->until;
    b->alone -= b->alone > 0;
    counts.alone += alone;
    return alone;
}

void bn_backoff_judge(int64_t elements, int threads, int64_t own, int64_t wall, int64_t now) {
    bn_backoff *b = of_size(elements);
    int64_t by_one = own * threads, lost = wall - by_one;
    counts.shared++;
    counts.lost += lost > 0;
    if (by_one <= 0)
        return;
    if (b->paused) {
        b->paused = 0;
        if (lost < FAR_TOO_LATE * by_one)
            return;
    }
    if (lost <= 0) {
        double paid = (double)-lost / (double)by_one;
        b->debt -= paid < MOST_PAID ? paid : MOST_PAID;
        b->pauses -= 1.0 / WINS_A_STEP;
        b->debt = b->debt < -MOST_CREDIT ? -MOST_CREDIT : b->debt;
        b->pauses = b->pauses < 0 ? 0 : b->pauses;
        return;
    }
    b->debt += (double)lost / (double)by_one;
    if (b->debt <= MOST_DEBT)
        return;
    int64_t calls = FIRST_PAUSE;
    for (int i = (int)b->pauses; i > 0 && calls < LONGEST_PAUSE; i--)
        calls *= LONGER;
    b->pauses += calls < LONGEST_PAUSE;
    b->alone = calls;
    int64_t times = calls / FIRST_PAUSE;
    b->until = now + lost * (times < TIMES_THE_LOSS ? times : TIMES_THE_LOSS);
    b->paused = 1;
    b->debt = MOST_DEBT / 2; /* the next try that is late is enough */
}

bn_backoff_counts bn_backoff_report(void) { return counts; }

void bn_backoff_forget(void) {
    memset(classes, 0, sizeof classes);
    memset(&counts, 0, sizeof counts);
}
