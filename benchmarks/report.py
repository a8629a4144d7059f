"""The table of a run, and what it says about the goals.

    python benchmarks/report.py benchmarks/results/1.1b.json

Reads the JSON that `run.py` writes, and writes the Markdown file beside it. Everything is a median over rounds, with the lowest
and the highest in brackets. Ratios are ratios of medians.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import CONTENDERS

QUIET_SHARE = 0.05
"""Part of the processors that others may take during a run before the table warns."""


NOTES = (
    "Load: from the call to a model that takes tokens, after all imports; what a library puts off until its first use shows",
    "in the first prompt. Peaks are of the load, above what the imports took: anonymous memory, and all that is resident with",
    "mapped files. llama.cpp opens a file that is quantized already, in the way that its library chooses; all others read",
    "bfloat16 and quantize. Everybody has its defaults, and nothing is compiled with `torch.compile`.",
)


class NotMeasured(Exception):
    """A figure that the runs do not hold."""


class Figures:
    """Medians and spreads of a result.

    Args:
        result: What `run.py` wrote.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.good = [run for run in result["runs"] if "error" not in run]

    def values(self, contender: str, key: str) -> list[float]:
        """One value for each finished run.

        Raises:
            NotMeasured: there is none.
        """
        found = [run[key] for run in self.good if run["contender"] == contender and key in run]
        if not found:
            raise NotMeasured(f"{contender} {key}")
        return found

    def __call__(self, contender: str, key: str) -> float:
        """The median."""
        return statistics.median(self.values(contender, key))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of what must be shown."""

    text: str
    """What is compared."""
    value: Callable[[Figures], float]
    """The ratio."""
    at_most: float | None = None
    """It must not be above this."""
    at_least: float | None = None
    """It must not be below this."""

    def met(self, value: float) -> bool:
        """Whether a value reaches the goal."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


def _ratio(key: str, above: str, below: str) -> Callable[[Figures], float]:
    return lambda figures: figures(above, key) / figures(below, key)


def _of_reading_and_quantizing(bits: str) -> Callable[[Figures], float]:
    return lambda f: f(f"qlazy-{bits}", "load_s") / (f("cat", "cat_s") + f("quantizers", f"quantize_{bits}_s"))


def decode_bandwidth(figures: Figures, contender: str) -> float:
    """GB/s of weights read while decoding."""
    return figures(contender, "token_bytes") * figures(contender, "decode") / 1e9


def _of_bandwidth(contender: str) -> Callable[[Figures], float]:
    return lambda figures: decode_bandwidth(figures, contender) / figures("bandwidth", "bandwidth")


def _memory_over_promise(contender: str) -> Callable[[Figures], float]:
    def ratio(f: Figures) -> float:
        promised = f(contender, "weight_bytes") + f(contender, "ring_bytes") + (64 << 20)
        return max(f.values(contender, "anonymous_peak_bytes")) / promised

    return ratio


def _decode_goals(bits: str, kind: str) -> list[Goal]:
    """Against both builds of llama.cpp and the memory, plain and through `--compile`."""
    against = {
        f"llama.cpp {kind.upper()} without AMX": f"llamacpp-{kind}-noamx",
        f"llama.cpp {kind.upper()}": f"llamacpp-{kind}",
    }
    found = []
    for ours, how in ((f"qlazy-{bits}", ""), (f"qlazy-{bits}-compiled", " compiled")):
        found += [
            Goal(text=f"decode, {bits}{how} / {title}", value=_ratio("decode", ours, peer), at_least=1)
            for title, peer in against.items()
        ]
        text = f"decode, {bits}{how}: weights read / read bandwidth"
        found.append(Goal(text=text, value=_of_bandwidth(ours), at_least=0.7))
    return found


GOALS = (
    Goal(text="load, int4 / bitsandbytes NF4", value=_ratio("load_s", "qlazy-int4", "bnb-nf4"), at_most=0.1),
    Goal(text="load, int8 / bitsandbytes int8", value=_ratio("load_s", "qlazy-int8", "bnb-int8"), at_most=0.125),
    Goal(text="load again, int8 / bitsandbytes int8", value=_ratio("load_again_s", "qlazy-int8", "bnb-int8"), at_most=0.125),
    Goal(text="load, NF4 / bitsandbytes NF4", value=_ratio("load_s", "qlazy-nf4", "bnb-nf4"), at_most=0.25),
    Goal(text="load, int4 / (`cat` + quantizing from memory)", value=_of_reading_and_quantizing("int4"), at_most=1.5),
    Goal(text="highest anonymous peak / (weights + ring + 64 MiB), int4", value=_memory_over_promise("qlazy-int4"), at_most=1),
    Goal(text="the same, int8", value=_memory_over_promise("qlazy-int8"), at_most=1),
    Goal(text="the same, NF4", value=_memory_over_promise("qlazy-nf4"), at_most=1),
    *(goal for bits, kind in (("int4", "q4_0"), ("int8", "q8_0")) for goal in _decode_goals(bits, kind)),
    Goal(
        text="prompt of 512, int4 / llama.cpp Q4_0 without AMX",
        value=_ratio("prefill_512", "qlazy-int4", "llamacpp-q4_0-noamx"),
        at_least=2,
    ),
    Goal(text="the same, with AMX", value=_ratio("prefill_512", "qlazy-int4", "llamacpp-q4_0"), at_least=2),
    Goal(text="prompt of 512, int4 / bfloat16", value=_ratio("prefill_512", "qlazy-int4", "bf16"), at_least=0.6),
)
"""What the engine must show on the 1.1B shape with a warm cache."""


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    figures = Figures(result)
    lines = [_title(result), "", *_circumstances(figures), ""]
    lines += _table(
        figures,
        [
            "load, s",
            "load again, s",
            "read, GB/s",
            "weights, MiB",
            "anonymous peak, MiB",
            "total peak, MiB",
            "of the whole run, MiB",
            "first prompt of 128, s",
        ],
        [
            _spread("load_s", "{:.2f}"),
            _spread("load_again_s", "{:.2f}"),
            lambda f, n: f"{f(n, 'file_bytes') / f(n, 'load_s') / 1e9:.2f}",
            _mib("weight_bytes"),
            _mib("anonymous_peak_bytes"),
            _mib("total_peak_bytes"),
            _mib("run_peak_bytes"),
            _spread("first_prompt_128_s", "{:.2f}"),
        ],
    )
    lines += [
        "",
        "Load again: in the same process, when the first model is gone. What is imported late is there then, and memory too,",
        "which the host of a virtual machine may give slower than its own kernel does (below). Peaks are of the first load,",
        "above what the imports took: anonymous memory, and all that is resident with mapped files.",
    ]
    lines += ["llama.cpp loads files that are quantized already; all others read bfloat16 and quantize.", ""]
    lines += _table(
        figures,
        ["prompt of 128, tokens/s", "prompt of 512, tokens/s", "decode, tokens/s", "weights read decoding, GB/s"],
        [
            _spread("prefill_128", "{:.1f}"),
            _spread("prefill_512", "{:.1f}"),
            _spread("decode", "{:.2f}"),
            lambda f, n: f"{decode_bandwidth(f, n):.2f}",
        ],
    )
    lines += ["", *_probes(figures)]
    if result["model"] == "demo":
        lines += ["", "## Answers", "", *_answers(figures)]
    elif result["cache"] == "warm":
        lines += ["", "## Goals", "", *_goals(figures)]
    if result.get("absent") or any("error" in run for run in result["runs"]):
        lines += ["", "## Absent", "", *_absent(result)]
    return "\n".join(lines) + "\n"


def write_report(path: Path) -> str:
    """Render a result file into the Markdown file beside it, and return the text."""
    text = render(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    return text


def _title(result: dict[str, Any]) -> str:
    what = "The demo model" if result["model"] == "demo" else f"A random Llama of {result['model'].upper()}, bfloat16"
    return f"# {what}: {result['cache']} page cache"


def _circumstances(figures: Figures) -> list[str]:
    result, runs = figures.result, figures.result["runs"]
    machine = result["machine"]
    rounds = sorted({run["round"] for run in runs})
    times = sorted(run["started"] for run in runs)
    commits = sorted({run["commit"] for run in runs})
    others = max((run["others_share"] for run in runs), default=0.0)
    stolen = max((run["stolen_share"] for run in runs), default=0.0)
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory; {result['settings']['threads']} threads for everybody.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        f"qlazy at commit {', '.join(commits)}. Rounds: {len(rounds)}, {times[0]} to {times[-1]}; each contender at most "
        f"once a round, in a process of its own. Of the processors' time, other programs took at most {others:.0%} during a "
        f"run, and the hypervisor {stolen:.0%}.",
    ]
    if others > QUIET_SHARE:
        busy = sum(run["others_share"] > QUIET_SHARE for run in runs)
        lines.append(
            f"**The machine was busy with other work during {busy} of {len(runs)} runs: these are not figures to quote.**"
        )
    return [f"{line}  " for line in lines]


def _table(figures: Figures, heads: list[str], cells: list[Callable[[Figures, str], str]]) -> list[str]:
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, contender in CONTENDERS.items():
        if not any(run["contender"] == name for run in figures.good):
            continue
        row = []
        for cell in cells:
            try:
                row.append(cell(figures, name))
            except NotMeasured:
                row.append("-")
        lines.append(f"| {contender.title} | " + " | ".join(row) + " |")
    return lines


def _spread(key: str, form: str) -> Callable[[Figures, str], str]:
    def cell(figures: Figures, name: str) -> str:
        values = figures.values(name, key)
        low, high = form.format(min(values)), form.format(max(values))
        return f"{form.format(figures(name, key))} ({low} - {high})"

    return cell


def _mib(key: str) -> Callable[[Figures, str], str]:
    return lambda figures, name: f"{figures(name, key) / 2**20:.0f}"


def _probes(figures: Figures) -> list[str]:
    lines = []
    for contender, key, text in (
        ("cat", "cat_s", "`cat` of the checkpoint's files: {} s."),
        ("quantizers", "quantize_int4_s", "Quantizing its linear weights from memory: int4 {} s,"),
        ("quantizers", "quantize_int8_s", "int8 {} s,"),
        ("quantizers", "quantize_nf4_s", "NF4 {} s."),
        ("bandwidth", "bandwidth", "Read bandwidth: {} GB/s."),
        ("bandwidth", "fresh", "Fresh pages of memory are filled at {} GB/s."),
    ):
        try:
            lines.append(text.format(_spread(key, "{:.2f}")(figures, contender)))
        except NotMeasured:
            continue
    for kind, made in figures.result.get("gguf", {}).items():
        took = f", quantized in {made['quantize_s']:.0f} s" if "quantize_s" in made else ""
        lines.append(
            f"{kind.upper()} file: {made['bytes'] / 2**20:.0f} MiB, embedding {made['embedding']}, head {made['head']}{took}."
        )
    builds: dict[str, str] = {}
    for run in (run for run in figures.good if "build" in run):
        builds.setdefault(_instructions(run["build"]), run["contender"])
    if builds:
        lines.append("llama.cpp is compiled with " + "; ".join(f"{used} ({name})" for used, name in builds.items()) + ".")
    return [" ".join(lines)] if lines else []


def _instructions(build: str) -> str:
    """The names of what a build of llama.cpp uses, from lines such as `CPU : AVX = 1 | FMA = 1 | `."""
    pairs = [part.split("=") for part in build.partition(":")[2].split("|") if "=" in part]
    return " ".join(name.strip() for name, value in pairs if value.strip() == "1")


def _goals(figures: Figures) -> list[str]:
    lines = ["| | measured | goal | |", "|---|---|---|---|"]
    for goal in GOALS:
        bound = f"<= {goal.at_most:g}" if goal.at_most is not None else f">= {goal.at_least:g}"
        try:
            value = goal.value(figures)
        except NotMeasured as missing:
            lines.append(f"| {goal.text} | no figure for {missing} | {bound} | not measured |")
            continue
        lines.append(f"| {goal.text} | {value:.3f} | {bound} | {'met' if goal.met(value) else '**missed**'} |")
    return lines


def _answers(figures: Figures) -> list[str]:
    lines = ["| | Paris in the answer | answer |", "|---|---|---|"]
    for name, contender in CONTENDERS.items():
        texts = [run["answer_text"] for run in figures.good if run["contender"] == name and "answer_text" in run]
        if texts:
            right = sum("Paris" in text for text in texts)
            shown = " ".join(texts[-1].split()).replace("|", "\\|")
            lines.append(f"| {contender.title} | {right} of {len(texts)} | {shown} |")
    return lines


def _absent(result: dict[str, Any]) -> list[str]:
    reasons = dict(result.get("absent", {}))
    good = {run["contender"] for run in result["runs"] if "error" not in run}
    reasons |= {run["contender"]: run["error"] for run in result["runs"] if "error" in run and run["contender"] not in good}
    lines = []
    for name, reason in reasons.items():
        title = CONTENDERS[name].title if name in CONTENDERS else name
        lines.append(f"- {title}: {reason}")
    failed = [run for run in result["runs"] if "error" in run and run["contender"] in good]
    lines += [f"- {run['contender']}, round {run['round'] + 1} only: {run['error']}" for run in failed]
    return lines


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
