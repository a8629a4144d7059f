"""What quantization costs: perplexity, and how far the predictions are from those of the 16-bit model, as llama.cpp tells them.

Every token of a text is predicted from those before it in its window; windows do not overlap. Figures are computed in float64
from the logits that the models give, and each comes with its standard error, told by blocks of `BLOCK_TOKENS` tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlazy.errors import QlazyError, UsageError
from qlazy.measuring.estimate import Estimate, exponential_of_mean, mean, quantile, root_mean_square
from qlazy.measuring.logits import ComputedLogits, Logits, RecordedLogits
from qlazy.measuring.windows import BLOCK_TOKENS, CONTEXT_LENGTH, TEXT, Windows, cut
from qlazy.report import align

_ROWS_ELEMENTS = 1 << 21
"""Numbers of a few rows of logits that are made float64 at once: 16 MiB."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One number a predicted token, float64 on the host. The last four need a reference."""

    nll: Tensor
    """Negative log-likelihood of the token, in nats."""
    reference_nll: Tensor | None = None
    """The same under the reference."""
    kl: Tensor | None = None
    """KL(reference || model) of the predictions, in nats."""
    same_top: Tensor | None = None
    """1 where the likeliest token is the reference's, else 0."""
    delta_p: Tensor | None = None
    """Probability of the token, less that under the reference."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model makes of a text. All but the perplexity needs a reference, and is None without."""

    tokens: int
    """Predicted tokens."""
    windows: int
    """Pieces that the text was read in."""
    context_length: int
    """Tokens of a window at most."""
    block_tokens: int
    """Tokens of a block, by which standard errors are told."""
    perplexity: Estimate
    """e to the mean negative log-likelihood of a token."""
    reference_perplexity: Estimate | None = None
    """The same of the reference."""
    perplexity_ratio: Estimate | None = None
    """The first over the second; its error is paired token by token."""
    kl_mean: Estimate | None = None
    """Mean of KL(reference || model), in nats."""
    kl_99: Estimate | None = None
    """Its 99th percentile."""
    same_top: Estimate | None = None
    """Share of tokens at which the likeliest token is the reference's."""
    delta_p_mean: Estimate | None = None
    """Mean change of the right token's probability."""
    delta_p_rms: Estimate | None = None
    """Root mean square of that change."""


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    context_length: int = CONTEXT_LENGTH,
    max_tokens: int | None = None,
    reference: PreTrainedModel | RecordedLogits | None = None,
) -> Quality:
    """Measure a causal language model on a text, alone or against another one.

        model, plain = qlazy.load_quantized("org/name"), AutoModelForCausalLM.from_pretrained("org/name")
        print(qlazy.perplexity(model, AutoTokenizer.from_pretrained("org/name"), reference=plain).kl_mean)

    Args:
        model: The model, quantized or not.
        tokenizer: Its tokenizer.
        text: Some prose; by default what comes with qlazy.
        context_length: Tokens of a window.
        max_tokens: Tokens of the text that are used at most.
        reference: What to compare with: a model, or the logits that `qlazy.measuring.logits.record_logits` took of one on the
            same windows, so that it need not be in memory any more.
    Returns:
        The figures, each with its standard error.
    Raises:
        UnsupportedModel: the model does not predict the next token.
        UsageError: the text is too short, the windows are too long, or the two models have different vocabularies.

    Memory: beside the models, activations and logits of one window for each, and 128 MiB to compare them.
    """
    windows = cut(tokenizer, TEXT.read_text("utf-8") if text is None else text, context_length, max_tokens)
    logits = ComputedLogits(reference, windows) if isinstance(reference, PreTrainedModel) else reference
    return summarize(score(model, windows, logits), windows, context_length)


def score(
    model: PreTrainedModel,
    windows: Windows,
    reference: Logits | None = None,
    *,
    on_window: Callable[[int], None] | None = None,
) -> Scores:
    """Say of each token of a text how well it is predicted.

    Args:
        model: The model.
        windows: The windows of the text.
        reference: Logits of the model to compare with, on the same windows.
        on_window: Called with the number of windows read.
    Returns:
        Numbers of each predicted token.
    Raises:
        UnsupportedModel: the model does not predict the next token.
        UsageError: the reference has another vocabulary.
        QlazyError: a prediction is not a number.

    Memory: activations and logits of one window, and a few rows in float64.
    """
    computed, found = ComputedLogits(model, windows), []
    for number, targets in enumerate(windows.targets):
        logits = computed[number]
        expected = None if reference is None else reference[number].to(logits.device)
        if expected is not None and expected.shape != logits.shape:
            raise UsageError(
                f"The reference predicts {expected.shape[0]} times {expected.shape[1]} tokens, the model {logits.shape[0]} "
                f"times {logits.shape[1]}.",
                hint="Compare models with the same tokenizer and vocabulary, on the same text.",
            )
        rows = max(1, _ROWS_ELEMENTS // logits.shape[-1])
        for first in range(0, len(targets), rows):
            part = slice(first, first + rows)
            found.append(_compare(logits[part], targets[part], None if expected is None else expected[part]))
        if on_window is not None:
            on_window(number + 1)
    columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    for name, values in columns.items():
        if bool(values.isnan().any()):
            raise QlazyError(
                f"{int(values.isnan().sum())} of {len(values)} predictions are not numbers ({name}).",
                hint="Try --dtype float32: activations may be too large for 16 bits.",
            )
    return Scores(**columns)


def summarize(scores: Scores, windows: Windows, context_length: int = CONTEXT_LENGTH) -> Quality:
    """The figures of a text from the numbers of its tokens.

    Args:
        scores: Of each token.
        windows: The windows that they are of.
        context_length: Tokens of a window at most.
    Returns:
        The figures.
    """
    blocks = windows.blocks
    alone = Quality(
        tokens=windows.tokens,
        windows=len(windows.ids),
        context_length=context_length,
        block_tokens=BLOCK_TOKENS,
        perplexity=exponential_of_mean(scores.nll, blocks),
    )
    if scores.kl is None or scores.reference_nll is None or scores.same_top is None or scores.delta_p is None:
        return alone
    return dataclasses.replace(
        alone,
        reference_perplexity=exponential_of_mean(scores.reference_nll, blocks),
        perplexity_ratio=exponential_of_mean(scores.nll - scores.reference_nll, blocks),
        kl_mean=mean(scores.kl, blocks),
        kl_99=quantile(scores.kl, blocks, 0.99),
        same_top=mean(scores.same_top, blocks),
        delta_p_mean=mean(scores.delta_p, blocks),
        delta_p_rms=root_mean_square(scores.delta_p, blocks),
    )


def table(quality: Quality) -> str:
    """The figures as a person reads them.

    Args:
        quality: What was measured.
    Returns:
        Lines of text without a final newline.
    """
    percent = [None if e is None else e.scaled(100) for e in (quality.same_top, quality.delta_p_mean, quality.delta_p_rms)]
    rows: list[tuple[str, Estimate | None, int, str]] = [
        ("Perplexity", quality.perplexity, 3, ""),
        ("Perplexity of the reference", quality.reference_perplexity, 3, ""),
        ("Ratio of the two", quality.perplexity_ratio, 4, ""),
        ("KL divergence, mean", quality.kl_mean, 5, " nats"),
        ("KL divergence, 99th percentile", quality.kl_99, 5, " nats"),
        ("Same top token", percent[0], 2, " %"),
        ("Δp, mean", percent[1], 3, " %"),
        ("Δp, root mean square", percent[2], 3, " %"),
    ]
    lines = align([[name, f"{e.value:.{digits}f} ± {e.error:.{digits}f}{unit}"] for name, e, digits, unit in rows if e])
    many = "" if quality.windows == 1 else "s"
    return (
        f"{lines}\n{quality.tokens:,} tokens predicted, in {quality.windows} window{many} of up to {quality.context_length}; "
        f"± one standard error, by blocks of {quality.block_tokens} tokens."
    )


def to_json(quality: Quality) -> dict[str, Any]:
    """The figures as plain data: probabilities and shares between 0 and 1; `schema` is the version of this layout.

    Args:
        quality: What was measured.
    Returns:
        A JSON-ready dict.
    """
    return {"schema": 1, **dataclasses.asdict(quality)}


def _compare(logits: Tensor, targets: Tensor, expected: Tensor | None) -> dict[str, Tensor]:
    """The fields of `Scores` for some tokens."""
    where = targets.unsqueeze(1).to(logits.device)
    got = logits.to(torch.float64).log_softmax(-1)
    of_target = got.gather(1, where).squeeze(1)
    found = {"nll": -of_target}
    if expected is not None:
        wanted = expected.to(torch.float64).log_softmax(-1)
        wanted_of_target = wanted.gather(1, where).squeeze(1)
        p = wanted.exp()
        # What the reference holds for impossible adds nothing, however little the model makes of it.
        found["kl"] = torch.where(p == 0, 0.0, p * (wanted - got)).sum(-1)
        found["reference_nll"] = -wanted_of_target
        found["same_top"] = (logits.argmax(-1) == expected.argmax(-1)).to(torch.float64)
        found["delta_p"] = of_target.exp() - wanted_of_target.exp()
    return {name: values.cpu() for name, values in found.items()}
