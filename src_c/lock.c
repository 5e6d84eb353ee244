/* lock.c: the locks that lock.h tells of. */
#include "lock.h"

#ifdef _WIN32
#include <intrin.h>
#include <windows.h>
typedef volatile char flag;
#define TAKE(f)  _InterlockedExchange8(f, 1)
#define CLEAR(f) ((void)_InterlockedExchange8(f, 0))
#define YIELD()  SwitchToThread()
#else
#include <pthread.h>
#include <sched.h>
typedef char flag;
#define TAKE(f)  __atomic_test_and_set(f, __ATOMIC_ACQUIRE)
#define CLEAR(f) __atomic_clear(f, __ATOMIC_RELEASE)
#define YIELD()  sched_yield()
#endif

static void take(flag *f) {
    while (TAKE(f))
        YIELD();
}

#ifdef Py_GIL_DISABLED
static flag in_use;

void bn_lock(void) { take(&in_use); }

void bn_unlock(void) { CLEAR(&in_use); }
#endif

static flag outputs_in_use;

void bn_lock_outputs(void) { take(&outputs_in_use); }

void bn_unlock_outputs(void) { CLEAR(&outputs_in_use); }

int bn_lock_outputs_at_forks(void) {
#ifndef _WIN32
    static int done;
    if (!done && pthread_atfork(bn_lock_outputs, bn_unlock_outputs, bn_unlock_outputs))
        return -1;
    done = 1;
#endif
    return 0;
}
