"""Gate and up projection together, interpreted."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference
from torch.nn.functional import gelu, linear, silu

from tests.kernels.packed import random_int4, random_tokens, require_no_worse

ACTIVATIONS = {"silu": silu, "gelu_tanh": lambda gate: gelu(gate, approximate="tanh")}


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "groups", "symmetric", "dtype"),
    [
        (1, 11, 256, 8, False, torch.float16),
        (3, 9, 1056, 33, True, torch.bfloat16),
        (2, 5, 100, 1, False, torch.float32),
    ],
)
def test_gate_up_is_as_precise_as_plain_torch(kernels, tokens, rows, columns, groups, symmetric, dtype, activation):
    gate = random_int4(rows, columns, groups, symmetric=symmetric, dtype=dtype)
    up = tuple(None if tensor is None else tensor.flip(0) for tensor in gate)
    x = random_tokens(tokens, columns, dtype)
    unpacked = [reference.dequantize_int4(*weight, columns=columns, dtype=torch.float64) for weight in (gate, up)]
    plain = ACTIVATIONS[activation](linear(x, unpacked[0].to(dtype))) * linear(x, unpacked[1].to(dtype))
    y = kernels.gate_up.gemv_gate_up_int4(x, gate, up, activation=activation)
    require_no_worse(y, plain, reference.gate_up(x, *unpacked, activation))


def test_gate_up_refuses_with_the_numbers(kernels):
    gate = random_int4(8, 64, 2, symmetric=False, dtype=torch.float32)
    other = random_int4(9, 64, 2, symmetric=False, dtype=torch.float32)
    x = torch.zeros(1, 64)
    with pytest.raises(ValueError, match=r"\(8, 8\) and \(9, 8\)"):
        kernels.gate_up.gemv_gate_up_int4(x, gate, other)
    with pytest.raises(ValueError, match="zeros"):
        kernels.gate_up.gemv_gate_up_int4(x, gate, (*gate[:2], None))
    with pytest.raises(ValueError, match="'relu'"):
        kernels.gate_up.gemv_gate_up_int4(x, gate, gate, activation="relu")
    assert kernels.gate_up.gemv_gate_up_int4(x[:0], gate, gate).shape == (0, 8)
