"""The budget: which devices a load may use, and how much of each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlazy import memory
from qlazy.errors import DeviceUnavailable, UsageError
from qlazy.sizes import parse_bytes

DEFAULT_RESERVE = 1 << 30
"""Bytes kept free on every GPU unless asked otherwise; on the host a quarter of that, as the desktop already counts as used."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Devices of a load and their limits."""

    devices: tuple[str, ...]
    """Devices that may hold weights, in the order in which they are filled."""
    free_bytes: Mapping[str, int]
    """Bytes that may be used, by device; the host is always there, for staging."""
    reserve_bytes: int
    """Bytes to keep free on each device that holds weights."""
    max_model_len: int
    """Tokens that the KV cache and activations are planned for."""
    device_map: Mapping[str, str] | None = None
    """Device by prefix of the name, where the user says it all."""


UNLIMITED = Budget(devices=("cpu",), free_bytes={"cpu": 1 << 60}, reserve_bytes=0, max_model_len=1)
"""The budget of a save: what is written need not fit anywhere."""


def make_budget(
    device_map: str | Mapping[str, str] = "auto",
    max_memory: Mapping[str | int, str | int] | None = None,
    *,
    reserve: str | int | None = None,
    max_model_len: int = 4096,
) -> Budget:
    """Look at the machine and settle what a load may use.

    Args:
        device_map: `auto` (all GPUs, or the CPU where there is none), `cpu`, `cuda`, `cuda:N`, or a map from module prefix to
            device.
        max_memory: Bytes or sizes such as `22GiB` by device; a number N stands for `cuda:N`. Devices not named are not used.
        reserve: Bytes or size to keep free on each device; default 1 GiB on a GPU and 256 MiB on the host.
        max_model_len: Tokens that the KV cache and activations are planned for.
    Returns:
        The budget.
    Raises:
        DeviceUnavailable: a device that this machine does not have.
        UsageError: a size without a unit or below zero, a context that is not positive, or an empty device map.
    """
    if max_model_len < 1:
        raise UsageError(f"max_model_len is {max_model_len}; it must be at least 1.", hint="Use --max-model-len 4096.")
    limits = {_device(key): _size(f"max_memory[{key!r}]", value) for key, value in (max_memory or {}).items()}
    names = _devices(device_map, tuple(limits))
    if limits and isinstance(device_map, str) and device_map in ("auto", "cuda"):
        names = tuple(name for name in names if name in limits) or tuple(limits)
    # Also those that are only limited: a limit for a device that is not there is a mistake worth hearing of.
    free = {name: memory.free_bytes(name) for name in dict.fromkeys([*names, *limits, "cpu"])}
    free = {name: min(nbytes, limits.get(name, nbytes)) for name, nbytes in free.items()}
    if reserve is None:
        reserve_bytes = DEFAULT_RESERVE // 4 if names == ("cpu",) else DEFAULT_RESERVE
    else:
        reserve_bytes = _size("reserve", reserve)
    placed = None if isinstance(device_map, str) else {prefix: _device(d) for prefix, d in device_map.items()}
    return Budget(devices=names, free_bytes=free, reserve_bytes=reserve_bytes, max_model_len=max_model_len, device_map=placed)


def _devices(device_map: str | Mapping[str, str], limited: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(device_map, str):
        if not device_map:
            raise UsageError("The device map is empty.", hint='Use {"": "cuda:0"}, or "auto".')
        return tuple(dict.fromkeys(_device(d) for d in device_map.values()))
    if device_map == "auto":
        return tuple(memory.cuda_devices()) or ("cpu",)
    if device_map == "cuda":
        gpus = tuple(memory.cuda_devices())
        if not gpus:
            raise DeviceUnavailable("There is no CUDA device on this machine.", hint="Use --device-map cpu.")
        return gpus
    return (_device(device_map),)


def _size(what: str, value: str | int) -> int:
    nbytes = value if isinstance(value, int) else parse_bytes(value)
    if nbytes < 0:
        raise UsageError(f"{what} is {nbytes}; it cannot be negative.", hint="Write a size such as 2GiB.")
    return nbytes


def _device(name: str | int) -> str:
    """The name as torch writes it: 0 and `0` are `cuda:0`."""
    text = str(name)
    if text.isdigit():
        return f"cuda:{text}"
    if text == "cuda":
        return "cuda:0"
    if text == "cpu" or (text.startswith("cuda:") and text[5:].isdigit()):
        return text
    raise DeviceUnavailable(f"{text!r} is not a device that qlazy knows.", hint="Use cpu, cuda, cuda:0, cuda:1, ...")
