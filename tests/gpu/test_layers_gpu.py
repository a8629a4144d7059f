"""Low-bit layers that are moved between a CPU and a GPU: the same bytes and the same weight on both."""

from __future__ import annotations

import pytest
import torch

from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.layers import LAYERS
from qlazy.quant_linear import QuantLinear

pytestmark = pytest.mark.gpu

FORMATS: list[Format] = [Int4(), Int4(group_size=128, symmetric=True), Int4(group_size=-1), Int8(), Codebook4()]


def filled(fmt: Format) -> QuantLinear:
    weight = torch.randn(320, 256, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    layer = LAYERS[type(fmt)](256, 320, format=fmt, dtype=torch.bfloat16, bias=None)
    layer.allocate("cpu")
    layer.fill(weight)
    return layer


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_layer_of_the_cpu_moves_to_a_gpu_and_back(fmt):
    layer, wanted = filled(fmt), filled(fmt)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    for device in ("cuda", "cpu"):
        layer.to(device)
        assert set(layer.state_dict()) == set(wanted.storage)
        for key in wanted.storage:
            assert torch.equal(getattr(layer, key).cpu(), getattr(wanted, key))
        assert torch.allclose(layer(x.to(device)).cpu().float(), x.float() @ wanted.weight.float().T, atol=0.05)
