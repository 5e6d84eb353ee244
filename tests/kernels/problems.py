"""Problems for driver.c: how they are written, and how what it made of them is read and judged."""

import os
import random
import subprocess
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from operations import ACTIVATIONS, DTYPES, SLOPE, Problem, assert_within, expect

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.c")
PARTS = ("dispatch", "machine", "plan", "schedule", "workplace")  # of src_c, beside the kernels


def objects_in(folder):
    """What the driver is linked with, of a build in that folder."""
    loops = [file for part in ("planes", "rows", "terms") for file in folder.glob(f"{part}_*.o")]
    return [*loops, *(folder / f"src_c/{name}.o" for name in PARTS)]


GAP = b"\x5a" * 8  # what driver.c fills memory with
ELEMENTS = ("float32", "float64", "float16", "bfloat16")  # as kernels.h numbers them
WAY = "way, tiles, rows, stores"
BACKWARD = {
    WAY: np.int64, "grad_weight": np.float32, "grad_bias": np.float32, "grad_input": np.float32,
    "grad_residual": np.float32,
    f"{WAY} of sums": np.int64, "dz": np.float64, "dz_dev": np.float64,
    f"{WAY} from sums": np.int64, "grad_input from sums": np.float32,
}  # fmt: skip
TRAINING = {
    f"{WAY} of training": np.int64, "mean": np.float64, "var": np.float64,
    "running_mean": np.float32, "exact mean": np.float64, "running_var": np.float32, "exact var": np.float64,
}  # fmt: skip
INFERENCE = {f"{WAY} of inference": np.int64}


def results_in_order(case):
    """The names and types of what driver.c writes."""
    names = (INFERENCE if case.frozen else TRAINING) | {"y": np.float32} | BACKWARD
    if case.dtype == "float32":
        return names
    elements = "y", "grad_input", "grad_residual", "grad_input from sums"
    real = np.float64 if case.dtype == "float64" else np.float32
    return {
        name: DTYPES[case.dtype]
        if name in elements
        else real
        if name in ("grad_weight", "grad_bias")
        else kind
        for name, kind in names.items()
    }


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, f"exit status {done.returncode} of {' '.join(map(str, command))}"
    return done


class Case(NamedTuple):
    rows: bool  # channels-last, or planes
    N: int
    C: int
    S: int
    activation: str | None = None
    residual: bool = False
    stream: bool = False  # as if there were no cache
    frozen: bool = False
    affine: bool = True
    threads: int = 1
    gaps: bool = False  # between rows and planes, or planes in another order; for rows only where fold is 1
    values: str = "normal"
    dtype: str = "float32"
    mask: str | None = None
    mask_output: bool = False


VALUES = {
    "normal": lambda rng, x: x,
    "offset": lambda rng, x: x + 1e4,
    "far": lambda rng, x: x + 1e6,
    "outlier": lambda rng, x: np.where(np.arange(x.shape[-1]) == 0, 1e6, x),
    "constant": lambda rng, x: np.full_like(x, 1e7),
    "huge": lambda rng, x: np.sign(x) * 1e30,
    "zeros": lambda rng, x: rng.choice([-0.0, 0.0], x.shape),
    "tiny": lambda rng, x: x * 1e-25,  # whose squares are 0 in float32
    "cancelling": lambda rng, x: rng.choice([-1e-25, 0.0, 1e-25], x.shape),  # to a sum of 0, at times
    "subnormal": lambda rng, x: x * 1e-40,
    "largest": lambda rng, x: rng.choice(np.array([1, -1]) * float(np.finfo(np.float32).max), x.shape),
    "infinite": lambda rng, x: np.where(rng.random(x.shape) < 0.1, np.inf, x),
    "nan": lambda rng, x: np.where(rng.random(x.shape) < 0.1, np.nan, x),
}
MASKS = {
    "coins": lambda rng, N, S: rng.random((N, S)) < 0.5,
    "lengths": lambda rng, N, S: np.arange(S) < rng.integers(0, S + 1, (N, 1)),
    "runs": lambda rng, N, S: np.repeat(rng.random((N, S)) < 0.5, 40, 1)[:, :S],
    "one": lambda rng, N, S: np.zeros((N, S), bool),
}
BEYOND_THE_ORACLE = ("largest", "infinite", "nan")  # only the bits are compared


NAMES = ("activation", "residual", "stream", "frozen", "affine", "threads")
CHOICES = list(product(ACTIVATIONS, [False, True], [False, True], [False, True], [True, False], [1, 2, 5]))
OPTIONS = [dict(zip(NAMES, CHOICES[i * 41 % len(CHOICES)], strict=True)) for i in range(len(CHOICES))]


def groups():
    """Named lists of cases. What is taken in turn has periods without a common factor."""
    option, n, values = cycle(OPTIONS), cycle((1, 2, 3, 2, 1)), cycle(["normal", "normal", *VALUES])
    gaps = cycle((True, False, False, True, False, False, False))
    small = list(product((1, 3, 16, 17, 64, 65, 130), range(1, 131)))
    many = list(product((1, 3, 17), range(1, 131)))
    large = [*product((1, 3, 16), (4095, 4096, 4097, 12544)), (65, 4097), (130, 4095)]
    wide = list(product((1, 2, 3), (128, 144, 257, 528, 1030), (1, 2, 7, 130), (False, True)))
    mixed = [(1, 1), (3, 5), (17, 49), (65, 131), (16, 300), (33, 7), (130, 49), (64, 64), (3, 4097)]
    odd = [(1, 1, 1), (2, 3, 5), (3, 17, 49), (2, 65, 131), (2, 2, 4200)]
    return {
        "planes, every tail": [Case(False, next(n), *s, **next(option), gaps=next(gaps)) for s in small],
        "rows, every tail": [Case(True, next(n), *s, **next(option)) for s in small],
        "planes, many": [Case(False, 83, *s, **next(option), gaps=next(gaps)) for s in many],
        "rows, many": [Case(True, 83, *s, **next(option)) for s in many[::3]],
        "planes, large": [Case(False, N, *s, **next(option), gaps=N > 1) for N in (1, 2, 3) for s in large],
        "rows, large": [Case(True, N, *s, **next(option)) for N in (1, 2, 3) for s in large],
        "rows, wide": [Case(True, N, C, S, **next(option), gaps=gap) for N, C, S, gap in wide],
        "options": [
            Case(rows, *s, **every) for every in OPTIONS for rows in (False, True) for s in odd[1:3]
        ],
        "elements": [
            Case(rows, N, *s, **next(option), gaps=next(gaps) and not rows, dtype=dtype)
            for dtype in ELEMENTS[1:] for rows in (False, True) for N in (1, 5, 2, 3) for s in mixed
        ] + [
            Case(True, next(n), C, S, **next(option), gaps=True, dtype=dtype)
            for dtype in ELEMENTS[1:] for C in (144, 257) for S in (1, 7, 130, 300)
        ],
        "masks": [
            Case(rows, N, *s, **next(option), gaps=next(gaps) and not rows, dtype=dtype,
                 mask=mask, mask_output=at, values=next(values) if dtype == "float32" else "normal")
            for dtype in ELEMENTS for mask in MASKS for rows in (False, True) for at in (False, True)
            for N in (1, 3, 5) for s in mixed
        ],
        "values": [
            Case(rows, *s, **next(option), values=v)
            for v in VALUES for _ in range(8) for rows in (False, True) for s in odd
        ],
    }  # fmt: skip


OPERANDS = ("x", "residual", "grad_output", "y", "grad_input", "grad_residual")


class Place:
    """Where the elements of an operand lie in its buffer."""

    def __init__(self, sizes, case, rng):
        self.sizes = outer, inner, run = sizes
        self.outer, self.inner, self.spare = inner * run, run, int(rng.choice([0, 0, 1, 5, 12, 16]))
        if case.gaps and not case.rows and rng.random() < 0.3:  # a channel's planes follow one another
            self.outer = run + rng.integers(4)
            self.inner = outer * self.outer
        elif case.gaps:
            self.inner += rng.integers(4)
            self.outer = inner * self.inner + rng.integers(20)
        self.length = (outer - 1) * self.outer + (inner - 1) * self.inner + run

    def elements(self, buffer):
        return as_strided(buffer, self.sizes, [n * buffer.itemsize for n in (self.outer, self.inner, 1)])


class Job:
    """A case with values."""

    def __init__(self, case, seed):
        rng = np.random.default_rng(seed)
        N, C, S = case.N, case.C, case.S
        self.packed = not case.gaps
        if case.rows and self.packed:  # rows without gaps are one batch
            N, S = 1, N * S
        sizes = (N, S, C) if case.rows else (N, C, S)
        self.case, self.dimensions, self.axis = case, (N, C, S), 2 if case.rows else 1
        # the backward pass takes its mask from y
        self.from_output = case.activation in ("relu", "relu6", "leaky_relu") and seed % 3 == 0
        absent = () if case.residual else ("residual", "grad_residual")
        self.places = {name: Place(sizes, case, rng) for name in OPERANDS if name not in absent}
        self.running = [rng.standard_normal(C).astype(np.float32), rng.uniform(0.5, 2, C).astype(np.float32)]
        self.mask = None
        if case.mask:
            self.mask = MASKS[case.mask](rng, *[n for i, n in enumerate(sizes) if i != self.axis])
            self.mask.flat[rng.integers(self.mask.size)] = True  # without any there is no batch
        real = np.float64 if case.dtype == "float64" else np.float32
        self.weight, self.bias = np.ones(C, real), np.zeros(C, real)
        if case.affine:
            self.weight, self.bias = rng.standard_normal((2, C)).astype(real)
            if case.values == "zeros":
                self.bias *= 0  # keeps the sign: some outputs are -0
        self.inputs = {}
        for name in OPERANDS[:3]:
            values = rng.standard_normal(sizes)
            if name == "x":
                values = VALUES[case.values](rng, values)
            if name in self.places:
                self.inputs[name] = np.full(self.places[name].length, np.nan, DTYPES[case.dtype])
                self.places[name].elements(self.inputs[name])[...] = values

    def write(self, file, order):
        case = self.case
        cache, group = (1, 1 << 14) if case.stream else (1 << 30, 0)
        integers = [
            case.rows,
            ELEMENTS.index(case.dtype),
            ACTIVATIONS.index(case.activation),
            self.packed,
            *self.dimensions,
            case.frozen,
        ]
        integers += [case.affine, case.threads, cache, group, self.from_output]
        integers += [self.mask is not None, case.mask_output]
        write_values(file, order, integers, np.int64)
        write_values(file, order, [1e-5, SLOPE], np.float64)
        for name in OPERANDS:
            place = self.places.get(name)
            fields = [place.length, place.outer, place.inner, place.spare] if place else [0] * 4
            write_values(file, order, fields, np.int64)
        write_values(file, order, self.running)
        if case.affine:
            write_values(file, order, [self.weight, self.bias], self.weight.dtype)
        if self.mask is not None:
            self.mask.tofile(file)
        for buffer in self.inputs.values():
            bits = f"u{buffer.itemsize}"  # for which there are byte orders; ml_dtypes has none
            write_values(file, order, buffer.view(bits), bits)

    def check(self, results):
        """Against the oracle; and that of the outputs' memory the elements were written, and nothing else."""
        for name in set(OPERANDS[3:]) & set(self.places):
            rest = results[name].view(f"u{results[name].itemsize}").copy()
            gap = np.frombuffer(GAP, rest.dtype)[0]
            self.places[name].elements(rest)[...] = gap
            assert (rest == gap).all(), f"{name} was written outside its elements"
        if self.case.values in BEYOND_THE_ORACLE or DTYPES[self.case.dtype].itemsize == 2:
            return
        operands = {name: self.places[name].elements(buffer) for name, buffer in self.inputs.items()}
        operands.setdefault("residual", None)
        p = Problem(**operands, weight=self.weight, bias=self.bias, axis=self.axis,
                    mask=self.mask, mask_output=self.case.mask_output,
                    running_mean=self.running[0], running_var=self.running[1])  # fmt: skip
        operations = (
            ("forward_given_stats", "frozen_backward") if self.case.frozen else ("forward", "backward")
        )
        expected = {}
        for operation in operations:
            expected |= expect(operation, p, self.case.activation, self.case.residual)
        for name, (value, bound) in expected.items():
            if name != "count":
                place = self.places.get(name)
                assert_within(place.elements(results[name]) if place else results[name], value, bound, name)


def jobs_of(group, one_of=1):
    """The jobs of a group's cases, or some of them, by chance: what is taken in turn has small periods."""
    cases = list(enumerate(groups()[group]))
    chosen = random.Random(0).sample(cases, -(-len(cases) // one_of))
    return [Job(case, seed) for seed, case in chosen]


def write_values(file, order, values, dtype=np.float32):
    np.array(values, np.dtype(dtype).newbyteorder(order)).tofile(file)


def read_values(file, order, dtype):
    count = np.fromfile(file, np.dtype(np.int64).newbyteorder(order), 1)[0]
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return np.fromfile(file, bits.newbyteorder(order), int(count)).astype(bits).view(dtype)


def results_of(driver, jobs, folder, order="="):
    """What the driver wrote, by name, for one job after the other; in the byte order of its CPU."""
    with open(folder / "problems", "wb") as file:
        for job in jobs:
            job.write(file, order)
    run(*driver, folder / "problems", folder / "results")
    (folder / "problems").unlink()
    with open(folder / "results", "rb") as file:
        for job in jobs:
            yield {
                name: read_values(file, order, dtype) for name, dtype in results_in_order(job.case).items()
            }
        assert not file.read(1)
    (folder / "results").unlink()


def assert_same(ours, theirs):
    """Equal bits; but of a NaN, which the IEEE standard leaves to the machine, only that it is one."""
    for name, actual in ours.items():
        if name.startswith(WAY):  # which may differ
            continue
        expected = theirs[name]
        assert actual.size == expected.size, name
        bits = f"u{actual.dtype.itemsize}"
        differ = (actual.view(bits) != expected.view(bits)) & ~(np.isnan(actual) & np.isnan(expected))
        if differ.any():
            i = np.argmax(differ)
            raise AssertionError(
                f"{name}[{i}] is {actual[i]!r} here, {expected[i]!r} there; "
                f"{np.count_nonzero(differ)} of {differ.size} values differ"
            )
