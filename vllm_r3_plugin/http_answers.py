"""Routed experts in HTTP answers: in each choice, also at the end of a stream."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import numpy as np

from shared_schema.formats.base64_text import to_base64
from shared_schema.formats.vllm import dump_npy
from vllm_r3_plugin import releases
from vllm_r3_plugin.wrapping import wrap_once

Take = Callable[[Any], Awaitable[None]]
"""Takes the rows off a completion of one prompt."""

_INLINE_BYTES = 1 << 17
"""Rows of more bytes become text in another thread."""


def install() -> None:
    """Wrap the handlers of completions, chat completions and vLLM's own generate."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    wrap_once(OpenAIServingCompletion, "create_completion", _answer)
    wrap_once(OpenAIServingChat, "create_chat_completion", _answer)
    wrap_once(ServingTokens, "serve_tokens", _answer)
    # The choices of the other answers take further fields by themselves.
    for model in releases.answers_of_generate():
        if model.model_config.get("extra") != "allow":
            model.model_config["extra"] = "allow"
            model.model_rebuild(force=True)


class Answer:
    """Routed experts of the choices of one answer, by index, until they are put into it."""

    def __init__(self) -> None:
        self._fields: dict[int, dict[str, str]] = {}
        self._num_choices = 0

    def new_prompt(self, num_choices: int) -> Take:
        """Take what the completions of the next prompt carry, which has ``num_choices``."""
        first = self._num_choices
        self._num_choices += num_choices

        async def take(completion: Any) -> None:
            rows, completion.routed_experts = completion.routed_experts, None
            if rows is None:
                text = None
            elif memoryview(rows).nbytes > _INLINE_BYTES:
                text = await asyncio.to_thread(as_text, rows)
            else:
                text = as_text(rows)
            fields = {
                "routed_experts": text,
                "routed_experts_path": completion.routed_experts_path,
                "routed_experts_reason": completion.routed_experts_reason,
            }
            carried = {name: value for name, value in fields.items() if value is not None}
            if carried:
                self._fields[first + completion.index] = carried

        return take

    def put_into(self, choices: list[Any]) -> None:
        """Fill the choices of a whole answer."""
        for choice in choices:
            for name, value in self._fields.pop(choice.index, {}).items():
                setattr(choice, name, value)

    async def put_into_stream(self, chunks: Any) -> AsyncIterator[str]:
        """Fill the last chunk of each choice; the others pass as they are."""
        async with aclosing(chunks):
            async for chunk in chunks:
                yield self._filled(chunk) if self._fields else chunk

    def _filled(self, chunk: str) -> str:
        data = chunk.removeprefix("data: ")
        if not data.startswith("{"):
            return chunk
        event = json.loads(data)
        for choice in event.get("choices", ()):
            if choice.get("finish_reason") is not None:
                choice.update(self._fields.pop(choice["index"], {}))
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"data: {text}\n\n"


_current: ContextVar[Answer | None] = ContextVar("moe_r3_answer", default=None)


def new_prompt(num_choices: int) -> Take | None:
    """What takes the rows of a prompt's completions; None where this is no HTTP answer."""
    answer = _current.get()
    return None if answer is None else answer.new_prompt(num_choices)


def as_text(rows: np.ndarray[Any, Any] | bytes) -> str:
    """The base64 of a ``.npy`` file or of encoded routed experts."""
    return to_base64(rows if isinstance(rows, bytes) else dump_npy(rows))


async def _answer(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    if getattr(request, "use_beam_search", False):
        # Its choices are put together from parts of many requests.
        return await original(self, request, *args, **kwargs)
    answer = Answer()
    token = _current.set(answer)
    try:
        response = await original(self, request, *args, **kwargs)
    finally:
        _current.reset(token)
    if inspect.isasyncgen(response):
        return answer.put_into_stream(response)
    answer.put_into(getattr(response, "choices", []))
    return response
