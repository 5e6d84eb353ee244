"""Arguments that once ended the process or gave a wrong number without a word."""

import numpy as np
import pytest

import fastbn

C = 4
X = np.random.default_rng(0).standard_normal((6, C, 5), np.float32)


def vectors(n, value=1.0):
    return [np.full(C, value, np.float32) for _ in range(n)]


def altered(name, array):
    """A BatchStats that somebody has changed behind its back."""
    stats = fastbn.batch_stats(X)
    object.__setattr__(stats, name, array)
    return stats


class ChangeableStats(fastbn.BatchStats):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


USES = {
    "forward": lambda stats: fastbn.batch_norm_forward(X, stats=stats),
    "backward": lambda stats: fastbn.batch_norm_backward(X, X, stats),
    "backward, fixed": lambda stats: fastbn.batch_norm_backward(X, X, stats, training=False),
    "update_running": lambda stats: fastbn.update_running(*vectors(2), stats),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize(
    "array",
    [
        np.ones(0),
        np.ones(1),
        np.ones((C, 1)),
        np.ones(C, np.float32),
        np.ones(C, ">f8"),
        np.ones(2 * C)[::2],
        np.ones(C)[::-1],
        [1.0] * C,
        None,
    ],
    ids=lambda array: f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}",
)
def test_altered_stats(use, name, array):
    with pytest.raises((TypeError, ValueError), match="stats"):
        use(altered(name, array))
    stats = ChangeableStats(np.zeros(C), np.ones(C), 30)
    setattr(stats, name, array)
    with pytest.raises((TypeError, ValueError), match="stats"):
        use(stats)


def test_running_statistics_of_none():
    with pytest.raises(TypeError, match="running_var"):
        fastbn.FrozenBatchNorm(np.ones(3, np.float32), None)
    with pytest.raises(TypeError, match="running_mean"):
        fastbn.FrozenBatchNorm(None, np.ones(3, np.float32))
    for name, other in ("running_var", "running_mean"), ("running_mean", "running_var"):
        layer = fastbn.BatchNorm(C).eval()
        setattr(layer, name, None)
        for call in (
            lambda layer=layer: layer(X),
            layer.freeze,
            lambda layer=layer: fastbn.fold_linear(np.ones((C, 3), np.float32), None, layer),
            lambda layer=layer: layer.train()(X),
        ):
            with pytest.raises(ValueError, match=f"{name} is None, but {other} is not"):
                call()
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("device", [(), (1,), None, 1, ("cpu", 0)])
def test_a_dlpack_device_that_is_none(device):
    class Strange:
        def __dlpack__(self, **options):
            raise BufferError("no")

        def __dlpack_device__(self):
            return device

    with pytest.raises(TypeError, match="x must be a float32"):
        fastbn.batch_stats(Strange())


def test_statistics_of_a_whole_batch_with_a_part_of_it():
    """Case 29."""
    stats = fastbn.batch_stats(X)
    with pytest.raises(ValueError, match=r"stats are of 30 values per channel, but x has 15; .*whole batch"):
        fastbn.batch_norm_backward(X[:3], X[:3], stats)
    fastbn.batch_norm_backward(X[:3], X[:3], stats, training=False)
    with pytest.raises(ValueError, match="stats are of 1180591620717411303424 values"):
        fastbn.batch_norm_backward(X, X, fastbn.BatchStats(stats.mean, stats.var, 1 << 70))


def test_counts_beyond_64_bits():
    many = fastbn.BatchStats(np.full(C, 2.0), np.full(C, 3.0), 1 << 70)
    mean, var = vectors(2)
    fastbn.update_running(mean, var, many, 1.0)
    assert (mean == 2).all()
    assert (var == 3).all()
    fastbn.batch_norm_forward(X, stats=many)
    assert (many + many).count == 1 << 71


@pytest.mark.parametrize("momentum", [-0.1, 1.5, 99, np.nan, -np.inf])
def test_momentum_out_of_range(momentum):
    """Case 36."""
    running = vectors(2)
    with pytest.raises(ValueError, match=r"momentum must .* \[0, 1\]"):
        fastbn.batch_norm(X, *running, training=True, momentum=momentum)
    with pytest.raises(ValueError, match="momentum"):
        fastbn.update_running(*running, fastbn.batch_stats(X), momentum)
    with pytest.raises(ValueError, match="momentum"):
        fastbn.BatchNorm(C, momentum=momentum)
    layer = fastbn.BatchNorm(C)
    with pytest.raises(ValueError, match="momentum"):
        layer.momentum = momentum
    assert layer.momentum == 0.1
    vars(layer)["momentum"] = momentum  # past the check
    with pytest.raises(ValueError, match="momentum"):
        layer(X)
    assert (np.array(running) == 1).all()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0, 1])
def test_momentum_at_the_ends(momentum):
    running = vectors(2)
    fastbn.batch_norm(X, *running, training=True, momentum=momentum, unbiased=False)
    expected = [fastbn.batch_stats(X).mean, fastbn.batch_stats(X).var] if momentum else np.ones((2, C))
    np.testing.assert_allclose(running, expected, rtol=1e-6)


@pytest.mark.parametrize("slope", [1e300, -1e39, np.inf, np.nan])
def test_slope_beyond_float32(slope):
    how = {"activation": "leaky_relu", "negative_slope": slope}
    for call in (
        lambda: fastbn.batch_norm_forward(X, **how),
        lambda: fastbn.batch_norm(X, *vectors(2), **how),
        lambda: fastbn.batch_norm_backward(X, X, fastbn.batch_stats(X), **how),
        lambda: fastbn.FrozenBatchNorm(*vectors(2), **how),
        lambda: fastbn.BatchNorm(C, **how),
    ):
        with pytest.raises(ValueError, match="negative_slope must be finite, in float32 too"):
            call()


@pytest.mark.parametrize("num_threads", [0, -1, 1025, 10**6, 1 << 63, -(1 << 70)])
def test_num_threads_out_of_range(num_threads):
    layer = fastbn.BatchNorm(C)
    layer(X)
    frozen = layer.freeze()
    for call in (
        lambda: fastbn.batch_stats(X, num_threads=num_threads),
        lambda: layer(X, num_threads=num_threads),
        lambda: layer.backward(X, num_threads=num_threads),
        lambda: frozen(X, num_threads=num_threads),
    ):
        with pytest.raises(ValueError, match="num_threads must be from 1 to 1024, got"):
            call()
    assert layer.num_batches_tracked == 1


def test_num_threads_of_layers():
    x = np.random.default_rng(0).standard_normal((8, 64, 40, 40), np.float32)
    layer = fastbn.BatchNorm2d(64)
    results = []
    for num_threads in (1, 2, 3):
        y = layer(x, num_threads=num_threads)
        grads = layer.backward(x, num_threads=num_threads)
        results.append([a.tobytes() for a in (y, *grads[:3])])
    assert results[0] == results[1] == results[2]
    frozen = layer.freeze()
    expected = layer.eval()(x, num_threads=1).tobytes()
    assert frozen(x, num_threads=2).tobytes() == expected


def test_a_sum_with_eps_below_zero():
    """Case 35."""
    mean, var = vectors(2)
    var[2] = -0.5
    for call in (
        lambda: fastbn.batch_norm(X, mean, var),
        lambda: fastbn.FrozenBatchNorm(mean, var),
    ):
        with pytest.raises(ValueError, match=r"running_var\[2\] \+ eps must be >= 0, got -0.5 \+ 1e-05"):
            call()
    var[2] = -9.99e-6
    y = fastbn.batch_norm(X, mean, var)
    exact = (X[:, 2].astype(np.float64) - 1) / np.sqrt(var[2].astype(np.float64) + 1e-5)
    np.testing.assert_allclose(y[:, 2], exact, rtol=1e-6)
    var[1] = np.nan
    assert np.isnan(fastbn.batch_norm(X, mean, var)[:, 1]).all()


def test_out_is_x_whose_elements_share_memory():
    b = np.zeros(100, np.float32)
    x = np.lib.stride_tricks.as_strided(b, (3, 4, 8), (0, 32, 4))
    for call in (
        lambda: fastbn.batch_norm_forward(x, out=x),
        lambda: fastbn.batch_norm(x, *vectors(2), out=x),
    ):
        with pytest.raises(ValueError, match="out has elements that share memory"):
            call()


def test_running_arrays_that_overlap():
    x = X.copy()
    mean, var, weight, bias = vectors(4)
    shared = np.ones(2 * C, np.float32)
    for (running_mean, running_var, *affine), message in [
        ((mean, mean), "running_mean overlaps running_var"),
        ((shared[:C], shared[1 : C + 1]), "running_mean overlaps running_var"),
        ((x[0, :, 0], var), "running_mean overlaps x"),
        ((mean, x[0, :, 0]), "running_var overlaps x"),
        ((weight, var, weight, bias), "running_mean overlaps weight"),
        ((mean, bias, weight, bias), "running_var overlaps bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastbn.batch_norm(x, running_mean, running_var, *affine, training=True)
    residual = np.ones_like(x)
    with pytest.raises(ValueError, match="running_mean overlaps residual"):
        fastbn.batch_norm(x, residual[0, :, 0], var, training=True, residual=residual)
    one_place = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (C,), (0,))
    with pytest.raises(ValueError, match="running_var has elements that share memory"):
        fastbn.batch_norm(x, mean, one_place, training=True)
    with pytest.raises(ValueError, match="running_mean overlaps running_var"):
        fastbn.update_running(mean, mean, fastbn.batch_stats(x))
    np.testing.assert_array_equal(x, X)
    assert (np.array([mean, var, weight, bias]) == 1).all()
