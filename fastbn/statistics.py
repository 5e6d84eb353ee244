"""BatchStats and GradSums: what parts of a batch tell per channel, and merge to that of the whole."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


class _Immutable:
    """What is set once, by the slots' own setters."""

    __slots__ = ()

    def _refuse_another_init(self) -> None:
        if hasattr(self, "count"):
            raise AttributeError(f"{type(self).__name__} is immutable: __init__ cannot be called again")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name!r}")


class BatchStats(_Immutable):
    """Mean and biased variance of each channel, and how many values of a channel they are taken over.

    Instances are immutable and picklable. Two compare equal when their counts and all their means and
    variances do; a NaN equals a NaN, so that a copy always equals its original.

    Parameters
    ----------
    mean : array_like of shape (C,)
        Mean of each channel. Copied to a read-only float64 array, as is `var`.
    var : array_like of shape (C,)
        Biased (population) variance of each channel.
    count : int
        Values per channel: N times the spatial size, or with a mask how many are real. With 0 the shard is
        empty and the rest means nothing.

    Raises
    ------
    ValueError
        If `mean` or `var` is not one-dimensional, their lengths differ, or a variance or `count` is negative.
    TypeError
        If `mean` or `var` does not hold real numbers or `count` is not an integer.
    """

    __slots__ = ("count", "mean", "var")

    count: int
    mean: NDArray[np.float64]
    var: NDArray[np.float64]

    def __init__(self, mean: ArrayLike, var: ArrayLike, count: int) -> None:
        means, variances, count = _vectors_and_count("mean", mean, "var", var, count)
        if (variances < 0).any():
            channel = int(np.argmax(variances < 0))
            raise ValueError(f"var must not be negative, got {variances[channel]} in channel {channel}")
        self._refuse_another_init()
        _set_mean(self, means)
        _set_var(self, variances)
        _set_count(self, count)

    @classmethod
    def _wrap(cls, mean: NDArray[np.float64], var: NDArray[np.float64], count: int) -> BatchStats:
        """Take over two read-only float64 vectors, unchecked and uncopied."""
        stats = cls.__new__(cls)
        _set_mean(stats, mean)
        _set_var(stats, var)
        _set_count(stats, count)
        return stats

    def merge(self, *others: BatchStats) -> BatchStats:
        """Statistics of all the shards together, as if their values had been one batch; also `a + b`.

        The pooling of Chan, Golub and LeVeque (1983), done for all shards at once: every term that enters a
        variance is a square, so nothing cancels, and order and grouping of shards matter to rounding only.

        Parameters
        ----------
        *others : BatchStats
            Shards with the same number of channels. An empty shard (count 0) changes nothing.

        Returns
        -------
        BatchStats

        Raises
        ------
        TypeError
            If one of `others` is not a BatchStats.
        ValueError
            If the numbers of channels differ.
        """
        for other in others:
            if not isinstance(other, BatchStats):
                raise TypeError(f"only BatchStats can be merged, got {type(other).__name__}")
            if other.mean.shape != self.mean.shape:
                sizes = f"{self.mean.size} and {other.mean.size}"
                raise ValueError(f"shards must have the same number of channels, got {sizes}")
        shards = [shard for shard in (self, *others) if shard.count]
        if len(shards) < 2:
            return shards[0] if shards else self
        count = sum(shard.count for shard in shards)
        share = np.array([shard.count / count for shard in shards])
        with np.errstate(invalid="ignore", over="ignore"):  # a channel may hold Inf or NaN
            # Means are pooled as differences from one of them, which keeps the digits of a mean that is large
            # compared with the deviation.
            origin = shards[0].mean
            shift = np.array([shard.mean - origin for shard in shards])
            mean_shift = _weighted(share, shift)
            spread = np.array([shard.var for shard in shards]) + np.square(shift - mean_shift)
            var = _weighted(share, spread)
        return BatchStats._wrap(_read_only(origin + mean_shift), _read_only(var), count)

    def __add__(self, other: BatchStats) -> BatchStats:
        return self.merge(other) if isinstance(other, BatchStats) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.var, other.var, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BatchStats(mean={self.mean!r}, var={self.var!r}, count={self.count})"

    def __reduce__(self) -> tuple[type[BatchStats], tuple[ArrayLike, ArrayLike, int]]:
        return BatchStats, (self.mean, self.var, self.count)


class GradSums(_Immutable):
    """Sums over a batch, or a part of one, that the gradients of the batch are made of.

    In each channel that of dz, the gradient that has passed the activation, and that of dz * (x - mean), with
    the mean of the whole batch. :func:`fastbn.batch_norm_backward_sums` takes them of a part of a batch; of
    all parts, merged, they are what :func:`fastbn.batch_norm_backward` wants as `sums` with each part.

    Instances are immutable and picklable. Two compare equal when their counts and all their sums do; a NaN
    equals a NaN, so that a copy always equals its original.

    Parameters
    ----------
    dz : array_like of shape (C,)
        Of each channel the sum of dz. Copied to a read-only float64 array, as is `dz_dev`.
    dz_dev : array_like of shape (C,)
        Of each channel the sum of dz * (x - mean): of dz times the deviation.
    count : int
        Values per channel: N times the spatial size, or with a mask how many are real. An empty part has sums
        of 0, and changes nothing; one of which nothing is real may have others.

    Raises
    ------
    ValueError
        If `dz` or `dz_dev` is not one-dimensional, their lengths differ, or `count` is negative.
    TypeError
        If `dz` or `dz_dev` does not hold real numbers or `count` is not an integer.
    """

    __slots__ = ("count", "dz", "dz_dev")

    count: int
    dz: NDArray[np.float64]
    dz_dev: NDArray[np.float64]

    def __init__(self, dz: ArrayLike, dz_dev: ArrayLike, count: int) -> None:
        of_dz, of_dz_dev, count = _vectors_and_count("dz", dz, "dz_dev", dz_dev, count)
        self._refuse_another_init()
        _set_dz(self, of_dz)
        _set_dz_dev(self, of_dz_dev)
        _set_sums_count(self, count)

    @classmethod
    def _wrap(cls, dz: NDArray[np.float64], dz_dev: NDArray[np.float64], count: int) -> GradSums:
        """Take over two read-only float64 vectors, unchecked and uncopied."""
        sums = cls.__new__(cls)
        _set_dz(sums, dz)
        _set_dz_dev(sums, dz_dev)
        _set_sums_count(sums, count)
        return sums

    def merge(self, *others: GradSums) -> GradSums:
        """Sums of all the parts together, added up in this order; also `a + b`.

        Parameters
        ----------
        *others : GradSums
            Parts with the same number of channels.

        Returns
        -------
        GradSums

        Raises
        ------
        TypeError
            If one of `others` is not a GradSums.
        ValueError
            If the numbers of channels differ.
        """
        for other in others:
            if not isinstance(other, GradSums):
                raise TypeError(f"only GradSums can be merged, got {type(other).__name__}")
            if other.dz.shape != self.dz.shape:
                sizes = f"{self.dz.size} and {other.dz.size}"
                raise ValueError(f"parts must have the same number of channels, got {sizes}")
        if not others:
            return self
        parts = (self, *others)
        with np.errstate(invalid="ignore", over="ignore"):  # a channel may hold Inf or NaN
            dz = np.sum([part.dz for part in parts], axis=0)
            dz_dev = np.sum([part.dz_dev for part in parts], axis=0)
        return GradSums._wrap(_read_only(dz), _read_only(dz_dev), sum(part.count for part in parts))

    def parameter_grads(
        self, stats: BatchStats, eps: float = 1e-5, *, dtype: DTypeLike = np.float32
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gradients of weight and bias: those of what was summed, be it a part or the whole batch.

        ``dz_dev / sqrt(var + eps)``, or 0 where that is no number for want of deviation, and ``dz``.

        Parameters
        ----------
        stats : BatchStats
            What the forward call normalized with.
        eps : float
            That of the forward call.
        dtype : {numpy.float32, numpy.float64}
            Of the parameters.

        Returns
        -------
        grad_weight, grad_bias : ndarray of `dtype`, shape (C,)

        Raises
        ------
        ValueError
            If `stats` are of another number of channels.
        """
        if stats.var.shape != self.dz.shape:
            raise ValueError(
                f"stats must be of {self.dz.size} channels, as the sums are, got {stats.var.size}"
            )
        v = stats.var + eps
        with np.errstate(all="ignore"):
            grad_weight = np.where(v == 0, 0.0, self.dz_dev / np.sqrt(v)).astype(dtype)
            return grad_weight, self.dz.astype(dtype)

    def __add__(self, other: GradSums) -> GradSums:
        return self.merge(other) if isinstance(other, GradSums) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradSums):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.dz, other.dz, equal_nan=True)
            and np.array_equal(self.dz_dev, other.dz_dev, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GradSums(dz={self.dz!r}, dz_dev={self.dz_dev!r}, count={self.count})"

    def __reduce__(self) -> tuple[type[GradSums], tuple[ArrayLike, ArrayLike, int]]:
        return GradSums, (self.dz, self.dz_dev, self.count)


# The slots' own setters, which the __setattr__ above does not stop.
_set_count = BatchStats.__dict__["count"].__set__
_set_mean = BatchStats.__dict__["mean"].__set__
_set_var = BatchStats.__dict__["var"].__set__
_set_sums_count = GradSums.__dict__["count"].__set__
_set_dz = GradSums.__dict__["dz"].__set__
_set_dz_dev = GradSums.__dict__["dz_dev"].__set__


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    array.setflags(write=False)
    return array


def _vectors_and_count(
    first: str, a: ArrayLike, second: str, b: ArrayLike, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    vectors = _float64_vector(first, a), _float64_vector(second, b)
    sizes = [vector.size for vector in vectors]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{first} and {second} must be of one length, got {sizes[0]} and {sizes[1]}")
    try:
        count = operator.index(count)
    except TypeError:
        raise TypeError(f"count must be an integer, got {type(count).__name__}") from None
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    return *vectors, count


def _weighted(share: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of the shards' values by their shares, in order: a BLAS has other bits on other machines."""
    total: NDArray[np.float64] = share[0] * values[0]
    for weight, value in zip(share[1:], values[1:], strict=True):
        total += weight * value
    return total


def _float64_vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, one value per channel, got shape {array.shape}")
    if array.size and not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return _read_only(np.array(array, np.float64, order="C"))
