"""What a load has quantized, kept in a folder for the next one. Off unless asked for; the key is that of a save."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from qlazy.errors import UnsupportedModel, UsageError
from qlazy.planning.recipe import Recipe
from qlazy.report import Progress
from qlazy.saving.fingerprint import content_key
from qlazy.saving.layouts import default_layout
from qlazy.saving.save import SHARD_BYTES, save
from qlazy.saving.saved import already_saved
from qlazy.sources.source import Source, open_source


def cache_root() -> Path:
    """The folder of cached models: `QLAZY_CACHE`, or `saved` in qlazy's part of the user's cache.

    Returns:
        The folder, which may not exist. What is in it can be deleted at any time.
    """
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QLAZY_CACHE") or Path(user) / "qlazy" / "saved")


def cached(
    source: Source,
    recipe: Recipe,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    drop_page_cache: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Source | None:
    """The saved folder of a source under a recipe, made now where it is not there.

    Args:
        source: An opened local source.
        recipe: What to quantize and how.
        dtype: Torch dtype name of what is not quantized.
        trust_remote_code: Run Python code from the model's folder.
        drop_page_cache: As in a load.
        on_progress: Called a few times a second while the folder is made.
    Returns:
        The folder, opened; it keeps the name that the user typed. None, with a warning, where it cannot be made: no layout
        holds the recipe's formats together, or another process is making it.
    Raises:
        OutOfSpace: the disk is full.

    Memory: as `save`.
    """
    layout = default_layout(recipe.format)
    key = content_key(source, recipe, layout=layout, dtype=dtype, shard_bytes=SHARD_BYTES)
    folder = cache_root() / f"{Path(source.resolved).name}-{recipe.name.replace(' ', '-')}-{key[:12]}"
    if already_saved(folder, key) is None:
        try:
            save(
                source,
                recipe,
                folder,
                layout=layout,
                dtype=dtype,
                force=True,
                trust_remote_code=trust_remote_code,
                drop_page_cache=drop_page_cache,
                on_progress=on_progress,
            )
        except (UsageError, UnsupportedModel) as error:
            warnings.warn(f"Not cached: {error}", stacklevel=2)
            return None
    return dataclasses.replace(open_source(folder), model_id=source.model_id)
