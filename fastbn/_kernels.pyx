# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The OpenMP-parallel kernels: arrays are checked and described, the work is cut into items, the items run in parallel.

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


# ---- arrays: what is taken, and how it is walked ----------------------------------------------------------------

cdef int activation_code(activation) except -1:
    if activation is None:
        return BN_IDENTITY
    if isinstance(activation, str):
        if activation == "relu":
            return BN_RELU
        if activation == "relu6":
            return BN_RELU6
        if activation == "leaky_relu":
            return BN_LEAKY_RELU
    raise ValueError(f"activation must be None, 'relu', 'relu6' or 'leaky_relu', got {activation!r}")


cdef int check_slope(double negative_slope) except -1:
    if not isfinite(negative_slope):
        raise ValueError(f"negative_slope must be finite, got {negative_slope}")
    return 0


def check_activation(activation, double negative_slope):
    activation_code(activation)
    check_slope(negative_slope)


cdef object foreign(a, str name):
    """An array of another library as NumPy sees it in place: by __array_interface__, DLPack or the buffer protocol."""
    reason = ""
    try:
        if isinstance(a, np.generic):
            reason = " (a scalar)"
        elif hasattr(a, "__array_interface__"):
            return np.asarray(a)
        elif not hasattr(a, "__dlpack__"):
            return np.asarray(memoryview(a))
        elif a.__dlpack_device__()[0] == 1:  # kDLCPU
            return np.from_dlpack(a)
        else:
            reason = " (not in the memory of the CPU)"
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        if hasattr(a, "__dlpack__"):
            reason = f" ({error})"
    raise TypeError(
        f"{name} must be a float32 numpy.ndarray, got {type(a).__name__}{reason}; "
        f"convert it with numpy.asarray({name}, dtype=numpy.float32)"
    )


cpdef cnp.ndarray array32(a, str name):
    """`a` as an array of float32 that shares its memory; raises where it is none."""
    b = a if cnp.PyArray_Check(a) else foreign(a, name)
    if cnp.PyArray_TYPE(b) != cnp.NPY_FLOAT32 or not cnp.PyArray_ISNOTSWAPPED(b):
        raise TypeError(
            f"{name} must have dtype float32 in native byte order, got {type(a).__name__} of {b.dtype!s} "
            f"({b.dtype.str}); convert it with numpy.asarray({name}, dtype=numpy.float32)"
        )
    if not cnp.PyArray_CheckExact(b) and isinstance(b, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked one: its mask would be ignored; fill it first")
    return b


cdef int check_shape(cnp.ndarray a, cnp.ndarray x, str name, str like) except -1:
    cdef int i, nd = cnp.PyArray_NDIM(x)
    if cnp.PyArray_NDIM(a) == nd:
        for i in range(nd):
            if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(x, i):
                break
        else:
            return 0
    raise ValueError(f"{name} must have the shape of {like}, {(<object> x).shape}, got {(<object> a).shape}")


cdef Py_ssize_t check_axis(cnp.ndarray x, axis, str name) except -1:
    cdef Py_ssize_t nd = cnp.PyArray_NDIM(x), i
    if nd < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (batch and channels), got shape {(<object> x).shape}")
    try:
        i = axis
    except (TypeError, OverflowError):
        raise TypeError(f"axis must be an int, got {axis!r}") from None
    if not -nd <= i < nd:
        raise ValueError(f"axis must lie in [{-nd}, {nd}) for {name} of shape {(<object> x).shape}, got {axis}")
    return i + nd if i < 0 else i


cpdef cnp.ndarray vector(a, str name, Py_ssize_t C, bint writable):
    """`a` as a float32 vector of C values."""
    cdef cnp.ndarray v = array32(a, name)
    if cnp.PyArray_NDIM(v) != 1 or cnp.PyArray_DIM(v, 0) != C:
        raise ValueError(f"{name} must have shape ({C},), one value a channel, got {(<object> v).shape}")
    if writable and not cnp.PyArray_ISWRITEABLE(v):
        raise ValueError(f"{name} is updated in place in training but is read-only; pass a writable copy")
    return v


cdef void extent(cnp.ndarray a, uintptr_t *low, uintptr_t *high) noexcept:
    cdef Py_ssize_t i, span
    low[0] = high[0] = <uintptr_t> cnp.PyArray_DATA(a)
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) == 0:
            high[0] = low[0]
            return
        span = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if span < 0:
            low[0] -= <uintptr_t> -span
        else:
            high[0] += <uintptr_t> span
    high[0] += <uintptr_t> cnp.PyArray_ITEMSIZE(a)


cdef bint overlap(cnp.ndarray a, cnp.ndarray b) except -1:
    cdef uintptr_t a0, a1, b0, b1
    extent(a, &a0, &a1)
    extent(b, &b0, &b1)
    if a0 >= b1 or b0 >= a1:
        return False
    try:
        return np.shares_memory(a, b, max_work=10000)
    except np.exceptions.TooHardError:
        return True


cdef bint same_memory(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True


cdef bint distinct(cnp.ndarray a) noexcept:
    """Whether each stride steps over all that the smaller ones reach, or two elements may lie in one place."""
    cdef Py_ssize_t reach = cnp.PyArray_ITEMSIZE(a), least, stride
    cdef int i, _, next_dim, nd = cnp.PyArray_NDIM(a)
    cdef unsigned long long done = 0  # a bit for each dimension: NumPy allows 64
    for _ in range(nd):
        next_dim = -1
        least = 0
        for i in range(nd):
            stride = cnp.PyArray_STRIDE(a, i)
            stride = -stride if stride < 0 else stride
            if cnp.PyArray_DIM(a, i) > 1 and not done >> i & 1 and (next_dim < 0 or stride < least):
                next_dim, least = i, stride
        if next_dim < 0:
            return True
        if least < reach:
            return False
        reach = least * cnp.PyArray_DIM(a, next_dim)
        done |= 1ULL << next_dim
    return True


cdef cnp.ndarray output(a, cnp.ndarray x, bint in_place):
    """`a` as an array that the result for x may be written into."""
    cdef cnp.ndarray out = array32(a, "out")
    check_shape(out, x, "out", "the input")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out is read-only; pass a writable array")
    if in_place and same_memory(out, x):
        return out
    if not (cnp.PyArray_IS_C_CONTIGUOUS(out) or distinct(out)):
        raise ValueError(
            f"out has elements that share memory (strides {(<object> out).strides}); pass an array without"
        )
    if overlap(out, x):
        raise ValueError(
            "out overlaps x; pass x itself (in place) or memory of its own" if in_place else
            "out overlaps x; pass memory of its own"
        )
    return out


cdef int check_clear(cnp.ndarray out, a, str name) except -1:
    if a is not None and overlap(out, a if cnp.PyArray_Check(a) else foreign(a, name)):
        raise ValueError(f"out overlaps {name}; pass memory of its own")
    return 0


cdef cnp.ndarray per_channel(Py_ssize_t C, int dtype, bint zero):
    """A result of one value a channel; without zero, memory that only the kernels write: clearing it takes its lines
    from the core of the thread that is about to."""
    cdef cnp.npy_intp shape = C
    return cnp.PyArray_ZEROS(1, &shape, dtype, 0) if zero else cnp.PyArray_EMPTY(1, &shape, dtype, 0)


cdef double *data64(cnp.ndarray a) noexcept:
    return <double *> cnp.PyArray_DATA(a)


cdef struct Strides:
    Py_ssize_t outer, channel, inner  # in elements
    bint walkable


cdef bint collapse(cnp.ndarray a, int first, int end, Py_ssize_t *stride) noexcept:
    """The one stride, in bytes, over dimensions [first, end), where there is one."""
    cdef Py_ssize_t i, size = 1
    stride[0] = 0
    for i in range(end - 1, first - 1, -1):
        if cnp.PyArray_DIM(a, i) == 1:
            continue
        if size == 1:
            stride[0] = cnp.PyArray_STRIDE(a, i)
        elif cnp.PyArray_STRIDE(a, i) != stride[0] * size:
            return False
        size *= cnp.PyArray_DIM(a, i)
    return True


cdef Strides strides_of(cnp.ndarray a, int axis) noexcept:
    cdef Strides s
    cdef int nd = cnp.PyArray_NDIM(a)
    s.outer = s.inner = 0
    s.channel = cnp.PyArray_STRIDE(a, axis)
    if axis == nd - 1 and nd > 2:
        s.walkable = collapse(a, 0, 1, &s.outer) and collapse(a, 1, axis, &s.inner)
    else:
        s.walkable = collapse(a, 0, axis, &s.outer) and collapse(a, axis + 1, nd, &s.inner)
    if (s.outer | s.channel | s.inner) & 3 or not cnp.PyArray_ISALIGNED(a):
        s.walkable = False
    s.outer //= 4
    s.channel //= 4
    s.inner //= 4
    return s


cdef void describe(bn_problem *p, cnp.ndarray x, int axis) noexcept:
    """Sizes and layout of p from x."""
    cdef Strides s = strides_of(x, axis)
    cdef int i, nd = cnp.PyArray_NDIM(x)
    memset(p, 0, sizeof(bn_problem))
    p.N = p.S = 1
    p.C = cnp.PyArray_DIM(x, axis)
    for i in range(nd):
        if i < axis and (i == 0 or axis < nd - 1 or nd == 2):
            p.N *= cnp.PyArray_DIM(x, i)
        elif i != axis:
            p.S *= cnp.PyArray_DIM(x, i)
    if p.S == 1:
        p.layout = BN_ROWS
    elif p.C == 1 or (s.walkable and s.inner == 1):
        p.layout = BN_PLANES
    elif s.walkable and s.channel == 1:
        p.layout = BN_ROWS
    else:
        p.layout = BN_ROWS if axis == nd - 1 else BN_PLANES
    p.fold = 1
    if p.layout == BN_ROWS and (not s.walkable or (
            (p.C == 1 or s.channel == 1) and (p.S == 1 or s.inner == p.C) and (p.N == 1 or s.outer == p.S * p.C))):
        p.fold = K.fold(p.C, 0)  # rows with gaps are walked one by one; what is not walkable will be copied


cdef bint place(bn_operand *o, const bn_problem *p, cnp.ndarray a, int axis) noexcept:
    """Fill in an operand; False where the kernels cannot walk it."""
    cdef Strides s = strides_of(a, axis)
    o.data = <float *> cnp.PyArray_DATA(a)
    o.outer = s.outer
    o.inner = s.channel if p.layout == BN_PLANES else s.inner
    if not s.walkable:
        return False
    if p.layout == BN_PLANES:
        return p.S == 1 or s.inner == 1
    if p.fold > 1:
        return ((p.C == 1 or s.channel == 1) and (p.S == 1 or s.inner == p.C)
                and (p.N == 1 or s.outer == p.S * p.C))
    return p.C == 1 or s.channel == 1


cdef void flatten(bn_problem *p) noexcept:
    """Whether there are gaps; rows whose batch needs no stride of its own become one batch."""
    cdef bn_operand *o
    cdef bn_operand **all = [&p.x, &p.residual, &p.grad_output, &p.y, &p.grad_input, &p.grad_residual]
    cdef Py_ssize_t gapless = p.C if p.layout == BN_ROWS else p.S
    cdef bint one_batch = p.layout == BN_ROWS
    cdef int i
    for i in range(6):
        o = all[i]
        if o.data != NULL and p.layout == BN_ROWS:
            if p.S == 1:
                o.inner = o.outer
            elif p.N > 1 and o.outer != p.S * o.inner:
                one_batch = False
    if one_batch:
        p.S *= p.N
        p.N = 1
    p.packed = one_batch or p.layout == BN_PLANES
    for i in range(6):
        o = all[i]
        if o.data != NULL and o.inner != gapless and (p.S > 1 or p.layout == BN_PLANES):
            p.packed = False


# Memory of large outputs is NumPy's to manage, through an allocator (NEP 49) that keeps what is freed for the next
# output. It is in force while such an array is made, and for all the life of that array.
cdef PyDataMem_Handler output_handler
memset(&output_handler, 0, sizeof(output_handler))
strcpy(output_handler.name, b"fastbn_outputs")
output_handler.version = 1
output_handler.allocator.malloc = bn_output_malloc
output_handler.allocator.calloc = bn_output_calloc
output_handler.allocator.realloc = bn_output_realloc
output_handler.allocator.free = bn_output_free
cdef object output_handler_capsule = PyCapsule_New(&output_handler, "mem_handler", NULL)
cdef Py_ssize_t KEEP_FROM = 1 << 18  # bytes; smaller arrays do not pay for page faults


def set_output_limit(Py_ssize_t max_bytes):
    bn_output_set_limit(<size_t> max_bytes)


def output_memory():
    """(bytes kept now, bytes kept at most)"""
    return bn_output_held(), bn_output_limit()


cdef cnp.ndarray empty_like(cnp.ndarray x):
    if cnp.PyArray_NBYTES(x) < KEEP_FROM or bn_output_limit() == 0:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    previous = PyDataMem_SetHandler(output_handler_capsule)
    try:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    finally:
        PyDataMem_SetHandler(previous)


cdef cnp.ndarray empty_for(const bn_problem *p, cnp.ndarray x, int axis):
    """An array of x's shape, without gaps, in the memory order of p's layout."""
    cdef bn_operand o
    cdef cnp.ndarray a = empty_like(x)
    if not place(&o, p, a, axis):
        to = axis
        if p.layout == BN_ROWS:
            to = -1
        elif axis == cnp.PyArray_NDIM(x) - 1:
            to = 1
        a = np.moveaxis(np.empty(np.moveaxis(x, axis, to).shape, np.float32), to, axis)
    return a


cdef cnp.ndarray readable(bn_operand *o, const bn_problem *p, cnp.ndarray a, int axis):
    """Fill in an operand that is read; returns the array that must live as long: `a` or a copy."""
    if place(o, p, a, axis):
        return a
    copy = empty_for(p, a, axis)
    copy[...] = a
    place(o, p, copy, axis)
    return copy


cdef cnp.ndarray writable(bn_operand *o, const bn_problem *p, out, cnp.ndarray x, int axis):
    """Fill in an operand that is written: `out`, or a new array where that is None or cannot be walked."""
    if out is not None and place(o, p, out, axis):
        return out
    fresh = empty_for(p, x, axis)
    place(o, p, fresh, axis)
    return fresh


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


ctypedef void (*Item)(const Plan *plan, Py_ssize_t i) noexcept nogil


cdef void for_each(Item item, const Plan *plan, Py_ssize_t n, int threads) noexcept nogil:
    cdef Py_ssize_t i
    if threads == 1 or n == 1:
        for i in range(n):
            item(plan, i)
    else:
        for i in prange(n, num_threads=threads, schedule="static"):
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
    first_pass(plan, c0, c1, -1)
    if second_is_due(plan):
        second_pass(plan, c0, c1)


cdef void interleaved_groups(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """The second pass of each group of channels in one loop with the first pass of the next."""
    cdef Py_ssize_t c0 = share(plan.first, i, plan.items, 1), end = share(plan.first, i + 1, plan.items, 1), c1, c2
    c1 = min(c0 + plan.group, end)
    first_pass(plan, c0, c1, -1)
    while c0 < end:
        c2 = min(c1 + plan.group, end)
        if c1 < c2:
            first_pass(plan, c1, c2, c0)
        if c2 - c1 < c1 - c0:
            second_pass(plan, c0 + c2 - c1, c1)
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


cdef void plan_tiles(Plan *plan, int threads) noexcept nogil:
    """Tiles to threads; where one would have an eighth more to do than most, columns too, but whole rows go faster."""
    cdef Py_ssize_t n = plan.T, most = (plan.width - plan.first + 63) // 64
    plan.panels = 1
    while (n + threads - 1) // threads * threads * 8 > n * 9 and plan.panels < most:
        plan.panels += 1
        n += plan.T
    plan.items = n if plan.panels > 1 else min(n, threads)


cdef void plan_elements(Plan *plan, int threads) noexcept nogil:
    plan.items = threads
    if plan.first:
        plan.pieces = (4 * threads + plan.p.N - 1) // plan.p.N
        plan.items = plan.pieces * plan.p.N


cdef void two_passes(Plan *plan, int threads) noexcept nogil:
    """Sums of some kind for each channel, then elementwise work that needs them."""
    cdef Py_ssize_t bytes_of_channel, group_bytes, groups
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
            for_each(interleaved_groups, plan, plan.items, threads)
        else:
            groups = threads
            if plan.p.stream or plan.p.N == 1:
                group_bytes = GROUP_BYTES if plan.p.stream else SAMPLE_GROUP_BYTES
                groups = (plan.first * bytes_of_channel + group_bytes - 1) // group_bytes
                groups = (groups + threads - 1) // threads * threads
            plan.items = min(plan.first, groups)
            for_each(both_passes_group, plan, plan.items, threads)
    if plan.first == plan.p.C:
        return
    plan_tiles(plan, threads)
    if plan.T == 1 and plan.width == plan.p.C and plan.first == 0:
        for_each(first_pass_group, plan, plan.items, threads)
    else:
        if not plan.need_stats:
            plan.K.coef(&plan.p, plan.first, plan.p.C, plan.mean, plan.var, plan.weight, plan.bias, plan.eps, &plan.k)
        for_each(stats_tiles if plan.need_stats else sums_tiles, plan, plan.items, threads)
        plan.items = 1 if plan.T * plan.width <= SERIAL_SUMS else min(threads, (plan.p.C - plan.first + 63) // 64)
        for_each(pool_channels, plan, plan.items, threads)
    if not second_is_due(plan):
        return
    plan_elements(plan, threads)
    for_each(forward_elements if plan.need_stats else backward_elements, plan, plan.items, threads)


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

cdef Py_ssize_t coef_width(Py_ssize_t C) noexcept:
    """Floats of one array of coefficients: as many repetitions as rows may want and 16 more, in whole lines."""
    return (C * K.fold(C, PY_SSIZE_T_MAX) + 16 + 15) // 16 * 16


cdef enum:
    ROOM = 3 * (1024 + 16) + 15  # floats: coefficients that need no allocation


cdef Py_ssize_t coef_floats(Py_ssize_t C, bint backward) noexcept:
    """Of all arrays, with what it takes to begin at a cache line: a vector across two takes twice as long to load."""
    return coef_width(C) * (8 if backward else 3) + 15


cdef float *allocate_coef(bn_coef *k, Py_ssize_t C, bint backward) except NULL:
    """Where k's arrays lie; to be freed."""
    cdef float *block = <float *> malloc(<size_t> coef_floats(C, backward) * sizeof(float))
    if block == NULL:
        raise MemoryError(f"no memory for the coefficients of {C} channels")
    lay_out_coef(k, block, C, backward)
    return block


cdef void lay_out_coef(bn_coef *k, float *block, Py_ssize_t C, bint backward) noexcept:
    cdef Py_ssize_t width = coef_width(C)
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
    p.C = C
    p.fold = K.fold(C, rows)
    if room != NULL and coef_floats(C, False) <= ROOM:
        lay_out_coef(k, room, C, False)
    else:
        block = allocate_coef(k, C, False)
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
    cdef size_t n = <size_t> (plan.T * plan.width)
    plan.tile_a = <double *> malloc(2 * (n + <size_t> plan.p.C) * sizeof(double))
    if plan.tile_a == NULL:
        raise MemoryError(f"no memory for the partial sums of {plan.T} tiles")
    plan.tile_b = plan.tile_a + n
    plan.g = plan.tile_b + n
    plan.gx = plan.g + plan.p.C
    return 0


cdef int allocate_scratch(Plan *plan, bint backward) except -1:
    """Tiles and coefficients; plan.tile_a and plan.coef_block are to be freed."""
    plan.coef_block = allocate_coef(&plan.k, plan.p.C, backward)
    try:
        return allocate_tiles(plan)
    except MemoryError:
        free(plan.coef_block)
        raise


cdef Py_ssize_t STREAM_BYTES = 0  # not 0: in place of what the caches suggest, for tests


cdef bint past_cache(const bn_problem *p, int threads) noexcept:
    """Whether to write past the cache: when the tensors together exceed what holds them better than memory does.

    That is so many eighths of the last-level cache, or of all of those that the threads are spread over. Less of it for
    one thread alone, which waits for memory longer, and for rows: what a second pass finds in L2 of planes it does not
    of rows, and a single pass was measured to be faster past the cache from there on too. And it is not the huge sliced
    cache of some servers: those are shared with others, and were measured to be no faster than streaming to memory
    from about the size of all threads' L2 on.
    """
    cdef Py_ssize_t limit = STREAM_BYTES
    cdef int tensors = ((p.x.data != NULL) + (p.residual.data != NULL) + (p.grad_output.data != NULL)
                        + (p.y.data != NULL) + (p.grad_input.data != NULL) + (p.grad_residual.data != NULL))
    cdef int eighths = (6 if threads > 1 else 4) - (2 if p.layout == BN_ROWS else 0)
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
    allocate_tiles(&plan)
    with nogil:
        two_passes(&plan, threads)
        free(plan.tile_a)
    return mean, var, m


def forward(x, weight, bias, double eps, axis, residual, activation, double negative_slope, out, num_threads,
            running_mean, running_var):
    """Training forward: (y, mean, var, count). The running statistics must only be clear of out."""
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
    allocate_scratch(&plan, False)
    with nogil:
        two_passes(&plan, threads)
        free(plan.tile_a)
        free(plan.coef_block)
    if out is not None and y is not out:
        out[...] = y
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
        plan.items = threads
        with nogil:
            for_each(forward_elements, &plan, threads, threads)
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
    allocate_scratch(&plan, True)
    with nogil:
        two_passes(&plan, threads)
        free(plan.tile_a)
        free(plan.coef_block)
    if out is not None and dx is not out:
        out[...] = dx
    return (dx if out is None else given), grad_weight, grad_bias, grad_residual


def update_running(running_mean, running_var, cnp.ndarray mean, cnp.ndarray var, double momentum, double factor):
    """running = (1 - momentum) * running + momentum * batch in float64, in place; factor makes var unbiased."""
    cdef Py_ssize_t c
    cdef char *rm = <char *> cnp.PyArray_DATA(running_mean)
    cdef char *rv = <char *> cnp.PyArray_DATA(running_var)
    cdef double *mu = data64(mean)
    cdef double *v = data64(var)
    cdef Py_ssize_t sm = cnp.PyArray_STRIDE(running_mean, 0), sv = cnp.PyArray_STRIDE(running_var, 0)
    for c in range(cnp.PyArray_DIM(mean, 0)):
        (<float *> (rm + c * sm))[0] = <float> ((1.0 - momentum) * (<float *> (rm + c * sm))[0] + momentum * mu[c])
        (<float *> (rv + c * sv))[0] = <float> ((1.0 - momentum) * (<float *> (rv + c * sv))[0]
                                                + momentum * (v[c] * factor))
