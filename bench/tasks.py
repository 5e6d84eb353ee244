"""What compare.py times: an operation on the arrays of one shape, layout and dtype, and who can do it how."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from shapes import channels_last, values_per_channel

OPS = (
    "inference",
    "inference+relu",
    "inference+residual+relu",
    "training",
    "training+relu",
    "backward",
    "backward+relu",
)
MORE_OPS = ("inference+silu", "training+silu")  # where --ops names them
DTYPES = ("float32", "bfloat16", "float16", "float64")
NCHW, NHWC, NC, BLOCKED = "NCHW", "channels-last", "(N, C)", "blocked"
EPS, MOMENTUM = 1e-5, 0.1
BASE_VALUES = 1_000_003  # random values, repeated: a prime number, so that no two channels are the same


def user_layouts(shape):
    """The layouts in which users hold an array of this shape."""
    return (NC,) if len(shape) == 2 else (NCHW, NHWC)


def numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def aligned(shape, dtype=np.float32):
    """An array that starts where a cache line does, as the arrays of most peers do: the same for everyone."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


class Data:
    """The arrays of one shape in one layout. The statistics and y (of training+relu) are those of x.

    With `like` the values are those of another Data of this shape, in memory of its own.
    """

    def __init__(self, shape, layout, dtype="float32", like=None):
        _, c, *spatial = shape
        self.shape, self.layout, self.dtype, self.count = shape, layout, dtype, values_per_channel(shape)
        self.numpy_dtype = numpy_dtype(dtype)
        self.axis = -1 if layout == NHWC else 1
        dims = channels_last(shape) if layout == NHWC else shape
        self.per_channel = (1, c) + (1,) * len(spatial) if self.axis == 1 else (c,)
        self.reduced = tuple(i for i in range(len(dims)) if i != self.axis % len(dims))
        self.arrays = self.x, self.grad_output, self.residual, self.y = [
            aligned(dims, self.numpy_dtype) for _ in range(4)
        ]
        if like:
            self.vectors = like.vectors
            for a, b in zip(self.arrays, like.arrays, strict=True):
                np.copyto(np.moveaxis(a, self.axis, 1), np.moveaxis(b, like.axis, 1))
        else:
            self.vectors = self.fill()
        self.weight, self.bias, self.running_mean, self.running_var, self.mean, self.invstd = self.vectors

    def fill(self):
        """Compute all values; returns the vectors, which are float32 where the arrays are halves."""
        rng = np.random.default_rng(0)
        base = rng.standard_normal(min(math.prod(self.shape), BASE_VALUES), np.float32)
        for a, offset in zip(self.arrays[:3], (0.5, 0, 0), strict=True):
            # The values of every layout are those of NCHW.
            np.copyto(
                np.moveaxis(a, self.axis, 1),
                np.resize(rng.permutation(base) + np.float32(offset), self.shape),
                casting="unsafe",
            )
        c = self.shape[1]
        weight, bias, running_mean = rng.standard_normal((3, c))
        running_var = rng.random(c) + 0.5
        x = self.x if self.x.itemsize >= 4 else self.x.astype(np.float32)
        mean = x.mean(self.reduced, np.float64)
        y = x - mean.astype(x.dtype).reshape(self.per_channel)
        var = np.einsum("...,...->...", y, y).mean(self.reduced, np.float64)
        invstd = 1 / np.sqrt(var + EPS)
        y *= (weight * invstd).astype(x.dtype).reshape(self.per_channel)
        y += bias.astype(x.dtype).reshape(self.per_channel)
        np.copyto(self.y, np.maximum(y, 0, out=y), casting="unsafe")
        vectors = weight, bias, running_mean, running_var, mean, invstd
        return [np.ascontiguousarray(v.astype(x.dtype)) for v in vectors]

    def empty(self):
        return aligned(self.x.shape, self.numpy_dtype)

    def running(self):
        return self.running_mean.copy(), self.running_var.copy()


class Task(NamedTuple):
    """One operation on one shape in one layout."""

    op: str
    data: Data
    preallocate: bool  # or as called by default, with fresh outputs

    @property
    def kind(self):
        return self.op.partition("+")[0]

    @property
    def activation(self):
        return next((name for name in ("relu", "silu") if self.op.endswith(name)), None)

    @property
    def relu(self):
        return self.activation == "relu"

    @property
    def residual(self):
        return "residual" in self.op

    @property
    def written(self):
        """What the operation before wrote."""
        return self.data.grad_output if self.kind == "backward" else self.data.x


class Candidate(NamedTuple):
    """One way to do a task. Between them call and result hold whatever memory the call works on."""

    how: str
    call: Callable[[], Any]
    # From what call() returned to (y,) or (grad_input, grad_weight, grad_bias), in the layout of the data.
    result: Callable[[Any], tuple]


class Contestant:
    layouts = (NCHW, NHWC, NC)
    dtypes = ("float32",)
    checked = True  # against the oracle
    shapes = None  # or patterns of those it is timed on where the command line names none
    # Whether its candidates read the task's own arrays, and result() shows its outputs without a copy: then
    # there are chain rows.
    chain = False

    def candidates(self, task: Task, layout: str) -> Iterator[Candidate]:
        raise NotImplementedError
