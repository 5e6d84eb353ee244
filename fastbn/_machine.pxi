# The C that there is and the machine it runs on, its caches, instruction sets and threads: a part of _kernels.pyx.

cdef extern from "kernels.h":
    enum:
        BN_PLANES, BN_ROWS, BN_SHORT_PLANE, BN_ROOM
        BN_IDENTITY, BN_RELU, BN_RELU6, BN_LEAKY_RELU

    ctypedef struct bn_operand:
        float *data
        Py_ssize_t outer, inner

    ctypedef struct bn_problem:
        int layout, activation, stream, packed, by_output
        float negative_slope
        Py_ssize_t N, C, S, fold, pitch
        bn_operand x, residual, grad_output, y, grad_input, grad_residual
        float *room

    ctypedef struct bn_coef:
        float *mean
        float *scale
        float *shift
        float *invstd
        float *offset
        float *g_mean
        float *g_proj
        float *g_shift

    ctypedef struct bn_running:
        char *value
        char *exact
        Py_ssize_t stride, exact_stride

    ctypedef struct bn_kernels:
        const char *name
        Py_ssize_t (*tiles)(const bn_problem *) noexcept nogil
        Py_ssize_t (*fold)(Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*stats[2])(const bn_problem *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, double *, double *,
                         Py_ssize_t) noexcept nogil
        void (*forward[2])(const bn_problem *, const bn_coef *, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*sums[2])(const bn_problem *, const bn_coef *, int, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                        double *, double *, Py_ssize_t) noexcept nogil
        void (*backward[2])(const bn_problem *, const bn_coef *, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*forward_and_stats)(const bn_problem *, const bn_coef *, Py_ssize_t, Py_ssize_t, Py_ssize_t, double *,
                                  double *) noexcept nogil
        void (*backward_and_sums)(const bn_problem *, const bn_coef *, Py_ssize_t, Py_ssize_t, Py_ssize_t, double *,
                                  double *) noexcept nogil
        void (*pool_stats)(const bn_problem *, Py_ssize_t, Py_ssize_t, const double *, const double *, Py_ssize_t,
                           double *, double *) noexcept nogil
        void (*pool_sums)(const bn_problem *, const bn_coef *, Py_ssize_t, Py_ssize_t, const double *, const double *,
                          Py_ssize_t, double *, double *, float *, float *) noexcept nogil
        void (*coef)(const bn_problem *, Py_ssize_t, Py_ssize_t, const double *, const double *, const float *,
                     const float *, double, const bn_coef *) noexcept nogil
        void (*move_running)(const bn_running *, const double *, const double *, Py_ssize_t, Py_ssize_t, double,
                             double) noexcept nogil
        void (*running_coef)(const bn_problem *, const float *, const float *, const float *, const float *, double,
                             const bn_coef *) noexcept nogil
        void (*backward_coef)(const bn_problem *, Py_ssize_t, Py_ssize_t, const double *, const double *,
                              const bn_coef *) noexcept nogil

    int bn_supported(const bn_kernels *tables[3])

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, int order, void *dtype, int subok)
    object PyDataMem_SetHandler(object handler)

    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept
        void *(*calloc)(void *, size_t, size_t) noexcept
        void *(*realloc)(void *, void *, size_t) noexcept
        void (*free)(void *, void *, size_t) noexcept

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

cdef extern from "outputs.h":
    void *bn_output_malloc(size_t)
    void *bn_output_calloc(size_t, size_t)
    void *bn_output_realloc(void *, size_t)
    void bn_output_free(void *)
    void bn_output_give_back()
    void bn_output_set_limit(size_t)
    size_t bn_output_limit()
    size_t bn_output_held()

cdef extern from "team.h":
    int BN_OPENMP
    ctypedef void (*bn_member)(void *work, int member, int team) noexcept nogil
    long long bn_now() nogil
    void bn_release_pool()
    void bn_release_before_fork()
    int bn_team_held
    int bn_startable(int threads, size_t stack) nogil
    int bn_in_team(int threads, bn_member member, void *work) nogil
    void bn_barrier() nogil
    int bn_openmp_threads()
    int bn_openmp_cpus()
    const char *bn_openmp_library()

cdef extern from "backoff.h":
    ctypedef struct bn_backoff_counts:
        long long shared, alone, lost
    bint bn_backoff_alone(long long elements, long long now)
    void bn_backoff_judge(long long elements, int threads, long long own, long long wall, long long now)
    bn_backoff_counts bn_backoff_report()
    void bn_backoff_forget()

# For where no GIL keeps others out of what is shared. Not a PyMutex: that may be handed to a thread that waits for it,
# and a child that another thread forks then finds it locked for ever. This one is held by running threads alone, and
# before it forks Python stops those where they hold nothing.
cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #include <sched.h>
    #include <stdatomic.h>
    static atomic_flag fastbn_in_use = ATOMIC_FLAG_INIT;
    static void fastbn_lock(void) {
        while (atomic_flag_test_and_set_explicit(&fastbn_in_use, memory_order_acquire))
            sched_yield();
    }
    static void fastbn_unlock(void) {
        atomic_flag_clear_explicit(&fastbn_in_use, memory_order_release);
    }
    #else
    #define fastbn_lock() ((void)0)
    #define fastbn_unlock() ((void)0)
    #endif
    """
    void fastbn_lock()
    void fastbn_unlock()


def caches():
    """Bytes of a core's L2 and of the last-level cache, and how many CPUs share the latter; a guess if not on Linux."""
    found = {2: (1 << 20, 1), 3: (8 << 20, 1)}
    for i in range(1, 8):
        facts = []
        try:
            for fact in "level", "type", "size", "shared_cpu_list":
                with open(f"/sys/devices/system/cpu/cpu0/cache/index{i}/{fact}") as file:
                    facts.append(file.read().strip())
            if facts[1] == "Unified":
                spans = [span.partition("-") for span in facts[3].split(",")]
                sharing = sum([int(end or first) - int(first) + 1 for first, _, end in spans])
                found[int(facts[0])] = int(facts[2].removesuffix("K")) << 10, sharing
        except (OSError, ValueError):
            break
    return found[2][0], *found[max(found)]


cdef Py_ssize_t L2_BYTES, LLC_BYTES, LLC_CPUS
L2_BYTES, LLC_BYTES, LLC_CPUS = caches()

openmp = BN_OPENMP or None  # the OpenMP version as yyyymm, None in a serial build


# ---- which instruction set ------------------------------------------------------------------------------------

cdef const bn_kernels *TABLES[3]
cdef int N_TABLES = bn_supported(TABLES)
cdef const bn_kernels *K = TABLES[N_TABLES - 1]


def supported_isas():
    """The instruction sets this build has kernels for and this CPU can run, the best last."""
    return tuple(TABLES[i].name.decode() for i in range(N_TABLES))


def get_isa():
    return K.name.decode()


def set_isa(name):
    """Choose the kernels of all later calls; returns the name of those in use before. For tests."""
    global K
    previous = get_isa()
    if name not in supported_isas():
        raise ValueError(f"this CPU and build offer {', '.join(supported_isas())}; got {name!r}")
    K = TABLES[supported_isas().index(name)]
    return previous


if os.environ.get("FASTBN_ISA"):
    try:
        set_isa(os.environ["FASTBN_ISA"])
    except ValueError as error:
        raise ImportError(f"FASTBN_ISA: {error}; unset it to take the best") from None


# ---- how many threads ---------------------------------------------------------------------------------------------

cdef enum:
    MAX_THREADS = 1024

cdef int AT_WORK = 0, MOST_AT_WORK = 0  # threads of calls that have let go of the GIL, now and at most
cdef int DEFAULT_THREADS = 0  # that a call took which named no number; only its kind is judged


cdef int ask_threads(num_threads, Py_ssize_t elements) except -1:
    cdef Py_ssize_t n = 1
    if num_threads is not None:
        n = whole(num_threads, "num_threads", "be from 1 to 1024")
        if not 1 <= n <= MAX_THREADS:
            raise ValueError(f"num_threads must be from 1 to {MAX_THREADS}, got {num_threads}")
    if elements < SERIAL:
        return 1
    if openmp is None:
        from fastbn import threads
        threads.warn_if_serial(num_threads)
        return 1
    if threads_module is None:
        first_parallel_call()
    if num_threads is None:
        n = threads_module.get_num_threads()
        if n > 1:
            n = default_threads(n, elements)
    return n if n == 1 else startable(n)


cdef int default_threads(int n, Py_ssize_t elements) noexcept:
    """Of n threads, what a call takes that named no number: all, or itself alone where others in calls leave no CPUs
    or where sharing did not pay lately."""
    global DEFAULT_THREADS
    cdef bint alone
    fastbn_lock()
    DEFAULT_THREADS = n
    alone = AT_WORK > 0 and AT_WORK + n > CPUS or bn_backoff_alone(elements, bn_now())
    fastbn_unlock()
    return 1 if alone else n


cdef int startable(int n) except -1:
    """n, or fewer where the system does not give as many threads: OpenMP would end the process."""
    cdef int can
    if n <= bn_team_held:
        return n
    with nogil:
        can = bn_startable(n, STACK_BYTES)
    if can < n:
        threads_module.warn_of_fewer(can, n)
    return can


cdef object threads_module = None  # imported at the first call that is big enough to need it
cdef size_t STACK_BYTES = 0  # of OpenMP's threads; 0: the system's default
cdef int CPUS = 1  # that the process may use


cdef int first_parallel_call() except -1:
    global threads_module, STACK_BYTES, CPUS
    from fastbn import threads
    STACK_BYTES = threads.stack_bytes()
    CPUS = threads.count_cpus()
    bn_release_before_fork()
    threads_module = threads
    return 0


def release_pool():
    """Give up this thread's OpenMP pool; it is made again when it is needed."""
    bn_release_pool()


def openmp_threads():
    """What OpenMP allows the calling thread, and threadpoolctl sets; 1 in a serial build."""
    return bn_openmp_threads()


def openmp_cpus():
    """The CPUs that OpenMP found before it bound threads to some of them; 0 if it has not."""
    return bn_openmp_cpus()


def openmp_library():
    """The file of the OpenMP runtime that the kernels use, None if that is unknown."""
    cdef const char *file = bn_openmp_library()
    return None if file == NULL else os.fsdecode(file)


def judge(elements, threads, own, wall):
    """Learn from a call as if one of so many elements had taken `wall` nanoseconds, and its caller's share `own`."""
    fastbn_lock()
    bn_backoff_judge(elements, threads, own, wall, bn_now())
    fastbn_unlock()


def sharing():
    """How many calls were shared out, went alone instead, and took longer than alone, among those that named no number
    of threads."""
    cdef bn_backoff_counts counts = bn_backoff_report()
    return counts.shared, counts.alone, counts.lost


def would_share(Py_ssize_t elements):
    """Whether a call of so many elements would be shared out now. For tests: it counts as one that asked."""
    fastbn_lock()
    cdef bint alone = bn_backoff_alone(elements, bn_now())
    fastbn_unlock()
    return not alone


def most_at_work():
    """The most threads that were in calls at once. For tests."""
    return MOST_AT_WORK


def forget_sharing():
    """Share all calls out again, until that does not pay. For tests."""
    fastbn_lock()
    bn_backoff_forget()
    fastbn_unlock()
