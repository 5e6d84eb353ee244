"""from_torch against PyTorch itself: 100 random layers, then state dicts from files and what is refused."""

import io
import re
import subprocess
import sys
import warnings

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
import fastbn
from_torch, from_keras = fastbn.interop.from_torch, fastbn.interop.from_keras  # from import fastbn alone
from_torch({"running_mean": np.zeros(2), "running_var": np.ones(2)})
from_keras([np.zeros(2), np.ones(2)])
frameworks = {"torch", "keras", "tensorflow", "jax", "flax", "onnx", "safetensors"}
print(*frameworks.intersection(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == []


def test_names_of_the_package():
    program = (
        "import fastbn; print('fastbn.interop.torch' in vars(fastbn), fastbn.interop.from_torch.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "from_torch"], done.stderr
    with pytest.raises(AttributeError, match="module 'fastbn' has no attribute 'nothing'"):
        fastbn.nothing  # noqa: B018


# Case 39: detection networks


def frozen(torch, eps, channels=3):
    class FrozenBatchNorm2d(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, low in ("weight", -2), ("bias", -2), ("running_mean", -2), ("running_var", 0.3):
                self.register_buffer(name, torch.empty(channels).uniform_(low, 3))
            if eps is not None:
                self.eps = eps

        def forward(self, x):
            scale = self.weight * (self.running_var + (self.eps if eps is not None else 0)).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    return FrozenBatchNorm2d()


@pytest.fixture(scope="module")
def torchvision_frozen(torch):
    """torchvision's class. Its operators are defined here where it was built for another PyTorch."""
    pytest.importorskip("PIL", reason="torchvision and pillow are not installed")
    libraries = [torch.library.Library("torchvision", "FRAGMENT")]
    for _ in range(10):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torchvision.ops import FrozenBatchNorm2d
        except ImportError:
            pytest.skip("torchvision is not installed (pip install --no-deps torchvision)")
        except RuntimeError as error:
            libraries[0].define(re.search(r"torchvision::(\w+)", str(error))[1] + "(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return FrozenBatchNorm2d
    return pytest.skip("torchvision cannot be imported")


def test_frozen_batch_norm_of_torchvision(torch, torchvision_frozen):  # case 39
    module = torchvision_frozen(3, eps=0.25)
    for tensor in module.buffers():
        tensor.uniform_(0.3, 3)
    x = batch(np.random.default_rng(0), (2, 3, 4, 5))
    expected = module(torch.from_numpy(x)).numpy()
    for layer in from_torch(module), from_torch(module.state_dict(), eps=0.25):
        assert layer.eps == 0.25
        assert layer.training is False
        assert_close(layer(x), expected)


@pytest.mark.parametrize("eps", [0.5, None])
def test_frozen_batch_norm_of_others(torch, eps):  # case 39
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), frozen(torch, eps))
    x = batch(np.random.default_rng(0), (2, 3, 4, 5))
    expected = network[1](torch.from_numpy(x)).numpy()
    given = {} if eps else {"eps": 0.0}
    layer = from_torch(network, "1", **given)
    assert type(layer) is fastbn.BatchNorm2d
    assert layer.eps == (eps or 0)
    assert layer.training is False  # although the module is in training mode
    assert_close(layer(x), expected)
    assert_close(from_torch(network.state_dict(), "1", eps=eps or 0.0)(x), expected)
    with pytest.raises(TypeError, match=r"prefixes of batch norms: \['1'\]"):
        from_torch(network)
    if eps is None:
        with pytest.raises(ValueError, match="FrozenBatchNorm2d at prefix '1' does not tell its eps"):
            from_torch(network, "1")


# Case 40: TorchScript


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_torchscript(torch, traced, saved):  # case 40
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, eps=0.5, momentum=0.25))
    network = torch.nn.Sequential(inner, torch.nn.ReLU())
    network(torch.randn(2, 3, 4, 4))
    network.eval()
    script = torch.jit.trace(network, torch.zeros(1, 3, 4, 4)) if traced else torch.jit.script(network)
    if saved:
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        script = torch.jit.load(file)
    layer = from_torch(script, "0.1")
    assert repr(layer) == repr(inner[1])
    assert layer.training is False
    assert_same_state(layer, inner[1])
    with pytest.raises(TypeError, match=r"got Sequential; prefixes of batch norms: \['0.1'\]"):
        from_torch(script)
    with pytest.raises(AttributeError):
        from_torch(script, "nowhere")


# Case 33: the flag, set later


@pytest.mark.parametrize("track", [False, True])
def test_track_running_stats_set_later(torch, track):  # case 33
    module = torch.nn.BatchNorm1d(3, track_running_stats=not track)
    module(torch.randn(8, 3))
    module.track_running_stats = track
    layer = from_torch(module)
    assert layer.track_running_stats is track
    for training in True, False, True:
        x = batch(np.random.default_rng(0), (8, 3))
        assert_close(layer.train(training)(x), module.train(training)(torch.from_numpy(x)).detach().numpy())
        assert_same_state(layer, module)


# Cases 35, 38, 47: values


STATISTICS = {"running_mean": np.zeros(3), "running_var": np.ones(3)}


def test_negative_variance(torch):  # case 35
    state = STATISTICS | {"running_var": np.array([1, -2.0, 3], np.float32)}
    with pytest.raises(ValueError, match=r"below zero: running_var\[1\] is -2, and eps 1e-05"):
        from_torch(state)
    assert from_torch(state, eps=2.5).running_var[1] == -2
    assert from_torch(STATISTICS | {"running_var": np.full(3, -9.99e-6)}).running_var[0] < 0
    module = torch.nn.BatchNorm2d(3)
    module.running_var[2] = -1
    with pytest.raises(ValueError, match=r"running_var\[2\] is -1"):
        from_torch(module)


@pytest.mark.parametrize("count", [np.float32(7), 7, 7.0, np.array([7]), np.array(7, np.int32)])
def test_counters(count):  # case 38
    layer = from_torch(STATISTICS | {"num_batches_tracked": count})
    assert layer.num_batches_tracked == 7
    assert layer.num_batches_tracked.dtype == np.int64
    assert layer.num_batches_tracked.shape == ()


@pytest.mark.parametrize("count", [2.5, np.nan, -1, 2.0**63, np.uint64(2**63), np.array([1, 2]), "7", None])
def test_refused_counters(count):  # case 38
    with pytest.raises(ValueError, match="num_batches_tracked must be a whole number of batches"):
        from_torch(STATISTICS | {"num_batches_tracked": count})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_arrays_are_taken_exactly(dtype):  # case 47
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    values = np.array([1 / 3, 2.5, 3e-5]).astype(dtype)
    layer = from_torch(STATISTICS | {"running_var": values})
    assert layer.running_var.tolist() == values.astype(np.float64).tolist()


def test_values_beyond_float32():
    huge, tiny = np.array([1, 1e300, 1]), np.full(3, 1e-300)
    with np.errstate(all="raise"):
        with pytest.raises(ValueError, match=r"weight must be within float32, got 1e\+300 at index \(1,\)"):
            from_torch(STATISTICS | {"weight": huge})
        assert not from_torch(STATISTICS | {"weight": tiny}).weight.any()
    assert np.isinf(from_torch(STATISTICS | {"running_var": np.full(3, np.inf)}).running_var).all()


def test_tensors_that_require_grad(torch):
    tensor = torch.ones(3, requires_grad=True)
    assert from_torch(STATISTICS | {"weight": tensor}).weight.tolist() == [1, 1, 1]
    keras = {"gamma": tensor, "moving_mean": tensor, "moving_variance": tensor}
    assert fastbn.interop.from_keras(keras).weight.tolist() == [1, 1, 1]
    assert fastbn.interop.from_flax({"batch_stats": {"mean": tensor, "var": tensor}}).running_var[0] == 1


def test_no_other_names():
    import fastbn.interop

    with pytest.raises(AttributeError, match="no attribute 'from_caffe'"):
        fastbn.interop.from_caffe  # noqa: B018
