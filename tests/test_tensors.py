"""The kernels' entry for tensors, which are told by address, shape and strides: as arrays, to the bit."""

import numpy as np
import pytest
from layouts import LAYOUTS
from operations import ACTIVATIONS, SLOPE, assert_same_bits, problem

from fastbn import _kernels

SHAPES = [(4, 5), (64, 256), (3, 5, 7), (2, 6, 4, 3), (3, 1, 5), (2, 3, 1, 1), (2, 3, 2, 3, 2)]
WALKED = ("contiguous", "channels_last", "sliced_batch", "sliced_channels", "second_float", "read_only")
TOLD = [name for name in LAYOUTS if not name.startswith("reversed") and name != "misaligned"]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False])


def told(a):
    """What a tensor tells."""
    if not isinstance(a, np.ndarray):
        return a
    strides = tuple(stride // a.itemsize for stride in a.strides)
    return a.__array_interface__["data"][0], a.dtype, a.shape, strides


def forward(p, training, tell=told, **changes):
    """The arrays that it writes, after the call."""
    C = p.x.shape[1]
    operands = {
        "x": p.x, "y": np.full(p.x.shape, np.nan, np.float32), "residual": p.residual,
        "weight": p.weight, "bias": p.bias,
        "running_mean": p.running_mean.copy(), "running_var": p.running_var.copy(),
        "mean": np.full(C, np.nan), "var": np.full(C, np.nan), "counter": np.array(7),
    }  # fmt: skip
    options = {"momentum": 0.1, "eps": 1e-5, "activation": None, "negative_slope": SLOPE, "num_threads": 2}
    operands |= {name: changes.pop(name) for name in set(changes) & set(operands)}
    options |= changes
    given = {name: tell(a) for name, a in operands.items()}
    _kernels.tensor_forward(*given.values(), training, *options.values())
    written = ("y", "running_mean", "running_var", "mean", "var", "counter")
    return {name: operands[name] for name in written if operands[name] is not None}


def forward_of_arrays(p, training, activation=None, add=True):
    """The same by the ordinary entry."""
    residual = p.residual if add else None
    running = [p.running_mean.copy(), p.running_var.copy()]
    counter = np.array(7)
    how = 1e-5, 1, residual, activation, SLOPE, None, 2
    if training:
        y, mean, var, _ = _kernels.forward(
            p.x, p.weight, p.bias, *how, *running, 0.1, True, True, None, counter
        )
    else:
        y = _kernels.normalize(p.x, *running, False, p.weight, p.bias, *how, None)
        mean, var = (v.astype(np.float64) for v in running)
    names = ("y", "running_mean", "running_var", "mean", "var", "counter")
    return dict(zip(names, (y, *running, mean, var, counter), strict=True))


def assert_same(found, expected):
    assert_same_bits(found, {name: expected[name] for name in found})


@both_modes
@shapes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(shape, activation, training):
    p = problem(shape)
    before = _kernels.calls_by_arrays()
    for tell in told, lambda a: a:
        found = forward(p, training, tell, activation=activation)
        assert_same(found, forward_of_arrays(p, training, activation))
        assert found["counter"] == 7 + training
    found = forward(p, training, residual=None, mean=None, var=None, counter=None)
    assert_same(found, forward_of_arrays(p, training, add=False))
    assert _kernels.calls_by_arrays() == before


@both_modes
@pytest.mark.parametrize("layout", TOLD)
def test_layouts(layout, training):
    """Those that cannot be walked too."""
    for shape in (4, 5), (3, 5, 7), (2, 6, 4, 3):
        p = problem(shape, x=layout, residual=layout)
        y = np.zeros_like(p.x) if layout == "channels_last" else np.zeros(shape, np.float32)
        before = _kernels.calls_by_arrays()
        assert_same(forward(p, training, y=y), forward_of_arrays(p, training))
        if layout in WALKED:
            assert _kernels.calls_by_arrays() == before
        q = p._replace(residual=np.ascontiguousarray(p.residual))
        assert_same(forward(q, training), forward_of_arrays(q, training))
        y = np.asfortranarray(np.zeros(shape, np.float32))
        assert_same(forward(p, training, y=y), forward_of_arrays(p, training))


def backward(p, training, needs="iwbr", tell=told, **changes):
    C = p.x.shape[1]
    mean, var, _ = _kernels.stats(p.x, 1, 1)
    operands = {
        "grad_output": p.grad_output, "x": p.x, "mean": mean, "var": var, "weight": p.weight,
        "bias": p.bias, "residual": p.residual, "output": None,
        "grad_input": np.full(p.x.shape, np.nan, np.float32), "grad_weight": np.full(C, np.nan, np.float32),
        "grad_bias": np.full(C, np.nan, np.float32), "grad_residual": np.full(p.x.shape, np.nan, np.float32),
    }  # fmt: skip
    options = {"eps": 1e-5, "activation": None, "negative_slope": SLOPE, "num_threads": 2}
    operands |= {name: changes.pop(name) for name in set(changes) & set(operands)}
    options |= changes
    for name in list(operands)[-4:]:
        if name[5] not in needs:
            operands[name] = None
    given = {name: tell(a) for name, a in operands.items()}
    _kernels.tensor_backward(*given.values(), training, *options.values())
    return {name: operands[name] for name in list(operands)[-4:] if operands[name] is not None}


def backward_of_arrays(p, training, activation=None, output=None, add=True):
    mean, var, count = _kernels.stats(p.x, 1, 1)
    residual = p.residual if add and output is None else None
    grads = _kernels.backward(
        p.grad_output, p.x, mean, var, count, p.weight, p.bias, 1e-5, training, 1, residual, activation,
        SLOPE, None, 2, None, output,
    )  # fmt: skip
    return dict(zip(("grad_input", "grad_weight", "grad_bias", "grad_residual"), grads, strict=True))


@both_modes
@shapes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(shape, activation, training):
    p = problem(shape)
    expected = backward_of_arrays(p, training, activation)
    before = _kernels.calls_by_arrays()
    for needs in "iwbr", "iwb", "i", "ir", "r", "w", "b", "":
        found = backward(p, training, needs, activation=activation)
        assert [name[5] for name in found] == sorted(needs, key="iwbr".index)
        assert_same(found, expected)
        assert _kernels.calls_by_arrays() == before + (needs == "r")
        before += needs == "r"
    assert_same(backward(p, training, tell=lambda a: a, activation=activation), expected)
    if activation in ("relu", "relu6", "leaky_relu"):
        y = forward(p, True, activation=activation)["y"]
        found = backward(p, training, residual=None, output=y, activation=activation)
        assert_same(found, backward_of_arrays(p, training, activation, y))
    expected = backward_of_arrays(p, training, activation, add=False)
    assert_same(backward(p, training, "iwb", residual=None, activation=activation), expected)


@both_modes
@pytest.mark.parametrize("layout", TOLD)
def test_layouts_backward(layout, training):
    for shape in (4, 5), (3, 5, 7), (2, 6, 4, 3):
        for layouts in {"x": layout}, {"grad_output": layout}, {"x": layout, "grad_output": layout}:
            p = problem(shape, **layouts)
            assert_same(backward(p, training, activation="relu"), backward_of_arrays(p, training, "relu"))


def test_vectors_with_gaps():
    p = problem((4, 5, 3))
    for training in True, False:
        for name in "weight", "bias", "running_mean", "running_var", "mean", "var":
            values = np.repeat(getattr(p, name, np.zeros(5)), 2)[::2]
            before = _kernels.calls_by_arrays()
            assert_same(forward(p, training, **{name: values}), forward_of_arrays(p, training))
            assert _kernels.calls_by_arrays() == before + 1


REFUSED = [
    ({"x": np.zeros(5, np.float32)}, ValueError, "at least 2 dimensions"),
    ({"x": np.zeros((4, 5, 3))}, TypeError, "x must have dtype float32"),
    ({"x": "text"}, TypeError, "expected a tensor"),
    ({"x": (0, "float32", (4, 5, 3), (15, 3, 1))}, ValueError, "must have memory"),
    ({"x": (64, "float32", (4, 5, 3), (15, -3, 1))}, ValueError, "negative size or stride"),
    ({"x": (64, "float32", (4, 5, 3), (15, 3))}, ValueError, "a stride for each dimension"),
    ({"x": (64, "float32", (1,) * 33, (1,) * 33)}, ValueError, "at most 32 dimensions, got 33"),
    ({"y": None}, TypeError, "y must be a tensor"),
    ({"y": np.zeros((4, 3, 5), np.float32)}, ValueError, "out must have the shape"),
    ({"y": np.broadcast_to(np.float32(0), (4, 5, 3))}, ValueError, "share memory"),
    ({"residual": np.zeros((4, 5, 1), np.float32)}, ValueError, "residual must have the shape"),
    ({"weight": np.zeros(4, np.float32)}, ValueError, "weight must have shape"),
    ({"bias": np.zeros(5)}, TypeError, "bias must have dtype float32"),
    ({"running_mean": np.zeros(4, np.float32)}, ValueError, "running_mean must have shape"),
    ({"counter": np.array(2**63 - 1)}, ValueError, "num_batches_tracked must be from 0"),
    ({"counter": np.array(1, np.int32)}, TypeError, "num_batches_tracked must be an int64"),
    ({"eps": -1.0}, ValueError, "eps must be"),
    ({"momentum": 2.0}, ValueError, "momentum must be"),
    ({"activation": "tanh"}, ValueError, "activation must be"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(change, error, text):
    """Nothing is written then."""
    p = problem((4, 5, 3))
    running = [p.running_mean.copy(), p.running_var.copy()]
    y, counter = np.zeros(p.x.shape, np.float32), np.array(7)
    given = {"running_mean": running[0], "running_var": running[1], "y": y, "counter": counter} | change
    with pytest.raises(error, match=text):
        forward(p, True, **given)
    assert np.array_equal(running, [p.running_mean, p.running_var])
    assert not y.any()
    assert counter == 7


def test_one_value_a_channel():
    p = problem((1, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        forward(p, True)
    assert_same(forward(p, False), forward_of_arrays(p, False))


def test_empty():
    p = problem((0, 5, 3))
    found = forward(p, True)
    assert found["y"].shape == (0, 5, 3)
    assert np.array_equal(found["running_mean"], p.running_mean)
    grads = backward(p, True)
    assert not grads["grad_weight"].any()
    assert not grads["grad_bias"].any()


def test_overlaps_are_refused():
    """By the checks for arrays."""
    p = problem((4, 5, 3))
    memory = np.zeros(80, np.float32)
    x, y = memory[:60].reshape(4, 5, 3), memory[20:].reshape(4, 5, 3)
    with pytest.raises(ValueError, match="out overlaps x"):
        forward(p._replace(x=x), True, y=y)
    with pytest.raises(ValueError, match="running_mean overlaps"):
        forward(p, True, weight=memory[:5], running_mean=memory[4:9])
    with pytest.raises(ValueError, match="out overlaps grad_output"):
        backward(p._replace(grad_output=x), True, grad_input=y)


def test_kept_like():
    for a in np.zeros((256, 300), np.float32), np.zeros((300, 256), np.float32).T:
        like = _kernels.kept_like(told(a))
        assert (like.shape, like.strides, like.dtype) == (a.shape, a.strides, a.dtype)
