"""fastbn.torch.batch_norm: outputs, gradients, running statistics: near PyTorch in float64, like its own."""

import copy
import itertools
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from judge import (  # noqa: E402
    ACTIVATIONS,
    PIECEWISE,
    SLOPE,
    Bounds,
    activate,
    assert_near,
    assert_same,
    away_from_kinks,
    composite,
    double,
    normal,
    outcome,
    parameters,
)

import fastbn  # noqa: E402
import fastbn.torch as ours  # noqa: E402
from fastbn import _kernels  # noqa: E402
from fastbn._kernels import output_memory  # noqa: E402
from fastbn.torch.functional import why_not  # noqa: E402

F = torch.nn.functional
both_modes = pytest.mark.parametrize("training", [True, False])


# Each makes a tensor of another layout from one of shape (N, C, ...).


def channels_last(x):
    last = torch.moveaxis(x, 1, -1).contiguous()
    return torch.moveaxis(last, -1, 1)


def cropped(x):
    """The inside of a larger image."""
    pad = [2] * (2 * (x.ndim - 2)) or [2, 2]
    block = F.pad(x, pad, value=77.0)
    for d in range(max(2, x.ndim - len(pad) // 2), x.ndim):
        block = block.narrow(d, 2, x.shape[d])
    return block if x.ndim > 2 else block[:, 2:-2]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "cropped": cropped,
    "cropped_channels_last": lambda x: channels_last(F.pad(x, [1, 1] * (x.ndim - 2), value=77.0))[
        (..., *[slice(1, -1)] * (x.ndim - 2))
    ],
    "every_second_channel": lambda x: torch.repeat_interleave(x, 2, 1)[:, ::2],
    "every_second_channel_last": lambda x: channels_last(torch.repeat_interleave(x, 2, 1))[:, ::2],
    "every_second_sample": lambda x: torch.repeat_interleave(x, 2, 0)[::2],
    "reversed_in_memory": lambda x: (
        x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    ),
    "batch_inside": lambda x: torch.moveaxis(torch.moveaxis(x, 0, -1).contiguous(), -1, 0),
    "last_two_swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_channels": lambda x: x[:, :1].expand(x.shape),
    "expanded_inside": lambda x: x[..., :1].expand(x.shape),
}
layouts = st.sampled_from(list(LAYOUTS))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def calls(draw):
    """Arguments of a call, and a gradient for its output."""
    ndim = draw(st.integers(2, 5))
    sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
    shape = draw(st.lists(sizes, min_size=ndim, max_size=ndim))
    while np.prod(shape) > 20000:
        shape[int(np.argmax(shape))] //= 3
    training = draw(st.booleans())
    if training and np.prod(shape) == shape[1]:
        shape[0] = 2
    seed = draw(st.integers(0, 99))
    x = LAYOUTS[draw(layouts)](normal(*shape, seed=seed) + draw(st.sampled_from([0.0, 0.0, 3.0, 100.0])))
    residual = draw(st.sampled_from([None, *LAYOUTS]))
    if residual is not None:
        residual = LAYOUTS[residual](normal(*shape, seed=seed + 1000)).requires_grad_(draw(st.booleans()))
    grad_output = LAYOUTS[draw(layouts)](normal(*shape, seed=seed + 2000))
    weight, bias, *running = parameters(shape[1], seed)
    running[0] += float(x.mean())
    if draw(st.booleans()):
        weight = weight.detach()
    weight, bias = (v if draw(st.booleans()) else None for v in (weight, bias))
    if training and draw(st.booleans()):
        running = [None, None]
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.1, 0.0, 1.0, 0.37])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
    activation = draw(st.sampled_from(ACTIVATIONS))
    return (
        x.requires_grad_(draw(st.booleans())),
        running,
        weight,
        bias,
        options,
        residual,
        activation,
        grad_output,
    )


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_against_float64(call):
    x, running, weight, bias, options, residual, activation, grad_output = call
    eps, training, momentum = options["eps"], options["training"], options["momentum"]
    leaves = x, weight, bias, residual
    exact = double(*leaves)
    exact_running = double(*running)
    before = [None if t is None else t.detach().clone() for t in (*leaves, grad_output)]

    z = composite(exact[0], *exact_running, *exact[1:3], **options, residual=exact[3])
    if z.requires_grad:
        z.retain_grad()
    expected = activate(z, activation)
    y = ours.batch_norm(
        x, *running, weight, bias, **options, residual=residual, activation=activation, negative_slope=SLOPE
    )

    d = [0, *range(2, x.ndim)]
    mean, var = exact[0].detach().mean(d), exact[0].detach().var(d, correction=0)
    used = (mean, var) if training else (exact_running[0], exact_running[1])
    bounds = Bounds(exact[0].detach(), exact[1] if weight is not None else None, None, *used, eps, training)
    with torch.no_grad():
        bound = torch.maximum(bounds.output(expected), bounds.output(z))
        assert_near(y, expected, bound, "y")
        if running[0] is not None:
            for name, our, their in zip(("running_mean", "running_var"), running, exact_running, strict=True):
                bound = getattr(bounds, name)(their, momentum) if training else 0
                assert_near(our, their, bound, name)

    theirs = composite(
        x.detach(), *_clones(running), *_detached(weight, bias), **options, activation=activation
    )
    assert y.stride() == theirs.stride()
    assert y.dtype == torch.float32
    assert y.requires_grad == z.requires_grad
    if y.requires_grad:
        grad_output = away_from_kinks(grad_output, z.detach().float())
        y.backward(grad_output)
        expected.backward(grad_output.double())
        smooth = activation in ("silu", "hardswish")
        for name, leaf, their, bound in zip(
            ("input", "weight", "bias", "residual"), leaves, exact, bounds.gradients(z.grad), strict=True
        ):
            assert (leaf is None or leaf.grad is None) == (their is None or their.grad is None), name
            if leaf is not None and leaf.grad is not None:
                if smooth:  # by PyTorch's operations in float32
                    bound = bound * 20 + 1e-5 * their.grad.abs().max()
                assert_near(leaf.grad, their.grad, bound, name)
    for t, value in zip((*leaves, grad_output), before, strict=True):
        if value is not None and t is not grad_output:
            assert torch.equal(t, value)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_dtypes_without_kernel_are_pytorchs(call, dtype, parameter_dtype):
    """To the bit, or by its own error."""
    x, running, weight, bias, options, residual, activation, grad_output = call

    def to(dtype, *tensors):
        return [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]

    results = []
    for function in ours.batch_norm, composite:
        leaves = to(dtype, x, residual) + to(parameter_dtype, weight, bias)
        moved = _clones(to(parameter_dtype, *running))
        x_, residual_, *vectors = leaves
        assume(why_not(x_, *moved, *vectors, options["training"], residual_) is not None)
        slope = {} if function is composite else {"negative_slope": SLOPE}
        y = outcome(
            function, x_, *moved, *vectors, **options, residual=residual_, activation=activation, **slope
        )
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.backward(grad_output.to(y.dtype))
        results.append([y, *moved, *(None if leaf is None else leaf.grad for leaf in leaves)])
    if isinstance(results[1][0], tuple):
        assert results[0][0] == results[1][0]
        return
    for mine, theirs in zip(*results, strict=True):
        if theirs is not None:
            mine, theirs = (t if t.dtype is not torch.bfloat16 else t.double() for t in (mine, theirs))
        assert_same(mine, theirs)


def _clones(tensors):
    return [None if t is None else t.clone() for t in tensors]


def _detached(*tensors):
    return [None if t is None else t.detach() for t in tensors]


# Trap 3.

SHAPES = {
    "2d": (6, 5),
    "3d": (4, 5, 7),
    "4d": (4, 6, 5, 7),
    "one_channel": (4, 1, 5, 7),
    "no_image": (4, 6, 1, 1),
    "one_sample": (1, 6, 5, 7),
    "one_column": (4, 6, 5, 1),
    "5d": (2, 4, 3, 5, 4),
    "3d_kept": (4, 40, 500),  # of these the memory is fastbn's
    "4d_kept": (4, 16, 40, 40),
    "one_channel_kept": (9, 1, 100, 100),
    "no_image_kept": (1100, 64, 1, 1),
    "one_sample_kept": (1, 64, 40, 40),
    "5d_kept": (2, 4, 10, 30, 40),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@both_modes
def test_strides(kernels_called, shape, layout, training):
    """Outputs and gradients have the strides that PyTorch gives them, so that a `view` works alike."""
    weight, bias, *running = parameters(shape[1])
    results = []
    for function in composite, ours.batch_norm:
        x = LAYOUTS[layout](normal(*shape)).requires_grad_()
        y = function(x, *_clones(running), weight, bias, training)
        assert torch.equal(x, LAYOUTS[layout](normal(*shape)))
        (dx,) = torch.autograd.grad(y, x, LAYOUTS[layout](normal(*shape, seed=1)))
        assert y._base is None
        viewed = outcome(lambda y: y.view(shape[0], -1).shape, y)
        results.append((y.stride(), dx.stride(), y.is_contiguous(), viewed))
        y.relu_()  # is no view
    assert results[0] == results[1]
    assert [name for name, _ in kernels_called] == ["forward" if training else "normalize", "backward"]


@both_modes
def test_strides_in_any_order_of_axes(training):
    """Sizes of 1 leave open what the memory format is."""
    shapes = [*itertools.product((1, 3), repeat=4), *itertools.product((1, 2), repeat=3), (1, 300, 1, 300)]
    shapes += [(1, 2, 1, 2, 2), (2, 2, 1, 1, 2), (1, 2, 1, 1, 3)]
    for shape in shapes:
        if training and np.prod(shape) == shape[1]:
            continue
        for order in itertools.permutations(range(len(shape))):
            x = normal(*(shape[d] for d in order)).permute([order.index(d) for d in range(len(shape))])
            strides = []
            for function in ours.batch_norm, F.batch_norm:
                weight, bias, *running = parameters(shape[1])
                x = x.detach().requires_grad_()
                y = function(x, *running, weight, bias, training)
                y.backward(torch.ones(shape))
                strides.append((y.stride(), x.grad.stride()))
            assert strides[0] == strides[1], (shape, x.stride())


def test_strides_of_size_one():
    """Where a dimension is of size 1 its stride means nothing, and still decides the format of outputs."""
    weight, bias, *running = parameters(64)
    memory = normal(200000)
    for strides in (
        (64, 1, 64, 64),
        (64, 1, 1, 1),
        (64, 1, 99, 3),
        (99, 1, 64, 64),
        (1, 1, 1, 1),
        (64, 1, 0, 0),
    ):
        for N in 1, 5, 1100:
            results = []
            for function in composite, ours.batch_norm:
                x = memory.as_strided((N, 64, 1, 1), strides).requires_grad_()
                y = function(x, *running, weight, bias, False)
                results.append((y.stride(), torch.autograd.grad(y.sum(), x)[0].stride()))
            assert results[0] == results[1], (N, strides)


# The rest of what a call may look like.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@both_modes
def test_evaluation_without_gradient_has_the_same_bits(activation, training):
    """The three ways in give one result: with a graph, without, and in inference mode."""
    weight, bias, *running = parameters(5)
    x, residual = normal(4, 5, 6, 7), normal(4, 5, 6, 7, seed=1)

    def run():
        moved = _clones(running)
        y = ours.batch_norm(x, *moved, weight, bias, training, residual=residual, activation=activation)
        return [y.detach(), *moved]

    results = [run()]
    for way in torch.no_grad, torch.inference_mode:
        with way():
            results.append(run())
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("activation", PIECEWISE)
@both_modes
def test_fused_and_unfused_have_the_same_parameter_gradients(kernels_called, activation, training):
    """To the bit: the mask of the activation is what PyTorch's activation would make of fastbn's output."""
    results = []
    for fused in True, False:
        weight, bias, *running = parameters(5)
        x, residual = (normal(4, 5, 6, 7, seed=s).requires_grad_() for s in (0, 1))
        if fused:
            y = ours.batch_norm(
                x,
                *running,
                weight,
                bias,
                training,
                residual=residual,
                activation=activation,
                negative_slope=SLOPE,
            )
        else:
            y = activate(ours.batch_norm(x, *running, weight, bias, training) + residual, activation)
        y.backward(normal(4, 5, 6, 7, seed=2))
        results.append([y, weight.grad, bias.grad, residual.grad])
    for name, a, b in zip(("y", "weight", "bias", "residual"), *results, strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy(), name)
    assert len(kernels_called) == 4


def test_edge_values_of_activations():
    """0, -0, 6 and its neighbours, infinities, the least numbers: as PyTorch's activations have them."""
    below, above = np.nextafter(np.float32(6), np.float32([0, 9]))
    values = torch.tensor(
        [0.0, -0.0, below, 6.0, above, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3, -3]
    )
    x = torch.zeros(len(values), 1)
    running = torch.zeros(1), torch.ones(1)
    for activation in PIECEWISE:
        residuals = [values[:, None].clone().requires_grad_() for _ in range(2)]
        y = ours.batch_norm(x, *running, residual=residuals[0], activation=activation, negative_slope=SLOPE)
        expected = composite(x, *running, None, None, False, residual=residuals[1], activation=activation)
        np.testing.assert_array_equal(y.detach().numpy(), expected.detach().numpy(), str(activation))
        y.sum().backward()
        expected.sum().backward()
        mine, theirs = (r.grad.numpy().copy() for r in residuals)
        if activation == "leaky_relu":  # at NaN PyTorch's gradient is the slope, the kernels' is 1
            mine[7] = theirs[7] = 0
        np.testing.assert_array_equal(mine, theirs, str(activation))


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_edge_values_of_smooth_activations(activation):
    """As PyTorch's, but for silu where z is infinite: the limits, where PyTorch has NaN."""
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3, -3, 6, 88, -88, 100, -100])
    x = torch.zeros(len(values), 1)
    running = torch.zeros(1), torch.ones(1)
    residuals = [values[:, None].clone().requires_grad_() for _ in range(2)]
    y = ours.batch_norm(x, *running, residual=residuals[0], activation=activation)
    expected = composite(x, *running, None, None, False, residual=residuals[1], activation=activation)
    y.sum().backward()
    expected.sum().backward()
    mine = [y.detach().numpy(), residuals[0].grad.numpy()]
    theirs = [expected.detach().numpy().copy(), residuals[1].grad.numpy().copy()]
    if activation == "silu":
        theirs[0][3], theirs[1][2], theirs[1][3] = 0, 1, 0
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize(
    "residual",
    [
        lambda: normal(4, 5, 6, 7, seed=1).double(),
        lambda: normal(5, 1, 1, seed=1),
        lambda: normal(3, 1, 5, 6, 7, seed=1)[:1],
        lambda: normal(1, 5, 6, 7, seed=1).requires_grad_(),
        lambda: torch.tensor(2.5),
        lambda: 1,
        lambda: 0.5,
        lambda: torch.arange(7),
    ],
    ids=["float64", "channels", "extra_dim", "batch_of_one", "scalar_tensor", "int", "float", "int64"],
)
@both_modes
def test_residual_kinds(kernels_called, residual, training):
    """Trap 29: what `+` broadcasts or promotes."""
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 6, 7)
    mine = ours.batch_norm(
        x, *_clones(running), weight, bias, training, residual=residual(), activation="relu"
    )
    theirs = composite(x, *_clones(running), weight, bias, training, residual=residual(), activation="relu")
    assert_same(mine, theirs)
    assert not kernels_called


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_fused(kernels_called, activation):
    """All of them, in one call."""
    weight, bias, *running = parameters(5)
    x = normal(4, 5, 6, 7)
    y = ours.batch_norm(x, *running, weight, bias, activation=activation, negative_slope=SLOPE)
    expected = composite(x.double(), *double(*running, weight, bias), False, activation=activation)
    assert_near(y, expected, 4e-6 * expected.abs().clamp(min=1))
    assert [name for name, _ in kernels_called] == ["normalize"]
    assert y.grad_fn.name() == "_BatchNormBackward"


def test_unknown_activation_is_refused_before_anything_is_written():
    running = torch.zeros(5), torch.ones(5)
    message = "activation must be None, 'relu', 'relu6', 'leaky_relu', 'silu' or 'hardswish', got 'gelu'"
    with pytest.raises(ValueError, match=message):
        ours.batch_norm(normal(4, 5), *running, training=True, activation="gelu")
    with pytest.raises(ValueError, match=message):
        ours.BatchNorm1d(5, activation="gelu")
    assert torch.equal(running[0], torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_dtype", DTYPES)
@both_modes
def test_dtypes(dtype, parameter_dtype, training):
    """The pairs of dtypes that PyTorch takes give its dtypes and near its values, the others its errors."""
    weight, bias, *running = (t.detach().to(parameter_dtype) for t in parameters(5))
    x = normal(4, 5, 6, 7).to(dtype)
    results = []
    for function in composite, ours.batch_norm:
        moved = _clones(running)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = outcome(function, leaves[0], *moved, *leaves[1:], training)
        if isinstance(y, tuple):
            results.append(y)
            continue
        y.sum().backward()
        results.append([y, *moved, *(leaf.grad for leaf in leaves)])
    theirs, mine = results
    if isinstance(theirs, tuple):
        assert mine == theirs
        return
    for a, b in zip(mine, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        tolerance = 8 * torch.finfo(a.dtype).eps
        terms = 10 if a.shape == x.shape else x.numel() / 5  # of about 1, of which PyTorch rounds each sum
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * terms)


def test_nothing_is_lost_to_overlapping_statistics(kernels_called):
    """What the kernels refuse, PyTorch does: nothing has been written when they do."""
    shared = torch.ones(5)
    x = normal(4, 5, 6)
    mine, theirs = shared.clone(), shared.clone()
    assert_same(ours.batch_norm(x, mine, mine, training=True), F.batch_norm(x, theirs, theirs, training=True))
    assert torch.equal(mine, theirs)
    y = ours.batch_norm(x, torch.zeros(5), torch.full((5,), -1.0))
    assert y.isnan().all()


def test_outputs_are_in_kept_memory():
    """From 256 KB on; smaller ones can be resized, as PyTorch's own can."""
    small = ours.batch_norm(normal(4, 5), torch.zeros(5), torch.ones(5))
    assert small.untyped_storage().resizable()
    for dropped in range(2):  # the output, then the gradient
        fastbn.empty_output_cache()
        x = normal(16, 64, 8, 8).requires_grad_()
        y = ours.batch_norm(x, torch.zeros(64), torch.ones(64))
        if dropped:
            y.sum().backward()
            x.grad = None
        else:
            del y
        assert output_memory()[0] >= x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (300, 1024), (1, 64, 65, 65), (600, 1, 30, 31), (65, 64, 1, 65), (65, 64, 65, 1), (4200, 65, 1, 1),
        (2, 64, 45, 47), (1, 64, 17, 17, 17), (2, 3, 4, 5, 60, 60),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_strides_of_what_is_in_kept_memory(shape, layout, dtype):
    """Those of PyTorch's results, also where an axis of 1 lets a tensor be of two formats."""
    x = normal(*shape).to(dtype)
    if layout == "channels_last":
        x = channels_last(x)
    elif layout == "permuted":
        x = x.flip(-1).transpose(0, -1).contiguous().transpose(0, -1)
    vectors = dtype if dtype is torch.float64 else torch.float32
    weight, bias, *running = (t.to(vectors) for t in parameters(shape[1]))
    found = []
    for batch_norm in ours.batch_norm, F.batch_norm:
        leaf = x.clone().requires_grad_()
        y = batch_norm(leaf, *(t.clone() for t in running), weight, bias, True)
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        found.append((y.stride(), gradient.stride()))
        assert y.dtype is gradient.dtype is dtype
    assert found[0] == found[1]
    fastbn.empty_output_cache()
    del y, gradient
    by_arrays = _kernels.calls_by_arrays()
    y = ours.batch_norm(x, *running, weight, bias)
    if _kernels.calls_by_arrays() == by_arrays:
        assert not y.untyped_storage().resizable()
        size = y.nbytes
        del y
        assert output_memory()[0] >= size
    else:
        assert layout == "permuted" or x.ndim == 6


def test_without_kept_memory():
    """It can be switched off; then all that PyTorch gets is its own."""
    before = output_memory()[1]
    fastbn.set_output_cache(0)
    try:
        x = normal(16, 64, 8, 9).requires_grad_()
        y = ours.batch_norm(x, torch.zeros(64), torch.ones(64))
        y.backward(torch.ones_like(y))
        assert y.untyped_storage().resizable()
        assert x.grad.untyped_storage().resizable()
    finally:
        fastbn.set_output_cache(before)


def test_kept_memory_outlives_its_tensor():
    """What shares the storage holds it, until the last one is gone; from any thread."""
    fastbn.empty_output_cache()
    x = normal(16, 64, 8, 9)
    y = ours.batch_norm(x, torch.zeros(64), torch.ones(64))
    view, expected = y[3:], y[3:].clone()
    del y
    assert output_memory()[0] == 0
    assert torch.equal(view, expected)
    holder = [view]
    del view
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert output_memory()[0] >= x.nbytes


def test_inputs_stay_resizable():
    """FSDP gives back the memory of parameters by resizing it, which Tensor.numpy() would forbid for good."""
    weight, bias, *running = parameters(5)
    x, residual, grad = (normal(4, 5, 6, seed=s) for s in range(3))
    y = ours.batch_norm(x, *running, weight, bias, True, residual=residual, activation="relu")
    y.backward(grad)
    for t in x, residual, grad, weight, bias, *running, y:
        assert t.untyped_storage().resizable()


def test_without_exchange(monkeypatch, kernels_called):
    """As with a PyTorch of before DLPack's table of functions."""
    results = []
    for exchange in True, False:
        monkeypatch.setattr("fastbn.torch.functional._EXCHANGE", exchange)
        for size in 6, 40_000:  # the larger one in memory that is kept
            weight, bias, *running = parameters(5)
            x, residual = (normal(4, 5, size, seed=s).requires_grad_() for s in range(2))
            y = ours.batch_norm(x, *running, weight, bias, True, residual=residual, activation="relu")
            y.backward(normal(4, 5, size, seed=2))
            results.append([y, *running, x.grad, weight.grad, bias.grad, residual.grad])
    for with_it, without in zip(results[:2], results[2:], strict=True):
        for a, b in zip(with_it, without, strict=True):
            assert torch.equal(a, b)
    assert [name for name, _ in kernels_called] == ["forward", "backward"] * 4


UNUSUAL = {
    "usual": {},
    "no vectors": {"weight": None, "bias": None},
    "momentum 1": {"momentum": 1},
    "momentum above 1": {"momentum": 1.5},
    "eps 0": {"eps": 0.0},
    "eps NaN": {"eps": float("nan")},
    "training 1": {"training": 1},
    "float64 vector": {"weight": torch.ones(5).double()},
    "longer vector": {"bias": torch.ones(6)},
    "vector with gaps": {"bias": torch.ones(10)[::2]},
    "matrix": {"bias": torch.ones(1, 5)},
    "one average": {"running_var": None},
    "no averages": {"running_mean": None, "running_var": None},
    "negative variance": {"running_var": -torch.ones(5)},
    "averages that overlap": {"running_mean": (both := torch.ones(6))[1:], "running_var": both[:5]},
    "averages that learn": {"running_mean": torch.zeros(5, requires_grad=True)},
    "integers": {"input": torch.ones(4, 5, 3, 2, dtype=torch.int64)},
    "rank 1": {"input": torch.ones(5)},
    "rank 6": {"input": normal(2, 5, 2, 2, 2, 3)},
    "empty": {"input": torch.ones(0, 5, 3, 2)},
    "one value": {"input": torch.ones(1, 5, 1, 1)},
    "negated": {"input": torch._neg_view(normal(4, 5, 3, 2))},
    "zero tensor": {"input": torch._efficientzerotensor((4, 5, 3, 2))},
    "sparse": {"input": normal(4, 5, 3, 2).to_sparse()},
    "meta": {"input": torch.ones(4, 5, 3, 2, device="meta")},
    "expanded": {"input": normal(4, 5, 1, 1).expand(4, 5, 3, 2)},
    "permuted": {"input": normal(5, 4, 3, 2).permute(1, 0, 3, 2)},
    "residual to broadcast": {"residual": normal(5, 1, 1)},
    "residual of float64": {"residual": normal(4, 5, 3, 2).double()},
    "residual like it": {"residual": normal(4, 5, 3, 2)},
}


@pytest.mark.parametrize("how", UNUSUAL)
@both_modes
def test_the_short_way_takes_no_more_than_the_long_one(training, how):
    """And both give the same; what neither takes is left untouched."""
    weight, bias, *running = parameters(5)
    call = {
        "input": normal(4, 5, 3, 2), "running_mean": running[0], "running_var": running[1],
        "weight": weight.detach(), "bias": bias.detach(), "training": training, "momentum": 0.1, "eps": 1e-5,
        "residual": None,
    }  # fmt: skip
    call |= {"training": int(training)} if how == "training 1" else UNUSUAL[how]
    running = [t if t is None else t.detach().clone() for t in (call["running_mean"], call["running_var"])]
    counter = torch.tensor(3)
    long_way = why_not(*[call[name] for name in (
        "input", "running_mean", "running_var", "weight", "bias", "training", "residual", "momentum", "eps",
    )])  # fmt: skip
    found = _kernels.torch_forward(*call.values(), None, 0.01, counter if training else None, 2)
    taken = found is not None
    assert not (taken and long_way)
    assert taken or how not in ("usual", "no vectors", "residual like it")
    assert counter == 3 + (taken and training)
    for before, average in zip(running, (call["running_mean"], call["running_var"]), strict=True):
        assert average is None or torch.equal(before, average.detach()) is not (taken and training)
    if taken:
        y = composite(**{**call, "running_mean": running[0], "running_var": running[1]})
        assert torch.allclose(found[0], y, atol=1e-5)
        assert found[0].stride() == y.stride()
        assert found[1] is found[2] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_the_short_way_under_what_watches():
    from torch.utils.flop_counter import FlopCounterMode

    x, running = normal(4, 5, 3), (torch.zeros(5), torch.ones(5))

    def taken():
        call = x, *running, None, None, False, 0.1, 1e-5, None, None, 0.01, None, 1
        return _kernels.torch_forward(*call) is not None

    assert taken()
    with torch.device("cpu"):
        assert not taken()
    with FlopCounterMode(display=False):
        assert not taken()
    with torch.autograd.forward_ad.dual_level():
        assert not taken()
    seen = []
    torch.func.vmap(lambda _: (seen.append(taken()), _)[1])(torch.ones(2))
    torch.jit.trace(lambda t: (seen.append(taken()), t)[1], torch.ones(2), check_trace=False)
    assert seen == [False, False]
    with torch.inference_mode():
        x = normal(4, 5, 3)
        assert taken()
    assert not taken()  # it could not be saved for a backward pass
    with torch.no_grad():
        assert taken()


def test_no_arrays_are_made():
    """Of tensors that the kernels can walk."""
    before = _kernels.calls_by_arrays()
    for x in normal(64, 256), normal(4, 5, 8, 8), normal(4, 8, 8, 5).permute(0, 3, 1, 2), normal(4, 7, 5):
        weight, bias, *running = parameters(x.shape[1])
        residual = x.sin().requires_grad_()  # in the same memory order
        y = ours.batch_norm(
            x.requires_grad_(), *running, weight, bias, True, residual=residual, activation="relu"
        )
        y.backward(y.detach())
        ours.batch_norm(x, *running, weight, bias)
    assert _kernels.calls_by_arrays() == before
    ours.batch_norm(normal(4, 5, 7).mT, *running, weight, bias, True)  # whose output is in another order
    assert _kernels.calls_by_arrays() == before + 1


# Masks.


def masked(x, mask, weight, bias, running, training, eps=1e-5):
    """Only what is real, in float64: (values of y where mask, mean, var, count)."""
    rows = torch.moveaxis(x, 1, -1)[mask.expand(x.shape[:1] + x.shape[2:])].double()
    mean, var = rows.mean(0), rows.var(0, correction=0)
    if not training:
        mean, var = (r.double() for r in running)
    return (rows - mean) / (var + eps).sqrt() * weight.double() + bias.double(), mean, var, len(rows)


@pytest.mark.parametrize("mask_shape", [(4, 6, 7), (6, 7), (4, 1, 7), (1, 6, 1), ()], ids=str)
@both_modes
def test_mask(mask_shape, training):
    x, grad_output = normal(4, 5, 6, 7).requires_grad_(), normal(4, 5, 6, 7, seed=2)
    weight, bias, *running = parameters(5)
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.6
    if not mask_shape:
        mask = torch.tensor(True)
    moved = _clones(running)
    y = ours.batch_norm(x, *moved, weight, bias, training, mask=mask)
    full = mask.expand(4, 6, 7)
    expected, mean, var, count = masked(x.detach(), mask, weight, bias, running, training)
    assert_near(torch.moveaxis(y, 1, -1)[full], expected, 2e-6 * expected.abs().clamp(min=1))
    if training:
        torch.testing.assert_close(moved[0], (0.9 * running[0] + 0.1 * mean).float(), rtol=1e-6, atol=1e-7)
        unbiased = var * count / (count - 1)
        torch.testing.assert_close(
            moved[1], (0.9 * running[1] + 0.1 * unbiased).float(), rtol=1e-6, atol=1e-7
        )
    else:
        assert torch.equal(torch.stack(moved), torch.stack(running))

    # the gradient: sums over all positions that are put out, the batch's terms to the real ones only
    y.backward(grad_output)
    column = (1, -1, 1, 1)
    f = full[:, None].double()
    invstd = (var + 1e-5).rsqrt()
    xhat = (x.detach().double() - mean.view(column)) * invstd.view(column)
    g = grad_output.double()
    sums = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    dx = g
    if training:
        dx = g - f * (sums[0].view(column) + xhat * sums[1].view(column)) / count
    torch.testing.assert_close(
        x.grad, (dx * (invstd * weight.detach()).view(column)).float(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(weight.grad, sums[1].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, sums[0].float(), rtol=1e-5, atol=1e-5)


@both_modes
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_masked_values_do_not_leak(junk, training):
    """Whatever is at False positions: no real output, no average and no gradient changes by a bit."""
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    results = []
    for value in 0.0, junk:
        weight, bias, *running = parameters(5)
        x = torch.where(mask[:, None], normal(3, 5, 3), value).requires_grad_()
        y = ours.batch_norm(x, *running, weight, bias, training, mask=mask, activation="relu")
        (y * y.detach().cos()).masked_fill(~mask[:, None], 0).sum().backward()
        real = torch.moveaxis(y.detach(), 1, -1)[mask]
        results.append([real, *running, x.grad, weight.grad, bias.grad])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_mask_without_a_true_is_an_empty_batch():
    weight, bias, *running = parameters(5)
    x = torch.full((4, 5, 6), torch.nan).requires_grad_()
    moved = _clones(running)
    y = ours.batch_norm(x, *moved, weight, bias, True, mask=torch.zeros(4, 6, dtype=torch.bool))
    assert torch.equal(y, bias.detach().view(1, 5, 1).expand(4, 5, 6))
    assert torch.equal(torch.stack(moved), torch.stack(running))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 5, 6))
    assert torch.equal(weight.grad, torch.zeros(5))
    assert torch.equal(bias.grad, torch.full((5,), 24.0))


def test_mask_is_checked_before_anything_is_written():
    running = torch.zeros(5), torch.ones(5)
    x = normal(4, 5, 6)
    for mask, error, message in (
        (
            torch.ones(4, 6),
            TypeError,
            "mask must be of torch.bool, True where input is real, got torch.float32",
        ),
        (torch.ones(4, 5, 6).bool(), ValueError, r"mask must have the shape .* \[4, 6\], .* got \[4, 5, 6\]"),
        (torch.ones(4).bool(), ValueError, r"\[4, 6\], or one that broadcasts to it, got \[4\]"),
        (
            torch.eye(4, 6).bool() & (torch.arange(4)[:, None] == 0),
            ValueError,
            "more than 1 value per channel",
        ),
    ):
        with pytest.raises(error, match=message):
            ours.batch_norm(x, *running, training=True, mask=mask)
    with pytest.raises(ValueError, match="running_mean and running_var are needed"):
        ours.batch_norm(x.requires_grad_(), None, None, mask=torch.ones(4, 6).bool())
    assert torch.equal(torch.stack(running), torch.stack([torch.zeros(5), torch.ones(5)]))


def test_evaluation_takes_no_statistics_and_needs_no_mask(kernels_called):
    weight, bias, *running = parameters(5)
    with torch.no_grad():
        y = ours.batch_norm(normal(4, 5, 6), *running, weight, bias, mask=torch.ones(4, 6).bool())
    assert [name for name, _ in kernels_called] == ["normalize"]
    assert torch.equal(y, ours.batch_norm(normal(4, 5, 6), *running, weight, bias))


@pytest.mark.parametrize(
    "name", ["nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_pytorch(name, dtype):
    """Trap 33: op_db."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(op for op in op_db if op.name == name)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 9
    for sample in samples:
        results = []
        for function in op.op, ours.batch_norm:
            args, kwargs = copy.deepcopy((sample.args, sample.kwargs))
            mean = var = None
            if name == "nn.functional.batch_norm":
                mean, var, weight, bias, *options = args
            elif len(args) == 5:
                weight, bias, *options = args
            else:
                weight, bias, mean, var, *options = args
            given = mean, var, weight, bias
            if function is not ours.batch_norm:
                given = args[: len(args) - len(options)]
            x = sample.input.detach().clone().requires_grad_()
            y = outcome(function, x, *given, *options, **kwargs)
            if isinstance(y, tuple) and isinstance(y[0], torch.Tensor):
                y = y[0]
            if isinstance(y, torch.Tensor):
                leaves = [t for t in (x, weight, bias) if t is not None]
                y = [y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True), mean, var]
            results.append(y)
        theirs, mine = results
        if isinstance(theirs, tuple):
            assert mine == theirs
            continue
        for a, b in zip(mine, theirs, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=20 * eps, atol=40 * eps * max(1, x.numel() ** 0.5))
