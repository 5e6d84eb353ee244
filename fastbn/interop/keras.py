"""Keras 3 and 2: a BatchNormalization layer, or its weights, becomes a layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.interop import _class_for_rank
from fastbn.modules import BatchNorm, _array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

# What Keras calls the arrays, in the order of get_weights(), and what PyTorch and fastbn call them.
_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_STATISTICS = ["moving_mean", "moving_variance"]


def from_keras(layer_or_weights: Any, name: str = "", *, dtype: DTypeLike = np.float32) -> BatchNorm:
    """A layer that computes what a BatchNormalization of Keras 3 or 2 (tf_keras) does.

    Keras weighs the old value with its `momentum`, fastbn the new one with ``1 - momentum``, along the same
    `axis`. Keras 3 averages the biased variance then (``unbiased=False``). Keras 2 averages the unbiased one
    in its fused implementation, taken by itself for inputs of 4 or 5 axes with the channels second or
    last, and the biased one in the other; the layer does as its `fused` says.

    Parameters
    ----------
    layer_or_weights : BatchNormalization of Keras, model, list or mapping
        A layer that has been built, on any backend; a model that has one; what its
        ``get_weights()`` gives; or a mapping of the names "gamma", "beta", "moving_mean" and
        "moving_variance" to arrays, of which the first two may be missing. Keras is never imported.
    name : str
        Which layer of a model: its name, behind those of the models it is nested in, as in
        ``"backbone/bn1"``.
    dtype : {numpy.float32, numpy.float64}
        Of the layer, which weights are rounded to.

    Returns
    -------
    BatchNorm
        BatchNorm1d, 2d or 3d where the layer knows the rank of its input. Values are copied and rounded to
        `dtype`. In evaluation mode, as a Keras layer is when it is called without ``training=True``; in
        training a batch with one value per channel is an error here, and has variance 0 in Keras. Weights
        alone come without options: the layer then has Keras' defaults, ``momentum=0.01`` (0.99 there),
        ``eps=1e-3`` and ``axis=-1``; set them if the model had others. A `beta` without a `gamma`
        (``scale=False``) gets a `weight` of ones.

    Raises
    ------
    TypeError
        If it is none of these, a model without the name of a batch normalization, or a layer whose `call` is
        not Keras' own.
    ValueError
        If the layer has not been built, uses batch renormalization, virtual batches or several axes, or the
        weights are not those of a batch normalization.
    """
    if isinstance(layer_or_weights, Mapping):
        return _layer(BatchNorm, layer_or_weights, dtype)
    if isinstance(layer_or_weights, (list, tuple)):
        names = {2: _STATISTICS, 4: list(_NAMES)}.get(len(layer_or_weights))
        if names is None:
            raise ValueError(
                f"weights must be {list(_NAMES)} or {_STATISTICS}, got {len(layer_or_weights)} arrays; "
                f"a mapping with names tells a lone gamma from a lone beta"
            )
        return _layer(BatchNorm, dict(zip(names, layer_or_weights, strict=True)), dtype)

    layer = layer_or_weights
    if name:
        layer = next((found for path, found in _batch_norms(layer) if path == name), layer)
    keras = next((keras for keras in _loaded() if isinstance(layer, keras.layers.BatchNormalization)), None)
    if keras is None or (name and layer is layer_or_weights):
        found = [path for path, _ in _batch_norms(layer_or_weights)]
        listed = f"; names of batch norms: {found}" if found else ""
        raise TypeError(
            f"layer_or_weights must be a keras.layers.BatchNormalization, its weights or a mapping, or a "
            f"model and the name of such a layer, got {type(layer).__name__} and name {name!r}{listed}"
        )
    if type(layer).call is not keras.layers.BatchNormalization.call:
        raise TypeError(
            f"{type(layer).__name__} has a call of its own, which is not converted; "
            f"from_keras(layer.get_weights()) takes its weights alone"
        )
    if not layer.built:
        raise ValueError(f"{layer.name} has no weights yet; call it once, or its build(input_shape)")
    # Keras 3 has the first since 3.14 only, and not the others.
    for option in "renorm", "virtual_batch_size", "adjustment":
        if getattr(layer, option, None):
            kind = "batch renormalization (renorm=True)" if option == "renorm" else option
            raise ValueError(
                f"{layer.name} uses {kind}, which trains differently; "
                f"for inference, pass a mapping of {list(_NAMES)}"
            )
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)  # Keras 2 keeps a list
    if len(axes) != 1:
        raise ValueError(f"{layer.name} normalizes along several axes, {axes}; fastbn has one channel axis")
    weights = {name: getattr(layer, name) for name in _NAMES}
    if hasattr(keras, "ops"):
        arrays = {name: keras.ops.convert_to_numpy(w) for name, w in weights.items() if w is not None}
    else:  # Keras 2
        arrays = {name: w.numpy() for name, w in weights.items() if w is not None}
    return _layer(
        _class_for_rank(layer.input_spec.ndim),
        arrays,
        dtype,
        momentum=layer.momentum,
        eps=layer.epsilon,
        axis=axes[0],
        unbiased=bool(getattr(layer, "fused", False)),
    )


def _loaded() -> list[Any]:
    """Keras 3 and Keras 2, as far as they are imported: whoever has a layer has imported its Keras."""
    modules = [sys.modules.get(name) for name in ("keras", "tf_keras")]
    return [module for module in modules if hasattr(module, "layers")]


def _batch_norms(model: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    kinds = tuple(keras.layers.BatchNormalization for keras in _loaded())
    for layer in getattr(model, "layers", ()):
        if isinstance(layer, kinds):
            yield f"{start}{layer.name}", layer
        yield from _batch_norms(layer, f"{start}{layer.name}/")


def _layer(
    kind: type[BatchNorm],
    weights: Mapping[str, Any],
    dtype: DTypeLike,
    momentum: float = 0.99,
    eps: float = 1e-3,
    axis: int = -1,
    unbiased: bool = False,
) -> BatchNorm:
    unknown = [name for name in weights if name not in _NAMES]
    missing = [name for name in _STATISTICS if name not in weights]
    if unknown or missing:
        raise ValueError(f"weights must have names of {list(_NAMES)}; missing {missing}, unknown {unknown}")
    layer = kind(
        _array(weights["moving_mean"]).size,
        eps,
        1 - momentum,
        affine="gamma" in weights or "beta" in weights,
        bias="beta" in weights,
        axis=axis,
        unbiased=unbiased,
        dtype=dtype,
    )
    layer.load_state_dict(layer.state_dict() | {_NAMES[name]: weights[name] for name in weights})
    return layer.eval()
