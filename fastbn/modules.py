"""BatchNorm layers: batch normalization with parameters, running averages, two modes and a state_dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbn import _kernels
from fastbn.frozen import FrozenBatchNorm
from fastbn.functional import batch_norm_backward
from fastbn.statistics import BatchStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from fastbn.functional import Array, BatchNormGrads

# In the order of PyTorch's state_dict.
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(..., strict=False)`` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class BatchNorm:
    """Batch normalization of an array of any rank >= 2 (Ioffe and Szegedy, 2015).

    In training each channel is normalized by the mean and biased variance of the batch, which also enter the
    running averages; in evaluation by the running averages. Then come `weight`, `bias`, a `residual` if the
    call has one, and the `activation`, all in the same pass over memory.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps : float
        Added to the variance; finite, >= 0.
    momentum : float or None
        Weight of the new value in the running averages; None averages over all batches alike.
    affine : bool
        Have a `weight` and a `bias`.
    track_running_stats : bool
        Keep running averages. Without them evaluation normalizes by the statistics of the batch too.
    bias : bool
        With False, an affine layer has a `weight` only.
    axis : int
        The channel axis: 1 for (N, C, ...), -1 for channels-last, (N, ..., C).
    unbiased : bool
        Average the unbiased variance, n / (n - 1) times the biased one, as PyTorch does; False averages the
        biased one, as Keras, ONNX and Flax do.
    activation : {None, "relu", "relu6", "leaky_relu"}
        Applied last.
    negative_slope : float
        Slope of "leaky_relu" below zero.

    Attributes
    ----------
    weight, bias : float32 ndarray of shape (C,), or None
        Parameters, at first 1 and 0. An optimizer may write into them or put other arrays in their place.
    running_mean, running_var : float32 ndarray of shape (C,), or None
        Running averages, at first 0 and 1.
    num_batches_tracked : int64 ndarray of shape (), or None
        How many batches have entered the running averages.
    training : bool
        The mode, at first True; see :meth:`train` and :meth:`eval`.

    Notes
    -----
    A layer keeps the arrays of its latest call by reference, for :meth:`backward`: they stay in memory until
    the next call and must not be changed before ``backward``. Copies and pickles of a layer leave them out. A
    service that only evaluates is better off with :meth:`freeze`, which keeps nothing.

    Several threads may evaluate one layer at once. Training it is for one thread at a time.

    Raises
    ------
    ValueError
        If `num_features`, `eps`, `momentum`, `activation` or `negative_slope` is out of range.
    TypeError
        If `num_features` or `axis` is not an integer.
    """

    _ranks: tuple[int, ...] | None = None  # None: whatever functional.py takes

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        unbiased: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        num_features = _kernels.whole(num_features, "num_features", "be less than 2**63")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        _kernels.check_eps(eps)
        if momentum is not None:
            _kernels.check_momentum(momentum)
        _kernels.check_activation(activation, negative_slope)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = _kernels.whole(axis, "axis", "number a dimension")
        self.unbiased = unbiased
        self.activation = activation
        self.negative_slope = negative_slope
        self.training = True
        self._saved: tuple[Array, Array | None, Array | None, BatchStats | None] | None = None

        def vector(wanted: bool) -> Any:
            return np.empty(num_features, np.float32) if wanted else None

        self.weight = vector(affine)
        self.bias = vector(affine and bias)
        self.running_mean = vector(track_running_stats)
        self.running_var = vector(track_running_stats)
        self.num_batches_tracked: Any = np.array(0, np.int64) if track_running_stats else None
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget all batches: running_mean 0, running_var 1, num_batches_tracked 0, in place."""
        self._saved = None
        for name, value in ("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0):
            array = getattr(self, name)
            if array is not None:
                array.fill(value)

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0 in place, and forget all batches."""
        self.reset_running_stats()
        if self.weight is not None:
            self.weight.fill(1)
        if self.bias is not None:
            self.bias.fill(0)

    def train(self, mode: bool = True) -> BatchNorm:
        """Go to training mode, or with False to evaluation mode; returns the layer itself."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Go to evaluation mode; returns the layer itself."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        *,
        num_threads: int | None = None,
    ) -> Array:
        """Normalize `x`; in training also update the running averages and the counter.

        Parameters
        ----------
        x : float32 ndarray of shape (N, C, ...), or (N, ..., C) with axis=-1
            Never written, unless `out` is `x`. An empty batch leaves running averages and counter alone.
        residual : float32 ndarray of the shape of `x`, optional
            Added before the activation.
        out : float32 ndarray of the shape of `x`, optional
            Where to write the result. May be `x`, but then :meth:`backward` cannot be called.
        num_threads : int, optional
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        float32 ndarray of the shape of `x`

        Raises
        ------
        ValueError
            If a shape does not fit, `out` overlaps an input otherwise than by being `x`, or a batch to take
            statistics of has one value per channel. Nothing is written then.
        TypeError
            If an array is not float32.
        """
        if self.training or self.running_mean is None:
            return self._normalize_by_batch(x, residual, out, num_threads)
        y = _kernels.normalize(
            x, self.running_mean, self.running_var, False, self.weight, self.bias, self.eps, self.axis,
            residual, self.activation, self.negative_slope, out, num_threads, self._ranks,
        )  # fmt: skip
        self._saved = (x, residual, out, None)
        return y

    def _normalize_by_batch(
        self, x: Array, residual: Array | None, out: Array | None, num_threads: int | None
    ) -> Array:
        x = _kernels.array32(x, "x")
        _kernels.check_input(x, self.axis, self._ranks, self.num_features)
        update = self.track_running_stats and self.running_mean is not None
        running_mean, running_var = (self.running_mean, self.running_var) if update else (None, None)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(self.num_batches_tracked) + 1) if update else 0.0
        y, mean, var, count = _kernels.forward(
            x, self.weight, self.bias, self.eps, self.axis, residual, self.activation, self.negative_slope,
            out, num_threads, running_mean, running_var, momentum, self.unbiased, True,
        )  # fmt: skip
        if update and count:
            self.num_batches_tracked[...] = int(self.num_batches_tracked) + 1  # += 1 takes ten times as long
        self._saved = (x, residual, out, BatchStats._wrap(mean, var, count))
        return y

    def backward(self, grad_output: Array, *, num_threads: int | None = None) -> BatchNormGrads:
        """Gradients of the latest call, from the gradient of its result.

        A call that normalized by the batch is differentiated through the batch's mean and variance; one that
        normalized by the running averages takes these for constants, with the values they have now.

        Parameters
        ----------
        grad_output : float32 ndarray of the shape of the call's `x`
        num_threads : int, optional
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        named tuple of grad_input, grad_weight, grad_bias, grad_residual
            As :func:`fastbn.batch_norm_backward` gives them.

        Raises
        ------
        RuntimeError
            If there was no call since the state was last reset or loaded, or the call's `out` was its `x`.
        ValueError, TypeError
            If `grad_output` is not float32 or does not have the shape of `x`.
        """
        if self._saved is None:
            raise RuntimeError(
                "backward() needs a call of the layer first, since its state was last set or copied"
            )
        x, residual, out, stats = self._saved
        x = _kernels.array32(x, "x")
        if out is not None and np.shares_memory(x, _kernels.array32(out, "out")):
            raise RuntimeError(
                "backward() needs the x of the latest call, which its result has replaced (out=x); "
                "call the layer without out= or with an array of its own"
            )
        training = stats is not None
        if stats is None:
            stats = BatchStats(self.running_mean, self.running_var, x.size // self.num_features)
        return batch_norm_backward(
            grad_output,
            x,
            stats,
            self.weight,
            self.bias,
            self.eps,
            training=training,
            axis=self.axis,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            num_threads=num_threads,
        )

    def freeze(self) -> FrozenBatchNorm:
        """An immutable, thread-safe layer that evaluates as this one does now, and does not change with it.

        Raises
        ------
        ValueError
            If the layer keeps no running averages.
        """
        if self.running_mean is None:
            raise ValueError("freeze() needs running statistics, and track_running_stats=False keeps none")
        return FrozenBatchNorm(
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            axis=self.axis,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters, running averages and counter that the layer has, under PyTorch's keys."""
        return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state_dict: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Copy parameters, running averages and counter into the layer's arrays.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            What :meth:`state_dict` gives, here or in PyTorch: arrays, CPU tensors, an open .npz file, what
            ``safetensors.numpy.load_file`` gives. Values are cast to the layer's dtypes.
            ``num_batches_tracked`` may be missing, as in old checkpoints.
        strict : bool
            Whether a missing or unexpected key is an error.

        Returns
        -------
        named tuple of missing_keys, unexpected_keys

        Raises
        ------
        ValueError
            If keys are missing or unexpected, or a shape is not the layer's. Nothing is written then.
        TypeError
            If a value cannot be cast to the layer's dtype, such as a complex one. Nothing is written then.
        """
        state = self._state()
        missing = [name for name in state if name not in state_dict and name != "num_batches_tracked"]
        unexpected = [name for name in state_dict if name not in state]
        if strict and (missing or unexpected):
            raise ValueError(
                f"state_dict does not fit {type(self).__name__}: missing keys {missing}, unexpected keys "
                f"{unexpected}; strict=False loads what fits"
            )
        values = {name: np.asarray(state_dict[name]) for name in state if name in state_dict}
        for name, value in values.items():
            if value.shape != state[name].shape:
                raise ValueError(f"{name} must have shape {state[name].shape}, got {value.shape}")
            if not np.can_cast(value.dtype, state[name].dtype, "same_kind"):
                raise TypeError(f"{name} must be castable to {state[name].dtype}, got {value.dtype}")
        self._saved = None
        for name, value in values.items():
            np.copyto(state[name], value)
        return IncompatibleKeys(missing, unexpected)

    def _state(self) -> dict[str, NDArray[Any]]:
        arrays = {name: getattr(self, name) for name in _STATE}
        return {name: array for name, array in arrays.items() if array is not None}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}

    def __repr__(self) -> str:
        described = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}",
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}",
        ]
        for name, default in ("axis", 1), ("unbiased", True), ("activation", None), ("negative_slope", 0.01):
            if getattr(self, name) != default:
                described.append(f"{name}={getattr(self, name)!r}")
        return f"{type(self).__name__}({', '.join(described)})"


class BatchNorm1d(BatchNorm):
    """BatchNorm of (N, C) and (N, C, L); with axis=-1 of (N, C) and (N, L, C)."""

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """BatchNorm of (N, C, H, W); with axis=-1 of (N, H, W, C)."""

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """BatchNorm of (N, C, D, H, W); with axis=-1 of (N, D, H, W, C)."""

    _ranks = (5,)
