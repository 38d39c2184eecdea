"""A resumable request on an engine that is stepped by hand, driven as `AsyncLLM` drives it."""

from typing import Any

import msgspec

from .rollouts import Rollout


class ResumableSession:
    """Prompts of several turns in one request.

    A turn goes on after the tokens that came before it, the last sampled one left out.
    """

    def __init__(self, engine: Any, name: str, params: Any, prompts: list[list[int]]) -> None:
        self._engine, self._name, self._params = engine, name, params
        self._to_send, self._later = list(prompts), prompts[1:]
        self._tokens, self._num_returned = list(prompts[0]), 0
        # AsyncLLM sends it last: the signal that no more prompts follow.
        self._end = self._request(name, [0])
        engine.input_processor.assign_request_id(self._end)
        self.send()

    @property
    def request_id(self) -> str:
        return str(self._end.request_id)

    def send(self) -> None:
        """Send the next turn's prompt, and the end behind the last one; nothing after an abort."""
        is_first = len(self._to_send) == len(self._later) + 1
        if not is_first and self.request_id not in self._engine.output_processor.request_states:
            return
        request = self._request(self.request_id, self._to_send.pop(0), resumable=True)
        request.external_req_id = self._name
        self._deliver(request)
        if not self._to_send:
            self._deliver(self._end)

    def turn_ended(self, output: Any) -> Rollout:
        """The rollout of everything up to the end of the turn that `output` ends."""
        (completion,) = output.outputs
        tokens, new = self._tokens, list(completion.token_ids[self._num_returned :])
        self._num_returned += len(new)
        if self._later:
            self._tokens = [*tokens, *new[:-1], *self._later.pop(0)]
        start = self._params.routed_experts_prompt_start
        routed, reason = completion.routed_experts, completion.finish_reason
        return Rollout(self._name, 0, tokens, new, routed, reason, None, start)

    def _request(self, name: str, prompt: list[int], **options: Any) -> Any:
        return self._engine.input_processor.process_inputs(
            name,
            {"prompt_token_ids": prompt},
            self._params,
            supported_tasks=self._engine.get_supported_tasks(),
            **options,
        )

    def _deliver(self, request: Any) -> None:
        self._engine.output_processor.add_request(request, None)
        # Front end and core each extend their own prompt; in one process they would share it.
        prompt = list(request.prompt_token_ids)
        self._engine.engine_core.add_request(
            msgspec.structs.replace(request, prompt_token_ids=prompt)
        )
