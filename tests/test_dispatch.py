"""The instruction set: the best by default, capped by FASTBN_ISA, and told clearly when that cannot be."""

import os
import subprocess
import sys

import pytest

from fastbn import _kernels


def python(code, isa):
    environment = {name: value for name, value in os.environ.items() if name != "FASTBN_ISA"}
    if isa is not None:
        environment["FASTBN_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


PRINT_ISA = "import fastbn; print(fastbn._kernels.get_isa())"


@pytest.mark.parametrize("isa", _kernels.supported_isas())
def test_the_environment_caps_it(isa):
    done = python(PRINT_ISA, isa)
    assert (done.stdout.strip(), done.stderr) == (isa, "")


@pytest.mark.parametrize("unset", [None, ""])
def test_the_best_by_default(unset):
    assert python(PRINT_ISA, unset).stdout.strip() == _kernels.supported_isas()[-1]


@pytest.mark.parametrize("isa", ["nonsense", "AVX2", "avx10"])
def test_unknown_names_are_import_errors(isa):  # case 24
    done = python(PRINT_ISA, isa)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in ("FASTBN_ISA", repr(isa), *_kernels.supported_isas()):
        assert part in last


def test_set_isa():
    names = _kernels.supported_isas()
    assert names[0] == "baseline"
    before = _kernels.get_isa()
    try:
        for name in names:
            _kernels.set_isa(name)
            assert _kernels.get_isa() == name
            assert _kernels.set_isa(name) == name
        with pytest.raises(ValueError, match="sse5"):
            _kernels.set_isa("sse5")
        assert _kernels.get_isa() == names[-1]
    finally:
        _kernels.set_isa(before)
