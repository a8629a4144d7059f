"""On which text a save calibrates, and what it tells of that. No torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlazy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text whose tokens go through a model while it is quantized."""

    file: str | Path | None = None
    """A text in UTF-8; None: the model writes its own."""
    random_tokens: bool = False
    """Tokens drawn at random in place of a text: nothing has to be written, and the model need not fit."""
    samples: int = 64
    """Sequences of tokens."""
    sequence_length: int = 512
    """Tokens of each."""
    seed: int = 0
    """Of the random numbers by which the model chooses its words, or tokens are drawn."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.samples < 1 or self.sequence_length < 2:
            raise UsageError(
                f"{self.samples} samples of {self.sequence_length} tokens are no text.",
                hint="Use at least --samples 1 and --sequence-length 2.",
            )
        if self.random_tokens and self.file is not None:
            raise UsageError(f"Tokens drawn at random are not those of {self.file}.", hint="Leave one of the two out.")

    def text(self) -> str | None:
        """What the file holds.

        Returns:
            The text; None where there is no file.
        Raises:
            UsageError: it cannot be read, or is not UTF-8.

        Memory: the text.
        """
        if self.file is None:
            return None
        try:
            return Path(self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{self.file} cannot be read: {error.strerror or error}.", hint="Give --calibration-file a text file."
            ) from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.file} is not UTF-8: {error.reason} at byte {error.start}.", hint="Convert it.") from None

    def told(self) -> dict[str, Any]:
        """What decides the bytes that are made, for keys and manifests.

        Returns:
            Data for JSON: of a file its hash, and no seed, as nothing is drawn then.

        Memory: the text.
        """
        told: dict[str, Any] = {"samples": self.samples, "sequence_length": self.sequence_length}
        text = self.text()
        if text is None:
            return told | {"text": "random tokens" if self.random_tokens else "its own", "seed": self.seed}
        return told | {"text": hashlib.sha256(text.encode()).hexdigest()}


@dataclass(kw_only=True)
class Calibrated:
    """What was calibrated, and what not and why."""

    sequences: int = 0
    """Sequences of tokens."""
    tokens: int = 0
    """Tokens in all."""
    blocks: int = 0
    """Blocks that were walked through now; what an earlier attempt has written is not walked through again."""
    weights: int = 0
    """Weights that were calibrated, of these blocks."""
    plain: dict[str, str] = field(default_factory=dict)
    """Names of those that were quantized without, and why: of these blocks, and all outside of blocks."""

    def __str__(self) -> str:
        """A few lines, as a person reads them."""
        lines = [f"Calibrated: {self.weights:,} weights in {self.blocks} blocks, on {self.sequences} x {self.tokens} tokens."]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.plain.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"Not calibrated: {some} ({reason}).")
        return "\n".join(lines)
