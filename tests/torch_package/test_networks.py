"""accelerate on torchvision's networks: how much is fused, and that they compute what they did."""

import copy
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import fastbn.torch as fast  # noqa: E402


@pytest.fixture(scope="module")
def models():
    helper = Path(__file__).resolve().parents[2] / "bench" / "vision.py"
    if not helper.exists():
        pytest.skip("the tests were copied without bench/")
    spec = importlib.util.spec_from_file_location("vision", helper)
    vision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vision)
    try:
        return vision.import_torchvision().models
    except ImportError:
        pytest.skip("torchvision is not installed")


def row(name, size, slow=False, /, **counts):
    return pytest.param(name, size, counts, id=name, marks=pytest.mark.slow if slow else ())


# Of all batch norms, in training: those fused with what, and those that nothing follows.
NETWORKS = [
    row("resnet18", 64, relu=9, add_relu=8, fast=3),
    row("resnet50", 64, True, relu=33, add_relu=16, fast=4),
    row("densenet121", 64, True, relu=121),
    row("regnet_y_400mf", 64, True, relu=33, add_relu=16, fast=4),
    row("googlenet", 64, True, relu=59),
    row("inception_v3", 96, True, relu=94),
    row("mobilenet_v2", 64, relu6=35, add=10, fast=7),
    row("mnasnet0_5", 64, True, relu=35, add=10, fast=7),
    row("vgg11_bn", 32, True, relu=8),
    row("shufflenet_v2_x0_5", 64, relu=37, fast=19),
    # Stochastic depth stands between batch norm and addition.
    row("efficientnet_b0", 64, True, silu=33, fast=16),
    row("mobilenet_v3_small", 64, hardswish=18, relu=5, add=6, fast=5),
]


def build(models, name):
    torch.manual_seed(0)
    if name == "vgg11_bn":  # without the half gigabyte of its classifier
        model = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    else:
        options = {"googlenet": {"init_weights": False}}
        options["inception_v3"] = {"init_weights": False, "aux_logits": False}
        model = getattr(models, name)(weights=None, **options.get(name, {}))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model


def run(model, x):
    torch.manual_seed(1)  # of dropout and stochastic depth
    y = model(x)
    return y if isinstance(y, torch.Tensor) else torch.cat(y, 1)


@pytest.mark.parametrize(("name", "size", "counts"), NETWORKS)
def test_network(models, name, size, counts):
    plain = build(models, name)
    exact, apart = copy.deepcopy(plain).double(), fast.accelerate(copy.deepcopy(plain), fuse=False)
    together = fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(4, 3, size, size)
    with fast.record() as calls:
        y = run(together, x)
    assert Counter(call.how for call in calls) == {
        key if key == "fast" else "fused " + key.replace("_", " + "): count for key, count in counts.items()
    }
    unfused = run(apart, x)
    smooth = {"silu", "hardswish"} & counts.keys()  # whose rounding is another one when they are fused
    assert torch.equal(y, unfused) or smooth
    with torch.no_grad():
        expected = run(exact, x.double())
        theirs = run(plain, x)
    assert error(y, expected) <= 4 * error(theirs, expected) + 1e-6
    grad = torch.randn(y.shape)
    y.backward(grad)
    if not smooth:
        unfused.backward(grad)
        for (key, p), q in zip(together.named_parameters(), apart.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), key
    with torch.no_grad():
        expected, theirs = run(exact.eval(), x.double()), run(plain.eval(), x)
        y = run(together.eval(), x)
    assert error(y, expected) <= 4 * error(theirs, expected) + 1e-6
    types = [type(module) for module in plain.modules()]
    assert [type(module) for module in fast.restore(together).modules()] == types


def error(found, expected):
    """The largest error, as a share of the largest value."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def test_memory_efficient_densenet(models):
    """Each layer is computed twice, in a closure that checkpoint calls."""
    torch.manual_seed(0)
    densenet = models.DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=True)
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for model in (fast.accelerate(copy.deepcopy(densenet)), fast.accelerate(densenet, fuse=False)):
        with fast.record() as calls:
            model(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        hows = Counter(call.how for call in calls)
    assert hows == {"fast": 1 + 2 * 4 + 4 + 1 + 1}
    assert all(map(torch.equal, *gradients))


def test_features_are_extracted(models):
    """By torch.fx, at the nodes that torchvision names."""
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = build(models, "resnet18").eval()
    model = fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    nodes = {"layer1.0.relu": "a", "layer2.0.bn2": "b", "layer3.1.relu_1": "c"}
    with torch.no_grad():
        expected = create_feature_extractor(plain, nodes)(x)
        found = create_feature_extractor(model, nodes)(x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
