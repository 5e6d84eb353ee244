"""Fixtures: the instruction sets, numbers of threads and code paths that a test is to be repeated on."""

import os
from collections import defaultdict

# Idle OpenMP threads sleep rather than spin: the tests use more threads than there are CPUs, and PyTorch
# brings an OpenMP of its own, whose spinning threads would take the CPUs from ours. Read at load time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from operations import kernels

from fastbn import _kernels

THREADS = (1, 2, 3, 7, 64)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Of a test that is marked `one_in(n)`, only each n-th combination of its parameters stays quick.

    These are the ones whose places in the lists of parameters add up to a multiple of n: so every value meets
    every other of another list, if a third list has n values. The rest is slow.
    """
    places = defaultdict(dict)  # of each value in the list of a parameter
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark:
            test = item.nodeid.partition("[")[0]
            seen = [(places[test, name], id(value)) for name, value in item.callspec.params.items()]
            if sum(found.setdefault(value, len(found)) for found, value in seen) % mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=_kernels.supported_isas())
def isa(request):
    """Each instruction set that this CPU supports."""
    with kernels(isa=request.param):
        yield request.param


@pytest.fixture
def shared_out():
    """Small work is shared out among threads too."""
    with kernels(shared_out=True):
        yield


@pytest.fixture(params=THREADS)
def threads(request, shared_out):
    """Each number of threads."""
    return request.param


@pytest.fixture(params=[False, True], ids=["cached", "streamed"])
def streamed(request):
    """Outputs written as small ones are, and past the cache as large ones are."""
    with kernels(streamed=request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
