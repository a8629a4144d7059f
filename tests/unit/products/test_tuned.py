"""Tables of kernels: what is shipped is sound, and a broken one is refused before a product meets it."""

from __future__ import annotations

import json

import pytest

from qlazy.configs import config_root
from qlazy.errors import UsageError
from qlazy.products import tuned

TILE = dict.fromkeys(tuned.TILE_FIELDS, 4)


@pytest.mark.parametrize("file", sorted((config_root() / "devices").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_tables_can_be_read(file):
    table = tuned.read_table(file)
    assert {part: set(table[part]) for part in ("dispatch", "tiles")} == {
        "dispatch": set(tuned.KERNELS),
        "tiles": set(tuned.TILES),
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ({"schema": 2}, "schema is 2, not 1"),
        ({"schema": 1, "dispatch": {"int3": []}}, "'int3'"),
        ({"schema": 1, "dispatch": {"int4": [{"max_tokens": 8, "kernel": "gemv"}]}}, "any number of tokens"),
        ({"schema": 1, "dispatch": {"int4": [{"max_tokens": None, "kernel": "bitsandbytes"}]}}, "'bitsandbytes'"),
        ({"schema": 1, "tiles": {"gemm_int4": [{"max_tokens": None} | TILE | {"block_k": 48}]}}, "powers of two"),
        ({"schema": 1, "tiles": {"gemm_int4": [{"max_tokens": None} | TILE | {"num_warps": 0}]}}, "sizes"),
        ({"schema": 1, "tiles": {"gemm_int4": [{"max_tokens": None} | TILE | {"rows": 8}]}}, "any shape"),
        ({"schema": 1, "tiles": {"gemm_int4": [{"max_tokens": None}]}}, "KeyError"),
        ({"schema": 1, "tiles": {"gemm_int4": []}}, "IndexError"),
    ],
)
def test_a_broken_table_is_refused_with_the_reason(tmp_path, content, words):
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as caught:
        tuned.read_table(file)
    assert str(file) in caught.value.message and words in caught.value.message
    assert "qlazy tune" in caught.value.hint


def test_the_first_entry_that_fits():
    entries = [
        {"max_tokens": 4, "rows": 10, "columns": 20, "at": 0},
        {"max_tokens": 4, "at": 1},
        {"max_tokens": None, "at": 2},
    ]
    fits = [tuned.choose(entries, *where)["at"] for where in ((4, 10, 20), (4, 10, 21), (5, 10, 20))]
    assert fits == [0, 1, 2]
