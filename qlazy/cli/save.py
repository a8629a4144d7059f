"""`qlazy save`: quantize a model into a folder, file by file, without ever holding it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlazy.calibrating.calibration import Calibration
from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Model
from qlazy.cli.options import Options, with_options
from qlazy.errors import UsageError
from qlazy.planning.budget import UNLIMITED
from qlazy.planning.plan import make_plan
from qlazy.save_api import save_recipe
from qlazy.saving.folder import require_replaceable
from qlazy.saving.layout_config import LAYOUTS, require_layout
from qlazy.saving.saved import SaveReport, read_manifest
from qlazy.sizes import parse_bytes
from qlazy.sources.source import open_source

if TYPE_CHECKING:
    from qlazy.calibrating.tokens import Text

_IDLE = (
    "device_map",
    "max_memory",
    "reserve",
    "max_model_len",
    "attn_implementation",
    "strict",
    "verify",
    "cache",
    "random_init",
)
"""Options of a load that a save has no use for."""


@app.command(
    epilog="Examples:\nqlazy save demo demo-int4\nqlazy save demo demo-int4 --calibrate\n"
    "qlazy save llama-8b llama-8b-nf4 --as bitsandbytes\n"
    "qlazy save ./folder ./folder-int4 --symmetric --group-size 64 --head-bits 16"
)
@with_options
def save(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.", show_default=False)],
    *,
    layout: Annotated[
        str | None,
        typer.Option(
            "--as",
            help=f"Whose layout the folder has: {', '.join(LAYOUTS)}; by default the first, and for nf4 and fp4 the second.",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file.")] = "512MiB",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Round by what each layer takes in: better, and slower. The model writes the text."),
    ] = False,
    calibration_file: Annotated[
        Path | None, typer.Option(help="Calibrate on this text, in UTF-8, and not on the model's own.")
    ] = None,
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="Calibrate on tokens drawn at random: quicker, and the model need not fit.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Sequences to calibrate on (default {Calibration.samples}).")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of each (default {Calibration.sequence_length}).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Of the text that the model writes, or of random tokens (default {Calibration.seed}).")
    ] = None,
    options: Options,
) -> None:
    """Quantize MODEL into FOLDER, for qlazy, transformers and vLLM; goes on where it was cut off. Also `qlazy quantize`."""
    calibration = _calibration(
        calibrate,
        file=calibration_file,
        random_tokens=random_tokens or None,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    idle = [name for name in _IDLE if getattr(options, name) != getattr(Options(), name)]
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise UsageError(f"qlazy save has no use for {flags}.", hint="Leave it out; it belongs to a load.")
    arguments = options.recipe_arguments()
    recipe = save_recipe(layout, **arguments)
    shard_bytes = parse_bytes(max_shard_size)
    if read_manifest(folder) is None:
        require_replaceable(folder, force=force)
    source = open_source(model, headers_only=True, **options.source_arguments())
    if source.folder is None:
        make_plan(source, recipe, UNLIMITED, dtype=options.dtype)  # refused before it is downloaded

    from qlazy.cli.generate import fetch, hush
    from qlazy.cli.progress import Display
    from qlazy.saving.save import save as save_source

    hush(options)
    with Display(silent=options.quiet or options.json) as display:
        source = fetch(source, options, display)

        def text() -> Text:
            from qlazy.own_text import tokens_for

            assert calibration is not None
            return tokens_for(
                source,
                calibration,
                trust_remote_code=options.trust_remote_code,
                drop_page_cache=options.drop_page_cache,
                on_progress=display,
            )

        report = save_source(
            source,
            recipe,
            folder,
            layout=None if layout is None else require_layout(layout),
            dtype=options.dtype,
            force=force,
            shard_bytes=shard_bytes,
            trust_remote_code=options.trust_remote_code,
            drop_page_cache=options.drop_page_cache,
            on_progress=display,
            calibration=calibration,
            text=text,
        )
    options.say(str(report))
    if options.json:
        print_json(_to_json(report))
    options.say(f"Next: qlazy run {folder} 'Hello'" + ("" if report.unlike else f"\n      vllm serve {folder}"))


def _calibration(calibrate: bool, **told: Any) -> Calibration | None:
    given = {name: value for name, value in told.items() if value is not None}
    if given and not (calibrate or "file" in given or "random_tokens" in given):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{flags} belongs to a calibration.", hint="Add --calibrate.")
    if "file" in given and "seed" in given:
        raise UsageError("--seed is of a text that is drawn, and --calibration-file is none.", hint="Leave one out.")
    return Calibration(**given) if calibrate or given else None


def _to_json(report: SaveReport) -> dict[str, object]:
    return {"schema": 1} | dataclasses.asdict(report) | {"folder": str(report.folder)}
