"""`qlazy chat`: a conversation at the terminal, or from a pipe with one question a line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qlazy.cli.app import app
from qlazy.cli.arguments import Compile, Model
from qlazy.cli.options import Options, with_options
from qlazy.cli.plan import fitting
from qlazy.errors import UsageError

if TYPE_CHECKING:
    from qlazy.cli.generate import Loaded, Messages

HELP = "/exit or Ctrl-D leaves, /reset forgets, Ctrl-C stops an answer."


@app.command(epilog="Examples:\nqlazy chat demo\necho 'What is the capital of France?' | qlazy chat demo -q")
@with_options
def chat(
    model: Model,
    *,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    compile: Compile = False,
    options: Options,
) -> None:
    """Load MODEL and talk with it.

    /exit or Ctrl-D leaves, /reset forgets the conversation, Ctrl-C stops an answer.
    """
    if options.json:
        raise UsageError("A conversation is not one JSON object.", hint="Use qlazy run --json.")
    source = fitting(model, options)

    from qlazy.cli import generate

    loaded = generate.load(source, options, compiles=compile)
    if not loaded.chats:
        raise UsageError(f"{model} has no chat template.", hint=f"{options.command('run', model)} PROMPT")
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() its line editing

        options.say(HELP)
    converse(loaded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def converse(loaded: Loaded, *, max_new_tokens: int, temperature: float, seed: int | None) -> None:
    """Answer one line after the other until the input ends.

    Args:
        loaded: A loaded model.
        max_new_tokens: Tokens of an answer at most.
        temperature: 0 takes the likeliest token every time.
        seed: Of the random numbers, for the first answer.
    """
    messages: Messages = []
    while (line := ask()) is not None and line != "/exit":
        if line == "/reset":
            messages.clear()
            continue
        if line.startswith("/") or not line:
            print(HELP, file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line})
        try:
            said = loaded.answer(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, echo=True)
        except KeyboardInterrupt:
            # Half an answer is no part of the conversation.
            messages.pop()
            print("\nStopped.", file=sys.stderr)
            continue
        except UsageError as error:
            messages.pop()
            print(f"{error.message} /reset begins anew.", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": said.text})
        seed = None


def ask() -> str | None:
    """The next line of the user.

    Returns:
        It without blanks at its ends; None at the end of the input.
    """
    while True:
        try:
            if sys.stdin.isatty():
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(f"\n{HELP}", file=sys.stderr)
