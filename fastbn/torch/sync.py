"""SyncBatchNorm on CPUs: ranks of a gloo group normalize by the statistics of all their batches together."""

import copy
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch._C import _dispatch_keys
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

import fastbn
from fastbn.distributed import _Ranks
from fastbn.statistics import BatchStats, GradSums
from fastbn.torch import functional
from fastbn.torch.modules import _BatchNorm, _in_backward
from fastbn.torch.population import batch_stats

_TORCHS = torch.nn.modules.batchnorm._BatchNorm

# Activations whose mask the backward pass takes from the output.
_TOLD_BY_OUTPUT = (None, "relu", "relu6", "leaky_relu")


class BatchNorm(_BatchNorm):
    """Batch norm of inputs of any rank from 2 on: what a SyncBatchNorm is that is not synchronized."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class SyncBatchNorm(BatchNorm):
    """``torch.nn.SyncBatchNorm`` for CPUs, under DistributedDataParallel on gloo.

    In training the statistics are those of the batches of all ranks, merged exactly (Chan, Golub and
    LeVeque, 1983) in float64 from a mean, a variance and a count of each; the gradient goes through all of
    them. The ranks have the same statistics to the bit. There is no communication in evaluation, with one
    rank or without a process group.

    Batches may be of different sizes. A rank without any still has to call the layers, forward and backward,
    as all ranks have to in the same order. `residual` and `mask` of a call are as in
    :func:`fastbn.torch.batch_norm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in torch.nn.SyncBatchNorm.
    process_group : torch.distributed.ProcessGroup or None
        Whose ranks are merged; None for all.
    activation, negative_slope, once
        As in the other layers of fastbn.torch.

    Raises
    ------
    ValueError
        From a call, on every rank: if all ranks together have one value per channel, or if they are at
        different layers or in different passes. Where one rank gets a call wrong it raises what PyTorch does,
        and the others this.

    Notes
    -----
    grad_weight and grad_bias are those of a rank's own batch, which DistributedDataParallel averages. There
    is no second derivative. With ``torch.utils.checkpoint`` a layer communicates twice; its averages move
    twice, unless `once` says otherwise. :func:`fastbn.torch.accelerate`, before or after a conversion, fuses
    what is behind it.
    """

    process_group: Any = None
    _unsynced: type[Module] | None = None  # what it was before a conversion

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        once: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias,
            activation=activation, negative_slope=negative_slope, once=once,
        )  # fmt: skip
        self.process_group = process_group

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str | None,
        negative_slope: float,
    ) -> Tensor:
        group = self._group()
        if group is None:
            return super()._normalize(input, residual, mask, activation, negative_slope)
        running_mean, running_var = self.running_mean, self.running_var
        momentum = self.momentum
        if not self.track_running_stats or (self.once and _in_backward()):
            running_mean = running_var = None
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return _synchronized(
            input, running_mean, running_var, self.weight, self.bias, momentum or 0.0, self.eps, residual,
            activation, negative_slope, mask, _Ranks(_Group(group)),
        )  # fmt: skip

    def _group(self) -> Any:
        """The group to communicate in, if that is to be done now."""
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        new = type(self).__new__(type(self))
        memo |= {id(self): new, id(self.process_group): self.process_group}  # a group cannot be copied
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new


def convert_sync_batchnorm(module: Module, process_group: Any = None) -> Module:
    """Make every batch norm in a model a :class:`SyncBatchNorm`, in place.

    Only classes are exchanged: parameters, which an optimizer may know, buffers, hooks, activations and modes
    stay. To be called before the model is wrapped in DistributedDataParallel.

    Parameters
    ----------
    module : torch.nn.Module
    process_group : torch.distributed.ProcessGroup or None
        See :class:`SyncBatchNorm`.

    Returns
    -------
    torch.nn.Module
        `module`.

    Raises
    ------
    ValueError
        If a layer is lazy and has not seen an input yet, or is parametrized. Nothing has been converted then.

    Warns
    -----
    UserWarning
        If a layer's forward is neither torch.nn's nor fastbn's: it is left alone.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _TORCHS)}
    for name, layer in layers.items():
        if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
            raise ValueError(f"{name or 'module'} must have seen an input to be converted, it is {layer}")
        if is_parametrized(layer):
            raise ValueError(
                f"{name or 'module'} must not be parametrized to be converted; convert the model, and then "
                f"parametrize it"
            )
    for name, layer in layers.items():
        if not isinstance(layer, SyncBatchNorm):
            forwards = _TORCHS.forward, torch.nn.SyncBatchNorm.forward, _BatchNorm.forward
            if type(layer).forward not in forwards or "forward" in layer.__dict__:
                kind = type(layer).__name__
                warnings.warn(
                    f"{name or 'module'} stays as it is, because {kind} has a forward of its own",
                    stacklevel=2,
                )
                continue
            if not isinstance(layer, torch.nn.SyncBatchNorm):
                layer._unsynced = type(layer)
            layer.__class__ = SyncBatchNorm
        layer.process_group = process_group
    return module


def revert_sync_batchnorm(module: Module) -> Module:
    """Undo :func:`convert_sync_batchnorm`, in place; torch.nn's SyncBatchNorm, too.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `module`, whose layers have the classes that they had before they were converted. One that was not
        converted becomes a batch norm of inputs of any rank.
    """
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm | torch.nn.SyncBatchNorm):
            layer.__class__ = layer.__dict__.pop("_unsynced", None) or BatchNorm
            layer.__dict__.pop("process_group", None)
    return module


@_disable_dynamo  # a compiler's graph breaks here, where ranks meet
def _synchronized(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    mask: Tensor | None,
    ranks: _Ranks,
) -> Tensor:
    """:func:`fastbn.torch.batch_norm` in training, by the statistics of all ranks."""
    dtype = input.dtype
    if dtype in (torch.bfloat16, torch.float16):  # a half result is that of the widened input, rounded
        widened = [t if t is None else t.float() for t in (input, weight, bias, residual)]
        input, weight, bias, residual = widened
    real, own = None, BatchStats([], [], 0)

    def of_shard() -> BatchStats:
        nonlocal real, own
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        vectors = running_mean, running_var, weight, bias
        if any(vector is not None and len(vector) != input.size(1) for vector in vectors):
            functional.composite(input, *vectors, training=True)  # raises PyTorch's own error
        real = None if mask is None else functional._mask_like(mask, input)
        own = batch_stats(input) if real is None else _masked_stats(input, real)
        return own

    stats: BatchStats = ranks.merge(of_shard, 0)
    if stats.count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 on all ranks of the group "
            f"together, input size {input.size()} on this one"
        )
    if (
        real is None
        and activation in _TOLD_BY_OUTPUT
        and (activation != "leaky_relu" or negative_slope > 0)
        and functional.why_not(input, None, None, weight, bias, True, residual, 0.0, eps) is None
    ):
        y = _Fused.apply(input, weight, bias, residual, stats, eps, activation, negative_slope, ranks)
    else:
        y = _Composite.apply(input, weight, bias, real, stats, own.count, eps, ranks)
        y = functional.activate(y if residual is None else y + residual, activation, negative_slope)
    if stats.count and running_mean is not None and running_var is not None:
        new = stats.mean, stats.var * (stats.count / (stats.count - 1))
        with torch.no_grad():
            for average, values in zip((running_mean, running_var), map(torch.tensor, new), strict=True):
                average.copy_((1 - momentum) * average.double() + momentum * values)
    return y.to(dtype)


class _Fused(torch.autograd.Function):
    """By the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: BatchStats,
        eps: float,
        activation: Any,
        negative_slope: float,
        ranks: _Ranks,
    ) -> Tensor:
        contiguous = input.is_contiguous()
        memory_format = torch.contiguous_format if contiguous else functional._memory_format(input)
        y = functional._room_for(input, memory_format)
        x, w, b, r = map(functional._array, (input, weight, bias, residual))
        array, _ = fastbn.batch_norm_forward(
            x, w, b, eps, stats=stats, residual=r, activation=activation, negative_slope=negative_slope,
            out=functional._array(y), num_threads=torch.get_num_threads(),
        )  # fmt: skip
        if y is None:
            y = functional._as_tensor(array, memory_format)
        # Where a residual was added, the output tells which side of the kink a value is on.
        ctx.save_for_backward(
            input, weight, bias, y if residual is not None and activation is not None else None
        )
        ctx.call = stats, eps, activation, negative_slope, ranks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, y = ctx.saved_tensors
        stats, eps, activation, negative_slope, ranks = ctx.call
        of_input, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
        if _dispatch_keys(grad_output).raw_repr() not in functional._KEYS_WITHOUT_GRAD:
            grad_output = grad_output.clone()  # of a tensor that has no memory, or is negated by a bit
        memory_format = functional._memory_format(input)
        dx = functional._room_for(input, memory_format) if of_input else None
        dy, x, w, b, output = map(functional._array, (grad_output, input, weight, bias, y))
        threads = torch.get_num_threads()
        sums = fastbn.batch_norm_backward_sums(
            dy, x, stats, w, b, eps, output=output, activation=activation, negative_slope=negative_slope,
            num_threads=threads,
        )  # fmt: skip
        dtype = "float64" if input.dtype == torch.float64 else "float32"
        grad_weight, grad_bias = map(torch.from_numpy, sums.parameter_grads(stats, eps, dtype=dtype))
        pooled = ranks.merge(lambda: sums, 0) if of_input else None
        through_activation = of_residual and y is not None  # else it is grad_output itself
        grads = fastbn.batch_norm_backward(
            dy, x, stats, w, b, eps, training=of_input, sums=pooled, output=output, activation=activation,
            negative_slope=negative_slope, out=functional._array(dx), num_threads=threads,
            needs=["input"] * of_input + ["residual"] * through_activation,
        )  # fmt: skip
        if of_input and dx is None:
            dx = functional._as_tensor(grads.grad_input, memory_format)
        if through_activation:
            grad_output = functional._as_tensor(grads.grad_residual, memory_format)
        return (
            dx if of_input else None,
            grad_weight if of_weight else None,
            grad_bias if of_bias else None,
            grad_output if of_residual else None,
            None, None, None, None, None,
        )  # fmt: skip


class _Composite(torch.autograd.Function):
    """By PyTorch's operations in float64: with a mask, of what is wider than float32, of an empty batch."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        real: Tensor | None,
        stats: BatchStats,
        count: int,
        eps: float,
        ranks: _Ranks,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, real)
        ctx.call = stats, count, eps, ranks
        y = _deviation(input, stats) * _scale(input, weight, stats, eps)
        return (y if bias is None else y + _column(bias, y)).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, real = ctx.saved_tensors
        stats, count, eps, ranks = ctx.call
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        dz, dev = grad_output.double(), _deviation(input, stats)
        if real is not None:  # what is not finite under False is in no sum
            dev = torch.where(real | dev.isfinite(), dev, 0.0)
        others = [axis for axis in range(input.ndim) if axis != 1]
        sums = GradSums(dz.sum(others).cpu().numpy(), (dz * dev).sum(others).cpu().numpy(), count)
        dx = grad_weight = grad_bias = None
        if of_weight:
            grad_weight = torch.tensor(sums.dz_dev / np.sqrt(stats.var + eps)).to(weight)
        if of_bias:
            grad_bias = torch.tensor(sums.dz).to(bias)
        if of_input:
            pooled, n = ranks.merge(lambda: sums, 0), max(stats.count, 1)
            through = _column(pooled.dz / n, dz) + dev * _column(pooled.dz_dev / n / (stats.var + eps), dz)
            if real is not None:
                through = torch.where(real, through, 0.0)
            dx = ((dz - through) * _scale(input, weight, stats, eps)).to(input.dtype)
            if not stats.count:  # a mask has left nothing
                dx.zero_()
        return dx, grad_weight, grad_bias, None, None, None, None, None


def _deviation(input: Tensor, stats: BatchStats) -> Tensor:
    if not stats.count:  # nothing is left but the bias
        return torch.zeros_like(input, dtype=torch.float64)
    return input.double() - _column(stats.mean, input)


def _scale(input: Tensor, weight: Tensor | None, stats: BatchStats, eps: float) -> Tensor:
    scale = _column((stats.var + eps) ** -0.5, input)
    return scale if weight is None else scale * _column(weight, input)


def _column(vector: Any, like: Tensor) -> Tensor:
    """A value for each channel, in float64, of a shape that goes with `like`."""
    column = torch.tensor(vector) if isinstance(vector, np.ndarray) else vector.detach()
    return column.to(like.device, torch.float64).view(-1, *[1] * (like.ndim - 2))


def _masked_stats(input: Tensor, real: Tensor) -> BatchStats:
    """Those of the True positions; all else is left out by selection."""
    x = input.detach().movedim(1, -1)[real.squeeze(1)].double()
    if not len(x):
        return BatchStats(np.zeros(input.shape[1]), np.zeros(input.shape[1]), 0)
    var, mean = torch.var_mean(x, 0, correction=0)
    return BatchStats(mean.cpu().numpy(), var.cpu().numpy(), len(x))


class _Group:
    """A process group, as fastbn.distributed wants what it merges over."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = distributed.get_world_size(group)

    def all_gather(self, vector: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        rows = torch.empty(self.size, len(vector), dtype=torch.float64)
        distributed.all_gather(list(rows), torch.from_numpy(vector), self.group)
        return list(rows.numpy())
