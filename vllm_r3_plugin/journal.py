"""Counts what did not go as planned and says so once; nothing here may stop the engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.moe_r3")
"""A child of vLLM's logger, so that messages appear where vLLM's own do."""


class Journal:
    """Events by name, with how often each happened.

    Attributes:
        counts: events so far.

    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, event: str, message: str, *, number: int = 1) -> None:
        """Count ``number`` events and log ``message`` if it is the first of its name."""
        self.counts[event] += number
        if self.counts[event] == number:
            logger.warning("moe-r3: %s (logged once; counted as %r)", message, event)

    @contextmanager
    def guard(self, place: str) -> Iterator[None]:
        """Turn an exception in our bookkeeping into a counted event: rows are lost, nothing else.

        ``place`` names what was being done.
        """
        try:
            yield
        except Exception as error:
            self.note(
                f"error while {place}: {type(error).__name__}",
                f"routing was lost while {place}: {type(error).__name__}: {error}",
            )
            logger.debug("moe-r3: while %s", place, exc_info=True)

    def report(self) -> None:
        """Log all counts, at shutdown."""
        if self.counts:
            logger.info("moe-r3: %s", ", ".join(f"{k}: {n}" for k, n in self.counts.items()))
