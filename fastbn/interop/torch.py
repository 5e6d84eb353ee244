"""PyTorch: a module, or a state dict from wherever it was kept, becomes a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, _array

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

# torch.nn has these, and torchvision, detectron2 and others the last, by this very name.
_KINDS: dict[str, type[BatchNorm]] = {
    "BatchNorm1d": BatchNorm1d,
    "BatchNorm2d": BatchNorm2d,
    "BatchNorm3d": BatchNorm3d,
    "SyncBatchNorm": BatchNorm,
    "FrozenBatchNorm2d": BatchNorm2d,
}


def from_torch(
    module_or_state_dict: Any,
    prefix: str = "",
    *,
    eps: float | None = None,
    dtype: DTypeLike = np.float32,
) -> BatchNorm:
    """A layer that computes what a batch norm of PyTorch does.

    Parameters
    ----------
    module_or_state_dict : torch.nn.Module or mapping of str to array_like
        A batch norm, a network that has one, or a state dict: PyTorch's own, an open .npz file, what
        safetensors loads. TorchScript modules, scripted or traced, and the FrozenBatchNorm2d of detection
        networks are taken too. PyTorch is imported for a module only.
    prefix : str
        Where in the network or state dict the batch norm is, such as ``"layer1.0.bn1"``.
    eps : float, optional
        In place of what the module says, or of the default where it says nothing.
    dtype : {numpy.float32, numpy.float64}
        Of the layer, which weights are rounded to.

    Returns
    -------
    BatchNorm
        BatchNorm1d, 2d or 3d where the module is one. Values are copied, from any device, and rounded to
        `dtype`. A module passes on its mode, `eps` and `momentum`. A state dict knows none of these: the
        layer is in evaluation mode with PyTorch's defaults, ``eps=1e-5`` and ``momentum=0.1``; set them if
        the model had others. A FrozenBatchNorm2d normalizes by its buffers in either mode: its layer is in
        evaluation mode. `track_running_stats` is passed on as it stands, whatever buffers there are.

    Raises
    ------
    TypeError
        If there is no batch norm at `prefix`, or one whose `forward` is not PyTorch's own.
    ValueError
        If a state dict has no running statistics at `prefix`, or entries that are not a batch norm's; if a
        value is beyond `dtype`, a variance plus `eps` below zero, the counter no whole number, or `eps`
        missing for a module that keeps none.
    AttributeError
        If a network has no module at `prefix`.
    """
    prefix = prefix.rstrip(".")
    if isinstance(module_or_state_dict, Mapping):
        state = _state_at(module_or_state_dict, prefix)
        return _layer(BatchNorm, state, 1e-5 if eps is None else eps, dtype).eval()

    import torch

    if not isinstance(module_or_state_dict, torch.nn.Module):
        raise TypeError(
            f"module_or_state_dict must be a torch.nn.Module or a mapping, "
            f"got {type(module_or_state_dict).__name__}"
        )
    module = module_or_state_dict
    for name in prefix.split(".") if prefix else ():  # get_submodule, which TorchScript has not
        module = getattr(module, name)
    if not isinstance(module, torch.nn.Module) or not _is_batch_norm(module):
        found = (
            [name for name, child in module.named_modules(prefix=prefix) if _is_batch_norm(child)]
            if isinstance(module, torch.nn.Module)
            else []
        )
        raise TypeError(
            f"the module at prefix {prefix!r} must be a batch norm of PyTorch, got {_class_name(module)}; "
            f"{_candidates(found)}"
        )
    name = _class_name(module)
    torch_batch_norm = torch.nn.modules.batchnorm._BatchNorm
    # A subclass may do more than normalize, such as apply an activation, which would be lost without a word.
    if isinstance(module, torch_batch_norm):
        own = type(module).forward not in (torch_batch_norm.forward, torch.nn.SyncBatchNorm.forward)
    else:
        own = name not in _KINDS
    if own:
        raise TypeError(
            f"{name} has a forward of its own, which is not converted; "
            f"from_torch(module.state_dict()) takes its weights alone"
        )
    kinds = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
    kind = next((k for k in kinds if isinstance(module, getattr(torch.nn, k.__name__))), None)
    options = _options(module)
    if eps is not None:
        options["eps"] = eps
    if options.get("eps") is None:
        raise ValueError(f"{name} at prefix {prefix!r} does not tell its eps; give it, as eps=1e-5 (or 0)")
    state = {key: _array(value) for key, value in module.state_dict().items()}
    num_features = getattr(module, "num_features", None)
    layer = _layer(kind or _KINDS.get(name, BatchNorm), state, options["eps"], dtype, num_features)
    layer.momentum = options["momentum"]
    layer.track_running_stats = options["track_running_stats"]
    return layer.train(options["training"])


def _class_name(module: Any) -> str:
    """Its class, and of a TorchScript module that which it was made from."""
    return str(getattr(module, "original_name", type(module).__name__))


def _is_batch_norm(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or _class_name(module) in _KINDS


def _options(module: Any) -> dict[str, Any]:
    import torch

    if _class_name(module) == "FrozenBatchNorm2d":
        return {
            "eps": getattr(module, "eps", None),
            "momentum": 0.1,
            "track_running_stats": True,
            "training": False,
        }
    if isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "eps"):
        # Traced: the numbers are in its program only.
        graph = module.inlined_graph  # kept, or its nodes are invalid
        node = graph.findNode("aten::batch_norm")
        if node is None:
            raise TypeError(
                f"the traced {_class_name(module)} does not call PyTorch's batch norm; "
                f"from_torch(module.state_dict()) takes its weights alone"
            )
        training, momentum, eps = (value.toIValue() for value in list(node.inputs())[5:8])
        return {"eps": eps, "momentum": momentum, "track_running_stats": True, "training": training}
    return {name: getattr(module, name) for name in ("eps", "momentum", "track_running_stats", "training")}


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


def _layer(
    kind: type[BatchNorm],
    state: Mapping[str, NDArray[Any]],
    eps: float,
    dtype: DTypeLike,
    num_features: int | None = None,
) -> BatchNorm:
    sizes = [state[name].size for name in ("running_mean", "weight") if name in state]
    if num_features is None and not sizes:
        raise ValueError(
            "a traced batch norm without parameters and running statistics has nothing to convert"
        )
    layer = kind(
        num_features or sizes[0],
        eps,
        affine="weight" in state,
        bias="bias" in state,
        track_running_stats="running_mean" in state,
        dtype=dtype,
    )
    layer.load_state_dict(state)
    return layer
