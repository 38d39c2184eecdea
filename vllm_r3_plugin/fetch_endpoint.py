"""``GET /v1/routed_experts/{ticket}``: rows of a request that has ended, as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from vllm_r3_plugin.fetch_path import FETCH_PATH, NotHeldError, Ticket
from vllm_r3_plugin.fetching import fetch_as_asked
from vllm_r3_plugin.wrapping import wrap_once

_AT_ONCE = 4
"""Answers that one process assembles at the same time; each takes several times its size."""
_PIECE_BYTES = 1 << 20


def install() -> None:
    """Wrap what registers vLLM's routes for models that generate."""
    from vllm.entrypoints.generate import api_router

    wrap_once(api_router, "register_generate_api_routers", _register)


def _register(original: Callable[..., Any], app: FastAPI) -> None:
    original(app)
    slots = asyncio.Semaphore(_AT_ONCE)

    @app.get(FETCH_PATH + "{ticket}", response_class=StreamingResponse)
    async def routed_experts(ticket: str, request: Request) -> StreamingResponse:
        """Routed experts of a request, as its encoding says; a repeated call answers the same."""
        try:
            async with slots:
                wanted = Ticket.of(f"{ticket}?{request.url.query}")
                fetched = await fetch_as_asked(request.app.state.engine_client, wanted)
                payload = await asyncio.to_thread(fetched.to_bytes)
        except NotHeldError as error:
            raise HTTPException(404, str(error)) from None
        return StreamingResponse(
            _pieces(payload),
            media_type="application/octet-stream",
            headers={"Content-Length": str(len(payload))},
        )


async def _pieces(payload: bytes) -> AsyncIterator[memoryview]:
    """Parts of ``payload``: the event loop does other things between them."""
    view = memoryview(payload)
    for start in range(0, len(view), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]
