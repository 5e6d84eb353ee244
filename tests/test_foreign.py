"""Arrays of other libraries: used in place where NumPy can see them, refused where it cannot."""

import array
import ctypes

import numpy as np
import pytest
from operations import problem

import fastbn
from fastbn import _kernels


class Interface:
    """An array that tells where it lies, as CuPy's and Pillow's images do, and nothing else."""

    def __init__(self, a):
        self.__array_interface__ = a.__array_interface__
        self.owner = a


class Capsule:
    """An array with DLPack alone, on a device of one's choice."""

    def __init__(self, a, device=(1, 0)):
        self.array, self.device = a, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def tensor(a):
    return pytest.importorskip("torch").from_numpy(a)


def jax_array(a):
    return pytest.importorskip("jax").numpy.asarray(a)


FRIENDS = pytest.mark.parametrize("friend", [Interface, Capsule, memoryview, tensor])


@FRIENDS
def test_every_array_may_be_foreign(friend):
    p = problem((4, 5, 6))
    ours = {"residual": p.residual, "activation": "relu"}
    theirs = {"residual": friend(p.residual), "activation": "relu"}
    running = p.running_mean.copy(), p.running_var.copy()
    own = p.running_mean.copy(), p.running_var.copy()
    fixed = p.running_mean, p.running_var, p.weight, p.bias
    for training in False, True:
        expected = fastbn.batch_norm(p.x, *own, p.weight, p.bias, training, **ours)
        given = [friend(a) for a in (p.x, *running, p.weight, p.bias)]
        y = fastbn.batch_norm(*given, training, **theirs)
        assert type(y) is np.ndarray
        assert y.tobytes() == expected.tobytes()
    assert running[0].tobytes() == own[0].tobytes() != p.running_mean.tobytes()  # updated in place
    assert running[1].tobytes() == own[1].tobytes() != p.running_var.tobytes()
    y, stats = fastbn.batch_norm_forward(friend(p.x), friend(p.weight), friend(p.bias))
    grads = fastbn.batch_norm_backward(
        friend(p.grad_output), friend(p.x), stats, friend(p.weight), friend(p.bias)
    )
    again = fastbn.batch_norm_backward(p.grad_output, p.x, fastbn.batch_stats(p.x), p.weight, p.bias)
    assert grads.grad_input.tobytes() == again.grad_input.tobytes()
    frozen = fastbn.FrozenBatchNorm(*map(friend, fixed))
    assert frozen(friend(p.x)).tobytes() == fastbn.batch_norm(p.x, *fixed).tobytes()


@FRIENDS
def test_folded_weights_may_be_foreign(friend):
    p = problem((5, 5, 6))
    bn = fastbn.FrozenBatchNorm(p.running_mean, p.running_var, p.weight, p.bias)
    for fold, weight in (fastbn.fold_linear, p.x[0]), (fastbn.fold_conv, p.x):
        folded = fold(friend(weight), friend(p.bias), bn)
        for ours, expected in zip(folded, fold(weight, p.bias, bn), strict=True):
            assert type(ours) is np.ndarray
            assert ours.tobytes() == expected.tobytes()


@FRIENDS
@pytest.mark.parametrize("training", [False, True])
def test_out_may_be_foreign(friend, training):
    p = problem((4, 5, 6))
    memory = np.zeros_like(p.x)
    out = friend(memory)
    layer = fastbn.BatchNorm1d(5).train(training)
    y = layer(friend(p.x), out=out)
    assert y is out
    assert memory.tobytes() == fastbn.BatchNorm1d(5).train(training)(p.x).tobytes() != bytes(memory.nbytes)
    dx = np.zeros_like(p.x)
    stats = fastbn.batch_stats(p.x)
    out = friend(dx)
    assert fastbn.batch_norm_backward(p.grad_output, p.x, stats, out=out).grad_input is out
    assert dx.any()
    memory.fill(0)
    out = friend(memory)
    frozen = layer.eval().freeze()
    assert frozen(friend(p.x), out=out) is out
    assert memory.tobytes() == frozen(p.x).tobytes()
    layer(friend(p.x), out=friend(p.x))
    with pytest.raises(RuntimeError, match="out=x"):
        layer.backward(p.grad_output)


@FRIENDS
def test_nothing_is_copied(friend):
    a = problem((4, 5, 6)).x
    assert np.shares_memory(_kernels.elements(friend(a), "a"), a)


def test_arrays_of_jax():
    """They are read-only: good for everything but `out` and running statistics in training."""
    p = problem((4, 5, 6))
    x, grad_output, residual, mean, var, weight, bias = map(
        jax_array, (p.x, p.grad_output, p.residual, p.running_mean, p.running_var, p.weight, p.bias)
    )
    assert _kernels.elements(x, "x").ctypes.data == x.unsafe_buffer_pointer()
    fixed = p.running_mean, p.running_var, p.weight, p.bias
    y = fastbn.batch_norm(x, mean, var, weight, bias, residual=residual, activation="relu")
    expected = fastbn.batch_norm(p.x, *fixed, residual=p.residual, activation="relu")
    assert type(y) is np.ndarray
    assert y.tobytes() == expected.tobytes()
    assert fastbn.FrozenBatchNorm(mean, var, weight, bias)(x).tobytes() == (
        fastbn.FrozenBatchNorm(*fixed)(p.x).tobytes()
    )
    grads, expected = (
        fastbn.batch_norm_backward(*arrays, fastbn.batch_stats(p.x), p.weight, p.bias).grad_input
        for arrays in ((grad_output, x), (p.grad_output, p.x))
    )
    assert grads.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="out is read-only"):
        fastbn.batch_norm_forward(p.x, out=x)
    with pytest.raises(ValueError, match="running_mean is updated in place in training but is read-only"):
        fastbn.batch_norm(p.x, mean, var, training=True)


@FRIENDS
def test_checks_see_through_them(friend):
    p = problem((4, 5, 6))
    with pytest.raises(ValueError, match="out overlaps weight"):
        fastbn.batch_norm_forward(p.x, friend(p.x[0, 0, :5]), out=friend(p.x))
    with pytest.raises(ValueError, match="x must have 5 channels"):
        fastbn.BatchNorm(5)(friend(p.x[:, :3].copy()))
    with pytest.raises(ValueError, match="2D or 3D"):
        fastbn.BatchNorm1d(5)(friend(p.x[0, 0].copy()))


def test_strides_are_kept():
    torch = pytest.importorskip("torch")
    x = torch.randn(4, 6, 5, 7)
    w = torch.rand(6)
    for view in x.to(memory_format=torch.channels_last), x[::2], x[:, :, :, ::2]:
        y, _ = fastbn.batch_norm_forward(view, w)
        expected = torch.nn.functional.batch_norm(view, None, None, w, training=True)
        np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6)
        out = torch.empty_like(view)
        assert fastbn.batch_norm_forward(view, w, out=out)[0] is out
        assert np.array_equal(out, y)


@pytest.mark.parametrize(
    "other",
    [array.array("f", range(12)), (ctypes.c_float * 12)(*range(12))],
    ids=["array.array", "ctypes"],
)
def test_buffers(other):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    stats = fastbn.batch_stats(memoryview(other).cast("B").cast("f", [6, 2]))
    assert np.array_equal(stats.mean, rows.mean(0))


def test_what_cannot_be_used_in_place_is_refused():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match=r"x must be .* got Capsule \(not in the memory of the CPU\)"):
        fastbn.batch_stats(Capsule(x, (2, 0)))
    for device in (), (1,), None, "cpu", [], 1:
        with pytest.raises(TypeError, match=r"x must be .* got Capsule"):
            fastbn.batch_stats(Capsule(x, device))
    with pytest.raises(TypeError, match=r"x must have dtype float32.* got Interface of int64 \(<i8\)"):
        fastbn.batch_stats(Interface(x.astype(np.int64)))
    with pytest.raises(TypeError, match=r"x must be .* got float32 \(a scalar\)"):
        fastbn.batch_stats(x[0, 0])
    x.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        fastbn.batch_norm_forward(np.ones((4, 3), np.float32), out=Interface(x))


def test_tensors_that_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"x must be .* got Tensor .*; pass x\.detach\(\)$"):
        fastbn.batch_stats(leaf := x.clone().requires_grad_())
    assert fastbn.batch_stats(leaf.detach()).count == 4
    for dtype in torch.float64, torch.float16:
        assert fastbn.batch_stats(x.to(dtype)).count == 4
    with pytest.raises(TypeError, match=r"x must have dtype float32.* got Tensor of int64"):
        fastbn.batch_stats(x.to(torch.int64))
    with pytest.raises(TypeError, match=r"x must .* got Tensor"):
        fastbn.batch_stats(x.to(torch.bfloat16))
