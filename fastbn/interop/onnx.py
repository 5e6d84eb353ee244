"""ONNX: a BatchNormalization node becomes a layer, and whole models run with their batch norms by fastbn."""

from __future__ import annotations

import math
import os
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fastbn.functional import batch_norm, batch_norm_forward, batch_stats, update_running
from fastbn.interop import _class_for_rank
from fastbn.modules import BatchNorm

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_DOMAINS = ("", "ai.onnx")  # the two spellings of ONNX's own


def from_onnx(model: Any, node: Any = None, *, dtype: DTypeLike = np.float32) -> BatchNorm:
    """A layer that computes what a BatchNormalization node of ONNX does.

    ONNX weighs the old value with `momentum`, fastbn the new one with ``1 - momentum``; both average the
    biased variance then (``unbiased=False``).

    Parameters
    ----------
    model : onnx.ModelProto, path or file
        Of opset 6 or later.
    node : str or onnx.NodeProto, optional
        The node, its name or that of its first output, in the model's main graph. May be left out where the
        graph has one BatchNormalization only.
    dtype : {numpy.float32, numpy.float64}
        Of the layer, which weights are rounded to.

    Returns
    -------
    BatchNorm
        BatchNorm1d, 2d or 3d where the rank of the node's input is stated in the model or can be inferred.
        Values may be initializers or results of nodes that need no input; they are copied and rounded to
        `dtype`. In training mode if the node is; a batch with one value per channel is an error here then,
        and has variance 0 in ONNX.

    Raises
    ------
    ValueError
        If no node or more than one fits, its parameters depend on an input of the graph, or it normalizes
        each activation by itself (``spatial=0``, opsets 6 and 7). If the model is damaged: values that are
        nowhere, a file of external data that is missing, a cycle, no opset.
    """
    folder = None
    if not isinstance(model, onnx.ModelProto):
        if isinstance(model, (str, os.PathLike)):
            folder = os.path.dirname(os.path.abspath(model))
        model = onnx.load(model, load_external_data=False)  # all weights, of which four are needed
    node = _find(model.graph, node)
    if len(node.input) != 5 or not all(node.input):
        raise ValueError(
            f"{_name(node)} must have the inputs X, scale, B, mean and var, got {list(node.input)}"
        )
    opsets = _opsets(model)
    schema = _schema(node, opsets)
    attributes = {name: a.default_value for name, a in schema.attributes.items()} | {
        a.name: a for a in node.attribute
    }
    attributes = {name: onnx.helper.get_attribute_value(a) for name, a in attributes.items()}
    if not attributes.get("spatial", 1):
        raise ValueError(
            f"{_name(node)} normalizes each activation by itself (spatial=0), which is no layer of C channels"
        )
    names = list(node.input[1:])
    arrays = _constants(model, opsets, names, folder)
    layer = _class_for_rank(_rank(model, node.input[0]))(
        arrays[0].size, attributes["epsilon"], 1 - attributes["momentum"], unbiased=False, dtype=dtype
    )
    keys = "weight", "bias", "running_mean", "running_var"
    layer.load_state_dict(dict(zip(keys, arrays, strict=True)))
    return layer.train(_training(schema, node, attributes))


class BatchNormalization(OpRun):
    """BatchNormalization of ONNX by fastbn, for ``onnx.reference.ReferenceEvaluator``.

    ``ReferenceEvaluator(model, new_ops=[BatchNormalization])`` runs every such node of the model by fastbn,
    those of subgraphs included: opsets 6 and later, inference and training, ``spatial=0`` too. The evaluator
    does not pass `new_ops` on to functions defined in the model; ``onnx.inliner.inline_local_functions``
    takes these apart first. Of the two spellings of ONNX's own domain it knows "" only, not "ai.onnx".

    Float32, float64, float16 and bfloat16; the latter two are computed in float32 and rounded once. A
    training node of opset 6 to 9 has outputs Y, mean, var, saved_mean and saved_var, of which the last is the
    biased variance of the batch (ONNX Runtime gives 1 / sqrt(variance + epsilon) there).

    Raises
    ------
    ValueError
        When a model is loaded, if its opset is below 6; when it is run, if shapes do not fit.
    TypeError
        When it is run, if a tensor is of another dtype.
    """

    op_domain = ""

    def __init__(self, onnx_node: Any, run_params: dict[str, Any], schema: Any = None) -> None:
        # OpRun would take the newest schema, which has not the attributes and defaults of the older ones.
        super().__init__(onnx_node, run_params, schema or _schema(onnx_node, run_params["opsets"]))

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, **attributes: Any) -> tuple[Any, ...]:
        shape, x_dtype, statistics_shape, statistics_dtype = x.shape, x.dtype, mean.shape, mean.dtype
        real = np.float64 if x_dtype == np.float64 else np.float32
        scale, bias, mean, var = (a.astype(real, copy=False) for a in (scale, bias, mean, var))
        if x.ndim == 1 or not attributes.get("spatial", 1):  # one channel; each activation is a channel
            x = x.reshape(len(x), math.prod(x.shape[1:]))
            scale, bias, mean, var = (a.ravel() for a in (scale, bias, mean, var))
        eps = float(attributes["epsilon"])
        if not _training(self._schema, self.onnx_node, attributes):
            y = batch_norm(x, mean, var, scale, bias, eps=eps)
            return (y.reshape(shape),)
        # With one value per channel ONNX has variance 0, and fastbn an error unless statistics are given.
        stats = batch_stats(x) if x.size == scale.size else None
        y, stats = batch_norm_forward(x, scale, bias, eps, stats=stats)
        mean, var = mean.copy(), var.copy()
        update_running(mean, var, stats, 1 - float(attributes["momentum"]), unbiased=False)
        statistics = [a.astype(statistics_dtype, copy=False) for a in (mean, var)]
        if self._schema.since_version < 14:
            statistics += [a.astype(x_dtype) for a in (stats.mean, stats.var)]
        return (
            y.reshape(shape),
            *(a.reshape(statistics_shape) for a in statistics),
        )


def _domain(domain: str) -> str:
    return "" if domain in _DOMAINS else domain


def _opsets(model: Any) -> dict[str, int]:
    return {_domain(opset.domain): opset.version for opset in model.opset_import}


def _schema(node: Any, opsets: dict[str, int]) -> Any:
    """The definition of BatchNormalization that holds for `node`."""
    opset = next((opsets[domain] for domain in _DOMAINS if domain in opsets), None)
    if opset is None:
        raise ValueError(
            f"the model says no opset of ONNX's own domain, in opset_import: there are {sorted(opsets)}"
        )
    schema = onnx.defs.get_schema("BatchNormalization", opset, "")
    if schema.since_version < 6:
        raise ValueError(
            f"BatchNormalization is supported from opset 6 on, got opset {opset}; "
            f"onnx.version_converter may help"
        )
    return schema


def _training(schema: Any, node: Any, attributes: dict[str, Any]) -> bool:
    if schema.since_version >= 14:
        return bool(attributes["training_mode"])
    if schema.since_version == 6:
        return not attributes["is_test"]
    return any(node.output[1:])  # opsets 7 and 9: by the outputs that are asked for


def _find(graph: Any, wanted: Any) -> Any:
    nodes = [n for n in graph.node if n.op_type == "BatchNormalization" and n.domain in _DOMAINS]
    found = nodes if wanted is None else [n for n in nodes if wanted in (n, n.name, n.output[0])]
    if len(found) != 1:
        asked = "node=None" if wanted is None else f"node {getattr(wanted, 'name', wanted)!r}"
        raise ValueError(
            f"{asked} fits {len(found)} BatchNormalization nodes of the graph, expected one of "
            f"{[_name(n) for n in nodes]}"
        )
    return found[0]


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


def _rank(model: Any, name: str) -> int | None:
    """The rank of a tensor, if the model states it or it follows from what the model states."""

    def stated(graph: Any) -> int | None:
        for value in (*graph.input, *graph.value_info):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                return len(value.type.tensor_type.shape.dim)
        return None

    return stated(model.graph) or stated(onnx.shape_inference.infer_shapes(model).graph)


def _constants(model: Any, opsets: dict[str, int], names: list[str], folder: str | None) -> list[Any]:
    """Values of tensors that are initializers or computed from nothing else."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output if output}
    depends: dict[str, list[str]] = {}
    needed = list(names)
    while needed:
        name = needed.pop()
        if name not in depends:
            node = None if name in initializers else producers.get(name)
            depends[name] = [source for source in node.input if source] if node is not None else []
            needed.extend(depends[name])
    try:
        order = list(TopologicalSorter(depends).static_order())
    except CycleError as error:
        raise ValueError(f"the graph has a cycle: {' <- '.join(map(str, error.args[1]))}") from None
    unknown = [name for name in order if name not in initializers and name not in producers]
    inputs = sorted({value.name for value in model.graph.input}.intersection(unknown))
    if inputs:
        raise ValueError(f"{names} depend on inputs of the graph, {inputs}: no values in the model")
    if unknown:
        raise ValueError(f"the model has no values for {unknown}: neither an initializer nor a node's output")
    nodes = []
    for name in order:
        if name not in initializers and producers[name] not in nodes:
            node = onnx.NodeProto()
            node.CopyFrom(producers[name])
            node.domain = _domain(node.domain)  # the evaluator knows one spelling
            nodes.append(node)
    tensors = [_loaded(initializers[name], folder) for name in order if name in initializers]
    graph = onnx.helper.make_graph(nodes, "constants", [], [], tensors)
    return list(ReferenceEvaluator(graph, opsets=opsets).run(names, {}))


def _loaded(tensor: Any, folder: str | None) -> Any:
    """The tensor, with its values where they are in another file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    location = {entry.key: entry.value for entry in tensor.external_data}.get("location")
    if folder is None:
        raise ValueError(
            f"the values of {tensor.name!r} are in the file {location!r}, which was not loaded with the "
            f"model; give the model's path, or load it by onnx.load"
        )
    try:
        onnx.external_data_helper.load_external_data_for_tensor(loaded, folder)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ValueError(
            f"the values of {tensor.name!r} are in the file {location!r} beside the model, which cannot be "
            f"read: {error}"
        ) from error
    loaded.data_location = onnx.TensorProto.DEFAULT
    del loaded.external_data[:]
    return loaded
