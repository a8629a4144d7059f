"""MODEL, and the flags of commands that take no other option of `options.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qlazy import configs


def complete_model(incomplete: str) -> list[str]:
    """Aliases and cached hub ids that begin with what was typed; no torch, no network.

    Args:
        incomplete: What was typed so far.
    Returns:
        Candidates; none where a path was begun, so that the shell completes it.
    """
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))
    cached = [folder.name.removeprefix("models--").replace("--", "/") for folder in sorted(cache.glob("models--*"))]
    return [name for name in [*configs.aliases(), *cached] if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Alias (see `qlazy models`), hub id such as org/name, local folder, or .gguf file.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the step from token to token: seconds to minutes once, then less a token."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress.")]
