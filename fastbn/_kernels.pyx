# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The OpenMP-parallel kernels: the operations on the arrays of _arrays.pxi, run in parallel by _partition.pxi on what
_machine.pxi has found.

An item is one call into the serial C kernels of src_c/, or a few for the same channels. Which thread runs which item
never changes a result: tiles and the order in which they are pooled depend on shape and memory layout alone.
"""

import operator
import os

import numpy as np

cimport numpy as cnp
from libc.float cimport FLT_MAX
from libc.math cimport fabs, isfinite
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


cdef float *inference_coef(bn_coef *k, float *room, Py_ssize_t C, Py_ssize_t rows, cnp.ndarray mean, cnp.ndarray var,
                           bint of_stats, weight, bias, double eps) except NULL:
    """Coefficients from checked vectors: running statistics of float32 or float64, or those of a BatchStats. For so
    many rows.

    They are in `room`, of ROOM floats, if that is not NULL and is enough; otherwise in memory to be freed.
    """
    cdef bn_problem p
    cdef float *block = room
    cdef const float *weights
    cdef const float *biases
    memset(&p, 0, sizeof(p))
    p.layout = BN_ROWS  # or planes, which want less
    p.C = C
    p.fold = K.fold(C, rows)
    cdef Py_ssize_t width = coef_width(C * p.fold, 0)
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
        take32(var, C, of_var)
    check_variance(var, float64, eps, of_var)
    # no Python code runs from here on
    weights = take32(weight, C, "weight")
    biases = take32(bias, C, "bias")
    if float64:
        take64(mean, C, of_mean)
        take64(var, C, of_var)
    else:
        take32(mean, C, of_mean)
        take32(var, C, of_var)
    if room == NULL or coef_floats(width, False) > ROOM:
        block = <float *> claim(<size_t> coef_floats(width, False) * sizeof(float))
        if block == NULL:
            raise MemoryError(f"no memory for coefficients, {width} of each")
    lay_out_coef(k, block, width, False, C * p.fold, NULL)
    if float64:
        K.coef(&p, 0, C, data64(mean), data64(var), weights, biases, eps, k)
    else:
        K.running_coef(&p, <const float *> cnp.PyArray_DATA(mean), <const float *> cnp.PyArray_DATA(var), weights,
                       biases, eps, k)
    return block


cdef int check_channels(cnp.ndarray x, int axis, Py_ssize_t expected) except -1:
    if cnp.PyArray_DIM(x, axis) != expected:
        raise ValueError(f"x must have {expected} channels on axis {axis}, got shape {(<object> x).shape}"
                         f"{last_axis_hint(x, axis, expected)}")
    return 0


def check_input(x, axis, tuple ranks, Py_ssize_t num_features):
    """That a layer of so many channels can take x."""
    x = array32(x, "x")
    check_rank(x, ranks)
    cdef Py_ssize_t number = whole(axis, "axis", "number a dimension")
    check_channels(x, check_axis(x, number), num_features)


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
    plan.scratch = claim(63 + rooms * sizeof(float) + sums + coefficients)
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


cdef int begin(Plan *plan, cnp.ndarray x, axis, activation, negative_slope, num_threads) except -1:
    """Everything that is not an array, and the problem as x has it; returns the channels' axis."""
    memset(plan, 0, sizeof(Plan))
    cdef int code = activation_code(activation)
    cdef float slope = check_slope(negative_slope)
    cdef Py_ssize_t number = whole(axis, "axis", "number a dimension")
    plan.threads = ask_threads(num_threads, cnp.PyArray_SIZE(x))
    cdef int ax = check_axis(x, number)
    plan.K = K
    describe(&plan.p, x, ax)
    plan.p.activation = code
    plan.p.negative_slope = slope
    return ax


def stats(x, axis, num_threads):
    """Mean and biased variance of each channel, float64 of shape (C,), and the number of values a channel."""
    x = array32(x, "x")
    cdef Plan plan
    cdef int ax = begin(&plan, x, axis, None, 0.0, num_threads)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    cdef cnp.ndarray mean = statistic(C, m == 0), var = statistic(C, m == 0)
    if C * m == 0:
        return mean, var, 0
    walked = readable(&plan.p, x, ax)
    result = mean, var, m
    take(&plan.p.x, &plan.p, walked, ax, "x")
    flatten(&plan.p)
    plan.mean = data64(mean)
    plan.var = data64(var)
    plan.need_stats = True
    plan.p.stream = past_cache(&plan.p, plan.threads)
    allocate_scratch(&plan)
    run(&plan, two_passes)
    return result


cpdef tuple unrounded(mean, var, tuple exact, double eps):
    """A layer's float32 running mean and variance in float64, with what rounding took; None where nothing that matters.

    What moves no result by 1e-6 is left out: float32 itself rounds so, and a layer then evaluates to the bits of its
    float32 values. `exact` counts for as long as it rounds to these.
    """
    cdef Py_ssize_t c, C
    cdef const float *m
    cdef const float *v
    cdef const double *exact_mean
    cdef const double *exact_var
    cdef double rest
    cdef bint matters = False
    mean, var = array32(mean, "running_mean"), array32(var, "running_var")
    C = cnp.PyArray_SIZE(mean)
    check_vector(mean, "running_mean", C)
    check_vector(var, "running_var", C)
    mean, var = contiguous(mean), contiguous(var)
    m, v = take32(mean, C, "running_mean"), take32(var, C, "running_var")
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
            running_var, momentum, bint unbiased, bint want_stats, exact=None, counter=None, bint skip_nonfinite=False):
    """Training forward: (y, mean, var, count), mean and var None without want_stats. Running statistics, or two
    times None, are updated; with those of a layer also what they were rounded from, and its counter."""
    x = array32(x, "x")
    weight = optional(weight, "weight")
    bias = optional(bias, "bias")
    residual = optional(residual, "residual")
    cdef bint update = running_mean is not None
    cdef bint float64 = False
    if update:
        running_mean = running(running_mean, "running_mean")
        running_var = running(running_var, "running_var")
        check_alike(running_mean, running_var)
        float64 = cnp.PyArray_TYPE(running_mean) == cnp.NPY_FLOAT64
    given = out
    out = optional(out, "out")
    cdef double epsilon = check_eps(eps), share = check_momentum(momentum) if update else 0.0
    cdef Plan plan
    cdef int ax = begin(&plan, x, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t C = plan.p.C, m = plan.p.N * plan.p.S
    check_vector(weight, "weight", C, x, ax)
    check_vector(bias, "bias", C, x, ax)
    if residual is not None:
        check_shape(residual, x, "residual", "x")
    if out is not None:
        check_output(out, x, True)
        check_clear(out, "out", residual, "residual")
        check_clear(out, "out", weight, "weight")
        check_clear(out, "out", bias, "bias")
    if update:
        check_vector(running_mean, "running_mean", C, x, ax)
        check_vector(running_var, "running_var", C, x, ax)
        check_clear(running_mean, "running_mean", running_var, "running_var")
        for average, name in (running_mean, "running_mean"), (running_var, "running_var"):
            check_running(average, name)
            if out is not None:
                check_clear(out, "out", average, name)
            check_clear(average, name, x, "x")
            check_clear(average, name, weight, "weight")
            check_clear(average, name, bias, "bias")
            check_clear(average, name, residual, "residual")
    cdef cnp.ndarray mean = statistic(C, m == 0) if want_stats else None
    cdef cnp.ndarray var = statistic(C, m == 0) if want_stats else None
    if C * m == 0:
        return (empty_for(&plan.p, x, ax) if out is None else given), mean, var, 0
    if m == 1:
        raise ValueError(
            f"training needs more than 1 value per channel, got x of shape {x.shape} with axis={axis}; "
            "pass a larger batch, or fixed statistics"
        )
    if weight is not None:
        weight = contiguous(weight)
    if bias is not None:
        bias = contiguous(bias)
    walked = readable(&plan.p, x, ax)
    if residual is not None:
        residual = readable(&plan.p, residual, ax)
    y = writable(&plan.p, out, x, ax)
    result = (y if out is None else given), mean, var, m
    take(&plan.p.x, &plan.p, walked, ax, "x")
    if residual is not None:
        take(&plan.p.residual, &plan.p, residual, ax, "residual")
    take_output(&plan.p.y, &plan.p, y, out, ax)
    plan.weight = take32(weight, C, "weight")
    plan.bias = take32(bias, C, "bias")
    if update:
        take_running(&plan.running_mean, running_mean, C, float64, "running_mean")
        take_running(&plan.running_var, running_var, C, float64, "running_var")
        if exact is not None and not float64:
            plan.running_mean.exact = <char *> take64((<tuple> exact)[0], C, "the unrounded mean")
            plan.running_var.exact = <char *> take64((<tuple> exact)[1], C, "the unrounded variance")
            plan.running_mean.exact_stride = plan.running_var.exact_stride = sizeof(double)
        if counter is not None:
            check_counter(counter)
        plan.update = True
        plan.skip_nonfinite = skip_nonfinite
        plan.momentum = share
        plan.unbiasing = unbiasing(m, unbiased)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, plan.threads)
    plan.eps = epsilon
    plan.need_stats = True
    allocate_scratch(&plan)
    plan.mean = data64(mean) if want_stats else plan.g  # which the forward pass has no other use for
    plan.var = data64(var) if want_stats else plan.gx
    if counter is not None:  # here, where neither an error nor a signal comes between it and the averages
        count_batch(counter)
    run(&plan, two_passes)
    if out is not None and y is not out:
        out[...] = y
    return result


def normalize(x, mean, var, bint of_stats, weight, bias, eps, axis, residual, activation, negative_slope, out,
              num_threads, tuple ranks, tuple exact=None):
    """y from running statistics, of a layer with what they were rounded from, or from those of a BatchStats."""
    x = array32(x, "x")
    if not of_stats:
        mean = running(mean, "running_mean")
        var = running(var, "running_var")
        check_alike(mean, var)
    weight = optional(weight, "weight")
    bias = optional(bias, "bias")
    residual = optional(residual, "residual")
    given = out
    out = optional(out, "out")
    check_rank(x, ranks)
    cdef double epsilon = check_eps(eps)
    cdef Plan plan
    cdef int ax = begin(&plan, x, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t C = plan.p.C
    if of_stats:
        check_moment(mean, "mean", C)
        check_moment(var, "var", C)
    else:
        check_vector(mean, "running_mean", C, x, ax)
        check_vector(var, "running_var", C, x, ax)
    check_vector(weight, "weight", C, x, ax)
    check_vector(bias, "bias", C, x, ax)
    if out is not None:
        check_clear(out, "out", weight, "weight")
        check_clear(out, "out", bias, "bias")
        check_clear(out, "out", mean, "stats.mean" if of_stats else "running_mean")
        check_clear(out, "out", var, "stats.var" if of_stats else "running_var")
    if exact is not None:
        exact = unrounded(mean, var, exact, epsilon)
        if exact is not None:
            mean, var = exact
    cdef float room[ROOM]
    cdef Py_ssize_t rows = plan.p.N * plan.p.S
    cdef float *block = inference_coef(&plan.k, room, C, rows, mean, var, of_stats, weight, bias, epsilon)
    try:
        return infer(&plan, x, ax, residual, out, given)
    finally:
        if block != room:
            free(block)


cdef class Frozen:
    """Coefficients made once, and how to apply them. Nothing of it changes after construction."""
    cdef bn_coef k
    cdef float *block
    cdef readonly Py_ssize_t num_features
    cdef readonly Py_ssize_t axis
    cdef readonly object activation
    cdef readonly double eps
    cdef readonly double negative_slope

    def __cinit__(self, running_mean, running_var, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None,
                  negative_slope=0.01, copy=True):
        running_mean = running(running_mean, "running_mean")
        running_var = running(running_var, "running_var")
        check_alike(running_mean, running_var)
        weight = optional(weight, "weight")
        bias = optional(bias, "bias")
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
            &self.k, NULL, C, PY_SSIZE_T_MAX, running_mean, running_var, False, weight, bias, self.eps)

    def __dealloc__(self):
        free(self.block)

    def __call__(self, x, residual=None, out=None, *, num_threads=None):
        """Normalize `x`.

        Parameters
        ----------
        x : ndarray of float32, rank >= 2
        residual, out : ndarray of float32, shape of `x`, or None
            See :func:`fastbn.batch_norm`.
        num_threads : int or None
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
        residual = optional(residual, "residual")
        given = out
        out = optional(out, "out")
        cdef Plan plan
        cdef int ax = begin(&plan, x, self.axis, self.activation, self.negative_slope, num_threads)
        check_channels(x, ax, self.num_features)
        plan.k = self.k
        return infer(&plan, x, ax, residual, out, given)


cdef infer(Plan *plan, cnp.ndarray x, int ax, residual, out, given):
    """y by the coefficients of plan.k, for as many channels as plan.p has."""
    if residual is not None:
        check_shape(residual, x, "residual", "x")
    if out is not None:
        check_output(out, x, True)
        check_clear(out, "out", residual, "residual")
    if plan.p.C * plan.p.N * plan.p.S == 0:
        return empty_for(&plan.p, x, ax) if out is None else given
    walked = readable(&plan.p, x, ax)
    if residual is not None:
        residual = readable(&plan.p, residual, ax)
    y = writable(&plan.p, out, x, ax)
    take(&plan.p.x, &plan.p, walked, ax, "x")
    if residual is not None:
        take(&plan.p.residual, &plan.p, residual, ax, "residual")
    take_output(&plan.p.y, &plan.p, y, out, ax)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, plan.threads)
    if plan.p.layout == BN_ROWS and plan.p.packed:  # without statistics, and so without tiles, more rows may be one
        plan.p.fold = plan.K.fold(plan.p.C, plan.p.S)
    run(plan, elementwise)
    if out is None:
        return y
    if y is not out:
        out[...] = y
    return given


cdef enum:  # what backward is to compute, a bit each
    GRAD_INPUT = 1
    GRAD_WEIGHT = 2
    GRAD_BIAS = 4
    GRAD_RESIDUAL = 8
    GRAD_SUMS = 16  # alone

cdef int PASSES = 0


def passes():
    """How many times the latest backward call went over its arrays."""
    return PASSES


def backward(grad_output, x, mean, var, count, weight, bias, eps, bint training, axis, residual, activation,
             negative_slope, out, num_threads, tuple sums=None, output=None, int needs=15):
    """(grad_input, grad_weight, grad_bias, grad_residual), None for what is not in needs; mean and var are float64 of
    shape (C,), over `count` values a channel. With `sums`, (dz, dz_dev, count), nothing is summed, and the gradients of
    the parameters are None. With GRAD_SUMS the result is such a tuple, of x alone."""
    global PASSES
    x = array32(x, "x")
    grad_output = array32(grad_output, "grad_output")
    weight = optional(weight, "weight")
    bias = optional(bias, "bias")
    residual = optional(residual, "residual")
    output = optional(output, "output")
    given = out
    out = optional(out, "out")
    cdef double epsilon = check_eps(eps)
    cdef Plan plan
    cdef int ax = begin(&plan, x, axis, activation, negative_slope, num_threads)
    cdef Py_ssize_t c, C = plan.p.C, m = plan.p.N * plan.p.S
    check_shape(grad_output, x, "grad_output", "x")
    check_moment(mean, "mean", C)
    check_moment(var, "var", C)
    check_variance(var, True, epsilon, "stats.var")
    check_vector(weight, "weight", C, x, ax)
    check_vector(bias, "bias", C, x, ax)
    if residual is not None:
        check_shape(residual, x, "residual", "x")
    if output is not None:
        check_shape(output, x, "output", "x")
        take_mask_from_output(&plan.p, activation)
    if sums is not None:
        check_moment(sums[0], "dz", C, "sums", "GradSums")
        check_moment(sums[1], "dz_dev", C, "sums", "GradSums")
        if not training:
            raise ValueError("sums are for training=True, gradients by fixed statistics need none; leave out sums")
        if sums[2] != count:
            raise ValueError(f"sums are of {sums[2]} values per channel, but stats of {count}; pass both of the whole "
                             "batch, merged from all of its parts")
    if out is not None:
        if not needs & GRAD_INPUT:
            raise ValueError("out is where grad_input goes, which needs does not name; add 'input', or leave out out")
        check_output(out, x, False)
        check_clear(out, "out", grad_output, "grad_output")
        check_clear(out, "out", residual, "residual")
        check_clear(out, "out", output, "output")
        check_clear(out, "out", weight, "weight")
        check_clear(out, "out", bias, "bias")
        check_clear(out, "out", mean, "stats.mean")
        check_clear(out, "out", var, "stats.var")
        if sums is not None:
            check_clear(out, "out", sums[0], "sums.dz")
            check_clear(out, "out", sums[1], "sums.dz_dev")
    if training and C * m > 0 and count != m:
        if sums is None and not needs & GRAD_SUMS:
            raise ValueError(
                f"stats are of {count} values per channel, but x has {m}; pass as x the whole batch that they are of, "
                "or with a part of it sums=, merged from the batch_norm_backward_sums() of all parts, or "
                "training=False where they are fixed"
            )
        if m > count:
            raise ValueError(f"stats are of {count} values per channel, but x, to be a part of these, has {m}; "
                             "pass the statistics of the whole batch, merged from all of its parts")
    if output is not None:
        residual = output  # in its place: what it tells is all that the residual would be wanted for
    cdef bint to_input = needs & GRAD_INPUT != 0
    cdef bint to_residual = residual is not None and needs & GRAD_RESIDUAL != 0
    cdef bint to_parameters = sums is None and needs & (GRAD_WEIGHT | GRAD_BIAS) != 0
    cdef bint to_sums = needs & GRAD_SUMS != 0
    if activation is None and not to_residual:
        residual = None
    # by fixed statistics grad_input is this alone: grad_output * scale
    cdef bint scaled = to_input and not (training or to_parameters or activation is not None or to_residual)
    cdef cnp.ndarray grad_weight = per_channel(C, cnp.NPY_FLOAT32, m == 0)
    cdef cnp.ndarray grad_bias = per_channel(C, cnp.NPY_FLOAT32, m == 0)
    cdef cnp.ndarray dz = statistic(C, m == 0) if to_sums else None
    cdef cnp.ndarray dz_dev = statistic(C, m == 0) if to_sums else None
    dx = grad_residual = None
    if C * m > 0:
        if weight is not None:
            weight = contiguous(weight)
        if bias is not None:
            bias = contiguous(bias)
        walked = None if scaled else readable(&plan.p, x, ax)
        grad_output = readable(&plan.p, grad_output, ax)
        if residual is not None:
            residual = readable(&plan.p, residual, ax)
    if to_input or to_residual:  # both, where one is not wanted: kernels write both
        if residual is not None:
            grad_residual = writable(&plan.p, None, x, ax)
        dx = writable(&plan.p, out, x, ax)
    if to_sums:
        result = dz, dz_dev, m
    else:
        result = (
            (dx if out is None else given) if to_input else None,
            grad_weight if to_parameters and needs & GRAD_WEIGHT else None,
            grad_bias if to_parameters and needs & GRAD_BIAS else None,
            grad_residual if to_residual else None,
        )
    PASSES = 0
    if C * m == 0 or not (to_input or to_residual or to_parameters or to_sums):
        return result
    if not scaled:
        take(&plan.p.x, &plan.p, walked, ax, "x")
    take(&plan.p.grad_output, &plan.p, grad_output, ax, "grad_output")
    if residual is not None:
        take(&plan.p.residual, &plan.p, residual, ax, "residual")
    if dx is not None:
        take_output(&plan.p.grad_input, &plan.p, dx, out, ax)
        if residual is not None:
            take(&plan.p.grad_residual, &plan.p, grad_residual, ax, "grad_residual")
    else:  # nothing is written, but kernels make addresses of all operands
        plan.sums_only = True
        plan.p.grad_input = plan.p.grad_output
        if residual is not None:
            plan.p.grad_residual = plan.p.grad_output
    if scaled:  # a forward pass: (grad_output - 0) * scale - 0, and -0 stays what it is
        plan.p.x, plan.p.y = plan.p.grad_output, plan.p.grad_input
        memset(&plan.p.grad_output, 0, sizeof(bn_operand))
        memset(&plan.p.grad_input, 0, sizeof(bn_operand))
    plan.weight = take32(weight, C, "weight")
    plan.bias = take32(bias, C, "bias")
    plan.mean = take64(mean, C, "stats.mean")
    plan.var = take64(var, C, "stats.var")
    cdef bint summed = sums is not None and to_input
    if summed:
        plan.dz = take64(sums[0], C, "sums.dz")
        plan.dz_dev = take64(sums[1], C, "sums.dz_dev")
        plan.part = <double> m / <double> count
    elif to_sums:
        plan.dz, plan.dz_dev = data64(dz), data64(dz_dev)
    flatten(&plan.p)
    plan.p.stream = past_cache(&plan.p, plan.threads)
    plan.grad_weight = <float *> cnp.PyArray_DATA(grad_weight)
    plan.grad_bias = <float *> cnp.PyArray_DATA(grad_bias)
    plan.eps = epsilon
    # one pass is all, too, where grad_input is not wanted
    plan.frozen = not (training and to_input) and not plan.sums_only
    allocate_scratch(&plan)
    PASSES = 1
    if scaled:
        coefficients(&plan, 0, C)
        for c in range(plan.width + LINE):
            plan.k.mean[c] = 0.0
            plan.k.shift[c] = -0.0
        run(&plan, elementwise)
    elif summed:
        run(&plan, second_pass_alone)
    else:
        PASSES += second_is_due(&plan)
        run(&plan, two_passes)
    if out is not None and dx is not out:
        out[...] = dx
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
    cdef cnp.ndarray to_mean = running(running_mean, "running_mean"), to_var = running(running_var, "running_var")
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
    K.move_running(&means, batch_mean, finite, 0, C, share, 1.0)
    K.move_running(&variances, batch_var, finite, 0, C, share, unbiasing(values, unbiased))
