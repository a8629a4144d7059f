"""`qlazy load`: plan, load, verify, and say how the measured bytes compare with the planned ones."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Model
from qlazy.cli.options import Options, with_options
from qlazy.cli.plan import draw_up, plan_only, text
from qlazy.errors import UsageError
from qlazy.planning.plan import require_fit
from qlazy.plot import draw_load, require_plot, save_figure
from qlazy.report import LoadReport, report_to_json
from qlazy.trace import Trace, span

if TYPE_CHECKING:
    from qlazy.cli.generate import Loaded

PROMPT = "In one sentence, what is the sea?"
"""What a model is asked after a load, to show that it speaks."""


@app.command(
    epilog="Examples:\nqlazy load demo\nqlazy load llama-8b --bits 8 --dry-run\nqlazy load ./folder --format nf4 --json\n"
    "qlazy load demo --plot memory.png --trace trace.json\nqlazy load llama-8b --random-init"
)
@with_options
def load(
    model: Model,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan, as `qlazy plan` does.")] = False,
    prompt: Annotated[str, typer.Option(help="What to ask the model afterwards; '' asks nothing.")] = PROMPT,
    trace: Annotated[
        Path | None, typer.Option(help="Write reads, quantization and memory over time to this file, for ui.perfetto.dev.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and bytes read over time to this file (.png, .svg, .pdf).")
    ] = None,
    options: Options,
) -> None:
    """Load MODEL, verify it, and report planned against measured bytes."""
    if dry_run:
        if trace is not None or plot is not None:
            raise UsageError("--dry-run loads nothing that could be traced or drawn.", hint="Leave --trace and --plot out.")
        plan_only(model, options)
        return
    if options.random_init and prompt == PROMPT:
        prompt = ""  # there is nothing to hear, and perhaps no tokenizer
    taken, picture = None if trace is None else Trace(trace), None if plot is None else require_plot(plot)
    with span(taken, "resolve"):
        source, planned = draw_up(model, options, patient=True)
    options.say(text(source, planned, options))
    require_fit(planned, source)

    from qlazy.cli import generate

    loaded = generate.load(source, options, speaks=bool(prompt), trace=taken)
    report = loaded.report
    if taken is not None:
        taken.write()
    if picture is not None:
        save_figure(draw_load(report), picture)
    options.say(f"{verified(loaded)}\n{report}{remarks(report)}")
    said = (
        loaded.answer([{"role": "user", "content": prompt}] if loaded.chats else prompt, max_new_tokens=32) if prompt else None
    )
    if said is not None:
        options.say(f"It says: {' '.join(said.text.split())}  ({said})")
    if options.json:
        print_json(report_to_json(report) | {"generated": None if said is None else dataclasses.asdict(said)})
    options.say(f"Next: {options.command('bench' if options.random_init else 'chat', model)}")


def verified(loaded: Loaded) -> str:
    """Tensors loaded, and those left without storage, counted once more.

    Args:
        loaded: A loaded model.
    Returns:
        E.g. `272/272 tensors, 0 left without storage`.
    """
    model, report = loaded.model, loaded.report
    left = sum(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))
    stored = sum(tensor.source_nbytes > 0 for tensor in report.plan.tensors)
    return f"{report.tensors_loaded}/{stored} tensors, {left} left without storage"


def remarks(report: LoadReport) -> str:
    """Checkpoint keys that were ignored and parameters that no checkpoint holds.

    Args:
        report: The report of a finished load.
    Returns:
        Lines that each begin with a newline; empty where there is nothing to say.
    """
    lines = ""
    if report.unexpected:
        lines += f"\nIgnored, as transformers does: {', '.join(report.unexpected)}"
    if report.initialized:
        lines += f"\nIn no file, as building the model makes them: {', '.join(report.initialized)}"
    return lines
