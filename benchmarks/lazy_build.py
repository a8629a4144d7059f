"""What lazy building costs: models too large for this machine built and read in parts, and 0.75B drawn straight into low bits.

    python benchmarks/lazy_build.py [--rounds 3] [--only 70b ...]

Each measurement is in a process of its own, round after round; the median counts. Writes benchmarks/results/lazy.json and .md.
Nothing is read from disk or the network, except that the 0.75B model that was built eagerly is written and read back once, to
compare bytes. Takes five minutes, 3 GB of memory and 1.5 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import THREADS, commit, machine, other_work, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MIB = 1 << 20
SEED = 0
DRAWS = 70_000_000_000
"""Values of a model of 70B, and so about the words that its construction draws."""
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""0.75B: 84 linear layers, a head and an embedding."""
FORMATS = ("int4", "nf4")


def build_70b() -> dict[str, Any]:
    """Build it; then the key projection and the largest matrix of its last layer, alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, found = _build(LlamaForCausalLM, LlamaConfig(**LLAMA_70B))
    last = model.model.layers[-1]
    for name, linear in {"k_proj": last.self_attn.k_proj, "down_proj": last.mlp.down_proj}.items():
        found |= {f"{name}_{key}": value for key, value in _materialize(linear.weight).items()}
    return found


def build_671b() -> dict[str, Any]:
    """Build DeepSeek-V3, whose shape is its config class's default."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return _build(DeepseekV3ForCausalLM, DeepseekV3Config())[1]


def jump() -> dict[str, Any]:
    """The state of a generator so many draws ahead, as the first jump of a process."""
    import torch

    from qlazy.lazy.mt19937 import advance

    state = torch.Generator().manual_seed(SEED).get_state()
    start = time.perf_counter()
    advance(state, DRAWS)
    return {"jump_s": time.perf_counter() - start}


def drawn(name: str) -> dict[str, Any]:
    """Draw the 0.75B model straight into a format."""
    import torch

    import qlazy
    from qlazy.planning.plan import RING_BYTES

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_1B))
        torch.manual_seed(SEED)
        start = time.perf_counter()
        model = qlazy.load_quantized(folder, format=name, device_map="cpu", random_init=True)
        seconds = time.perf_counter() - start
    report: Any = model.qlazy_report
    largest = max(2 * tensor.numel() for tensor in _shapes())
    return {
        "drawn_s": seconds,
        "digest": _digest(model),
        "peak_bytes": report.host_peak_bytes,
        "weight_bytes": sum(report.device_bytes.values()),
        "limit_bytes": sum(report.device_bytes.values()) + RING_BYTES + 64 * MIB + largest,
    }


def eager(name: str) -> dict[str, Any]:
    """Build the 0.75B model eagerly, and quantize its linear layers from memory, in as many threads as a load takes."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import qlazy
    from qlazy.layers.quant_linear import QuantLinear

    torch.manual_seed(SEED)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
    found = {"eager_s": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantized = qlazy.load_quantized(folder, format=name, device_map="cpu")
    found["digest"] = _digest(quantized)
    work = []
    for key, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear):
            weight = model.get_submodule(key).weight.detach()
            step = max(64, MIB // weight.shape[1] // 64 * 64)
            work += [(layer, first, weight[first : first + step]) for first in range(0, weight.shape[0], step)]
            layer.allocate("cpu")

    def quantize(item: tuple[Any, int, Any]) -> None:
        torch.set_num_threads(1)
        layer, first, rows = item
        with torch.no_grad():
            layer.fill(rows, first)

    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(quantize, work))
        found["quantize_s"] = time.perf_counter() - start
    return found


MEASUREMENTS: dict[str, Any] = {
    "70b": build_70b,
    "671b": build_671b,
    "jump": jump,
    **{f"{verb.__name__} {name}": lambda verb=verb, name=name: verb(name) for name in FORMATS for verb in (drawn, eager)},
}


def _build(cls: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from qlazy.lazy import lazy_build
    from qlazy.memory import Meter

    # What libraries put off until their first use is not the model's: its own class, in a small shape.
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    with lazy_build():
        cls(type(config)(**config.to_dict() | small))
    torch.manual_seed(SEED)
    with Meter(interval_s=0.002) as meter:
        start = time.perf_counter()
        with lazy_build() as build:
            model = cls._from_config(config, dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    assert all(parameter.is_meta for parameter in model.parameters())
    return model, {
        "build_s": seconds,
        "growth_bytes": meter.peak_bytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ops": build.report().ops,
    }


def _materialize(weight: Any) -> dict[str, Any]:
    from qlazy.lazy import materialize
    from qlazy.memory import Meter

    with Meter(interval_s=0.002) as meter:
        start = time.perf_counter()
        materialize(weight)
        seconds = time.perf_counter() - start
    return {"s": seconds, "bytes": weight.nbytes, "growth_bytes": meter.peak_bytes}


def _shapes() -> list[Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return list(LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).parameters())


def _digest(model: Any) -> str:
    """Of all that the model holds, low-bit storage included."""
    import torch

    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, layer in model.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    digest = hashlib.sha256()
    for key in sorted(found):
        digest.update(key.encode())
        digest.update(found[key].detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def summary(runs: list[dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """What was to be shown, the goal, what was measured, and whether it is met.

    Args:
        runs: Every run of every measurement, with the measurement's name under `of`.
    Returns:
        Rows of a table.
    """

    def values(of: str, key: str) -> list[Any]:
        return [run[key] for run in runs if run["of"] == of]

    def median(of: str, key: str) -> float:
        return statistics.median(values(of, key))

    rows: list[tuple[str, str, str, bool]] = []

    def less(what: str, of: str, key: str, goal: float, unit: str = "s", scale: float = 1) -> None:
        if values(of, key):
            measured = median(of, key) / scale
            rows.append((what, f"< {goal:g} {unit}", f"{measured:.3g} {unit}", measured < goal))

    less("Llama-70B shape, built", "70b", "build_s", 3)
    less("its memory growth", "70b", "growth_bytes", 64, "MiB", MIB)
    less("DeepSeek-V3-671B shape, built", "671b", "build_s", 8)
    less("its memory growth", "671b", "growth_bytes", 64, "MiB", MIB)
    less("last layer's k_proj of the 70B alone (16 MiB)", "70b", "k_proj_s", 2)
    less("last layer's down_proj of the 70B alone (448 MiB)", "70b", "down_proj_s", 2)
    less("jump over 70e9 draws", "jump", "jump_s", 0.5)
    for name in FORMATS:
        of, other = f"drawn {name}", f"eager {name}"
        if values(of, "drawn_s") and values(other, "eager_s"):
            digests = set(values(of, "digest")) | set(values(other, "digest"))
            same = "the same" if len(digests) == 1 else f"{len(digests)} different"
            rows.append((f"0.75B to {name}: bytes", "those of the eager model, quantized", same, len(digests) == 1))
            peak, limit = max(values(of, "peak_bytes")) / MIB, min(values(of, "limit_bytes")) / MIB
            goal = f"<= {limit:.0f} MiB: packed + ring + 64 MiB + one tensor"
            rows.append((f"0.75B to {name}: peak", goal, f"{peak:.0f} MiB", peak <= limit))
            both = median(other, "eager_s") + median(other, "quantize_s")
            took = median(of, "drawn_s")
            goal = f"<= 1.2 x ({median(other, 'eager_s'):.2f} s eager + {median(other, 'quantize_s'):.2f} s quantization)"
            rows.append((f"0.75B to {name}: time", goal, f"{took:.2f} s = {took / both:.2f} x", took <= 1.2 * both))
    return rows


def render(result: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {goal} | {found} | {'met' if met else '**missed**'} |"
        for what, goal, found, met in summary(result["runs"])
    ]
    kept = result["machine"]
    counts = {run["of"]: sum(other["of"] == run["of"] for other in result["runs"]) for run in result["runs"]}
    noisy = sum(run["others_share"] > 0.05 for run in result["runs"])
    return (
        "# Lazy building\n\n"
        f"Written by `python benchmarks/lazy_build.py` at {result['commit']}. {kept['processor']}, {kept['cores']} cores, "
        f"{kept['memory_bytes'] / 2**30:.0f} GiB, {THREADS} threads; torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}. Medians of {min(counts.values())} runs, each a process of its own; peaks are "
        f"the highest. Other work took more than 5 % of the processors in {noisy} of {len(result['runs'])} runs.\n\n"
        + "\n".join(lines)
        + "\n\nBuilding is counted without imports. Peaks are anonymous memory above the start. Eager construction draws with "
        "one thread, as PyTorch does; drawing straight into low bits jumps ahead, and draws in as many as there are.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--name", default="lazy", help="of the result files")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure]()))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), str(HERE.parent / "kernels"), environment.get("PYTHONPATH", "")]
    )
    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "versions": versions(), "runs": []}
    for number in range(arguments.rounds):
        for name in arguments.only:
            record: dict[str, Any] = {"of": name, "round": number}
            command = [sys.executable, __file__, "--measure", name]
            with other_work(record):
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr}")
            result["runs"].append(record | json.loads(done.stdout.splitlines()[-1]))
            print(name, {key: value for key, value in result["runs"][-1].items() if key != "digest"}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(render(result))
    print(render(result))


if __name__ == "__main__":
    main()
