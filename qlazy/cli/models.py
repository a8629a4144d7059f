"""`qlazy models`: the short names that MODEL may be."""

from __future__ import annotations

import dataclasses

from qlazy import configs
from qlazy.cli.app import app, print_json
from qlazy.cli.arguments import Json


@app.command(epilog="Examples:\nqlazy models\nqlazy models --json")
def models(*, json: Json = False) -> None:
    """List the aliases: short names that MODEL may be."""
    aliases = configs.aliases()
    if json:
        print_json({"schema": 1, "models": [{"name": name} | dataclasses.asdict(a) for name, a in aliases.items()]})
        return
    rows = [[name, alias.id, "gated" if alias.gated else "", alias.note] for name, alias in aliases.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
