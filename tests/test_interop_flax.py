"""from_flax against Flax itself, and variables without Flax: case 46."""

import warnings

import numpy as np
import pytest

import fastbn
from fastbn.interop import from_flax

STATISTICS = {"mean": np.array([5.0, 6.0]), "var": np.array([7.0, 8.0])}
PARAMETERS = {"scale": np.array([1.0, 2.0]), "bias": np.array([3.0, 4.0])}


@pytest.fixture(scope="module")
def linen():
    pytest.importorskip("jax", reason="JAX is not installed (pip install jax)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said while it is imported
        return pytest.importorskip("flax.linen", reason="Flax is not installed (pip install flax)")


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_layer(linen, seed):  # case 46
    import jax

    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2, 6))
    shape = (int(rng.integers(8, 16)), *(int(n) for n in rng.integers(2, 5, rank - 1)))
    options = {"momentum": 0.99, "epsilon": 1e-5, "axis": int(rng.choice([-1, 1]))}
    if rng.random() < 0.8:
        options |= {"momentum": float(rng.choice([0.0, 0.5, 1.0])), "epsilon": float(rng.choice([0.01, 0.1]))}
    theirs = linen.BatchNorm(
        **options,
        use_bias=bool(rng.random() < 0.7),
        use_scale=bool(rng.random() < 0.7),
        bias_init=jax.nn.initializers.normal(),
        scale_init=jax.nn.initializers.normal(),
    )
    x = rng.standard_normal(shape, np.float32) * 2 + 1
    variables = theirs.init(jax.random.key(seed), x, use_running_average=False)
    ours = from_flax(variables, momentum=options["momentum"], eps=options["epsilon"], axis=options["axis"])
    assert ours.training is False
    for training in False, True, True, False:
        x = rng.standard_normal(shape, np.float32) * 2 + 1
        expected, changed = theirs.apply(
            variables, x, use_running_average=not training, mutable=["batch_stats"]
        )
        variables = variables | changed
        assert_close(ours.train(training)(x), expected)
        assert_close(ours.running_mean, variables["batch_stats"]["mean"])
        assert_close(ours.running_var, variables["batch_stats"]["var"])


def test_network(linen):  # case 46
    import jax

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x))

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True, name="last")(Block(name="block")(x))

    variables = Network().init(jax.random.key(0), np.ones((2, 4), np.float32))
    for name in "block/BatchNorm_0", "block.BatchNorm_0", "last":
        assert from_flax(variables, name).num_features == 3
    with pytest.raises(ValueError, match=r"no mean and var at name '' .*: \['block/BatchNorm_0', 'last'\]"):
        from_flax(variables)


def variables_at(name, **parameters):
    return {"batch_stats": {name: STATISTICS}, "params": {name: parameters}}


def test_variables_and_defaults_without_flax():
    layer = from_flax(variables_at("bn", **PARAMETERS), "bn")
    assert repr(layer) == repr(fastbn.BatchNorm(2, 1e-5, 1 - 0.99, axis=-1, unbiased=False))
    assert [a.tolist() for a in (layer.weight, layer.bias, layer.running_mean, layer.running_var)] == [
        [1, 2], [3, 4], [5, 6], [7, 8]
    ]  # fmt: skip
    assert from_flax(variables_at("bn", scale=PARAMETERS["scale"]), "bn").bias is None
    alone = from_flax(variables_at("bn", bias=PARAMETERS["bias"]), "bn")
    assert (alone.weight.tolist(), alone.bias.tolist()) == ([1, 1], [3, 4])
    assert from_flax({"batch_stats": STATISTICS}).weight is None


def test_refused_variables():
    with pytest.raises(TypeError, match='mapping of "params" and "batch_stats", got list'):
        from_flax([])
    with pytest.raises(ValueError, match="there is no batch norm in them"):
        from_flax({"params": {}})
    with pytest.raises(ValueError, match=r"not only those of a batch norm: \['kernel'\]"):
        from_flax(variables_at("bn", kernel=np.ones(2)), "bn")
    with pytest.raises(ValueError, match=r"mean .* one axis, got shape \(1, 2\); .* one replica"):
        from_flax({"batch_stats": {key: value[None] for key, value in STATISTICS.items()}})
    with pytest.raises(ValueError, match=r"running_var\[1\] is -1, and eps 1e-05"):  # case 35
        from_flax({"batch_stats": STATISTICS | {"var": np.array([1.0, -1.0])}})
