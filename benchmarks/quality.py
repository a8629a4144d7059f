"""What each format costs in quality: KL divergence from the 16-bit model, at bits per weight counted to the byte.

    python benchmarks/quality.py [--seed 7] [--only int4-g32-asym nf4] [--heads] [--json FILE]

The model is the demo model with its channels shuffled (`shuffle_channels.py` says why), its weights rounded to bfloat16.
Every row replaces the weight of each Linear layer (the head is kept) by what the format makes of it, rounded to bfloat16;
everything is computed in float32, the reference too. The text, the windows and the figures are those of `qlazy ppl`: KL is the
mean over predicted tokens in nats with its standard error, told by blocks of 32 tokens; the difference to NF4 is paired token
by token, which takes most of the noise out.

`--heads` asks what an output head costs: a copy of the model whose head is a tensor of its own, with the head in 16 bits and in
several formats, and the difference to 16 bits paired in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from shuffle_channels import save_shuffled_demo
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.measuring.estimate import mean
from qlazy.measuring.logits import record_logits
from qlazy.measuring.quality import score, summarize
from qlazy.measuring.windows import TEXT, cut
from qlazy.quantizing.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

BASELINE = "nf4"
PLAIN = "bfloat16"
"""Nothing is quantized."""
HEADS = (PLAIN, "int8-g64", "int8-channel", "int4-g32-asym", "nf4")
"""What an output head is measured in; the first is what the others are compared with."""
BODIES = (PLAIN, "int8-channel", "int4-g32-asym", "nf4")
"""What the other layers are in meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    """Format, and how its codes were chosen."""
    head: str
    """Format of the output head."""
    head_bytes: int
    """Stored bytes of the output head."""
    bits_per_weight: float
    """Stored bits of all Linear weights but the head, scales and zeros included, over their number."""
    kl: float
    """Mean of KL(16-bit || quantized) over the predicted tokens, in nats."""
    kl_error: float
    """Standard error of that mean."""
    less_than_baseline: float
    """Mean of the paired difference KL(baseline) - KL(this); the baseline is NF4, or the same layers with a head in 16 bits."""
    less_than_baseline_error: float
    """Standard error of that difference."""
    perplexity: float
    """Of the text."""
    same_top: float
    """Share of tokens for which the most likely next token is the 16-bit model's."""
    squared_error: float
    """Sum of squared weight errors over the sum of squared weights."""
    quantize_seconds: float
    """Time to quantize and dequantize all weights."""


def methods() -> dict[str, tuple[Format, Callable[[Tensor, Any], Tensor]]]:
    """Format and quantize-dequantize function of every row, by the row's name; NF4 comes first."""
    rows: dict[str, tuple[Format, Callable[[Tensor, Any], Tensor]]] = {
        BASELINE: (Codebook4(kind="nf4", double_quant=False), _bitsandbytes),
        "nf4-dq": (Codebook4(kind="nf4", double_quant=True), _bitsandbytes),
        "fp4": (Codebook4(kind="fp4", double_quant=False), _bitsandbytes),
    }
    for symmetric in (True, False):
        for group_size in (32, 64, 128):
            fmt = Int4(group_size=group_size, symmetric=symmetric)
            rows[f"{fmt.name} plain rounding"] = (fmt, _plain_int4)
            rows[fmt.name] = (fmt, _searched_int4)
    for group_size in (-1, 128, 64):
        rows[Int8(group_size=group_size).name] = (Int8(group_size=group_size), _int8)
    return rows


@torch.no_grad()
def measure(folder: Path, names: list[str], heads: tuple[str, ...] = (PLAIN,)) -> Iterator[Row]:
    """Yield one row for each name and head.

    Args:
        folder: Shuffled model in bfloat16 with its tokenizer.
        names: Rows of `methods()`; the baseline has to come first.
        heads: Formats of the output head, which must not be tied where there is more than one: the first is then the baseline.

    Yields:
        Rows in the order of `names`, for each of them those of `heads`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = cut(AutoTokenizer.from_pretrained(folder), TEXT.read_text("utf-8"))
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    weights = {n: m.weight.to(torch.bfloat16) for n, m in linears.items()}
    head_weight = head.weight.to(torch.bfloat16)
    elements = sum(w.numel() for w in weights.values())
    reference = record_logits(model, windows)
    perplexity = summarize(score(model, windows), windows).perplexity.value
    print(f"{windows.tokens} predicted tokens; 16-bit perplexity {perplexity:.3f}; {elements:,} weights", flush=True)

    baseline: Tensor | None = None
    for name, head_name in itertools.product(names, heads):
        nbytes, squares, total, start = 0, 0.0, 0.0, time.perf_counter()
        for key, weight in weights.items():
            nbytes += _set(linears[key], weight, name)
        seconds = time.perf_counter() - start
        head_bytes = _set(head, head_weight, head_name)
        if len(heads) > 1 and head_name == heads[0]:
            baseline = None
        for key, weight in weights.items():
            squares += float((linears[key].weight - weight).square().sum())
            total += float(weight.to(torch.float32).square().sum())
        scores = score(model, windows, reference)
        quality = summarize(scores, windows)
        assert scores.kl is not None and quality.kl_mean is not None and quality.same_top is not None
        baseline = scores.kl if baseline is None else baseline
        less = mean(baseline - scores.kl, windows.blocks)
        yield Row(
            name=name,
            head=head_name,
            head_bytes=head_bytes,
            bits_per_weight=nbytes * 8 / elements,
            kl=quality.kl_mean.value,
            kl_error=quality.kl_mean.error,
            less_than_baseline=less.value,
            less_than_baseline_error=less.error,
            perplexity=quality.perplexity.value,
            same_top=quality.same_top.value,
            squared_error=squares / total,
            quantize_seconds=seconds,
        )


def _set(linear: Any, weight: Tensor, name: str) -> int:
    """Give a layer the weight that a row of `methods()` makes of `weight`; its stored bytes."""
    if name == PLAIN:
        linear.weight.copy_(weight)
        return weight.nbytes
    fmt, roundtrip = methods()[name]
    used = fmt.for_columns(weight.shape[1])
    linear.weight.copy_(roundtrip(weight, used))
    return sum(s.nbytes for s in used.storage(*weight.shape, "bfloat16").values())


def _bitsandbytes(weight: Tensor, fmt: Codebook4) -> Tensor:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=fmt.kind, compress_statistics=fmt.double_quant)
    return bnb.dequantize_4bit(codes, state)


def _searched_int4(weight: Tensor, fmt: Int4) -> Tensor:
    codes, scale, zero = quantize_int4(weight, group_size=fmt.group_size, symmetric=fmt.symmetric, scale_dtype=torch.bfloat16)
    return dequantize_int4(codes, scale, zero, torch.bfloat16)


def _plain_int4(weight: Tensor, fmt: Int4) -> Tensor:
    """Minimum and maximum on the outermost codes, everything rounded to nearest: what the search has to beat."""
    rows, columns = weight.shape
    grouped = weight.to(torch.float32).view(rows, -1, columns if fmt.group_size == -1 else fmt.group_size)
    if fmt.symmetric:
        scale = (grouped.abs().amax(2) / 7).to(torch.bfloat16)
        zero = torch.full_like(scale, 8).to(torch.uint8)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / 15).to(torch.bfloat16)
        zero = (-low / scale.to(torch.float32)).round().clamp(0, 15).to(torch.uint8)
    codes = (grouped / scale.to(torch.float32).unsqueeze(2)).round() + zero.unsqueeze(2)
    return dequantize_int4(
        codes.clamp(0, 15).to(torch.uint8).view(rows, columns), scale, None if fmt.symmetric else zero, torch.bfloat16
    )


def _int8(weight: Tensor, fmt: Int8) -> Tensor:
    q, scale = quantize_int8(weight, group_size=fmt.group_size, scale_dtype=torch.bfloat16)
    return dequantize_int8(q, scale, torch.bfloat16)


def main() -> None:
    """Print the table in Markdown, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description="KL divergence and bits per weight of every format on the shuffled demo model."
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of the channel shuffle")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "qlazy" / "benchmarks")
    parser.add_argument("--only", nargs="+", choices=list(methods()), help="rows to measure; nf4 is always measured")
    parser.add_argument("--heads", action="store_true", help="measure what an untied output head costs in each format")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    names = [name for name in methods() if not arguments.only or name in arguments.only or name == BASELINE]
    folder = arguments.cache_dir / f"demo-shuffled-{arguments.seed}{'-untied' if arguments.heads else ''}"
    save_shuffled_demo(folder, seed=arguments.seed, untied=arguments.heads)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    for row in measure(folder, list(BODIES), HEADS) if arguments.heads else measure(folder, names):
        if not rows and arguments.heads:
            print("\n| Layers | Head | Head, MiB | KL, nats | Above a head in 16 bits by | Perplexity | Same top |")
            print("|---|---|---|---|---|---|---|")
        elif not rows:
            print("\n| Format | Bits per weight | KL, nats | Below NF4 by | Perplexity | Same top | Squared error |")
            print("|---|---|---|---|---|---|---|")
        rows.append(row)
        kl = f"{row.kl:.4f} ± {row.kl_error:.4f}"
        if arguments.heads:
            cells = [row.name, row.head, f"{row.head_bytes / 2**20:.1f}", kl]
            cells += [f"{0 - row.less_than_baseline:+.4f} ± {row.less_than_baseline_error:.4f}"]
            cells += [f"{row.perplexity:.2f}", f"{row.same_top:.1%}"]
        else:
            cells = [row.name, f"{row.bits_per_weight:.3f}", kl]
            cells += [f"{row.less_than_baseline:+.4f} ± {row.less_than_baseline_error:.4f}"]
            cells += [f"{row.perplexity:.2f}", f"{row.same_top:.1%}", f"{row.squared_error:.3e}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
