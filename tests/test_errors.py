"""What is refused: the right exception, a message that names the argument, and nothing written before it.

That nothing is written is proven by `call`, which compares all memory behind all arguments, `out` and the
running statistics too, whenever the call raises.
"""

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
    return {
        "batch_stats": (fastbn.batch_stats, x),
        "inference": (fastbn.batch_norm, forward | running),
        "training": (fastbn.batch_norm, forward | running | {"training": True, "momentum": 0.1}),
        "batch_norm_forward": (fastbn.batch_norm_forward, forward),
        "given_stats": (fastbn.batch_norm_forward, forward | stats),
        "backward": (fastbn.batch_norm_backward, backward),
        "frozen_backward": (fastbn.batch_norm_backward, backward | {"training": False}),
        "update_running": (fastbn.update_running, running | stats | {"momentum": 0.1}),
        "FrozenBatchNorm": (FrozenBatchNorm, running | affine | options | {"axis": 1}),
        "frozen": (FrozenBatchNorm(**running, **affine), operands),
        "layer in training": (BatchNorm(C), operands),
        "layer in evaluation": (BatchNorm(C).eval(), operands),
    }[operation]


OPERATIONS = (
    "batch_stats", "inference", "training", "batch_norm_forward", "given_stats", "backward",
    "frozen_backward", "update_running", "FrozenBatchNorm", "frozen", "layer in training",
    "layer in evaluation",
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


# What is not an array of float32


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
@pytest.mark.parametrize("dtype", [">f4", "f8", "f2", "i4", "i8", "u1", "?", "c8", "O", "S4", "M8[s]"])
def test_another_dtype(operation, name, dtype):  # case 15
    wrong = np.ones(arguments(operation)[1][name].shape).astype(dtype)
    kind = str(np.dtype(dtype))
    refuses(
        operation,
        TypeError,
        [rf"\b{name}\b", "float32", re.escape(kind), r"convert it|pass"],
        **{name: wrong},
    )


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


@takes("residual", "grad_output", "out")
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
        changes = {name: np.ones(shape, np.float32) for name in ("x", "residual", "grad_output", "out")}
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
@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf])
def test_senseless_momentum(operation, name, momentum):
    refuses(operation, ValueError, ["momentum", str(momentum)], momentum=momentum)


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
@pytest.mark.parametrize("slope", [np.nan, np.inf])
def test_senseless_slope(operation, name, slope):
    refuses(operation, ValueError, ["negative_slope", str(slope)], negative_slope=slope)


@takes("num_threads")
@pytest.mark.parametrize("number", [0, -1])
def test_senseless_number_of_threads(operation, name, number):
    refuses(operation, ValueError, ["num_threads", str(number)], num_threads=number)


@takes("num_threads")
@pytest.mark.parametrize("number", [1.5, "2", [2]])
def test_number_of_threads_of_another_type(operation, name, number):
    refuses(operation, TypeError, ["num_threads", re.escape(repr(number))], num_threads=number)


@pytest.mark.parametrize(
    "operation", ["batch_stats", "inference", "training", "batch_norm_forward", "backward"]
)
def test_no_such_axis(operation):
    for axis in 3, -4, 2**40:
        refuses(operation, ValueError, ["axis", str(axis)], axis=axis)
    for axis in 1.0, "1", None:
        refuses(operation, TypeError, ["axis", re.escape(repr(axis))], axis=axis)


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


def test_options_beyond_pytorch_are_keyword_only():
    p = problem(SHAPE)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_norm(p.x, p.running_mean, p.running_var, p.weight, p.bias, False, 0.1, 1e-5, 1)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_stats(p.x, 1)
    with pytest.raises(TypeError, match="positional"):
        fastbn.batch_norm_forward(p.x, p.weight, p.bias, 1e-5, None)
