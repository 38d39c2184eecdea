"""The front end's side of rows that are fetched: from a ticket to routed experts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, encode, to_vllm_native
from shared_schema.formats.vllm import dump_npy
from vllm_r3_plugin.fetch_path import NotHeldError, Ticket, spans_of
from vllm_r3_plugin.received_rows import why_incomplete

_METHOD = "moe_r3_fetch"


class Fetched(NamedTuple):
    """Rows that were fetched, and how the request wanted them."""

    routed: RoutedExperts
    encoding: str
    unrecorded: str

    def to_bytes(self) -> bytes:
        """The bytes that the request asked for: a ``.npy`` file or what ``shared_schema`` decodes.

        Raises:
            NotHeldError: a row is unrecorded, and an array would have to say so.

        """
        if self.encoding == "r3":
            return encode(self.routed)
        sentinel = self.unrecorded == "sentinel"
        if not sentinel and not self.routed.is_complete:
            why = why_incomplete(self.routed.token_start, np.asarray(self.routed.status))
            raise NotHeldError(
                f"{why.removesuffix('.')}, expected none for an array: ask for r3_encoding "
                '"r3" or r3_unrecorded "sentinel".'
            )
        return dump_npy(to_vllm_native(self.routed, sentinel=sentinel))


def fetch(llm: Any, path: str) -> RoutedExperts:
    """Rows of a request of ``llm``, a :class:`vllm.LLM`, that has ended and named this ``path``.

    Raises:
        NotHeldError: there are none under this ticket; they may have been given up.

    """
    wanted = Ticket.of(path)
    client = llm.llm_engine.engine_core

    def ask(row: int | None) -> Any:
        arguments = (wanted.held_under, wanted.stop, row)
        if hasattr(client, "call_utility"):
            return client.call_utility(_METHOD, *arguments)
        answer = getattr(client.engine_core, _METHOD)(*arguments)
        return answer if isinstance(answer, str) else answer.result()

    first = _require(ask(None))
    rest = [_require(ask(row)) for row in _further_rows(first)]
    return _join(wanted, [first, *rest]).routed


async def fetch_async(engine: Any, path: str) -> RoutedExperts:
    """As :func:`fetch`, for ``engine``, a :class:`vllm.AsyncLLM`.

    Raises:
        NotHeldError: there are none under this ticket; they may have been given up.

    """
    return (await fetch_as_asked(engine, Ticket.of(path))).routed


async def fetch_as_asked(engine: Any, wanted: Ticket) -> Fetched:
    """As :func:`fetch_async`, with what the request said about their encoding."""
    client = engine.engine_core
    identity = wanted.engine.to_bytes(2, "little")
    if identity not in client.core_engines:
        raise NotHeldError(
            f"they are in engine {wanted.engine}, expected one of "
            f"{', '.join(map(str, client.engine_ranks_managed))}: ask the server of that "
            "data-parallel rank."
        )

    async def ask(row: int | None) -> dict[str, Any]:
        arguments = (wanted.held_under, wanted.stop, row)
        return _require(await client._call_utility_async(_METHOD, *arguments, engine=identity))

    first = await ask(None)
    rest = await asyncio.gather(*(ask(row) for row in _further_rows(first)))
    return await asyncio.to_thread(_join, wanted, [first, *rest])


def _require(answer: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(answer, str):
        raise NotHeldError(answer)
    return answer


def _further_rows(first: dict[str, Any]) -> Iterable[int]:
    """Positions from which to ask for the rows that the first answer has left."""
    chunk = len(first["status"])
    return range(first["start"] + chunk, first["stop"], chunk) if chunk else ()


def _join(wanted: Ticket, answers: list[dict[str, Any]]) -> Fetched:
    first = answers[0]
    layout = RoutingLayout.from_dict(first["layout"])
    status = np.concatenate([np.frombuffer(answer["status"], np.uint8) for answer in answers])
    ids = np.concatenate([np.frombuffer(answer["ids"], layout.dtype) for answer in answers])
    rows = ids.reshape(len(status), layout.num_moe_layers, layout.top_k)
    start = first["start"]
    spans = tuple(spans_of(wanted.weight_versions, start, first["stop"]))
    routed = RoutedExperts.trusted(rows, layout, start, status, spans)
    return Fetched(routed, first["encoding"], first["unrecorded"])
