"""Sizes as people write and read them: bytes are ints in code, GiB and MiB in text."""

from __future__ import annotations

import re

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
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size.", hint="Write a number with a unit, e.g. 22GiB, 500MiB or 24GB.")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def format_bytes(nbytes: int) -> str:
    """Write a number of bytes in the largest binary unit that keeps it readable.

    Args:
        nbytes: Bytes.
    Returns:
        E.g. `21.4 GiB`, `118.2 MiB`, `7 KiB`, `12 B`.
    """
    if abs(nbytes) >= 1 << 30:
        return f"{nbytes / (1 << 30):.1f} GiB"
    if abs(nbytes) >= 1 << 20:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes // 1024} KiB" if abs(nbytes) >= 1024 else f"{nbytes} B"
