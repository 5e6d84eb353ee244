"""Fixtures for the tests of fastbn.torch, which are all skipped without PyTorch."""

from types import SimpleNamespace

import pytest

from fastbn import _kernels

NUM_THREADS = {"forward": 9, "normalize": 12, "backward": 14}  # where it is among a kernel's arguments


@pytest.fixture
def kernels_called(monkeypatch):
    """The kernels that fastbn.torch has called, in order, and the number of threads each was given."""
    functional = pytest.importorskip("fastbn.torch.functional")
    calls = []

    def spy(name):
        def call(*args):
            calls.append((name, args[NUM_THREADS[name]]))
            return getattr(_kernels, name)(*args)

        return call

    monkeypatch.setattr(functional, "_kernels", SimpleNamespace(**{name: spy(name) for name in NUM_THREADS}))
    return calls
