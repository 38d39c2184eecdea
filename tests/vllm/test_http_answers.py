"""Routed experts, reasons and paths find their choice; everything else passes unchanged."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from shared_schema.formats.base64_text import from_base64
from shared_schema.formats.vllm import load_npy
from vllm_r3_plugin.http_answers import Answer

ROWS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def _ended(index: int, rows: Any = None, path: Any = None, reason: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        index=index,
        routed_experts=rows,
        routed_experts_path=path,
        routed_experts_reason=reason,
    )


def _chunk(index: int, finish_reason: str | None) -> str:
    choice = {"index": index, "text": "é\u2028", "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"


def _streamed(answer: Answer, chunks: Sequence[str]) -> list[str]:
    async def stream() -> AsyncIterator[str]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[str]:
        return [chunk async for chunk in answer.put_into_stream(stream())]

    return asyncio.run(collect())


def _fields(chunk: str) -> dict[str, Any]:
    (choice,) = json.loads(chunk.removeprefix("data: "))["choices"]
    assert choice.pop("text") == "é\u2028"
    return dict(choice)


def test_only_the_last_chunk_of_a_choice_is_touched() -> None:
    answer = Answer()
    take_first, take_second = answer.new_prompt(2), answer.new_prompt(2)
    asyncio.run(take_first(_ended(1, ROWS)))
    asyncio.run(take_second(_ended(0, reason="why")))
    asyncio.run(take_second(_ended(1, path="/path")))
    given = [
        *(_chunk(index, None) for index in range(4)),
        *(_chunk(index, "stop") for index in range(4)),
        'data: {"choices":[],"usage":{}}\n\n',
        "data: [DONE]\n\n",
    ]
    seen = _streamed(answer, given)
    assert [_fields(chunk) for chunk in seen[:4]] == [_fields(chunk) for chunk in given[:4]]
    assert _fields(seen[4]) == _fields(given[4])
    carried = _fields(seen[5])["routed_experts"]
    np.testing.assert_array_equal(load_npy(from_base64(carried)), ROWS)
    assert _fields(seen[6]) == {**_fields(given[6]), "routed_experts_reason": "why"}
    assert _fields(seen[7]) == {**_fields(given[7]), "routed_experts_path": "/path"}
    assert seen[8:] == given[8:]


def test_a_stream_without_routed_experts_is_the_same_text() -> None:
    answer = Answer()
    asyncio.run(answer.new_prompt(1)(_ended(0)))
    given = [_chunk(0, None), _chunk(0, "length"), "data: [DONE]\n\n"]
    assert _streamed(answer, given) == given


def test_rows_are_taken_off_the_completion_and_put_into_its_choice() -> None:
    answer = Answer()
    completions = [_ended(0, b"first"), _ended(1, bytes(1 << 20))]
    take = answer.new_prompt(2)
    for completion in completions:
        asyncio.run(take(completion))
    choices = [SimpleNamespace(index=0), SimpleNamespace(index=1)]
    answer.put_into(choices)
    assert [from_base64(choice.routed_experts) for choice in choices] == [b"first", bytes(1 << 20)]
    assert [completion.routed_experts for completion in completions] == [None, None]
    assert not hasattr(choices[0], "routed_experts_reason")
