"""How load time and memory grow with the model: random Llamas of 0.3B to 13B to int4, from a cold and from a warm page cache.

    python benchmarks/scaling.py [--shapes 0.3b 1.1b 3b 13b] [--runs 3] [--resume]

Each load is in a process of its own, and then answers a few tokens. Writes benchmarks/results/scaling.json, .md and .png. The
13B checkpoint takes 26 GB on disk; what this program writes it deletes again. A checkpoint that the memory cannot cache is only
read cold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from checkpoint import write_checkpoint
from contenders import Inputs
from machine import THREADS, machine, versions
from run import RESULTS, run_once

SHAPES = ("0.3b", "1.1b", "3b", "13b")
CONTENDER = "qlazy-int4"
NEW_TOKENS = 8
LIMIT_13B = int(7.5 * 2**30)
"""What a load of the 13B shape may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result file has, and do what is missing")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints that this program writes")
    parser.add_argument("--name", default="scaling", help="of the result files")
    parser.add_argument("--work-dir", type=Path, default=Path.home() / ".cache" / "qlazy" / "benchmarks")
    arguments = parser.parse_args()

    path = RESULTS / f"{arguments.name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if arguments.resume and path.exists() else {"runs": []}
    result |= {"machine": machine(), "versions": versions()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for shape in arguments.shapes:
        done = {(run["cache"], run["run"]) for run in result["runs"] if run["shape"] == shape and "error" not in run}
        todo = [(cache, run) for run in range(arguments.runs) for cache in ("cold", "warm") if (cache, run) not in done]
        if not todo:
            continue
        folder = arguments.work_dir / shape
        found_there = folder.exists()
        try:
            write_checkpoint(folder, shape)
            inputs = Inputs(folder=str(folder), prompts={"short": list(range(10, 26))}, new_tokens=NEW_TOKENS, threads=THREADS)
            for cache, run in todo:
                if cache == "warm" and _file_bytes(folder) > memory / 2:
                    continue
                record = run_once(CONTENDER, inputs, arguments.work_dir, cold=cache == "cold")
                record = {"shape": shape, "cache": cache, "run": run, **record}
                key = (shape, cache, run)
                result["runs"] = [r for r in result["runs"] if (r["shape"], r["cache"], r["run"]) != key] + [record]
                RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(shape, cache, record.get("error") or f"{record['load_s']:.1f} s", flush=True)
        finally:
            if not found_there and not arguments.keep:
                shutil.rmtree(folder, ignore_errors=True)
    text = render(result)
    path.with_suffix(".md").write_text(text)
    print(text)
    plot(result, path.with_suffix(".png"))


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians by shape and cache, in the order of size."""
    rows = []
    good = [run for run in result["runs"] if "error" not in run]
    sizes = {run["shape"]: run["file_bytes"] for run in good}
    for cache in ("cold", "warm"):
        for shape in sorted(sizes, key=sizes.__getitem__):
            runs = [run for run in good if run["shape"] == shape and run["cache"] == cache]
            if runs:
                keys = ("file_bytes", "load_s", "weight_bytes", "anonymous_peak_bytes", "total_peak_bytes", "decode")
                medians = {key: statistics.median(run[key] for run in runs) for key in keys}
                grown = [run["page_cache_growth_bytes"] for run in runs if "page_cache_growth_bytes" in run]
                medians["page_cache_growth_bytes"] = max(grown, default=None)
                rows.append({"shape": shape, "cache": cache, "runs": len(runs), **medians})
    return rows


def render(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = summary(result)
    commits = sorted({run["commit"] for run in result["runs"]})
    lines = [
        "# Load time and memory by size of the model, qlazy int4",
        "",
        f"{result['machine']['processor']}, {result['machine']['cores']} cores, "
        f"{result['machine']['memory_bytes'] / 2**30:.0f} GiB; torch {result['versions']['torch']}; qlazy at commit "
        f"{', '.join(commits)}. Medians; peaks are of the load, above what the imports took.",
        "",
        "| shape | page cache | runs | files, GB | load, s | s a GB | weights, MiB | anonymous peak, MiB "
        "| above the weights, MiB | page cache grew by, MiB | decode, tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gigabytes, peak, weights = row["file_bytes"] / 1e9, row["anonymous_peak_bytes"], row["weight_bytes"]
        grown = "-" if row["page_cache_growth_bytes"] is None else f"{row['page_cache_growth_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row['shape']} | {row['cache']} | {row['runs']} | {gigabytes:.1f} | {row['load_s']:.2f} "
            f"| {row['load_s'] / gigabytes:.3f} | {weights / 2**20:.0f} | {peak / 2**20:.0f} | {(peak - weights) / 2**20:.0f} "
            f"| {grown} | {row['decode']:.2f} |"
        )
    large = [run["anonymous_peak_bytes"] for run in result["runs"] if run["shape"] == "13b" and "error" not in run]
    if large:
        verdict = "met" if max(large) < LIMIT_13B else "**missed**"
        lines += ["", f"13B: highest peak {max(large) / 2**30:.2f} GiB, to be under {LIMIT_13B / 2**30:.1f} GiB: {verdict}."]
    failed = [run for run in result["runs"] if "error" in run]
    lines += (
        ["", *[f"- {run['shape']} {run['cache']}, run {run['run'] + 1}: {run['error']}" for run in failed]] if failed else []
    )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory over the size of the files."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = summary(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for cache, marker in (("cold", "o"), ("warm", "s")):
        chosen = [row for row in rows if row["cache"] == cache]
        if not chosen:
            continue
        sizes = [row["file_bytes"] / 1e9 for row in chosen]
        left.plot(sizes, [row["load_s"] for row in chosen], marker=marker, label=f"{cache} page cache")
        right.plot(sizes, [row["anonymous_peak_bytes"] / 2**30 for row in chosen], marker=marker, label=f"{cache} page cache")
    for row in (row for row in rows if row["cache"] == "cold"):
        left.annotate(
            row["shape"], (row["file_bytes"] / 1e9, row["load_s"]), textcoords="offset points", xytext=(-4, 6), ha="right"
        )
    weights = sorted({(row["file_bytes"] / 1e9, row["weight_bytes"] / 2**30) for row in rows})
    right.plot(*zip(*weights, strict=True), color="gray", linestyle="--", label="packed weights")
    left.set(xlabel="bfloat16 files, GB", ylabel="load to int4, s", xlim=0, ylim=0)
    right.set(xlabel="bfloat16 files, GB", ylabel="peak of host memory, GiB", xlim=0, ylim=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
