"""`qlazy bench`: how fast a model reads prompts and generates on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlazy.bench import measure, table, to_json
from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Compile, Model
from qlazy.cli.options import Options, with_options
from qlazy.cli.plan import fitting
from qlazy.errors import UsageError
from qlazy.plot import draw_benchmark, require_plot, save_figure
from qlazy.report import report_to_json

PROMPTS, ANSWERS = ["512"], ["128"]
"""Tokens of the tests that llama-bench runs when it is asked for none."""


@app.command(
    epilog="Examples:\nqlazy bench demo\nqlazy bench llama-8b --bits 8 -p 128,512 -n 64 -r 3\n"
    "qlazy bench ./folder --json --plot bench.png"
)
@with_options
def bench(
    model: Model,
    *,
    prompt_tokens: Annotated[
        list[str], typer.Option("--prompt-tokens", "-p", help="Lengths of prompts to time; repeatable, or 128,512; 0: none.")
    ] = PROMPTS,
    gen_tokens: Annotated[
        list[str], typer.Option("--gen-tokens", "-n", help="Numbers of tokens to generate, likewise.")
    ] = ANSWERS,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="How often each test is timed.")] = 5,
    compile: Compile = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the rates to this file (.png, .svg, .pdf).")] = None,
    options: Options,
) -> None:
    """Load MODEL, and time prompt processing and generation as llama-bench does."""
    tests = {"prompt_tokens": counts("--prompt-tokens", prompt_tokens), "gen_tokens": counts("--gen-tokens", gen_tokens)}
    require_room(tests["prompt_tokens"] + tests["gen_tokens"], options)
    picture = None if plot is None else require_plot(plot)
    source = fitting(model, options)

    from qlazy.cli import generate

    loaded = generate.load(source, options, speaks=False, compiles=compile)
    if compile and tests["gen_tokens"]:
        loaded.compile_for(tests["gen_tokens"])
    options.say(f"One warm-up and {repetitions} on the clock of each test.")
    measured = measure(loaded.model, **tests, repetitions=repetitions, on_test=lambda test: options.say(f"Timing {test}"))
    if picture is not None:
        save_figure(draw_benchmark(measured), picture)
    if options.json:
        print_json(to_json(measured) | {"report": report_to_json(loaded.report)})
    else:
        print(table(measured))


def counts(flag: str, words: list[str]) -> list[int]:
    """Numbers of tokens, as typed.

    Args:
        flag: Name of the option.
        words: Each a number, or a list of numbers with commas.
    Returns:
        The numbers that are not 0.
    Raises:
        UsageError: something that is no number of tokens.
    """
    typed = [number.strip() for word in words for number in word.split(",")]
    if not all(number.isascii() and number.isdigit() for number in typed):
        raise UsageError(f"{flag} {','.join(words)!r} is not a list of numbers.", hint=f"E.g. {flag} 128,512; 0 leaves it out.")
    return [int(number) for number in typed if int(number)]


def require_room(tokens: list[int], options: Options) -> None:
    """Refuse tests that are none, or that need more memory than is planned for.

    Args:
        tokens: Numbers of tokens of all tests.
        options: The shared options.
    Raises:
        UsageError: nothing to time, or too many tokens.
    """
    if not tokens:
        raise UsageError("There is nothing to time.", hint="Give --prompt-tokens or --gen-tokens a number above 0.")
    if max(tokens) > options.max_model_len:
        raise UsageError(
            f"A test of {max(tokens)} tokens needs more than the {options.max_model_len} that memory is planned for.",
            hint=f"Use --max-model-len {max(tokens)}, or fewer tokens.",
        )
