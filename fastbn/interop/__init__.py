"""Layers from PyTorch, Keras, Flax and ONNX as fastbn layers, their conventions converted.

PyTorch is imported when one of its modules is given, ONNX when `from_onnx` is first asked for, Keras and Flax
never. Every function returns a new layer or raises.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:
    from fastbn.interop.flax import from_flax
    from fastbn.interop.keras import from_keras
    from fastbn.interop.onnx import from_onnx
    from fastbn.interop.torch import from_torch

__all__ = ["from_flax", "from_keras", "from_onnx", "from_torch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"fastbn.interop.{name.removeprefix('from_')}"), name)
    if (
        f"from_{name}" in __all__
    ):  # fastbn.interop.onnx and the others, which need no import of their own either
        return import_module(f"fastbn.interop.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _class_for_rank(rank: int | None) -> type[BatchNorm]:
    """The layer for arrays of this rank, or for any where the rank is unknown or has no layer of its own."""
    kinds = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
    return BatchNorm if rank is None else kinds.get(rank, BatchNorm)
