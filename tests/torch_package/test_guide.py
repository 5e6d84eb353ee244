"""docs/pytorch.md and examples/digits_resnet.py run, and show what they claim."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "pytorch.md"
EXAMPLE = ROOT / "examples" / "digits_resnet.py"


@pytest.fixture
def example():
    """The program as a module."""
    if not EXAMPLE.exists():
        pytest.skip("the tests were copied without examples/")
    for library in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(library, reason="the examples need the extra [demo]")
    spec = importlib.util.spec_from_file_location("digits_resnet", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_guide(capsys, tmp_path, monkeypatch):
    """Its programs, one after the other; a forward can be rewritten only where it is in a file."""
    if not GUIDE.exists():
        pytest.skip("the tests were copied without docs/")
    text = GUIDE.read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 5
    file = tmp_path / "guide.py"
    file.write_text("\n".join(programs[:4]), encoding="utf-8")
    names = {}
    exec(compile(file.read_text(encoding="utf-8"), file, "exec"), names)
    shown = re.search(r"with its name in the model:\n\n(.*?)\n\n", text, re.DOTALL)[1]
    assert capsys.readouterr().out.split() == shown.split()
    assert type(names["y"]) is torch.Tensor
    exec(programs[4], names)
    nn = torch.nn
    assert [type(module) for module in names["model"]] == [names["Block"], nn.BatchNorm2d, nn.GELU]


@pytest.mark.slow
def test_example_trains_alike(example):
    network, results = example.train(8, 2)
    plain, fast = ([epoch[0] for epoch in results[name]] for name in example.NAMES)
    for a, b in zip(plain[0], fast[0], strict=True):
        assert b == pytest.approx(a, rel=5e-3)  # roundings grow from step to step
    assert plain[0][0] > 2 > plain[1][-1]
    assert fast[1][-1] == pytest.approx(plain[1][-1], rel=0.1)
    import fastbn.torch

    with fastbn.torch.record() as calls:
        network(torch.zeros(2, 1, 8, 8))
    same, down = ["fused relu", "fused add + relu"], ["fused relu", "fast", "fused add + relu"]
    assert [call.how for call in calls] == ["fused relu", *same, *down, *down]


@pytest.mark.slow
def test_example_prints_and_draws(example, tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLE, "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=400)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warnings spilled
    picture = tmp_path / "digits_resnet.png"
    assert str(picture) in done.stdout
    assert "9 batch norms" in done.stdout
    from matplotlib.image import imread

    assert imread(picture)[..., :3].std() > 0.1
