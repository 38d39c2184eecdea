"""The front end's part: what requests ask for, rows of aborted ones, rows that were withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.request_options import RequestOptions
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.wrapping import wrap_once

_journal = Journal()


class RequestError(VLLMValidationError, ValueError):
    """A request asks for what there is not: status 400 over HTTP, a ``ValueError`` in Python."""


def install() -> None:
    """Wrap what the front end needs; engines without the flag only pass through."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    wrap_once(AsyncLLM, "generate", _generate)
    wrap_once(InputProcessor, "process_inputs", _process_inputs)
    wrap_once(AsyncLLM, "abort", _abort)
    wrap_once(RequestState, "_new_completion_output", _new_completion_output)


def _captures(vllm_config: Any) -> bool:
    return isinstance(vllm_config.scheduler_config.scheduler_cls, SchedulerFactory)


def _options(vllm_config: Any, sampling_params: Any, prompt: Any) -> RequestOptions:
    """``prompt`` is token ids or embeddings, or None where they are not known yet."""
    try:
        options = RequestOptions.of(sampling_params, R3Options.of(vllm_config))
        if prompt is not None:
            options.require_start_within(len(prompt))
    except ValueError as error:
        raise RequestError(str(error)) from None
    return options


def _generate(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse wrong options before the answer to a streaming request has begun."""
    if _captures(self.vllm_config):
        prompt_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        _options(self.vllm_config, sampling_params, prompt_ids)
    return original(self, prompt, sampling_params, *args, **kwargs)


def _process_inputs(
    original: Callable[..., Any], self: Any, request_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Refuse wrong options; spell out the others for the engine core."""
    request = original(self, request_id, *args, **kwargs)
    params = request.sampling_params
    if params is not None and _captures(self.vllm_config):
        ids, embeddings = request.prompt_token_ids, request.prompt_embeds
        options = _options(self.vllm_config, params, embeddings if ids is None else ids)
        options.write_to(params)
    return request


async def _abort(
    original: Callable[..., Any],
    self: Any,
    request_id: str | Iterable[str],
    internal: bool = False,
) -> None:
    """Fetch the rows of a request before its end is reported.

    vLLM reports an aborted request with what the front end has received so far. Rows leave the
    engine core when a request ends, so at this moment they are still there.
    """
    ids = [request_id] if isinstance(request_id, str) else list(request_id)
    # Internal aborts follow a client that has gone: nobody reads what is reported.
    if not internal and _captures(self.vllm_config):
        with _journal.guard("fetching the rows of aborted requests"):
            await _fetch_rows(self, ids)
    await original(self, ids, internal)


async def _fetch_rows(engine: Any, external_ids: list[str]) -> None:
    processor = engine.output_processor
    ids = [i for external in external_ids for i in processor.external_req_ids.get(external, ())]
    if not ids:
        return
    client = engine.engine_core
    # Each data-parallel engine core has requests of its own and passes over those of others.
    answers = await asyncio.gather(
        *(
            client._call_utility_async("moe_r3_abort", ids, engine=core)
            for core in client.core_engines
        )
    )
    fetched = [item for answer in answers for item in answer.items()]
    for request_id, (stop, dtype, shape, data) in fetched:
        state = processor.request_states.get(request_id)
        num_tokens = state.detokenizer.num_output_tokens() if state is not None else 0
        if num_tokens:
            # The engine core may be some tokens ahead of what has arrived here.
            surplus = stop - (state.prompt_len + num_tokens - 1)
            rows = np.frombuffer(data, dtype).reshape(shape)
            state.routed_experts_chunks = [rows[: max(0, len(rows) - surplus)]]


def _new_completion_output(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    """Return no routed experts where the engine core withdrew rows that it had already sent."""
    output = original(self, *args)
    rows, output.routed_experts = output.routed_experts, None
    with _journal.guard("returning rows"):
        if rows is not None and rows.dtype.kind != "f":
            output.routed_experts = rows
    return output
