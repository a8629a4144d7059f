"""The application that the commands hang on, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlazy import __version__
from qlazy.errors import DoesNotFit, QlazyError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

BROKEN_PIPE = 141
"""Exit code when the reader of our output has gone: 128 + SIGPIPE, as shells have it."""

EXIT_CODES = {
    0: "done",
    1: "unexpected error, or no space on disk",
    2: "usage",
    3: "model not found, gated, offline or unsupported",
    4: "does not fit",
    5: "corrupt or incomplete checkpoint",
    6: "no such device or kernel",
    INTERRUPTED: "interrupted",
    BROKEN_PIPE: "the reader of the output left",
}
"""What each exit code says."""

ORDER = ("plan", "load", "save", "run", "chat", "bench", "ppl", "tune", "doctor", "configs", "models")
"""Commands in the order of the help text."""

ALIASES = {"quantize": "save"}
"""Other names of commands."""

_UsageProblem: type = typer.BadParameter.__mro__[1]
"""What typer raises for every error in the arguments; it has no public name."""


class Commands(TyperGroup):
    """All commands, with qlazy's manners: `Error:` and `Hint:` on stderr, exit codes by kind of error, no traceback."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command line and exit with its code.

        Args:
            args: Words after `qlazy`; those of this process by default.
            prog_name: Name in help texts.
            **extra: What typer passes on.
        Returns:
            Never.
        """
        words = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(words, prog_name or "qlazy", **{**extra, "standalone_mode": False})
        except Exception as error:
            code = complain(error, as_json="--json" in words)
        sys.exit(code)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, for help texts.

        Args:
            ctx: Typer's context.
        Returns:
            The names in `ORDER`.
        """
        return sorted(self.commands, key=ORDER.index)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name.

        Args:
            ctx: Typer's context.
            cmd_name: Its name, or another one of it.
        Returns:
            The command.
        """
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that a command line names.

        Args:
            ctx: Typer's context.
        Returns:
            What the command returns.
        """
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The interpreter flushes stdout once more at exit, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None


def complain(error: Exception, *, as_json: bool) -> int:
    """Say on stderr what went wrong and what to type next, and with `--json` on stdout too.

    Args:
        error: What was raised.
        as_json: Whether to print the JSON object.
    Returns:
        The exit code.
    """
    if os.environ.get("QLAZY_DEBUG") == "1":
        traceback.print_exception(error)
    told = describe(error)
    print(f"Error: {told['message']}", file=sys.stderr)
    if told["hint"]:
        print(f"Hint: {told['hint']}", file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):  # stdout itself may be what failed
            print_json({"schema": 1, "error": told})
    if isinstance(error, _UsageProblem):
        return 2
    return error.exit_code if isinstance(error, QlazyError) else 1


def describe(error: Exception) -> dict[str, Any]:
    """An error as plain data.

    Args:
        error: What was raised.
    Returns:
        Its type, message and hint, and the numbers of a `DoesNotFit`.
    """
    if isinstance(error, QlazyError):
        told: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        if isinstance(error, DoesNotFit):
            told |= {"needed_bytes": error.needed_bytes, "free_bytes": error.free_bytes}
        return told
    if isinstance(error, _UsageProblem):
        where = getattr(getattr(error, "ctx", None), "command_path", "qlazy")
        return {
            "type": "UsageError",
            "message": error.format_message(),  # type: ignore[attr-defined]
            "hint": f"See {where} --help.",
        }
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "what the output goes to"
        return {"type": "OutOfSpace", "message": f"No space left on {where}.", "hint": "Free some, and run it again."}
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"type": type(error).__name__, "message": message, "hint": "Set QLAZY_DEBUG=1 to see the traceback."}


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout.

    Args:
        data: JSON-ready data with a `schema`.
    """
    print(json.dumps(data, indent=2))


app = typer.Typer(
    name="qlazy",
    cls=Commands,
    help="Run language models whose 16-bit weights do not fit: planned to the byte, streamed into 4 or 8 bits.",
    epilog="Exit codes:\n" + "\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()),
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qlazy {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """Run the command line of this process, and exit."""
    app(prog_name="qlazy")
