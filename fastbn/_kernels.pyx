# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The OpenMP-parallel kernels: the operations on the arrays of _arrays.pxi, run in parallel by _partition.pxi on what
_machine.pxi has found.

An item is one call into the serial C kernels of src_c/, or a few for the same channels. Which thread runs which item
never changes a result: tiles and the order in which they are pooled depend on shape and memory layout alone.
"""

import operator
import os

import numpy as np

cimport numpy as cnp
from libc.math cimport isfinite
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcpy
from cpython.pycapsule cimport PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX

cnp.import_array()

include "_machine.pxi"
include "_arrays.pxi"
include "_partition.pxi"


# ---- coefficients ---------------------------------------------------------------------------------------------

cdef Py_ssize_t coef_width(Py_ssize_t columns, Py_ssize_t n_gaps) noexcept:
    """Floats of one array of coefficients: of so many columns and 16 more, in whole lines, and the gaps between those
    of several threads."""
    return (columns + 16 + 15) // 16 * 16 + n_gaps * GAP


cdef enum:
    ROOM = 3 * (384 + 16) + 15 + 384  # floats, 6 KB: coefficients that need no allocation


cdef Py_ssize_t coef_floats(Py_ssize_t width, bint backward) noexcept:
    """Of all arrays, with what it takes to begin where lay_out_coef wants: within a page or the columns."""
    return width * (8 if backward else 3) + 15 + min(PAGE, width)


cdef void lay_out_coef(bn_coef *k, float *block, Py_ssize_t width, bint backward, Py_ssize_t columns,
                       const float *out) noexcept:
    """k's arrays in `block`, for rows of so many columns, written from `out` on (NULL: from the start of a page).

    They begin at a cache line, as a vector across two takes twice as long to load, and in the low bits of addresses
    half way between rows, a line from one array to the next: a load waits for a store before it to an address where
    the low 12 bits are the same.
    """
    cdef Py_ssize_t period = min(PAGE, columns & -columns), spread = LINE * (8 if backward else 3)
    cdef Py_ssize_t place = <Py_ssize_t> out // 64 * LINE + (period - spread) // 2 // LINE * LINE
    memset(k, 0, sizeof(bn_coef))
    block = <float *> ((<uintptr_t> block + 63) // 64 * 64)
    if period > spread:
        block += place - <Py_ssize_t> block // 4 & period - 1
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
    cdef Py_ssize_t width = coef_width(C * p.fold, 0)
    if room == NULL or coef_floats(width, False) > ROOM:
        block = <float *> malloc(<size_t> coef_floats(width, False) * sizeof(float))
        if block == NULL:
            raise MemoryError(f"no memory for coefficients, {width} of each")
    lay_out_coef(k, block, width, False, C * p.fold, NULL)
    if float64:
        K.coef(&p, 0, C, data64(mean), data64(var), data32(weight), data32(bias), eps, k)
    else:
        K.running_coef(&p, data32(mean), data32(var), data32(weight), data32(bias), eps, k)
    return block


def channels(x, axis, tuple ranks):
    """The number of channels of x, checked."""
    x = array32(x, "x")
    check_rank(x, ranks)
    return cnp.PyArray_DIM(x, check_axis(x, axis, "x"))


# ---- the operations -----------------------------------------------------------------------------------------------

cdef int allocate_scratch(Plan *plan) except -1:
    """Room for each member's sums of columns, tiles, sums over them, and coefficients if there is an output."""
    plan.T = plan.K.tiles(&plan.p)
    plan.width = plan.p.C * plan.p.fold
    cdef bint backward = plan.p.grad_input.data != NULL
    cdef const float *out = plan.p.grad_input.data if backward else plan.p.y.data
    cdef Py_ssize_t C = plan.p.C + gaps(plan) * GAP, n = plan.T * plan.width + gaps(plan) * GAP
    cdef Py_ssize_t width = coef_width(plan.p.C * K.fold(plan.p.C, PY_SSIZE_T_MAX), gaps(plan))
    cdef size_t sums = 2 * <size_t> (n + C) * sizeof(double)
    if plan.p.layout == BN_ROWS and plan.p.C % PAGE == 0:
        width += PAGE  # for columns that go on in the next row
    cdef Py_ssize_t rooms = plan.threads * BN_ROOM if plan.p.layout == BN_ROWS else 0
    cdef size_t coefficients = 0 if out == NULL else coef_floats(width, backward) * sizeof(float)
    plan.scratch = malloc(63 + rooms * sizeof(float) + sums + coefficients)
    if plan.scratch == NULL:
        raise MemoryError(f"no memory for the partial sums of {plan.T} tiles")
    plan.p.room = <float *> ((<uintptr_t> plan.scratch + 63) // 64 * 64)
    plan.tile_a = <double *> (plan.p.room + rooms)
    plan.tile_b = plan.tile_a + n
    plan.g = plan.tile_b + n
    plan.gx = plan.g + C
    if out != NULL:
        lay_out_coef(&plan.k, <float *> (plan.gx + C), width, backward,
                     plan.width if plan.p.layout == BN_ROWS else 0, out)
    return 0


def stats(x, axis, num_threads):
    """Mean and biased variance of each channel, float64 of shape (C,), and the number of values a channel."""
    x = array32(x, "x")
    cdef int ax = check_axis(x, axis, "x")
    cdef Plan plan
    memset(&plan, 0, sizeof(plan))
    describe(&plan.p, x, ax)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    plan.threads = ask_threads(num_threads, C * m)
    cdef cnp.ndarray mean = statistic(C, m == 0), var = statistic(C, m == 0)
    if C * m == 0:
        return mean, var, 0
    x = readable(&plan.p.x, &plan.p, x, ax)
    flatten(&plan.p)
    plan.K = K
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.need_stats = True
    plan.p.stream = past_cache(&plan.p, plan.threads)
    allocate_scratch(&plan)
    run(&plan, two_passes)
    return mean, var, m


def forward(x, weight, bias, double eps, axis, residual, activation, double negative_slope, out, num_threads,
            running_mean, running_var, double momentum, bint unbiased, bint want_stats):
    """Training forward: (y, mean, var, count), mean and var None without want_stats. Running statistics, or two
    times None, are updated."""
    x = array32(x, "x")
    check_eps(eps)
    cdef int ax = check_axis(x, axis, "x")
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
        check_momentum(momentum)
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
    plan.threads = ask_threads(num_threads, C * m)
    cdef cnp.ndarray mean = statistic(C, m == 0) if want_stats else None
    cdef cnp.ndarray var = statistic(C, m == 0) if want_stats else None
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
    plan.p.stream = past_cache(&plan.p, plan.threads)
    plan.K = K
    plan.eps = eps
    plan.need_stats = True
    if running_mean is not None:
        plan.running_mean = <char *> cnp.PyArray_DATA(running_mean)
        plan.running_var = <char *> cnp.PyArray_DATA(running_var)
        plan.running_stride = [cnp.PyArray_STRIDE(running_mean, 0), cnp.PyArray_STRIDE(running_var, 0)]
        plan.momentum = momentum
        plan.unbiasing = unbiasing(m, unbiased)
    allocate_scratch(&plan)
    plan.mean = data64(mean) if want_stats else plan.g  # which the forward pass has no other use for
    plan.var = data64(var) if want_stats else plan.gx
    run(&plan, two_passes)
    if out is not None and y is not out:
        out[...] = y
    return (y if out is None else given), mean, var, m


def normalize(x, mean, var, bint float64, weight, bias, double eps, axis, residual, activation, double negative_slope,
              out, num_threads, tuple ranks):
    """y from running statistics, or with float64 those of a BatchStats."""
    cdef int code = activation_code(activation)
    check_slope(negative_slope)
    x = array32(x, "x")
    check_rank(x, ranks)
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
    cdef int ax = check_axis(x, axis, "x")
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
    plan.threads = ask_threads(num_threads, elements)
    if elements == 0:
        return empty_for(&plan.p, x, ax) if out is None else given
    x0 = x
    x = readable(&plan.p.x, &plan.p, x, ax)
    if residual is not None:
        residual = readable(&plan.p.residual, &plan.p, residual, ax)
    y = writable(&plan.p.y, &plan.p, out, x0, ax)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, plan.threads)
    plan.K = K
    plan.k = k[0]
    if plan.p.layout == BN_ROWS and plan.p.packed:  # without statistics, and so without tiles, more rows may be one
        plan.p.fold = K.fold(plan.p.C, plan.p.S)
    run(&plan, elementwise)
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
    cdef int ax = check_axis(x, axis, "x")
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
    plan.threads = ask_threads(num_threads, C * m)
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
    plan.p.stream = past_cache(&plan.p, plan.threads)
    plan.K = K
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.grad_weight = data32(grad_weight)
    plan.grad_bias = data32(grad_bias)
    plan.eps = eps
    plan.frozen = not training
    allocate_scratch(&plan)
    run(&plan, two_passes)
    if out is not None and dx is not out:
        out[...] = dx
    return (dx if out is None else given), grad_weight, grad_bias, grad_residual


cdef double unbiasing(Py_ssize_t count, bint unbiased) noexcept:
    """Bessel's correction."""
    return <double> count / (count - 1) if unbiased and count > 1 else 1.0


def update_running(running_mean, running_var, cnp.ndarray mean, cnp.ndarray var, Py_ssize_t count, double momentum,
                   bint unbiased):
    """running = (1 - momentum) * running + momentum * batch in float64, in place; nothing where count is 0."""
    cdef Py_ssize_t C = cnp.PyArray_DIM(mean, 0)
    check_momentum(momentum)
    if count == 0:
        return
    K.move_running(<char *> cnp.PyArray_DATA(running_mean), cnp.PyArray_STRIDE(running_mean, 0), data64(mean), 0, C,
                   momentum, 1.0)
    K.move_running(<char *> cnp.PyArray_DATA(running_var), cnp.PyArray_STRIDE(running_var, 0), data64(var), 0, C,
                   momentum, unbiasing(count, unbiased))
