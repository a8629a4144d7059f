"""What every contender is given, the same for all: checkpoint, GGUF files, prompts. What is there already is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
from child import call
from contenders import CONTENDERS, PROMPT_TOKENS, Inputs
from machine import THREADS

QUESTION = "What is the capital of France?"
CONVERT_TIMEOUT_S = 3600


def write_inputs(
    model: str, names: Sequence[str], absent: dict[str, str], work_dir: Path, new_tokens: int
) -> tuple[Inputs, dict[str, Any]]:
    """Checkpoint, GGUF files and prompts, those that are there kept; and how the GGUF files were made."""
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
            found = call("gguf_files.py", str(folder), kind, str(target), timeout_s=CONVERT_TIMEOUT_S)
            if "error" in found:
                absent |= {n: f"no {kind} file: {found['error']}" for n in names if _reads(n, kind)}
            else:
                gguf[kind], made[kind] = str(target), found
        (work_dir / f"{model}.bf16.gguf").unlink(missing_ok=True)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    prompts = {"short": [draw.randrange(10, vocabulary) for _ in range(16)]}
    if model == "demo":
        prompts["short"] = _question(folder)
    for length in (128, PROMPT_TOKENS):
        prompts[str(length)] = [draw.randrange(10, vocabulary) for _ in range(length)]
    return Inputs(folder=str(folder), gguf=gguf, prompts=prompts, new_tokens=new_tokens, threads=THREADS), made


def _reads(name: str, kind: str) -> bool:
    return name in CONTENDERS and CONTENDERS[name].gguf == kind


def _question(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
