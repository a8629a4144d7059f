"""Sizes as people write and read them: bytes are ints in code, GiB and MiB in text."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from qlazy.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Read a size such as `22GiB` or `500 MB`.

    Args:
        text: A number and a unit; a bare number is refused, as it could mean either bytes or gigabytes.
    Returns:
        Bytes.
    Raises:
        UsageError: no number, no unit, or a unit that does not exist.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size.", hint="Write a number with a unit, e.g. 22GiB, 500MiB or 24GB.")
    return int(Decimal(match.group(1)) * _UNITS[match.group(2).upper()])


def format_bytes(nbytes: int, *, round_up: bool = False) -> str:
    """Write a number of bytes in the largest binary unit that keeps it readable.

    Args:
        nbytes: Bytes.
        round_up: Never write less than there is, as a number that is to be enough must not be.
    Returns:
        E.g. `21.4 GiB`, `118.2 MiB`, `7 KiB`, `12 B`.
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(nbytes) >= scale:
            number = math.ceil(10 * nbytes / scale) / 10 if round_up else nbytes / scale
            return f"{number:.1f} {unit}"
    kib = -(-nbytes // 1024) if round_up else nbytes // 1024
    return f"{kib} KiB" if abs(nbytes) >= 1024 else f"{nbytes} B"
