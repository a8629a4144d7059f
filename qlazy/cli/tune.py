"""`qlazy tune`: measures the kernels on this machine's GPU and keeps the table that products read from then on."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Json
from qlazy.outfile import replacing, require_writable
from qlazy.products import tuned


@app.command(epilog="Examples:\nqlazy tune\nqlazy tune --device cuda:1\nqlazy tune --output table.json --json")
def tune(
    *,
    device: Annotated[str, typer.Option(help="GPU to measure, as PyTorch names it.")] = "cuda:0",
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default the one that qlazy reads for this GPU.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Measure the kernels on a GPU, some minutes, and write the table that products on it follow."""
    given = None if output is None else require_writable(output)

    from qlazy import tune as measuring

    name = measuring.device_name(device)
    file = given or tuned.user_file(name)
    if given is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        require_writable(file)
    table = measuring.tune(device, on_progress=lambda line: None if json else print(f"Measuring {line}", file=sys.stderr))
    with replacing(file) as made:
        made.write_text(json_module.dumps(table, indent=2) + "\n", encoding="utf-8")
        tuned.read_table(made)
    if json:
        print_json({"schema": 1, "device": name, "path": str(file), "table": table})
    else:
        print(file)
