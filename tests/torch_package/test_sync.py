"""SyncBatchNorm over gloo: three processes and their cases; conversion and what it keeps, in this process."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)
nn = torch.nn

import sync_ranks  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.torch import (  # noqa: E402
    SyncBatchNorm,
    convert_sync_batchnorm,
    recalibrate,
    revert_sync_batchnorm,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which the ranks have left their reports."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=sync_ranks.main, args=(rank, folder)) for rank in range(sync_ranks.WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    return folder


@pytest.mark.parametrize("name", sync_ranks.CASES)
def test_ranks(ranks, name):
    for rank in range(sync_ranks.WORLD):
        report = torch.load(ranks / f"rank{rank}.pt")
        assert name in report, f"rank {rank} has not come to it"
        assert not report[name], f"rank {rank}: {report[name]}"


def test_a_rank_that_fails_makes_the_others_fail(ranks):
    for rank in 0, 1:
        left, seconds = torch.load(ranks / f"left{rank}.pt")
        assert left.startswith(("RuntimeError", "DistBackendError")), left
        assert seconds < 30  # and not for ever, or for the group's timeout


class Twins:
    """In place of ranks: another one that has the same."""

    def merge(self, make, number):
        part = make()
        return part.merge(part)


@pytest.fixture
def twins(monkeypatch):
    monkeypatch.setattr(SyncBatchNorm, "_group", lambda layer: "a group")
    monkeypatch.setattr(fastbn.torch.sync, "_Group", lambda group: group)
    monkeypatch.setattr(fastbn.torch.sync, "_Ranks", lambda group: Twins())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_twin(twins, residual, activation, masked, dtype):
    """As one layer of PyTorch's that has the batch twice."""
    torch.manual_seed(0)
    x, r, grad = torch.randn(3, 6, 5, 4, 3).to(dtype)
    r = r if residual else None
    mask = torch.rand(6, 4, 3) < 0.7 if masked else None
    parameters = torch.promote_types(dtype, torch.float32)
    ours = SyncBatchNorm(5, momentum=0.3, activation=activation, dtype=parameters)
    theirs = fastbn.torch.BatchNorm2d(5, momentum=0.3, activation=activation, dtype=torch.float64)
    results = []
    for layer, copies, wide in (ours, 1, dtype), (theirs, 2, torch.float64):
        leaves = [None if t is None else t.clone().to(wide).requires_grad_() for t in (x, r)]
        doubled = [None if t is None else torch.cat([t] * copies) for t in leaves]
        y = layer(*doubled, None if mask is None else torch.cat([mask] * copies))
        y.backward(torch.cat([grad.to(wide)] * copies))
        gradients = [t.grad / copies for t in (*leaves, layer.weight, layer.bias) if t is not None]
        results.append([y[:6].detach(), *gradients, layer.running_mean, layer.running_var])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_twin_of_nothing_and_of_one_value(twins):
    layer = SyncBatchNorm(5)
    assert layer(torch.randn(0, 5)).shape == (0, 5)
    x = torch.randn(1, 5, requires_grad=True)
    layer(x).sum().backward()  # two values
    assert torch.allclose(x.grad, torch.zeros(1, 5), atol=1e-6)
    y = layer(x, mask=torch.zeros(1, dtype=torch.bool))
    y.sum().backward()
    assert torch.equal(y, layer.bias.detach().view(1, 5))


@pytest.fixture
def alone():
    """A group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_group_of_this_process(alone):
    layer = SyncBatchNorm(5)
    x = torch.randn(6, 5)
    assert torch.equal(layer(x), fastbn.torch.BatchNorm1d(5)(x))
    assert list(fastbn.torch.sync._Group(alone).all_gather(np.arange(3.0))[0]) == [0, 1, 2]
    expected = recalibrate(nn.Sequential(nn.BatchNorm1d(5)), [x, x + 1])
    assert recalibrate(nn.Sequential(nn.BatchNorm1d(5)), [x, x + 1], process_group=alone) == expected
    with pytest.raises(TypeError, match="got ndarray"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(5)), [x, x.numpy()], process_group=alone)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),
        fastbn.torch.BatchNorm2d(4, activation="leaky_relu", negative_slope=0.3),
        nn.Sequential(nn.SyncBatchNorm(4, momentum=None), nn.BatchNorm1d(4, affine=False, eps=1e-3)),
        nn.InstanceNorm2d(4),
    )  # fmt: skip


def test_convert_and_revert_keep_all_but_the_class():
    """Trap 17: an activation, too, which PyTorch's own converter drops."""
    model = network()
    model[1].eval()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    kinds = [type(module) for module in model.modules()]
    own = [dict(module.__dict__) for module in model.modules()]
    objects = [*model.parameters(), *model.buffers()]
    keys = list(model.state_dict())
    assert convert_sync_batchnorm(model, "a group") is model
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [type(layer) for layer in layers] == [SyncBatchNorm] * 4
    assert all(layer.process_group == "a group" for layer in layers)
    assert all(a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert list(model.state_dict()) == keys
    assert (layers[1].activation, layers[1].negative_slope) == ("leaky_relu", 0.3)
    assert (layers[2].momentum, layers[3].eps) == (None, 1e-3)
    assert not layers[0].training
    assert "activation='leaky_relu'" in repr(model)
    model[1](torch.randn(2, 4, 3, 3))
    assert calls == [1]
    assert convert_sync_batchnorm(model, None) is model  # again, for another group
    assert all(layer.process_group is None for layer in layers)
    assert revert_sync_batchnorm(model) is model
    expected = [fastbn.torch.sync.BatchNorm if kind is nn.SyncBatchNorm else kind for kind in kinds]
    assert [type(module) for module in model.modules()] == expected
    for module, before in zip(model.modules(), own, strict=True):
        if type(module) is not fastbn.torch.sync.BatchNorm:
            assert module.__dict__.keys() == before.keys()


def test_root():
    layer = nn.BatchNorm1d(3)
    assert convert_sync_batchnorm(layer) is layer
    assert type(layer) is SyncBatchNorm
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm1d


def test_reverted_layers_that_were_not_converted():
    for layer in SyncBatchNorm(3, activation="relu"), nn.SyncBatchNorm(3):
        layer = revert_sync_batchnorm(nn.Sequential(layer))[0]
        for shape in (4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 6):
            x = torch.randn(shape)
            y = nn.functional.batch_norm(x, None, None, training=True)
            assert torch.allclose(layer(x), y.relu() if layer.activation else y, atol=1e-5)
        with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
            layer(torch.randn(3))


def test_layers_with_ways_of_their_own():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    class Checked(nn.BatchNorm2d):
        def _check_input_dim(self, input):
            pass

    model = nn.ModuleDict({"own": Own(3), "plain": nn.BatchNorm2d(3), "checked": Checked(3)})
    with pytest.warns(UserWarning, match="own stays as it is, because Own has a forward of its own"):
        convert_sync_batchnorm(model)
    assert type(model["own"]) is Own
    assert type(model["checked"]) is SyncBatchNorm
    revert_sync_batchnorm(model)
    assert type(model["checked"]) is Checked


def test_layers_that_cannot_be_converted():
    lazy = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"1 must have seen an input to be converted, it is LazyBatchNorm2d"):
        convert_sync_batchnorm(lazy)
    assert type(lazy[0]) is nn.BatchNorm2d
    lazy(torch.randn(4, 3, 5, 5))
    assert type(convert_sync_batchnorm(lazy)[1]) is SyncBatchNorm
    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    with pytest.raises(ValueError, match="module must not be parametrized to be converted"):
        convert_sync_batchnorm(parametrized)


def test_without_a_group_it_is_a_batch_norm():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), fastbn.torch.BatchNorm1d(4, activation="relu"))
    synced = convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(6, 3)
    assert torch.equal(plain(x), synced(x))
    assert torch.equal(plain[1].running_var, synced[1].running_var)
    residual = torch.randn(6, 4)
    layer = SyncBatchNorm(4, activation="relu")
    y = layer(residual, residual)
    assert torch.equal(y, fastbn.torch.BatchNorm1d(4, activation="relu")(residual, residual))


def test_copies_and_pickles():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is SyncBatchNorm
    assert type(revert_sync_batchnorm(again)[0]) is nn.BatchNorm2d
    convert_sync_batchnorm(model, group := object())
    other = copy.deepcopy(model)
    assert other[0].process_group is group
    assert other[0].weight is not model[0].weight
    assert torch.equal(other[0].weight, model[0].weight)
    tied = copy.deepcopy(nn.ModuleList([model[0], model[0]]))
    assert tied[0] is tied[1]


def test_state_dict_both_ways():
    for theirs, ours in (nn.SyncBatchNorm(3), SyncBatchNorm(3)), (SyncBatchNorm(3), nn.BatchNorm2d(3)):
        nn.init.uniform_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.weight, theirs.weight)


def test_is_not_torchs_own():
    """Or DistributedDataParallel would refuse it on CPUs."""
    assert not issubclass(SyncBatchNorm, nn.SyncBatchNorm)
    assert "BatchNorm" in SyncBatchNorm.__name__
