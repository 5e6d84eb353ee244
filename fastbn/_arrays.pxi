# Which arrays the kernels take, how their memory is walked, and where new ones come from: a part of _kernels.pyx.

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


cdef int take_mask_from_output(bn_problem *p, activation) except -1:
    """Of an activation whose output tells on which side of its kinks z lies."""
    if p.activation == BN_RELU or p.activation == BN_RELU6:
        p.negative_slope = 0.0  # which the kernels for any activation go by
    elif p.activation != BN_LEAKY_RELU or not p.negative_slope > 0.0:
        slope = f" with negative_slope={p.negative_slope}" if p.activation == BN_LEAKY_RELU else ""
        raise ValueError(
            "output tells the derivative of 'relu', 'relu6', and 'leaky_relu' with a negative_slope above 0, not of "
            f"{activation!r}{slope}; leave out output, and pass the residual if there was one"
        )
    p.by_output = True
    return 0


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


cdef float check_slope(negative_slope) except? -1.0:
    cdef double value = number(negative_slope, "negative_slope")
    if not fabs(value) <= FLT_MAX:
        raise ValueError(f"negative_slope must be finite, in float32 too, got {value}")
    return <float> value


cpdef double check_momentum(momentum) except? -1.0:
    cdef double value = number(momentum, "momentum")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"momentum must be finite and lie in [0, 1], the weight of the new value, got {value}")
    return value


def check_activation(activation, negative_slope):
    activation_code(activation)
    check_slope(negative_slope)


cdef object foreign(a, str name):
    """An array of another library as NumPy sees it in place: by __array_interface__, DLPack or the buffer protocol."""
    reason = ""
    cure = f"convert it with numpy.asarray({name}, dtype=numpy.float32)"
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
    raise TypeError(f"{name} must be a float32 numpy.ndarray, got {type(a).__name__}{reason}; {cure}")


cpdef cnp.ndarray array32(a, str name):
    """`a` as an array of float32 that shares its memory; raises where it is none."""
    b = a if cnp.PyArray_Check(a) else foreign(a, name)
    check_dtype(b, a, name, False)
    return b


cpdef cnp.ndarray running(a, str name):
    """`a` as an array of running averages, which may be of float64, too."""
    b = a if cnp.PyArray_Check(a) else foreign(a, name)
    check_dtype(b, a, name, True)
    return b


cdef int check_dtype(b, a, str name, bint or_float64) except -1:
    """Of the array b, which `a` was given as."""
    cdef int dtype = cnp.PyArray_TYPE(b)
    if (dtype != cnp.NPY_FLOAT32 and not (or_float64 and dtype == cnp.NPY_FLOAT64)) or not cnp.PyArray_ISNOTSWAPPED(b):
        raise TypeError(
            f"{name} must have dtype float32 in native byte order, got {type(a).__name__} of {b.dtype!s} "
            f"({b.dtype.str}); convert it with numpy.asarray({name}, dtype=numpy.float32)"
        )
    if not cnp.PyArray_CheckExact(b) and isinstance(b, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked one: its mask would be ignored; fill it first")
    return 0


cdef object optional(a, str name):
    return None if a is None else array32(a, name)


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


cpdef cnp.ndarray vector(a, str name, Py_ssize_t C, bint writable):
    """`a` as a float32 vector of C values."""
    cdef cnp.ndarray v = array32(a, name)
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
    cdef Py_ssize_t c, C = cnp.PyArray_DIM(var, 0)
    cdef const float *v32 = <const float *> cnp.PyArray_DATA(var)
    cdef const double *v64 = <const double *> cnp.PyArray_DATA(var)
    cdef int negative = False  # in loops of little, which compilers make vectors of
    if float64:
        for c in range(C):
            negative |= v64[c] < 0.0
    else:
        for c in range(C):
            negative |= v32[c] < 0.0
    if not negative:
        return 0
    too_small = np.asarray(var, np.float64) + eps < 0.0
    if too_small.any():
        c = int(np.argmax(too_small))
        raise ValueError(f"{name}[{c}] + eps must be >= 0, got {(<object> var)[c]!s} + {eps}")
    return 0


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


cdef void sizes_of(cnp.ndarray a, int axis, Py_ssize_t *N, Py_ssize_t *C, Py_ssize_t *S) noexcept:
    cdef int i, nd = cnp.PyArray_NDIM(a)
    N[0] = S[0] = 1
    C[0] = cnp.PyArray_DIM(a, axis)
    for i in range(nd):
        if i < axis and (i == 0 or axis < nd - 1 or nd == 2):
            N[0] *= cnp.PyArray_DIM(a, i)
        elif i != axis:
            S[0] *= cnp.PyArray_DIM(a, i)


cdef void describe(bn_problem *p, cnp.ndarray x, int axis) noexcept:
    """Sizes and layout of p from x."""
    cdef Strides s = strides_of(x, axis)
    memset(p, 0, sizeof(bn_problem))
    sizes_of(x, axis, &p.N, &p.C, &p.S)
    if p.S == 1:
        p.layout = BN_ROWS
    elif p.C == 1 or (s.walkable and s.inner == 1):
        p.layout = BN_PLANES
    elif s.walkable and s.channel == 1:
        p.layout = BN_ROWS
    else:
        p.layout = BN_ROWS if axis == cnp.PyArray_NDIM(x) - 1 else BN_PLANES
    p.fold = 1
    if p.layout == BN_ROWS and (not s.walkable or (
            (p.C == 1 or s.channel == 1) and (p.S == 1 or s.inner == p.C) and (p.N == 1 or s.outer == p.S * p.C))):
        p.fold = K.fold(p.C, 0)  # rows with gaps are walked one by one; what is not walkable will be copied


cdef bint place(bn_operand *o, const bn_problem *p, cnp.ndarray a, int axis) noexcept:
    """Fill in an operand; False where the kernels cannot walk it, or it is none of this problem."""
    cdef Py_ssize_t N, C, S
    cdef Strides s
    if cnp.PyArray_NDIM(a) <= max(axis, 1) or cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT32:
        return False
    sizes_of(a, axis, &N, &C, &S)
    if N != p.N or C != p.C or S != p.S:
        return False
    s = strides_of(a, axis)
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


cdef enum:
    OPERANDS = 6


cdef inline void operands_of(bn_problem *p, bn_operand **all) noexcept nogil:
    all[0], all[1], all[2] = &p.x, &p.residual, &p.grad_output
    all[3], all[4], all[5] = &p.y, &p.grad_input, &p.grad_residual


cdef void flatten(bn_problem *p) noexcept:
    """Whether there are gaps; rows whose batch needs no stride of its own become one batch."""
    cdef bn_operand *o
    cdef bn_operand *all[OPERANDS]
    cdef Py_ssize_t gapless = p.C if p.layout == BN_ROWS else p.S
    cdef bint one_batch = p.layout == BN_ROWS
    cdef int i
    operands_of(p, all)
    for i in range(OPERANDS):
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
    for i in range(OPERANDS):
        o = all[i]
        if o.data != NULL and o.inner != gapless and (p.S > 1 or p.layout == BN_PLANES):
            p.packed = False
    p.pitch = p.C if p.packed else 0


# Memory of large outputs is NumPy's to manage, through an allocator (NEP 49) that keeps what is freed for the next
# output. It is in force while such an array is made, and for all the life of that array.
cdef void *output_malloc(void *unused, size_t size) noexcept:
    fastbn_lock()
    cdef void *memory = bn_output_malloc(size)
    fastbn_unlock()
    return memory


cdef void *output_calloc(void *unused, size_t count, size_t size) noexcept:
    fastbn_lock()
    cdef void *memory = bn_output_calloc(count, size)
    fastbn_unlock()
    return memory


cdef void *output_realloc(void *unused, void *memory, size_t size) noexcept:
    fastbn_lock()
    cdef void *moved = bn_output_realloc(memory, size)
    fastbn_unlock()
    return moved


cdef void output_free(void *unused, void *memory, size_t size) noexcept:
    fastbn_lock()
    bn_output_free(memory)
    fastbn_unlock()


cdef PyDataMem_Handler output_handler
memset(&output_handler, 0, sizeof(output_handler))
strcpy(output_handler.name, b"fastbn_outputs")
output_handler.version = 1
output_handler.allocator.malloc = output_malloc
output_handler.allocator.calloc = output_calloc
output_handler.allocator.realloc = output_realloc
output_handler.allocator.free = output_free
cdef object output_handler_capsule = PyCapsule_New(&output_handler, "mem_handler", NULL)
cdef Py_ssize_t KEEP_FROM = 1 << 18  # bytes; smaller arrays do not pay for page faults


def set_output_limit(Py_ssize_t max_bytes):
    fastbn_lock()
    bn_output_set_limit(<size_t> max_bytes)
    fastbn_unlock()


def output_memory():
    """(bytes kept now, bytes kept at most)"""
    fastbn_lock()
    cdef size_t held = bn_output_held(), limit = bn_output_limit()
    fastbn_unlock()
    return held, limit


cpdef size_t give_back() noexcept:
    """Give back what is kept; returns how many bytes: where any, an allocation that failed may be tried once more."""
    fastbn_lock()
    cdef size_t held = bn_output_held()
    bn_output_give_back()
    fastbn_unlock()
    return held


cdef void *claim(size_t size) noexcept:
    """Memory to be freed, or NULL."""
    cdef void *memory = malloc(size)
    if memory == NULL and give_back():
        memory = malloc(size)
    return memory


cdef cnp.ndarray empty_like(cnp.ndarray x, int order):
    cdef bint keep = cnp.PyArray_NBYTES(x) >= KEEP_FROM and bn_output_limit() > 0
    if keep:
        previous = PyDataMem_SetHandler(output_handler_capsule)
    try:
        return PyArray_NewLikeArray(x, order, NULL, 0)
    except MemoryError:
        if not give_back():
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
        if not give_back():
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
    if not place(&o, p, a, axis):
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
    if place(&o, p, a, axis):
        return a
    copy = empty_for(p, a, axis)
    copy[...] = a
    return copy


cdef cnp.ndarray writable(const bn_problem *p, out, cnp.ndarray x, int axis):
    """What to write: `out`, or a new array where that is None or cannot be walked."""
    cdef bn_operand o
    if out is not None and place(&o, p, out, axis):
        return out
    return empty_for(p, x, axis)


# Python code may run wherever one is called, memory is freed, or the GIL is let go of, and then an array may get
# another shape or memory. So the kernels' pointers are taken last, and every array is looked at again with that.

cdef int changed(str name) except -1:
    raise RuntimeError(f"{name} was given another shape, other strides or other memory during the call")


cdef int take(bn_operand *o, const bn_problem *p, cnp.ndarray a, int axis, str name) except -1:
    return 0 if place(o, p, a, axis) else changed(name)


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


cdef const float *take32(a, Py_ssize_t C, str name) except? NULL:
    if a is None:
        return NULL
    return <const float *> take_vector(a, C, cnp.NPY_FLOAT32, 4, name)


cdef double *take64(a, Py_ssize_t C, str name) except? NULL:
    return <double *> take_vector(a, C, cnp.NPY_FLOAT64, 8, name)
