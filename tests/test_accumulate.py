"""The program that accumulates gradients over parts of a batch, and has those of the whole batch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "accumulate.py"


@pytest.fixture(scope="module")
def program():
    if not PROGRAM.exists():
        pytest.skip("the tests were copied without examples/")
    pytest.importorskip("sklearn", reason="the examples need the extra [demo]")
    spec = importlib.util.spec_from_file_location("accumulate", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batch(rng):
    return rng.random((100, 64), np.float32), rng.integers(0, 10, 100)


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_parts_have_the_gradients_of_the_whole(program, batch, size):
    network = program.Network()
    loss, gradients, stats = program.gradients_of_batch(network, [batch])
    in_parts = program.gradients_of_batch(network, program.cut(*batch, size))
    assert in_parts[0] == pytest.approx(loss, rel=1e-6)
    assert program.distance(in_parts[1], gradients) < 1e-5
    assert [of_part.count for of_part in in_parts[2]] == [100, 100]
    for ours, theirs in zip(in_parts[2], stats, strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.var, theirs.var, rtol=1e-5)


def test_parts_by_themselves_do_not(program, batch):
    network = program.Network()
    _, gradients, _ = program.gradients_of_batch(network, [batch])
    _, others, _ = program.gradients_of_parts(network, program.cut(*batch, 20))
    assert program.distance(others, gradients) > 0.1


def test_gradients_are_those_of_the_loss(program, batch):
    """By central differences: along the gradient of a parameter the slope is the gradient's length."""
    network, parts = program.Network(), program.cut(*batch, 32)
    _, gradients, _ = program.gradients_of_batch(network, parts)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        length = np.linalg.norm(gradient)
        start, step = parameter.copy(), 2e-2 * gradient / length
        losses = []
        for sign in (-1, 1):
            parameter[...] = start + sign * step
            losses.append(program.gradients_of_batch(network, parts)[0])
        parameter[...] = start
        assert (losses[1] - losses[0]) / 4e-2 == pytest.approx(length, rel=0.02)


def test_training_in_parts_is_training(program, rng):
    x, labels = rng.random((520, 64), np.float32), rng.integers(0, 10, 520)
    data = x, x[:50], labels, labels[:50]
    whole, losses, _ = program.train(data, 2, program.gradients_of_batch, 256)
    parts, same, _ = program.train(data, 2, program.gradients_of_batch, 50)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for ours, theirs in zip(parts.norms, whole.norms, strict=True):
        np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-5)
