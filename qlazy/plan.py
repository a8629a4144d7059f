"""The plan: what goes where, in bytes, before anything is read. No torch here, so that a plan answers in a second.

A plan is made twice by the same code: from the headers alone (`qlazy plan`; kinds are told from names, and where in doubt the
answer is the larger one), and once more by `swap_layers` from the model itself, exactly, before any storage exists.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlazy.budget import Budget
from qlazy.demand import activation_bytes, kv_cache_bytes, text_config
from qlazy.errors import DoesNotFit, UsageError
from qlazy.formats import ITEMSIZE, Format, packed_nbytes
from qlazy.recipe import Kind, Recipe, guess_kind, make_recipe
from qlazy.sizes import format_bytes
from qlazy.source import Source

RUNTIME_BYTES = {"cpu": 128 << 20, "cuda": 640 << 20}
"""Memory that a process takes beside weights, cache and activations: allocator slack and library scratch; on CUDA its context
too.
"""

RING_BYTES = 64 << 20
"""Staging ring of a load, on the host."""

CHUNK_BYTES = 8 << 20
"""One slot of the ring: the unit in which files are read."""

STAGING_BYTES = {"cpu": RING_BYTES + (48 << 20), "cuda": 3 * CHUNK_BYTES}
"""Transient memory of a load: on the host the ring and the quantizers' work buffers, on a GPU three chunks."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor that a model holds, as the planner sees it."""

    name: str
    """Key in the checkpoint, or path in the model."""
    shape: tuple[int, ...]
    """Its shape; for `linear` (rows, columns) = (out_features, in_features)."""
    dtype: str
    """Dtype that it has in memory when it is not quantized."""
    kind: Kind
    """What it is to the recipe."""
    source_nbytes: int
    """Bytes that are read for it."""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What becomes of one tensor."""

    name: str
    """Key in the checkpoint, or path in the model."""
    shape: tuple[int, ...]
    """Shape before quantization."""
    format: Format | None
    """Low-bit format, or None where it keeps `dtype`."""
    dtype: str
    """Dtype in memory; of the scales where it is quantized."""
    reason: str
    """Why it is not quantized; empty where it is."""
    device: str
    """Where it lives."""
    nbytes: int
    """Bytes there, scales and zeros included."""
    source_nbytes: int
    """Bytes that are read for it."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The bytes of one device."""

    device: str
    """`cpu` or `cuda:N`."""
    free_bytes: int
    """Free now, or what `max_memory` allows, whichever is less."""
    quantized_bytes: int
    """Packed weights with scales and zeros."""
    unquantized_bytes: int
    """Weights and buffers in the model's dtype."""
    kv_cache_bytes: int
    """Keys and values of the layers that live here, for `max_model_len` tokens."""
    activation_bytes: int
    """Largest transient of a forward pass over that many tokens."""
    staging_bytes: int
    """Transient buffers of the load."""
    runtime_bytes: int
    """Allocator slack, library scratch and, on a GPU, the CUDA context."""
    reserve_bytes: int
    """Kept free for others, as asked."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and buffers."""
        return self.quantized_bytes + self.unquantized_bytes

    @property
    def total_bytes(self) -> int:
        """All that the model will take here; the reserve is not part of it."""
        transient = self.kv_cache_bytes + self.activation_bytes + self.staging_bytes + self.runtime_bytes
        return self.weight_bytes + transient

    @property
    def left_bytes(self) -> int:
        """Bytes that stay free beyond the reserve; negative where it does not fit."""
        return self.free_bytes - self.reserve_bytes - self.total_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every tensor becomes and where, with the bytes of every device."""

    model_id: str
    """What was asked for."""
    resolved: str
    """Hub id, folder or file that it stands for."""
    recipe: Recipe
    """What is quantized and how."""
    budget: Budget
    """The devices and their limits."""
    dtype: str
    """Dtype of everything that is not quantized."""
    tensors: tuple[TensorPlan, ...]
    """Every tensor, in the order of the source."""
    devices: tuple[DevicePlan, ...]
    """Every device that holds something, and the host."""
    exact: bool
    """True when made from the model itself, False when from the headers alone."""

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(device.left_bytes >= 0 for device in self.devices)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and buffers on all devices."""
        return sum(device.weight_bytes for device in self.devices)

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices, transients included."""
        return sum(device.total_bytes for device in self.devices)

    @property
    def source_bytes(self) -> int:
        """Bytes that a load reads."""
        return sum(tensor.source_nbytes for tensor in self.tensors)

    @property
    def device_map(self) -> dict[str, str]:
        """Device of every tensor, by name."""
        return {tensor.name: tensor.device for tensor in self.tensors}

    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales and zeros included; 0 where nothing is quantized."""
        chosen = [tensor for tensor in self.tensors if tensor.format is not None]
        return 8 * sum(t.nbytes for t in chosen) / max(1, sum(math.prod(t.shape) for t in chosen))


def make_plan(source: Source, recipe: Recipe, budget: Budget, *, dtype: str = "auto") -> Plan:
    """Plan a load from the headers alone.

    Args:
        source: An opened source; no weights are read.
        recipe: What to quantize and how.
        budget: Devices and their limits.
        dtype: `auto` (the config's, bfloat16 for float16 on a CPU), or a torch dtype name.
    Returns:
        The plan, which fits.
    Raises:
        DoesNotFit: a device is short; the error carries the numbers and what would fit.
        UsageError: a dtype that does not exist, or a device map that leaves a tensor out.
    """
    resolved = resolve_dtype(source, dtype, budget)
    plan = allocate(entries(source, resolved), source, recipe, budget, dtype=resolved, exact=False)
    require_fit(plan, source)
    return plan


def resolve_dtype(source: Source, dtype: str, budget: Budget) -> str:
    """The dtype of everything that is not quantized.

    Args:
        source: An opened source.
        dtype: `auto` or a torch dtype name.
        budget: The devices: a CPU has no fast float16, so that `auto` takes bfloat16 there.
    Returns:
        `float32`, `float16` or `bfloat16`.
    Raises:
        UsageError: any other name.
    """
    if dtype == "auto":
        stored = [t.dtype for t in source.tensors.values() if t.dtype in ITEMSIZE and "float" in t.dtype and len(t.shape) > 1]
        text = text_config(source.config)
        named = [c.get(key) for c in (source.config, text) for key in ("dtype", "torch_dtype")]
        dtype = next((str(n).removeprefix("torch.") for n in named if n), stored[0] if stored else "bfloat16")
        if dtype == "float16" and budget.devices == ("cpu",):
            dtype = "bfloat16"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UsageError(f"There is no model dtype {dtype!r}.", hint="Use --dtype auto, bfloat16, float16 or float32.")
    return dtype


def entries(source: Source, dtype: str) -> list[Entry]:
    """The tensors of a source as a model will hold them, as far as their names tell.

    Args:
        source: An opened source.
        dtype: Dtype of everything that is not quantized.
    Returns:
        One entry a tensor, in file order.
    """
    tensors = sorted(source.tensors.values(), key=lambda t: (str(t.path), t.offset))
    integers = ("int64", "int32", "int16", "int8", "uint8", "bool")
    return [
        Entry(
            name=t.name,
            shape=t.shape,
            dtype=t.dtype if t.dtype in integers else dtype,
            kind=guess_kind(t.name, t.shape),
            source_nbytes=t.nbytes,
        )
        for t in tensors
    ]


def allocate(
    tensors: Iterable[Entry], source: Source, recipe: Recipe, budget: Budget, *, dtype: str, exact: bool, extra_bytes: int = 0
) -> Plan:
    """Give every tensor a format and a device and add up the bytes, whether or not they fit.

    Args:
        tensors: What the model holds.
        source: Where it comes from, for its config.
        recipe: What to quantize and how.
        budget: Devices and their limits.
        dtype: Dtype of everything that is not quantized.
        exact: Whether `tensors` come from the model itself.
        extra_bytes: Host memory that the load needs beside the ring, for tensors that must be converted as a whole.
    Returns:
        The plan.
    Raises:
        UsageError: a device map that leaves a tensor out.
    """
    tensors = list(tensors)
    first = budget.devices[0]
    sized = [_plan_tensor(entry, recipe, dtype, first) for entry in tensors]
    kv_bytes = kv_cache_bytes(source.config, budget.max_model_len, dtype)
    active = activation_bytes(source.config, budget.max_model_len, dtype)
    fixed = active + RUNTIME_BYTES[_kind(first)] + budget.reserve_bytes + STAGING_BYTES[_kind(first)]
    layers = max(1, len({block_of(t.name) for t in sized} - {""}))
    places = _assign(sized, budget, fixed, kv_bytes // layers)
    placed = tuple(
        t if t.device == places[t.name] else _plan_tensor(entry, recipe, dtype, places[t.name])
        for entry, t in zip(tensors, sized, strict=True)
    )
    devices = []
    for device in dict.fromkeys([*budget.devices, "cpu"]):
        here = [t for t in placed if t.device == device]
        share = len({block_of(t.name) for t in here} - {""}) / layers
        holds = bool(here)
        host_staging = STAGING_BYTES["cpu"] + extra_bytes
        devices.append(
            DevicePlan(
                device=device,
                free_bytes=budget.free_bytes[device],
                quantized_bytes=sum(t.nbytes for t in here if t.format is not None),
                unquantized_bytes=sum(t.nbytes for t in here if t.format is None),
                kv_cache_bytes=math.ceil(kv_bytes * share) if len(budget.devices) > 1 else kv_bytes * holds,
                activation_bytes=active if holds else 0,
                staging_bytes=host_staging if device == "cpu" else STAGING_BYTES["cuda"] * holds,
                runtime_bytes=RUNTIME_BYTES[_kind(device)] if holds or device == "cpu" else 0,
                reserve_bytes=budget.reserve_bytes if device in budget.devices else 0,
            )
        )
    return Plan(
        model_id=source.model_id,
        resolved=source.resolved,
        recipe=recipe,
        budget=budget,
        dtype=dtype,
        tensors=placed,
        devices=tuple(devices),
        exact=exact,
    )


def require_fit(plan: Plan, source: Source) -> None:
    """Raise where a plan does not fit.

    Args:
        plan: Any plan.
        source: Where it comes from, for what would fit.
    Raises:
        DoesNotFit: which device is short, by how much, and what would fit.
    """
    short = [device for device in plan.devices if device.left_bytes < 0]
    if not short:
        return
    needed, free = sum(d.total_bytes for d in short), sum(d.free_bytes - d.reserve_bytes for d in short)
    where = ", ".join(f"{d.device} is short by {format_bytes(-d.left_bytes)}" for d in short)
    raise DoesNotFit(
        f"{plan.model_id} in {plan.recipe.format.name} does not fit: it needs {format_bytes(needed)} where "
        f"{format_bytes(max(0, free))} are free after the reserve; {where}.",
        hint=_what_fits(plan, source),
        needed_bytes=needed,
        free_bytes=max(0, free),
    )


def block_of(name: str) -> str:
    """The repeated block that a tensor belongs to: its path up to the first number, or an empty string.

    Args:
        name: A tensor's path, e.g. `model.layers.3.mlp.up_proj.weight`.
    Returns:
        E.g. `model.layers.3`.
    """
    match = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return match.group() if match else ""


def _plan_tensor(entry: Entry, recipe: Recipe, dtype: str, device: str) -> TensorPlan:
    rows, columns = entry.shape if len(entry.shape) == 2 else (0, 0)
    fmt, reason = recipe.format_for(entry.kind, entry.name, rows, columns)
    if fmt is None:
        nbytes = math.prod(entry.shape) * ITEMSIZE.get(entry.dtype, 1)
    else:
        nbytes = packed_nbytes(fmt, rows, columns, dtype, device)
    return TensorPlan(
        name=entry.name,
        shape=entry.shape,
        format=fmt,
        dtype=entry.dtype,
        reason=reason,
        device=device,
        nbytes=nbytes,
        source_nbytes=entry.source_nbytes,
    )


def _assign(tensors: list[TensorPlan], budget: Budget, fixed_bytes: int, block_kv_bytes: int) -> dict[str, str]:
    """Device of every tensor: as the device map says, else blocks in order, each device filled before the next begins."""
    if budget.device_map is not None:
        return {t.name: _mapped(t.name, budget.device_map) for t in tensors}
    if len(budget.devices) == 1:
        return dict.fromkeys((t.name for t in tensors), budget.devices[0])
    units: dict[str, list[TensorPlan]] = {}
    for t in tensors:
        units.setdefault(block_of(t.name) or _outer_unit(t), []).append(t)
    order = sorted(units, key=_unit_order)
    places: dict[str, str] = {}
    at, room = 0, budget.free_bytes[budget.devices[0]] - fixed_bytes
    for unit in order:
        need = sum(t.nbytes for t in units[unit]) + block_kv_bytes * (not unit.startswith("\0"))
        while need > room and at + 1 < len(budget.devices):
            at += 1
            room = budget.free_bytes[budget.devices[at]] - fixed_bytes
        room -= need
        places.update((t.name, budget.devices[at]) for t in units[unit])
    return places


def _outer_unit(tensor: TensorPlan) -> str:
    """A tensor outside the blocks goes before them if it is an embedding, after them if it is a norm or head."""
    return "\0first" if tensor.reason == "embedding" else "\0last"


def _unit_order(unit: str) -> tuple[int, list[int | str]]:
    rank = {"\0first": 0, "\0last": 2}.get(unit, 1)
    return rank, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", unit)]


def _mapped(name: str, device_map: Mapping[str, str]) -> str:
    """The device of the longest prefix of `name` in a device map."""
    prefixes = [p for p in device_map if p == "" or name == p or name.startswith(p + ".")]
    if not prefixes:
        raise UsageError(f"The device map has no entry for {name!r}.", hint='Add "" as an entry for everything else.')
    return device_map[max(prefixes, key=len)]


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def _what_fits(plan: Plan, source: Source) -> str:
    """The smallest change that makes the plan fit, tried in turn; no weights are read for it."""
    smaller = dataclasses.replace(make_recipe(bits=4), modules_to_not_convert=plan.recipe.modules_to_not_convert)
    tries: list[tuple[str, Recipe, Budget]] = []
    for length in (8192, 4096, 2048, 1024):
        if length < plan.budget.max_model_len:
            tries.append((f"--max-model-len {length}", plan.recipe, dataclasses.replace(plan.budget, max_model_len=length)))
    if plan.recipe.format.bits == 8:
        tries.append(("--bits 4", smaller, plan.budget))
        tries.append(("--bits 4 --max-model-len 1024", smaller, dataclasses.replace(plan.budget, max_model_len=1024)))
    for words, recipe, budget in tries:
        other = allocate(entries(source, plan.dtype), source, recipe, budget, dtype=plan.dtype, exact=False)
        if other.fits:
            return f"This would fit: {words}."
    return (
        f"Nothing smaller fits here; use a machine or --max-memory with {format_bytes(plan.total_bytes)}, or a smaller model."
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: bytes are ints, `schema` is the version of this layout.

    Args:
        plan: Any plan.
    Returns:
        A JSON-ready dict.
    """
    return {
        "schema": 1,
        "model_id": plan.model_id,
        "resolved": plan.resolved,
        "format": plan.recipe.format.name,
        "dtype": plan.dtype,
        "max_model_len": plan.budget.max_model_len,
        "exact": plan.exact,
        "fits": plan.fits,
        "source_bytes": plan.source_bytes,
        "weight_bytes": plan.weight_bytes,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight(), 4),
        "devices": [
            dataclasses.asdict(d) | {"weight_bytes": d.weight_bytes, "total_bytes": d.total_bytes, "left_bytes": d.left_bytes}
            for d in plan.devices
        ],
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "format": t.format.name if t.format else None,
                "dtype": t.dtype,
                "reason": t.reason,
                "device": t.device,
                "nbytes": t.nbytes,
                "source_nbytes": t.source_nbytes,
            }
            for t in plan.tensors
        ],
    }
