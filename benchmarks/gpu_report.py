"""Tables of what `gpu.py` measured."""

from __future__ import annotations

from typing import Any

MIB, GIB = 1 << 20, 1 << 30
GOALS = {"gemv": 0.65, "prompt": 1.1, "decode": 3.0, "load": 0.7, "host": GIB}
"""Share of the copy bandwidth at one token; time of 4096 tokens against bfloat16; tokens/s against bitsandbytes; rate of a load
against the slower of reading and copying; host memory of a load."""

LOAD_HEAD = ["format", "run", "files", "load, s", "GB/s", "weights, MiB", "device peak - weights", "host peak", "above imports"]
LARGE = ("gate, up", "down", "q, o")
"""Layers that the goals are about; keys and values of grouped attention are too small to fill a GPU."""


def render(result: dict[str, Any]) -> str:
    """All parts as Markdown."""
    gpu, found = result["device"], result["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    lines = [
        f"# qlazy on {gpu['name']}",
        "",
        f"{gpu['memory_bytes'] / GIB:.0f} GiB, {gpu['multiprocessors']} multiprocessors, capability {gpu['capability']}, "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}; {packages}.",
    ]
    for part, table in {"kernels": _kernels, "load": _load, "decode": _decode, "70b": _seventy}.items():
        if part not in result:
            continue
        lines += ["", f"## {part}", "", f"Commit {result[part]['commit']}, {result[part]['took_s']:.0f} s."]
        if "error" in result[part]:
            lines += ["", f"**Not complete**: {result[part]['error']}"]
        lines += table(result[part], result)
    return "\n".join(lines) + "\n"


def verdict(met: bool) -> str:
    """A word for a goal."""
    return "met" if met else "**missed**"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])] if rows else []


def _kernels(part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    rows = part.get("rows", [])
    if not rows:
        return []
    best = part["ceilings"]
    lines = [
        "",
        f"Ceilings of this run: copy within the device {best['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written), "
        f"from locked host memory {best['upload_bytes_per_s'] / 1e9:.1f} GB/s, bfloat16 product of 8192 x 8192 x 8192 "
        f"{best['matmul_flops'] / 1e12:.0f} TFLOP/s. Times in microseconds; at one token the share of the copy's bandwidth, "
        "at the most tokens the share of the product's rate. `*`: by events, not captured in a graph.",
    ]
    tokens = sorted({row["tokens"] for row in rows})
    for label in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == label]
        table = []
        for name in dict.fromkeys(row["name"] for row in here):
            own = {row["tokens"]: row for row in here if row["name"] == name}
            times = [_microseconds(own.get(n)) for n in tokens]
            first, last = own.get(1), own.get(tokens[-1])
            table.append(
                [
                    name,
                    *times,
                    f"{100 * first['bytes_per_s'] / best['copy_bytes_per_s']:.0f} %" if first else "-",
                    f"{100 * last['flops'] / best['matmul_flops']:.0f} %" if last else "-",
                ]
            )
        lines += ["", f"### {label}: {here[0]['rows']} x {here[0]['columns']}"]
        lines += _table(["", *(f"M = {n}" for n in tokens), "bandwidth, M = 1", f"rate, M = {tokens[-1]}"], table)
    lines += _kernel_goals(rows, best["copy_bytes_per_s"])
    if part.get("absent"):
        lines += ["", *(f"- {what}: {why}" for what, why in part["absent"].items())]
    return lines


def _microseconds(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['seconds'] * 1e6:.1f}{'*' if row['how'] == 'events' else ''}"


def _kernel_goals(rows: list[dict[str, Any]], copy: float) -> list[str]:
    large = [row for row in rows if row["shape"].partition(" ")[2] in LARGE]
    times = {(row["shape"], row["name"], row["tokens"]): row["seconds"] for row in large}
    lines = [""]
    for name in dict.fromkeys(row["name"] for row in large if row["name"].startswith("qlazy")):
        own = [row for row in large if row["name"] == name]
        shares = [row["bytes_per_s"] / copy for row in own if row["tokens"] == 1]
        words = []
        if shares:
            words.append(f"bandwidth at M = 1 from {min(shares):.2f} of the copy's ({verdict(min(shares) >= GOALS['gemv'])})")
        for peer in ("bitsandbytes nf4", "tinygemm int4 g128"):
            ratios = [
                times[row["shape"], peer, row["tokens"]] / row["seconds"]
                for row in own
                if row["tokens"] <= 16 and (row["shape"], peer, row["tokens"]) in times
            ]
            if ratios:
                words.append(
                    f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as {peer} up to M = 16 ({verdict(min(ratios) > 1)})"
                )
        slower = [
            row["seconds"] / times[row["shape"], "bf16", 4096]
            for row in own
            if row["tokens"] == 4096 and (row["shape"], "bf16", 4096) in times
        ]
        if slower:
            words.append(f"up to {max(slower):.2f} of bf16's time at M = 4096 ({verdict(max(slower) <= GOALS['prompt'])})")
        lines.append(f"- {name}, large layers: {'; '.join(words)}.")
    return lines


def _load(part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    rows = [row for row in part.get("rows", []) if "seconds" in row]
    lines = _table(LOAD_HEAD, [_load_row(row) for row in rows])
    upload = result.get("kernels", {}).get("ceilings", {}).get("upload_bytes_per_s")
    again = [row["bytes_per_s"] for row in rows if row["run"] == "again" and row["cache"] == "warm"]
    if upload and again and "read_bytes_per_s" in part:
        slower = min(upload, part["read_bytes_per_s"])
        lines += [
            "",
            f"Eight threads read the cached files at {part['read_bytes_per_s'] / 1e9:.1f} GB/s; with the copy rate above the "
            f"slower is {slower / 1e9:.1f} GB/s. Once kernels were compiled, reading and quantizing ran at "
            f"{min(again) / slower:.2f} to {max(again) / slower:.2f} of it ({verdict(min(again) >= GOALS['load'] * slower)}).",
        ]
    return lines + _bounds(rows)


def _bounds(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    over = max(row["device_requested_peak_bytes"] - row["weight_bytes"] - row["planned_staging_bytes"] for row in rows)
    host = max(row["host_peak_above_import_bytes"] for row in rows)
    return [
        "",
        f"Asked for on the device: weights and three chunks, up to {over / MIB:+.1f} MiB ({verdict(over <= 16 * MIB)}); the "
        f"table has what PyTorch's allocator makes of it, which rounds up. Host peak: up to {host / MIB:.0f} MiB above the "
        f"imports, with CUDA's context and compiled kernels ({verdict(host < GOALS['host'])}).",
    ]


def _load_row(row: dict[str, Any]) -> list[str]:
    return [
        row["format"],
        row["run"],
        row["cache"],
        f"{row['seconds']:.2f}",
        f"{row['bytes_per_s'] / 1e9:.1f}",
        f"{row['weight_bytes'] / MIB:.0f}",
        f"{(row['device_peak_bytes'] - row['weight_bytes']) / MIB:.1f}",
        f"{row['host_peak_bytes'] / MIB:.0f}",
        f"{row['host_peak_above_import_bytes'] / MIB:.0f}",
    ]


def _decode(part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    peer = part.get("peer", {})
    rows = [*part.get("rows", []), *peer.get("rows", [])]
    compiled = [f"{row['compile_s']:.0f}" if "compile_s" in row else "" for row in rows]
    table = [[r["format"], r["how"], f"{r['tokens_per_s']:.1f}", c] for r, c in zip(rows, compiled, strict=True)]
    lines = _table(["", "how", "tokens/s", "compiled in, s"], table)
    ours = [row["tokens_per_s"] for row in part.get("rows", []) if row["format"] == "int4"]
    theirs = [row["tokens_per_s"] for row in peer.get("rows", [])]
    if ours and theirs:
        ratio = max(ours) / theirs[0]
        lines += ["", f"{ratio:.2f} times transformers with bitsandbytes ({verdict(ratio >= GOALS['decode'])})."]
    if "seconds" in peer:
        lines += [
            "",
            f"transformers with bitsandbytes loads in {peer['seconds']:.1f} s, "
            f"host peak {peer['host_peak_bytes'] / MIB:.0f} MiB, device peak {peer['device_peak_bytes'] / MIB:.0f} MiB.",
        ]
    if "not_compiled" in part:
        lines += ["", f"Not compiled: {part['not_compiled']}"]
    if "error" in peer:
        lines += ["", f"Of the peer: {peer['error']}"]
    return lines


def _seventy(part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    rows = [row for row in part.get("rows", []) if "seconds" in row]
    lines = _table(LOAD_HEAD, [_load_row(row) for row in rows])
    for row in part.get("rows", []):
        if "tokens_per_s" in row:
            lines += ["", f"Its weights are zeros, read from holes. It generates {row['tokens_per_s']:.1f} tokens/s."]
    return lines + _bounds(rows)
