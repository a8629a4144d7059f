"""How work is cut: spans never cross a group, and the generic table of devices holds the defaults of the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

GENERIC = Path(__file__).parents[2] / "configs" / "devices" / "generic.json"


@pytest.mark.parametrize("group", [8, 24, 32, 40, 64, 96, 128, 4096, 5632, 11008])
@pytest.mark.parametrize("block_k", [32, 64, 256, 1024])
def test_a_span_divides_group_and_tile(kernels, group, block_k):
    span = kernels.tiles.span_of(group, block_k)
    assert group % span == 0 and block_k % span == 0


def test_next_power_of_two(kernels):
    assert [kernels.tiles.next_power_of_two(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]


def entries(table: list[dict]) -> list[dict]:
    """The entries, once their bounds are known to ascend and the last to be open."""
    bounds = [entry["max_tokens"] for entry in table]
    assert bounds[-1] is None and bounds[:-1] == sorted(bounds[:-1])
    return table


def test_generic_table_holds_the_defaults(kernels):
    table = json.loads(GENERIC.read_text())
    assert table["schema"] == 1 and table["device"] == "generic"
    assert table["measured"] is None, "no GPU has measured the generic table"
    for formats in table["dispatch"].values():
        assert entries(formats)
    gemv, gemm = kernels.gemv.TILES, kernels.gemm.TILES
    defaults = {"gemv_int4": gemv[4], "gemv_int8": gemv[8], "gemv_codebook4": gemv[4], "gemm_int4": gemm, "gemm_int8": gemm}
    assert set(table["tiles"]) == set(defaults)
    for name, tiles in defaults.items():
        rows = entries(table["tiles"][name])
        assert [kernels.tiles.Tile(**{k: v for k, v in row.items() if k != "max_tokens"}) for row in rows] == list(
            tiles.values()
        )
        assert [row["max_tokens"] for row in rows[:-1]] == list(tiles)[:-1]


def test_default_tiles_by_tokens(kernels):
    assert [kernels.gemv.default_tile(4, tokens).block_m for tokens in (1, 2, 3, 5, 16)] == [1, 2, 4, 8, 8]
    assert [kernels.gemm.default_tile(tokens).block_m for tokens in (1, 16, 17, 64, 65, 4096)] == [16, 16, 32, 64, 128, 128]
    assert kernels.gemm.default_tile(4096, torch.float32) == kernels.gemm.FLOAT32_TILE
