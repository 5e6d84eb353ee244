"""Elements other than float32: float64 against longdouble, halves against float32 rounded once."""

import copy
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from layouts import LAYOUTS
from operations import (
    ACTIVATIONS,
    DTYPES,
    OPERATIONS,
    UNFUSED,
    assert_same_bits,
    call,
    check,
    kernels,
    problem,
    run,
)

import fastbn
from fastbn import _kernels

OTHERS = ("float64", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
SHAPES = [(4, 35, 7, 7), (3, 20, 40, 40), (2, 3, 90, 110), (70, 130), (300, 16), (40, 6, 30)]


@pytest.fixture(params=OTHERS)
def dtype(request):
    return request.param


@pytest.mark.one_in(3)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_the_oracle_agrees(operation, shape, axis, dtype, isa, streamed, shared_out):
    p = problem(shape, axis, dtype=dtype)
    for activation in (None,) if operation in UNFUSED else ACTIVATIONS:
        for add in (False,) if operation in UNFUSED else (False, True):
            results = check(operation, p, activation, add, num_threads=1)
            assert_same_bits(run(operation, p, activation, add, num_threads=3), results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, -1])
def test_layouts(layout, axis, dtype):
    for shape in (5, 7, 4, 6), (6, 9):
        p = problem(shape, axis, dtype=dtype, x=layout, grad_output=layout, residual=layout)
        for operation in OPERATIONS:
            check(operation, p, None if operation in UNFUSED else "relu", operation not in UNFUSED)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_same_bits_on_all_with_fma(axis, dtype):
    fused = [isa for isa in _kernels.supported_isas() if isa != "baseline"]
    for shape in SHAPES:
        p = problem(shape, axis, dtype=dtype, offset=3)
        for operation in OPERATIONS:
            for activation in (None,) if operation in UNFUSED else ("relu", "silu"):
                results = []
                for isa in fused:
                    with kernels(isa):
                        results.append(run(operation, p, activation))
                for other in results[1:]:
                    assert_same_bits(other, results[0], f"{operation} {activation} {shape}")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("axis", [1, -1])
def test_all_values_of_a_half(half, axis, isa):
    """Every bit pattern comes through widening and rounding: denormals, infinities, NaN."""
    x = np.arange(65536, dtype=np.uint16).view(DTYPES[half]).reshape(256, 256)
    zero, one = np.zeros(256, np.float32), np.ones(256, np.float32)
    for scale in 1.0, 0.37, 1e-4, 3.0:
        weight = np.full(256, scale, np.float32)
        y = fastbn.batch_norm(x, zero, one, weight, eps=0.0, axis=axis)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float32) * np.float32(scale)).astype(x.dtype)
        same = (y.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(y) & np.isnan(expected))
        assert same.all() or (y[~same] == 0).all() & (expected[~same] == 0).all()  # -0 + 0 is 0


@pytest.mark.parametrize("half", HALVES)
def test_ties_go_to_even(half, isa):
    dtype = DTYPES[half]
    values = np.arange(1, 2, 2.0**-13, dtype=np.float32)[: 8192 // 64 * 64].reshape(-1, 64)
    values = np.concatenate([values * np.float32(2.0**e) for e in (-24, -20, -14, 0, 14, 15)])
    ones = np.ones((len(values), 64), dtype)
    mean = np.zeros(64, np.float32)
    for row in range(0, len(values), 16):
        y = fastbn.batch_norm(ones[:2], mean, np.ones(64, np.float32), values[row], eps=0.0)
        with np.errstate(over="ignore"):
            assert np.array_equal(y[0], values[row].astype(dtype)), row


def test_planned_ways_are_taken(dtype):
    """The planner is asked about these elements, and what they take of the cache."""
    p = problem((64, 256, 40, 40), dtype=dtype)
    _kernels.watch_plans(True)
    try:
        for cache in 1, 2**62:
            _kernels.tune(cache=cache)
            run("forward", p, num_threads=1)
            plan = _kernels.latest_plan()
            assert plan["dtype"] == dtype
            assert (plan["apply"]["store"] == "streamed") == (cache == 1)
    finally:
        _kernels.watch_plans(False)
        _kernels.tune(cache=0)


def test_streaming_depends_on_bytes():
    bytes_of = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    streams = {
        (name, n): _kernels.plan((n, 64, 56, 56), "inference", dtype=name, machine="zen3")["apply"]["store"]
        for name in bytes_of
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    }
    at = {
        name: next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if streams[name, n] == "streamed")
        for name in bytes_of
    }
    assert {name: at[name] * bytes_of[name] for name in bytes_of} == dict.fromkeys(
        bytes_of, at["float32"] * 4
    )


# ---- layers


@pytest.mark.parametrize("training", [True, False])
def test_layers(dtype, training):
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 4)).astype(DTYPES[dtype])
    real = np.float64 if dtype == "float64" else np.float32
    layer = fastbn.BatchNorm2d(5, dtype=real, activation="relu").train(training)
    layer.weight[...] = [1, 2, -3, 4, 0.5]
    y = layer(x, residual=x)
    assert y.dtype == x.dtype
    grads = layer.backward(y)
    assert grads.grad_input.dtype == grads.grad_residual.dtype == x.dtype
    assert grads.grad_weight.dtype == grads.grad_bias.dtype == layer.running_mean.dtype == real
    if training:
        wide = fastbn.BatchNorm2d(5, dtype=np.float64, activation="relu")
        wide.weight[...] = layer.weight
        expected = wide(x.astype(np.float64), residual=x.astype(np.float64))
        np.testing.assert_allclose(layer.running_var, wide.running_var, rtol=2e-6)
        np.testing.assert_allclose(
            y.astype(float), expected, atol=1e-12 if dtype == "float64" else 0.05, rtol=0.01
        )
    for clone in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert clone.dtype is layer.dtype
        assert np.array_equal(clone.eval()(x), layer.eval()(x))
    frozen = layer.freeze()
    assert frozen.dtype == real
    assert np.array_equal(frozen(x), layer.eval()(x))
    assert np.array_equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    assert ("dtype=float64" in repr(layer)) == ("dtype=float64" in repr(frozen)) == (dtype == "float64")


@pytest.mark.parametrize("options", [{"virtual_batch_size": 4}, {"renorm": True}], ids=str)
def test_variants_of_training(dtype, options):
    x = np.random.default_rng(0).standard_normal((8, 5, 3, 3)).astype(DTYPES[dtype])
    real = np.float64 if dtype == "float64" else np.float32
    layer, wide = (fastbn.BatchNorm2d(5, dtype=d, **options) for d in (real, np.float64))
    y, expected = layer(x), wide(x.astype(np.float64))
    np.testing.assert_allclose(y.astype(float), expected, atol=0.03 if dtype in HALVES else 1e-12)
    grads, expected = layer.backward(x), wide.backward(x.astype(np.float64))
    assert grads.grad_input.dtype == x.dtype
    assert grads.grad_weight.dtype == real
    np.testing.assert_allclose(
        grads.grad_weight, expected.grad_weight, rtol=1e-5 if dtype in HALVES else 1e-12
    )


def test_recalibrate(dtype):
    batches = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(DTYPES[dtype])
    layer = fastbn.BatchNorm1d(5, dtype=np.float64 if dtype == "float64" else np.float32)
    fastbn.recalibrate(layer, list(batches))
    whole = batches.astype(np.float64).reshape(-1, 5)
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(layer.running_mean, whole.mean(0), atol=tolerance)
    np.testing.assert_allclose(layer.running_var, whole.var(0, ddof=1), rtol=tolerance)
    with fastbn.adapt(layer.eval(), prior=4):
        assert layer(batches[0]).dtype == batches.dtype


def test_half_parameters_are_widened():
    state = fastbn.BatchNorm1d(5).state_dict()
    halves = {k: v.astype(ml_dtypes.bfloat16) if v.ndim else v for k, v in state.items()}
    halves["weight"] = np.array([1, 2, 3, 4, 0.1], np.float16)
    layer = fastbn.BatchNorm1d(5)
    layer.load_state_dict(halves)
    assert layer.weight.dtype == np.float32
    assert layer.weight[4] == np.float32(np.float16(0.1))
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float16)
    one, zero = np.ones(5, np.float32), np.zeros(5, np.float32)
    y = call(fastbn.batch_norm, x, zero.astype(np.float16), one.astype(np.float16), halves["weight"])
    assert np.array_equal(y, fastbn.batch_norm(x, zero, one, layer.weight))
    layer.weight = halves["weight"]
    assert layer.weight.dtype == np.float32


def test_folding(dtype):
    rng = np.random.default_rng(0)
    real = np.float64 if dtype == "float64" else np.float32
    bn = fastbn.BatchNorm1d(3, dtype=real).eval()
    bn.running_mean[...], bn.running_var[...] = [1, 2, 3], [4, 5, 6]
    weight, bias = (rng.standard_normal(s).astype(DTYPES[dtype]) for s in [(3, 4), (3,)])
    folded, shift = fastbn.fold_linear(weight, bias, bn)
    assert folded.dtype == shift.dtype == weight.dtype
    scale = 1 / np.sqrt(np.array([4, 5, 6.0]) + bn.eps)
    assert np.array_equal(folded, (weight.astype(np.float64) * scale[:, None]).astype(weight.dtype))
    next_weight, next_bias = (rng.standard_normal(s).astype(DTYPES[dtype]) for s in [(4, 3), (4,)])
    assert {a.dtype for a in fastbn.fold_linear_next(bn, next_weight, next_bias)} == {weight.dtype}
    other = bias.astype(np.float32)
    with pytest.raises(TypeError, match="linear_bias must have the dtype of the weight"):
        fastbn.fold_linear(weight, other, bn)


# ---- what is refused


def refuses(message, function, *args, **kwargs):
    with pytest.raises(TypeError, match=message):
        call(function, *args, **kwargs)


def test_mixed_dtypes_are_refused():
    x = np.ones((4, 5))
    one = np.ones(5)
    x32, one32 = x.astype(np.float32), one.astype(np.float32)
    stats = fastbn.batch_stats(x)
    refuses(
        "residual must have the dtype of x, float64, got float32", fastbn.batch_norm_forward, x, residual=x32
    )
    refuses(
        "out must have the dtype of x, float32, got float64", fastbn.batch_norm_forward, x32, out=x.copy()
    )
    refuses("weight must have dtype float64 where x has float64", fastbn.batch_norm_forward, x, one32)
    refuses("bias must have dtype float32 where x has float32", fastbn.batch_norm_forward, x32, one32, one)
    refuses("running_mean must have dtype float64", fastbn.batch_norm, x, one32, one32)
    refuses("grad_output must have the dtype of x", fastbn.batch_norm_backward, x32, x, stats)
    half = x.astype(np.float16)
    refuses(
        "output must have the dtype of x, float16, got float32.*numpy.float16",
        fastbn.batch_norm_backward, half, half, stats, output=x32, activation="relu",
    )  # fmt: skip
    refuses(
        "running_mean is updated in place .* stall",
        fastbn.batch_norm, half, one.astype(np.float16), one.astype(np.float16), training=True,
    )  # fmt: skip
    refuses("x must have dtype float32, float64, float16 or bfloat16", fastbn.batch_stats, half.astype(">f2"))


def test_layers_refuse_what_is_not_theirs():
    x = np.ones((4, 5))
    for training in True, False:
        layer = fastbn.BatchNorm1d(5).train(training)
        refuses("x must have dtype float32, .* dtype=numpy.float64", layer, x)
        layer = fastbn.BatchNorm1d(5, dtype=np.float64).train(training)
        refuses("x must have dtype float64, .* dtype=numpy.float32", layer, x.astype(np.float16))
    refuses("x must have dtype float32", fastbn.BatchNorm1d(5).freeze(), x)
    refuses("dtype must be numpy.float32", fastbn.BatchNorm1d, 5, dtype=np.float16)
    with pytest.raises(AttributeError, match="cannot change"):
        layer.dtype = np.float32


def test_bfloat16_is_looked_for_only_where_it_comes_in():
    """NumPy stays the only package that is imported."""
    code = """
import sys, numpy as np, fastbn
fastbn.batch_stats(np.ones((4, 3), np.float16))
print('ml_dtypes' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("mask_output", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_masks(dtype, axis, mask_output, isa):
    rng = np.random.default_rng(0)
    for shape in (6, 20, 7, 7), (3, 5, 40, 40), (40, 130), (30, 6, 50):
        positions = shape[:1] + shape[2:]
        p = problem(shape, axis, dtype=dtype)._replace(
            mask=rng.random(positions) < 0.6, mask_output=mask_output
        )
        for operation in OPERATIONS:
            check(operation, p, None if operation in UNFUSED else "relu", operation not in UNFUSED)
