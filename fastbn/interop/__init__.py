"""Layers from PyTorch, Keras, Flax and ONNX as fastbn layers, their conventions converted.

PyTorch is imported when one of its modules is given, ONNX when `from_onnx` is first asked for, Keras and Flax
never. Every function returns a new layer or raises.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from fastbn.interop.flax import from_flax
    from fastbn.interop.keras import from_keras
    from fastbn.interop.onnx import from_onnx
    from fastbn.interop.torch import from_torch

__all__ = ["from_flax", "from_keras", "from_onnx", "from_torch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"fastbn.interop.{name.removeprefix('from_')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _class_for_rank(rank: int | None) -> type[BatchNorm]:
    """The layer for arrays of this rank, or for any where the rank is unknown or has no layer of its own."""
    kinds = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
    return BatchNorm if rank is None else kinds.get(rank, BatchNorm)


def _array(value: Any) -> NDArray[Any]:
    """The values of an array, or of a tensor on any device, of any dtype, with or without gradient."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.dtype.itemsize < 4 and value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _filled(layer: BatchNorm, state: Mapping[str, Any]) -> BatchNorm:
    """`layer`, with copies of the values of `state`."""
    values = {name: _array(value) for name, value in state.items()}
    for name, value in values.items():
        values[name] = _count(value) if name == "num_batches_tracked" else _float32(name, value)
    if "running_var" in values:
        var = values["running_var"].astype(np.float64).ravel()
        below = np.flatnonzero(var + layer.eps < 0)
        if below.size:
            channel = below[0]
            raise ValueError(
                f"running_var + eps must not be below zero: running_var[{channel}] is {var[channel]:g}, and "
                f"eps {layer.eps:g}; give the eps the model was trained with, or mend the checkpoint"
            )
    layer.load_state_dict(values)
    return layer


def _float32(name: str, value: NDArray[Any]) -> NDArray[Any]:
    if not np.can_cast(value.dtype, np.float32, "same_kind") and value.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be castable to float32, got {value.dtype}")
    with np.errstate(all="ignore"):
        rounded = value.astype(np.float32)
        lost = np.argwhere(np.isinf(rounded) & np.isfinite(value))
    if lost.size:
        index = tuple(lost[0].tolist())
        raise ValueError(f"{name} must be within float32, got {value[index]} at index {index}")
    return rounded


def _count(value: NDArray[Any]) -> NDArray[np.int64]:
    """A counter, which averaging of checkpoints makes a float, and other frameworks an array of one value."""
    number = value.item() if value.size == 1 and value.dtype.kind in "iuf" else None
    if number is None or not 0 <= number < 2**63 or number != int(number):
        raise ValueError(f"num_batches_tracked must be a whole number of batches, got {value}")
    return np.array(int(number), np.int64)
