"""The programs of examples/ run, and show what they claim."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def load(program):
    """A program of examples/ as a module."""
    if not EXAMPLES.exists():
        pytest.skip("the tests were copied without examples/")
    for library in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(library, reason="the examples need the extra [demo]")
    spec = importlib.util.spec_from_file_location(program, EXAMPLES / f"{program}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program, folder):
    """Run a program of examples/ as a user does; returns what it prints and the picture it leaves."""
    load(program)  # or skip
    command = [sys.executable, "-W", "error", EXAMPLES / f"{program}.py", "--quick", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warnings spilled
    picture = folder / f"{program}.png"
    assert str(picture) in done.stdout
    from matplotlib.image import imread

    return done.stdout, imread(picture)


@pytest.mark.slow
def test_first_layer_agrees_with_numpy_and_draws(tmp_path):
    printed, picture = run("first_layer", tmp_path / "made")
    differences = [float(text) for text in re.findall(r"\d\.\de[+-]\d\d", printed)]
    assert len(differences) == 2  # training, inference
    assert max(differences) < 1e-4
    assert picture[..., :3].std() > 0.1


@pytest.mark.slow
def test_digits_prints_and_draws(tmp_path):
    printed, picture = run("digits_mlp", tmp_path)
    assert len(re.findall(r"\d\.\d%", printed)) == 30  # 5 learning rates, 3 scales, 2 networks
    assert picture[..., :3].std() > 0.1


def test_first_layer_convolution():
    first_layer = load("first_layer")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
    filters, names = first_layer.make_filters(rng)
    assert filters.shape == (16, 3, 3, 3)
    assert len(names) == 16
    result = first_layer.conv2d(images, filters)
    assert result.shape == (2, 16, 5, 7)
    np.testing.assert_allclose(
        result[1, :, 2, 3], (filters * images[1, :, 1:4, 2:5]).sum((1, 2, 3)), rtol=1e-5, atol=1e-5
    )
    corner = (filters[:, :, 1:, 1:] * images[0, :, :2, :2]).sum((1, 2, 3))
    np.testing.assert_allclose(result[0, :, 0, 0], corner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_digits_gradients_are_those_of_the_loss(batch_norm):
    """By central differences: along the gradient of a parameter the slope is the gradient's length."""
    digits = load("digits_mlp")
    x, _, labels, _ = digits.load_data()
    x, labels = x[:200], labels[:200]
    network = digits.Perceptron((64, 32, 16, 10), batch_norm, 1, np.random.default_rng(0))

    def loss():
        return digits.cross_entropy(network.forward(x), labels)

    _, grad = loss()
    network.backward(grad)
    gradients = network.gradients()
    assert len(gradients) == (8 if batch_norm else 6)
    for parameter, gradient in gradients:
        length = np.linalg.norm(gradient)
        assert length > 1e-3  # or the differences would drown in rounding
        start, step = parameter.copy(), 2e-3 * gradient / length
        losses = []
        for sign in (-1, 1):
            parameter[...] = start + sign * step
            losses.append(float(loss()[0]))
        parameter[...] = start
        assert (losses[1] - losses[0]) / 4e-3 == pytest.approx(length, rel=0.01)


def test_digits_are_judged_by_running_averages():
    digits = load("digits_mlp")
    x, _, labels, _ = digits.load_data()
    network = digits.Perceptron((64, 32, 16, 10), True, 1, np.random.default_rng(0))
    network.forward(x)
    each = [digits.accuracy(network, x[i : i + 1], labels[i : i + 1]) for i in range(50)]
    assert np.mean(each) == digits.accuracy(network, x[:50], labels[:50])
    assert all(layer.bn.training for layer in network.layers[1:-1:2])  # as before


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "scale"), [(0.01, 0.1), (1, 10), (3, 0.1), (3, 1), (3, 10)])
def test_digits_need_batch_norm_at_extreme_rates_and_scales(rate, scale):
    digits = load("digits_mlp")
    data = digits.load_data()
    assert digits.train(data, False, rate, scale, epochs=8)[-1] < 0.3
    assert digits.train(data, True, rate, scale, epochs=8)[-1] > 0.9
