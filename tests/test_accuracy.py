"""The promised error bounds on data that breaks sums of squares: large means, outliers, huge values."""

import numpy as np
import pytest
import reference
from operations import MEAN, OUTPUT, SUM, VARIANCE, assert_within, call

import fastbn

# Planes within a tile and of several tiles; rows of a folded width and of a full one
LAYOUTS = [
    ((32, 8, 56, 56), 1),
    ((2, 5, 100, 101), 1),
    ((8, 56, 56, 8), -1),
    ((2000, 130), 1),
    ((700, 512), 1),
]

layouts = pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)


def normal(shape, offset=0.0):
    """Standard normal values plus the offset, rounded to float32."""
    return (np.random.default_rng(1).standard_normal(shape) + offset).astype(np.float32)


def first_of_each_channel(axis):
    return tuple(slice(None) if i == axis % 4 else 0 for i in range(4))


def assert_accurate(x, axis):
    """Statistics and training output within the bounds, and not a warning on the way."""
    mean, var, count = reference.batch_stats(x, axis)
    y, stats = call(fastbn.batch_norm_forward, x, axis=axis)
    assert stats.count == count
    assert_within(stats.var, var, VARIANCE * var, "var")
    assert_within(stats.mean, mean, 1e-6 * np.sqrt(var), "mean")
    expected = reference.forward(x, mean, var, axis=axis)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)), "y")
    return stats


@layouts
@pytest.mark.parametrize("offset", [0, 1e2, -1e2, 1e4, 1e6, -1e6])
def test_offset(isa, shape, axis, offset):  # case 2
    x = normal(shape, offset)
    stats = assert_accurate(x, axis)
    grad_output = normal(shape)[::-1]
    grads = call(fastbn.batch_norm_backward, grad_output, x, stats, axis=axis)
    expected = reference.backward(grad_output, x, stats.mean, stats.var, axis=axis)
    xhat = reference.normalize(x, stats.mean, stats.var, axis=axis)
    others = reference.others(x, axis)
    assert_within(grads.grad_weight, expected[1], SUM * abs(grad_output * xhat).sum(others), "grad_weight")
    assert_within(grads.grad_input, expected[0], OUTPUT * np.maximum(1, abs(expected[0])), "grad_input")


@layouts
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_offset_in_inference(isa, shape, axis, offset):
    x = normal(shape, offset)
    C = x.shape[axis]
    mean = (offset + np.linspace(-0.5, 0.5, C)).astype(np.float32)
    var = np.linspace(0.5, 2, C, dtype=np.float32)
    expected = reference.forward(x, mean, var, axis=axis)
    y = call(fastbn.batch_norm, x, mean, var, axis=axis)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)), "y")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("offset", [0, 1e2, 1e4])
@pytest.mark.parametrize("outlier", [1e6, -1e6])
def test_outlier_in_the_first_element(isa, outlier, offset, axis):  # case 4
    shape = [8, 56, 56]
    shape.insert(axis % 4, 5)
    x = normal(shape, offset)
    x[first_of_each_channel(axis)] = outlier
    assert_accurate(x, axis)


@pytest.mark.parametrize("axis", [1, -1])
def test_outliers_wherever_a_shift_may_be_taken_from(isa, axis):
    """Eight outliers a channel and tile, all over it: no guess of the mean survives that."""
    shape = [8, 64, 64]
    shape.insert(axis % 4, 5)
    x = normal(shape)
    x[:, ::8, ::8] = 1e6
    assert_accurate(x, axis)


@pytest.mark.parametrize(
    ("shape", "unlike"),
    [((32, 8, 56, 56), np.s_[..., :2, :]), ((64, 8, 14, 14), np.s_[..., 0]), ((64, 8, 7, 7), np.s_[::16])],
    ids=["first rows", "first column", "first image"],
)
@pytest.mark.parametrize("level", [1e3, -1e6])
def test_what_a_mean_is_guessed_from_is_unlike_the_rest(isa, streamed, level, shape, unlike):
    x = normal(shape)
    x[unlike] += level
    assert_accurate(x, axis=1)


@pytest.mark.parametrize("axis", [1, -1])
def test_outlier_beside_ordinary_channels(isa, axis):
    shape = [8, 20, 20]
    shape.insert(axis % 4, 17)
    x = normal(shape)
    np.moveaxis(x, axis, 0)[3, 2, 5, 7] = 1e8
    assert_accurate(x, axis)


@layouts
@pytest.mark.parametrize("value", [1e7, 100, -0.1, 16777217, 1e30, 1e-40])
def test_constant_channel_is_exactly_bias(isa, shape, axis, value):  # case 1
    x = np.full(shape, value, np.float32)
    bias = np.linspace(-3, 3, x.shape[axis], dtype=np.float32)
    weight = np.full(x.shape[axis], 7.3, np.float32)
    y, stats = call(fastbn.batch_norm_forward, x, weight, bias, axis=axis)
    assert (stats.var == 0).all()
    assert (stats.mean == np.float64(np.float32(value))).all()
    assert (y == reference.column(bias, x.ndim, axis)).all()


@layouts
def test_two_constant_halves(isa, shape, axis):
    """Tiles that are constant each but not alike: all of the variance comes from pooling."""
    x = np.full(shape, 1e6, np.float32)
    x[len(x) // 2 :] += 1
    assert_accurate(x, axis)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(32, 8, 56, 56), (4, 3, 2, 2)], ids=str)
def test_huge_values_do_not_overflow(isa, shape, axis):  # case 9
    sign = np.where(np.arange(np.prod(shape)) % 2, -1, 1).reshape(shape).astype(np.float32)
    x = np.ascontiguousarray(np.moveaxis(sign * np.float32(1e30), 1, axis))
    sign = np.moveaxis(sign, 1, axis)
    running_mean, running_var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    writes = running_mean, running_var
    y = call(fastbn.batch_norm, x, *writes, training=True, axis=axis, writes=writes)
    np.testing.assert_allclose(y, sign, rtol=2e-6)
    assert np.isinf(running_var).all()
    assert np.isfinite(running_mean).all()
    stats = fastbn.batch_stats(x, axis=axis)
    np.testing.assert_allclose(stats.var, np.float64(np.float32(1e30)) ** 2, rtol=2e-6)
    grads = call(fastbn.batch_norm_backward, sign, x, stats, axis=axis)
    count = sign.size // shape[1]
    np.testing.assert_allclose(grads.grad_weight, count, rtol=1e-5)
    assert abs(grads.grad_bias).max() == 0


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("scale", [1e18, 1e19, 1e20, 1e37])
def test_variance_beyond_float32(isa, scale, axis):
    shape = [8, 30, 30]
    shape.insert(axis % 4, 5)
    x = (normal(shape) * np.float32(scale)).astype(np.float32)
    mean, var, _ = reference.batch_stats(x, axis)
    y, stats = call(fastbn.batch_norm_forward, x, axis=axis)
    assert_within(stats.var, var, VARIANCE * var, "var")
    expected = reference.forward(x, mean, var, axis=axis)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)), "y")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("scale", [1e-12, 1e-18, 1e-22, 1e-30])
def test_tiny_values(isa, scale, axis):
    """Squares below the range of float32 count where eps is 0."""
    shape = [8, 30, 30]
    shape.insert(axis % 4, 5)
    x = (normal(shape) * np.float32(scale)).astype(np.float32)
    mean, var, _ = reference.batch_stats(x, axis)
    y, stats = call(fastbn.batch_norm_forward, x, eps=0.0, axis=axis)
    assert_within(stats.var, var, VARIANCE * var, "var")
    expected = reference.forward(x, mean, var, eps=0, axis=axis)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)), "y")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(4, 3, 2, 8), (8, 3, 80, 80)], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-40])
def test_tiny_values_that_cancel(isa, streamed, scale, shape, axis):
    """Squares that are all 0 in float32, of values whose mean is 0."""
    sign = np.moveaxis(
        np.where(np.arange(np.prod(shape)) % 2, -1, 1).reshape(shape).astype(np.float32), 1, axis
    )
    x = np.ascontiguousarray(sign * np.float32(scale))
    y, stats = call(fastbn.batch_norm_forward, x, eps=0.0, axis=axis)
    np.testing.assert_allclose(stats.var, np.float64(np.float32(scale)) ** 2, rtol=VARIANCE)
    if scale > 1e-38:  # its inverse is a float32
        np.testing.assert_allclose(y, sign, rtol=OUTPUT)


@pytest.mark.parametrize("shape", [(2**25, 1), (2**12, 2**13, 1), (1, 1, 2**25)], ids=str)
def test_more_ones_than_a_float32_can_count(isa, shape):  # case 3
    x = np.ones(shape, np.float32)
    stats = fastbn.batch_stats(x, axis=-1 if shape[-1] == 1 else 1, num_threads=1)
    assert (stats.mean.tolist(), stats.var.tolist(), stats.count) == ([1.0], [0.0], 2**25)


@pytest.mark.parametrize(
    ("shape", "axis"), [((512, 1024), -1), ((2048, 16), -1), ((2, 256, 64, 64), 1), ((64, 512, 7, 7), 1)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("zeros", "bound"), [(64, VARIANCE), (128, 2 * VARIANCE)])  # as numerics.md says
def test_like_values_whose_roundings_add_up(isa, zeros, bound, masked, shape, axis):
    """Of them a float32 sum takes few, because all sums of so many may be rounded to the same side."""
    rng = np.random.default_rng(1)
    value = rng.uniform(0.5, 1, shape[axis]).astype(np.float32)
    like = reference.column(value, len(shape), axis).astype(np.float32)
    position = np.arange(np.prod(np.delete(shape, axis))).reshape(np.delete(shape, axis)) % 256
    x = np.where(np.expand_dims(position, axis) < zeros, np.float32(0), like)  # shifts are 0
    mask = rng.random(np.delete(shape, axis)) < 0.9 if masked else None
    stats = fastbn.batch_stats(x, axis=axis, mask=mask)
    mean, var, count = reference.batch_stats(x, axis, mask)
    assert_within(stats.mean, mean, MEAN * np.sqrt(var), "mean")
    assert_within(stats.var, var, bound * var, "var")
    grad_output = np.broadcast_to(like, shape)
    options = {"axis": axis, "mask": mask, "mask_output": masked}
    grads = fastbn.batch_norm_backward(grad_output, x, stats, **options)
    total = count * value.astype(np.float64)
    assert_within(grads.grad_bias, total, SUM * total, "grad_bias")


def test_the_exponential_of_silu(isa):
    """Far below 0 silu(z) is z * e^z: the exponential's error, and what a sum and a division round."""
    z = np.linspace(-87, -17, 1_000_000, dtype=np.float32).reshape(-1, 4)
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    y = fastbn.batch_norm(z, zero, one, eps=1e-30, activation="silu")
    wide = z.astype(np.float64)
    expected = wide / (1 + np.exp(-wide))
    assert (abs(y - expected) <= (1 + 0.5 + 0.5) * np.spacing(abs(expected.astype(np.float32)))).all()
