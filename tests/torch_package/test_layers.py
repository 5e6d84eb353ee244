"""BatchNorm1d, 2d and 3d of fastbn.torch in place of torch.nn's: state, modes, errors, tools on modules."""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from judge import (  # noqa: E402
    ACTIVATIONS,
    SLOPE,
    assert_near,
    composite,
    normal,
    outcome,
    parameters,
)

import fastbn.torch as ours  # noqa: E402

F = torch.nn.functional
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SHAPES = {"BatchNorm1d": (4, 5, 7), "BatchNorm2d": (4, 5, 6, 7), "BatchNorm3d": (4, 5, 3, 4, 2)}
named = pytest.mark.parametrize("name", NAMES)


def pair(name="BatchNorm2d", *args, **options):
    """Our layer and PyTorch's, with the same options and the same parameters."""
    C = args[0] if args else 5
    made = [getattr(module, name)(*(args or (5,)), **options) for module in (ours, torch.nn)]
    values = dict(zip(("weight", "bias", "running_mean", "running_var"), parameters(C), strict=True))
    for layer in made:
        for key, tensor in layer.state_dict().items():
            if key in values:
                tensor.copy_(values[key])
    return made


def train(layers, shape, steps=3):
    """Train both on the same batches; their states stay alike."""
    for step in range(steps):
        grads = []
        for layer in layers:
            x = normal(*shape, seed=step).requires_grad_()
            y = layer(x)
            y.backward(normal(*shape, seed=step + 100))
            grads.append((y, x.grad))
        for mine, theirs in zip(*grads, strict=True):
            assert_near(mine, theirs, 1e-4)
    assert_alike(*layers)


def assert_alike(mine, theirs):
    states = mine.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-5, atol=1e-5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@named
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 1},
        {"momentum": 0.0, "eps": 1e-3},
        {"momentum": 1.7},
        {"eps": 1},
    ],
    ids=str,
)
def test_trains_and_evaluates_like_pytorch(name, options):
    layers = pair(name, **options)
    assert repr(layers[0]) == repr(layers[1])
    train(layers, SHAPES[name])
    for layer in layers:
        layer.eval()
    x = normal(*SHAPES[name], seed=9)
    assert_near(layers[0](x), layers[1](x), 1e-5 * layers[1](x).abs().clamp(min=1))


@named
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options_of_our_own(name, activation):
    """Activation, residual and mask, as attributes and arguments of a layer."""
    layer = getattr(ours, name)(5, activation=activation, negative_slope=SLOPE)
    shape = SHAPES[name]
    x, residual = normal(*shape), normal(*shape, seed=1)
    expected = composite(
        x.double(), None, None, None, None, True, residual=residual.double(), activation=activation
    )
    assert_near(layer(x, residual), expected, 1e-5)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    assert_near(layer(x, residual, mask), expected, 1e-5)
    assert_near(layer(x, residual=residual, mask=mask), expected, 1e-5)
    assert ("activation=" in repr(layer)) == (activation is not None)
    assert (f"negative_slope={SLOPE}" in repr(layer)) == (activation == "leaky_relu")


def test_rectangular_2d_input():
    layers = pair("BatchNorm1d")
    train(layers, (6, 5))


# Trap 9.


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 5, 6, 7), (4, 5, 0, 7), (1, 5, 1, 1), (4, 5, 6), (4, 3, 6, 7), (4, 5, 6, 7)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_counter_like_torch(shape, track, training):
    """It counts also an empty batch, and before an error."""
    layers = pair(track_running_stats=track)
    results = []
    for layer in layers:
        layer.train(training)
        result = outcome(layer, normal(*shape))
        results.append(result if isinstance(result, tuple) else tuple(result.shape))
    assert results[0] == results[1]
    assert_alike(*layers)


def _counter_of_floats(layer):
    layer.num_batches_tracked = torch.tensor(3.0)
    layer(normal(4, 5, 6, 7))


def _counter_of_an_inference(layer):
    with torch.inference_mode():
        layer.num_batches_tracked = torch.tensor(3)
    layer(normal(4, 5, 6, 7))


def _counter_of_a_subclass(layer):
    layer.num_batches_tracked = torch.tensor(3).as_subclass(Labelled)
    layer(normal(4, 5, 6, 7))


def _no_counter(layer):
    layer.num_batches_tracked = None
    layer(normal(4, 5, 6, 7))


def _counter_that_is_shared(layer):
    layer.num_batches_tracked = torch.tensor([3, 4])[1:].squeeze(0)
    layer(normal(4, 5, 6, 7))


def _averages_that_learn(layer):
    layer.running_mean = torch.zeros(5, requires_grad=True)
    layer(normal(4, 5, 6, 7))


def _an_average_elsewhere(layer):
    del layer.running_mean
    layer.running_mean = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    layer(normal(4, 5, 6, 7))


def _twice(layer):
    layer(normal(4, 5, 6, 7))
    layer(normal(4, 5, 6, 7))


@pytest.mark.parametrize(
    "use",
    [
        _twice, _counter_of_floats, _counter_of_an_inference, _counter_of_a_subclass, _no_counter,
        _counter_that_is_shared, _averages_that_learn, _an_average_elsewhere,
    ],
)  # fmt: skip
def test_counter_of_any_kind(use):
    """It moves within the call that also moves the averages, where it is as usual."""
    layers = pair("BatchNorm2d")
    results = [outcome(lambda layer=layer: use(layer)) for layer in layers]
    assert results[0] == results[1]
    counts = [layer.num_batches_tracked for layer in layers]
    assert counts[0] == counts[1]
    assert counts[0] is None or (type(counts[0]), counts[0].dtype) == (type(counts[1]), counts[1].dtype)
    assert layers[0].running_var.allclose(layers[1].running_var)


def _of_a_property(base):
    return type("Positive", (base,), {"weight": property(lambda self: self._parameters["weight"] * 2)})


def _of_another_search(base):
    def search(self, name):
        found = base.__getattr__(self, name)
        return found * 2 if name == "weight" else found

    return type("Positive", (base,), {"__getattr__": search})


@pytest.mark.parametrize("make", [_of_a_property, _of_another_search])
def test_a_class_that_has_its_own_weight(make):
    """What a layer multiplies with is its attribute, whatever that is; not what it has for a parameter."""
    results = []
    for base in ours.BatchNorm2d, torch.nn.BatchNorm2d:
        layer = base(5)
        layer.__class__ = make(base)
        results.append(layer(normal(4, 5, 6, 7)))
    assert results[0].allclose(results[1], atol=1e-5)


# Trap 10.

X = 4, 5, 6, 7
CALLS = {
    "channels": lambda layer: layer(normal(4, 3, 6, 7)),
    "rank": lambda layer: layer(normal(4, 5, 6)),
    "float64": lambda layer: layer(normal(*X).double()),
    "int64": lambda layer: layer(torch.ones(X, dtype=torch.int64)),
    "complex": lambda layer: layer(torch.ones(X, dtype=torch.complex64)),
    "bool": lambda layer: layer(torch.ones(X, dtype=torch.bool)),
    "one_value": lambda layer: layer(normal(1, 5, 1, 1)),
    "array": lambda layer: layer(normal(*X).numpy()),
    "none": lambda layer: layer(None),
    "number": lambda layer: layer(1.0),
    "sparse": lambda layer: layer(normal(*X).to_sparse()),
    "eps_zero": lambda layer: with_(layer, eps=0.0)(normal(*X)),
    "eps_negative": lambda layer: with_(layer, eps=-1.0)(normal(*X)),
    "eps_text": lambda layer: with_(layer, eps="1")(normal(*X)),
    "eps_nan": lambda layer: with_(layer, eps=torch.nan)(normal(*X)),
    "momentum_text": lambda layer: with_(layer, momentum="1")(normal(*X)),
    "momentum_nan": lambda layer: with_(layer, momentum=torch.nan)(normal(*X)),
    "one_running": lambda layer: with_(layer, running_mean=None)(normal(*X)),
    "running_shape": lambda layer: with_(layer, running_mean=torch.ones(3))(normal(*X)),
    "running_requires_grad": lambda layer: with_(layer, running_mean=torch.ones(5, requires_grad=True))(
        normal(*X)
    ),
    "weight_dtype": lambda layer: with_(layer, weight=torch.nn.Parameter(torch.ones(5).double()))(normal(*X)),
    "weight_matrix": lambda layer: with_(layer, weight=torch.nn.Parameter(torch.ones(5, 1)))(normal(*X)),
    "meta_input": lambda layer: layer(torch.empty(X, device="meta")),
    "meta_layer": lambda layer: layer.to("meta")(normal(*X)),
    "no_argument": lambda layer: layer(),
}


def with_(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_errors_same_type_and_text(call, training):
    """What PyTorch refuses is refused by its own error, and what it takes is taken."""
    layers = [layer.train(training) for layer in pair()]
    mine, theirs = (outcome(CALLS[call], layer) for layer in layers)
    if isinstance(theirs, torch.Tensor):
        assert (mine.shape, mine.device) == (theirs.shape, theirs.device)
        if mine.device.type == "cpu":
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        names = "_BatchNorm.forward", "_BatchNorm.forward"
        assert mine[0] is theirs[0]
        assert mine[1].replace(*names) == theirs[1]
    for key, value in layers[1].state_dict().items():
        if value.device.type == "cpu":
            torch.testing.assert_close(
                layers[0].state_dict()[key], value, rtol=1e-5, atol=1e-5, equal_nan=True
            )


def test_functions_errors_are_pytorchs():
    x, running = normal(4, 5, 6), (torch.zeros(5), torch.ones(5))
    for args, kwargs in (
        ((x, None, None), {}),
        ((x, running[0], None), {}),
        ((x, *running), {"training": 1}),
        ((x, *running), {"training": True, "momentum": None}),
        ((x[:, 0, 0], *running), {}),
        ((x, *running, torch.ones(4)), {}),
        ((x, *running, None, torch.ones(5).double()), {}),
        ((normal(1, 5, 1), *running), {"training": True}),
        ((x, *running), {"training": True, "eps": 0.0}),
        ((x, *running), {"eps": -1.0}),
    ):
        results = [outcome(f, *args, **kwargs) for f in (ours.batch_norm, F.batch_norm)]
        assert isinstance(results[1], tuple), (args, kwargs)
        assert results[0] == results[1]
    assert torch.equal(running[0], torch.zeros(5))


# Traps 13 and 14: programs made from a module.


class Net(torch.nn.Module):
    def __init__(self, layers=ours):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3, bias=False)
        self.bn = layers.BatchNorm2d(5)
        self.deep = torch.nn.Sequential(layers.BatchNorm2d(5), torch.nn.ReLU())

    def forward(self, x):
        return self.deep(self.bn(self.conv(x)))


class WithResidual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = ours.BatchNorm2d(5, activation="relu")

    def forward(self, x, residual):
        return self.bn(x, residual) + self.bn(x, mask=None, residual=residual)


def test_symbolic_trace():
    """A layer is a leaf of torch.fx's graphs, as torch.nn's are."""
    net = Net().eval()
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == [
        "conv",
        "bn",
        "deep.0",
        "deep.1",
    ]
    x = normal(2, 3, 8, 8)
    assert torch.equal(graph(x), net(x))
    assert type(graph.bn) is ours.BatchNorm2d
    graph.train()(x)
    assert net.bn.num_batches_tracked == 1

    module = WithResidual().eval()
    graph = torch.fx.symbolic_trace(module)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 2
    x, residual = normal(2, 5, 4, 4), normal(2, 5, 4, 4, seed=1)
    assert torch.equal(graph(x, residual), module(x, residual))


def test_feature_extractor(torchvision):
    """torchvision's, which traces by torch.fx."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = Net().eval()
    extractor = create_feature_extractor(net, ["bn", "deep.1"])
    x = normal(2, 3, 8, 8)
    features = extractor(x)
    assert torch.equal(features["bn"], net.bn(net.conv(x)))
    assert torch.equal(features["deep.1"], net(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_script(activation, momentum):
    """A scripted layer is PyTorch's operations alone; it trains, evaluates, is saved and loaded."""
    layer = ours.BatchNorm2d(5, momentum=momentum, activation=activation, negative_slope=SLOPE)
    scripted = torch.jit.script(copy.deepcopy(layer))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    x, residual = normal(4, 5, 6, 7), normal(4, 5, 6, 7, seed=1)
    mask = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    for module in scripted, loaded:
        mine = copy.deepcopy(layer)
        for training in True, False:
            for m in module, mine:
                m.train(training)
            for args in (x,), (x, residual), (x, None, mask), (x, residual, mask):
                assert_near(module(*args), mine(*args), 1e-5)
        assert_alike(mine, module)
        assert module.num_batches_tracked == 4
    with pytest.raises(torch.jit.Error, match="mask must have the shape"):
        scripted(x, None, mask[:, :3, :])
    assert "PythonOp" not in str(scripted.inlined_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traced_and_exported_programs_are_pytorchs(kernels_called):
    """They run where fastbn is not installed."""
    net = Net().eval()
    x = normal(2, 3, 8, 8)
    traced = torch.jit.trace(net, x, check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    exported = torch.export.export(net, (x,))
    targets = [str(n.target) for n in exported.graph.nodes]
    assert targets.count("aten.batch_norm.default") == 2
    assert "fastbn" not in str(exported.graph_module.code)
    assert not kernels_called
    for program in traced, exported.module():
        torch.testing.assert_close(program(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training):
    """Nothing in the way to PyTorch's operations makes Dynamo break the graph."""
    torch.compiler.reset()
    net = Net().train(training)
    theirs = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = normal(2, 3, 8, 8)
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert_alike(net, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@named
@pytest.mark.parametrize(
    "options", [{"track_running_stats": False}, {"affine": False}, {"bias": False}], ids=str
)
def test_scripts_without_some_tensors(name, options):
    layer = getattr(ours, name)(5, **options)
    scripted = torch.jit.script(copy.deepcopy(layer))
    x = normal(*SHAPES[name])
    for training in True, False:
        for module in layer, scripted:
            module.train(training)
        assert_near(scripted(x), layer(x), 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_network():
    scripted, net = torch.jit.script(Net().eval()), Net().eval()
    net.load_state_dict(scripted.state_dict())
    x = normal(2, 3, 8, 8)
    torch.testing.assert_close(scripted(x), net(x), rtol=1e-5, atol=1e-5)


# Traps 15 to 18: code that looks at classes.


def test_folds_into_a_convolution():
    """Trap 15: by torch.nn.utils.fusion, which takes any batch norm."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = Net().eval()
    train_a_little(net)
    net.eval()
    x = normal(2, 3, 8, 8)
    folded = fuse_conv_bn_eval(net.conv, net.bn)
    torch.testing.assert_close(folded(x), net.bn(net.conv(x)), rtol=1e-4, atol=1e-4)


def train_a_little(net):
    net.train()
    for step in range(3):
        net(normal(4, 3, 8, 8, seed=step)).sum().backward()


@named
def test_class_names(name):
    """Trap 16: initialization by name, as DCGAN's, and by class."""
    layer, theirs = pair(name)
    assert type(layer).__name__ == name
    assert type(layer).__name__.find("BatchNorm") == 0
    assert isinstance(layer, getattr(torch.nn, name))
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert layer._get_name() == theirs._get_name()


def test_a_layer_of_pytorch_becomes_one_of_ours_by_its_class(kernels_called):
    """And back: nothing of the state differs."""
    layer = torch.nn.BatchNorm2d(5)
    content = dict(layer.__dict__)
    layer.__class__ = ours.BatchNorm2d
    layer(normal(4, 5, 3, 3))
    assert [name for name, _ in kernels_called] == ["forward"]
    layer.__class__ = torch.nn.BatchNorm2d
    assert layer.__dict__.keys() == content.keys()
    layer(normal(4, 5, 3, 3))
    assert len(kernels_called) == 1


def test_parametrized(kernels_called):
    """Trap 18: a parametrization makes a class of its own, and `weight` a property."""
    from torch.nn.utils import parametrize

    class Positive(torch.nn.Module):
        def forward(self, w):
            return w.exp()

    layers = pair()
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Positive())
    train(layers, (4, 5, 6, 7))
    assert layers[0].parametrizations.weight.original.grad is not None
    assert len(kernels_called) == 6


def test_lazy(kernels_called):
    """Trap 18: a lazy layer becomes what `cls_to_become` says."""
    lazy = torch.nn.LazyBatchNorm2d()
    lazy.cls_to_become = ours.BatchNorm2d
    y = lazy(normal(4, 5, 6, 7))
    assert type(lazy) is ours.BatchNorm2d
    assert lazy.num_features == 5
    assert_near(y, torch.nn.BatchNorm2d(5)(normal(4, 5, 6, 7)), 1e-5)
    lazy(normal(4, 5, 6, 7))
    assert kernels_called


def test_subclasses_of_ours():
    class Mine(ours.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    x = normal(4, 5, 6, 7)
    assert_near(Mine(5)(x), 2 * torch.nn.BatchNorm2d(5)(x), 1e-5)


# Traps 23 and 24.


def test_flag_set_later():
    """track_running_stats, running_mean and momentum may be set at any time."""
    layers = pair()
    train(layers, (4, 5, 6, 7))
    for layer in layers:
        layer.track_running_stats = False
    train(layers, (4, 5, 6, 7))
    for layer in layers:
        layer.eval()
    assert_near(*(layer(normal(4, 5, 6, 7)) for layer in layers), 1e-5)
    for layer in layers:
        layer.running_mean = layer.running_var = None
    assert_near(*(layer(normal(4, 5, 6, 7)) for layer in layers), 1e-5)


def test_tent_upstream_pattern(kernels_called):
    """Batch statistics in both modes, affine parameters alone are trained, as TENT configures a model."""
    models = []
    for layers in ours, torch.nn:
        torch.manual_seed(0)
        model = Net(layers)
        model.train()
        model.requires_grad_(False)
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.requires_grad_(True)
                m.track_running_stats = False
                m.running_mean = None
                m.running_var = None
        chosen = [p for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
        optimizer = torch.optim.SGD(chosen, 0.1)
        for step in range(3):
            logits = model(normal(4, 3, 8, 8, seed=step)).mean((2, 3))
            loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        models.append((model.state_dict(), model(normal(4, 3, 8, 8))))
    (mine, y), (theirs, expected) = models
    assert list(mine) == list(theirs)
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-5)
    assert_near(y, expected, 1e-4)
    assert [name for name, _ in kernels_called].count("forward") == 8


def test_swa():
    """Averaged and exponentially averaged copies, and update_bn's cumulative averages."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    states = []
    for layers in ours, torch.nn:
        torch.manual_seed(0)
        model = Net(layers)
        averaged, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            model(normal(4, 3, 8, 8, seed=step)).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
            ema.update_parameters(model)
        update_bn([normal(4, 3, 8, 8, seed=s) for s in range(3)], averaged)
        assert averaged.module.bn.momentum == 0.1
        states.append({**averaged.state_dict(), **{f"ema.{k}": v for k, v in ema.state_dict().items()}})
        assert type(averaged.module.bn) is layers.BatchNorm2d
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-4)
    assert states[0]["module.bn.num_batches_tracked"] == 3


# Traps 25 and 27.


def test_autocast():
    """A convolution under autocast hands bfloat16 to layers of float32."""
    torch.manual_seed(0)
    net = Net()
    theirs = Net(torch.nn)
    theirs.load_state_dict(net.state_dict())
    outputs = []
    for model in net, theirs:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(normal(4, 3, 8, 8))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        outputs.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    for mine, their in zip(*outputs, strict=True):
        assert mine.dtype == their.dtype
        torch.testing.assert_close(mine, their, rtol=0.02, atol=0.02 * float(their.detach().abs().max()))


class Labelled(torch.Tensor):
    pass


FOREIGN = {
    "meta": lambda x: x.to("meta"),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0, :, 0].T, x[1, :, 0].T], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(Labelled),
    "negative_bit": lambda x: torch.complex(x, x).conj().imag,
    "zero_tensor": lambda x: torch._efficientzerotensor(x.shape),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "functional": lambda x: torch._to_functional_tensor(x),
}


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # of PyTorch, that nested and quantized tensors are prototypes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("training", [True, False])
def test_foreign_tensors(kernels_called, kind, training):
    results = []
    for layer in pair():
        layer.train(training)
        result = outcome(layer, FOREIGN[kind](normal(4, 5, 6, 7)))
        results.append(result)
    mine, theirs = results
    if isinstance(theirs, tuple):
        assert mine == theirs
    else:
        assert type(mine) is type(theirs)
        assert (mine.layout, mine.device, mine.dtype) == (theirs.layout, theirs.device, theirs.dtype)
        if kind in ("subclass", "negative_bit", "zero_tensor"):
            assert torch.equal(mine, theirs)
    assert not kernels_called


def test_dtensor(kernels_called, tmp_path):
    from torch import distributed

    if not distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        results = [
            outcome(layer, distribute_tensor(normal(4, 5, 6, 7), mesh, [Replicate()])) for layer in pair()
        ]
    finally:
        distributed.destroy_process_group()
    assert type(results[0]) is type(results[1])
    if isinstance(results[1], tuple):
        assert results[0] == results[1]
    assert not kernels_called


# Traps 28 and 30.


def test_state_dict_both_ways(tmp_path):
    """The keys are PyTorch's, and so are files, also those of before there was a counter."""
    mine, theirs = Net(), Net(torch.nn)
    train_a_little(mine)
    torch.save(mine.state_dict(), tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for key, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata
    train_a_little(theirs)
    mine.load_state_dict(theirs.state_dict())
    old = theirs.state_dict()
    del old._metadata
    for key in [key for key in old if "num_batches" in key]:
        del old[key]
    mine.load_state_dict(old)
    assert mine.bn.num_batches_tracked == 6
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*bn.weight"):
        mine.load_state_dict({})


def test_whole_module_is_not_weights_alone(tmp_path):
    """As that of any class that PyTorch does not know: a state_dict, or weights_only=False."""
    torch.save(Net(), tmp_path / "net.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(tmp_path / "net.pt", weights_only=True)
    net = torch.load(tmp_path / "net.pt", weights_only=False)
    assert type(net.bn) is ours.BatchNorm2d


@pytest.mark.slow
def test_spawn(tmp_path):
    """A layer is unpickled in a process that has imported nothing."""
    layer = ours.BatchNorm2d(5, activation="leaky_relu", negative_slope=SLOPE)
    layer(normal(4, 5, 6, 7))
    layer.eval()
    x = normal(4, 5, 6, 7)
    file = tmp_path / "layer.pickle"
    file.write_bytes(pickle.dumps((layer, x, layer(x).detach())))
    program = (
        "import pickle, sys, torch\n"
        "layer, x, y = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "assert torch.equal(layer(x), y)\n"
        "print(type(layer).__module__, layer.activation)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert done.stdout.split() == ["fastbn.torch.modules", "leaky_relu"], done.stderr
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_storages_may_be_replaced():
    """Nothing keeps views of parameters or buffers: .to(), assign=True and .data put others in place."""
    layer, theirs = pair()
    x = normal(4, 5, 6, 7)
    layer(x)
    theirs(x)
    for module in layer, theirs:
        module.double()
        module.float()
        module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
        module.weight.data = torch.full((5,), 3.0)
        module.running_mean = torch.full((5,), 2.0)
        module(x)
        module.eval()
    assert_near(layer(x), theirs(x), 2e-5)
    assert_alike(layer, theirs)


def test_functional_call_and_stacked_ensembles():
    """torch.func.functional_call puts other tensors in place for the time of a call."""
    layer, theirs = (module.eval() for module in pair())
    x = normal(4, 5, 6, 7)
    state = {"weight": torch.full((5,), 2.0, requires_grad=True), "running_mean": torch.full((5,), 0.5)}
    results = [torch.func.functional_call(module, state, (x,)) for module in (layer, theirs)]
    assert_near(*results, 1e-5)
    (g,) = torch.autograd.grad(results[0].square().sum(), state["weight"])
    assert g.abs().min() > 0


def test_channels_last_module():
    net, theirs = Net().to(memory_format=torch.channels_last), Net(torch.nn)
    theirs.load_state_dict(net.state_dict())
    x = normal(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = net(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, theirs(x), 1e-4)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_samples_of_pytorch(name, dtype, training):
    """Trap 33: module_db."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.name == f"nn.{name}")
    inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert len(inputs) >= 7
    for sample in inputs:
        results = []
        for module in ours, torch.nn:
            made = sample.constructor_input
            layer = getattr(module, name)(*made.args, **made.kwargs, dtype=dtype).train(training)
            x = sample.forward_input.args[0].detach().clone().requires_grad_()
            y = layer(x)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
            results.append((layer, y, x.grad))
        (mine, y, dx), (theirs, expected, expected_dx) = results
        assert_near(y, expected, 2e-5 * expected.abs().clamp(min=1))
        assert_near(dx, expected_dx, 1e-4)
        assert_alike(mine, theirs)


def test_public_names():
    assert {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm"} <= set(ours.__all__)
    for name in ours.__all__:
        assert hasattr(ours, name)
    import fastbn

    assert fastbn.torch is ours
    program = (
        "import sys, fastbn\n"
        "assert 'torch' not in sys.modules\n"
        "fastbn.torch.batch_norm\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_without_pytorch():
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import fastbn\n"
        "try: fastbn.torch\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.search(r"pip install 'fastbn\[torch\]'", done.stdout), done.stderr


def test_another_version_of_pytorch():
    """One that lacks what is needed of its inside."""
    program = (
        "import torch, fastbn\n"
        "del torch._C._len_torch_dispatch_stack\n"
        "torch.__version__ = '1.0'\n"
        "try: fastbn.torch\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "made for PyTorch 2.13, and PyTorch 1.0 is not like it" in done.stdout, done.stderr
    assert "_len_torch_dispatch_stack" in done.stdout


@named
def test_reference_is_not_ours(name):
    """The judge of these tests is PyTorch's own class."""
    assert not isinstance(pair(name)[1], getattr(ours, name))


@pytest.mark.parametrize("training", [True, False])
def test_why_not(training):
    """The words that tell a user where a call goes."""
    from fastbn.torch.functional import why_not

    running, x = (torch.zeros(5), torch.ones(5)), normal(4, 5, 6)
    assert why_not(x, *running, None, None, training, None) is None
    assert why_not(x, *running, torch.ones(5), torch.ones(5), training, x) is None
    with torch.inference_mode():
        assert why_not(normal(4, 5, 6), *running, None, None, training, None) is None
    for words, args in {
        "input is of torch.int64": (x.long(), None, None, None, None, True, None),
        "running_mean of torch.float64": (x, running[0].double(), running[1], None, None, training, None),
        "input is of type Labelled": (x.as_subclass(Labelled), *running, None, None, training, None),
        "on meta": (x.to("meta"), *running, None, None, training, None),
        "sparse": (x.to_sparse(), *running, None, None, training, None),
        "weight has shape (4,), for 5 channels": (x, *running, torch.ones(4), None, training, None),
        "residual has shape (5, 1), input (4, 5, 6)": (x, *running, None, None, training, torch.ones(5, 1)),
        "residual is of type float": (x, *running, None, None, training, 1.0),
        "input is empty": (x[:0], *running, None, None, training, None),
        "only one of running_mean and running_var": (x, running[0], None, None, None, training, None),
        "no running statistics": (x, None, None, None, None, False, None),
        "one value per channel": (x[:1, :, :1], *running, None, None, True, None),
        "input has shape (5,)": (x[0, :, 0], *running, None, None, training, None),
    }.items():
        assert words in why_not(*args)
    with torch.device("meta"):
        assert why_not(x, *running, None, None, training, None) is None
    assert "momentum is 2" in why_not(x, *running, None, None, True, None, 2)
    assert "eps is 0" in why_not(x, *running, None, None, training, None, 0.1, 0)
