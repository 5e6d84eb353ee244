"""FrozenBatchNorm: fixed statistics and parameters, made into coefficients once, for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import _kernels

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from fastbn.typing import Activation, Array, Running


class _CallSignature:
    """What inspect.signature does not find in a compiled call; that of the class is its own."""

    def __get__(self, frozen: FrozenBatchNorm | None, owner: type) -> Any:
        if frozen is None:
            return None
        import inspect

        return inspect.signature(
            lambda x, residual=None, out=None, *, mask=None, mask_output=False, num_threads=None: x
        )


class FrozenBatchNorm(_kernels.Frozen):
    """Batch normalization whose statistics and parameters no longer change.

    Called with ``x``, ``residual=None`` and ``out=None``, and as a layer with ``mask=`` and ``mask_output=``.
    Immutable, so any number of threads may call one object at once; all but tiny calls release the GIL.
    Compared and hashed by identity.

    Parameters
    ----------
    running_mean, running_var : ndarray of float32, or both of float64, shape (C,)
    weight, bias : ndarray of `dtype`, shape (C,), or None
        Those of float16 and bfloat16 are widened to float32.
    eps, axis, activation, negative_slope
        See :func:`fastbn.batch_norm`.
    dtype : {numpy.float32, numpy.float64}, optional
        What is computed in: float32 for arrays of float32, float16 and bfloat16, float64 for those of
        float64. By default what `weight` and `bias` are.
    copy : bool
        Whether the attributes of these names are copies of the four arrays; with False they are views, which
        saves memory but shows what is written into the arrays later, and a pickle holds that. Results of this
        object never change: its coefficients are computed at construction, once.

    Attributes
    ----------
    running_mean, running_var : read-only ndarray of float32 or float64, shape (C,)
    weight, bias : read-only ndarray of `dtype`, shape (C,), or None
    dtype : numpy.dtype
    num_features : int
        The number of channels.
    eps, axis, activation, negative_slope

    Raises
    ------
    TypeError, ValueError
        As :func:`fastbn.batch_norm`.
    """

    __slots__ = ("bias", "dtype", "running_mean", "running_var", "weight")
    __signature__ = _CallSignature()

    running_mean: Running
    running_var: Running
    weight: Array | None
    bias: Array | None
    dtype: np.dtype[Any]

    def __init__(
        self,
        running_mean: Running,
        running_var: Running,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        axis: int = 1,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike | None = None,
        copy: bool = True,
    ) -> None:
        if hasattr(self, "weight"):
            raise AttributeError("FrozenBatchNorm is immutable: __init__ cannot be called again")
        object.__setattr__(self, "dtype", _kernels.real_dtype(dtype, weight, bias))
        given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
        for name, value in given.items():
            array: Any = None
            if value is not None:
                array = _kernels.elements(value, name)
                if array.dtype.itemsize < 4:
                    array = array.astype(np.float32)
                array = np.array(array) if copy else array.view()
                array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"FrozenBatchNorm is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"FrozenBatchNorm is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self.running_mean, self.running_var, self.weight, self.bias)
        return _rebuild, (*arrays, self.eps, self.axis, self.activation, self.negative_slope, self.dtype)

    def __copy__(self) -> FrozenBatchNorm:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenBatchNorm:
        return self

    def __repr__(self) -> str:
        parts = [f"{self.num_features}", f"eps={self.eps:g}"]
        parts += [f"{name}=None" for name in ("weight", "bias") if getattr(self, name) is None]
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        if self.axis != 1:
            parts.append(f"axis={self.axis}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope:g}")
        return f"FrozenBatchNorm({', '.join(parts)})"


def _rebuild(*state: Any) -> FrozenBatchNorm:
    arrays_and_eps, (axis, activation, negative_slope, *later) = state[:5], state[5:]
    return FrozenBatchNorm(
        *arrays_and_eps,
        axis=axis,
        activation=activation,
        negative_slope=negative_slope,
        dtype=later[0] if later else np.float32,
    )
