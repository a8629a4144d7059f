"""Files as tensors without reading them: every tensor is a view of a map, whose pages come from the page cache when touched."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from qlazy.errors import IncompleteCheckpoint
from qlazy.sources.safetensors import TensorInfo

_NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE: a map is no promise of memory, as nothing writes to it."""


class MappedFiles:
    """Maps of files. They last as long as a tensor of theirs.

    What is written to a tensor stays in this process (MAP_PRIVATE), and the file is never changed.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, Tensor] = {}
        self.copied_bytes = 0
        """Bytes of tensors that had to be copied, as they do not lie on a multiple of their element."""

    def tensor(self, info: TensorInfo) -> Tensor:
        """A stored tensor.

        Args:
            info: Where it lies.
        Returns:
            A view of the map in the stored dtype and shape.
        Raises:
            IncompleteCheckpoint: the file is shorter than it was.

        Memory: none; a copy where a file of others does not align its tensors.
        """
        whole = self._maps.get(info.path)
        if whole is None:
            whole = self._maps[info.path] = _map(info.path)
        if info.end > whole.numel():
            raise IncompleteCheckpoint(
                f"{info.path.name}: tensor {info.name!r} ends at byte {info.end:,}, but the file has {whole.numel():,}."
            )
        dtype: torch.dtype = getattr(torch, info.dtype)
        part = whole[info.offset : info.offset + info.nbytes]
        if info.offset % dtype.itemsize:
            self.copied_bytes += info.nbytes
            part = part.clone()
        return part.view(dtype).view(info.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of one of the maps.

        Args:
            tensor: Any tensor.
        Returns:
            False for a copy.
        """
        return any(tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for whole in self._maps.values())


def _map(path: Path) -> Tensor:
    with path.open("rb") as file:
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        whole = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(whole, dtype=torch.uint8)
