/* lock.c: the lock of interpreters without a GIL. */
#include "lock.h"

#ifdef Py_GIL_DISABLED
#include <sched.h>
#include <stdatomic.h>

static atomic_flag in_use = ATOMIC_FLAG_INIT;

void bn_lock(void) {
    while (atomic_flag_test_and_set_explicit(&in_use, memory_order_acquire))
        sched_yield();
}

void bn_unlock(void) { atomic_flag_clear_explicit(&in_use, memory_order_release); }
#endif
