"""FrozenBatchNorm: the bits of batch_norm in inference, and nothing about it that could change."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import reference
from layouts import LAYOUTS, WRITABLE, arrange
from operations import ACTIVATIONS, SLOPE, call, kernels, problem

import fastbn
from fastbn import FrozenBatchNorm

both_axes = pytest.mark.parametrize("axis", [1, -1])


def freeze(p, **options):
    return FrozenBatchNorm(p.running_mean, p.running_var, p.weight, p.bias, axis=p.axis, **options)


@both_axes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 256), (1, 16, 8, 8), (40, 17), (2, 3, 70, 80), (8, 130, 3)], ids=str)
def test_same_bits_as_batch_norm(isa, activation, shape, axis):
    p = problem(shape, axis)
    options = {"eps": 1e-3, "activation": activation, "negative_slope": SLOPE}
    frozen = freeze(p, **options)
    for residual in None, p.residual:
        expected = fastbn.batch_norm(
            p.x, p.running_mean, p.running_var, p.weight, p.bias, axis=axis, residual=residual, **options
        )
        assert call(frozen, p.x, residual).tobytes() == expected.tobytes()
        out = np.empty_like(p.x)
        assert call(frozen, p.x, residual, out=out) is out
        assert out.tobytes() == expected.tobytes()


@both_axes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, axis):
    p = problem((4, 17, 6, 5), axis, x=layout)
    frozen = freeze(p)
    expected = frozen(np.ascontiguousarray(p.x))
    assert np.array_equal(call(frozen, p.x), expected)
    if layout in WRITABLE:
        out = arrange(np.zeros(p.x.shape), layout, axis)
        assert np.array_equal(call(frozen, p.x, out=out), expected)
        assert call(frozen, p.x, out=p.x) is p.x
        assert np.array_equal(p.x, expected)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_optional(weight, bias):
    p = problem((4, 17, 6))
    given = p.running_mean, p.running_var, p.weight if weight else None, p.bias if bias else None
    frozen = FrozenBatchNorm(*given)
    assert np.array_equal(frozen(p.x), fastbn.batch_norm(p.x, *given))
    assert [frozen.weight is not None, frozen.bias is not None] == [weight, bias]


def test_it_keeps_copies():
    p = problem((4, 17, 6))
    arrays = [p.running_mean.copy(), p.running_var.copy(), p.weight.copy(), p.bias.copy()]
    frozen = FrozenBatchNorm(*arrays)
    expected = frozen(p.x)
    for array in arrays:
        array[:] = 9
    assert np.array_equal(frozen(p.x), expected)
    for held, array in zip(
        (frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias), p[3:7], strict=False
    ):
        assert not np.shares_memory(held, array)
        with pytest.raises(ValueError, match="read-only"):
            held[0] = 1


def test_strided_and_read_only_vectors():
    p = problem((4, 17, 6))
    vectors = [np.repeat(v, 2)[::2] for v in (p.running_mean, p.running_var, p.weight, p.bias)]
    for vector in vectors:
        vector.setflags(write=False)
    assert np.array_equal(call(FrozenBatchNorm, *vectors)(p.x), freeze(p)(p.x))


def test_nothing_can_be_set_or_deleted():
    frozen = freeze(problem((4, 3)))
    for name in "weight", "bias", "running_mean", "running_var", "eps", "axis", "activation", "other":
        with pytest.raises(AttributeError, match=f"immutable: cannot set '{name}'"):
            setattr(frozen, name, None)
        with pytest.raises(AttributeError, match=f"immutable: cannot delete '{name}'"):
            delattr(frozen, name)
    assert not hasattr(frozen, "__dict__")


def test_init_again_changes_nothing():
    p = problem((4, 3))
    frozen = freeze(p)
    expected = frozen(p.x)
    for arrays in ((p.running_var, p.running_mean), (p.running_mean, p.running_var, p.weight, p.bias)):
        with pytest.raises(AttributeError, match="immutable: __init__ cannot be called again"):
            frozen.__init__(*arrays)
    assert np.array_equal(frozen.running_mean, p.running_mean)
    assert np.array_equal(frozen.weight, p.weight)
    assert np.array_equal(frozen(p.x), expected)


def test_signature():
    frozen = freeze(problem((4, 3)))
    names = ["x", "residual", "out", "mask", "mask_output", "num_threads"]
    assert list(inspect.signature(frozen).parameters) == names
    assert list(inspect.signature(FrozenBatchNorm).parameters)[:3] == [
        "running_mean",
        "running_var",
        "weight",
    ]


@both_axes
def test_float64_statistics(isa, axis):  # case 32
    p = problem((4, 17, 9), axis)
    mean, var = p.running_mean.astype(np.float64) + 1e6 + 1 / 64, p.running_var.astype(np.float64)
    x = p.x + np.float32(1e6)
    frozen = FrozenBatchNorm(mean, var, p.weight, p.bias, axis=axis)
    expected = reference.forward(x, mean, var, p.weight, p.bias, axis=axis)
    np.testing.assert_allclose(frozen(x), expected, rtol=2e-6, atol=2e-6)
    assert np.array_equal(fastbn.batch_norm(x, mean, var, p.weight, p.bias, axis=axis), frozen(x))
    strided = np.repeat(mean, 2)[::2], np.repeat(var, 2)[::2]
    assert np.array_equal(fastbn.batch_norm(x, *strided, p.weight, p.bias, axis=axis), frozen(x))
    twin = pickle.loads(pickle.dumps(frozen))
    assert twin.running_mean.dtype == np.float64
    assert np.array_equal(twin(x), frozen(x))
    with pytest.raises(ValueError, match=r"running_var\[0\] \+ eps must be >= 0, got -1.0"):
        FrozenBatchNorm(mean, -np.ones(17))


def test_attributes():
    p = problem((4, 3), -1)
    frozen = freeze(p, eps=1e-3, activation="leaky_relu", negative_slope=0.2)
    assert (frozen.num_features, frozen.eps, frozen.axis) == (3, 1e-3, -1)
    assert (frozen.activation, frozen.negative_slope) == ("leaky_relu", 0.2)
    for name in "running_mean", "running_var", "weight", "bias":
        assert np.array_equal(getattr(frozen, name), getattr(p, name))


def test_without_copies():
    p = problem((4, 17, 9))
    arrays = [p.running_mean, p.running_var, p.weight, p.bias]
    frozen = fastbn.FrozenBatchNorm(*arrays, copy=False)
    expected = frozen(p.x)
    for name, array in zip(("running_mean", "running_var", "weight", "bias"), arrays, strict=True):
        view = getattr(frozen, name)
        assert np.shares_memory(view, array)
        assert not view.flags.writeable
        assert array.flags.writeable
        array += 1
        assert np.array_equal(view, array)
    assert frozen(p.x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_and_pickles(duplicate):
    p = problem((4, 17, 6), -1)
    for options in {}, {"eps": 1e-3, "activation": "leaky_relu", "negative_slope": 0.2}:
        frozen = freeze(p, **options)
        twin = duplicate(frozen)
        assert type(twin) is FrozenBatchNorm
        assert repr(twin) == repr(frozen)
        assert np.array_equal(twin(p.x), frozen(p.x))


def test_identity_is_equality():
    p = problem((4, 3))
    one, other = freeze(p), freeze(p)
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "FrozenBatchNorm(3, eps=1e-05, weight=None, bias=None)"),
        (
            {"weight": np.ones(3, np.float32), "eps": 0.1, "axis": -1, "activation": "relu"},
            "FrozenBatchNorm(3, eps=0.1, bias=None, axis=-1, activation='relu')",
        ),
        (
            {"bias": np.ones(3, np.float32), "activation": "leaky_relu", "negative_slope": 0.2},
            "FrozenBatchNorm(3, eps=1e-05, weight=None, activation='leaky_relu', negative_slope=0.2)",
        ),
    ],
)
def test_repr(arguments, text):
    assert repr(FrozenBatchNorm(np.zeros(3, np.float32), np.ones(3, np.float32), **arguments)) == text


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 96, 256, 1000])
def test_many_rows_as_few(isa, streamed, channels, rng):
    """Of two million values, more rows at a time make one of the kernel's."""
    x = rng.standard_normal((2**21 // channels + 37, channels), np.float32)
    mean, weight, bias = rng.standard_normal((3, channels), np.float32)
    var = rng.random(channels, np.float32) + np.float32(0.5)
    parts = np.array_split(x, 40)
    few = np.concatenate([fastbn.batch_norm(a, mean, var, weight, bias, activation="relu") for a in parts])
    many = FrozenBatchNorm(mean, var, weight, bias, activation="relu")
    np.testing.assert_array_equal(many(x), few)
    np.testing.assert_array_equal(many(x[1:]), few[1:])
    for threads in 1, 3:
        y = fastbn.batch_norm(x, mean, var, weight, bias, activation="relu", num_threads=threads)
        np.testing.assert_array_equal(y, few)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4, 4)])
def test_empty_batch(shape):
    p = problem((4, 3))
    assert freeze(p)(np.empty(shape, np.float32)).shape == shape


def test_made_under_one_instruction_set_called_under_another():
    p = problem((4, 17, 60))
    made = {}
    for isa in fastbn._kernels.supported_isas():
        with kernels(isa):
            made[isa] = freeze(p)
    expected = freeze(p)(p.x)
    for frozen in made.values():
        assert np.array_equal(frozen(p.x), expected)
