"""The layers: modes, running averages, backward, state_dicts, copies, freezing, and what errors leave."""

import copy
import pickle
import signal
import sys
import threading

import numpy as np
import pytest
import reference

import fastbn
from fastbn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

C = 5
SHAPES = [(7, C), (4, C, 6), (4, C, 3, 2), (2, C, 3, 2, 4), (2, C, 2, 3, 2, 2)]
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

both_axes = pytest.mark.parametrize("axis", [1, -1])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def batch(rng, shape=(4, C, 3, 2), axis=1):
    """Values with a mean and a deviation of their own in each channel; `shape` has the channels second."""
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    deviation, mean = rng.uniform(0.5, 2, per_channel), rng.uniform(-3, 3, per_channel)
    x = (rng.standard_normal(shape) * deviation + mean).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(x, 1, axis))


def randomize(layer, rng):
    """Parameters and running averages as after some training."""
    for name in STATE[:4]:
        array = getattr(layer, name)
        if array is not None:
            array[:] = rng.uniform(0.5, 1.5, array.shape)
    return layer


def expected_output(layer, x, mean, var):
    """What `layer` should give for the statistics, in float64, without residual and activation."""
    shape = [1] * x.ndim
    shape[layer.axis] = C
    mean, var = np.asarray(mean, np.float64).reshape(shape), np.asarray(var, np.float64).reshape(shape)
    weight = 1 if layer.weight is None else layer.weight.astype(np.float64).reshape(shape)
    bias = 0 if layer.bias is None else layer.bias.astype(np.float64).reshape(shape)
    return (x - mean) / np.sqrt(var + layer.eps) * weight + bias


def read_only(array):
    array.setflags(write=False)
    return array


def moments(x, axis):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return x.mean(others, np.float64), x.var(others, np.float64), x.size // x.shape[axis]


def assert_state_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert np.array_equal(state[name], other[name]), name


# Construction


def test_defaults():
    layer = BatchNorm(3)
    assert layer.training is True
    assert (layer.num_features, layer.eps, layer.momentum) == (3, 1e-5, 0.1)
    for name, value in ("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1):
        array = getattr(layer, name)
        assert array.dtype == np.float32
        assert array.tolist() == [value] * 3
    assert layer.num_batches_tracked.dtype == np.int64
    assert layer.num_batches_tracked.shape == ()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, STATE),
        ({"bias": False}, ["weight", *STATE[2:]]),
        ({"affine": False}, STATE[2:]),
        ({"affine": False, "bias": True}, STATE[2:]),
        ({"track_running_stats": False}, STATE[:2]),
        ({"affine": False, "track_running_stats": False}, []),
    ],
)
def test_which_arrays_there_are(options, names):
    layer = BatchNorm2d(3, **options)
    assert [name for name in STATE if getattr(layer, name) is not None] == names
    assert list(layer.state_dict()) == names


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_features": 2.0}, TypeError, "num_features must be an int, got 2.0"),  # case 43
        ({"num_features": "2"}, TypeError, "num_features must be an int, got '2'"),
        ({"num_features": 2**70}, ValueError, "num_features must be"),
        ({"eps": "1e-5"}, TypeError, "eps must be a number"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number"),
        ({"negative_slope": "0.1"}, TypeError, "negative_slope must be a number"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and >= 0, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"momentum": float("inf")}, ValueError, "momentum must be finite"),
        ({"axis": 1.0}, TypeError, "axis must be an int"),
        ({"activation": "tanh"}, ValueError, "activation must be .*'tanh'"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        BatchNorm(**({"num_features": 3} | arguments))


def test_options_beyond_pytorch_are_keyword_only():
    with pytest.raises(TypeError):
        BatchNorm(3, 1e-5, 0.1, True, True, True)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            BatchNorm2d(3),
            "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        ),
        (
            BatchNorm(
                8,
                0.001,
                None,
                bias=False,
                axis=-1,
                unbiased=False,
                activation="leaky_relu",
                negative_slope=0.2,
            ),
            "BatchNorm(8, eps=0.001, momentum=None, affine=True, bias=False, track_running_stats=True, "
            "axis=-1, unbiased=False, activation='leaky_relu', negative_slope=0.2)",
        ),
    ],
)
def test_repr(layer, text):
    assert repr(layer) == text


# Ranks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "ranks", "expected"),
    [
        (BatchNorm, (2, 3, 4, 5, 6), None),
        (BatchNorm1d, (2, 3), "2D or 3D"),
        (BatchNorm2d, (4,), "4D"),
        (BatchNorm3d, (5,), "5D"),
    ],
)
def test_ranks(rng, kind, ranks, expected, training, shape):
    layer = kind(C).train(training)
    if len(shape) in ranks:
        assert layer(batch(rng, shape)).shape == shape
        return
    out = np.full(shape, 9, np.float32)
    with pytest.raises(ValueError, match=rf"expected {expected} input \(got {len(shape)}D input\)"):
        layer(batch(rng, shape), out=out)
    assert (out == 9).all()
    assert_state_equal(layer.state_dict(), kind(C).state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [BatchNorm, BatchNorm1d, BatchNorm2d])
def test_what_is_no_array_is_a_type_error(kind, training):
    for x in None, [[1.0] * C] * 2:
        with pytest.raises(TypeError, match=r"x must be a float32 numpy.ndarray, got (NoneType|list)"):
            kind(C).train(training)(x)


# Training


def test_train_and_eval_return_the_layer():
    layer = BatchNorm(3)
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False).training is False


@both_axes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"affine": False}, {"eps": 0.1}, {"track_running_stats": False}], ids=str
)
def test_training_normalizes_by_the_batch(rng, shape, axis, options):
    layer = randomize(BatchNorm(C, axis=axis, **options), rng)
    x = batch(rng, shape, axis)
    untouched = x.copy()
    y = layer(x)
    mean, var, _ = moments(x, axis)
    np.testing.assert_allclose(
        y, expected_output(layer, x, mean, var), rtol=0, atol=2e-6 * max(1, abs(y).max())
    )
    assert np.array_equal(x, untouched)
    assert y.dtype == np.float32


@both_axes
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0, 1, 0.9, None])
def test_running_averages(rng, momentum, unbiased, axis):
    layer = BatchNorm(C, momentum=momentum, unbiased=unbiased, axis=axis)
    arrays = [getattr(layer, name) for name in STATE]
    running_mean, running_var = np.zeros(C), np.ones(C)
    for i in range(1, 5):
        x = batch(rng, (i + 1, C, 3), axis)
        layer(x)
        mean, var, n = moments(x, axis)
        factor = 1 / i if momentum is None else momentum
        running_mean += factor * (mean - running_mean)
        running_var += factor * (var * (n / (n - 1) if unbiased else 1) - running_var)
        np.testing.assert_allclose(layer.running_mean, running_mean, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(layer.running_var, running_var, rtol=2e-6)
        assert layer.num_batches_tracked == i
    assert all(getattr(layer, name) is array for name, array in zip(STATE, arrays, strict=True))


def test_cumulative_average_is_the_mean_over_batches(rng):
    layer = BatchNorm(C, momentum=None)
    batches = [batch(rng) for _ in range(20)]
    for x in batches:
        layer(x)
    expected = np.mean([moments(x, 1)[0] for x in batches], 0)
    np.testing.assert_allclose(layer.running_mean, expected, rtol=0, atol=1e-6)
    layer.reset_running_stats()
    layer(batches[0])  # from the start again: the first batch counts fully
    np.testing.assert_allclose(layer.running_mean, moments(batches[0], 1)[0], rtol=1e-6)


def test_without_running_averages_evaluation_takes_the_batch_too(rng):
    layer = randomize(BatchNorm(C, track_running_stats=False), rng)
    x = batch(rng)
    y = layer(x)
    assert np.array_equal(layer.eval()(x), y)
    assert layer.num_batches_tracked is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x[:1, :, :1, :1])


def test_tracking_can_be_switched_off(rng):
    layer = randomize(BatchNorm(C), rng)
    layer.track_running_stats = False
    before = layer.state_dict()
    layer(batch(rng))
    assert_state_equal(layer.state_dict(), before)


@pytest.mark.parametrize("arrays", [True, False])
def test_tracking_switched_off_is_pytorchs(rng, arrays):  # case 33
    torch = pytest.importorskip("torch")
    ours, theirs = randomize(BatchNorm2d(C), rng), torch.nn.BatchNorm2d(C)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in ours.state_dict().items()})
    for layer in ours, theirs:
        layer.track_running_stats = False
        if not arrays:
            layer.running_mean = layer.running_var = None
    for training in True, False, True:
        x = batch(rng)
        expected = theirs.train(training)(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(ours.train(training)(x), expected, rtol=1e-5, atol=1e-5)
    assert_state_equal(ours.state_dict(), {key: value.numpy() for key, value in theirs.state_dict().items()})
    if arrays:
        np.testing.assert_array_equal(ours.freeze()(x), ours.eval()(x))
    else:
        with pytest.raises(ValueError, match=r"freeze.* needs running statistics"):
            ours.freeze()


def test_channels_are_checked_even_where_the_layer_has_no_arrays(rng):
    layer = BatchNorm(C, affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match=r"x must have 5 channels on axis 1, got shape \(4, 6, 3\)"):
        layer(batch(rng, (4, 6, 3)))


# Averages do not stall (case 32)


def unscaled(rng, channels=C, n=256):
    """Mean 1e6 and deviation 1, as of a feature that nobody scaled."""
    return (1e6 + np.linspace(0, 1, channels) + rng.standard_normal((n, channels))).astype(np.float32)


@both_axes
def test_averages_of_unscaled_features_converge(rng, axis):
    """Steps of 0.01 deviations, thousands of them: float32 averages stop where a step is below 0.03."""
    layer = BatchNorm(C, momentum=0.01, axis=axis)
    expected = np.zeros(C), np.ones(C)
    for _ in range(3000):
        x = unscaled(rng, n=64)
        layer(x)
        expected = reference.update_running(*expected, *reference.batch_stats(x), momentum=0.01)
    assert layer.running_mean.dtype == np.float32
    assert np.array_equal(layer.running_mean, expected[0].astype(np.float32))
    np.testing.assert_allclose(layer.running_var, expected[1], rtol=1e-6)
    x = unscaled(rng)
    normalized = reference.forward(x, *expected, axis=axis)
    assert abs(layer.eval()(x) - normalized).max() < 1e-5
    assert abs(normalized).max() > 2
    untracked = reference.forward(x, layer.running_mean, layer.running_var, axis=axis)
    assert abs(untracked - normalized).max() > 1e-3  # rounding alone

    frozen = layer.freeze()
    y = layer(x)
    grads = layer.backward(x)
    for twin in copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)):
        assert np.array_equal(twin(x), y)
        assert np.array_equal(twin.backward(x).grad_weight, grads.grad_weight)
    for twin in frozen, pickle.loads(pickle.dumps(frozen)):
        assert np.array_equal(twin(x), y)
    wanted = reference.backward(x, x, *expected, training=False, axis=axis)
    np.testing.assert_allclose(grads.grad_weight, wanted[1], rtol=1e-5)
    weight, bias = fastbn.fold_linear_next(layer, np.eye(C, dtype=np.float32), None)
    scale, shift = 1 / np.sqrt(expected[1] + 1e-5), -expected[0] / np.sqrt(expected[1] + 1e-5)
    np.testing.assert_allclose(bias, shift, rtol=1e-7)
    np.testing.assert_allclose(weight.diagonal(), scale, rtol=1e-6)


def test_evaluation_agrees_with_training(rng):
    layer = BatchNorm(C, momentum=0.01, unbiased=False)
    x = unscaled(rng)
    for _ in range(4000):
        trained = layer(x)
    assert abs(layer.eval()(x) - trained).max() < 1e-5
    assert abs(trained).max() > 2


@pytest.mark.parametrize("scale", [1e-19, 1e-21, 1e-23])
@pytest.mark.parametrize("momentum", [1.0, None])
def test_evaluation_of_tiny_features(rng, scale, momentum):  # case 49
    """Their variance is below float32's numbers, or has few digits there."""
    layer = BatchNorm(C, 0, momentum, unbiased=False)
    x = (batch(rng, (64, C)) * scale).astype(np.float32)
    trained = layer(x)
    assert 2 < abs(trained).max() < 10
    np.testing.assert_allclose(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)
    assert np.array_equal(layer.freeze()(x), layer(x))
    layer.running_var[:] = 1
    assert abs(layer(x)).max() < 1e-17


def test_what_is_written_into_the_averages_counts(rng):
    layer = BatchNorm(C)
    for _ in range(20):
        layer(unscaled(rng))
    x = unscaled(rng)
    before = layer.eval()(x)
    layer.running_mean[1] += 1
    expected = reference.forward(x, layer.running_mean, layer.running_var)
    y = layer(x)
    assert abs(y - before)[:, [0, 2, 3, 4]].max() == 0
    np.testing.assert_allclose(y[:, 1], expected[:, 1], atol=2e-6)
    layer.running_mean = np.full(C, 1e6, np.float32)
    np.testing.assert_allclose(
        layer(x), reference.forward(x, layer.running_mean, layer.running_var), atol=2e-6
    )
    loaded = BatchNorm(C).eval()
    loaded.load_state_dict(layer.state_dict())
    assert np.array_equal(loaded(x), layer(x))
    state = layer.train().state_dict()
    layer(x)
    layer.load_state_dict(state)  # what was behind the averages goes, or the same state would not do the same
    for _ in range(3):
        layer(x)
        loaded.train()(x)
    assert np.array_equal(layer.eval()(x), loaded.eval()(x))
    assert_state_equal(layer.state_dict(), loaded.state_dict())


def test_where_rounding_does_not_matter_evaluation_is_that_of_the_float32_averages(rng):
    layer = BatchNorm(C)
    for _ in range(20):
        layer(batch(rng))
    x = batch(rng)
    y = layer.eval()(x)
    assert np.array_equal(y, fastbn.batch_norm(x, layer.running_mean, layer.running_var))
    assert layer.freeze().running_mean.dtype == np.float32


# Batches that are not finite (case 44)


@both_axes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_skip_nonfinite(rng, value, axis):
    layer, plain = (BatchNorm(C, axis=axis, skip_nonfinite=skip) for skip in (True, False))
    clean, x = batch(rng, axis=axis), batch(rng, axis=axis)
    for each in layer, plain:
        each(clean)
    before = layer.state_dict()
    np.moveaxis(x, axis, 1)[1, 2, 0, 0] = value
    with pytest.warns(RuntimeWarning, match=r"not finite in 1 of 5 channels, channel 2 .* stay") as warned:
        y = layer(x)
    assert warned[0].filename == __file__
    assert np.array_equal(y, plain(x), equal_nan=True)
    others = [0, 1, 3, 4]
    for name in "running_mean", "running_var":
        average = getattr(layer, name)
        assert average[2] == before[name][2]
        assert np.array_equal(average[others], getattr(plain, name)[others])
        assert (average[others] != before[name][others]).all()
    assert not np.isfinite(plain.running_var[2])
    assert layer.num_batches_tracked == 2
    layer(x)  # without another word
    layer(clean)
    assert np.isfinite(layer.eval()(clean)).all()


def test_skip_nonfinite_without_need(rng):
    layer, plain, x = BatchNorm(C, skip_nonfinite=True), BatchNorm(C), batch(rng)
    assert np.array_equal(layer(x), plain(x))
    assert_state_equal(layer.state_dict(), plain.state_dict())
    assert repr(layer).endswith(", skip_nonfinite=True)")
    assert copy.deepcopy(layer).skip_nonfinite
    x[0, 0] = np.nan
    layer.eval()(x)  # takes no averages
    bare = BatchNorm(C, track_running_stats=False, skip_nonfinite=True)
    bare(x)


def test_skip_nonfinite_needs_a_momentum():
    with pytest.raises(ValueError, match="skip_nonfinite=True needs a momentum"):
        BatchNorm(C, momentum=None, skip_nonfinite=True)
    layer = BatchNorm(C, skip_nonfinite=True)
    with pytest.raises(ValueError, match="skip_nonfinite=True needs a momentum"):
        layer.momentum = None
    layer = BatchNorm(C, momentum=None)
    with pytest.raises(ValueError, match="skip_nonfinite=True needs a momentum"):
        layer.skip_nonfinite = True


# Evaluation


@both_axes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_evaluation_normalizes_by_the_running_averages(rng, shape, axis, options):
    layer = randomize(BatchNorm(C, axis=axis, **options), rng).eval()
    before = layer.state_dict()
    x = batch(rng, shape, axis)
    y = layer(x)
    expected = expected_output(layer, x, layer.running_mean, layer.running_var)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * max(1, abs(y).max()))
    assert_state_equal(layer.state_dict(), before)


def test_evaluation_of_one_value_per_channel(rng):
    layer = randomize(BatchNorm(C), rng).eval()
    x = batch(rng, (1, C))
    np.testing.assert_allclose(
        layer(x), expected_output(layer, x, layer.running_mean, layer.running_var), rtol=1e-5
    )


@both_axes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_options_reach_the_kernels(rng, axis, training, activation):
    options = {"axis": axis, "activation": activation, "negative_slope": 0.3}
    layer = randomize(BatchNorm(C, 1e-3, unbiased=False, **options), rng).train(training)
    x, residual, out = batch(rng, axis=axis), batch(rng, axis=axis), np.empty_like(batch(rng, axis=axis))
    running_mean, running_var = layer.running_mean.copy(), layer.running_var.copy()
    expected = fastbn.batch_norm(
        x, running_mean, running_var, layer.weight, layer.bias, training, 0.1, 1e-3, unbiased=False,
        residual=residual, **options,
    )  # fmt: skip
    assert layer(x, residual, out) is out
    assert np.array_equal(out, expected)
    assert np.array_equal(layer.running_mean, running_mean)
    assert np.array_equal(layer.running_var, running_var)
    layer = copy.deepcopy(layer).train(training)
    plain = layer(x)
    assert layer(x, out=x) is x
    assert np.array_equal(x, plain)


def test_many_threads_evaluate_one_layer(rng):
    layer = randomize(BatchNorm2d(16, activation="relu"), rng).eval()
    batches = [batch(rng, (2, 16, 40, 40)) for _ in range(16)]
    serial = [layer(x) for x in batches]
    wrong = []
    start = threading.Barrier(16)

    def call(i):
        start.wait()
        for _ in range(20):
            if not np.array_equal(layer(batches[i]), serial[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Backward


@both_axes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
def test_backward_is_that_of_the_call(rng, axis, training, options, fused):
    options |= {"axis": axis, "activation": "relu" if fused else None}
    layer = randomize(BatchNorm(C, **options), rng).train(training)
    x, grad_output = batch(rng, axis=axis), batch(rng, axis=axis)
    residual = batch(rng, axis=axis) if fused else None
    layer(x, residual)
    grads = layer.backward(grad_output)
    by_batch = training or layer.running_mean is None
    if by_batch:
        stats = fastbn.batch_stats(x, axis=axis)
    else:
        stats = fastbn.BatchStats(layer.running_mean, layer.running_var, 24)
    expected = fastbn.batch_norm_backward(
        grad_output, x, stats, layer.weight, layer.bias, training=by_batch, axis=axis, residual=residual,
        activation=layer.activation,
    )  # fmt: skip
    assert grads._fields == ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    assert (grads.grad_residual is None) == (residual is None)
    for name in grads._fields:
        assert np.array_equal(getattr(grads, name), getattr(expected, name)), name


def test_backward_through_the_batch_by_finite_differences(rng):
    layer = randomize(BatchNorm(C, momentum=0), rng)
    x, grad_output = batch(rng, (3, C, 2)), batch(rng, (3, C, 2))
    layer(x)
    grad_input = layer.backward(grad_output).grad_input
    step = 1e-6
    for index in np.ndindex(x.shape):
        losses = []
        for sign in 1, -1:
            moved = x.astype(np.float64)
            moved[index] += sign * step
            mean, var, _ = moments(moved, 1)
            losses.append((expected_output(layer, moved, mean, var) * grad_output).sum())
        assert abs((losses[0] - losses[1]) / (2 * step) - grad_input[index]) < 2e-5


def test_backward_in_evaluation(rng):
    layer = randomize(BatchNorm(C), rng).eval()
    x, grad_output = batch(rng), batch(rng)
    layer(x)
    grads = layer.backward(grad_output)
    column = (1, C, 1, 1)
    invstd = 1 / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    expected = grad_output * (layer.weight * invstd).reshape(column)
    np.testing.assert_allclose(grads.grad_input, expected, rtol=1e-6)
    normalized = (x - layer.running_mean.reshape(column).astype(np.float64)) * invstd.reshape(column)
    np.testing.assert_allclose(
        grads.grad_weight, (grad_output * normalized).sum((0, 2, 3)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(grads.grad_bias, grad_output.sum((0, 2, 3), np.float64), rtol=1e-5, atol=1e-5)


def test_backward_belongs_to_the_call_not_to_the_mode(rng):
    layer = randomize(BatchNorm(C), rng)
    x, grad_output = batch(rng), batch(rng)
    layer(x)
    trained = layer.backward(grad_output).grad_input
    layer(x)
    assert np.array_equal(layer.eval().backward(grad_output).grad_input, trained)
    layer(x)
    assert not np.allclose(layer.train().backward(grad_output).grad_input, trained)


@pytest.mark.parametrize("training", [True, False])
def test_backward_twice_is_refused(rng, training):
    """Case 37: of a layer used twice, the second gradient would be that of the wrong call."""
    layer = BatchNorm(C).train(training)
    x, other, grad_output = batch(rng), batch(rng), batch(rng)
    layer(x)
    layer(other)
    expected = copy.deepcopy(layer)
    expected(other)
    with pytest.raises(TypeError, match="grad_output"):
        layer.backward(None)  # which does not count
    assert layer.backward(grad_output).grad_input.shape == x.shape
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"once.*batch_norm_forward\(\) and batch_norm_backward\(\), or one layer"
        ):
            layer.backward(grad_output)
    layer(x)
    layer.backward(grad_output)


def test_a_successful_backward_lets_go_of_the_batch(rng):
    layer, x = BatchNorm(C), batch(rng)
    held = sys.getrefcount(x)
    layer(x)
    assert sys.getrefcount(x) > held
    layer.backward(x)
    assert sys.getrefcount(x) == held


def test_backward_in_evaluation_by_a_variance_just_below_zero(rng):
    """Case 35: eps makes up for it."""
    layer = randomize(BatchNorm(C), rng).eval()
    layer.running_var[2] = -9.9e-6
    x, grad_output = batch(rng), batch(rng)
    y = layer(x)
    invstd = 1 / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    expected = (x - layer.running_mean[:, None, None]) * (invstd * layer.weight)[:, None, None]
    np.testing.assert_allclose(y - layer.bias[:, None, None], expected, rtol=1e-5, atol=1e-5)
    expected = grad_output * (invstd * layer.weight)[:, None, None]
    np.testing.assert_allclose(layer.backward(grad_output).grad_input, expected, rtol=1e-6)
    layer(x)
    layer.running_var[2] = -1
    with pytest.raises(ValueError, match=r"var\[2\] \+ eps must be >= 0"):
        layer.backward(grad_output)


def test_backward_needs_a_call(rng):
    layer = BatchNorm(C)
    x = batch(rng)

    def refuses(layer):
        with pytest.raises(RuntimeError, match="needs a call of the layer first"):
            layer.backward(x)

    refuses(layer)
    for change in (
        lambda: layer.load_state_dict(layer.state_dict()),
        layer.reset_running_stats,
        layer.reset_parameters,
    ):
        layer(x)
        layer.backward(x)
        change()
        refuses(layer)
    layer(x)
    for twin in copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)):
        refuses(twin)
    layer.backward(x)


@pytest.mark.parametrize("training", [True, False])
def test_backward_after_a_call_in_place(rng, training):
    layer = BatchNorm(C).train(training)
    x, grad_output = batch(rng), batch(rng)
    for out in x, x[:]:
        layer(x, out=out)
        with pytest.raises(RuntimeError, match=r"out=x"):
            layer.backward(grad_output)
    layer(x, out=np.empty_like(x))
    layer.backward(grad_output)
    both = np.empty((4, 2 * C, 3, 2), np.float32)
    both[:, :C] = x
    layer(both[:, :C], out=both[:, C:])  # side by side in one block of memory is not in place
    grad_input = layer.backward(grad_output).grad_input
    layer(x)
    assert np.array_equal(layer.backward(grad_output).grad_input, grad_input)


def test_backward_checks_its_argument(rng):
    layer = BatchNorm(C)
    layer(batch(rng))
    with pytest.raises(ValueError, match="grad_output must have the shape of x"):
        layer.backward(batch(rng, (4, C, 3)))
    with pytest.raises(TypeError, match=r"grad_output .*float64"):
        layer.backward(batch(rng).astype(np.float64))


# Errors leave everything as it was; so do empty batches


def assert_refused(layer, x, error, match, residual=None, **given):
    out = np.full(x.shape, 9, np.float32)
    x_before, state_before = x.copy(), layer.state_dict()
    with pytest.raises(error, match=match):
        layer(x, residual, given.get("out", out))
    assert_state_equal(layer.state_dict(), state_before)
    assert np.array_equal(x, x_before)
    assert (out == 9).all()


@pytest.mark.parametrize(
    ("attribute", "value", "error", "match"),
    [
        ("running_mean", read_only(np.zeros(C, np.float32)), ValueError, r"running_mean .*read-only"),
        ("running_var", read_only(np.ones(C, np.float32)), ValueError, r"running_var .*read-only"),
        ("running_var", np.ones(4, np.float32), ValueError, r"running_var must have shape \(5,\)"),
        ("running_mean", np.zeros(C), TypeError, r"running_mean .*float64"),
        ("weight", np.ones(4, np.float32), ValueError, r"weight must have shape \(5,\)"),
        ("eps", float("nan"), ValueError, "eps must be"),
        ("momentum", float("nan"), ValueError, "momentum must be finite"),
        ("activation", "gelu", ValueError, "activation must be"),
    ],
)
def test_bad_attribute_stops_training_before_anything_is_written(rng, attribute, value, error, match):
    layer = randomize(BatchNorm(C), rng)
    vars(layer)[attribute] = value  # past the checks of __setattr__
    assert_refused(layer, batch(rng), error, match)


@pytest.mark.parametrize(
    ("attribute", "value", "error", "match"),
    [
        *(
            (name, value, error, rf"{name} must have .*{match}|{name} must be .*{match}")
            for name in STATE[:4]
            for value, error, match in [
                ([1, 2, 3, 4, 5], TypeError, "list"),
                (1.0, TypeError, "float"),
                (np.ones(C), TypeError, "float64"),
                (np.ones(C + 1, np.float32), ValueError, r"\(6,\)"),
                (np.ones((1, C), np.float32), ValueError, r"\(1, 5\)"),
            ]
        ),
        ("num_batches_tracked", 2.5, ValueError, "num_batches_tracked must be a whole number"),
        ("num_batches_tracked", -1, ValueError, "num_batches_tracked must be a whole number"),
        ("num_batches_tracked", 2**63, ValueError, "num_batches_tracked must be a whole number"),
        ("num_batches_tracked", "7", ValueError, "num_batches_tracked must be a whole number"),
        ("num_batches_tracked", [1, 2], ValueError, "num_batches_tracked must be a whole number"),
        ("eps", -1, ValueError, "eps must be finite and >= 0"),  # case 43 from here on
        ("eps", "1e-5", TypeError, "eps must be a number"),
        ("momentum", 1.5, ValueError, "momentum must be"),  # case 36
        ("momentum", "0.1", TypeError, "momentum must be a number"),
        ("num_features", 5.0, TypeError, "num_features must be an int"),
        ("num_features", "5", TypeError, "num_features must be an int"),
        ("num_features", 0, ValueError, "num_features must be at least 1"),
        ("axis", 1.0, TypeError, "axis must be an int"),
        ("activation", "gelu", ValueError, "activation must be"),
        ("negative_slope", float("nan"), ValueError, "negative_slope must be"),
    ],
)
def test_bad_values_are_refused_where_they_are_set(rng, attribute, value, error, match):
    layer = randomize(BatchNorm(C), rng)
    before, described = layer.state_dict(), repr(layer)
    with pytest.raises(error, match=match):
        setattr(layer, attribute, value)
    assert_state_equal(layer.state_dict(), before)
    assert repr(layer) == described
    layer(batch(rng))


def test_arrays_can_be_replaced(rng):
    layer, x = BatchNorm(C), batch(rng)
    for name in STATE[:4]:
        array = np.full(2 * C, 2, np.float32)[::2]
        setattr(layer, name, array)
        assert getattr(layer, name) is array
    layer(x)
    layer.num_batches_tracked = 7
    layer(x)
    assert layer.num_batches_tracked == 8
    assert layer.num_batches_tracked.dtype == np.int64
    layer.num_batches_tracked = counter = np.array([3])
    layer(x)
    assert counter.tolist() == [4]
    layer.num_features = 3
    for name in STATE[:4]:
        setattr(layer, name, np.ones(3, np.float32))
    assert layer(x[:, :3]).shape == (4, 3, 3, 2)


# The counter moves with the averages, or neither does


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("counter", "error", "match"),
    [
        (read_only(np.array(3)), ValueError, "num_batches_tracked is updated in place.*read-only"),
        (np.array(2**63 - 1), ValueError, "num_batches_tracked must be from 0 to .*9223372036854775807"),
        (np.array(-1), ValueError, "num_batches_tracked must be from 0"),
    ],
)  # fmt: skip
def test_a_counter_that_cannot_count_stops_training(rng, momentum, counter, error, match):
    layer = randomize(BatchNorm(C, momentum=momentum), rng)
    layer.num_batches_tracked = counter
    assert_refused(layer, batch(rng), error, match)
    layer.eval()(batch(rng))
    layer.num_batches_tracked = 3
    layer.train()(batch(rng))
    assert layer.num_batches_tracked == 4


def test_a_counter_of_another_type_stops_training(rng):
    layer = randomize(BatchNorm(C), rng)
    for counter in 7, np.array(7.0), np.array([1, 2]), np.array(7, ">i8"):
        vars(layer)["num_batches_tracked"] = counter  # past the check
        before = layer.running_mean.copy(), layer.running_var.copy()
        with pytest.raises(TypeError, match="num_batches_tracked must be an int64 array of one value"):
            layer(batch(rng))
        assert np.array_equal((layer.running_mean, layer.running_var), before)


def test_without_a_counter(rng):
    """As in PyTorch it is not needed, but for averages over all batches."""
    layer, twin = BatchNorm(C), BatchNorm(C)
    layer.num_batches_tracked = None
    x = batch(rng)
    assert np.array_equal(layer(x), twin(x))
    assert np.array_equal(layer.running_mean, twin.running_mean)
    layer.momentum = None
    assert_refused(layer, x, ValueError, "momentum=None .*num_batches_tracked is None; set it to 0")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
def test_an_interrupt_never_parts_counter_and_averages(rng):
    x = batch(rng, (64, C, 1000))
    BatchNorm(C)(x)  # the first call in a process opens files, which an interrupt would leave to be closed

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(50):
            layer = BatchNorm(C)
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (i + 1))
                layer(x)
                while True:
                    pass
            assert layer.num_batches_tracked == layer.running_mean.all()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_bad_input_stops_training_before_anything_is_written(rng):
    layer, x = randomize(BatchNorm(C), rng), batch(rng)
    assert_refused(layer, x[:1, :, :1, :1], ValueError, r"more than 1 value per channel.*\(1, 5, 1, 1\)")
    assert_refused(layer, batch(rng, (1, C)), ValueError, r"more than 1 value per channel.*\(1, 5\)")
    assert_refused(layer, x.astype(np.float64), TypeError, r"x .*float64")
    assert_refused(layer, x[:, :4], ValueError, "x must have 5 channels on axis 1")
    assert_refused(layer, x[0, 0, 0], ValueError, "x must have at least 2 dimensions")
    assert_refused(layer, x, ValueError, "residual must have the shape of x", residual=x[:2])
    assert_refused(layer, x, ValueError, "out must have the shape", out=np.empty(3, np.float32))
    assert_refused(layer, x, ValueError, "out overlaps x", out=x[::-1])
    block = np.ones((5, C), np.float32)
    layer.running_mean = block[4]
    assert_refused(layer, batch(rng, (5, C)), ValueError, "out overlaps running_mean", out=block)
    assert (block == 1).all()


@pytest.mark.parametrize("shape", [(0, C), (0, C, 3), (2, C, 0), (2, C, 0, 3)])
@both_axes
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_empty_batch(rng, shape, axis, options):
    layer = randomize(BatchNorm(C, axis=axis, **options), rng)
    before = layer.state_dict()
    for training in True, False:
        x = batch(rng, shape, axis)
        assert layer.train(training)(x).shape == x.shape
        grads = layer.backward(x)
        assert grads.grad_input.shape == x.shape
        assert grads.grad_weight.tolist() == grads.grad_bias.tolist() == [0] * C
        assert_state_equal(layer.state_dict(), before)


# Parameters and state_dict


def test_reset_works_in_place(rng):
    layer = randomize(BatchNorm(C), rng)
    layer(batch(rng))
    arrays = [getattr(layer, name) for name in STATE]
    layer.reset_running_stats()
    assert not (layer.weight == 1).all()
    assert_state_equal(
        {name: layer.state_dict()[name] for name in STATE[2:]}, BatchNorm(C, affine=False).state_dict()
    )
    layer.reset_parameters()
    assert_state_equal(layer.state_dict(), BatchNorm(C).state_dict())
    assert all(getattr(layer, name) is array for name, array in zip(STATE, arrays, strict=True))
    bare = BatchNorm(C, affine=False, track_running_stats=False)
    bare.reset_parameters()
    assert bare.state_dict() == {}


def test_state_dict_holds_copies(rng):
    layer = BatchNorm(C)
    before = layer.state_dict()
    assert list(before) == STATE
    layer(batch(rng))
    layer.weight[:] = 7
    assert_state_equal(before, BatchNorm(C).state_dict())
    assert before["num_batches_tracked"].dtype == np.int64
    assert before["num_batches_tracked"].shape == ()


def test_load_state_dict_copies_into_the_layers_arrays(rng):
    source, target = randomize(BatchNorm(C), rng), BatchNorm(C)
    source(batch(rng))
    arrays = [getattr(target, name) for name in STATE]
    state = source.state_dict()
    assert target.load_state_dict(state) == ([], [])
    assert_state_equal(target.state_dict(), source.state_dict())
    assert all(getattr(target, name) is array for name, array in zip(STATE, arrays, strict=True))
    state["weight"][:] = 0
    assert_state_equal(target.state_dict(), source.state_dict())
    x = batch(rng)
    assert np.array_equal(target.eval()(x), source.eval()(x))


def test_load_state_dict_takes_what_numpy_can_read(rng, tmp_path):
    source, target = randomize(BatchNorm(C), rng), BatchNorm(C)
    np.savez(tmp_path / "layer.npz", **source.state_dict())
    with np.load(tmp_path / "layer.npz") as file:
        target.load_state_dict(file)
    assert_state_equal(target.state_dict(), source.state_dict())
    state = {name: array.astype(np.float64) for name, array in source.state_dict().items()}
    target.load_state_dict(state | {"weight": state["weight"].tolist(), "num_batches_tracked": 12})
    assert_state_equal(target.state_dict(), source.state_dict() | {"num_batches_tracked": np.array(12)})
    assert target.weight.dtype == np.float32


def test_old_checkpoints_have_no_counter(rng):
    layer = BatchNorm(C)
    layer(batch(rng))
    state = randomize(BatchNorm(C), rng).state_dict()
    del state["num_batches_tracked"]
    assert layer.load_state_dict(state) == ([], [])
    assert_state_equal(layer.state_dict(), state | {"num_batches_tracked": np.array(1)})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": None}, ValueError, r"missing keys \['weight'\], unexpected keys \[\]"),
        ({"bias": None, "gamma": 1}, ValueError, r"missing keys \['bias'\], unexpected keys \['gamma'\]"),
        ({"bn1.weight": 1}, ValueError, r"unexpected keys \['bn1.weight'\]"),
        ({"running_var": np.ones(4)}, ValueError, r"running_var must have shape \(5,\), got \(4,\)"),
        ({"running_var": np.ones((1, 5))}, ValueError, "running_var must have shape"),
        ({"num_batches_tracked": np.zeros(2, int)}, ValueError, "num_batches_tracked must be a whole number"),
        (
            {"num_batches_tracked": 2.5},
            ValueError,
            "num_batches_tracked must be a whole number.*2.5",
        ),  # case 38
        (
            {"num_batches_tracked": np.float32("nan")},
            ValueError,
            "num_batches_tracked must be a whole number",
        ),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked must be a whole number"),
        (
            {"weight": [1, 2, 3, 4, 1e39]},
            ValueError,
            r"weight must be within float32, got 1e\+39 at index \(4,\)",
        ),
        ({"running_var": [1, 1, -1, 1, 1]}, ValueError, r"running_var\[2\] is -1, and eps 1e-05"),  # case 35
        (
            {"running_var": np.ones(5, complex)},
            TypeError,
            "running_var must be castable to float32, got complex128",
        ),
        ({"running_var": ["a"] * 5}, TypeError, "running_var must be castable"),
    ],
)
def test_load_state_dict_checks_before_it_writes(rng, change, error, match):
    layer = randomize(BatchNorm(C), rng)
    before = layer.state_dict()
    state = {name: value for name, value in (BatchNorm(C).state_dict() | change).items() if value is not None}
    with pytest.raises(error, match=match), np.errstate(all="raise"):
        layer.load_state_dict(state)
    assert_state_equal(layer.state_dict(), before)


@pytest.mark.parametrize("name", STATE)
def test_load_state_dict_writes_all_or_nothing(rng, name):
    layer = randomize(BatchNorm(C), rng)
    read_only(getattr(layer, name))
    before = layer.state_dict()
    with pytest.raises(ValueError, match=f"{name} of the layer is read-only; give the layer a writable copy"):
        layer.load_state_dict(BatchNorm(C).state_dict())
    assert_state_equal(layer.state_dict(), before)


def test_load_state_dict_of_the_layers_own_arrays(rng):
    layer = randomize(BatchNorm(C), rng)
    before = layer.state_dict()
    swapped = {"weight": layer.bias, "bias": layer.weight, "running_mean": layer.running_var[::-1]}
    layer.load_state_dict(swapped, strict=False)
    assert_state_equal(
        layer.state_dict(),
        before
        | {"weight": before["bias"], "bias": before["weight"], "running_mean": before["running_var"][::-1]},
    )


@pytest.mark.parametrize(
    "counter",
    [7, 7.0, np.float32(7), np.array(7), np.array([7]), np.array([[7.0]]), np.array([7], np.uint8), [7]],
    ids=repr,
)
def test_load_state_dict_takes_any_whole_counter(counter):  # case 38
    for own in np.array(0), np.array([0]):
        layer = BatchNorm(C)
        layer.num_batches_tracked = own
        layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": counter})
        assert layer.num_batches_tracked is own
        assert own.item() == 7


def test_load_state_dict_of_half_precision(rng):  # case 47
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for dtype in bfloat16, np.float16:
        layer, state = BatchNorm(C), randomize(BatchNorm(C), rng).state_dict()
        half = {name: value.astype(dtype) for name, value in state.items()}
        half["num_batches_tracked"] = np.array(3, dtype)
        layer.load_state_dict(half)
        for name, value in half.items():
            assert np.array_equal(getattr(layer, name), value.astype(np.float64)), name


def test_load_state_dict_of_half_precision_tensors(rng):  # case 47
    torch = pytest.importorskip("torch")
    for dtype in torch.bfloat16, torch.float16:
        layer, theirs = BatchNorm(C), torch.nn.BatchNorm1d(C).to(dtype)
        torch.nn.init.normal_(theirs.weight)
        layer.load_state_dict({name: value.requires_grad_(value.is_floating_point()) for name, value in
                               theirs.state_dict().items()})  # fmt: skip
        for name, value in theirs.state_dict().items():
            assert np.array_equal(getattr(layer, name), value.double().numpy()), name


def test_load_state_dict_of_a_whole_network_names_the_cure():
    state = {
        f"{prefix}.{name}": value
        for prefix in ("bn1", "layer1.0.bn2")
        for name, value in BatchNorm(C).state_dict().items()
    }
    with pytest.raises(ValueError, match=r"from_torch\(state, 'bn1'\) makes .* \(or of 'layer1.0.bn2'\)"):
        BatchNorm(C).load_state_dict(state | {"conv.weight": np.ones(3)})
    fastbn.interop.from_torch(state, "bn1")
    with pytest.raises(ValueError, match="unexpected") as error:
        BatchNorm(C).load_state_dict({"conv.weight": np.ones(3)})
    assert "from_torch" not in str(error.value)


def test_load_state_dict_not_strict(rng):
    source, layer = randomize(BatchNorm(C), rng), BatchNorm(C, bias=False)
    state = source.state_dict()
    del state["running_mean"]
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["running_mean"]
    assert result.unexpected_keys == ["bias"]
    assert np.array_equal(layer.weight, source.weight)
    assert (layer.running_mean == 0).all()
    with pytest.raises(ValueError, match="weight must have shape"):
        layer.load_state_dict({"weight": np.ones(4)}, strict=False)


# Copies, pickles, frozen layers


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(rng, duplicate):
    options = {
        "bias": False,
        "axis": -1,
        "activation": "leaky_relu",
        "negative_slope": 0.2,
        "unbiased": False,
    }
    layer = randomize(BatchNorm2d(C, 1e-3, None, **options), rng)
    layer(batch(rng, axis=-1))
    twin = duplicate(layer)
    assert type(twin) is BatchNorm2d
    assert repr(twin) == repr(layer)
    assert twin.training is True
    assert_state_equal(twin.state_dict(), layer.state_dict())
    before = layer.state_dict()
    x = batch(rng, axis=-1)
    y = twin(x)
    assert_state_equal(layer.state_dict(), before)
    assert np.array_equal(layer(x), y)
    assert_state_equal(layer.state_dict(), twin.state_dict())
    assert duplicate(layer.eval()).training is False


def test_a_pickle_does_not_hold_the_batch(rng):
    layer = BatchNorm(C)
    size = len(pickle.dumps(layer))
    layer(batch(rng, (64, C, 20)))
    assert len(pickle.dumps(layer)) < size + 500  # the averages in float64
    layer.backward(batch(rng, (64, C, 20)))  # which the layer itself still does


def test_a_pickle_of_an_older_version(rng):
    layer, x = randomize(BatchNorm(C), rng), batch(rng)
    old = BatchNorm.__new__(BatchNorm)
    new = ("skip_nonfinite", "_said_nonfinite", "_exact")
    old.__setstate__(
        {name: value for name, value in layer.__getstate__().items() if name not in new} | {"_saved": None}
    )
    assert np.array_equal(old(x), layer(x))
    assert np.array_equal(old.backward(x).grad_input, layer.backward(x).grad_input)
    assert_state_equal(old.state_dict(), layer.state_dict())


@both_axes
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_freeze_evaluates_to_the_same_bits(rng, axis, activation, options):
    layer = BatchNorm(C, 1e-3, axis=axis, activation=activation, negative_slope=0.3, **options)
    layer(batch(rng, axis=axis))
    frozen = randomize(layer, rng).freeze()
    layer.eval()
    x, residual = batch(rng, axis=axis), batch(rng, axis=axis)
    y, with_residual = layer(x), layer(x, residual)
    randomize(layer, rng)
    layer.train()(x)
    assert np.array_equal(frozen(x), y)
    assert np.array_equal(frozen(x, residual), with_residual)


def test_freeze_needs_running_averages():
    with pytest.raises(ValueError, match=r"freeze.* needs running statistics"):
        BatchNorm(C, track_running_stats=False).freeze()


# PyTorch as a judge

TORCH = [
    ("BatchNorm1d", (6, C)),
    ("BatchNorm1d", (4, C, 6)),
    ("BatchNorm2d", (4, C, 3, 2)),
    ("BatchNorm3d", (2, C, 3, 2, 4)),
]


@pytest.mark.parametrize(("name", "shape"), TORCH)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_layer_is_pytorchs(rng, name, shape, options):
    torch = pytest.importorskip("torch")
    ours, theirs = getattr(fastbn, name)(C, **options), getattr(torch.nn, name)(C, **options)
    assert repr(ours) == repr(theirs)
    randomize(ours, rng)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in ours.state_dict().items()})
    for training in True, True, True, False:
        x, grad_output = batch(rng, shape), batch(rng, shape)
        tensor = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        expected = theirs.train(training)(tensor)
        expected.backward(torch.from_numpy(grad_output))
        y = ours.train(training)(x)
        grads = ours.backward(grad_output)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads.grad_input, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)
        if theirs.weight is not None:
            np.testing.assert_allclose(grads.grad_weight, theirs.weight.grad.numpy(), rtol=1e-4, atol=1e-5)
        if theirs.bias is not None:
            np.testing.assert_allclose(grads.grad_bias, theirs.bias.grad.numpy(), rtol=1e-4, atol=1e-5)
        state = theirs.state_dict()
        assert list(ours.state_dict()) == list(state)
        for key, value in ours.state_dict().items():
            np.testing.assert_allclose(value, state[key].numpy(), rtol=1e-5, atol=1e-6)
            assert value.shape == tuple(state[key].shape)
    back = getattr(fastbn, name)(C, **options)
    back.load_state_dict(theirs.state_dict())
    assert_state_equal(back.state_dict(), {key: value.numpy() for key, value in theirs.state_dict().items()})


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (4, C, 3), (4, C)])
def test_what_pytorch_refuses_is_refused(rng, shape):
    torch = pytest.importorskip("torch")
    x = batch(rng, shape)
    with pytest.raises(ValueError, match=r"Expected more than 1 value|expected 4D input") as theirs:
        torch.nn.BatchNorm2d(C)(torch.from_numpy(x))
    with pytest.raises(ValueError, match=r"more than 1 value|expected 4D input") as ours:
        BatchNorm2d(C)(x)
    if "4D" in str(theirs.value):
        assert str(ours.value) == str(theirs.value)
