"""PyTorch: a module, or a state dict from wherever it was kept, becomes a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:
    from numpy.typing import NDArray


def from_torch(module_or_state_dict: Any, prefix: str = "") -> BatchNorm:
    """A layer that computes what a batch norm of PyTorch does.

    Parameters
    ----------
    module_or_state_dict : torch.nn.Module or mapping of str to array_like
        A batch norm, a network that has one, or a state dict: PyTorch's own, an open .npz file, what
        safetensors loads. PyTorch is imported for a module only.
    prefix : str
        Where in the network or state dict the batch norm is, such as ``"layer1.0.bn1"``.

    Returns
    -------
    BatchNorm
        BatchNorm1d, 2d or 3d where the module is one. Values are copied, from any device, and rounded to
        float32. A module passes on its mode, `eps` and `momentum`. A state dict knows none of these: the
        layer is in evaluation mode with PyTorch's defaults, ``eps=1e-5`` and ``momentum=0.1``; set them if
        the model had others.

    Raises
    ------
    TypeError
        If there is no batch norm at `prefix`, or one whose `forward` is not PyTorch's own.
    ValueError
        If a state dict has no running statistics at `prefix`, or entries that are not a batch norm's.
    AttributeError
        If a network has no module at `prefix`.
    """
    prefix = prefix.rstrip(".")
    if isinstance(module_or_state_dict, Mapping):
        state = _state_at(module_or_state_dict, prefix)
        layer = _layer(BatchNorm, state["running_mean"].size, state)
        return layer.eval()

    import torch

    if not isinstance(module_or_state_dict, torch.nn.Module):
        raise TypeError(
            f"module_or_state_dict must be a torch.nn.Module or a mapping, "
            f"got {type(module_or_state_dict).__name__}"
        )
    module = module_or_state_dict.get_submodule(prefix)
    torch_batch_norm = torch.nn.modules.batchnorm._BatchNorm
    if not isinstance(module, torch_batch_norm):
        found = [
            name for name, child in module.named_modules(prefix=prefix) if isinstance(child, torch_batch_norm)
        ]
        raise TypeError(
            f"the module at prefix {prefix!r} must be a batch norm of PyTorch, got {type(module).__name__}; "
            f"{_candidates(found)}"
        )
    # A subclass may do more than normalize, such as apply an activation, which would be lost without a word.
    if type(module).forward not in (torch_batch_norm.forward, torch.nn.SyncBatchNorm.forward):
        raise TypeError(
            f"{type(module).__name__} has a forward of its own, which is not converted; "
            f"from_torch(module.state_dict()) takes its weights alone"
        )
    kinds = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
    kind = next((kind for kind in kinds if isinstance(module, getattr(torch.nn, kind.__name__))), BatchNorm)
    state = {name: _array(value) for name, value in module.state_dict().items()}
    layer = _layer(kind, module.num_features, state, eps=module.eps, momentum=module.momentum)
    return layer.train(module.training)


def _state_at(state_dict: Mapping[str, Any], prefix: str) -> dict[str, NDArray[Any]]:
    start = f"{prefix}." if prefix else ""
    if f"{start}running_mean" not in state_dict:
        found = [name.removesuffix("running_mean") for name in state_dict if name.endswith("running_mean")]
        raise ValueError(
            f"state dict has no {start + 'running_mean'!r}, by which a batch norm is told from other layers; "
            f"{_candidates([name.removesuffix('.') for name in found])}"
        )
    return {
        name.removeprefix(start): _array(value)
        for name, value in state_dict.items()
        if name.startswith(start)
    }


def _candidates(prefixes: list[str]) -> str:
    return f"prefixes of batch norms: {prefixes}" if prefixes else "there is no batch norm in it"


def _array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a tensor, perhaps on another device or of a dtype that NumPy has not
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _layer(
    kind: type[BatchNorm], num_features: int, state: dict[str, NDArray[Any]], **options: Any
) -> BatchNorm:
    layer = kind(
        num_features,
        affine="weight" in state,
        bias="bias" in state,
        track_running_stats="running_mean" in state,
        **options,
    )
    layer.load_state_dict(state)
    return layer
