"""Which kernel a GPU gets for a product, and how it cuts its work: tables that were measured, and a generic one.

A table is a JSON file of `configs/devices`, named by the GPU, or the one that `qlazy tune` wrote for this machine::

    {"schema": 1, "device": "NVIDIA H100", "measured": "2026-11-22, ...",
     "dispatch": {"int4": [{"max_tokens": 8, "kernel": "gemv"}, ..., {"max_tokens": null, "kernel": "dequantize"}], ...},
     "tiles": {"gemv_int4": [{"max_tokens": 1, "rows": 4096, "columns": 4096, "block_m": 1, ...}, ...], ...}}

The first entry that fits is taken: `max_tokens` null is any number; `rows` and `columns`, where given, are one shape of weight.
What a table leaves out the generic one says.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from qlazy.configs import config_root
from qlazy.errors import UsageError

SCHEMA = 1

KERNELS = {
    "int4": ("gemv", "gemm", "dequantize"),
    "int8": ("gemv", "gemm", "dequantize"),
    "codebook4": ("bitsandbytes", "gemv", "dequantize"),
    "codebook4_alone": ("gemv", "dequantize"),
}
"""What a table may choose for each format; `codebook4_alone` is NF4 and FP4 where bitsandbytes is not installed."""

TILES = ("gemv_int4", "gemv_int8", "gemv_codebook4", "gemm_int4", "gemm_int8")
"""Kernels whose work is cut by the table."""

TILE_FIELDS = ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
"""Of `qlazy_kernels.tiles.Tile`."""


def user_file(device_name: str) -> Path:
    """Where `qlazy tune` keeps the table of a GPU.

    Args:
        device_name: As PyTorch gives it.

    Returns:
        A file under XDG_CONFIG_HOME, or ~/.config.
    """
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "qlazy" / "devices" / _file_name(device_name)


@functools.cache
def table_for(device_name: str) -> dict[str, Any]:
    """The table of a GPU, read once: the user's own, else the shipped one of its name, else the generic one.

    Args:
        device_name: As PyTorch gives it.

    Returns:
        `dispatch` and `tiles` as the module's docstring has them, complete.

    Raises:
        UsageError: A table is no such JSON.
    """
    folder = config_root() / "devices"
    generic = read_table(folder / "generic.json")
    for file in (user_file(device_name), folder / _file_name(device_name)):
        if file.is_file():
            own = read_table(file)
            return {key: generic[key] | own.get(key, {}) for key in ("dispatch", "tiles")}
    return generic


def read_table(file: Path) -> dict[str, Any]:
    """Read a table, and refuse one that would fail in the middle of a product.

    Args:
        file: JSON.

    Returns:
        What it holds.

    Raises:
        UsageError: It is no JSON, of another schema, or names something that does not exist.
    """
    try:
        table: Any = json.loads(file.read_text(encoding="utf-8"))
        wrong = _first_fault(table)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UsageError(f"{file} is no table of kernels: {wrong}.", hint="Delete it, or write it anew with `qlazy tune`.")
    return dict(table)


def choose(entries: list[dict[str, Any]], tokens: int, rows: int, columns: int) -> dict[str, Any]:
    """The first entry that fits.

    Args:
        entries: Of one format or kernel.
        tokens: M.
        rows: N.
        columns: K.

    Returns:
        The entry.
    """
    return next(
        entry
        for entry in entries
        if (entry["max_tokens"] is None or tokens <= entry["max_tokens"])
        and entry.get("rows", rows) == rows
        and entry.get("columns", columns) == columns
    )


def _first_fault(table: dict[str, Any]) -> str:
    """What is wrong with a table; nothing where it is sound."""
    if table["schema"] != SCHEMA:
        return f"its schema is {table['schema']}, not {SCHEMA}"
    for part, known in (("dispatch", KERNELS), ("tiles", TILES)):
        for name, entries in table.get(part, {}).items():
            if name not in known:
                return f"{part} has {name!r}, which is none of {', '.join(known)}"
            if entries[-1]["max_tokens"] is not None or entries[-1].keys() & {"rows", "columns"}:
                return f"the last entry of {name} must be for any number of tokens and any shape"
            for entry in entries:
                if part == "dispatch" and entry["kernel"] not in KERNELS[name]:
                    return f"{name} has the kernel {entry['kernel']!r}, which is none of {', '.join(KERNELS[name])}"
                sizes = [entry[field] for field in TILE_FIELDS] if part == "tiles" else []
                if any(type(size) is not int or size < 1 for size in sizes) or any(s & (s - 1) for s in sizes[:3]):
                    return f"an entry of {name} has the sizes {sizes}; the first three must be powers of two"
    return ""


def _file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in device_name).strip("-").lower() + ".json"
