"""Four-bit codes to 32-bit words and back: the bit order of the logical layout, as compressed-tensors has it."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes_NK: Tensor) -> Tensor:
    """Eight codes along a row to one 32-bit word, the first in the lowest bits; the last word is filled up with zeros.

    ::

        bit    31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
              | k=8p+7 | k=8p+6 | k=8p+5 | k=8p+4 | k=8p+3 | k=8p+2 | k=8p+1 | k=8p   |      word p of row n
        byte  |        3        |        2        |        1        |        0        |      (little-endian)

    Args:
        codes_NK: uint8 (N, K) in 0..15.

    Returns:
        int32 (N, ceil(K/8)).

    Memory: the result, and a copy of the codes if K is no multiple of 8.
    """
    short = -codes_NK.shape[1] % 8
    codes = torch.nn.functional.pad(codes_NK, (0, short)) if short else codes_NK
    # Little-endian bytes of the word: byte b holds k=8p+2b in its low half and k=8p+2b+1 in its high half.
    pairs = (codes[:, 1::2] << 4).bitwise_or_(codes[:, 0::2])
    # Flat first: a single row may have any stride, and a view of another width minds it.
    return pairs.reshape(-1).view(torch.int32).view(pairs.shape[0], pairs.shape[1] // 4)


def unpack_int4(packed_NP: Tensor, columns: int) -> Tensor:
    """The codes that `pack_int4` packed.

    Args:
        packed_NP: int32 (N, ceil(K/8)).
        columns: K.

    Returns:
        uint8 (N, K) in 0..15.

    Memory: the result, and at most 8 padding columns of it.
    """
    rows, words = packed_NP.shape
    # Flat first: a single column may have any stride, and a view of another width minds it.
    pairs = packed_NP.reshape(-1).view(torch.uint8).view(rows, 4 * words)
    codes = torch.empty((pairs.shape[0], pairs.shape[1] * 2), dtype=torch.uint8, device=pairs.device)
    torch.bitwise_and(pairs, 15, out=codes[:, 0::2])
    torch.bitwise_right_shift(pairs, 4, out=codes[:, 1::2])
    return codes[:, :columns].contiguous()


def pack_zero_points(zero_NG: Tensor) -> Tensor:
    """Eight zeros along a *column* to one 32-bit word, the first row in the lowest bits; the last word is filled up with zeros.

    ::

        bit    31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
              | n=8i+7 | n=8i+6 | n=8i+5 | n=8i+4 | n=8i+3 | n=8i+2 | n=8i+1 | n=8i   |      word (i, g)

    Args:
        zero_NG: uint8 (N, G) in 0..15.

    Returns:
        int32 (ceil(N/8), G).

    Memory: the result and a copy of it.
    """
    return pack_int4(zero_NG.t().contiguous()).t().contiguous()


def unpack_zero_points(packed: Tensor, rows: int) -> Tensor:
    """The zeros that `pack_zero_points` packed.

    Args:
        packed: int32 (ceil(N/8), G).
        rows: N.

    Returns:
        uint8 (N, G) in 0..15.

    Memory: the result and a copy of it.
    """
    return unpack_int4(packed.t().contiguous(), rows).t().contiguous()
