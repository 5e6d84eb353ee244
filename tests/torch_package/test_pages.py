"""The programs of docs/torch_statistics.md and of examples/tent.py run, and show what they claim."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from operations import TORCHRUN

torch = pytest.importorskip("torch")

import fastbn.torch  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "torch_statistics.md"


def programs():
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(text, marks=[pytest.mark.slow] * ("init_process_group" in text), id=str(i))
        for i, text in enumerate(programs())
    ],
)
def test_program(program, tmp_path, monkeypatch):
    if "init_process_group" in program:
        train = tmp_path / "train.py"
        train.write_text(program, encoding="utf-8")
        done = subprocess.run(
            [*TORCHRUN, train], capture_output=True, text=True, encoding="utf-8", timeout=300
        )
        assert done.returncode == 0, done.stderr
        means = re.findall(r"rank [01]: (\[.*?\])", done.stdout)
        assert len(means) == 2
        assert means[0] == means[1]
    elif 'backend="fastbn"' in program:
        from torch._dynamo.backends import registry

        from fastbn.torch import compiler

        monkeypatch.setitem(registry._BACKENDS, "fastbn", None)  # as the entry point of an installed fastbn
        monkeypatch.setitem(registry._COMPILER_FNS, "fastbn", compiler.backend)
        exec(program, {})
    else:
        exec(program, {})


@pytest.fixture(scope="module")
def tent():
    for library in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(library, reason="the examples need the extra [demo]")
    path = ROOT / "examples" / "tent.py"
    if not path.exists():
        pytest.skip("the tests were copied without examples/")
    spec = importlib.util.spec_from_file_location("tent", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tent):
    images, test_images, labels, test_labels = tent.load_data()
    return tent.train(images, labels, epochs=4), test_images, test_labels


def test_adaptation_helps_on_shifted_digits(tent, trained):
    network, images, labels = trained
    right = {
        way: (tent.answer(network, tent.shift(images, 0.75), way) == labels).float().mean()
        for way in tent.WAYS
    }
    assert right["as it is"] < 0.5
    assert right["adapt, prior 16"] > 0.6
    assert right["adapt, prior 0"] > 0.6
    assert right["TENT"] > 0.6
    assert (tent.answer(network, images, "as it is") == labels).float().mean() > 0.9


def test_tent_works_on_the_layers_of_both(tent, trained):
    """What its authors do with PyTorch's layers; it can be reset by a state dict, and no average moves."""
    network, images, _ = trained
    plain = copy.deepcopy(network)
    for i, module in enumerate(plain):
        if isinstance(module, fastbn.torch.BatchNorm2d):
            norm = torch.nn.BatchNorm2d(module.num_features)
            norm.load_state_dict(module.state_dict())
            plain[i] = torch.nn.Sequential(norm, torch.nn.ReLU())
    batches = tent.shift(images, 0.5)[:150].split(50)
    outputs = []
    for model in plain, copy.deepcopy(network):
        adapting = tent.Tent(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(parameters) == 6
        # Adam takes steps of one length where a gradient is nothing but rounding.
        adapting.optimizer = torch.optim.SGD(parameters, 0.05)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        assert not any("running" in name for name in start)
        outputs.append(torch.cat([adapting(batch) for batch in batches]))
        state = model.state_dict()
        moved = {name for name in start if not torch.equal(state[name], start[name])}
        assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.load_state_dict(start, strict=True)
        assert torch.equal(adapting(batches[0]), outputs[-1][:50])
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], torch.cat([plain(batch) for batch in batches]), atol=1e-2)


@pytest.mark.slow
def test_tent_prints_and_draws(tmp_path):
    for library in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(library, reason="the examples need the extra [demo]")
    command = [sys.executable, "-W", "error", ROOT / "examples" / "tent.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d\.\d%", done.stdout)) == 20
    from matplotlib.image import imread

    assert imread(tmp_path / "tent.png")[..., :3].std() > 0.1
