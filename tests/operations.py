"""Each operation beside what the oracle says of it, and proof that a call leaves its inputs alone."""

import os
import sys
from contextlib import contextmanager
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import reference
from layouts import arrange

import fastbn
from fastbn import _kernels

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")
SMOOTH = ("hardswish", "silu")  # that round on their way
SLOPE = 0.25
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]  # a program, as two ranks
TORCHRUN += ["--standalone", "--nproc-per-node", "2"]

# How far from the oracle the library may be. Outputs and variances: what it promises.
OUTPUT = 2e-6  # of max(1, |output|), and of what `bias` and residual may have cancelled in it
VARIANCE = 2e-6  # of the variance
MEAN = 1e-6  # of the deviation
ROUNDING = 6e-8  # of a float32
GRADIENT = 5e-7  # of the gradient that reaches it
SMOOTH_GRADIENT = 1e-6  # the same behind a smooth activation, whose derivative has an exponential in it
FLOAT64 = 5e-9  # times all of these, of float64
SUM = 2e-6  # of the sum of the absolute values of its terms


not_sanitized = pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ, reason="the sanitizer takes memory and stacks of its own"
)


@contextmanager
def kernels(isa=None, shared_out=False, streamed=None):
    """The kernels of another instruction set, all work shared out among threads, outputs (not) streamed past
    the cache, by groups of few channels: where by default the best one is taken, and large work is shared out
    and streamed."""
    previous = _kernels.set_isa(isa or _kernels.get_isa())
    if shared_out:
        _kernels.tune(serial=0)
    if streamed is not None:
        _kernels.tune(cache=1 if streamed else 2**62, group=2**17)
    try:
        yield
    finally:
        _kernels.set_isa(previous)
        if shared_out:
            _kernels.tune(serial=65536)
        if streamed is not None:
            _kernels.tune(cache=0, group=0)


def call(function, *args, writes=(), **kwargs):
    """function(*args, **kwargs), and proof of what it wrote.

    That is nothing but `out` and the arrays in `writes`, not even between their elements; and if the call
    raises, nothing at all. All memory that the arguments are views of is compared byte by byte.
    """
    arguments = [*args, *kwargs.values()]
    of_stats = [v for a in arguments if isinstance(a, fastbn.BatchStats) for v in (a.mean, a.var)]
    of_sums = [v for a in arguments if isinstance(a, fastbn.GradSums) for v in (a.dz, a.dz_dev)]
    arrays = [*arguments, *of_stats, *of_sums]
    arrays = [a for a in arrays if isinstance(a, np.ndarray)]
    before = [(memory, memory.tobytes()) for memory in map(memory_of, arrays)]
    if isinstance(kwargs.get("out"), np.ndarray):
        writes = (*writes, kwargs["out"])
    old = [w.copy() for w in writes]
    try:
        result = function(*args, **kwargs)
    except Exception:
        assert_unchanged(before)
        raise
    new = [w.copy() for w in writes]
    for w, value in zip(writes, old, strict=True):
        w[...] = value
    assert_unchanged(before)
    for w, value in zip(writes, new, strict=True):
        w[...] = value
    return result


def memory_of(array):
    """The array that owns the memory of a view, or as close to it as NumPy tells."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def assert_unchanged(before):
    for memory, content in before:
        assert memory.tobytes() == content, "an array was written that must not be"


class Problem(NamedTuple):
    """All that the operations need, with the channels on `axis`."""

    x: np.ndarray
    grad_output: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    axis: int
    mask: np.ndarray | None = None
    mask_output: bool = False


def problem(shape, axis=1, offset=0.0, seed=0, dtype="float32", **layouts):
    """Normal data with a mean and a deviation of its own in each channel.

    `shape` is (N, C, ...) wherever the channels go. `layouts` are those of x, grad_output and residual where
    they are not contiguous, `dtype` is theirs.
    """
    rng = np.random.default_rng(seed)
    C = shape[1]
    at = (1, C) + (1,) * (len(shape) - 2)
    mean, deviation = rng.uniform(-1, 1, C), rng.uniform(0.5, 1.5, C)

    def operand(name, values):
        return arrange(np.moveaxis(values, 1, axis), layouts.get(name, "contiguous"), axis, DTYPES[dtype])

    def parameter(values):
        return values.astype(np.float64 if dtype == "float64" else np.float32)

    return Problem(
        x=operand("x", rng.standard_normal(shape) * deviation.reshape(at) + mean.reshape(at) + offset),
        grad_output=operand("grad_output", rng.standard_normal(shape)),
        residual=operand("residual", rng.standard_normal(shape)),
        weight=parameter(rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C)),
        bias=parameter(rng.uniform(-1, 1, C)),
        running_mean=parameter(mean + offset + rng.uniform(-0.1, 0.1, C)),
        running_var=parameter(np.square(deviation * rng.uniform(0.9, 1.1, C))),
        axis=axis,
    )


OPERATIONS = (
    "batch_stats", "forward", "forward_given_stats", "training", "inference", "backward", "frozen_backward",
    "backward_by_sums",
)  # fmt: skip
UNFUSED = ("batch_stats",)  # operations that take no activation and no residual


def run(operation, p, activation=None, add=False, out=None, num_threads=None, needs=None):
    """What the operation gives, by name. `add` adds p.residual, `needs` is of the backward pass."""
    common = {"axis": p.axis, "num_threads": num_threads}
    if p.mask is not None:
        common["mask"] = p.mask
    if operation == "batch_stats":
        stats = call(fastbn.batch_stats, p.x, **common)
        return {"mean": stats.mean, "var": stats.var, "count": stats.count}
    common |= {
        "residual": p.residual if add else None,
        "activation": activation,
        "negative_slope": SLOPE,
        "out": out,
    }
    if p.mask is not None:
        common["mask_output"] = p.mask_output
    if operation == "forward":
        y, stats = call(fastbn.batch_norm_forward, p.x, p.weight, p.bias, **common)
        return {"y": y, "mean": stats.mean, "var": stats.var, "count": stats.count}
    if operation == "forward_given_stats":
        given = running_stats(p)
        y, stats = call(fastbn.batch_norm_forward, p.x, p.weight, p.bias, stats=given, **common)
        assert stats is given
        return {"y": y}
    if operation == "training":
        running = p.running_mean.copy(), p.running_var.copy()
        y = call(fastbn.batch_norm, p.x, *running, p.weight, p.bias, True, writes=running, **common)
        return {"y": y, "running_mean": running[0], "running_var": running[1]}
    if operation == "inference":
        return {"y": call(fastbn.batch_norm, p.x, p.running_mean, p.running_var, p.weight, p.bias, **common)}
    training = operation != "frozen_backward"
    stats = fastbn.batch_stats(p.x, axis=p.axis, mask=p.mask) if training else running_stats(p)
    if operation == "backward_by_sums":
        common |= sums_and_output(p, stats, common, add)
    if needs is not None:
        common["needs"] = needs
    grads = call(
        fastbn.batch_norm_backward, p.grad_output, p.x, stats, p.weight, p.bias, training=training, **common
    )
    assert (grads.grad_residual is None) == (not add or (needs is not None and "residual" not in needs))
    return {name: grad for name, grad in grads._asdict().items() if grad is not None}


def sums_and_output(p, stats, options, add):
    """What the second half of the backward pass takes: sums, and if it can be the output for the residual."""
    options = {name: value for name, value in options.items() if name != "out"}
    output = {}
    if options["activation"] is not None and options["activation"] not in SMOOTH:
        y, _ = fastbn.batch_norm_forward(p.x, p.weight, p.bias, stats=stats, **options)
        output = {"output": y, "residual": None}
    sums = call(
        fastbn.batch_norm_backward_sums, p.grad_output, p.x, stats, p.weight, p.bias, **options | output
    )
    return output | {"sums": sums, "needs": ("input", "weight", "bias", "residual")[: 3 + add]}


def output_at(place, p):
    """Memory for an output that begins as many bytes behind the beginning of a page as `place` does."""
    memory = np.full(p.x.nbytes + 4096, 255, np.uint8)  # NaN
    return np.ndarray(p.x.shape, p.x.dtype, memory, (place - memory.ctypes.data) % 4096)


def running_stats(p):
    """The running statistics as if they were those of a batch."""
    return fastbn.BatchStats(p.running_mean, p.running_var, p.x.size // max(1, p.weight.size))


def expect(operation, p, activation=None, add=False):
    """What the oracle gives for :func:`run`: by name the value, and how far from it a result may be."""
    x, finer = reference.exact(p.x), 1.0
    if p.x.dtype == np.float64:
        x, finer = p.x.astype(np.longdouble), FLOAT64
    mean, var, count = reference.batch_stats(x, p.axis, p.mask)
    batch = operation not in ("forward_given_stats", "inference", "frozen_backward")
    nothing = p.mask is not None and count == 0 and batch
    if nothing:  # then x does not matter
        x = np.zeros_like(x)
    deviation = np.sqrt(var)
    stats = {
        "mean": (mean, finer * MEAN * deviation + max(1e-12 * finer, 3e-16) * abs(mean)),
        "var": (var, finer * VARIANCE * var),
        "count": (count, 0),
    }
    if operation == "batch_stats":
        return stats
    given = (p.running_mean, p.running_var)
    parameters = {"weight": p.weight, "bias": p.bias, "axis": p.axis, "residual": p.residual if add else None}
    activation = {"activation": activation, "negative_slope": SLOPE}
    if "backward" in operation:
        training = operation != "frozen_backward"
        if training:
            given = (stats := fastbn.batch_stats(p.x, axis=p.axis, mask=p.mask)).mean, stats.var
        # The kinks are seen where the library's forward pass, which has its own tests, sees them.
        options = {"axis": p.axis, "residual": parameters["residual"]}
        as_stats = fastbn.BatchStats(*given, count)
        z = fastbn.batch_norm_forward(
            x.astype(p.x.dtype) if nothing else p.x, p.weight, p.bias, stats=as_stats, **options
        )[0]
        grads = reference.backward(
            p.grad_output, x, *given, **parameters, training=training, **activation, z=z,
            mask=p.mask, mask_output=p.mask_output,
        )  # fmt: skip
        # smooth activations round what reaches them, others pass it on or do not
        smooth = activation["activation"] in SMOOTH
        g = finer * abs(np.asarray(p.grad_output, np.float64) if smooth else grads[3])
        xhat = abs(reference.normalize(x, *given, axis=p.axis))
        other = reference.others(x, p.axis)
        sums = [v.sum(other) for v in (g * xhat, g)]
        bound = (SMOOTH_GRADIENT if smooth else GRADIENT) * g
        if training and count:
            means = [reference.column(v, x.ndim, p.axis) / count for v in sums]
            bound = bound + SUM * (xhat * means[0] + means[1])
        scale = abs(p.weight) * reference.inverse_deviation(given[1], 1e-5)
        bounds = (
            reference.column(scale, x.ndim, p.axis) * bound,
            SUM * sums[0],
            SUM * sums[1],
            (SMOOTH_GRADIENT if smooth else ROUNDING) * g,
        )
        named = dict(zip(fastbn.BatchNormGrads._fields, zip(grads, bounds, strict=True), strict=True))
        if not add:
            del named["grad_residual"]
        return named
    if operation in ("forward", "training"):
        given = mean, var
    output = p.mask if p.mask_output else None
    y = reference.forward(x, *given, **parameters, **activation, mask=output)
    scaled = reference.forward(x, *given, weight=p.weight, axis=p.axis)
    result = {"y": (y, finer * near(np.maximum(abs(y), abs(scaled))))}
    if operation == "forward":
        result |= stats
    if operation == "training":
        running = reference.update_running(p.running_mean, p.running_var, mean, var, count)
        result["running_mean"] = running[0], finer * (2 * ROUNDING * abs(running[0]) + 0.1 * MEAN * deviation)
        result["running_var"] = running[1], finer * (2 * ROUNDING * running[1] + 0.1 * VARIANCE * var)
    return result


def near(expected):
    return OUTPUT * np.maximum(1, abs(expected))


def assert_within(actual, expected, bound, name="result"):
    error = abs(reference.exact(actual) - expected)
    if not np.all(error <= bound):
        worst = np.unravel_index(np.argmax(error - bound), np.shape(error))
        limit = np.broadcast_to(bound, np.shape(error))[worst]
        raise AssertionError(
            f"{name}{list(map(int, worst))} is {np.asarray(actual)[worst]!r}, the oracle says "
            f"{np.asarray(expected)[worst]!r}: off by {error[worst]:.3g}, more than {limit:.3g}; "
            f"{np.count_nonzero(~(error <= bound))} of {error.size} values are"
        )


def check(operation, p, activation=None, add=False, out=None, num_threads=None):
    """Run an operation against the oracle, of halves that of float32; returns its results."""
    results = run(operation, p, activation, add, out, num_threads)
    if p.x.dtype.itemsize == 2:
        wide = p._replace(**{name: widened(getattr(p, name)) for name in Problem._fields[:3]})
        check(operation, wide, activation, add, num_threads=num_threads)
        assert_same_bits(
            results, rounded(run(operation, wide, activation, add), p), f"{operation} {activation}"
        )
        return results
    for name, (expected, bound) in expect(operation, p, activation, add).items():
        assert np.shape(results[name]) == np.shape(expected), name
        assert_within(results[name], expected, bound, f"{operation} {activation} {add}: {name}")
    for name, value in results.items():
        if name in ("mean", "var"):
            assert value.dtype == np.float64
        elif name != "count":
            assert value.dtype == p.x.dtype
    if out is not None:
        assert results.get("y", results.get("grad_input")) is out
    return results


def widened(a):
    """In float32, as aligned and with the same strides in elements: tiles depend on the layout."""
    steps = [stride // a.itemsize for stride in a.strides]
    low, high = (sum(f(0, s * (n - 1)) for s, n in zip(steps, a.shape, strict=True)) for f in (min, max))
    memory = np.zeros(4 * (high - low + 2), np.uint8)
    begin = -4 * low + (not a.flags.aligned)
    view = np.ndarray(a.shape, np.float32, memory, begin, [4 * s for s in steps])
    view[...] = a
    return view


def rounded(results, p):
    """What half elements are to give, from what float32 gives of them, widened: each value rounded once."""
    elements = "y", "grad_input", "grad_residual"
    with np.errstate(over="ignore"):
        return {k: v.astype(p.x.dtype) if k in elements else v for k, v in results.items()}


def assert_same_bits(results, others, what=""):
    assert results.keys() == others.keys()
    for name in results:
        a, b = np.asarray(results[name]), np.asarray(others[name])
        assert a.shape == b.shape, (what, name)
        assert a.tobytes() == b.tobytes(), f"{what}: {name} differs in {np.count_nonzero(a != b)} of {a.size}"
