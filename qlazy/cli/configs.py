"""`qlazy configs`: the recipes and tables that come with qlazy, to read and to copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Json
from qlazy.configs import config_root
from qlazy.errors import UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

configs = typer.Typer(
    help="List, print and copy the configuration files that come with qlazy.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
)
app.add_typer(configs, name="configs")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a file as `qlazy configs ls` prints it.")]


@configs.command("ls", epilog="Example: qlazy configs ls")
def list_files(*, json: Json = False) -> None:
    """List the files."""
    names = sorted(shipped())
    if json:
        print_json({"schema": 1, "files": names})
    else:
        print("\n".join(names))


@configs.command("cat", epilog="Example: qlazy configs cat recipes/int4.yaml")
def print_file(name: Name, *, json: Json = False) -> None:
    """Print a file."""
    content = find(name).read_text(encoding="utf-8")
    if json:
        print_json({"schema": 1, "name": name, "content": content})
    else:
        print(content, end="")


@configs.command("cp", epilog="Example: qlazy configs cp recipes/int4.yaml my.yaml")
def copy_file(
    name: Name,
    to: Annotated[Path, typer.Argument(metavar="TO", help="File or folder to write to.")] = Path("."),
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
    json: Json = False,
) -> None:
    """Copy a file, to change it."""
    source = find(name)
    target = to / source.name if to.is_dir() else to
    try:
        with target.open("wb" if force else "xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise UsageError(f"{target} exists.", hint="Use --force to overwrite it.") from None
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}.", hint="Name another file.") from None
    if json:
        print_json({"schema": 1, "name": name, "path": str(target)})
    else:
        print(target)


def shipped() -> dict[str, Traversable]:
    """The files that come with qlazy.

    Returns:
        File by its name below the root, e.g. `recipes/int4.yaml`.
    """

    def walk(folder: Traversable, prefix: str) -> dict[str, Traversable]:
        found: dict[str, Traversable] = {}
        for item in folder.iterdir():
            if item.is_dir():
                found |= walk(item, f"{prefix}{item.name}/")
            elif not item.name.startswith("."):
                found[prefix + item.name] = item
        return found

    return walk(config_root(), "")


def find(name: str) -> Traversable:
    """One file that comes with qlazy.

    Args:
        name: Its name below the root, with or without `.yaml`.
    Returns:
        The file.
    Raises:
        UsageError: there is none of that name.
    """
    files = shipped()
    for candidate in (name, f"{name}.yaml", f"recipes/{name}", f"recipes/{name}.yaml"):
        if candidate in files:
            return files[candidate]
    raise UsageError(f"There is no configuration {name!r}.", hint="See `qlazy configs ls`.")
