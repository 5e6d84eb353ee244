"""BatchStats: the mean and variance of a batch per channel, which shards of the batch can pool exactly."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class BatchStats:
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
        Values per channel: N times the spatial size. With 0 the shard is empty and the rest means nothing.

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
        means = _float64_vector("mean", mean)
        variances = _float64_vector("var", var)
        if means.shape != variances.shape:
            raise ValueError(f"mean and var must be of one length, got {means.size} and {variances.size}")
        if (variances < 0).any():
            channel = int(np.argmax(variances < 0))
            raise ValueError(f"var must not be negative, got {variances[channel]} in channel {channel}")
        try:
            count = operator.index(count)
        except TypeError:
            raise TypeError(f"count must be an integer, got {type(count).__name__}") from None
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if hasattr(self, "count"):
            raise AttributeError("BatchStats is immutable: __init__ cannot be called again")
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
            mean_shift = share @ shift
            var = share @ (np.array([shard.var for shard in shards]) + np.square(shift - mean_shift))
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

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BatchStats is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BatchStats is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[type[BatchStats], tuple[ArrayLike, ArrayLike, int]]:
        return BatchStats, (self.mean, self.var, self.count)


# The slots' own setters, which the __setattr__ above does not stop.
_set_count = BatchStats.__dict__["count"].__set__
_set_mean = BatchStats.__dict__["mean"].__set__
_set_var = BatchStats.__dict__["var"].__set__


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    array.setflags(write=False)
    return array


def _float64_vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, one value per channel, got shape {array.shape}")
    if array.size and not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return _read_only(np.array(array, np.float64, order="C"))
