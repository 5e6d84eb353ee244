"""recalibrate and adapt for models of PyTorch: against float64, and what they leave behind."""

import copy
import sys
import types

import numpy as np
import pytest

import fastbn

torch = pytest.importorskip("torch")
nn = torch.nn

from fastbn.torch import BatchNorm1d, BatchNorm2d, adapt, recalibrate  # noqa: E402


def network(seed=0, layer=nn.BatchNorm2d):
    """Two convolutions with batch norm, dropout between them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), layer(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3), layer(4)
    )  # fmt: skip


def images(sort=False, offset=0.0, number=67):
    """Batches of 16 and a last one of 3 of images that differ in brightness; sorted by it, or shuffled."""
    rng = np.random.default_rng(0)
    brightness = rng.normal(0, 3, number)
    if sort:
        brightness.sort()
    x = rng.standard_normal((number, 3, 9, 9)) + brightness[:, None, None, None] + offset
    return list(torch.tensor(x, dtype=torch.float32).split(16))


def state(model):
    """All that recalibrate and adapt touch."""
    modules = [
        (module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        for module in model.modules()
    ]
    return {name: value.clone() for name, value in model.state_dict().items()}, modules


def assert_same(before, model):
    after = state(model)
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def exact(x):
    """Mean and variance per channel, in float64."""
    x = x.double()
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def assert_near(stats, x, bound, offset=0.0):
    mean, var = exact(x)
    np.testing.assert_allclose(stats.mean, mean, rtol=0, atol=bound * float(var.sqrt().max()) + 1e-9 * offset)
    np.testing.assert_allclose(stats.var, var, rtol=bound)
    assert stats.count == x.numel() // x.shape[1]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, BatchNorm2d], ids=["torch.nn", "fastbn"])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_first_layer_is_exact_in_one_pass(sort, offset, layer):
    model = network(layer=layer)
    batches = images(sort, offset)
    found = recalibrate(model, batches)
    assert list(found) == ["1", "5"]
    x = model[0].double()(torch.cat(batches).double()).detach()
    # The convolution has rounded to float32 what the statistics were taken of.
    assert_near(found["1"], x, 1e-6 if not offset else 1e-3)
    layer = model[1]
    np.testing.assert_allclose(layer.running_mean, found["1"].mean, rtol=1e-7)
    n = found["1"].count
    np.testing.assert_allclose(layer.running_var, found["1"].var * n / (n - 1), rtol=1e-7)
    assert layer.num_batches_tracked == len(batches)


def test_large_offset_without_a_convolution_before():
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = images(sort=True, offset=1e4)
    assert_near(recalibrate(model, batches)["0"], torch.cat(batches), 1e-7, offset=1e4)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, BatchNorm2d], ids=["torch.nn", "fastbn"])
@pytest.mark.parametrize("sort", [False, True])
def test_sequential_is_exact_for_all_layers(sort, layer):
    model = network(layer=layer)
    batches = images(sort)
    found = recalibrate(model, batches, method="sequential")
    x = torch.cat(batches).double()
    reference = copy.deepcopy(model).double().eval()
    for i, module in enumerate(reference):
        if isinstance(module, nn.BatchNorm2d):
            assert_near(found[str(i)], x, 1e-6)
            mean, var = exact(x)
            n = x.numel() // x.shape[1]
            module.running_mean.copy_(mean)
            module.running_var.copy_(var * n / (n - 1))
        x = module(x).detach()
    # What one pass finds is not that, or there would be no need of so many.
    once = recalibrate(model, batches)
    assert abs(once["5"].var / found["5"].var - 1).max() > (0.1 if sort else 1e-3)


def test_better_than_update_bn_on_sorted_batches():
    batches = images(sort=True)
    model = network()
    torch.optim.swa_utils.update_bn(batches, model)
    _, var = exact(model[0](torch.cat(batches)).detach())
    assert abs(model[1].running_var / var - 1).max() > 0.3
    recalibrate(model, batches)
    assert abs(model[1].running_var / var - 1).max() < 1e-3


@pytest.mark.parametrize("method", ["one_pass", "sequential"])
def test_modes_momentum_and_hooks_are_as_before(method):
    model = network().train()
    model[3].eval()
    model[5].eval()
    model[1].momentum = None
    before = state(model)
    parameters = list(model.parameters()), list(model.buffers())
    recalibrate(model, images(), method=method)
    assert before[1] == state(model)[1]
    assert model[1].momentum is None
    assert all(
        a is b
        for a, b in zip(parameters[0] + parameters[1], [*model.parameters(), *model.buffers()], strict=True)
    )
    assert not any(p.grad is not None or p.requires_grad is False for p in model.parameters())


def test_dropout_is_off():
    model = network().train()
    first, second = (recalibrate(model, images()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("method", ["one_pass", "sequential"])
@pytest.mark.parametrize("fails", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_exception_leaves_the_model_as_it_was(method, fails):
    model = network().train()
    before = state(model)
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == 8:  # in the second pass of "sequential"
            raise fails
        model(batch)

    batches = images() * 2
    with pytest.raises(type(fails)):
        recalibrate(model, batches, method=method, forward=forward)
    assert_same(before, model)


def test_exception_of_the_batches():
    model = network()
    before = state(model)

    def batches():
        yield images()[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        recalibrate(model, batches())
    assert_same(before, model)


def test_layer_called_several_times_is_pooled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(3 * self.bn(x) + 2)

    model, batches = Twice(), images()
    for method in "one_pass", "sequential":
        found = recalibrate(model, batches, method=method)
        inputs = []
        for x in batches:
            x = x.double()
            y = nn.functional.batch_norm(x, None, None, training=True)
            inputs += [x, 3 * y + 2]
        assert_near(found["bn"], torch.cat(inputs), 1e-6)
        assert model.bn.num_batches_tracked == len(batches)


def test_nested_shared_and_unused_layers():
    inner = network()
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(inner),
            "unused": nn.BatchNorm1d(7),
            "plain": nn.BatchNorm2d(4, track_running_stats=False),
        }
    )
    model["same"] = inner[1]
    before = copy.deepcopy(model["unused"].state_dict())
    found = recalibrate(model, images(), forward=lambda model, x: model["plain"](model["a"](x)))
    assert set(found) == {"a.0.1", "a.0.5"}
    assert all(torch.equal(before[name], value) for name, value in model["unused"].state_dict().items())
    assert model["same"].num_batches_tracked == 5


def test_kinds_of_batches():
    expected = recalibrate(network(), images())

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, *, pixels, label=None):
            return self.net(pixels)

    assert recalibrate(network(), ((x, "label") for x in images())) == expected
    assert recalibrate(network(), ([x] for x in images())) == expected
    named = recalibrate(Named(), [{"pixels": x, "label": 1} for x in images()])
    assert list(named.values()) == list(expected.values())
    data = torch.utils.data.TensorDataset(torch.cat(images()))
    assert recalibrate(network(), torch.utils.data.DataLoader(data, 16)) == expected
    assert recalibrate(network(), [{"x": x} for x in images()], forward=lambda m, b: m(b["x"])) == expected
    with pytest.raises(TypeError, match=r"got ndarray; forward=lambda model, batch"):
        recalibrate(network(), [x.numpy() for x in images()])


def test_number_of_batches():
    expected = recalibrate(network(), images()[:3])
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield images()[len(taken) - 1]

    assert recalibrate(network(), endless(), num_batches=3) == expected
    assert len(taken) == 3
    assert recalibrate(network(), iter(images()), num_batches=99) == recalibrate(network(), images())
    assert recalibrate(network(), images(), num_batches=3, method="sequential")["1"] == expected["1"]
    with pytest.raises(ValueError, match="num_batches must be at least 1, or None for all of them, got 0"):
        recalibrate(network(), images(), num_batches=0)


def test_sequential_stops_at_its_layer():
    model = network()
    seen = []
    model[4].register_forward_pre_hook(lambda *_: seen.append("conv"))
    model[5].register_forward_hook(lambda *_: seen.append("bn"))
    recalibrate(model, images(), method="sequential")
    assert seen == ["conv", "bn"] * 5 + ["conv"] * 5


def test_no_except_clause_of_the_model_holds_it_up():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            try:
                return self.second(self.first(x))
            except Exception:
                pytest.fail("the model was told of the end of the pass")

    found = recalibrate(Careful(), images(), method="sequential")
    assert set(found) == {"first", "second"}


def test_errors():
    model, batches = network(), images()
    before = state(model)
    with pytest.raises(ValueError, match="method must be 'one_pass' or 'sequential', got 'twice'"):
        recalibrate(model, batches, method="twice")
    with pytest.raises(TypeError, match=r"generator given ends after the first time; give a list"):
        recalibrate(model, (x for x in batches), method="sequential")
    with pytest.raises(ValueError, match="at least one batch, got none"):
        recalibrate(model, [])
    with pytest.raises(ValueError, match="a batch norm with running averages, Sequential has none"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), batches)
    with pytest.raises(ValueError, match=r"called none of \['1', '5'\]"):
        recalibrate(model, batches, forward=lambda model, x: x)
    with pytest.raises(ValueError, match=r"for the batch norm '0', got an input of shape \(1, 3\); leave"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(3)), [torch.ones(4, 3), torch.ones(1, 3)])
    assert_same(before, model)


def test_one_value_in_a_batch_where_the_layer_does_not_normalize_by_it():
    """The last pass of "sequential" ends before the layer."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    found = recalibrate(model, [torch.ones(4, 3), torch.zeros(0, 3), torch.full((2, 3), 4.0)])
    assert found["0"] == fastbn.BatchStats([2.0] * 3, [2.0] * 3, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    x = torch.cat(images()).to(dtype)
    found = recalibrate(model, x.split(16))
    assert_near(found["0"], x, 1e-12 if dtype is torch.float64 else 1e-6)
    assert model[0].running_var.dtype is dtype
    with adapt(model.eval(), prior=4):
        assert model(x).dtype is dtype


def test_compiled_model():
    model = network()
    expected = recalibrate(copy.deepcopy(model), images())
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(images()[0])
    found = recalibrate(compiled, images())
    assert list(found.values()) == list(expected.values())
    x = images(sort=True)[0]
    with adapt(model, prior=4):
        expected = model(x)
        assert torch.equal(compiled(x), expected)
    assert not torch.allclose(compiled(x), expected)


def test_progress(monkeypatch):
    shown = []

    def tqdm(batches, desc, total):
        shown.append((desc, total))
        return batches

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    recalibrate(network(), images(), progress=True, method="sequential", num_batches=4)
    recalibrate(network(), iter(images()), progress=True)
    assert shown == [("all layers", 4), ("layer 2 of 2", 4), ("all layers", 5)]
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    assert recalibrate(network(), images(), progress=True) == recalibrate(network(), images())


@torch.no_grad()
def adapted(model, x, prior):
    """What Schneider et al. (2020) define, in float64, for the network above."""
    x = x.double()
    share = prior / (prior + len(x))
    for module in copy.deepcopy(model).double().eval():
        if isinstance(module, nn.BatchNorm2d):
            mean = share * module.running_mean + (1 - share) * x.mean((0, 2, 3))
            var = share * module.running_var + (1 - share) * x.var((0, 2, 3), correction=1)
            x = nn.functional.batch_norm(x, mean, var, module.weight, module.bias, False, 0.0, module.eps)
        else:
            x = module(x)
    return x


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, BatchNorm2d], ids=["torch.nn", "fastbn"])
@pytest.mark.parametrize("prior", [0, 16, 1000.5])
@pytest.mark.parametrize("number", [1, 16])
def test_adapt(prior, number, layer):
    model = network(layer=layer)
    recalibrate(model, images())
    model.eval()
    before = state(model)
    x = images(sort=True)[0][:number]
    plain = model(x)
    with adapt(model, prior=prior) as same:
        assert same is model
        y = model(x)
    assert torch.allclose(y.double(), adapted(model, x, prior), atol=1e-5)
    assert not torch.allclose(y, plain, atol=1e-3)
    assert_same(before, model)
    assert torch.equal(model(x), plain)


def test_adapt_of_a_model_in_training_mode():
    model = network().train()
    model[3].eval()
    before = state(model)
    x = images()[0]
    with adapt(model, prior=2):
        y = model(x)
        assert model.training
    assert torch.allclose(y.double(), adapted(model, x, 2), atol=1e-5)
    assert_same(before, model)


def test_adapt_takes_statistics_for_constants():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = images()[0].requires_grad_()
    with adapt(model, prior=0):
        model(x).sum().backward()
    scale = 1 / torch.sqrt(x.detach().var((0, 2, 3)) + 1e-5)
    assert torch.allclose(x.grad, scale.view(3, 1, 1).expand_as(x), rtol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where", ["behind a call", "in the layer", "in a hook before ours", "in a hook behind"]
)
def test_adapt_after_an_exception(where, error):
    model = network().train()

    def fail(*_):
        raise error

    handles = [model[1].register_forward_pre_hook(fail)] if where == "in a hook before ours" else []
    before = state(model)

    def use():
        with adapt(model):
            if where == "in a hook behind":
                handles.append(model[1].register_forward_pre_hook(fail))
            if where == "in the layer":
                model[1](torch.zeros(4, 5, 6, 6))
            model(images()[0])
            raise error

    with pytest.raises(error if where != "in the layer" else RuntimeError):
        use()
    if where == "in a hook behind":
        handles.pop().remove()
    assert_same(before, model)


def test_adapt_within_adapt():
    model = network().eval()
    before = state(model)
    x = images()[0]
    with adapt(model, prior=8), adapt(model, prior=8):
        model(x)
        model(x)
    assert_same(before, model)


def test_adapt_shared_layer_and_empty_batch():
    bn = nn.BatchNorm2d(3).eval()
    model = nn.Sequential(bn, bn)
    x = images(sort=True)[0]
    with adapt(model, prior=0):
        y = model(x)
        assert model(x[:0]).shape == (0, 3, 9, 9)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.equal(bn.running_mean, torch.zeros(3))


def test_adapt_errors():
    for prior in -1, float("nan"), float("inf"):
        with (
            pytest.raises(
                ValueError, match=f"prior must be a finite number of images, at least 0, got {prior}"
            ),
            adapt(network(), prior=prior),
        ):
            pass
    with (
        pytest.raises(ValueError, match="a batch norm with running averages, Linear has none"),
        adapt(nn.Linear(2, 2)),
    ):
        pass
    model = nn.Sequential(BatchNorm1d(3)).eval()
    before = state(model)
    with (
        pytest.raises(
            ValueError,
            match=r"prior=0 needs more than one value per channel in a batch, got an input of shape \(1, 3\)",
        ),
        adapt(model, prior=0),
    ):
        model(torch.ones(1, 3))
    assert_same(before, model)
    with adapt(model, prior=1):
        assert torch.allclose(model(torch.ones(1, 3)), torch.full((1, 3), 0.5 / np.sqrt(0.5 + 1e-5)))
