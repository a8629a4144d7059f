"""What is counted while recording."""

from __future__ import annotations

from collections import Counter


class Tally:
    """What one build counts."""

    def __init__(self) -> None:
        self.ops = 0
        """Operations written down."""
        self.lazy_bytes = 0
        """Bytes that eager construction would have asked for."""
        self.constant_bytes = 0
        """Bytes of values that came from Python or from real tensors, and are kept."""
        self.concretised: Counter[str] = Counter()
        """How often values were worked out, by what asked for them."""
        self.concretised_bytes: Counter[str] = Counter()
        """The same in bytes of storage."""
        self.real: Counter[str] = Counter()
        """What was made real at once, as there is no meta kernel or layout for it, by operation."""
