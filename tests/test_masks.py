"""Masks: values that are not real do not count, whatever they are; against the oracle, PyTorch and Keras."""

import os

import numpy as np
import pytest
import reference
from layouts import LAYOUTS
from operations import (
    ACTIVATIONS,
    OPERATIONS,
    OUTPUT,
    SLOPE,
    UNFUSED,
    VARIANCE,
    assert_same_bits,
    assert_within,
    call,
    check,
    kernels,
    problem,
    run,
)

import fastbn
from fastbn import _kernels

both = pytest.mark.parametrize("mask_output", [False, True], ids=["", "zeros"])
both_axes = pytest.mark.parametrize("axis", [1, -1])


def positions(x, axis):
    return tuple(n for i, n in enumerate(x.shape) if i != axis % x.ndim)


def mask_of(kind, shape, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    if kind == "half":
        mask = rng.random(shape) < 0.5
    elif kind == "most":
        mask = rng.random(shape) < 0.97
    elif kind == "lengths":  # sequences that end earlier or later
        lengths = rng.integers(0, shape[-1] + 1, shape[:-1])
        mask = np.arange(shape[-1]) < lengths[..., None]
    elif kind == "beginning":
        mask.reshape(-1)[: mask.size // 3] = True
    elif kind == "no first":
        mask = ~mask
        mask.reshape(-1)[0] = False
    mask.reshape(-1)[[mask.size // 5, -1]] = True  # two at least
    return mask


KINDS = ("half", "most", "lengths", "beginning", "no first", "two")


def masked(shape, axis, kind, mask_output=False, **options):
    p = problem(shape, axis, **options)
    return p._replace(mask=mask_of(kind, positions(p.x, axis)), mask_output=mask_output)


def everywhere(p):
    return reference.everywhere(p.mask, p.x, p.axis)


# Short and long planes and planes of several tiles; rows that are folded, that divide into vectors or not,
# that leave a rest.
SHAPES = [
    (4, 3, 5, 5), (5, 40, 7, 7), (2, 5, 70, 80), (600, 5), (600, 130), (41, 3), (3, 4, 2, 2), (3, 70, 20, 20),
    (2, 1, 33), (2, 300, 30), (19, 6, 17),
]  # fmt: skip


@both
@both_axes
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_oracle(isa, streamed, kind, axis, mask_output):
    for i, shape in enumerate(SHAPES):
        if (i + KINDS.index(kind)) % 3:  # of each kind a third, and all kinds together each shape twice
            continue
        p = masked(shape, axis, kind, mask_output)
        for j, operation in enumerate(OPERATIONS):
            activation = None if operation in UNFUSED else ACTIVATIONS[(i + j) % len(ACTIVATIONS)]
            check(operation, p, activation, add=activation is not None)


@both
@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o not in UNFUSED])
def test_activations_and_residual(operation, activation, axis, mask_output):
    for shape in (3, 17, 7, 9), (1, 3, 65, 64), (9, 65):
        for add in False, True:
            check(operation, masked(shape, axis, "half", mask_output), activation, add)


@both
@both_axes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, axis, mask_output):
    options = dict.fromkeys(("x", "grad_output", "residual"), layout)
    for shape, kind in ((4, 6, 9, 10), "most"), ((4, 6, 19, 20), "beginning"):
        p = masked(shape, axis, kind, mask_output, **options)
        for operation in OPERATIONS:
            activation = None if operation in UNFUSED else "relu"
            check(operation, p, activation, activation is not None)


@both_axes
@pytest.mark.parametrize("axis_of_channels", range(-4, 4))
def test_any_axis(axis_of_channels, axis):
    for operation in OPERATIONS:
        check(operation, masked((4, 5, 6, 7), axis_of_channels, "half", axis == 1))


@both
@both_axes
def test_threads_and_streaming_do_not_change_a_bit(isa, shared_out, axis, mask_output):
    for shape in (3, 7, 30, 31), (30, 40, 7, 7), (700, 50), (300, 1040), (9, 1024), (2, 3, 70, 60):
        p = masked(shape, axis, "most", mask_output)
        for operation in OPERATIONS:
            activation = None if operation in UNFUSED else "relu6"
            expected = run(operation, p, activation, num_threads=1)
            for threads, streamed in (2, True), (5, False), (64, True):
                with kernels(streamed=streamed):
                    found = run(operation, p, activation, num_threads=threads)
                    assert_same_bits(found, expected, (shape, operation, threads))


@both
@both_axes
def test_instruction_sets_with_fma_agree_to_the_bit(axis, mask_output):
    isas = _kernels.supported_isas()[1:]
    if len(isas) < 2:
        pytest.skip("this CPU has not two instruction sets with a fused multiply-add")
    for shape in SHAPES:
        p = masked(shape, axis, "half", mask_output)
        for operation in OPERATIONS:
            found = []
            for isa in isas:
                with kernels(isa):
                    found.append(run(operation, p, None if operation in UNFUSED else "silu"))
            assert_same_bits(*found, (shape, operation))


@both_axes
def test_a_mask_that_is_true_everywhere_is_none(axis):
    for shape in (4, 3, 5, 5), (600, 130), (2, 5, 70, 80):
        p = problem(shape, axis)
        ones = p._replace(mask=np.ones(positions(p.x, axis), bool), mask_output=True)
        for operation in OPERATIONS:
            assert_same_bits(run(operation, ones), run(operation, p), operation)


# What is not real, in x and whatever else: not even a NaN of it is seen elsewhere


JUNK = (np.nan, np.inf, -np.inf, 3e38)


@both
@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_junk_leaves_no_trace(isa, activation, axis, mask_output):
    for shape in (5, 40, 7, 7), (2, 5, 70, 80), (600, 130), (19, 6, 17):
        p = masked(shape, axis, "half", mask_output)
        real = everywhere(p)
        junk = np.resize(np.float32(JUNK), shape if axis == 1 else p.x.shape)
        zeroed = p._replace(**{n: np.where(real, getattr(p, n), np.float32(0)) for n in ("x", "grad_output")})
        spoiled = p._replace(
            **{n: np.where(real, getattr(p, n), junk) for n in ("x", "grad_output", "residual")}
        )
        for operation in OPERATIONS:
            how = (None, False) if operation in UNFUSED else (activation, activation is not None)
            clean, found = run(operation, zeroed, *how), run(operation, spoiled, *how)
            for name in clean:
                a, b = np.asarray(clean[name]), np.asarray(found[name])
                if a.shape == p.x.shape:
                    np.testing.assert_array_equal(a[real], b[real], f"{operation} {name}")
                    if mask_output:
                        assert not b[~real].any()
                else:  # with zeros for gradients, nothing of the others was added
                    np.testing.assert_array_equal(a, b, f"{operation} {name}")


@both_axes
def test_gradients_of_what_is_not_real_count_where_they_are_finite(isa, axis):
    p = masked((4, 7, 9, 11), axis, "half")
    real = everywhere(p)
    x, g = p.x.copy(), p.grad_output.copy()
    x[~real] = np.resize(np.float32([1.5, np.nan]), np.count_nonzero(~real))
    kept = real | np.isfinite(x)
    found = run("backward", p._replace(x=x))
    without = p._replace(x=np.where(kept, x, np.float32(0)), grad_output=np.where(kept, g, np.float32(0)))
    expected = run("backward", without)
    np.testing.assert_array_equal(found["grad_input"][real], expected["grad_input"][real])
    np.testing.assert_array_equal(found["grad_weight"], expected["grad_weight"])
    np.testing.assert_array_equal(found["grad_bias"], expected["grad_bias"])
    given = reference.batch_stats(x, axis, p.mask)[:2]
    grads = reference.backward(without.grad_output, without.x, *given, p.weight, axis=axis, mask=p.mask)
    np.testing.assert_allclose(found["grad_bias"], grads[2], rtol=0, atol=1e-4)


# Accuracy, as without a mask


def standard(shape, axis, offset=0.0):
    x = (np.random.default_rng(1).standard_normal(shape) + offset).astype(np.float32)
    return x, mask_of("half", positions(x, axis))


def assert_accurate(x, axis, mask):
    mean, var, count = reference.batch_stats(x, axis, mask)
    y, stats = call(fastbn.batch_norm_forward, x, axis=axis, mask=mask, mask_output=True)
    assert stats.count == count
    assert_within(stats.var, var, VARIANCE * var, "var")
    assert_within(stats.mean, mean, 1e-6 * np.sqrt(var), "mean")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference.forward(x, mean, var, axis=axis, mask=mask)
    assert_within(y, expected, OUTPUT * np.maximum(1, abs(expected)), "y")


LARGE = [
    ((8, 8, 56, 56), 1), ((2, 5, 100, 101), 1), ((40, 8, 7, 7), 1), ((4, 56, 56, 8), -1), ((9, 57, 3), -1),
    ((2000, 130), 1), ((700, 512), 1),
]  # fmt: skip
large = pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)


@large
@pytest.mark.parametrize("offset", [0, -1e2, 1e4, 1e6])
def test_offset(isa, shape, axis, offset):
    x, mask = standard(shape, axis, offset)
    x[~reference.everywhere(mask, x, axis)] = 3e38  # no guess may come from these
    assert_accurate(x, axis, mask)


@large
@pytest.mark.parametrize("scale", [1e30, 1e-20, 1e-36])
def test_huge_and_tiny(isa, shape, axis, scale):
    x, mask = standard(shape, axis)
    x = np.sign(x) * np.float32(scale) if scale > 1 else x * np.float32(scale)
    mean, var, _ = reference.batch_stats(x, axis, mask)
    stats = call(fastbn.batch_stats, x, axis=axis, mask=mask)
    assert_within(stats.var, var, VARIANCE * var, "var")
    assert_within(stats.mean, mean, 1e-6 * np.sqrt(var), "mean")


@large
@pytest.mark.parametrize("offset", [0, 1e4])
def test_outlier_in_the_first_real_value(isa, shape, axis, offset):
    x, mask = standard(shape, axis, offset)
    first = tuple(int(i) for i in np.argwhere(mask)[0])
    at = axis % len(shape)
    x[(*first[:at], slice(None), *first[at:])] = 1e6
    assert_accurate(x, axis, mask)


@large
def test_constant_channels_have_no_variance(isa, shape, axis):
    x, mask = standard(shape, axis)
    channel = tuple(slice(None, None, 2) if i == axis % x.ndim else slice(None) for i in range(x.ndim))
    x[channel] = np.where(reference.everywhere(mask, x, axis), np.float32(1e7), np.float32(np.nan))[channel]
    stats = call(fastbn.batch_stats, x, axis=axis, mask=mask)
    assert (stats.mean[::2] == 1e7).all()
    assert (stats.var[::2] == 0).all()
    y, _ = call(fastbn.batch_norm_forward, x, axis=axis, mask=mask, mask_output=True)
    assert not y[channel].any()


# PyTorch and Keras


@both
@pytest.mark.parametrize("training", [True, False], ids=["batch", "fixed"])
@pytest.mark.parametrize("add", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_autograd(activation, add, training, mask_output):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p = masked((3, 5, 4, 6), 1, "half", mask_output, seed=3)
    real = torch.from_numpy(everywhere(p).copy())
    x, weight, bias, residual = (
        torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (p.x, p.weight, p.bias, p.residual)
    )
    zero = torch.zeros((), dtype=torch.float64)
    count = real.sum() / p.weight.size

    def mean_of(a):
        return torch.where(real, a, zero).sum((0, 2, 3), keepdim=True) / count

    if training:
        mean = mean_of(x)
        var = mean_of((x - mean) ** 2)
        stats = fastbn.batch_stats(p.x, mask=p.mask)
    else:
        mean, var = (torch.from_numpy(a.astype(np.float64))[:, None, None] for a in p[5:7])
        stats = fastbn.BatchStats(p.running_mean, p.running_var, 72)
    z = (x - mean) / torch.sqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]
    if add:
        z = z + residual
    y = {
        None: lambda z: z, "relu": functional.relu, "relu6": functional.relu6, "silu": functional.silu,
        "leaky_relu": lambda z: functional.leaky_relu(z, SLOPE), "hardswish": functional.hardswish,
    }[activation](z)  # fmt: skip
    if mask_output:
        y = torch.where(real, y, zero)
    (y * torch.from_numpy(p.grad_output.astype(np.float64))).sum().backward()
    options = {
        "residual": p.residual if add else None, "activation": activation, "negative_slope": SLOPE,
        "mask": p.mask, "mask_output": mask_output,
    }  # fmt: skip
    output, _ = call(
        fastbn.batch_norm_forward, p.x, p.weight, p.bias, stats=None if training else stats, **options
    )
    np.testing.assert_allclose(output, y.detach().numpy(), rtol=0, atol=1e-5)
    grads = call(
        fastbn.batch_norm_backward, p.grad_output, p.x, stats, p.weight, p.bias, training=training, **options
    )
    expected = [x.grad, weight.grad, bias.grad] + ([residual.grad] if add else [])
    for found, grad in zip(grads, expected, strict=False):
        np.testing.assert_allclose(found, grad.numpy(), rtol=1e-5, atol=1e-5)


def test_against_keras():
    axis = -1  # with channels elsewhere, Keras 3 cannot bring the mask in line
    if os.environ.setdefault("KERAS_BACKEND", "torch") == "torch":
        pytest.importorskip("torch")
    keras = pytest.importorskip("keras")
    bn = fastbn.BatchNorm(5, eps=1e-3, momentum=0.01, axis=axis, unbiased=False)
    theirs = keras.layers.BatchNormalization(axis=axis)
    for step in range(3):
        p = masked((4, 5, 6), axis, "half", seed=step)
        y = bn(p.x, mask=p.mask)
        expected = np.asarray(theirs(p.x, training=True, mask=p.mask).detach())
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(bn.running_mean, np.asarray(theirs.moving_mean.value.detach()), atol=1e-6)
        np.testing.assert_allclose(
            bn.running_var, np.asarray(theirs.moving_variance.value.detach()), atol=1e-5
        )


# Of what shapes a mask may be


@pytest.mark.parametrize(
    "shape", [(), (1,), (6,), (5, 1), (5, 6), (1, 6), (4, 1, 1), (4, 5, 1), (1, 5, 6)], ids=str
)
def test_masks_are_broadcast(shape):
    p = problem((4, 3, 5, 6))
    mask = np.asarray(mask_of("half", shape) if shape else np.True_)
    whole = np.broadcast_to(mask, (4, 5, 6)).copy()
    for operation in OPERATIONS:
        found = run(operation, p._replace(mask=mask, mask_output=True))
        assert_same_bits(found, run(operation, p._replace(mask=whole, mask_output=True)), operation)


def test_masks_in_any_layout_and_of_any_byte():
    p = masked((4, 3, 5, 6), 1, "half")
    expected = run("training", p)
    spaced = np.zeros((4, 10, 18), bool)
    spaced[:, ::2, ::3] = p.mask
    bytes_of = (p.mask * np.uint8(7)).view(bool)
    read_only = p.mask.copy()
    read_only.setflags(write=False)
    for mask in (
        p.mask.copy("F"),
        spaced[:, ::2, ::3],
        p.mask[:, :, ::-1].copy()[:, :, ::-1],
        bytes_of,
        read_only,
    ):
        assert_same_bits(run("training", p._replace(mask=mask)), expected)


def test_masks_of_other_libraries():
    torch = pytest.importorskip("torch")
    p = masked((4, 3, 5, 6), 1, "half")
    found = run("training", p._replace(mask=torch.from_numpy(p.mask)))
    assert_same_bits(found, run("training", p))


# Nothing real, and one value


@both
@both_axes
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (41, 3), (2, 130, 20)], ids=str)
def test_nothing_real_is_an_empty_batch(isa, shape, axis, mask_output):
    p = problem(shape, axis)
    p = p._replace(mask=np.zeros(positions(p.x, axis), bool), mask_output=mask_output)
    for operation in OPERATIONS:
        for activation, add in ((None, False),) if operation in UNFUSED else ((None, False), ("relu", True)):
            check(operation, p, activation, add)
    nan = p._replace(x=np.full_like(p.x, np.nan))
    for operation in "forward", "training", "backward", "backward_by_sums":
        assert_same_bits(run(operation, nan), run(operation, p), operation)
    found = run("forward", p)
    bias = reference.column(p.bias, p.x.ndim, axis)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(0 if mask_output else bias, p.x.shape))
    assert found["count"] == 0
    grad_input = run("backward", p._replace(grad_output=np.full_like(p.x, np.nan)))["grad_input"]
    assert not grad_input.any()


def test_a_layer_does_not_move_where_nothing_is_real():
    p = problem((4, 3, 5))
    for options in {}, {"momentum": None}, {"virtual_batch_size": 2}, {"renorm": True}:
        bn = fastbn.BatchNorm1d(3, **options)
        bn(p.x)
        before = bn.state_dict()
        y = bn(p.x, mask=np.zeros((4, 5), bool))
        np.testing.assert_array_equal(y, np.broadcast_to(bn.bias[:, None], p.x.shape))
        assert_same_bits(bn.state_dict(), before)
        grads = bn.backward(p.grad_output)
        assert not grads.grad_input.any()
        assert not grads.grad_weight.any()
        np.testing.assert_allclose(grads.grad_bias, p.grad_output.sum((0, 2)), rtol=1e-5, atol=1e-5)


def test_one_real_value_is_one_value():
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = True
    p = problem((4, 3, 5))._replace(mask=mask)
    for operation in "forward", "training":
        with pytest.raises(ValueError, match=r"more than 1 value per channel, .*mask with 1 True"):
            run(operation, p)
    stats = fastbn.batch_stats(p.x, mask=mask)
    assert stats.count == 1
    np.testing.assert_array_equal(stats.mean, p.x[1, :, 2])
    check("inference", p)


# Parts of a batch


@both
@both_axes
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_parts_of_a_batch(activation, axis, mask_output):
    shape = (9, 5, 30)
    p = masked(shape, axis, "lengths", mask_output)
    p.mask[4:6] = False  # a part of which nothing is real
    options = {"axis": axis, "activation": activation, "mask_output": mask_output}
    whole = fastbn.batch_stats(p.x, axis=axis, mask=p.mask)
    expected = fastbn.batch_norm_backward(p.grad_output, p.x, whole, p.weight, p.bias, mask=p.mask, **options)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 9)]
    shards = [fastbn.batch_stats(p.x[i], axis=axis, mask=p.mask[i]) for i in parts]
    assert [shard.count for shard in shards] == [np.count_nonzero(p.mask[i]) for i in parts]
    assert shards[2].count == 0
    stats = shards[0].merge(*shards[1:])
    assert stats.count == whole.count
    np.testing.assert_allclose(stats.var, whole.var, rtol=1e-7)
    y = fastbn.batch_norm_forward(p.x, p.weight, p.bias, mask=p.mask, **options)[0]
    found, sums = [], []
    for i in parts:
        given = {"mask": p.mask[i], **options}
        found.append(fastbn.batch_norm_forward(p.x[i], p.weight, p.bias, stats=stats, **given)[0])
        of_part = (p.grad_output[i], p.x[i], stats, p.weight, p.bias)
        sums.append(call(fastbn.batch_norm_backward_sums, *of_part, **given))
    np.testing.assert_allclose(np.concatenate(found), y, rtol=0, atol=2e-6)
    assert sums[2].count == 0
    assert sums[2].dz.any() == (not mask_output)
    total = sums[0].merge(*sums[1:])
    grads = []
    for i in parts:
        of_part = (p.grad_output[i], p.x[i], stats, p.weight, p.bias)
        grads.append(call(fastbn.batch_norm_backward, *of_part, sums=total, mask=p.mask[i], **options))
    grad_input = np.concatenate([grad.grad_input for grad in grads])
    largest = abs(expected.grad_input).max()
    np.testing.assert_allclose(grad_input, expected.grad_input, rtol=0, atol=2e-7 * largest)
    for name in "grad_weight", "grad_bias":
        a, b = getattr(grads[0], name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * abs(b).max())


def test_parts_none_of_which_has_anything_real():
    p = problem((4, 3, 5))
    mask = np.zeros((4, 5), bool)
    stats = fastbn.batch_stats(p.x[:2], mask=mask[:2]) + fastbn.batch_stats(p.x[2:], mask=mask[2:])
    y, _ = fastbn.batch_norm_forward(p.x[:2], p.weight, p.bias, stats=stats, mask=mask[:2])
    np.testing.assert_array_equal(y, np.broadcast_to(p.bias[:, None], y.shape))
    sums = fastbn.batch_norm_backward_sums(p.grad_output[:2], p.x[:2], stats, p.weight, p.bias, mask=mask[:2])
    np.testing.assert_allclose(sums.dz, p.grad_output[:2].sum((0, 2)), rtol=1e-5, atol=1e-5)
    assert not sums.dz_dev.any()
    grads = fastbn.batch_norm_backward(
        p.grad_output[:2], p.x[:2], stats, p.weight, p.bias, mask=mask[:2], sums=sums
    )
    assert not grads.grad_input.any()


# Layers


@both
@both_axes
def test_a_layer_is_the_functions(axis, mask_output):
    p = masked((4, 5, 6), axis, "half", mask_output)
    bn = fastbn.BatchNorm(5, axis=axis, activation="leaky_relu", negative_slope=SLOPE)
    bn.weight[:], bn.bias[:] = p.weight, p.bias
    bn.running_mean[:], bn.running_var[:] = p.running_mean, p.running_var
    how = {"mask": p.mask, "mask_output": mask_output}
    expected = run("training", p, "leaky_relu", True)
    assert_same_bits({"y": bn(p.x, p.residual, **how)}, {"y": expected["y"]})
    np.testing.assert_array_equal(bn.running_mean, expected["running_mean"])
    grads = bn.backward(p.grad_output)
    assert_same_bits(grads._asdict(), run("backward", p, "leaky_relu", True))
    bn.eval()
    bn.running_mean[:], bn.running_var[:] = p.running_mean, p.running_var
    expected = run("inference", p, "leaky_relu", True)
    assert_same_bits({"y": bn(p.x, p.residual, **how)}, expected)
    assert_same_bits({"y": bn.freeze()(p.x, p.residual, **how)}, expected)
    bn(p.x, p.residual, **how)
    assert_same_bits(bn.backward(p.grad_output)._asdict(), run("frozen_backward", p, "leaky_relu", True))


@pytest.mark.parametrize("renorm", [None, True])
def test_ghost_batches_take_their_parts_of_the_mask(renorm):
    p = masked((5, 3, 8), 1, "half", True)
    p.mask[:3] = False
    p.mask[3:, 2:5] = True
    ghosts = fastbn.BatchNorm1d(3, virtual_batch_size=3, renorm=renorm)
    plain = fastbn.BatchNorm1d(3, renorm=renorm)
    y = ghosts(p.x, mask=p.mask, mask_output=True)
    grad_input = ghosts.backward(p.grad_output).grad_input
    for part in slice(0, 3), slice(3, 5):
        expected = plain(p.x[part], mask=p.mask[part], mask_output=True)
        np.testing.assert_array_equal(y[part], expected)
        np.testing.assert_array_equal(grad_input[part], plain.backward(p.grad_output[part]).grad_input)
    assert_same_bits(ghosts.state_dict(), plain.state_dict())
    assert ghosts.num_batches_tracked == 1
    p.mask[0, 0] = True
    with pytest.raises(ValueError, match=r"parts that virtual_batch_size=3 .* mask is True at 1 position"):
        ghosts(p.x, mask=p.mask)
    assert_same_bits(ghosts.state_dict(), plain.state_dict())


def test_recalibration_and_adaptation_take_masks():
    p = masked((6, 3, 8), 1, "half")
    bn = fastbn.BatchNorm1d(3)
    halves = [(p.x[i], p.mask[i]) for i in (slice(0, 2), slice(2, 6))]
    fastbn.recalibrate(lambda batch: bn(batch[0], mask=batch[1]), halves)
    mean, var, count = reference.batch_stats(p.x, 1, p.mask)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, var * count / (count - 1), rtol=1e-6)
    with fastbn.adapt(bn, prior=0):
        y = bn(p.x, mask=p.mask, mask_output=True)
    expected = reference.forward(p.x, mean, var * count / (count - 1), mask=p.mask)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


# What is refused, before anything is written


def refused(error, match, operations=OPERATIONS, **changes):
    p = problem((4, 3, 5))
    for operation in operations:
        with pytest.raises(error, match=match):
            run(operation, p._replace(**changes))


def test_a_mask_of_another_dtype():
    refused(
        TypeError, r"mask must have dtype bool, .* of float32; convert it", mask=np.ones((4, 5), np.float32)
    )
    refused(TypeError, r"mask must have dtype bool, .* of uint8; convert it", mask=np.ones((4, 5), np.uint8))
    refused(TypeError, "mask must be a bool numpy.ndarray, got list", mask=[True])
    refused(TypeError, "mask must be a bool numpy.ndarray, got bool", mask=True)
    refused(TypeError, "mask must be a plain array", mask=np.ma.masked_array(np.ones((4, 5), bool)))


@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((4, 3, 5), "one value a position"),
        ((4, 1, 5), r"mask.squeeze\(1\)"),
        ((4,), r"mask\[\.\.\., None\]"),
        ((5, 4), "one value a position"),
        ((0, 5), "one value a position"),
    ],
    ids=str,
)
def test_a_mask_of_another_shape(shape, cure):
    refused(
        ValueError, rf"mask must have the shape of x .*\(4, 5\).*got .*; .*{cure}", mask=np.ones(shape, bool)
    )


def test_out_over_the_mask():
    p = problem((4, 3, 5))
    memory = np.zeros(p.x.nbytes, np.uint8)
    out, mask = memory.view(np.float32).reshape(p.x.shape), memory[:20].view(bool).reshape(4, 5)
    for operation in set(OPERATIONS) - {"batch_stats"}:
        with pytest.raises(ValueError, match="out overlaps mask"):
            run(operation, p._replace(mask=mask), out=out)


def test_statistics_of_another_mask():
    p = masked((4, 3, 5), 1, "half")
    stats = fastbn.batch_stats(p.x)
    with pytest.raises(ValueError, match=r"stats are of 20 values .* x has \d+ where mask is True"):
        call(fastbn.batch_norm_backward, p.grad_output, p.x, stats, mask=p.mask)
