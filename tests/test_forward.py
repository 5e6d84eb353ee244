"""Forward operations against the oracle: shapes around all edges of the kernels, options, activations."""

import numpy as np
import pytest
import reference
from operations import (
    ACTIVATIONS,
    OUTPUT,
    SLOPE,
    SMOOTH,
    UNFUSED,
    assert_same_bits,
    assert_within,
    call,
    check,
    problem,
    run,
)

import fastbn

# N, C, S around the edges of vectors (4 to 16 lanes), of 16 partial sums (planes of up to 256 values) and
# 64, of pieces of long runs (128 values, from 256 on), of tiles (4096 values of a plane, 4 to 64 short
# planes, 256 rows), of blocks of channels (64) and columns (1024, 2048), and of the folding of few channels
# into wide rows.
SIZES = [
    (2, 1, 1), (3, 16, 1), (83, 3, 1), (600, 64, 1), (300, 520, 1), (13, 1040, 1), (5, 2060, 1),
    (40000, 3, 1), (1, 3, 2), (8, 130, 2), (2, 17, 3), (3, 64, 7), (8, 1, 15), (1, 65, 16), (2, 16, 17),
    (3, 3, 31), (2, 130, 49), (83, 3, 49), (84, 3, 49), (8, 17, 63), (3, 16, 64), (1, 64, 65),
    (2, 3, 127), (8, 65, 169), (65, 2, 16), (5, 17, 255), (5, 3, 256), (17, 3, 257), (5, 3, 767),
    (3, 1, 1300), (2, 3, 4095), (2, 3, 4096), (1, 17, 4097), (2, 2, 8193), (3, 1, 12544),
    (1, 16, 12544),
]  # fmt: skip
FORWARDS = ("batch_stats", "forward", "forward_given_stats", "training", "inference")

RANKS = [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 4, 3), (2, 3, 2, 1, 3, 2)]

ranks = pytest.mark.parametrize("shape", RANKS, ids=len)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
both_axes = pytest.mark.parametrize("axis", [1, -1])


def shape_of(size):
    return size if size[2] > 1 else size[:2]


@both_axes
@sizes
def test_against_the_oracle(isa, size, axis):
    p = problem(shape_of(size), axis)
    for operation in FORWARDS:
        check(operation, p)
    check("training", p, "relu", add=True)
    check("inference", p, "relu", add=True)


@pytest.mark.one_in(2)
@both_axes
@sizes
def test_streamed_against_the_oracle(isa, streamed, size, axis):
    p = problem(shape_of(size), axis)
    check("training", p)
    check("inference", p)


@pytest.mark.one_in(3)
@both_axes
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", [name for name in FORWARDS if name not in UNFUSED])
def test_activations_and_residual(isa, streamed, operation, activation, add, axis):
    for shape in (3, 17, 7, 9), (2, 130, 1, 5), (2, 3, 70, 60), (9, 65):
        check(operation, problem(shape, axis), activation, add)


@both_axes
@ranks
def test_ranks(isa, shape, axis):
    for operation in FORWARDS:
        check(operation, problem(shape, axis))


@pytest.mark.parametrize("axis", range(-4, 4))
def test_any_axis(isa, axis):
    for operation in FORWARDS:
        check(operation, problem((4, 5, 6, 7), axis))


@both_axes
@pytest.mark.parametrize("size", [(2, 17, 169), (300, 3, 49), (40, 130, 1), (2, 3, 5000)], ids=str)
def test_out_is_what_is_returned(isa, shared_out, size, axis):
    p = problem(shape_of(size), axis)
    for operation in FORWARDS[1:]:
        fresh = run(operation, p, "leaky_relu", True, num_threads=3)
        out = np.full(p.x.shape, np.nan, np.float32)
        assert_same_bits(check(operation, p, "leaky_relu", True, out, 3), fresh, operation)


@both_axes
@pytest.mark.parametrize("eps", [0, 1e-12, 1e-3, 10.0])
def test_eps(isa, eps, axis):
    p = problem((4, 5, 6), axis)
    mean, var, _ = reference.batch_stats(p.x, axis)
    for training, stats in (True, (mean, var)), (False, (p.running_mean, p.running_var)):
        running = p.running_mean.copy(), p.running_var.copy()
        y = call(
            fastbn.batch_norm, p.x, *running, p.weight, p.bias, training, eps=eps, axis=axis, writes=running
        )
        expected = reference.forward(p.x, *stats, p.weight, p.bias, eps, axis)
        assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weight_and_bias_are_optional_each_by_itself(isa, weight, bias, training):
    p = problem((4, 17, 6))
    given = {"weight": p.weight if weight else None, "bias": p.bias if bias else None}
    running = p.running_mean.copy(), p.running_var.copy()
    y = call(fastbn.batch_norm, p.x, *running, **given, training=training, writes=running)
    stats = reference.batch_stats(p.x)[:2] if training else (p.running_mean, p.running_var)
    expected = reference.forward(p.x, *stats, **given)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)))


def test_positional_order_is_that_of_pytorch():
    p = problem((4, 5, 6))
    running = p.running_mean.copy(), p.running_var.copy()
    y = fastbn.batch_norm(p.x, *running, p.weight, p.bias, True, 0.3, 1e-2)
    again = p.running_mean.copy(), p.running_var.copy()
    named = fastbn.batch_norm(
        p.x, running_mean=again[0], running_var=again[1], weight=p.weight, bias=p.bias, training=True,
        momentum=0.3, eps=1e-2,
    )  # fmt: skip
    assert_same_bits({"y": y, "m": running[0], "v": running[1]}, {"y": named, "m": again[0], "v": again[1]})
    assert not np.array_equal(y, fastbn.batch_norm(p.x, None, None, p.weight, p.bias, True))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics(isa, momentum, unbiased):
    p = problem((4, 5, 6))
    options = {"momentum": momentum, "unbiased": unbiased}
    running = p.running_mean.copy(), p.running_var.copy()
    y = call(fastbn.batch_norm, p.x, *running, training=True, writes=running, **options)
    mean, var, count = reference.batch_stats(p.x)
    expected = reference.update_running(p.running_mean, p.running_var, mean, var, count, **options)
    np.testing.assert_allclose(running, expected, rtol=1e-6, atol=1e-7)
    again = p.running_mean.copy(), p.running_var.copy()
    same, stats = fastbn.batch_norm_forward(p.x)
    assert call(fastbn.update_running, *again, stats, writes=again, **options) is None
    assert_same_bits({"y": y, "m": running[0], "v": running[1]}, {"y": same, "m": again[0], "v": again[1]})


def test_running_statistics_may_be_strided_and_must_not_move():
    p = problem((4, 5, 6))
    block = np.full((5, 3), 9, np.float32)
    running = block[:, 0], block[::-1, 2]
    running[0][:], running[1][:] = p.running_mean, p.running_var
    call(fastbn.batch_norm, p.x, *running, training=True, writes=running)
    expected = run("training", p)
    assert np.array_equal(running[0], expected["running_mean"])
    assert np.array_equal(running[1], expected["running_var"])
    assert (block[:, 1] == 9).all()


def test_strided_parameters():
    p = problem((4, 5, 6))
    vectors = [p.running_mean, p.running_var, p.weight, p.bias]
    strided = [np.repeat(v, 3)[::3] for v in vectors]
    backwards = [v[::-1].copy()[::-1] for v in vectors]
    misaligned = []
    for v in vectors:
        memory = np.zeros(v.nbytes + 1, np.uint8)
        misaligned.append(memory[1:].view(np.float32))
        misaligned[-1][:] = v
    expected = fastbn.batch_norm(p.x, *vectors)
    for given in strided, backwards, misaligned:
        assert np.array_equal(call(fastbn.batch_norm, p.x, *given), expected)
        for v in given:
            v.setflags(write=False)
        assert np.array_equal(call(fastbn.batch_norm, p.x, *given), expected)


def test_training_without_running_statistics():
    p = problem((4, 5, 6))
    y = call(fastbn.batch_norm, p.x, None, None, p.weight, p.bias, True)
    assert np.array_equal(y, run("training", p)["y"])


def test_result_of_given_stats_is_that_of_the_batch(isa):
    p = problem((4, 5, 6))
    y, stats = fastbn.batch_norm_forward(p.x, p.weight, p.bias)
    again, same = call(fastbn.batch_norm_forward, p.x, p.weight, p.bias, stats=stats)
    assert same is stats
    assert np.array_equal(again, y)


def test_stats_pooled_from_shards_normalize_as_the_whole(isa):
    p = problem((8, 5, 6))
    stats = sum((fastbn.batch_stats(shard) for shard in np.split(p.x, [1, 3])), fastbn.batch_stats(p.x[:0]))
    y = np.concatenate([fastbn.batch_norm_forward(shard, stats=stats)[0] for shard in np.split(p.x, 2)])
    expected = reference.forward(p.x, *reference.batch_stats(p.x)[:2])
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)))


KINKS = np.array([-np.inf, -7, -1e-30, -0.0, 0.0, 1e-30, 3, 6, 6.0000005, 7, np.inf], np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("add", [False, True])
def test_activation_at_its_kinks(isa, activation, layout, add):
    """With mean 0, variance 1 and eps 0 the activation sees x itself."""
    x = np.tile(KINKS, (2, 3, 2)) if layout == "planes" else np.repeat(KINKS[:, None], 3, 1)
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    residual = np.zeros_like(x) if add else None
    with np.errstate(over="ignore"):
        expected = reference.activate(x, activation, np.float32(SLOPE)).astype(np.float32)
    y = fastbn.batch_norm(x, zero, one, eps=0, activation=activation, negative_slope=SLOPE, residual=residual)
    if activation in SMOOTH:
        np.testing.assert_allclose(y, expected, rtol=5e-7, atol=1e-36)
    else:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan(isa, activation):
    x = np.array([[1, np.nan], [-1, 2]], np.float32)
    y = fastbn.batch_norm(x, np.zeros(2, np.float32), np.ones(2, np.float32), activation=activation)
    assert np.array_equal(np.isnan(y), np.isnan(x))


@pytest.mark.parametrize("slope", [0.0, -0.5, 1.0, 2.5])
def test_any_slope(isa, slope):
    x = np.array([[-2, 3], [-4, 0]], np.float32)
    options = {"eps": 0, "activation": "leaky_relu", "negative_slope": slope}
    y = fastbn.batch_norm(x, np.zeros(2, np.float32), np.ones(2, np.float32), **options)
    np.testing.assert_array_equal(y, np.where(x > 0, x, slope * x))


VARIANCES = np.array([0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1, 3, 3e38, np.inf, np.nan, 0.5], np.float32)


@pytest.mark.parametrize("eps", [0, 1e-300, 1e-45, 1e-38, 1e-5, 1e300])
@pytest.mark.parametrize("float64", [False, True], ids=["running_var", "BatchStats"])
def test_any_variance(isa, eps, float64):
    """Where float32 has not the range, and where there is no deviation. Below zero it is refused: case 35."""
    var = np.append(VARIANCES.astype(np.float64), [1e60, 1e-200, 1e-310]) if float64 else VARIANCES
    x, mean = np.array([[-2], [3]], np.float32) * np.ones(var.size, np.float32), np.zeros_like(var)
    weight = np.full(var.size, 1e-3, np.float32)
    with np.errstate(all="ignore"):
        expected = reference.forward(x, mean, var, weight, eps=eps).astype(np.float32)
    if float64:
        stats = fastbn.BatchStats(mean, var, 2)
        y, _ = call(fastbn.batch_norm_forward, x, weight, eps=eps, stats=stats)
    else:
        y = call(fastbn.batch_norm, x, mean, var, weight, eps=eps)
    np.testing.assert_allclose(y, expected, rtol=2.4e-7)
