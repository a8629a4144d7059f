"""The plan: what goes where, in bytes, before anything is read. No torch here, so that a plan answers in a second.

A plan is made twice by the same code: from the headers alone (`qlazy plan`; kinds are told from names, and where in doubt the
answer is the larger one), and once more by `swap_layers` from the model itself, exactly, before any storage exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from qlazy.errors import DoesNotFit
from qlazy.formats import Int4
from qlazy.planning.aim import aim
from qlazy.planning.budget import Budget
from qlazy.planning.data import DevicePlan, Entry, Plan, TensorPlan, to_json
from qlazy.planning.demand import activation_bytes, layer_kv_bytes
from qlazy.planning.devices import assign, block_of, kv_by_block
from qlazy.planning.entries import conversion_bytes, entries, resolve_dtype
from qlazy.planning.recipe import Recipe, make_recipe
from qlazy.sizes import format_bytes
from qlazy.sources.source import Source

__all__ = [
    "CHUNK_BYTES",
    "GPU_CHUNK_BYTES",
    "GPU_RING_BYTES",
    "RING_BYTES",
    "RUNTIME_BYTES",
    "SCRATCH_CHUNKS",
    "STAGING_BYTES",
    "Entry",
    "Plan",
    "TensorPlan",
    "allocate",
    "block_of",
    "entries",
    "make_plan",
    "require_fit",
    "resolve_dtype",
    "to_json",
]

RUNTIME_BYTES = {"cpu": 128 << 20, "cuda": 640 << 20}
"""Memory that a process takes beside weights, cache and activations: allocator slack and library scratch; on CUDA its context
too.
"""

RING_BYTES = 64 << 20
"""Staging ring of a load to the host."""

CHUNK_BYTES = 8 << 20
"""One slot of the ring at most: the unit in which files are read."""

GPU_RING_BYTES = 128 << 20
"""Staging ring of a load to GPUs, on the host."""

GPU_CHUNK_BYTES = 16 << 20
"""One slot of it, and one scratch chunk: larger than for the host, as a GPU copies it in less than a millisecond."""

SCRATCH_CHUNKS = 3
"""Chunks on a GPU: one that is copied to, one that is quantized, and one to spare, so that neither waits for the other."""

STAGING_BYTES = {"cpu": RING_BYTES + (48 << 20), "cuda": SCRATCH_CHUNKS * GPU_CHUNK_BYTES}
"""Transient memory of a load: on the host the ring and the quantizers' work buffers, on a GPU the scratch chunks."""

GGUF_BYTES = 128 << 20
"""Host memory that transformers leaves in scattered small objects when it makes a tokenizer of a GGUF file."""


def make_plan(source: Source, recipe: Recipe, budget: Budget, *, dtype: str = "auto", patient: bool = False) -> Plan:
    """Plan a load from the headers alone.

    Args:
        source: An opened source; no weights are read.
        recipe: What to quantize and how.
        budget: Devices and their limits.
        dtype: `auto` (the config's, bfloat16 for float16 on a CPU), or a torch dtype name.
        patient: As in `allocate`.
    Returns:
        The plan, which fits.
    Raises:
        DoesNotFit: a device is short; the error carries the numbers and what would fit.
        UnsupportedModel: the weights are quantized already.
        UsageError: a dtype that does not exist.

    Memory: names and shapes.
    """
    resolved = resolve_dtype(source, dtype, budget)
    plan = allocate(entries(source, resolved), source, recipe, budget, dtype=resolved, exact=False, patient=patient)
    require_fit(plan, source)
    return plan


def allocate(
    tensors: Iterable[Entry],
    source: Source,
    recipe: Recipe,
    budget: Budget,
    *,
    dtype: str,
    exact: bool,
    extra_bytes: int | None = None,
    patient: bool = False,
) -> Plan:
    """Give every tensor a format and a device and add up the bytes, whether or not they fit.

    Args:
        tensors: What the model holds.
        source: Where it comes from, for its config.
        recipe: What to quantize and how.
        budget: Devices and their limits.
        dtype: Dtype of everything that is not quantized.
        exact: Whether `tensors` come from the model itself.
        extra_bytes: Host memory that the load needs beside the ring, for tensors that must be converted as a whole; by default
            what the headers tell of it.
        patient: Take the smallest formats where a target is smaller, unless `exact`: names may tell of more weights than the
            model has, such as those of layers that only draft.
    Returns:
        The plan; its recipe names the formats that were chosen for a target.
    Raises:
        DoesNotFit: no formats are small enough for the recipe's target.
        UsageError: a device map that leaves a tensor out.
    """
    tensors = list(tensors)
    recipe = aim(tensors, recipe, dtype, exact=exact, patient=patient and not exact)
    blocks = sorted({block_of(t.name) for t in tensors} - {""})
    kv = kv_by_block(blocks, layer_kv_bytes(source.config, budget.max_model_len, dtype))
    active = activation_bytes(source.config, budget.max_model_len, dtype)
    extra_bytes = conversion_bytes(source) if extra_bytes is None else extra_bytes
    staging = dict.fromkeys(budget.devices, STAGING_BYTES["cuda"]) | {"cpu": _host_staging(source, budget) + extra_bytes}
    fixed = {device: nbytes + RUNTIME_BYTES[_kind(device)] for device, nbytes in staging.items()}
    places = assign(
        tensors,
        budget,
        nbytes=lambda entry, device: _plan_tensor(entry, recipe, dtype, device).nbytes,
        room={d: budget.free_bytes[d] - budget.reserve_bytes - active - fixed[d] for d in budget.devices},
        block_kv_bytes=kv,
        exact=exact,
    )
    placed = tuple(_plan_tensor(entry, recipe, dtype, places[entry.name]) for entry in tensors)
    kv_places = {block_of(t.name): t.device for t in placed}
    devices = []
    for device in dict.fromkeys([*budget.devices, "cpu"]):
        here = [t for t in placed if t.device == device]
        if not here and device != "cpu":
            continue
        devices.append(
            DevicePlan(
                device=device,
                free_bytes=budget.free_bytes[device],
                quantized_bytes=sum(t.nbytes for t in here if t.format is not None),
                unquantized_bytes=sum(t.nbytes for t in here if t.format is None),
                kv_cache_bytes=sum(nbytes for block, nbytes in kv.items() if kv_places.get(block) == device),
                activation_bytes=active if here else 0,
                staging_bytes=staging[device],
                runtime_bytes=RUNTIME_BYTES[_kind(device)],
                reserve_bytes=budget.reserve_bytes if here else 0,
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
    needed, free, reserve = (sum(getattr(d, key) for d in short) for key in ("total_bytes", "free_bytes", "reserve_bytes"))
    where = ", ".join(f"{d.device} is short by {format_bytes(-d.left_bytes, round_up=True)}" for d in short)
    asked = f"in {plan.recipe.name}" if plan.recipe.target is None else f"for a {plan.recipe.name}"
    raise DoesNotFit(
        f"{plan.model_id} {asked} does not fit: it needs {format_bytes(needed)}, and "
        f"{format_bytes(reserve)} kept free, where {format_bytes(free)} may be used; {where}.",
        hint=_what_fits(plan, source),
        needed_bytes=needed,
        free_bytes=max(0, free - reserve),
    )


def _plan_tensor(entry: Entry, recipe: Recipe, dtype: str, device: str) -> TensorPlan:
    fmt, reason = recipe.format_for(entry.kind, entry.name, *entry.matrix)
    return TensorPlan(
        name=entry.name,
        shape=entry.shape,
        kind=entry.kind,
        format=fmt,
        dtype=entry.dtype,
        reason=reason,
        device=device,
        nbytes=entry.stored_bytes(fmt, dtype),
        source_nbytes=entry.source_nbytes,
    )


def _host_staging(source: Source, budget: Budget) -> int:
    """Transient host memory of a load that converts nothing."""
    larger_ring = GPU_RING_BYTES - RING_BYTES if budget.devices != ("cpu",) else 0
    return STAGING_BYTES["cpu"] + larger_ring + (GGUF_BYTES if source.kind == "gguf" else 0)


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def _what_fits(plan: Plan, source: Source) -> str:
    """The smallest change that makes the plan fit, tried in turn; no weights are read for it."""
    held = [Entry(name=t.name, shape=t.shape, dtype=t.dtype, kind=t.kind, source_nbytes=t.source_nbytes) for t in plan.tensors]
    extra = next(d.staging_bytes for d in plan.devices if d.device == "cpu") - _host_staging(source, plan.budget)

    def again(recipe: Recipe, budget: Budget) -> Plan:
        return allocate(held, source, recipe, budget, dtype=plan.dtype, exact=plan.exact, extra_bytes=extra, patient=True)

    recipes = [("", plan.recipe)]
    if plan.recipe.format.bits == 8:
        recipes.append(("--bits 4", dataclasses.replace(plan.recipe, format=make_recipe(bits=4).format)))
    elif plan.recipe.target is None and isinstance(plan.recipe.format, Int4) and plan.recipe.format.group_size in (32, 64):
        coarse = dataclasses.replace(plan.recipe.format, group_size=128)
        recipes.append(("--group-size 128", dataclasses.replace(plan.recipe, format=coarse)))
    lengths = [plan.budget.max_model_len, *(n for n in (8192, 4096, 2048, 1024) if n < plan.budget.max_model_len)]
    for words, recipe in recipes:
        for length in lengths:
            if again(recipe, dataclasses.replace(plan.budget, max_model_len=length)).fits:
                context = f"--max-model-len {length}" if length < plan.budget.max_model_len else ""
                return f"This would fit: {' '.join(filter(None, [words, context]))}."
    first = plan.budget.devices[0]
    alone = again(plan.recipe, dataclasses.replace(plan.budget, devices=(first,), device_map=None))
    needs = [f"{format_bytes(d.total_bytes + d.reserve_bytes, round_up=True)} free on {d.device}" for d in alone.devices]
    tried, smaller = ("context or coarser format fits", "model") if plan.recipe.target is None else ("context fits", "target")
    return f"No shorter {tried} here. It takes {' and '.join(needs)}, or a smaller {smaller}."
