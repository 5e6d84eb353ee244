"""BatchNorm1d, 2d and 3d: torch.nn's layers, whose forward calls fastbn's batch norm."""

# TorchScript compiles `forward`. It cannot read annotations that are strings, and of two conditions in one
# `if` it compiles the second even where the first is false for good.
# ruff: noqa: SIM102

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy

from fastbn.torch.functional import batch_norm_of_layer, check_activation, composite


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three have in common beyond torch.nn's.

    All state is torch.nn's, and options that it lacks have their defaults in the class: an instance of
    torch.nn's becomes one of these by its `__class__` alone, and back.
    """

    __constants__ = [  # noqa: RUF012
        *torch.nn.modules.batchnorm._BatchNorm.__constants__, "activation", "negative_slope",
    ]  # fmt: skip

    activation: str | None = None
    negative_slope: float = 0.01
    once: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        once: bool = False,
    ) -> None:
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.activation = activation
        self.negative_slope = negative_slope
        if once:
            self.once = True

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``; see :func:`fastbn.torch.batch_norm`."""
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return _leaf(self, input, residual, mask)
        return self._normalize(input, residual, mask, self.activation, self.negative_slope)

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str | None,
        negative_slope: float,
    ) -> Tensor:
        """:meth:`forward`, with an activation that need not be the layer's own."""
        if not torch.jit.is_scripting():
            if not is_compiling():
                return self._at_once(input, residual, mask, activation, negative_slope)
        # As torch.nn's own forward decides.
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            batches = self.num_batches_tracked
            if batches is not None:
                batches.add_(1)
                if self.momentum is None:
                    factor = 1.0 / float(batches)
        running_mean, running_var = self.running_mean, self.running_var
        bn_training = self.training or (running_mean is None and running_var is None)
        if self.training and not self.track_running_stats:
            running_mean, running_var = None, None
        if not torch.jit.is_scripting():
            return batch_norm_of_layer(
                input, running_mean, running_var, self.weight, self.bias, bn_training, factor, self.eps,
                residual, activation, negative_slope, mask,
            )  # fmt: skip
        return composite(
            input, running_mean, running_var, self.weight, self.bias, bn_training, factor, self.eps,
            residual, activation, negative_slope, mask,
        )  # fmt: skip

    def _at_once(
        self, input: Any, residual: Any, mask: Any, activation: str | None, negative_slope: float
    ) -> Tensor:
        """The same where nothing but the result counts."""
        self._check_input_dim(input)
        weight, bias, running_mean, running_var, batches = tensors_of(self)
        training, momentum = self.training, self.momentum
        bn_training = training or (running_mean is None and running_var is None)
        if not training:
            batches = None
        elif not self.track_running_stats or (self.once and _in_backward()):
            batches = running_mean = running_var = None
        if momentum is None:
            momentum = 0.0
            if batches is not None:
                batches.add_(1)
                momentum, batches = 1.0 / float(batches), None
        return batch_norm_of_layer(
            input, running_mean, running_var, weight, bias, bn_training, momentum, self.eps, residual,
            activation, negative_slope, mask, batches,
        )  # fmt: skip

    def _group(self) -> Any:
        """The processes to meet in a call, which has to keep its place among such calls; None without any."""
        return None

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.once:
            text += ", once=True"
        return text


_as_usual: dict[type, bool] = {}  # classes whose instances have nothing else under these names


def tensors_of(norm: Any) -> tuple[Any, ...]:
    """Weight, bias, running mean and variance, and number of batches, without the search for each of them."""
    cls = type(norm)
    usual = _as_usual.get(cls)
    if usual is None:
        names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        usual = _as_usual[cls] = (
            not any(hasattr(cls, name) for name in names)
            and getattr(cls, "__getattr__") is getattr(torch.nn.Module, "__getattr__")  # noqa: B009
            and getattr(cls, "__getattribute__") is getattr(object, "__getattribute__")  # noqa: B009
        )
    if usual:
        parameters, buffers = norm._parameters, norm._buffers
        try:
            return (
                parameters["weight"], parameters["bias"],
                buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"],
            )  # fmt: skip
        except KeyError:  # somebody has put something else in their places
            pass
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


def _in_backward() -> bool:
    """Whether autograd is at a backward pass; what is called then is computed by a checkpoint again."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def _leaf(module: Any, *args: Any) -> Any:
    """A call of the module in the graph that torch.fx traces, as of torch.nn's own layers, not its inside."""
    tracer = args[0].tracer
    while args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` by fastbn, of (N, C) and (N, C, L).

    Parameters, state and errors are PyTorch's. What comes on top is the same for 1d, 2d and 3d:

    Parameters
    ----------
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
        Applied last.
    negative_slope : float
        Of "leaky_relu".
    once : bool
        Move the averages once where ``torch.utils.checkpoint`` computes a call again in the backward pass.
        PyTorch's own layers move them twice, and so do these by default.

    Raises
    ------
    ValueError
        If `activation` is none of these.

    Notes
    -----
    A call may have a `residual`, which is added before the activation, and a `mask` of what is real:
    ``layer(input, residual, mask)``, see :func:`fastbn.torch.batch_norm`. Functions of PyTorch that fold a
    batch norm into a convolution, or exchange it for another, know nothing of an activation: there, keep it
    in a module of its own.

    A scripted layer is made of PyTorch's own operations, as is one that is traced, exported or compiled.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` by fastbn, of (N, C, H, W), with the options of :class:`BatchNorm1d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` by fastbn, of (N, C, D, H, W), with the options of :class:`BatchNorm1d`."""
