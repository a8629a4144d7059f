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
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, PROMPT_TOKENS, Inputs
from report import write_report

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "optimum-quanto",
    "torchao",
    "llama-cpp-python",
    "gguf",
    "safetensors",
    "numpy",
)
PROBES = ("cat", "bandwidth", "quantizers")
"""What is measured beside the contenders: reading the files, reading memory, quantizing from memory."""

QUESTION = "What is the capital of France?"
QUICK = ("cat", "bandwidth", "quantizers", "qlazy-int4", "qlazy-int8", "qlazy-nf4", "bnb-nf4", "bnb-int8")
THREADS = 2
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
    absent = {name: reason for name, reason in check(wanted, arguments.work_dir).items() if reason}
    inputs, made = write_inputs(arguments.model, wanted, absent, arguments.work_dir, arguments.new_tokens)
    names = [n for n in wanted if n not in absent and (n in PROBES or CONTENDERS[n].gguf in ("", *inputs.gguf))]
    result |= {
        "model": arguments.model,
        "cache": "cold" if arguments.cold else "warm",
        "machine": machine(),
        "versions": versions(),
        "settings": {"threads": THREADS, "new_tokens": arguments.new_tokens, "prompts": [*inputs.prompts]},
        "absent": absent,
        "gguf": made,
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
        order += [(round_, name) for name in names[shift:] + names[:shift] if (name, round_) not in done]
    return order


def run_once(contender: str, inputs: Inputs, work_dir: Path, *, cold: bool) -> dict[str, Any]:
    """One run in a process of its own, with what else the machine did meanwhile."""
    files = _files(contender, inputs)
    (_drop if cold else _warm)(files)
    record: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "file_bytes": sum(file.stat().st_size for file in files),
    }
    cached = _cached_bytes(files) if cold else 0
    with _other_work(record):
        if contender == "cat":
            start = time.perf_counter()
            subprocess.run(["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, files)], check=True)
            record["cat_s"] = time.perf_counter() - start
        elif contender == "bandwidth":
            record |= bandwidth(work_dir)
        else:
            record |= _measure(contender, inputs, work_dir)
    if cold:
        record["page_cache_growth_bytes"] = _cached_bytes(files) - cached
    return record


def bandwidth(work_dir: Path) -> dict[str, Any]:
    """GB/s that all threads together read from memory, by a C program; without a compiler, by sums in PyTorch."""
    program = work_dir / "bandwidth"
    compiler = shutil.which("cc")
    if compiler is None:
        import torch

        torch.set_num_threads(THREADS)
        data = torch.ones(1 << 27, dtype=torch.int64)
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - start)
        return {"bandwidth": data.nbytes / best / 1e9, "by": "torch"}
    source = HERE / "bandwidth.c"
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "1024", str(THREADS)], check=True, capture_output=True, text=True)
    return {"bandwidth": float(done.stdout), "by": "bandwidth.c"}


def check(names: list[str] | tuple[str, ...], work_dir: Path) -> dict[str, str]:
    """By name why a contender cannot run here, or an empty text: each runs once on a tiny model."""
    found = {}
    for name in names:
        if name in CONTENDERS and not _importable(CONTENDERS[name].imports[0]):
            found[name] = f"{CONTENDERS[name].imports[0]} is not installed"
    inputs, _ = write_inputs("tiny", names, found, work_dir, new_tokens=8)
    for name in names:
        if name in found or name in ("cat", "bandwidth"):
            continue
        if name in CONTENDERS and CONTENDERS[name].gguf not in ("", *inputs.gguf):
            continue
        found[name] = _measure(name, inputs, work_dir).get("error", "")
        print(f"check {name}: {found[name] or 'runs'}", file=sys.stderr, flush=True)
    return found


def write_inputs(
    model: str, names: list[str] | tuple[str, ...], absent: dict[str, str], work_dir: Path, new_tokens: int
) -> tuple[Inputs, dict[str, Any]]:
    """Checkpoint, GGUF files and prompts, those that are there kept; and how the GGUF files were made."""
    import checkpoint

    kinds = {CONTENDERS[n].gguf for n in names if n in CONTENDERS and n not in absent} - {""}
    made: dict[str, Any] = {}
    gguf: dict[str, str] = {}
    if model == "demo":
        folder = checkpoint.write_demo(work_dir / "demo")
        if "shipped" in kinds:
            gguf["shipped"] = str(checkpoint.demo_file())
    else:
        folder = checkpoint.write_checkpoint(work_dir / model, model)
        for kind in sorted(kinds - {"shipped"}):
            target = work_dir / f"{model}.{kind}.gguf"
            # llama.cpp's library in a process of its own: what it takes and does stays out of this one.
            command = [sys.executable, str(HERE / "gguf_files.py"), str(folder), kind, str(target)]
            done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=4 * TIMEOUT_S)
            if done.returncode == 0:
                gguf[kind] = str(target)
                made[kind] = json.loads(done.stdout.splitlines()[-1])
            else:
                absent |= {n: f"no {kind} file: {_last_line(done)}" for n in names if _reads(n, kind)}
        (work_dir / f"{model}.bf16.gguf").unlink(missing_ok=True)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    prompts = {"short": [draw.randrange(10, vocabulary) for _ in range(16)]}
    if model == "demo":
        prompts["short"] = _question(folder)
    for length in (128, PROMPT_TOKENS):
        prompts[str(length)] = [draw.randrange(10, vocabulary) for _ in range(length)]
    return Inputs(folder=str(folder), gguf=gguf, prompts=prompts, new_tokens=new_tokens, threads=THREADS), made


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    processor = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flags = Path("/proc/cpuinfo").read_text()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if flag in flags]
    return {"processor": processor, "cores": os.cpu_count(), "memory_bytes": memory, "instructions": known}


def versions() -> dict[str, str]:
    """Python and what takes part, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _measure(name: str, inputs: Inputs, work_dir: Path) -> dict[str, Any]:
    given = work_dir / "inputs.json"
    given.write_text(json.dumps(asdict(inputs)))
    command = [sys.executable, str(HERE / "measure.py"), name, str(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIMEOUT_S} s"}
    if done.returncode != 0:
        return {"error": _last_line(done)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    threads = str(THREADS)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _reads(name: str, kind: str) -> bool:
    return name in CONTENDERS and CONTENDERS[name].gguf == kind


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _files(contender: str, inputs: Inputs) -> list[Path]:
    kind = CONTENDERS[contender].gguf if contender in CONTENDERS else ""
    return [Path(inputs.gguf[kind])] if kind else sorted(Path(inputs.folder).glob("*.safetensors"))


def _warm(files: list[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _drop(files: list[Path]) -> None:
    os.sync()
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cached_bytes(files: list[Path]) -> int:
    """Bytes of files that are in the page cache, as `fincore` of util-linux counts them."""
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", *map(str, files)], capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split())


@contextlib.contextmanager
def _other_work(record: dict[str, Any]) -> Iterator[None]:
    """Record how much of the processors something else used, or the hypervisor took, while the block ran."""
    before, own_before, start = _cpu_seconds(), _own_seconds(), time.perf_counter()
    yield
    took = (time.perf_counter() - start) * (os.cpu_count() or 1)
    busy, stolen = (after - earlier for after, earlier in zip(_cpu_seconds(), before, strict=True))
    record["others_share"] = max(0.0, busy - (_own_seconds() - own_before)) / took
    record["stolen_share"] = stolen / took


def _cpu_seconds() -> tuple[float, float]:
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, interrupts, soft, stolen = (field / os.sysconf("SC_CLK_TCK") for field in fields)
    return user + nice + system + interrupts + soft, stolen


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def _question(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


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
    keys = ("load_s", "prefill_128", "prefill_512", "decode", "cat_s", "bandwidth", "others_share", "answer_text")
    found = {**{key: run[key] for key in keys if key in run}, **{k: v for k, v in run.items() if k.startswith("quantize_")}}
    return ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())


if __name__ == "__main__":
    main()
