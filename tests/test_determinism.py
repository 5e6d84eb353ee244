"""The same bits for every number of threads, cached or streamed, on AVX2 and AVX-512, among many callers."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import THREADS
from layouts import LAYOUTS
from operations import ACTIVATIONS, OPERATIONS, UNFUSED, assert_same_bits, kernels, output_at, problem, run

import fastbn
from fastbn import _kernels

# Fewer channels than threads, more of them, numbers that no number of threads divides; one tile and many
SHAPES = [
    (2, 1, 90, 100),
    (3, 3, 50, 41),
    (84, 17, 7, 7),
    (5, 130, 14, 14),
    (4, 300, 10, 10),
    (1, 1030, 3, 3),
    (1, 70, 50, 50),
    (20, 11, 17, 16),
    (6000, 20),
    (9, 700),
    (15, 4096),
]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_axes = pytest.mark.parametrize("axis", [1, -1])
operations = pytest.mark.parametrize("operation", OPERATIONS)


def fusing(operation):
    """Arguments of `run` that fuse all that can be fused."""
    return () if operation in UNFUSED else ("leaky_relu", True)


@pytest.mark.one_in(3)
@shapes
@both_axes
@operations
def test_every_number_of_threads(isa, shared_out, shape, axis, operation):  # case 23
    p = problem(shape, axis, offset=10)
    serial = run(operation, p, *fusing(operation), num_threads=1)
    for threads in (*THREADS[1:], None):
        assert_same_bits(
            run(operation, p, *fusing(operation), num_threads=threads), serial, f"{threads} threads"
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(32, 17, 13, 13), (4, 300, 30, 30)], ids=str)
@both_axes
@operations
def test_sizes_that_decide_what_is_shared_out(isa, shape, axis, operation):
    """Without `shared_out`: a small share of work stays with one thread, a larger one does not."""
    p = problem(shape, axis, offset=10)
    serial = run(operation, p, *fusing(operation), num_threads=1)
    for threads in THREADS[1:]:
        assert_same_bits(
            run(operation, p, *fusing(operation), num_threads=threads), serial, f"{threads} threads"
        )


@pytest.mark.one_in(3)
@shapes
@both_axes
@operations
@pytest.mark.parametrize("threads", [1, 3])
def test_streaming(isa, shared_out, shape, axis, operation, threads):
    p = problem(shape, axis)
    found = []
    try:
        # tensors that fit the cache: none, those that are read, all
        for tensors, group in (
            (0, 0),
            (0, 2**14),
            (0, 2**17),
            (1.5, 2**17),
            (2.5, 2**17),
            (3.5, 2**17),
            (100, 0),
        ):
            _kernels.tune(cache=int(tensors * p.x.nbytes) + 1, group=group)
            found.append(run(operation, p, *fusing(operation), num_threads=threads))
    finally:
        _kernels.tune(cache=0, group=0)
    for other in found[1:]:
        assert_same_bits(found[0], other)


@pytest.mark.parametrize("shape", [(3, 7, 70, 60), (30, 7, 20, 20), (30, 40, 7, 7)], ids=str)
@pytest.mark.parametrize("channel", [0, 2, 6])
def test_streamed_tiles_that_are_summed_again(isa, shared_out, shape, channel):
    """Where float32 has not the range, in one tile of a channel beside others."""
    for n in 0, shape[0] // 2, shape[0] - 1:
        p = problem(shape, 1)
        p.x[n, channel] *= 1e18
        expected = run("training", p, num_threads=1)
        with kernels(streamed=True):
            for threads in 1, 3:
                assert_same_bits(run("training", p, num_threads=threads), expected, f"sample {n}")


@pytest.mark.parametrize("shape", [(9, 1024), (3, 2048, 3, 1), (2, 40, 7, 7), (2, 3, 40, 50)], ids=str)
@both_axes
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o not in UNFUSED])
def test_wherever_the_output_lies(isa, shared_out, shape, axis, operation):
    """Rows of whole pages are gone through from their end where the output lies just above an input, and are
    shared out by the pages of the output."""
    p = problem(shape, axis)
    expected = run(operation, p, "leaky_relu", True, num_threads=1)
    above = [p.x.ctypes.data + distance for distance in (0, 20, 64, 128, 2048, 4032)]
    for place in *above, 0, 16, 4060, 4092:
        for threads in 1, 2:
            found = run(operation, p, "leaky_relu", True, output_at(place, p), threads)
            assert_same_bits(found, expected, f"at {place % 4096} of a page, {threads} threads")


@pytest.mark.skipif(len(_kernels.supported_isas()) < 3, reason="needs AVX-512")
@both_axes
@operations
@pytest.mark.parametrize("offset", [0, 1e4, 1e20])
def test_avx2_and_avx512_agree(operation, offset, axis):
    odd = (3, 3), (2, 5, 4097), (8, 65, 169), (3, 17, 2), (5, 3, 767), (7, 64, 9), (3, 96, 43)
    for shape in (*SHAPES, *odd):
        p = problem(shape, axis, offset)
        if offset == 1e20:
            p.x[..., ::2] *= -1
        for activation in ACTIVATIONS if offset == 0 and operation not in UNFUSED else [None]:
            found = []
            for isa in "avx2", "avx512":
                with kernels(isa):
                    found.append(run(operation, p, activation, activation is not None))
            assert_same_bits(*found, f"{shape} {activation}")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("broadcast")])
def test_elementwise_results_do_not_depend_on_layout(isa, layout):
    """What is not summed has one right rounding, however the memory is walked."""
    for shape in (3, 17, 7, 9), (4, 130, 5, 5), (9, 65), (2, 3, 4100):
        p, q = problem(shape), problem(shape, x=layout, residual=layout, grad_output=layout)
        for operation in "inference", "forward_given_stats":
            assert_same_bits(run(operation, q, "relu", True), run(operation, p, "relu", True))
        gradients = [run("frozen_backward", r, "relu", True) for r in (p, q)]
        for name in "grad_input", "grad_residual":
            assert gradients[0][name].tobytes() == gradients[1][name].tobytes()


def all_at_once(calls, repeat=10):
    """Results of calling each of `calls` repeatedly, each in a thread of its own, all starting together."""
    barrier = threading.Barrier(len(calls))

    def caller(call):
        barrier.wait(timeout=60)
        return [call() for _ in range(repeat)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caller, calls))


@both_axes
def test_sixteen_threads_with_one_frozen_layer(isa, axis):  # case 22
    p = problem((2, 16, 40, 40), axis)
    frozen = fastbn.FrozenBatchNorm(p.running_mean, p.running_var, p.weight, p.bias, axis=axis)
    inputs = [np.roll(p.x, i) for i in range(16)]
    serial = [fastbn.batch_norm(x, *p[5:7], p.weight, p.bias, axis=axis, num_threads=1) for x in inputs]
    found = all_at_once([lambda x=x: frozen(x) for x in inputs])
    for results, expected in zip(found, serial, strict=True):
        for y in results:
            assert y.tobytes() == expected.tobytes()


@both_axes
def test_sixteen_threads_with_one_layer_in_evaluation(isa, axis):  # case 22
    p = problem((2, 16, 40, 40), axis)
    layer = fastbn.BatchNorm2d(16, axis=axis).eval()
    layer.load_state_dict(
        {name: getattr(p, name) for name in ("weight", "bias", "running_mean", "running_var")}
    )
    inputs = [np.roll(p.x, i) for i in range(16)]
    serial = [fastbn.batch_norm(x, *p[5:7], p.weight, p.bias, axis=axis, num_threads=1) for x in inputs]
    found = all_at_once([lambda x=x: layer(x) for x in inputs])
    for results, expected in zip(found, serial, strict=True):
        for y in results:
            assert y.tobytes() == expected.tobytes()


@both_axes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sixteen_threads_with_every_operation(shared_out, axis, threads):
    """Other operations, shapes and sizes at once: no state is shared between calls."""
    problems = [problem((2 + i, 1 + 5 * i, 9, 11), axis, seed=i) for i in range(16)]
    names = [OPERATIONS[i % len(OPERATIONS)] for i in range(16)]
    serial = [run(name, p, *fusing(name), num_threads=1) for p, name in zip(problems, names, strict=True)]
    calls = [
        lambda p=p, name=name: run(name, p, *fusing(name), num_threads=threads)
        for p, name in zip(problems, names, strict=True)
    ]
    for found, expected, name in zip(all_at_once(calls), serial, names, strict=True):
        for result in found:
            assert_same_bits(result, expected, name)


@pytest.mark.parametrize("operation", ["batch_stats", "forward", "backward", "inference", "frozen"])
def test_other_threads_run_meanwhile(operation):
    """The GIL is released: with this switch interval another thread gets it in no other way."""
    p = problem((4, 16, 64, 64))
    running, out = (p.running_mean, p.running_var), np.empty_like(p.x)
    stats, frozen = fastbn.batch_stats(p.x), fastbn.FrozenBatchNorm(*running)
    call = {
        "batch_stats": lambda: fastbn.batch_stats(p.x),
        "forward": lambda: fastbn.batch_norm_forward(p.x, out=out),
        "backward": lambda: fastbn.batch_norm_backward(p.grad_output, p.x, stats, out=out),
        "inference": lambda: fastbn.batch_norm(p.x, *running, out=out),
        "frozen": lambda: frozen(p.x, out=out),
    }[operation]
    started, ran = threading.Event(), threading.Event()

    def other():
        started.wait()
        ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    fastbn.set_num_threads(1)
    try:
        started.set()
        deadline = time.monotonic() + 10
        while not ran.is_set() and time.monotonic() < deadline:
            call()
        assert ran.is_set()
    finally:
        fastbn.set_num_threads(None)
        sys.setswitchinterval(interval)
        thread.join()
