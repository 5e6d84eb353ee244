"""Layers that train on ghost batches (`virtual_batch_size`) or by batch renormalization (`renorm`)."""

import copy
import math
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNorm, BatchNorm1d, BatchNorm2d, Renorm

C = 5
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def batch(rng, shape=(10, C, 3, 2), axis=1):
    """Values with a mean and deviation of their own in each channel; `shape` has the channels second."""
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    x = rng.standard_normal(shape) * rng.uniform(0.5, 2, per_channel) + rng.uniform(-3, 3, per_channel)
    return np.ascontiguousarray(np.moveaxis(x.astype(np.float32), 1, axis))


def randomize(layer, rng):
    """Parameters and running averages as after some training."""
    for name in STATE[:4]:
        array = getattr(layer, name)
        if array is not None:
            array[:] = rng.uniform(0.5, 1.5, array.shape)
    return layer


def parts_of(x, size):
    return np.array_split(x, -(-len(x) // size)) if len(x) else [x]


def assert_states_equal(layer, other):
    state, expected = layer.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert np.array_equal(state[name], expected[name]), name


# Ghost batches


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("size", [2, 3, 5, 9, 10, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"activation": "leaky_relu"}, {"track_running_stats": False}],
    ids=str,
)
def test_each_ghost_batch_is_a_batch(rng, axis, size, options):
    """To the bit: output, averages, counter and gradients of a layer without that has one after the other."""
    x, residual, grad_output = (batch(rng, axis=axis) for _ in range(3))
    plain = randomize(BatchNorm(C, axis=axis, **options), rng)
    layer = copy.deepcopy(plain)
    layer.virtual_batch_size = size
    y = layer(x, residual)
    grads = layer.backward(grad_output)
    of_parts = []
    for part, added, grad in zip(*(parts_of(a, size) for a in (x, residual, grad_output)), strict=True):
        of_parts.append((plain(part, added), *plain.backward(grad)))
    ys, grad_inputs, grad_weights, grad_biases, grad_residuals = zip(*of_parts, strict=True)
    assert np.array_equal(y, np.concatenate(ys))
    assert_states_equal(layer, plain)
    assert np.array_equal(grads.grad_input, np.concatenate(grad_inputs))
    assert np.array_equal(grads.grad_residual, np.concatenate(grad_residuals))
    np.testing.assert_allclose(grads.grad_weight, sum(grad_weights), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.grad_bias, sum(grad_biases), rtol=1e-5, atol=1e-5)


def test_ghost_batches_in_float64(rng):
    x, grad_output = batch(rng), batch(rng)
    layer = randomize(BatchNorm2d(C, virtual_batch_size=4), rng)
    running = layer.running_mean.copy(), layer.running_var.copy()
    y = layer(x)
    grads = layer.backward(grad_output)
    grad_weight = grad_bias = 0
    for rows in slice(0, 4), slice(4, 7), slice(7, 10):
        mean, var, count = reference.batch_stats(x[rows])
        expected = reference.forward(x[rows], mean, var, layer.weight, layer.bias)
        np.testing.assert_allclose(y[rows], expected, rtol=2e-6, atol=2e-6)
        running = reference.update_running(*running, mean, var, count)
        grad_input, gw, gb, _ = reference.backward(
            grad_output[rows], x[rows], mean, var, layer.weight, layer.bias
        )
        np.testing.assert_allclose(grads.grad_input[rows], grad_input, atol=5e-6)
        grad_weight, grad_bias = grad_weight + gw, grad_bias + gb
    np.testing.assert_allclose(layer.running_mean, running[0], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, running[1], rtol=1e-6)
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(grads.grad_weight, grad_weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.grad_bias, grad_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "size"), [(256, 64), (257, 128), (100, 33), (50, 64)])
def test_tabnets_ghost_batches(rng, rows, size):
    """pytorch-tabnet gives the chunks of a batch to one BatchNorm1d; where these are as large as ours."""
    torch = pytest.importorskip("torch")
    x, grad_output = rng.standard_normal((2, rows, C), np.float32)
    theirs = torch.nn.BatchNorm1d(C, momentum=0.01)
    inputs = torch.from_numpy(x.copy()).requires_grad_()
    out = torch.cat([theirs(chunk) for chunk in inputs.chunk(math.ceil(rows / size))])
    out.backward(torch.from_numpy(grad_output))
    layer = BatchNorm1d(C, momentum=0.01, virtual_batch_size=size)
    np.testing.assert_allclose(layer(x), out.detach().numpy(), atol=2e-6)
    for name, buffer in theirs.named_buffers():
        np.testing.assert_allclose(getattr(layer, name), buffer.numpy(), rtol=2e-6, atol=1e-6)
    grads = layer.backward(grad_output)
    np.testing.assert_allclose(grads.grad_input, inputs.grad.numpy(), atol=5e-6)
    np.testing.assert_allclose(grads.grad_weight, theirs.weight.grad.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.grad_bias, theirs.bias.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_keras_2_ghost_batches(rng):
    """Its parts are no neighbours: it makes (size, parts, C) of the rows and reduces the first axis alone."""
    size, parts = 4, 6
    x = rng.standard_normal((size * parts, C), np.float32)
    grouped = x.astype(np.float64).reshape(size, parts, C)
    expected = (grouped - grouped.mean(0)) / np.sqrt(grouped.var(0) + 1e-5)
    layer = BatchNorm1d(C, virtual_batch_size=size)
    y = layer(x.reshape(size, parts, C).swapaxes(0, 1).reshape(x.shape))  # as docs/training_variants.md says
    y = y.reshape(parts, size, C).swapaxes(0, 1)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)


@given(rows=st.integers(0, 60), size=st.integers(2, 70))
@example(rows=3, size=2)
@settings(deadline=None, max_examples=60)
def test_ghost_batches_are_few_and_alike(rows, size):
    x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) ** 2
    layer = BatchNorm1d(2, virtual_batch_size=size, momentum=None)
    count = -(-rows // size)
    least = rows // max(count, 1)
    if rows == 1 or (count > 1 and least == 1):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x)
        count = 0
    else:
        y = layer(x)
        if rows:
            # Within each part the values have mean 0; a border is where a sum over rows so far is 0.
            sums = np.cumsum(y[:, 0], dtype=np.float64)
            borders = np.flatnonzero(np.abs(sums) < 1e-4) + 1
            sizes = np.diff([0, *borders])
            assert len(sizes) == count
            assert max(sizes) <= size
            assert max(sizes) - min(sizes) <= 1
    assert layer.num_batches_tracked == count


def test_ghost_batches_of_one_image(rng):
    x = batch(rng)
    y = BatchNorm2d(C, virtual_batch_size=1)(x)
    np.testing.assert_allclose(y.mean((2, 3)), 0, atol=1e-6)  # which is instance normalization
    np.testing.assert_allclose(y.var((2, 3)), 1, rtol=1e-3)


@pytest.mark.parametrize("options", [{"virtual_batch_size": 3}, {"renorm": True}], ids=str)
def test_out_and_in_place(rng, options):
    x, residual = batch(rng), batch(rng)
    layer = randomize(BatchNorm2d(C, activation="relu", **options), rng)
    twin = copy.deepcopy(layer)
    expected = twin(x, residual)
    out = np.full_like(x, 9)
    assert layer(x, residual, out) is out
    assert np.array_equal(out, expected)
    assert_states_equal(layer, twin)
    place = x.copy()
    again = copy.deepcopy(layer)
    assert np.array_equal(layer(place, residual, out=place), again(x, residual))
    with pytest.raises(RuntimeError, match="out=x"):
        layer.backward(x)


@pytest.mark.parametrize("layout", ["channels-last memory", "sliced batch", "every second pixel"])
def test_layouts(rng, layout):
    x = batch(rng, (20, C, 6, 4))
    if layout == "channels-last memory":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    else:
        x = x[::2] if layout == "sliced batch" else x[:, :, ::2]
    grad_output = batch(rng, x.shape)
    layer = randomize(BatchNorm2d(C, virtual_batch_size=4, renorm=True), rng)
    twin = copy.deepcopy(layer)
    np.testing.assert_allclose(layer(x), twin(np.ascontiguousarray(x)), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(layer.backward(grad_output)[:3], twin.backward(grad_output)[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


# Renormalization


def algorithm_1(x, layer, rmax, dmax, rmin=None):
    """A training step of Ioffe (2017), in float64: y, r, d; with the deviation that evaluation would take."""
    mean, var, _ = reference.batch_stats(x, layer.axis)
    sigma_batch = np.sqrt(var + layer.eps)
    sigma = np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    r = np.minimum(np.maximum(sigma_batch / sigma, 1 / rmax if rmin is None else rmin), rmax)
    d = np.minimum(np.maximum((mean - layer.running_mean) / sigma, -dmax), dmax)
    xhat = reference.normalize(x, mean, var, layer.eps, layer.axis)
    xhat = xhat * reference.column(r, x.ndim, layer.axis) + reference.column(d, x.ndim, layer.axis)
    weight = 1 if layer.weight is None else reference.column(layer.weight, x.ndim, layer.axis)
    bias = 0 if layer.bias is None else reference.column(layer.bias, x.ndim, layer.axis)
    return xhat * weight + bias, r, d


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("bounds", [(3, 5, None), (1.1, 0.2, None), (math.inf, math.inf, 0), (2, 1, 0.9)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_renorm_is_that_of_the_paper(rng, axis, bounds, options):
    layer = randomize(BatchNorm(C, axis=axis, renorm=Renorm(*bounds), **options), rng)
    running = layer.running_mean.copy(), layer.running_var.copy()
    x = batch(rng, axis=axis)
    expected, r, d = algorithm_1(x, layer, *bounds)
    np.testing.assert_allclose(layer(x), expected, rtol=3e-6, atol=3e-6)
    mean, var = reference.update_running(*running, *reference.batch_stats(x, axis))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)
    assert layer.num_batches_tracked == 1
    if bounds[0] == 1.1:
        assert {0.2, -0.2} & set(d)  # so that the bounds are tested, too
        assert {1.1, 1 / 1.1} & set(r)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_gradients_of_renorm_by_autograd(rng, activation, options):
    torch = pytest.importorskip("torch")
    layer = randomize(BatchNorm2d(C, renorm=Renorm(1.5, 1), activation=activation, **options), rng)
    x, residual, grad_output = batch(rng), batch(rng), batch(rng)
    _, r, d = algorithm_1(x, layer, 1.5, 1)
    layer(x, residual)
    grads = layer.backward(grad_output)

    def leaf(array):
        return torch.from_numpy(np.asarray(array, np.float64)).requires_grad_()

    def column(vector):
        return vector.reshape(C, 1, 1)

    inputs, added, weight = leaf(x), leaf(residual), leaf(layer.weight)
    bias = leaf(np.zeros(C) if layer.bias is None else layer.bias)
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    xhat = (inputs - column(mean)) / torch.sqrt(column(var) + layer.eps)
    z = (xhat * column(torch.from_numpy(r)) + column(torch.from_numpy(d))) * column(weight) + column(bias)
    z = z + added
    if activation:
        z = torch.relu(z)
    z.backward(torch.from_numpy(grad_output.astype(np.float64)))
    for ours, theirs in zip(grads, (inputs, weight, bias, added), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=2e-5, atol=2e-5)


def test_gradients_of_renorm_by_finite_differences(rng):
    layer = randomize(BatchNorm(C, renorm=True, momentum=0), rng)
    x, grad_output = batch(rng, (4, C)), batch(rng, (4, C))
    _, r, d = algorithm_1(x, layer, 3, 5)
    layer(x)
    grads = layer.backward(grad_output)

    def loss(x, weight, bias):  # r and d stay
        mean, var, _ = reference.batch_stats(x)
        return (((reference.normalize(x, mean, var) * r + d) * weight + bias) * grad_output).sum()

    arguments = [a.astype(np.float64) for a in (x, layer.weight, layer.bias)]
    for i, gradient in enumerate(grads[:3]):
        for index in np.ndindex(gradient.shape):
            losses = []
            for step in 1e-6, -1e-6:
                moved = [a.copy() for a in arguments]
                moved[i][index] += step
                losses.append(loss(*moved))
            assert abs((losses[0] - losses[1]) / 2e-6 - gradient[index]) < 2e-5


@given(
    offset=st.floats(-1e4, 1e4), scale=st.floats(0.1, 10), momentum=st.floats(0, 1), unbiased=st.booleans()
)
@settings(deadline=None, max_examples=50)
def test_without_bounds_training_is_evaluation(offset, scale, momentum, unbiased):
    """Which is what the paper is about. Only that the averages move afterwards."""
    rng = np.random.default_rng(0)
    renorm = Renorm(rmax=math.inf, dmax=math.inf, rmin=0)
    layer = BatchNorm2d(C, momentum=momentum, unbiased=unbiased, renorm=renorm)
    layer.running_mean[:] = offset
    layer.running_var[:] = scale**2
    randomized = rng.uniform(0.5, 1.5, (2, C))
    layer.weight[:], layer.bias[:] = randomized
    x = (batch(rng) * scale + offset).astype(np.float32)
    expected = layer.eval()(x)
    np.testing.assert_allclose(layer.train()(x), expected, rtol=1e-5, atol=1e-5)


def test_within_no_bounds_renorm_is_plain(rng):
    plain = randomize(BatchNorm2d(C), rng)
    layer = copy.deepcopy(plain)
    layer.renorm = Renorm(rmax=1, dmax=0)
    x, grad_output = batch(rng), batch(rng)
    assert np.array_equal(layer(x), plain(x))
    for ours, theirs in zip(layer.backward(grad_output)[:3], plain.backward(grad_output)[:3], strict=True):
        assert np.array_equal(ours, theirs)
    assert_states_equal(layer, plain)


def test_renorm_of_means_far_from_zero(rng):
    """Float32 averages are too coarse here; those behind them are not."""
    layer = BatchNorm1d(3, renorm=Renorm(math.inf, math.inf, 0))
    x = (rng.standard_normal((400, 256, 3)) * 0.5 + np.array([1e6, -3e5, 1e5])).astype(np.float32)
    for part in x[:-1]:
        layer(part)
    expected = layer.eval()(x[-1])
    np.testing.assert_allclose(layer.train()(x[-1]), expected, rtol=1e-5, atol=1e-5)


def test_averages_for_renorm_alone_are_keras(rng, monkeypatch):
    """Keras has them always; its momentum weighs the old value."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Keras and its backend say while they are imported
        keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("another test has imported Keras on another backend")
    theirs = keras.layers.BatchNormalization(
        axis=1, epsilon=1e-3, renorm=True, renorm_momentum=0.8, momentum=0.9,
        renorm_clipping={"rmax": 1.5, "rmin": 0.5, "dmax": 0.4},
    )  # fmt: skip
    theirs.build((None, C, 3, 2))
    layer = BatchNorm2d(C, eps=1e-3, unbiased=False, renorm=Renorm(1.5, 0.4, 0.5, momentum=0.2))
    layer.running_var[:] = 1 - 1e-3  # Keras begins with a deviation of 1, eps included
    layer.weight[:], layer.bias[:] = rng.uniform(0.5, 1.5, (2, C))
    theirs.gamma.assign(layer.weight)
    theirs.beta.assign(layer.bias)
    for _ in range(6):
        x = batch(rng)
        expected = theirs(x, training=True).detach().numpy()
        np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        layer.running_mean, theirs.moving_mean.value.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_averages_for_renorm_alone(rng):
    layer = randomize(BatchNorm2d(C, renorm=Renorm(9, 9, 0, momentum=0.3)), rng)
    x = batch(rng), batch(rng), batch(rng)
    running = layer.running_mean.copy(), np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    for part in x:
        mean, var, _ = reference.batch_stats(part)
        now = mean, np.sqrt(var + layer.eps)
        expected = reference.normalize(part, mean, var)
        r, d = now[1] / running[1], (mean - running[0]) / running[1]
        expected = expected * reference.column(r, 4, 1) + reference.column(d, 4, 1)
        expected = expected * reference.column(layer.weight, 4, 1) + reference.column(layer.bias, 4, 1)
        np.testing.assert_allclose(layer(part), expected, rtol=1e-5, atol=1e-5)
        running = [0.7 * old + 0.3 * new for old, new in zip(running, now, strict=True)]
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert np.array_equal(twin(x[0]), copy.deepcopy(layer)(x[0]))
    layer.load_state_dict(layer.state_dict())  # from here on they begin with the running averages
    twin = randomize(BatchNorm2d(C, renorm=layer.renorm), rng)
    twin.load_state_dict(layer.state_dict())
    assert np.array_equal(layer(x[0]), twin(x[0]))
    layer.reset_parameters()
    assert np.array_equal(layer(x[0]), BatchNorm2d(C, renorm=layer.renorm)(x[0]))


def test_constant_channels_without_eps(rng):
    layer = BatchNorm1d(3, eps=0, renorm=True)
    layer.running_mean[:] = 2, 2, 1
    layer.running_var[:] = 0, 1, 0
    x = np.full((6, 3), 2, np.float32)
    y = layer(x)
    assert y.tolist() == [[0, 0, 5]] * 6  # the last one is infinitely many deviations off: dmax


# Both, and what else a layer does


def test_ghost_batches_are_corrected_each(rng):
    layer = randomize(BatchNorm2d(C, renorm=Renorm(1.2, 0.5)), rng)
    both = copy.deepcopy(layer)
    both.virtual_batch_size = 4
    x, grad_output = batch(rng), batch(rng)
    y, grads = both(x), both.backward(grad_output)
    grad_weight = 0
    for rows in slice(0, 4), slice(4, 7), slice(7, 10):
        assert np.array_equal(y[rows], layer(x[rows]))
        of_part = layer.backward(grad_output[rows])
        assert np.array_equal(grads.grad_input[rows], of_part.grad_input)
        grad_weight = grad_weight + of_part.grad_weight.astype(np.float64)
    np.testing.assert_allclose(grads.grad_weight, grad_weight, rtol=1e-6)
    assert_states_equal(both, layer)


VARIANTS = [{"virtual_batch_size": 3}, {"renorm": True}, {"virtual_batch_size": 3, "renorm": Renorm(2, 1)}]
all_variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


@all_variants
def test_evaluation_freezing_and_folding_are_plain(rng, options):
    layer, plain = BatchNorm2d(C, **options), BatchNorm2d(C)
    randomize(layer, rng)
    layer(batch(rng))
    assert list(layer.state_dict()) == STATE
    plain.load_state_dict(layer.state_dict())
    x = batch(rng)
    for each in layer, plain:
        each.eval()
    expected = plain(x)
    assert np.array_equal(layer(x), expected)
    assert np.array_equal(layer.backward(x).grad_input, plain.backward(x).grad_input)
    assert np.array_equal(layer.freeze()(x), expected)
    kernel = rng.standard_normal((C, 2, 3, 3), np.float32)
    for ours, theirs in zip(
        fastbn.fold_conv(kernel, None, layer), fastbn.fold_conv(kernel, None, plain), strict=True
    ):
        assert np.array_equal(ours, theirs)


@all_variants
def test_copies_keep_the_options(rng, options):
    layer = randomize(BatchNorm2d(C, **options), rng)
    layer(batch(rng))
    x = batch(rng)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    expected = layer(x)
    for twin in twins:
        assert np.array_equal(twin(x), expected)
        assert repr(twin) == repr(layer)
        for name, value in options.items():
            assert f"{name}={'Renorm' if name == 'renorm' else value}" in repr(layer)


def test_a_pickle_of_an_older_version(rng):
    layer = BatchNorm2d(C)
    state = layer.__getstate__()
    for name in "virtual_batch_size", "renorm", "_followed":
        del state[name]
    old = BatchNorm2d.__new__(BatchNorm2d)
    old.__setstate__(state)
    x = batch(rng)
    assert np.array_equal(old(x), layer(x))


@all_variants
def test_an_empty_batch(rng, options):
    layer = randomize(BatchNorm2d(C, **options), rng)
    if layer.renorm is not None:
        layer.renorm = layer.renorm._replace(momentum=0.5)
    layer(batch(rng))
    before, followed = layer.state_dict(), layer._followed
    y = layer(np.empty((0, C, 3, 2), np.float32))
    assert layer._followed is followed
    assert y.shape == (0, C, 3, 2)
    grads = layer.backward(y)
    assert grads.grad_weight.tolist() == grads.grad_bias.tolist() == [0] * C
    for name, array in layer.state_dict().items():
        assert np.array_equal(array, before[name])


@all_variants
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_stay_in_their_channel(rng, options, value):  # case 44
    x = batch(rng)
    clean = randomize(BatchNorm2d(C, **options), rng)
    layer = copy.deepcopy(clean)
    expected, grads = clean(x), clean.backward(x)
    x[-1, 2, 0, 0] = value
    y = layer(x)
    grad_output = x.copy()
    grad_output[-1, 2, 0, 0] = 0
    found = layer.backward(grad_output)
    good = [0, 1, 3, 4]
    assert np.array_equal(y[:, good], expected[:, good])
    assert np.array_equal(found.grad_input[:, good], grads.grad_input[:, good])
    assert np.isnan(y[-1, 2]).any()
    assert not np.isfinite(layer.running_mean[2])
    assert np.array_equal(layer.running_var[good], clean.running_var[good])


@all_variants
def test_skip_nonfinite(rng, options):  # case 44
    if "renorm" in options:
        options = options | {"renorm": Renorm(momentum=0.5)}
    x = batch(rng)
    layer = randomize(BatchNorm2d(C, skip_nonfinite=True, **options), rng)
    before = layer.running_mean[2].copy()
    x[:, 2, 0, 0] = np.nan
    with pytest.warns(RuntimeWarning, match="not finite in 1 of 5 channels, channel 2") as told:
        layer(x)
    assert [warning.filename for warning in told] == [__file__]
    assert layer.running_mean[2] == before
    layer(x)
    clean = layer(batch(rng))
    assert np.isfinite(clean).all()


def test_tracking_switched_off_later(rng):
    layer = randomize(BatchNorm2d(C, renorm=Renorm(momentum=0.5), virtual_batch_size=5), rng)
    layer.track_running_stats = False
    before = layer.state_dict()
    x = batch(rng)
    assert np.array_equal(layer(x), layer(x))
    for name, array in layer.state_dict().items():
        assert np.array_equal(array, before[name])


# Errors leave everything as it was


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1, or None .*, got 0"),
        ({"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size must be an int, got 2.0"),
        ({"virtual_batch_size": True}, TypeError, "virtual_batch_size must be an int, got True"),
        (
            {"renorm": {"rmax": 3}},
            TypeError,
            r"renorm must be None, True or a fastbn.Renorm, got {'rmax': 3}",
        ),
        ({"renorm": Renorm(rmax="3")}, TypeError, "rmax of renorm must be a number, got '3'"),
        ({"renorm": Renorm(dmax=None)}, TypeError, "dmax of renorm must be a number, got None"),
        ({"renorm": Renorm(rmax=0.9)}, ValueError, "rmax of renorm must be at least 1, got 0.9"),
        ({"renorm": Renorm(rmax=math.nan)}, ValueError, "rmax of renorm must be at least 1, got nan"),
        ({"renorm": Renorm(dmax=-1)}, ValueError, "dmax of renorm must be at least 0, got -1"),
        (
            {"renorm": Renorm(rmin=4)},
            ValueError,
            r"rmin of renorm must be from 0 to rmax, which is 3.0, got 4",
        ),
        ({"renorm": Renorm(momentum=2)}, ValueError, "momentum must be"),
        ({"renorm": True, "track_running_stats": False}, ValueError, "renorm needs running averages"),
    ],
    ids=str,
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        BatchNorm(3, **options)
    layer = BatchNorm(3)
    for name, value in options.items():
        if name != "track_running_stats" and "track_running_stats" not in options:
            with pytest.raises(error, match=match):
                setattr(layer, name, value)
    assert layer.virtual_batch_size is layer.renorm is None


def test_options_are_switched_off():
    layer = BatchNorm(3, renorm=True, virtual_batch_size=8)
    assert layer.renorm == Renorm()
    layer.renorm, layer.virtual_batch_size = False, None
    assert repr(layer) == repr(BatchNorm(3))


def cases(rng):
    """Name, x, other arguments and what the error says."""
    x = batch(rng)
    wide, locked = np.empty((15, C, 3, 2), np.float32), np.zeros_like(x)
    locked.setflags(write=False)
    return {
        "residual of more rows": (x, {"residual": batch(rng, (20, C, 3, 2))}, "residual must have the shape"),
        "out of more rows": (x, {"out": np.empty((20, C, 3, 2), np.float32)}, "out must have the shape"),
        "out over x, a row further": (wide[:10], {"out": wide[1:11]}, "out overlaps x"),
        "out over later parts of x": (wide[:10], {"out": wide[5:]}, "out overlaps x"),
        "out over residual": (x, {"residual": wide[:10], "out": wide[5:]}, "out overlaps residual"),
        "out with rows in one place": (
            x,
            {"out": np.lib.stride_tricks.as_strided(wide, x.shape, (24, 24, 8, 4))},
            "share memory",
        ),
        "read-only out": (x, {"out": locked}, "out is read-only"),
        "float64": (x.astype(np.float64), {}, "x must have dtype float32"),
        "channels": (x[:, :3], {}, "x must have 5 channels"),
        "threads": (x, {"num_threads": 0}, "num_threads"),
    }


@pytest.mark.parametrize("name", cases(np.random.default_rng(0)))
@all_variants
def test_nothing_is_written_before_an_error(rng, name, options):
    layer = randomize(BatchNorm2d(C, **options), rng)
    x, arguments, match = cases(rng)[name]
    arrays = [x, *(a for a in arguments.values() if isinstance(a, np.ndarray))]
    for array in arrays:
        if array.flags.writeable:
            array[...] = np.nan_to_num(array)
    before = [layer.state_dict(), *(array.copy() for array in arrays)]
    with pytest.raises((ValueError, TypeError), match=match):
        layer(x, **arguments)
    after = [layer.state_dict(), *arrays]
    for old, new in zip(before[1:], after[1:], strict=True):
        assert np.array_equal(old, new)
    assert all(np.array_equal(before[0][key], after[0][key]) for key in before[0])


@pytest.mark.parametrize("overlapped", ["x", "out"])
@pytest.mark.parametrize("average", ["running_mean", "running_var"])
def test_averages_within_a_later_part(rng, overlapped, average):
    arrays = {"x": batch(rng), "out": np.zeros((10, C, 3, 2), np.float32)}
    layer = BatchNorm2d(C, virtual_batch_size=4)
    setattr(layer, average, arrays[overlapped].reshape(-1)[-C:])
    before = copy.deepcopy(arrays)
    with pytest.raises(ValueError, match=f"overlaps {'x' if overlapped == 'x' else average}"):
        layer(arrays["x"], out=arrays["out"])
    for name, array in arrays.items():
        assert np.array_equal(array, before[name])


def test_rows_of_out_in_one_place(rng):
    layer = BatchNorm2d(C, virtual_batch_size=1)
    out = np.lib.stride_tricks.as_strided(np.zeros((C, 3, 2), np.float32), (10, C, 3, 2), (0, 24, 8, 4))
    with pytest.raises(ValueError, match="out has elements that share memory"):
        layer(batch(rng), out=out)
    assert not out.any()


def test_a_backward_of_another_shape(rng):
    layer = BatchNorm2d(C, virtual_batch_size=4)
    layer(batch(rng))
    for shape in (20, C, 3, 2), (9, C, 3, 2), (10, C, 3):
        with pytest.raises(ValueError, match="grad_output must have the shape of x"):
            layer.backward(batch(rng, shape))
    layer.backward(batch(rng))
    with pytest.raises(RuntimeError, match="once"):
        layer.backward(batch(rng))


def test_the_batch_must_come_first(rng):
    layer = BatchNorm(C, axis=0, virtual_batch_size=4)
    with pytest.raises(ValueError, match="cuts x along its first axis, where axis=0 has the channels"):
        layer(batch(rng, (10, C)).T)


def test_a_variance_below_zero(rng):
    layer = BatchNorm2d(C, renorm=True)
    layer.running_var[3] = -1
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"running_var\[3\] \+ eps must be >= 0"):
        layer(batch(rng))
    for name, array in layer.state_dict().items():
        assert np.array_equal(array, before[name])


def test_renorm_without_averages(rng):
    layer = BatchNorm2d(C, renorm=True)
    layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match="renorm needs running averages"):
        layer(batch(rng))


# The page


def test_page():
    page = Path(__file__).resolve().parents[1] / "docs" / "training_variants.md"
    if not page.exists():
        pytest.skip("the tests were copied without docs/")
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        exec(program, {})


@pytest.mark.parametrize(
    ("rows", "size", "sizes"), [(1000, 300, [250] * 4), (10, 3, [3, 3, 2, 2]), (1000, 128, [125] * 8)]
)
def test_the_sizes_that_the_page_tells(rng, rows, size, sizes):
    x = rng.standard_normal((rows, C), np.float32)
    plain = BatchNorm1d(C)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    assert np.array_equal(
        BatchNorm1d(C, virtual_batch_size=size)(x), np.concatenate([plain(p) for p in parts])
    )


def test_the_sizes_that_the_page_tells_of_tabnet():
    torch = pytest.importorskip("torch")
    for rows, size, sizes in (1000, 300, [250] * 4), (10, 3, [3, 3, 3, 1]):
        assert [len(chunk) for chunk in torch.zeros(rows, 1).chunk(math.ceil(rows / size))] == sizes
