"""Programs for mpiexec, which the command line names: what tests/test_mpi.py runs on 1 to 4 ranks."""

import faulthandler
import os
import pickle
import re
import signal
import sys
import time

if sys.argv[1] == "threads_bound":  # before anything asks
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 1 + int(os.environ["PMI_RANK"])])

import numpy as np
import pytest
from mpi4py import MPI

import fastbn
from fastbn import BatchNorm, BatchStats, GradSums, distributed
from fastbn.distributed import SyncBatchNorm, all_merge

WORLD = MPI.COMM_WORLD
SHORT, GATHERED = distributed._SHORT, distributed._GATHERED


def same_on_all_ranks(*arrays):
    assert len(set(WORLD.allgather(pickle.dumps(arrays)))) == 1, "ranks differ"


def refused(match, function, *args):
    """With a ValueError, on every rank."""
    with pytest.raises(ValueError, match=re.escape(match)):
        function(*args)


def shard(array, empty=()):
    """This rank's part of a batch, of uneven sizes, none for the ranks that are to have none."""
    ranks = [rank for rank in range(WORLD.size) if rank not in empty]
    if WORLD.rank not in ranks:
        return array[:0]
    ends = [len(array) * (i * i) // len(ranks) ** 2 for i in range(len(ranks) + 1)]
    i = ranks.index(WORLD.rank)
    return array[ends[i] : ends[i + 1]]


def part_of(kind, rank, channels):
    rng = np.random.default_rng(rank)
    return kind(rng.standard_normal(channels), rng.random(channels), 3 * rank)


def merge():
    """By gathers, and by the tree that many ranks with many channels take."""
    for kind, names in (BatchStats, ("mean", "var")), (GradSums, ("dz", "dz_dev")):
        for channels in 5, 700:
            parts = [part_of(kind, rank, channels) for rank in range(WORLD.size)]
            expected = parts[0].merge(*parts[1:])
            # In one gather, in two, and along the tree, after the header alone or with numbers along.
            for short, gathered in (
                (80_000, {4: 1 << 20}),
                (400, {4: 1 << 20}),
                (80_000, {}),
                (80_000, {4: 99}),
            ):
                distributed._SHORT, distributed._GATHERED = short, gathered
                merged = all_merge(parts[WORLD.rank], WORLD)
                assert merged.count == expected.count
                same_on_all_ranks(*(getattr(merged, name) for name in names))
                for name in names:
                    found, wanted = getattr(merged, name), getattr(expected, name)
                    if gathered.get(4) == 1 << 20:
                        assert np.array_equal(found, wanted)
                    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    distributed._SHORT, distributed._GATHERED = SHORT, GATHERED


def layers():
    """Every rank has what one process has of the whole batch; also at large means, with an empty shard."""
    rng = np.random.default_rng(0)
    for offset in 0, 1e4:
        for empty in (), (0,) if WORLD.size > 1 else ():
            x, dy = (rng.standard_normal((23, 6, 4, 3), np.float32) for _ in range(2))
            x += np.float32(offset)
            whole = BatchNorm(6, activation="relu")
            synced = SyncBatchNorm(6, activation="relu", reduce_parameters=True)
            for _ in range(3):
                y, grads = whole(x), whole.backward(dy)
                ours, of_ours = synced(shard(x, empty)), synced.backward(shard(dy, empty))
                np.testing.assert_allclose(ours, shard(y, empty), rtol=2e-6, atol=2e-6)
                np.testing.assert_allclose(of_ours.grad_input, shard(grads.grad_input, empty), atol=1e-5)
                for name in "grad_weight", "grad_bias":
                    np.testing.assert_allclose(getattr(of_ours, name), getattr(grads, name), atol=3e-4)
                x, dy = dy + np.float32(offset), x - np.float32(offset)
            same_on_all_ranks(*synced.state_dict().values(), *of_ours[1:3])
            for name, value in synced.state_dict().items():
                np.testing.assert_allclose(value, whole.state_dict()[name], rtol=2e-6, atol=1e-6)


def groups():
    """Each half of the ranks for itself, in a communicator of its own."""
    half = WORLD.Split(WORLD.rank % 2)
    merged = all_merge(GradSums([WORLD.rank], [1.0], 1), half)
    assert merged == GradSums([sum(range(WORLD.rank % 2, WORLD.size, 2))], [half.size], half.size)
    layer = SyncBatchNorm(2, comm=half)
    layer(np.full((3, 2), WORLD.rank, np.float32))
    assert len(set(half.allgather(layer.running_mean.tobytes()))) == 1


def wrong_steps():
    """Refused on every rank, which then go on together."""
    x = np.ones((4, 5), np.float32)
    last = WORLD.size - 1
    if last:
        refused(
            "ranks are not in step",
            SyncBatchNorm(5 + (WORLD.rank == last)),
            x[:, :1].repeat(5 + (WORLD.rank == last), 1),
        )
        first, second = SyncBatchNorm(5), SyncBatchNorm(5)
        first.train(WORLD.rank != last)
        refused("ranks are not in step", lambda: second(first(x)))
        kinds = GradSums([0], [1], 1), BatchStats([0], [1], 1)
        refused("ranks are not in step", all_merge, kinds[WORLD.rank == last], WORLD)
        layer = SyncBatchNorm(5)
        refused(
            "shape of x, (4, 5)" if WORLD.rank == last else "could not take part",
            layer,
            x,
            x[: 4 - (WORLD.rank == last)],
        )
    alone = x[:1] if WORLD.rank == last else x[:0]
    refused("more than 1 value per channel", SyncBatchNorm(5), alone)
    layer = SyncBatchNorm(5)
    layer(x)
    layer.backward(x)
    same_on_all_ranks(layer.running_mean)


def out_of_step():
    """As few ranks find out, and as many do."""
    for distributed._GATHERED in {}, GATHERED:
        wrong_steps()


def one_evaluates():
    """Evaluation takes nobody else."""
    layer = SyncBatchNorm(5)
    if WORLD.rank == 0:
        layer.eval()(np.ones((4, 5), np.float32))


def threads():
    """How many each rank takes, once it has trained."""
    SyncBatchNorm(5)(np.ones((4, 5), np.float32))
    WORLD.Barrier()
    print(f"rank {WORLD.rank}: {fastbn.get_num_threads()}", flush=True)


threads_bound = threads


def end(how):
    """The last rank ends, and the others wait for it."""
    if WORLD.rank == WORLD.size - 1:
        print(f"the end comes at {time.time()}", flush=True)
        how()
    SyncBatchNorm(5)(np.ones((4, 5), np.float32))


def fail():
    raise RuntimeError("done for")


def raises():
    end(fail)


def killed():
    end(lambda: os.kill(os.getpid(), signal.SIGKILL))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # where it waits for ever
    for name in sys.argv[1:]:
        globals()[name]()
