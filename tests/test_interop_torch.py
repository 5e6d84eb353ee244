"""from_torch against PyTorch itself: 100 random layers, then state dicts from files and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn.interop import from_torch

SPATIAL = {"BatchNorm1d": [(), (6,)], "BatchNorm2d": [(4, 3)], "BatchNorm3d": [(3, 2, 4)]}
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch==2.13.0)")


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_state(layer, module):
    state = module.state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert_close(value, state[name].numpy())


def random_module(torch, rng):
    """A batch norm with random options, trained a little, in either mode; and the shape of its inputs."""
    name = rng.choice(list(SPATIAL))
    spatial = SPATIAL[name][rng.integers(len(SPATIAL[name]))]
    shape = (int(rng.integers(2, 5)), int(rng.integers(1, 9)), *spatial)
    module = getattr(torch.nn, name)(
        shape[1],
        eps=rng.choice([1e-5, 1e-3, 0.1]),
        momentum=rng.choice([None, 0.0, 0.1, 0.7, 1.0]),
        affine=rng.random() < 0.8,
        track_running_stats=rng.random() < 0.8,
        bias=rng.random() < 0.7,
    )
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -2, 2)
    for _ in range(rng.integers(3)):
        module(torch.from_numpy(batch(rng, shape)))
    return module.train(rng.random() < 0.5), shape


def batch(rng, shape):
    return (rng.standard_normal(shape) * rng.uniform(0.5, 3) + rng.uniform(-3, 3)).astype(np.float32)


@pytest.mark.parametrize("seed", range(100))
def test_random_layer(torch, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module, shape = random_module(torch, rng)
    layer = from_torch(module)
    assert repr(layer) == repr(module)  # class, eps, momentum and all other options
    assert layer.training is module.training
    assert_same_state(layer, module)
    for training in False, True, True, False:
        x = batch(rng, shape)
        grad_output = batch(rng, shape) / np.float32(len(x))  # of a mean over the batch
        module_input = torch.from_numpy(x).requires_grad_()
        expected = module.train(training)(module_input)
        assert_close(layer.train(training)(x), expected.detach().numpy())
        assert_same_state(layer, module)
        # A step of gradient descent, and on with the parameters it gives
        parameters = dict(module.named_parameters())
        expected = torch.autograd.grad(
            expected, [module_input, *parameters.values()], torch.from_numpy(grad_output)
        )
        grads = layer.backward(grad_output)
        assert_close(grads.grad_input, expected[0].numpy())
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), expected[1:], strict=True):
                assert_close(getattr(grads, f"grad_{name}"), gradient.numpy())
                parameter -= 0.01 * gradient
                array = getattr(layer, name)
                array -= np.float32(0.01) * getattr(grads, f"grad_{name}")
        assert_same_state(layer, module)


def test_values_are_copied(torch):
    module = torch.nn.BatchNorm2d(3)
    layer = from_torch(module)
    layer.weight += 1
    layer(np.ones((2, 3, 2, 2), np.float32))
    assert module.weight.tolist() == [1, 1, 1]
    assert module.running_mean.tolist() == [0, 0, 0]
    assert module.num_batches_tracked == 0


@pytest.fixture
def network(torch):
    """Batch norms at "1" and "2.bn"."""
    torch.manual_seed(0)
    inner = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 5, 1), "bn": torch.nn.BatchNorm2d(5)})
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), inner)
    for module in network[1], inner["bn"]:
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand_like(tensor, dtype=torch.float) * 5)
    return network


@pytest.mark.parametrize("prefix", ["2.bn", "2.bn."])
def test_prefix(network, prefix):
    module = network.get_submodule("2.bn")
    from_module = from_torch(network, prefix)
    assert type(from_module) is fastbn.BatchNorm2d
    assert_same_state(from_module, module)
    from_state = from_torch(network.state_dict(), prefix)
    assert type(from_state) is fastbn.BatchNorm  # whose rank it is, a state dict does not tell
    assert from_state.training is False
    assert_same_state(from_state, module)


def numpy_state(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def test_npz(network, tmp_path):
    np.savez(tmp_path / "network.npz", **numpy_state(network))
    np.savez(tmp_path / "bn.npz", **numpy_state(network[1]))
    with np.load(tmp_path / "network.npz") as state:
        assert_same_state(from_torch(state, "2.bn"), network[2]["bn"])
    with np.load(tmp_path / "bn.npz") as state:
        assert_same_state(from_torch(state), network[1])
        layer = fastbn.BatchNorm2d(4)
        layer.load_state_dict(state)
    assert_same_state(layer, network[1])


def test_safetensors(network, tmp_path):
    """Files that PyTorch users write, read without PyTorch."""
    pytest.importorskip("safetensors", reason="safetensors is not installed (pip install safetensors)")
    import safetensors.numpy
    import safetensors.torch

    safetensors.torch.save_file(network.state_dict(), tmp_path / "network.safetensors")
    safetensors.torch.save_file(network[1].state_dict(), tmp_path / "bn.safetensors")
    state = safetensors.numpy.load_file(tmp_path / "network.safetensors")
    assert_same_state(from_torch(state, "2.bn"), network[2]["bn"])
    layer = fastbn.BatchNorm2d(4)
    layer.load_state_dict(safetensors.numpy.load_file(tmp_path / "bn.safetensors"))
    assert_same_state(layer, network[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_become_float32(network, torch, dtype):
    module = network[1].to(getattr(torch, dtype))
    for layer in from_torch(module), from_torch(module.state_dict()):
        assert layer.weight.dtype == np.float32
        for name, value in layer.state_dict().items():
            assert np.array_equal(value, module.state_dict()[name].to(torch.float).numpy())


def test_sync_batch_norm_is_of_any_rank(torch):
    layer = from_torch(torch.nn.SyncBatchNorm(3, eps=0.5))
    assert type(layer) is fastbn.BatchNorm
    assert layer.eps == 0.5


def test_state_dict_without_parameters_or_counter():
    statistics = {"running_mean": np.ones(3), "running_var": np.full(3, 2.0)}
    layer = from_torch(statistics)
    assert layer.weight is layer.bias is None
    assert layer.running_var.tolist() == [2, 2, 2]
    layer = from_torch(statistics | {"weight": np.ones(3)})
    assert layer.bias is None
    assert layer.num_batches_tracked == 0


def test_refused(torch, network):
    with pytest.raises(TypeError, match=r"got Sequential; prefixes of batch norms: \['1', '2.bn'\]"):
        from_torch(network)
    with pytest.raises(TypeError, match=r"got ModuleDict; prefixes of batch norms: \['2.bn'\]"):
        from_torch(network, "2")
    with pytest.raises(TypeError, match="got InstanceNorm2d; there is no batch norm in it"):
        from_torch(torch.nn.InstanceNorm2d(3, track_running_stats=True))
    with pytest.raises(AttributeError, match="nowhere"):
        from_torch(network, "nowhere")
    with pytest.raises(TypeError, match=r"a torch.nn.Module or a mapping, got list"):
        from_torch([1, 2])
    with pytest.raises(ValueError, match="uninitialized parameter"):
        from_torch(torch.nn.LazyBatchNorm2d())

    class WithActivation(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(TypeError, match=r"WithActivation has a forward of its own.*module.state_dict\(\)"):
        from_torch(WithActivation(3))


def test_refused_state_dicts():
    state = {
        "a.running_mean": np.zeros(3),
        "a.running_var": np.ones(3),
        "conv.weight": np.zeros((3, 2, 1, 1)),
    }
    with pytest.raises(ValueError, match=r"no 'running_mean', .*; prefixes of batch norms: \['a'\]"):
        from_torch(state)
    with pytest.raises(ValueError, match=r"no 'conv.running_mean'"):
        from_torch(state, "conv")
    with pytest.raises(ValueError, match="there is no batch norm in it"):
        from_torch({})
    with pytest.raises(ValueError, match=r"unexpected keys \['conv.weight'\]"):
        from_torch(state | {"a.conv.weight": np.zeros(3)}, "a")
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), got \(3, 1\)"):
        from_torch(state | {"a.weight": np.ones((3, 1))}, "a")


def test_no_framework_is_imported_before_it_is_used():
    program = """
import sys
import numpy as np
from fastbn.interop import from_keras, from_torch
from_torch({"running_mean": np.zeros(2), "running_var": np.ones(2)})
from_keras([np.zeros(2), np.ones(2)])
frameworks = {"torch", "keras", "tensorflow", "jax", "onnx", "safetensors"}
print(*frameworks.intersection(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == []


def test_no_other_names():
    import fastbn.interop

    with pytest.raises(AttributeError, match="no attribute 'from_caffe'"):
        fastbn.interop.from_caffe  # noqa: B018
