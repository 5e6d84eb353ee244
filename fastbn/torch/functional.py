"""Batch norm of tensors: by fastbn's kernels where they take a call as it is, otherwise by PyTorch itself.

Whatever is unusual about a call, PyTorch's own path gives the result or raises the error. What the kernels
take is an allow-list, in :func:`why_not`; they see the memory of the tensors in place, and what they return
is as PyTorch's would be: same strides, same gradients, same statistics.
"""

# TorchScript compiles `composite` and what it calls, and cannot read annotations that are strings.
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_keys,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastbn import _kernels

# What the kernels have: (dtype of input and output, dtype of parameters and statistics).
_DTYPES = {
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
}
_INPUT_DTYPES = {dtype for dtype, _ in _DTYPES}

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")

# A tensor is plain if it is of these classes and has these dispatch keys: then it is not sparse, nested, on
# another device, negated by a bit, batched by vmap, functionalized, or of a subclass. Those made in inference
# mode cannot be saved for a backward pass.
_TYPES = {Tensor, torch.nn.Parameter}
with torch.inference_mode(False):
    _PLAIN = _dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
with torch.inference_mode():
    _PLAIN_IN_INFERENCE = _dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
_KEYS_WITH_GRAD, _KEYS_WITHOUT_GRAD = {_PLAIN}, {_PLAIN, _PLAIN_IN_INFERENCE}

# Since PyTorch 2.10 a tensor tells the kernels through DLPack's table of C functions where it is.
_EXCHANGE = hasattr(Tensor, "__dlpack_c_exchange_api__")

# Both must know DLPack's first stable version.
_DLPACK = hasattr(torch._C, "_to_dlpack_versioned") and np.lib.NumpyVersion(np.__version__) >= "2.1.0"

# From so many bytes on an output is in memory that fastbn keeps and hands out again, see fastbn.outputs.
_KEPT_FROM = 1 << 18


def batch_norm(
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
    mask: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, with a residual and an activation in the same pass over memory.

    ``activation(batch_norm(input) + residual)``, differentiable in `input`, `weight`, `bias` and `residual`.

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
    running_mean, running_var : Tensor of shape (C,), or None
        Updated in place in training, needed otherwise.
    weight, bias : Tensor of shape (C,), or None
    training : bool
        Normalize with the statistics of `input`, and update the running ones.
    momentum : float
        Weight of the new value in the running ones.
    eps : float
        Added to the variance.
    residual : Tensor, or None
        Added before the activation; broadcast as by ``+``, at full speed where it has the shape of `input`.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
    negative_slope : float
        Of "leaky_relu".
    mask : Tensor of bool, or None
        Which positions are real. Of the shape of `input` without its channels, or one that broadcasts to it.
        Statistics and averages are those of the True positions; the output is computed everywhere. What is at
        False positions reaches no other one, NaN included. With no True at all the output is `bias`, and no
        average moves.

    Returns
    -------
    Tensor
        Of the dtype, shape and memory format that PyTorch's own has. What is computed by the kernels and has
        256 KB or more is in memory that fastbn keeps (see :func:`fastbn.set_output_cache`).

    Raises
    ------
    ValueError
        If `activation` is none of these, if `mask` has another shape or a single True a channel in training.
    TypeError
        If `mask` is not of bool.
    Exception
        All else is raised by PyTorch itself, as it does for ``torch.nn.functional.batch_norm``.

    Notes
    -----
    Unlike PyTorch, a backward pass in evaluation mode uses the running statistics of the forward pass, also
    where they have moved since. Saved for the backward pass are `input`, `weight`, with an activation `bias`,
    and with a residual behind it the output, where it tells the derivative ("relu", "relu6", "leaky_relu" of
    a slope above 0), otherwise `residual`; changing one of these in place in between raises PyTorch's error.
    """
    check_activation(activation)
    return batch_norm_of_layer(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
        negative_slope, mask,
    )  # fmt: skip


def batch_norm_of_layer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Any,
    negative_slope: float,
    mask: Tensor | None = None,
    counter: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm`, which adds one to the number of batches, too."""
    if mask is not None and not training and not torch.is_grad_enabled():
        mask = None  # evaluation takes no statistics
    if mask is None and _EXCHANGE and not is_compiling():
        # In one call, whatever is as usual; the rest of this function takes what is not.
        found = _kernels.torch_forward(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
            negative_slope, counter, torch.get_num_threads(),
        )  # fmt: skip
        if found is not None:
            if found[1] is None:
                return found[0]
            return _apply(input, weight, bias, residual, (found, training, eps, activation, negative_slope))
    if counter is not None:
        counter.add_(1)
    if (
        mask is None
        and why_not(input, running_mean, running_var, weight, bias, training, residual, momentum, eps) is None
    ):
        wants_grad = torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        try:
            done = _forward(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
                negative_slope, wants_grad,
            )  # fmt: skip
        except (TypeError, ValueError):
            # What the kernels refuse and PyTorch may take, such as running statistics that share memory or
            # are below -eps. They check before they write.
            pass
        else:
            if not wants_grad:
                return done[0]
            return _apply(input, weight, bias, residual, (done, training, eps, activation, negative_slope))
    return composite(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
        negative_slope, mask,
    )  # fmt: skip


def composite(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm` by PyTorch's own operations, one after the other."""
    if mask is None:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        y = _masked(input, running_mean, running_var, weight, bias, training, momentum, eps, mask)
    if residual is not None:
        y = y + residual
    return activate(y, activation, negative_slope)


def activate(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    if activation is None:
        return z
    if activation == "relu":
        z = F.relu(z)
    elif activation == "relu6":
        z = F.relu6(z)
    elif activation == "leaky_relu":
        z = F.leaky_relu(z, negative_slope)
    elif activation == "silu":
        z = F.silu(z)
    elif activation == "hardswish":
        z = F.hardswish(z)
    return z


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        *others, last = map(repr, ACTIVATIONS)
        raise ValueError(f"activation must be {', '.join(others)} or {last}, got {activation!r}")


def why_not(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> str | None:
    """Why the kernels do not take a call of :func:`batch_norm`, in words; None where they do."""
    reason = _watched()
    if reason is not None:
        return reason
    plain_keys = _KEYS_WITH_GRAD if torch.is_grad_enabled() else _KEYS_WITHOUT_GRAD
    if type(input) not in _TYPES or _dispatch_keys(input).raw_repr() not in plain_keys:
        return f"input is {_kind(input)}"
    shape = input.shape
    if len(shape) < 2:
        return f"input has shape {tuple(shape)}"
    C = shape[1]
    dtype = input.dtype
    for vector in running_mean, running_var, weight, bias:
        if vector is not None and (
            type(vector) not in _TYPES
            or _dispatch_keys(vector).raw_repr() not in plain_keys
            or (dtype, vector.dtype) not in _DTYPES
            or vector.dim() != 1
            or vector.numel() != C
        ):
            vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight}
            name = next((name for name, value in vectors.items() if value is vector), "bias")
            if type(vector) not in _TYPES or _dispatch_keys(vector).raw_repr() not in plain_keys:
                return f"{name} is {_kind(vector)}"
            if (dtype, vector.dtype) not in _DTYPES:
                return f"input is of {dtype}, {name} of {vector.dtype}"
            return f"{name} has shape {tuple(vector.shape)}, for {C} channels"
    values = input.numel()
    if dtype not in _INPUT_DTYPES:
        return f"input is of {dtype}"
    if residual is not None:
        if type(residual) not in _TYPES or _dispatch_keys(residual).raw_repr() not in plain_keys:
            return f"residual is {_kind(residual)}"
        if residual.dtype is not dtype:
            return f"residual is of {residual.dtype}, input of {dtype}"
        if residual.shape != shape:
            return f"residual has shape {tuple(residual.shape)}, input {tuple(shape)}"
    if values == 0:
        return "input is empty"
    if (running_mean is None) is not (running_var is None):
        return "only one of running_mean and running_var is given"
    if running_mean is None:
        if training is not True:
            return "there are no running statistics to evaluate with"
    elif running_mean.requires_grad or running_var.requires_grad:  # type: ignore[union-attr]
        return "running statistics require a gradient"
    if training is True:
        if values == C:
            return "there is one value per channel"
    elif training is not False:
        return f"training is {training!r}"
    if not (isinstance(momentum, (float, int)) and (0 <= momentum <= 1 or not training)):
        return f"momentum is {momentum!r}"
    if not (isinstance(eps, (float, int)) and 0 < eps < inf):
        return f"eps is {eps!r}"
    return None


def _watched() -> str | None:
    """What PyTorch is at that has to see every operation, so that none may be done behind its back."""
    if is_compiling():
        return "a compiler follows the call"
    if _is_tracing():
        return "torch.jit.trace follows the call"
    if _are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    if _len_torch_dispatch_stack():
        return "a TorchDispatchMode is at work"
    if _len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is at work"
    return None


def _kind(value: Any) -> str:
    """What something is that is no plain tensor."""
    if type(value) not in _TYPES:
        return f"of type {type(value).__name__}"
    keys = torch._C._dispatch_keyset_to_string(_dispatch_keys(value))
    return f"a tensor of {value.layout} on {value.device} with keys {keys}"


def _memory_format(t: Tensor) -> torch.memory_format:
    """That of gradients of such an input, as PyTorch's batch norm chooses it."""
    ndim = t.dim()
    if ndim != 4 and ndim != 5:
        return torch.contiguous_format
    channels_last = torch.channels_last if ndim == 4 else torch.channels_last_3d
    if not t.is_contiguous() and t.is_contiguous(memory_format=channels_last):
        return channels_last
    strides = t.stride()  # the rest is TensorImpl::suggest_memory_format
    if strides[1] > strides[-1] or strides[1] == 0:
        return torch.contiguous_format
    shape = t.shape
    least = 0
    for d in (1, *range(ndim - 1, 1, -1), 0):
        if strides[d] < least:
            return torch.contiguous_format
        least = strides[d] * shape[d]
    return channels_last


def _room_for(t: Tensor, memory_format: torch.memory_format) -> Tensor | None:
    """A tensor to write a result for `t` into; None where the array that a kernel makes is as good."""
    if t.nbytes >= _KEPT_FROM and t.itemsize > 2 and t.is_contiguous(memory_format=memory_format):
        return None  # NumPy has no bfloat16 of its own
    return torch.empty_like(t, memory_format=memory_format)


def _empty_like(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor for a result for `t`."""
    y = _room_for(t, memory_format)
    return _as_tensor(_kernels.kept_like(_told(t)), memory_format) if y is None else y


def _as_tensor(array: Any, memory_format: torch.memory_format) -> Tensor:
    """A new array of the kernels as a tensor, which is no view and so may be changed in place."""
    t = torch.from_numpy(array)
    if 1 in array.shape:  # a stride that means nothing, and that NumPy and PyTorch choose differently
        t.resize_(array.shape, memory_format=memory_format)
    return t


def _told(argument: Any) -> Any:
    """What the kernels take for a tensor."""
    if _EXCHANGE or type(argument) not in _TYPES:
        return argument
    dtype = str(argument.dtype).removeprefix("torch.")
    return argument.data_ptr(), dtype, argument.shape, argument.stride()


class _Exported:
    """What numpy.from_dlpack asks for."""

    __slots__ = ("capsule",)

    def __init__(self, t: Tensor) -> None:
        self.capsule = torch._C._to_dlpack_versioned(t)

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def _array(t: Tensor | None) -> Any:
    """The memory of a plain tensor. Unlike Tensor.numpy(), DLPack leaves it resizable, as FSDP needs it."""
    if t is None:
        return None
    return np.from_dlpack(_Exported(t)) if _DLPACK else t.detach().numpy()


def _forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Any,
    negative_slope: float,
    want_stats: bool,
) -> tuple[Tensor, Any, Any]:
    """The output, and if wanted mean and variance of what it was normalized with, in float64.

    Also of the running statistics these are copies: they may move before the backward pass.
    """
    memory_format = torch.contiguous_format if input.is_contiguous() else _memory_format(input)
    y = _empty_like(input, memory_format)
    mean = var = None
    if want_stats:
        C = input.shape[1]
        mean, var = np.empty(C), np.empty(C)
    arguments: tuple[Any, ...] = (
        input, y, residual, weight, bias, running_mean, running_var, mean, var, None,
        training, momentum, eps, activation, negative_slope, torch.get_num_threads(),
    )  # fmt: skip
    _kernels.tensor_forward(*(arguments if _EXCHANGE else map(_told, arguments)))
    return y, mean, var


def _backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Any,
    var: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    needs: tuple[bool, ...],
    training: bool,
    eps: float,
    activation: Any,
    negative_slope: float,
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual, as far as they are needed."""
    of_input, of_weight, of_bias, of_residual, _ = needs
    memory_format = _memory_format(input)
    grad_input = _empty_like(input, memory_format) if of_input else None
    vector = input.new_empty(input.shape[1]) if weight is None else weight
    grad_weight = torch.empty_like(vector) if of_weight else None
    grad_bias = torch.empty_like(vector) if of_bias else None
    through_activation = of_residual and activation is not None  # else it is grad_output itself
    grad_residual = _empty_like(input, memory_format) if through_activation else None
    arguments: tuple[Any, ...] = (
        grad_output, input, mean, var, weight, bias, residual, output,
        grad_input, grad_weight, grad_bias, grad_residual,
        training, eps, activation, negative_slope, torch.get_num_threads(),
    )  # fmt: skip
    _kernels.tensor_backward(*(arguments if _EXCHANGE else map(_told, arguments)))
    if of_residual and not through_activation:
        grad_residual = grad_output
    return grad_input, grad_weight, grad_bias, grad_residual


class _BatchNorm(torch.autograd.Function):
    """The gradient of what `_forward` has done."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: tuple[Any, ...],
    ) -> Tensor:
        (y, mean, var), training, eps, activation, negative_slope = call
        output = None
        if activation is None:
            bias = residual = None  # without a kink to find again they do not matter
        elif residual is not None and _output_tells(activation, negative_slope):
            residual, output = None, y  # which what follows mostly keeps in any case
        ctx.save_for_backward(input, weight, bias, residual, output)
        ctx.set_materialize_grads(False)
        ctx.call = mean, var, training, eps, activation, negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        saved = ctx.saved_tensors
        if _EXCHANGE and not is_compiling():
            found = _kernels.torch_backward(
                grad_output, saved, ctx.call, ctx.needs_input_grad, torch.get_num_threads()
            )
            if found is not None:
                return found
        if (
            torch.is_grad_enabled()
            or type(grad_output) not in _TYPES
            or _dispatch_keys(grad_output).raw_repr() not in _KEYS_WITHOUT_GRAD
            or _watched() is not None
        ):
            return _differentiable_backward(ctx, grad_output, saved)
        mean, var, *call = ctx.call
        input, weight, bias, residual, output = saved
        grads = _backward(
            grad_output, input, mean, var, weight, bias, residual, output, ctx.needs_input_grad, *call
        )
        return *grads, None


# Past autograd.Function.apply, which unwraps what is left over of torch.func: nothing plain.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def _output_tells(activation: str | None, negative_slope: float) -> bool:
    """Whether the output of an activation tells on which side of its kinks the input lies."""
    return activation in ("relu", "relu6") or (activation == "leaky_relu" and negative_slope > 0)


def _differentiable_backward(
    ctx: Any, grad_output: Tensor, saved: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch's own operations, which it can differentiate, batch and watch."""
    input: Any
    input, weight, bias, residual, output = saved
    mean, var, training, eps, activation, negative_slope = ctx.call
    create_graph = torch.is_grad_enabled()
    running = (None, None)
    if not training:
        dtype = next(parameter for dtype, parameter in _DTYPES if dtype is input.dtype)
        running = torch.from_numpy(mean).to(dtype), torch.from_numpy(var).to(dtype)
    with torch.enable_grad():
        # Aliases, so that the hooks of the tensors themselves are not called once more.
        leaves = [None if t is None else t.view_as(t) for t in (input, weight, bias, residual)]
        if ctx.needs_input_grad[2] and bias is None:  # not kept where no gradient depends on their values
            leaves[2] = input.new_zeros(input.shape[1], requires_grad=True)
        if ctx.needs_input_grad[3] and residual is None:
            leaves[3] = torch.zeros_like(input, requires_grad=True)
        input, weight, bias, residual = leaves
        if output is None:
            y = composite(
                input, *running, weight, bias, training, 0.0, eps, residual, activation, negative_slope
            )
        else:
            y = composite(input, *running, weight, bias, training, 0.0, eps, residual)
            y = _as_output_tells(y, output.detach(), activation, negative_slope)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        found = torch.autograd.grad(y, [leaves[i] for i in wanted], grad_output, create_graph=create_graph)
    grads: list[Tensor | None] = [None] * 5
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _as_output_tells(z: Tensor, output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Something with the gradient of the activation where that gave this output."""
    if activation == "leaky_relu":
        return torch.where(output > 0, z, negative_slope * z)
    cut = output <= 0
    if activation == "relu6":
        cut |= output >= 6
    return torch.where(cut, torch.zeros((), dtype=z.dtype), z)


def _masked(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    mask: Tensor,
) -> Tensor:
    """Batch norm with the statistics of the True positions, in float64. Selects, never multiplies."""
    real = _mask_like(mask, input)
    column = [1] * input.dim()
    column[1] = -1
    others = list(range(input.dim()))
    others.pop(1)
    x = input.double()
    count = int(real.sum())
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var are needed unless training=True, got None")
        mean, var = running_mean.double().view(column), running_var.double().view(column)
    elif count == 0:
        x = torch.where(real, x, 0.0)  # an empty batch
        mean, var = torch.zeros_like(x[:1]), torch.ones_like(x[:1])
    elif count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got a mask with a single True"
        )
    else:
        mean = torch.where(real, x, 0.0).sum(others, keepdim=True) / count
        deviation = torch.where(real, x - mean, 0.0)
        var = (deviation * deviation).sum(others, keepdim=True) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                new_mean = running_mean + momentum * (mean.flatten() - running_mean)
                new_var = running_var + momentum * (var.flatten() * (count / (count - 1)) - running_var)
                running_mean.copy_(new_mean)
                running_var.copy_(new_var)
    scale = torch.rsqrt(var + eps)
    shift = torch.zeros_like(scale)
    if weight is not None:
        scale = scale * weight.double().view(column)
    if bias is not None:
        shift = shift + bias.double().view(column)
    # What is not finite under False is put out as it comes, but its gradients would be NaN in every sum.
    usable = real | x.isfinite()
    y = (torch.where(usable, x, 0.0) - mean) * scale + shift
    rest = (x - mean) * scale + shift
    return torch.where(usable, y, rest.detach()).to(input.dtype)


def _mask_like(mask: Tensor, input: Tensor) -> Tensor:
    """The mask with a channel axis of 1."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of torch.bool, True where input is real, got {mask.dtype}")
    shape = list(input.shape)
    if len(shape) < 2:
        raise ValueError(f"input must have at least 2 dimensions (batch and channels), got shape {shape}")
    shape.pop(1)
    fits = mask.dim() <= len(shape)
    if fits:
        for i in range(mask.dim()):
            size = mask.size(mask.dim() - 1 - i)
            fits = fits and (size == 1 or size == shape[len(shape) - 1 - i])
    if not fits:
        raise ValueError(
            f"mask must have the shape of input without its channels, {shape}, or one that broadcasts to it, "
            f"got {list(mask.shape)}"
        )
    return mask.expand(shape).unsqueeze(1)


if _EXCHANGE:
    _kernels.learn_torch(torch, _memory_format, _PLAIN, _PLAIN_IN_INFERENCE)
