"""fastbn: batch normalization for CPUs. NumPy arrays in, NumPy arrays out."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fastbn.config import show_config
from fastbn.folding import fold_conv, fold_conv_next, fold_linear, fold_linear_next
from fastbn.frozen import FrozenBatchNorm
from fastbn.functional import (
    BatchNormGrads,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_stats,
    update_running,
)
from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.outputs import empty_output_cache, set_output_cache
from fastbn.statistics import BatchStats
from fastbn.threads import get_num_threads, set_num_threads

if _TYPE_CHECKING:
    from fastbn import interop

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGrads",
    "BatchStats",
    "FrozenBatchNorm",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "empty_output_cache",
    "fold_conv",
    "fold_conv_next",
    "fold_linear",
    "fold_linear_next",
    "get_num_threads",
    "interop",
    "set_num_threads",
    "set_output_cache",
    "show_config",
    "update_running",
]


def __getattr__(name: str) -> _Any:
    if name == "interop":  # when it is first asked for
        from importlib import import_module

        return import_module("fastbn.interop")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
