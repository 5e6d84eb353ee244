"""Methods made up at random and rewritten: to the bit what they were, whatever stands in them."""

import copy
import importlib
import random
import sys

import pytest

torch = pytest.importorskip("torch")

import fastbn.torch as fast  # noqa: E402

PROGRAMS = 150
HEAD = """
import torch
import torch.nn.functional as F
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(2) for _ in range(3))
        self.branch = nn.Sequential(nn.Conv2d(2, 2, 1), self.bn3, nn.ReLU(), nn.BatchNorm2d(2))
        self.conv = nn.Conv2d(2, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()

"""
EXPRESSIONS = (
    ["self.bn1({})", "self.bn1({})", "self.bn2({})", "self.bn3({})", "self.bn2(self.conv({}))"] * 2
    + ["self.branch({})", "F.relu({})", "self.relu({})", "F.relu6({})", "{} + {}", "{} + self.bn1({})"] * 2
    + ["self.bn2({}) + {}", "F.relu(self.bn1({}))", "F.relu(self.bn2({}) + {})", "F.relu({} + {})"]
    + ["self.relu({} + self.branch({}))", "{}", "{}[:]", "self.same({})", "self.conv({})"]
    + ["self.bn1({}) + self.relu({})"]
)
NAMES = "xyzt"


def block(rng, indent, depth, looping):
    """The lines of some statements."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        kind = rng.random()
        name = rng.choice(NAMES[1:])
        space = "    " * indent
        expression = rng.choice(EXPRESSIONS)
        expression = expression.format(*rng.choices(NAMES, k=2))
        if kind < 0.55:
            lines.append(f"{space}{name} = {expression}")
        elif kind < 0.75:
            lines.append(f"{space}{name} += {rng.choice([expression, rng.choice(NAMES)])}")
        elif kind < 0.79:
            lines.append(f"{space}found.append({expression})")
        elif kind < 0.82:
            lines.append(f"{space}{name}.add_(1)")
        elif kind < 0.94 and depth:
            lines.append(f"{space}if flags[{rng.randrange(4)}]:")
            lines += block(rng, indent + 1, depth - 1, looping)
            if rng.random() < 0.2:
                lines.append(
                    f"{space}    {rng.choice(['return ' + expression, 'break' if looping else 'pass'])}"
                )
            if rng.random() < 0.5:
                lines.append(f"{space}else:")
                lines += block(rng, indent + 1, depth - 1, looping)
        elif depth:
            lines.append(f"{space}for _ in range(2):")
            lines += block(rng, indent + 1, depth - 1, True)
    return lines or [f"{space}pass"]


def test_random_forwards(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = HEAD
    for i in range(PROGRAMS):
        text += f"class Program{i}(Base):\n    def forward(self, x, flags):\n        found = []\n"
        text += "        y, z, t = self.conv(x), 2 * x, x[:]\n"
        text += "\n".join(block(rng, 2, 2, False))
        text += "\n        return y + 2 * z + 3 * t + sum(found)\n\n\n"
    (tmp_path / "random_forwards.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    programs = importlib.import_module("random_forwards")
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3)
    fused = 0
    try:
        for i in range(PROGRAMS):
            apart = fast.accelerate(getattr(programs, f"Program{i}")(), fuse=False)
            for flags in ((False,) * 4, (True,) * 4, tuple(rng.random() < 0.5 for _ in range(4))):
                expected, found = copy.deepcopy(apart), fast.accelerate(copy.deepcopy(apart))
                with torch.no_grad(), fast.record() as calls:
                    y = found(x.clone(), flags)
                    fused += sum(call.how.startswith("fused") for call in calls)
                    assert torch.equal(y, expected(x.clone(), flags)), i
                for one, other in zip(found.buffers(), expected.buffers(), strict=True):
                    assert torch.equal(one, other), i
    finally:
        del sys.modules["random_forwards"]
    assert fused > 3 * PROGRAMS  # a batch norm was put off in most of them
