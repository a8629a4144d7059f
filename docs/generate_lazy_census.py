"""Every model that is known here, built eagerly and lazily under one seed and compared: writes docs/lazy_census.md.

    python docs/generate_lazy_census.py [--libraries transformers timm ...] [--families bert vit ...] [--results FILE]

All model types of transformers with every class of the auto mappings (of their modules, where those have none), shrunk; one
model for each family of timm and of torchvision; diffusers' models. A library that is not installed is left out, and what
needs one is listed. They go into a folder of their own, so that nothing replaces torch:

    pip install --no-deps --target .cache/census timm diffusers "torchvision==0.28.*" importlib_metadata zipp Pillow
    PYTHONPATH=.cache/census python docs/generate_lazy_census.py

Takes about half an hour. With `--families` it prints what it finds and writes no page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lazy_census.md"
LIBRARIES = ("transformers", "timm", "diffusers", "torchvision")
CHUNK = 25
SECONDS = 900
"""What one model may take; one that takes longer is listed."""
BYTES = 6 << 30
"""What a process may allocate."""
STATUSES = ("equal", "unequal", "unbuildable")


def work(library: str, families: list[str]) -> None:
    """Compare in this process, and print a line of JSON for each model."""
    import contextlib
    import dataclasses
    import resource
    import time
    import warnings

    sys.path.insert(0, str(ROOT))
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        import torch

        from tests.lazy import zoo

        torch.set_num_threads(1)
        for family in families:
            models = list(zoo.builders(library, family))
            if not models:
                nothing = {
                    "status": "unbuildable",
                    "reason": "no model class of its own: part of another model",
                    "differences": [],
                }
                print(json.dumps({"library": library, "family": family, "name": "", **nothing}), file=out, flush=True)
            for name, ways in models:
                started = time.perf_counter()
                result = dataclasses.asdict(zoo.compare_first(ways))
                result["differences"] = result["differences"][:20]
                line = {"library": library, "family": family, "name": name, **result}
                print(json.dumps({**line, "seconds": round(time.perf_counter() - started, 2)}), file=out, flush=True)
            print(json.dumps({"done": family}), file=out, flush=True)


def run(library: str, families: list[str]) -> Iterator[dict[str, Any]]:
    """Compare families in processes of their own; one that kills its process, or hangs, is a result too."""
    left = list(families)
    while left:
        command = [sys.executable, __file__, "--work", library, *left[:CHUNK]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_feed, args=(process, lines), daemon=True).start()
        expected = left[:CHUNK]
        why = "ended its process"
        while expected:
            try:
                line = lines.get(timeout=SECONDS)
            except queue.Empty:
                why = f"took longer than {SECONDS} s"
                break
            if not line:
                break
            result = json.loads(line)
            if "done" in result:
                expected.remove(result["done"])
                left.remove(result["done"])
            else:
                yield result
        process.kill()
        process.wait()
        if expected:
            yield {
                "library": library,
                "family": expected[0],
                "name": "",
                "status": "unequal",
                "reason": why,
                "differences": [why],
            }
            left.remove(expected[0])


def _feed(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")


def page(results: list[dict[str, Any]]) -> str:
    """The page of documentation.

    Args:
        results: What `run` yielded.

    Returns:
        Markdown.
    """
    parts = [
        "# Lazy building against eager construction",
        "Written by `python docs/generate_lazy_census.py`. Each model is built twice under one seed: eagerly, and under "
        "`lazy_build` with `materialize` after it. Compared are the bytes of all parameters, buffers and plain tensor "
        "attributes, dtypes, strides, plain values on modules, which tensors are the same object or share storage, and the "
        "generators' states.",
        _versions(results),
        "## Counts",
        _counts(results),
    ]
    for status, title, text in (
        ("unequal", "Unequal", "Differ from eager construction, or cannot be built lazily."),
        (
            "unbuildable",
            "Left out",
            "Eager construction itself fails from the default config, shrunk or not; or there is no class to build.",
        ),
    ):
        found = [result for result in results if result["status"] == status]
        if found:
            rows = [(result["library"], result["family"], result["name"], _why(result)) for result in found]
            parts += [f"## {title}", text, _table(("library", "family", "model", "why"), rows)]
    loose = [result for result in results if result.get("undetermined") and result["status"] == "equal"]
    if loose:
        rows = [
            (result["library"], result["family"], result["name"], ", ".join(f"`{name}`" for name in result["undetermined"][:3]))
            for result in loose
        ]
        parts += [
            "## Not determined by the seed",
            "Two eager constructions under one seed differ in these, as they leave elements uninitialised or draw without the "
            "seed. Such elements are not compared; all others of the model are.",
            _table(("library", "family", "model", "tensors"), rows),
        ]
    parts += ["## By family", _by_family(results)]
    return "\n\n".join(parts) + "\n"


def _versions(results: list[dict[str, Any]]) -> str:
    libraries = ["torch", *dict.fromkeys(result["library"] for result in results)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    commit = subprocess.run(
        ["git", "describe", "--always", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    changed = ["git", "status", "--porcelain", "qlazy", "tests/lazy"]
    dirty = "-dirty" if subprocess.run(changed, cwd=ROOT, capture_output=True, text=True, check=False).stdout else ""
    return f"Versions: qlazy at {commit.stdout.strip() or 'an unknown commit'}{dirty}, {versions}."


def _counts(results: list[dict[str, Any]]) -> str:
    rows = []
    for library in dict.fromkeys(result["library"] for result in results):
        own = [result for result in results if result["library"] == library]
        counts = Counter(result["status"] for result in own)
        families = {result["family"] for result in own}
        built = {result["family"] for result in own if result["status"] != "unbuildable"}
        tensors = sum(result.get("tensors", 0) for result in own)
        real = sum(len(result.get("real", ())) for result in own)
        rows.append((library, len(families), len(built), len(own), *(counts[status] for status in STATUSES), tensors, real))
    heads = ("library", "families", "of them built", "models", *STATUSES, "tensors compared", "not lazy")
    return _table(heads, rows)


def _by_family(results: list[dict[str, Any]]) -> str:
    rows = []
    for key in dict.fromkeys((result["library"], result["family"]) for result in results):
        own = [result for result in results if (result["library"], result["family"]) == key]
        counts = Counter(result["status"] for result in own)
        rows.append((*key, *(counts[status] or "" for status in STATUSES), sum(result.get("tensors", 0) for result in own)))
    return _table(("library", "family", *STATUSES, "tensors"), rows)


def _why(result: dict[str, Any]) -> str:
    text = result.get("reason") or "; ".join(result["differences"][:2])
    return text.replace("|", "\\|")[:160]


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def main() -> None:
    """Compare what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--results", type=Path, help="lines of JSON; those already there are not compared again")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work[0], options.work[1:])
    sys.path.insert(0, str(ROOT))
    from tests.lazy import zoo

    results = []
    if options.results and options.results.exists():
        results = [json.loads(line) for line in options.results.read_text().splitlines()]
    known = {(result["library"], result["family"]) for result in results}
    for library in options.libraries:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
            continue
        families = [family for family in options.families or zoo.families(library) if (library, family) not in known]
        for result in run(library, families):
            results.append(result)
            if result["status"] != "equal" or options.families:
                print(library, result["family"], result["name"], result["status"], _why(result), flush=True)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    if not options.families:
        PAGE.write_text(page(results))
    print(_counts(results))


if __name__ == "__main__":
    main()
