"""Measure a loaded model as llama-bench does: tokens per second of reading a prompt, and of generating after it.

Torch is imported when something is measured, so that the command line stays quick.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from qlazy.errors import UnsupportedModel, UsageError
from qlazy.memory import Meter
from qlazy.report import LoadReport
from qlazy.sizes import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["prompt", "generation"]
"""Whether tokens are read all at once, or generated one after the other."""

PREFIXES: dict[Kind, str] = {"prompt": "pp", "generation": "tg"}
"""What llama-bench's names of tests begin with."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One test: the same work, timed some times."""

    kind: Kind
    """What was done with the tokens."""
    tokens: int
    """How many tokens each time."""
    seconds: tuple[float, ...]
    """Seconds that each repetition took."""

    @property
    def test(self) -> str:
        """Its name as llama-bench has it, e.g. `pp512` or `tg128`."""
        return f"{PREFIXES[self.kind]}{self.tokens}"

    @property
    def tokens_per_s(self) -> float:
        """Mean of the repetitions' rates."""
        return statistics.fmean(self._rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of the repetitions' rates; 0 for a single one."""
        return statistics.stdev(self._rates) if len(self.seconds) > 1 else 0.0

    @property
    def _rates(self) -> list[float]:
        return [self.tokens / seconds for seconds in self.seconds]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured of one model on one machine."""

    model: str
    """What was asked for."""
    format: str
    """Format of its layers, or the target that theirs were chosen for."""
    weight_bytes: int
    """Bytes of all weights and buffers, measured."""
    parameters: int
    """Numbers that the stored weights stand for."""
    device: str
    """Devices that hold weights."""
    threads: int
    """Threads that torch computes with on the host."""
    timings: tuple[Timing, ...]
    """The tests, in the order in which they ran."""
    load_seconds: float
    """Seconds of the load, from the plan to the finished model."""
    load_peak_bytes: int
    """Peak of host memory while loading, above the start of the load."""
    run_peak_bytes: int
    """Peak of host memory in the warm-up runs, above the start of the load."""
    device_peak_bytes: dict[str, int]
    """Peak of memory allocated on each GPU."""


def measure(
    model: PreTrainedModel,
    *,
    prompt_tokens: Sequence[int] = (512,),
    gen_tokens: Sequence[int] = (128,),
    repetitions: int = 5,
    on_test: Callable[[str], None] | None = None,
) -> Benchmark:
    """Time a model at batch 1: prompts of random tokens, and generation from a single one with a cache.

    Each test runs once to warm up, which is when memory is sampled, and then `repetitions` times on the clock.

    Args:
        model: A model that qlazy has loaded.
        prompt_tokens: Lengths of prompts; only the last token's logits are computed.
        gen_tokens: Numbers of tokens to generate.
        repetitions: How often each test is timed.
        on_test: Called with the name of each test before it begins.
    Returns:
        The rates, and what the load took.
    Raises:
        UnsupportedModel: the model does not generate text.
        UsageError: the model has fewer positions than a test needs.

    Memory: the KV cache of the longest test, and the activations of the longest prompt.
    """
    _require_text(model, max([*prompt_tokens, *gen_tokens]))
    report: LoadReport = cast(Any, model).qlazy_report
    tests: list[tuple[Kind, int]] = [*(("prompt", n) for n in prompt_tokens), *(("generation", n) for n in gen_tokens)]
    timings, peaks = [], []
    for kind, tokens in tests:
        if on_test is not None:
            on_test(f"{PREFIXES[kind]}{tokens}")
        run = _work(model, kind, tokens)
        with Meter() as meter:
            _seconds(model, run)
        peaks.append(meter.baseline_bytes + meter.peak_bytes - report.samples[0][1])
        timings.append(Timing(kind=kind, tokens=tokens, seconds=tuple(_seconds(model, run) for _ in range(repetitions))))
    return summarize(report, tuple(timings), run_peak_bytes=max(peaks))


def summarize(report: LoadReport, timings: tuple[Timing, ...], *, run_peak_bytes: int) -> Benchmark:
    """Put what was timed beside what the load told.

    Args:
        report: The report of the load.
        timings: The tests.
        run_peak_bytes: Peak of host memory while they ran.
    Returns:
        The benchmark.
    """
    import torch

    plan = report.plan
    return Benchmark(
        model=plan.model_id,
        format=plan.recipe.name,
        weight_bytes=sum(report.device_bytes.values()),
        parameters=sum(math.prod(tensor.shape) for tensor in plan.tensors if tensor.source_nbytes),
        device=", ".join(sorted({tensor.device for tensor in plan.tensors})),
        threads=torch.get_num_threads(),
        timings=timings,
        load_seconds=report.seconds["total"],
        load_peak_bytes=report.host_peak_bytes,
        run_peak_bytes=run_peak_bytes,
        device_peak_bytes={device: torch.cuda.max_memory_allocated(device) for device in report.device_peak_bytes},
    )


def table(benchmark: Benchmark) -> str:
    """A benchmark as a Markdown table, to read and to paste, and a line on the load.

    Args:
        benchmark: What was measured.
    Returns:
        Lines of text without a final newline.
    """
    unit, scale = ("B", 1e9) if benchmark.parameters >= 1e9 else ("M", 1e6)
    fixed = (
        benchmark.model,
        benchmark.format,
        format_bytes(benchmark.weight_bytes),
        f"{benchmark.parameters / scale:.1f} {unit}",
        benchmark.device,
        str(benchmark.threads),
    )
    rows = [("model", "format", "size", "params", "device", "threads", "test", "tokens/s")]
    rows += [(*fixed, timing.test, f"{timing.tokens_per_s:.2f} ± {timing.deviation:.2f}") for timing in benchmark.timings]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    peaks = [f"host memory up to {format_bytes(benchmark.load_peak_bytes)} while loading"]
    peaks += [f"{format_bytes(benchmark.run_peak_bytes)} while running"]
    peaks += [f"{device} up to {format_bytes(nbytes)}" for device, nbytes in benchmark.device_peak_bytes.items()]
    return "\n".join([*lines, "", f"Loaded in {benchmark.load_seconds:.2f} s; {', '.join(peaks)}."])


def to_json(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark as plain data: bytes are ints, `schema` is the version of this layout.

    Args:
        benchmark: What was measured.
    Returns:
        A JSON-ready dict.
    """
    data = {"schema": 1, **dataclasses.asdict(benchmark)}
    data["timings"] = [
        {
            "test": timing.test,
            "kind": timing.kind,
            "tokens": timing.tokens,
            "batch": 1,
            "seconds": list(timing.seconds),
            "tokens_per_s": timing.tokens_per_s,
            "deviation": timing.deviation,
        }
        for timing in benchmark.timings
    ]
    return data


def _require_text(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a model that does not continue text, or not as much of it."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} does not continue text, so there is nothing to time.",
            hint="A benchmark needs a causal language model.",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UsageError(
            f"A test needs {tokens} positions; {type(model).__name__} has {positions}.", hint="Ask for fewer tokens."
        )


def _work(model: PreTrainedModel, kind: Kind, tokens: int) -> Callable[[], object]:
    """What is timed: one pass over a prompt of random tokens, or as many steps of transformers' own `generate` as tokens."""
    import torch

    called: Any = model
    vocabulary = called.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens if kind == "prompt" else 1), generator=generator).to(model.device)
    if kind == "prompt":
        # Logits of the last token, as `generate` asks for, where the model can be asked.
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(called.forward).parameters else {}
        return lambda: called(input_ids=ids, use_cache=True, **options)
    # Greedy, and no token ends it early.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    lengths = {"max_new_tokens": tokens, "max_length": None, "eos_token_id": None, "pad_token_id": 0}
    return lambda: called.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **greedy, **lengths)


def _seconds(model: PreTrainedModel, run: Callable[[], object]) -> float:
    import torch

    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else int
    with torch.inference_mode():
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - began
