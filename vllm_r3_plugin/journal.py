"""Counts what did not go as planned and says so once; nothing here may stop the engine."""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType

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

    def guard(self, place: str) -> Guard:
        """A context in which an exception is a counted event: rows are lost, nothing else.

        ``place`` names what is being done.
        """
        return Guard(self, place)

    def report(self) -> None:
        """Log all counts, at shutdown."""
        if self.counts:
            logger.info("moe-r3: %s", ", ".join(f"{k}: {n}" for k, n in self.counts.items()))


class Guard:
    """What :meth:`Journal.guard` returns; a class, since it is entered several times a step."""

    __slots__ = ("_journal", "_place")

    def __init__(self, journal: Journal, place: str) -> None:
        self._journal = journal
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        name = type(error).__name__
        self._journal.note(
            f"error while {self._place}: {name}",
            f"routing was lost while {self._place}: {name}: {error}",
        )
        logger.debug("moe-r3: while %s", self._place, exc_info=error)
        return True
