"""The kernels on a real device, bit for bit against plain torch there."""

from __future__ import annotations

import pytest
import torch
from qlazy_kernels import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(4096, 4096, 32), (1023, 2048, 64), (5632, 2048, 128), (19, 264, -1), (1, 8, -1)]
)
def test_dequantize_int4_equals_reference(rows, columns, group_size, symmetric, dtype):
    from qlazy_kernels.dequantize import dequantize_int4

    groups = 1 if group_size == -1 else columns // group_size
    generator = torch.Generator("cuda").manual_seed(rows)
    options = {"generator": generator, "dtype": torch.int64, "device": "cuda"}
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), **options).to(torch.int32)
    zeros = None if symmetric else torch.randint(-(2**31), 2**31, (-(-rows // 8), groups), **options).to(torch.int32)
    scale = torch.randn((rows, groups), generator=generator, device="cuda").to(dtype)
    assert torch.equal(dequantize_int4(packed, scale, zeros), reference.dequantize_int4(packed, scale, zeros))


def test_offsets_beyond_32_bits():
    from qlazy_kernels.dequantize import dequantize_int4

    rows, columns = 262_144 + 8, 8_192  # 2^31 elements and a few rows: 4 GiB in float16
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip(f"needs 8 GiB free on the device, there are {torch.cuda.mem_get_info()[0] >> 30} GiB")
    packed = torch.full((rows, columns // 8), 0x76543210, dtype=torch.int32, device="cuda")
    scale = torch.ones((rows, 1), dtype=torch.float16, device="cuda")
    weight = dequantize_int4(packed, scale)
    expected = torch.arange(-8, 0, dtype=torch.float16, device="cuda").repeat(columns // 8)
    assert torch.equal(weight[-8:], expected.expand(8, -1))


def test_result_lands_on_the_device_of_its_input():
    from qlazy_kernels.dequantize import dequantize_int4

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    packed = torch.full((8, 4), 0x76543210, dtype=torch.int32, device="cuda:1")
    weight = dequantize_int4(packed, torch.ones((8, 1), device="cuda:1"))
    assert weight.device == packed.device
    assert weight[0, :8].tolist() == list(range(-8, 0))
