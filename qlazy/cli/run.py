"""`qlazy run`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Compile, Model
from qlazy.cli.options import Options, with_options
from qlazy.cli.plan import fitting
from qlazy.report import measured_table, plan_summary, report_to_json, timings


@app.command(
    epilog='Examples:\nqlazy run demo "What is the capital of France?"\n'
    'qlazy run llama-8b "A haiku about rain" --temperature 0.8 --seed 1'
)
@with_options
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it is, without the chat template.")] = False,
    compile: Compile = False,
    report: Annotated[bool, typer.Option("--report", help="Report bytes and seconds on stderr.")] = False,
    options: Options,
) -> None:
    """Load MODEL, answer PROMPT, print the answer alone on stdout."""
    source = fitting(model, options)

    from qlazy.cli import generate

    loaded = generate.load(source, options, compiles=compile)
    conversation = [{"role": "user", "content": prompt}]
    said = loaded.answer(
        prompt if raw or not loaded.chats else conversation,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        echo=not options.json,
    )
    if report:
        told = loaded.report
        options.say(f"\n{plan_summary(told.plan)}\n{measured_table(told)}\n{timings(told)}\n{said}")
    if options.json:
        print_json({"schema": 1, "generated": dataclasses.asdict(said), "report": report_to_json(loaded.report)})
