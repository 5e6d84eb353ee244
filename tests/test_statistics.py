"""BatchStats: pooling shards of a batch exactly, and what it is made of, copied and compared by."""

import copy
import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
import reference
from operations import assert_same_bits, call, problem

import fastbn
from fastbn import BatchStats


def shards_of(values, sizes):
    """BatchStats of consecutive parts of `values`, shape (n, C), by the oracle."""
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return [BatchStats(*reference.batch_stats(part)) for part in parts]


def assert_pooled_exactly(stats, shards):
    """Against the pooling of `shards` in rational numbers."""
    shards = [shard for shard in shards if shard.count]
    count = sum(shard.count for shard in shards)
    assert stats.count == count
    for c in range(stats.mean.size):
        terms = [(shard.count, Fraction(shard.mean[c]), Fraction(shard.var[c])) for shard in shards]
        mean = sum(n * m for n, m, _ in terms) / count
        var = sum(n * (v + (m - mean) ** 2) for n, m, v in terms) / count
        assert stats.mean[c] == pytest.approx(float(mean), rel=1e-12)
        assert stats.var[c] == pytest.approx(float(var), rel=1e-12)


def assert_pooled(stats, values):
    mean, var, count = reference.batch_stats(values)
    assert stats.count == count
    assert type(stats.count) is int
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, var, rtol=1e-12)


@pytest.mark.parametrize("offset", [0, 10])
@pytest.mark.parametrize("sizes", [(700, 0, 1), (0, 1, 50), (1, 1, 0), (300, 200, 500), (0, 0, 7)], ids=str)
def test_shards_in_any_order_and_grouping_are_the_whole(rng, offset, sizes):  # case 16
    values = rng.standard_normal((sum(sizes), 5)) * np.geomspace(0.1, 1e3, 5) + offset
    for a, b, c in itertools.permutations(shards_of(values, sizes)):
        for pooled in a + b + c, a + (b + c), a.merge(b, c), a.merge(b).merge(c), sum([b, c], a):
            assert_pooled(pooled, values)


@pytest.mark.parametrize("offset", [1e2, 1e6, -1e9])
def test_large_means_lose_nothing(rng, offset):
    shards = [
        BatchStats(rng.standard_normal(5) + offset, rng.random(5), count) for count in (70, 0, 1, 2, 300)
    ]
    for order in itertools.permutations(shards):
        assert_pooled_exactly(order[0].merge(*order[1:]), shards)


def test_shards_computed_by_the_kernels(isa):
    x = problem((64, 17, 9), offset=100).x
    parts = [fastbn.batch_stats(x[i:j]) for i, j in ((0, 1), (1, 1), (1, 30), (30, 64))]
    pooled = call(parts[0].merge, *parts[1:])
    mean, var, count = reference.batch_stats(x)
    assert pooled.count == count
    np.testing.assert_allclose(pooled.mean, mean, rtol=1e-8)
    np.testing.assert_allclose(pooled.var, var, rtol=2e-6)


def test_an_empty_shard_is_the_identity(rng):
    (stats,) = shards_of(rng.standard_normal((9, 3)), [9])
    empty = fastbn.batch_stats(np.empty((0, 3), np.float32))
    garbage = BatchStats([np.nan] * 3, [np.inf] * 3, 0)
    for neutral in empty, garbage:
        for merged in stats + neutral, neutral + stats, stats.merge(neutral, neutral), stats.merge():
            assert merged == stats
    assert (empty + empty).count == 0


def test_thousands_of_shards(rng):
    values = rng.standard_normal((4000, 3)) + 1e5  # one by one the mean would be rounded 4000 times
    first, *rest = shards_of(values, [1] * 4000)
    assert_pooled_exactly(first.merge(*rest), [first, *rest])


def test_equal_shards_stay_exact():
    one = BatchStats([0.1, 1e7], [0.0, 0.0], 3)
    merged = one.merge(*[one] * 6)
    assert (merged.mean.tolist(), merged.var.tolist(), merged.count) == ([0.1, 1e7], [0.0, 0.0], 21)


def test_a_bad_channel_stays_alone():
    a, b = BatchStats([1, np.nan, 3], [1, np.nan, 1], 4), BatchStats([2, 2, np.inf], [1, 1, np.nan], 4)
    merged = a + b
    assert np.isfinite(merged.mean).tolist() == [True, False, False]
    assert np.isfinite(merged.var).tolist() == [True, False, False]
    assert (merged.mean[0], merged.var[0]) == (1.5, 1.25)


def test_counts_beyond_32_bits():
    a, b = BatchStats([0.0], [1.0], 2**40), BatchStats([2.0], [1.0], 2**40)
    merged = a + b
    assert (merged.mean[0], merged.var[0], merged.count) == (1.0, 2.0, 2**41)


def test_attributes():
    mean = np.array([1, 2], np.float32)
    stats = BatchStats(mean, [3, 4], np.int64(5))
    mean[:] = 0
    assert stats.mean.dtype == stats.var.dtype == np.float64
    assert (stats.mean.tolist(), stats.var.tolist(), stats.count) == ([1, 2], [3, 4], 5)
    assert repr(stats) == "BatchStats(mean=array([1., 2.]), var=array([3., 4.]), count=5)"


def test_immutable():
    made = BatchStats([1.0], [1.0], 2)
    x = np.ones((2, 1), np.float32)
    computed, saved = fastbn.batch_stats(x), fastbn.batch_norm_forward(x)[1]
    for stats in made, computed, saved, made + computed:
        for name in "mean", "var", "count", "other":
            with pytest.raises(AttributeError, match="immutable"):
                setattr(stats, name, 1)
            with pytest.raises(AttributeError, match="immutable"):
                delattr(stats, name)
        for array in stats.mean, stats.var:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_and_pickles(rng, duplicate):
    (stats,) = shards_of(rng.standard_normal((9, 3)), [9])
    twin = duplicate(stats)
    assert_same_bits({"m": twin.mean, "v": twin.var}, {"m": stats.mean, "v": stats.var})
    assert twin == stats
    with pytest.raises(ValueError, match="read-only"):
        twin.mean[0] = 1


def test_equality():
    stats = BatchStats([1, np.nan], [1, 2], 3)
    assert stats == BatchStats([1, np.nan], [1, 2], 3)
    for other in (
        BatchStats([1, 0], [1, 2], 3),
        BatchStats([1, np.nan], [1, 3], 3),
        BatchStats([1], [1], 3),
        1,
    ):
        assert stats != other
    assert stats != BatchStats([1, np.nan], [1, 2], 4)
    with pytest.raises(TypeError, match="unhashable"):
        hash(stats)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([[1]], [1], 1), ValueError, r"mean must be one-dimensional.*\(1, 1\)"),
        ((1, [1], 1), ValueError, r"mean must be one-dimensional"),
        (([1], [[1]], 1), ValueError, r"var must be one-dimensional"),
        (([1, 2], [1], 1), ValueError, "mean and var must be of one length, got 2 and 1"),
        (([1, 2], [1, -1], 1), ValueError, "var must not be negative, got -1.0 in channel 1"),
        (([1], [1], -1), ValueError, "count must not be negative, got -1"),
        (([1], [1], 1.0), TypeError, "count must be an integer, got float"),
        (([1], [1], None), TypeError, "count must be an integer, got NoneType"),
        ((["a"], [1], 1), TypeError, "mean must hold real numbers"),
        (([1], [1j], 1), TypeError, "var must hold real numbers"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        BatchStats(*arguments)


def test_what_cannot_be_merged():
    stats = BatchStats([1], [1], 1)
    with pytest.raises(TypeError, match="only BatchStats can be merged, got int"):
        stats.merge(1)
    with pytest.raises(TypeError, match="unsupported operand"):
        stats + 1
    for other in BatchStats([1, 2], [1, 2], 1), BatchStats([1, 2], [1, 2], 0):
        with pytest.raises(ValueError, match="same number of channels, got 1 and 2"):
            stats.merge(other)


def test_init_again_changes_nothing(rng):
    x = problem((4, 3, 5)).x
    for stats in BatchStats([1, 2], [3, 4], 5), fastbn.batch_stats(x):
        mean, var, count = stats.mean.copy(), stats.var.copy(), stats.count
        with pytest.raises(AttributeError, match="immutable: __init__ cannot be called again"):
            stats.__init__([9, 9], [9, 9], 9)
        assert np.array_equal(stats.mean, mean)
        assert np.array_equal(stats.var, var)
        assert stats.count == count


# Running averages of float64, and at any address


def packed(dtype, values):
    """Values as a field of a packed struct: at odd addresses, and with others in between."""
    records = np.zeros(values.size, np.dtype([("flag", "u1"), ("value", dtype), ("other", "u2")]))
    records["value"] = values
    return records["value"]


@pytest.mark.parametrize("arrange", [lambda dtype, v: v.astype(dtype), packed], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 17), (4, 17, 9)], ids=str)
def test_running_averages(isa, shape, dtype, arrange):  # case 32
    p = problem(shape)
    stats = fastbn.batch_stats(p.x)
    expected = p.running_mean.astype(np.float64) + 1e6, p.running_var.astype(np.float64)
    by_update, by_call = ([arrange(dtype, v) for v in expected] for _ in range(2))
    expected = [v.astype(dtype) for v in expected]
    for _ in range(3):
        fastbn.update_running(*by_update, stats, 0.1)
        fastbn.batch_norm(p.x, *by_call, training=True, momentum=0.1)
        expected = reference.update_running(*expected, stats.mean, stats.var, stats.count, 0.1)
        expected = [v.astype(dtype) for v in expected]
    for given, same, wanted in zip(by_update, by_call, expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=4 * np.finfo(dtype).eps)
        assert np.array_equal(given, same)
    y = fastbn.batch_norm(p.x, *by_call)
    assert np.array_equal(y, fastbn.batch_norm(p.x, *(np.array(v) for v in by_call)))
    np.testing.assert_allclose(y, reference.forward(p.x, *by_call), rtol=2e-6)


def test_a_packed_field_keeps_its_neighbours():
    records = np.full(3, -1, np.dtype([("a", "i1"), ("mean", "f4"), ("b", "i1"), ("var", "f4"), ("c", "i1")]))
    stats = BatchStats([1, 2, 3], [4, 5, 6], 10)
    fastbn.update_running(records["mean"], records["var"], stats, 1, unbiased=False)
    assert records.tolist() == [(-1, 1, -1, 4, -1), (-1, 2, -1, 5, -1), (-1, 3, -1, 6, -1)]


def test_float64_averages_do_not_stall():  # case 32
    """The mean is less than float32's spacing away from where it starts."""
    stats = BatchStats([1e6 + 0.01], [1.0], 100)
    averages = {dtype: (np.array([1e6], dtype), np.array([1], dtype)) for dtype in (np.float32, np.float64)}
    for running in averages.values():
        for _ in range(1000):
            fastbn.update_running(*running, stats, 0.01)
    assert averages[np.float32][0] == 1e6
    np.testing.assert_allclose(averages[np.float64][0], 1e6 + 0.01, rtol=1e-11)


def test_both_averages_have_one_dtype():
    mean, var = np.zeros(3, np.float32), np.ones(3)
    x = np.ones((2, 3), np.float32)
    for operation in (
        lambda *running: fastbn.batch_norm(x, *running),
        lambda *running: fastbn.batch_norm(x, *running, training=True),
        lambda *running: fastbn.update_running(*running, fastbn.batch_stats(x)),
        fastbn.FrozenBatchNorm,
    ):
        with pytest.raises(
            TypeError, match="both of dtype float32 or both of float64, got float32 and float64"
        ):
            operation(mean, var)
        with pytest.raises(
            TypeError, match="both of dtype float32 or both of float64, got float64 and float32"
        ):
            operation(var, mean)
    assert not mean.any()
    assert (var == 1).all()
