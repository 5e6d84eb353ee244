"""Gradients in parts: sums that merge, the mask from the output, and only those that are needed."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS
from operations import (
    ACTIVATIONS,
    SLOPE,
    SMOOTH,
    SUM,
    assert_same_bits,
    assert_within,
    call,
    kernels,
    problem,
)
from test_forward import KINKS, both_axes
from test_properties import search

import fastbn
from fastbn import GradSums, _kernels

NEEDS = ("input", "weight", "bias", "residual")
CUT = [name for name in ACTIVATIONS[1:] if name not in SMOOTH]  # activations whose output tells where
SHAPES = [(6, 5), (300, 16), (4, 17, 9), (8, 40, 7, 7), (3, 3, 50, 41), (40, 1100), (5, 2048)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def watched():
    """Plans are kept for passes()."""
    _kernels.watch_plans(True)
    yield
    _kernels.watch_plans(False)


def passes():
    """How many times the latest call went over its arrays."""
    plan = _kernels.latest_plan()
    return (plan["sums"] is not None) + (plan["apply"] is not None) if plan else 0


def options_of(p, activation, add=False, num_threads=None):
    return {
        "axis": p.axis,
        "activation": activation,
        "negative_slope": SLOPE,
        "residual": p.residual if add else None,
        "num_threads": num_threads,
    }


def affine(p):
    return p.weight, p.bias


# Sums


@pytest.mark.one_in(3)
@shapes
@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
def test_sums_are_those_of_the_oracle(isa, streamed, shape, axis, activation, add):
    p = problem(shape, axis, offset=3)
    stats = fastbn.batch_stats(p.x, axis=axis)
    options = options_of(p, activation, add)
    z, _ = fastbn.batch_norm_forward(
        p.x, *affine(p), stats=stats, axis=axis, residual=p.residual if add else None
    )
    found = [
        call(fastbn.batch_norm_backward_sums, p.grad_output, p.x, stats, *affine(p), eps, **options)
        for eps in (1e-5, 10.0)
    ]
    assert passes() == 1
    dz = np.asarray(p.grad_output, np.float64) * reference.derivative(z, activation, SLOPE)
    deviation = p.x - reference.column(stats.mean, p.x.ndim, axis)
    others = reference.others(p.x, axis)
    for sums in found if activation is None else found[:1]:  # of another eps, z is another
        assert sums.count == stats.count
        assert_within(sums.dz, dz.sum(others), SUM * abs(dz).sum(others), "dz")
        terms = dz * deviation
        assert_within(sums.dz_dev, terms.sum(others), SUM * abs(terms).sum(others), "dz_dev")
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats, *affine(p), **options)
    for name, grad in zip(("grad_weight", "grad_bias"), found[0].parameter_grads(stats), strict=True):
        assert grad.dtype == np.float32
        np.testing.assert_allclose(grad, getattr(grads, name), rtol=3e-7, atol=1e-30)


@st.composite
def splits(draw):
    """A problem, and into which parts its samples are split: some may be empty."""
    shape = draw(st.sampled_from([(12, 5), (40, 17), (9, 3, 5), (7, 33, 4, 4), (6, 2, 40, 50), (5, 130, 9)]))
    layout = draw(st.sampled_from([name for name in LAYOUTS if not name.startswith("broadcast")]))
    how = {"axis": draw(st.sampled_from([1, -1])), "offset": draw(st.sampled_from([0, 10]))}
    how |= {"seed": draw(st.integers(0, 50)), "x": layout, "residual": layout}
    cuts = draw(st.lists(st.integers(0, shape[0]), max_size=5))
    return shape, how, [*itertools.pairwise([0, *sorted(cuts), shape[0]])]


@search(200)
@given(
    splits(),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.sampled_from(_kernels.supported_isas()),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_any_split_is_the_whole(split, activation, add, isa, threads, by_output):  # case 29
    shape, how, parts = split
    p = problem(shape, **how)
    options = options_of(p, activation, add, threads)

    by_output = by_output and activation in CUT

    def of_part(i, j):
        changes = {"residual": p.residual[i:j] if add and not by_output else None}
        if by_output:
            changes["output"] = y[i:j]
        return options | changes

    with kernels(isa, shared_out=True):
        first, *rest = [fastbn.batch_stats(p.x[i:j], axis=p.axis) for i, j in parts]
        stats = first.merge(*rest)
        assert stats.count == p.x.size // p.weight.size
        y, _ = fastbn.batch_norm_forward(p.x, *affine(p), stats=stats, **options)
        whole = fastbn.batch_norm_backward(p.grad_output, p.x, stats, *affine(p), **options)
        sums = [
            call(
                fastbn.batch_norm_backward_sums, p.grad_output[i:j], p.x[i:j], stats, *affine(p),
                **of_part(i, j),
            )
            for i, j in parts
        ]  # fmt: skip
        assert [s.count for s in sums] == [(j - i) * stats.count // len(p.x) for i, j in parts]
        pooled = sums[0].merge(*sums[1:])
        grads = [
            call(
                fastbn.batch_norm_backward, p.grad_output[i:j], p.x[i:j], stats, *affine(p), sums=pooled,
                **of_part(i, j),
            )
            for i, j in parts
        ]  # fmt: skip
    grad_input = np.concatenate([g.grad_input for g in grads])
    largest = abs(whole.grad_input).max()
    assert_within(grad_input, whole.grad_input.astype(np.float64), 2e-7 * largest, "grad_input")
    if add:
        grad_residual = np.concatenate([g.grad_residual for g in grads])
        assert grad_residual.tobytes() == np.ascontiguousarray(whole.grad_residual).tobytes()
    g, xhat = (
        abs(np.asarray(p.grad_output)),
        abs(reference.normalize(p.x, stats.mean, stats.var, axis=p.axis)),
    )
    for name, terms in ("grad_weight", g * xhat), ("grad_bias", g):
        expected = getattr(whole, name).astype(np.float64)
        bound = 5e-7 * terms.sum(reference.others(p.x, p.axis))
        for part in grads:  # each has those of the whole batch
            assert_within(getattr(part, name), expected, bound, name)


def test_a_split_by_hand():
    """Against the oracle, with no word of the library's own gradient of the whole."""
    p = problem((9, 3, 5), offset=1e4)
    parts = [slice(0, 1), slice(1, 1), slice(1, 6), slice(6, 9)]
    first, *rest = [fastbn.batch_stats(p.x[i]) for i in parts]
    stats = first.merge(*rest)
    sums = [fastbn.batch_norm_backward_sums(p.grad_output[i], p.x[i], stats, *affine(p)) for i in parts]
    assert sums[1] == GradSums([0] * 3, [0] * 3, 0)
    pooled = sum(sums[1:], sums[0])
    grads = [
        fastbn.batch_norm_backward(p.grad_output[i], p.x[i], stats, *affine(p), sums=pooled) for i in parts
    ]
    expected = reference.backward(p.grad_output, p.x, *reference.batch_stats(p.x)[:2], *affine(p))
    grad_input = np.concatenate([g.grad_input for g in grads])
    np.testing.assert_allclose(grad_input, expected[0], rtol=0, atol=2e-6 * abs(expected[0]).max())
    assert grads[1].grad_input.shape == (0, 3, 5)
    for g in grads:
        np.testing.assert_allclose(g.grad_weight, expected[1], rtol=2e-5)
        np.testing.assert_allclose(g.grad_bias, expected[2], rtol=2e-5)
    shares = [s.parameter_grads(stats) for s in sums]
    for k in 0, 1:
        total = np.sum([share[k] for share in shares], axis=0)
        np.testing.assert_allclose(total, expected[1 + k], rtol=2e-5, atol=1e-6)


@shapes
@both_axes
def test_sums_do_not_depend_on_threads(isa, shared_out, shape, axis):
    p = problem(shape, axis)
    stats = fastbn.batch_stats(p.x, axis=axis)
    found = [
        fastbn.batch_norm_backward_sums(
            p.grad_output, p.x, stats, *affine(p), **options_of(p, "relu", True, threads)
        )
        for threads in (1, 2, 3, 7, None)
    ]
    for sums in found[1:]:
        assert_same_bits({"dz": sums.dz, "dev": sums.dz_dev}, {"dz": found[0].dz, "dev": found[0].dz_dev})


def test_given_sums_are_believed(isa):
    """They are what the second pass goes by, and the first is left out."""
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    none = GradSums(np.zeros(5), np.zeros(5), stats.count)
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats, *affine(p), sums=none)
    assert passes() == 1
    frozen = fastbn.batch_norm_backward(p.grad_output, p.x, stats, *affine(p), training=False)
    np.testing.assert_allclose(grads.grad_input, frozen.grad_input, rtol=2e-7)
    assert not grads.grad_weight.any()
    assert not grads.grad_bias.any()


# The mask from the output


def named(grads, add):
    """By name, with one NaN for all kinds of it: which comes of Inf - Inf is the CPU's to choose."""
    return {
        name: np.where(np.isnan(grad), np.float32(np.nan), grad)
        for name, grad in grads._asdict().items()
        if add or name != "grad_residual"
    }


def assert_output_tells_the_mask(grad_output, x, stats, weight, bias, **options):
    """As much as the residual, in every use, and to the bit."""
    given = grad_output, x, stats, weight, bias
    eps = {"eps": options.pop("eps", 1e-5)}
    y, _ = fastbn.batch_norm_forward(x, weight, bias, stats=stats, **eps, **options)
    by_output = options | eps | {"residual": None, "output": y}
    add = options["residual"] is not None
    for training in True, False:
        expected = fastbn.batch_norm_backward(*given, training=training, **eps, **options)
        for more in {}, {"residual": options["residual"]}:
            found = call(fastbn.batch_norm_backward, *given, training=training, **by_output | more)
            assert_same_bits(named(found, add), named(expected, add))
            assert found.grad_residual is not None  # there may have been a residual
    expected = fastbn.batch_norm_backward_sums(*given, **eps, **options)
    assert call(fastbn.batch_norm_backward_sums, *given, **by_output) == expected


@pytest.mark.one_in(3)
@shapes
@both_axes
@pytest.mark.parametrize("activation", CUT)
@pytest.mark.parametrize("add", [False, True])
def test_output_tells_the_mask(isa, streamed, shared_out, shape, axis, activation, add):
    p = problem(shape, axis)
    stats = fastbn.batch_stats(p.x, axis=axis)
    for threads in 1, 3:
        options = options_of(p, activation, add, threads)
        assert_output_tells_the_mask(p.grad_output, p.x, stats, *affine(p), **options)


@pytest.mark.parametrize("activation", CUT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_tells_the_mask_in_every_layout(isa, layout, activation):
    for shape in (3, 17, 7, 9), (9, 65), (2, 3, 4100):
        p = problem(shape, x=layout, residual=layout, grad_output=layout)
        stats = fastbn.batch_stats(p.x)
        assert_output_tells_the_mask(p.grad_output, p.x, stats, *affine(p), **options_of(p, activation, True))


@pytest.mark.parametrize("activation", CUT)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("add", [False, True])
def test_output_tells_the_mask_at_kinks(isa, activation, layout, add):
    """Of NaN and Inf too, and for gradients of which a product with 0 would not be 0."""
    z = np.concatenate([KINKS, [np.nan, 5.9999995, 1e-45, -1e-45, -1e-38]]).astype(np.float32)
    dy = np.array([1, -1, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3e38], np.float32)
    if layout == "planes":  # a gradient for each channel, so that none spoils the others
        x, grad_output = np.tile(z, (2, dy.size, 2)), np.broadcast_to(dy[:, None], (2, dy.size, 2 * z.size))
    else:
        x, grad_output = np.repeat(z[:, None], dy.size, 1), np.broadcast_to(dy, (z.size, dy.size))
    residual = np.zeros_like(x) if add else None
    if add:
        x, residual = residual, x
    stats = fastbn.BatchStats(np.zeros(dy.size), np.ones(dy.size), x.size // dy.size)
    with np.errstate(all="ignore"):
        assert_output_tells_the_mask(
            grad_output, x, stats, None, None, eps=0.0, residual=residual, activation=activation,
            negative_slope=SLOPE,
        )  # fmt: skip


def test_output_alone_is_looked_at():
    """Not the residual beside it, nor what would be computed."""
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    output = np.where(p.grad_output > 0, np.float32(1), np.float32(-1))
    for residual in None, p.residual:
        grads = fastbn.batch_norm_backward(
            p.grad_output, p.x, stats, output=output, activation="relu", residual=residual
        )
        assert np.array_equal(grads.grad_residual, np.maximum(p.grad_output, 0))


# Only what is needed

SUBSETS = [needs for n in range(5) for needs in itertools.combinations(NEEDS, n)]


def expected_passes(needs, training, activation, add, sums):
    of_sums = not sums and ("weight" in needs or "bias" in needs or (training and "input" in needs))
    return of_sums + ("input" in needs or (add and "residual" in needs))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(40, 17), (4, 17, 9), (3, 3, 50, 41), (5, 2048)], ids=str)
@both_axes
@pytest.mark.parametrize("needs", SUBSETS, ids="-".join)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_needs(shared_out, streamed, shape, axis, needs, activation):
    p = problem(shape, axis)
    stats = fastbn.batch_stats(p.x, axis=axis)
    given = (p.grad_output, p.x, stats, *affine(p))
    for add, by_output, how in itertools.product(
        (False, True), (False, True) if activation else (False,), ("training", "fixed", "sums")
    ):
        options = options_of(p, activation, add, 3) | {"training": how != "fixed"}
        if by_output:
            y, _ = fastbn.batch_norm_forward(p.x, *affine(p), stats=stats, **options_of(p, activation, add))
            options |= {"output": y, "residual": None}
        if how == "sums":
            without = {name: value for name, value in options.items() if name != "training"}
            options["sums"] = fastbn.batch_norm_backward_sums(*given, **without)
        everything = fastbn.batch_norm_backward(*given, **options)
        _kernels.watch_plans(True)  # anew
        some = call(fastbn.batch_norm_backward, *given, needs=needs, **options)
        what = f"{add} {by_output} {how}"
        assert passes() == expected_passes(
            needs, how == "training", activation, add or by_output, how == "sums"
        ), what
        for name in NEEDS:
            expected, found = (getattr(grads, f"grad_{name}") for grads in (everything, some))
            if name in needs and expected is not None:
                assert found.tobytes() == expected.tobytes(), (what, name)
                assert found.strides == expected.strides
            else:
                assert found is None, (what, name)


@both_axes
@pytest.mark.parametrize("shape", [(40, 17), (4, 17, 9), (3, 3, 50, 41)], ids=str)
def test_a_fixed_scale_alone(isa, streamed, shape, axis):
    """Without statistics and sums only grad_output is read: its zeros keep their sign, whatever x is."""
    p = problem(shape, axis)
    p.grad_output.reshape(-1)[:5] = 0.0, -0.0, np.inf, 1e-45, -np.inf
    p.x.reshape(-1)[2:5] = np.inf
    p.x.reshape(-1)[7] = np.nan
    stats = fastbn.BatchStats(p.running_mean, p.running_var, 1)
    given = (p.grad_output, p.x, stats, *affine(p))
    expected = fastbn.batch_norm_backward(*given, training=False, axis=axis)
    out = np.full_like(p.x, np.nan)
    for needs in ("input",), ["input", "residual"]:
        grads = call(fastbn.batch_norm_backward, *given, training=False, axis=axis, needs=needs, out=out)
        assert grads.grad_input is out
        assert out.tobytes() == expected.grad_input.tobytes()
        assert grads[1:] == (None, None, None)


@pytest.mark.parametrize("needs", SUBSETS, ids="-".join)
def test_needs_of_an_empty_batch(needs):
    x = np.empty((0, 5, 6), np.float32)
    stats = fastbn.batch_stats(x)
    for options in {}, {"sums": GradSums(np.zeros(5), np.zeros(5), 0)}, {"training": False}:
        grads = fastbn.batch_norm_backward(x, x, stats, residual=x, needs=needs, **options)
        for name, grad in zip(NEEDS, grads, strict=True):
            if name not in needs:
                assert grad is None
            else:
                assert grad.shape == (x.shape if name in ("input", "residual") else (5,))
                assert not grad.any()


@pytest.mark.parametrize("kind", [tuple, list, set, frozenset])
def test_needs_may_be_any_collection(kind):
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    grads = fastbn.batch_norm_backward(p.grad_output, p.x, stats, needs=kind(["bias", "weight"]))
    assert [g is None for g in grads] == [True, False, False, True]


# Layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("add", [False, True])
def test_layers(training, add):
    p = problem((8, 5, 6))
    layer = fastbn.BatchNorm(5, activation="relu").train(training)
    layer.weight[...], layer.bias[...] = affine(p)
    residual = p.residual if add else None

    def backward(**options):
        y = layer(p.x, residual)
        if "output" in options:
            options["output"] = y
        return layer.backward(p.grad_output, **options)

    expected = backward()
    by_output = backward(output=True)
    assert (by_output.grad_residual is None) == (not add)
    assert_same_bits(named(by_output, add), named(expected, add))
    some = backward(needs=("bias", "residual"))
    assert [g is None for g in some] == [True, True, False, not add]
    assert np.array_equal(some.grad_bias, expected.grad_bias)
    if training:
        stats = fastbn.batch_stats(p.x)
        sums = fastbn.batch_norm_backward_sums(
            p.grad_output, p.x, stats, layer.weight, layer.bias, residual=residual, activation="relu"
        )
        given = backward(sums=sums)
        np.testing.assert_allclose(given.grad_input, expected.grad_input, rtol=0, atol=1e-6)


def test_layers_with_a_training_of_their_own():
    p = problem((8, 5, 6))
    layer = fastbn.BatchNorm(5, virtual_batch_size=4)
    layer(p.x, p.residual)
    with pytest.raises(ValueError, match="leave out sums"):
        layer.backward(p.grad_output, sums=sums_of(count=48))
    expected = layer.backward(p.grad_output)
    layer(p.x, p.residual)
    some = layer.backward(p.grad_output, needs=("weight", "residual"))
    assert [g is None for g in some] == [True, False, True, False]
    assert np.array_equal(some.grad_weight, expected.grad_weight)


def test_a_layer_refuses_and_goes_on():
    p = problem((8, 5, 6))
    layer = fastbn.BatchNorm(5)
    y = layer(p.x)
    for options, error in (
        ({"output": y}, ValueError),
        ({"needs": ("x",)}, ValueError),
        ({"needs": "input"}, TypeError),
        ({"sums": 1}, TypeError),
        ({"sums": GradSums([0] * 5, [0] * 5, 1)}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            call(layer.backward, p.grad_output, **options)
    layer.backward(p.grad_output)  # which none of these counted for


# What is refused, and writes nothing


def refused(error, match, p=None, **changes):
    p = p or problem((4, 5, 6))
    given = {
        "grad_output": p.grad_output, "x": p.x, "stats": fastbn.batch_stats(p.x), "weight": p.weight,
        "bias": p.bias, "activation": "relu", "out": np.full_like(p.x, 9),
    }  # fmt: skip
    with pytest.raises(error, match=match):
        call(fastbn.batch_norm_backward, **given | changes)


def sums_of(channels=5, count=24):
    return GradSums(np.zeros(channels), np.zeros(channels), count)


@pytest.mark.parametrize("channels", [0, 1, 4, 6])
def test_sums_of_other_channels(channels):
    refused(
        ValueError,
        rf"sums must be of 5 channels, as x is, got dz of shape \({channels},\)",
        sums=sums_of(channels),
    )


@pytest.mark.parametrize("count", [0, 12, 25, 2**70])
def test_sums_of_another_count(count):
    refused(
        ValueError,
        rf"sums are of {count} values per channel, but stats of 24; .*merged",
        sums=sums_of(count=count),
    )


@pytest.mark.parametrize(
    "wrong", [(np.zeros(5), np.zeros(5), 24), 1.0, "sums", fastbn.BatchStats([1], [1], 24)], ids=type
)
def test_sums_of_another_type(wrong):
    refused(TypeError, f"sums must be a GradSums.*got {type(wrong).__name__}", sums=wrong)


@pytest.mark.parametrize("name", ["dz", "dz_dev"])
@pytest.mark.parametrize(
    "array", [np.ones(5, np.float32), np.ones(5, ">f8"), np.ones(10)[::2], np.ones((5, 1)), [1.0] * 5, None],
    ids=lambda array: f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}",
)  # fmt: skip
def test_sums_that_were_changed(name, array):
    sums = sums_of()
    object.__setattr__(sums, name, array)
    refused((TypeError, ValueError), r"sums\b.*make a new GradSums|sums must be of 5 channels", sums=sums)


def test_sums_with_fixed_statistics():
    refused(ValueError, "sums are for training=True.*leave out sums", sums=sums_of(), training=False)


def test_a_part_that_is_more_than_the_whole():
    p = problem((4, 5, 6))
    half = fastbn.batch_stats(p.x[:2])
    refused(
        ValueError,
        "stats are of 12 values per channel, but x, .* has 24; .*merged",
        stats=half,
        sums=sums_of(count=12),
    )
    with pytest.raises(ValueError, match=r"stats are of 12 values per channel, but x, .* has 24"):
        call(fastbn.batch_norm_backward_sums, p.grad_output, p.x, half)


def test_a_part_without_sums_is_told_of_them():  # case 29
    p = problem((4, 5, 6))
    stats = fastbn.batch_stats(p.x)
    with pytest.raises(
        ValueError, match=r"24 values .* x has 12; .*sums=.*batch_norm_backward_sums\(\) of all parts"
    ):
        fastbn.batch_norm_backward(p.grad_output[:2], p.x[:2], stats)


@pytest.mark.parametrize(
    ("activation", "slope"), [(None, 0.01), ("leaky_relu", 0.0), ("leaky_relu", -0.5), ("leaky_relu", 1e-50)]
)
def test_output_that_tells_no_mask(activation, slope):
    p = problem((4, 5, 6))
    options = {"activation": activation, "negative_slope": slope, "output": p.x}
    refused(ValueError, "output tells the derivative of 'relu', .*leave out output", p, **options)
    with pytest.raises(ValueError, match="output tells the derivative"):
        call(fastbn.batch_norm_backward_sums, p.grad_output, p.x, fastbn.batch_stats(p.x), **options)


def test_out_that_overlaps_output_or_sums():
    p = problem((4, 5, 6))
    output = np.ones_like(p.x)
    refused(ValueError, "out overlaps output", p, output=output, out=output)
    memory = np.zeros(p.x.nbytes)
    sums = GradSums._wrap(memory[:5], np.zeros(5), 24)
    out = memory.view(np.float32)[: p.x.size].reshape(p.x.shape)
    refused(ValueError, "out overlaps sums.dz", p, sums=sums, out=out)


@pytest.mark.parametrize("wrong", ["input", 1, None, {"input": 1}])
def test_needs_of_another_type(wrong):
    refused(TypeError, "needs must be a tuple of", needs=wrong)


@pytest.mark.parametrize("name", ["x", "Input", "grad_input", 1, None, ["input"]])
def test_needs_that_are_unknown(name):
    refused(
        ValueError,
        r"needs must name some of \('input', 'weight', 'bias', 'residual'\), got",
        needs=("input", name),
    )


def test_out_that_is_not_needed():
    refused(ValueError, "out is where grad_input goes, which needs does not name", needs=("weight",))


# GradSums


def test_attributes():
    dz = np.array([1, 2], np.float32)
    sums = GradSums(dz, [3, 4], np.int64(5))
    dz[:] = 0
    assert sums.dz.dtype == sums.dz_dev.dtype == np.float64
    assert (sums.dz.tolist(), sums.dz_dev.tolist(), sums.count) == ([1, 2], [3, 4], 5)
    assert type(sums.count) is int
    assert repr(sums) == "GradSums(dz=array([1., 2.]), dz_dev=array([3., 4.]), count=5)"


def computed():
    p = problem((4, 2, 6))
    return fastbn.batch_norm_backward_sums(p.grad_output, p.x, fastbn.batch_stats(p.x))


def test_merging():
    a, b, c = GradSums([1, 2], [3, 4], 5), GradSums([10, 20], [30, 40], 50), computed()
    assert a + b == GradSums([11, 22], [33, 44], 55) == b.merge(a) == sum([b], a)
    merged = a.merge(b, c)
    assert merged.count == 55 + 24
    np.testing.assert_array_equal(merged.dz, a.dz + b.dz + c.dz)
    np.testing.assert_array_equal(merged.dz_dev, a.dz_dev + b.dz_dev + c.dz_dev)
    empty = GradSums([0, 0], [0, 0], 0)
    assert c + empty == empty + c == c.merge() == c
    with np.errstate(all="raise"):
        bad = a + GradSums([np.nan, np.inf], [np.inf, 1], 1) + GradSums([1, -np.inf], [-np.inf, 1], 1)
    assert np.isnan(bad.dz).all()


def test_immutable():
    a = GradSums([1.0], [1.0], 2)
    for sums in a, a + a, computed():
        for name in "dz", "dz_dev", "count", "other":
            with pytest.raises(AttributeError, match="GradSums is immutable"):
                setattr(sums, name, 1)
            with pytest.raises(AttributeError, match="GradSums is immutable"):
                delattr(sums, name)
        for array in sums.dz, sums.dz_dev:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        with pytest.raises(AttributeError, match="__init__ cannot be called again"):
            sums.__init__([9], [9], 9)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_and_pickles(duplicate):
    for sums in computed(), GradSums([np.nan, 1], [1, np.inf], 3):
        twin = duplicate(sums)
        assert twin == sums
        assert type(twin) is GradSums
        with pytest.raises(ValueError, match="read-only"):
            twin.dz[0] = 1


def test_equality():
    sums = GradSums([1, np.nan], [1, 2], 3)
    for other in (
        GradSums([1, 0], [1, 2], 3),
        GradSums([1, np.nan], [1, 3], 3),
        GradSums([1, np.nan], [1, 2], 4),
        GradSums([1], [1], 3),
        fastbn.BatchStats([1, np.nan], [1, 2], 3),
        1,
    ):
        assert sums != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(sums)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([[1]], [1], 1), ValueError, r"dz must be one-dimensional.*\(1, 1\)"),
        (([1], 1, 1), ValueError, r"dz_dev must be one-dimensional"),
        (([1, 2], [1], 1), ValueError, "dz and dz_dev must be of one length, got 2 and 1"),
        (([1], [1], -1), ValueError, "count must not be negative, got -1"),
        (([1], [1], 1.0), TypeError, "count must be an integer, got float"),
        ((["a"], [1], 1), TypeError, "dz must hold real numbers"),
        (([1], [1j], 1), TypeError, "dz_dev must hold real numbers"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        GradSums(*arguments)


def test_what_cannot_be_merged():
    sums = GradSums([1], [1], 1)
    for other in 1, fastbn.BatchStats([1], [1], 1):
        with pytest.raises(TypeError, match=f"only GradSums can be merged, got {type(other).__name__}"):
            sums.merge(other)
        with pytest.raises(TypeError, match="unsupported operand"):
            sums + other
    with pytest.raises(ValueError, match="same number of channels, got 1 and 2"):
        sums.merge(GradSums([1, 2], [1, 2], 1))
    with pytest.raises(ValueError, match="stats must be of 1 channels, as the sums are, got 2"):
        sums.parameter_grads(fastbn.BatchStats([1, 2], [1, 2], 1))


def test_parameters_of_a_channel_without_deviation():
    weight, bias = GradSums([1, 2], [0, 3], 4).parameter_grads(fastbn.BatchStats([0, 0], [0, 4], 4), 0.0)
    assert (weight.tolist(), bias.tolist()) == ([0, 1.5], [1, 2])
