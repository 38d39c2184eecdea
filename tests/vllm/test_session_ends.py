"""Which rows belong to the tokens that a session has returned, in vLLM's own front end."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_r3_plugin import front_end
from vllm_r3_plugin.request_options import RequestOptions


class Session:
    """A resumable request without an engine core: its outputs are made up here."""

    def __init__(self) -> None:
        front_end.install()
        self._processor = OutputProcessor(None, log_stats=False)
        self._params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
        options = RequestOptions("on", 0, "native", "response", "omit")
        setattr(self._params, front_end._OPTIONS, options)
        self._queue = RequestOutputCollector(RequestOutputKind.DELTA, "session")

    def take_prompt(self, num_tokens: int) -> None:
        request = EngineCoreRequest(
            request_id="session",
            prompt_token_ids=[1] * num_tokens,
            mm_features=None,
            sampling_params=self._params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id="session",
            resumable=True,
        )
        self._processor.add_request(request, None, queue=self._queue)

    def take_output(self, num_tokens: int, reason: FinishReason | None = None) -> Any:
        output = EngineCoreOutput("session", [2] * num_tokens, finish_reason=reason)
        self._processor.process_outputs([output])
        return self._completion()

    def abort(self) -> Any:
        self._processor.abort_requests(["session"], internal=False)
        return self._completion()

    def _completion(self) -> Any:
        output = self._queue.get_nowait()
        assert output is not None
        return output.outputs[0]


@pytest.fixture
def session() -> Session:
    """Two turns have ended, of 5 + 3 and 4 + 2 tokens; the last of the first one was replaced."""
    session = Session()
    session.take_prompt(5)
    assert session.take_output(3, FinishReason.LENGTH).routed_experts.stop == 5 + 3 - 1
    session.take_prompt(4)
    assert session.take_output(1).routed_experts is None
    assert session.take_output(1, FinishReason.LENGTH).routed_experts.stop == 5 + 2 + 4 + 2 - 1
    return session


def test_an_abort_between_two_turns_leaves_the_rows_of_the_last_one(session: Session) -> None:
    assert session.abort().routed_experts.stop == 5 + 2 + 4 + 2 - 1


def test_an_abort_in_a_turn_cuts_rows_of_tokens_that_were_not_returned(session: Session) -> None:
    session.take_prompt(6)
    session.take_output(2)
    assert session.abort().routed_experts.stop == 5 + 2 + 4 + 1 + 6 + 2 - 1
