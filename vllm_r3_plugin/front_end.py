"""The front end's part: what requests ask for, and what their completions carry in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from shared_schema import RoutingLayout
from vllm_r3_plugin import http_answers
from vllm_r3_plugin.fetch_path import VersionedRows
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.received_rows import Delivery, ReceivedRows
from vllm_r3_plugin.request_options import RequestOptions
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.wrapping import wrap_once

_journal = Journal()
_OPTIONS = "moe_r3_options"
"""Attribute of a request's sampling parameters, and of its state."""
_TURNS = "moe_r3_turns"
"""Attribute of a session's state: length of its prompt when a turn ended, and tokens replaced."""
_LAYOUT = "moe_r3_layout"
"""Attribute of an engine, and the method of its engine core."""
_UNLABELLED = "default"
"""vLLM's weight version where nobody has set one."""
_INLINE_BYTES = 1 << 17
"""Rows of more bytes are put into their form in another thread."""


class RequestError(VLLMValidationError, ValueError):
    """A request asks for what there is not: status 400 over HTTP, a ``ValueError`` in Python."""


def install() -> None:
    """Wrap what the front end needs; engines without the flag only pass through."""
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    wrap_once(AsyncLLM, "generate", _generate)
    wrap_once(InputProcessor, "process_inputs", _process_inputs)
    wrap_once(OutputProcessor, "add_request", _add_request)
    wrap_once(AsyncLLM, "abort", _abort)
    wrap_once(RequestState, "_new_completion_output", _new_completion_output)
    wrap_once(LLMEngine, "step", _step)
    wrap_once(RequestOutput, "add", _add)
    CompletionOutput.routed_experts_path = None
    CompletionOutput.routed_experts_reason = None
    http_answers.install()


def _captures(vllm_config: Any) -> bool:
    return isinstance(vllm_config.scheduler_config.scheduler_cls, SchedulerFactory)


# --- what a request asks for -----------------------------------------------------------------


def _prompt_len(request: Any) -> int:
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def _options(vllm_config: Any, sampling_params: Any, prompt_len: int | None) -> RequestOptions:
    """Read a request's options; ``prompt_len`` is None where it is not known yet."""
    try:
        options = RequestOptions.of(sampling_params, R3Options.of(vllm_config))
        if prompt_len is not None:
            options.require_start_within(prompt_len)
    except ValueError as error:
        raise RequestError(str(error)) from None
    return options


def _process_inputs(
    original: Callable[..., Any], self: Any, request_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Refuse wrong options; spell out the others for the engine core."""
    request = original(self, request_id, *args, **kwargs)
    if _captures(self.vllm_config):
        _spell_out(self.vllm_config, request)
    return request


def _spell_out(vllm_config: Any, request: Any) -> None:
    params = request.sampling_params
    if params is not None:
        options = _options(vllm_config, params, _prompt_len(request))
        options.write_to(params)
        setattr(params, _OPTIONS, options)


def _add_request(
    original: Callable[..., Any],
    self: Any,
    request: Any,
    prompt: str | None,
    parent_req: Any = None,
    request_index: int = 0,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Remember what the request asked for; of ``n`` completions one carries the prompt's rows."""
    is_new = request.request_id not in self.request_states
    options = None
    with _journal.guard("reading what a request asks for"):
        options = _options_of_completion(request, parent_req, request_index)
    original(self, request, prompt, parent_req, request_index, *args, **kwargs)
    if options is not None and is_new:
        state = self.request_states[request.request_id]
        setattr(state, _OPTIONS, (options, request.resumable))


def _options_of_completion(request: Any, parent: Any, index: int) -> RequestOptions | None:
    params = request.sampling_params
    options: RequestOptions | None = getattr(
        params if parent is None else parent.sampling_params, _OPTIONS, None
    )
    if options is None or not index or options.encoding != "r3":
        return options
    options = replace(options, start=_prompt_len(request))
    request.sampling_params = copy(params)
    options.write_to(request.sampling_params)
    return options


# --- what its completions carry --------------------------------------------------------------


def _new_completion_output(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    """Keep the rows as they came, with what is known here about them."""
    output = original(self, *args)
    if output.finish_reason is not None:
        rows, output.routed_experts = output.routed_experts, None
        with _journal.guard("receiving rows"):
            output.routed_experts = _received(self, output, rows)
    return output


def _received(state: Any, output: Any, rows: Any) -> Any:
    options, is_session = getattr(state, _OPTIONS, (None, False))
    if options is None:
        # Not a request of ours, then rows are vLLM's own, of three dimensions.
        return None if rows is None or rows.ndim == 2 else rows
    num_tokens = state.detokenizer.num_output_tokens()
    if options.routing == "off" or not num_tokens:
        return None
    # The row that sampled a token is that of the token before it.
    first = state.prompt_len - 1
    if is_session:
        return ReceivedRows(rows, options, first + num_tokens - _replaced_tokens(state))
    known = getattr(output, "weight_versions", None) or ()
    versions = [
        VersionedRows(v.version, first + v.start, first + v.end)
        for v in known
        if v.version != _UNLABELLED
    ]
    return ReceivedRows(rows, options, first + num_tokens, versions)


def _add(original: Callable[..., Any], self: Any, next_output: Any, aggregate: bool) -> None:
    """Keep the rows of a last chunk that joins others, as vLLM itself does since 0.31."""
    original(self, next_output, aggregate)
    with _journal.guard("keeping rows of chunks that are joined"):
        rows = {
            completion.index: completion.routed_experts
            for completion in next_output.outputs
            if completion.routed_experts is not None
        }
        for completion in self.outputs if rows else ():
            completion.routed_experts = rows.get(completion.index, completion.routed_experts)


def _replaced_tokens(state: Any) -> int:
    """Tokens of a session in whose place another turn began: the last one of each turn before.

    To be called when a turn ends; another one began if the prompt has grown since the last call.
    """
    prompt_len, replaced = getattr(state, _TURNS, (state.prompt_len, 0))
    replaced += state.prompt_len != prompt_len
    setattr(state, _TURNS, (state.prompt_len, replaced))
    return int(replaced)


def _set(completion: Any, delivery: Delivery) -> None:
    completion.routed_experts = delivery.routed_experts
    completion.routed_experts_path = delivery.path
    completion.routed_experts_reason = delivery.reason


def _take_received(completion: Any) -> ReceivedRows | None:
    """Take the rows off a completion that has ended; unless others are set, it says why."""
    rows = completion.routed_experts
    if not isinstance(rows, ReceivedRows):
        return None
    _set(completion, Delivery(reason="they could not be delivered, the server's log says why."))
    return rows


def _step(original: Callable[..., Any], self: Any) -> Any:
    """Put the rows of completions that have ended into the form that was asked for."""
    outputs = original(self)
    if _captures(self.vllm_config):
        for output in outputs:
            for completion in getattr(output, "outputs", ()):
                rows = _take_received(completion)
                if rows is not None:
                    with _journal.guard("delivering rows"):
                        _set(completion, rows.deliver(_layout(self)))
    return outputs


def _layout(engine: Any) -> RoutingLayout:
    if not hasattr(engine, _LAYOUT):
        client = engine.engine_core
        if hasattr(client, "call_utility"):
            fields = client.call_utility(_LAYOUT)
        else:
            fields = getattr(client.engine_core, _LAYOUT)()
        setattr(engine, _LAYOUT, RoutingLayout.from_dict(fields))
    found: RoutingLayout = getattr(engine, _LAYOUT)
    return found


def _generate(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse wrong options before a streaming answer begins; deliver the rows at the end."""
    if not _captures(self.vllm_config):
        return original(self, prompt, sampling_params, *args, **kwargs)
    if hasattr(prompt, "sampling_params"):
        _spell_out(self.vllm_config, prompt)  # a request of the engine core, made by the caller
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    _options(self.vllm_config, sampling_params, None if ids is None else len(ids))
    take = http_answers.new_prompt(sampling_params.n)
    outputs = original(self, prompt, sampling_params, *args, **kwargs)
    return _delivering(self, outputs, take)


async def _delivering(
    engine: Any, outputs: Any, take: http_answers.Take | None
) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            for completion in output.outputs:
                if completion.finish_reason is not None:
                    with _journal.guard("delivering rows"):
                        await _deliver(engine, completion)
                        if take is not None:
                            await take(completion)
            yield output


async def _deliver(engine: Any, completion: Any) -> None:
    rows = _take_received(completion)
    if rows is None:
        return
    if not hasattr(engine, _LAYOUT):
        fields = await engine.engine_core.call_utility_async(_LAYOUT)
        setattr(engine, _LAYOUT, RoutingLayout.from_dict(fields))
    layout = getattr(engine, _LAYOUT)
    if rows.nbytes > _INLINE_BYTES:
        _set(completion, await asyncio.to_thread(rows.deliver, layout))
    else:
        _set(completion, rows.deliver(layout))


# --- requests that a client aborts -----------------------------------------------------------


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
    for answer in answers:
        for request_id, (shape, data) in answer.items():
            state = processor.request_states.get(request_id)
            if state is not None:
                state.routed_experts_chunks = [np.frombuffer(data, np.uint8).reshape(shape)]
