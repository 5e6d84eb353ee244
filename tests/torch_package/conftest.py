"""Fixtures for the tests of fastbn.torch, which are all skipped without PyTorch."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest

from fastbn import _kernels

NUM_THREADS = {"forward": 9, "normalize": 12, "backward": 14}  # where it is among a kernel's arguments


@pytest.fixture
def kernels_called(monkeypatch):
    """The kernels that have done a call of fastbn.torch, in order, and the threads each was given."""
    functional = pytest.importorskip("fastbn.torch.functional")
    calls = []

    def spy(name):
        def call(*args):
            result = getattr(_kernels, name)(*args)
            calls.append((name, args[NUM_THREADS[name]]))
            return result

        return call

    monkeypatch.setattr(functional, "_kernels", SimpleNamespace(**{name: spy(name) for name in NUM_THREADS}))
    return calls


@pytest.fixture(scope="session")
def torchvision():
    """Its operators are defined here where it was built for another PyTorch than there is."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("PIL", reason="pillow is not installed, which torchvision needs")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(10):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import torchvision
        except ImportError:
            pytest.skip("torchvision is not installed (pip install --no-deps torchvision)")
        except RuntimeError as error:
            library.define(re.search(r"torchvision::(\w+)", str(error))[1] + "(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            yield torchvision
            return
    pytest.skip("torchvision cannot be imported")
