"""The story of a save: a source is quantized and written shard by shard, and the model is never there as a whole.

1. open, plan, build, match, swap   as a load does, with no storage and no limit: nothing is run
2. shards                           tensors in file order, up to half a gibibyte of what is written
3. stream, place, write             one shard's storage at a time; a shard that is on the disk already is passed over
4. companions, index, manifest      tokenizer and the like; hashes of all files
5. config.json, rename              now it is a model
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qlazy.calibrating.blocks import find_decoder
from qlazy.calibrating.calibration import Calibration
from qlazy.calibrating.tokens import Text
from qlazy.calibrating.walk import Walk, require_walk
from qlazy.match import match_tensors
from qlazy.memory import trim_heap
from qlazy.place import empty
from qlazy.placeholder import build_placeholder
from qlazy.planning.aim import unlike
from qlazy.planning.budget import UNLIMITED
from qlazy.planning.entries import own_dtype
from qlazy.planning.plan import make_plan
from qlazy.planning.recipe import Recipe
from qlazy.report import Progress
from qlazy.saving.calibrated import CalibratedSave
from qlazy.saving.companions import companions, config_json, gguf_companions
from qlazy.saving.fill_shard import fill_shard
from qlazy.saving.fingerprint import content_key, fingerprint, weight_files
from qlazy.saving.folder import PartialFolder, require_replaceable, writing
from qlazy.saving.layout_config import Layout
from qlazy.saving.layouts import default_layout
from qlazy.saving.outputs import stored
from qlazy.saving.pieces import cut_shards, describe, make_pieces, require_layout_fits
from qlazy.saving.saved import SaveReport, already_saved, make_manifest
from qlazy.saving.shards import index_json, shard_pieces
from qlazy.sensitivity import measured
from qlazy.sources.safetensors import read_header
from qlazy.sources.source import Source
from qlazy.swap import swap_layers

SHARD_BYTES = 512 << 20
"""Bytes of a shard, unless one tensor has more: what a save holds beside its ring."""


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
    calibration: Calibration | None = None,
    text: Callable[[], Text] | None = None,
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
        calibration: Walk through the blocks of the model with a text, and round by what each layer takes in.
        text: Gives the tokens of that text, needed then; only asked for where no earlier attempt has.
    Returns:
        What was written.
    Raises:
        UsageError: the folder holds something else, the layout cannot hold the recipe's formats, or a text to calibrate on
            has longer sequences than the model takes.
        UnsupportedModel: a model that cannot be walked through block by block.
        OutOfSpace: the disk is full; what is complete stays for the next attempt.
        CorruptCheckpoint: a damaged file, by name of file and tensor.

    Memory: one shard, or the largest tensor where that is more, and the ring of a load; calibrated as `Walk` says beside that.
    """
    began = time.perf_counter()
    layout = layout or default_layout(recipe.format)
    dtype = own_dtype(source, dtype)  # where the folder will be used is not known
    told = {} if calibration is None else {"calibration": calibration.told()}
    key = content_key(source, recipe, layout=layout, dtype=dtype, shard_bytes=shard_bytes, **told)
    done = already_saved(folder, key)
    if done is not None:
        return done
    sources = [*weight_files(source), *([source.folder] if source.folder is not None else [])]
    require_replaceable(folder, force=force, sources=sources)
    with torch.no_grad():  # whatever is refused is refused before there is a folder
        plan = make_plan(source, recipe, UNLIMITED, dtype=dtype, patient=True)
        model = build_placeholder(source, getattr(torch, plan.dtype), trust_remote_code=trust_remote_code)
        match = match_tensors(model, source)
        recipe = measured(model, recipe, plan.dtype, match, drop_page_cache=drop_page_cache, on_progress=on_progress)
        plan = swap_layers(model, dataclasses.replace(plan, recipe=recipe), match, source)
        pieces = make_pieces(model, plan, match, source)
        require_layout_fits(pieces, layout)
        make_walk = functools.partial(
            Walk, model, plan, match, source, trust_remote_code=trust_remote_code, drop_page_cache=drop_page_cache
        )
        if calibration is not None:
            require_walk(model, plan, calibration.sequence_length, make_walk)
    with writing(folder, key, force=force, sources=sources) as partial, torch.no_grad():
        walk = None
        if calibration is not None:
            assert text is not None
            walk = CalibratedSave(partial, text, make_walk, find_decoder(model))
            pieces = walk.in_blocks(pieces)
        shards = cut_shards(pieces, shard_bytes)
        resumed = len(partial.done.keys() & shards.keys())
        total, before, most = sum(fill.nbytes for fill in match.fills), 0, 0

        def reading(done: int) -> None:
            nonlocal most
            most = max(most, before + done)  # what a walk leaves of a shard is read after it, and counted from 0
            if on_progress is not None:
                stage = "read" if walk is None else "calibrate"
                on_progress(Progress(stage=stage, done_bytes=most, total_bytes=total))

        for name, shard in shards.items():
            if name not in partial.done:
                filled = walk.fill(shard, reading) if walk is not None else set()
                tensors = fill_shard(model, plan, shard, layout, drop_page_cache, reading, filled)
                partial.write(name, shard_pieces(stored(tensors), {"format": "pt"}))
                tensors.clear()
                empty(model, {output.name for piece in shard for output in piece.outputs if output.name})
                trim_heap()
            before += sum(fill.nbytes for piece in shard for fill in piece.fills)
        if calibration is not None and walk is not None:
            told = {"calibration": calibration.told() | walk.told()}
            walk.end()
        nbytes = write_index(partial, list(shards))
        beside = gguf_companions(source, model) if source.gguf_file else companions(source.folder or Path())
        for name, content in beside:
            partial.write(name, [content], journal=False)
        said = describe(layout, model, pieces)
        config = source.config
        if source.gguf_file:
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
            config.pop("_name_or_path", None)
        partial.commit(
            make_manifest(layout, plan.dtype, model_id=source.resolved, revision=source.revision, files=fingerprint(source))
            | {"recipe": repr(plan.recipe)}
            | told,
            config_json(config, said, plan.dtype),
        )
    return SaveReport(
        folder=partial.folder,
        layout=layout,
        nbytes=nbytes,
        shards=len(shards),
        shards_resumed=resumed,
        seconds=time.perf_counter() - began,
        calibrated=None if walk is None else walk.done,
        unlike=unlike({t.name: t.format for t in plan.tensors if t.kind in ("linear", "experts")}),
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
