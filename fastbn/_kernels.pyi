"""Types of the compiled kernels; for use inside fastbn only."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import disjoint_base

from fastbn.typing import Activation, Array, Mask, Running

_Float64Pair: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
_Sums: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], int]  # dz, dz * (x - mean), count

openmp: int | None

def supported_isas() -> tuple[str, ...]: ...
def get_isa() -> str: ...
def set_isa(name: str) -> str: ...
def release_pool() -> None: ...
def elements(a: Any, name: str) -> Array: ...
def vector(a: Any, name: str, C: int, writable: bool, dtype: np.dtype[Any]) -> Array: ...
def real_dtype(dtype: DTypeLike | None, weight: Any = None, bias: Any = None) -> np.dtype[Any]: ...
def dtype_of_parameters(x: Array) -> str: ...
def caches() -> tuple[int, int, int]: ...
def openmp_threads() -> int: ...
def openmp_cpus() -> int: ...
def judge(elements: int, threads: int, own: int, wall: int) -> None: ...
def sharing() -> tuple[int, int, int]: ...
def would_share(elements: int) -> bool: ...
def most_at_work() -> int: ...
def forget_sharing() -> None: ...
def openmp_library() -> str | None: ...
def check_activation(activation: Activation | None, negative_slope: float) -> None: ...
def check_momentum(momentum: float) -> float: ...
def check_input(
    x: Array, axis: int, ranks: tuple[int, ...] | None, num_features: int, dtype: np.dtype[Any]
) -> None: ...
def check_eps(eps: float) -> float: ...
def whole(value: int, name: str, limits: str) -> int: ...

@disjoint_base
class Frozen:
    num_features: int
    axis: int
    activation: Activation | None
    eps: float
    negative_slope: float
    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        *,
        mask: Mask | None = None,
        mask_output: bool = False,
        num_threads: int | None = None,
    ) -> Array: ...

def positions(mask: Mask, x: Array, axis: int) -> Mask: ...
def give_back() -> int: ...
def set_output_limit(max_bytes: int) -> None: ...
def output_memory() -> tuple[int, int]: ...
def stats(
    x: Array, axis: int, num_threads: int | None, mask: Mask | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]: ...
def forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axis: int,
    residual: Array | None,
    activation: Activation | None,
    negative_slope: float,
    out: Array | None,
    num_threads: int | None,
    running_mean: Running | None,
    running_var: Running | None,
    momentum: float,
    unbiased: bool,
    want_stats: bool,  # else mean and var are None, which batch_norm drops
    exact: _Float64Pair | None = None,
    counter: NDArray[np.int64] | None = None,
    skip_nonfinite: bool = False,
    mask: Mask | None = None,
    mask_output: bool = False,
) -> tuple[Array, NDArray[np.float64], NDArray[np.float64], int]: ...
def normalize(
    x: Array,
    mean: Running,
    var: Running,
    of_stats: bool,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axis: int,
    residual: Array | None,
    activation: Activation | None,
    negative_slope: float,
    out: Array | None,
    num_threads: int | None,
    ranks: tuple[int, ...] | None,
    exact: _Float64Pair | None = None,
    mask: Mask | None = None,
    mask_output: bool = False,
    count: int | None = None,  # of the values that mean and var are of
    dtype: np.dtype[Any] | None = None,
) -> Array: ...
def unrounded(mean: Array, var: Array, exact: _Float64Pair, eps: float) -> _Float64Pair | None: ...
def backward_sums(
    grad_output: Array,
    x: Array,
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    count: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axis: int,
    residual: Array | None,
    output: Array | None,
    activation: Activation | None,
    negative_slope: float,
    num_threads: int | None,
    mask: Mask | None = None,
    mask_output: bool = False,
) -> _Sums: ...
def backward(
    grad_output: Array,
    x: Array,
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    count: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    training: bool,
    axis: int,
    residual: Array | None,
    activation: Activation | None,
    negative_slope: float,
    out: Array | None,
    num_threads: int | None,
    sums: _Sums | None = None,
    output: Array | None = None,
    needs: int = 15,  # the results in their order, a bit each
    mask: Mask | None = None,
    mask_output: bool = False,
) -> tuple[Any, Any, Any, Any]: ...
def tensor_forward(
    x: Any,
    y: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    mean: Any,
    var: Any,
    counter: Any,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    num_threads: int | None,
) -> None: ...
def tensor_backward(
    grad_output: Any,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    output: Any,
    grad_input: Any,
    grad_weight: Any,
    grad_bias: Any,
    grad_residual: Any,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    num_threads: int | None,
) -> None: ...
def kept_like(a: Any) -> NDArray[Any]: ...
def learn_torch(torch: Any, memory_format: Any, plain_keys: int, plain_keys_in_inference: int) -> None: ...
def torch_forward(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    residual: Any,
    activation: str | None,
    negative_slope: float,
    counter: Any,
    num_threads: int,
) -> tuple[Any, Any, Any] | None: ...
def torch_backward(
    grad_output: Any, saved: tuple[Any, ...], call: tuple[Any, ...], needs: tuple[bool, ...], num_threads: int
) -> tuple[Any, ...] | None: ...
def calls_by_arrays() -> int: ...
def update_running(
    running_mean: Running,
    running_var: Running,
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    count: int,
    momentum: float,
    unbiased: bool,
    exact: _Float64Pair | None = None,
    counter: NDArray[np.int64] | None = None,
    skip_nonfinite: bool = False,
) -> None: ...
def tune(serial: int = -1, cache: int = -1, group: int = -1) -> None: ...
def dtypes() -> list[str]: ...
def machines() -> list[str]: ...
def plan(
    shape: tuple[int, ...],
    operation: str,
    *,
    axis: int = 1,
    dtype: str = "float32",
    threads: int = 1,
    residual: bool = False,
    machine: str | None = None,
    facts: dict[str, int] | None = None,
) -> dict[str, Any]: ...
def watch_plans(watched: bool) -> None: ...
def latest_plan() -> dict[str, Any] | None: ...
