"""What constructors see of recorded tensors: the device that they would be on, and their values where Python asks for them.

`torch.nn.init` and others do nothing for tensors on meta, so within a build `is_meta` is False and `device` is the logical one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qlazy.errors import UsageError
from qlazy.lazy.edits import SETTERS_OF_DATA
from qlazy.lazy.journal import CPU, META, Journal
from qlazy.lazy.log import Record, geometry_of, map_leaves, record_of, tensor_on
from qlazy.lazy.materialize import materialize, swapped
from qlazy.lazy.record import Recorder
from qlazy.lazy.replay import plain


class Facade(TorchFunctionMode):
    """The function mode of one thread.

    Args:
        recorder: Its dispatch mode.
        journal: Where values come from.
    """

    def __init__(self, recorder: Recorder, journal: Journal) -> None:
        super().__init__()
        self._recorder = recorder
        self._journal = journal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this in place of the function."""
        kwargs = kwargs or {}
        if func in _FROM_DATA and args and isinstance(args[0], (list, tuple)):
            args = (map_leaves(self._as_real, args[0]), *args[1:])
        record = None
        if args and isinstance(args[0], Tensor):
            with torch._C.DisableTorchFunction():
                record = record_of(args[0])
        if func in SETTERS_OF_DATA:
            return _set_data(*args)
        answer = _ANSWERS.get(func)
        if answer is not None and record is not None:
            if record.real is None:
                return answer(self._journal, record, *args, **kwargs)
            # An alias of what was materialized meanwhile.
            with plain():
                args = (tensor_on(record.real, geometry_of(args[0])), *args[1:])
            return func(*args, **kwargs)
        asked = next((device for value in (*args, *kwargs.values()) if (device := _as_device(value)) is not None), None)
        if asked is None or func is torch.device or (record is None and args and isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        if asked.type == "meta":
            before, self._recorder.on_meta = self._recorder.on_meta, True
            try:
                return func(*args, **kwargs)
            finally:
                self._recorder.on_meta = before
        # Torch would ask the driver of a GPU before any operation is dispatched; and what is there already stays itself.
        stays = func is Tensor.to and record is not None and record.device == asked
        args, kwargs = map_leaves(
            lambda value: value if _as_device(value) is None else META if stays else CPU, (tuple(args), dict(kwargs))
        )
        return self._journal.on_device(asked, func, *args, **kwargs)

    def _as_real(self, leaf: Any) -> Any:
        """Numbers that torch would read without asking anybody."""
        return _concrete(self._journal, leaf, "torch.tensor") if isinstance(leaf, Tensor) and record_of(leaf) else leaf


def _as_device(value: Any) -> torch.device | None:
    """The device that an argument names, if it names one."""
    if isinstance(value, str) and value.partition(":")[0] in _DEVICE_NAMES:
        value = torch.device(value)
    if not isinstance(value, torch.device):
        return None
    return torch.device(value.type, 0) if value.type == "cuda" and value.index is None else value


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


def _cuda(journal: Journal, record: Record, tensor: Tensor, device: Any = None, *rest: Any, **options: Any) -> Any:
    index = device if isinstance(device, int) else torch.device(device or "cuda").index or 0
    wanted = torch.device("cuda", index)
    return tensor if record.device == wanted else journal.on_device(wanted, tensor.to, CPU)


def _cpu(journal: Journal, record: Record, tensor: Tensor, **options: Any) -> Any:
    return tensor if record.device == CPU else journal.on_device(CPU, tensor.to, CPU)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """Put a tensor on another's storage, whether or not they have memory."""
    with torch._C.DisableTorchFunction():
        moved = record_of(value)
        if moved is not None:
            moved.writes = None
        if (moved is None) == (record_of(tensor) is None):
            tensor.data = value
            return
    with plain():
        if swapped(tensor, value) is not tensor:
            raise UsageError(
                f"The data of a tensor {list(tensor.shape)} that something holds on to was replaced, while a module was built.",
                hint="Copy the values: tensor.data.copy_(values).",
            )


def _data_ptr(journal: Journal, record: Record, tensor: Tensor) -> int:
    """Whoever has an address reads and writes unseen: from here on the tensor has memory."""
    if record.device != CPU:
        return 0
    journal.tell_real("Tensor.data_ptr")
    with torch._C.DisableTorchFunction():
        return materialize(tensor).data_ptr()


def _tolist(journal: Journal, record: Record, tensor: Tensor) -> Any:
    return _concrete(journal, tensor, "Tensor.tolist").tolist()


def _repr(journal: Journal, record: Record, tensor: Tensor, **options: Any) -> str:
    return repr(_concrete(journal, tensor, "Tensor.__repr__"))


def _format(journal: Journal, record: Record, tensor: Tensor, spec: str) -> str:
    return format(_concrete(journal, tensor, "Tensor.__format__"), spec)


def _getitem(journal: Journal, record: Record, tensor: Tensor, index: Any) -> Tensor:
    return tensor[_as_index(index)]


def _setitem(journal: Journal, record: Record, tensor: Tensor, index: Any, value: Any) -> None:
    tensor[_as_index(index)] = value


def _as_index(index: Any) -> Any:
    """An index whose lists and arrays are tensors: torch would put them on the tensor's device, where values are lost."""
    if isinstance(index, tuple):
        return tuple(_as_index(item) for item in index)
    if isinstance(index, (list, range)) and any(isinstance(item, (slice, type(None), type(...))) for item in index):
        return index
    if isinstance(index, (list, range)) or hasattr(index, "__array_interface__"):
        return torch.as_tensor(index, dtype=torch.long if len(index) == 0 else None, device="cpu")
    return index


def _new_tensor(
    journal: Journal,
    record: Record,
    tensor: Tensor,
    data: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    requires_grad: bool = False,
    **options: Any,
) -> Tensor:
    return torch.tensor(data, dtype=dtype or tensor.dtype, device=device or record.device, requires_grad=requires_grad)


def _new(journal: Journal, record: Record, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    if len(args) == 1 and isinstance(args[0], (list, tuple)) and not isinstance(args[0], torch.Size):
        return torch.tensor(args[0], dtype=tensor.dtype, device=record.device)
    made: Tensor = tensor.new(*args, **options)
    return made


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


_DEVICE_NAMES = {"cpu", "cuda", "meta", "mps", "xpu"}
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.is_meta.__get__: _no,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _is_cpu,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _is_cuda,  # type: ignore[attr-defined]
    Tensor.device.__get__: _device,
    Tensor.cuda: _cuda,
    Tensor.cpu: _cpu,
    Tensor.get_device: _get_device,
    Tensor.data_ptr: _data_ptr,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    Tensor.__repr__: _repr,
    Tensor.__format__: _format,
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.new_tensor: _new_tensor,
    Tensor.new: _new,
    Tensor.__deepcopy__: _deepcopy,
}
