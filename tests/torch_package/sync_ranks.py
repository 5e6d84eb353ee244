"""What ranks of a gloo group do with SyncBatchNorm; test_sync.py starts three and reads what they report.

Every function in CASES runs on all ranks at once, and checks its own results against one process that has the
whole batch. A failure is reported with its traceback.
"""

import copy
import time
import traceback
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch
from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm, recalibrate

WORLD = 3
CASES = {}
PAIR = None  # the group of the ranks 0 and 1


def case(function):
    CASES[function.__name__] = function
    return function


def main(rank, folder):
    """Write what came of the cases, and then what happens to the others when rank 2 fails."""
    global PAIR
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), WORLD)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    PAIR = distributed.new_group([0, 1])
    report = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function(rank)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        torch.save(report, folder / f"rank{rank}.pt")
    bn = SyncBatchNorm(3)
    if rank == 2:
        raise RuntimeError("rank 2 has had enough")
    start = time.monotonic()
    try:
        bn(torch.randn(4, 3))
        left = "nothing"
    except Exception as error:
        left = f"{type(error).__name__}: {error}"
    torch.save((left, time.monotonic() - start), folder / f"left{rank}.pt")


def share(whole, sizes, rank):
    """A rank's part of a batch, as a leaf."""
    return None if whole is None else whole.split(sizes)[rank].clone().requires_grad_()


def over_ranks(tensor, group=None):
    """The sum over all ranks."""
    tensor = tensor.detach().clone()
    distributed.all_reduce(tensor, group=group)
    return tensor


def same_everywhere(*tensors, group=None):
    for tensor in tensors:
        everyone = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, tensor.detach().contiguous(), group=group)
        assert all(torch.equal(tensor, other) for other in everyone)


def activate(z, activation):
    if activation is None:
        return z
    return F.leaky_relu(z, 0.2) if activation == "leaky_relu" else getattr(F, activation)(z)


def bound(exact, tolerance):
    return tolerance * exact.abs().clamp(min=1)


def check_shards(rank, sizes, x, residual=None, activation=None, mask=None, affine=True, tolerance=2e-6):
    """A call and its gradients against float64 autograd over the whole batch in one process."""
    group = PAIR if len(sizes) == 2 else None
    if rank >= len(sizes):
        return
    with torch.random.fork_rng():  # or the ranks that take part would draw other numbers from here on
        torch.manual_seed(1)
        check_share(rank, sizes, group, x, residual, activation, mask, affine, tolerance)


def check_share(rank, sizes, group, x, residual, activation, mask, affine, tolerance):
    C, dtype = x.shape[1], x.dtype
    parameters = torch.promote_types(dtype, torch.float32)
    layer = SyncBatchNorm(
        C,
        momentum=0.3,
        affine=affine,
        process_group=group,
        dtype=parameters,
        activation=activation,
        negative_slope=0.2,
    )
    if affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -1, 1)
    grad = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    wx, wr, ww, wb = (
        None if t is None else t.detach().double().clone().requires_grad_()
        for t in (x, residual, layer.weight, layer.bias)
    )
    real = torch.ones(x[:, :1].shape, dtype=torch.bool) if mask is None else mask.unsqueeze(1)
    count = int(real.sum())
    others = [0, *range(2, x.ndim)]
    column = (1, C, *[1] * (x.ndim - 2))
    mean = torch.where(real, wx, 0).sum(others) / count
    var = torch.where(real, (wx - mean.view(column)).square(), 0).sum(others) / count
    z = (
        F.batch_norm(wx, mean, var, ww, wb)
        if False
        else (wx - mean.view(column)) / (var.view(column) + layer.eps).sqrt()
    )
    z = z if ww is None else z * ww.view(column) + wb.view(column)
    z = z if wr is None else z + wr
    exact = activate(z, activation)
    # Near a kink float32 may be on the other side, and then has another gradient.
    near = sum(
        ((z.detach() - kink).abs() < 1e-3 for kink in (-3, 0, 3, 6)), torch.zeros_like(z, dtype=torch.bool)
    )
    grad = torch.where(near, 0, grad) if activation else grad
    exact.backward(grad.double())

    own, own_residual = share(x, sizes, rank), share(residual, sizes, rank)
    own_mask = None if mask is None else mask.split(sizes)[rank]
    y = layer(own, own_residual, own_mask)
    assert y.dtype is dtype
    assert (
        y.is_contiguous(memory_format=torch.channels_last)
        == own.is_contiguous(memory_format=torch.channels_last)
        or x.ndim != 4
    )
    y.backward(grad.split(sizes)[rank])

    def near_exact(found, expected, times=1):
        expected = expected.detach()
        error = (found.double() - expected).abs()
        assert (error <= bound(expected, times * tolerance)).all(), (error.max(), times * tolerance)

    near_exact(y, exact.split(sizes)[rank])
    near_exact(own.grad, wx.grad.split(sizes)[rank], 3)
    if residual is not None:
        near_exact(own_residual.grad, wr.grad.split(sizes)[rank])
    if affine:
        terms = x.numel() // C
        near_exact(over_ranks(layer.weight.grad, group), ww.grad, 3 + terms / 20)
        near_exact(over_ranks(layer.bias.grad, group), wb.grad, 3 + terms / 20)
    near_exact(layer.running_mean, 0.3 * mean)
    near_exact(layer.running_var, 0.7 + 0.3 * var * count / (count - 1))
    assert layer.num_batches_tracked == 1
    same_everywhere(layer.running_mean, layer.running_var, group=group)


SPLITS = [6, 6], [1, 11], [0, 12], [2, 9, 1], [5, 0, 7]
SHAPES = (12, 5, 4, 3), (12, 5, 7), (12, 5)


@case
def shards(rank):
    for sizes in SPLITS:
        for shape in SHAPES:
            x, residual = torch.randn(2, *shape)
            check_shards(rank, sizes, x)
            check_shards(rank, sizes, x, residual, "relu")
        for activation in None, "relu6", "leaky_relu", "silu", "hardswish":
            check_shards(rank, sizes, x, residual, activation)
        check_shards(rank, sizes, x, None, "relu", affine=False)


@case
def layouts(rank):
    for make in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3),
        lambda t: torch.cat([t, t], 1)[:, :5],
    ):
        x, residual = (make(torch.randn(12, 5, 6, 6)) for _ in range(2))
        check_shards(rank, [2, 9, 1], x, residual, "relu")
        check_shards(rank, [2, 9, 1], x)


@case
def large_outputs(rank):
    """In memory that fastbn keeps."""
    x, residual = torch.randn(2, 12, 64, 24, 24)
    check_shards(rank, [4, 5, 3], x, residual, "relu", tolerance=4e-6)


@case
def more_channels_than_go_round_at_once(rank):
    check_shards(rank, [2, 9, 1], torch.randn(12, 300))


@case
def other_dtypes(rank):
    for dtype, tolerance in (torch.float64, 1e-12), (torch.bfloat16, 2**-7), (torch.float16, 2**-10):
        x, residual = torch.randn(2, 12, 5, 4, 3).to(dtype)
        check_shards(rank, [2, 9, 1], x, tolerance=tolerance)
        check_shards(rank, [5, 0, 7], x, residual, "relu", tolerance=tolerance)


@case
def halves_are_the_rounded_results_of_float32(rank):
    x = torch.randn(12, 5, 4, 3).bfloat16().split([2, 9, 1])[rank]
    for residual in None, torch.randn_like(x):
        wide, half = SyncBatchNorm(5, activation="relu"), SyncBatchNorm(5, activation="relu")
        y = half(x, residual)
        expected = wide(x.float(), None if residual is None else residual.float())
        assert torch.equal(y, expected.bfloat16())
        assert torch.equal(wide.running_var, half.running_var)


@case
def masks(rank):
    x, residual = torch.randn(2, 12, 5, 7)
    mask = torch.rand(12, 7) < 0.6
    mask[:2] = False  # nothing real on rank 0
    for sizes in [2, 9, 1], [2, 10]:
        check_shards(rank, sizes, x, mask=mask)
        check_shards(rank, sizes, x, residual, "relu", mask=mask)


@case
def what_is_not_finite_under_a_mask_does_not_leak(rank):
    x = torch.randn(12, 5, 7)
    mask = torch.rand(12, 7) < 0.6
    x[~mask.unsqueeze(1).expand_as(x)] = float("nan")
    zeros = torch.where(mask.unsqueeze(1), x, 0)
    results = []
    for values in x, zeros:
        layer = SyncBatchNorm(5)
        own = share(values, [2, 9, 1], rank)
        y = layer(own, mask=mask.split([2, 9, 1])[rank])
        torch.where(mask.split([2, 9, 1])[rank].unsqueeze(1), y, 0).square().sum().backward()
        results.append((own.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    assert all(map(torch.equal, *results))


@case
def all_false_on_all_ranks_is_an_empty_batch(rank):
    layer = SyncBatchNorm(5)
    nn.init.uniform_(layer.bias)
    x = torch.randn(4, 5, 7, requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 7, dtype=torch.bool))
    assert torch.equal(y, layer.bias.detach().view(5, 1).expand_as(y))
    y.sum().backward()
    assert not x.grad.any()
    assert torch.equal(layer.running_var, torch.ones(5))


@case
def nothing_at_all(rank):
    layer = SyncBatchNorm(5)
    x = torch.randn(0, 5, 7, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.running_mean, torch.zeros(5))


@case
def large_mean(rank):
    """E[x^2] - E[x]^2 in float32 would be negative."""
    x = torch.randn(12, 5, 14, 14) + 1e4
    layer = SyncBatchNorm(5)
    y = layer(x.split([2, 9, 1])[rank])
    exact = F.batch_norm(x.double(), None, None, training=True).split([2, 9, 1])[rank]
    assert ((y - exact).abs() <= bound(exact, 2e-6)).all()


@case
def one_value_in_all(rank):
    layer = SyncBatchNorm(5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(int(rank == 1), 5))
    assert torch.equal(layer.running_mean, torch.zeros(5))
    # One on each of two ranks are two.
    layer(torch.randn(int(rank != 1), 5))
    assert not torch.equal(layer.running_mean, torch.zeros(5))


@case
def other_channels(rank):
    for channels, told in (
        ((5, 8, 8), "rank 0: statistics of 5 channels; rank 1, 2: statistics of 8 channels"),
        ((5, 5, 300), "rank 0, 1: statistics of 5 channels; rank 2: statistics of 300 channels"),
        ((290, 290, 300), "rank 0, 1: statistics of 290 channels; rank 2: statistics of 300 channels"),
    ):
        layer = SyncBatchNorm(channels[rank])
        with pytest.raises(ValueError, match=f"ranks are not in step .{told}"):
            layer(torch.randn(4, channels[rank]))
        assert not layer.running_mean.any()


@case
def evaluation_on_one_rank(rank):
    """Of one layer of two: the ranks meet at different ones."""
    model = nn.Sequential(SyncBatchNorm(4), nn.Linear(4, 6), SyncBatchNorm(6))
    if rank == 1:
        model[0].eval()
    with pytest.raises(ValueError, match=r"rank 0, 2: statistics of 4 channels; rank 1: statistics of 6"):
        model(torch.randn(4, 4))


@case
def different_passes(rank):
    layer = SyncBatchNorm(4)
    x = torch.randn(4, 4, requires_grad=True)
    y = layer(x)
    with pytest.raises(
        ValueError, match=r"rank 0: sums of the gradient of 4 channels; rank 1, 2: statistics"
    ):
        y.sum().backward() if rank == 0 else layer(x)


@case
def evaluation_does_not_communicate(rank):
    layer = SyncBatchNorm(4).eval()
    if rank == 0:
        x = torch.randn(3, 4, requires_grad=True)
        y = layer(x)
        assert torch.allclose(y, x / (1 + layer.eps) ** 0.5)
        y.sum().backward()
    layer = SyncBatchNorm(4, track_running_stats=False).eval()
    if rank == 1:
        assert layer(torch.randn(3, 4)).mean(0).abs().max() < 1e-6


@case
def a_group_of_one_does_not_communicate(rank):
    groups = [distributed.new_group([i]) for i in range(WORLD)]
    x = torch.randn(7, 4)
    if rank == 0:
        layer = SyncBatchNorm(4, process_group=groups[0])
        assert torch.equal(layer(x), fastbn.torch.BatchNorm1d(4)(x))


@case
def what_one_rank_gets_wrong(rank):
    """It raises PyTorch's own error, and the others are told."""
    layer = SyncBatchNorm(4)
    mask = torch.ones(3, dtype=torch.bool)
    for wrong, error, text in (
        ((torch.randn(3, 5),), RuntimeError, "running_mean should contain 5 elements not 4"),
        ((torch.randn(4),), ValueError, r"expected at least 2D input \(got 1D input\)"),
        ((torch.randn(3, 4), None, mask.float()), TypeError, "mask must be of torch.bool"),
    ):
        told = pytest.raises(ValueError, match="rank 1 could not take part")
        with pytest.raises(error, match=text) if rank == 1 else told:
            layer(*wrong if rank == 1 else (torch.randn(3, 4),))
    assert torch.equal(layer.running_mean, torch.zeros(4))
    layer(torch.randn(3, 4), None, mask)


@case
def frozen_parameters_and_no_gradient_of_the_input(rank):
    layer = SyncBatchNorm(4)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 4)
    y = layer(x)
    if rank == 0:  # without a gradient of the input there is nothing to tell the others
        y.sum().backward()
        assert layer.weight.grad is None
        assert torch.allclose(layer.bias.grad, torch.full((4,), 3.0))
    with torch.no_grad():
        assert not layer(x).requires_grad


@case
def cumulative_average_and_no_averages(rank):
    layer = SyncBatchNorm(4, momentum=None)
    batches = torch.randn(3, 9, 4)
    for batch in batches:
        layer(batch.split([2, 6, 1])[rank])
    assert torch.allclose(layer.running_mean, batches.mean((0, 1)), atol=1e-6)
    layer = SyncBatchNorm(4, track_running_stats=False)
    layer(batches[0].split([2, 6, 1])[rank])
    assert layer.running_mean is None


@case
def gradient_kinds(rank):
    """Expanded, of another memory format, a tensor of zeros that has no memory, negated by a bit."""
    x = torch.randn(4, 5, 6, 6)
    kinds = {
        "ones": lambda y: torch.ones(y.shape),
        "expanded": lambda y: torch.ones(()).expand(y.shape),
        "channels last": lambda y: torch.ones(y.shape).to(memory_format=torch.channels_last),
        "no memory": lambda y: torch._efficientzerotensor(y.shape),
        "negated": lambda y: torch._neg_view(-torch.ones(y.shape)),
    }
    grads = {}
    for kind, make in kinds.items():
        torch.manual_seed(1)
        layer = SyncBatchNorm(5, activation="relu")
        own = x.clone().requires_grad_()
        y = layer(own, torch.zeros_like(own))
        y.backward(make(y))
        grads[kind] = own.grad, layer.weight.grad
    for kind, (of_input, of_weight) in grads.items():
        times = 0 if kind == "no memory" else 1
        assert torch.equal(of_input, times * grads["ones"][0]), kind
        assert torch.equal(of_weight, times * grads["ones"][1]), kind


@case
def output_changed_in_place_before_the_gradient(rank):
    layer = SyncBatchNorm(5, activation="relu")
    x = torch.randn(4, 5, requires_grad=True)
    y = layer(x, torch.randn(4, 5))
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def network(layers=None):
    torch.manual_seed(3)
    layers = layers or nn
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), layers.BatchNorm2d(6), nn.Tanh(),
        nn.Conv2d(6, 4, 3, bias=False), layers.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2),
    )  # fmt: skip


OPTIONS = {
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "no_broadcast_of_buffers": {"broadcast_buffers": False},
    "tiny_buckets": {"bucket_cap_mb": 1e-4},
}


@case
def ddp(rank):
    """Steps on uneven batches as one process takes them on whole ones, and the same bits on all ranks."""
    for name, options in OPTIONS.items():
        for group in (None, PAIR) if name == "tiny_buckets" else (PAIR,):
            sizes = [2, 5, 1] if group is None else [2, 6]
            if rank >= len(sizes):
                continue
            single = network()
            model = convert_sync_batchnorm(copy.deepcopy(single), group)
            ddp = DistributedDataParallel(model, process_group=group, **options)
            optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (single, model)]
            for step in range(20 if group is None else 5):
                images = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(step))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = (single(images) - 1).square().sum() / 8
                # DistributedDataParallel takes the mean over ranks.
                part = (ddp(images.split(sizes)[rank]) - 1).square().sum() * len(sizes) / 8
                loss.backward()
                part.backward()
                for optimizer in optimizers:
                    optimizer.step()
                total = over_ranks(part, group) / len(sizes)
                assert abs(total - loss) <= 1e-4 * loss, (name, step, total, loss)
            same_everywhere(*model.state_dict().values(), group=group)
            for ours, theirs in zip(model.state_dict().values(), single.state_dict().values(), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4), name


@case
def checkpoint(rank):
    """Communicates twice, with the gradients of a plain call; the averages move twice, as PyTorch's do."""
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 5)
    results = {}
    for once, reentrant in (False, None), (False, True), (False, False), (True, True), (True, False):
        layer = SyncBatchNorm(5, once=once)
        own = x.clone().requires_grad_()
        y = layer(own) if reentrant is None else checkpoint(layer, own, use_reentrant=reentrant)
        y.square().sum().backward()
        results[once, reentrant] = own.grad, layer.running_mean, layer.running_var
        assert layer.num_batches_tracked == (1 if reentrant is None or once else 2)
    plain = results[False, None]
    for (once, _), found in results.items():
        assert torch.equal(found[0], plain[0])
        assert not once or all(map(torch.equal, found, plain))


class Joined(nn.Module):
    """Two layers of as many channels, of which the first could wait for the second."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return F.relu(out)


@case
def accelerated(rank):
    """The same bits, fused or not, also where one rank has hooks and so computes in another way."""
    apart = convert_sync_batchnorm(Joined())
    together = fastbn.torch.accelerate(copy.deepcopy(apart))
    results, x = [], torch.randn(2 + rank, 3, 5, 5)
    for model in apart, together, together:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters())])
        if rank == 0:
            together.bn2.register_forward_hook(lambda *args: None)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    with fastbn.torch.record() as calls:
        together(x)
    hows = [call.how for call in calls]
    assert hows == ["fused relu", "fast", "fast"]
    same_everywhere(*together.buffers())


@case
def compiled(rank):
    model = network()
    convert_sync_batchnorm(model)
    x = torch.randn(2 + rank, 3, 10, 10)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    model.load_state_dict(before)
    assert torch.allclose(torch.compile(model, backend="eager")(x), expected, atol=1e-6)


@case
def no_second_derivative(rank):
    x = torch.randn(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(SyncBatchNorm(5)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@case
def recalibration(rank):
    """Ranks with shares of a data set find what one process finds, and stop together."""
    images = torch.randn(20, 3, 10, 10) * torch.arange(1, 21).view(20, 1, 1, 1)
    parts = images.split([4, 15, 1])
    for method in "one_pass", "sequential":
        model, single = network(), network()
        own = parts[rank].split(5)
        found = recalibrate(model, own, method=method, process_group=distributed.group.WORLD)
        whole = [batch for part in parts for batch in part.split(5)]
        expected = recalibrate(single, whole, method=method)
        assert list(found) == list(expected) == ["1", "4"]
        for name, stats in found.items():
            assert stats.count == expected[name].count
            assert np.allclose(stats.mean, expected[name].mean, rtol=0, atol=1e-7)
            assert np.allclose(stats.var, expected[name].var, rtol=1e-6)
        same_everywhere(*model.state_dict().values())
        assert model[1].num_batches_tracked == len(whole)
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield parts[0]
        if rank == 1:
            raise OSError("disk")

    told = {"match": "rank 1 of the process group has failed, and all stop with it: OSError: disk"}
    with pytest.raises(OSError, match="disk") if rank == 1 else pytest.raises(RuntimeError, **told):
        recalibrate(model, batches(), process_group=distributed.group.WORLD)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # A model under DistributedDataParallel, and with layers that synchronize in training.
    ddp = DistributedDataParallel(convert_sync_batchnorm(network()))
    found = recalibrate(ddp, own, process_group=distributed.group.WORLD)
    for stats, expected in zip(found.values(), recalibrate(network(), whole).values(), strict=True):
        assert np.allclose(stats.var, expected.var, rtol=1e-5)
    if rank == 0:  # on its own
        recalibrate(ddp, own)
