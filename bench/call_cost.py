"""What a call costs around the work of the kernels: small tensors, by direction and way of passing them.

    python bench/call_cost.py [--rounds 101] [--calls 200] [--quick]

Microseconds: the entry of the kernels for tensors (by address, shape and strides) and that for arrays, both
with memory for the results at hand; `fastbn.torch.batch_norm`; an autograd.Function that does nothing with
the same tensors, which is PyTorch's own share of it; and PyTorch's batch norm. "Around" is what fastbn.torch
adds to the entry for tensors and to that Function, memory for its results included. All take turns, round by
round, on one thread, whose CPU time is counted; the figures are medians over rounds. With one value a channel
the backward pass is that of evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import fastbn
from fastbn import _kernels
from fastbn.torch import batch_norm

SHAPES = [(1, 256), (64, 256)]
DIRECTIONS = ["inference", "training", "backward"]
COLUMNS = ["tensors", "arrays", "fastbn.torch", "an empty Function", "PyTorch"]

Call = Callable[[], object]


class Nothing(torch.autograd.Function):
    """Saves what a batch norm saves, and returns what it is given."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any, results: Any) -> Any:
        ctx.save_for_backward(input, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.results = results
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        ctx.saved_tensors  # noqa: B018
        return *ctx.results[1:], None


def contestants(shape: tuple[int, int], direction: str) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    x, grad_output = torch.randn(2, *shape, generator=generator)
    weight, bias, running_mean, running_var = torch.rand(4, shape[1], generator=generator) + 0.5
    y, grad_input, grad_weight, grad_bias = map(torch.empty_like, (x, x, weight, bias))
    mean, var = np.empty((2, shape[1]))
    running = running_mean, running_var
    arrays: Any = [t.numpy() for t in (x, weight, bias)]
    options = 1e-5, None, 0.01, 1
    how: Any = (1e-5, 1, None, None, 0.01, y.numpy(), 1)
    averages = [t.numpy() for t in running]
    training = direction != "inference" and shape[0] > 1

    def forward(training: bool) -> None:
        _kernels.tensor_forward(x, y, None, weight, bias, *running, mean, var, None, training, 0.1, *options)

    if direction == "inference":
        return {
            "tensors": lambda: _kernels.tensor_forward(
                x, y, None, weight, bias, *running, None, None, None, False, 0.1, *options
            ),
            "arrays": lambda: _kernels.normalize(
                arrays[0], *averages, False, *arrays[1:], *how, None
            ),
            "fastbn.torch": lambda: batch_norm(x, *running, weight, bias),
            "PyTorch": lambda: F.batch_norm(x, *running, weight, bias),
        }  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    if direction == "training":
        return {
            "tensors": lambda: forward(True),
            "arrays": lambda: _kernels.forward(*arrays, *how, *averages, 0.1, True, True),
            "fastbn.torch": lambda: batch_norm(leaves[0], *running, *leaves[1:], True),
            "an empty Function": lambda: Nothing.apply(*leaves, (y,)),
            "PyTorch": lambda: F.batch_norm(leaves[0], *running, *leaves[1:], True),
        }
    forward(training)
    gradients = grad_input, grad_weight, grad_bias
    made = {
        "fastbn.torch": batch_norm(leaves[0], *running, *leaves[1:], training),
        "an empty Function": Nothing.apply(*leaves, (y, *gradients)),
        "PyTorch": F.batch_norm(leaves[0], *running, *leaves[1:], training),
    }
    grad_array, grad_input_array = grad_output.numpy(), grad_input.numpy()

    def back(name: str) -> Call:
        return lambda: torch.autograd.grad(made[name], leaves, grad_output, retain_graph=True)

    return {
        "tensors": lambda: _kernels.tensor_backward(
            grad_output, x, mean, var, weight, bias, None, None, *gradients, None, training, *options
        ),
        "arrays": lambda: _kernels.backward(
            grad_array, arrays[0], mean, var, len(x), *arrays[1:], 1e-5, training, 1, None, None, 0.01,
            grad_input_array, 1, needs=7,
        ),
        **{name: back(name) for name in made},
    }  # fmt: skip


def seconds(call: Call, calls: int) -> float:
    begun = thread_time()
    for _ in range(calls):
        call()
    return (thread_time() - begun) / calls


def measure(calls: dict[str, Call], rounds: int, count: int) -> dict[str, float]:
    """Microseconds of each contestant."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, count))
    return {name: 1e6 * median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--calls", type=int, default=200, help="of each contestant in a round")
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    arguments = parser.parse_args()
    sizes = (1, 1) if arguments.quick else (arguments.rounds, arguments.calls)
    torch.set_num_threads(1)
    table = Table(title=f"Microseconds a call; fastbn {fastbn.__version__}, PyTorch {torch.__version__}")
    for name in ("", *COLUMNS, "around"):
        table.add_column(name, justify="right" if name else "left")
    for shape in SHAPES:
        for direction in DIRECTIONS:
            if direction == "training" and shape[0] == 1:
                continue
            with torch.set_grad_enabled(direction != "inference"):
                found = measure(contestants(shape, direction), *sizes)
            around = found["fastbn.torch"] - found["tensors"] - found.get("an empty Function", 0.0)
            cells = [f"{found[name]:.1f}" if name in found else "" for name in COLUMNS]
            table.add_row(f"{shape} {direction}", *cells, f"{around:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
