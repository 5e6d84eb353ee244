"""Wrong and odd calls, by one argument and by two: PyTorch's own errors, type and text, or its results."""

import copy
import itertools

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from blocks import C, ResidualDown  # noqa: E402
from judge import normal, outcome  # noqa: E402

import fastbn.torch as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, which gives each once

F, nn = torch.nn.functional, torch.nn
X, V = normal(4, 5, 3), 0.5 + torch.rand(5, generator=torch.Generator().manual_seed(0))

INPUTS = {
    "four channels": X[:, :4],
    "a vector": X[0, 0],
    "a number": X[0, 0, 0],
    "a matrix": X[:, :, 0],
    "six axes": normal(2, 5, 1, 2, 1, 2),
    "no samples": X[:0],
    "no length": X[..., :0],
    "no channels": X[:, :0],
    "one value per channel": X[:1, :, :1],
    "float64": X.double(),
    "bfloat16": X.bfloat16(),
    "float16": X.half(),
    "float8": X.to(torch.float8_e4m3fn),
    "int32": X.int(),
    "int8": X.to(torch.int8),
    "bool": X > 0,
    "complex": X + 0j,
    "None": None,
    "float": 1.5,
    "text": "x",
    "list": [1.0],
    "array": X.numpy(),
    "meta": X.to("meta"),
    "sparse": X.to_sparse(),
}
VECTORS = {
    "None": None,
    "4 values": V[:4],
    "6 values": torch.ones(6),
    "1 value": V[:1],
    "no values": torch.ones(0),
    "a column": V[:, None],
    "a row": V[None],
    "a number": V[0],
    "float64": V.double(),
    "bfloat16": V.bfloat16(),
    "float16": V.half(),
    "int32": V.int(),
    "float": 1.0,
    "list": [1.0] * 5,
    "array": V.numpy(),
    "meta": V.to("meta"),
    "strided": torch.ones(10)[::2],
    "negative": -V,
}
PARAMETERS = VECTORS | {"expanded": torch.ones(1).expand(5)}  # averages would be written by all at once
NUMBERS = {
    "None": None,
    "0": 0.0,
    "2": 2.0,
    "-1": -1.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "tiny": 1e-300,
    "text": "a",
    "int": 1,
    "bool": True,
    "tensor": torch.tensor(0.1),
}
FLAGS = {"int": 1, "None": None, "text": "a", "tensor": torch.tensor(True)}
ODD = {
    "input": INPUTS,
    "running_mean": VECTORS,
    "running_var": VECTORS,
    "weight": PARAMETERS,
    "bias": PARAMETERS,
    "training": FLAGS,
    "momentum": NUMBERS,
    "eps": NUMBERS,
}
RIGHT = {
    "input": X, "running_mean": V / 10, "running_var": V, "weight": V, "bias": V, "training": True,
    "momentum": 0.1, "eps": 1e-5,
}  # fmt: skip


def check(odd, *, differentiate):
    results = []
    for function in ours.batch_norm, F.batch_norm:
        given = {name: copy.deepcopy(value) for name, value in odd.items()}
        leaves = [given[name] for name in ("input", "weight", "bias")]
        leaves = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_(differentiate)
        y = outcome(function, **given)
        grads = []
        if isinstance(y, torch.Tensor) and y.requires_grad and not y.is_meta:
            grads = [outcome(y.sum().backward), *(leaf.grad for leaf in leaves)]
        results.append([y, *grads, given["running_mean"], given["running_var"]])
    for mine, theirs in zip(*results, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
            tolerance = 1e-2 if theirs.dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        elif isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs
    return isinstance(results[1][0], tuple)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_one_odd_argument(name, training):
    refused = 0
    for value in ODD[name].values():
        for differentiate in (False, True):
            refused += check(RIGHT | {"training": training, name: value}, differentiate=differentiate)
    assert refused


@pytest.mark.parametrize("training", [True, False])
def test_two_odd_arguments(training):
    """Then it is also a matter of which is found first."""
    for first, second in itertools.combinations(ODD, 2):
        pairs = list(itertools.product(ODD[first].values(), ODD[second].values()))
        for a, b in pairs[::23]:
            check(RIGHT | {"training": training, first: a, second: b}, differentiate=False)


CONSTRUCTIONS = {
    "nothing": ((), {}),
    "negative": ((-1,), {}),
    "none": ((0,), {}),
    "float": ((2.5,), {}),
    "text": (("5",), {}),
    "None": ((None,), {}),
    "too much": ((5, 1e-5, 0.1, True, True, None, None, 1), {}),
    "unknown": ((5,), {"epsilon": 1e-3}),
    "eps": ((5, "1"), {}),
    "momentum": ((5, 1e-5, "1"), {}),
    "dtype": ((5,), {"dtype": "float32"}),
    "int dtype": ((5,), {"dtype": torch.int32}),
    "device": ((5,), {"device": "abc"}),
}


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize("made", CONSTRUCTIONS)
def test_constructions(name, made):
    args, kwargs = CONSTRUCTIONS[made]
    mine, theirs = (outcome(getattr(module, name), *args, **kwargs) for module in (ours, nn))
    if isinstance(theirs, nn.Module):
        assert repr(mine) == repr(theirs)
    else:
        assert mine[0] is theirs[0]
        # Python says itself which arguments there are, and we have more.
        alike = mine[1].replace("_BatchNorm.", "").split(" from ")[0] == theirs[1].replace("_BatchNorm.", "")
        assert alike or (mine[0] is TypeError and "positional arguments" in theirs[1])


GRADS = {
    "another shape": torch.ones(4, 5, 2),
    "no shape": torch.ones(()),
    "int": torch.ones(4, 5, 3).int(),
    "a number": 1.0,
    "nothing": None,
    "meta": torch.ones(4, 5, 3, device="meta"),
    "complex": torch.ones(4, 5, 3) + 0j,
}


@pytest.mark.parametrize("kind", GRADS)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_gradients(kind, training):
    results = []
    for function in ours.batch_norm, F.batch_norm:
        x = X.clone().requires_grad_()
        y = function(x, V / 10, V.clone(), V, V, training)
        results.append((outcome(y.backward, GRADS[kind]), x.grad))
    (mine, dx), (theirs, expected) = results
    assert mine == theirs
    if kind == "int":  # which autograd converts
        torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)
    else:
        assert mine is not None
        assert dx is expected is None


def scramble(block, **attributes):
    for name, value in attributes.items():
        module, _, attribute = name.replace("__", ".").rpartition(".")
        setattr(block.get_submodule(module), attribute, value)


def vector(size, dtype=torch.float32):
    return nn.Parameter(torch.ones(size, dtype=dtype))


# What is put in, or what is done to the block before.
IMAGES = normal(2, C, 4, 4)
NETWORKS = {
    "other channels": normal(2, C + 1, 4, 4),
    "a vector": normal(C),
    "without a batch": normal(C, 4, 4),
    "one value": normal(1, C, 1, 1),
    "nothing": normal(0, C, 4, 4),
    "float64": IMAGES.double(),
    "bfloat16": IMAGES.bfloat16(),
    "int": IMAGES.int(),
    "array": IMAGES.numpy(),
    "None": None,
    "meta": IMAGES.to("meta"),
    "half a model": lambda block: block.bn2.half(),
    "wide bn1": lambda block: scramble(block, bn1=type(block.bn1)(C + 1)),
    "wide bn2": lambda block: scramble(block, bn2=type(block.bn2)(C + 1)),
    "wide norm in down": lambda block: scramble(block, down__1=type(block.bn2)(C + 1)),
    "wide bn2 and down": lambda block: scramble(
        block, bn2=type(block.bn2)(C + 1), down__0=nn.Conv2d(C + 1, 3, 1)
    ),
    "sizes that do not add": lambda block: scramble(block, down__0=nn.Conv2d(C, C, 2)),
    "channels that do not add": lambda block: scramble(block, down=nn.Conv2d(C, C + 1, 1)),
    "a long weight": lambda block: scramble(block, bn1__weight=vector(C + 1)),
    "a bias of float64": lambda block: scramble(block, bn2__bias=vector(C, torch.float64)),
    "eps": lambda block: scramble(block, bn1__eps=0.0),
    "momentum": lambda block: scramble(block, bn2__momentum="a"),
    "no activation": lambda block: scramble(block, relu=None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_in_a_network(kind, training):
    """Of several modules, each of which may be the one that refuses."""
    torch.manual_seed(0)
    wrong = NETWORKS[kind]
    plain = nn.Sequential(ResidualDown(), nn.BatchNorm2d(C), nn.ReLU(inplace=True)).train(training)
    model = ours.accelerate(copy.deepcopy(plain))
    results = []
    for each in plain, model:
        torch.manual_seed(1)
        if callable(wrong):
            wrong(each[0])
        results.append(outcome(each, IMAGES if callable(wrong) else wrong))
    mine, theirs = results
    if isinstance(theirs, torch.Tensor):
        assert kind in ("nothing", "meta") or (kind, training) in (("eps", False), ("one value", False))
        assert mine.shape == theirs.shape
    else:
        assert mine == theirs
