"""Planned against measured bytes: weights, and the peak of a load followed by a prompt and answer of the planned length.

    python benchmarks/plan.py [MODEL ...]

Models are whatever qlazy opens; by default the demo model and random Llamas of 0.3B and 1.1B. Each is measured in a process of
its own, after all imports. Prints a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 512
"""Tokens that are planned for, prompt and answer."""


def measure(model_id: str, bits: int) -> dict[str, int]:
    """Plan from headers, load, prompt and answer; in this process."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import qlazy.load
    from qlazy.memory import Meter

    plan = qlazy.plan(model_id, bits=bits, device_map="cpu", max_model_len=TOKENS)
    with Meter() as meter:
        model = qlazy.load_quantized(model_id, bits=bits, device_map="cpu", max_model_len=TOKENS)
        prompt = torch.randint(10, 1000, (1, TOKENS - 8))
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    weights = sum(model.qlazy_report.device_bytes.values())
    return {"weights": plan.weight_bytes, "measured": weights, "total": plan.total_bytes, "peak": meter.peak_bytes}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return

    from checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="qlazy-bench-") as folder:
        made = [] if sys.argv[1:] else [str(write_checkpoint(Path(folder, shape), shape)) for shape in ("0.3b", "1.1b")]
        print("| model | bits | weights: planned MiB | measured MiB | difference | total: planned MiB | peak MiB |")
        print("|---|---|---|---|---|---|---|")
        for model_id in sys.argv[1:] or ["demo", *made]:
            for bits in (4, 8):
                command = [sys.executable, __file__, "--measure", model_id, str(bits)]
                environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found = json.loads(done.stdout.splitlines()[-1])
                mib = {key: f"{value / 2**20:.1f}" for key, value in found.items()}
                off = f"{100 * (found['weights'] / found['measured'] - 1):+.3f} %"
                name = Path(model_id).name
                print(f"| {name} | {bits} | {mib['weights']} | {mib['measured']} | {off} | {mib['total']} | {mib['peak']} |")


if __name__ == "__main__":
    main()
