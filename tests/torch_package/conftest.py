"""Fixtures for the tests of fastbn.torch, which are all skipped without PyTorch."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest

from fastbn import _kernels

TRAINING, TRAINING_AT_ONCE = 10, 5  # where it is among the arguments of a forward call


@pytest.fixture
def kernels_called(monkeypatch):
    """What the kernels have done of calls of fastbn.torch, in order, and the threads each was given."""
    functional = pytest.importorskip("fastbn.torch.functional")
    calls = []

    def forward(*args):
        _kernels.tensor_forward(*args)
        calls.append(("forward" if args[TRAINING] else "normalize", args[-1]))

    def backward(*args):
        _kernels.tensor_backward(*args)
        calls.append(("backward", args[-1]))

    def at_once(*args):
        found = _kernels.torch_forward(*args)
        if found is not None:
            calls.append(("forward" if args[TRAINING_AT_ONCE] else "normalize", args[-1]))
        return found

    def back_at_once(*args):
        found = _kernels.torch_backward(*args)
        if found is not None:
            calls.append(("backward", args[-1]))
        return found

    spies = SimpleNamespace(
        tensor_forward=forward, tensor_backward=backward, kept_like=_kernels.kept_like,
        torch_forward=at_once, torch_backward=back_at_once,
    )  # fmt: skip
    monkeypatch.setattr(functional, "_kernels", spies)
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
