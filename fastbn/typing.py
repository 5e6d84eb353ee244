"""The types that signatures of fastbn name, for annotations of your own."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Activation", "Array", "Mask", "Running"]

Array: TypeAlias = NDArray[Any]  # of float32, float64, float16 or bfloat16
Running: TypeAlias = NDArray[np.float32] | NDArray[np.float64]  # running averages: both of one of these
Mask: TypeAlias = NDArray[np.bool_]
Activation: TypeAlias = Literal["relu", "relu6", "leaky_relu", "silu", "hardswish"]
