"""Merging over ranks, and the layer that does so: here the ranks are threads, in test_mpi.py processes."""

import copy
import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from operations import ACTIVATIONS, SMOOTH, TORCHRUN, assert_within, near, problem
from test_forward import both_axes

import fastbn
from fastbn import BatchNorm, BatchStats, GradSums, distributed
from fastbn.distributed import SyncBatchNorm, all_merge

SHARDS = [[6, 6], [1, 11], [0, 12], [2, 9, 1], [5, 0, 7]]


class Rank:
    """A communicator of threads, as all_merge() takes any."""

    def __init__(self, number, vectors, barrier):
        self.number, self.vectors, self.barrier = number, vectors, barrier
        self.size = len(vectors)
        self.gathered = []

    def all_gather(self, vector):
        self.gathered.append(vector.size)
        self.vectors[self.number] = vector
        self.barrier.wait(timeout=20)
        found = [v.copy() for v in self.vectors]
        self.barrier.wait(timeout=20)
        return found


def on_ranks(size, function):
    """What function(rank, comm) returns on each, or the exception that it raises."""
    vectors, barrier = [None] * size, threading.Barrier(size)

    def of_rank(number):
        try:
            return function(number, Rank(number, vectors, barrier))
        except Exception as error:
            if isinstance(error, threading.BrokenBarrierError):
                raise
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


def refused(results, match):
    """On every rank."""
    for error in results:
        assert isinstance(error, ValueError), error
        assert match in str(error), error


def bits(part):
    return [pickle.dumps(getattr(part, name)) for name in type(part).__slots__]


def random_part(kind, rng, channels=5, count=None):
    count = int(rng.integers(1, 9)) if count is None else count
    return kind(rng.standard_normal(channels), rng.random(channels), count)


# all_merge


@pytest.mark.parametrize("kind", [BatchStats, GradSums])
@pytest.mark.parametrize(("size", "along"), [(2, 256), (19, 256), (64, 75), (70, 0)])
@pytest.mark.parametrize("channels", [1, 75, 76, 256, 257, 600])
def test_all_merge(rng, kind, size, along, channels):
    parts = [random_part(kind, rng, channels, 0 if rank == 1 else None) for rank in range(size)]
    results = on_ranks(size, lambda rank, comm: (all_merge(parts[rank], comm), comm.gathered))
    expected = parts[0].merge(*parts[1:])
    for merged, gathered in results:
        assert bits(merged) == bits(expected)
        assert gathered == results[0][1]
        assert len(gathered) == (1 if channels <= along else 2)
        assert 8 * size * gathered[0] <= 80_000  # of which any MPI makes few messages


def test_several_parts_of_each_rank(rng):
    parts = [[random_part(BatchStats, rng) for _ in range(rank + 1)] for rank in range(3)]
    for merged in on_ranks(3, lambda rank, comm: all_merge(iter(parts[rank]), comm)):
        assert merged == parts[0][0].merge(parts[1][0].merge(parts[1][1]), parts[2][0].merge(*parts[2][1:]))


@pytest.mark.parametrize("count", [2**53 - 1, 2**53, 2**53 + 1, 2**80 + 1, 2**105])
def test_any_count(count):
    merged = on_ranks(2, lambda rank, comm: all_merge(GradSums([1], [2], count + rank), comm))
    assert [m.count for m in merged] == [2 * count + 1] * 2
    results = on_ranks(2, lambda rank, comm: all_merge(GradSums([1], [2], 2**106 - rank), comm))
    refused(results[:1], "count must be below")
    refused(results[1:], "rank 0 could not take part")


def test_one_rank_is_not_asked():
    class Alone:
        size = 1

        def all_gather(self, vector):
            raise AssertionError

    stats = BatchStats([1, 2], [3, 4], 5)
    assert all_merge(stats, Alone()) is stats


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (BatchStats([0] * 4, [1] * 4, 3), "rank 0, 2: statistics of 5 channels; rank 1: statistics of 4"),
        (BatchStats([0] * 400, [1] * 400, 3), "rank 1: statistics of 400 channels"),
        (GradSums([0] * 5, [1] * 5, 3), "rank 1: sums of the gradient of 5 channels"),
    ],
)
@pytest.mark.parametrize("gathered", [distributed._GATHERED, {}], ids=["few", "many"])
def test_ranks_that_are_not_in_step(monkeypatch, other, told, gathered):
    monkeypatch.setattr(distributed, "_GATHERED", gathered)
    stats = BatchStats([0] * 5, [1] * 5, 3)

    def of_rank(rank, comm):
        with pytest.raises(ValueError, match="ranks are not in step") as caught:
            all_merge(other if rank == 1 else stats, comm)
        assert all_merge(stats, comm).count == 9  # and on they go
        raise caught.value

    refused(on_ranks(3, of_rank), told)


@pytest.mark.parametrize(
    "wrong", [None, 1, "stats", [], [1], [BatchStats([1], [1], 1), GradSums([1], [1], 1)]]
)
def test_parts_of_another_type(wrong):
    results = on_ranks(2, lambda rank, comm: all_merge(wrong if rank else GradSums([1], [1], 1), comm))
    assert isinstance(results[1], TypeError)
    refused(results[:1], "rank 1 could not take part, because of an error that it raises itself")


@pytest.mark.parametrize(
    "comm", [None, 1, object(), type("Sizeless", (), {"all_gather": lambda self, v: v})()]
)
def test_comm_of_another_type(comm):
    with pytest.raises(TypeError, match="comm must be a communicator of mpi4py"):
        all_merge(BatchStats([1], [1], 1), comm)
    if comm is not None:
        with pytest.raises(TypeError, match="comm must be a communicator of mpi4py"):
            SyncBatchNorm(3, comm=comm)


def test_all_gather_that_returns_something_else():
    class Wrong:
        size = 2

        def all_gather(self, vector):
            return [vector]

    with pytest.raises(ValueError, match="all_gather of comm must return the vectors of 2 ranks"):
        all_merge(BatchStats([1], [1], 1), Wrong())


# SyncBatchNorm


def split(array, sizes):
    return np.split(array, np.cumsum(sizes)[:-1])


def trained(layer, p, add, steps, shard=slice(None)):
    """Outputs and gradients of some steps, each on other data."""
    found = []
    for step in range(steps):
        x = (p.x + np.float32(step))[shard]
        mask = {} if p.mask is None else {"mask": p.mask[shard], "mask_output": p.mask_output}
        y = layer(x, p.residual[shard] if add else None, **mask)
        found.append((y, layer.backward(p.grad_output[shard])))
    return found


OPTIONS = [
    {},
    {"activation": "relu", "momentum": None},
    {"activation": "leaky_relu", "affine": False, "unbiased": False},
    {"activation": "relu6", "bias": False, "track_running_stats": False},
]


def randomize(layer, p):
    for name in "weight", "bias":
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = getattr(p, name)
    return layer


@pytest.mark.parametrize("sizes", SHARDS, ids=str)
@both_axes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("offset", "masked"), [(0, False), (1e4, False), (0, True)])
def test_shards_are_the_whole(sizes, axis, options, offset, masked):
    p = problem((12, 5, 3), axis, offset)
    if masked:  # of two samples nothing is real, and NaN where nothing is real reaches no other rank
        mask = np.random.default_rng(0).random((12, 3)) < 0.7
        mask[-2:] = False
        p = p._replace(mask=mask, mask_output=True)
        np.moveaxis(p.x, axis, -1)[~mask] = np.nan
    add = options.get("activation") == "relu"
    whole = randomize(BatchNorm(5, axis=axis, **options), p)
    expected = trained(whole, p, add, 3)
    ends = np.cumsum(sizes)

    def of_rank(rank, comm):
        layer = randomize(
            SyncBatchNorm(5, axis=axis, comm=comm, reduce_parameters=rank_reduces, **options), p
        )
        layer._number = 1  # which is counted in each process, of which there is one here
        return layer, trained(layer, p, add, 3, slice(ends[rank] - sizes[rank], ends[rank]))

    for rank_reduces in False, True:
        results = on_ranks(len(sizes), of_rank)
        for result in results:
            if isinstance(result, Exception):
                raise result
        for step, (y, grads) in enumerate(expected):
            outputs = np.concatenate([found[step][0] for _, found in results])
            assert_within(outputs, y.astype(np.float64), near(y), "y")
            grad_input = np.concatenate([found[step][1].grad_input for _, found in results])
            largest = abs(grads.grad_input).max()
            assert_within(grad_input, grads.grad_input.astype(np.float64), 2e-6 * largest, "grad_input")
            if add:
                grad_residual = np.concatenate([found[step][1].grad_residual for _, found in results])
                np.testing.assert_array_equal(grad_residual, grads.grad_residual)
            for name in "grad_weight", "grad_bias":
                each = [getattr(found[step][1], name) for _, found in results]
                total = each[0] if rank_reduces else np.sum(each, axis=0, dtype=np.float64)
                bound = 1e-5 * abs(p.grad_output).sum() / 5
                assert_within(total, getattr(grads, name).astype(np.float64), bound, name)
                assert not rank_reduces or len({e.tobytes() for e in each}) == 1
        states = [layer.state_dict() for layer, _ in results]
        for name, value in whole.state_dict().items():
            assert len({state[name].tobytes() for state in states}) == 1, name
            np.testing.assert_allclose(states[0][name], value, rtol=2e-6, atol=1e-6)
        if whole.running_mean is not None:
            assert states[0]["num_batches_tracked"] == 3
            for layer, _ in results:  # float64 is kept behind the averages as in any layer
                np.testing.assert_array_equal(layer._exact[0].astype(np.float32), layer.running_mean)


def two_layers(rank, comm, function):
    layers = [SyncBatchNorm(5, comm=comm), SyncBatchNorm(5, comm=comm)]
    for number, layer in enumerate(layers):
        layer._number = number + 1
    return function(rank, *layers)


def test_a_rank_in_another_mode():
    """It is at the next layer, of as many channels, when the others wait for it in this one."""
    x = problem((4, 5, 3)).x

    def step(rank, first, second):
        first.train(rank != 1)
        second(first(x))

    refused(
        on_ranks(3, lambda rank, comm: two_layers(rank, comm, step)),
        "rank 0, 2: statistics of 5 channels, in layer 1; rank 1: statistics of 5 channels, in layer 2",
    )


def test_a_rank_that_is_a_pass_ahead():
    x = problem((4, 5, 3)).x

    def step(rank, first, second):
        first(x)
        if rank == 0:
            first.backward(x)
        else:
            first(x)

    refused(
        on_ranks(2, lambda rank, comm: two_layers(rank, comm, step)),
        "rank 0: sums of the gradient of 5 channels, in layer 1; rank 1: statistics",
    )


def test_other_channels_on_one_rank():
    """Of its layer, or of x alone."""
    x = problem((4, 5, 3)).x

    def of_rank(rank, comm, channels):
        layer = SyncBatchNorm(channels, comm=comm)
        layer._number = 1
        layer(x[:, :4] if rank else x)

    results = on_ranks(2, lambda rank, comm: of_rank(rank, comm, 5 - rank))
    refused(results, "rank 0: statistics of 5 channels, in layer 1; rank 1: statistics of 4 channels")
    results = on_ranks(2, lambda rank, comm: of_rank(rank, comm, 5))
    refused(results[:1], "rank 1 could not take part")
    refused(results[1:], "x must have 5 channels on axis 1")


@pytest.mark.parametrize("wrong", ["x", "residual", "out", "running_var", "counter", "grad_output"])
def test_an_error_of_one_rank(wrong):
    """It raises the error, the others that there was one, nothing is moved, and then all go on."""
    p = problem((4, 5, 3))

    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm)
        layer._number = 1
        before = layer.state_dict()
        given = {"x": p.x, "residual": p.residual, "out": np.full_like(p.x, 9)}
        bad = np.ones((4, 5, 2), np.float32)
        if wrong == "grad_output":
            layer(p.x)
            before = layer.state_dict()
        elif rank and wrong in given:
            given[wrong] = bad if wrong != "x" else bad.astype(np.float64)
        elif rank and wrong == "running_var":
            layer.running_var.setflags(write=False)
        elif rank:
            layer.num_batches_tracked = np.array(2**63 - 1)
            before = layer.state_dict()
        error = None
        try:
            layer.backward(bad if rank else p.x) if wrong == "grad_output" else layer(**given)
        except (ValueError, TypeError) as e:
            error = e
        for name, value in layer.state_dict().items():
            assert np.array_equal(value, before[name])
        if isinstance(given["out"], np.ndarray) and given["out"].shape == p.x.shape:
            assert (given["out"] == 9).all()
        assert all_merge(BatchStats([1], [1], 1), comm).count == 2
        return error

    results = on_ranks(2, of_rank)
    refused(results[:1], "rank 1 could not take part")
    assert ("num_batches_tracked" if wrong == "counter" else wrong) in str(results[1])


@pytest.mark.parametrize("sizes", [[1, 0], [0, 1], [0, 0, 1]], ids=str)
def test_one_value_in_all(sizes):
    """Refused on every rank, with nothing moved."""

    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm)
        layer._number = 1
        try:
            layer(np.ones((sizes[rank], 5), np.float32))
        finally:
            assert layer.num_batches_tracked == 0
            assert not layer.running_mean.any()

    refused(
        on_ranks(len(sizes), of_rank),
        "more than 1 value per channel, but the shards of all ranks together have 1",
    )


def test_one_value_on_each():
    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm)
        layer._number = 1
        return layer(np.full((1, 5), rank, np.float32))

    for rank, y in enumerate(on_ranks(2, of_rank)):
        np.testing.assert_allclose(y, np.full((1, 5), 2 * rank - 1), rtol=1e-4)


def test_nothing_in_all():
    empty = np.empty((0, 5, 3), np.float32)

    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm, reduce_parameters=True)
        layer._number = 1
        assert layer(empty).shape == empty.shape
        grads = layer.backward(empty)
        assert layer.num_batches_tracked == 0
        return grads

    for grads in on_ranks(2, of_rank):
        assert grads.grad_input.shape == empty.shape
        assert not grads.grad_weight.any()


class Silent:
    size = 2

    def all_gather(self, vector):
        raise AssertionError("nothing was to be told")


def test_evaluation_is_silent():
    p = problem((4, 5, 3))
    layer = randomize(SyncBatchNorm(5, comm=Silent()), p).eval()
    plain = randomize(BatchNorm(5), p).eval()
    assert np.array_equal(layer(p.x), plain(p.x))
    assert np.array_equal(layer.backward(p.grad_output).grad_input, plain.backward(p.grad_output).grad_input)
    assert np.array_equal(layer.freeze()(p.x), plain(p.x))
    layer.running_mean = layer.running_var = None
    assert layer(p.x).shape == p.x.shape
    with pytest.raises(AssertionError, match="nothing was to be told"):
        layer.train()(p.x)


def test_one_rank_is_a_batch_norm():
    class Alone(Silent):
        size = 1

    p = problem((4, 5, 3))
    layer, plain = SyncBatchNorm(5, comm=Alone()), BatchNorm(5)
    assert np.array_equal(layer(p.x), plain(p.x))
    assert np.array_equal(layer.backward(p.grad_output).grad_input, plain.backward(p.grad_output).grad_input)
    assert np.array_equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS[1:] if name not in SMOOTH])
def test_output_and_needs(activation):
    p = problem((4, 5, 3))

    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm, activation=activation)
        layer._number = 1
        y = layer(p.x, p.residual)
        expected = layer.backward(p.grad_output)
        layer(p.x, p.residual)
        by_output = layer.backward(p.grad_output, output=y)
        layer(p.x, p.residual)
        some = layer.backward(p.grad_output, needs=("input", "bias"))
        assert some.grad_weight is some.grad_residual is None
        for name in expected._fields:
            assert np.array_equal(getattr(by_output, name), getattr(expected, name))
            assert getattr(some, name) is None or np.array_equal(getattr(some, name), getattr(expected, name))
        with pytest.raises(RuntimeError, match="needs a call of the layer first"):
            layer.backward(p.grad_output)
        return True

    assert on_ranks(2, of_rank) == [True, True]


def test_a_shard_that_is_not_finite():
    p = problem((4, 5, 3))

    def of_rank(rank, comm):
        layer = SyncBatchNorm(5, comm=comm, skip_nonfinite=True)
        layer._number = 1
        x = p.x.copy()
        x[0, 2, 0] = np.nan if rank else x[0, 2, 0]
        layer(x)
        return layer.state_dict()

    with pytest.warns(RuntimeWarning, match="statistics that are not finite in 1 of 5 channels"):
        states = on_ranks(2, of_rank)
    for name in states[0]:
        assert np.array_equal(states[0][name], states[1][name])
    assert (states[0]["running_mean"] != 0).tolist() == [True, True, False, True, True]


def test_copies_share_the_communicator_and_pickles_leave_it_out():
    comm = Silent()
    layer = SyncBatchNorm(5, comm=comm, reduce_parameters=True, activation="relu")
    for twin in copy.copy(layer), copy.deepcopy(layer):
        assert twin.comm is comm
        assert twin._number == layer._number
    twin = pickle.loads(pickle.dumps(layer))
    assert twin._shared.comm is None
    assert (twin.reduce_parameters, twin.activation) == (True, "relu")
    assert np.array_equal(
        twin.eval()(np.ones((2, 5), np.float32)), np.ones((2, 5), np.float32) / np.float32(1.000005)
    )


def test_options_that_it_cannot_have():
    for options in {"virtual_batch_size": 4}, {"renorm": True}:
        with pytest.raises(ValueError, match=f"cannot have {next(iter(options))}"):
            SyncBatchNorm(5, **options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        SyncBatchNorm(5, colour="red")


def test_no_mpi(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    layer = SyncBatchNorm(5)
    assert layer.eval()(np.ones((2, 5), np.float32)).shape == (2, 5)
    with pytest.raises(ImportError, match="pip install mpi4py mpich, or pass comm="):
        layer.train()(np.ones((2, 5), np.float32))


def test_it_is_found_without_an_import_of_its_own():
    assert fastbn.distributed.SyncBatchNorm is SyncBatchNorm


GLOO = """
import sys
import torch

import fastbn

torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2
)
"""


@pytest.mark.slow
def test_gloo(tmp_path):
    """By the class that the docstring of all_merge has."""
    pytest.importorskip("torch", reason="needs the extra [torch]")
    docstring = inspect.cleandoc(all_merge.__doc__)
    example = docstring[docstring.index("    class Group:") : docstring.index("\nReturns\n")]
    program = f"{GLOO}{textwrap.dedent(example)}\n" + textwrap.dedent(
        """
        part = fastbn.GradSums([int(sys.argv[2])], [2.0], 1 + int(sys.argv[2]))
        assert fastbn.distributed.all_merge(part, Group()) == fastbn.GradSums([1], [4], 3)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # or its threads may outlive what they use
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, told = rank.communicate(timeout=120)
        assert rank.returncode == 0, told.decode()


@pytest.mark.slow
def test_gloo_of_the_guide(tmp_path):
    """The program of docs/many_machines.md, started as it says there."""
    pytest.importorskip("torch", reason="needs the extra [torch]")
    page = Path(__file__).resolve().parents[1] / "docs" / "many_machines.md"
    if not page.exists():
        pytest.skip("the tests were copied without docs/")
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (program,) = (program for program in programs if "torch" in program)
    path = tmp_path / "program.py"
    path.write_text(program + 'assert stats.count == 200\nprint(f"rank {rank}: {abs(y.mean()) < 0.2}")\n')
    environment = os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).resolve().parents[1])}
    done = subprocess.run([*TORCHRUN, path], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d: True", done.stdout)) == ["rank 0: True", "rank 1: True"]
