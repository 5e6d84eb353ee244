"""What is refused: the right exception, a message that names the argument, and nothing written before it.

That nothing is written is proven by `call`, which compares all memory behind all arguments, `out` and the
running statistics too, whenever the call raises.
"""

import math
import pickle
import re

import numpy as np
import pytest
from operations import assert_same_bits, call, problem

import fastbn
from fastbn import BatchNorm, BatchStats, FrozenBatchNorm

N, C, L = SHAPE = (4, 5, 6)


def arguments(operation):
    """The operation, and a fresh valid set of all arrays and options that it takes by keyword."""
    p = problem(SHAPE)
    x = {"x": p.x, "axis": 1, "num_threads": None}
    operands = {"x": p.x, "residual": p.residual, "out": np.full(SHAPE, 9, np.float32)}
    running = {"running_mean": p.running_mean, "running_var": p.running_var}
    affine = {"weight": p.weight, "bias": p.bias, "eps": 1e-5}
    options = {"activation": "relu", "negative_slope": 0.1}
    stats = {"stats": BatchStats(p.running_mean, p.running_var, N * L)}
    forward = x | operands | affine | options
    backward = forward | stats | {"grad_output": p.grad_output}
    by_output = backward | {"output": p.residual.copy()}
    sums = {"sums": fastbn.GradSums(np.ones(C), np.ones(C), N * L)}
    return {
        "batch_stats": (fastbn.batch_stats, x),
        "inference": (fastbn.batch_norm, forward | running),
        "training": (fastbn.batch_norm, forward | running | {"training": True, "momentum": 0.1}),
        "batch_norm_forward": (fastbn.batch_norm_forward, forward),
        "given_stats": (fastbn.batch_norm_forward, forward | stats),
        "backward": (fastbn.batch_norm_backward, backward),
        "frozen_backward": (fastbn.batch_norm_backward, backward | {"training": False}),
        "backward_sums": (
            fastbn.batch_norm_backward_sums,
            {k: v for k, v in by_output.items() if k != "out"},
        ),
        "backward_by_sums": (fastbn.batch_norm_backward, by_output | sums),
        "update_running": (fastbn.update_running, running | stats | {"momentum": 0.1}),
        "FrozenBatchNorm": (FrozenBatchNorm, running | affine | options | {"axis": 1}),
        "frozen": (FrozenBatchNorm(**running, **affine), operands | {"num_threads": None}),
        "layer in training": (BatchNorm(C), operands),
        "layer in evaluation": (BatchNorm(C).eval(), operands),
    }[operation]


OPERATIONS = (
    "batch_stats", "inference", "training", "batch_norm_forward", "given_stats", "backward",
    "frozen_backward", "backward_sums", "backward_by_sums", "update_running", "FrozenBatchNorm", "frozen",
    "layer in training", "layer in evaluation",
)  # fmt: skip
ARRAYS = [(o, name) for o in OPERATIONS for name, a in arguments(o)[1].items() if isinstance(a, np.ndarray)]
REQUIRED = ("x", "grad_output")  # None is fine for all other arrays, or for both of a pair
VECTORS = ("weight", "bias", "running_mean", "running_var")


def takes(*names):
    """The operations that take one of these arguments, each with that argument."""
    pairs = [(o, name) for o in OPERATIONS for name in arguments(o)[1] if name in names]
    return pytest.mark.parametrize(("operation", "name"), pairs)


def refuses(operation, error, message, **changes):
    """The operation with these arguments raises, with a message that all of these patterns are found in."""
    function, given = arguments(operation)
    state_dict = getattr(function, "state_dict", dict)
    before = state_dict()
    with pytest.raises(error) as caught:
        call(function, **given | changes)
    for pattern in [message] if isinstance(message, str) else message:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    assert_same_bits(state_dict(), before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_valid_arguments_are_valid(operation):
    function, given = arguments(operation)
    writes = [given[n] for n in VECTORS[2:] if n in given and operation in ("training", "update_running")]
    call(function, **given, writes=writes)


# What is not an array of floats


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
@pytest.mark.parametrize("dtype", [">f4", ">f8", "f16", "i4", "i8", "u1", "?", "c8", "O", "S4", "M8[s]"])
def test_another_dtype(operation, name, dtype):  # case 15
    wrong = np.ones(arguments(operation)[1][name].shape).astype(dtype)
    kind = str(np.dtype(dtype))
    refuses(
        operation,
        TypeError,
        [rf"\b{name}\b", "float32", re.escape(kind), r"convert it|pass"],
        **{name: wrong},
    )


@pytest.mark.parametrize(("operation", "name"), [a for a in ARRAYS if a[1] != "x"])
@pytest.mark.parametrize("dtype", ["f8", "f2"])
def test_a_dtype_that_is_not_that_of_x(operation, name, dtype):
    wrong = np.ones(arguments(operation)[1][name].shape).astype(dtype)
    moved = operation in ("training", "update_running") and name.startswith("running")
    if name in VECTORS and dtype == "f2" and not moved:
        return  # widened
    if name in VECTORS and operation == "FrozenBatchNorm":
        return  # tells what the layer computes in, or is of the averages before they were rounded
    kind = str(np.dtype(dtype))
    refuses(operation, TypeError, [rf"\b{name}\b|running", "float32", kind, "convert|pass"], **{name: wrong})


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
@pytest.mark.parametrize(
    "wrong", [[[1.0] * 5] * 4, (1.0,), 1.0, "x", memoryview(b"abcd")], ids=lambda w: type(w).__name__
)
def test_another_type(operation, name, wrong):  # case 15
    refuses(operation, TypeError, [rf"\b{name}\b", "float32", type(wrong).__name__], **{name: wrong})


@takes(*REQUIRED)
def test_none_for_an_array(operation, name):  # case 15
    refuses(operation, TypeError, [rf"\b{name}\b", "NoneType"], **{name: None})


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_masked_arrays_would_lose_their_mask(operation, name):
    array = arguments(operation)[1][name]
    refuses(operation, TypeError, [rf"\b{name}\b", "mask"], **{name: np.ma.masked_array(array, array > 0)})


# Shapes and lengths


@takes(*VECTORS)
@pytest.mark.parametrize("shape", [(0,), (1,), (C - 1,), (C + 1,), (), (1, C), (C, 1)], ids=str)
def test_vectors_of_another_length(operation, name, shape):  # case 7
    if operation == "FrozenBatchNorm" and name == "running_mean" and len(shape) == 1:
        name_of_what_does_not_fit = "running_var"  # the channels are counted in running_mean
    else:
        name_of_what_does_not_fit = name
    expected = [rf"\b{name_of_what_does_not_fit}\b", rf"\({C},\)|shape"]
    refuses(operation, ValueError, expected, **{name: np.ones(shape, np.float32)})


@takes("residual", "grad_output", "output", "out")
@pytest.mark.parametrize(
    "shape", [(C,), (N, C), (N, C, 1), (N, C, L + 1), (N, L, C), (N, C, L, 1), (0, C, L)], ids=str
)
def test_operands_of_another_shape(operation, name, shape):  # case 7
    expected = [rf"\b{name}\b", re.escape(str(SHAPE)), re.escape(str(shape))]
    refuses(operation, ValueError, expected, **{name: np.ones(shape, np.float32)})


@takes("x")
def test_x_of_less_than_two_dimensions(operation, name):  # case 7
    for shape in (), (C,):
        refuses(operation, ValueError, [r"\bx\b", "at least 2 dimensions", re.escape(str(shape))],
                x=np.ones(shape, np.float32))  # fmt: skip


@pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o not in ("batch_stats", "update_running", "FrozenBatchNorm")]
)
def test_x_of_other_channels(operation):  # case 7
    """Then the vectors do not fit, or x does not: whatever is named, both numbers are told."""
    for channels in 1, C - 1, C + 1, 0:
        shape = (N, channels, L)
        changes = {
            name: np.ones(shape, np.float32) for name in ("x", "residual", "grad_output", "output", "out")
        }
        changes = {k: v for k, v in changes.items() if k in arguments(operation)[1]}
        refuses(operation, ValueError, [str(C), str(channels)], **changes)


def test_stats_of_other_channels():
    for operation in "given_stats", "backward", "frozen_backward":
        other = BatchStats(np.zeros(C - 1), np.ones(C - 1), 3)
        refuses(operation, ValueError, [r"\bstats\b", str(C), str(C - 1)], stats=other)
    refuses("update_running", ValueError, [r"running_mean", r"\(4,\)"], stats=other)


@pytest.mark.parametrize("operation", ["given_stats", "backward", "frozen_backward", "update_running"])
@pytest.mark.parametrize(
    "wrong", [(np.zeros(C), np.ones(C), 4), "stats", 1.0], ids=lambda w: type(w).__name__
)
def test_stats_of_another_type(operation, wrong):
    refuses(operation, TypeError, [r"\bstats\b", "BatchStats", type(wrong).__name__], stats=wrong)


def test_stats_are_needed():
    for operation in "backward", "frozen_backward", "update_running":
        refuses(operation, TypeError, r"\bstats\b", stats=None)


# Running statistics


@pytest.mark.parametrize("operation", ["training", "inference"])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_only_one_of_the_running_statistics(operation, missing):  # case 7
    refuses(operation, ValueError, ["running_mean", "running_var", f"{missing} is None"], **{missing: None})


def test_no_running_statistics_in_inference():
    refuses(
        "inference",
        ValueError,
        ["running_mean", "running_var", "training"],
        running_mean=None,
        running_var=None,
    )


@pytest.mark.parametrize("operation", ["training", "update_running"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_read_only_running_statistics(operation, name):  # case 13
    array = np.ones(C, np.float32)
    array.setflags(write=False)
    refuses(operation, ValueError, [name, "read-only"], **{name: array})


@takes("momentum")
@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf, -0.1, 1.5, 99, math.nextafter(1, 2)])
def test_senseless_momentum(operation, name, momentum):  # case 36
    refuses(operation, ValueError, ["momentum", r"\[0, 1\]", str(momentum)], momentum=momentum)


@pytest.mark.parametrize("momentum", [0, 1, 0.0, 1.0])
def test_momentum_of_nothing_and_of_all(momentum):  # case 36
    stats = BatchStats([3, 4], [5, 6], 10)
    running = np.ones(2, np.float32), np.ones(2, np.float32)
    fastbn.update_running(*running, stats, momentum, unbiased=False)
    assert [r.tolist() for r in running] == ([[3, 4], [5, 6]] if momentum else [[1, 1], [1, 1]])


SHARED = np.ones(2 * N * C * L, np.float32)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (r, o)
        for r in VECTORS[2:]
        for o in ("x", "weight", "bias", "residual", "out", "running_mean")
        if r != o
    ],
)
def test_running_statistics_that_overlap(name, other):
    """Another array, by one value, in no order that a stride could tell."""
    shape = arguments("training")[1][other].shape
    view = SHARED[C - 1 : C - 1 + math.prod(shape)].reshape(shape)
    refuses(
        "training",
        ValueError,
        [rf"\b{name}\b", "overlaps", rf"\b{other}\b"],
        **{name: SHARED[:C], other: view},
    )
    if other == "running_mean":
        refuses("update_running", ValueError, [name, "overlaps", other], **{name: SHARED[:C], other: view})


@pytest.mark.parametrize("operation", ["training", "update_running"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_of_one_value_for_all_channels(operation, name):
    stretched = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (C,), (0,))
    refuses(operation, ValueError, [name, "share memory"], **{name: stretched})


@pytest.mark.parametrize("operation", ["inference", "FrozenBatchNorm", "layer in evaluation"])
@pytest.mark.parametrize("variance", [-0.5, -np.inf, -1.1e-5])
def test_variance_below_zero(operation, variance):  # case 35
    function, given = arguments(operation)
    var = np.ones(C, np.float32)
    var[3] = variance
    expected = [r"running_var\[3\] \+ eps must be >= 0, got " + re.escape(str(var[3])) + r" \+ 1e-05"]
    if operation == "layer in evaluation":
        function.running_var[...] = var
        with pytest.raises(ValueError, match=expected[0]):
            function(**given)
        return
    refuses(operation, ValueError, expected, running_var=var)
    # once in float64, too: a gap between values is copied away
    refuses(operation, ValueError, expected, running_var=np.repeat(var, 2)[::2])


def test_variance_that_eps_brings_above_zero():  # case 35
    x = np.array([[1], [2]], np.float32)
    mean, var = np.zeros(1, np.float32), np.array([-9.99e-6], np.float32)
    expected = (x / np.sqrt(var.astype(np.float64) + 1e-5)).astype(np.float32)
    for y in fastbn.batch_norm(x, mean, var), FrozenBatchNorm(mean, var)(x):
        np.testing.assert_allclose(y, expected, rtol=2.4e-7)


def test_frozen_without_running_statistics():
    ones = np.ones(3, np.float32)
    for running in (ones, None), (None, ones), (None, None):
        with pytest.raises(TypeError, match=r"running_(mean|var) must be .* got NoneType; pass an array"):
            FrozenBatchNorm(*running)


# Statistics that are given


class Meddled(BatchStats):
    """Of a class that keeps nobody from changing it."""

    __slots__ = ()
    __setattr__ = object.__setattr__


def resized(name):
    array = np.ones(C)
    stats = Meddled(np.ones(C), np.ones(C), N * L)
    setattr(stats, name, array)
    del array
    getattr(stats, name).resize(1, refcheck=False)
    return stats


def replaced(name, value):
    stats = Meddled(np.ones(C), np.ones(C), N * L)
    setattr(stats, name, value)
    return stats


@pytest.mark.parametrize("operation", ["given_stats", "backward", "frozen_backward", "update_running"])
@pytest.mark.parametrize("name", ["mean", "var"])
def test_stats_that_were_changed(operation, name):
    wide = np.ones(2 * C)
    odd = np.ndarray(C, np.float64, np.ones(8 * C + 8, np.uint8), 4 if C else 0)
    refuses(operation, ValueError, "stats|running_mean", stats=resized(name))
    for wrong in np.ones((C, 1)), np.ones(C - 1), np.array(1.0), wide[::2], odd[::-1]:
        refuses(operation, ValueError, "stats|running_mean", stats=replaced(name, wrong))
    for wrong in np.ones(C, np.float32), np.ones(C, ">f8"), [1.0] * C, None:
        refuses(operation, TypeError, [rf"stats\.{name} must be a float64"], stats=replaced(name, wrong))


def test_count_that_was_changed():
    for wrong in "24", None, 24.0:
        refuses("update_running", TypeError, ["count must be an int"], stats=replaced("count", wrong))


@pytest.mark.parametrize("count", [1, N * L - 1, N * L + 1, 3 * N * L, 2**64])
def test_stats_of_another_count(count):  # case 29
    stats = BatchStats(np.zeros(C), np.ones(C), count)
    expected = [r"\bstats\b", rf"\b{count} values", rf"\b{N * L}\b", "whole batch", "sums=", "training=False"]
    refuses("backward", ValueError, expected, stats=stats)
    for operation in "frozen_backward", "given_stats":
        function, given = arguments(operation)
        call(function, **given | {"stats": stats})


def test_half_of_a_batch_is_refused():  # case 29
    """The statistics of a whole batch, and of it one part: no gradient rather than a wrong one."""
    p = problem((8, C, L))
    stats = fastbn.batch_stats(p.x[:4]) + fastbn.batch_stats(p.x[4:])
    fastbn.batch_norm_backward(p.grad_output, p.x, stats)
    with pytest.raises(ValueError, match=r"48 values per channel, but x has 24"):
        fastbn.batch_norm_backward(p.grad_output[:4], p.x[:4], stats)


@pytest.mark.parametrize("count", [2**63 - 1, 2**63, 2**64, 10**400])
def test_counts_beyond_64_bits(count):
    stats = BatchStats([1.0] * C, [2.0] * C, count)
    running = np.zeros(C, np.float32), np.zeros(C, np.float32)
    fastbn.update_running(*running, stats, 0.5)
    assert [r.tolist() for r in running] == [[0.5] * C, [1] * C]
    merged = stats + stats
    assert (merged.count, merged.var.tolist()) == (2 * count, [2] * C)
    assert pickle.loads(pickle.dumps(stats)) == stats


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1), (1, C, 1, 1)], ids=str)
def test_one_value_per_channel_in_training(shape):  # case 5
    """For layers too, whose counter and averages stay; statistics alone are fine."""
    x = np.ones(shape, np.float32)
    expected = ["more than 1 value per channel", re.escape(str(shape))]
    for operation in "training", "batch_norm_forward", "layer in training":
        refuses(operation, ValueError, expected, x=x, residual=x.copy(), out=x.copy())
    refuses(
        "training", ValueError, expected, x=x, residual=None, out=None, running_mean=None, running_var=None
    )
    stats = fastbn.batch_stats(x)
    assert (stats.mean.tolist(), stats.var.tolist(), stats.count) == ([1] * C, [0] * C, 1)
    for operation in "inference", "given_stats", "layer in evaluation":
        function, given = arguments(operation)
        assert call(function, **given | {"x": x, "residual": None, "out": x.copy()}) is not None


# Options


@takes("eps")
@pytest.mark.parametrize("eps", [-1e-5, -np.inf, np.inf, np.nan])
def test_senseless_eps(operation, name, eps):  # case 20
    refuses(operation, ValueError, [r"\beps\b", str(eps)], eps=eps)


@takes("activation")
@pytest.mark.parametrize("activation", ["gelu", "ReLU", "", 1, b"relu"])
def test_unknown_activation(operation, name, activation):
    refuses(
        operation, ValueError, ["activation", "relu6", re.escape(repr(activation))], activation=activation
    )


@takes("negative_slope")
@pytest.mark.parametrize("slope", [np.nan, np.inf, 1e300, -1e39])
def test_senseless_slope(operation, name, slope):
    refuses(operation, ValueError, ["negative_slope", re.escape(str(slope))], negative_slope=slope)


@takes("num_threads")
@pytest.mark.parametrize("number", [0, -1, 1025, 10**6, 2**63, -(2**70)])
def test_senseless_number_of_threads(operation, name, number):
    refuses(operation, ValueError, ["num_threads", str(number)], num_threads=number)


@takes("num_threads")
@pytest.mark.parametrize("number", [1.5, "2", [2], True, np.ones(2, int)], ids=str)
def test_number_of_threads_of_another_type(operation, name, number):
    refuses(operation, TypeError, ["num_threads", re.escape(repr(number))], num_threads=number)


@pytest.mark.parametrize(
    "operation", ["batch_stats", "inference", "training", "batch_norm_forward", "backward"]
)
def test_no_such_axis(operation):
    for axis in 3, -4, 2**40, 2**70, -(2**70):
        refuses(operation, ValueError, ["axis", str(axis)], axis=axis)
    for axis in 1.0, "1", None, True:
        refuses(operation, TypeError, ["axis", re.escape(repr(axis))], axis=axis)


def test_axis_of_frozen():
    for axis in 1.0, "1", None, True:
        refuses("FrozenBatchNorm", TypeError, ["axis", re.escape(repr(axis))], axis=axis)
    refuses("FrozenBatchNorm", ValueError, ["axis", str(2**70)], axis=2**70)


@takes("eps", "momentum", "negative_slope")
@pytest.mark.parametrize("wrong", ["1e-5", None, 1j, [0.1]], ids=repr)
def test_numbers_of_another_type(operation, name, wrong):  # case 43
    refuses(operation, TypeError, [rf"\b{name} must be a number", re.escape(repr(wrong))], **{name: wrong})


@takes("eps", "momentum", "negative_slope")
def test_numbers_beyond_floats(operation, name):
    refuses(operation, ValueError, name, **{name: 10**400})


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "operation",
    ["inference", "training", "batch_norm_forward", "frozen", "layer in training", "layer in evaluation"],
)
def test_channels_that_come_last(operation, shape):  # case 42
    expected = [re.escape(str(shape)), "axis=-1"]
    refuses(operation, ValueError, expected, x=np.ones(shape, np.float32), residual=None, out=None)
    other = (*shape[:-1], C + 2)
    with pytest.raises(AssertionError):  # what fits nowhere gets no such advice
        refuses(operation, ValueError, expected, x=np.ones(other, np.float32), residual=None, out=None)


# out


def overlapping(other):
    """An array of SHAPE that begins in the middle of the memory of `other`."""
    memory = np.zeros(2 * N * C * L + other.size, np.float32)
    view = memory[: other.size].reshape(other.shape)
    view[...] = other
    start = other.size // 2
    return view, memory[start : start + N * C * L].reshape(SHAPE)


@pytest.mark.parametrize(
    ("operation", "name"),
    [(o, name) for o, name in ARRAYS if name != "out" and "out" in arguments(o)[1]],
)
def test_out_overlaps_an_input(operation, name):  # case 12
    view, out = overlapping(arguments(operation)[1][name])
    refuses(operation, ValueError, [r"\bout\b", "overlap", rf"\b{name}\b"], **{name: view, "out": out})


@pytest.mark.parametrize("operation", ["backward", "frozen_backward"])
@pytest.mark.parametrize("name", ["x", "grad_output", "residual"])
def test_out_of_backward_is_an_input(operation, name):
    refuses(
        operation,
        ValueError,
        [r"\bout\b", rf"\b{name}\b"],
        out=(array := np.ones(SHAPE, np.float32)),
        **{name: array},
    )


def test_out_is_the_residual():
    for operation in "inference", "training", "frozen", "layer in training", "layer in evaluation":
        array = np.ones(SHAPE, np.float32)
        refuses(operation, ValueError, ["out overlaps residual"], residual=array, out=array)


@takes("out")
def test_out_that_is_x_but_for_its_strides(operation, name):  # case 12
    x = np.ones((5, 5, 5), np.float32)
    residual = np.ones_like(x)
    given = {"x": x, "out": x.transpose(2, 1, 0), "residual": residual}
    if "backward" in operation:
        given["grad_output"] = residual
    if operation == "backward_by_sums":
        given["output"] = residual
    refuses(operation, ValueError, "out overlaps x", **given)


@takes("out")
def test_read_only_out(operation, name):
    out = np.ones(SHAPE, np.float32)
    out.setflags(write=False)
    refuses(operation, ValueError, [r"\bout\b", "read-only"], out=out)


@takes("out")
def test_out_that_overlaps_itself(operation, name):
    memory = np.ones((C, L), np.float32)
    outs = [
        np.lib.stride_tricks.as_strided(memory, SHAPE, (0, 4 * L, 4)),
        np.lib.stride_tricks.as_strided(np.ones(1000, np.float32), SHAPE, (4, 4 * L, 4)),
    ]
    for out in outs:
        refuses(operation, ValueError, [r"\bout\b", "share memory"], out=out)
        if "backward" not in operation:  # nor where it is x itself
            refuses(operation, ValueError, [r"\bout\b", "share memory"], x=out, out=out)


# Arrays that change during the call, by Python code that it runs


class Hook:
    """A number, or an array, that does something to others when it is looked at."""

    def __init__(self, value, action):
        self.value, self.action = value, action

    def look(self):
        self.action()
        return self.value

    __index__ = __float__ = look
    __array_interface__ = property(lambda self: self.look().__array_interface__)


@takes("axis", "num_threads", "eps", "momentum", "negative_slope", "weight", "residual", "running_var", "out")
@pytest.mark.parametrize("shape", [(N, 2 * C, L // 2), (N, C, 1), (1, C, 1), (0, C, L)], ids=str)
def test_x_that_is_resized_during_the_call(operation, name, shape):
    """It is another x then, and either is refused or gives what it gives."""
    function, given = arguments(operation)
    if "x" not in given:
        return
    given |= {k: None for k in ("residual", "out") if k in given and k != name}
    x = given["x"].copy()
    value = {"axis": 1, "num_threads": 1}.get(name, given[name])
    hook = Hook(value, lambda: x.resize(shape, refcheck=False))
    try:
        result = function(**given | {"x": x, name: hook})
    except (ValueError, TypeError, RuntimeError):
        assert x.shape == shape
        return
    expected = function(**arguments(operation)[1] | {k: None for k in given if k in ("residual", "out")}
                        | {"x": x, name: value})  # fmt: skip
    assert pickle.dumps(result) == pickle.dumps(expected)


@pytest.mark.parametrize(
    "operation", ["inference", "training", "batch_norm_forward", "given_stats", "backward"]
)
@pytest.mark.parametrize("name", ["x", "out", "weight"])
def test_array_that_changes_while_others_are_checked(operation, name):
    """Where NumPy is asked whether two arrays share memory, their class has the word."""
    memory = np.ones((6, 6, 6), np.float32)

    class Meddler(np.ndarray):
        def __array_function__(self, function, types, args, kwargs):
            arrays[name].shape = (2, 3) if name == "weight" else (2, 4, 9)
            return False

    arrays = {"x": memory[::3], "out": memory[1::3].view(Meddler), "weight": memory[2, 0]}
    ones = np.ones(6, np.float32)
    given = arguments(operation)[1] | arrays | {"residual": None, "bias": ones}
    given |= {k: ones.copy() for k in ("running_mean", "running_var") if k in given}
    if "stats" in given:
        given["stats"] = BatchStats(np.ones(6), np.ones(6), 12)
    if "grad_output" in given:
        given["grad_output"] = np.ones((2, 6, 6), np.float32)
    with pytest.raises((RuntimeError, ValueError)):
        call(arguments(operation)[0], **given)
    assert (memory == 1).all()


def test_options_beyond_pytorch_are_keyword_only():
    p = problem(SHAPE)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_norm(p.x, p.running_mean, p.running_var, p.weight, p.bias, False, 0.1, 1e-5, 1)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_stats(p.x, 1)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_norm_forward(p.x, p.weight, p.bias, 1e-5, None)
