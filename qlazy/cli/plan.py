"""`qlazy plan`: whether and how a model fits, from its headers alone."""

from __future__ import annotations

import math

import typer

from qlazy import memory
from qlazy.cli.app import app, complain, describe, print_json
from qlazy.cli.arguments import Model
from qlazy.cli.options import Options, with_options
from qlazy.errors import DoesNotFit
from qlazy.planning.budget import make_budget
from qlazy.planning.kept import keep
from qlazy.planning.plan import Plan, allocate, block_of, entries, require_fit, resolve_dtype, to_json
from qlazy.planning.recipe import make_recipe
from qlazy.report import align, plan_summary, plan_table
from qlazy.sizes import format_bytes
from qlazy.sources.source import Source, open_source


@app.command(
    epilog="Examples:\nqlazy plan demo\nqlazy plan llama-70b --bits 4 --max-model-len 8192\n"
    "qlazy plan ./folder --max-memory 0=22GiB --json"
)
@with_options
def plan(model: Model, *, options: Options) -> None:
    """Say whether MODEL fits and what goes where; reads headers only."""
    plan_only(model, options)


def plan_only(model: str, options: Options) -> None:
    """Plan and print it on stdout, whether or not it fits; the exit code tells.

    Args:
        model: What was typed as MODEL.
        options: The shared options.
    Raises:
        typer.Exit: with the code of `DoesNotFit` where it does not fit.
    """
    source, planned = draw_up(model, options)
    try:
        require_fit(planned, source)
    except DoesNotFit as error:
        if options.json:
            print_json(to_json(planned) | {"error": describe(error)})
        else:
            print(text(source, planned, options), flush=True)
        raise typer.Exit(complain(error, as_json=False)) from None
    if options.json:
        print_json(to_json(planned))
    else:
        print(text(source, planned, options))
        options.say(f"Next: {options.command('load', model)}")


def draw_up(model: str, options: Options, *, patient: bool = False) -> tuple[Source, Plan]:
    """Make a plan that need not fit.

    Args:
        model: What was typed as MODEL.
        options: The shared options.
        patient: Leave it to the load to refuse a target, where the model is here: the model itself may be smaller.
    Returns:
        The source, of which only headers were read (with `--random-init` only the config), and the plan.
    Raises:
        QlazyError: a model that is not found or cannot be read, or options that cannot be meant.
    """
    recipe = make_recipe(**options.recipe_arguments())
    budget = make_budget(**options.budget_arguments())
    source = open_source(model, headers_only=True, config_only=options.random_init, **options.source_arguments())
    dtype = resolve_dtype(source, options.dtype, budget)
    if options.random_init:
        # No file says what the model holds, so that it has to be built, without memory.
        from qlazy.random_init import drawn_source

        source = drawn_source(source, dtype, trust_remote_code=options.trust_remote_code)
    recipe = keep(source, recipe) or recipe
    patient = patient and source.folder is not None
    return source, allocate(entries(source, dtype), source, recipe, budget, dtype=dtype, exact=False, patient=patient)


def fitting(model: str, options: Options) -> Source:
    """Refuse what does not fit before anything is downloaded, read or imported.

    Args:
        model: What was typed as MODEL.
        options: The shared options.
    Returns:
        The source, of which only headers were read.
    Raises:
        QlazyError: as `draw_up`, and `DoesNotFit`.
    """
    source, planned = draw_up(model, options, patient=True)
    require_fit(planned, source)
    return source


def text(source: Source, planned: Plan, options: Options) -> str:
    """A plan as a person reads it.

    Args:
        source: What it is a plan of.
        planned: The plan.
        options: The shared options; `--verbose` lists every tensor.
    Returns:
        Lines of text without a final newline.
    """
    names = {device: gpu.name.removeprefix("NVIDIA ") for device, gpu in memory.cuda_devices().items()}
    parts = [heading(source, planned, drawn=options.random_init), plan_table(planned, names), plan_summary(planned)]
    if options.verbose:
        rows = [
            [t.name, "x".join(map(str, t.shape)), t.format.name if t.format else t.dtype, t.device, format_bytes(t.nbytes)]
            for t in planned.tensors
        ]
        parts.insert(1, align(rows))
    return "\n".join(parts)


def heading(source: Source, planned: Plan, *, drawn: bool = False) -> str:
    """What a name resolved to, and how large it is.

    Args:
        source: An opened source.
        planned: Its plan.
        drawn: Whether its weights are in no file.
    Returns:
        One line.
    """
    name = source.model_id if source.model_id == source.resolved else f"{source.model_id} -> {source.resolved}"
    if source.revision:
        name += f" @ {source.revision[:7] if len(source.revision) == 40 else source.revision}"
    parameters = sum(math.prod(t.shape) for t in planned.tensors)
    unit, scale = ("B", 1e9) if parameters >= 1e9 else ("M", 1e6)
    layers = len({block_of(t.name) for t in planned.tensors} - {""})
    files = len({t.path for t in source.tensors.values()})
    origin = "random weights" if drawn else f"{files} file{'s' if files != 1 else ''}"
    return f"{name}   {parameters / scale:.1f} {unit} parameters, {layers} layers, {origin}"
