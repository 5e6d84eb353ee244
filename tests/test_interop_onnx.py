"""from_onnx and the operator against ONNX Runtime: 100 random nodes, ResNet-50, the corners of each opset."""

from pathlib import Path

import numpy as np
import pytest
import reference

import fastbn

onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install 'onnx>=1.15')")

from onnx import helper, inliner, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import fastbn.interop.onnx  # noqa: E402
from fastbn.interop import from_onnx  # noqa: E402
from fastbn.interop.onnx import BatchNormalization  # noqa: E402

PARAMETERS = ["scale", "B", "mean", "var"]
FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def onnx_runtime():
    """Runs a model by ONNX Runtime."""
    runtime = pytest.importorskip(
        "onnxruntime", reason="ONNX Runtime is not installed (pip install onnxruntime)"
    )
    options = runtime.SessionOptions()
    options.log_severity_level = 3

    def run(model, names=None, **inputs):
        session = runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return session.run(names, inputs)

    return run


def evaluate(model, **inputs):
    """Runs a model by ONNX's own evaluator, its batch norms by fastbn."""
    return ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, inputs)


def make_model(nodes, x_shape, outputs, values, opset, dtype=FLOAT, functions=()):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, x_shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def one_node(x_shape, values, opset, outputs=("y",), dtype=FLOAT, **attributes):
    node = helper.make_node("BatchNormalization", ["x", *PARAMETERS], outputs, name="bn", **attributes)
    return make_model([node], x_shape, outputs, values, opset, dtype)


def random_values(rng, *shape):
    values = {name: rng.uniform(-2, 2, shape).astype(np.float32) for name in PARAMETERS}
    return values | {"var": rng.uniform(0.3, 3, shape).astype(np.float32)}


def batch(rng, shape):
    return (rng.standard_normal(shape) * rng.uniform(0.5, 3) + rng.uniform(-3, 3)).astype(np.float32)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def random_model(rng):
    """A node of a random opset, mode and rank with random options, some of them left to their defaults."""
    shape = tuple(int(n) for n in rng.integers(2, 6, rng.integers(2, 7)))
    attributes = {}
    if rng.random() < 0.7:
        attributes["epsilon"] = rng.choice([1e-5, 1e-3, 0.1])
    if rng.random() < 0.7:
        attributes["momentum"] = rng.choice([0.0, 0.5, 0.99, 1.0])
    opset = int(rng.integers(7, 18))
    training = rng.random() < 0.5
    outputs = ["y"]
    if training and opset < 14:
        outputs += ["running_mean", "running_var", "saved_mean", "saved_var"]
    elif training:
        outputs += ["running_mean", "running_var"]
        attributes["training_mode"] = 1
    return one_node(shape, random_values(rng, shape[1]), opset, outputs, **attributes), shape, training


@pytest.mark.parametrize("seed", range(100))
def test_random_node(onnx_runtime, seed):  # case 27
    rng = np.random.default_rng(seed)
    model, shape, training = random_model(rng)
    x = batch(rng, shape)
    expected = onnx_runtime(model, x=x)[:4]  # what saved_var is, they disagree

    outputs = evaluate(model, x=x)
    for ours, theirs in zip(outputs, expected, strict=False):
        assert_close(ours, theirs)

    layer = from_onnx(model)
    kinds = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}
    assert type(layer) is kinds.get(len(shape), fastbn.BatchNorm)
    assert layer.training is training
    assert_close(layer(x), expected[0])
    if training:
        assert_close(layer.running_mean, expected[1])
        assert_close(layer.running_var, expected[2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("opset", range(7, 16))
def test_every_opset(onnx_runtime, calls, opset, training):
    """With spatial=1, where there is such an attribute; opset 6 is below."""
    rng = np.random.default_rng(0)
    x, values = batch(rng, (3, 4, 2, 5)), random_values(rng, 4)
    attributes = {"spatial": 1} if opset < 9 else {}
    outputs = ["y"]
    if training:
        outputs += ["m", "v"] if opset >= 14 else ["m", "v", "sm", "sv"]
    if opset >= 14:
        attributes["training_mode"] = int(training)
    model = one_node(x.shape, values, opset, outputs, momentum=0.7, **attributes)
    results, expected = evaluate(model, x=x), onnx_runtime(model, x=x)
    assert calls == ["batch_norm_forward" if training else "batch_norm"]
    assert len(results) == len(expected) == len(outputs)
    for ours, theirs in zip(results[:4], expected, strict=False):  # what saved_var is, they disagree
        assert_close(ours, theirs)


# Opset 6, which ONNX Runtime does not have: is_test decides there, and the outputs do in opset 9.


@pytest.mark.parametrize("is_test", [0, 1])
@pytest.mark.parametrize("all_outputs", [False, True])
def test_opset_6(onnx_runtime, is_test, all_outputs):
    rng = np.random.default_rng(0)
    x, values = batch(rng, (3, 4, 2, 2)), random_values(rng, 4)
    names = ["y", "m", "v", "sm", "sv"]
    expected = onnx_runtime(one_node(x.shape, values, 9, names[:1] if is_test else names), x=x)
    outputs = names if all_outputs and not is_test else names[:1]
    model = one_node(x.shape, values, 6, outputs, **({"is_test": 1} if is_test else {}))
    results = evaluate(model, x=x)
    assert len(results) == len(outputs)
    for ours, theirs in zip(results[:4], expected, strict=False):
        assert_close(ours, theirs)
    layer = from_onnx(model)
    assert layer.training is not bool(is_test)
    assert_close(layer(x), expected[0])


def test_saved_statistics():
    rng = np.random.default_rng(0)
    x, values = batch(rng, (3, 4, 2, 2)), random_values(rng, 4)
    saved_mean, saved_var = evaluate(one_node(x.shape, values, 9, ["y", "m", "v", "sm", "sv"]), x=x)[3:]
    mean, var, _ = reference.batch_stats(x)
    assert_close(saved_mean, mean)
    assert_close(saved_var, var)


@pytest.mark.parametrize("opset", [6, 7, 8])
def test_each_activation_by_itself(onnx_runtime, opset):
    """spatial=0, which ONNX Runtime does not train."""
    rng = np.random.default_rng(0)
    x, values = batch(rng, (3, 4, 2, 5)), random_values(rng, 4, 2, 5)
    options = {"is_test": 1} if opset == 6 else {}
    expected = onnx_runtime(one_node(x.shape, values, 7, spatial=0), x=x)
    assert_close(evaluate(one_node(x.shape, values, opset, spatial=0, **options), x=x)[0], expected[0])
    model = one_node(x.shape, values, opset, ["y", "m", "v", "sm", "sv"], spatial=0)
    y, running_mean, running_var, saved_mean, saved_var = evaluate(model, x=x)
    mean, var = x.mean(0), x.var(0)
    assert_close(y, (x - mean) / np.sqrt(var + 1e-5) * values["scale"] + values["B"])
    assert_close(saved_mean, mean)
    assert_close(saved_var, var)
    assert_close(running_mean, 0.9 * values["mean"] + 0.1 * mean)
    assert_close(running_var, 0.9 * values["var"] + 0.1 * var)
    with pytest.raises(ValueError, match=r"bn normalizes each activation by itself \(spatial=0\)"):
        from_onnx(model)


@pytest.mark.parametrize("opset", [9, 15])
def test_rank_one_is_one_channel(onnx_runtime, opset):
    x, values = np.arange(6, dtype=np.float32), random_values(np.random.default_rng(0), 1)
    model = one_node(x.shape, values, opset)
    assert_close(evaluate(model, x=x)[0], onnx_runtime(model, x=x)[0])


def test_one_value_per_channel_has_variance_0(onnx_runtime):
    x, values = np.array([[5, -3]], np.float32), random_values(np.random.default_rng(0), 2)
    model = one_node(x.shape, values, 15, ["y", "m", "v"], training_mode=1)
    outputs = evaluate(model, x=x)
    assert outputs[0].ravel().tolist() == values["B"].tolist()
    for ours, theirs in zip(outputs, onnx_runtime(model, x=x), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("training", [0, 1])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(name, training):
    dtype = getattr(onnx.TensorProto, name.upper())
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    rng = np.random.default_rng(0)
    x = batch(rng, (3, 4, 5)).astype(numpy_dtype)
    values = {key: value.astype(numpy_dtype) for key, value in random_values(rng, 4).items()}
    # Running statistics may be of a type of their own.
    values |= {key: values[key].astype(np.float32) for key in ("mean", "var")}
    outputs = ["y", "m", "v"] if training else ["y"]
    model = one_node(x.shape, values, 15, outputs, dtype, training_mode=training)
    y, *running = evaluate(model, x=x)
    x, scale, bias = (a.astype(np.float64) for a in (x, values["scale"], values["B"]))
    mean, var = reference.batch_stats(x)[:2] if training else (values["mean"], values["var"])
    expected = reference.forward(x, mean, var, scale, bias)
    assert y.dtype == numpy_dtype
    # Rounded once: by half a unit in the last place, and what float32 adds.
    precision = 2.0**-11 if name == "float16" else 2.0**-8
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=precision * 1.01, atol=1e-6)
    assert [a.dtype for a in running] == [np.float32] * (2 * training)


def test_refused_by_the_operator():
    rng = np.random.default_rng(0)
    values = random_values(rng, 4)
    with pytest.raises(ValueError, match="supported from opset 6 on, got opset 5"):
        evaluate(one_node((2, 4), values, 5), x=batch(rng, (2, 4)))
    with pytest.raises(ValueError, match=r"must have shape \(5,\), one value a channel, got \(4,\)"):
        evaluate(one_node((2, 5), values, 9), x=batch(rng, (2, 5)))
    double = {name: value.astype(np.float64) for name, value in values.items()}
    model = one_node((2, 4), double, 15, dtype=onnx.TensorProto.DOUBLE)
    [y] = evaluate(model, x=batch(rng, (2, 4)).astype(np.float64))
    assert y.dtype == np.float64


@pytest.fixture
def calls(monkeypatch):
    """What fastbn is called with by the operator."""
    calls = []

    def recorded(name):
        function = getattr(fastbn, name)

        def call(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(fastbn.interop.onnx, name, call)

    recorded("batch_norm")
    recorded("batch_norm_forward")
    return calls


def test_subgraphs(calls):
    rng = np.random.default_rng(0)
    x, values = batch(rng, (2, 4)), random_values(rng, 4)
    node = helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["z"])
    out = [helper.make_tensor_value_info("z", FLOAT, None)]
    then = helper.make_graph([node], "then", [], out)
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "else", [], out)
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other)
    model = make_model([branch], x.shape, ["y"], values | {"condition": np.array(True)}, 15)
    assert_close(evaluate(model, x=x)[0], evaluate(one_node(x.shape, values, 15), x=x)[0])
    assert calls == ["batch_norm"] * 2


def test_functions_of_the_model_are_inlined_first(calls):
    rng = np.random.default_rng(0)
    x, values = batch(rng, (2, 4)), random_values(rng, 4)
    node = helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["y"])
    function = helper.make_function(
        "local", "Normalize", ["x", *PARAMETERS], ["y"], [node], [helper.make_opsetid("", 15)]
    )
    call = helper.make_node("Normalize", ["x", *PARAMETERS], ["y"], domain="local")
    model = make_model([call], x.shape, ["y"], values, 15, functions=[function])
    expected = evaluate(model, x=x)[0]
    assert calls == []  # the evaluator's doing; the docstring says so
    assert_close(evaluate(inliner.inline_local_functions(model), x=x)[0], expected)
    assert calls == ["batch_norm"]


# ResNet-50 as the onnx package has it: the graph of the real network, its weights all 0.02.


@pytest.fixture(scope="module")
def resnet50():
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx"
    if not path.exists():
        pytest.skip(f"this onnx package has no {path.name}")
    return onnx.load(path)


def batch_norms(model):
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def with_random_weights(model):
    """The same graph with initializers in the place of its ConstantOfShape nodes."""
    rng = np.random.default_rng(0)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = [node for node in changed.graph.node if node.op_type != "ConstantOfShape"]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    positive = {name for node in batch_norms(model) for name in (node.input[1], node.input[4])}
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            name, shape = node.output[0], initializers[node.input[0]]
            if name in positive:
                value = rng.uniform(0.5, 1.5, shape)
            else:
                value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            changed.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return changed


def with_outputs(model, names):
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["as shipped", "random"])
def test_resnet50(onnx_runtime, calls, resnet50, weights):
    """The answer, and what each batch norm has to say, whose errors grow on the way through the network."""
    model = resnet50 if weights == "as shipped" else with_random_weights(resnet50)
    model = with_outputs(model, [node.output[0] for node in batch_norms(model)])
    inputs = {"gpu_0/data_0": np.random.default_rng(1).standard_normal((1, 3, 224, 224), np.float32)}
    answer, *outputs = evaluate(model, **inputs)
    assert calls == ["batch_norm"] * 53
    expected_answer, *expected = onnx_runtime(model, **inputs)
    assert_close(answer, expected_answer)
    assert len(outputs) == len(expected) == 53
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_layers_of_resnet50(onnx_runtime, resnet50):
    """Some of its weights are computed by nodes, and ranks have to be inferred."""
    nodes = batch_norms(resnet50)[:4]
    names = [name for node in nodes for name in (node.input[0], node.output[0])]
    x = np.random.default_rng(1).standard_normal((1, 3, 224, 224), np.float32)
    results = onnx_runtime(with_outputs(resnet50, names), names, **{"gpu_0/data_0": x})
    for node, layer_input, layer_output in zip(nodes, results[::2], results[1::2], strict=True):
        layer = from_onnx(resnet50, node)
        assert type(layer) is fastbn.BatchNorm2d
        assert layer.training is False
        assert_close(layer(layer_input), layer_output)
        assert repr(from_onnx(resnet50, node.name)) == repr(layer)


# from_onnx


def two_nodes(values):
    nodes = [
        helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["z"], name="first", epsilon=0.5),
        helper.make_node("BatchNormalization", ["z", *PARAMETERS], ["y"], epsilon=0.25),
    ]
    return make_model(nodes, (None, 4), ["y"], values, 15)


def test_which_node(tmp_path):
    model = two_nodes(random_values(np.random.default_rng(0), 4))
    onnx.save(model, tmp_path / "model.onnx")
    for source in model, tmp_path / "model.onnx", str(tmp_path / "model.onnx"):
        assert [from_onnx(source, node).eps for node in ("first", "z", "y")] == [0.5, 0.5, 0.25]
    assert [from_onnx(model, node).eps for node in model.graph.node] == [0.5, 0.25]
    with pytest.raises(ValueError, match=r"node=None fits 2 .* one of \['first', 'y'\]"):
        from_onnx(model)
    with pytest.raises(ValueError, match=r"node 'last' fits 0 .* one of \['first', 'y'\]"):
        from_onnx(model, "last")


def test_values_are_copied():
    model = one_node((2, 4), random_values(np.random.default_rng(0), 4), 15)
    before = model.SerializeToString()
    layer = from_onnx(model).train()
    layer.weight += 1
    layer(np.eye(4, dtype=np.float32))
    assert model.SerializeToString() == before


def test_values_that_nodes_compute():
    values = random_values(np.random.default_rng(0), 4)
    nodes = [
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Mul", ["half", "two"], ["scale"]),
        helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["y"]),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    constants = {"half": values.pop("scale") / 2} | values
    layer = from_onnx(make_model(nodes, (None, 4, 5, 5), ["z"], constants, 15))
    assert np.array_equal(layer.weight, 2 * constants["half"])
    assert np.array_equal(layer.running_var, constants["var"])


def test_values_that_are_inputs_are_refused():
    values = random_values(np.random.default_rng(0), 4)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0),
        helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["y"]),
    ]
    del values["mean"]
    with pytest.raises(ValueError, match=r"depend on inputs of the graph, \['x'\]"):
        from_onnx(make_model(nodes, (None, 4), ["y"], values, 15))


def test_unknown_rank():
    layer = from_onnx(one_node(None, random_values(np.random.default_rng(0), 4), 15))
    assert type(layer) is fastbn.BatchNorm
    with pytest.raises(ValueError, match="supported from opset 6 on, got opset 5"):
        from_onnx(one_node(None, random_values(np.random.default_rng(0), 4), 5))


# Case 41: damaged models, and the other spelling of the domain


@pytest.mark.parametrize("in_nodes", [False, True])
def test_the_other_spelling_of_the_domain(in_nodes):  # case 41
    values = random_values(np.random.default_rng(0), 4)
    nodes = [
        helper.make_node("Neg", ["minus"], ["scale"]),
        helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["y"], epsilon=0.5),
    ]
    model = make_model(nodes, (None, 4), ["y"], {"minus": -values.pop("scale")} | values, 15)
    expected = from_onnx(model)
    x = batch(np.random.default_rng(1), (3, 4))
    y = evaluate(model, x=x)[0]
    if in_nodes:
        for node in model.graph.node:
            node.domain = "ai.onnx"
    else:
        model.opset_import[0].domain = "ai.onnx"
    layer = from_onnx(model)
    assert repr(layer) == repr(expected)
    assert np.array_equal(layer.weight, expected.weight)
    assert_close(layer(x), y)


def test_damaged_models():  # case 41
    def changed(change):
        nodes = [
            helper.make_node("Neg", ["minus"], ["scale"]),
            helper.make_node("BatchNormalization", ["x", *PARAMETERS], ["y"], name="bn"),
        ]
        values = random_values(np.random.default_rng(0), 4)
        model = make_model(nodes, (None, 4), ["y"], {"minus": -values.pop("scale")} | values, 15)
        change(model)
        return model

    def missing(model):
        del model.graph.initializer[0]

    def cycle(model):
        model.graph.node[0].input[0] = "scale"

    def no_opset(model):
        del model.opset_import[0]

    def four_inputs(model):
        model.graph.node[1].input.pop()

    def external(model):
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        tensor.ClearField("raw_data")

    for change, message in [
        (missing, r"no values for \['minus'\]: neither an initializer nor a node's output"),
        (cycle, "the graph has a cycle: scale <- scale"),
        (no_opset, r"no opset of ONNX's own domain, in opset_import: there are \['local'\]"),
        (four_inputs, "bn must have the inputs X, scale, B, mean and var, got"),
        (external, r"values of 'minus' are in the file 'weights.bin', which was not loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_onnx(changed(change))


def test_external_data(tmp_path):  # case 41
    values = random_values(np.random.default_rng(0), 400)
    model = one_node((None, 400), values, 15)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert np.array_equal(from_onnx(path).weight, values["scale"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"'\w+' are in the file 'weights.bin' .* cannot be read"):
        from_onnx(path)


def test_negative_variance():  # case 35
    values = random_values(np.random.default_rng(0), 4)
    values["var"][2] = -1
    with pytest.raises(ValueError, match=r"running_var\[2\] is -1"):
        from_onnx(one_node((None, 4), values, 15))
