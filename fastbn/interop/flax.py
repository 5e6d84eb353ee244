"""Flax: the variables of a linen BatchNorm become a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.modules import BatchNorm, _array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

# What Flax calls the arrays of either collection, and what PyTorch and fastbn call them.
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_PARAMETERS = {"scale": "weight", "bias": "bias"}


def from_flax(
    variables: Mapping[str, Any],
    name: str = "",
    *,
    momentum: float = 0.99,
    eps: float = 1e-5,
    axis: int = -1,
    dtype: DTypeLike = np.float32,
) -> BatchNorm:
    """A layer that computes what a BatchNorm of Flax (linen) does.

    Flax weighs the old value with its `momentum`, fastbn the new one with ``1 - momentum``; both average the
    biased variance then (``unbiased=False``).

    Parameters
    ----------
    variables : mapping
        What ``init`` gives, and training updates: ``{"params": ..., "batch_stats": ...}``. Flax is not
        imported. The variables of nnx are of this shape too, when taken apart by hand.
    name : str
        Where in the network the batch norm is, such as ``"block_0/BatchNorm_1"``; dots will do as well as
        slashes.
    momentum, eps, axis
        What the module was made with: variables do not tell. The defaults are those of Flax, and `momentum`
        is as Flax has it.
    dtype : {numpy.float32, numpy.float64}
        Of the layer, which weights are rounded to.

    Returns
    -------
    BatchNorm
        In evaluation mode (``use_running_average=True``). Values are copied and rounded to `dtype`. A `bias`
        without a `scale` gets a `weight` of ones. In training a batch with one value per channel is an error
        here, and has variance 0 in Flax.

    Raises
    ------
    TypeError
        If `variables` is not a mapping.
    ValueError
        If there is no batch norm at `name`, or its values are not those of one.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f'variables must be a mapping of "params" and "batch_stats", got {type(variables).__name__}'
        )
    path = name.replace(".", "/").strip("/").split("/") if name else []
    statistics = _at(variables.get("batch_stats", {}), path)
    if not _STATISTICS.keys() <= statistics.keys():
        found = list(_names(variables.get("batch_stats", {})))
        raise ValueError(
            f"variables have no mean and var at name {name!r} of batch_stats; "
            + (f"names of batch norms: {found}" if found else "there is no batch norm in them")
        )
    parameters = _at(variables.get("params", {}), path)
    unknown = [key for key in parameters if key not in _PARAMETERS]
    unknown += [key for key in statistics if key not in _STATISTICS]
    if unknown:
        raise ValueError(f"the variables at name {name!r} are not only those of a batch norm: {unknown}")
    mean = _array(statistics["mean"])
    if mean.ndim != 1:
        raise ValueError(
            f"mean at name {name!r} must have one axis, got shape {mean.shape}; of variables that are "
            f"replicated, take one replica (flax.jax_utils.unreplicate)"
        )
    layer = BatchNorm(
        mean.size,
        eps,
        1 - momentum,
        affine=bool(parameters),
        bias="bias" in parameters,
        axis=axis,
        unbiased=False,
        dtype=dtype,
    )
    named = {_STATISTICS[key]: value for key, value in statistics.items()}
    named |= {_PARAMETERS[key]: value for key, value in parameters.items()}
    layer.load_state_dict(layer.state_dict() | named)
    return layer.eval()


def _at(tree: Mapping[str, Any], path: list[str]) -> Mapping[str, Any]:
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return tree if isinstance(tree, Mapping) else {}


def _names(tree: Mapping[str, Any], start: str = "") -> Iterator[str]:
    if _STATISTICS.keys() <= tree.keys():
        yield start
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{start}/{key}" if start else key)
