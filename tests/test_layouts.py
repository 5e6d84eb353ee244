"""Operands in every memory layout, alike and mixed; where outputs go, and what may lie in one place."""

import tracemalloc

import numpy as np
import pytest
from layouts import LAYOUTS, WRITABLE, arrange
from operations import OPERATIONS, UNFUSED, assert_same_bits, call, check, problem, run

import fastbn

SHAPES = [(6, 5), (300, 16), (4, 17, 9), (3, 5, 6, 7), (2, 64, 7, 7), (2, 3, 70, 60), (2, 3, 2, 5, 4)]
BACKWARDS = ("backward", "frozen_backward", "backward_by_sums")

both_axes = pytest.mark.parametrize("axis", [1, -1])
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.mark.one_in(2)
@both_axes
@every_layout
@shapes
def test_all_operands_alike(isa, shape, axis, layout):  # cases 13 and 14
    p = problem(shape, axis, x=layout, residual=layout, grad_output=layout)
    for operation in OPERATIONS:
        check(operation, p)
        if operation not in UNFUSED:
            check(operation, p, "relu", add=True)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(15, 640), (15, 1024), (2050, 136), (353, 768), (257, 1040)], ids=str)
def test_several_rows_at_a_time(isa, shape, operation):
    """As many as their columns and operands allow, with prefetches from 1 MB on; here some are left over."""
    p = problem(shape)
    check(operation, p)
    if operation not in UNFUSED:
        check(operation, p, "relu", add=True)


@both_axes
@every_layout
@pytest.mark.parametrize("operand", ["x", "residual", "grad_output"])
def test_one_operand_unlike_the_others(isa, shared_out, operand, axis, layout):
    p = problem((3, 17, 6, 7), axis, **{operand: layout})
    for operation in BACKWARDS if operand == "grad_output" else OPERATIONS:
        check(operation, p, None, add=operation not in UNFUSED, num_threads=3)


@pytest.mark.parametrize("axis", [0, 2, -2, -4])
@every_layout
def test_any_axis(isa, axis, layout):
    p = problem((3, 5, 6, 7), axis, x=layout, residual=layout, grad_output=layout)
    for operation in OPERATIONS:
        check(operation, p, None, add=operation not in UNFUSED)


@both_axes
@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "broadcast_everywhere"])
@pytest.mark.parametrize(
    "shape", [(4, 5, 3, 2), (4, 1, 3, 2), (4, 5, 1, 1), (4, 1, 1, 1), (2, 3, 80, 60)], ids=str
)
def test_backward_of_mixed_memory_orders(isa, shape, axis, layout):  # case 10
    """Right, and for equal layouts of x equal to the bit, wherever grad_output and residual come from."""
    for x in "contiguous", "channels_last", "channels_first":
        p = problem(shape, axis, x=x, grad_output=layout, residual=layout)
        copies = p._replace(
            grad_output=np.ascontiguousarray(p.grad_output), residual=np.ascontiguousarray(p.residual)
        )
        for operation in BACKWARDS:
            grads = check(operation, p, "leaky_relu", add=True)
            assert_same_bits(grads, run(operation, copies, "leaky_relu", True), x)


@pytest.mark.one_in(3)
@both_axes
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize(
    "x", ["contiguous", "channels_last", "channels_first", "stepped_width", "misaligned"]
)
def test_out_of_every_layout(isa, streamed, axis, layout, x):
    for shape in (6, 5), (4, 17, 9), (2, 64, 7, 7), (2, 3, 70, 60):
        p = problem(shape, axis, x=x)
        for operation in "training", "inference", "backward", "frozen_backward":
            out = arrange(np.full(p.x.shape, np.nan), layout, axis)
            check(operation, p, "relu", True, out)


@pytest.mark.one_in(2)
@both_axes
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("operation", ["training", "inference", "forward", "forward_given_stats"])
def test_in_place(isa, streamed, operation, axis, layout):  # case 12
    for shape in (6, 5), (4, 17, 9), (2, 64, 7, 7), (2, 3, 70, 60):
        p = problem(shape, axis, x=layout)
        expected = run(operation, p, "leaky_relu", True)
        for out in p.x, p.x[:]:
            q = problem(shape, axis, x=layout)
            q = q._replace(x=q.x)
            out = q.x if out is p.x else q.x[:]
            results = run(operation, q, "leaky_relu", True, out)
            assert results["y"] is out
            assert_same_bits({"y": np.array(q.x)}, {"y": np.array(expected["y"])})


@both_axes
def test_in_place_with_many_threads(isa, threads, axis):
    for shape in (5, 130, 14, 14), (2, 3, 70, 60), (300, 17):
        expected = run("training", problem(shape, axis))["y"]
        p = problem(shape, axis)
        assert np.array_equal(run("training", p, out=p.x, num_threads=threads)["y"], expected)


@both_axes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 17, 9), (3, 5, 6, 7), (2, 3, 2, 5, 4)], ids=str)
def test_new_outputs_have_the_memory_order_of_x(shape, axis, layout):
    p = problem(shape, axis, x=layout)
    stats = fastbn.batch_stats(p.x, axis=axis)
    outputs = [run(operation, p)["y"] for operation in ("training", "inference")]
    outputs += [
        array
        for training in (True, False)
        for array in fastbn.batch_norm_backward(
            p.grad_output, p.x, stats, training=training, axis=axis, residual=p.residual
        )[::3]
    ]
    for output in outputs:
        assert output.strides == np.empty_like(p.x).strides
        assert output.flags.writeable
        assert not np.shares_memory(output, p.x)


def test_memory_mapped_file(tmp_path):  # case 13
    p = problem((4, 17, 9))
    np.save(tmp_path / "x.npy", p.x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = run("training", p._replace(x=mapped))["y"]
    assert np.array_equal(y, run("training", p)["y"])
    assert type(y) is np.ndarray
    written = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, p.x.shape)
    assert run("training", p, out=written)["y"] is written
    written.flush()
    assert np.array_equal(np.load(tmp_path / "y.npy"), y)


def test_parameters_may_be_inputs_twice():
    """One array in several roles is fine as long as it is only read."""
    p = problem((4, 17, 9))
    y = call(fastbn.batch_norm, p.x, p.bias, p.weight**2, p.bias, p.bias, residual=p.x)
    expected = fastbn.batch_norm(
        p.x, p.bias.copy(), p.weight**2, p.bias.copy(), p.bias.copy(), residual=p.x.copy()
    )
    assert np.array_equal(y, expected)


@both_axes
@pytest.mark.parametrize("shape", [(40, 3, 30, 30), (40, 17, 30, 30), (40, 64, 20, 20), (900, 100)], ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced_batch", "sliced_channels", "second_float"]
)
def test_what_is_walked_without_a_copy(shape, axis, layout):
    p = problem(shape, axis, x=layout)
    running = p.running_mean, p.running_var
    out = arrange(np.zeros_like(p.x), layout, axis)
    fastbn.empty_output_cache()
    tracemalloc.start()
    try:
        fastbn.batch_norm(p.x, *running, p.weight, p.bias, out=out, axis=axis)
        fastbn.batch_norm(p.x, *running, p.weight, p.bias, True, out=out, axis=axis)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < p.x.nbytes / 4
