# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The OpenMP-parallel kernels: the arrays of _arrays.pxi, work cut into items, and the items run in parallel.

An item is one call into the serial C kernels of src_c/, or a few for the same channels. Which thread runs which item
never changes a result: tiles and the order in which they are pooled depend on shape and memory layout alone.
"""

import operator
import os

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport isfinite
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strcpy
from cpython.pycapsule cimport PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX

cnp.import_array()

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
        Py_ssize_t N, C, S, fold
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
                          Py_ssize_t, double *, double *) noexcept nogil
        void (*coef)(const bn_problem *, Py_ssize_t, Py_ssize_t, const double *, const double *, const float *,
                     const float *, double, const bn_coef *) noexcept nogil
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
    void *bn_output_malloc(void *, size_t) noexcept
    void *bn_output_calloc(void *, size_t, size_t) noexcept
    void *bn_output_realloc(void *, void *, size_t) noexcept
    void bn_output_free(void *, void *, size_t) noexcept
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
    #else
    #define fastbn_openmp_threads() 1
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


include "_arrays.pxi"


# ---- the plan of a call, and the items it is cut into -------------------------------------------------------------

cdef Py_ssize_t SERIAL = 65536  # elements below which waking other threads costs more than it brings
cdef Py_ssize_t SERIAL_SUMS = 4096  # tiles times columns up to which one thread pools them: the same reason
# of x: so much at a time goes through all passes, beyond the cache and, of a single sample, within it
cdef Py_ssize_t GROUP_BYTES = max(L2_BYTES // 2, 1 << 19), SAMPLE_GROUP_BYTES = L2_BYTES // 4
cdef Py_ssize_t BLOCK = 16384  # elements that a reversed pass takes at a time


cdef struct Plan:
    const bn_kernels *K
    bn_problem p
    bn_coef k
    float *coef_block
    const float *weight
    const float *bias
    double eps
    double *mean
    double *var
    double *g
    double *gx
    float *grad_weight
    float *grad_bias
    double *tile_a  # what stats or sums wrote, a slab for each group or a row for each tile
    double *tile_b
    bint frozen, need_stats
    Py_ssize_t T        # tiles of each channel
    Py_ssize_t width    # columns: C, or C * fold in rows
    Py_ssize_t first    # channels before this one have an owner, later ones are split
    Py_ssize_t group    # channels that go through all passes together
    Py_ssize_t items, panels, pieces
    int threads


ctypedef void (*Item)(const Plan *plan, Py_ssize_t i) noexcept nogil


cdef void for_each_item(const Plan *plan, Item item) noexcept nogil:
    cdef Py_ssize_t i
    if plan.threads == 1 or plan.items == 1:
        for i in range(plan.items):
            item(plan, i)
    else:
        for i in prange(plan.items, num_threads=plan.threads, schedule="static"):
            item(plan, i)


cdef inline Py_ssize_t share(Py_ssize_t total, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit) noexcept nogil:
    """Where part i of n begins, at a multiple of unit."""
    return total if i == n else total * i // n // unit * unit


cdef void backwards(const Plan *plan, Py_ssize_t e0, Py_ssize_t e1, bint backward) noexcept nogil:
    """Elementwise work from the end: what the pass before read last is still in cache."""
    cdef Py_ssize_t e = e1
    while e > e0:
        e = max(e0, (e - 1) // BLOCK * BLOCK)
        if backward:
            plan.K.backward[plan.p.layout](&plan.p, &plan.k, e, e1, -BLOCK)
        else:
            plan.K.forward[plan.p.layout](&plan.p, &plan.k, e, e1, -BLOCK)
        e1 = e


# one owner for a group of channels: all passes back to back, while the data is in its cache

cdef enum:
    GAP = 256  # elements: more than a core prefetches beyond what it writes, which would take it from its neighbour


cdef inline Py_ssize_t gaps(const Plan *plan) noexcept nogil:
    """Between the sums and coefficients of threads that own channels."""
    return min(plan.threads, plan.p.C) - 1 if plan.p.layout == BN_PLANES else 0


cdef inline Plan of_owner(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """The plan as the thread of item i goes by it: with sums and coefficients that are a gap away from all others'."""
    cdef Plan own = plan[0]
    cdef Py_ssize_t j, distance = i * (gaps(plan) + 1) // plan.items * GAP
    cdef float **coefficients = <float **> &own.k
    own.tile_a += distance
    own.tile_b += distance
    own.g += distance
    own.gx += distance
    for j in range(<Py_ssize_t> (sizeof(bn_coef) // sizeof(float *))):
        if coefficients[j] != NULL:
            coefficients[j] += distance
    return own


cdef inline void finish_sums(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1, double *a, double *b,
                             Py_ssize_t ld) noexcept nogil:
    """From the tiles' sums of channels [c0, c1) to their gradients and to the coefficients of the second pass."""
    cdef Py_ssize_t c
    plan.K.pool_sums(&plan.p, &plan.k, c0, c1, a, b, ld, plan.g, plan.gx)
    for c in range(c0, c1):
        plan.grad_bias[c] = <float> plan.g[c]
        plan.grad_weight[c] = <float> plan.gx[c]
    if not plan.frozen:
        plan.K.backward_coef(&plan.p, c0, c1, plan.g, plan.gx, &plan.k)


cdef inline void first_pass(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t beside) noexcept nogil:
    """Of channels [c0, c1) all that the second pass needs; in one loop with the second pass of as many channels from
    `beside` on, unless that is negative."""
    cdef double *a = plan.tile_a + c0 * plan.T
    cdef double *b = plan.tile_b + c0 * plan.T
    if plan.need_stats:
        if beside < 0:
            plan.K.stats[plan.p.layout](&plan.p, 0, plan.T, c0, c1, a, b, c1 - c0)
        else:
            plan.K.forward_and_stats(&plan.p, &plan.k, beside, c0, c1 - c0, a, b)
        plan.K.pool_stats(&plan.p, c0, c1, a, b, c1 - c0, plan.mean, plan.var)
    if not plan.need_stats or plan.p.y.data != NULL:
        plan.K.coef(&plan.p, c0, c1, plan.mean, plan.var, plan.weight, plan.bias, plan.eps, &plan.k)
    if not plan.need_stats:
        if beside < 0:
            plan.K.sums[plan.p.layout](&plan.p, &plan.k, plan.frozen, 0, plan.T, c0, c1, a, b, c1 - c0)
        else:
            plan.K.backward_and_sums(&plan.p, &plan.k, beside, c0, c1 - c0, a, b)
        finish_sums(plan, c0, c1, a, b, c1 - c0)


cdef inline bint second_is_due(const Plan *plan) noexcept nogil:
    return not plan.frozen and (not plan.need_stats or plan.p.y.data != NULL)


cdef inline void second_pass(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t n, e0, e1, ahead = (c1 - c0) * plan.p.x.inner
    for n in range(plan.p.N - 1, -1, -1):
        e0 = (n * plan.p.C + c0) * plan.p.S
        e1 = (n * plan.p.C + c1) * plan.p.S
        if plan.need_stats:
            plan.K.forward[BN_PLANES](&plan.p, &plan.k, e0, e1, ahead)
        else:
            plan.K.backward[BN_PLANES](&plan.p, &plan.k, e0, e1, ahead)


cdef void first_pass_group(const Plan *plan, Py_ssize_t i) noexcept nogil:
    first_pass(plan, share(plan.width, i, plan.items, 16), share(plan.width, i + 1, plan.items, 16), -1)


cdef void both_passes_group(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t c0 = share(plan.first, i, plan.items, 1), c1 = share(plan.first, i + 1, plan.items, 1)
    cdef Plan own = of_owner(plan, i)
    first_pass(&own, c0, c1, -1)
    if second_is_due(&own):
        second_pass(&own, c0, c1)


cdef void interleaved_groups(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """The second pass of each group of channels in one loop with the first pass of the next."""
    cdef Py_ssize_t c0 = share(plan.first, i, plan.items, 1), end = share(plan.first, i + 1, plan.items, 1), c1, c2
    cdef Plan own = of_owner(plan, i)
    c1 = min(c0 + plan.group, end)
    first_pass(&own, c0, c1, -1)
    while c0 < end:
        c2 = min(c1 + plan.group, end)
        if c1 < c2:
            first_pass(&own, c1, c2, c0)
        if c2 - c1 < c1 - c0:
            second_pass(&own, c0 + c2 - c1, c1)
        c0 = c1
        c1 = c2


# no owner: tiles are shared out, then channels, then elements

cdef inline void tile_range(const Plan *plan, Py_ssize_t i, Py_ssize_t *r) noexcept nogil:
    """Item i's tiles [r0, r1) and columns [r2, r3)."""
    cdef Py_ssize_t strips = plan.items // plan.panels, columns = plan.width - plan.first
    r[0] = share(plan.T, i // plan.panels, strips, 1)
    r[1] = share(plan.T, i // plan.panels + 1, strips, 1)
    r[2] = plan.first + share(columns, i % plan.panels, plan.panels, 16)
    r[3] = plan.first + share(columns, i % plan.panels + 1, plan.panels, 16)


cdef void stats_tiles(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t r[4]
    tile_range(plan, i, r)
    cdef Py_ssize_t at = plan.first * plan.T + r[0] * (plan.width - plan.first) + r[2] - plan.first
    plan.K.stats[plan.p.layout](&plan.p, r[0], r[1], r[2], r[3], plan.tile_a + at, plan.tile_b + at,
                                plan.width - plan.first)


cdef void sums_tiles(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t r[4]
    tile_range(plan, i, r)
    cdef Py_ssize_t at = plan.first * plan.T + r[0] * (plan.width - plan.first) + r[2] - plan.first
    plan.K.sums[plan.p.layout](&plan.p, &plan.k, plan.frozen, r[0], r[1], r[2], r[3], plan.tile_a + at,
                               plan.tile_b + at, plan.width - plan.first)


cdef void pool_channels(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t C = plan.p.C - plan.first, ld = plan.width - plan.first, at = plan.first * plan.T
    cdef Py_ssize_t c0 = share(C, i, plan.items, 16), c1 = share(C, i + 1, plan.items, 16)
    if c0 == c1:
        return
    if plan.need_stats:
        plan.K.pool_stats(&plan.p, plan.first + c0, plan.first + c1, plan.tile_a + at + c0, plan.tile_b + at + c0, ld,
                          plan.mean, plan.var)
        if plan.p.y.data != NULL:
            plan.K.coef(&plan.p, plan.first + c0, plan.first + c1, plan.mean, plan.var, plan.weight, plan.bias,
                        plan.eps, &plan.k)
    else:
        finish_sums(plan, plan.first + c0, plan.first + c1, plan.tile_a + at + c0, plan.tile_b + at + c0, ld)


cdef inline void element_range(const Plan *plan, Py_ssize_t i, Py_ssize_t *e) noexcept nogil:
    """Item i's elements: all of them are shared out, or (behind owned channels) those of one n."""
    cdef Py_ssize_t n, base, length
    if plan.first == 0:
        n = plan.p.N * plan.p.C * plan.p.S
        e[0] = share(n, i, plan.items, 16)
        e[1] = share(n, i + 1, plan.items, 16)
        return
    n = i // plan.pieces
    base = (n * plan.p.C + plan.first) * plan.p.S
    length = (plan.p.C - plan.first) * plan.p.S
    e[0] = base + share(length, i % plan.pieces, plan.pieces, 16)
    e[1] = base + share(length, i % plan.pieces + 1, plan.pieces, 16)


cdef void forward_elements(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t e[2]
    element_range(plan, i, e)
    if plan.need_stats:
        backwards(plan, e[0], e[1], False)
    else:
        plan.K.forward[plan.p.layout](&plan.p, &plan.k, e[0], e[1], 0)


cdef void backward_elements(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t e[2]
    element_range(plan, i, e)
    backwards(plan, e[0], e[1], True)


cdef void plan_tiles(Plan *plan) noexcept nogil:
    """Tiles to threads; where one would have an eighth more to do than most, columns too, but whole rows go faster."""
    cdef Py_ssize_t n = plan.T, most = (plan.width - plan.first + 63) // 64, threads = plan.threads
    plan.panels = 1
    while (n + threads - 1) // threads * threads * 8 > n * 9 and plan.panels < most:
        plan.panels += 1
        n += plan.T
    plan.items = n if plan.panels > 1 else min(n, threads)


cdef void plan_elements(Plan *plan) noexcept nogil:
    plan.items = plan.threads
    if plan.first:
        plan.pieces = (4 * plan.threads + plan.p.N - 1) // plan.p.N
        plan.items = plan.pieces * plan.p.N


cdef void two_passes(Plan *plan) noexcept nogil:
    """Sums of some kind for each channel, then elementwise work that needs them."""
    cdef Py_ssize_t bytes_of_channel, group_bytes, groups, threads = plan.threads
    plan.first = 0
    if plan.p.layout == BN_PLANES:
        # channels that do not divide among the threads have no owner, unless the odd ones hardly matter
        plan.first = plan.p.C // threads * threads
        if plan.p.C >= 16 * threads or (plan.p.C - plan.first) * plan.p.N * plan.p.S < SERIAL:
            plan.first = plan.p.C
    if plan.first:
        bytes_of_channel = plan.p.N * plan.p.S * 4
        if plan.p.stream and plan.p.S > BN_SHORT_PLANE and second_is_due(plan):
            plan.group = max(1, GROUP_BYTES // 2 // bytes_of_channel)
            plan.items = threads
            for_each_item(plan, interleaved_groups)
        else:
            groups = threads
            if plan.p.stream or plan.p.N == 1:
                group_bytes = GROUP_BYTES if plan.p.stream else SAMPLE_GROUP_BYTES
                groups = (plan.first * bytes_of_channel + group_bytes - 1) // group_bytes
                groups = (groups + threads - 1) // threads * threads
            plan.items = min(plan.first, groups)
            for_each_item(plan, both_passes_group)
    if plan.first == plan.p.C:
        return
    plan_tiles(plan)
    if plan.T == 1 and plan.width == plan.p.C and plan.first == 0:
        for_each_item(plan, first_pass_group)
    else:
        if not plan.need_stats:
            plan.K.coef(&plan.p, plan.first, plan.p.C, plan.mean, plan.var, plan.weight, plan.bias, plan.eps, &plan.k)
        for_each_item(plan, stats_tiles if plan.need_stats else sums_tiles)
        plan.items = 1 if plan.T * plan.width <= SERIAL_SUMS else min(threads, (plan.p.C - plan.first + 63) // 64)
        for_each_item(plan, pool_channels)
    if not second_is_due(plan):
        return
    plan_elements(plan)
    for_each_item(plan, forward_elements if plan.need_stats else backward_elements)


cdef int ask_threads(num_threads, Py_ssize_t elements) except -1:
    cdef Py_ssize_t n = 1
    if num_threads is not None:
        try:
            n = num_threads.__index__()
        except (AttributeError, TypeError):
            raise TypeError(f"num_threads must be None or an int, got {num_threads!r}") from None
        if n < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
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


# ---- coefficients ---------------------------------------------------------------------------------------------

cdef Py_ssize_t coef_width(Py_ssize_t C, Py_ssize_t gaps) noexcept:
    """Floats of one array of coefficients: as many repetitions as rows may want and 16 more, in whole lines, and the
    gaps between those of several threads."""
    return (C * K.fold(C, PY_SSIZE_T_MAX) + 16 + 15) // 16 * 16 + gaps * GAP


cdef enum:
    ROOM = 3 * (1024 + 16) + 15  # floats: coefficients that need no allocation


cdef Py_ssize_t coef_floats(Py_ssize_t width, bint backward) noexcept:
    """Of all arrays, with what it takes to begin at a cache line: a vector across two takes twice as long to load."""
    return width * (8 if backward else 3) + 15


cdef float *allocate_coef(bn_coef *k, Py_ssize_t width, bint backward) except NULL:
    """Where k's arrays lie; to be freed."""
    cdef float *block = <float *> malloc(<size_t> coef_floats(width, backward) * sizeof(float))
    if block == NULL:
        raise MemoryError(f"no memory for coefficients, {width} of each")
    lay_out_coef(k, block, width, backward)
    return block


cdef void lay_out_coef(bn_coef *k, float *block, Py_ssize_t width, bint backward) noexcept:
    memset(k, 0, sizeof(bn_coef))
    block = <float *> ((<uintptr_t> block + 63) // 64 * 64)
    k.mean = block
    k.scale = block + width
    k.shift = block + 2 * width
    if backward:
        k.invstd = block + 3 * width
        k.offset = block + 4 * width
        k.g_mean = block + 5 * width
        k.g_proj = block + 6 * width
        k.g_shift = block + 7 * width


cdef int check_eps(double eps) except -1:
    if not (isfinite(eps) and eps >= 0.0):
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    return 0


cdef object contiguous(a, str name, Py_ssize_t C):
    """A checked vector, or a copy of it without gaps."""
    if a is None:
        return None
    a = vector(a, name, C, False)
    if C > 1 and cnp.PyArray_STRIDE(a, 0) != 4 or not cnp.PyArray_ISALIGNED(a):
        return np.array(a)
    return a


cdef inline float *data32(a) noexcept:
    return NULL if a is None else <float *> cnp.PyArray_DATA(a)


cdef float *inference_coef(bn_coef *k, float *room, Py_ssize_t C, Py_ssize_t rows, mean, var, bint float64, weight,
                           bias, double eps) except NULL:
    """Coefficients from float32 running statistics, or from the float64 ones of a BatchStats, for so many rows.

    They are in `room`, of ROOM floats, if that is not NULL and is enough; otherwise in memory to be freed.
    """
    cdef bn_problem p
    cdef float *block = room
    check_eps(eps)
    if not float64:
        mean = contiguous(mean, "running_mean", C)
        var = contiguous(var, "running_var", C)
    elif cnp.PyArray_DIM(mean, 0) != C:
        raise ValueError(f"stats must be of {C} channels, as x is, got {mean.size}")
    weight = contiguous(weight, "weight", C)
    bias = contiguous(bias, "bias", C)
    memset(&p, 0, sizeof(p))
    p.layout = BN_ROWS  # or planes, which want less
    p.C = C
    p.fold = K.fold(C, rows)
    cdef Py_ssize_t width = coef_width(C, 0)
    if room != NULL and coef_floats(width, False) <= ROOM:
        lay_out_coef(k, room, width, False)
    else:
        block = allocate_coef(k, width, False)
    if float64:
        K.coef(&p, 0, C, data64(mean), data64(var), data32(weight), data32(bias), eps, k)
    else:
        K.running_coef(&p, data32(mean), data32(var), data32(weight), data32(bias), eps, k)
    return block


def channels(x, axis):
    """The number of channels of x, checked."""
    x = array32(x, "x")
    return cnp.PyArray_DIM(x, check_axis(x, axis, "x"))


# ---- the operations -----------------------------------------------------------------------------------------------

cdef int allocate_tiles(Plan *plan) except -1:
    plan.T = plan.K.tiles(&plan.p)
    plan.width = plan.p.C * plan.p.fold
    cdef Py_ssize_t C = plan.p.C + gaps(plan) * GAP, n = plan.T * plan.width + gaps(plan) * GAP
    plan.tile_a = <double *> malloc(2 * <size_t> (n + C) * sizeof(double))
    if plan.tile_a == NULL:
        raise MemoryError(f"no memory for the partial sums of {plan.T} tiles")
    plan.tile_b = plan.tile_a + n
    plan.g = plan.tile_b + n
    plan.gx = plan.g + C
    return 0


cdef int allocate_scratch(Plan *plan, bint backward) except -1:
    """Tiles and coefficients; plan.tile_a and plan.coef_block are to be freed."""
    cdef Py_ssize_t width = coef_width(plan.p.C, gaps(plan))
    plan.coef_block = allocate_coef(&plan.k, width, backward)
    if plan.frozen:  # without batch terms
        memset(plan.k.g_mean, 0, 3 * width * sizeof(float))
    try:
        return allocate_tiles(plan)
    except MemoryError:
        free(plan.coef_block)
        raise


cdef Py_ssize_t STREAM_BYTES = 0  # not 0: in place of what the caches suggest, for tests


cdef bint past_cache(const bn_problem *p, int threads) noexcept:
    """Whether to write past the cache: when the tensors together exceed what holds them better than memory does.

    That is so many eighths of the last-level cache, or of all of those that the threads are spread over; less of it for
    one thread alone, which waits for memory longer. And it is not the huge sliced cache of some servers: those are
    shared with others, and were measured to be no faster than streaming to memory from about the size of all threads'
    L2 on.
    """
    cdef Py_ssize_t limit = STREAM_BYTES
    cdef int tensors = ((p.x.data != NULL) + (p.residual.data != NULL) + (p.grad_output.data != NULL)
                        + (p.y.data != NULL) + (p.grad_input.data != NULL) + (p.grad_residual.data != NULL))
    cdef int eighths = 6 if threads > 1 else 4
    if limit == 0:
        limit = threads * L2_BYTES
        if LLC_BYTES <= 64 << 20:
            limit = LLC_BYTES * ((threads + LLC_CPUS - 1) // LLC_CPUS) // 8 * eighths
    return p.N * p.C * p.S * 4 * tensors > limit


def tune(Py_ssize_t stream_bytes=-1, Py_ssize_t serial=-1, Py_ssize_t group_bytes=-1):
    """Move the sizes from which outputs are streamed and work is shared out, and that of groups of channels beyond the
    cache (0: the best), so that tests reach all paths."""
    global STREAM_BYTES, SERIAL, GROUP_BYTES
    if stream_bytes >= 0:
        STREAM_BYTES = stream_bytes
    if serial >= 0:
        SERIAL = serial
    if group_bytes >= 0:
        GROUP_BYTES = group_bytes or max(L2_BYTES // 2, 1 << 19)


def stats(x, axis, num_threads):
    """Mean and biased variance of each channel, float64 of shape (C,), and the number of values a channel."""
    x = array32(x, "x")
    cdef int ax = check_axis(x, axis, "x"), threads
    cdef Plan plan
    memset(&plan, 0, sizeof(plan))
    describe(&plan.p, x, ax)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    threads = ask_threads(num_threads, C * m)
    cdef cnp.ndarray mean = per_channel(C, cnp.NPY_FLOAT64, m == 0)
    cdef cnp.ndarray var = per_channel(C, cnp.NPY_FLOAT64, m == 0)
    if C * m == 0:
        return mean, var, 0
    x = readable(&plan.p.x, &plan.p, x, ax)
    flatten(&plan.p)
    plan.K = K
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.need_stats = True
    plan.p.stream = past_cache(&plan.p, threads)
    plan.threads = threads
    allocate_tiles(&plan)
    with nogil:
        two_passes(&plan)
        free(plan.tile_a)
    return mean, var, m


def forward(x, weight, bias, double eps, axis, residual, activation, double negative_slope, out, num_threads,
            running_mean, running_var, double momentum, bint unbiased):
    """Training forward: (y, mean, var, count). Running statistics, or two times None, are updated."""
    x = array32(x, "x")
    check_eps(eps)
    cdef int ax = check_axis(x, axis, "x"), threads
    cdef Plan plan
    memset(&plan, 0, sizeof(plan))
    describe(&plan.p, x, ax)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    plan.p.activation = activation_code(activation)
    check_slope(negative_slope)
    plan.p.negative_slope = negative_slope
    cdef object flat_weight = contiguous(weight, "weight", C), flat_bias = contiguous(bias, "bias", C)
    plan.weight = data32(flat_weight)
    plan.bias = data32(flat_bias)
    if running_mean is not None:
        running_mean = vector(running_mean, "running_mean", C, True)
        running_var = vector(running_var, "running_var", C, True)
        if not isfinite(momentum):
            raise ValueError(f"momentum must be finite, got {momentum}")
    if residual is not None:
        residual = array32(residual, "residual")
        check_shape(residual, x, "residual", "x")
    given = out
    if out is not None:
        out = output(out, x, True)
        check_clear(out, residual, "residual")
        check_clear(out, weight, "weight")
        check_clear(out, bias, "bias")
        check_clear(out, running_mean, "running_mean")
        check_clear(out, running_var, "running_var")
    threads = ask_threads(num_threads, C * m)
    cdef cnp.ndarray mean = per_channel(C, cnp.NPY_FLOAT64, m == 0)
    cdef cnp.ndarray var = per_channel(C, cnp.NPY_FLOAT64, m == 0)
    if C * m == 0:
        return (empty_for(&plan.p, x, ax) if out is None else given), mean, var, 0
    if m == 1:
        raise ValueError(
            f"training needs more than 1 value per channel, got x of shape {x.shape} with axis={axis}; "
            "pass a larger batch, or fixed statistics"
        )
    x0 = x
    x = readable(&plan.p.x, &plan.p, x, ax)
    if residual is not None:
        residual = readable(&plan.p.residual, &plan.p, residual, ax)
    y = writable(&plan.p.y, &plan.p, out, x0, ax)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, threads)
    plan.K = K
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.eps = eps
    plan.need_stats = True
    plan.threads = threads
    allocate_scratch(&plan, False)
    with nogil:
        two_passes(&plan)
        free(plan.tile_a)
        free(plan.coef_block)
    if out is not None and y is not out:
        out[...] = y
    if running_mean is not None:
        update_running(running_mean, running_var, mean, var, m, momentum, unbiased)
    return (y if out is None else given), mean, var, m


def normalize(x, mean, var, bint float64, weight, bias, double eps, axis, residual, activation, double negative_slope,
              out, num_threads):
    """y from running statistics, or with float64 those of a BatchStats."""
    cdef int code = activation_code(activation)
    check_slope(negative_slope)
    x = array32(x, "x")
    cdef bn_coef k
    cdef Py_ssize_t C = cnp.PyArray_DIM(x, check_axis(x, axis, "x"))
    cdef float room[ROOM]
    cdef Py_ssize_t rows = cnp.PyArray_SIZE(x) // max(C, 1)
    cdef float *block = inference_coef(&k, room, C, rows, mean, var, float64, weight, bias, eps)
    try:
        if out is not None:
            to = array32(out, "out")
            check_clear(to, weight, "weight")
            check_clear(to, bias, "bias")
            check_clear(to, mean, "running_mean")
            check_clear(to, var, "running_var")
        return infer(&k, x, axis, residual, code, negative_slope, out, num_threads)
    finally:
        if block != room:
            free(block)


cdef class Frozen:
    """Coefficients made once, and how to apply them. Nothing of it changes after construction."""
    cdef bn_coef k
    cdef float *block
    cdef int activation_code
    cdef readonly Py_ssize_t num_features
    cdef readonly object axis
    cdef readonly object activation
    cdef readonly double eps
    cdef readonly double negative_slope

    def __cinit__(self, running_mean, running_var, weight=None, bias=None, double eps=1e-5, *, axis=1, activation=None,
                  double negative_slope=0.01, copy=True):
        running_mean = array32(running_mean, "running_mean")
        if cnp.PyArray_NDIM(running_mean) != 1:
            raise ValueError(f"running_mean must have shape (C,), one value a channel, got {running_mean.shape}")
        self.num_features = cnp.PyArray_DIM(running_mean, 0)
        self.axis = operator.index(axis)
        self.activation = activation
        self.activation_code = activation_code(activation)
        check_slope(negative_slope)
        self.negative_slope = negative_slope
        self.eps = eps
        self.block = inference_coef(
            &self.k, NULL, self.num_features, PY_SSIZE_T_MAX, running_mean, running_var, False, weight, bias, eps)

    def __dealloc__(self):
        free(self.block)

    def __call__(self, x, residual=None, out=None):
        """Normalize `x`.

        Parameters
        ----------
        x : ndarray of float32, rank >= 2
        residual, out : ndarray of float32, shape of `x`, or None
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        ndarray of float32, shape of `x`
            `out`, or a new array in the memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            As :func:`fastbn.batch_norm`.
        """
        x = array32(x, "x")
        if cnp.PyArray_DIM(x, check_axis(x, self.axis, "x")) != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels on axis {self.axis}, got shape {x.shape}")
        return infer(&self.k, x, self.axis, residual, self.activation_code, self.negative_slope, out, None)


cdef infer(const bn_coef *k, x, axis, residual, int activation, double negative_slope, out, num_threads):
    cdef int ax = check_axis(x, axis, "x"), threads
    cdef Plan plan
    cdef Py_ssize_t elements
    memset(&plan, 0, sizeof(plan))
    describe(&plan.p, x, ax)
    elements = plan.p.C * plan.p.N * plan.p.S
    plan.p.activation = activation
    plan.p.negative_slope = negative_slope
    if residual is not None:
        residual = array32(residual, "residual")
        check_shape(residual, x, "residual", "x")
    given = out
    if out is not None:
        out = output(out, x, True)
        check_clear(out, residual, "residual")
    threads = ask_threads(num_threads, elements)
    if elements == 0:
        return empty_for(&plan.p, x, ax) if out is None else given
    x0 = x
    x = readable(&plan.p.x, &plan.p, x, ax)
    if residual is not None:
        residual = readable(&plan.p.residual, &plan.p, residual, ax)
    y = writable(&plan.p.y, &plan.p, out, x0, ax)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, threads)
    plan.K = K
    plan.k = k[0]
    if plan.p.layout == BN_ROWS and plan.p.packed:  # without statistics, and so without tiles, more rows may be one
        plan.p.fold = K.fold(plan.p.C, plan.p.S)
    if threads == 1 and elements < SERIAL:
        plan.K.forward[plan.p.layout](&plan.p, &plan.k, 0, elements, 0)  # not worth letting go of the GIL
    else:
        plan.threads = threads
        plan.items = threads
        with nogil:
            for_each_item(&plan, forward_elements)
    if out is None:
        return y
    if y is not out:
        out[...] = y
    return given


def backward(grad_output, x, cnp.ndarray mean, cnp.ndarray var, weight, bias, double eps, bint training, axis,
             residual, activation, double negative_slope, out, num_threads):
    """(grad_input, grad_weight, grad_bias, grad_residual); mean and var are float64 of shape (C,)."""
    x = array32(x, "x")
    grad_output = array32(grad_output, "grad_output")
    check_eps(eps)
    cdef int ax = check_axis(x, axis, "x"), threads
    check_shape(grad_output, x, "grad_output", "x")
    cdef Plan plan
    memset(&plan, 0, sizeof(plan))
    describe(&plan.p, x, ax)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    plan.p.activation = activation_code(activation)
    check_slope(negative_slope)
    plan.p.negative_slope = negative_slope
    cdef object flat_weight = contiguous(weight, "weight", C), flat_bias = contiguous(bias, "bias", C)
    plan.weight = data32(flat_weight)
    plan.bias = data32(flat_bias)
    if residual is not None:
        residual = array32(residual, "residual")
        check_shape(residual, x, "residual", "x")
    given = out
    if out is not None:
        out = output(out, x, False)
        check_clear(out, grad_output, "grad_output")
        check_clear(out, residual, "residual")
        check_clear(out, weight, "weight")
        check_clear(out, bias, "bias")
    threads = ask_threads(num_threads, C * m)
    if mean.size != C:
        raise ValueError(f"stats must be of {C} channels, as x is, got {mean.size}")
    cdef cnp.ndarray grad_weight = per_channel(C, cnp.NPY_FLOAT32, m == 0)
    cdef cnp.ndarray grad_bias = per_channel(C, cnp.NPY_FLOAT32, m == 0)
    if C * m == 0:
        return (empty_for(&plan.p, x, ax) if out is None else given), grad_weight, grad_bias, (
            None if residual is None else empty_for(&plan.p, x, ax))
    x0 = x
    x = readable(&plan.p.x, &plan.p, x, ax)
    grad_output = readable(&plan.p.grad_output, &plan.p, grad_output, ax)
    grad_residual = None
    if residual is not None:
        residual = readable(&plan.p.residual, &plan.p, residual, ax)
        grad_residual = writable(&plan.p.grad_residual, &plan.p, None, x0, ax)
    dx = writable(&plan.p.grad_input, &plan.p, out, x0, ax)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, threads)
    plan.K = K
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.grad_weight = data32(grad_weight)
    plan.grad_bias = data32(grad_bias)
    plan.eps = eps
    plan.frozen = not training
    plan.threads = threads
    allocate_scratch(&plan, True)
    with nogil:
        two_passes(&plan)
        free(plan.tile_a)
        free(plan.coef_block)
    if out is not None and dx is not out:
        out[...] = dx
    return (dx if out is None else given), grad_weight, grad_bias, grad_residual


cdef inline void move_towards(char *running, Py_ssize_t stride, const double *batch, Py_ssize_t C, double momentum,
                              double factor) noexcept:
    cdef Py_ssize_t c
    cdef float *a
    for c in range(C):
        a = <float *> (running + c * stride)
        a[0] = <float> ((1.0 - momentum) * a[0] + momentum * (batch[c] * factor))


cdef move_running(running, cnp.ndarray batch, double momentum, double factor):
    cdef char *data = <char *> cnp.PyArray_DATA(running)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(running, 0), C = cnp.PyArray_DIM(batch, 0)
    if stride == 4:  # a constant to the compiler, which then takes several at a time
        move_towards(data, 4, data64(batch), C, momentum, factor)
    else:
        move_towards(data, stride, data64(batch), C, momentum, factor)


cpdef update_running(running_mean, running_var, mean, var, Py_ssize_t count, double momentum, bint unbiased):
    """running = (1 - momentum) * running + momentum * batch in float64, in place."""
    move_running(running_mean, mean, momentum, 1.0)
    move_running(running_var, var, momentum, <double> count / (count - 1) if unbiased and count > 1 else 1.0)
