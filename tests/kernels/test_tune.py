"""Measuring: what comes out of any clock is a table that can be read, with the fastest of everything."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from qlazy import tune
from qlazy.products import tuned


@pytest.mark.parametrize(("kernel", "bits"), [("gemv", 4), ("gemv", 8), ("gemm", 4)])
def test_candidates_are_whole_tiles(kernel, bits):
    for tokens in tune.GEMV_TOKENS if kernel == "gemv" else tune.GEMM_TOKENS:
        tiles = list(tune.candidates(kernel, tokens, bits))
        assert 2 <= len(tiles) == len({tuple(tile.values()) for tile in tiles}) <= 50
        for tile in tiles:
            assert set(tile) == set(tuned.TILE_FIELDS) and tile["block_m"] == tokens
            assert all(size > 0 and size & (size - 1) == 0 for size in list(tile.values())[:3])
            if kernel == "gemv":
                assert 8 % tile["block_n"] == 0, "the zeros of a block's rows are read as one word"


def test_the_clock_is_that_of_the_gpu_that_is_measured(monkeypatch):
    pytest.importorskip("triton")
    current, seen = ["cuda:0"], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append(current[-1])

        def elapsed_time(self, end):
            return 5.0

    @contextlib.contextmanager
    def device(asked):
        current.append(str(asked))
        yield
        current.pop()

    monkeypatch.setattr(tune.torch.cuda, "Event", Event)
    monkeypatch.setattr(tune.torch.cuda, "device", device)
    monkeypatch.setattr(tune.torch.cuda, "synchronize", lambda: seen.append(current[-1]))
    clock = tune.gpu_timer(torch.device("meta"))  # which takes no memory
    assert clock(lambda: torch.empty(0)) == 5e-3
    assert seen == ["meta"] * (2 * tune.REPETITIONS + 1) and current == ["cuda:0"]
    assert clock(lambda: None) == float("inf")


def test_a_table_has_the_fastest(dispatch, tmp_path, monkeypatch):
    """The clock: narrow tiles are fast, GEMV up to 2 tokens, tensor cores never; bitsandbytes is not there."""

    def seconds(work) -> float:
        if work.func is tune.ops.product_by_blocks:
            return 2.5
        kernel, tile, x, *_ = work.args
        if kernel == "gemm":
            return 9.0 + (tile.block_n != 64)
        if kernel == "gemv":
            return x.shape[0] + tile.block_n / 100
        assert work() is None, "no kernel, and no step towards one"
        return float("inf")

    monkeypatch.setattr(dispatch.triton_products, "_by_bitsandbytes", lambda *args: pytest.fail("bitsandbytes is not there"))
    told: list[str] = []
    table = tune.tune("cpu", shapes=[(8, 128), (16, 64)], timer=seconds, on_progress=told.append)
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    read = tuned.read_table(file)
    assert set(read["tiles"]) == set(tuned.TILES) and set(read["dispatch"]) == set(tuned.KERNELS)
    assert all(entry["block_n"] <= 2 for name in tuned.TILES if "gemv" in name for entry in read["tiles"][name])
    assert all(entry["block_n"] == 64 for entry in read["tiles"]["gemm_int4"])
    for name in tuned.KERNELS:
        assert read["dispatch"][name] == [
            {"max_tokens": 2, "kernel": "gemv"},
            {"max_tokens": None, "kernel": "dequantize"},
        ], name
    assert "gemm, int8" in told
