"""What PyTorch's own tests ask of its batch norm, asked of ours: samples of wrong calls, and what they state.

Its samples of right calls (op_db, module_db) are in test_results.py and test_layers.py.
"""

import copy
import re
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from judge import assert_near, normal, outcome  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import fastbn.torch as ours  # noqa: E402

F, nn = torch.nn.functional, torch.nn
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_module_error_inputs(name, training):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    (info,) = (info for info in module_db if info.name == f"nn.{name}")
    samples = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=training)
    assert samples
    for sample in samples:
        assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
        made, given = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        mine, theirs = (
            outcome(getattr(module, name)(*made.args, **made.kwargs).train(training), *given.args)
            for module in (ours, nn)
        )
        if training:
            assert mine[0] is sample.error_type
            assert re.search(sample.error_regex, mine[1])
        if isinstance(theirs, tuple):
            assert mine == theirs
        else:
            torch.testing.assert_close(mine, theirs)


def test_calls_that_scripts_are_tested_with():
    pytest.importorskip("expecttest")
    from torch.testing._internal import jit_metaprogramming_utils as jit

    found = 0
    for name, shape, args, *_ in jit.get_nn_functional_tests():
        if name == "batch_norm":
            found += 1
            args = [getattr(arg, "tensor", arg) for arg in args]
            x = normal(*shape)
            mine, theirs = (outcome(f, x, *copy.deepcopy(args)) for f in (ours.batch_norm, F.batch_norm))
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert found >= 10


@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "mixed"],
)
def test_channels_last_is_as_contiguous(shape, dtype, parameters):
    C = shape[1]
    first = ours.BatchNorm2d(C)
    with torch.no_grad():
        first.weight.uniform_()
        first.bias.uniform_()
    results = []
    for memory_format in torch.contiguous_format, torch.channels_last:
        layer = copy.deepcopy(first).to(parameters)
        x, grad = (
            normal(*shape, seed=seed).to(dtype).contiguous(memory_format=memory_format) for seed in (0, 1)
        )
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        assert y.is_contiguous(memory_format=memory_format)
        assert x.grad.stride() == x.stride()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_input_whose_axes_were_exchanged():
    x = torch.arange(6.0).view(1, 3, 2, 1).permute(0, 2, 1, 3)
    layer = ours.BatchNorm2d(2).eval()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cumulative_average_of_two_batches_is_the_mean_of_each(dtype):
    layer = ours.BatchNorm1d(3, momentum=None).to(dtype)
    one, two = (normal(20, 3, seed=seed).to(dtype) for seed in (0, 1))
    apart = []
    for batch in one, two:
        layer(batch)
        apart.append([layer.running_mean.clone(), layer.running_var.clone()])
        layer.reset_running_stats()
        assert torch.equal(layer.running_mean, torch.zeros(3, dtype=dtype))
        assert torch.equal(layer.running_var, torch.ones(3, dtype=dtype))
    layer(one)
    layer(two)
    for average, *both in zip((layer.running_mean, layer.running_var), *apart, strict=True):
        torch.testing.assert_close(average, sum(both) / 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own use
@pytest.mark.parametrize("dual", [(0,), (1,), (1, 2), (0, 1), (0, 1, 2)], ids=str)
def test_running_statistics_have_no_tangents(dual):
    results = []
    for function in ours.batch_norm, F.batch_norm:
        tensors = normal(3, 2, 5), normal(2), normal(2, seed=1)
        with forward_ad.dual_level():
            made = [
                forward_ad.make_dual(t, torch.ones_like(t)) if i in dual else t for i, t in enumerate(tensors)
            ]
            results.append(outcome(function, *made, training=False, momentum=-1.2))
            if isinstance(results[-1], torch.Tensor):
                results[-1] = forward_ad.unpack_dual(results[-1])
    mine, theirs = results
    if isinstance(theirs[0], type):
        assert mine == theirs
        assert "not differentiable wrt running_mean and running_var" in mine[1]
    else:
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, training):
    """Of both orders, in float64; and what the kernels do in float32 is near that."""
    shape = {"BatchNorm1d": (5, 2), "BatchNorm2d": (3, 2, 2, 2), "BatchNorm3d": (2, 2, 2, 1, 2)}[name]
    layer = getattr(ours, name)(2).double().train(training)
    x = normal(*shape).double().requires_grad_()
    call = partial(torch.func.functional_call, layer)
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return call(dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(function, (x, *parameters.values()))
    single = copy.deepcopy(layer).float()
    own = x.detach().float().requires_grad_()
    for module, leaf in (layer, x), (single, own):
        module(leaf).square().sum().backward(inputs=[leaf, *module.parameters()])
    assert_near(own.grad, x.grad, 1e-5)
    for p, q in zip(single.parameters(), layer.parameters(), strict=True):
        assert_near(p.grad, q.grad, 1e-5 * q.grad.abs().clamp(min=1))


def test_more_samples_than_a_half_counts():
    """As many as a grid of a graphics processor has not."""
    x = normal(70000, 3, seed=2)
    y = ours.BatchNorm1d(3)(x)
    assert_near(y, F.batch_norm(x.double(), None, None, training=True), 2e-5)
