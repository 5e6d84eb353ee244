"""Backward operations against the oracle, and against finite differences of the forward pass."""

import numpy as np
import pytest
import reference
from operations import ACTIVATIONS, SLOPE, SMOOTH, assert_same_bits, assert_within, call, check, problem, run
from test_forward import KINKS, both_axes, ranks, shape_of, sizes

import fastbn

BACKWARDS = ("backward", "frozen_backward", "backward_by_sums")


@pytest.mark.one_in(2)
@both_axes
@sizes
def test_against_the_oracle(isa, streamed, size, axis):
    p = problem(shape_of(size), axis)
    for operation in BACKWARDS:
        check(operation, p)
        check(operation, p, "relu", add=True)


@pytest.mark.one_in(3)
@both_axes
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", BACKWARDS)
def test_activations_and_residual(isa, streamed, operation, activation, add, axis):
    for shape in (3, 17, 7, 9), (2, 130, 1, 5), (2, 3, 70, 60), (9, 65):
        check(operation, problem(shape, axis), activation, add)


@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_at_nan(isa, activation, axis):
    """It passes as the oracle, and PyTorch, let it pass, wherever in a vector the NaN is."""
    p = problem((3, 50, 7), axis)
    p.x[...] = np.nan
    stats = fastbn.BatchStats(np.zeros(50), np.ones(50), p.x.size // 50)
    options = {"axis": axis, "residual": p.residual, "activation": activation, "negative_slope": SLOPE}
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats, training=False, **options)
    factor = reference.derivative(np.full(p.x.shape, np.nan), activation, SLOPE)
    np.testing.assert_array_equal(grads.grad_residual, (p.grad_output * factor).astype(np.float32))


@both_axes
@ranks
def test_ranks(isa, shape, axis):
    for operation in BACKWARDS:
        check(operation, problem(shape, axis), "leaky_relu", True)


@pytest.mark.parametrize("axis", range(-4, 4))
def test_any_axis(isa, axis):
    for operation in BACKWARDS:
        check(operation, problem((4, 5, 6, 7), axis), "leaky_relu", True)


@both_axes
@pytest.mark.parametrize("size", [(2, 17, 169), (300, 3, 49), (40, 130, 1), (2, 3, 5000)], ids=str)
def test_out_takes_grad_input(isa, shared_out, size, axis):
    p = problem(shape_of(size), axis)
    for operation in BACKWARDS:
        fresh = run(operation, p, "leaky_relu", True, num_threads=3)
        out = np.full(p.x.shape, np.nan, np.float32)
        assert_same_bits(check(operation, p, "leaky_relu", True, out, 3), fresh, operation)


@both_axes
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operation", BACKWARDS[:2])
def test_weight_and_bias_are_optional_each_by_itself(isa, operation, weight, bias, axis):
    p = problem((4, 17, 6), axis)
    ones, zeros = np.ones_like(p.weight), np.zeros_like(p.bias)
    plain = p._replace(weight=p.weight if weight else ones, bias=p.bias if bias else zeros)
    expected = run(operation, plain, "relu", True)
    given = p._replace(weight=p.weight if weight else None, bias=p.bias if bias else None)
    stats = fastbn.BatchStats(p.running_mean, p.running_var, 24)
    if operation == "backward":
        stats = fastbn.batch_stats(p.x, axis=axis)
    grads = call(
        fastbn.batch_norm_backward, p.grad_output, p.x, stats, given.weight, given.bias, axis=axis,
        training=operation == "backward", activation="relu", residual=p.residual,
    )  # fmt: skip
    assert_same_bits(grads._asdict(), expected)


@pytest.mark.parametrize("eps", [0, 1e-3, 10.0])
@pytest.mark.parametrize("training", [True, False])
def test_eps(isa, eps, training):
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    grads = call(
        fastbn.batch_norm_backward, p.grad_output, p.x, stats, p.weight, p.bias, eps, training=training
    )
    expected = reference.backward(
        p.grad_output, p.x, stats.mean, stats.var, p.weight, p.bias, eps, training=training
    )
    for name, gradient, value in zip(grads._fields, grads[:3], expected, strict=False):
        assert_within(gradient, value, 2e-6 * np.maximum(1, abs(value)), name)


def test_grad_residual_comes_with_a_residual_only():
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats)
    assert grads._fields == ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    assert grads.grad_residual is None
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats, residual=p.residual)
    assert np.array_equal(grads.grad_residual, p.grad_output)
    assert not np.shares_memory(grads.grad_residual, p.grad_output)


@both_axes
@pytest.mark.parametrize("shape", [(8, 65, 9), (3, 3, 5000), (40, 17)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("operation", BACKWARDS)
def test_the_mask_is_where_the_forward_pass_was_cut(isa, operation, activation, shape, axis):
    """Even where the residual cancels all but rounding: both passes must compute one expression."""
    p = problem(shape, axis, offset=1000)
    forward = "forward_given_stats" if operation == "frozen_backward" else "forward"
    kink = np.where(np.arange(p.x.size) % 2, 0, 6 if activation == "relu6" else 0).reshape(p.x.shape)
    stats = p.running_mean, p.running_var
    if operation != "frozen_backward":
        stats = reference.batch_stats(p.x, axis)[:2]
    y = reference.forward(p.x, *stats, p.weight, p.bias, axis=axis)
    p = p._replace(residual=(kink - y).astype(np.float32), grad_output=np.ones_like(p.x))
    y = run(forward, p, activation, True)["y"]
    passed = (y > 0) & (y < 6) if activation == "relu6" else y > 0
    assert 0.01 < passed.mean() < 0.99
    np.testing.assert_array_equal(run(operation, p, activation, True)["grad_residual"], passed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_activation_at_its_kinks(isa, activation, layout, add, training):
    finite = KINKS[1:-1]
    x = np.tile(finite, (2, 3, 2)) if layout == "planes" else np.repeat(finite[:, None], 3, 1)
    stats = fastbn.BatchStats(np.zeros(3), np.ones(3), x.size // 3)
    residual = np.zeros_like(x) if add else None
    options = {"eps": 0, "activation": activation, "negative_slope": SLOPE, "training": training}
    grads = fastbn.batch_norm_backward(np.ones_like(x), x, stats, residual=residual, **options)
    passed = reference.derivative(x, activation, SLOPE)
    bounds = {"rtol": 5e-7 if activation in SMOOTH else 0, "atol": 1e-36 if activation in SMOOTH else 0}
    if add:
        np.testing.assert_allclose(grads.grad_residual, passed, **bounds)
    if not training:
        np.testing.assert_allclose(grads.grad_input, passed, **bounds)
    np.testing.assert_allclose(grads.grad_bias, passed.sum(reference.others(x, 1)), **bounds)


@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_finite_differences_of_the_forward_pass(isa, training, activation, axis):
    """Coarse, for float32 allows no small steps, but without the oracle: the two passes belong together."""
    rng = np.random.default_rng(3)
    p = problem((64, 3, 5), axis)
    p = p._replace(residual=(p.residual * 2 + 2).astype(np.float32))
    stats = fastbn.batch_stats(p.x, axis=axis)
    options = {"axis": axis, "activation": activation, "negative_slope": SLOPE}
    given = {"x": p.x, "weight": p.weight, "bias": p.bias, "residual": p.residual}

    def loss(**moved):
        y, _ = fastbn.batch_norm_forward(**given | moved, stats=None if training else stats, **options)
        return (y.astype(np.float64) * p.grad_output).sum()

    grads = fastbn.batch_norm_backward(
        p.grad_output, p.x, stats, p.weight, p.bias, training=training, residual=p.residual, **options
    )
    step = 2.5e-4
    for name, gradient in zip(("x", "weight", "bias", "residual"), grads, strict=True):
        direction = np.sign(rng.standard_normal(given[name].shape)).astype(np.float32)
        ahead, behind = (given[name] + np.float32(sign * step) * direction for sign in (1, -1))
        slope = (loss(**{name: ahead}) - loss(**{name: behind})) / (2 * step)
        # a few of a thousand values pass a kink on the way
        assert slope == pytest.approx((gradient.astype(np.float64) * direction).sum(), rel=0.02, abs=0.1), (
            name
        )


@both_axes
@pytest.mark.parametrize(
    ("operation", "scale"),
    [
        ("backward", 1e-10),
        ("backward", 1e10),
        ("backward", 1e30),
        ("frozen_backward", 1e-10),
        ("frozen_backward", 1e10),
    ],
)
def test_large_and_small_values(isa, operation, axis, scale):
    """A product of two factors of a size is out of range long before the gradient is."""
    p = problem((8, 17, 9), axis)
    p = p._replace(x=p.x * np.float32(scale))
    if operation == "frozen_backward":
        p = p._replace(
            running_mean=p.running_mean * np.float32(scale), running_var=p.running_var * np.float32(scale**2)
        )
    check(operation, p)
    check(operation, p, "relu", add=True)
