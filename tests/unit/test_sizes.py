"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlazy.errors import UsageError
from qlazy.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("22GiB", 22 << 30),
        ("500 MB", 500_000_000),
        ("24GB", 24_000_000_000),
        ("1.5GiB", 3 << 29),
        (" 7 kib ", 7 << 10),
        ("3KB", 3000),
        ("2tib", 2 << 40),
        ("1TB", 10**12),
        ("0MiB", 0),
        # In binary floating point this is one byte less.
        ("0.000009TB", 9_000_000),
        ("4.35GB", 4_350_000_000),
    ],
)
def test_a_number_with_a_unit_is_bytes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["22", "", "GiB", "-1GiB", "1e3MiB", "5B", "5 G", "1,5GiB", "1.GiB", "٣GiB", "nanGiB", "1GiBs"]
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text) in caught.value.message and "22GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (7 * 1024 + 900, "7 KiB"),
        (1 << 20, "1.0 MiB"),
        (int(118.2 * (1 << 20)), "118.2 MiB"),
        (1 << 30, "1.0 GiB"),
        (22 << 30, "22.0 GiB"),
        (-(3 << 30), "-3.0 GiB"),
        (-5, "-5 B"),
    ],
)
def test_bytes_are_written_in_a_readable_unit(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(1 << 20, 1 << 50))
def test_what_is_written_reads_back_to_a_twentieth_of_a_unit(nbytes):
    unit = 1 << 30 if nbytes >= 1 << 30 else 1 << 20
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= unit // 20 + 1


@given(st.integers(1024, 1 << 50))
def test_rounded_up_is_never_less(nbytes):
    assert nbytes <= parse_bytes(format_bytes(nbytes, round_up=True)) + 1 <= nbytes * 1.2 + 1024
