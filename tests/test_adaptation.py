"""adapt: evaluation by running averages and the batch together, which leaves layers as they are."""

import threading

import numpy as np
import pytest
import reference

import fastbn
from fastbn import BatchNorm, BatchNorm1d, BatchNorm2d, adapt
from fastbn.stand_ins import stand_ins

C = 5


@pytest.fixture(autouse=True)
def nothing_stands_in_afterwards():
    yield
    assert not stand_ins


def batch(rng, shape=(6, C, 3, 2), axis=1):
    """Values with a mean and deviation of their own in each channel; `shape` has the channels second."""
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    x = rng.standard_normal(shape) * rng.uniform(0.5, 2, per_channel) + rng.uniform(-3, 3, per_channel)
    return np.ascontiguousarray(np.moveaxis(x.astype(np.float32), 1, axis))


def trained(rng, kind=BatchNorm, **options):
    layer = kind(C, **options)
    for name in "weight", "bias", "running_mean", "running_var":
        array = getattr(layer, name)
        array[:] = rng.uniform(0.5, 1.5, array.shape)
    return layer


def mixed(layer, x, prior):
    """Mean and variance by the formula of the paper (Schneider et al., 2020, section 3), in float64."""
    mean, var, count = reference.batch_stats(x, layer.axis)
    n = len(x)  # images, not values
    share = prior / (prior + n)
    return (
        share * layer.running_mean.astype(np.float64) + (1 - share) * mean,
        share * layer.running_var.astype(np.float64) + (1 - share) * var * count / (count - 1),
    )


def states_equal(layer, state):
    now = layer.state_dict()
    return now.keys() == state.keys() and all(np.array_equal(now[name], state[name]) for name in now)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("prior", [0, 0.5, 16, np.float32(1000)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, C), (1, C, 4), (6, C, 3, 2)], ids=str)
def test_adapt_is_that_of_the_paper(rng, axis, prior, training, shape):
    layer = trained(rng, axis=axis).train(training)
    x, grad_output = batch(rng, shape, axis), batch(rng, shape, axis)
    before = layer.state_dict()
    mean, var = mixed(layer, x, float(prior))
    with adapt(layer, prior=prior):
        y = layer(x)
        assert layer.training is training
    expected = reference.forward(x, mean, var, layer.weight, layer.bias, axis=axis)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    assert states_equal(layer, before)
    grads = layer.backward(grad_output)
    expected = reference.backward(
        grad_output, x, mean, var, layer.weight, layer.bias, training=False, axis=axis
    )
    for ours, theirs in zip(grads[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_by_default_the_prior_is_16(rng):
    layer, x = trained(rng), batch(rng)
    with adapt(layer):
        y = layer(x)
    with adapt(layer, prior=16):
        assert np.array_equal(layer(x), y)
    with adapt(layer, prior=17):
        assert not np.array_equal(layer(x), y)


def test_with_no_prior_the_averages_do_not_count(rng):
    layer, twin = trained(rng), trained(rng)
    layer.weight[:], layer.bias[:] = twin.weight, twin.bias
    layer.running_mean[:] = np.nan
    layer.running_var[:] = np.inf
    x = batch(rng)
    with adapt(layer, prior=0), adapt(twin, prior=0):
        assert np.array_equal(layer(x), twin(x))


def test_a_large_prior_is_evaluation(rng):
    layer, x = trained(rng).eval(), batch(rng)
    expected = layer(x)
    with adapt(layer, prior=1e12):
        np.testing.assert_allclose(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_what_a_call_has_besides_x(rng):
    layer = trained(rng, BatchNorm2d, activation="relu6")
    x, residual = batch(rng), batch(rng)
    out = np.empty_like(x)
    mean, var = mixed(layer, x, 16)
    with adapt(layer):
        assert layer(x, residual, out, num_threads=1) is out
    expected = reference.forward(
        x, mean, var, layer.weight, layer.bias, residual=residual, activation="relu6"
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
    assert layer.backward(x).grad_residual.shape == x.shape


def test_large_means(rng):
    layer = BatchNorm1d(3).eval()
    x = (rng.standard_normal((2, 2000, 3)) * 1e-2 + 1e4).astype(np.float32)
    fastbn.recalibrate(layer, [x[0]])
    mean, var, n = reference.batch_stats(x[0])
    batch_mean, batch_var, _ = reference.batch_stats(x[1])
    share = 16 / 2016
    unbiased = n / (n - 1)
    expected = reference.normalize(
        x[1],
        share * mean + (1 - share) * batch_mean,
        (share * var + (1 - share) * batch_var) * unbiased,
    )
    with adapt(layer):
        np.testing.assert_allclose(layer(x[1]), expected, rtol=2e-5, atol=2e-5)


def test_an_exception_ends_it_too(rng):
    layer, x = trained(rng).eval(), batch(rng)
    expected, before = layer(x), layer.state_dict()

    def fail(error):
        with adapt(layer):
            layer(x)
            raise error

    for error in RuntimeError, KeyboardInterrupt:
        with pytest.raises(error):
            fail(error)
        assert np.array_equal(layer(x), expected)
        assert states_equal(layer, before)
        assert not layer.training


def test_several_layers_and_those_beside(rng):
    layers = [trained(rng).eval() for _ in range(3)]
    x = batch(rng)
    plain = [layer(x) for layer in layers]
    with adapt(layer for layer in layers[:2]):
        adapted = [layer(x) for layer in layers]
    assert [np.array_equal(a, b) for a, b in zip(adapted, plain, strict=True)] == [False, False, True]
    with adapt([]):
        assert np.array_equal(layers[0](x), plain[0])


def test_the_inner_one_counts(rng):
    layer, x = trained(rng), batch(rng)
    results = []
    for prior in 1, 2:
        with adapt(layer, prior=prior):
            results.append(layer(x))
    with adapt(layer, prior=1):
        with adapt(layer, prior=2):
            assert np.array_equal(layer(x), results[1])
        assert np.array_equal(layer(x), results[0])


def test_in_all_threads(rng):
    layer, x = trained(rng).eval(), batch(rng)
    seen = []
    with adapt(layer):
        expected = layer(x)
        thread = threading.Thread(target=lambda: seen.append(layer(x)))
        thread.start()
        thread.join()
    assert np.array_equal(seen[0], expected)


def test_variants_do_not_matter(rng):
    x = batch(rng)
    layer, plain = trained(rng, virtual_batch_size=2, renorm=True), trained(rng)
    plain.load_state_dict(layer.state_dict())
    with adapt([layer, plain]):
        assert np.array_equal(layer(x), plain(x))


def test_an_empty_batch(rng):
    layer = trained(rng)
    with adapt(layer):
        assert layer(np.empty((0, C, 3), np.float32)).shape == (0, C, 3)


def test_bad_values_stay_in_their_channel(rng):
    layer, x = trained(rng), batch(rng)
    with adapt(layer):
        expected = layer(x)
        x[0, 2, 0, 0] = np.nan
        y = layer(x)
    good = [0, 1, 3, 4]
    assert np.array_equal(y[:, good], expected[:, good])
    assert np.isnan(y[:, 2]).all()


def test_bad_arguments(rng):
    layer, x = trained(rng, BatchNorm1d), batch(rng, (6, C))
    for given, error, match in (
        (layer.freeze(), TypeError, "not iterable"),
        ([layer.freeze()], TypeError, "got FrozenBatchNorm; keep the layer that was frozen"),
        ([layer, None], TypeError, r"layers that are a fastbn.BatchNorm, got NoneType"),
        (BatchNorm(C, track_running_stats=False), ValueError, "needs running averages"),
    ):
        with pytest.raises(error, match=match), adapt(given):
            pass
    for prior, error in ("16", TypeError), (True, TypeError), (-1, ValueError), (np.inf, ValueError):
        with pytest.raises(error, match="prior must be"), adapt(layer, prior=prior):
            pass
    with adapt(layer):
        with pytest.raises(ValueError, match=r"adapt\(\) needs more than 1 value per channel"):
            layer(x[:1])
        with pytest.raises(ValueError, match="x must have 5 channels"):
            layer(x[:, :4])
        with pytest.raises(TypeError, match="x must have dtype float32"):
            layer(x.astype(np.float64))
