"""Folded weights against the layer and then the batch norm, by PyTorch's convolutions; what is refused."""

import numpy as np
import pytest
import reference

from fastbn import BatchNorm, FrozenBatchNorm, fold_conv, fold_conv_next, fold_linear, fold_linear_next

C = 6


def batch_norm_for(rng, channels, **options):
    bn = BatchNorm(channels, **options).eval()
    for name in "weight", "bias", "running_mean":
        if getattr(bn, name) is not None:
            getattr(bn, name)[:] = rng.uniform(-2, 2, channels)
    bn.running_var[:] = rng.uniform(0.3, 3, channels)
    return bn


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(100))
def test_random_convolution(seed):  # case 28
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch==2.13.0)")
    rng = np.random.default_rng(seed)
    rank, transposed, groups = int(rng.integers(1, 4)), bool(rng.random() < 0.5), int(rng.integers(1, 4))
    inputs, outputs = (groups * int(rng.integers(1, 4)) for _ in range(2))
    kernel = rng.integers(1, 4, rank)
    channels = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = normal(rng, *channels, *kernel) / np.float32(np.sqrt(inputs / groups * kernel.prod()))
    bias = normal(rng, outputs) if rng.random() < 0.5 else None
    affine = rng.random() < 0.8
    bn = batch_norm_for(rng, outputs, eps=rng.choice([1e-5, 0.1]), affine=affine, bias=rng.random() < 0.8)
    x = torch.from_numpy(normal(rng, 2, inputs, *rng.integers(3, 8, rank)))
    options = {"groups": groups, "stride": int(rng.integers(1, 3)), "padding": int(rng.integers(0, 2))}
    convolve = getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{rank}d")

    def output(weight, bias):
        bias = None if bias is None else torch.from_numpy(bias)
        return convolve(x, torch.from_numpy(weight), bias, **options).numpy()

    before = [None if a is None else a.copy() for a in (weight, bias)]
    folded = fold_conv(weight, bias, bn, transposed=transposed, groups=groups)
    assert [a.dtype for a in folded] == [np.float32] * 2
    assert_close(output(*folded), bn(output(weight, bias)))
    for array, copy in zip((weight, bias), before, strict=True):
        assert (array is copy is None) or np.array_equal(array, copy)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear(with_bias, frozen):
    rng = np.random.default_rng(0)
    weight, bias, x = normal(rng, C, 4) / 2, normal(rng, C), normal(rng, 7, 4)
    bn = batch_norm_for(rng, C)
    folded_weight, folded_bias = fold_linear(
        weight, bias if with_bias else None, bn.freeze() if frozen else bn
    )
    assert folded_weight.dtype == folded_bias.dtype == np.float32
    assert_close(x @ folded_weight.T + folded_bias, bn(x @ weight.T + (bias if with_bias else 0)))


def test_is_computed_in_float64_and_rounded_once():
    rng = np.random.default_rng(0)
    weight, bias, bn = normal(rng, C, 4, 3, 3), normal(rng, C), batch_norm_for(rng, C)
    scale = bn.weight * reference.inverse_deviation(bn.running_var, bn.eps)
    folded_weight, folded_bias = fold_conv(weight, bias, bn)
    expected = weight * scale[:, None, None, None]
    assert np.array_equal(folded_weight, expected.astype(np.float32))
    exact = (bias.astype(np.float64) - bn.running_mean) * scale + bn.bias
    np.testing.assert_allclose(folded_bias, exact, rtol=2.0**-24)


def test_depthwise_and_pointwise_without_torch():
    """Kernels of one value, for which a convolution is a product of matrices."""
    rng = np.random.default_rng(0)
    bn, x, bias = batch_norm_for(rng, C), normal(rng, 2, C, 5), normal(rng, C)
    weight, folded_bias = fold_conv(depthwise := normal(rng, C, 1, 1), bias, bn, groups=C)
    assert_close(x * weight[:, 0] + folded_bias[:, None], bn(x * depthwise[:, 0] + bias[:, None]))
    pointwise = normal(rng, C, C, 1) / 2  # (in, out, 1)
    weight, folded_bias = fold_conv(pointwise, None, bn, transposed=True)
    assert_close(
        np.einsum("ncl,co->nol", x, weight[..., 0]) + folded_bias[:, None],
        bn(np.einsum("ncl,co->nol", x, pointwise[..., 0])),
    )


def test_no_deviation_at_all_gives_the_bias():
    zeros, ones = np.zeros(C, np.float32), np.ones(C, np.float32)
    bn = FrozenBatchNorm(ones, zeros, ones, np.arange(C, dtype=np.float32), eps=0)
    weight, bias = fold_linear(np.ones((C, 4), np.float32), ones * 5, bn)
    assert not weight.any()
    assert bias.tolist() == list(range(C))
    x = np.full((2, C), 3, np.float32)
    assert np.array_equal(bn(x), [bias, bias])


def test_infinite_variance_gives_the_bias():
    bn = batch_norm_for(np.random.default_rng(0), C)
    bn.running_var[:] = np.inf
    weight, bias = fold_linear(np.ones((C, 4), np.float32), None, bn)
    assert not weight.any()
    assert np.array_equal(bias, bn.bias)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_an_activation_is_refused(activation):
    layer = BatchNorm(C, activation=activation).eval()
    for bn in layer, layer.freeze():
        with pytest.raises(ValueError, match=f"activation='{activation}', which folding would lose"):
            fold_linear(np.ones((C, 4), np.float32), None, bn)


def test_batch_norms_that_are_refused():
    weight = np.ones((C, 4), np.float32)
    with pytest.raises(ValueError, match=r"bn is in training mode.*; call bn.eval\(\)"):
        fold_linear(weight, None, BatchNorm(C))
    with pytest.raises(ValueError, match="track_running_stats=False keeps none"):
        fold_linear(weight, None, BatchNorm(C, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="bn has 5 channels, the weight 6 output channels"):
        fold_linear(weight, None, BatchNorm(5).eval())
    with pytest.raises(TypeError, match="bn must be a BatchNorm or FrozenBatchNorm, got dict"):
        fold_linear(weight, None, BatchNorm(C).state_dict())


def test_weights_that_are_refused():
    bn = BatchNorm(C).eval()
    linear, conv = np.ones((C, 4), np.float32), np.ones((C, 4, 3), np.float32)
    with pytest.raises(ValueError, match=r"conv_weight must have at least 3 axes, got shape \(6, 4\)"):
        fold_conv(linear, None, bn)
    with pytest.raises(ValueError, match=r"linear_weight must have 2 axes, got shape \(6, 4, 3\)"):
        fold_linear(conv, None, bn)
    for weight in conv.astype(np.int64), conv.astype(">f4"):
        with pytest.raises(TypeError, match=f"conv_weight must .* float32.* got ndarray of {weight.dtype} "):
            fold_conv(weight, None, bn)
    with pytest.raises(TypeError, match="conv_bias"):
        fold_conv(conv, np.zeros(C), bn)
    with pytest.raises(ValueError, match="linear_bias"):
        fold_linear(linear, np.zeros(5, np.float32), bn)


@pytest.mark.parametrize("groups", [4, 7, 0, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_that_do_not_divide(groups, transposed):
    with pytest.raises(ValueError, match=f"divide the first axis of conv_weight, got {groups} for shape"):
        fold_conv(
            np.ones((C, C, 3), np.float32), None, BatchNorm(C).eval(), groups=groups, transposed=transposed
        )


def test_groups_of_a_transposed_convolution_multiply_the_outputs():
    weight = np.ones((4, 3, 1), np.float32)
    fold_conv(weight, None, BatchNorm(6).eval(), groups=2, transposed=True)
    with pytest.raises(ValueError, match="bn has 3 channels, the weight 6 output channels"):
        fold_conv(weight, None, BatchNorm(3).eval(), groups=2, transposed=True)


# Into the layer behind: case 45


@pytest.mark.parametrize("seed", range(30))
def test_random_convolution_behind(seed):  # case 45
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch==2.13.0)")
    rng = np.random.default_rng(seed)
    rank, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    inputs, outputs = (groups * int(rng.integers(1, 4)) for _ in range(2))
    weight = normal(rng, outputs, inputs // groups, *rng.integers(1, 4, rank))
    bias = normal(rng, outputs) if rng.random() < 0.5 else None
    affine = rng.random() < 0.8
    bn = batch_norm_for(rng, inputs, eps=rng.choice([1e-5, 0.1]), affine=affine, bias=rng.random() < 0.8)
    x = normal(rng, 2, inputs, *rng.integers(3, 8, rank))
    convolve = getattr(torch.nn.functional, f"conv{rank}d")

    def output(x, weight, bias):  # in float64
        weight, bias = (None if a is None else torch.from_numpy(a).double() for a in (weight, bias))
        return convolve(torch.from_numpy(x).double(), weight, bias, groups=groups).numpy()

    padding = [0, (0,) * rank, "valid"][rng.integers(3)]
    folded = fold_conv_next(bn if seed % 2 else bn.freeze(), weight, bias, padding=padding, groups=groups)
    assert [a.dtype for a in folded] == [np.float32] * 2
    ones, zeros = np.ones(inputs), np.zeros(inputs)
    normalized = reference.forward(
        x.astype(np.float64),
        bn.running_mean,
        bn.running_var,
        ones if bn.weight is None else bn.weight,
        zeros if bn.bias is None else bn.bias,
        bn.eps,
    )
    expected = output(normalized, weight, bias)
    np.testing.assert_allclose(output(x, *folded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_behind(with_bias):  # case 45
    rng = np.random.default_rng(0)
    weight, bias, x = normal(rng, 4, C) / 2, normal(rng, 4) if with_bias else None, normal(rng, 7, C)
    bn = batch_norm_for(rng, C)
    folded_weight, folded_bias = fold_linear_next(bn, weight, bias)
    scale = bn.weight * reference.inverse_deviation(bn.running_var, bn.eps)
    assert np.array_equal(folded_weight, (weight * scale).astype(np.float32))
    exact = weight.astype(np.float64) @ (bn.bias - bn.running_mean * scale) + (bias if with_bias else 0)
    np.testing.assert_allclose(folded_bias, exact, rtol=2.0**-23)
    assert_close(x @ folded_weight.T + folded_bias, bn(x) @ weight.T + (bias if with_bias else 0))


@pytest.mark.parametrize("padding", [1, (0, 1), "same"])
def test_padding_by_zeros_is_refused(padding):  # case 45
    with pytest.raises(ValueError, match=r"padding must be 0, got .*: zeros are padded behind"):
        fold_conv_next(BatchNorm(C).eval(), np.ones((2, C, 3, 3), np.float32), None, padding=padding)


def test_what_the_layer_behind_refuses():  # case 45
    conv, linear = np.ones((2, C, 3), np.float32), np.ones((2, C), np.float32)
    for bn in BatchNorm(C, activation="relu").eval(), BatchNorm(C, activation="relu").eval().freeze():
        with pytest.raises(ValueError, match="cannot take in what stands behind an activation"):
            fold_linear_next(bn, linear, None)
        with pytest.raises(ValueError, match="activation='relu', which folding would lose"):
            fold_conv_next(bn, conv, None)
    with pytest.raises(ValueError, match="training mode"):
        fold_linear_next(BatchNorm(C), linear, None)
    with pytest.raises(ValueError, match="bn has 6 channels, the weight 12 input channels"):
        fold_conv_next(BatchNorm(C).eval(), conv, None, groups=2)
    with pytest.raises(ValueError, match="divide the first axis of conv_weight, got 3"):
        fold_conv_next(BatchNorm(C).eval(), conv, None, groups=3)
    with pytest.raises(ValueError, match="weight must have 2 axes"):
        fold_linear_next(BatchNorm(C).eval(), conv, None)
    with pytest.raises(ValueError, match="at least 3 axes"):
        fold_conv_next(BatchNorm(C).eval(), linear, None)
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
        fold_linear_next(BatchNorm(C).eval(), linear, np.zeros(3, np.float32))
