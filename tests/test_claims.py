"""examples/claims.py: its layers and measurements hold to what is certain, and all of it runs and draws."""

import re
import sys
from itertools import permutations

import numpy as np
import pytest
from test_examples import EXAMPLES, load

import fastbn

TINY = {
    "rates": {"rates": (0.01, 1), "epochs": 1},
    "depth": {"count": 3, "images": 64},
    "order": {"rates": (0.01, 1), "epochs": 1},
    "dropout": {"shares": (0, 0.5), "epochs": 1},
    "batch_size": {"sizes": (1, 64, 256), "epochs": 1},
}


@pytest.fixture(scope="module")
def claims():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield load("claims")


@pytest.fixture(scope="module")
def data(claims):
    return claims.load_data()


def test_gradients_are_those_of_the_loss(claims, data):
    """By central differences: along the gradient of a parameter the slope is the gradient's length."""
    x, _, labels, _ = data
    x, labels = x[:200], labels[:200]
    rng = np.random.default_rng(0)
    dropout = claims.Dropout(0.25, None)
    skip = claims.Skip(claims.BatchNorm(32), claims.ReLU(), claims.Linear(32, 32, 1, rng), dropout)
    network = claims.Chain(
        claims.Linear(64, 32, 1, rng),
        skip,
        claims.LayerNorm(32),
        claims.ReLU(),
        claims.Linear(32, 10, 1, rng),
    )

    def loss():
        dropout.rng = np.random.default_rng(1)  # always the same values are dropped
        return claims.cross_entropy(network.forward(x), labels)

    network.layers[2].weight[:] = rng.uniform(0.5, 2, 32)
    _, grad = loss()
    network.backward(grad)
    gradients = network.gradients
    assert len(gradients) == 10  # three linear layers, batch norm, layer norm
    for parameter, gradient in gradients:
        length = np.linalg.norm(gradient)
        if parameter is network.layers[0].bias:  # not seen by batch norm, but by way of the skip connection
            assert length > 1e-4
        start, step = parameter.copy(), 2e-3 * gradient / length
        losses = []
        for sign in (-1, 1):
            parameter[...] = start + sign * step
            losses.append(float(loss()[0]))
        parameter[...] = start
        assert (losses[1] - losses[0]) / 4e-3 == pytest.approx(length, rel=0.02)


def test_layer_norm_sees_neither_offset_nor_scale_of_a_row(claims):
    x = np.random.default_rng(0).normal(3, 2, (8, 100)).astype(np.float32)
    norm = claims.LayerNorm(100)
    y = norm.forward(x)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(1), 1, atol=1e-5)
    moved = np.linspace(1, 9, 8, dtype=np.float32)[:, None]
    np.testing.assert_allclose(norm.forward(moved * x - 5 * moved), y, atol=1e-5)


def test_batch_norm_hides_the_size_of_the_weights_before_it(claims, data):
    """The output stays; the gradient shrinks as the weights grow, and is at a right angle to them."""
    x = data[0]
    grad = np.random.default_rng(1).standard_normal((len(x), 16)).astype(np.float32)
    results = []
    for scale in (1, 10):
        linear = claims.Linear(64, 16, scale, np.random.default_rng(0))
        network = claims.Chain(linear, claims.BatchNorm(16))
        y = network.forward(x)
        network.backward(grad)
        gradient = network.gradients[0][1]
        along = (linear.weight * gradient).sum(0)
        lengths = np.linalg.norm(linear.weight, axis=0) * np.linalg.norm(gradient, axis=0)
        np.testing.assert_allclose(along / lengths, 0, atol=1e-4)
        results.append((y, scale * gradient))
    for one, ten in zip(*results, strict=True):
        np.testing.assert_allclose(ten, one, atol=1e-3 * np.abs(one).max())


def test_a_batch_of_two_is_normalized_to_signs(claims):
    x = np.float32([[1, -2, 300], [2, -7, 301]])
    np.testing.assert_allclose(claims.BatchNorm(3).forward(x), [[-1, 1, -1], [1, -1, 1]], atol=1e-4)


def test_places_of_the_norm(claims):
    rng = np.random.default_rng(0)
    kinds = {
        place: [type(layer).__name__ for layer in claims.perceptron(hidden, rng).layers[:3]]
        for place, hidden in {
            "before": claims.before(claims.BatchNorm),
            "after": claims.after(claims.LayerNorm),
            "none": claims.before(None),
        }.items()
    }
    assert kinds == {
        "before": ["Linear", "BatchNorm", "ReLU"],
        "after": ["Linear", "ReLU", "LayerNorm"],
        "none": ["Linear", "ReLU", "Linear"],
    }


@pytest.mark.parametrize("norm", ["plain", "batch norm", "layer norm"])
def test_gradient_through_blocks_that_do_nothing(claims, data, norm):
    """Weights of zero: a skip connection passes the gradient on as it is, and nothing else passes it on."""
    x, _, labels, _ = data

    def lengths(block):
        # The last linear layer must not be zero, or there would be no gradient at all.
        make = claims.Linear
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "Linear", lambda i, o, s, rng: make(i, o, 0 if i == o else 1, rng))
            rng = np.random.default_rng(0)
            return claims.gradient_lengths(claims.NORMS[norm], block, 1, 4, x[:64], labels[:64], rng)

    np.testing.assert_array_equal(lengths(claims.Skip), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(lengths(claims.Chain), [0, 0, 0, 0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "block", "scale", "growth"),
    [
        ("plain", "Chain", 1, 1),  # what He weights are for
        ("plain", "Chain", 0.7, 0.7),
        ("plain", "Skip", 1, 2**0.5),  # two variances add up in each block
        # Of a ReLU's mean square batch norm leaves the variance, 1 - 1 / pi of it, and divides by its root.
        ("batch norm", "Chain", 1, (1 - 1 / np.pi) ** -0.5),
        ("batch norm", "Chain", 0.7, (1 - 1 / np.pi) ** -0.5),
    ],
)
def test_growth_of_gradients(claims, data, norm, block, scale, growth):
    x, _, labels, _ = data
    rng = np.random.default_rng(0)
    lengths = claims.gradient_lengths(
        claims.NORMS[norm], getattr(claims, block), scale, 40, x[:256], labels[:256], rng
    )
    assert (lengths[10] / lengths[40]) ** (1 / 30) == pytest.approx(growth, rel=0.02)


def hidden_with_dropout(claims, share, rng):
    return lambda features: [claims.BatchNorm(features), claims.ReLU(), claims.Dropout(share, rng)]


def test_statistics_are_taken_again_in_evaluation(claims, data):
    x, rng = data[0], np.random.default_rng(0)
    network = claims.perceptron(hidden_with_dropout(claims, 0.5, rng), rng)
    network.set_training(False)
    y = network.forward(x)
    calibrated = claims.recalibrated(network, x)
    np.testing.assert_array_equal(network.forward(x), y)  # it is a copy
    for layer in calibrated.layers:
        if isinstance(layer, claims.BatchNorm):
            stats = fastbn.batch_stats(x)
            np.testing.assert_allclose(layer.bn.running_mean, stats.mean, atol=1e-5)
            np.testing.assert_allclose(layer.bn.running_var, stats.var * len(x) / (len(x) - 1), rtol=1e-4)
            assert layer.bn.momentum == 0.1
        x = layer.forward(x)


@pytest.mark.parametrize("share", [0, 0.2, 0.7])
def test_dropout_raises_the_variance_as_it_must(claims, data, share):
    x, rng = data[0], np.random.default_rng(0)
    trained = claims.perceptron(hidden_with_dropout(claims, share, rng), rng)
    many = np.tile(x, (20, 1))  # each image with 20 draws
    for layer in trained.layers[:6]:
        if isinstance(layer, claims.BatchNorm):
            layer.bn.momentum = 1
        many = layer.forward(many)
    trained.set_training(False)
    measured, expected = claims.variance_shift(trained, claims.recalibrated(trained, x), x)
    assert measured == pytest.approx(expected, rel=0.01 if share else 1e-3)
    assert (expected == 1) == (share == 0)


@pytest.mark.slow
def test_dropping_nothing_changes_nothing(claims, data):
    errors = claims.collect(claims.try_dropout(data, 3, shares=(0,), epochs=1))
    errors = errors["test error: by the place of the dropout"]
    assert errors["dropout between batch norms"] == errors["dropout behind all batch norms"]
    assert errors["dropout, no batch norm at all"][0][0] == claims.trained_error(
        claims.before(None), data, 3, epochs=1
    )


def test_errors_of_statistics(claims):
    x = np.random.default_rng(0).normal(5, 2, (4, 3)).astype(np.float32)
    assert claims.statistics_error(x, np.arange(4), 4) == (0, 0)
    assert claims.statistics_error(x, np.arange(4), 1) == pytest.approx((1, 1))
    # The theory is that of the mean over all orders.
    squares = [claims.statistics_error(x, np.array(order), 2)[0] ** 2 for order in permutations(range(4))]
    assert np.mean(squares) == pytest.approx((4 - 2) / (2 * (4 - 1)))


def test_batches_in_the_place_of_the_population(claims, data):
    """A batch normalized by itself is read as by a network that has its statistics."""
    _, x, _, labels = data
    rng = np.random.default_rng(0)
    network = claims.train(claims.perceptron(claims.before(claims.BatchNorm), rng), data, rng, epochs=1)
    before = network.forward(x)
    found = claims.error_by_batches(network, x, labels, np.arange(len(x)), len(x))
    np.testing.assert_array_equal(network.forward(x), before)  # it was a copy
    assert found == pytest.approx(claims.error(claims.recalibrated(network, x), data), abs=2.5 / len(x))
    assert found < 0.5


@pytest.mark.slow
def test_short_form_prints_and_draws(claims, tmp_path, monkeypatch, capsys):
    tiny = {name: each._replace(short=TINY[name]) for name, each in claims.EXPERIMENTS.items()}
    monkeypatch.setattr(claims, "EXPERIMENTS", tiny)
    monkeypatch.setattr(claims, "SEEDS", range(2))
    monkeypatch.setattr(sys, "argv", ["claims.py", "--short", "--out", str(tmp_path / "made")])
    monkeypatch.setenv("COLUMNS", "150")
    try:
        claims.main()
    finally:
        fastbn.set_num_threads(None)
    printed = capsys.readouterr().out
    from matplotlib.image import imread

    for name in TINY:
        picture = tmp_path / "made" / f"claims_{name}.png"
        assert str(picture) in printed
        assert imread(picture)[..., :3].std() > 0.1
    figures = re.findall(r"\d\.\d% \((\d+\.\d)% to (\d+\.\d)%\)", printed)
    in_rates, in_order, in_dropout = 3 * 2 * 3, 2 * 2 * 3, 2 * 4  # scales, rates, networks and so on
    in_batch_size = (1 + 2) + 2 * (3 + 4)  # batches of one, and the others
    assert len(figures) == in_rates + in_order + in_dropout + in_batch_size
    assert all(0 <= float(least) <= float(most) <= 100 for least, most in figures)


def test_a_part_is_enough(claims, tmp_path, monkeypatch, capsys):
    depth = claims.EXPERIMENTS["depth"]._replace(full=TINY["depth"])
    monkeypatch.setattr(claims, "EXPERIMENTS", claims.EXPERIMENTS | {"depth": depth})
    monkeypatch.setattr(sys, "argv", ["claims.py", "depth", "--out", str(tmp_path)])
    try:
        claims.main()
    finally:
        fastbn.set_num_threads(None)
    assert [file.name for file in tmp_path.iterdir()] == ["claims_depth.png"]
    assert capsys.readouterr().out.count("Picture: ") == 1
