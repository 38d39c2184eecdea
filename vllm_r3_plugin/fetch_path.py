"""The path under which a client fetches rows: a ticket, and what only the front end knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import parse_qs, urlencode

from shared_schema import Span

FETCH_PATH = "/v1/routed_experts/"
"""Under /v1, where vLLM asks for the server's API key."""


class NotHeldError(LookupError):
    """Nothing can be fetched with a ticket; the message is one sentence that says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"there are no routed experts for this ticket, {reason}")


class VersionedRows(NamedTuple):
    """Rows at positions ``first`` … ``stop - 1`` that weights of this ``version`` sampled from."""

    version: str
    first: int
    stop: int


class Ticket(NamedTuple):
    """A ticket as the client has it: ``ENGINE.SECRET``, and a query.

    Attributes:
        held_under: what the engine core knows.
        stop: position after the last row, where the front end cut; None for all that are held.
        weight_versions: in the order of the rows.

    """

    held_under: str
    stop: int | None
    weight_versions: tuple[VersionedRows, ...] = ()

    @classmethod
    def of(cls, text: str) -> Ticket:
        """Read the path that a response names, or the end of it.

        Raises:
            NotHeldError: it is none.

        """
        held_under, _, query = text.removeprefix(FETCH_PATH).partition("?")
        fields = parse_qs(query)
        try:
            stop = int(fields["stop"][0]) if "stop" in fields else None
            versions = tuple(_read(versioned) for versioned in fields.get("weight_version", ()))
        except ValueError as error:
            raise NotHeldError(
                f"its query is {query!r} ({error}), expected stop=ROW and "
                "weight_version=ROW-ROW:VERSION: pass it as the response gave it."
            ) from None
        return cls(held_under, stop, versions)

    @property
    def path(self) -> str:
        """What :meth:`of` reads."""
        fields = [] if self.stop is None else [("stop", str(self.stop))]
        fields += [
            ("weight_version", f"{rows.first}-{rows.stop}:{rows.version}")
            for rows in self.weight_versions
        ]
        return f"{FETCH_PATH}{self.held_under}" + (f"?{urlencode(fields)}" if fields else "")

    @property
    def engine(self) -> int:
        """Index of the engine core."""
        index = self.held_under.partition(".")[0]
        if not (index.isascii() and index.isdigit() and len(index) < 5):
            raise NotHeldError("expected ENGINE.SECRET: pass it as the response gave it.")
        return int(index)


def spans_of(versions: Iterable[VersionedRows], start: int, stop: int) -> Iterator[Span]:
    """Spans of the rows ``start`` … ``stop - 1``, without a version where none is known."""
    reached = start
    for version, first, after in versions:
        first, after = max(first, reached), min(after, stop)
        if first >= after:
            continue
        if reached < first:
            yield Span(reached, first)
        yield Span(first, after, weight_version=version)
        reached = after
    if reached < stop:
        yield Span(reached, stop)


def _read(versioned: str) -> VersionedRows:
    rows, _, version = versioned.partition(":")
    first, _, stop = rows.partition("-")
    return VersionedRows(version, int(first), int(stop))
