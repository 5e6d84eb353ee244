"""What a type checker and help() are told: the types of fastbn.typing, signatures."""

import inspect
import re
from typing import Any, get_args

import pytest

import fastbn
from fastbn.typing import Activation, Array, Running


def test_activations_are_those_that_the_kernels_take():
    assert len(get_args(Activation)) >= 3
    for name in get_args(Activation):
        fastbn.BatchNorm1d(2, activation=name)
    with pytest.raises(ValueError, match="activation") as refused:
        fastbn.BatchNorm1d(2, activation="tanh")
    assert re.findall(r"'(\w+)'", str(refused.value)) == [*get_args(Activation), "tanh"]


def test_arrays_are_of_numpy():
    assert get_args(Array)[0] == get_args(get_args(Running)[0])[0]
    assert get_args(get_args(Array)[1])[0] is Any  # bfloat16 is no type of NumPy's own


def test_signature_of_the_call_of_a_frozen_layer():
    frozen = fastbn.BatchNorm(2).freeze()
    of_class = inspect.signature(fastbn.FrozenBatchNorm.__call__)
    arguments = "x, residual=None, out=None, *, mask=None, mask_output=False, num_threads=None)"
    assert str(of_class) == f"(self, /, {arguments}"
    assert list(inspect.signature(frozen).parameters) == list(of_class.parameters)[1:]
    assert str(inspect.signature(frozen)) == f"({arguments}"
    assert inspect.getdoc(fastbn.FrozenBatchNorm.__call__).startswith("Normalize `x`.\n\nParameters\n")


def test_modes_return_the_layer_itself():
    bn = fastbn.BatchNorm2d(2)
    assert bn.eval() is bn
    assert bn.train() is bn
    assert inspect.signature(fastbn.BatchNorm2d.eval).return_annotation == "Self"
