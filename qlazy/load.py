"""The story of a load, in the order in which it happens.

0. open_source        alias, hub id, folder or file -> config and tensor headers; no weights are read
1. make_plan          exact bytes for each device, or DoesNotFit
2. build_placeholder  the model class, its parameters without storage
3. match_tensors      which stored tensor becomes which of the model's; names, shapes and dtypes are checked
4. measured           for a target alone: some rows of every layer in every format, to tell what each would cost it
5. swap_layers        linear layers, experts, embeddings -> low bits, still without storage; the plan becomes exact
6. stream, place      a bounded ring: read in file order, quantize straight into final storage
7. finish             ties, what no file holds, and the proof that nothing is left without storage

What is packed already is mapped instead (`qlazy/reopening/reopen.py`), and random values are drawn instead of read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from qlazy import native
from qlazy.errors import UsageError
from qlazy.finish import finish
from qlazy.layers.storage import taken_ahead
from qlazy.match import match_tensors
from qlazy.memory import Meter
from qlazy.place import Placer
from qlazy.placeholder import build_placeholder, eager_values
from qlazy.planning.budget import Budget
from qlazy.planning.entries import resolve_dtype
from qlazy.planning.kept import keep
from qlazy.planning.plan import GPU_CHUNK_BYTES, GPU_RING_BYTES, RING_BYTES, Plan, make_plan
from qlazy.planning.recipe import Recipe
from qlazy.random_init import Drawn, build_reference, match_drawn, with_tensors
from qlazy.reading.chunks import CACHED_BYTES, host_chunk_bytes, worker_count
from qlazy.reading.staging import open_gpus
from qlazy.reopening.reopen import reopen
from qlazy.report import LoadReport, Progress
from qlazy.saving.cache import cached
from qlazy.saving.saved import verify as verify_folder
from qlazy.sensitivity import measured
from qlazy.sources.source import Source
from qlazy.stream import Stream
from qlazy.swap import swap_layers
from qlazy.trace import Clock, Trace


def load(
    source: Source,
    recipe: Recipe,
    budget: Budget,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    strict: bool = True,
    drop_page_cache: bool = True,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    trace: Trace | None = None,
    random_init: bool = False,
    verify: bool = False,
    cache: bool = False,
) -> PreTrainedModel:
    """Load an opened source. `qlazy.load_quantized` is this with the options spelled out, and documents them.

    Args:
        source: An opened local source.
        recipe: What to quantize and how.
        budget: Devices and their limits.
        dtype: `auto` or a torch dtype name, for what is not quantized.
        attn_implementation: As in transformers.
        strict: Whether missing and unexpected tensors are errors.
        drop_page_cache: Give the file pages that the load brings in back to the kernel.
        trust_remote_code: Run Python code from the model's folder.
        on_progress: Called a few times a second.
        trace: Takes stages, reads and placements, and the meter's samples; the caller writes it.
        random_init: Read no weights: the values are those that building the model gives.
        verify: Read a saved folder whole and compare it with the hashes in its manifest first.
        cache: Save what is quantized, and open that from the next time on.
    Returns:
        The model in evaluation mode, with its `LoadReport` as `qlazy_report`.
    Raises:
        DoesNotFit: before anything is read.
        CorruptCheckpoint: a damaged file, by name of file and tensor.
        UnsupportedModel: no such architecture.

    Memory: as `qlazy.load_quantized`.
    """
    if verify and source.folder is not None:
        verify_folder(source.folder)
    kept = None if random_init else keep(source, recipe)
    if trace is not None and not random_init and (kept is not None or cache):
        raise UsageError(
            "What is packed already is mapped: nothing is read or quantized that could be traced.",
            hint="Leave --trace (trace=) out, or --cache.",
        )
    if cache and kept is None and not random_init:
        resolved = resolve_dtype(source, dtype, budget)
        held = cached(
            source,
            recipe,
            dtype=resolved,
            trust_remote_code=trust_remote_code,
            drop_page_cache=drop_page_cache,
            on_progress=on_progress,
        )
        kept = keep(held) if held is not None else None
        source = held or source
    if kept is not None:
        return reopen(
            source,
            kept,
            budget,
            dtype=dtype,
            attn_implementation=attn_implementation,
            strict=strict,
            drop_page_cache=drop_page_cache,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
    clock = Clock(trace)
    with Meter() as meter:
        construct: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        reference = None
        if random_init:
            reference = build_reference(source, getattr(torch, resolve_dtype(source, dtype, budget)), **construct)
            source = with_tensors(source, reference)
        plan = make_plan(source, recipe, budget, dtype=dtype, patient=True)
        _require_one_kind(plan)
        if gpus := sorted({tensor.device for tensor in plan.tensors} - {"cpu"}):
            open_gpus(gpus)
            meter.restart()
        clock.lap("plan")
        # What a target makes of the layers is known only when they have been looked at.
        with taken_ahead(plan) if recipe.target is None else contextlib.nullcontext():
            model = build_placeholder(source, getattr(torch, plan.dtype), **construct)
            match = match_tensors(model, source, strict=strict) if reference is None else match_drawn(model, source, reference)
            if recipe.target is not None and reference is None:
                clock.lap("build")
                recipe = measured(model, recipe, plan.dtype, match, drop_page_cache=drop_page_cache, on_progress=on_progress)
                plan = dataclasses.replace(plan, recipe=recipe)
                clock.lap("measure")
            plan = swap_layers(model, plan, match, source)
            clock.lap("build")
            placer = Placer(model, plan)
        place = placer.place if trace is None else trace.placing(placer.place, plan)
        least_bytes, ring_bytes = (GPU_CHUNK_BYTES, GPU_RING_BYTES) if gpus else (CACHED_BYTES, RING_BYTES)
        workers = worker_count(match.fills, least_bytes, ring_bytes)
        chunk_bytes = least_bytes if gpus else host_chunk_bytes(workers, compiled=native.available())
        devices = plan.device_map if gpus else {}
        reading: Stream | Drawn = (
            Stream(match.fills, place, workers, drop_page_cache, trace, chunk_bytes, ring_bytes, devices)
            if reference is None
            else Drawn(reference, match.fills, place, chunk_bytes, ring_bytes)
        )
        with placer, reading as stream:
            meter.watch(lambda: stream.bytes_done)
            total = sum(fill.nbytes for fill in match.fills)
            for done in stream:
                if on_progress is not None:
                    on_progress(Progress(stage="read", done_bytes=done, total_bytes=total))
        placer.require_finite()
        clock.lap("stream")
        missing = eager_values(source, getattr(torch, plan.dtype), match.missing, **construct)
        model = finish(model, plan, match, placer, source, missing)
        clock.lap("finish")
    if trace is not None:
        trace.count("host memory", meter.started, meter.samples)
        trace.count("bytes read", meter.started, meter.watched)
    loaded: Any = model
    loaded.qlazy_report = LoadReport(
        plan=plan,
        seconds=clock.seconds,
        bytes_read=stream.bytes_done,
        device_bytes=_device_bytes(model),
        host_peak_bytes=meter.peak_bytes,
        device_peak_bytes={device: torch.cuda.max_memory_allocated(device) for device in gpus},
        unexpected=list(match.unexpected),
        initialized=list(match.missing),
        samples=meter.samples,
        read_samples=meter.watched,
        tensors_loaded=len({target for fill in match.fills for target in fill.targets}),
    )
    return model


def _require_one_kind(plan: Plan) -> None:
    """Refuse a model partly on the host and partly on GPUs: accelerate would carry the host's share to a GPU at every use."""
    used = {tensor.device for tensor in plan.tensors}
    if "cpu" in used and len(used) > 1:
        raise UsageError(
            f"{plan.model_id} would lie on {', '.join(sorted(used))}; a model runs on GPUs or on the CPU, not yet on both.",
            hint="Use --device-map cpu, or --device-map cuda.",
        )


def _device_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of weights and buffers by device, tied storage counted once."""
    storages = {
        (str(t.device), t.untyped_storage().data_ptr()): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    found: dict[str, int] = {}
    for (device, _), nbytes in storages.items():
        found[device] = found.get(device, 0) + nbytes
    return found
