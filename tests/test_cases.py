"""Cases in which batch normalization has gone wrong elsewhere and that no other file here is about."""

import subprocess
import sys

import numpy as np
import pytest
import reference
from layouts import arrange
from operations import OPERATIONS, assert_same_bits, call, problem, run

import fastbn

both_axes = pytest.mark.parametrize("axis", [1, -1])

# Elsewhere: 1, 2, 3, 4 and 9 in test_accuracy.py; 5, 7, 12, 13, 15 and 20 in test_errors.py; 10, 12, 13 and
# 14 in test_layouts.py; 16 in test_statistics.py; 18 in test_fork.py; 22 and 23 in test_determinism.py.


@both_axes
@pytest.mark.parametrize(
    "shape", [(0, 5), (0, 5, 3), (0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0), (0, 5, 0, 0)], ids=str
)
def test_empty_batch(isa, shape, axis):  # case 6
    p = problem(shape, axis)
    for operation in OPERATIONS:
        results = run(operation, p, *([] if operation == "batch_stats" else ["relu", True]), num_threads=3)
        for name in "y", "grad_input", "grad_residual":
            assert results.get(name, p.x).shape == p.x.shape
            assert results.get(name, p.x).dtype == np.float32
        for name in "grad_weight", "grad_bias", "mean", "var":
            assert results.get(name, np.zeros(5)).tolist() == [0] * 5
        assert results.get("count", 0) == 0
        assert np.array_equal(results.get("running_mean", p.running_mean), p.running_mean)
        assert np.array_equal(results.get("running_var", p.running_var), p.running_var)
    out = np.empty_like(p.x)
    assert fastbn.batch_norm(p.x, None, None, training=True, axis=axis, out=out) is out
    running = p.running_mean.copy(), p.running_var.copy()
    call(fastbn.update_running, *running, fastbn.batch_stats(p.x, axis=axis))
    layer = fastbn.BatchNorm(5, axis=axis)
    before = layer.state_dict()
    layer(p.x)
    assert_same_bits(layer.state_dict(), before)


@both_axes
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("shape", [(6, 5), (300, 3), (8, 17, 7, 7), (2, 130, 5), (2, 3, 70, 60)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_what_is_not_finite_stays_in_its_channel(isa, shared_out, shape, bad, activation, axis):  # case 8
    clean = problem(shape, axis)
    p = clean._replace(x=clean.x.copy())
    where = tuple(n // 2 if i != axis % len(shape) else 1 for i, n in enumerate(p.x.shape))
    p.x[where] = bad
    for operation in OPERATIONS:
        options = [activation, activation is not None] if operation != "batch_stats" else []
        expected, results = (
            run(operation, clean, *options, num_threads=1),
            run(operation, p, *options, num_threads=3),
        )
        for name, value in results.items():
            if name == "count":
                continue
            of_channel = axis % len(shape) if value.ndim > 1 else 0
            ours, theirs = (np.moveaxis(r[name], of_channel, 0) for r in (results, expected))
            others = np.arange(len(ours)) != 1
            assert ours[others].tobytes() == theirs[others].tobytes(), (operation, name)
            if operation in ("batch_stats", "forward", "training") and (name != "y" or activation is None):
                assert not np.isfinite(ours[1]).any(), (operation, name)
            if operation == "backward" and name in ("grad_input", "grad_weight") and activation is None:
                assert not np.isfinite(ours[1]).any(), (operation, name)
        if operation in ("inference", "forward_given_stats", "frozen_backward") and activation is None:
            elementwise = "grad_input" if "backward" in operation else "y"
            changed = results[elementwise] != expected[elementwise]
            assert changed.sum() == (elementwise == "y")


@both_axes
def test_grad_output_that_is_not_finite_stays_in_its_channel(isa, axis):  # case 8
    clean = problem((8, 17, 7, 7), axis)
    p = clean._replace(grad_output=clean.grad_output.copy())
    np.moveaxis(p.grad_output, axis, 0)[1, 3, 4, 5] = np.nan
    for operation in "backward", "frozen_backward":
        expected, results = run(operation, clean), run(operation, p)
        for name, of_channel in ("grad_input", axis), ("grad_weight", 0), ("grad_bias", 0):
            ours, theirs = (np.moveaxis(r[name], of_channel, 0) for r in (results, expected))
            others = np.arange(17) != 1
            assert np.array_equal(ours[others], theirs[others])
            assert np.isnan(ours[1]).any()


@both_axes
def test_backward_of_inference(isa, axis):  # case 11
    p = problem((4, 17, 9), axis)
    stats = fastbn.BatchStats(p.running_mean, p.running_var, 1)
    grads = call(fastbn.batch_norm_backward, p.grad_output, p.x, stats, p.weight, training=False, axis=axis)
    scale = reference.column(p.weight / np.sqrt(p.running_var.astype(np.float64) + 1e-5), 3, axis)
    np.testing.assert_allclose(grads.grad_input, p.grad_output * scale, rtol=3e-7)
    xhat = reference.normalize(p.x, p.running_mean, p.running_var, axis=axis)
    others = reference.others(p.x, axis)
    np.testing.assert_allclose(grads.grad_weight, (p.grad_output * xhat).sum(others), rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads.grad_bias, p.grad_output.sum(others, np.float64), rtol=0, atol=1e-5)


ENVIRONMENT = """
import numpy as np
def state():
    tiny = np.float32(1e-40) * np.float32([1.0])  # computed, and with vectors, not folded
    return 5e-324 != 0, 5e-324 * 1.0 != 0, tiny[0] != 0, float(np.finfo(np.float32).smallest_subnormal)
before = state()
import fastbn
assert state() == before == (True, True, True, 1.401298464324817e-45), (before, state())
x = np.ones((8, 16, 64, 64), np.float32)
for isa in fastbn._kernels.supported_isas():
    fastbn._kernels.set_isa(isa)
    y, stats = fastbn.batch_norm_forward(x, num_threads=3)
    fastbn.batch_norm_backward(x, x, stats, num_threads=3)
    assert state() == before
    zero, one = np.zeros(16, np.float32), np.ones(16, np.float32)
    subnormal = fastbn.batch_norm(x * np.float32(1e-40), zero, one, eps=0, num_threads=3)
    assert (subnormal == np.float32(1e-40)).all()  # in all threads, those of the pool too
"""


def test_floating_point_environment_stays_as_it_was():  # case 19
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ENVIRONMENT], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@both_axes
@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_variance_and_no_eps(isa, axis, activation):  # case 20
    p = problem((4, 17, 9), axis)
    p = p._replace(x=np.full_like(p.x, 3.7))
    bias = np.broadcast_to(reference.column(p.bias, 3, axis), p.x.shape).astype(np.float32)
    bias = reference.activate(bias, activation)
    options = {"eps": 0.0, "axis": axis, "activation": activation}
    y, stats = call(fastbn.batch_norm_forward, p.x, p.weight, p.bias, **options)
    assert np.array_equal(y, bias)
    y = call(fastbn.batch_norm, p.x, p.running_mean, p.running_var * 0, p.weight, p.bias, **options)
    assert np.array_equal(y, bias)
    for training in True, False:
        grads = call(
            fastbn.batch_norm_backward,
            p.grad_output,
            p.x,
            stats,
            p.weight,
            p.bias,
            training=training,
            **options,
        )
        assert (grads.grad_input == 0).all()
        assert (grads.grad_weight == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axis"), [((2**16 + 1, 2, 2**14), 1), ((2**12 + 1, 2**12, 128), -1)], ids=["planes", "rows"]
)
def test_more_than_2_to_the_31_elements(shape, axis):  # case 21
    values = np.random.default_rng(0).standard_normal((1, *shape[1:]), dtype=np.float32)
    x = np.broadcast_to(values, shape)
    assert x.size > 2**31
    mean, var, count = reference.batch_stats(values, axis)
    stats = fastbn.batch_stats(x, axis=axis)
    assert stats.count == x.size // shape[axis] == count * shape[0]
    np.testing.assert_allclose(stats.mean, mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(stats.var, var, rtol=2e-6)
    stats_of_values = fastbn.batch_stats(values, axis=axis)
    np.testing.assert_allclose(stats.var, stats_of_values.var, rtol=2e-6)


@both_axes
@pytest.mark.parametrize("momentum", [0.1, 0.75, None])
def test_counter_and_averages(momentum, axis):  # case 26
    layer = fastbn.BatchNorm(5, momentum=momentum, axis=axis)
    mean, var = np.zeros(5), np.ones(5)
    for i in range(1, 6):
        x = problem((4, 5, 6), axis, seed=i, offset=i).x
        layer(x)
        assert layer.num_batches_tracked == i
        weight = 1 / i if momentum is None else momentum
        mean, var = reference.update_running(mean, var, *reference.batch_stats(x, axis), momentum=weight)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)
        layer.eval()(x)
        layer.train()
        assert layer.num_batches_tracked == i


@both_axes
def test_without_running_statistics_evaluation_takes_those_of_the_batch(axis):  # case 26
    layer = fastbn.BatchNorm(5, track_running_stats=False, axis=axis)
    x = problem((4, 5, 6), axis).x
    expected = reference.forward(x, *reference.batch_stats(x, axis)[:2], axis=axis)
    for mode in True, False:
        np.testing.assert_allclose(layer.train(mode)(x), expected, rtol=0, atol=4e-6)
    assert layer.num_batches_tracked is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 1, 3, 3), (1, 1, 50, 50), (5, 4, 1, 1), (7, 1), (1, 3, 1, 9)], ids=str)
def test_single_channels_and_single_pixels(isa, shared_out, shape, layout):  # case 10
    """Sizes of 1 give strides that mean nothing and layouts that cannot be told apart."""
    p = problem(shape, x=layout)
    nonsense = np.lib.stride_tricks.as_strided(
        p.x, p.x.shape, [s if n > 1 else 12345 * 4 for n, s in zip(p.x.shape, p.x.strides, strict=True)]
    )
    for operation in OPERATIONS:
        assert_same_bits(
            run(operation, p._replace(x=nonsense), num_threads=3), run(operation, p, num_threads=1)
        )
    assert arrange(p.x, layout).shape == shape
