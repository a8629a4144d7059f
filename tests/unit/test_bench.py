"""The figures of a benchmark, from seconds that are given."""

from __future__ import annotations

import json
import statistics

import pytest

from qlazy.bench import Benchmark, Timing, table, to_json

PROMPT = Timing(kind="prompt", tokens=512, seconds=(2.0, 4.0))
ANSWER = Timing(kind="generation", tokens=128, seconds=(10.0,))


@pytest.fixture
def benchmark() -> Benchmark:
    return Benchmark(
        model="some/model",
        format="int4-g32-asym",
        weight_bytes=3 << 30,
        parameters=8_030_000_000,
        device="cuda:0",
        threads=8,
        timings=(PROMPT, ANSWER),
        load_seconds=12.345,
        load_peak_bytes=100 << 20,
        run_peak_bytes=200 << 20,
        device_peak_bytes={"cuda:0": 4 << 30},
    )


def test_mean_and_deviation_are_those_of_the_rates():
    assert (PROMPT.test, ANSWER.test) == ("pp512", "tg128")
    assert PROMPT.tokens_per_s == statistics.mean([256, 128]) and PROMPT.deviation == statistics.stdev([256, 128])
    assert (ANSWER.tokens_per_s, ANSWER.deviation) == (12.8, 0.0)


def test_table_is_markdown_with_a_row_for_each_test(benchmark):
    head, rule, *rows, blank, last = table(benchmark).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert cells[0] == ["model", "format", "size", "params", "device", "threads", "test", "tokens/s"]
    assert cells[1] == ["some/model", "int4-g32-asym", "3.0 GiB", "8.0 B", "cuda:0", "8", "pp512", "192.00 ± 90.51"]
    assert cells[2][-2:] == ["tg128", "12.80 ± 0.00"]
    assert set(rule) == {"|", "-", " "} and blank == "" and len({len(row) for row in (head, rule, *rows)}) == 1
    assert last == (
        "Loaded in 12.35 s; host memory up to 100.0 MiB while loading, 200.0 MiB while running, cuda:0 up to 4.0 GiB."
    )


def test_json_has_every_repetition(benchmark):
    found = json.loads(json.dumps(to_json(benchmark)))
    assert found["schema"] == 1 and found["weight_bytes"] == 3 << 30 and found["load_seconds"] == 12.345
    assert found["timings"][0] == {
        "test": "pp512",
        "kind": "prompt",
        "tokens": 512,
        "batch": 1,
        "seconds": [2.0, 4.0],
        "tokens_per_s": PROMPT.tokens_per_s,
        "deviation": PROMPT.deviation,
    }
