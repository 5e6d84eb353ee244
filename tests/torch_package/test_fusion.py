"""accelerate, restore and record on small modules: what is fused, and that nothing else can tell."""

import copy
import io
import pickle
import re
import subprocess
import sys
import traceback
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from blocks import APART, FUSED, Base, C, Inherited, Residual, ResidualDown, SameName, Shortcut  # noqa: E402
from torch import nn  # noqa: E402

import fastbn.torch as fast  # noqa: E402
from fastbn.torch import fusion, rewriting  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# As far as a network of some layers may be from float64, for values around 1.
NEAR = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(*shape):
    return torch.randn(*(shape or (3, C, 8, 8)))


def lively(model):
    """With parameters and running averages that are not all 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return model


def how(model, *args, **kwargs):
    """How the batch norms of a model were computed, in their order; the model stays as it is."""
    with fast.record() as calls:
        copy.deepcopy(model)(*args, **kwargs)
    return [call.how for call in calls]


def step(model, x, *args, **kwargs):
    """Output, gradients and buffers of a call and its backward pass; or the error of the backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(1 * x, *args, **kwargs)
    found = {"output": y.detach().clone()}
    try:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        found["error"] = torch.ones(())
    else:
        found["grad of input"] = x.grad
        found |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected):
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == (value.dtype if value.dtype != torch.float64 else torch.float32)
        scale = max(1.0, value.abs().max().item()) if name.startswith("grad") else 1.0
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=NEAR["rtol"], atol=NEAR["atol"] * scale, msg=name
        )


def compare(model, *args, x=None, **kwargs):
    """Plain against fast against fused, in training and in evaluation. Returns how the fused one did it."""
    x = batch() if x is None else x
    lively(model)
    apart, together = copy.deepcopy(model), copy.deepcopy(model)
    fast.accelerate(apart, fuse=False)
    fast.accelerate(together)
    done = how(together, x, *args, **kwargs)
    for training in (True, False):
        plain, unfused, fused = (copy.deepcopy(each).train(training) for each in (model, apart, together))
        expected = step(plain.double(), x.double(), *args, **kwargs)
        apart_found = step(unfused, x, *args, **kwargs)
        found = step(fused, x, *args, **kwargs)
        assert_near(apart_found, expected)
        if any("silu" in each or "hardswish" in each for each in done):
            assert_near(found, expected)
        else:
            assert_same(found, apart_found)
    return done


@pytest.mark.parametrize("cls", FUSED, ids=lambda cls: cls.__name__)
def test_fused(cls):
    assert compare(cls()) == FUSED[cls]


@pytest.mark.parametrize("cls", APART, ids=lambda cls: cls.__name__)
def test_apart(cls):
    assert compare(cls()) == APART[cls]


def test_other_ways_through_a_forward():
    from blocks import (
        AddedInABranch,
        OnlySometimes,
        ReturnsBetween,
        TwoBranches,
        WithinABranch,
        WithoutAResult,
    )

    assert compare(OnlySometimes(), False) == []
    assert compare(WithinABranch(), False) == ["fast"]
    assert compare(ReturnsBetween(), False) == ["fused relu"]
    assert compare(WithoutAResult(), False) == ["fast"]
    model = AddedInABranch()
    model.connect = False
    assert compare(model) == ["fast"]
    model = TwoBranches()
    model.project = None
    assert compare(model) == ["fused add + silu"]


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.3),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_activations(name, channels_last):
    model = Residual()
    model.relu = ACTIVATIONS[name]
    x = batch()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert compare(model, x=x) == [f"fused {name}", f"fused add + {name}"]
    sequential = nn.Sequential(
        nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), ACTIVATIONS[name], nn.Conv2d(C, 2, 1)
    )
    assert compare(sequential, x=x) == [f"fused {name}"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.LeakyReLU(0.0),
        nn.LeakyReLU(-0.5),
        nn.GELU(),
        nn.Hardtanh(0, 6),
        nn.Identity(),
        nn.Tanh(),
        type("ReLU", (nn.ReLU,), {"forward": lambda self, x: 2 * x})(),
    ],
    ids=repr,
)
def test_other_activations(activation):
    model = SameName()
    model.relu = activation
    assert compare(model) == ["fast"]
    assert compare(nn.Sequential(nn.BatchNorm2d(C), activation)) == ["fast"]


def test_relu6_with_other_bounds():
    activation = nn.ReLU6()
    activation.max_val = 1.0
    assert compare(nn.Sequential(nn.BatchNorm2d(C), activation)) == ["fast"]


@pytest.mark.parametrize(
    ("kinds", "x"),
    [
        ((nn.BatchNorm1d, lambda c, d: nn.Linear(c, d, bias=False)), (6, C)),
        ((nn.BatchNorm1d, lambda c, d: nn.Linear(c, d, bias=False)), (2, C, C)),
        ((nn.BatchNorm3d, lambda c, d: nn.Conv3d(c, d, 1, bias=False)), (2, C, 2, 3, 4)),
    ],
    ids=["1d", "1d of rank 3", "3d"],
)
def test_other_ranks(kinds, x):
    norm, linear = kinds
    model = nn.Sequential(linear(C, C), norm(C), nn.ReLU(), linear(C, C), norm(C))
    assert compare(model, x=batch(*x)) == ["fused relu", "fast"]


# ---- Sequential


def test_sequential_inside_sequential():
    model = nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.Sequential(nn.BatchNorm2d(C))),
            act=nn.ReLU(),
            second=nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)),
            drop=nn.Dropout(0.0),
            third=nn.BatchNorm2d(C),
        )
    )
    assert compare(model) == ["fused relu", "fast", "fast", "fast"]


def test_sequential_of_a_class_of_its_own():
    class Block(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Conv2d(C, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            self.width = width

    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    assert compare(nn.Sequential(Block(5), nn.Conv2d(5, 2, 1))) == ["fused relu"]
    assert compare(Twice(nn.BatchNorm2d(C), nn.ReLU())) == ["fast", "fast"]


def test_sequential_is_still_one():
    model = fast.accelerate(
        nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(), nn.Flatten())
    )
    x = batch()
    assert how(model, x) == ["fused relu"]
    assert type(model).__name__ == "Sequential"
    assert [type(module).__name__ for module in model] == ["Conv2d", "BatchNorm2d", "ReLU", "Flatten"]
    assert how(model[:2], x) == ["fast"]
    assert how(model[1:], x) == ["fused relu"]
    model[2] = nn.GELU()
    assert how(model, x) == ["fast"]
    model.insert(2, nn.SiLU())
    assert how(model, x) == ["fused silu"]
    del model[1]
    assert how(model, x) == []
    model.append(nn.Linear(C * 64, 2))
    assert model(x).shape == (3, 2)


# ---- a model that changes after it was accelerated


def test_modules_exchanged_later():
    model, x = fast.accelerate(Residual()), batch()
    assert how(model, x) == ["fused relu", "fused add + relu"]
    model.relu = nn.GELU()
    assert how(model, x) == ["fast", "fused add"]
    model.relu = nn.ReLU6()
    assert how(model, x) == ["fused relu6", "fused add + relu6"]
    model.bn1 = nn.Identity()
    assert how(model, x) == ["fused add + relu6"]
    model.bn2 = nn.BatchNorm2d(C)
    assert how(model, x) == ["PyTorch"]
    model.bn2 = fast.BatchNorm2d(C)
    assert how(model, x) == ["fused add + relu6"]
    model.bn2 = fast.BatchNorm2d(C, activation="relu")
    assert how(model, x) == ["fused relu"]
    plain = fast.restore(copy.deepcopy(model))
    assert torch.equal(model.eval()(x), plain.eval()(x))


def hooks(model):
    seen = []

    def see(*args):
        seen.append(args[-1].sum().item())

    def see_backward(module, grad_input, grad_output):
        seen.append(grad_output[0].sum().item())

    return seen, {
        "forward": lambda m: m.register_forward_hook(see),
        "pre": lambda m: m.register_forward_pre_hook(lambda module, args: see(args[0])),
        "backward": lambda m: m.register_full_backward_hook(see_backward),
        "backward pre": lambda m: m.register_full_backward_pre_hook(lambda module, g: see(g[0])),
    }


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
@pytest.mark.parametrize("where", ["bn1", "relu", "down.1", "down"])
def test_hooks_after_accelerate(kind, where):
    """Trap 19: who watches a module sees what it computed before."""
    plain, x = lively(ResidualDown()), batch()
    for name, module in plain.named_modules():
        if name == "relu":
            module.inplace = False  # PyTorch refuses the view that a backward hook makes
    model = fast.accelerate(copy.deepcopy(plain))
    fused = how(model, x)
    assert fused == ["fused relu", "fast", "fused add + relu"]
    found = []
    for each in (plain, model):
        seen, ways = hooks(each)
        handle = ways[kind](each.get_submodule(where))
        step(each, x)
        found.append((each, seen, handle))
    (_, expected, _), (_, seen, handle) = found
    assert len(expected) == (2 if where == "relu" else 1)
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-3)
    done = how(model, x)
    assert (
        done
        == {
            "bn1": ["fast", "fast", "fused add + relu"],
            "relu": ["fast", "fast", "fused add"],
            "down.1": fused,
            "down": fused,
        }[where]
    )
    handle.remove()
    assert how(model, x) == fused


def test_global_hooks_see_all():
    model, x, seen = fast.accelerate(Residual()), batch(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        model(x)
        assert seen.count("ReLU") == 2
        assert how(model, x) == ["fast", "fast"]
    finally:
        handle.remove()
    assert how(model, x) == ["fused relu", "fused add + relu"]


def test_global_backward_hooks_see_all():
    model, x = fast.accelerate(SameName()), batch()
    model.relu.inplace = False
    handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    try:
        assert how(model, x) == ["fast"]
    finally:
        handle.remove()
    assert how(model, x) == ["fused relu"]


def test_arguments_that_an_activation_does_not_have():
    class Wrong(Base):
        def forward(self, x, *args, **kwargs):
            return self.call(x)

    class Keyword(Wrong):
        def call(self, x):
            return F.relu(self.bn1(x), slope=1)

    class Position(Wrong):
        def call(self, x):
            return torch.relu(self.bn1(x), True)

    for cls in (Keyword, Position):
        with pytest.raises(TypeError, match="argument"):
            fast.accelerate(cls())(batch())


def test_backward_hook_in_front_of_an_activation_in_place():
    """The view that the hook makes may not be changed in place: PyTorch's error, from PyTorch."""
    model = fast.accelerate(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(inplace=True)))
    model[0].register_full_backward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(batch().requires_grad_())


def test_forward_of_an_instance():
    model, x = fast.accelerate(SameName()), batch()
    model.relu.forward = lambda x: 3 * x
    assert how(model, x) == ["fast"]
    del model.relu.forward
    model.bn1.forward = lambda x: 2 * x
    assert torch.equal(
        model(x), model.conv2(2 * model.conv1(x)).relu() * 0 + model.conv2(F.relu(2 * model.conv1(x)))
    )
    model = SameName()
    model.forward = lambda x: x
    assert fast.accelerate(model)(x) is x


# ---- what is shared


def test_one_norm_twice_and_parameters_tied():
    class Shared(Base):
        def forward(self, x):
            x = self.relu(self.bn1(x))
            return self.relu(self.bn1(self.conv1(x)) + x)

    model = Shared()
    model.bn2.weight = model.bn1.weight
    assert compare(model) == ["fused relu", "fused add + relu"]
    fast.accelerate(model)
    assert model.bn2.weight is model.bn1.weight
    model(batch())
    before = model.bn1.num_batches_tracked.item()
    model(batch())
    assert model.bn1.num_batches_tracked.item() == before + 2


def test_frozen_parameters_have_no_gradient():
    model = fast.accelerate(lively(Residual()))
    model.bn1.weight.requires_grad_(False)
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    found = step(model, batch())
    plain = fast.restore(model)
    expected = step(plain, batch())
    assert found.keys() == expected.keys()
    assert "grad of bn1.weight" not in found


# ---- residuals


@pytest.mark.parametrize(
    ("residual", "fusing"),
    [
        (torch.ones(3, C, 8, 8), True),
        (nn.Parameter(torch.ones(3, C, 8, 8)), True),
        (torch.ones(3, C, 8, 8).to(memory_format=torch.channels_last), True),
        (torch.ones(C, 1, 1), False),
        (torch.ones(2, 3, C, 8, 8), False),
        (torch.ones(3, C, 8, 8, dtype=torch.float64), False),
        (torch.ones(3, C, 8, 8, dtype=torch.int32), False),
        (2, False),
        (1.5, False),
    ],
    ids=[
        "plain",
        "parameter",
        "memory format",
        "broadcast",
        "more axes",
        "float64",
        "int",
        "number",
        "float",
    ],
)
def test_residual_kinds(residual, fusing):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)

        def forward(self, x, r):
            return F.relu(self.bn(x) + r)

    plain, x = lively(Adds()), batch()
    model = fast.accelerate(copy.deepcopy(plain))
    assert how(model, x, residual) == ["fused add + relu" if fusing else "fast"]
    expected, found = plain(x, residual), model(x, residual)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("residual_first", [False, True])
@pytest.mark.parametrize("formats", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_memory_format_of_a_sum(residual_first, formats):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)

        def forward(self, x, r):
            return r + self.bn(x) if residual_first else self.bn(x) + r

    x, r = (
        batch().to(memory_format=torch.channels_last if last else torch.contiguous_format) for last in formats
    )
    plain = lively(Adds())
    expected, found = plain(x, r), fast.accelerate(copy.deepcopy(plain))(x, r)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, **NEAR)


def test_sum_with_another_factor():
    class Adds(Base):
        def forward(self, x):
            return F.relu(torch.add(self.bn1(x), x, alpha=2))

    assert compare(Adds()) == ["fast"]


def test_input_changed_behind_its_back():
    """By a module that has it from elsewhere. It cannot be undone then, and must not go unnoticed."""

    class Keeps(nn.Module):
        def forward(self, x):
            self.kept = x.clone()
            return self.kept

    class Changes(nn.Module):
        def __init__(self, keeps):
            super().__init__()
            self.keeps = [keeps]

        def forward(self, x):
            self.keeps[0].kept.add_(1)
            return 2 * x

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.keeps, self.bn = Keeps(), nn.BatchNorm2d(C)
            self.changes = Changes(self.keeps)

        def forward(self, x):
            out = self.bn(self.keeps(x))
            r = self.changes(x)
            out += r
            return F.relu(out)

    model, x = Hidden(), batch()
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(RuntimeError, match=r"BatchNorm2d\(4\) was changed in place.*exclude"):
            fast.accelerate(model)(x)
        torch.testing.assert_close(fast.accelerate(model, exclude=[""])(x), expected, **NEAR)


# ---- copies, pickles, other processes


def test_deepcopy_is_independent():
    model, x = fast.accelerate(lively(ResidualDown())), batch()
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    before = model(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin(x)
    assert how(twin, x) == ["fused relu", "fast", "fused add + relu"]
    torch.testing.assert_close(model(x), before)
    assert twin.bn1.num_batches_tracked != model.bn1.num_batches_tracked
    assert type(copy.copy(model)) is type(model)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_is_accelerated_again(protocol):
    model, x = fast.accelerate(lively(nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU()))), batch()
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert how(twin, x) == ["fused relu", "fast", "fused add + relu", "fused relu"]
    assert_same(step(twin, x), step(model, x))
    types = [type(module) for module in fast.restore(model).modules()]
    assert [type(module) for module in fast.restore(twin).modules()] == types


def test_saved_whole():
    model = fast.accelerate(lively(ResidualDown()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = batch()
    assert how(twin, x) == ["fused relu", "fast", "fused add + relu"]
    assert_same(step(twin, x), step(model, x))


@pytest.mark.slow
def test_spawn(tmp_path):
    """Another process gets the model, and has to rewrite its methods itself."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "import fastbn.torch as fast\n"
        "import blocks\n"
        "def work(model, x, queue):\n"
        "    with fast.record() as calls:\n"
        "        model(x)\n"
        "    queue.put([call.how for call in calls])\n"
        "if __name__ == '__main__':\n"
        "    context = torch.multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    model = fast.accelerate(blocks.Residual())\n"
        "    child = context.Process(target=work, args=(model, torch.ones(2, 4, 3, 3), queue))\n"
        "    child.start()\n"
        "    print(queue.get(timeout=300))\n"
        "    child.join()\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=400)
    assert done.stdout.strip() == "['fused relu', 'fused add + relu']", done.stderr


def test_state_dict_both_ways():
    plain = lively(ResidualDown())
    model = fast.accelerate(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert str(model) == str(plain)
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict(), assign=True)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


# ---- restore


def test_restore_is_exact():
    model = nn.Sequential(ResidualDown(), Shortcut(), nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert fast.accelerate(model) is model
    assert any(type(module) is not cls for module, cls, _ in before)
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert fast.restore(model) is model
    for module, cls, state in before:
        assert type(module) is cls
        assert module.__dict__ == state
    assert fast.restore(model) is model


def test_restore_leaves_our_own_layers():
    model = nn.Sequential(
        fast.BatchNorm2d(C, activation="relu"), fast.BatchNorm2d(C), nn.BatchNorm2d(C), nn.ReLU()
    )
    types = [type(module) for module in model]
    fast.accelerate(model)
    assert how(model, batch()) == ["fused relu", "fast", "fused relu"]
    assert [type(module) for module in fast.restore(model)] == types


def test_again_with_other_options():
    model, x = ResidualDown(), batch()
    types = [type(module) for module in model.modules()]
    fast.accelerate(fast.accelerate(model))
    assert how(model, x) == ["fused relu", "fast", "fused add + relu"]
    fast.accelerate(model, fuse=False)
    assert how(model, x) == ["fast"] * 3
    fast.accelerate(model, exclude=["bn1"])
    assert how(model, x) == ["PyTorch", "fast", "fused add + relu"]
    assert [type(module) for module in fast.restore(model).modules()] == types


def test_restore_then_fold():
    """PyTorch's own tools ask for exact types."""
    from torch.fx.experimental.optimization import fuse
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model, x = lively(ResidualDown()).eval(), batch()
    expected = model(x)
    fast.accelerate(model)
    folded = fuse_conv_bn_eval(model.conv1, model.bn1)
    torch.testing.assert_close(folded(x), model.bn1(model.conv1(x)), **NEAR)
    graph = fuse(fast.restore(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())
    torch.testing.assert_close(graph(x), expected, **NEAR)


# ---- what is left out


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ((), ["fused relu", "fast", "fused add + relu"]),
        (["down"], ["fused relu", "PyTorch", "fused add + relu"]),
        ("bn2", ["fused relu", "PyTorch", "fast"]),
        ({"bn1", "down.1"}, ["PyTorch", "PyTorch", "fused add + relu"]),
        ([""], ["PyTorch"] * 3),
        (lambda name, module: name == "bn1", ["PyTorch", "fast", "fused add + relu"]),
        (
            lambda name, module: isinstance(module, nn.Sequential),
            ["fused relu", "PyTorch", "fused add + relu"],
        ),
    ],
)
def test_exclude(exclude, expected):
    assert how(fast.accelerate(ResidualDown(), exclude=exclude), batch()) == expected


def test_exclude_says_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"no module of the model has: \['down.2'\]; close to 'down.2': .*'down.1'"
    ):
        fast.accelerate(ResidualDown(), exclude=["down.2"])
    with pytest.raises(ValueError, match=r"see model\.named_modules"):
        fast.accelerate(ResidualDown(), exclude=["???"])


@pytest.mark.parametrize("function", [fast.accelerate, fast.restore])
def test_only_modules(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        function([nn.BatchNorm2d(C)])


def test_a_batch_norm_alone():
    norm = nn.BatchNorm2d(C)
    assert type(fast.accelerate(norm)) is fast.BatchNorm2d
    assert type(fast.restore(norm)) is nn.BatchNorm2d


def test_class_names():
    """As DCGAN's initialization has it."""
    model = fast.accelerate(ResidualDown())
    assert sum("BatchNorm" in module.__class__.__name__ for module in model.modules()) == 3
    assert isinstance(model, ResidualDown)
    assert type(model).__name__ == "ResidualDown"
    assert type(model).__module__ == ResidualDown.__module__


class Subclass(nn.BatchNorm2d):
    def extra_repr(self):
        return "mine, " + super().extra_repr()


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Registered(nn.Module):
    known = []  # noqa: RUF012

    def __init_subclass__(cls):
        cls.known.append(cls)


class InRegistry(Registered):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(self.bn(x))


class WithSlots(nn.Module):
    __slots__ = ("extra",)

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(self.bn(x))


def test_subclasses_of_batch_norm():
    assert compare(nn.Sequential(Subclass(C), nn.ReLU())) == ["fused relu"]
    assert compare(nn.Sequential(OwnForward(C), nn.ReLU())) == ["PyTorch"]
    assert compare(nn.Sequential(nn.SyncBatchNorm(C), nn.ReLU()).eval()) == ["PyTorch"]
    norm = fast.accelerate(Subclass(C))
    assert isinstance(norm, Subclass)
    assert isinstance(norm, fast.BatchNorm2d.__mro__[1])
    assert repr(norm) == repr(Subclass(C))
    assert type(pickle.loads(pickle.dumps(norm))) is type(norm)
    assert type(fast.restore(norm)) is Subclass


def test_a_norm_with_an_attribute_of_the_name_of_ours():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    model[0].activation = "relu6"  # a note of the user's, which means nothing to PyTorch
    assert compare(model) == ["PyTorch"]


def test_classes_that_may_not_be_subclassed():
    assert compare(InRegistry()) == ["fast"]
    assert Registered.known == [InRegistry]
    assert compare(WithSlots()) == ["fast"]


def test_scripted_and_traced_modules_are_left_alone():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()).eval())
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()).eval())
    model = nn.ModuleList([scripted, graph])
    types = [type(module) for module in model]
    fast.accelerate(model)
    assert [type(module) for module in model] == types
    assert how(graph, batch()) == ["fast"]


def test_parametrized():
    from torch.nn.utils import parametrize

    class Square(nn.Module):
        def forward(self, w):
            return w * w

    plain, x = lively(Residual()), batch()
    parametrize.register_parametrization(plain.bn1, "weight", Square())
    parametrized = type(plain.bn1)
    model = copy.deepcopy(plain)
    fast.accelerate(model)
    assert how(model, x) == ["fused relu", "fused add + relu"]
    assert_near(step(model, x), step(copy.deepcopy(plain).double(), x.double()))
    assert type(fast.restore(fast.accelerate(plain)).bn1) is parametrized
    # Removed while it is accelerated, and put on then.
    fast.accelerate(plain)
    parametrize.remove_parametrizations(plain.bn1, "weight")
    assert type(plain.bn1) is fast.BatchNorm2d
    parametrize.register_parametrization(plain.bn1, "weight", Square())
    assert how(plain, x) == ["fused relu", "fused add + relu"]
    fast.restore(plain)
    assert type(plain.bn1).__mro__[1] is nn.BatchNorm2d
    parametrize.remove_parametrizations(plain.bn1, "weight")
    assert type(plain.bn1) is nn.BatchNorm2d


def test_lazy():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.LazyBatchNorm2d()
            self.layers = nn.Sequential(nn.LazyConv2d(C, 1), nn.LazyBatchNorm2d(), nn.ReLU())

        def forward(self, x):
            return F.relu(self.bn(self.layers(x)))

    model, x = fast.accelerate(Lazy()), batch()
    model(x)
    assert type(model.bn) is type(model.layers[1]) is fast.BatchNorm2d
    assert how(model, x) == ["fused relu", "fused relu"]
    assert type(fast.restore(model).bn) is nn.BatchNorm2d
    assert "cls_to_become" not in model.bn.__dict__
    never = fast.restore(fast.accelerate(Lazy()))
    never(x)
    assert type(never.bn) is nn.BatchNorm2d


@pytest.mark.parametrize("first", ["accelerate", "convert"])
def test_synchronized_layers_are_fused(monkeypatch, first):
    """In a group, too, but for what would exchange the order in which ranks meet."""
    group, met = None, []
    monkeypatch.setattr(fast.SyncBatchNorm, "_group", lambda layer: group)
    monkeypatch.setattr(fast.sync, "_Group", lambda group: group)
    monkeypatch.setattr(fast.sync, "_Ranks", lambda group: group)

    class Alone:
        def merge(self, make, number):
            part = make()
            met.append(len(part.mean if hasattr(part, "mean") else part.dz))
            return part

    plain, x = lively(nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU())), batch()
    apart, together = copy.deepcopy(plain), copy.deepcopy(plain)
    ways = [fast.accelerate, fast.convert_sync_batchnorm]
    for way in ways if first == "accelerate" else reversed(ways):
        way(together)
    fast.convert_sync_batchnorm(apart)
    assert how(together, x) == ["fused relu", "fast", "fused add + relu", "fused relu"]
    assert_same(step(copy.deepcopy(together), x), step(copy.deepcopy(apart), x))
    group = Alone()
    with fast.record() as calls:
        copy.deepcopy(together)(x)
    names = ["0.bn1", "0.bn2", "0.down.1", "1"]
    assert [(call.name, call.how) for call in calls] == list(
        zip(names, ["fused relu", "fast", "fast", "fused relu"], strict=True)
    )
    assert calls[1].reason == "ranks meet in it, and in the order that is written"
    met.clear()
    found = step(together, x)
    assert len(met) == 8
    assert_same(found, step(apart, x))
    fast.revert_sync_batchnorm(fast.restore(together))
    assert [type(module) for module in together.modules()] == [type(module) for module in plain.modules()]


def test_converted_to_sync_batch_norm():
    model = fast.accelerate(ResidualDown())
    plain = fast.restore(copy.deepcopy(model))
    model, plain = (nn.SyncBatchNorm.convert_sync_batchnorm(each).eval() for each in (model, plain))
    x = batch()
    assert how(model, x) == ["PyTorch"] * 3
    assert torch.equal(model(x), plain(x))


# ---- PyTorch at work around it


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ResidualDown()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model = lively(Checkpointed())
    assert compare(model) == ["fused relu", "fast", "fused add + relu"]
    fast.accelerate(model)
    with fast.record() as calls:
        step(model, batch())
    assert [call.how for call in calls] == ["fused relu", "fast", "fused add + relu"] * 2


def test_checkpoint_once():
    """An option of accelerate, which leaves with it; of layers that were made as ours it is their own."""
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(ResidualDown(), fast.BatchNorm2d(C), nn.LazyBatchNorm2d())
    before = [dict(module.__dict__) for module in model.modules()]

    def counts():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.reset_running_stats()
        checkpoint(model, batch().requires_grad_(), use_reentrant=False).sum().backward()
        return [count.item() for name, count in model.named_buffers() if "num_batches" in name]

    fast.accelerate(model, once=True)
    model(batch())
    assert counts() == [1, 1, 1, 2, 1]
    assert counts() == [1, 1, 1, 2, 1]
    convert = fast.convert_sync_batchnorm(model)
    assert counts() == [1, 1, 1, 2, 1]
    fast.revert_sync_batchnorm(convert)
    fast.accelerate(model)
    assert counts() == [2, 2, 2, 2, 2]
    fast.restore(fast.accelerate(model, once=True))
    model[1].once = True
    assert counts() == [2, 2, 2, 1, 2]
    del model[1].once
    for module, attributes in zip(list(model.modules())[:-1], before, strict=False):
        assert module.__dict__.keys() == attributes.keys()


def test_traced_by_fx_and_feature_extraction():
    plain = lively(nn.Sequential(ResidualDown(), nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))).eval()
    model, x = fast.accelerate(copy.deepcopy(plain)), batch()
    graph, expected = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(plain)
    assert [node.target for node in graph.graph.nodes] == [node.target for node in expected.graph.nodes]
    torch.testing.assert_close(graph(x), plain(x), **NEAR)


@pytest.mark.parametrize("how_to", ["script", "trace", "export"])
def test_exported_as_pytorch_would(how_to):
    plain, x = lively(nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU())).eval(), batch()
    model = fast.accelerate(copy.deepcopy(plain))
    if how_to == "export":
        made = torch.export.export(model, (x,)).module()
        operations = [str(node.target) for node in made.graph.nodes]
    else:
        made = torch.jit.script(model) if how_to == "script" else torch.jit.trace(model, x)
        operations = re.findall(r"= (\w+::\w+)", str(made.inlined_graph))
    assert sum("batch_norm" in name for name in operations) >= 4
    assert not any("fastbn" in name for name in operations)
    torch.testing.assert_close(made(x), plain(x), **NEAR)


def test_compiled_without_a_break():
    import torch._dynamo

    plain, x = lively(nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU())).eval(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(fast.accelerate(copy.deepcopy(plain)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), **NEAR)


def test_dispatch_modes_see_all():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    plain, x = lively(nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU())).eval(), batch()
    with Watch() as expected:
        plain(x)
    with Watch() as found:
        fast.accelerate(plain)(x)
    assert found.seen == expected.seen
    assert "aten.add_.Tensor" in found.seen


def test_vmap_and_functional_call():
    plain, x = lively(ResidualDown()).eval(), batch()
    model = fast.accelerate(copy.deepcopy(plain))
    expected = torch.vmap(plain)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(torch.vmap(model)(torch.stack([x, 2 * x])), expected, **NEAR)
    doubled = {name: 2 * p.detach() for name, p in plain.named_parameters()}
    expected = torch.func.functional_call(plain, doubled, (x,))
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), expected, **NEAR)


def test_autocast_and_no_grad():
    model, x = fast.accelerate(lively(ResidualDown())).eval(), batch()
    plain = fast.restore(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = model(x), plain(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), **NEAR)


def test_what_has_no_kernel_is_computed_as_it_was_written(monkeypatch):
    """In place where that was so, and not by operations that take more memory."""
    from fastbn.torch import functional

    calls = []

    def spy(*args):
        calls.append(args)
        return composite(*args)

    composite = functional.composite
    monkeypatch.setattr(functional, "composite", spy)
    fast.accelerate(ResidualDown()).bfloat16()(batch().bfloat16())
    assert len(calls) == 3
    assert not any(isinstance(each, str) for args in calls for each in args)  # an activation


def test_users_errors_are_pytorchs():
    plain = nn.Sequential(Residual(), nn.BatchNorm2d(C), nn.ReLU())
    model = fast.accelerate(copy.deepcopy(plain))
    for x in (batch(2, C + 1, 4, 4), batch(2, C, 4), torch.ones(1, C, 1, 1), torch.ones(2, C, 3, 3).int()):
        errors = []
        for each in (plain[1:], model[1:], plain, model):
            with pytest.raises(Exception) as error:  # noqa: PT011
                each(x)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]
        assert errors[2] == errors[3]


def test_traceback_shows_the_users_lines():
    class Fails(Base):
        def forward(self, x):
            x = self.bn1(x)
            x = self.relu(x)
            return x + None  # this is the line

    model = fast.accelerate(Fails())
    assert type(model).forward is not Fails.forward
    try:
        model(batch())
    except TypeError as error:
        text = "".join(traceback.format_exception(error))
    assert "return x + None  # this is the line" in text
    assert f'"{__file__}"' in text
    assert "in forward" in text


# ---- record


def test_record_says_why():
    model, x = fast.accelerate(ResidualDown(), exclude=["down.1"]), batch()
    with fast.record() as calls:
        model(x)
    assert calls == [
        ("bn1", "fused relu", ""),
        ("down.1", "PyTorch", "not accelerated"),
        ("bn2", "fused add + relu", ""),
    ]
    assert str(calls).splitlines()[0].split() == ["bn1", "fused", "relu"]
    assert str(calls).splitlines()[-1] == "3 batch norms: 1 fused relu, 1 PyTorch, 1 fused add + relu"
    model.relu = nn.GELU()
    model.bn2.register_forward_hook(lambda *args: None)
    with fast.record() as calls, fast.record() as inner:
        model(x)
    assert calls == inner
    assert calls[0] == ("bn1", "fast", "GELU comes behind it")
    assert calls[1] == ("bn2", "fast", "it has hooks")
    with fast.record() as calls:
        model.bfloat16()(x.bfloat16())
    assert calls[0].how == "PyTorch"
    assert "bfloat16" in calls[0].reason
    assert str(fusion.Calls()) == "0 batch norms"


def test_record_of_layers_with_options_and_arguments_of_ours():
    x, mask = batch(), torch.ones(3, 8, 8, dtype=torch.bool)
    layer = fast.BatchNorm2d(C, activation="relu")
    plain = fast.BatchNorm2d(C)
    with fast.record() as calls:
        layer(x)
        layer(input=x, residual=x)
        plain(x, x)
        plain(x)
        layer(x, x, mask)
        plain(input=x, mask=mask)
        plain(x, torch.ones(C, 1, 1))
        plain.eval()(x, None, mask)
        with torch.no_grad():  # where statistics are not taken and nothing is differentiated
            plain(x, None, mask)
    assert [call[1:] for call in calls] == [
        ("fused relu", ""),
        ("fused add + relu", ""),
        ("fused add", ""),
        ("fast", ""),
        ("PyTorch", "a mask is given"),
        ("PyTorch", "a mask is given"),
        ("PyTorch", f"residual has shape ({C}, 1, 1), input (3, {C}, 8, 8)"),
        ("PyTorch", "a mask is given"),
        ("fast", ""),
    ]


def test_record_tells_what_the_kernels_did(kernels_called):
    """For what ways through a model and kinds of tensors there are: the kernels are called, or are not."""
    for training in (True, False):
        for make in (
            lambda x: x,
            lambda x: x.double(),
            lambda x: x.bfloat16(),
            lambda x: x.to(memory_format=torch.channels_last),
            lambda x: x[:1],
            lambda x: x.as_subclass(type("Labelled", (torch.Tensor,), {})),
        ):
            model = fast.accelerate(ResidualDown()).train(training)
            x = make(batch())
            kernels_called.clear()
            with fast.record() as calls:
                model.to(x.dtype)(x)
            assert len(calls) == 3
            assert sum(call.how != "PyTorch" for call in calls) == len(kernels_called)


def test_record_names_within_the_outermost_module():
    model = nn.Sequential(Residual(), nn.BatchNorm2d(C))
    with fast.record() as calls:
        fast.accelerate(model)(batch())
        model[1](input=batch())
    assert [call.name for call in calls] == ["0.bn1", "0.bn2", "1", "1"]
    with pytest.raises(LookupError), fast.record():
        raise LookupError
    assert not nn.modules.module._has_any_global_hook()


# ---- rewriting


def test_a_method_that_was_changed_since(tmp_path, monkeypatch):
    """The source tells another story than the code: it is not trusted."""
    file = tmp_path / "story.py"
    head = "from blocks import Base\nclass Story(Base):\n    def forward(self, x):\n"
    text = head + "        return self.relu(self.bn1({}))\n"
    file.write_text(text.format("x"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import story

    file.write_text(text.format("2 * x"), encoding="utf-8")
    x = batch()
    assert compare(story.Story(), x=x) == ["fast"]
    del sys.modules["story"]


def test_no_source():
    names = {"Base": Base}
    exec("class Typed(Base):\n    def forward(self, x):\n        return self.relu(self.bn1(x))", names)
    assert compare(names["Typed"]()) == ["fast"]


def test_only_what_is_won_is_rewritten():
    """A batch norm that nothing follows is not put off."""

    class Mixed(Base):
        def forward(self, x):
            x = self.bn1(x)
            x = self.conv1(x)
            x = self.bn2(x)
            return self.relu(x)

        def other(self, x):
            return self.bn1(x)

    model = fast.accelerate(Mixed())
    assert type(model).other is Mixed.other
    assert "__fastbn_force__" not in type(model).forward.__code__.co_freevars
    roles = rewriting.Roles(("bn1", "bn2"), (), ("relu",))
    assert rewriting.rewrite(Mixed.other, roles, fusion._HELPERS) is None


def test_a_class_is_made_once():
    models = [fast.accelerate(Residual()), fast.accelerate(Residual())]
    assert type(models[0]) is type(models[1])
    other = Residual()
    other.relu = nn.GELU()
    assert type(fast.accelerate(other)) is not type(models[0])
    assert type(fast.accelerate(Inherited())).__mro__[1] is Inherited


def test_a_method_patched_in_its_class(monkeypatch):
    class Patched(Base):
        def forward(self, x):
            return self.relu(self.bn1(x))

    model, x = fast.accelerate(Patched()), batch()
    assert how(model, x) == ["fused relu"]
    monkeypatch.setattr(Patched, "forward", SameName.forward)
    plain = SameName()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(fast.accelerate(model)(x), plain(x), **NEAR)
    assert how(model, x) == ["fused relu"]
