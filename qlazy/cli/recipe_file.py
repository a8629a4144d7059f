"""Recipes in files: the same fields as on the command line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from qlazy import configs
from qlazy.errors import UsageError
from qlazy.planning.recipe import make_recipe

RECIPE_FIELDS = tuple(inspect.signature(make_recipe).parameters)
"""What a recipe says, in a file, on the command line and in Python."""


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe file.

    Args:
        name: A path, or the name of a shipped recipe such as `int4`.
    Returns:
        Arguments of `make_recipe`.
    Raises:
        UsageError: no such file, not YAML, or a field that no recipe has.
    """
    import yaml

    shipped = configs.config_root() / "recipes"
    names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
    file = Path(name) if Path(name).is_file() or name not in names else shipped / f"{name}.yaml"
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"There is no recipe {name!r}: {error.strerror or error}.", hint=f"Give a YAML file, or one of {', '.join(names)}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} is not YAML: {error}", hint="See `qlazy configs cat recipes/int4.yaml`.") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{name} holds no fields.", hint="See `qlazy configs cat recipes/int4.yaml`.")
    unknown = [str(field) for field in fields if field not in RECIPE_FIELDS]
    if unknown:
        raise UsageError(f"{name} has {', '.join(unknown)}, which no recipe has.", hint=f"Use {', '.join(RECIPE_FIELDS)}.")
    return fields
