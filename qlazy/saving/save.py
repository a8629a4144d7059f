"""The story of a save: a source is quantized and written shard by shard, and the model is never there as a whole.

1. open, plan, build, match, swap   as a load does, with no storage and no limit: nothing is run
2. shards                           tensors in file order, up to half a gibibyte of what is written
3. stream, place, write             one shard's storage at a time; a shard that is on the disk already is passed over
4. companions, index, manifest      tokenizer and the like; hashes of all files
5. config.json, rename              now it is a model
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy import __version__
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint
from qlazy.layers.quant_linear import NonFiniteError, require_finite
from qlazy.match import match_tensors
from qlazy.matching.fill import Fill, row_count
from qlazy.memory import anonymous_bytes, trim_heap
from qlazy.place import Placer
from qlazy.placeholder import build_placeholder
from qlazy.planning.budget import Budget
from qlazy.planning.plan import Plan, make_plan, resolve_dtype
from qlazy.planning.recipe import Recipe
from qlazy.reading.chunks import CACHED_BYTES, Chunk, worker_count
from qlazy.report import Progress
from qlazy.saving.companions import companions, config_json, gguf_companions
from qlazy.saving.fingerprint import content_key, fingerprint, weight_files
from qlazy.saving.folder import PartialFolder, writing
from qlazy.saving.layout_config import Layout
from qlazy.saving.layouts import default_layout
from qlazy.saving.outputs import by_stack, output_tensors, stored
from qlazy.saving.pieces import Output, Piece, cut_shards, describe, make_pieces, require_layout_fits
from qlazy.saving.saved import SaveReport, already_saved
from qlazy.saving.shards import index_json, shard_names, shard_pieces
from qlazy.sources.safetensors import read_header
from qlazy.sources.source import Source
from qlazy.stream import Stream
from qlazy.swap import swap_layers

SHARD_BYTES = 512 << 20
"""Bytes of a shard, unless one tensor has more: what a save holds beside its ring."""

UNLIMITED = Budget(devices=("cpu",), free_bytes={"cpu": 1 << 60}, reserve_bytes=0, max_model_len=1)
"""The budget of a save: what is written need not fit anywhere."""


def save(
    source: Source,
    recipe: Recipe,
    folder: str | Path,
    *,
    layout: Layout | None = None,
    dtype: str = "auto",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
    drop_page_cache: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> SaveReport:
    """Quantize an opened source into a folder. `qlazy.save_quantized` is this with the options spelled out.

    Args:
        source: An opened local source.
        recipe: What to quantize and how.
        folder: The folder to make.
        layout: Whose layout the folder has; by default what the recipe's format says.
        dtype: `auto` or a torch dtype name, for what is not quantized.
        force: Replace a folder that holds something.
        shard_bytes: Bytes of a shard.
        trust_remote_code: Run Python code from the model's folder.
        drop_page_cache: Give the file pages that reading brings in back to the kernel.
        on_progress: Called a few times a second.
    Returns:
        What was written.
    Raises:
        UsageError: the folder holds something else, or the layout cannot hold the recipe's formats.
        OutOfSpace: the disk is full; what is complete stays for the next attempt.
        CorruptCheckpoint: a damaged file, by name of file and tensor.

    Memory: one shard, or the largest tensor where that is more, and the ring of a load.
    """
    began = time.perf_counter()
    layout = layout or default_layout(recipe.format)
    # No rule for this machine's processor: where the folder will be used is not known.
    dtype = resolve_dtype(source, dtype, dataclasses.replace(UNLIMITED, devices=("cuda:0",)))
    key = content_key(source, recipe, layout=layout, dtype=dtype, shard_bytes=shard_bytes)
    done = already_saved(folder, key)
    if done is not None:
        return done
    sources = [*weight_files(source), *([source.folder] if source.folder is not None else [])]
    with writing(folder, key, force=force, sources=sources) as partial, torch.no_grad():
        plan = make_plan(source, recipe, UNLIMITED, dtype=dtype)
        model = build_placeholder(source, getattr(torch, plan.dtype), trust_remote_code=trust_remote_code)
        match = match_tensors(model, source)
        plan = swap_layers(model, plan, match, source)
        pieces = make_pieces(model, plan, match, source)
        require_layout_fits(pieces, layout)
        shards = list(cut_shards(pieces, shard_bytes))
        names = shard_names(len(shards))
        resumed = len(partial.done.keys() & set(names))
        total, before = sum(fill.nbytes for fill in match.fills), 0

        def reading(done: int) -> None:
            if on_progress is not None:
                host = anonymous_bytes()
                on_progress(Progress(stage="read", done_bytes=before + done, total_bytes=total, host_bytes=host))

        for name, shard in zip(names, shards, strict=True):
            if name not in partial.done:
                tensors = _filled(model, plan, shard, layout, drop_page_cache, reading)
                partial.write(name, shard_pieces(stored(tensors), {"format": "pt"}))
                tensors.clear()
                _empty(model, shard)
                trim_heap()
            before += sum(fill.nbytes for piece in shard for fill in piece.fills)
        nbytes = write_index(partial, names)
        beside = gguf_companions(source, model) if source.gguf_file else companions(source.folder or Path())
        for name, content in beside:
            partial.write(name, [content], journal=False)
        said = describe(layout, model, pieces)
        config = source.config
        if source.gguf_file:
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
            config.pop("_name_or_path", None)
        partial.commit(
            make_manifest(layout, plan, model_id=source.resolved, revision=source.revision, files=fingerprint(source)),
            config_json(config, said, plan.dtype),
        )
    return SaveReport(
        folder=partial.folder,
        layout=layout,
        nbytes=nbytes,
        shards=len(shards),
        shards_resumed=resumed,
        seconds=time.perf_counter() - began,
    )


def write_index(partial: PartialFolder, names: Sequence[str]) -> int:
    """Write the index of several shards, from what the files themselves say.

    Args:
        partial: The folder in the making, its shards complete.
        names: Of the shards.
    Returns:
        Bytes of all tensors.

    Memory: the headers.
    """
    headers = {name: read_header(partial.path / name) for name in names}
    nbytes = sum(info.nbytes for header in headers.values() for info in header.values())
    assert len({key for header in headers.values() for key in header}) == sum(map(len, headers.values()))
    if len(names) > 1:
        partial.write("model.safetensors.index.json", [index_json(headers, nbytes)], journal=False)
    return nbytes


def make_manifest(layout: Layout, plan: Plan, **source: Any) -> dict[str, Any]:
    """What a manifest says beside the key and the files.

    Args:
        layout: Whose layout.
        plan: What the folder holds.
        **source: Where that comes from.
    Returns:
        Data for JSON.
    """
    return {
        "schema": 1,
        "made_by": f"qlazy {__version__}",
        "source": source,
        "recipe": repr(plan.recipe),
        "layout": layout,
        "dtype": plan.dtype,
    }


def _filled(
    model: PreTrainedModel,
    plan: Plan,
    shard: Sequence[Piece],
    layout: Layout,
    drop_page_cache: bool,
    reading: Callable[[int], None],
) -> dict[str, Tensor]:
    """Read and quantize one shard; gives what is to be written."""
    outputs = [output for piece in shard for output in piece.outputs]
    names = {output.name for output in outputs}
    placer = Placer(model, dataclasses.replace(plan, tensors=tuple(t for t in plan.tensors if t.name in names)))
    passed = _Passed([output for output in outputs if not output.name])

    def place(chunk: Chunk, tensors: list[Tensor]) -> None:
        (passed if chunk.fill.targets[0] in passed.tensors else placer).place(chunk, tensors)

    fills = tuple(sorted((fill for piece in shard for fill in piece.fills), key=_file_order))
    with Stream(fills, place, worker_count(fills), drop_page_cache, None, CACHED_BYTES) as stream:
        for done in stream:
            reading(done)
    made: list[dict[str, Tensor]] = []
    for output in outputs:
        left = placer.rows_left(output.name) if output.name else passed.rows_left(output.key)
        if left:
            raise IncompleteCheckpoint(f"{plan.model_id}: {left} rows of {output.key!r} were never filled.")
        if output.name:
            made.append(output_tensors(layout, output, model.get_submodule(output.name.rpartition(".")[0])))
        else:
            made.append({output.key: passed.tensors[output.key]})
    tensors = [item for piece in by_stack(outputs, made) for item in piece]
    assert len(dict(tensors)) == len(tensors), "two tensors of one name"
    return dict(tensors)


def _file_order(fill: Fill) -> tuple[str, int]:
    return str(fill.sources[0].path), fill.sources[0].offset


class _Passed:
    """Stored tensors that go from file to file, cast to the dtype of the model."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.tensors = {output.key: torch.empty(output.shape, dtype=getattr(torch, output.dtype)) for output in outputs}
        self._rows = {output.key: row_count(output.shape) for output in outputs}

    def place(self, chunk: Chunk, tensors: list[Tensor]) -> None:
        info, values = chunk.fill.sources[0], tensors[0]
        whole = self.tensors[info.name]
        rows = whole.view(-1, whole.shape[-1]) if whole.dim() > 1 else whole.reshape(-1)
        try:
            if values.is_floating_point():
                require_finite(values)
        except NonFiniteError:
            raise CorruptCheckpoint(
                f"{info.path.name}: tensor {info.name!r} holds a NaN or an infinity in rows {chunk.start} to {chunk.stop}.",
                hint="The file is damaged; download it again, e.g. with `hf download --force-download`.",
            ) from None
        rows[chunk.start : chunk.stop].copy_(values.reshape(rows[chunk.start : chunk.stop].shape))
        self._rows[info.name] -= chunk.stop - chunk.start

    def rows_left(self, key: str) -> int:
        return self._rows[key]


def _empty(model: nn.Module, shard: Sequence[Piece]) -> None:
    """Take the storage of what has been written away."""
    for name in {output.name for piece in shard for output in piece.outputs if output.name}:
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        packed = owner._modules.get(leaf, owner)
        keys = list(packed.storage) if hasattr(packed, "storage") else [leaf]
        for key in keys:
            held = getattr(packed, key)
            empty = torch.empty_like(held, device="meta")
            setattr(packed, key, nn.Parameter(empty, requires_grad=False) if isinstance(held, nn.Parameter) else empty)
