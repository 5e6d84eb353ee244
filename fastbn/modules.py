"""BatchNorm layers: batch normalization with parameters, running averages, two modes and a state_dict."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbn import _kernels, variants
from fastbn.frozen import FrozenBatchNorm
from fastbn.functional import _NEEDS, BatchNormGrads, _needed, batch_norm_backward
from fastbn.stand_ins import stand_ins, stood_in
from fastbn.statistics import BatchStats, _read_only
from fastbn.variants import Masked

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Self

    from fastbn.functional import BatchNormGrads
    from fastbn.statistics import GradSums
    from fastbn.typing import Activation, Array, Mask, Running
    from fastbn.variants import Renorm

    Float64 = NDArray[np.float64]
    # Of grad_output, x, residual, num_threads and mask.
    Gradients = Callable[[Array, Array, Array | None, int | None, Masked], BatchNormGrads]
    _Call = tuple[Array, Array | None, Array | None, BatchStats | None, Gradients | None, Masked]

# In the order of PyTorch's state_dict.
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_FLOAT32 = _kernels.real_dtype(np.float32)
_UNMASKED = Masked()

# Options that a repr tells only where they are not these.
_SELDOM = {
    "axis": 1, "unbiased": True, "activation": None, "negative_slope": 0.01, "skip_nonfinite": False,
    "virtual_batch_size": None, "renorm": None, "dtype": _FLOAT32,
}  # fmt: skip


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
    activation : {None, "relu", "relu6", "leaky_relu", "silu", "hardswish"}
        Applied last.
    negative_slope : float
        Slope of "leaky_relu" below zero.
    skip_nonfinite : bool
        Whether the running averages of a channel stay as they are where a batch gives it a mean or variance
        that float32 has no number for: NaN, infinite, or beyond its range. The layer says so once, by a
        RuntimeWarning. Not with momentum=None. With False, as in PyTorch, they enter the averages.
    virtual_batch_size : int or None
        Train on ghost batches (Hoffer et al., 2017): a batch of more rows, along its first axis, is cut into
        as few parts as make none larger, in sizes that differ by one at most. Each part is normalized by
        itself and enters the running averages and the counter as a batch of its own, one after the other.
    renorm : Renorm, bool or None
        Train with batch renormalization, with the options of a :class:`fastbn.Renorm`; True for its defaults.
    dtype : {numpy.float32, numpy.float64}
        Of parameters and averages, and what is computed in. A layer of float32 takes arrays of float32,
        float16 and bfloat16, one of float64 those of float64.

    Attributes
    ----------
    weight, bias : ndarray of `dtype` and shape (C,), or None
        Parameters, at first 1 and 0. An optimizer may write into them or put other arrays in their place.
    running_mean, running_var : ndarray of `dtype` and shape (C,), or None
        Running averages, at first 0 and 1. Without both, evaluation normalizes by the statistics of the batch
        too. They may be written into or replaced.
    num_batches_tracked : int64 ndarray of shape (), or None
        How many batches have entered the running averages. May be set to an int.
    training : bool
        The mode, at first True; see :meth:`train` and :meth:`eval`.

    Notes
    -----
    A layer keeps the arrays of its latest call by reference, for :meth:`backward`: they stay in memory until
    ``backward`` or the next call, and must not be changed before. Copies and pickles of a layer leave them
    out. A service that only evaluates is better off with :meth:`freeze`, which keeps nothing.

    Behind the float32 averages a layer keeps what they were rounded from, in float64: otherwise an average
    would stop where a step is less than half of float32's spacing, as it soon is for a mean of 1e6 with
    deviation 1. Where that matters to a result, by more than 1e-6, evaluation and :meth:`freeze` take it,
    too; so they do for features of less than 1e-19, whose variance float32 has no number for, with
    ``eps=0``. It counts as long as it rounds to what the float32 arrays hold, so that one may write into
    these; copies and pickles keep it, a state_dict does not.

    TabNet has the same ghost batches where the parts are equally large; otherwise its last part is the
    smallest, and may be a single row. Keras 2 refused what does not divide, and moved its averages once a
    batch, to the mean of the parts.

    With ``track_running_stats`` set to False later, training leaves the averages alone, and evaluation still
    goes by them, as in PyTorch.

    Several threads may evaluate one layer at once. Training it is for one thread at a time.

    Raises
    ------
    ValueError
        If `num_features`, `eps`, `momentum`, `activation`, `negative_slope`, `virtual_batch_size` or a bound
        of `renorm` is out of range, or `renorm` comes without running averages; also where an attribute is
        set to such a value later, or to an array of another shape.
    TypeError
        If `num_features`, `axis` or `virtual_batch_size` is not an integer, `renorm` no Renorm, or an
        attribute is set to what is no array of `dtype`.
    """

    _ranks: tuple[int, ...] | None = None  # None: whatever functional.py takes

    num_features: int
    dtype: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    renorm: Any
    _exact: tuple[Float64, Float64] | None  # what the running averages were rounded from
    _followed: tuple[Float64, Float64] | None  # mean and deviation for `renorm` alone

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
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        skip_nonfinite: bool = False,
        virtual_batch_size: int | None = None,
        renorm: Renorm | bool | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.dtype = dtype
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.unbiased = unbiased
        self.activation = activation
        self.negative_slope = negative_slope
        self.skip_nonfinite = skip_nonfinite
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self._said_nonfinite = False
        self.training = True
        # The latest call, in a list, because writing into that does not go through __setattr__: its arrays,
        # the statistics of its batch if it went by them, what gives its gradients if backward() cannot, and
        # its mask.
        self._saved: list[_Call | None] = [None]

        def vector(wanted: bool) -> Array | None:
            return np.empty(self.num_features, self.dtype) if wanted else None

        self.weight = vector(affine)
        self.bias = vector(affine and bias)
        self.running_mean = vector(track_running_stats)
        self.running_var = vector(track_running_stats)
        self.num_batches_tracked = 0 if track_running_stats else None
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(self, value))

    def reset_running_stats(self) -> None:
        """Forget all batches: running_mean 0, running_var 1, num_batches_tracked 0, in place."""
        self._saved[0] = self._exact = self._followed = None
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

    def train(self, mode: bool = True) -> Self:
        """Go to training mode, or with False to evaluation mode; returns the layer itself."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Go to evaluation mode; returns the layer itself."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        *,
        mask: Mask | None = None,
        mask_output: bool = False,
        num_threads: int | None = None,
    ) -> Array:
        """Normalize `x`; in training also update the running averages and the counter.

        Parameters
        ----------
        x : ndarray of shape (N, C, ...), or (N, ..., C) with axis=-1
            Of float32, float16 or bfloat16, or of float64 if that is the layer's dtype. Never written, unless
            `out` is `x`. An empty batch leaves running averages and counter alone.
        residual : ndarray of the shape and dtype of `x`, optional
            Added before the activation.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write the result. May be `x`, but then :meth:`backward` cannot be called.
        mask : bool ndarray of the shape of `x` without its channels, or one that can be broadcast to it
            True where `x` is real. A batch of which nothing is leaves running averages and counter alone.
        mask_output : bool
            Write 0 where `mask` is False. For both see :func:`fastbn.batch_norm`.
        num_threads : int, optional
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        ndarray of the shape and dtype of `x`

        Raises
        ------
        ValueError
            If a shape does not fit, `out` overlaps an input otherwise than by being `x`, a batch to take
            statistics of has one value per channel, only one of the running averages is None, or the counter
            cannot count on. Nothing is written then.
        TypeError
            If an array is not of a dtype that the layer takes.
        """
        masked = _UNMASKED if mask is None else Masked(mask, mask_output)
        if stand_ins:
            y = stood_in(self, x, residual, out, num_threads, masked)
            if y is not None:
                return y
        if self.training:
            if self.virtual_batch_size is None and self.renorm is None:
                return self._normalize_by_batch(x, residual, out, num_threads, self.weight, self.bias, masked)
            return variants.train(self, x, residual, out, num_threads, masked)
        running_mean, running_var = self.running_mean, self.running_var
        if running_mean is None or running_var is None:
            return self._normalize_by_batch(x, residual, out, num_threads, self.weight, self.bias, masked)
        y = _kernels.normalize(
            x, running_mean, running_var, False, self.weight, self.bias, self.eps, self.axis,
            residual, self.activation, self.negative_slope, out, num_threads, self._ranks,
            self._exact, mask, mask_output, None, self.dtype,
        )  # fmt: skip
        self._saved[0] = (x, residual, out, None, None, masked)
        return y

    def _normalize_by_batch(
        self,
        x: Array,
        residual: Array | None,
        out: Array | None,
        num_threads: int | None,
        weight: Array | None,
        bias: Array | None,
        masked: Masked,
    ) -> Array:
        x = _kernels.elements(x, "x")
        _kernels.check_input(x, self.axis, self._ranks, self.num_features, self.dtype)
        running_mean, running_var, exact, counter, momentum = self._to_move()
        y, mean, var, count = _kernels.forward(
            x, weight, bias, self.eps, self.axis, residual, self.activation, self.negative_slope,
            out, num_threads, running_mean, running_var, momentum, self.unbiased, True,
            exact, counter, self.skip_nonfinite, *masked,
        )  # fmt: skip
        self._saved[0] = (x, residual, out, BatchStats._wrap(mean, var, count), None, masked)
        if self.skip_nonfinite and running_var is not None and not self._said_nonfinite:
            self._tell_nonfinite(var)
        return y

    def _to_move(self) -> tuple[Any, Any, tuple[Float64, Float64] | None, Any, float]:
        """What a batch moves, each None if it does not: averages, what they were rounded from, counter;
        and the weight of the batch."""
        running_mean, running_var = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        elif running_mean is None or running_var is None:
            self._has_averages()  # which refuses one alone
        exact = counter = None
        momentum = 0.0
        if running_mean is not None:
            exact, counter = self._exact, self.num_batches_tracked
            if exact is None and self.dtype is _FLOAT32:
                # Zeros do as well as any others that do not round to the averages.
                exact = self._exact = (np.zeros(self.num_features), np.zeros(self.num_features))
            given = self.momentum
            if given is not None:
                momentum = given
            else:
                if counter is None:
                    raise ValueError(
                        "momentum=None averages over all batches and needs to count them, but "
                        "num_batches_tracked is None; set it to 0, or momentum to a number"
                    )
                momentum = 1 / max(counter.item() + 1, 1)
        return running_mean, running_var, exact, counter, momentum

    def _has_averages(self) -> bool:
        """Whether there are running averages; of one alone nobody can say what is meant."""
        if (self.running_mean is None) != (self.running_var is None):
            names = ["running_mean", "running_var"]
            missing, other = names if self.running_mean is None else names[::-1]
            raise ValueError(
                f"{missing} is None, but {other} is not; set both, or both to None to normalize by the "
                f"statistics of each batch"
            )
        return self.running_mean is not None

    def _averages(self) -> tuple[Running, Running]:
        """The running averages: float32, or float64 where rounding has taken what matters."""
        mean, var, exact = self.running_mean, self.running_var, self._exact
        if exact is not None:
            exact = _kernels.unrounded(mean, var, exact, self.eps)
        return (mean, var) if exact is None else exact

    def _tell_nonfinite(self, var: Float64) -> None:
        (skipped,) = np.nonzero(~(var <= np.finfo(self.dtype).max))
        if skipped.size:
            self._said_nonfinite = True
            warnings.warn(
                f"a batch has statistics that are not finite in {skipped.size} of {var.size} channels, "
                f"channel {skipped[0]} the first; their running averages stay as they are "
                f"(skip_nonfinite=True), now and whenever that happens again",
                RuntimeWarning,
                stacklevel=4 if self.virtual_batch_size is None and self.renorm is None else 5,
            )

    def backward(
        self,
        grad_output: Array,
        *,
        sums: GradSums | None = None,
        output: Array | None = None,
        needs: Collection[str] = _NEEDS,
        num_threads: int | None = None,
    ) -> BatchNormGrads:
        """Gradients of the latest call, from the gradient of its result.

        A call that normalized by the batch is differentiated through the batch's mean and variance; one that
        normalized by the running averages takes these for constants, with the values they have now.

        Only once for each call. A layer that is called several times before, or a call whose gradients are
        wanted more than once, needs the functions, which keep nothing: :func:`fastbn.batch_norm_forward` and
        :func:`fastbn.batch_norm_backward`. Or one layer for each call.

        Parameters
        ----------
        grad_output : ndarray of the shape and dtype of the call's `x`
        sums : GradSums, optional
        output : ndarray of the shape and dtype of the call's `x`, optional
            The result of the call.
        needs : collection of str
            Which gradients to return. For these three see :func:`fastbn.batch_norm_backward`.
        num_threads : int, optional
            See :func:`fastbn.batch_norm`.

        Returns
        -------
        named tuple of grad_input, grad_weight, grad_bias, grad_residual
            As :func:`fastbn.batch_norm_backward` gives them; grad_residual None where the call had none.

        Raises
        ------
        RuntimeError
            If there was no call since the state was last reset or loaded, or since the latest ``backward``;
            or if the call's `out` was its `x`.
        ValueError, TypeError
            If `grad_output` has not the dtype or the shape of `x`, or as
            :func:`fastbn.batch_norm_backward`.
        """
        if self._saved[0] is None:
            raise RuntimeError(
                "backward() needs a call of the layer first: it gives the gradients of the latest call, "
                "once, and there was no call since then, or since the layer was copied or its state set. For "
                "a layer that is used several times in a forward pass, or gradients of one call for several "
                "losses, use batch_norm_forward() and batch_norm_backward(), or one layer for each call"
            )
        x, residual, out, stats, gradients, masked = self._saved[0]
        x = _kernels.elements(x, "x")
        if out is not None and np.shares_memory(x, _kernels.elements(out, "out")):
            raise RuntimeError(
                "backward() needs the x of the latest call, which its result has replaced (out=x); "
                "call the layer without out= or with an array of its own"
            )
        if gradients is not None:
            if sums is not None:
                raise ValueError(
                    "sums are of one batch and its statistics, of which virtual_batch_size and renorm make "
                    "others; leave out sums"
                )
            needed = _needed(needs)
            grads = gradients(grad_output, x, residual, num_threads, masked)
            self._saved[0] = None
            return BatchNormGrads(*(grad if needed >> i & 1 else None for i, grad in enumerate(grads)))
        training = stats is not None
        if output is not None and residual is None:  # whose gradient it would stand for
            needs = [name for name in needs if name != "residual"]
        if stats is None:
            mean, var = (_read_only(np.array(average, np.float64)) for average in self._averages())
            stats = BatchStats._wrap(mean, var, x.size // self.num_features)  # with variances below 0, too
        grads = batch_norm_backward(
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
            sums=sums,
            output=output,
            needs=needs,
            mask=masked.mask,
            mask_output=masked.mask_output,
        )
        self._saved[0] = None  # or gradients of another call might be taken for those of this one
        return grads

    def freeze(self) -> FrozenBatchNorm:
        """An immutable, thread-safe layer that evaluates as this one does now, and does not change with it.

        Raises
        ------
        ValueError
            If the layer keeps no running averages, or only one of the two.
        """
        if not self._has_averages():
            raise ValueError("freeze() needs running statistics, and track_running_stats=False keeps none")
        return FrozenBatchNorm(
            *self._averages(),
            self.weight,
            self.bias,
            self.eps,
            axis=self.axis,
            activation=self.activation,
            negative_slope=self.negative_slope,
            dtype=self.dtype,
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
            ``safetensors.numpy.load_file`` gives. Values are cast to the layer's dtypes, those of float16 and
            bfloat16 exactly. ``num_batches_tracked`` may be missing, as in old checkpoints, and may be any
            whole number, or array of one, as averaging of checkpoints leaves it.
        strict : bool
            Whether a missing or unexpected key is an error.

        Returns
        -------
        named tuple of missing_keys, unexpected_keys

        Raises
        ------
        ValueError
            If keys are missing or unexpected, a shape is not the layer's, a value is beyond its dtype, a
            variance plus `eps` is below zero, the counter is no whole number, or an array of the layer is
            read-only. Nothing is written then.
        TypeError
            If a value cannot be cast to the layer's dtype, such as a complex one. Nothing is written then.
        """
        state = self._state()
        missing = [name for name in state if name not in state_dict and name != "num_batches_tracked"]
        unexpected = [name for name in state_dict if name not in state]
        if strict and (missing or unexpected):
            raise ValueError(
                f"state_dict does not fit {type(self).__name__}: missing keys {missing}, unexpected keys "
                f"{unexpected}; {_cure(unexpected)}strict=False loads what fits"
            )
        loaded = [name for name in state if name in state_dict]
        # New arrays, even where the values are those of the layer itself under other names.
        values = [_loadable(name, state_dict[name], state[name], self.eps) for name in loaded]
        self._saved[0] = self._exact = self._followed = None
        any(map(np.copyto, (state[name] for name in loaded), values))  # one call: no signal comes in between
        return IncompatibleKeys(missing, unexpected)

    def _state(self) -> dict[str, NDArray[Any]]:
        arrays = {name: getattr(self, name) for name in _STATE}
        return {name: array for name, array in arrays.items() if array is not None}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": [None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        added = {  # since version 0.1.0
            "skip_nonfinite": False, "virtual_batch_size": None, "renorm": None,
            "_said_nonfinite": False, "_exact": None, "_followed": None, "dtype": _FLOAT32,
        }  # fmt: skip
        self.__dict__.update(added | state | {"_saved": [None]})
        self.__dict__["dtype"] = _kernels.real_dtype(self.dtype)  # the object, not another that is equal

    def __repr__(self) -> str:
        described = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}",
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}",
        ]
        for name, default in _SELDOM.items():
            if getattr(self, name) != default:
                described.append(
                    f"{name}={self.dtype}" if name == "dtype" else f"{name}={getattr(self, name)!r}"
                )
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


# What an attribute of a layer is checked by where it is set; returns what is kept.


def _set_dtype(layer: BatchNorm, value: DTypeLike) -> np.dtype[Any]:
    dtype: np.dtype[Any] = _kernels.real_dtype(_FLOAT32 if value is None else value)
    if hasattr(layer, "dtype") and dtype != layer.dtype:
        raise AttributeError(f"the dtype of a layer cannot change; make a new one with dtype=numpy.{dtype}")
    return dtype


def _set_num_features(layer: BatchNorm, value: int) -> int:
    value = _kernels.whole(value, "num_features", "be less than 2**63")
    if value < 1:
        raise ValueError(f"num_features must be at least 1, got {value}")
    layer._exact = layer._followed = None  # of as many channels
    return value


def _set_eps(layer: BatchNorm, value: float) -> float:
    _kernels.check_eps(value)
    return value


def _set_momentum(layer: BatchNorm, value: float | None) -> float | None:
    if value is not None:
        _kernels.check_momentum(value)
    elif getattr(layer, "skip_nonfinite", False):
        raise ValueError(_NO_MEAN_OF_SOME)
    return value


def _set_skip_nonfinite(layer: BatchNorm, value: bool) -> bool:
    if value and layer.momentum is None:
        raise ValueError(_NO_MEAN_OF_SOME)
    return bool(value)


def _set_virtual_batch_size(layer: BatchNorm, value: int | None) -> int | None:
    return variants.checked_size(value)


def _set_renorm(layer: BatchNorm, value: Any) -> Renorm | None:
    renorm = variants.checked_renorm(value)
    if renorm is not None and not layer.track_running_stats:
        raise ValueError("renorm needs running averages, and track_running_stats=False keeps none")
    return renorm


_NO_MEAN_OF_SOME = (
    "skip_nonfinite=True needs a momentum: momentum=None weighs all batches alike, which it cannot where a "
    "channel has not taken all of them"
)


def _set_axis(layer: BatchNorm, value: int) -> int:
    return _kernels.whole(value, "axis", "number a dimension")


def _set_activation(layer: BatchNorm, value: Activation | None) -> Activation | None:
    _kernels.check_activation(value, 0.0)
    return value


def _set_negative_slope(layer: BatchNorm, value: float) -> float:
    _kernels.check_activation(None, value)
    return value


def _vector(name: str) -> Callable[[BatchNorm, Any], Array | None]:
    def check(layer: BatchNorm, value: Any) -> Array | None:
        return None if value is None else _kernels.vector(value, name, layer.num_features, False, layer.dtype)

    return check


def _set_counter(layer: BatchNorm, value: Any) -> NDArray[np.int64] | None:
    if value is None or (isinstance(value, np.ndarray) and value.dtype == np.int64 and value.size == 1):
        return value
    return _count(np.asarray(value))


_CHECKS: dict[str, Callable[[BatchNorm, Any], Any]] = {
    "dtype": _set_dtype,
    "num_features": _set_num_features,
    "eps": _set_eps,
    "momentum": _set_momentum,
    "skip_nonfinite": _set_skip_nonfinite,
    "virtual_batch_size": _set_virtual_batch_size,
    "renorm": _set_renorm,
    "axis": _set_axis,
    "activation": _set_activation,
    "negative_slope": _set_negative_slope,
    "num_batches_tracked": _set_counter,
    **{name: _vector(name) for name in _STATE[:4]},
}


# What a state_dict has.


def _cure(unexpected: Iterable[str]) -> str:
    """Where the keys are those of a network: how to make a layer of one of its batch norms."""
    ending = ".running_mean"
    prefixes = [key.removesuffix(ending) for key in unexpected if key.endswith(ending)]
    if not prefixes:
        return ""
    others = f" (or of {', '.join(map(repr, prefixes[1:]))})" if prefixes[1:] else ""
    return f"fastbn.interop.from_torch(state, {prefixes[0]!r}) makes a layer of that batch norm{others}; "


def _array(value: Any) -> NDArray[Any]:
    """The values of an array, or of a tensor on any device, of any dtype, with or without gradient."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.dtype.itemsize < 4 and value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _loadable(name: str, value: Any, array: NDArray[Any], eps: float) -> NDArray[Any]:
    """A new array of what is to be written into `array`, checked."""
    if not array.flags.writeable:
        raise ValueError(f"{name} of the layer is read-only; give the layer a writable copy first")
    value = _array(value)
    if name == "num_batches_tracked":
        return _count(value)
    if value.shape != array.shape:
        raise ValueError(f"{name} must have shape {array.shape}, got {value.shape}")
    rounded = _rounded(name, value, array.dtype)
    if name == "running_var":
        _check_variances(rounded, eps)
    return rounded


def _rounded(name: str, value: NDArray[Any], dtype: np.dtype[Any]) -> Array:
    """A copy of `value`, all of which must be within the dtype."""
    if not np.can_cast(value.dtype, dtype, "same_kind") and value.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be castable to {dtype}, got {value.dtype}")
    with np.errstate(all="ignore"):
        rounded = value.astype(dtype)
        lost = np.argwhere(np.isinf(rounded) & np.isfinite(value))
    if lost.size:
        index = tuple(lost[0].tolist())
        raise ValueError(f"{name} must be within {dtype}, got {value[index]} at index {index}")
    return rounded


def _count(value: NDArray[Any]) -> NDArray[np.int64]:
    """A counter, which averaging of checkpoints makes a float, and other frameworks an array of one value."""
    if value.dtype.name == "bfloat16":
        value = value.astype(np.float32)
    number = value.item() if value.size == 1 and value.dtype.kind in "iuf" else None
    if number is None or not 0 <= number < 2**63 or number != int(number):
        raise ValueError(f"num_batches_tracked must be a whole number of batches, got {value}")
    return np.array(int(number), np.int64)


def _check_variances(running_var: Array, eps: float) -> None:
    below = np.flatnonzero(running_var.astype(np.float64) + eps < 0)
    if below.size:
        channel = below[0]
        raise ValueError(
            f"running_var + eps must not be below zero: running_var[{channel}] is {running_var[channel]:g}, "
            f"and eps {eps:g}; give the eps the model was trained with, or mend the checkpoint"
        )
