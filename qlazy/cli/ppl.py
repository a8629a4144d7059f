"""`qlazy ppl`: what quantization costs, measured on a text."""

from __future__ import annotations

import dataclasses
import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Model
from qlazy.cli.options import Options, with_options
from qlazy.cli.plan import fitting
from qlazy.cli.recipe_file import RECIPE_FIELDS
from qlazy.errors import DoesNotFit, UsageError
from qlazy.memory import trim_heap
from qlazy.planning.demand import text_config
from qlazy.planning.kept import keep
from qlazy.planning.plan import Plan, resolve_dtype
from qlazy.planning.recipe import make_recipe
from qlazy.report import report_to_json
from qlazy.sizes import format_bytes
from qlazy.sources.source import Source, open_source

if TYPE_CHECKING:
    from qlazy.measuring.logits import RecordedLogits
    from qlazy.measuring.windows import Windows

_DTYPE_BYTES = {"float32": 4}


@app.command(
    epilog="Examples:\nqlazy ppl demo\nqlazy ppl llama-8b --bits 8 --file wiki.test.raw --max-tokens 20000\n"
    "qlazy ppl ./saved --reference org/name --json\nqlazy ppl llama-70b --no-reference"
)
@with_options
def ppl(
    model: Model,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text in UTF-8; by default some 1,500 tokens of English prose.")
    ] = None,
    context_length: Annotated[
        int, typer.Option("--context-length", "--ctx", "-c", min=2, help="Tokens of a window; each is read on its own.")
    ] = 512,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "--tokens", min=1, help="Use no more of the text than this many tokens.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this model, read in 16 bits; by default with MODEL in 16 bits.")
    ] = None,
    no_reference: Annotated[bool, typer.Option("--no-reference", help="Compare with nothing: perplexity alone.")] = False,
    options: Options,
) -> None:
    """Load MODEL and measure its perplexity, and how far its predictions are from those in 16 bits."""
    text = None if file is None else _read(file)
    if context_length > options.max_model_len:
        raise UsageError(
            f"A window of {context_length} tokens needs more than the {options.max_model_len} that memory is planned for.",
            hint=f"Use --max-model-len {context_length}, or a smaller --context-length.",
        )
    if reference and no_reference:
        raise UsageError("--reference and --no-reference exclude each other.", hint="Give one of them.")
    source = fitting(model, options)
    plain = None if no_reference else _sixteen_bits(source, reference, options)

    from qlazy.cli import generate
    from qlazy.cli.progress import Display
    from qlazy.measuring.quality import score, summarize, table, to_json
    from qlazy.measuring.windows import TEXT, cut
    from qlazy.tokenizer import load_tokenizer

    generate.hush(options)
    with Display(silent=options.quiet or options.json) as display:
        source = generate.fetch(source, options, display)
    text = TEXT.read_text("utf-8") if text is None else text
    windows = cut(load_tokenizer(source, without=generate.LOAD_WITHOUT), text, context_length, max_tokens)
    recorded = None
    if plain is not None:
        # The quantized model is loaded when the reference is gone: what is held is the larger of the two, not both.
        recorded = _record(*(plain if reference else (source, plain[1])), windows)
    loaded = generate.load(source, options, speaks=False)
    options.say(f"Reading {windows.tokens:,} tokens of text ...")
    try:
        quality = summarize(score(loaded.model, windows, recorded), windows, context_length)
    finally:
        if recorded is not None:
            recorded.close()
    named = {"model": model, "reference": None if no_reference else reference or model, "file": str(file) if file else None}
    plan = loaded.report.plan
    if options.json:
        print_json(
            to_json(quality) | named | {"bits_per_weight": bits_per_weight(plan), "report": report_to_json(loaded.report)}
        )
    else:
        bits = bits_per_weight(plan)
        what = "nothing quantized" if bits is None else f"{plan.recipe.name}, {bits:.3f} bits per quantized weight"
        print(f"{model}: {what}\n{table(quality)}")


def bits_per_weight(plan: Plan) -> float | None:
    """Stored bits of the weights that are quantized, scales and zeros included, over their number.

    Args:
        plan: The plan of a load.
    Returns:
        Bits; None where nothing is quantized.
    """
    packed = [tensor for tensor in plan.tensors if tensor.format is not None]
    numbers = sum(math.prod(tensor.shape) for tensor in packed)
    return 8 * sum(tensor.nbytes for tensor in packed) / numbers if numbers else None


def _read(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.", hint="Give --file a text file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.", hint="Convert it.") from None


def _sixteen_bits(source: Source, reference: str | None, options: Options) -> tuple[Source, Options]:
    """The reference and the options that keep all of it in 16 bits; refused where it does not fit or is no comparison."""
    if reference is None and keep(source, make_recipe(**options.recipe_arguments())) is not None:
        raise UsageError(
            f"{source.model_id} is in low bits already, so that there is nothing in 16 bits to compare it with.",
            hint="Give the model that it was made from as --reference, or use --no-reference.",
        )
    # Nothing of the recipe is left, typed or in a file: a target would be one that 16 bits do not meet.
    bare: dict[str, Any] = {**dict.fromkeys(RECIPE_FIELDS), "recipe": None}
    plain: dict[str, Any] = {**bare, "modules_to_not_convert": ["*"]}
    if reference is not None:
        plain["revision"] = None
        other = open_source(reference, headers_only=True, **(options.source_arguments() | {"revision": None}))
        if keep(other) is not None:
            # What is in low bits already, say in 8, is compared with as it is.
            plain = {**bare, "revision": None}
    whole = dataclasses.replace(options, **plain)
    try:
        return fitting(reference or source.model_id, whole), whole
    except DoesNotFit as error:
        raise DoesNotFit(
            f"The reference, {reference or source.model_id} in 16 bits, does not fit: {error.message}",
            hint="Use --no-reference, or as --reference the model saved in 8 bits (qlazy save --bits 8).",
            needed_bytes=error.needed_bytes,
            free_bytes=error.free_bytes,
        ) from None


def _record(source: Source, options: Options, windows: Windows) -> RecordedLogits:
    """Load the reference, keep its logits in a temporary file, and let go of it."""
    import tempfile

    import torch

    from qlazy.cli import generate
    from qlazy.measuring.logits import record_logits, require_space
    from qlazy.planning.budget import make_budget

    dtype = resolve_dtype(source, options.dtype, make_budget(**options.budget_arguments()))
    nbytes = windows.tokens * int(text_config(source.config).get("vocab_size") or 0) * _DTYPE_BYTES.get(dtype, 2)
    require_space(nbytes)
    options.say(f"Reference in 16 bits first; its logits take {format_bytes(nbytes)} in {tempfile.gettempdir()} for a while.")
    loaded = generate.load(source, options, speaks=False)
    options.say(f"Reading {windows.tokens:,} tokens of text ...")
    recorded = record_logits(loaded.model, windows)
    del loaded
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return recorded
