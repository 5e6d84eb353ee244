"""The oracle judged by other means: NumPy's own reductions, and finite differences for its gradients."""

import itertools

import numpy as np
import pytest
import reference

SHAPE = (4, 3, 2)
AXES = [1, -1, 0]


@pytest.fixture
def arrays(rng):
    return {name: rng.standard_normal(SHAPE) for name in ("x", "grad_output", "residual")}


def parameters(rng, x, axis):
    return {"weight": rng.standard_normal(x.shape[axis]), "bias": rng.standard_normal(x.shape[axis])}


@pytest.mark.parametrize("axis", AXES)
def test_statistics(arrays, axis):
    x = arrays["x"]
    mean, var, count = reference.batch_stats(x, axis)
    for c, values in enumerate(np.moveaxis(x, axis, 0)):
        assert mean[c] == pytest.approx(np.mean(values), rel=1e-14)
        assert var[c] == pytest.approx(np.var(values), rel=1e-14)
        assert count == values.size


def test_statistics_of_nothing():
    mean, var, count = reference.batch_stats(np.empty((0, 2, 3)))
    assert (mean.tolist(), var.tolist(), count) == ([0, 0], [0, 0], 0)


@pytest.mark.parametrize("axis", AXES)
def test_normalized_batch_has_the_moments_of_the_parameters(rng, arrays, axis):
    x = arrays["x"]
    given = parameters(rng, x, axis)
    mean, var, _ = reference.batch_stats(x, axis)
    y_mean, y_var, _ = reference.batch_stats(reference.forward(x, mean, var, **given, eps=0, axis=axis), axis)
    np.testing.assert_allclose(y_mean, given["bias"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(y_var, given["weight"] ** 2, rtol=1e-13)


def test_no_deviation_gives_bias():
    x = np.full((2, 1, 2), 7.0)
    assert (reference.forward(x, [7], [0], [3], [0.5], eps=0) == 0.5).all()


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (None, [-8, -0.5, 0, 3, 6, 7]),
        ("relu", [0, 0, 0, 3, 6, 7]),
        ("relu6", [0, 0, 0, 3, 6, 6]),
        ("leaky_relu", [-0.8, -0.05, 0, 3, 6, 7]),
    ],
)
def test_activations(activation, expected):
    z = np.array([-8, -0.5, 0, 3, 6, 7])
    np.testing.assert_allclose(reference.activate(z, activation, 0.1), expected)


def test_running_update():
    mean, var = reference.update_running([1.0], [2.0], [5.0], [3.0], 4, momentum=0.25)
    assert (mean[0], var[0]) == (0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * 4)
    assert reference.update_running([1.0], [2.0], [5.0], [3.0], 4, 0.25, unbiased=False)[1] == 2.25
    assert reference.update_running([1.0], [2.0], [0.0], [0.0], 0) == ([1], [2])
    assert reference.update_running([0.0], [1.0], [8.0], [0.0], 1, 0.5) == ([4], [0.5])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_gradients_by_finite_differences(rng, arrays, axis, training, activation):
    grad_output = arrays.pop("grad_output")
    arrays["residual"] += 3  # so that some values are beyond the upper kink of relu6
    arrays |= parameters(rng, arrays["x"], axis)
    fixed = reference.batch_stats(arrays["x"], axis)[:2]
    options = {"eps": 1e-3, "axis": axis, "activation": activation, "negative_slope": 0.3}

    def loss():
        x = arrays["x"]
        stats = reference.batch_stats(x, axis)[:2] if training else fixed
        y = reference.forward(
            x, *stats, arrays["weight"], arrays["bias"], residual=arrays["residual"], **options
        )
        return (y * grad_output).sum()

    gradients = reference.backward(
        grad_output, arrays["x"], *fixed, arrays["weight"], arrays["bias"], training=training,
        residual=arrays["residual"], **options,
    )  # fmt: skip
    step = 1e-5
    for name, gradient in zip(("x", "weight", "bias", "residual"), gradients, strict=True):
        for index in itertools.product(*map(range, arrays[name].shape)):
            here = arrays[name][index]
            arrays[name][index] = here + step
            above = loss()
            arrays[name][index] = here - step
            below = loss()
            arrays[name][index] = here
            assert gradient[index] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8), name
