"""The options that every command with a MODEL shares: declared once, read once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from qlazy.cli.recipe_file import RECIPE_FIELDS, read_recipe
from qlazy.errors import UsageError

_WHAT = "What becomes of the weights"
_WHERE = "Where they go"
_FROM = "Where they come from"
_SAYS = "What is said"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every shared option, as typed; None = not typed."""

    bits: Annotated[
        int | None, typer.Option(help="Bits per weight: 4 (default) or 8.", rich_help_panel=_WHAT, show_default=False)
    ] = None
    format: Annotated[
        str | None, typer.Option(help="int4, int8, nf4 or fp4; by default int4 or int8 after --bits.", rich_help_panel=_WHAT)
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale: 32, 64, 128, or -1 for the whole row.", rich_help_panel=_WHAT),
    ] = None
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="int4 without zero points, or with.", rich_help_panel=_WHAT)
    ] = None
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="nf4 and fp4: scales in 8 bits, or not.", rich_help_panel=_WHAT),
    ] = None
    head_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of an output head not tied to the embedding: 8 (default; saved as GPTQ or bitsandbytes 16), 4 or 16.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of token embeddings, and of a head tied to them: 16 (default), 8 or 4.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None
    module_bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BITS",
            help="Bits of modules by name or glob, e.g. down_proj=8: 4, 8, 16 or a format such as int4-g64; repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(help="Size of all weights, e.g. 5GiB: bits and groups by layer, as they matter.", rich_help_panel=_WHAT),
    ] = None
    target_bpw: Annotated[
        float | None,
        typer.Option(help="The same by bits per quantized weight, scales included, e.g. 4.3.", rich_help_panel=_WHAT),
    ] = None
    modules_to_not_convert: Annotated[
        list[str] | None,
        typer.Option(help="Name or glob of modules to keep in 16 bits as well; repeatable.", rich_help_panel=_WHAT),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(help="YAML file with these settings, or the name of a shipped one.", rich_help_panel=_WHAT),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Of all that is not quantized: auto, bfloat16, float16, float32.", rich_help_panel=_WHAT)
    ] = "auto"
    device_map: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, or PREFIX=DEVICE,... by module.", rich_help_panel=_WHERE)
    ] = "auto"
    max_memory: Annotated[str | None, typer.Option(help="Limit by device, e.g. 0=22GiB,cpu=16GiB.", rich_help_panel=_WHERE)] = (
        None
    )
    reserve: Annotated[
        str | None,
        typer.Option(help="Keep free on each device; default 1GiB, on a CPU 256MiB.", rich_help_panel=_WHERE),
    ] = None
    max_model_len: Annotated[
        int, typer.Option(help="Tokens that memory is planned for, prompt and answer.", rich_help_panel=_WHERE)
    ] = 4096
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention of transformers, e.g. sdpa or eager.", rich_help_panel=_WHERE)
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_FROM)] = None
    token: Annotated[
        str | None, typer.Option(help="Hub token; better in HF_TOKEN, where no process list shows it.", rich_help_panel=_FROM)
    ] = None
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder of downloads; default that of huggingface_hub.", rich_help_panel=_FROM)
    ] = None
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Ask no network.", rich_help_panel=_FROM)] = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare a saved folder with its manifest first.", rich_help_panel=_FROM)
    ] = False
    cache: Annotated[
        bool, typer.Option("--cache", help="Save what is quantized, and map it the next time.", rich_help_panel=_FROM)
    ] = False
    random_init: Annotated[
        bool,
        typer.Option(
            "--random-init",
            help="Read no weights: draw them as building the model under seed 0 does. Needs only config.json.",
            rich_help_panel=_FROM,
        ),
    ] = False
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Refuse missing and unexpected tensors, or initialize and ignore.",
            rich_help_panel=_FROM,
        ),
    ] = True
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code from the model's folder.", rich_help_panel=_FROM)
    ] = False
    drop_page_cache: Annotated[
        bool,
        typer.Option(
            "--drop-page-cache/--keep-page-cache", help="Give back the file cache that the load fills.", rich_help_panel=_FROM
        ),
    ] = True
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress.", rich_help_panel=_SAYS)
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say only what was asked for.", rich_help_panel=_SAYS)] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: every tensor, and what libraries log.", rich_help_panel=_SAYS)
    ] = False

    def recipe_arguments(self) -> dict[str, Any]:
        """Arguments of `make_recipe`: those of the recipe file, overridden by what was typed.

        Returns:
            Arguments by name.
        Raises:
            UsageError: the recipe file is absent or says something that no recipe says.
        """
        typed = {name: getattr(self, name) for name in RECIPE_FIELDS if getattr(self, name) is not None}
        if self.module_bits:
            typed["module_bits"] = _pairs("--module-bits", ",".join(self.module_bits), "down_proj=8")
        return (read_recipe(self.recipe) if self.recipe else {}) | typed

    def budget_arguments(self) -> dict[str, Any]:
        """Arguments of `make_budget`.

        Returns:
            Arguments by name.
        Raises:
            UsageError: a list without `=`.
        """
        return {
            "device_map": _pairs("--device-map", self.device_map) if "=" in self.device_map else self.device_map,
            "max_memory": _pairs("--max-memory", self.max_memory) if self.max_memory else None,
            "reserve": self.reserve,
            "max_model_len": self.max_model_len,
        }

    def source_arguments(self) -> dict[str, Any]:
        """Arguments of `open_source`.

        Returns:
            Arguments by name.
        """
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of `qlazy.load.load` beside source, recipe and budget.

        Returns:
            Arguments by name.
        """
        names = (
            "dtype",
            "attn_implementation",
            "strict",
            "trust_remote_code",
            "drop_page_cache",
            "random_init",
            "verify",
            "cache",
        )
        return {name: getattr(self, name) for name in names}

    def say(self, text: str = "") -> None:
        """Print on stderr, unless asked to be quiet.

        Args:
            text: One or more lines.
        """
        if not (self.quiet or self.json):
            print(text, file=sys.stderr, flush=True)

    def command(self, verb: str, model: str) -> str:
        """The command line that does `verb` with the same options; a token is left out.

        Args:
            verb: Name of a command.
            model: What was typed as MODEL.
        Returns:
            Words to type.
        """
        words = ["qlazy", verb, model]
        hints = get_type_hints(Options, include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in ("token", "json", "quiet", "verbose"):
                continue
            declared = getattr(hints[field.name].__metadata__[0], "default", ...)
            names = declared.split("/") if isinstance(declared, str) else ["--" + field.name.replace("_", "-")]
            for one in value if isinstance(value, list) else [value]:
                words += [names[0] if one else names[1]] if isinstance(one, bool) else [names[0], str(one)]
        return shlex.join(words)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options: Options` of a command by one flag for every field of `Options`.

    Args:
        command: A function whose other parameters are the command's own.
    Returns:
        The function that typer sees.
    """
    hints = get_type_hints(Options, include_extras=True)
    own = inspect.signature(command, eval_str=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(Options)
    ]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        options = Options(**{f.name: given.pop(f.name) for f in dataclasses.fields(Options)})
        command(**given, options=options)

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in own.parameters.items() if name != "options"]
    call.__signature__ = own.replace(parameters=[*kept, *shared])  # type: ignore[attr-defined]
    return call


def _pairs(flag: str, text: str, example: str = "0=22GiB,cpu=16GiB") -> dict[str, str]:
    """`a=b,c=d` as a dict."""
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(pairs.values()):
        raise UsageError(f"{flag} {text!r} is not a list of NAME=VALUE.", hint=f"E.g. {flag} {example}.")
    return {key.strip(): value.strip() for key, value in pairs.items()}
