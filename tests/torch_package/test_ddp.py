"""Trap 32: DistributedDataParallel, and FSDP, on two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

from ddp_rank import OPTIONS  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found, by option: for fastbn.torch and torch.nn, losses and state."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # the rest is found as it is here
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ddp_rank", str(rank), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("option", OPTIONS)
def test_ddp(ranks, option):
    for rank in ranks:
        (losses, state), (expected_losses, expected) = rank[option]
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    first, second = (rank[option][0][1] for rank in ranks)
    for key, value in first.items():
        alike = (
            "running" not in key
        )  # each rank has statistics of its own, which rank 0 hands out before a call
        assert torch.equal(value, second[key]) or not alike, key
