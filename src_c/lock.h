/* lock.h: locks that are held for some instructions, by threads that wait for nothing meanwhile.
 *
 * bn_lock is for where no GIL keeps others out of what is shared. Not a mutex of Python's: that may be handed to a
 * thread that waits for it, and a child that another thread forks then finds it locked for ever. This one is held by
 * running threads alone, and before it forks Python stops those where they hold nothing.
 *
 * Memory of outputs has one of its own with a GIL, too: PyTorch drops tensors in threads that do not hold it. Such
 * threads are not stopped before a fork, which therefore takes the lock itself. */
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

void bn_lock_outputs(void);
void bn_unlock_outputs(void);
int bn_lock_outputs_at_forks(void); /* from now on; not 0: there is no memory for that */

#endif
