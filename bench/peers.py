"""The contestants of compare.py: fastbn, everyone it is measured against, and the memory limit.

A contestant offers one or more candidates for a task, the ways in which a user of it could do that;
compare.py checks each against the oracle and times the fastest. A contestant whose library is missing raises
ImportError or OSError when it is made, and is left out.
"""

import ctypes
import math
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from shapes import FEW, label
from tasks import (
    BLOCKED,
    DTYPES,
    EPS,
    MOMENTUM,
    NC,
    NCHW,
    NHWC,
    Candidate,
    Contestant,
    aligned,
)

BUILD = Path(__file__).resolve().parents[1] / "build" / "bench"
HALVES = ("bfloat16", "float16")
FEW_SHAPES = tuple(map(label, FEW))  # for peers that take long to be timed, or to compile each shape


class FastBN(Contestant):
    name = "fastbn"
    dtypes = DTYPES
    chain = True

    def __init__(self, threads):
        import fastbn

        fastbn.set_num_threads(threads)
        self.fastbn, self.version = fastbn, fastbn.__version__

    def candidates(self, task, layout):
        fastbn, d = self.fastbn, task.data
        out = d.empty() if task.preallocate else None
        activation = task.activation
        if task.kind == "inference":
            frozen = fastbn.FrozenBatchNorm(
                d.running_mean, d.running_var, d.weight, d.bias, EPS, axis=d.axis, activation=activation
            )
            residual = d.residual if task.residual else None
            call = partial(frozen, d.x, residual, out)
            yield Candidate("FrozenBatchNorm", call, lambda y: (y,))
        elif task.kind == "training":
            running_mean, running_var = d.running()
            yield Candidate(
                "batch_norm",
                lambda: fastbn.batch_norm(
                    d.x, running_mean, running_var, d.weight, d.bias, True, MOMENTUM, EPS,
                    axis=d.axis, activation=activation, out=out,
                ),
                lambda y: (y,),
            )  # fmt: skip
        else:
            stats = fastbn.batch_stats(d.x, axis=d.axis)
            yield Candidate(
                "batch_norm_backward",
                lambda: fastbn.batch_norm_backward(
                    d.grad_output, d.x, stats, d.weight, d.bias, EPS,
                    axis=d.axis, activation=activation, out=out,
                ),
                lambda grads: grads[:3],
            )  # fmt: skip


class NumPy(Contestant):
    """One thread; not halves, which NumPy would add up in halves."""

    name = "NumPy"
    shapes = FEW_SHAPES
    dtypes = ("float32", "float64")
    chain = True

    def __init__(self, threads):
        from fastbn import baseline

        self.baseline, self.version = baseline, np.__version__

    def candidates(self, task, layout):
        baseline, d = self.baseline, task.data
        kept = d.empty() if task.preallocate else None

        def out():
            return np.empty_like(d.x) if kept is None else kept

        def silu(y):
            scale = np.exp(-y)
            scale += 1
            return np.divide(y, scale, out=y)

        if task.kind == "inference":
            inputs = d.x, d.running_mean, d.running_var, d.weight, d.bias, EPS

            def call():
                y = baseline.inference(*inputs, axis=d.axis, relu=task.relu and not task.residual, out=out())
                if task.residual:
                    y += d.residual
                    np.maximum(y, 0, out=y)
                return silu(y) if task.activation == "silu" else y

            yield Candidate("baseline", call, lambda y: (y,))
        elif task.kind == "training":
            inputs = d.x, *d.running(), d.weight, d.bias, MOMENTUM, EPS
            finish = silu if task.activation == "silu" else lambda y: y
            yield Candidate(
                "baseline",
                lambda: finish(baseline.training_forward(*inputs, axis=d.axis, relu=task.relu, out=out())[0]),
                lambda y: (y,),
            )
        else:
            masked = d.empty() if task.preallocate and task.relu else None

            def call():
                dy = np.multiply(d.grad_output, d.y > 0, out=masked) if task.relu else d.grad_output
                return baseline.backward(dy, d.x, d.mean, d.invstd, d.weight, axis=d.axis, out=out())

            yield Candidate("baseline", call, lambda grads: grads)


class PyTorch(Contestant):
    name = "PyTorch"
    dtypes = DTYPES
    chain = True

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.version = torch, torch.__version__

    def tensor(self, array, d):
        """Without a copy, channels second. A channels-last sequence gets the fourth axis its kernels know."""
        if d.dtype == "bfloat16" and array.ndim > 1:
            t = self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        else:
            t = self.torch.from_numpy(array)
        if d.layout == NHWC:
            t = t.movedim(-1, 1)
            t = t.unsqueeze(-1) if t.dim() == 3 else t
        return t

    def array(self, t, d):
        t = t.reshape(d.shape).movedim(1, d.axis)
        return t.view(self.torch.uint16).numpy().view(d.numpy_dtype) if d.dtype == "bfloat16" else t.numpy()

    def candidates(self, task, layout):
        torch, aten, d = self.torch, self.torch.ops.aten, task.data
        array = partial(self.array, d=d)
        x, dy, y_saved, residual = (self.tensor(a, d) for a in (d.x, d.grad_output, d.y, d.residual))
        w, b, mean, invstd = map(torch.from_numpy, (d.weight, d.bias, d.mean, d.invstd))
        running_mean, running_var = map(torch.from_numpy, d.running())
        training = task.kind == "training"
        if task.kind != "backward":

            def finish(y):
                if task.residual:
                    y.add_(residual)
                if task.activation == "silu":
                    return torch.nn.functional.silu(y, inplace=True)
                return y.relu_() if task.relu else y

            def default():
                return finish(
                    torch.batch_norm(x, w, b, running_mean, running_var, training, MOMENTUM, EPS, False)
                )

            yield Candidate("batch_norm", default, lambda y: (array(y),))
            if task.preallocate:
                y = self.tensor(d.empty(), d)
                saved = y, torch.empty_like(mean), torch.empty_like(mean)
                inputs = x, w, b, running_mean, running_var, training, MOMENTUM, EPS

                def preallocated():
                    torch.native_batch_norm(*inputs, out=saved)
                    return finish(y)

                yield Candidate("native_batch_norm(out=)", preallocated, lambda y: (array(y),))
            return

        def result(grads):
            return array(grads[0]), grads[1].numpy(), grads[2].numpy()

        if not task.preallocate:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x, w, b)]
                y = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
                y = y.relu() if task.relu else y
            call = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
            yield Candidate("autograd", call, result)
            return
        inputs = x, w, running_mean, running_var, mean, invstd, True, EPS, [True, True, True]
        masked = self.tensor(d.empty(), d) if task.relu else None
        # Its variant with outputs given computes fresh ones and copies them.
        function = aten.native_batch_norm_backward.default

        def call():
            if not task.relu:
                return function(dy, *inputs)
            return function(aten.threshold_backward.grad_input(dy, y_saved, 0, grad_input=masked), *inputs)

        yield Candidate("native_batch_norm_backward", call, result)


class TorchCompile(PyTorch):
    """torch.compile with its default backend; of the backward the one of a compiled forward."""

    name = "torch.compile"
    shapes = FEW_SHAPES

    def __init__(self, threads):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / "inductor"))
        super().__init__(threads)
        import torch._dynamo
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a graph is gone through again and again
        self.row = None

    def function(self, task):
        """The compiled function of a row, the only one that Dynamo then has to guard."""
        torch, row = self.torch, (task.op, task.data.shape)
        if row != self.row:
            torch._dynamo.reset()
            self.row = row
            training = task.kind != "inference"

            def function(x, w, b, running_mean, running_var, residual):
                y = torch.nn.functional.batch_norm(
                    x, running_mean, running_var, w, b, training, MOMENTUM, EPS
                )
                y = y + residual if task.residual else y
                if task.activation == "silu":
                    return torch.nn.functional.silu(y)
                return torch.relu(y) if task.relu else y

            self.compiled = torch.compile(function, dynamic=False, fullgraph=True)
        return self.compiled

    def candidates(self, task, layout):
        torch, d, function = self.torch, task.data, self.function(task)
        x, dy, residual = (self.tensor(a, d) for a in (d.x, d.grad_output, d.residual))
        w, b, *running = map(torch.from_numpy, (d.weight, d.bias, *d.running()))
        if task.kind != "backward":
            call = partial(function, x, w, b, *running, residual)
            yield Candidate("inductor", call, lambda y: (self.array(y, d),))
            return
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, w, b)]
            y = function(*leaves, None, None, None)
        call = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
        yield Candidate(
            "inductor", call, lambda grads: (self.array(grads[0], d), *(g.numpy() for g in grads[1:]))
        )


class Numba(Contestant):
    """The kernels of numba_bn.py, shared out between threads, small arrays also not.

    Their compilation takes a minute of the first run; it is kept in build/bench.
    """

    name = "Numba"
    dtypes = ("float32", "float64")
    chain = True
    fastmath = False
    serial = True

    def __init__(self, threads):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(BUILD / "numba"))
        os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
        import numba
        import numba_bn

        self.threads, self.numba_bn, self.version = threads, numba_bn, numba.__version__
        numba.set_num_threads(threads)

    def candidates(self, task, layout):
        d = task.data
        n, c, *spatial = d.shape
        rows = "_rows" if d.axis == -1 or d.layout == NC else ""
        dims = (-1, c) if rows else (n, c, math.prod(spatial))
        out = d.empty() if task.preallocate else None
        for threads in {1, self.threads} if self.serial and d.x.nbytes < 2**22 else (self.threads,):
            flavour = self.numba_bn.kernels(threads > 1, self.fastmath, task.activation, task.residual)
            function = getattr(flavour, task.kind + rows)
            call = self.call(task, function, dims, out, threads)
            yield Candidate(f"{threads} threads", call, lambda results: results)

    def call(self, task, function, dims, out, threads):
        d = task.data

        def empty():
            return np.empty_like(d.x) if out is None else out

        x, dy, residual = (a.reshape(dims) for a in (d.x, d.grad_output, d.residual))
        if task.kind == "inference":
            scale = (d.weight / np.sqrt(d.running_var + EPS)).astype(d.weight.dtype)

            def call():
                y = empty()
                function(x, y.reshape(dims), residual, d.running_mean, scale, d.bias)
                return (y,)

        elif task.kind == "training":
            running, momentum = d.running(), d.weight.dtype.type(MOMENTUM)

            def call():
                y = empty()
                function(x, y.reshape(dims), d.weight, d.bias, *running, momentum, EPS, threads)
                return (y,)

        else:

            def call():
                dx, dw, db = empty(), np.empty_like(d.weight), np.empty_like(d.bias)
                function(dy, x, d.mean, d.invstd, d.weight, d.bias, dx.reshape(dims), dw, db, threads)
                return dx, dw, db

        return call


class NumbaFastmath(Numba):
    name = "Numba, fastmath"
    fastmath = True
    serial = False


class OnnxRuntime(Contestant):
    """Has no channels-last and no backward; training is BatchNormalization with training_mode=1."""

    name = "ONNX Runtime"
    layouts = (NCHW, NC)
    dtypes = ("float32", "float16", "float64")
    chain = True

    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.ort, self.version = onnx, onnxruntime, onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def session(self, task):
        h, d = self.onnx.helper, task.data
        element = h.np_dtype_to_tensor_dtype(d.numpy_dtype)
        training = task.kind == "training"
        inputs = {"x": d.x} | ({"residual": d.residual} if task.residual else {})
        outputs = ["y", "running_mean", "running_var"] if training else ["y"]
        nodes = [
            h.make_node(
                "BatchNormalization", ["x", "weight", "bias", "mean", "var"], ["bn", *outputs[1:]],
                epsilon=EPS, momentum=1 - MOMENTUM, training_mode=int(training),
            )
        ]  # fmt: skip
        if task.residual:
            nodes.append(h.make_node("Add", ["bn", "residual"], ["sum"]))
        if task.relu:
            nodes.append(h.make_node("Relu", [nodes[-1].output[0]], ["y"]))
        if task.activation == "silu":
            last = nodes[-1].output[0]
            nodes += [h.make_node("Sigmoid", [last], ["gate"]), h.make_node("Mul", [last, "gate"], ["y"])]
        nodes[-1].output[0] = "y"
        values = {"weight": d.weight, "bias": d.bias, "mean": d.running_mean, "var": d.running_var}
        graph = h.make_graph(
            nodes,
            "batch_norm",
            [h.make_tensor_value_info(name, element, a.shape) for name, a in inputs.items()],
            [h.make_tensor_value_info(name, element, None) for name in outputs],
            [self.onnx.numpy_helper.from_array(a.astype(d.numpy_dtype), name) for name, a in values.items()],
        )
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 15)], ir_version=10)
        session = self.ort.InferenceSession(
            model.SerializeToString(), self.options, providers=["CPUExecutionProvider"]
        )
        return session, inputs, outputs

    def candidates(self, task, layout):
        if task.kind == "backward":
            return
        session, inputs, outputs = self.session(task)
        if not task.preallocate:
            yield Candidate("run", partial(session.run, None, inputs), lambda ys: ys[:1])
            return
        shapes = dict.fromkeys(outputs, task.data.weight.shape) | {"y": task.data.x.shape}
        dtype = task.data.numpy_dtype
        results = {name: aligned(shape, dtype) for name, shape in shapes.items()}
        binding = session.io_binding()
        for name, a in inputs.items():
            binding.bind_input(name, "cpu", 0, dtype, a.shape, a.ctypes.data)
        for name, a in results.items():
            binding.bind_output(name, "cpu", 0, dtype, a.shape, a.ctypes.data)
        call = partial(session.run_with_iobinding, binding)
        yield Candidate("run_with_iobinding", call, lambda _: (results["y"],))


class OpenVINO(Contestant):
    """Inference only, in float32: in bfloat16 its parameters would be rounded, too.

    Its BatchNormInference is channels-second: channels-last is a scale and a shift.
    """

    name = "OpenVINO"
    dtypes = ("float32", *HALVES)
    chain = True

    def __init__(self, threads):
        import openvino

        self.openvino, self.version = openvino, openvino.__version__.partition("-")[0]
        self.core, self.row = openvino.Core(), None
        self.config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # or it may compute in bfloat16
        }

    def candidates(self, task, layout):
        if task.kind != "inference":
            return
        from openvino import opset13 as ops

        openvino, d = self.openvino, task.data
        element = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}
        element = element[d.dtype]

        def tensor(a):
            a = a.view(np.uint16) if d.dtype == "bfloat16" else a
            return openvino.Tensor(a, a.shape, element)

        def wide(parameter):
            return parameter if d.dtype == "float32" else ops.convert(parameter, "f32")

        parameters = [ops.parameter(d.x.shape, element)]
        if d.layout == NHWC:
            scale = d.weight / np.sqrt(d.running_var + np.float32(EPS))
            y = ops.add(ops.multiply(wide(parameters[0]), scale), d.bias - d.running_mean * scale)
        else:
            constants = (ops.constant(a) for a in (d.weight, d.bias, d.running_mean, d.running_var))
            y = ops.batch_norm_inference(wide(parameters[0]), *constants, EPS)
        if task.residual:
            parameters.append(ops.parameter(d.x.shape, element))
            y = ops.add(y, wide(parameters[1]))
        y = ops.relu(y) if task.relu else y
        y = ops.swish(y) if task.activation == "silu" else y
        y = y if d.dtype == "float32" else ops.convert(y, element.get_type_name())
        row = task.op, d.layout, d.shape
        if row != self.row:  # the sets of a chain row share it
            self.compiled = self.core.compile_model(openvino.Model([y], parameters), "CPU", self.config)
            self.row = row
        compiled = self.compiled
        inputs = [d.x, d.residual][: len(parameters)]
        if not task.preallocate:
            yield Candidate("compiled model", partial(compiled, inputs), lambda results: (results[0],))
            return
        request, out = compiled.create_infer_request(), d.empty()
        for i, a in enumerate(inputs):
            request.set_input_tensor(i, tensor(a))
        request.set_output_tensor(0, tensor(out))
        yield Candidate("infer", request.infer, lambda _: (out,))

        def start_and_wait():
            request.start_async()
            request.wait()

        yield Candidate("start_async, wait", start_and_wait, lambda _: (out,))


class TensorFlow(Contestant):
    """FusedBatchNormV3, which knows (N, H, W, C) and (N, C, H, W), as called and compiled by XLA.

    A tf.function without XLA is left out: it never was the fastest.
    """

    name = "TensorFlow"
    shapes = FEW_SHAPES
    dtypes = ("float32", *HALVES)

    def __init__(self, threads):
        import tensorflow

        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        self.tf, self.version = tensorflow, tensorflow.__version__

    def candidates(self, task, layout):
        tf, raw, d = self.tf, self.tf.raw_ops, task.data
        n, c, *spatial = d.shape
        s = math.prod(spatial)
        dims = (n, c, s, 1) if d.layout == NCHW else (n, s, 1, c)
        options = {"data_format": "NCHW" if d.layout == NCHW else "NHWC", "epsilon": EPS}

        def constants(*arrays):
            return [tf.constant(a if a.ndim == 1 else a.reshape(dims)) for a in arrays]

        inputs = constants(d.x, d.weight, d.bias, d.running_mean, d.running_var)
        if task.kind != "backward":
            training = task.kind == "training"
            inputs += constants(d.residual) if task.residual else []

            def function(x, w, b, mean, var, residual=None):
                y, mean, var, *_ = raw.FusedBatchNormV3(
                    x=x, scale=w, offset=b, mean=mean, variance=var, is_training=training,
                    exponential_avg_factor=MOMENTUM if training else 1.0, **options,
                )  # fmt: skip
                y = y + residual if task.residual else y
                y = tf.nn.relu(y) if task.relu else y
                y = tf.nn.silu(y) if task.activation == "silu" else y
                return (y, mean, var) if training else (y,)
        else:
            x, w, b, mean, var = inputs
            saved = raw.FusedBatchNormV3(
                x=x, scale=w, offset=b, mean=mean, variance=var, is_training=True, **options
            )
            inputs = [*constants(d.grad_output), x, w, *saved[3:6]] + (constants(d.y) if task.relu else [])

            def function(dy, x, w, saved_1, saved_2, saved_3, y=None):
                dy = raw.ReluGrad(gradients=dy, features=y) if task.relu else dy
                return raw.FusedBatchNormGradV3(
                    y_backprop=dy, x=x, scale=w, reserve_space_1=saved_1, reserve_space_2=saved_2,
                    reserve_space_3=saved_3, is_training=True, **options,
                )[:3]  # fmt: skip

        def result(outputs):
            outputs = outputs[: 3 if task.kind == "backward" else 1]
            return outputs[0].numpy().reshape(d.x.shape), *(a.numpy() for a in outputs[1:])

        yield Candidate("eager", partial(function, *inputs), result)
        if task.preallocate:
            xla = tf.function(function, jit_compile=True).get_concrete_function(*inputs)
            yield Candidate("XLA", partial(xla, *inputs), result)


class JAX(Contestant):
    """As Flax computes: in float32 where the arrays are halves."""

    name = "JAX"
    shapes = FEW_SHAPES
    dtypes = DTYPES
    chain = True

    def __init__(self, threads):
        import jax

        jax.config.update("jax_enable_x64", True)
        self.functions = {}
        self.jax, self.version = jax, jax.__version__

    def candidates(self, task, layout):
        jax, d = self.jax, task.data
        if task.kind == "backward":
            inputs = d.grad_output, d.x, d.y, d.mean, d.invstd, d.weight
        else:
            inputs = d.x, d.running_mean, d.running_var, d.weight, d.bias, d.residual
        key = task.op, d.layout, d.shape
        if key not in self.functions:
            self.functions = {k: f for k, f in self.functions.items() if k[::2] == key[::2]}
            self.functions[key] = jax.jit(self.function(task))
        compiled = self.functions[key]
        # Without a copy, but for bfloat16, for which NumPy has no such interface.
        share = jax.device_put if d.dtype == "bfloat16" else jax.dlpack.from_dlpack
        inputs = [share(a) if a.ndim > 1 else jax.device_put(a) for a in inputs]

        def call():
            outputs = compiled(*inputs)
            outputs[0].block_until_ready()
            return outputs

        def result(outputs):
            return tuple(map(np.asarray, outputs[: 3 if task.kind == "backward" else 1]))

        yield Candidate("jit", call, result)

    def function(self, task):
        jax, jnp, d = self.jax, self.jax.numpy, task.data
        dtype, parameters = d.numpy_dtype, d.weight.dtype
        spread = partial(jnp.reshape, shape=d.per_channel)

        def normalize(x, mean, var, w, b, residual):
            y = (x - spread(mean)) * spread(w * jax.lax.rsqrt(var + EPS)) + spread(b)
            y = y + residual.astype(parameters) if task.residual else y
            y = jax.nn.silu(y) if task.activation == "silu" else y
            return (jax.nn.relu(y) if task.relu else y).astype(dtype)

        def inference(x, *others):
            return (normalize(x.astype(parameters), *others),)

        def training(x, running_mean, running_var, w, b, residual):
            x = x.astype(parameters)
            # The variance in one pass, as Flax has it by default.
            mean = x.mean(d.reduced)
            var = jnp.maximum(0, (x * x).mean(d.reduced) - mean * mean)
            running_mean += MOMENTUM * (mean - running_mean)
            running_var += MOMENTUM * (var - running_var)
            return normalize(x, mean, var, w, b, residual), running_mean, running_var

        def backward(dy, x, y, mean, invstd, w):
            dy, x = dy.astype(parameters), x.astype(parameters)
            dy = jnp.where(y > 0, dy, 0) if task.relu else dy
            normalized = (x - spread(mean)) * spread(invstd)
            grad_weight, grad_bias = (dy * normalized).sum(d.reduced), dy.sum(d.reduced)
            dx = dy - spread(grad_bias / d.count) - normalized * spread(grad_weight / d.count)
            return (spread(w * invstd) * dx).astype(dtype), grad_weight, grad_bias

        return {"inference": inference, "training": training, "backward": backward}[task.kind]


class Paddle(Contestant):
    name = "PaddlePaddle"
    shapes = FEW_SHAPES
    dtypes = ("float32", "float64")
    chain = True

    def __init__(self, threads):
        import paddle

        paddle.set_grad_enabled(False)
        self.paddle, self.version = paddle, paddle.__version__

    def candidates(self, task, layout):
        paddle, functional, d = self.paddle, self.paddle.nn.functional, task.data
        x, dy, residual = map(paddle.utils.dlpack.from_dlpack, (d.x, d.grad_output, d.residual))
        w, b, *running = map(paddle.to_tensor, (d.weight, d.bias, *d.running()))
        spatial = ("HW" if d.layout == NC else "", "L", "HW", "DHW")[len(d.shape) - 2]
        form = f"N{spatial}C" if d.layout == NHWC else f"NC{spatial}"
        options = {"momentum": 1 - MOMENTUM, "epsilon": EPS, "data_format": form}
        relu = functional.relu if task.kind == "backward" else functional.relu_

        def forward(x, w, b):
            y = functional.batch_norm(x, *running, w, b, training=task.kind != "inference", **options)
            y = y.add_(residual) if task.residual else y
            if task.activation == "silu":
                return functional.silu(y)
            return relu(y) if task.relu else y

        def arrays(tensors):
            return tuple(map(np.from_dlpack, tensors))

        if task.kind != "backward":
            yield Candidate("batch_norm", partial(forward, x, w, b), lambda y: arrays([y]))
            return
        with paddle.enable_grad():
            leaves = [x, w, b]
            for leaf in leaves:
                leaf.stop_gradient = False
            y = forward(*leaves)
        call = partial(paddle.grad, y, leaves, dy, retain_graph=True)
        yield Candidate("grad", call, arrays)


class LiteRT(Contestant):
    """Inference only: a scale and a shift by XNNPACK, which is all that a converted batch norm is.

    TensorFlow is needed for the conversion. The interpreter's own memory is filled before it is timed.
    """

    name = "LiteRT"
    shapes = FEW_SHAPES

    def __init__(self, threads):
        import tensorflow
        from ai_edge_litert import __version__
        from ai_edge_litert.interpreter import Interpreter

        self.tf, self.threads = tensorflow, threads
        self.interpreter, self.version = Interpreter, __version__

    def candidates(self, task, layout):
        if task.kind != "inference":
            return
        tf, d = self.tf, task.data
        n, c, *spatial = d.shape
        s = math.prod(spatial)
        dims, per_channel = ((n, c, s), (c, 1)) if d.layout == NCHW else ((n, s, c), (c,))
        scale = d.weight / np.sqrt(d.running_var + np.float32(EPS))
        shift = (d.bias - d.running_mean * scale).reshape(per_channel)
        scale = scale.reshape(per_channel)
        inputs = [d.x, d.residual] if task.residual else [d.x]

        @tf.function(
            input_signature=[tf.TensorSpec(dims, tf.float32, name=f"i{k}") for k in range(len(inputs))]
        )
        def function(x, residual=None):
            y = x * scale + shift
            y = y + residual if task.residual else y
            y = y * tf.sigmoid(y) if task.activation == "silu" else y
            return tf.nn.relu(y) if task.relu else y

        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [function.get_concrete_function()], function
        )
        interpreter = self.interpreter(model_content=converter.convert(), num_threads=self.threads)
        interpreter.allocate_tensors()
        for details, a in zip(interpreter.get_input_details(), inputs, strict=True):
            interpreter.set_tensor(details["index"], a.reshape(dims))
        index = interpreter.get_output_details()[0]["index"]
        yield Candidate(
            "XNNPACK", interpreter.invoke, lambda _: (interpreter.get_tensor(index).reshape(d.x.shape),)
        )


def compiled(source, compiler, *flags, name=None):
    """The shared library of a C or C++ file of this folder, compiled when it is older than its source."""
    source = Path(__file__).with_name(source)
    library = BUILD / f"lib{name or source.stem}.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", library, source, *flags]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ImportError(f"{compiler} is not installed") from None
        except subprocess.CalledProcessError as error:
            raise ImportError(f"{source.name} does not compile: {error.stderr.splitlines()[0]}") from None
    # Bound at once and to its own dependencies first: TensorFlow and PyTorch carry other versions of oneDNN.
    return ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_LOCAL | getattr(os, "RTLD_DEEPBIND", 0))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


# The enumerations of onednn_bn.cpp. (N, C) is tried as a matrix and as an image of one pixel.
ONEDNN_OPS = ("inference", "training", "backward")
ONEDNN_TYPES = ("float32", *HALVES)
ONEDNN_HOWS = ("", "fused", "post-op", "of its own")
ONEDNN_ACTIVATIONS = ("relu", "silu")
ONEDNN_FORMATS = {"nchw": 0, "nc": 0, "nhwc": 1, "blocked16": 2, "blocked8": 3}
ONEDNN_FORMATS_OF = {NCHW: ("nchw",), NHWC: ("nhwc",), BLOCKED: ("blocked16", "blocked8"), NC: ("nc", "nhwc")}


class OneDNN(Contestant):
    """The primitive of oneDNN 3 through onednn_bn.cpp, on the task's arrays or in blocked memory."""

    name = "oneDNN (TBB)"
    layouts = (NCHW, NHWC, BLOCKED, NC)
    dtypes = ONEDNN_TYPES
    chain = True
    prefix = Path(sys.prefix)
    install = "pip install onednn==2026.1.0 onednn-devel==2026.1.0"

    def __init__(self, threads):
        include, lib = self.prefix / "include", self.prefix / "lib"
        if not (include / "dnnl.hpp").exists() or not (lib / "libdnnl.so.3").exists():
            raise ImportError(f"it is not installed: {self.install}")
        os.environ.setdefault("ONEDNN_VERBOSE", "none")
        # This build's CPU is a device of SYCL, whose driver is another library of the same folder.
        os.environ.setdefault("OCL_ICD_FILENAMES", str(lib / "libintelocl.so"))
        os.environ.setdefault("DPCPP_CPU_NUM_CUS", str(threads))
        # By an rpath of the old kind, which holds for what libdnnl needs, too.
        flags = (
            f"-I{include}",
            f"-L{lib}",
            "-ldnnl",
            f"-Wl,--disable-new-dtags,-rpath,{lib},-rpath-link,{lib}",
        )
        name = "onednn_" + "".join(filter(str.isalnum, self.name.lower()))
        self.library = library = compiled("onednn_bn.cpp", "g++", *flags, name=name)
        c_int = ctypes.c_int
        library.onednn_create.restype = ctypes.c_void_p
        library.onednn_create.argtypes = (
            *[c_int] * 2,
            ctypes.POINTER(ctypes.c_int64),
            *[c_int] * 5,
            ctypes.c_float,
        )
        for name in ("version", "error", "implementation"):
            getattr(library, f"onednn_{name}").restype = ctypes.c_char_p
        self.version = library.onednn_version().decode()
        if library.onednn_probe():
            raise ImportError(f"it has no CPU engine: {library.onednn_error().decode()}")

    def candidates(self, task, layout):
        if not task.preallocate:
            return
        if task.residual:
            hows = ["post-op"]
        elif task.activation:
            hows = ["of its own"] + ["fused"] * task.relu + ["post-op"] * (task.kind == "inference")
        else:
            hows = [""]
        refused = None
        for form in ONEDNN_FORMATS_OF[layout]:
            for activated in hows:
                try:
                    candidate = self.candidate(task, form, activated)
                except NotImplementedError as error:
                    refused = refused or error
                else:
                    refused = candidate
                    yield candidate
        if isinstance(refused, NotImplementedError):
            raise refused

    def candidate(self, task, form, activated):
        library, d = self.library, task.data
        shape = (*d.shape, 1, 1) if d.layout == NC and form == "nhwc" else d.shape
        dims = (ctypes.c_int64 * len(shape))(*shape)
        codes = (
            ONEDNN_TYPES.index(d.dtype),
            ONEDNN_FORMATS[form],
            ONEDNN_HOWS.index(activated),
            ONEDNN_ACTIVATIONS.index(task.activation or "relu"),
            task.residual,
        )
        handle = library.onednn_create(ONEDNN_OPS.index(task.kind), len(dims), dims, *codes, EPS)
        if handle is None:
            raise NotImplementedError(library.onednn_error().decode())
        bn = _Handle(handle, library)
        backward, blocked = task.kind == "backward", form.startswith("blocked")
        output, out = "grad_input" if backward else "y", d.empty()
        arrays = {"x": d.x} | ({"residual": d.residual} if task.residual else {})
        arrays |= {"grad_output": d.grad_output} if backward else {}
        vectors = {"weight": d.weight, "bias": d.bias}
        if task.kind == "inference":
            vectors |= {"mean": d.running_mean, "var": d.running_var}
        for name, a in (arrays | {output: out}).items() if not blocked else ():
            bn("bind", name.encode(), pointer(a))
        for name, a in (arrays | vectors if blocked else vectors).items():
            plain = np.moveaxis(a, d.axis, 1) if a.ndim > 1 else a
            bn("set", name.encode(), pointer(np.ascontiguousarray(plain)))
        bn("run_before")
        bn("run")  # and says why it cannot

        def result(_):
            y = out
            if blocked:
                y = np.empty(d.shape, d.numpy_dtype)
                bn("get", output.encode(), pointer(y))
                y = np.moveaxis(y, 1, d.axis)
            sums = [np.empty_like(d.weight), np.empty_like(d.bias)] if backward else []
            for name, a in zip(("grad_weight", "grad_bias"), sums, strict=False):
                bn("get", name.encode(), pointer(a))
            return y, *sums

        activated = activated and f"{task.activation} {activated}"
        how = ", ".join(filter(None, (form, activated, library.onednn_implementation(bn.handle).decode())))
        return Candidate(how, bn.run, result)


class OneDNNOpenMP(OneDNN):
    name = "oneDNN (GNU OpenMP)"
    prefix = BUILD / "onednn-gomp"  # its libraries have the names of those of the other
    install = (
        "pip install --no-deps --ignore-installed --prefix build/bench/onednn-gomp "
        "onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0"
    )


class _Handle:
    """An object of onednn_bn.cpp: destroyed with its last reference."""

    def __init__(self, handle, library):
        self.handle, self.library = ctypes.c_void_p(handle), library
        self.run = partial(library.onednn_run, self.handle)

    def __call__(self, function, *arguments):
        if getattr(self.library, f"onednn_{function}")(self.handle, *arguments):
            raise RuntimeError(f"oneDNN: {self.library.onednn_error().decode()}")

    def __del__(self):
        self.library.onednn_destroy(self.handle)


LIMITS = ("memory limit", "memory limit of two passes")


class MemoryLimit(Contestant):
    """Not a batch norm: the least traffic of the operation, in one pass or in two, by memory_limit.c."""

    layouts = (NCHW, NC)
    checked = False
    ISAS = ("baseline", "avx2", "avx512")

    def __init__(self, threads, passes=1):
        self.library = compiled("memory_limit.c", "gcc", "-fopenmp")
        allowed = self.ISAS.index(os.environ.get("FASTBN_ISA", "avx512"))
        self.isa = min(allowed, self.library.memory_limit_isa())
        self.threads, self.passes, self.version = threads, passes, None
        self.name = LIMITS[passes - 1]

    def candidates(self, task, layout):
        d = task.data
        if d.x.nbytes < 2**18:  # the call itself is what takes the time
            return
        if self.passes == 2 and task.kind == "inference":
            return
        second = {"backward": d.grad_output}.get(task.kind, d.residual if task.residual else None)
        out = d.empty()
        pointers = pointer(d.x), second if second is None else pointer(second), pointer(out)
        size = ctypes.c_size_t(d.x.size)
        for threads in {1, self.threads} if d.x.nbytes < 2**22 else (self.threads,):
            for nt, ahead in product((0, 1), map(ctypes.c_size_t, (0, 4096))):
                call = partial(
                    self.library.memory_limit, *pointers, size, self.isa, nt, ahead, self.passes, threads
                )
                stores, prefetch = "non-temporal" if nt else "plain", ", prefetching" if ahead.value else ""
                how = f"{self.ISAS[self.isa]}, {stores}{prefetch}, {threads} threads"
                yield Candidate(how, call, lambda _: (out,))


# Each group is timed beside fastbn in a process of its own.
GROUPS = {
    "memory limit": (MemoryLimit, partial(MemoryLimit, passes=2)),
    "NumPy": (NumPy,),
    "Numba": (Numba, NumbaFastmath),
    "oneDNN (TBB)": (OneDNN,),
    "oneDNN (GNU OpenMP)": (OneDNNOpenMP,),
    "PyTorch": (PyTorch,),
    "torch.compile": (TorchCompile,),
    "ONNX Runtime": (OnnxRuntime,),
    "OpenVINO": (OpenVINO,),
    "TensorFlow": (TensorFlow,),
    "LiteRT": (LiteRT,),
    "JAX": (JAX,),
    "PaddlePaddle": (Paddle,),
}
