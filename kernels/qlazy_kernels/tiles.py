"""How a kernel cuts its work: one frozen record a launch, so that a table measured on a GPU can stand in for the defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program of a kernel takes. The numbers change how fast a result comes, never what a group is scaled with."""

    block_m: int = 1
    """Tokens: a power of two; at least 16 where tensor cores multiply."""
    block_n: int
    """Rows of the weight: a power of two."""
    block_k: int
    """Columns taken at a time: a power of two."""
    split_k: int = 1
    """Programs that share the columns of one tile of results; they write fp32 parts that a second kernel adds in order."""
    num_warps: int = 4
    """Warps of a program."""
    num_stages: int = 2
    """Depth of the load pipeline where the compiler builds one."""


def span_of(group_size: int, block_k: int) -> int:
    """Columns of a tile that certainly share a scale: what a kernel may sum up before it multiplies.

    A tile that crossed a group's end with one scale would be wrong without a sound, so the span is the largest power of two
    that divides the group, and never longer than the tile.

    Args:
        group_size: Columns that share a scale.
        block_k: Columns of a tile, a power of two.

    Returns:
        A power of two that divides both.
    """
    return min(group_size & -group_size, block_k)


def next_power_of_two(count: int) -> int:
    """The least power of two that is not below `count`.

    Args:
        count: At least 1.

    Returns:
        A power of two.
    """
    return 1 << (count - 1).bit_length()
