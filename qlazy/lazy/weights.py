"""Fill a lazily built module from stored tensors; what none of them holds gets eager construction's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.lazy.log import record_of
from qlazy.lazy.materialize import materialize, swapped
from qlazy.lazy.replay import plain
from qlazy.lazy.scan import Place, places


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the stored tensors, and what they did not hold."""

    loaded: tuple[str, ...]
    """Tensors of the module that were filled."""
    initialized: tuple[str, ...]
    """Parameters and saved buffers that were in no file and have eager construction's values."""
    unexpected: tuple[str, ...]
    """Stored tensors that the module has no place for."""


def load_weights(
    module: nn.Module,
    stored: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
) -> Loaded:
    """Give a lazily built module stored values, and materialize the rest.

    A stored tensor takes the place of what was recorded, which is never worked out. Buffers that are not saved, and plain
    tensor attributes, get eager construction's values. Of tied parameters one name is enough.

    Args:
        module: Built under `lazy_build`.
        stored: Tensors by the names of `state_dict`; each is looked up once, so a mapping may read when it is asked.
        device: Where to; None takes the devices that were asked for while building.
        strict: Whether a parameter or saved buffer that is not stored, and a stored tensor without a place, are errors.
    Returns:
        What was filled, what was initialized instead, and what was left over.
    Raises:
        IncompleteCheckpoint: `strict`, and a tensor is not stored.
        CorruptCheckpoint: a stored tensor has another shape; or `strict`, and it has no place in the module.

    Memory: the module, plus one tensor.
    """
    with plain():
        saved = {name: tensor for name, tensor in _state(module).items() if tensor.is_meta}
        filled = {id(tensor) for name, tensor in saved.items() if name in stored}
        missing = [name for name, tensor in saved.items() if id(tensor) not in filled]
        unexpected = [name for name in stored if name not in _state(module)]
        if strict and missing:
            raise IncompleteCheckpoint(
                f"{type(module).__name__}: {len(missing)} of {len(saved)} tensors are not stored: {', '.join(missing[:3])}.",
                hint="Pass strict=False to give them the values that building the model would.",
            )
        if strict and unexpected:
            raise CorruptCheckpoint(
                f"{type(module).__name__} has no place for {len(unexpected)} stored tensors: {', '.join(unexpected[:3])}.",
                hint="Pass strict=False to leave them out.",
            )
        done: set[int] = set()
        by_storage: dict[int, list[Place]] = {}
        for place in places([module]):
            if record_of(place.tensor) is not None:
                by_storage.setdefault(place.tensor.untyped_storage()._cdata, []).append(place)
        for name, tensor in saved.items():
            if name in stored and id(tensor) not in done:
                done.add(id(tensor))
                _fill(name, tensor, stored[name], by_storage.get(tensor.untyped_storage()._cdata, []), device)
        materialize(module, device=device)
        return Loaded(
            loaded=tuple(name for name in saved if name in stored), initialized=tuple(missing), unexpected=tuple(unexpected)
        )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` holds, as the tensors themselves, every name of tied ones."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, inner in module.named_modules(remove_duplicate=False):
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _fill(name: str, tensor: Tensor, value: Tensor, held: list[Place], device: torch.device | str | None) -> None:
    """Give one tensor its stored values, in the layout that the module built."""
    if value.shape != tensor.shape:
        raise CorruptCheckpoint(
            f"{name} is stored as {list(value.shape)}, but the module has {list(tensor.shape)} for it.",
            hint="The stored tensors belong to another model.",
        )
    if any(place.tensor is not tensor for place in held):
        # Others look at the same memory, some perhaps at parts that are not stored.
        materialize(tensor, device=device).copy_(value)
        return
    real = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device or "cpu").copy_(value)
    result = swapped(tensor, real)
    if result is not tensor:
        for place in held:
            place.rebind(result)
