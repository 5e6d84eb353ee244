# The C that there is and the machine it runs on, its caches, instruction sets and threads: a part of _kernels.pyx.

cdef extern from "kernels.h":
    enum:
        BN_PLANES, BN_ROWS, BN_SHORT_PLANE
        BN_IDENTITY, BN_RELU, BN_RELU6, BN_LEAKY_RELU

    ctypedef struct bn_operand:
        float *data
        Py_ssize_t outer, inner

    ctypedef struct bn_problem:
        int layout, activation, stream, packed
        float negative_slope
        Py_ssize_t N, C, S, fold, pitch
        bn_operand x, residual, grad_output, y, grad_input, grad_residual

    ctypedef struct bn_coef:
        float *mean
        float *scale
        float *shift
        float *invstd
        float *offset
        float *g_mean
        float *g_proj
        float *g_shift

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
        void (*move_running)(char *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, double, double) noexcept nogil
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

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTBN_OPENMP _OPENMP
    #else
    #define FASTBN_OPENMP 0
    #endif
    /* OpenMP 5.0; GCC has had it since 9 without saying so in _OPENMP */
    #if FASTBN_OPENMP >= 201811 || (FASTBN_OPENMP && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9)
    #define fastbn_release_pool() ((void)omp_pause_resource_all(omp_pause_soft))
    #else
    #define fastbn_release_pool() ((void)0)
    #endif
    #if FASTBN_OPENMP
    #define fastbn_openmp_threads() omp_get_max_threads()
    #define fastbn_team_size() omp_get_num_threads()
    #define fastbn_barrier() _Pragma("omp barrier")
    #else
    #define fastbn_openmp_threads() 1
    #define fastbn_team_size() 1
    #define fastbn_barrier() ((void)0)
    #endif
    /* the library that our OpenMP calls reach; NULL: unknown */
    #if FASTBN_OPENMP && !defined(_WIN32)
    #include <dlfcn.h>
    static const char *fastbn_openmp_library(void) {
        Dl_info info;
        return dladdr((void *)omp_get_max_threads, &info) ? info.dli_fname : NULL;
    }
    #else
    #define fastbn_openmp_library() NULL
    #endif
    """
    int FASTBN_OPENMP
    void fastbn_release_pool() nogil
    int fastbn_openmp_threads()
    int fastbn_team_size() nogil
    void fastbn_barrier() nogil
    const char *fastbn_openmp_library()


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

openmp = FASTBN_OPENMP or None  # the OpenMP version as yyyymm, None in a serial build


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

cdef int ask_threads(num_threads, Py_ssize_t elements) except -1:
    cdef Py_ssize_t n = 1
    if num_threads is not None:
        n = whole(num_threads, "num_threads")
        if not 1 <= n <= 1024:
            raise ValueError(f"num_threads must be None or from 1 to 1024, got {num_threads}")
    if elements < SERIAL or openmp is None:
        return 1
    if threads_module is None:
        first_parallel_call()
    if num_threads is None:
        n = threads_module.get_num_threads()
    return min(n, 1024)


cdef object threads_module = None  # imported at the first call that is big enough to need it


cdef int first_parallel_call() except -1:
    global threads_module
    from fastbn import threads
    threads.register_fork_hook()
    threads_module = threads
    return 0


def release_pool():
    """Give up this thread's OpenMP pool; it is made again when it is needed."""
    with nogil:
        fastbn_release_pool()


def openmp_threads():
    """What OpenMP allows the calling thread, and threadpoolctl sets; 1 in a serial build."""
    return fastbn_openmp_threads()


def openmp_library():
    """The file of the OpenMP runtime that the kernels use, None if that is unknown."""
    cdef const char *file = fastbn_openmp_library()
    return None if file == NULL else os.fsdecode(file)
