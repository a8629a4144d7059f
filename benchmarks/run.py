"""Peers side by side: every contender on the same weights, in turn, each in a process of its own.

    python benchmarks/run.py [--model 1.1b] [--rounds 5] [--only NAME]... [--resume] [--cold] [--check]

`--model` is a shape of `checkpoint.py` or `demo`. A round runs all contenders once, so that whatever the machine does meanwhile
meets all of them. Each finished run is written to `benchmarks/results/<model>.json` at once, and `--resume` goes on from there;
the table beside it is `report.py`'s. A contender that is not installed, or that fails, is reported as absent with the reason.

`--check` only runs everybody on a tiny model. That happens before the first round too: it shows who is absent, and lets
libraries that compile at first use do so when no clock runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from child import call
from contenders import CONTENDERS, Inputs
from inputs import write_inputs
from machine import HERE, THREADS, bandwidth, cached_bytes, commit, drop, machine, other_work, versions, warm
from report import write_report

RESULTS = HERE / "results"
PROBES = ("cat", "bandwidth", "quantizers")
"""What is measured beside the contenders: reading the files, reading memory, quantizing from memory."""

QUICK = ("cat", "bandwidth", "quantizers", "qlazy-int4", "qlazy-int8", "qlazy-nf4", "bnb-nf4", "bnb-int8")
FEWER = ("quanto-int4", "quanto-int8", "torchao-int8", "llamacpp-q4_k_m")
"""Run in the first `FEWER_ROUNDS` rounds alone: no goal is measured by them, and some take long."""

FEWER_ROUNDS = 3
TIMEOUT_S = 900
"""Longest that one run may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.1b", help="a shape of checkpoint.py, or demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--only", action="append", metavar="NAME", help=f"repeatable; of {', '.join([*PROBES, *CONTENDERS])}")
    parser.add_argument("--quick", action="store_true", help="qlazy and bitsandbytes alone")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result file has, and do what is missing")
    parser.add_argument("--check", action="store_true", help="run everybody on a tiny model, and stop")
    parser.add_argument("--no-check", action="store_true", help="do not run everybody on a tiny model first")
    parser.add_argument("--name", help="of the result files; default: the model, with -quick or -cold")
    parser.add_argument("--work-dir", type=Path, default=Path.home() / ".cache" / "qlazy" / "benchmarks")
    arguments = parser.parse_args()

    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    wanted = arguments.only or (QUICK if arguments.quick else [*PROBES, *CONTENDERS])
    if unknown := [name for name in wanted if name not in CONTENDERS and name not in PROBES]:
        parser.error(f"no contender {', '.join(unknown)}; there are {', '.join([*PROBES, *CONTENDERS])}")
    if arguments.check:
        for name, reason in check(wanted, arguments.work_dir).items():
            print(f"{name}: {reason or 'runs'}")
        return
    name = arguments.name or arguments.model + "-quick" * arguments.quick + "-cold" * arguments.cold
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text()) if arguments.resume and path.exists() else {"runs": []}
    works = {run["contender"] for run in result["runs"] if "error" not in run}
    checked = {} if arguments.no_check else check([name for name in wanted if name not in works], arguments.work_dir)
    absent = {name: reason for name, reason in checked.items() if reason}
    inputs, made = write_inputs(arguments.model, wanted, absent, arguments.work_dir, arguments.new_tokens)
    names = [n for n in wanted if n not in absent and (n in PROBES or CONTENDERS[n].gguf in ("", *inputs.gguf))]
    result |= {
        "model": arguments.model,
        "cache": "cold" if arguments.cold else "warm",
        "machine": machine(),
        "versions": versions(),
        "settings": {"threads": THREADS, "new_tokens": arguments.new_tokens, "prompts": [*inputs.prompts]},
        "absent": {name: why for name, why in result.get("absent", {}).items() if name not in wanted} | absent,
        "gguf": result.get("gguf", {}) | made,
    }
    todo = remaining(names, arguments.rounds, result["runs"])
    start = time.monotonic()
    for index, (round_, contender) in enumerate(todo):
        run = run_once(contender, inputs, arguments.work_dir, cold=arguments.cold)
        run = {"contender": contender, "round": round_, **run}
        if arguments.model == "demo" and "answer" in run:
            run["answer_text"] = _detokenize(run["answer"], Path(inputs.folder))
        result["runs"] = [r for r in result["runs"] if (r["contender"], r["round"]) != (contender, round_)] + [run]
        _write(path, result)
        left = (time.monotonic() - start) / (index + 1) * (len(todo) - index - 1)
        print(f"round {round_ + 1} {contender}: {_brief(run)}; about {left / 60:.0f} min left", flush=True)
    print(write_report(path))


def remaining(names: list[str], rounds: int, runs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Rounds and names without a finished run, in order; each round begins with another name, so that none is always first."""
    done = {(run["contender"], run["round"]) for run in runs if "error" not in run}
    order = []
    for round_ in range(rounds):
        shift = round_ % max(1, len(names))
        turn = [name for name in names[shift:] + names[:shift] if round_ < FEWER_ROUNDS or name not in FEWER]
        order += [(round_, name) for name in turn if (name, round_) not in done]
    return order


def run_once(contender: str, inputs: Inputs, work_dir: Path, *, cold: bool) -> dict[str, Any]:
    """One run in a process of its own, with what else the machine did meanwhile."""
    files = _files(contender, inputs)
    (drop if cold else warm)(files)
    record: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "file_bytes": sum(file.stat().st_size for file in files),
    }
    cached = cached_bytes(files) if cold else None
    with other_work(record):
        if contender == "cat":
            start = time.perf_counter()
            subprocess.run(["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, files)], check=True)
            record["cat_s"] = time.perf_counter() - start
        elif contender == "bandwidth":
            record |= bandwidth(work_dir)
        else:
            record |= _measure(contender, inputs, work_dir)
    if cached is not None:
        record["page_cache_growth_bytes"] = (cached_bytes(files) or 0) - cached
    return record


def check(names: Sequence[str], work_dir: Path) -> dict[str, str]:
    """By name why a contender cannot run here, or an empty text: each runs once on a tiny model."""
    found = {}
    for name in names:
        if name in CONTENDERS and not _importable(CONTENDERS[name].imports[0]):
            found[name] = f"{CONTENDERS[name].imports[0]} is not installed"
        elif name in CONTENDERS and (library := CONTENDERS[name].library) is not None and not library.is_dir():
            found[name] = f"there is no such build in {library}"
    inputs, _ = write_inputs("tiny", names, found, work_dir, new_tokens=8)
    for name in names:
        if name in found or name in ("cat", "bandwidth"):
            continue
        if name in CONTENDERS and CONTENDERS[name].gguf not in ("", *inputs.gguf):
            continue
        found[name] = _measure(name, inputs, work_dir).get("error", "")
        print(f"check {name}: {found[name] or 'runs'}", file=sys.stderr, flush=True)
    return found


def _measure(name: str, inputs: Inputs, work_dir: Path) -> dict[str, Any]:
    given = work_dir / "inputs.json"
    given.write_text(json.dumps(asdict(inputs)))
    library = CONTENDERS[name].library if name in CONTENDERS else None
    more = {"LLAMA_CPP_LIB_PATH": str(library)} if library else {}
    return call("measure.py", name, str(given), timeout_s=TIMEOUT_S, more=more)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _files(contender: str, inputs: Inputs) -> list[Path]:
    kind = CONTENDERS[contender].gguf if contender in CONTENDERS else ""
    return [Path(inputs.gguf[kind])] if kind else sorted(Path(inputs.folder).glob("*.safetensors"))


def _detokenize(ids: list[int], folder: Path) -> str:
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    return text.split("<|im_end|>")[0].strip()


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def _brief(run: dict[str, Any]) -> str:
    if "error" in run:
        return f"failed: {run['error']}"
    keys = (
        "load_s",
        "load_again_s",
        "prefill_128",
        "prefill_512",
        "decode",
        "cat_s",
        "bandwidth",
        "others_share",
        "answer_text",
    )
    found = {**{key: run[key] for key in keys if key in run}, **{k: v for k, v in run.items() if k.startswith("quantize_")}}
    return ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())


if __name__ == "__main__":
    main()
