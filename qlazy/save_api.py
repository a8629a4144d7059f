"""The public function `save_quantized`. Importing this module imports neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlazy.calibrating.calibration import Calibration
from qlazy.errors import UsageError
from qlazy.planning.budget import UNLIMITED
from qlazy.planning.plan import make_plan
from qlazy.planning.recipe import Recipe, make_recipe
from qlazy.report import Progress, downloading
from qlazy.saving.layout_config import require_layout
from qlazy.saving.saved import SaveReport
from qlazy.sizes import parse_bytes
from qlazy.sources.source import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlazy.calibrating.tokens import Text


def save_quantized(
    model: PreTrainedModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    layout: str | None = None,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    double_quant: bool = True,
    head_bits: int | None = None,
    embedding_bits: int = 16,
    module_bits: Mapping[str, int | str] | None = None,
    modules_to_not_convert: list[str] | tuple[str, ...] | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
    dtype: str = "auto",
    max_shard_size: str | int = "512MiB",
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    calibrate: bool | Calibration = False,
) -> SaveReport:
    """Write a model's low-bit weights to a folder that qlazy, transformers and vLLM open.

        qlazy.save_quantized("org/name", "name-int4")        # never holds the model
        qlazy.save_quantized(model, "name-int4")             # what is loaded, as it is
        qlazy.load_quantized("name-int4")                    # mapped, not read
        qlazy.save_quantized("org/name", "name-int4", calibrate=True)

    Args:
        model: A folder, a `.gguf` file, an alias, or a hub id; or a model that `load_quantized` gave.
        folder: The folder to make. It is there as a whole or not at all; a save that was cut off goes on where it was.
        layout: Whose layout it has: `compressed-tensors` (default for integers), `bitsandbytes` (for nf4 and fp4) or `gptq`.
        bits: 4 or 8. Of no meaning for a loaded model, as are all that follow but `max_shard_size` and `force`.
        format: `int4`, `int8`, `nf4` or `fp4`; by default what `bits` and `layout` say.
        group_size: Columns that share a scale.
        symmetric: Int4 without zero points; the default under `gptq`.
        double_quant: NF4 and FP4 with absmax in 8 bits.
        head_bits: Bits of an output head that is not tied to the embedding: by default 8, and 16 where the layout has no room
            for a second format.
        embedding_bits: Bits of token embeddings, and of output heads tied to them: 16 keeps them, or 8, or 4.
        module_bits: Bits by name or glob of modules.
        modules_to_not_convert: Modules kept in the model's dtype beside the defaults; under `bitsandbytes` experts are too.
        target_size: Size of all weights, e.g. `5GiB`: formats are chosen layer by layer, as in `load_quantized`.
        target_bpw: The same by bits per quantized weight, e.g. 4.3.
        dtype: `auto` or a torch dtype name, for what is not quantized.
        max_shard_size: Bytes or size of a file.
        force: Replace a folder that holds something.
        revision: Branch, tag or commit on the hub.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Do not ask the hub.
        trust_remote_code: Run Python code that lies in a local folder; none is downloaded.
        on_progress: Called a few times a second with a `Progress`.
        calibrate: Round by what each layer takes in while a text goes through the model block by block: a text that the
            model itself writes, or what a `Calibration` says.
    Returns:
        What was written.
    Raises:
        UsageError: the folder holds something else, or the layout cannot hold the weights' format.
        DoesNotFit: nothing is as small as the target.
        UnsupportedModel: a model that cannot be calibrated block by block.
        OutOfSpace: the disk is full; what is complete stays for the next attempt.
        QlazyError: the model is not found, not supported or damaged.

    Memory: one file, or the largest tensor where that is more, and the ring of a load; of a loaded model a copy of one file's
    tensors at most. Calibrated: the model in 8 bits while it writes its text, or in 4; then, beside two files, one block in 16
    bits twice, four times K x K in float32 for its widest layer of K columns, and activations of 4096 tokens.
    """
    calibration = Calibration() if calibrate is True else calibrate or None
    if not isinstance(model, str | os.PathLike):
        if calibration is not None:
            raise UsageError(
                "A model that is loaded is in low bits already, and is not calibrated any more.", hint="Give its folder."
            )
        from qlazy.saving.save_model import save_model

        wanted = None if layout is None else require_layout(layout)
        return save_model(model, os.fspath(folder), layout=wanted, force=force, shard_bytes=_bytes(max_shard_size))
    recipe = save_recipe(
        layout,
        format=format,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        double_quant=double_quant,
        head_bits=head_bits,
        embedding_bits=embedding_bits,
        module_bits=module_bits,
        modules_to_not_convert=modules_to_not_convert,
        target_size=target_size,
        target_bpw=target_bpw,
    )

    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    source = open_source(model, headers_only=True, **where)
    if source.folder is None:
        make_plan(source, recipe, UNLIMITED, dtype=dtype)  # refused before it is downloaded
        source = open_source(model, on_progress=downloading(on_progress), **where)
    from qlazy.saving.save import save

    def text() -> Text:
        from qlazy.own_text import tokens_for

        assert calibration is not None
        return tokens_for(source, calibration, trust_remote_code=trust_remote_code, on_progress=on_progress)

    return save(
        source,
        recipe,
        os.fspath(folder),
        layout=None if layout is None else require_layout(layout),
        dtype=dtype,
        force=force,
        shard_bytes=_bytes(max_shard_size),
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
        calibration=calibration,
        text=text,
    )


def _bytes(size: str | int) -> int:
    return size if isinstance(size, int) else parse_bytes(size)


def save_recipe(
    layout: str | None,
    *,
    format: str | None = None,
    bits: int | None = None,
    symmetric: bool | None = None,
    head_bits: int | None = None,
    **options: Any,
) -> Recipe:
    """The recipe of a save: defaults are those that the layout has room for.

    Args:
        layout: Whose layout the folder has, or None.
        format: Format of the weights, or None.
        bits: 4 or 8, or None.
        symmetric: Int4 without zero points, or None.
        head_bits: Bits of the head, or None.
        **options: Other arguments of `make_recipe`.
    Returns:
        The recipe.
    Raises:
        UsageError: as `make_recipe`, or a layout that does not exist, or has no room for a target.
    """
    if layout is not None:
        require_layout(layout)
    if layout == "bitsandbytes" and (options.get("target_size") is not None or options.get("target_bpw") is not None):
        raise UsageError(
            "bitsandbytes' layout has one format for all weights; a target chooses one for each.",
            hint="Use --as compressed-tensors, or leave --target-size and --target-bpw out.",
        )
    if layout == "bitsandbytes" and format is None and bits != 8:
        format = "nf4"
    if layout == "gptq" and symmetric is None and format in (None, "int4") and bits != 8:
        symmetric = True
    if head_bits is None:
        one_format = layout in ("bitsandbytes", "gptq") or format in ("nf4", "fp4")
        head_bits = 16 if one_format else 8
    if layout == "bitsandbytes" or format in ("nf4", "fp4"):
        # Its readers have no layer for fused experts.
        options["modules_to_not_convert"] = [*(options.get("modules_to_not_convert") or ()), "experts"]
    bits = bits if bits is not None else (8 if format == "int8" else 4)
    return make_recipe(bits=bits, format=format, symmetric=symmetric, head_bits=head_bits, **options)
