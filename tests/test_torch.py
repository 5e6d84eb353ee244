"""PyTorch as a second judge of signature, results and gradients: in float64, and in its own float32."""

import inspect

import numpy as np
import pytest
from operations import SUM, assert_within, call

import fastbn

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SHAPES = [
    (6, 5),
    (1, 5, 7),
    (4, 5, 7),
    (3, 5, 6, 7),
    (2, 64, 14, 14),
    (2, 5, 3, 4, 6),
    (84, 3, 7, 7),
    (2, 3, 70, 60),
]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
# what PyTorch computes in, how close its results should be
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
both_modes = pytest.mark.parametrize("training", [True, False])


def arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    C = shape[1]
    x, grad_output, residual = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    weight, running_var = (rng.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(2))
    bias, running_mean = (rng.uniform(-1, 1, C).astype(np.float32) for _ in range(2))
    return x, grad_output, residual, weight, bias, running_mean, running_var


def tensors(dtype, *values):
    return [None if v is None else torch.tensor(v, dtype=dtype) for v in values]


def test_signature_is_pytorchs():
    ours = list(inspect.signature(fastbn.batch_norm).parameters.values())
    theirs = list(inspect.signature(functional.batch_norm).parameters.values())
    assert ours[0].name == "x"
    assert theirs[0].name == "input"
    for our, their in zip(ours, theirs, strict=False):
        assert (our.default, our.kind) == (their.default, their.kind), our.name
    assert [p.name for p in ours[1 : len(theirs)]] == [p.name for p in theirs[1:]]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@shapes
@precisions
@both_modes
@pytest.mark.parametrize("momentum", [0.1, 0.75])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_results(isa, shape, dtype, tolerance, training, momentum, eps):
    x, _, _, weight, bias, *running = arrays(shape)
    for w, b in (weight, bias), (None, None), (weight, None), (None, bias):
        arguments = w, b, training, momentum, eps
        ours, theirs = [v.copy() for v in running], tensors(dtype, *running)
        expected = functional.batch_norm(*tensors(dtype, x), *theirs, *tensors(dtype, w, b), *arguments[2:])
        y = call(fastbn.batch_norm, x, *ours, *arguments, writes=ours if training else ())
        expected = expected.numpy()
        assert_within(y, expected, tolerance * np.maximum(1, abs(expected)))
        for our, their in zip(ours, theirs, strict=True):
            assert_within(our, their.numpy(), tolerance * np.maximum(1, abs(their.numpy())))


@shapes
@precisions
@both_modes
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_gradients(isa, shape, dtype, tolerance, training, activation):
    x, grad_output, residual, weight, bias, *running = arrays(shape)
    if activation:  # PyTorch may see a value that is all but 0 on the other side
        y = fastbn.batch_norm(x, *[v.copy() for v in running], weight, bias, training, residual=residual)
        grad_output[(abs(y) < 1e-5) | (abs(y - 6) < 1e-5)] = 0
    leaves = tensors(dtype, x, weight, bias, residual)
    for leaf in leaves:
        leaf.requires_grad_()
    z = functional.batch_norm(leaves[0], *tensors(dtype, *running), *leaves[1:3], training) + leaves[3]
    negative_slope = 0.2
    if activation == "leaky_relu":
        z = functional.leaky_relu(z, negative_slope)
    elif activation:
        z = getattr(functional, activation)(z)
    z.backward(*tensors(dtype, grad_output))
    stats = fastbn.batch_stats(x) if training else fastbn.BatchStats(*running, x.size // len(bias))
    grads = call(
        fastbn.batch_norm_backward, grad_output, x, stats, weight, bias, training=training, residual=residual,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip
    for name, gradient, leaf in zip(grads._fields, grads, leaves, strict=True):
        expected = leaf.grad.numpy()
        bound = tolerance * np.maximum(1, abs(expected))
        if gradient.ndim == 1:  # a sum of as many terms
            bound = bound + SUM * x.size / len(bias)
        assert_within(gradient, expected, bound, name)


@precisions
@both_modes
def test_channels_last_memory(isa, dtype, tolerance, training):
    x, _, _, weight, bias, *running = arrays((3, 17, 6, 7))
    ours = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    theirs = torch.tensor(x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = fastbn.batch_norm(ours, *[v.copy() for v in running], weight, bias, training)
    expected = functional.batch_norm(theirs, *tensors(dtype, *running, weight, bias), training)
    assert_within(y, expected.numpy(), tolerance * np.maximum(1, abs(expected.numpy())))
    assert y.strides == tuple(4 * stride for stride in expected.stride())


def test_without_running_statistics():
    x, *_ = arrays((4, 5, 7))
    expected = functional.batch_norm(torch.tensor(x).double(), None, None, training=True).numpy()
    assert_within(
        fastbn.batch_norm(x, None, None, training=True), expected, 2e-6 * np.maximum(1, abs(expected))
    )


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_gradient_at_the_kinks_is_pytorchs(isa, activation):
    z = np.array([[-1, -0.0, 0, 1e-30, 3, 6, 7]], np.float32).T
    leaf = torch.tensor(z, requires_grad=True)
    getattr(functional, activation)(leaf).sum().backward()
    stats = fastbn.BatchStats([0], [1], len(z))
    grads = fastbn.batch_norm_backward(
        np.ones_like(z), z, stats, eps=0, training=False, activation=activation
    )
    np.testing.assert_array_equal(grads.grad_input, leaf.grad.numpy())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("size", [1, 64])
def test_gradient_at_nan_is_pytorchs(isa, activation, size):
    """Where PyTorch has one: in relu6 and hardswish it depends on whether a vector is full."""
    z = np.full((size, 1), np.nan, np.float32)
    leaf = torch.tensor(z, requires_grad=True)
    getattr(functional, activation)(leaf).sum().backward()
    stats = fastbn.BatchStats([0], [1], len(z))
    grads = fastbn.batch_norm_backward(
        np.ones_like(z), z, stats, eps=0, training=False, residual=z, activation=activation
    )
    np.testing.assert_array_equal(grads.grad_residual, leaf.grad.numpy())


@both_modes
def test_nan_spreads_as_in_pytorch(isa, training):
    x, _, _, weight, bias, *running = arrays((4, 5, 7))
    x[1, 2, 3], x[2, 4, 0] = np.nan, np.inf
    expected = functional.batch_norm(*tensors(torch.float32, x, *running, weight, bias), training).numpy()
    y = fastbn.batch_norm(x, *running, weight, bias, training)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1)])
def test_one_value_per_channel_is_refused_as_by_pytorch(shape):
    x, _, _, _, _, *running = arrays(shape)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.batch_norm(*tensors(torch.float32, x, *running), training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        call(fastbn.batch_norm, x, *running, training=True)


@both_modes
def test_tensors_share_their_memory(training):
    """torch.Tensor.numpy() is no copy, and fastbn updates the tensors behind the arrays."""
    x, _, _, weight, bias, *running = arrays((4, 5, 7))
    expected, theirs = tensors(torch.float32, *running), tensors(torch.float32, *running)
    inputs = tensors(torch.float32, x, weight, bias)
    y = fastbn.batch_norm(
        inputs[0].numpy(), *[t.numpy() for t in theirs], inputs[1].numpy(), inputs[2].numpy(), training
    )
    reference = functional.batch_norm(inputs[0], *expected, *inputs[1:], training)
    np.testing.assert_allclose(y, reference.numpy(), rtol=0, atol=1e-5)
    for ours, their in zip(theirs, expected, strict=True):
        torch.testing.assert_close(ours, their)
