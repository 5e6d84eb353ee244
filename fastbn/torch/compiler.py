"""torch.compile: a backend that fuses in Dynamo's graph, and operators for the graphs of other backends."""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from fastbn import _kernels
from fastbn.torch import functional


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="fastbn")`` calls with a graph of the model.

    Each batch norm of the graph becomes a call of :func:`fastbn.torch.batch_norm`, together with the addition
    and the activation that follow it, wherever in the model's code they are. The rest of the graph runs as
    without compilation, or with ``options={"backend": "inductor"}`` is compiled by that backend.

    Raises
    ------
    ValueError
        If there are other `options`, or a `mode`.
    """
    then = dict(options or {})
    inner = then.pop("backend", None)
    if then or mode not in (None, "default"):
        raise ValueError(
            f"backend 'fastbn' takes no mode, and as its only option 'backend', which compiles the rest of "
            f"the graph; got mode={mode!r}, options={options!r}"
        )
    fuse(gm.graph, functional.batch_norm if inner is None else in_graph)
    gm.recompile()
    compiled: Callable[..., Any] = gm.forward if inner is None else lookup_backend(inner)(gm, example_inputs)
    return compiled


# Operators. They are functional, for only such can be given a gradient: what moves the running averages are
# operations of PyTorch's, which the compiler sees.


def in_graph(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """:func:`fastbn.torch.batch_norm` for a compiler to trace: one operator, or PyTorch's own operations."""
    if not _taken(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
    ):
        return functional.composite(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
            negative_slope,
        )  # fmt: skip
    running = (None, None) if training else (running_mean, running_var)
    y, mean, var = torch.ops.fastbn.batch_norm(
        input, *running, weight, bias, residual, eps, activation, negative_slope
    )
    if training and running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1]
        with torch.no_grad():
            for average, new in (running_mean, mean), (running_var, var * (count / (count - 1))):
                average.copy_((1 - momentum) * average.double() + momentum * new)
    return y


def _taken(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> bool:
    """Whether the operator does such a call: as `functional.why_not`, for tensors that have no memory yet."""
    if input.ndim < 2 or not eps > 0:
        return False
    if (running_mean is None) is not (running_var is None):
        return False
    C = input.shape[1]
    vectors = [vector for vector in (running_mean, running_var, weight, bias) if vector is not None]
    pairs = [(input.dtype, vector.dtype) for vector in vectors] or [(input.dtype, input.dtype)]
    others = vectors if residual is None else [*vectors, residual]
    return (
        all(pair in functional._DTYPES for pair in pairs)
        and all(t.device.type == "cpu" and t.layout is torch.strided for t in (input, *others))
        and all(vector.shape == (C,) for vector in vectors)
        and (residual is None or (residual.dtype == input.dtype and residual.shape == input.shape))
        and (
            input.numel() > C and 0 <= momentum <= 1
            if training
            else bool(running_mean is not None and input.numel())
        )
    )


def _forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the running averages if there are any, else by the batch. Returns those, too, in float64."""
    training = running_mean is None
    y, mean, var = functional._forward(
        input, running_mean, running_var, weight, bias, training, 0.0, eps, residual, activation,
        negative_slope, True,
    )  # fmt: skip
    return y, torch.from_numpy(mean), torch.from_numpy(var)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Any,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memory_format = functional._memory_format(input)
    grad_input = functional._empty_like(input, memory_format)
    grad_weight, grad_bias = (input.new_empty(input.shape[1]) for _ in range(2))
    grad_residual = None if residual is None else functional._empty_like(input, memory_format)
    arguments: tuple[Any, ...] = (
        grad_output, input, mean, var, weight, bias, residual, None,
        grad_input, grad_weight, grad_bias, grad_residual,
        training, eps, activation, negative_slope, torch.get_num_threads(),
    )  # fmt: skip
    _kernels.tensor_backward(*map(functional._told, arguments))
    return grad_input, grad_weight, grad_bias, input.new_empty(0) if grad_residual is None else grad_residual


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2))
    memory_format = torch.contiguous_format if input.is_contiguous() else functional._memory_format(input)
    return torch.empty_like(input, memory_format=memory_format), mean, var


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(input, memory_format=functional._memory_format(input))
    dtype = torch.promote_types(input.dtype, torch.float32)
    grad_weight, grad_bias = (input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))
    return dx, grad_weight, grad_bias, input.new_empty(0) if residual is None else torch.empty_like(dx)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, running_mean, _, weight, bias, residual, *options = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    if options[1] is None:  # no kink to be found again from these
        bias = residual = None
    ctx.save_for_backward(input, mean, var, weight, bias, residual)
    ctx.call = running_mean is None, options


def _gradients(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    input, mean, var, weight, bias, residual = ctx.saved_tensors
    training, options = ctx.call
    grad_input, grad_weight, grad_bias, grad_residual = torch.ops.fastbn.batch_norm_backward(
        grad_output, input, mean, var, training, weight, bias, residual, *options
    )
    if options[1] is None:
        grad_residual = grad_output
    needed = ctx.needs_input_grad
    grads = grad_input, None, None, grad_weight, grad_bias, grad_residual, None, None, None
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _no_gradients(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "torch.ops.fastbn.batch_norm has no second derivative; outside of compiled code "
        "fastbn.torch.batch_norm has one"
    )


def _register() -> torch.library.Library:
    library = torch.library.Library("fastbn", "FRAGMENT")  # "DEF" can be had once in a process only
    library.define(
        "batch_norm(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
        "Tensor? residual, float eps, str? activation, float negative_slope) "
        "-> (Tensor output, Tensor mean, Tensor var)",
        tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    )
    library.define(
        "batch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor var, bool training, "
        "Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, float negative_slope) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
        tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    )
    library.impl("batch_norm", _forward, "CPU")
    library.impl("batch_norm_backward", _backward, "CPU")
    torch.library.register_fake("fastbn::batch_norm", _forward_fake, lib=library)
    torch.library.register_fake("fastbn::batch_norm_backward", _backward_fake, lib=library)
    torch.library.register_autograd("fastbn::batch_norm", _gradients, setup_context=_save, lib=library)
    torch.library.register_autograd("fastbn::batch_norm_backward", _no_gradients, lib=library)
    return library


if not hasattr(torch.ops.fastbn, "batch_norm"):  # once in a process, also where a module is imported anew
    _library = _register()


# Fusion. Dynamo's graph is one straight line of calls. A batch norm, the addition behind it and the
# activation behind that become one call, where the last of them stood. Nobody else may read what is in
# between, and nothing on the way may change what the batch norm reads, or the mode that it is computed in.

# How activations are spelled, and their arguments behind the input.
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    F.relu6: ("relu6", ("inplace",)),
    F.hardtanh: ("relu6", ("min_val", "max_val", "inplace")),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.silu: ("silu", ("inplace",)),
    F.hardswish: ("hardswish", ("inplace",)),
    **dict.fromkeys((torch.relu, torch.relu_, "relu", "relu_"), ("relu", ())),
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")

_OURS = (functional.batch_norm, in_graph)
# What these put out shares memory with nothing.
_NEW = {
    *_OURS, F.batch_norm, F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d,
    torch.conv_transpose2d, torch.conv_transpose3d, torch.matmul, torch.add, operator.add,
}  # fmt: skip
# What changes none of its arguments, unless its name ends in "_" or it is told to.
_PURE = {*_OURS, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem}
_PURE_IN = (torch, F, torch._C._nn)


def fuse(graph: Graph, call: Callable[..., Any]) -> None:
    """Make `call` of each batch norm in a graph of Dynamo's, and of what can be fused with it."""
    signature = inspect.signature(F.batch_norm)
    for norm in [node for node in graph.nodes if node.target is F.batch_norm]:
        bound = signature.bind(*norm.args, **norm.kwargs)
        bound.apply_defaults()
        if type(_value(bound.arguments["input"])) is not FakeTensor:
            continue  # of a subclass of tensors, which has its own ways
        buffers = {bound.arguments["running_mean"], bound.arguments["running_var"]} - {None}
        chain: list[Node] = [norm]
        options: dict[str, Any] = {}
        for find in (_addition, _activation):
            last = chain[-1]
            behind = next(iter(last.users)) if len(last.users) == 1 else None
            found = None if behind is None else find(behind, last)
            if found is not None and _undisturbed([*chain, behind], buffers):
                chain.append(behind)
                options |= found
        with graph.inserting_before(chain[-1]):
            fused = graph.call_function(call, tuple(bound.arguments.values()), options)
        fused.meta = chain[-1].meta.copy()
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)


def _addition(node: Node, norm: Node) -> dict[str, Any] | None:
    """The residual, where `node` adds one to what `norm` puts out, and writes into nothing else."""
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
        return None
    first, second = node.args
    if node.target in (operator.iadd, "add_") and first is not norm:
        return None
    residual = second if first is norm else first
    ours, theirs = _value(norm), _value(residual)
    alike = (
        residual is not norm
        and isinstance(theirs, Tensor)
        and (theirs.shape, theirs.dtype, theirs.device) == (ours.shape, ours.dtype, ours.device)
    )
    return {"residual": residual} if alike else None


def _activation(node: Node, last: Node) -> dict[str, Any] | None:
    """Which activation `node` applies to what `last` puts out, if any."""
    activation, names = _ACTIVATIONS.get(node.target, ("", ()))
    if not activation or node.args[:1] != (last,) or len(node.args) > 1 + len(names):
        return None
    options = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    options.pop("inplace", None)
    if node.target is F.hardtanh:
        return {"activation": activation} if options == {"min_val": 0, "max_val": 6} else None
    if activation == "leaky_relu":
        slope = options.pop("negative_slope", 0.01)
        fits = not options and isinstance(slope, int | float) and slope > 0
        return {"activation": activation, "negative_slope": slope} if fits else None
    return None if options else {"activation": activation}


def _undisturbed(chain: list[Node], buffers: set[Any]) -> bool:
    """Whether the first of a chain may as well be computed where the last stands."""
    node = chain[0].next
    while node is not chain[-1]:
        if node not in chain and (buffers & set(node.all_input_nodes) or not _harmless(node)):
            return False
        node = node.next
    return True


def _harmless(node: Node) -> bool:
    """Whether a call changes no tensor that others may read but by the call, and no mode."""
    value = _value(node)
    if node.op in ("get_attr", "placeholder"):
        return True
    if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor | tuple | list | int):
        return False  # what changes modes puts out nothing of the kind
    if _in_place(node):
        counter = isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 0
        return counter or _is_new(node.args[0])
    return (
        node.op == "call_method"
        or node.target in _PURE
        or any(getattr(module, node.target.__name__, None) is node.target for module in _PURE_IN)
    )


def _in_place(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    told = any(value is True for value in node.args) or node.kwargs.get("inplace") or "out" in node.kwargs
    return name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv") or bool(told)


def _is_new(node: Any) -> bool:
    """Whether a value has memory of its own that only one call reads, the one that is asked about."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method") or len(node.users) != 1:
        return False
    return node.target in _NEW or (_in_place(node) and _is_new(node.args[0]))


def _value(node: Any) -> Any:
    """What Dynamo knows of a node's value; a tensor has shape and dtype, and no memory."""
    return node.meta.get("example_value") if isinstance(node, Node) else None
