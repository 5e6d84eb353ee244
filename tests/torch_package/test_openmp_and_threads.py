"""Threads: as many as PyTorch says, in the one OpenMP that both use; and several Python threads at once."""

import json
import os
import subprocess
import sys
import threading

import pytest
from operations import TORCHRUN

torch = pytest.importorskip("torch")

from judge import normal  # noqa: E402

import fastbn.torch as ours  # noqa: E402
from fastbn import _kernels  # noqa: E402

ONE_RUNTIME = """
import json, sys
{imports}
from threadpoolctl import threadpool_info
torch.set_num_threads(2)
layer = fastbn.torch.BatchNorm2d(64)
x = torch.ones(8, 64, 32, 32, requires_grad=True)
(layer(x) @ torch.ones(32, 32)).sum().backward()
found = [(p["prefix"], p["filepath"]) for p in threadpool_info() if p["user_api"] == "openmp"]
print(json.dumps([found, fastbn.show_config is not None]))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="PyTorch's wheels for Linux bring GNU OpenMP"
)
@pytest.mark.skipif(_kernels.openmp is None, reason="built without OpenMP")
@pytest.mark.parametrize(
    "imports",
    [
        "import torch\nimport fastbn.torch",
        "import fastbn\nimport torch",
        "import numpy, fastbn\nimport fastbn.torch, torch",
    ],
    ids=["torch_first", "fastbn_first", "torch_by_fastbn"],
)
def test_one_openmp(imports):
    """Two pools of threads would fight for the CPUs."""
    pytest.importorskip("threadpoolctl")
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUNTIME.format(imports=imports)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, _ = json.loads(done.stdout)
    assert len(found) == 1, found


@pytest.fixture
def num_threads():
    """Set PyTorch's, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_follow_torch(kernels_called, num_threads, threads):
    """Trap 31: each call is told, forward and backward."""
    layer = ours.BatchNorm2d(5)
    num_threads(threads)
    layer(normal(4, 5, 6, 7).requires_grad_()).sum().backward()
    layer.eval()(normal(4, 5, 6, 7))
    assert kernels_called == [("forward", threads), ("backward", threads), ("normalize", threads)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # JAX, if another test loaded it, warns
def test_workers_of_a_loader_have_one_thread():
    """PyTorch sets one thread in each worker process, and the kernels follow."""
    loader = torch.utils.data.DataLoader(Normalized(), batch_size=None, num_workers=1)
    assert [int(threads) for _, threads in loader] == [1, 1]


UNDER_TORCHRUN = """
import torch, fastbn.torch
x = torch.randn(4, 5, 6, 7, requires_grad=True)
fastbn.torch.BatchNorm2d(5)(x).sum().backward()
print(f"threads {torch.get_num_threads()};")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"
)
def test_ranks_of_torchrun_have_one_thread(tmp_path):
    """It sets OMP_NUM_THREADS=1 for each process, and the kernels have as many threads as PyTorch."""
    program = tmp_path / "program.py"
    program.write_text(UNDER_TORCHRUN, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([*TORCHRUN, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads 1;") == 2, done.stdout


class Normalized(torch.utils.data.Dataset):
    """Batches that are normalized where they are loaded."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        from fastbn.torch import functional

        seen = []

        class Spy:
            @staticmethod
            def tensor_forward(*args):
                seen.append(args[-1])
                return _kernels.tensor_forward(*args)

            @staticmethod
            def torch_forward(*args):
                seen.append(args[-1])
                return _kernels.torch_forward(*args)

        functional._kernels = Spy
        y = ours.batch_norm(normal(4, 5, 6, 7), torch.zeros(5), torch.ones(5))
        return y, seen[0]


def test_two_models_two_threads():
    """Two Python threads that train two models get what each would get alone."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), ours.BatchNorm2d(8, activation="relu"), torch.nn.Conv2d(8, 4, 3),
            ours.BatchNorm2d(4),
        )  # fmt: skip

    def train(model, seed):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(20):
            optimizer.zero_grad()
            model(normal(4, 3, 24, 24, seed=seed + step)).square().mean().backward()
            optimizer.step()

    alone, together = [model(), model()], [model(), model()]
    for seed, m in enumerate(alone):
        train(m, 1000 * seed)
    threads = [threading.Thread(target=train, args=(m, 1000 * seed)) for seed, m in enumerate(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        for key, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-5, atol=1e-6)


DROPPED_WITHOUT_THE_GIL = """
import os, signal, threading, time
import numpy as np, torch
import fastbn, fastbn.torch

torch.set_num_threads(1)
stop = time.monotonic() + 8
wrong = []


def train(rows):  # the backward pass drops tensors in a thread that does not hold the GIL
    x = torch.randn(4, 16, rows, 40, requires_grad=True)
    w, b = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    while time.monotonic() < stop:
        y = fastbn.torch.batch_norm(x, None, None, w, b, training=True, activation="relu")
        z = fastbn.torch.batch_norm(y, None, None, w, b, training=True, activation="relu")
        z.backward(torch.ones_like(z))
        x.grad = None
        del y, z


def check(rows):
    x, bias = np.full((4, 16, rows, 40), rows, np.float32), np.full(16, rows, np.float32)
    while time.monotonic() < stop:
        y = fastbn.batch_norm(x, None, None, None, bias, training=True, num_threads=1)
        if not (y == rows).all():
            wrong.append(rows)


threads = [threading.Thread(target=f, args=(40 + i,)) for i in range(3) for f in (train, check)]
for thread in threads:
    thread.start()
x = np.ones((4, 16, 50, 40), np.float32)
while time.monotonic() < stop:
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # which ends a child that waits for a lock that nobody holds
        fastbn.batch_norm(x, None, None, training=True, num_threads=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.5)
for thread in threads:
    thread.join()
assert not wrong
"""


@pytest.mark.slow
def test_memory_that_is_dropped_without_the_gil():
    """Kept memory is handed out once, whoever drops it, and a child forked meanwhile gets some, too."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", DROPPED_WITHOUT_THE_GIL], check=True, timeout=120)
