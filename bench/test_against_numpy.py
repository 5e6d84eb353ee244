"""fastbn against the NumPy baseline, every shape and layout; `python bench/ratios.py` prints the ratios.

The two contestants share their arrays and take turns in bursts of some tens of milliseconds, so that a
ratio is one between neighbours in time, also on a machine that slows down or speeds up. Each burst begins
with a warm-up, so that it finds the caches as the contestant itself leaves them, and no thread still
spinning after the other's calls.
"""

from functools import lru_cache

import numpy as np
import pytest
from shapes import SHAPES, channels_last, label, values_per_channel

import fastbn
from fastbn import baseline

BURSTS = 3
CASES = [
    pytest.param(shape, axis, op, id=f"{label(shape)}-{'last' if axis == -1 else 'second'}-{op}")
    for shape in SHAPES
    for axis in ((1, -1) if len(shape) > 2 else (1,))  # (N, C) is both
    for op in ("inference", "inference+relu", "forward", "backward")
    if values_per_channel(shape) > 1 or op.startswith("inference")
]


class Problem:
    """The arrays of one shape, and what each contestant does with them."""

    def __init__(self, shape, axis):
        rng = np.random.default_rng(0)
        c = shape[1]
        dims = shape if axis == 1 else channels_last(shape)
        x, dy = (rng.standard_normal(dims, np.float32) for _ in range(2))
        x += 1
        weight, bias, running_mean = rng.standard_normal((3, c), np.float32)
        running_var = rng.random(c, np.float32) + np.float32(0.5)
        inference = x, running_mean, running_var, weight, bias
        forward = x, running_mean.copy(), running_var.copy(), weight, bias
        self.out = np.empty_like(x)
        how = {"axis": axis, "out": self.out}
        self.calls = {
            ("inference", "numpy"): lambda: baseline.inference(*inference, **how),
            ("inference", "fastbn"): lambda: fastbn.batch_norm(*inference, **how),
            ("inference+relu", "numpy"): lambda: baseline.inference(*inference, relu=True, **how),
            ("inference+relu", "fastbn"): lambda: fastbn.batch_norm(*inference, activation="relu", **how),
        }
        if values_per_channel(shape) > 1:
            stats = fastbn.batch_stats(x, axis=axis)
            mean, invstd = (a.astype(np.float32) for a in (stats.mean, 1 / np.sqrt(stats.var + 1e-5)))
            self.calls |= {
                ("forward", "numpy"): lambda: baseline.training_forward(*forward, **how),
                ("forward", "fastbn"): lambda: fastbn.batch_norm(*forward, training=True, **how),
                ("backward", "numpy"): lambda: baseline.backward(dy, x, mean, invstd, weight, **how),
                ("backward", "fastbn"): lambda: fastbn.batch_norm_backward(dy, x, stats, weight, bias, **how),
            }


@lru_cache(maxsize=1)  # neighbouring tests share a problem, and the next one takes its memory
def problem(shape, axis):
    return Problem(shape, axis)


@lru_cache(maxsize=1)
def check_equal_work(shape, axis, op):
    """Both contestants compute the same thing, or there is nothing to compare."""
    the = problem(shape, axis)
    results = []
    for contestant in ("numpy", "fastbn"):
        the.out.fill(np.nan)
        the.calls[op, contestant]()
        results.append(the.out[[0, -1]])
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.benchmark(min_time=1e-4, max_time=0.02, min_rounds=3, warmup=True, disable_gc=True)
@pytest.mark.parametrize("contestant", ["numpy", "fastbn"])
@pytest.mark.parametrize("burst", range(BURSTS))
@pytest.mark.parametrize(("shape", "axis", "op"), CASES)
def test_speed(benchmark, shape, axis, op, burst, contestant):
    benchmark.group = f"{op}, {label(shape)}, channels {'last' if axis == -1 else 'second'}"
    check_equal_work(shape, axis, op)
    benchmark(problem(shape, axis).calls[op, contestant])
