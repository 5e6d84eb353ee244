"""fastbn: batch normalization for CPUs. NumPy arrays in, NumPy arrays out."""

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any


def _openmp_is_loaded() -> bool:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            return "/libgomp" in file.read()
    except OSError:  # not on Linux
        return False


# GNU OpenMP reads, when it is loaded, how long its threads spin for the next region before they sleep.
# Without a word it is milliseconds, which a busy machine pays for; here it is some tens of microseconds. The
# variable is gone again before anything else can see it. Where another library has loaded the runtime before,
# nothing changes.
_short_spin = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & _os.environ.keys() and not _openmp_is_loaded()
if _short_spin:
    _os.environ["GOMP_SPINCOUNT"] = "3000"
try:
    from fastbn import _kernels as _kernels
except ImportError as _error:
    if "static TLS block" in str(_error):
        raise ImportError(
            f"{_error}. Libraries that were imported before have taken all of the memory that this one needs "
            "a little of: import fastbn before them, or start Python with LD_PRELOAD=libgomp.so.1"
        ) from _error
    # A wheel brings a runtime for machines that have none. It keeps the name by which others are known, so
    # that whatever asks for OpenMP later finds it, and a process has one pool of threads.
    _runtime = _os.path.join(_os.path.dirname(__file__), "_openmp", "libgomp.so.1")
    if "libgomp.so.1" not in str(_error) or not _os.path.exists(_runtime):
        raise
    import ctypes as _ctypes

    _ctypes.CDLL(_runtime)
    from fastbn import _kernels as _kernels
finally:
    if _short_spin:
        del _os.environ["GOMP_SPINCOUNT"]

# ruff: noqa: E402
from fastbn.adaptation import adapt
from fastbn.config import show_config
from fastbn.folding import fold_conv, fold_conv_next, fold_linear, fold_linear_next
from fastbn.frozen import FrozenBatchNorm
from fastbn.functional import (
    BatchNormGrads,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_sums,
    batch_norm_forward,
    batch_stats,
    update_running,
)
from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.outputs import empty_output_cache, set_output_cache
from fastbn.population import recalibrate
from fastbn.statistics import BatchStats, GradSums
from fastbn.threads import get_num_threads, set_num_threads
from fastbn.variants import Renorm

if _TYPE_CHECKING:
    from fastbn import distributed, interop
    from fastbn import torch as torch

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGrads",
    "BatchStats",
    "FrozenBatchNorm",
    "GradSums",
    "Renorm",
    "adapt",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_sums",
    "batch_norm_forward",
    "batch_stats",
    "distributed",
    "empty_output_cache",
    "fold_conv",
    "fold_conv_next",
    "fold_linear",
    "fold_linear_next",
    "get_num_threads",
    "interop",
    "recalibrate",
    "set_num_threads",
    "set_output_cache",
    "show_config",
    "update_running",
]


def __getattr__(name: str) -> _Any:
    if name in ("distributed", "interop", "torch"):  # when it is first asked for
        from importlib import import_module

        return import_module(f"fastbn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
