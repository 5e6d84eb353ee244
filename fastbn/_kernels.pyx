# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The kernels as Python calls them: arguments are checked, arrays become the operands of a problem, and a plan for it
is carried out by a team of threads without the GIL.

Which thread does what never changes a result: see src_c/schedule.c.
"""

import operator
import os
import sys

import numpy as np

cimport cython
cimport numpy as cnp
from libc.float cimport FLT_MAX
from libc.math cimport fabs, isfinite
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcpy
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.ref cimport Py_DECREF

from fastbn._c cimport *

cnp.import_array()


# ---- the machine: instruction set, caches, thresholds ---------------------------------------------------------------

cdef bn_machine MACHINE = bn_this_machine()
cdef bn_tuning TUNING = bn_tunings[MACHINE.class_]
cdef const bn_kernels *TABLES[BN_MAX_ISAS]
cdef int N_TABLES = bn_supported(TABLES)
cdef const bn_kernels *K

openmp = BN_OPENMP or None  # the OpenMP version as yyyymm, None in a serial build


cdef void use(const bn_kernels *table) noexcept:
    global K
    K = table
    MACHINE.lanes = table.terms[BN_f32].lanes
    MACHINE.held = table.terms[BN_f32].held
    MACHINE.overlaps = table.terms[BN_f32].overlaps


if N_TABLES == 0:
    raise ImportError("fastbn was built for some instruction sets alone (FASTBN_BUILD_ISAS), and this CPU has none of "
                      "them; build it without that variable")
use(TABLES[N_TABLES - 1])
if bn_lock_outputs_at_forks():
    raise MemoryError("no memory to be told of forks")


def caches():
    """Bytes of a core's L2 and of the last-level cache, and how many CPUs share the latter; a guess if not on Linux."""
    return MACHINE.l2, MACHINE.llc, MACHINE.llc_cpus


def supported_isas():
    """The instruction sets this build has kernels for and this CPU can run, the best last."""
    return tuple(TABLES[i].name.decode() for i in range(N_TABLES))


def get_isa():
    return K.name.decode()


def set_isa(name):
    """Choose the kernels of all later calls; returns the name of those in use before. For tests."""
    previous = get_isa()
    if name not in supported_isas():
        raise ValueError(f"this CPU and build offer {', '.join(supported_isas())}; got {name!r}")
    use(TABLES[supported_isas().index(name)])
    return previous


if os.environ.get("FASTBN_ISA"):
    try:
        set_isa(os.environ["FASTBN_ISA"])
    except ValueError as error:
        raise ImportError(f"FASTBN_ISA: {error}; unset it to take the best") from None


def tune(Py_ssize_t serial=-1, Py_ssize_t cache=-1, Py_ssize_t group=-1):
    """Move the size in elements up to which a call takes one thread, and in bytes those of the caches and of a group of
    channels from beyond them (0: the machine's and the best), so that tests reach all paths."""
    if serial >= 0:
        TUNING.serial = serial
    if cache >= 0:
        TUNING.cache = cache
    if group >= 0:
        TUNING.group = group


def dtypes():
    """The names of what kernels work on."""
    return list(ELEMENTS)


def machines():
    """The names of machines that plans can be made for."""
    cdef int i = 0
    names = []
    while bn_machine_name(i) != NULL:
        names.append(bn_machine_name(i).decode())
        i += 1
    return names


cdef list ELEMENTS = [bn_element_name(code).decode() for code in range(<int> BN_N_ELEMENTS)]
cdef list SHARED_OUT = ["elementwise", "owned", "overlapped", "tiled"]  # by bn_way


cdef dict pass_of(const bn_pass *how):
    return {
        "rows": how.rows, "store": "streamed" if how.store == BN_STREAMED else "cached", "by_batch": bool(how.by_batch),
        "period": how.period, "ahead": how.ahead,
    }


cdef dict told(const bn_plan *plan, const bn_problem *p):
    """A plan in Python's terms."""
    return {
        "operation": bn_operation_name(plan.op).decode(), "layout": "rows" if p.layout == BN_ROWS else "planes",
        "dtype": ELEMENTS[p.element],
        "N": p.N, "C": p.C, "S": p.S, "fold": p.fold, "class": bn_class_name(plan.class_).decode(),
        "threads": plan.threads, "way": SHARED_OUT[plan.way], "tiles": plan.T, "columns": plan.width,
        "from_memory": bool(plan.from_memory), "reversed": bool(plan.reversed), "by_columns": bool(plan.by_columns),
        "owned": plan.owned, "group": plan.group, "unit": plan.unit, "groups": plan.owner_items,
        "shares": {
            "tiles": plan.tiles.items, "panels": plan.tiles.panels, "pooling": plan.pool.items,
            "elements": plan.elements.items,
        },
        "sums": pass_of(&plan.sums) if bn_first_pass(plan.op) else None,
        "apply": pass_of(&plan.apply) if bn_second_pass(plan.op) else None,
        "overlap": pass_of(&plan.overlap) if plan.way == BN_OVERLAPPED else None,
        "scratch": plan.scratch.bytes,
        "why": {
            "way": plan.why_way.decode(), "store": plan.why_store.decode(), "rows": plan.why_rows.decode(),
        },
    }


def plan(shape, str operation, *, int axis=1, str dtype="float32", int threads=1, bint residual=False,
         str machine=None, dict facts=None):
    """How an operation on a gapless array of this shape would be gone about, here or on another machine.

    `facts` replace those of the machine: l2, llc, llc_cpus, streams, lanes, held, overlaps.
    """
    cdef bn_machine m = MACHINE
    cdef bn_tuning tuning = TUNING
    cdef bn_problem p
    cdef bn_plan found
    cdef int op
    cdef bn_operand there
    if machine is not None and not bn_named_machine(machine.encode(), &m):
        raise ValueError(f"machine must be one of {', '.join(machines())}, got {machine!r}")
    if facts is not None:
        m.l2, m.llc = facts.get("l2", m.l2), facts.get("llc", m.llc)
        m.llc_cpus, m.streams = facts.get("llc_cpus", m.llc_cpus), facts.get("streams", m.streams)
        m.lanes, m.held = facts.get("lanes", m.lanes), facts.get("held", m.held)
        m.overlaps = facts.get("overlaps", m.overlaps)
    if machine is not None or facts is not None:
        m.class_ = bn_class_of(&m)
        tuning = bn_tunings[m.class_]
    names = [bn_operation_name(<bn_operation> code).decode() for code in range(<int> BN_N_OPERATIONS)]
    if operation not in names:
        raise ValueError(f"operation must be one of {', '.join(names)}, got {operation!r}")
    op = names.index(operation)
    if dtype not in ELEMENTS:
        raise ValueError(f"dtype must be one of {', '.join(ELEMENTS)}, got {dtype!r}")
    cdef int element = ELEMENTS.index(dtype)
    x = np.lib.stride_tricks.as_strided(np.empty(0, np.float32), shape, c_strides(shape))
    describe(&p, memory_of(x), check_axis(x, axis))
    place(&there, &p, memory_of(x), check_axis(x, axis))
    there.data = <void *> &p  # never looked at
    p.element = element
    p.x = there
    if residual:
        p.residual = there
    if op == BN_INFERENCE or op == BN_TRAINING:
        p.y = there
    if op == BN_SUMS or op == BN_BACKWARD or op == BN_GRAD_INPUT:
        p.grad_output = there
    if op == BN_BACKWARD or op == BN_GRAD_INPUT:
        p.grad_input = there
        if residual:
            p.grad_residual = there
    flatten(&p)
    bn_make_plan(&found, &p, <bn_operation> op, &m, &tuning,
                 bn_plan_threads(p.N * p.C * p.S, threads, &tuning))
    return told(&found, &p)


cdef tuple c_strides(shape):
    strides = [4]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))


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
    if bn_plan_threads(elements, 2, &TUNING) == 1:
        return 1
    if openmp is None:
        from fastbn import threads
        threads.warn_if_serial(num_threads)
        return 1
    if threads_module is None:
        first_parallel_call()
    if num_threads is None:
        n = threads_module.get_num_threads()
        if n > 1 and (no_cpus_for(n) or goes_alone(n, elements)):
            n = 1
    if n > 1:
        n = startable(n)
        if num_threads is None and no_cpus_for(n):  # others came first while the GIL was let go of
            n = 1
    return n


cdef bint no_cpus_for(int n) noexcept:
    """Whether the threads of others that are in calls leave no CPUs for a team of n."""
    return AT_WORK > 0 and AT_WORK + n > CPUS


cdef bint goes_alone(int n, Py_ssize_t elements) noexcept:
    """Whether a call that named no number, and could have n threads, goes alone because sharing did not pay lately."""
    global DEFAULT_THREADS
    cdef bint alone
    bn_lock()
    DEFAULT_THREADS = n
    alone = bn_backoff_alone(elements, bn_now())
    bn_unlock()
    return alone


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
    bn_lock()
    bn_backoff_judge(elements, threads, own, wall, bn_now())
    bn_unlock()


def sharing():
    """How many calls were shared out, went alone instead, and took longer than alone, among those that named no number
    of threads."""
    cdef bn_backoff_counts counts = bn_backoff_report()
    return counts.shared, counts.alone, counts.lost


def would_share(Py_ssize_t elements):
    """Whether a call of so many elements would be shared out now. For tests: it counts as one that asked."""
    bn_lock()
    cdef bint alone = bn_backoff_alone(elements, bn_now())
    bn_unlock()
    return not alone


def most_at_work():
    """The most threads that were in calls at once. For tests."""
    return MOST_AT_WORK


def forget_sharing():
    """Share all calls out again, until that does not pay. For tests."""
    bn_lock()
    bn_backoff_forget()
    bn_unlock()


# ---- checks of arguments ------------------------------------------------------------------------------------------

cdef list ACTIVATIONS = [  # by code
    None if bn_activation_name(code) == NULL else bn_activation_name(code).decode() for code in range(BN_N_ACTIVATIONS)
]


cdef int activation_code(activation) except -1:
    if activation is None:
        return BN_IDENTITY
    cdef int code
    for code in range(BN_IDENTITY + 1, BN_N_ACTIVATIONS):
        if isinstance(activation, str) and activation == ACTIVATIONS[code]:
            return code
    names = [repr(name) for name in ACTIVATIONS]
    raise ValueError(f"activation must be {', '.join(names[:-1])} or {names[-1]}, got {activation!r}")


cdef double number(value, str name) except? -1.0:
    try:
        return value
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be within the range of a float, got an int beyond it") from None


cpdef Py_ssize_t whole(value, str name, str limits) except? -1:
    """An int that C has room for, as whatever has these limits must be."""
    if type(value) is int:
        pass
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    else:
        try:
            value = operator.index(value)
        except TypeError:  # an array has the method, but not always a number
            raise TypeError(f"{name} must be an int, got {value!r}") from None
    try:
        return value
    except OverflowError:
        raise ValueError(f"{name} must {limits}, got {value}") from None


cpdef double check_eps(eps) except? -1.0:
    cdef double value = number(eps, "eps")
    if not (isfinite(value) and value >= 0.0):
        raise ValueError(f"eps must be finite and >= 0, got {value}")
    return value


cdef double check_slope(negative_slope) except? -1.0:
    cdef double value = number(negative_slope, "negative_slope")
    if not fabs(value) <= FLT_MAX:
        raise ValueError(f"negative_slope must be finite, in float32 too, got {value}")
    return value


cpdef double check_momentum(momentum) except? -1.0:
    cdef double value = number(momentum, "momentum")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"momentum must be finite and lie in [0, 1], the weight of the new value, got {value}")
    return value


def check_activation(activation, negative_slope):
    activation_code(activation)
    check_slope(negative_slope)


cdef object foreign(a, str name, str dtype="float32"):
    """An array of another library as NumPy sees it in place: by __array_interface__, DLPack or the buffer protocol."""
    reason = ""
    cure = f"convert it with numpy.asarray({name}, dtype={'' if dtype == 'bool' else 'numpy.'}{dtype})"
    try:
        if a is None:
            cure = "pass an array"
        elif isinstance(a, np.generic):
            reason = " (a scalar)"
        elif hasattr(a, "__array_interface__"):
            return np.asarray(a)
        elif not hasattr(a, "__dlpack__"):
            return np.asarray(memoryview(a))
        else:
            device, _ = a.__dlpack_device__()
            if device == 1:  # kDLCPU
                return np.from_dlpack(a)
            reason = " (not in the memory of the CPU)"
            cure = "copy it there first"
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        if hasattr(a, "__dlpack__"):
            reason = f" ({error})"
    if getattr(a, "requires_grad", False) is True:
        cure = f"pass {name}.detach()"
    raise TypeError(f"{name} must be a {dtype} numpy.ndarray, got {type(a).__name__}{reason}; {cure}")


cdef object FLOAT32 = np.dtype(np.float32), FLOAT64 = np.dtype(np.float64)
cdef int BFLOAT16 = -16  # NumPy's number of ml_dtypes' bfloat16, once that is loaded; before one that nothing has


cdef extern from *:
    """
    #ifndef FASTBN_FLOAT32_ALONE /* setup.py defines it, for quick builds */
    #define FASTBN_FLOAT32_ALONE 0
    #endif
    """
    bint FASTBN_FLOAT32_ALONE

cdef str DTYPES = "float32" if FASTBN_FLOAT32_ALONE else "float32, float64, float16 or bfloat16"


cdef int element_of_dtype(int dtype) noexcept:
    """The kernels' number of what NumPy has this number for; -1 where they have none."""
    if dtype == cnp.NPY_FLOAT32:
        return BN_f32
    if FASTBN_FLOAT32_ALONE:
        return -1
    if dtype == cnp.NPY_FLOAT64:
        return BN_f64
    if dtype == cnp.NPY_FLOAT16:
        return BN_f16
    if dtype == BFLOAT16:
        return BN_bf16
    return -1


cdef int element_of(cnp.ndarray a) noexcept:
    return element_of_dtype(cnp.PyArray_TYPE(a)) if cnp.PyArray_ISNOTSWAPPED(a) else -1


cdef Py_ssize_t bytes_of(int dtype) noexcept:
    """Of an element, or of what else has 8."""
    cdef int element = element_of_dtype(dtype)
    return 8 if element < 0 else bn_element_bytes(element)


cdef int learn_bfloat16(a) except -1:
    """Arrays of bfloat16 come from a module that is loaded then."""
    global BFLOAT16
    if BFLOAT16 < 0 and a.dtype.name == "bfloat16":
        BFLOAT16 = np.dtype(sys.modules["ml_dtypes"].bfloat16).num
    return 0


cpdef cnp.ndarray elements(a, str name):
    """`a` as an array of elements that kernels work on, in its own memory; raises where it is none."""
    if cnp.PyArray_CheckExact(a) and element_of(a) >= 0:
        return a
    b = a if cnp.PyArray_Check(a) else foreign(a, name)
    if element_of(b) < 0:
        learn_bfloat16(b)
        if element_of(b) < 0:
            raise TypeError(
                f"{name} must have dtype {DTYPES} in native byte order, got "
                f"{type(a).__name__} of {b.dtype!s} ({b.dtype.str}); convert it with "
                f"numpy.asarray({name}, dtype=numpy.float32)"
            )
    check_unmasked(b, name)
    return b


cdef int check_unmasked(b, str name) except -1:
    if not cnp.PyArray_CheckExact(b) and isinstance(b, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked one: its mask would be ignored; fill it first")
    return 0


cdef cnp.ndarray truths(mask):
    """`mask` as an array of bool that shares its memory; raises where it is none."""
    b = mask if cnp.PyArray_Check(mask) else foreign(mask, "mask", "bool")
    if cnp.PyArray_TYPE(b) != cnp.NPY_BOOL:
        raise TypeError(f"mask must have dtype bool, True where x is real, got {type(mask).__name__} of {b.dtype!s}; "
                        "convert it, such as with mask != 0")
    if not cnp.PyArray_CheckExact(b) and isinstance(b, np.ma.MaskedArray):
        raise TypeError("mask must be a plain array, got a masked one: its mask would be ignored; fill it first")
    return b


cdef bint is_position_a_byte(cnp.ndarray mask, cnp.ndarray x, int axis) noexcept:
    """Whether a mask needs neither broadcasting nor gathering."""
    cdef int i, nd = cnp.PyArray_NDIM(mask)
    if nd != cnp.PyArray_NDIM(x) - 1 or not cnp.PyArray_IS_C_CONTIGUOUS(mask):
        return False
    for i in range(nd):
        if cnp.PyArray_DIM(mask, i) != cnp.PyArray_DIM(x, i + (i >= axis)):
            return False
    return True


cdef tuple check_mask(cnp.ndarray mask, cnp.ndarray x, int axis):
    """That it can be broadcast to the positions of x, whose shape this returns."""
    cdef tuple shape = (<object> x).shape, found = (<object> mask).shape
    cdef tuple positions = shape[:axis] + shape[axis + 1:]
    cdef int missing = len(positions) - len(found)
    if missing >= 0:
        for n, m in zip(positions[missing:], found):
            if n != m and m != 1:
                break
        else:
            return positions
    cure = "pass one value a position, for all channels alike"
    if found == shape[:axis] + (1,) + shape[axis + 1:]:
        cure = f"leave out its axis of channels, such as by mask.squeeze({axis})"
    elif missing > 0 and found == positions[:len(found)]:
        cure = f"give it {missing} more axes of length 1 at its end" if missing > 1 else "pass mask[..., None]"
    raise ValueError(f"mask must have the shape of x without its channels, {positions}, or one that can be broadcast "
                     f"to that, got {found} for x of shape {shape} with its channels on axis {axis}; {cure}")


def positions(mask, x, Py_ssize_t axis):
    """A mask as a view of one value for each position of x."""
    x = elements(x, "x")
    cdef cnp.ndarray given = truths(mask)
    return np.broadcast_to(given, check_mask(given, x, check_axis(x, axis)))


cdef object optional(a, str name):
    return None if a is None else elements(a, name)


cdef int check_same_dtype(cnp.ndarray a, str name, cnp.ndarray x) except -1:
    """Of another operand, that it is x's."""
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(x):
        dtype = (<object> x).dtype.name
        raise TypeError(
            f"{name} must have the dtype of x, {dtype}, got {(<object> a).dtype!s}; convert one of the two, as with "
            f"{name}.astype({quoted(dtype)})"
        )
    return 0


cdef str quoted(str dtype):
    """How an array's dtype is written."""
    return "ml_dtypes.bfloat16" if dtype == "bfloat16" else f"numpy.{dtype}"


cdef bint is_half(cnp.ndarray a) noexcept:
    return bn_element_bytes(element_of(a)) == 2


cdef cnp.ndarray parameter(a, str name, int element):
    """`a` as a vector of parameters or statistics beside such elements: float64 for float64, else float32; halves are
    widened, in a copy."""
    cdef int real = cnp.NPY_FLOAT64 if element == BN_f64 else cnp.NPY_FLOAT32
    if cnp.PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == real and cnp.PyArray_ISNOTSWAPPED(a):
        return a
    cdef cnp.ndarray b = elements(a, name)
    if is_half(b) and element != BN_f64:
        return (<object> b).astype(np.float32)
    if cnp.PyArray_TYPE(b) != real:
        expected, of_x = ("float64", "float64") if element == BN_f64 else ("float32", "float32 or a half of it")
        raise TypeError(
            f"{name} must have dtype {expected} where x has {of_x}, got {(<object> b).dtype!s}; convert it with "
            f"{name}.astype(numpy.{expected}), or x to its dtype"
        )
    return b


cdef cnp.ndarray running(a, str name, int element, bint moved):
    """`a` as running averages beside such elements: as a parameter, or float64 beside any. Those that are moved are the
    caller's own, for which a widened copy will not do."""
    cdef cnp.ndarray b
    if cnp.PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 and element != BN_f64 and (
            cnp.PyArray_ISNOTSWAPPED(a)):
        return a
    b = elements(a, name)
    if cnp.PyArray_TYPE(b) == cnp.NPY_FLOAT64:
        return b
    if moved and is_half(b):
        raise TypeError(
            f"{name} is updated in place in training and must have dtype float32 or float64, got "
            f"{(<object> b).dtype!s}, in which averages stall; convert it with {name}.astype(numpy.float32)"
        )
    return parameter(b, name, element)


cdef cnp.ndarray vector32(a, str name):
    """`a` as an array of float32, or a widened copy of halves."""
    return parameter(a, name, BN_f32)


cpdef str dtype_of_parameters(x):
    """float64 beside an array of float64, float32 beside others."""
    return "float64" if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else "float32"


cdef int check_shape(cnp.ndarray a, cnp.ndarray x, str name, str like) except -1:
    cdef int i, nd = cnp.PyArray_NDIM(x)
    if cnp.PyArray_NDIM(a) == nd:
        for i in range(nd):
            if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(x, i):
                break
        else:
            return 0
    raise ValueError(f"{name} must have the shape of {like}, {(<object> x).shape}, got {(<object> a).shape}")


cdef int check_rank(x, tuple ranks) except -1:
    """x must be of one of these; None allows all."""
    if ranks is None:
        return 0
    for rank in ranks:
        if <int> rank == cnp.PyArray_NDIM(x):
            return 0
    expected = " or ".join([f"{rank}D" for rank in ranks])
    raise ValueError(f"expected {expected} input (got {cnp.PyArray_NDIM(x)}D input)")


cdef int check_axis(cnp.ndarray x, Py_ssize_t axis) except -1:
    cdef Py_ssize_t nd = cnp.PyArray_NDIM(x)
    if nd < 2:
        raise ValueError(f"x must have at least 2 dimensions (batch and channels), got shape {(<object> x).shape}")
    if not -nd <= axis < nd:
        raise ValueError(f"axis must lie in [{-nd}, {nd}) for x of shape {(<object> x).shape}, got {axis}")
    return axis + nd if axis < 0 else axis


cdef str last_axis_hint(x, int axis, Py_ssize_t C):
    """What to do where C would fit the last axis of x, but not this one."""
    cdef int last = 0 if x is None else cnp.PyArray_NDIM(x) - 1
    if axis < last and cnp.PyArray_DIM(x, last) == C:
        return f"; x has shape {x.shape} and its channels on axis {axis}: pass axis=-1 if they come last"
    return ""


cdef int check_vector(a, str name, Py_ssize_t C, x=None, int axis=0) except -1:
    """`a`, an array of float32 or None, must have C values: the channels of x on this axis, where there is one."""
    if a is not None and (cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != C):
        hint = last_axis_hint(x, axis, cnp.PyArray_DIM(a, 0)) if cnp.PyArray_NDIM(a) == 1 else ""
        raise ValueError(f"{name} must have shape ({C},), one value a channel, got {a.shape}{hint}")
    return 0


cdef int check_alike(cnp.ndarray running_mean, cnp.ndarray running_var) except -1:
    if cnp.PyArray_TYPE(running_mean) != cnp.PyArray_TYPE(running_var):
        raise TypeError(
            "running_mean and running_var must be both of dtype float32 or both of float64, got "
            f"{(<object> running_mean).dtype!s} and {(<object> running_var).dtype!s}; pass both in one dtype"
        )
    return 0


cdef int check_counter(a) except -1:
    """The num_batches_tracked of a layer, which must have room for one more."""
    if (not cnp.PyArray_Check(a) or cnp.PyArray_TYPE(a) != cnp.NPY_INT64 or cnp.PyArray_SIZE(a) != 1
            or not cnp.PyArray_ISNOTSWAPPED(a)):
        raise TypeError(f"num_batches_tracked must be an int64 array of one value, got {a!r}")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError("num_batches_tracked is updated in place in training but is read-only; set a writable copy")
    cdef long long count = read_counter(a)
    if not 0 <= count < 0x7FFFFFFFFFFFFFFF:
        raise ValueError(f"num_batches_tracked must be from 0 to 2**63 - 2 to count one more batch, got {count}")
    return 0


cdef long long read_counter(cnp.ndarray a) noexcept:
    cdef long long count
    memcpy(&count, cnp.PyArray_DATA(a), sizeof(count))  # at any address
    return count


cdef int check_running(cnp.ndarray a, str name) except -1:
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} is updated in place in training but is read-only; pass a writable copy")
    if not distinct(a):
        raise ValueError(f"{name} has elements that share memory (stride 0); pass an array without")
    return 0


cpdef cnp.ndarray vector(a, str name, Py_ssize_t C, bint writable, dtype):
    """`a` as a vector of C parameters of a layer of this dtype; halves are widened, in a copy."""
    cdef cnp.ndarray v = parameter(a, name, BN_f64 if dtype is FLOAT64 else BN_f32)
    check_vector(v, name, C)
    if writable:
        check_running(v, name)
    return v


cdef int check_moment(a, str name, Py_ssize_t C, str of="stats", str made="BatchStats") except -1:
    """A vector of a BatchStats or GradSums, which no more than a class keeps others from changing."""
    if not cnp.PyArray_Check(a) or cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT64 or not cnp.PyArray_ISNOTSWAPPED(a):
        raise TypeError(f"{of}.{name} must be a float64 numpy.ndarray, got {getattr(a, 'dtype', type(a).__name__)}; "
                        f"make a new {made}")
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != C:
        raise ValueError(f"{of} must be of {C} channels, as x is, got {name} of shape {a.shape}")
    if C > 1 and cnp.PyArray_STRIDE(a, 0) != 8 or not cnp.PyArray_ISALIGNED(a):
        raise ValueError(f"{of}.{name} must be contiguous and aligned; make a new {made}")
    return 0


cdef int check_variance(cnp.ndarray var, bint float64, double eps, str name) except -1:
    """That a checked vector, without gaps, gives no root of a negative number; a NaN may be."""
    cdef Py_ssize_t c
    if not any_negative(cnp.PyArray_DATA(var), float64, cnp.PyArray_DIM(var, 0)):
        return 0
    too_small = np.asarray(var, np.float64) + eps < 0.0
    if too_small.any():
        c = int(np.argmax(too_small))
        raise ValueError(f"{name}[{c}] + eps must be >= 0, got {(<object> var)[c]!s} + {eps}")
    return 0


cdef bint any_negative(const void *values, bint float64, Py_ssize_t n) noexcept:
    cdef const float *v32 = <const float *> values
    cdef const double *v64 = <const double *> values
    cdef Py_ssize_t i
    cdef int negative = False  # in loops of little, which compilers make vectors of
    if float64:
        for i in range(n):
            negative |= v64[i] < 0.0
    else:
        for i in range(n):
            negative |= v32[i] < 0.0
    return negative


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


cdef int check_output(cnp.ndarray out, cnp.ndarray x, bint in_place) except -1:
    """The result for x may be written into out."""
    check_shape(out, x, "out", "the input")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out is read-only; pass a writable array")
    if not (cnp.PyArray_IS_C_CONTIGUOUS(out) or distinct(out)):
        raise ValueError(
            f"out has elements that share memory (strides {(<object> out).strides}); pass an array without"
        )
    if not (in_place and same_memory(out, x)) and overlap(out, x):
        raise ValueError(
            "out overlaps x; pass x itself (in place) or memory of its own" if in_place else
            "out overlaps x; pass memory of its own"
        )
    return 0


cdef int check_clear(cnp.ndarray a, str name, other, str name_of_other) except -1:
    """That `a`, which is written, shares no memory with another array."""
    if other is not None and overlap(a, other):
        raise ValueError(f"{name} overlaps {name_of_other}; pass memory of its own")
    return 0


# ---- arrays as operands of a problem ------------------------------------------------------------------------------

cdef struct Memory:  # of an array or a tensor, valid until Python code runs
    char *data
    int nd, dtype  # NumPy's number of it
    const Py_ssize_t *shape
    const Py_ssize_t *strides  # in bytes

cdef struct Strides:
    Py_ssize_t outer, channel, inner  # in elements
    bint walkable


cdef Memory memory_of(cnp.ndarray a) noexcept:
    cdef Memory m
    m.data = <char *> cnp.PyArray_DATA(a)
    m.nd = cnp.PyArray_NDIM(a)
    m.dtype = cnp.PyArray_TYPE(a)
    m.shape = <const Py_ssize_t *> cnp.PyArray_DIMS(a)
    m.strides = <const Py_ssize_t *> cnp.PyArray_STRIDES(a)
    return m


cdef bint collapse(const Memory *a, int first, int end, Py_ssize_t *stride) noexcept:
    """The one stride, in bytes, over dimensions [first, end), where there is one."""
    cdef Py_ssize_t i, size = 1
    stride[0] = 0
    for i in range(end - 1, first - 1, -1):
        if a.shape[i] == 1:
            continue
        if size == 1:
            stride[0] = a.strides[i]
        elif a.strides[i] != stride[0] * size:
            return False
        size *= a.shape[i]
    return True


cdef Strides strides_of(const Memory *a, int axis) noexcept:
    cdef Strides s
    s.outer = s.inner = 0
    s.channel = a.strides[axis]
    if axis == a.nd - 1 and a.nd > 2:
        s.walkable = collapse(a, 0, 1, &s.outer) and collapse(a, 1, axis, &s.inner)
    else:
        s.walkable = collapse(a, 0, axis, &s.outer) and collapse(a, axis + 1, a.nd, &s.inner)
    cdef Py_ssize_t size = bytes_of(a.dtype)  # a power of two
    if (s.outer | s.channel | s.inner | <Py_ssize_t> a.data) & (size - 1):
        s.walkable = False
    s.outer //= size
    s.channel //= size
    s.inner //= size
    return s


cdef void sizes_of(const Memory *a, int axis, Py_ssize_t *N, Py_ssize_t *C, Py_ssize_t *S) noexcept:
    cdef int i
    N[0] = S[0] = 1
    C[0] = a.shape[axis]
    for i in range(a.nd):
        if i < axis and (i == 0 or axis < a.nd - 1 or a.nd == 2):
            N[0] *= a.shape[i]
        elif i != axis:
            S[0] *= a.shape[i]


cdef void describe(bn_problem *p, Memory x, int axis) noexcept:
    """Sizes and layout of p from x."""
    cdef Strides s = strides_of(&x, axis)
    memset(p, 0, sizeof(bn_problem))
    p.element = element_of_dtype(x.dtype)
    sizes_of(&x, axis, &p.N, &p.C, &p.S)
    if p.S == 1:
        p.layout = BN_ROWS
    elif p.C == 1 or (s.walkable and s.inner == 1):
        p.layout = BN_PLANES
    elif s.walkable and s.channel == 1:
        p.layout = BN_ROWS
    else:
        p.layout = BN_ROWS if axis == x.nd - 1 else BN_PLANES
    p.fold = 1
    if p.layout == BN_ROWS and (not s.walkable or (
            (p.C == 1 or s.channel == 1) and (p.S == 1 or s.inner == p.C) and (p.N == 1 or s.outer == p.S * p.C))):
        p.fold = bn_fold(p.C)  # rows with gaps are walked one by one; what is not walkable will be copied


cdef bint place(bn_operand *o, const bn_problem *p, Memory a, int axis) noexcept:
    """Fill in an operand; False where the kernels cannot walk it, or it is none of this problem."""
    cdef Py_ssize_t N, C, S
    cdef Strides s
    if a.nd <= max(axis, 1) or element_of_dtype(a.dtype) != p.element:
        return False
    sizes_of(&a, axis, &N, &C, &S)
    if N != p.N or C != p.C or S != p.S:
        return False
    s = strides_of(&a, axis)
    o.data = a.data
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
    p.pitch = p.C if p.packed else 0


# ---- memory -------------------------------------------------------------------------------------------------------

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


def give_back():
    """Give back what is kept; returns how many bytes: where any, an allocation that failed may be tried once more."""
    return bn_output_give_back()


cdef void *claim(size_t size) noexcept:
    """Memory to be freed, or NULL."""
    cdef void *memory = malloc(size)
    if memory == NULL and bn_output_give_back():
        memory = malloc(size)
    return memory


cdef cnp.ndarray empty_like(cnp.ndarray x, int order):
    cdef bint keep = cnp.PyArray_NBYTES(x) >= KEEP_FROM and bn_output_limit() > 0
    if keep:
        previous = PyDataMem_SetHandler(output_handler_capsule)
    try:
        return PyArray_NewLikeArray(x, order, NULL, 0)
    except MemoryError:
        if not bn_output_give_back():
            raise
        return PyArray_NewLikeArray(x, order, NULL, 0)
    finally:
        if keep:
            PyDataMem_SetHandler(previous)


cdef cnp.ndarray per_channel(Py_ssize_t C, int dtype, bint zero):
    """A result of one value a channel; without zero, memory that only the kernels write: clearing it takes its lines
    from the core of the thread that is about to."""
    cdef cnp.npy_intp shape = C
    try:
        return cnp.PyArray_ZEROS(1, &shape, dtype, 0) if zero else cnp.PyArray_EMPTY(1, &shape, dtype, 0)
    except MemoryError:
        if not bn_output_give_back():
            raise
        return cnp.PyArray_ZEROS(1, &shape, dtype, 0) if zero else cnp.PyArray_EMPTY(1, &shape, dtype, 0)


cdef cnp.ndarray statistic(Py_ssize_t C, bint zero):
    """Float64 and read-only to all but the kernels, as a BatchStats has it."""
    cdef cnp.ndarray a = per_channel(C, cnp.NPY_FLOAT64, zero)
    cnp.PyArray_CLEARFLAGS(a, cnp.NPY_ARRAY_WRITEABLE)
    return a


cdef double *data64(cnp.ndarray a) noexcept:
    return <double *> cnp.PyArray_DATA(a)


cdef cnp.ndarray contiguous(cnp.ndarray a):
    """A checked vector, or a copy of it without gaps."""
    cdef bint gapless = cnp.PyArray_DIM(a, 0) <= 1 or cnp.PyArray_STRIDE(a, 0) == cnp.PyArray_ITEMSIZE(a)
    if gapless and cnp.PyArray_ISALIGNED(a):
        return a
    copy = per_channel(cnp.PyArray_DIM(a, 0), cnp.PyArray_TYPE(a), False)
    copy[...] = a
    return copy


cdef cnp.ndarray empty_for(const bn_problem *p, cnp.ndarray x, int axis):
    """An array of x's shape, without gaps, in the memory order of p's layout."""
    cdef bn_operand o
    cdef cnp.ndarray a = empty_like(x, cnp.NPY_KEEPORDER)
    if not place(&o, p, memory_of(a), axis):
        to = axis
        if p.layout == BN_ROWS:
            to = -1
        elif axis == cnp.PyArray_NDIM(x) - 1:
            to = 1
        a = np.moveaxis(empty_like(np.moveaxis(x, axis, to), cnp.NPY_CORDER), to, axis)
    return a


cdef cnp.ndarray readable(const bn_problem *p, cnp.ndarray a, int axis):
    """What to read in place of `a`: itself, or a copy where that cannot be walked."""
    cdef bn_operand o
    if place(&o, p, memory_of(a), axis):
        return a
    copy = empty_for(p, a, axis)
    copy[...] = a
    return copy


cdef cnp.ndarray writable(const bn_problem *p, out, cnp.ndarray x, int axis):
    """What to write: `out`, or a new array where that is None or cannot be walked."""
    cdef bn_operand o
    if out is not None and place(&o, p, memory_of(out), axis):
        return out
    return empty_for(p, x, axis)


# Python code may run wherever one is called, memory is freed, or the GIL is let go of, and then an array may get
# another shape or memory. So the kernels' pointers are taken last, and every array is looked at again with that.

cdef int changed(str name) except -1:
    raise RuntimeError(f"{name} was given another shape, other strides or other memory during the call")


cdef int take(bn_operand *o, const bn_problem *p, cnp.ndarray a, int axis, str name) except -1:
    return 0 if place(o, p, memory_of(a), axis) else changed(name)


cdef int take_output(bn_operand *o, const bn_problem *p, cnp.ndarray y, out, int axis) except -1:
    """What is written, and is copied into `out` if that is another array."""
    if out is not None and out is not y:
        check_shape(out, y, "out", "the input")
    return take(o, p, y, axis, "out")


cdef char *take_vector(cnp.ndarray a, Py_ssize_t C, int dtype, Py_ssize_t stride, str name) except? NULL:
    """The C values of a checked vector, so many bytes apart (0: any number)."""
    if (cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != C or cnp.PyArray_TYPE(a) != dtype
            or C > 1 and stride != 0 and cnp.PyArray_STRIDE(a, 0) != stride):
        changed(name)
    return <char *> cnp.PyArray_DATA(a)


cdef int take_running(bn_running *r, cnp.ndarray a, Py_ssize_t C, bint float64, str name) except -1:
    """Averages that are moved: the caller's own, of float32 or float64."""
    memset(r, 0, sizeof(bn_running))
    if float64:
        r.exact = take_vector(a, C, cnp.NPY_FLOAT64, 0, name)
        r.exact_stride = cnp.PyArray_STRIDE(a, 0)
    else:
        r.value = take_vector(a, C, cnp.NPY_FLOAT32, 0, name)
        r.stride = cnp.PyArray_STRIDE(a, 0)
    return 0


cdef int real_of(int element) noexcept:
    """NumPy's number of what coefficients and parameters are beside such elements."""
    return cnp.NPY_FLOAT64 if element == BN_f64 else cnp.NPY_FLOAT32


cdef void *take_parameter(a, Py_ssize_t C, int element, str name) except? NULL:
    return NULL if a is None else take_vector(a, C, real_of(element), bn_real_bytes(element), name)


cdef double *take64(a, Py_ssize_t C, str name) except? NULL:
    return <double *> take_vector(a, C, cnp.NPY_FLOAT64, 8, name)


# ---- a team of threads at a call ----------------------------------------------------------------------------------

cdef struct Team:
    const bn_call *call
    long long worked  # nanoseconds of the caller's, without those at barriers

cdef bint WATCHED = False
cdef bn_plan LATEST
cdef bn_problem LATEST_PROBLEM


def watch_plans(bint watched):
    """Keep the plan of each call for latest_plan(), or no longer. For tests, which ask whether a path was taken."""
    global WATCHED
    WATCHED = watched
    LATEST.threads = 0


def latest_plan():
    """The plan of the latest call, None before there was one."""
    return told(&LATEST, &LATEST_PROBLEM) if LATEST.threads else None


cdef void wait_for_all(void *waited) noexcept nogil:
    cdef long long start = bn_now()
    bn_barrier()
    (<long long *> waited)[0] += bn_now() - start


cdef void as_member(void *arg, int member, int team) noexcept nogil:
    cdef Team *all = <Team *> arg
    cdef long long waited = 0, start = 0 if member else bn_now()
    cdef bn_member me
    me.member = member
    me.team = team
    me.wait = wait_for_all
    me.arg = &waited
    bn_do_share(all.call, &me)
    if member == 0:
        all.worked = bn_now() - start - waited


cdef int plan_and_allocate(bn_call *call, bn_operation op, int threads) except -1:
    """What comes last before run(). Inference has its coefficients and needs no scratch."""
    global LATEST, LATEST_PROBLEM
    flatten(&call.p)
    bn_make_plan(&call.plan, &call.p, op, &MACHINE, &TUNING, threads)
    if WATCHED:
        LATEST, LATEST_PROBLEM = call.plan, call.p
    if op == BN_INFERENCE:
        return 0
    call.memory = claim(call.plan.scratch.bytes + 63)
    if call.memory == NULL:
        raise MemoryError(f"no memory for the partial sums of {call.plan.T} tiles")
    call.scratch = <char *> ((<uintptr_t> call.memory + 63) // 64 * 64)
    if call.p.mask != NULL:
        bn_count_mask(call)
    return 0


cdef void run(bn_call *call) noexcept:
    """All of the work, in one parallel region: a barrier costs less than a second region. Little work is not worth
    letting go of the GIL, and has no smaller team, because GNU OpenMP would end the threads that are left out."""
    global AT_WORK, MOST_AT_WORK
    cdef Py_ssize_t elements = call.p.N * call.p.C * call.p.S
    cdef int threads = call.plan.threads
    cdef long long start = 0, wall = 0
    cdef bint fresh = True
    cdef Team team
    cdef bn_member alone
    call.K = K
    alone.member = 0
    alone.team = 1
    if threads == 1 and elements < TUNING.serial:
        bn_do_share(call, &alone)
        free(call.memory)
        return
    team.call = call
    bn_lock()
    AT_WORK += threads
    MOST_AT_WORK = max(MOST_AT_WORK, AT_WORK)
    bn_unlock()
    with nogil:
        if threads == 1:
            bn_do_share(call, &alone)
        else:
            start = bn_now()
            fresh = bn_in_team(threads, as_member, &team)
            wall = bn_now() - start
        free(call.memory)
    bn_lock()
    AT_WORK -= threads
    if threads > 1 and threads == DEFAULT_THREADS and not fresh:
        bn_backoff_judge(elements, threads, team.worked, wall, start + wall)
    bn_unlock()


# ---- coefficients of inference ------------------------------------------------------------------------------------

cdef enum:
    ROOM = 7168  # bytes: of coefficients that need no allocation, and where in a page they may begin


cdef char *inference_coef(bn_coef *k, char *room, Py_ssize_t C, int element, cnp.ndarray mean, cnp.ndarray var,
                          bint of_stats, weight, bias, double eps) except NULL:
    """Coefficients from checked vectors: running statistics of float32 or float64, or those of a BatchStats.

    They are in `room`, of ROOM bytes, if that is not NULL and is enough; otherwise in memory to be freed.
    """
    cdef bn_source source
    cdef bint float64 = cnp.PyArray_TYPE(mean) == cnp.NPY_FLOAT64
    cdef str of_mean = "stats.mean" if of_stats else "running_mean", of_var = "stats.var" if of_stats else "running_var"
    mean = contiguous(mean)
    var = contiguous(var)
    if weight is not None:
        weight = contiguous(weight)
    if bias is not None:
        bias = contiguous(bias)
    if float64:
        take64(var, C, of_var)
    else:
        take_parameter(var, C, BN_f32, of_var)
    check_variance(var, float64, eps, of_var)
    # no Python code runs from here on
    source.weight = take_parameter(weight, C, element, "weight")
    source.bias = take_parameter(bias, C, element, "bias")
    source.eps = eps
    if float64:
        source.mean = take64(mean, C, of_mean)
        source.var = take64(var, C, of_var)
        return coef_in(room, k, C, element, &source, NULL, NULL)
    return coef_in(room, k, C, element, &source, take_parameter(mean, C, BN_f32, of_mean),
                   take_parameter(var, C, BN_f32, of_var))


cdef char *coef_in(char *room, bn_coef *k, Py_ssize_t C, int element, const bn_source *source, const void *mean,
                   const void *var) except NULL:
    """Coefficients of a source, or where there is a mean, of this and this variance, float32, in place of its own."""
    cdef bn_problem p
    cdef char *block = room
    memset(&p, 0, sizeof(p))
    p.layout = BN_ROWS  # or planes, which want less
    p.element = element
    p.C = C
    p.fold = bn_fold(C)
    cdef size_t value = <size_t> bn_real_bytes(element)
    cdef size_t step = (<size_t> (C * p.fold + BN_LINE) * value + 63) // 64 * 64
    cdef bn_neighbour rows = bn_rows_beside(NULL, <size_t> (C * p.fold) * value)  # they may begin at a page
    cdef size_t bytes = BN_COEF_FORWARD * step + 63 + rows.period
    if room == NULL or bytes > ROOM:
        block = <char *> claim(bytes)
        if block == NULL:
            raise MemoryError(f"no memory for the coefficients of {C} channels")
    cdef char *at = <char *> ((<uintptr_t> block + 63) // 64 * 64)
    at += (rows.period // 2 - <uintptr_t> at) & (rows.period - 1) & ~<uintptr_t> 63  # half way between rows
    bn_coef_at(k, at, step, False)
    if mean == NULL:
        K.terms[element].coef(&p, 0, C, source, k)
    else:
        K.terms[element].running_coef(&p, mean, var, source, k)
    return block


cdef int check_channels(cnp.ndarray x, int axis, Py_ssize_t expected) except -1:
    if cnp.PyArray_DIM(x, axis) != expected:
        raise ValueError(f"x must have {expected} channels on axis {axis}, got shape {(<object> x).shape}"
                         f"{last_axis_hint(x, axis, expected)}")
    return 0


def check_input(x, axis, tuple ranks, Py_ssize_t num_features, dtype):
    """That a layer of so many channels, and of this dtype, can take x."""
    x = elements(x, "x")
    check_layer_dtype(x, dtype is FLOAT64)
    check_rank(x, ranks)
    cdef Py_ssize_t number = whole(axis, "axis", "number a dimension")
    check_channels(x, check_axis(x, number), num_features)


# ---- what all operations begin with -------------------------------------------------------------------------------

@cython.final
@cython.freelist(8)
cdef class Operands:
    """The arrays of a call: as they came, then as the kernels can walk them."""
    cdef cnp.ndarray x, grad_output, residual, weight, bias, out, y, grad_residual, mask
    cdef object given  # out as its caller has it
    cdef int axis, threads, element
    cdef Py_ssize_t real  # positions that are: all, but with a mask

    cdef int begin(self, bn_call *call, axis, activation, negative_slope, num_threads) except -1:
        """Everything that is not an array, and the problem as x has it."""
        cdef int code = activation_code(activation)
        cdef double slope = check_slope(negative_slope)
        cdef Py_ssize_t number = whole(axis, "axis", "number a dimension")
        memset(call, 0, sizeof(bn_call))
        self.threads = ask_threads(num_threads, cnp.PyArray_SIZE(self.x))
        self.axis = check_axis(self.x, number)
        describe(&call.p, memory_of(self.x), self.axis)
        call.p.activation = code
        call.p.negative_slope = slope if self.element == BN_f64 else <float> slope
        self.real = call.p.N * call.p.S
        return 0

    cdef int look_at(self, bn_call *call, mask, bint mask_output) except -1:
        """Check a mask, and keep it as the kernels want it; one that is True everywhere is none."""
        cdef bn_problem *p = &call.p
        cdef cnp.ndarray given, gapless, kept
        cdef const unsigned char *of
        cdef unsigned char *to
        cdef unsigned char one
        cdef Py_ssize_t n, s, N = p.N, S = p.S, count = 0, pitch = S
        if mask is None:
            return 0
        given = truths(mask)
        if self.out is not None:
            check_clear(self.out, "out", given, "mask")
        if p.layout == BN_PLANES:
            pitch += BN_LINE
        kept = per_channel(N * pitch + BN_LINE, cnp.NPY_UINT8, True)
        gapless = given
        if not is_position_a_byte(given, self.x, self.axis):  # no Python code runs between this and the loop, if it is
            gapless = np.empty(check_mask(given, self.x, self.axis), np.bool_)
            PyArray_CopyInto(gapless, given)
        for n in range(N):
            of = <const unsigned char *> cnp.PyArray_DATA(gapless) + n * S
            to = <unsigned char *> cnp.PyArray_DATA(kept) + n * pitch
            for s in range(S):
                one = of[s] != 0  # a view of other bytes may be called bool
                to[s] = one
                count += one
            for s in range(S, pitch):
                to[s] = to[s - S]
        if count < N * S:
            self.mask = kept
            self.real = count
            p.mask_output = mask_output
        return 0

    cdef cnp.ndarray forget_all(self, const bn_problem *p):
        """Zeros in place of x, weight and what this returns, mean and variance: y is bias, whatever x is."""
        self.forget_x(p)
        self.weight = per_channel(p.C, real_of(self.element), True)
        return statistic(p.C, True)

    cdef int forget_x(self, const bn_problem *p) except -1:
        """Zeros in its place, where nothing of it is real."""
        cdef cnp.ndarray zeros = empty_for(p, self.x, self.axis)
        zeros.fill(0)
        self.x = zeros
        return 0

    cdef int check(self, Py_ssize_t C, bint in_place) except -1:
        """That shapes and lengths are those of x, and that nothing is written that is also read."""
        check_vector(self.weight, "weight", C, self.x, self.axis)
        check_vector(self.bias, "bias", C, self.x, self.axis)
        if self.grad_output is not None:
            check_same_dtype(self.grad_output, "grad_output", self.x)
            check_shape(self.grad_output, self.x, "grad_output", "x")
        if self.residual is not None:
            check_same_dtype(self.residual, "residual", self.x)
            check_shape(self.residual, self.x, "residual", "x")
        if self.out is not None:
            check_same_dtype(self.out, "out", self.x)
            check_output(self.out, self.x, in_place)
            check_clear(self.out, "out", self.grad_output, "grad_output")
            check_clear(self.out, "out", self.residual, "residual")
            check_clear(self.out, "out", self.weight, "weight")
            check_clear(self.out, "out", self.bias, "bias")
        return 0

    cdef int make_walkable(self, const bn_problem *p, cnp.ndarray like, bint writes) except -1:
        """Copies of what the kernels cannot walk, and an output in the memory order of an array."""
        if self.weight is not None:
            self.weight = contiguous(self.weight)
        if self.bias is not None:
            self.bias = contiguous(self.bias)
        self.x = readable(p, self.x, self.axis)
        if self.grad_output is not None:
            self.grad_output = readable(p, self.grad_output, self.axis)
        if self.residual is not None:
            self.residual = readable(p, self.residual, self.axis)
        if writes:
            self.y = writable(p, self.out, like, self.axis)
        return 0

    cdef int take(self, bn_call *call) except -1:
        """Pointers, after which no Python code may run before the kernels are done."""
        cdef bn_problem *p = &call.p
        take(&p.x, p, self.x, self.axis, "x")
        if self.mask is not None:
            p.mask = <const unsigned char *> cnp.PyArray_DATA(self.mask)
        if self.grad_output is not None:
            take(&p.grad_output, p, self.grad_output, self.axis, "grad_output")
        if self.residual is not None:
            take(&p.residual, p, self.residual, self.axis, "residual")
        if self.grad_residual is not None:
            take(&p.grad_residual, p, self.grad_residual, self.axis, "grad_residual")
        if self.y is not None:
            take_output(&p.y if self.grad_output is None else &p.grad_input, p, self.y, self.out, self.axis)
        call.source.weight = take_parameter(self.weight, p.C, self.element, "weight")
        call.source.bias = take_parameter(self.bias, p.C, self.element, "bias")
        return 0

    cdef object result(self):
        return self.y if self.out is None else self.given

    cdef object empty_result(self, const bn_problem *p):
        return empty_for(p, self.x, self.axis) if self.out is None else self.given

    cdef int copy_back(self) except -1:
        if self.out is not None and self.y is not self.out:
            self.out[...] = self.y
        return 0


cdef Operands operands(x, weight, bias, residual, out):
    cdef Operands o = Operands.__new__(Operands)
    o.x = elements(x, "x")
    o.element = element_of(o.x)
    o.weight = None if weight is None else parameter(weight, "weight", o.element)
    o.bias = None if bias is None else parameter(bias, "bias", o.element)
    o.residual = optional(residual, "residual")
    o.given = out
    o.out = optional(out, "out")
    return o


# ---- the operations -----------------------------------------------------------------------------------------------

def stats(x, axis, num_threads, mask=None):
    """Mean and biased variance of each channel, float64 of shape (C,), and the number of values a channel."""
    cdef bn_call call
    cdef Operands o = operands(x, None, None, None, None)
    o.begin(&call, axis, None, 0.0, num_threads)
    o.look_at(&call, mask, False)
    cdef Py_ssize_t C = call.p.C, m = o.real
    cdef cnp.ndarray mean = statistic(C, m == 0), var = statistic(C, m == 0)
    if C * m == 0:
        return mean, var, 0
    o.make_walkable(&call.p, o.x, False)
    result = mean, var, m
    o.take(&call)
    call.mean = data64(mean)
    call.var = data64(var)
    plan_and_allocate(&call, BN_STATS, o.threads)
    run(&call)
    return result


cpdef tuple unrounded(mean, var, tuple exact, double eps):
    """A layer's float32 running mean and variance in float64, with what rounding took; None where nothing that matters.

    What moves no result by 1e-6 is left out: float32 itself rounds so, and a layer then evaluates to the bits of its
    float32 values. `exact` counts for as long as it rounds to these.
    """
    cdef Py_ssize_t c, C
    cdef float *m
    cdef float *v
    cdef const double *exact_mean
    cdef const double *exact_var
    cdef double rest
    cdef bint matters = False
    mean, var = vector32(mean, "running_mean"), vector32(var, "running_var")
    C = cnp.PyArray_SIZE(mean)
    check_vector(mean, "running_mean", C)
    check_vector(var, "running_var", C)
    mean, var = contiguous(mean), contiguous(var)
    m = <float *> take_parameter(mean, C, BN_f32, "running_mean")
    v = <float *> take_parameter(var, C, BN_f32, "running_var")
    exact_mean, exact_var = take64(exact[0], C, "the unrounded mean"), take64(exact[1], C, "the unrounded variance")
    for c in range(C):
        rest = exact_mean[c] - m[c]
        matters |= <float> exact_mean[c] == m[c] and rest * rest > 1e-12 * (v[c] + eps)
        rest = exact_var[c] - v[c]
        matters |= <float> exact_var[c] == v[c] and fabs(rest) > 1e-6 * (v[c] + eps)  # below float32's normal numbers
    if not matters:
        return None
    return tuple([np.where(e.astype(np.float32) == a, e, a) for e, a in zip(exact, (mean, var))])


def forward(x, weight, bias, eps, axis, residual, activation, negative_slope, out, num_threads, running_mean,
            running_var, momentum, bint unbiased, bint want_stats, exact=None, counter=None, bint skip_nonfinite=False,
            mask=None, bint mask_output=False):
    """Training forward: (y, mean, var, count), mean and var None without want_stats. Running statistics, or two
    times None, are updated; with those of a layer also what they were rounded from, and its counter."""
    cdef bn_call call
    cdef Operands o = operands(x, weight, bias, residual, out)
    cdef bint update = running_mean is not None
    cdef bint float64 = False
    if update:
        running_mean = running(running_mean, "running_mean", o.element, True)
        running_var = running(running_var, "running_var", o.element, True)
        check_alike(running_mean, running_var)
        float64 = cnp.PyArray_TYPE(running_mean) == cnp.NPY_FLOAT64
    cdef double epsilon = check_eps(eps), share = check_momentum(momentum) if update else 0.0
    o.begin(&call, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t C = call.p.C
    o.check(C, True)
    if update:
        check_averages(o, running_mean, running_var, C)
    o.look_at(&call, mask, mask_output)
    cdef Py_ssize_t m = o.real
    cdef cnp.ndarray mean = statistic(C, m == 0) if want_stats else None
    cdef cnp.ndarray var = statistic(C, m == 0) if want_stats else None
    if C * call.p.N * call.p.S == 0:
        return o.empty_result(&call.p), mean, var, 0
    if m == 0:
        return of_nothing(&call, o, epsilon), mean, var, 0
    if m == 1:
        where = " and a mask with 1 True" if o.mask is not None else ""
        raise ValueError(
            f"training needs more than 1 value per channel, got x of shape {(<object> o.x).shape} with axis={axis}"
            f"{where}; pass a larger batch, or fixed statistics"
        )
    o.make_walkable(&call.p, o.x, True)
    result = o.result(), mean, var, m
    o.take(&call)
    if update:
        take_running(&call.running_mean, running_mean, C, float64, "running_mean")
        take_running(&call.running_var, running_var, C, float64, "running_var")
        if exact is not None and not float64:
            call.running_mean.exact = <char *> take64((<tuple> exact)[0], C, "the unrounded mean")
            call.running_var.exact = <char *> take64((<tuple> exact)[1], C, "the unrounded variance")
            call.running_mean.exact_stride = call.running_var.exact_stride = sizeof(double)
        if counter is not None:
            check_counter(counter)
        call.update = True
        call.skip_nonfinite = skip_nonfinite
        call.momentum = share
        call.unbiasing = unbiasing(m, unbiased)
    call.source.eps = epsilon
    if want_stats:
        call.mean = data64(mean)
        call.var = data64(var)
    plan_and_allocate(&call, BN_TRAINING, o.threads)
    if counter is not None:  # here, where neither an error nor a signal comes between it and the averages
        count_batch(counter)
    run(&call)
    o.copy_back()
    return result


cdef int check_averages(Operands o, cnp.ndarray running_mean, cnp.ndarray running_var, Py_ssize_t C) except -1:
    """That running averages can be moved, and share no memory with anything else."""
    check_vector(running_mean, "running_mean", C, o.x, o.axis)
    check_vector(running_var, "running_var", C, o.x, o.axis)
    check_clear(running_mean, "running_mean", running_var, "running_var")
    for average, name in (running_mean, "running_mean"), (running_var, "running_var"):
        check_running(average, name)
        check_clear(average, name, o.x, "x")
        check_clear(average, name, o.weight, "weight")
        check_clear(average, name, o.bias, "bias")
        check_clear(average, name, o.residual, "residual")
        if o.out is not None:
            check_clear(o.out, "out", average, name)
    return 0


def normalize(x, mean, var, bint of_stats, weight, bias, eps, axis, residual, activation, negative_slope, out,
              num_threads, tuple ranks, tuple exact=None, mask=None, bint mask_output=False, count=None, dtype=None):
    """y from running statistics, of a layer with what they were rounded from and its dtype, or from those of a
    BatchStats, of `count` values a channel: if that is 0, with a mask, from nothing."""
    cdef bn_call call
    if dtype is not None:
        x = elements(x, "x")
        check_layer_dtype(x, dtype is FLOAT64)
    cdef Operands o = operands(x, weight, bias, residual, out)
    if not of_stats:
        mean = running(mean, "running_mean", o.element, False)
        var = running(var, "running_var", o.element, False)
        check_alike(mean, var)
    check_rank(o.x, ranks)
    cdef double epsilon = check_eps(eps)
    o.begin(&call, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t C = call.p.C
    if of_stats:
        check_moment(mean, "mean", C)
        check_moment(var, "var", C)
    else:
        check_vector(mean, "running_mean", C, o.x, o.axis)
        check_vector(var, "running_var", C, o.x, o.axis)
    o.check(C, True)
    if o.out is not None:
        check_clear(o.out, "out", mean, "stats.mean" if of_stats else "running_mean")
        check_clear(o.out, "out", var, "stats.var" if of_stats else "running_var")
    o.look_at(&call, mask, mask_output)
    if mask is not None and count == 0 and C * call.p.N * call.p.S > 0:
        return of_nothing(&call, o, epsilon)
    if exact is not None:
        exact = unrounded(mean, var, exact, epsilon)
        if exact is not None:
            mean, var = exact
    cdef char room[ROOM]
    cdef char *block = inference_coef(&call.k, room, C, o.element, mean, var, of_stats, o.weight, o.bias, epsilon)
    o.weight = o.bias = None  # they are in the coefficients
    try:
        return infer(&call, o)
    finally:
        if block != room:
            free(block)


cdef of_nothing(bn_call *call, Operands o, double eps):
    """y of a batch of which nothing is real: bias, residual and activation alone."""
    cdef cnp.ndarray zeros = statistic(call.p.C, True)
    cdef char room[ROOM]
    cdef char *block = inference_coef(&call.k, room, call.p.C, o.element, zeros, zeros, True, o.weight, o.bias, eps)
    o.weight = o.bias = None
    try:
        o.forget_x(&call.p)
        return infer(call, o)
    finally:
        if block != room:
            free(block)


cdef infer(bn_call *call, Operands o):
    """y by the coefficients of call.k."""
    if call.p.C * call.p.N * call.p.S == 0:
        return o.empty_result(&call.p)
    o.make_walkable(&call.p, o.x, True)
    result = o.result()
    o.take(call)
    plan_and_allocate(call, BN_INFERENCE, o.threads)
    run(call)
    o.copy_back()
    return result


cdef class Frozen:
    """Coefficients made once, and how to apply them. Nothing of it changes after construction."""
    cdef bn_coef k
    cdef char *block
    cdef readonly Py_ssize_t num_features
    cdef readonly Py_ssize_t axis
    cdef readonly object activation
    cdef readonly double eps
    cdef readonly double negative_slope
    cdef int element  # f64, or f32 for all that is computed in float32

    def __cinit__(self, running_mean, running_var, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None,
                  negative_slope=0.01, dtype=None, copy=True):
        self.element = BN_f64 if real_dtype(dtype, weight, bias) is FLOAT64 else BN_f32
        running_mean = running(running_mean, "running_mean", self.element, False)
        running_var = running(running_var, "running_var", self.element, False)
        check_alike(running_mean, running_var)
        weight = None if weight is None else parameter(weight, "weight", self.element)
        bias = None if bias is None else parameter(bias, "bias", self.element)
        self.axis = whole(axis, "axis", "number a dimension")
        check_activation(activation, negative_slope)
        self.activation = activation
        self.negative_slope = negative_slope
        self.eps = check_eps(eps)
        if cnp.PyArray_NDIM(running_mean) != 1:
            raise ValueError(f"running_mean must have shape (C,), one value a channel, got {running_mean.shape}")
        cdef Py_ssize_t C = cnp.PyArray_DIM(running_mean, 0)
        self.num_features = C
        check_vector(running_var, "running_var", C)
        check_vector(weight, "weight", C)
        check_vector(bias, "bias", C)
        self.block = inference_coef(
            &self.k, NULL, C, self.element, running_mean, running_var, False, weight, bias, self.eps)

    def __dealloc__(self):
        free(self.block)

    def __call__(self, x, residual=None, out=None, *, mask=None, mask_output=False, num_threads=None):
        """__call__($self, /, x, residual=None, out=None, *, mask=None, mask_output=False, num_threads=None)\n--\n
        Normalize `x`.

        Parameters
        ----------
        x : ndarray of float32, float16 or bfloat16, or of float64 if that is the layer's dtype, rank >= 2
        residual, out : ndarray of x's dtype and shape, or None
            See :func:`fastbn.batch_norm`.
        mask : ndarray of bool, or None
        mask_output : bool
            Whether the result is 0 where `mask` is False, which has no other effect here. See
            :func:`fastbn.batch_norm`.
        num_threads : int or None
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        ndarray of x's dtype and shape
            `out`, or a new array in the memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            As :func:`fastbn.batch_norm`.
        """
        cdef bn_call call
        cdef Operands o = operands(x, None, None, residual, out)
        check_layer_dtype(o.x, self.element)
        o.begin(&call, self.axis, self.activation, self.negative_slope, num_threads)
        check_channels(o.x, o.axis, self.num_features)
        o.check(self.num_features, True)
        o.look_at(&call, mask, mask_output)
        call.k = self.k
        return infer(&call, o)


def real_dtype(dtype, weight=None, bias=None):
    """What a layer computes in: float32 or float64, each always as one object; where it is not named, what its
    parameters are."""
    if dtype is None:
        names = [str(getattr(a, "dtype", "")) for a in (weight, bias)]
        return FLOAT64 if "float64" in names else FLOAT32
    try:
        for found in FLOAT32, FLOAT64:
            if np.dtype(dtype) == found:
                return found
    except TypeError:
        pass
    raise TypeError(
        f"dtype must be numpy.float32, which is for float16 and bfloat16, too, or numpy.float64, got {dtype!r}"
    )


cdef int check_layer_dtype(cnp.ndarray x, bint float64) except -1:
    """That x is what a layer of float64, or one of float32, takes."""
    if float64 != (cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64):
        takes = "float64" if float64 else "float32, float16 or bfloat16"
        raise TypeError(
            f"x must have dtype {takes}, as the layer has dtype {'float64' if float64 else 'float32'}, got "
            f"{(<object> x).dtype!s}; convert x, or make the layer with dtype=numpy.{dtype_of_parameters(x)}"
        )
    return 0


cdef enum:  # gradients, by what batch_norm_backward calls them
    NEED_INPUT = 1
    NEED_WEIGHT = 2
    NEED_BIAS = 4
    NEED_RESIDUAL = 8


cdef int mask_from_output(bn_problem *p, activation) except -1:
    """Of an activation whose output tells on which side of its kinks z lies."""
    if p.activation != BN_RELU and p.activation != BN_RELU6 and not (
            p.activation == BN_LEAKY_RELU and p.negative_slope > 0.0):
        slope = f" with negative_slope={p.negative_slope}" if p.activation == BN_LEAKY_RELU else ""
        raise ValueError(
            "output tells the derivative of 'relu', 'relu6', and 'leaky_relu' with a negative_slope above 0, not of "
            f"{activation!r}{slope}; leave out output, and pass the residual if there was one"
        )
    p.from_output = True
    return 0


cdef Operands gradient_operands(bn_call *call, grad_output, x, mean, var, weight, bias, eps, axis, residual, output,
                                activation, negative_slope, out, num_threads, mask, bint mask_output):
    """Checked operands of a backward call; a residual only where the kernels look at it, or output in its place."""
    cdef Operands o = operands(x, weight, bias, residual, out)
    o.grad_output = elements(grad_output, "grad_output")
    cdef cnp.ndarray y = optional(output, "output")
    cdef double epsilon = check_eps(eps)
    o.begin(call, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t C = call.p.C
    check_same_dtype(o.grad_output, "grad_output", o.x)
    check_shape(o.grad_output, o.x, "grad_output", "x")
    check_moment(mean, "mean", C)
    check_moment(var, "var", C)
    check_variance(var, True, epsilon, "stats.var")
    o.check(C, False)
    if y is not None:
        check_same_dtype(y, "output", o.x)
        check_shape(y, o.x, "output", "x")
        mask_from_output(&call.p, activation)
    if o.out is not None:
        check_clear(o.out, "out", y, "output")
        check_clear(o.out, "out", mean, "stats.mean")
        check_clear(o.out, "out", var, "stats.var")
    o.look_at(call, mask, mask_output)
    call.source.eps = epsilon
    if y is not None:
        o.residual = y
    elif call.p.activation == BN_IDENTITY:
        o.residual = None
    return o


def backward_sums(grad_output, x, mean, var, count, weight, bias, eps, axis, residual, output, activation,
                  negative_slope, num_threads, mask=None, bint mask_output=False):
    """The sums of dz and of dz * (x - mean) over x, a part of the `count` values a channel that mean and var are of,
    and how many values a channel x has."""
    cdef bn_call call
    cdef Operands o = gradient_operands(&call, grad_output, x, mean, var, weight, bias, eps, axis, residual, output,
                                        activation, negative_slope, None, num_threads, mask, mask_output)
    cdef Py_ssize_t C = call.p.C, m = call.p.N * call.p.S
    check_part(o.real, count)
    cdef cnp.ndarray dz = statistic(C, m == 0), dz_dev = statistic(C, m == 0)
    result = dz, dz_dev, o.real
    if C * m == 0:
        return result
    if o.mask is not None and count == 0:
        mean = var = o.forget_all(&call.p)
    o.make_walkable(&call.p, o.x, False)
    o.take(&call)
    call.source.mean = take64(mean, C, "stats.mean")
    call.source.var = take64(var, C, "stats.var")
    call.dz, call.dz_dev = data64(dz), data64(dz_dev)
    plan_and_allocate(&call, BN_SUMS, o.threads)
    run(&call)
    return result


cdef int check_part(m, count) except -1:
    if m > count:
        raise ValueError(f"stats are of {count} values per channel, but x, to be a part of these, has {m}; "
                         "pass the statistics of the whole batch, merged from all of its parts")
    return 0


cdef int check_sums(tuple sums, m, count, bint training, Py_ssize_t C, Operands o) except -1:
    """Pooled sums for a part of m (real) values a channel of the `count` that statistics are of."""
    check_moment(sums[0], "dz", C, "sums", "GradSums")
    check_moment(sums[1], "dz_dev", C, "sums", "GradSums")
    if not training:
        raise ValueError("sums are for training=True, gradients by fixed statistics need none; leave out sums")
    if sums[2] != count:
        raise ValueError(f"sums are of {sums[2]} values per channel, but stats of {count}; pass both of the whole "
                         "batch, merged from all of its parts")
    check_part(m, count)
    if o.out is not None:
        check_clear(o.out, "out", sums[0], "sums.dz")
        check_clear(o.out, "out", sums[1], "sums.dz_dev")
    return 0


cdef bn_operation gradient_operation(const bn_problem *p, bint summed, bint to_elements, bint to_parameters) noexcept:
    """What gives the gradients that are asked for, without work for others."""
    if not to_parameters and (p.fixed or summed):
        return BN_GRAD_INPUT
    return BN_BACKWARD if to_elements else BN_SUMS


def backward(grad_output, x, mean, var, count, weight, bias, eps, bint training, axis, residual, activation,
             negative_slope, out, num_threads, tuple sums=None, output=None, int needs=15, mask=None,
             bint mask_output=False):
    """(grad_input, grad_weight, grad_bias, grad_residual), None for what is not in needs; mean and var are float64 of
    shape (C,), over `count` values a channel. With `sums`, (dz, dz_dev, count), x is a part of those, and there are no
    gradients of the parameters."""
    cdef bn_call call
    cdef Operands o = gradient_operands(&call, grad_output, x, mean, var, weight, bias, eps, axis, residual, output,
                                        activation, negative_slope, out, num_threads, mask, mask_output)
    cdef Py_ssize_t C = call.p.C, m = call.p.N * call.p.S
    cdef bint nothing = training and o.mask is not None and count == 0  # is real, in all of the batch
    cdef bint to_input = needs & NEED_INPUT
    cdef bint to_parameters = sums is None and needs & (NEED_WEIGHT | NEED_BIAS)
    cdef bint to_residual = needs & NEED_RESIDUAL and (residual is not None or output is not None)
    if o.out is not None and not to_input:
        raise ValueError("out is where grad_input goes, which needs does not name; add 'input', or leave out out")
    if sums is not None:
        check_sums(sums, o.real, count, training, C, o)
    elif training and C * m > 0 and count != o.real:
        where = "" if o.mask is None else " where mask is True"
        raise ValueError(
            f"stats are of {count} values per channel, but x has {o.real}{where}; pass as x the whole batch that they "
            "are of, or with a part of it sums=, merged from the batch_norm_backward_sums() of all parts, or "
            "training=False where they are fixed"
        )
    call.p.fixed = not (training and to_input)  # the gradient goes through the statistics only to the input
    cdef bn_operation op = gradient_operation(&call.p, sums is not None, to_input or to_residual, to_parameters)
    cdef cnp.ndarray like = o.x
    if nothing and C * m > 0:
        mean = var = o.forget_all(&call.p)
    if op == BN_GRAD_INPUT and call.p.fixed and activation is None:
        o.x = o.grad_output  # x is not looked at, and need not be read
    cdef cnp.ndarray grad_weight = per_channel(C, real_of(o.element), m == 0)
    cdef cnp.ndarray grad_bias = per_channel(C, real_of(o.element), m == 0)
    if C * m > 0:
        o.make_walkable(&call.p, like, to_input or to_residual)
    elif to_input:
        o.y = o.out if o.out is not None else empty_for(&call.p, like, o.axis)
    if to_residual:
        o.grad_residual = writable(&call.p, None, like, o.axis)
    result = (
        o.result() if to_input else None, grad_weight if to_parameters and needs & NEED_WEIGHT else None,
        grad_bias if to_parameters and needs & NEED_BIAS else None, o.grad_residual if to_residual else None,
    )
    if C * m == 0 or not (to_input or to_residual or to_parameters):
        return result
    o.take(&call)
    call.source.mean = take64(mean, C, "stats.mean")
    call.source.var = take64(var, C, "stats.var")
    if to_parameters:
        call.grad_weight = cnp.PyArray_DATA(grad_weight)
        call.grad_bias = cnp.PyArray_DATA(grad_bias)
    call.count = <double> max(o.real, 1)
    if sums is not None:
        call.dz = take64(sums[0], C, "sums.dz")
        call.dz_dev = take64(sums[1], C, "sums.dz_dev")
        call.count = <double> max(count, 1)
    plan_and_allocate(&call, op, o.threads)
    run(&call)
    if nothing and to_input:
        o.y.fill(0)  # not even a NaN of grad_output
    o.copy_back()
    return result


cdef double unbiasing(double count, bint unbiased) noexcept:
    """Bessel's correction."""
    return count / (count - 1) if unbiased and count > 1 else 1.0


cdef void count_batch(cnp.ndarray counter) noexcept:
    cdef long long count = read_counter(counter) + 1
    memcpy(cnp.PyArray_DATA(counter), &count, sizeof(count))


def update_running(running_mean, running_var, mean, var, count, momentum, bint unbiased, exact=None, counter=None,
                   bint skip_nonfinite=False):
    """running = (1 - momentum) * running + momentum * batch in float64, in place; nothing where count is 0. Those of a
    layer with what they were rounded from, and its counter."""
    cdef cnp.ndarray to_mean = running(running_mean, "running_mean", BN_f32, True)
    cdef cnp.ndarray to_var = running(running_var, "running_var", BN_f32, True)
    check_alike(to_mean, to_var)
    cdef bint float64 = cnp.PyArray_TYPE(to_mean) == cnp.NPY_FLOAT64
    cdef bn_running means, variances
    cdef double share = check_momentum(momentum)
    most = min(count, PY_SSIZE_T_MAX) if type(count) is int else count
    cdef Py_ssize_t values = whole(most, "stats.count", "be an int")
    cdef Py_ssize_t C = mean.size if isinstance(mean, np.ndarray) else 0
    check_moment(mean, "mean", C)
    check_moment(var, "var", C)
    check_vector(to_mean, "running_mean", C)
    check_vector(to_var, "running_var", C)
    check_running(to_mean, "running_mean")
    check_running(to_var, "running_var")
    check_clear(to_mean, "running_mean", to_var, "running_var")
    check_clear(to_mean, "running_mean", mean, "stats.mean")
    check_clear(to_mean, "running_mean", var, "stats.var")
    check_clear(to_var, "running_var", mean, "stats.mean")
    check_clear(to_var, "running_var", var, "stats.var")
    if counter is not None:
        check_counter(counter)
    if values == 0:
        return
    take_running(&means, to_mean, C, float64, "running_mean")
    take_running(&variances, to_var, C, float64, "running_var")
    if exact is not None and not float64:
        means.exact = <char *> take64((<tuple> exact)[0], C, "the unrounded mean")
        variances.exact = <char *> take64((<tuple> exact)[1], C, "the unrounded variance")
        means.exact_stride = variances.exact_stride = sizeof(double)
    cdef const double *batch_mean = take64(mean, C, "stats.mean")
    cdef const double *batch_var = take64(var, C, "stats.var")
    cdef const double *finite = batch_var if skip_nonfinite else NULL
    if counter is not None:
        count_batch(counter)
    cdef const bn_terms *terms = K.terms[BN_f64 if float64 else BN_f32]
    terms.move_running(&means, batch_mean, finite, 0, C, share, 1.0)
    terms.move_running(&variances, batch_var, finite, 0, C, share, unbiasing(values, unbiased))


# ---- tensors: operands that are no arrays -------------------------------------------------------------------------

# A tensor tells where it is through a table of C functions that its type has, DLPack's "exchange API" (DLPack 1.2), in
# the time of a few instructions; to make an array of it takes a microsecond. Callers without such a table tell the same
# in a tuple. Either way the kernels walk what is in memory, which the caller keeps alive and in place during the call.

cdef enum:
    MOST_DIMENSIONS = 32
    MOST_OPERANDS = 12

cdef struct DLTensor:
    void *data
    int32_t device, device_id, nd
    uint8_t code, bits
    uint16_t lanes
    const int64_t *shape
    const int64_t *strides  # in elements
    uint64_t offset

cdef struct DLExchange:
    uint32_t major, minor
    DLExchange *older
    void *allocate
    void *owned_from_object
    int (*object_from_owned)(void *owned, void **tensor) except -1
    int (*look)(void *tensor, DLTensor *told) except -1
    void *stream

cdef struct Tensor:
    bint read_only
    Memory m  # whose shape and strides are these
    Py_ssize_t shape[MOST_DIMENSIONS]
    Py_ssize_t strides[MOST_DIMENSIONS]

cdef struct Spans:  # of the memory of a call's operands
    int n
    uintptr_t low[MOST_OPERANDS]
    uintptr_t high[MOST_OPERANDS]
    bint written[MOST_OPERANDS]

cdef dict EXCHANGES = {}  # by type: the table in a capsule, False if it has none


cdef DLExchange *exchange_of(type kind) except? NULL:
    capsule = EXCHANGES.get(kind)
    if capsule is None:
        capsule = getattr(kind, "__dlpack_c_exchange_api__", False)
        EXCHANGES[kind] = capsule
    if capsule is False:
        return NULL
    cdef DLExchange *table = <DLExchange *> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while table != NULL and table.major != 1:
        table = table.older
    return NULL if table == NULL or table.look == NULL else table


cdef int dtype_of(const DLTensor *told) noexcept:
    """NumPy's number of a dtype, NPY_VOID of one that no operand has."""
    if told.lanes == 1 and told.code == 2:  # kDLFloat
        if told.bits == 32:
            return cnp.NPY_FLOAT32
        if told.bits == 64:
            return cnp.NPY_FLOAT64
        if told.bits == 16:
            return cnp.NPY_FLOAT16
    if told.lanes == 1 and told.code == 4 and told.bits == 16:  # kDLBfloat
        return BFLOAT16
    if told.lanes == 1 and told.code == 0 and told.bits == 64:  # kDLInt
        return cnp.NPY_INT64
    return cnp.NPY_VOID


cdef int look(Tensor *t, object a) except -1:
    """What `a` is in memory: a tensor, or an array, or a tuple (address, dtype, shape, strides in elements)."""
    cdef DLExchange *table
    cdef DLTensor told
    cdef Memory array
    cdef Py_ssize_t size, values = 1
    cdef int i
    t.m.shape = t.shape
    t.m.strides = t.strides
    t.read_only = False
    if cnp.PyArray_CheckExact(a) and cnp.PyArray_ISNOTSWAPPED(a):
        t.read_only = not cnp.PyArray_ISWRITEABLE(a)
        array = memory_of(a)
        t.m.data, t.m.dtype, t.m.nd = array.data, array.dtype, array.nd
        if array.nd <= MOST_DIMENSIONS:
            for i in range(array.nd):
                t.shape[i], t.strides[i] = array.shape[i], array.strides[i]
    elif type(a) is tuple:
        address, dtype, shape, strides = a
        if len(shape) != len(strides):
            raise ValueError(f"a tensor must have a stride for each dimension, got shape {shape}, strides {strides}")
        dtype = np.dtype(dtype)
        size = dtype.itemsize
        t.m.dtype, t.m.nd = dtype.num, len(shape)
        if t.m.nd <= MOST_DIMENSIONS:
            for i in range(t.m.nd):
                t.shape[i], t.strides[i] = shape[i], strides[i] * size
        t.m.data = <char *> <uintptr_t> address
    else:
        table = exchange_of(type(a))
        if table == NULL:
            raise TypeError(f"expected a tensor, an array or (address, dtype, shape, strides), got {type(a).__name__}")
        table.look(<void *> a, &told)
        t.m.dtype = dtype_of(&told)
        if told.device != 1 or t.m.dtype == cnp.NPY_VOID:  # kDLCPU
            raise TypeError(
                "expected a tensor of floats or int64 in the memory of the CPU, got one of DLPack's device "
                f"{told.device}, dtype {told.code}, {told.bits} bits, {told.lanes} lanes"
            )
        size = told.bits // 8
        t.m.nd = told.nd
        if told.nd <= MOST_DIMENSIONS:
            for i in range(told.nd):
                t.shape[i], t.strides[i] = <Py_ssize_t> told.shape[i], <Py_ssize_t> told.strides[i] * size
        t.m.data = <char *> told.data + told.offset
    if t.m.nd > MOST_DIMENSIONS:
        raise ValueError(f"a tensor must have at most {<int> MOST_DIMENSIONS} dimensions, got {t.m.nd}")
    for i in range(t.m.nd):
        if t.shape[i] < 0 or t.strides[i] < 0:
            raise ValueError("a tensor must have no negative size or stride, got "
                             f"{t.shape[i]} and {t.strides[i]} bytes")
        values *= t.shape[i]
    if t.m.data == NULL and values:
        raise ValueError("a tensor must have memory, got the address 0")
    return 0


cdef cnp.ndarray as_array(a):
    """The same memory as an array."""
    cdef Tensor t
    if a is None or cnp.PyArray_Check(a):
        return a
    look(&t, a)
    if t.m.dtype == BFLOAT16 and BFLOAT16 < 0:
        import ml_dtypes
        learn_bfloat16(np.empty(0, ml_dtypes.bfloat16))
        look(&t, a)
    return cnp.PyArray_New(
        cnp.ndarray, t.m.nd, <cnp.npy_intp *> t.shape, t.m.dtype, <cnp.npy_intp *> t.strides, t.m.data, 0,
        cnp.NPY_ARRAY_WRITEABLE, None)


def kept_like(a):
    """An array for a result of the shape, dtype and memory order of `a`: of 256 KB or more in memory that is kept."""
    return empty_like(as_array(a), cnp.NPY_KEEPORDER)


cdef int note(Spans *spans, const Tensor *t, bint written) except -1:
    """One more operand of a call."""
    cdef const Memory *m = &t.m
    cdef uintptr_t high = <uintptr_t> m.data + <uintptr_t> bytes_of(m.dtype)
    cdef int i
    if written and t.read_only:
        raise ValueError("an operand that is written is read-only; pass a writable array")
    for i in range(m.nd):
        high += <uintptr_t> ((m.shape[i] - 1) * m.strides[i])
    spans.low[spans.n], spans.high[spans.n], spans.written[spans.n] = <uintptr_t> m.data, high, written
    spans.n += 1
    return 0


cdef bint apart(const Spans *s) noexcept:
    """Whether what is written is beside everything else."""
    cdef int i, j
    for i in range(s.n):
        if s.written[i]:
            for j in range(s.n):
                if i != j and s.low[i] < s.high[j] and s.low[j] < s.high[i]:
                    return False
    return True


cdef bint gapless(const bn_problem *p, const bn_operand *o) noexcept:
    """Of an operand in its place: whether each element has memory of its own, and there is none between them."""
    cdef Py_ssize_t unit = p.C if p.layout == BN_ROWS else p.S
    cdef Py_ssize_t units = p.S if p.layout == BN_ROWS else p.C
    return (units == 1 or o.inner == unit) and (p.N == 1 or o.outer == p.S * p.C)


cdef bint put(bn_operand *o, const bn_problem *p, const Memory *like, Spans *spans, a, bint written) except -1:
    """Fill in an operand, where there is one; False where the kernels cannot walk it."""
    cdef Tensor t
    cdef int i
    if a is None:
        return True
    look(&t, a)
    if t.m.nd != like.nd:
        return False
    for i in range(t.m.nd):
        if t.m.shape[i] != like.shape[i]:
            return False
    note(spans, &t, written)
    return place(o, p, t.m, 1) and (not written or gapless(p, o))


cdef bint put_vector(void **at, Py_ssize_t C, int dtype, Spans *spans, a, bint written) except -1:
    """The address of a vector of C values, where there is one; False where it is another or has gaps."""
    cdef Tensor t
    at[0] = NULL
    if a is None:
        return True
    look(&t, a)
    cdef Py_ssize_t size = bytes_of(dtype)
    if (t.m.nd != 1 or t.m.shape[0] != C or t.m.dtype != dtype or C > 1 and t.m.strides[0] != size
            or <uintptr_t> t.m.data % <uintptr_t> size):
        return False
    note(spans, &t, written)
    at[0] = t.m.data
    return True


cdef int begin_tensors(bn_call *call, Tensor *x, a, activation, negative_slope, num_threads) except -1:
    """The problem as x has it, with channels on axis 1; returns the number of threads."""
    cdef int code = activation_code(activation), threads
    cdef double slope = check_slope(negative_slope)
    cdef Py_ssize_t values = 1
    cdef int i
    memset(call, 0, sizeof(bn_call))
    look(x, a)
    if x.m.nd < 2:
        raise ValueError(f"x must have at least 2 dimensions (batch and channels), got {x.m.nd}")
    for i in range(x.m.nd):
        values *= x.m.shape[i]
    threads = ask_threads(num_threads, values)
    look(x, a)  # Python code may have run
    if element_of_dtype(x.m.dtype) < 0:
        raise TypeError(f"x must be of {DTYPES}")
    describe(&call.p, x.m, 1)
    call.p.activation = code
    call.p.negative_slope = slope if call.p.element == BN_f64 else <float> slope
    return threads


def tensor_forward(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, bint training, momentum,
                   eps, activation, negative_slope, num_threads):
    """y of tensors with channels on axis 1, and what it was normalized with into mean and var, float64, if these are
    given. With training the running averages and the counter, if given, are moved, otherwise they are what to normalize
    with. What the kernels cannot walk goes by arrays, with the same results and errors."""
    if y is None:
        raise TypeError("y must be a tensor for the result, got None")
    if not forward_in_place(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, training,
                            momentum, eps, activation, negative_slope, num_threads):
        forward_by_arrays(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, training,
                          momentum, eps, activation, negative_slope, num_threads)


cdef bint forward_in_place(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, bint training,
                           momentum, eps, activation, negative_slope, num_threads) except -1:
    """tensor_forward of what the kernels can walk where it lies; False, and nothing done, where they cannot."""
    cdef bn_call call
    cdef Tensor like
    cdef Spans spans
    cdef double epsilon = check_eps(eps), share = check_momentum(momentum) if training else 0.0
    cdef int threads = begin_tensors(&call, &like, x, activation, negative_slope, num_threads)
    cdef bn_problem *p = &call.p
    cdef Py_ssize_t C = p.C, m = p.N * p.S
    cdef int real = real_of(p.element)
    cdef bint float64 = p.element == BN_f64
    cdef long long *count = NULL
    cdef void *averages[2]
    cdef char room[ROOM]
    cdef char *block
    cdef Py_ssize_t c
    spans.n = 0
    if not (
        C > 0 and m > (1 if training else 0) and (running_mean is None) is (running_var is None)
        and (training or running_mean is not None)
        and put(&p.x, p, &like.m, &spans, x, False)
        and put(&p.y, p, &like.m, &spans, y, True)
        and put(&p.residual, p, &like.m, &spans, residual, False)
        and put_vector(<void **> &call.source.weight, C, real, &spans, weight, False)
        and put_vector(<void **> &call.source.bias, C, real, &spans, bias, False)
        and put_vector(&averages[0], C, real, &spans, running_mean, training)
        and put_vector(&averages[1], C, real, &spans, running_var, training)
        and put_vector(<void **> &call.mean, C, cnp.NPY_FLOAT64, &spans, mean, True)
        and put_vector(<void **> &call.var, C, cnp.NPY_FLOAT64, &spans, var, True)
        and put_counter(&count, &spans, counter)
        and apart(&spans)
        and (training or not any_negative(averages[1], float64, C))
    ):
        return False
    call.source.eps = epsilon
    if training:
        if running_mean is not None:
            if float64:
                call.running_mean.exact, call.running_var.exact = <char *> averages[0], <char *> averages[1]
                call.running_mean.exact_stride = call.running_var.exact_stride = sizeof(double)
            else:
                call.running_mean.value, call.running_var.value = <char *> averages[0], <char *> averages[1]
                call.running_mean.stride = call.running_var.stride = sizeof(float)
            call.update = True
            call.momentum = share
            call.unbiasing = unbiasing(m, True)
        plan_and_allocate(&call, BN_TRAINING, threads)
        if count != NULL:
            count[0] += 1
        run(&call)
        return True
    for c in range(C if call.mean != NULL else 0):
        call.mean[c] = (<double *> averages[0])[c] if float64 else (<float *> averages[0])[c]
    for c in range(C if call.var != NULL else 0):
        call.var[c] = (<double *> averages[1])[c] if float64 else (<float *> averages[1])[c]
    if float64:
        call.source.mean, call.source.var = <double *> averages[0], <double *> averages[1]
        block = coef_in(room, &call.k, C, p.element, &call.source, NULL, NULL)
    else:
        block = coef_in(room, &call.k, C, p.element, &call.source, averages[0], averages[1])
    call.source.weight = call.source.bias = NULL  # they are in the coefficients
    try:
        plan_and_allocate(&call, BN_INFERENCE, threads)
        run(&call)
    finally:
        if block != room:
            free(block)
    return True


cdef bint put_counter(long long **at, Spans *spans, a) except -1:
    """The address of a number of batches that has room for one more, where there is one."""
    cdef Tensor t
    if a is None:
        return True
    look(&t, a)
    if t.m.nd != 0 or t.m.dtype != cnp.NPY_INT64 or <uintptr_t> t.m.data % 8:
        return False
    note(spans, &t, True)
    at[0] = <long long *> t.m.data
    return 0 <= at[0][0] < 0x7FFFFFFFFFFFFFFF


cdef long long BY_ARRAYS = 0


def calls_by_arrays():
    """How many calls of tensors went by arrays. For tests."""
    return BY_ARRAYS


cdef int forward_by_arrays(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, bint training,
                           momentum, eps, activation, negative_slope, num_threads) except -1:
    global BY_ARRAYS
    BY_ARRAYS += 1
    cdef list arrays = [as_array(a) for a in (x, weight, bias, residual, y, running_mean, running_var, counter)]
    x, weight, bias, residual, y, running_mean, running_var, counter = arrays
    if counter is not None and training:
        check_counter(counter)
    if training:
        _, of_batch, var_of_batch, _ = forward(
            x, weight, bias, eps, 1, residual, activation, negative_slope, y, num_threads, running_mean, running_var,
            momentum, True, True, None, counter)
    else:
        of_batch, var_of_batch = running_mean, running_var
        normalize(x, running_mean, running_var, False, weight, bias, eps, 1, residual, activation, negative_slope, y,
                  num_threads, None)
    if mean is not None:
        as_array(mean)[...] = of_batch
    if var is not None:
        as_array(var)[...] = var_of_batch
    return 0


def tensor_backward(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight, grad_bias,
                    grad_residual, bint training, eps, activation, negative_slope, num_threads):
    """Gradients by statistics of the whole of x, into the tensors that are given for them: of None there is no need."""
    if grad_output is None or mean is None or var is None:
        raise TypeError("grad_output, mean and var must be tensors, got None")
    if not backward_in_place(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight,
                             grad_bias, grad_residual, training, eps, activation, negative_slope, num_threads):
        backward_by_arrays(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight,
                           grad_bias, grad_residual, training, eps, activation, negative_slope, num_threads)


cdef bint backward_in_place(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight,
                            grad_bias, grad_residual, bint training, eps, activation, negative_slope,
                            num_threads) except -1:
    """tensor_backward of what the kernels can walk where it lies; False, and nothing done, where they cannot."""
    cdef bn_call call
    cdef Tensor like
    cdef Spans spans
    cdef double epsilon = check_eps(eps)
    cdef int threads = begin_tensors(&call, &like, x, activation, negative_slope, num_threads)
    cdef bn_problem *p = &call.p
    cdef Py_ssize_t C = p.C, m = p.N * p.S
    cdef bint to_elements = grad_input is not None or grad_residual is not None
    cdef bint to_parameters = grad_weight is not None or grad_bias is not None
    cdef bint kinked = activation is not None  # so that z has to be found again
    cdef int real = real_of(p.element)
    cdef bn_operation op
    if output is not None:
        mask_from_output(p, activation)
    p.fixed = not (training and grad_input is not None)
    op = gradient_operation(p, False, to_elements, to_parameters)
    spans.n = 0
    if not (
        C > 0 and m > 0
        and put(&p.x, p, &like.m, &spans, x, False)
        and put(&p.grad_output, p, &like.m, &spans, grad_output, False)
        and put(&p.residual, p, &like.m, &spans, (residual if output is None else output) if kinked else None, False)
        and put(&p.grad_input, p, &like.m, &spans, grad_input, True)
        and put(&p.grad_residual, p, &like.m, &spans, grad_residual, True)
        and put_vector(<void **> &call.source.weight, C, real, &spans, weight, False)
        and put_vector(<void **> &call.source.bias, C, real, &spans, bias, False)
        and put_vector(<void **> &call.source.mean, C, cnp.NPY_FLOAT64, &spans, mean, False)
        and put_vector(<void **> &call.source.var, C, cnp.NPY_FLOAT64, &spans, var, False)
        and put_vector(<void **> &call.grad_weight, C, real, &spans, grad_weight, True)
        and put_vector(<void **> &call.grad_bias, C, real, &spans, grad_bias, True)
        and apart(&spans) and not any_negative(call.source.var, True, C)
        and (grad_residual is None or grad_input is not None)  # the kernels write both
    ):
        return False
    if not to_elements and not to_parameters:
        return True
    if op == BN_GRAD_INPUT and p.fixed and not kinked:
        p.x = p.grad_output  # x is not looked at, and need not be read
    call.source.eps = epsilon
    call.count = <double> m
    plan_and_allocate(&call, op, threads)
    run(&call)
    return True


cdef int backward_by_arrays(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight,
                            grad_bias, grad_residual, training, eps, activation, negative_slope,
                            num_threads) except -1:
    global BY_ARRAYS
    BY_ARRAYS += 1
    cdef list arrays = [as_array(a) for a in (grad_output, x, mean, var, weight, bias, residual, output)]
    grad_output, x, mean, var, weight, bias, residual, output = arrays
    cdef list wanted = [as_array(a) for a in (grad_input, grad_weight, grad_bias, grad_residual)]
    needs = sum([1 << i for i in range(4) if wanted[i] is not None])
    cdef Py_ssize_t count = x.size // x.shape[1] if x.size else 0
    found = backward(grad_output, x, mean, var, count, weight, bias, eps, training, 1, residual, activation,
                     negative_slope, wanted[0], num_threads, None, output, needs)
    for place_for, gradient in zip(wanted, found):
        if place_for is not None and place_for is not gradient:
            place_for[...] = gradient
    return 0


# ---- calls of PyTorch's -------------------------------------------------------------------------------------------

# All of a call of fastbn.torch between Python's frames and the kernel: in a network a call finds no cache warm, and
# each bytecode and each attribute on the way is one more place in memory to wait for.

cdef tuple TENSOR_TYPES = ()
cdef object DISPATCH_KEYS, RAW_KEYS, IS_TRACING, ARE_TRANSFORMS_ACTIVE, COUNT_DISPATCH_MODES, COUNT_FUNCTION_MODES
cdef object FORWARD_AD, IS_GRAD_ENABLED, TORCH_EMPTY_LIKE, MEMORY_FORMAT
cdef DLExchange *EXCHANGE = NULL
cdef tuple MEMORY_FORMATS = ()  # contiguous, channels-last of 4 and of 5 dimensions
cdef unsigned long long PLAIN = 0, PLAIN_IN_INFERENCE = 0


def learn_torch(torch, memory_format, plain_keys, plain_keys_in_inference):
    """What calls need of PyTorch."""
    global TENSOR_TYPES, DISPATCH_KEYS, RAW_KEYS, IS_TRACING, ARE_TRANSFORMS_ACTIVE, COUNT_DISPATCH_MODES
    global COUNT_FUNCTION_MODES, FORWARD_AD, IS_GRAD_ENABLED, TORCH_EMPTY_LIKE, MEMORY_FORMAT, MEMORY_FORMATS
    global PLAIN, PLAIN_IN_INFERENCE, EXCHANGE
    TENSOR_TYPES = torch.Tensor, torch.nn.Parameter
    DISPATCH_KEYS, RAW_KEYS = torch._C._dispatch_keys, torch._C.DispatchKeySet.raw_repr
    IS_TRACING, ARE_TRANSFORMS_ACTIVE = torch._C._is_tracing, torch._C._are_functorch_transforms_active
    COUNT_DISPATCH_MODES = torch._C._len_torch_dispatch_stack
    COUNT_FUNCTION_MODES = torch._C._len_torch_function_stack
    FORWARD_AD, IS_GRAD_ENABLED = torch.autograd.forward_ad, torch.is_grad_enabled
    TORCH_EMPTY_LIKE, MEMORY_FORMAT = torch.empty_like, memory_format
    MEMORY_FORMATS = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
    PLAIN, PLAIN_IN_INFERENCE = plain_keys, plain_keys_in_inference
    EXCHANGE = exchange_of(<type> torch.Tensor)


cdef bint is_watched() except -1:
    """Whether PyTorch may be at something that has to see every operation; functional._watched knows more exactly."""
    return (
        IS_TRACING() or ARE_TRANSFORMS_ACTIVE() or COUNT_DISPATCH_MODES() or COUNT_FUNCTION_MODES()
        or FORWARD_AD._current_level >= 0
    )


cdef bint is_plain(t, bint grad) except -1:
    """Whether a tensor is one of no special kind, or None; as functional.why_not has it."""
    cdef unsigned long long keys
    if t is None:
        return True
    if type(t) is not TENSOR_TYPES[0] and type(t) is not TENSOR_TYPES[1]:
        return False
    keys = RAW_KEYS(DISPATCH_KEYS(t))
    return keys == PLAIN or keys == PLAIN_IN_INFERENCE and not grad


cdef bint lies_as(const Memory *m, int *order, int n) noexcept:
    """Whether memory has no gaps with the dimensions in this order, the fastest first."""
    cdef Py_ssize_t step = bytes_of(m.dtype)
    cdef int i
    for i in range(n):
        if m.shape[order[i]] != 1:
            if m.strides[order[i]] != step:
                return False
            step *= m.shape[order[i]]
    return True


cdef struct OwnedTensor:  # DLPack's, and behind it the sizes that it points to
    uint32_t major, minor
    void *manager
    void (*deleter)(OwnedTensor *) noexcept nogil
    uint64_t flags
    DLTensor tensor
    int64_t shape[MOST_DIMENSIONS]
    int64_t strides[MOST_DIMENSIONS]


cdef void drop(OwnedTensor *owned) noexcept nogil:
    bn_output_free(NULL, owned.tensor.data, 0)
    free(owned)


cdef object kept_tensor(const Memory *m, const int *order):
    """A tensor of that shape and dtype in memory that is kept, with the dimensions in this order, the fastest first;
    None where there is no such memory."""
    cdef OwnedTensor *owned = NULL
    cdef int64_t step = 1
    cdef int i
    cdef void *made = NULL
    if EXCHANGE != NULL and EXCHANGE.object_from_owned != NULL:
        owned = <OwnedTensor *> malloc(sizeof(OwnedTensor))
    if owned == NULL:
        return None
    for i in range(m.nd):
        owned.shape[order[i]], owned.strides[order[i]] = m.shape[order[i]], step
        step *= m.shape[order[i]]
    owned.major, owned.minor, owned.manager, owned.deleter, owned.flags = 1, 0, NULL, drop, 0
    owned.tensor.data = bn_output_malloc(NULL, <size_t> (step * bytes_of(m.dtype)))
    owned.tensor.device, owned.tensor.device_id, owned.tensor.nd = 1, 0, m.nd  # kDLCPU
    owned.tensor.code, owned.tensor.bits = 4 if m.dtype == BFLOAT16 else 2, 8 * bytes_of(m.dtype)
    owned.tensor.lanes, owned.tensor.offset = 1, 0
    owned.tensor.shape, owned.tensor.strides = owned.shape, owned.strides
    if owned.tensor.data == NULL:
        free(owned)
        return None
    EXCHANGE.object_from_owned(owned, &made)
    t = <object> made
    Py_DECREF(t)  # the reference that the function gave, beside that of the name
    return t


cdef object room_for(t, const Memory *m, bint of_gradient):
    """A tensor for a result, in the memory format that PyTorch gives to those for such an input."""
    cdef int order[MOST_DIMENSIONS]
    cdef int i, n = m.nd
    cdef bint clear = True, contiguous
    cdef Py_ssize_t size = bytes_of(m.dtype)
    for i in range(n):
        order[i] = n - 1 - i
        size *= m.shape[i]
        clear = clear and not (of_gradient and m.shape[i] == 1)  # else two formats may be the same
    contiguous = lies_as(m, order, n)
    how = MEMORY_FORMATS[0]
    if not (contiguous and clear):
        if n == 4 or n == 5:
            order[0] = 1
            for i in range(1, n - 1):
                order[i] = n - i
            how = MEMORY_FORMATS[n - 3]
        if not (clear and lies_as(m, order, n)):
            how = MEMORY_FORMAT(t)
            if how is MEMORY_FORMATS[0]:
                for i in range(n):
                    order[i] = n - 1 - i
    made = kept_tensor(m, order) if size >= KEEP_FROM and bn_output_limit() > 0 else None
    return TORCH_EMPTY_LIKE(t, memory_format=how) if made is None else made


def torch_forward(x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
                  negative_slope, counter, num_threads):
    """functional.batch_norm of a call without anything unusual: (y, mean, var), of which mean and var are None where no
    gradient is wanted; None, and nothing done, where it has to be looked at more closely."""
    cdef bint grad = IS_GRAD_ENABLED(), wanted
    if not (
        (training is True or training is False) and type(momentum) is float and type(eps) is float and <double> eps > 0
        and is_plain(x, grad) and is_plain(weight, grad) and is_plain(bias, grad) and is_plain(running_mean, grad)
        and is_plain(running_var, grad) and is_plain(residual, grad) and is_plain(counter, grad) and not is_watched()
        and x is not None and not (running_mean is not None and running_mean.requires_grad)
        and not (running_var is not None and running_var.requires_grad)
    ):
        return None
    wanted = grad and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    cdef Tensor like
    mean = var = None
    try:
        look(&like, x)
        if like.m.nd < 2:
            return None
        y = room_for(x, &like.m, False)
        if wanted:
            mean = per_channel(like.m.shape[1], cnp.NPY_FLOAT64, False)
            var = per_channel(like.m.shape[1], cnp.NPY_FLOAT64, False)
        if forward_in_place(x, y, residual, weight, bias, running_mean, running_var, mean, var, counter, training,
                            momentum, eps, activation, negative_slope, num_threads):
            return y, mean, var
    except (TypeError, ValueError):
        pass
    return None


def torch_backward(grad_output, tuple saved, tuple call, tuple needs, num_threads):
    """The gradient of such a call: of input, weight, bias, residual; None where it has to be looked at more closely."""
    if IS_GRAD_ENABLED() or grad_output is None or not is_plain(grad_output, False) or is_watched():
        return None
    x, weight, bias, residual, output = saved
    mean, var, training, eps, activation, negative_slope = call
    cdef bint of_input = needs[0], of_weight = needs[1], of_bias = needs[2], of_residual = needs[3]
    cdef bint through = of_residual and activation is not None  # else it is grad_output itself
    grad_input = grad_weight = grad_bias = grad_residual = None
    cdef Tensor like
    if of_input or through:
        look(&like, x)
        if of_input:
            grad_input = room_for(x, &like.m, True)
        if through:
            grad_residual = room_for(x, &like.m, True)
    if of_weight or of_bias:
        vector = x.new_empty(x.shape[1]) if weight is None else weight
        if of_weight:
            grad_weight = TORCH_EMPTY_LIKE(vector)
        if of_bias:
            grad_bias = TORCH_EMPTY_LIKE(vector)
    if not backward_in_place(grad_output, x, mean, var, weight, bias, residual, output, grad_input, grad_weight,
                             grad_bias, grad_residual, training, eps, activation, negative_slope, num_threads):
        return None
    return grad_input, grad_weight, grad_bias, grad_output if of_residual and not through else grad_residual, None
