"""Writes docs/cli.md from the commands themselves: `python docs/generate_cli.py`. A test holds the file to it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from qlazy.cli.app import EXIT_CODES, app
from qlazy.cli.doctor import VARIABLES
from qlazy.cli.options import Options

SHARED = {field.name for field in dataclasses.fields(Options)}
HEADS = ("argument or option", "meaning", "default")
PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """The reference of the command line.

    Returns:
        Markdown.
    """
    root = typer.main.get_command(app)
    parts = [
        "# Command line",
        "<!-- Written by docs/generate_cli.py; do not edit. -->",
        str(root.help),
        "Data goes to stdout, progress and reports to stderr. `--json` prints one object with a `schema` version, bytes as "
        'integers; an error is then an object too: `{"schema": 1, "error": {"type", "message", "hint"}}`.',
    ]
    context = typer.Context(root, info_name="qlazy")
    for name in root.list_commands(context):  # type: ignore[attr-defined]
        parts += section(root.commands[name], f"qlazy {name}")  # type: ignore[attr-defined]
    shared = [row(p) for p in root.commands["plan"].params if p.name in SHARED]  # type: ignore[attr-defined]
    parts += ["## Options of every command with a MODEL", table(HEADS, shared)]
    parts += ["## Exit codes", table(("code", "meaning"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])]
    parts += [
        "## Environment",
        "Variables that are honoured; `qlazy doctor` shows them: " + ", ".join(f"`{v}`" for v in VARIABLES) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def section(command: Any, path: str) -> Iterator[str]:
    """One command.

    Args:
        command: As typer built it.
        path: Words that call it.
    Yields:
        Paragraphs.
    """
    subcommands = getattr(command, "commands", {})
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    yield f"## `{' '.join([path, *arguments, *(['COMMAND'] if subcommands else [])])}`"
    yield inspect.cleandoc(command.help or "")
    own = [row(p) for p in command.params if p.name != "help" and (p.name not in SHARED or len(command.params) < len(SHARED))]
    if own and not subcommands:
        yield table(HEADS, own)
    if len(command.params) > len(SHARED):
        yield "And the [options of every command with a MODEL](#options-of-every-command-with-a-model)."
    if command.epilog:
        first, *examples = command.epilog.replace("Example: ", "Examples:\n").splitlines()
        yield f"{first}\n\n```\n" + "\n".join(examples) + "\n```"
    for name, sub in subcommands.items():
        yield from section(sub, f"{path} {name}")


def row(parameter: Any) -> tuple[str, str, str]:
    """One argument or option.

    Args:
        parameter: As typer built it.
    Returns:
        Its names, meaning and default.
    """
    if parameter.param_type_name == "argument":
        names = parameter.metavar
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = ",".join(parameter.default) if isinstance(parameter.default, list) else parameter.default
    return f"`{names}`", parameter.help or "", "" if default is None or default is False else f"`{default}`"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table.

    Args:
        heads: Names of the columns.
        rows: Cells.
    Returns:
        Markdown.
    """
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
