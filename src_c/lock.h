/* lock.h: for where no GIL keeps others out of what is shared.
 *
 * Not a mutex of Python's: that may be handed to a thread that waits for it, and a child that another thread forks then
 * finds it locked for ever. This one is held by running threads alone, and before it forks Python stops those where
 * they hold nothing. */
#ifndef FASTBN_LOCK_H
#define FASTBN_LOCK_H

#include <Python.h>

#ifdef Py_GIL_DISABLED
void bn_lock(void);
void bn_unlock(void);
#else
#define bn_lock()   ((void)0)
#define bn_unlock() ((void)0)
#endif

#endif
