"""from_keras against Keras 3 itself, on a backend that is installed: 100 random layers; what is refused."""

import importlib.util
import os
import warnings

import numpy as np
import pytest

import fastbn
from fastbn.interop import from_keras

# What Keras makes NumPy say wherever it turns a tensor of PyTorch into an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

WEIGHTS = {
    "gamma": np.array([1.0, 2.0]),
    "beta": np.array([3.0, 4.0]),
    "moving_mean": np.array([5.0, 6.0]),
    "moving_variance": np.array([7.0, 8.0]),
}


@pytest.fixture(scope="module")
def keras():
    """On KERAS_BACKEND where that is set, otherwise the quickest to import."""
    backends = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
    if not importlib.util.find_spec("keras") or not backends:
        pytest.skip("Keras 3 or a backend for it is not installed (pip install 'keras>=3' torch==2.13.0)")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a backend says while it is imported
        patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", backends[0]))
        import keras
    return keras


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def batch(rng, shape):
    return (rng.standard_normal(shape) * rng.uniform(0.5, 3) + rng.uniform(-3, 3)).astype(np.float32)


def arrays(keras, layer):
    names = "gamma", "beta", "moving_mean", "moving_variance"
    variables = {name: getattr(layer, name) for name in names}
    return {name: keras.ops.convert_to_numpy(v) for name, v in variables.items() if v is not None}


def assert_same_state(keras, ours, theirs):
    weights = arrays(keras, theirs)
    ones, zeros = np.ones(ours.num_features), np.zeros(ours.num_features)
    assert_close(ones if ours.weight is None else ours.weight, weights.get("gamma", ones))
    assert_close(zeros if ours.bias is None else ours.bias, weights.get("beta", zeros))
    assert_close(ours.running_mean, weights["moving_mean"])
    assert_close(ours.running_var, weights["moving_variance"])


def random_layer(keras, rng):
    """A BatchNormalization with random options, trained a little, and the shape of its inputs."""
    rank = int(rng.integers(2, 6))
    # Not fewer values, among which the variance may be small: Keras takes it as mean(x^2) - mean(x)^2.
    shape = (int(rng.integers(8, 16)), *(int(n) for n in rng.integers(2, 6, rank - 1)))
    options = {
        "axis": int(rng.choice([-1, 1, rank - 1, int(rng.integers(1, rank))])),
        "center": bool(rng.random() < 0.8),
        "scale": bool(rng.random() < 0.8),
        "beta_initializer": keras.initializers.RandomUniform(-2, 2, seed=1),
        "gamma_initializer": keras.initializers.RandomUniform(-2, 2, seed=2),
    }
    if rng.random() < 0.8:  # else Keras' defaults
        options |= {"momentum": rng.choice([0.0, 0.5, 0.9, 1.0]), "epsilon": rng.choice([1e-5, 0.01, 0.1])}
    layer = keras.layers.BatchNormalization(**options)
    layer.build(shape)
    for _ in range(rng.integers(3)):
        layer(batch(rng, shape), training=True)
    return layer, shape


@pytest.mark.parametrize("seed", range(100))
def test_random_layer(keras, seed):  # case 27
    rng = np.random.default_rng(seed)
    theirs, shape = random_layer(keras, rng)
    ours = from_keras(theirs)
    kinds = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}
    assert type(ours) is kinds[len(shape)]
    assert ours.training is False
    assert_same_state(keras, ours, theirs)
    for training in False, True, True, False:
        x = batch(rng, shape)
        expected = theirs(x, training=training)
        if not training:
            expected = theirs(x)  # how Keras is called without a word
        assert_close(ours.train(training)(x), keras.ops.convert_to_numpy(expected))
        assert_same_state(keras, ours, theirs)


@pytest.mark.parametrize("seed", range(100))
def test_training_step(keras, seed):
    """train_on_batch: gradient descent shows all gradients, that of the input in a layer before."""

    class Shift(keras.layers.Layer):
        def build(self, shape):
            self.shift = self.add_weight(shape=shape, initializer="zeros")

        def call(self, x):
            return x + self.shift

    rng = np.random.default_rng(seed)
    theirs, shape = random_layer(keras, rng)
    ours, before = from_keras(theirs).train(), Shift()
    model = keras.Sequential([keras.Input(batch_shape=shape), before, theirs])
    rate, values = 0.5, np.float32(np.prod(shape) / ours.num_features)  # a channel
    model.compile(keras.optimizers.SGD(rate), lambda g, y: keras.ops.sum(g * y) / values, run_eagerly=True)
    shift = np.zeros(shape, np.float32)
    for _ in range(2):
        x, grad_output = batch(rng, shape), batch(rng, shape)
        model.train_on_batch(x, grad_output)
        ours(x + shift)
        grads = ours.backward(grad_output / values)
        steps = (shift, grads.grad_input), (ours.weight, grads.grad_weight), (ours.bias, grads.grad_bias)
        trained = True, theirs.scale, theirs.center
        for (array, gradient), is_trained in zip(steps, trained, strict=True):
            if is_trained:
                array -= np.float32(rate) * gradient
        expected = keras.ops.convert_to_numpy(before.shift)
        np.testing.assert_allclose(shift, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert_same_state(keras, ours, theirs)


def test_weights_alone(keras):
    theirs = keras.layers.BatchNormalization()
    theirs.build((None, 4, 4, 3))
    rng = np.random.default_rng(0)
    theirs.set_weights([rng.uniform(0.5, 2, 3) for _ in range(4)])
    named = arrays(keras, theirs)
    for weights in named, list(named.values()), tuple(named.values()):
        ours = from_keras(weights)
        assert type(ours) is fastbn.BatchNorm
        assert_same_state(keras, ours, theirs)
        x = batch(rng, (2, 4, 4, 3))
        assert_close(ours(x), keras.ops.convert_to_numpy(theirs(x)))


def test_refused_layers(keras):
    with pytest.raises(TypeError, match="got LayerNormalization"):
        from_keras(keras.layers.LayerNormalization())
    with pytest.raises(ValueError, match="has no weights yet; call it once"):
        from_keras(keras.layers.BatchNormalization())
    renorm = keras.layers.BatchNormalization(renorm=True)
    renorm.build((None, 3))
    with pytest.raises(ValueError, match=r"batch renormalization \(renorm=True\)"):
        from_keras(renorm)


def test_layer_of_a_keras_without_batch_renormalization(keras):
    theirs = keras.layers.BatchNormalization()
    theirs.build((None, 3))
    vars(theirs).pop("renorm", None)  # as older ones are
    assert_same_state(keras, from_keras(theirs), theirs)


def test_weights_and_defaults_without_keras():
    ours = from_keras(WEIGHTS)
    assert repr(ours) == repr(fastbn.BatchNorm(2, 1e-3, 1 - 0.99, axis=-1, unbiased=False))
    assert ours.training is False
    assert [a.tolist() for a in (ours.weight, ours.bias, ours.running_mean, ours.running_var)] == [
        [1, 2], [3, 4], [5, 6], [7, 8]
    ]  # fmt: skip
    assert np.array_equal(from_keras(list(WEIGHTS.values())).running_var, [7, 8])


def test_missing_parameters_without_keras():
    def without(*names):
        return from_keras({name: value for name, value in WEIGHTS.items() if name not in names})

    assert without("beta").bias is None
    assert without("gamma").weight.tolist() == [1, 1]
    assert without("gamma").bias.tolist() == [3, 4]
    assert without("gamma", "beta").weight is None
    assert from_keras(list(WEIGHTS.values())[2:]).running_mean.tolist() == [5, 6]
    with pytest.raises(ValueError, match=r"missing \['moving_mean'\], unknown \[\]"):
        without("moving_mean")


def test_refused_weights():
    with pytest.raises(ValueError, match="got 3 arrays; a mapping with names tells a lone gamma"):
        from_keras(list(WEIGHTS.values())[1:])
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['weight'\]"):
        from_keras(WEIGHTS | {"weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\), got \(3,\)"):
        from_keras(WEIGHTS | {"beta": np.ones(3)})
    with pytest.raises(ValueError, match=r"running_var\[0\] is -1"):  # case 35
        from_keras(WEIGHTS | {"moving_variance": np.array([-1.0, 1])})


def test_models(keras):
    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.BatchNormalization(name="last")])
    with pytest.raises(TypeError, match=r"got Sequential and name ''; names .*: \['inner/bn', 'last'\]"):
        from_keras(model)
    with pytest.raises(TypeError, match=r"name 'first'; names .*: \['inner/bn', 'last'\]"):
        from_keras(model, "first")
    for name in "inner/bn", "last":
        assert type(from_keras(model, name)) is fastbn.BatchNorm1d


def test_a_call_of_its_own(keras):
    class WithActivation(keras.layers.BatchNormalization):
        def call(self, inputs, **options):
            return keras.ops.relu(super().call(inputs, **options))

    layer = WithActivation()
    layer.build((None, 3))
    with pytest.raises(TypeError, match="WithActivation has a call of its own"):
        from_keras(layer)


# Keras 2: case 46


@pytest.fixture(scope="module")
def keras_2():
    if not importlib.util.find_spec("tensorflow") or not importlib.util.find_spec("tf_keras"):
        pytest.skip("Keras 2 is not installed (pip install tf_keras)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tf_keras
    return tf_keras


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3), (2, 3, 2, 4), (2, 3, 2, 2, 4)])
@pytest.mark.parametrize("fused", [None, False])
def test_keras_2(keras_2, shape, fused):  # case 46
    rng = np.random.default_rng(0)
    theirs = keras_2.layers.BatchNormalization(momentum=0.75, epsilon=0.01, fused=fused)
    theirs.build(shape)
    theirs.set_weights([rng.uniform(0.5, 2, shape[-1]) for _ in range(4)])
    ours = from_keras(theirs)
    assert ours.unbiased is (fused is None and len(shape) >= 4)
    for training in False, True, True, False:
        x = batch(rng, shape)
        assert_close(ours.train(training)(x), theirs(x, training=training).numpy())
        for array, name in (ours.running_mean, "moving_mean"), (ours.running_var, "moving_variance"):
            assert_close(array, getattr(theirs, name).numpy())


def test_keras_2_refused(keras_2):  # case 46
    for options, message in ({"renorm": True}, "renorm=True"), ({"axis": [1, 2]}, r"axes, \[1, 2\]"):
        layer = keras_2.layers.BatchNormalization(**options)
        layer.build((2, 3, 4))
        with pytest.raises(ValueError, match=message):
            from_keras(layer)
