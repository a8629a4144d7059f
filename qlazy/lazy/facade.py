"""What constructors see of recorded tensors: the device that they would be on, and their values where Python asks for them.

`torch.nn.init` and others do nothing for tensors on meta, so within a build `is_meta` is False and `device` is the logical one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qlazy.lazy.journal import Journal
from qlazy.lazy.log import Record, record_of


class Facade(TorchFunctionMode):
    """The function mode of one thread.

    Args:
        journal: Where values come from.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this in place of the function."""
        answer = _ANSWERS.get(func)
        if answer is not None and isinstance(args[0], Tensor):
            record = record_of(args[0])
            if record is not None:
                return answer(self._journal, record, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _concrete(journal: Journal, tensor: Tensor, reason: str) -> Tensor:
    with torch._C.DisableTorchFunction():
        (found,) = journal.concrete([tensor], reason)
    return found


def _device(journal: Journal, record: Record, tensor: Tensor) -> torch.device:
    return record.device


def _no(journal: Journal, record: Record, tensor: Tensor) -> bool:
    return False


def _is_cpu(journal: Journal, record: Record, tensor: Tensor) -> bool:
    return record.device.type == "cpu"


def _is_cuda(journal: Journal, record: Record, tensor: Tensor) -> bool:
    return record.device.type == "cuda"


def _get_device(journal: Journal, record: Record, tensor: Tensor) -> int:
    return -1 if record.device.type == "cpu" else record.device.index or 0


def _tolist(journal: Journal, record: Record, tensor: Tensor) -> Any:
    return _concrete(journal, tensor, "Tensor.tolist").tolist()


def _repr(journal: Journal, record: Record, tensor: Tensor, **options: Any) -> str:
    return repr(_concrete(journal, tensor, "Tensor.__repr__"))


def _numpy(journal: Journal, record: Record, tensor: Tensor, **options: Any) -> Any:
    if tensor.requires_grad and not options.get("force"):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
    with torch._C.DisableTorchFunction():
        return journal.numpy_view(tensor)


def _array(journal: Journal, record: Record, tensor: Tensor, dtype: Any = None, *rest: Any, **options: Any) -> Any:
    array = _numpy(journal, record, tensor)
    return array if dtype is None else array.astype(dtype, copy=False)


def _deepcopy(journal: Journal, record: Record, tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
    """As `Tensor.__deepcopy__`: tensors on one storage get copies on one storage."""
    if not tensor.is_leaf or type(tensor) is not Tensor:
        copied: Tensor = Tensor.__deepcopy__(tensor, memo)  # type: ignore[no-untyped-call]
        return copied
    if id(tensor) in memo:
        found: Tensor = memo[id(tensor)]
        return found
    key = ("qlazy", record.slot)
    with torch.no_grad():
        if key not in memo:
            nbytes = tensor.untyped_storage().nbytes()
            whole = torch.as_strided(tensor.detach(), (nbytes // tensor.element_size(),), (1,), 0)
            memo[key] = whole.clone()
        base = memo[key] if memo[key].dtype == tensor.dtype else memo[key].view(tensor.dtype)
        copy = torch.as_strided(base, tensor.size(), tensor.stride(), tensor.storage_offset())
    copy.requires_grad_(tensor.requires_grad)
    copy.__dict__.update(tensor.__dict__)
    memo[id(tensor)] = copy
    return copy


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.is_meta.__get__: _no,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _is_cpu,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _is_cuda,  # type: ignore[attr-defined]
    Tensor.device.__get__: _device,
    Tensor.get_device: _get_device,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    Tensor.__repr__: _repr,
    Tensor.__deepcopy__: _deepcopy,
}
