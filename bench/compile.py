"""Time torch.compile: PyTorch's batch norm and fastbn's, by the backends "fastbn" and "inductor".

    python bench/compile.py [--rounds 15] [--batch 8] [--pixels 32] [--quick]

A small residual network (a block without and one with a downsampling branch), training step and evaluation,
both memory formats. All contestants take turns, round by round, in one process; the figures are medians, and
ratios are medians of the ratios within a round. Whether inductor should be given fastbn's operator is the
ratio of the column "inductor" to the column "fastbn + inductor".
"""

import argparse
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastbn.torch import compiler

CONTESTANTS = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model, backend="inductor"),
    "fastbn": lambda model: torch.compile(model, backend=compiler.backend),
    "fastbn + inductor": lambda model: torch.compile(
        model, backend=compiler.backend, options={"backend": "inductor"}
    ),
}


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.down = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


def make_network(channels):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
        Block(channels, channels, 1), Block(channels, 2 * channels, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10),
    )  # fmt: skip


def seconds(call, model, x, training):
    begun = perf_counter()
    if training:
        model.zero_grad()
        call(x).square().mean().backward()
    else:
        with torch.no_grad():
            call(x)
    return perf_counter() - begun


def measure(training, memory_format, rounds, batch, pixels, channels):
    """Seconds of each contestant, in each round."""
    x = torch.randn(batch, 3, pixels, pixels).to(memory_format=memory_format)
    calls = {}
    torch._dynamo.reset()
    for name, make in CONTESTANTS.items():
        model = make_network(channels).to(memory_format=memory_format).train(training)
        calls[name] = make(model), model
        for _ in range(3):  # compiles
            seconds(*calls[name], x, training)
    return [{name: seconds(*call, x, training) for name, call in calls.items()} for _ in range(rounds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    arguments = parser.parse_args()
    sizes = arguments.rounds, arguments.batch, arguments.pixels, arguments.channels
    if arguments.quick:
        sizes = 1, 2, 8, 4
    threads = torch.get_num_threads()
    table = Table(
        title=f"PyTorch {torch.__version__}, {threads} threads: milliseconds (times as fast as eager)"
    )
    table.add_column("")
    for name in CONTESTANTS:
        table.add_column(name, justify="right")
    for training in True, False:
        for memory_format in torch.contiguous_format, torch.channels_last:
            times = measure(training, memory_format, *sizes)
            cells = []
            for name in CONTESTANTS:
                ratio = median(row["eager"] / row[name] for row in times)
                cells.append(f"{1e3 * median(row[name] for row in times):.2f} ({ratio:.2f})")
            layout = "NCHW" if memory_format is torch.contiguous_format else "channels-last"
            table.add_row(f"{'training step' if training else 'evaluation'}, {layout}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
