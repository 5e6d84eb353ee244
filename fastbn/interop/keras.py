"""Keras 3: a BatchNormalization layer, or its weights, becomes a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastbn.interop import _class_for_rank
from fastbn.modules import BatchNorm

# What Keras calls the arrays, in the order of get_weights(), and what PyTorch and fastbn call them.
_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_STATISTICS = ["moving_mean", "moving_variance"]


def from_keras(layer_or_weights: Any) -> BatchNorm:
    """A layer that computes what a BatchNormalization of Keras 3 does.

    Keras weighs the old value with its `momentum`, fastbn the new one with ``1 - momentum``; both average the
    biased variance then (``unbiased=False``), along the same `axis`.

    Parameters
    ----------
    layer_or_weights : keras.layers.BatchNormalization, list or mapping
        A layer that has been built, on any backend; what its ``get_weights()`` gives; or a mapping of the
        names "gamma", "beta", "moving_mean" and "moving_variance" to arrays, of which the first two may be
        missing. Keras is imported for a layer only.

    Returns
    -------
    BatchNorm
        BatchNorm1d, 2d or 3d where the layer knows the rank of its input. Values are copied and rounded to
        float32. In evaluation mode, as a Keras layer is when it is called without ``training=True``; in
        training a batch with one value per channel is an error here, and has variance 0 in Keras. Weights
        alone come without options: the layer then has Keras' defaults, ``momentum=0.01`` (0.99 there),
        ``eps=1e-3`` and ``axis=-1``; set them if the model had others. A `beta` without a `gamma`
        (``scale=False``) gets a `weight` of ones.

    Raises
    ------
    TypeError
        If it is neither of these.
    ValueError
        If the layer has not been built or uses batch renormalization, or the weights are not those of a
        batch normalization.
    """
    if isinstance(layer_or_weights, Mapping):
        return _layer(BatchNorm, layer_or_weights)
    if isinstance(layer_or_weights, (list, tuple)):
        names = {2: _STATISTICS, 4: list(_NAMES)}.get(len(layer_or_weights))
        if names is None:
            raise ValueError(
                f"weights must be {list(_NAMES)} or {_STATISTICS}, got {len(layer_or_weights)} arrays; "
                f"a mapping with names tells a lone gamma from a lone beta"
            )
        return _layer(BatchNorm, dict(zip(names, layer_or_weights, strict=True)))

    import keras

    layer = layer_or_weights
    if not isinstance(layer, keras.layers.BatchNormalization):
        raise TypeError(
            "layer_or_weights must be a keras.layers.BatchNormalization, its weights or a mapping, "
            f"got {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(f"{layer.name} has no weights yet; call it once, or its build(input_shape)")
    if getattr(layer, "renorm", False):  # Keras has it since 3.14 only
        raise ValueError(
            f"{layer.name} uses batch renormalization (renorm=True), which trains differently; "
            f"for inference, pass a mapping of {list(_NAMES)}"
        )
    weights = {name: getattr(layer, name) for name in _NAMES}
    return _layer(
        _class_for_rank(layer.input_spec.ndim),
        {name: keras.ops.convert_to_numpy(w) for name, w in weights.items() if w is not None},
        momentum=layer.momentum,
        eps=layer.epsilon,
        axis=layer.axis,
    )


def _layer(
    kind: type[BatchNorm],
    weights: Mapping[str, Any],
    momentum: float = 0.99,
    eps: float = 1e-3,
    axis: int = -1,
) -> BatchNorm:
    unknown = [name for name in weights if name not in _NAMES]
    missing = [name for name in _STATISTICS if name not in weights]
    if unknown or missing:
        raise ValueError(f"weights must have names of {list(_NAMES)}; missing {missing}, unknown {unknown}")
    layer = kind(
        np.size(weights["moving_mean"]),
        eps,
        1 - momentum,
        affine="gamma" in weights or "beta" in weights,
        bias="beta" in weights,
        axis=axis,
        unbiased=False,
    )
    layer.load_state_dict(layer.state_dict() | {_NAMES[name]: weights[name] for name in weights})
    return layer.eval()
