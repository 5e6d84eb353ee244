"""torch.compile: the operators, what the backend fuses and what it must not, and what is exported."""

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch._dynamo")
nn, F = torch.nn, torch.nn.functional

import fastbn.torch  # noqa: E402
from fastbn.torch import compiler, functional  # noqa: E402

pytestmark = [  # what PyTorch's compiler does itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def tensors(shape, memory_format=torch.contiguous_format):
    C = shape[1]
    x, residual = (torch.randn(shape).to(memory_format=memory_format) for _ in range(2))
    weight, bias, running_mean = torch.rand(C) + 0.5, torch.randn(C), torch.randn(C)
    for t in (x, residual, weight, bias):
        t.requires_grad_()
    return x, residual, weight, bias, running_mean, torch.rand(C) + 0.5


# The operators.

LAYOUTS = {
    "NCHW": lambda: torch.randn(4, 3, 5, 6),
    "NHWC": lambda: torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
    "NC": lambda: torch.randn(8, 3),
    "NLC": lambda: torch.randn(4, 7, 3).transpose(1, 2),
    "NCDHW": lambda: torch.randn(2, 3, 2, 3, 4).to(memory_format=torch.channels_last_3d),
    "one channel": lambda: torch.randn(4, 1, 5, 6),
    "no space": lambda: torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(4, 6, 5, 6)[:, ::2],
    "permuted": lambda: torch.randn(5, 6, 4, 3).permute(2, 3, 1, 0),
    "flipped": lambda: torch.randn(6, 3, 4, 5).transpose(2, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(layout, training):
    x = LAYOUTS[layout]().requires_grad_()
    C = x.shape[1]
    weight, bias = torch.rand(C, requires_grad=True), torch.randn(C, requires_grad=True)
    running = (None, None) if training else (torch.randn(C), torch.rand(C))
    residual = torch.randn_like(x).requires_grad_()
    calls = [(x, *running, weight, bias, residual, 1e-5, "relu", 0.01)]
    if layout == "NCHW":
        calls.append((x, *running, None, None, residual, 1e-3, None, 0.01))
        calls.append((x.detach(), *running, weight, bias, None, 1e-5, "leaky_relu", 0.2))
    for arguments in calls:
        torch.library.opcheck(torch.ops.fastbn.batch_norm.default, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_the_gradient(training):
    x, residual, weight, bias, mean, var = (t.detach() for t in tensors((4, 3, 5, 6)))
    mean, var = mean.double(), var.double()
    for arguments in (
        (torch.randn_like(x), x, mean, var, training, weight, bias, residual, 1e-5, "relu", 0.01),
        (torch.ones(()).expand_as(x), x, mean, var, training, None, None, None, 1e-5, None, 0.01),
    ):
        torch.library.opcheck(torch.ops.fastbn.batch_norm_backward.default, arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("residual", [True, False])
def test_operator_has_the_results_of_the_function(training, activation, residual):
    results = []
    for function in functional.batch_norm, compiler.in_graph:
        torch.manual_seed(1)
        x, r, weight, bias, mean, var = tensors((4, 3, 5, 6))
        r = r if residual else None
        y = function(
            x,
            mean,
            var,
            weight,
            bias,
            training,
            0.3,
            1e-4,
            residual=r,
            activation=activation,
            negative_slope=0.2,
        )
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        grads = [t.grad for t in (x, weight, bias)] + ([r.grad] if residual else [])
        results.append(([y.detach(), *grads], [mean, var]))
    (ours, averages), (theirs, others) = results
    assert all(map(torch.equal, ours, theirs))
    for average, other in zip(averages, others, strict=True):
        torch.testing.assert_close(average, other, rtol=1e-7, atol=1e-7)


def test_operator_says_that_it_has_no_second_derivative():
    x = torch.randn(4, 3, requires_grad=True)
    y, _, _ = torch.ops.fastbn.batch_norm(x, None, None, None, None, None, 1e-5, None, 0.01)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; outside of compiled code"):
        grad.sum().backward()


def test_gradients_that_are_not_wanted():
    x, residual, weight, bias, *_ = tensors((4, 3, 5, 6))
    weight.requires_grad_(False)
    residual.requires_grad_(False)
    y, mean, var = torch.ops.fastbn.batch_norm(x, None, None, weight, bias, residual, 1e-5, "relu", 0.01)
    assert not mean.requires_grad
    assert not var.requires_grad
    y.sum().backward()
    assert weight.grad is None
    assert residual.grad is None
    assert x.grad is not None
    assert bias.grad is not None


def test_imported_anew(monkeypatch):
    monkeypatch.setattr(fastbn, "torch", fastbn.torch)  # the package has the present one again afterwards
    for name in [name for name in sys.modules if name.startswith("fastbn.torch")]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("fastbn.torch.compiler")
    assert again is not compiler
    x = torch.randn(4, 3)
    y = again.in_graph(x, None, None, training=True)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    importlib.reload(again)
    assert torch.equal(again.in_graph(x, None, None, training=True), y)


# The backend.


def counting(model, **options):
    """The model compiled by the backend, and what that made: counts of (activation, has a residual)."""
    calls = Counter()

    def backend(gm, example_inputs):
        run = compiler.backend(gm, example_inputs)
        for node in gm.graph.nodes:
            assert node.target is not F.batch_norm
            if node.target is functional.batch_norm:
                calls[node.kwargs.get("activation"), "residual" in node.kwargs] += 1
        return run

    return torch.compile(model, backend=backend, **options), calls


class Block(nn.Module):
    """A block of a ResNet, with the addition and the activation as they are told."""

    def __init__(self, join, down=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down = (
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) if down else nn.Identity()
        )
        self.relu = nn.ReLU(inplace=True)
        self.join = join

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.join(self, y, self.down(x))


def iadd(block, y, identity):
    y += identity
    return block.relu(y)


JOINS = {
    "iadd": iadd,
    "add": lambda block, y, identity: block.relu(y + identity),
    "radd": lambda block, y, identity: F.relu(identity + y),
    "torch.add": lambda block, y, identity: torch.relu(torch.add(y, identity, alpha=1)),
    "method": lambda block, y, identity: y.add_(identity).relu_(),
}


def assert_same_training(model, compiled, x):
    """One step of both gives the same, and moves the averages alike."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    grads = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in model, compiled:
        model.load_state_dict(before)
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = call(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads.append(
            [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]
        )
        grads[-1] = [t.clone() for t in grads[-1]]
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("join", "down"), [*((join, True) for join in JOINS), ("iadd", False)])
def test_block_is_fused(join, down):
    model = Block(JOINS[join], down)
    compiled, calls = counting(model)
    x = torch.randn(4, 4, 6, 6)
    assert_same_training(model, compiled, x)
    assert calls == {("relu", False): 1, ("relu", True): 1} | ({(None, False): 1} if down else {})
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    modules = {
        "relu": nn.ReLU(True), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(0.2), "silu": nn.SiLU(),
        "hardswish": nn.Hardswish(),
    }  # fmt: skip
    x = 3 * torch.randn(4, 4, 6, 6)
    functions = {"leaky_relu": lambda y: F.leaky_relu(y, 0.2)}
    for end in modules[activation], functions.get(activation, getattr(F, activation)):

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.end = nn.BatchNorm2d(4), end  # noqa: B023

            def forward(self, x):
                return self.end(self.bn(x))

        model = Model()
        compiled, calls = counting(model)
        assert_same_training(model, compiled, x)
        assert calls == {(activation, False): 1}


class Around(nn.Module):
    """A function of a batch norm and two tensors."""

    def __init__(self, function):
        super().__init__()
        self.bn, self.conv, self.function = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), function

    def forward(self, x, r):
        return self.function(self, self.conv(x), r)


def read_twice(m, x, r):
    y = m.bn(x)
    return F.relu(y) + y


def in_place_and_old_name(m, x, r):
    y = m.bn(x)
    F.relu(y, inplace=True)
    return y + r


def into_the_other(m, x, r):
    r = r * 1
    s = r
    r += m.bn(x)
    return F.relu(r) + s


def input_changes(m, x, r):
    y = m.bn(x)
    x.add_(1)
    y += r
    return F.relu(y)


def view_of_input_changes(m, x, r):
    y = m.bn(x)
    x.view(-1)[:7].zero_()
    return F.relu(y + r)


def input_is_rectified(m, x, r):
    y = m.bn(x)
    s = F.relu(x, inplace=True)
    return F.relu(y + r) + s


def residual_changes(m, x, r):
    r = r + 0
    y = m.bn(x)
    z = y + r
    r.mul_(2)
    return F.relu(z) + r


def weight_changes(m, x, r):
    y = m.bn(x)
    with torch.no_grad():
        m.bn.bias.add_(1)
    return F.relu(y + r)


def called_twice(m, x, r):
    y = m.bn(x)
    z = m.bn(2 * r + 1)
    return F.relu(y + z.mean())  # no addition of equals, and another call in between


def called_twice_in_a_sum(m, x, r):
    y = m.bn(x)
    z = m.bn(2 * r + 1)
    return F.relu(y + z)


def gradient_off(m, x, r):
    y = m.bn(x)
    with torch.no_grad():
        return F.relu(y)


def autocast_on(m, x, r):
    y = m.bn(x)
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(y) + m.conv(r)


def broadcast(m, x, r):
    return F.relu(m.bn(x) + r[:1])


def number(m, x, r):
    return F.relu(m.bn(x) + 1)


def scaled(m, x, r):
    return F.relu(torch.add(m.bn(x), r, alpha=2))


def itself(m, x, r):
    y = m.bn(x)
    return F.relu(y + y)


def other_dtype(m, x, r):
    return F.relu(m.bn(x) + r.double())


def other_hardtanh(m, x, r):
    return F.hardtanh(m.bn(x), -1, 6)


def negative_slope(m, x, r):
    return F.leaky_relu(m.bn(x), -0.5)


def returned(m, x, r):
    y = m.bn(x)
    return y, F.relu(y)


LEFT = {(None, False): 1}
UNSAFE = {  # what may be fused of each, which has the right result then
    read_twice: LEFT, in_place_and_old_name: LEFT, into_the_other: LEFT, input_changes: LEFT,
    view_of_input_changes: LEFT, input_is_rectified: LEFT, residual_changes: {(None, True): 1},
    weight_changes: LEFT,
    called_twice: {(None, False): 2}, called_twice_in_a_sum: {(None, False): 1, ("relu", True): 1},
    gradient_off: LEFT, autocast_on: LEFT, broadcast: LEFT, number: LEFT, scaled: LEFT, itself: LEFT,
    other_dtype: LEFT, other_hardtanh: LEFT, negative_slope: LEFT, returned: LEFT,
}  # fmt: skip


@pytest.mark.parametrize("function", UNSAFE, ids=lambda function: function.__name__)
def test_unsafe(function):
    model = Around(function)
    x, r = torch.randn(4, 4, 6, 6), torch.randn(4, 4, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled, calls = counting(model, fullgraph=True)
    results = []
    for call in model, compiled:
        model.load_state_dict(before)
        y = call(x.clone(), r.clone())
        ys = y if isinstance(y, tuple) else (y,)
        results.append([t.detach().clone() for t in (*ys, *model.state_dict().values())])
        assert ys[0].requires_grad is (function is not gradient_off)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls == UNSAFE[function]


def test_harmless_between():
    """What stands between a batch norm and its addition in usual networks does not keep them apart."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.branch = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True),
                nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4),
            )  # fmt: skip

        def forward(self, x):
            y = self.bn(x)
            r = self.branch(x)
            y += r
            return F.relu(y)

    model, x = Model(), torch.randn(4, 4, 6, 6)
    compiled, calls = counting(model)
    assert_same_training(model, compiled, x)
    assert calls == {("relu", True): 1, ("relu", False): 1, (None, False): 1}


def test_across_modules_and_graph_breaks():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.bn(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = Norm(), Norm(), nn.ReLU()

        def forward(self, x):
            x = self.act(self.a(x))
            torch._dynamo.graph_break()
            return self.act(self.b(x))

    compiled, calls = counting(Model())
    compiled(torch.randn(8, 5))
    assert calls == {("relu", False): 2}


def test_dynamic_shapes_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for options in {}, {"options": {"backend": "aot_eager"}}:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=compiler.backend, dynamic=True, **options)
        for number in 4, 6, 3:
            x = torch.randn(number, 3, 8, 7)
            for training in True, False:
                model.train(training)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_fastbn_layers_are_fused_alike():
    model = nn.Sequential(
        fastbn.torch.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 1, bias=False),
        fastbn.torch.BatchNorm2d(4), nn.ReLU6(),
    )  # fmt: skip
    x = torch.randn(4, 4, 6, 6)
    compiled, calls = counting(model, fullgraph=True)
    assert_same_training(model, compiled, x)
    assert calls == {("relu", False): 1, ("relu6", False): 1}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [nn, fastbn.torch], ids=["torch.nn", "fastbn"])
def test_inductor(layers):
    """Alone, and behind the backend: then with our operator in its code."""
    block = Block(iadd)
    block.bn1, block.bn2 = layers.BatchNorm2d(4), layers.BatchNorm2d(4)
    x = torch.randn(4, 4, 6, 6)
    assert_same_training(block, torch.compile(block, backend="inductor"), x)
    torch._dynamo.reset()
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(block, backend=compiler.backend, options={"backend": "inductor"})
    _, codes = run_and_get_code(compiled, x)
    assert sum(code.count("torch.ops.fastbn.batch_norm.default(") for code in codes) == 3
    assert_same_training(block, compiled, x)
    block.eval()
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_other_dtypes_are_left_to_pytorch(dtype, inner):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    x = torch.randn(4, 4, 6, 6, dtype=dtype)
    options = {} if inner is None else {"options": {"backend": inner}}
    compiled = torch.compile(model, backend=compiler.backend, **options)
    assert torch.equal(compiled(x), model(x))


def test_errors_are_those_of_eager_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    for inner in {}, {"options": {"backend": "aot_eager"}}:
        compiled = torch.compile(model, backend=compiler.backend, **inner)
        with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
            compiled(torch.randn(1, 3))
        with pytest.raises(RuntimeError):
            compiled(torch.randn(4, 5))


def test_options():
    model = nn.Sequential(nn.BatchNorm1d(3))
    for arguments in {"options": {"fast": True}}, {"mode": "max-autotune"}:
        with pytest.raises(Exception, match="takes no mode, and as its only option 'backend'"):
            torch.compile(model, backend=compiler.backend, **arguments)(torch.randn(4, 3))
        torch._dynamo.reset()


def test_found_by_name(monkeypatch):
    """By the entry point alone: of an installed fastbn, or of what pyproject.toml declares."""
    name = "torch_dynamo_backends"
    declared = [entry for entry in importlib.metadata.entry_points(group=name) if entry.name == "fastbn"]
    if not declared:  # installed before there was one
        file = Path(__file__).parents[2] / "pyproject.toml"
        if not file.exists():
            pytest.skip("the tests were copied without pyproject.toml")
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser")
        value = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["entry-points"][name]["fastbn"]
        declared = [importlib.metadata.EntryPoint("fastbn", value, name)]
    assert declared[0].load() is compiler.backend
    from torch._dynamo.backends import registry

    monkeypatch.setitem(registry._BACKENDS, "fastbn", declared[0])
    assert registry.lookup_backend("fastbn") is compiler.backend
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(model, backend="fastbn")(x), model(x))


# Exported: no trace of fastbn.


def test_export_has_pytorchs_own_operators():
    model = nn.Sequential(fastbn.torch.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(4, 4, 6, 6)
    for program in torch.export.export(model, (x,)), torch.export.export(model.train(), (x,)):
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "aten.batch_norm.default" in targets
        assert not any("fastbn" in target for target in targets)
