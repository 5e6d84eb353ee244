"""The contestants of compare.py: fastbn, everyone it is measured against, and the memory limit.

A contestant offers one or more candidates for a task, the ways in which a user of it could do that;
compare.py checks each against the oracle and times the fastest. All candidates get the same NumPy arrays. A
contestant whose library is missing raises ImportError or OSError when it is made, and is left out.
"""

import contextlib
import ctypes
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shapes import channels_last, values_per_channel

OPS = (
    "inference",
    "inference+relu",
    "inference+residual+relu",
    "training",
    "training+relu",
    "backward",
    "backward+relu",
)
NCHW, NHWC, NC, BLOCKED = "NCHW", "channels-last", "(N, C)", "blocked"
EPS, MOMENTUM = 1e-5, 0.1
BUILD = Path(__file__).resolve().parents[1] / "build" / "bench"


def user_layouts(shape):
    """The layouts in which users hold an array of this shape."""
    return (NC,) if len(shape) == 2 else (NCHW, NHWC)


def aligned(shape):
    """An array that starts where a cache line does, as the arrays of most peers do: the same for everyone."""
    size = math.prod(shape)
    room = np.empty(size + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + size].reshape(shape)


class Data:
    """The arrays of one shape in one layout. The statistics and y (of training+relu) are those of x."""

    def __init__(self, shape, layout):
        rng = np.random.default_rng(0)
        _, c, *spatial = shape
        self.shape, self.layout, self.count = shape, layout, values_per_channel(shape)
        self.axis = -1 if layout == NHWC else 1
        dims = channels_last(shape) if layout == NHWC else shape
        self.per_channel = (1, c) + (1,) * len(spatial) if self.axis == 1 else (c,)
        self.reduced = tuple(i for i in range(len(dims)) if i != self.axis % len(dims))
        self.x, self.grad_output, self.residual = arrays = [aligned(dims) for _ in range(3)]
        for a in arrays:
            # The values of every layout are those of NCHW.
            np.copyto(np.moveaxis(a, self.axis, 1), rng.standard_normal(shape, np.float32))
        self.x += 0.5
        self.weight, self.bias, self.running_mean = rng.standard_normal((3, c), np.float32)
        self.running_var = rng.random(c, np.float32) + np.float32(0.5)
        self.y = self.empty()
        self.mean = self.x.mean(self.reduced, np.float64).astype(np.float32)
        np.subtract(self.x, self.mean.reshape(self.per_channel), out=self.y)
        self.var = np.einsum("...,...->...", self.y, self.y).mean(self.reduced, np.float64).astype(np.float32)
        self.invstd = (1 / np.sqrt(self.var + EPS)).astype(np.float32)
        self.y *= (self.weight * self.invstd).reshape(self.per_channel)
        self.y += self.bias.reshape(self.per_channel)
        np.maximum(self.y, 0, out=self.y)

    def empty(self):
        return aligned(self.x.shape)

    def running(self):
        return self.running_mean.copy(), self.running_var.copy()


class Task(NamedTuple):
    """One operation on one shape in one layout."""

    op: str
    data: Data
    preallocate: bool  # or as called by default, with fresh outputs

    @property
    def kind(self):
        return self.op.partition("+")[0]

    @property
    def relu(self):
        return "relu" in self.op

    @property
    def residual(self):
        return "residual" in self.op


class Candidate(NamedTuple):
    """One way to do a task. Between them call and result hold whatever memory the call works on."""

    how: str
    call: Callable[[], Any]
    # From what call() returned to (y,) or (grad_input, grad_weight, grad_bias), in the layout of the data.
    result: Callable[[Any], tuple]


class Contestant:
    layouts = (NCHW, NHWC, NC)

    def candidates(self, task: Task, layout: str) -> Iterator[Candidate]:
        raise NotImplementedError


class FastBN(Contestant):
    name = "fastbn"

    def __init__(self, threads):
        import fastbn

        fastbn.set_num_threads(threads)
        self.fastbn, self.version = fastbn, fastbn.__version__

    def candidates(self, task, layout):
        fastbn, d = self.fastbn, task.data
        out = d.empty() if task.preallocate else None
        activation = "relu" if task.relu else None
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
    name = "NumPy"

    def __init__(self, threads):
        from fastbn import baseline

        self.baseline, self.version = baseline, np.__version__

    def candidates(self, task, layout):
        baseline, d = self.baseline, task.data
        kept = d.empty() if task.preallocate else None

        def out():
            return np.empty_like(d.x) if kept is None else kept

        if task.kind == "inference":
            inputs = d.x, d.running_mean, d.running_var, d.weight, d.bias, EPS

            def call():
                y = baseline.inference(*inputs, axis=d.axis, relu=task.relu and not task.residual, out=out())
                if task.residual:
                    y += d.residual
                    np.maximum(y, 0, out=y)
                return y

            yield Candidate("baseline", call, lambda y: (y,))
        elif task.kind == "training":
            inputs = d.x, *d.running(), d.weight, d.bias, MOMENTUM, EPS
            yield Candidate(
                "baseline",
                lambda: baseline.training_forward(*inputs, axis=d.axis, relu=task.relu, out=out()),
                lambda outputs: outputs[:1],
            )
        else:
            masked = d.empty() if task.preallocate and task.relu else None

            def call():
                dy = np.multiply(d.grad_output, d.y > 0, out=masked) if task.relu else d.grad_output
                return baseline.backward(dy, d.x, d.mean, d.invstd, d.weight, axis=d.axis, out=out())

            yield Candidate("baseline", call, lambda grads: grads)


class PyTorch(Contestant):
    name = "PyTorch"

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.version = torch, torch.__version__

    def tensor(self, array, d):
        """Without a copy, channels second. A channels-last sequence gets the fourth axis its kernels know."""
        t = self.torch.from_numpy(array)
        if d.layout == NHWC:
            t = t.movedim(-1, 1)
            t = t.unsqueeze(-1) if t.dim() == 3 else t
        return t

    def candidates(self, task, layout):
        torch, aten, d = self.torch, self.torch.ops.aten, task.data

        def array(t):
            return t.reshape(d.shape).movedim(1, d.axis).numpy()

        x, dy, y_saved, residual = (self.tensor(a, d) for a in (d.x, d.grad_output, d.y, d.residual))
        w, b, mean, invstd = map(torch.from_numpy, (d.weight, d.bias, d.mean, d.invstd))
        running_mean, running_var = map(torch.from_numpy, d.running())
        training = task.kind == "training"
        if task.kind != "backward":

            def finish(y):
                if task.residual:
                    y.add_(residual)
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


class OnnxRuntime(Contestant):
    """Has no channels-last and no backward; training is BatchNormalization with training_mode=1."""

    name = "ONNX Runtime"
    layouts = (NCHW, NC)

    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.ort, self.version = onnx, onnxruntime, onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def session(self, task):
        h, float32, d = self.onnx.helper, self.onnx.TensorProto.FLOAT, task.data
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
        nodes[-1].output[0] = "y"
        values = {"weight": d.weight, "bias": d.bias, "mean": d.running_mean, "var": d.running_var}
        graph = h.make_graph(
            nodes,
            "batch_norm",
            [h.make_tensor_value_info(name, float32, a.shape) for name, a in inputs.items()],
            [h.make_tensor_value_info(name, float32, None) for name in outputs],
            [self.onnx.numpy_helper.from_array(a, name) for name, a in values.items()],
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
        results = {name: aligned(shape) for name, shape in shapes.items()}
        binding = session.io_binding()
        for name, a in inputs.items():
            binding.bind_input(name, "cpu", 0, np.float32, a.shape, a.ctypes.data)
        for name, a in results.items():
            binding.bind_output(name, "cpu", 0, np.float32, a.shape, a.ctypes.data)
        call = partial(session.run_with_iobinding, binding)
        yield Candidate("run_with_iobinding", call, lambda _: (results["y"],))


class OpenVINO(Contestant):
    """Inference only. Its BatchNormInference is channels-second: channels-last is a scale and a shift."""

    name = "OpenVINO"

    def __init__(self, threads):
        import openvino

        self.openvino, self.version = openvino, openvino.__version__.partition("-")[0]
        self.core = openvino.Core()
        self.config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # or it may take bfloat16
        }

    def candidates(self, task, layout):
        if task.kind != "inference":
            return
        from openvino import opset13 as ops

        openvino, d = self.openvino, task.data
        parameters = [ops.parameter(d.x.shape, np.float32)]
        if d.layout == NHWC:
            scale = d.weight / np.sqrt(d.running_var + np.float32(EPS))
            y = ops.add(ops.multiply(parameters[0], scale), d.bias - d.running_mean * scale)
        else:
            constants = (ops.constant(a) for a in (d.weight, d.bias, d.running_mean, d.running_var))
            y = ops.batch_norm_inference(parameters[0], *constants, EPS)
        if task.residual:
            parameters.append(ops.parameter(d.x.shape, np.float32))
            y = ops.add(y, parameters[1])
        y = ops.relu(y) if task.relu else y
        compiled = self.core.compile_model(openvino.Model([y], parameters), "CPU", self.config)
        inputs = [d.x, d.residual][: len(parameters)]
        if not task.preallocate:
            yield Candidate("compiled model", partial(compiled, inputs), lambda results: (results[0],))
            return
        request, out = compiled.create_infer_request(), d.empty()
        for i, a in enumerate(inputs):
            request.set_input_tensor(i, openvino.Tensor(a, shared_memory=True))
        request.set_output_tensor(0, openvino.Tensor(out, shared_memory=True))
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
    name = "JAX"

    def __init__(self, threads):
        import jax

        self.jax, self.version = jax, jax.__version__

    def candidates(self, task, layout):
        jax, jnp, d = self.jax, self.jax.numpy, task.data
        spread = partial(jnp.reshape, shape=d.per_channel)

        def inference(x, mean, var, w, b, residual):
            y = (x - spread(mean)) * spread(w * jax.lax.rsqrt(var + EPS)) + spread(b)
            y = y + residual if task.residual else y
            return (jax.nn.relu(y) if task.relu else y,)

        def training(x, running_mean, running_var, w, b, residual):
            # The variance in one pass, as Flax has it by default.
            mean = x.mean(d.reduced)
            var = jnp.maximum(0, (x * x).mean(d.reduced) - mean * mean)
            running_mean += MOMENTUM * (mean - running_mean)
            running_var += MOMENTUM * (var - running_var)
            return *inference(x, mean, var, w, b, residual), running_mean, running_var

        def backward(dy, x, y, mean, invstd, w):
            dy = jnp.where(y > 0, dy, 0) if task.relu else dy
            normalized = (x - spread(mean)) * spread(invstd)
            grad_weight, grad_bias = (dy * normalized).sum(d.reduced), dy.sum(d.reduced)
            dx = dy - spread(grad_bias / d.count) - normalized * spread(grad_weight / d.count)
            return spread(w * invstd) * dx, grad_weight, grad_bias

        if task.kind == "backward":
            function, inputs = backward, (d.grad_output, d.x, d.y, d.mean, d.invstd, d.weight)
        else:
            function = {"inference": inference, "training": training}[task.kind]
            inputs = d.x, d.running_mean, d.running_var, d.weight, d.bias, d.residual
        compiled, inputs = jax.jit(function), jax.device_put(inputs)

        def call():
            outputs = compiled(*inputs)
            outputs[0].block_until_ready()
            return outputs

        def result(outputs):
            return tuple(map(np.asarray, outputs[: 3 if task.kind == "backward" else 1]))

        yield Candidate("jit", call, result)


def compiled(source, compiler, *flags):
    """The shared library of a C or C++ file of this folder, compiled when it is older than its source."""
    source = Path(__file__).with_name(source)
    library = BUILD / f"lib{source.stem}.so"
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
ONEDNN_RELUS = ("", "fused relu", "relu as post-op", "relu of its own")
ONEDNN_FORMATS = {"nchw": 0, "nc": 0, "nhwc": 1, "blocked16": 2, "blocked8": 3}
ONEDNN_FORMATS_OF = {NCHW: ("nchw",), NHWC: ("nhwc",), BLOCKED: ("blocked16", "blocked8"), NC: ("nc", "nhwc")}


class OneDNN(Contestant):
    """oneDNN's primitive through onednn_bn.cpp, in memory of its own that is filled before it is timed."""

    name = "oneDNN"
    layouts = (NCHW, NHWC, BLOCKED, NC)

    def __init__(self, threads):
        self.library = library = compiled("onednn_bn.cpp", "g++", "-ldnnl")
        c_int = ctypes.c_int
        library.onednn_create.restype = ctypes.c_void_p
        library.onednn_create.argtypes = (
            *[c_int] * 2,
            ctypes.POINTER(ctypes.c_int64),
            *[c_int] * 3,
            ctypes.c_float,
        )
        for name in ("version", "error", "implementation"):
            getattr(library, f"onednn_{name}").restype = ctypes.c_char_p
        self.version = library.onednn_version().decode()

    def candidates(self, task, layout):
        if not task.preallocate:
            return
        if task.residual:
            relus = ["relu as post-op"]
        elif task.relu:
            relus = ["fused relu", "relu of its own"] + ["relu as post-op"] * (task.kind == "inference")
        else:
            relus = [""]
        for form in ONEDNN_FORMATS_OF[layout]:
            for relu in relus:
                with contextlib.suppress(NotImplementedError):
                    yield self.candidate(task, form, relu)

    def candidate(self, task, form, relu):
        library, d = self.library, task.data
        shape = (*d.shape, 1, 1) if d.layout == NC and form == "nhwc" else d.shape
        dims = (ctypes.c_int64 * len(shape))(*shape)
        codes = ONEDNN_FORMATS[form], ONEDNN_RELUS.index(relu), task.residual
        handle = library.onednn_create(ONEDNN_OPS.index(task.kind), len(dims), dims, *codes, EPS)
        if handle is None:
            raise NotImplementedError(library.onednn_error().decode())
        bn = _Handle(handle, library)
        inputs = {"x": np.moveaxis(d.x, d.axis, 1), "weight": d.weight, "bias": d.bias}
        if task.kind == "inference":
            inputs |= {"mean": d.running_mean, "var": d.running_var}
        if task.residual:
            inputs["residual"] = np.moveaxis(d.residual, d.axis, 1)
        if task.kind == "backward":
            inputs["grad_output"] = np.moveaxis(d.grad_output, d.axis, 1)
        for name, a in inputs.items():
            bn("set", name.encode(), pointer(np.ascontiguousarray(a)))
        bn("run_before")

        def result(_):
            outputs = [np.empty(d.shape, np.float32)]
            names = ["y"]
            if task.kind == "backward":
                names = ["grad_input", "grad_weight", "grad_bias"]
                outputs += [np.empty_like(d.weight), np.empty_like(d.bias)]
            for name, a in zip(names, outputs, strict=True):
                bn("get", name.encode(), pointer(a))
            return np.moveaxis(outputs[0], 1, d.axis), *outputs[1:]

        how = ", ".join(filter(None, (form, relu, library.onednn_implementation(bn.handle).decode())))
        return Candidate(how, bn.run, result)


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


class MemoryLimit(Contestant):
    """Not a batch norm: the least traffic of the operation, in one pass or in two, by memory_limit.c."""

    name = "memory limit"
    layouts = (NCHW, NC)
    ISAS = ("baseline", "avx2", "avx512")

    def __init__(self, threads, passes=1):
        self.library = compiled("memory_limit.c", "gcc", "-fopenmp")
        allowed = self.ISAS.index(os.environ.get("FASTBN_ISA", "avx512"))
        self.isa = min(allowed, self.library.memory_limit_isa())
        self.threads, self.passes, self.version = threads, passes, None

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


CONTESTANTS = (FastBN, NumPy, OneDNN, PyTorch, OnnxRuntime, OpenVINO, TensorFlow, JAX)
