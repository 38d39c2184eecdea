"""Counts what happens, says once what did not go as planned; nothing here stops the engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
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
        self._new: dict[str, int] = {}

    def count(self, event: str, number: int = 1) -> None:
        """Count ``number`` events."""
        self.counts[event] += number
        self._new[event] = self._new.get(event, 0) + number

    def note(self, event: str, message: str, *, number: int = 1) -> None:
        """Count ``number`` events and log ``message`` if it is the first of its name."""
        first = event not in self.counts
        self.count(event, number)
        if first:
            logger.warning("moe-r3: %s (logged once; counted as %r)", message, event)

    @property
    def has_new(self) -> bool:
        """Whether anything was counted since the last :meth:`take_new`."""
        return bool(self._new)

    def take_new(self) -> dict[str, int]:
        """What was counted since the last call."""
        new, self._new = self._new, {}
        return new

    def guard(self, place: str, then: Callable[[], None] | None = None) -> Guard:
        """A context in which an exception is a counted event: rows are lost, nothing else.

        ``place`` names what is being done; ``then`` is called after an exception, guarded too.
        """
        return Guard(self, place, then)

    def fail(self, place: str, error: Exception, then: Callable[[], None] | None = None) -> None:
        """What a guard does with an exception; for places where a guard costs too much."""
        name = type(error).__name__
        self.note(
            f"error while {place}: {name}", f"routing was lost while {place}: {name}: {error}"
        )
        logger.debug("moe-r3: while %s", place, exc_info=error)
        if then is not None:
            with self.guard(f"recovering from an error while {place}"):
                then()

    def report(self) -> None:
        """Log all counts, at shutdown."""
        if self.counts:
            logger.info("moe-r3: %s", ", ".join(f"{k}: {n}" for k, n in self.counts.items()))


class Guard:
    """What :meth:`Journal.guard` returns; a class, which costs less than a generator."""

    __slots__ = ("_journal", "_place", "_then")

    def __init__(self, journal: Journal, place: str, then: Callable[[], None] | None) -> None:
        self._journal = journal
        self._place = place
        self._then = then

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
        self._journal.fail(self._place, error, self._then)
        return True
