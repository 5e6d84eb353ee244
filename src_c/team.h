/* team.h: the threads of a call: OpenMP's region, what can keep its threads from starting, and what they inherit.
 *
 * In a header, because it is compiled with OpenMP's flags into the one file that opens regions. A region is opened in C
 * and not by Cython, which would ask for the GIL's state in each thread: with Python 3.10 and 3.11 that ends the
 * process once there has been a subinterpreter. */
#ifndef FASTBN_TEAM_H
#define FASTBN_TEAM_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#define BN_SSE 1
#else
#include <fenv.h>
#define BN_SSE 0
#endif

#ifdef _OPENMP
#include <omp.h>
#define BN_OPENMP _OPENMP
#else
#define BN_OPENMP 0
#endif

#if BN_OPENMP && !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <stdio.h>
#include <sys/syscall.h>
#endif
#define BN_PTHREADS 1
#else
#define BN_PTHREADS 0
#endif

/* OpenMP 5.0; GCC has had it since 9 without saying so in _OPENMP */
#if BN_OPENMP >= 201811 || (BN_OPENMP && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9)
#define bn_pause_openmp() ((void)omp_pause_resource_all(omp_pause_soft))
#else
#define bn_pause_openmp() ((void)0)
#endif

#ifdef _MSC_VER
#define BN_THREAD_LOCAL __declspec(thread)
#else
#define BN_THREAD_LOCAL _Thread_local
#endif

static inline int64_t bn_now(void) {
    struct timespec t;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC);
#endif
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Members of the team that OpenMP holds for this thread, itself counted; 0: none yet. */
static BN_THREAD_LOCAL int bn_team_held;

/* ---- giving threads up */

static inline void bn_release_pool(void) {
    bn_pause_openmp();
    bn_team_held = 0;
}

/* In a child the threads of its parent's pool are gone, and GNU OpenMP waits for them for ever. A handler in C is
 * also called where a server forks without telling Python, and after every hook that Python calls before a fork. */
static inline void bn_release_before_fork(void) {
#if BN_PTHREADS
    static int registered;
    if (!registered) /* two threads that race here register it twice, which does no harm */
        registered = pthread_atfork(bn_release_pool, NULL, NULL) == 0;
#endif
}

/* ---- starting threads: GNU OpenMP ends the process where that fails */

#if BN_PTHREADS
typedef struct {
    pthread_mutex_t gate;
    size_t stack; /* bytes, 0: the system's default */
} bn_trial;

typedef struct {
    bn_trial *trial;
    pthread_t thread;
    long id; /* of the kernel's, or 0 */
} bn_trial_thread;

static inline void *bn_wait_at_gate(void *arg) {
    bn_trial_thread *t = (bn_trial_thread *)arg;
#ifdef __linux__
    t->id = syscall(SYS_gettid);
#endif
    pthread_mutex_lock(&t->trial->gate);
    pthread_mutex_unlock(&t->trial->gate);
    return NULL;
}

/* A thread that was joined counts against limits until the kernel has let go of it, a little later. */
static inline void bn_wait_until_gone(long id) {
#ifdef __linux__
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%ld", id);
    for (int i = 0; id && i < 1000 && access(path, F_OK) == 0; i++)
        sched_yield();
#else
    (void)id;
#endif
}
#endif

/* Of so many threads, the caller one of them, how many can be had. Where the caller's team is to grow, as many are
 * started, held until all are there, and joined: the memory of their stacks stays at hand for those of OpenMP. */
static inline int bn_startable(int threads, size_t stack) {
#if BN_PTHREADS
    if (threads <= bn_team_held)
        return threads;
    bn_trial trial = {.stack = stack};
    bn_trial_thread *all = (bn_trial_thread *)calloc((size_t)threads, sizeof *all);
    void *spare = malloc(1 << 16); /* for what OpenMP notes down about a team */
    int n = 0;
    pthread_attr_t attributes;
    if (all != NULL && spare != NULL && pthread_attr_init(&attributes) == 0) {
        if (stack)
            pthread_attr_setstacksize(&attributes, stack);
        pthread_mutex_init(&trial.gate, NULL);
        pthread_mutex_lock(&trial.gate);
        for (; n < threads - 1; n++) {
            all[n].trial = &trial;
            if (pthread_create(&all[n].thread, &attributes, bn_wait_at_gate, &all[n]) != 0)
                break;
        }
        pthread_mutex_unlock(&trial.gate);
        for (int i = 0; i < n; i++) {
            pthread_join(all[i].thread, NULL);
            bn_wait_until_gone(all[i].id);
        }
        pthread_mutex_destroy(&trial.gate);
        pthread_attr_destroy(&attributes);
    }
    free(spare);
    free(all);
    return n + 1;
#else
    (void)stack;
    return threads;
#endif
}

/* ---- rounding mode and flush-to-zero */

#if BN_SSE
/* Without x87's, which the kernels do not use and which takes longer than a small region's work. */
typedef unsigned bn_arithmetic;
static inline bn_arithmetic bn_get_arithmetic(void) { return _mm_getcsr() & ~0x3fu; /* but what has happened so far */ }
static inline void bn_set_arithmetic(bn_arithmetic a) {
    if (bn_get_arithmetic() != a)
        _mm_setcsr(a);
}
#else
typedef fenv_t bn_arithmetic;
static inline bn_arithmetic bn_get_arithmetic(void) {
    fenv_t a;
    fegetenv(&a);
    return a;
}
static inline void bn_set_arithmetic(bn_arithmetic a) { fesetenv(&a); }
#endif

/* ---- the region */

typedef void (*bn_work)(void *work, int member, int team);

/* Call `work` as each member of a team. Rounding mode and flush-to-zero are the caller's in all of them, or the number
 * of threads would change bits. Returns whether the team was new, and its threads had to be started. */
static inline int bn_in_team(int threads, bn_work member, void *work) {
#if BN_OPENMP
    int fresh = threads > bn_team_held;
    const bn_arithmetic callers = bn_get_arithmetic();
#pragma omp parallel num_threads(threads)
    {
        int i = omp_get_thread_num();
        const bn_arithmetic own = bn_get_arithmetic();
        if (i)
            bn_set_arithmetic(callers);
        member(work, i, omp_get_num_threads());
        if (i)
            bn_set_arithmetic(own);
    }
    bn_team_held = threads; /* GNU OpenMP ends the threads that a smaller team leaves out */
    return fresh;
#else
    (void)threads;
    member(work, 0, 1);
    return 0;
#endif
}

static inline void bn_barrier(void) {
#if BN_OPENMP
#pragma omp barrier
#endif
}

/* ---- what OpenMP says */

static inline int bn_openmp_threads(void) {
#if BN_OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* CPUs that OpenMP found when it was loaded, if it has bound threads to places since: then the affinity of a thread
 * tells its place, not what the process may use. Else 0. */
static inline int bn_openmp_cpus(void) {
#if BN_OPENMP >= 201511
    return omp_get_num_places() > 0 ? omp_get_num_procs() : 0;
#else
    return 0;
#endif
}

/* The library that our OpenMP calls reach; NULL: unknown. */
static inline const char *bn_openmp_library(void) {
#if BN_OPENMP && !defined(_WIN32)
    Dl_info info;
    return dladdr((void *)omp_get_max_threads, &info) ? info.dli_fname : NULL;
#else
    return NULL;
#endif
}

#endif
