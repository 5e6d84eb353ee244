"""What autograd, torch.func, checkpointing and modes do to a call: as with PyTorch's own batch norm."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from judge import (  # noqa: E402
    SLOPE,
    assert_near,
    assert_same,
    composite,
    double,
    normal,
    outcome,
    parameters,
)
from torch.autograd import forward_ad  # noqa: E402
from torch.utils import checkpoint as checkpointing  # noqa: E402

import fastbn.torch as ours  # noqa: E402

F = torch.nn.functional
both_modes = pytest.mark.parametrize("training", [True, False])


def clones(tensors):
    return [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def layers(C=5, **options):
    """Ours and PyTorch's, alike."""
    weight, bias, running_mean, running_var = parameters(C)
    pair = ours.BatchNorm2d(C, **options), torch.nn.BatchNorm2d(C, **options)
    for layer in pair:
        state = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
        layer.load_state_dict({k: v for k, v in state.items() if k in layer.state_dict()}, strict=False)
    return pair


@both_modes
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("add", [False, True])
def test_gradient_penalty(kernels_called, add, activation, training):
    """Trap 1: the gradient of a function of the gradient, of which NumPy in `backward` would give half."""
    results = []
    u = normal(4, 5, 3, 2, seed=3)
    for function, dtype in (ours.batch_norm, None), (composite, None), (composite, torch.float64):
        weight, bias, *running = parameters(5)
        x, residual = (normal(4, 5, 3, 2, seed=s).requires_grad_() for s in (0, 1))
        made = x, weight, bias, residual if add else None
        x_, weight_, bias_, residual_ = made = double(*made) if dtype else made
        running = [r.to(x_.dtype) for r in running]
        options = {} if function is composite else {"negative_slope": SLOPE}
        y = function(
            x_, *running, weight_, bias_, training, residual=residual_, activation=activation, **options
        )
        loss = (y.square() * u.to(x_.dtype)).sum()
        (g,) = torch.autograd.grad(loss, x_, create_graph=True)
        (loss + g.square().sum()).backward()
        results.append([g.detach(), *(leaf.grad for leaf in made if leaf is not None)])
    for mine, theirs, exact in zip(*results, strict=True):
        scale = exact.abs().max()
        assert (mine.double() - exact).abs().max() <= 1e-5 * scale
        assert (mine - theirs).abs().max() <= 1e-5 * scale
    assert [name for name, _ in kernels_called] == ["forward" if training else "normalize", "backward"]


@both_modes
def test_third_order_is_left_to_pytorch(training):
    results = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        x = normal(4, 5, 3).requires_grad_()
        y = function(x, *running, weight, bias, training)

        def orders(y=y, x=x):
            (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
            return torch.autograd.grad(h.pow(2).sum(), x)[0]

        results.append(outcome(orders))
    mine, theirs = results
    if isinstance(theirs, tuple):
        assert mine == theirs
    else:
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_hooks_of_tensors_run_once():
    """Also where the gradient is computed by a second graph."""
    for create_graph in False, True:
        x, (weight, bias, *running) = normal(4, 5, 3).requires_grad_(), parameters(5)
        x = x * 1
        calls = []
        x.register_hook(lambda g, calls=calls: calls.append("x"))
        weight.register_hook(lambda g, calls=calls: calls.append("weight"))
        y = ours.batch_norm(x, *running, weight, bias, True, activation="relu")
        torch.autograd.grad(y.sum(), (x, weight), create_graph=create_graph)
        assert sorted(calls) == ["weight", "x"]


# Trap 2.


def transforms():
    from torch import func

    x, tangent = normal(4, 5, 3), normal(4, 5, 3, seed=1)
    many = normal(2, 4, 5, 3)
    return {
        "vmap": lambda f: func.vmap(f)(many),
        "grad": lambda f: func.grad(lambda x: f(x).pow(2).sum())(x),
        "jacrev": lambda f: func.jacrev(f)(x),
        "jacfwd": lambda f: func.jacfwd(f)(x),
        "hessian": lambda f: func.hessian(lambda x: f(x).pow(3).sum())(x[:2, :2]),
        "jvp": lambda f: func.jvp(f, (x,), (tangent,))[1],
        "vjp": lambda f: func.vjp(f, x)[1](tangent)[0],
        "vmap_of_grad": lambda f: func.vmap(func.grad(lambda x: f(x).pow(2).sum()))(many),
        "functionalize": lambda f: func.functionalize(f)(x),
        "jacobian": lambda f: torch.autograd.functional.jacobian(f, x[:2]),
        "jacobian_vectorized": lambda f: torch.autograd.functional.jacobian(f, x[:2], vectorize=True),
    }


TRANSFORMS = ("vmap", "grad", "jacrev", "jacfwd", "hessian", "jvp", "vjp", "vmap_of_grad", "functionalize",
              "jacobian", "jacobian_vectorized")  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of slow fallbacks within PyTorch
@pytest.mark.parametrize("transform", TRANSFORMS)
@both_modes
@pytest.mark.parametrize("updated", [False, True])
def test_func(transform, training, updated):
    results = []
    for function in ours.batch_norm, composite:
        apply = transforms()[transform]

        def f(x, function=function):
            C = x.shape[-2]
            weight, bias, *running = (p.detach() for p in parameters(C))
            given = running if updated or not training else (None, None)
            return function(x, *given, weight, bias, training, residual=x, activation="relu")

        results.append(outcome(apply, f))
    mine, theirs = results
    if isinstance(theirs, tuple):
        assert mine == theirs
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_plain_tensors_within_a_transform(kernels_called):
    """They are nothing to the transform, but autograd around it may yet have to see through it."""
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 3)
    grads = []
    for function in ours.batch_norm, composite:
        scale = torch.tensor(2.0)
        y = torch.func.grad(lambda s, f=function: (s * f(x, *running, weight, bias, True)).square().sum())(
            scale
        )
        grads.append(torch.autograd.grad(y, (weight, bias)))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not kernels_called


def test_vmap_over_updated_buffers_is_pytorchs_error():
    results = []
    for function in ours.batch_norm, composite:
        running = torch.zeros(5), torch.ones(5)
        call = torch.func.vmap(lambda x, f=function, r=running: f(x, *r, None, None, True))
        results.append(outcome(call, normal(2, 4, 5, 3)))
    assert results[0] == results[1]
    assert issubclass(results[0][0], Exception)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own use
def test_forward_mode():
    results = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        with forward_ad.dual_level():
            x = forward_ad.make_dual(normal(4, 5, 3), normal(4, 5, 3, seed=1))
            results.append(forward_ad.unpack_dual(function(x, *running, weight, bias, True)))
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)


def test_batched_gradients():
    results = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        x = normal(4, 5, 3).requires_grad_()
        y = function(x, *running, weight, bias, True, residual=x, activation="relu")
        results.append(
            torch.autograd.grad(y, (x, weight, bias), normal(6, 4, 5, 3, seed=1), is_grads_batched=True)
        )
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# Trap 4.

GRADS = {
    "expanded": lambda shape: torch.ones(1).expand(shape),
    "expanded_batch": lambda shape: normal(1, *shape[1:], seed=5).expand(shape),
    "channels_last": lambda shape: normal(*shape, seed=5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda shape: normal(*reversed(shape), seed=5).permute(3, 2, 1, 0),
    "sliced": lambda shape: normal(*shape[:-1], 2 * shape[-1], seed=5)[..., ::2],
    "zero_tensor": lambda shape: torch._efficientzerotensor(shape),
    "negative_bit": lambda shape: torch.complex(normal(*shape), normal(*shape, seed=5)).conj().imag,
    "requires_grad": lambda shape: normal(*shape, seed=5).requires_grad_(),
    "float64": lambda shape: normal(*shape, seed=5).double(),
}


@pytest.mark.parametrize("kind", GRADS)
@pytest.mark.parametrize("activation", [None, "relu"])
@both_modes
def test_grad_output_kinds(kind, activation, training):
    results = []
    shape = 4, 5, 6, 7
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        x, residual = (normal(*shape, seed=s).requires_grad_() for s in (0, 1))
        y = function(x, *running, weight, bias, training, residual=residual, activation=activation)
        results.append(torch.autograd.grad(y, (x, weight, bias, residual), GRADS[kind](shape)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_unused_output_and_partly_used_graph():
    """No gradient reaches the function, or one that is undefined."""
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 3).requires_grad_()
    y = ours.batch_norm(x, *running, weight, bias, True)

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, g):
            return None, g

    z = Undefined.apply(y, x)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 5, 3))
    assert weight.grad is None


# Traps 5 to 8: what changes between forward and backward.


def test_eval_backward_after_training_call():
    """Trap 5: the gradient is that of the statistics which normalized, wherever they have moved since."""
    layer, _ = layers()
    layer.eval()
    expected = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().clone()
    x = normal(4, 5, 3, 2).requires_grad_()
    y = layer(x)
    layer.train()
    layer(10 * normal(4, 5, 3, 2, seed=1))
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected.view(1, 5, 1, 1).expand(4, 5, 3, 2), rtol=1e-6, atol=0)


@both_modes
def test_buffers_changed_between(training):
    """Trap 6: two calls before a backward, and buffers that are written to in between, as DDP does."""
    layer, _ = layers()
    layer.train(training)
    other, _ = layers()
    other.train(training)
    x = normal(4, 5, 3, 2).requires_grad_()
    (expected,) = torch.autograd.grad(other(x).square().sum(), x)
    y = layer(x)
    layer(normal(4, 5, 3, 2, seed=1))
    with torch.no_grad():
        layer.running_mean.fill_(7)
        layer.running_var.copy_(torch.full((5,), 9.0))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("changed", ["input", "weight"])
@both_modes
def test_saved_tensor_changed_in_place(changed, training):
    """Trap 7: PyTorch's own error."""
    texts = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        x = normal(4, 5, 3)
        y = function(x, *running, weight, bias, training)
        with torch.no_grad():
            (x if changed == "input" else weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            y.sum().backward()
        texts.append(str(error.value).split("; expected")[0].split("which is")[0])
    assert texts[0] == texts[1]


def test_bias_may_change_where_it_does_not_matter():
    weight, bias, *running = parameters(5)
    y = ours.batch_norm(normal(4, 5, 3), *running, weight, bias, True)
    with torch.no_grad():
        bias.add_(1)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 12.0))


@both_modes
@pytest.mark.parametrize("add", [False, True])
def test_output_changed(training, add):
    """Trap 8: without a residual the mask of a fused activation comes from the inputs, so that the output is
    free to change, where PyTorch has to refuse; with one it comes from the output, and so do we."""
    grads = []
    for change in False, True:
        weight, bias, *running = parameters(5)
        x = normal(4, 5, 3).requires_grad_()
        residual = normal(4, 5, 3, seed=2) if add else None
        y = ours.batch_norm(x, *running, weight, bias, training, residual=residual, activation="relu")
        if change:
            y += 1
        if change and add:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward(normal(4, 5, 3, seed=1))
        else:
            y.backward(normal(4, 5, 3, seed=1))
            grads.append([x.grad, weight.grad, bias.grad])
    for a, b in zip(grads[0], grads[-1], strict=True):
        assert torch.equal(a, b)
    y = composite(x, *running, weight, bias, training, activation="relu")
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu", "hardswish"])
@pytest.mark.parametrize("slope", [0.25, -0.25])
def test_residual_changed_in_place(activation, slope):
    """It is needed again where neither the output tells the derivative nor that is 1 everywhere; then
    changing it must not go unseen, and otherwise it need not be kept."""
    needed = activation in ("silu", "hardswish") or (activation == "leaky_relu" and slope < 0)
    grads = []
    for change in False, True:
        weight, bias, *running = parameters(5)
        residual = normal(4, 5, 3, seed=1)
        y = ours.batch_norm(
            normal(4, 5, 3), *running, weight, bias, True, residual=residual, activation=activation,
            negative_slope=slope,
        )  # fmt: skip
        kept = weakref.ref(residual)
        if change:
            residual.add_(1)
        del residual
        assert (kept() is None) or needed
        if change and needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
            grads.append([weight.grad, bias.grad])
    for a, b in zip(grads[0], grads[-1], strict=True):
        assert torch.equal(a, b)


@both_modes
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mask_from_the_output_or_the_residual(kernels_called, training, activation, memory_format):
    """The same gradients to the bit, also at the kinks and where the output is not finite."""
    x, residual, grad = (normal(4, 5, 3, 2, seed=s).contiguous(memory_format=memory_format) for s in range(3))
    residual[0, 0], residual[1, 1, 1], residual[2, 2, 2] = torch.nan, torch.inf, -torch.inf
    grads = []
    for tells in True, False:
        weight, bias, *running = parameters(5)
        weight.data[4], bias.data[4] = 0, 0  # z is the residual
        residual[:, 4] = torch.tensor([-0.0, 0.0, 6.0, 1e-40, -1e-40, torch.nan]).view(3, 2)
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
        with pytest.MonkeyPatch.context() as patch:
            if not tells:
                patch.setattr("fastbn.torch.functional._output_tells", lambda *how: False)
            y = ours.batch_norm(
                leaves[0], *running, weight, bias, training, residual=leaves[1], activation=activation,
                negative_slope=SLOPE,
            )  # fmt: skip
        grads.append(torch.autograd.grad(y, [*leaves, weight, bias], grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    assert len(kernels_called) == 4


# Trap 11.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kernels_called, reentrant):
    """Everything is computed twice, and the statistics move twice, as with PyTorch."""
    results = []
    for layer in layers():
        x = normal(4, 5, 3, 2).requires_grad_()
        y = checkpointing.checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
        assert layer.num_batches_tracked == 2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in kernels_called] == ["forward", "forward", "backward"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint_once(reentrant, momentum):
    """Asked for, the statistics move as without a checkpoint; and so they do after it."""
    results = []
    for once in True, None:
        layer = ours.BatchNorm2d(5, momentum=momentum, activation="relu", once=bool(once))
        assert ("once" in repr(layer)) == bool(once)
        for step in range(2):
            x = normal(4, 5, 3, 2, seed=step).requires_grad_()
            y = checkpointing.checkpoint(layer, x, use_reentrant=reentrant) if once else layer(x)
            y.backward(normal(4, 5, 3, 2, seed=9))
        assert layer.num_batches_tracked == 2
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    assert all(map(torch.equal, *results))


def test_saved_tensors_go_through_hooks():
    """As torch.autograd.graph.save_on_cpu, and whatever packs them, expects."""
    packed = []

    def pack(t):
        packed.append(tuple(t.shape))
        return t.clone()

    weight, bias, *running = parameters(5)
    x, residual = normal(4, 5, 3).requires_grad_(), normal(4, 5, 3, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours.batch_norm(x, *running, weight, bias, True, residual=residual, activation="relu")
    assert sorted(packed) == [(4, 5, 3), (4, 5, 3), (5,), (5,)]
    y.sum().backward()
    assert x.grad is not None


def test_error_of_a_hook_is_not_taken_for_one_of_the_kernels():
    """Which would mean a second call, by PyTorch, and statistics that move twice."""

    def pack(t):
        raise ValueError("no room")

    layer, theirs = layers()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        pytest.raises(ValueError, match="no room"),
    ):
        layer(normal(4, 5, 3, 2).requires_grad_())
    theirs(normal(4, 5, 3, 2))
    torch.testing.assert_close(layer.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)


# Trap 12: modes that watch or replace operations.


def test_flop_counter_and_dispatch_modes(kernels_called):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    for layer in layers():
        x = normal(4, 5, 3, 2).requires_grad_()
        with Record() as record:
            layer(x).sum().backward()
        seen.append(record.seen)
    assert seen[0] == seen[1]
    assert any("batch_norm_backward" in op for op in seen[0])
    layer = layers()[0]
    y = layer(x)  # the forward pass is not watched, the backward pass is
    with Record() as record:
        y.sum().backward()
    assert any("batch_norm_backward" in op for op in record.seen)
    assert [name for name, _ in kernels_called] == ["forward"]


def test_fake_tensors(kernels_called):
    from torch._subclasses import FakeTensorMode

    strides = []
    for layer in layers():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = layer(mode.from_tensor(normal(4, 5, 3, 2)).contiguous(memory_format=torch.channels_last))
        strides.append((type(y).__name__, y.stride()))
    assert strides[0] == strides[1]
    assert not kernels_called


def test_selective_checkpoint():
    """What is to be saved is an operation of PyTorch's, which a NumPy call would hide."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    results = []
    for layer in layers():
        ops = []

        def policy(ctx, op, *args, ops=ops, **kwargs):
            ops.append(str(op))
            return (
                CheckpointPolicy.MUST_SAVE if "batch_norm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
            )

        x = normal(4, 5, 3, 2).requires_grad_()
        y = checkpointing.checkpoint(
            lambda x, layer=layer: layer(x).relu(), x, use_reentrant=False,
            context_fn=lambda policy=policy: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        y.sum().backward()
        results.append((x.grad, layer.running_mean, ops, int(layer.num_batches_tracked)))
    assert results[0][2:] == results[1][2:]
    for mine, theirs in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_function_modes(kernels_called):
    from torch.overrides import TorchFunctionMode

    class Record(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += (getattr(func, "__name__", ""),)
            return func(*args, **(kwargs or {}))

    layer, _ = layers()
    with Record() as record:
        layer(normal(4, 5, 3, 2))
    assert "batch_norm" in record.seen
    assert not kernels_called
    with torch.device("cpu"):  # a mode of PyTorch's own, which batch norm is nothing to
        layer(normal(4, 5, 3, 2))
    assert kernels_called


# Trap 20.


def test_backward_hook_inplace():
    """A full backward hook makes the output a view, which an in-place ReLU must not change."""
    texts = []
    for layer in layers():
        layer.register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace") as error:
            F.relu_(layer(normal(4, 5, 3, 2).requires_grad_()))
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    layer, _ = layers()
    for memory_format in torch.contiguous_format, torch.channels_last:
        for size in 2, 100:
            y = layer(normal(4, 5, size, size).contiguous(memory_format=memory_format).requires_grad_())
            F.relu_(y).sum().backward()


# Trap 21.


def test_sharing():
    """One layer twice in a pass, an input that is also the residual, and parameters that two layers share."""
    results = []
    for first, second in zip(layers(), layers(), strict=True):
        first.weight = second.weight
        assert first.weight is second.weight
        x = normal(4, 5, 3, 2).requires_grad_()
        fused = isinstance(first, ours.BatchNorm2d)
        y = first(second(first(x)), x) if fused else first(second(first(x))) + x
        y.square().sum().backward()
        results.append([y, x.grad, first.weight.grad, first.bias.grad, second.bias.grad, *first.buffers()])
        assert first.num_batches_tracked == 2
        assert second.num_batches_tracked == 1
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@both_modes
def test_input_is_the_residual(training):
    results = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        x = normal(4, 5, 3, 2).requires_grad_()
        y = function(x, *running, weight, bias, training, residual=x, activation="relu")
        y.backward(normal(4, 5, 3, 2, seed=1))
        results.append([y, x.grad, weight.grad, bias.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# Trap 22.


@both_modes
@pytest.mark.parametrize("wanted", range(16))
@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen(kernels_called, wanted, training, activation):
    """.grad is None exactly where PyTorch's is."""
    results = []
    for function in ours.batch_norm, composite:
        weight, bias, *running = parameters(5)
        leaves = normal(4, 5, 3), weight.detach(), bias.detach(), normal(4, 5, 3, seed=1)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(wanted >> i & 1))
        x, weight, bias, residual = leaves
        y = function(x, *running, weight, bias, training, residual=residual, activation=activation)
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(normal(4, 5, 3, seed=2))
        results.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(kernels_called) == 1 + bool(wanted)


# Trap 26.


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_input_is_not_kept_without_gradient(kernels_called, way):
    layer, _ = layers()
    for training in True, False:
        layer.train(training)
        with way():
            x = normal(4, 5, 3, 2)
            gone = weakref.ref(x)
            y = layer(x)
            del x
        gc.collect()
        assert gone() is None
        assert not y.requires_grad
        assert y.is_inference() == (way is torch.inference_mode)
    assert len(kernels_called) == 2


def test_imported_in_inference_mode():
    """What is plain does not depend on where the package was first imported."""
    from importlib.util import module_from_spec, spec_from_file_location

    from fastbn.torch import functional

    spec = spec_from_file_location("another_functional", functional.__file__)
    module = module_from_spec(spec)
    with torch.inference_mode():
        spec.loader.exec_module(module)
    x = normal(4, 5, 3).requires_grad_()
    assert module.why_not(x, None, None, None, None, True, None) is None


def test_inference_tensors_elsewhere():
    """They cannot be saved for a backward pass: PyTorch's error, before the statistics move."""
    with torch.inference_mode():
        x = normal(4, 5, 3, 2)
    results = []
    for layer in layers():
        results.append(outcome(layer, x))
        results.append(layer.running_mean.clone())
    assert results[0] == results[2]
    assert issubclass(results[0][0], RuntimeError)
    assert torch.equal(results[1], results[3])
    layer, theirs = layers()
    with torch.no_grad():
        assert_near(layer(x), theirs(x), 1e-5)


def test_graph_is_freed_and_may_be_kept():
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 3).requires_grad_()
    y = ours.batch_norm(x, *running, weight, bias, True, activation="relu")
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_culprit():
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 3).requires_grad_()
    with (
        torch.autograd.detect_anomaly(),
        pytest.warns(UserWarning, match="_BatchNormBackward"),
        pytest.raises(RuntimeError, match="Function '_BatchNormBackward' returned nan values"),
    ):
        ours.batch_norm(x, *running, weight, bias, True).backward(torch.full((4, 5, 3), torch.nan))
