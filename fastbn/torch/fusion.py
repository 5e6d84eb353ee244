"""A model by fastbn, in place: `accelerate`, its undo `restore`, and `record`, which tells what was done.

Nothing in the model is moved or replaced: modules get another class, and keep their parameters, hooks and
names. Batch norms get fastbn's; a Sequential gets a subclass whose forward looks at what comes behind a batch
norm; any other module with a batch norm whose result goes into an activation or an addition gets a subclass
whose methods are rewritten (rewriting.py) to let the batch norm wait for them. Whether one waits, and what it
is fused with, is decided at every call, by what stands there then: a module that was exchanged, a hook, a
tensor of another shape or dtype, and all is computed one after the other, as it was written.
"""

from __future__ import annotations

import copyreg
import operator
from abc import ABCMeta
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from fastbn.torch.functional import _DTYPES, _watched, why_not
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm, tensors_of
from fastbn.torch.rewriting import Roles, rewrite

_FAST = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}

_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
# With the arguments that may follow the first.
_ACTIVATION_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu6: ("relu6", ("inplace",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.silu: ("silu", ("inplace",)),
    F.hardswish: ("hardswish", ("inplace",)),
}
_TENSORS = {Tensor, nn.Parameter}
_KERNEL_DTYPES = {input for input, _ in _DTYPES}


# ---- what happens at a call


class _Waiting:
    """A batch norm with its input, not computed yet because what follows may go into the same pass."""

    __slots__ = ("norm", "residual", "version", "x")

    def __init__(self, norm: _BatchNorm, x: Tensor) -> None:
        self.norm: Any = norm
        self.x: Any = x
        self.residual: Any = None
        self.version: int | None = None

    def takes(self, residual: Any) -> bool:
        """Whether the residual can be added in the same pass; it is kept then."""
        x = self.x
        if (
            self.residual is not None
            or type(residual) not in _TENSORS
            or residual.dtype is not x.dtype
            or residual.shape != x.shape
            or residual.device != x.device
            or residual.layout is not torch.strided
        ):
            return False
        self.residual = residual
        return True

    def compute(self, activation: str | None = None, negative_slope: float = 0.01) -> Any:
        norm, x, residual, version = self.norm, self.x, self.residual, self.version
        self.norm = self.x = self.residual = None  # the name that this is bound to may live on
        if version is not None and x._version != version:
            raise RuntimeError(
                f"the input of {type(norm).__name__}({norm.num_features}) was changed in place by a module "
                f"that runs behind it and does not have it as an argument: leave what contains the two out, "
                f"by accelerate(model, exclude=[...])"
            )
        if residual is None and activation is None:
            return norm(x)
        if _records:
            _tell(norm, x, residual, None, activation, "", _records)
        return norm._normalize(x, residual, None, activation, negative_slope)


def _has_kernel(module: Any, dtype: torch.dtype) -> bool:
    """Whether the kernels take an input of that dtype with the parameters and averages of a layer."""
    weight, _, running_mean, _, _ = tensors_of(module)
    vector = running_mean if weight is None else weight
    return dtype in _KERNEL_DTYPES if vector is None else (dtype, vector.dtype) in _DTYPES


def _defer(module: Any, x: Any) -> Any:
    """``module(x)``, in which the last batch norm waits if it may."""
    if is_compiling():  # spares the compiler what follows, which would come to the same
        return module(x)
    forward = getattr(type(module), "forward", None)
    if forward is _norm_forward:
        seen = _is_seen(module)
        if (
            type(x) in _TENSORS
            and x.is_cpu
            and _has_kernel(module, x.dtype)
            and module.activation is None
            and seen is None
            and _watched() is None
            and x.dim() > 1
            and x.shape[1] == module.num_features  # or it raises an error, which its own line should
        ):
            return _Waiting(module, x)
        if _records and seen is not None:
            with _reason(module, f"it {seen}"):
                return module(x)
    elif forward is _sequential_forward and _is_seen(module) is None and _watched() is None:
        return _in_turn(module, x)
    return module(x)


def _in_turn(modules: Iterable[Any], x: Any) -> Any:
    """What a Sequential computes, in which the last batch norm waits if it may."""
    for module in modules:
        if type(x) is _Waiting:
            activation = _activation(module)
            if type(activation) is tuple:
                x = x.compute(*activation)
                continue
            x = _unfused(x, activation)
        x = _defer(module, x)
    return x


def _settle(waiting: Any, module: Any, *args: Any) -> Any:
    """What waits, computed if ``module(*args)``, which comes next, could have to do with it."""
    if type(waiting) is not _Waiting or waiting.norm is None:
        return waiting
    norm, x = waiting.norm, waiting.x
    if norm._group() is not None:
        return _unfused(waiting, "ranks meet in it, and in the order that is written")
    if (
        waiting.residual is not None
        or not isinstance(module, nn.Module)
        or any(inner is norm for inner in module.modules())
        or any(_may_share_memory(x, each) for each in args)
    ):
        return _unfused(waiting, "what is computed between might change its input")
    if not x.is_inference():
        waiting.version = x._version
    return waiting


def _may_share_memory(x: Tensor, other: Any) -> bool:
    if other is None or isinstance(other, (bool, int, float, str)):
        return False
    if type(other) not in _TENSORS:
        return True
    try:
        mine, others = x.untyped_storage(), other.untyped_storage()
        start, end = mine.data_ptr(), mine.data_ptr() + mine.nbytes()
        return bool(start < others.data_ptr() + others.nbytes() and others.data_ptr() < end)
    except (RuntimeError, NotImplementedError):  # without memory of the usual kind
        return True


def _add(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """``operation(a, b)``, in which the addition waits if it may; at most one of the two waits."""
    known = operation is operator.add or operation is operator.iadd or operation is torch.add
    if type(b) is _Waiting:
        # The strides of a sum are those of the first summand; where it is fused, those of the batch norm.
        if known and type(a) in _TENSORS and a.stride() == b.x.stride() and b.takes(a):
            return b
        return operation(a, _unfused(b, "the other summand is unlike it"))
    if type(a) is _Waiting:
        return a if known and a.takes(b) else operation(_unfused(a, "the other summand is unlike it"), b)
    return operation(a, b)


def _act(waiting: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``function(waiting, *args, **kwargs)``, in one pass with what waits if it can be."""
    if type(waiting) is not _Waiting:
        return function(waiting, *args, **kwargs)
    activation = _activation(function, args, kwargs)
    if type(activation) is tuple:
        return waiting.compute(*activation)
    return function(_unfused(waiting, activation), *args, **kwargs)


def _force(waiting: Any) -> Any:
    """What waits, computed; one that has been taken in a branch before is left, as nothing reads it."""
    return waiting.compute() if type(waiting) is _Waiting and waiting.norm is not None else waiting


_HELPERS: dict[str, Callable[..., Any]] = {
    "defer": _defer,
    "settle": _settle,
    "add": _add,
    "plus": operator.add,
    "iadd": operator.iadd,
    "act": _act,
    "force": _force,
}


def _activation(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """(activation, negative_slope), or in words why there is none that can be fused."""
    slope: Any = 0.01
    name = _ACTIVATION_MODULES.get(type(function))
    if name is not None:
        seen = _is_seen(function)
        if seen is not None:
            return f"{type(function).__name__} behind it {seen}"
        if args or kwargs or (name == "relu6" and not (function.min_val == 0 and function.max_val == 6)):
            return f"{function} behind it is called in an unusual way"
        if name == "leaky_relu":
            slope = function.negative_slope
    elif isinstance(function, nn.Module):
        return f"{type(function).__name__} comes behind it"
    else:
        try:
            name, options = _ACTIVATION_FUNCTIONS[function]
        except (KeyError, TypeError):
            return f"{getattr(function, '__name__', function)} comes behind it"
        if len(args) > len(options):
            return f"{name} behind it is called in an unusual way"
        given = dict(zip(options, args, strict=False)) | (kwargs or {})
        if len(given) < len(args) + len(kwargs or ()) or not given.keys() <= set(options):
            return f"{name} behind it is called in an unusual way"
        slope = given.get("negative_slope", slope)
    if not (type(slope) in (float, int) and 0 < slope < float("inf")):
        return f"the negative slope is {slope!r}"
    return name, slope


def _is_seen(module: Any) -> str | None:
    """Who sees the calls of a module, so that none may be left out or merged with another."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "has a forward of its own"
    if global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
        return "is seen by global hooks"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        ours = len(_records)
        if (
            len(global_hooks._global_forward_hooks) > ours
            or len(global_hooks._global_forward_pre_hooks) > ours
        ):
            return "is seen by global hooks"
    return None


# ---- record


class Call(NamedTuple):
    """One batch norm in one call of a model: its name there, how it was computed, and why not better."""

    name: str
    how: str
    reason: str


class Calls(list[Call]):
    """What :func:`record` gives; printed as a table."""

    def __str__(self) -> str:
        widths = [max((len(call[i]) for call in self), default=0) for i in range(2)]
        lines = [f"{call[0]:{widths[0]}}  {call[1]:{widths[1]}}  {call[2]}".rstrip() for call in self]
        counts = Counter(call.how for call in self)
        total = ", ".join(f"{count} {how}" for how, count in counts.most_common())
        return "\n".join([*lines, f"{len(self)} batch norms" + (f": {total}" if total else "")])


_Note = Callable[[Any, str, str], None]
_records: list[_Note] = []
_reasons: dict[Any, str] = {}  # why the batch norm that is called now is not fused


@contextmanager
def record() -> Iterator[Calls]:
    """See what becomes of each batch norm of a model.

    ``with record() as calls: model(x)``, then ``print(calls)``. Calls of other threads are seen as well.
    Modules take longer meanwhile.

    Yields
    ------
    list of (name, how, reason)
        One for each call of a batch norm, in their order. The name is that in the outermost module that is
        called. `how` is "fast" (by fastbn alone), "fused relu", "fused add", "fused add + relu" and the like,
        or "PyTorch". The reason says why PyTorch computes it, or why nothing that is behind it is fused with
        it where something might have been.
    """
    calls = Calls()
    names: dict[nn.Module, str] = {}

    def look(module: nn.Module, args: Any) -> None:
        if module not in names:
            names.update((inner, name) for name, inner in module.named_modules())

    def note(norm: nn.Module, how: str, reason: str) -> None:
        calls.append(Call(names.get(norm, ""), how, reason))

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return
        if not isinstance(module, _BatchNorm):
            note(module, "PyTorch", "not accelerated")
            return
        given = dict(zip(("input", "residual", "mask"), args, strict=False)) | kwargs
        x, residual, mask = given["input"], given.get("residual"), given.get("mask")
        _tell(module, x, residual, mask, module.activation, _reasons.get(module, ""), [note])

    _records.append(note)
    handles = [
        nn.modules.module.register_module_forward_pre_hook(look),
        nn.modules.module.register_module_forward_hook(see, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
            global_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which PyTorch leaves there
        _records.remove(note)


def _why_not(norm: Any, x: Any, residual: Any, mask: Any) -> str | None:
    if mask is not None and (norm.training or torch.is_grad_enabled()):
        return "a mask is given"
    tracked = not norm.training or norm.track_running_stats
    return why_not(
        x,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.weight,
        norm.bias,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        residual,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
    )


def _tell(
    norm: Any, x: Any, residual: Any, mask: Any, activation: str | None, unfused: str, notes: list[_Note]
) -> None:
    """Note how a call is computed; `unfused` says why not with what comes behind it."""
    reason = _why_not(norm, x, residual, mask)
    parts = [] if residual is None else ["add"]
    if activation is not None:
        parts.append(activation)
    how = "PyTorch" if reason else "fused " + " + ".join(parts) if parts else "fast"
    for note in notes:
        note(norm, how, reason or unfused)


def _unfused(waiting: _Waiting, reason: str) -> Any:
    """What waits, computed as far as it has come."""
    if not _records:
        return waiting.compute()
    with _reason(waiting.norm, reason):
        return waiting.compute()


@contextmanager
def _reason(norm: Any, reason: str) -> Iterator[None]:
    _reasons[norm] = reason
    try:
        yield
    finally:
        del _reasons[norm]


# ---- classes


def _sequential_forward(self: Any, input):  # type: ignore[no-untyped-def]
    if torch.jit.is_scripting():
        for module in self:
            input = module(input)
        return input
    return _force(_in_turn(self, input))


_norm_forward = _BatchNorm.forward
_classes: dict[Any, type | None] = {}


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickles and copies modules of the classes that are made here, which no import would find."""
    made_of = self._fastbn_made_of
    reduced = made_of[0].__reduce_ex__(self, max(protocol, 2))
    if reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
        return _rebuild, made_of, *reduced[2:]
    return reduced


def _rebuild(*made_of: Any) -> Any:
    made: Any = _made(*made_of) or made_of[0]
    return made.__new__(made)


def _made(base: type, kind: str, *roles: tuple[str, ...]) -> type | None:
    """The subclass of `base` for its modules of these roles; None if none would help, or none can be made."""
    methods = _methods(base) if kind == "methods" else {}
    key = (base, kind, *roles, *methods.items())
    if key not in _classes:
        _classes[key] = _make(base, kind, roles, methods) if _may_be_subclassed(base) else None
    return _classes[key]


def _methods(base: type) -> dict[str, FunctionType]:
    """The methods of a class, but for those of PyTorch."""
    seen: dict[str, Any] = {}
    for owner in base.__mro__:
        for name, value in vars(owner).items():
            ours = type(value) is FunctionType and not _is_of(owner, "torch.nn") and name[:2] != "__"
            seen.setdefault(name, value if ours else None)  # an overridden method is none of this class's
    return {name: value for name, value in seen.items() if value is not None}


def _make(
    base: Any, kind: str, roles: tuple[tuple[str, ...], ...], methods: dict[str, FunctionType]
) -> type | None:
    bases: tuple[type, ...] = (base,)
    new: dict[str, Any] = {}
    if kind == "norm":
        bases = (_BatchNorm, base)
        new = {"__init__": base.__init__}
    elif kind == "sequential":
        new = {"forward": _sequential_forward}
    else:
        rewritten = {name: rewrite(function, Roles(*roles), _HELPERS) for name, function in methods.items()}
        new = {name: function for name, function in rewritten.items() if function is not None}
        if not new:
            return None
    new |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_fastbn_made_of": (base, kind, *roles),
    }
    made: type = type(base)(base.__name__, bases, new)
    return made


def _is_of(cls: type, package: str) -> bool:
    return cls.__module__ == package or cls.__module__.startswith(package + ".")


def _may_be_subclassed(base: Any) -> bool:
    """Whether to make a subclass has no other effect: no registry hears of it, and it has no slots."""
    return type(base) in (type, ABCMeta) and not any(
        "__init_subclass__" in vars(owner) or vars(owner).get("__slots__") for owner in base.__mro__[:-1]
    )


def accelerate(
    model: nn.Module,
    *,
    fuse: bool = True,
    exclude: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    once: bool = False,
) -> Any:
    """Let fastbn compute the batch norms of a model, with the activations and additions behind them.

    The model computes what it did. Its modules stay the same objects, with the same parameters, buffers,
    hooks and names; some get a subclass of their class. What is fused is decided at each call, so the model
    can be changed afterwards like any other. Calling this again, with other options, replaces what it did
    before.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    fuse : bool
        Compute activation and addition in the same pass: ``act(bn(x))``, ``act(bn(x) + r)`` and ``bn(x) +
        r``, where act is ReLU, ReLU6, LeakyReLU of a positive slope, SiLU or Hardswish, as a module or a
        function, in a Sequential or in the methods of any module.
    exclude : names, or a function of name and module
        Which modules to leave alone, with all that is in them. Names are those of ``model.named_modules()``.
    once : bool
        Move the running averages once where ``torch.utils.checkpoint`` computes a batch norm again in the
        backward pass, and not twice, as PyTorch does. Layers that were made as fastbn.torch's have an option
        of their own.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If `exclude` has a name that no module has.

    Notes
    -----
    Subclasses of PyTorch's batch norm with a forward of their own are left alone, and so are scripted models
    and modules whose class cannot be subclassed without side effects. A module whose methods have no source
    to be read, or are decorated, gets the fast batch norms but no fusion. A method that is changed in its
    class later takes effect when this is called again. Code that asks for the exact type of a module does not
    recognize it: :func:`restore` first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = _chosen(model, exclude)
    restore(model)
    for module in chosen:
        if isinstance(module, LazyModuleMixin) and module.cls_to_become in _FAST:
            module.cls_to_become = _FAST[module.cls_to_become]
        else:
            _swap(module, _fast_class)
        if once and _is_accelerated(module):
            module.once = True
    if fuse:
        for module in chosen:
            _swap(module, _fusing_class)
    return model


def restore(model: nn.Module) -> Any:
    """Undo :func:`accelerate`: every module gets back the class that it had.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. What was never accelerated stays as it is, layers of fastbn.torch that were made as
        such among it.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if _is_accelerated(module):
            module.__dict__.pop("once", None)
        if module.__dict__.get("cls_to_become") in _PLAIN:
            del module.cls_to_become
        _swap(module, _former_class)
        unsynced = module.__dict__.get("_unsynced")  # what revert_sync_batchnorm goes back to
        if unsynced is not None:
            module._unsynced = _former_class(module, unsynced) or unsynced
    return model


def _is_accelerated(module: Any) -> bool:
    """Whether a batch norm was made as one of PyTorch's, and is one of ours, or will be."""
    ours = isinstance(module, _BatchNorm) or module.__dict__.get("cls_to_become") in _PLAIN
    return ours and "activation" not in module.__dict__


def _chosen(model: nn.Module, exclude: Iterable[str] | Callable[[str, nn.Module], bool]) -> list[nn.Module]:
    """The modules that are not excluded, each once."""
    named = list(model.named_modules(remove_duplicate=False))
    if callable(exclude):
        left_out = [module for name, module in named if exclude(name, module)]
    else:
        wanted = {exclude} if isinstance(exclude, str) else set(exclude)
        unknown = sorted(wanted - {name for name, _ in named})
        if unknown:
            close = get_close_matches(str(unknown[0]), [name for name, _ in named])
            raise ValueError(
                f"exclude has names that no module of the model has: {unknown}"
                + (f"; close to {unknown[0]!r}: {close}" if close else "; see model.named_modules()")
            )
        left_out = [module for name, module in named if name in wanted]
    apart = {inner for module in left_out for inner in module.modules()}
    scripted = (torch.jit.ScriptModule, torch.fx.GraphModule)
    return [module for module in model.modules() if module not in apart and not isinstance(module, scripted)]


def _swap(module: Any, find: Callable[[Any, Any], type | None]) -> None:
    """Give a module the class that `find` has for its own; if parametrized, for the one behind that."""
    cls = type(module)
    if not is_parametrized(module):
        module.__class__ = find(module, cls) or cls
        return
    # PyTorch has made a class for this module alone, and takes the base of that when parametrizations are
    # removed.
    found = find(module, cls.__bases__[0])
    if found is None:
        return
    before = vars(cls).get("_fastbn_before")
    own = {name: value for name, value in vars(cls).items() if name not in _NOT_COPIED}
    if (
        before is not None
        and before.__bases__[0] is found
        and own.keys() == vars(before).keys() - _NOT_COPIED
    ):
        module.__class__ = before
    else:
        metaclass: Any = type(cls)
        module.__class__ = metaclass(cls.__name__, (found,), own | {"_fastbn_before": cls})


_NOT_COPIED = {"__dict__", "__weakref__", "_fastbn_before"}


def _fast_class(module: Any, cls: Any) -> type | None:
    """Ours for a batch norm, if what it computes is what PyTorch's does."""
    if (
        not issubclass(cls, tuple(_FAST))
        or issubclass(cls, _BatchNorm)
        or cls.forward is not nn.modules.batchnorm._BatchNorm.forward
        or hasattr(module, "activation")  # these would mean something to our forward
        or hasattr(module, "negative_slope")
        or hasattr(module, "once")
    ):
        return None
    return _FAST.get(cls) or _made(cls, "norm")


def _fusing_class(module: Any, cls: Any) -> type | None:
    """The class for a module that has batch norms whose results may go into activations or additions."""
    if "forward" in module.__dict__:
        return None
    if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        return _made(cls, "sequential") if any(map(_ends_in_norm, module)) else None
    children = module._modules.items()
    norms = sorted(name for name, child in children if _ends_in_norm(child))
    lists = sorted(
        name
        for name, child in children
        if isinstance(child, (nn.ModuleList, nn.ModuleDict))
        and any(map(_ends_in_norm, child._modules.values()))
    )
    if not (norms or lists) or _is_of(cls, "torch.nn"):
        return None
    activations = [name for name, child in children if type(child) in _ACTIVATION_MODULES]
    activations += [
        name
        for name, value in module.__dict__.items()
        if isinstance(value, (FunctionType, BuiltinFunctionType)) and value in _ACTIVATION_FUNCTIONS
    ]
    return _made(cls, "methods", tuple(norms), tuple(lists), tuple(sorted(activations)))


def _former_class(module: Any, cls: Any) -> type | None:
    """What the class was before :func:`accelerate`."""
    if "_fastbn_made_of" in vars(cls):
        former: type = cls._fastbn_made_of[0]
        return former
    # Layers that were made as ours have their options in themselves.
    return None if "activation" in module.__dict__ else _PLAIN.get(cls)


def _ends_in_norm(module: Any) -> bool:
    while isinstance(module, nn.Sequential) and module._modules:
        if _forward_of(module) not in (nn.Sequential.forward, _sequential_forward):
            return False
        module = next(reversed(module._modules.values()))
    return isinstance(module, nn.Module) and (
        _forward_of(module) is _norm_forward or module.__dict__.get("cls_to_become") in _PLAIN
    )


def _forward_of(module: Any) -> Any:
    return getattr(type(module), "forward", None)  # scripted modules have none
