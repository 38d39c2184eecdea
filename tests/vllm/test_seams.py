"""Every private symbol of vLLM that the plugin touches is there, and is what the plugin expects."""

import inspect

import pytest
import vllm

from vllm_r3_plugin import seams


@pytest.mark.parametrize("seam", seams.SEAMS, ids=lambda seam: seam.symbol)
def test_vllm_still_has(seam):
    assert seam not in seams.missing(), f"{seam.symbol} moved; it serves: {seam.why}"


def test_an_attribute_that_moved_is_noticed():
    from vllm.v1.request import Request

    names = ("num_tokens", "drop_stale_output", "no_such_attribute")
    assert seams.missing_attributes(Request, names) == ["no_such_attribute"]


def test_the_installed_vllm_was_checked():
    assert vllm.__version__.partition("+")[0] in seams.CHECKED_ON


def test_no_symbol_is_listed_twice():
    symbols = [seam.symbol for seam in seams.SEAMS]
    assert len(set(symbols)) == len(symbols)


@pytest.mark.parametrize(
    ("symbol", "parameters"),
    [
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config", ["self"]),
        ("vllm.v1.engine.core:EngineCore._initialize_kv_caches", ["self", "vllm_config"]),
        (
            "vllm.v1.engine.core:EngineCoreProc._send_finish_outputs_to_client",
            ["self", "req_ids", "client_index", "finish_reason"],
        ),
        ("vllm.v1.engine.async_llm:AsyncLLM.abort", ["self", "request_id", "internal"]),
        ("vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request", ["self", "request"]),
        (
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            ["self", "scheduler_output", "model_runner_output"],
        ),
        ("vllm.v1.worker.worker_base:WorkerBase.sample_tokens", ["self", "grammar_output"]),
    ],
)
def test_wrapped_methods_take_the_arguments_that_wraps_pass_on(symbol, parameters):
    assert list(inspect.signature(seams.resolve(symbol)).parameters)[: len(parameters)] == (
        parameters
    )


def test_a_symbol_that_moved_is_named_before_the_engine_starts(monkeypatch):
    gone = seams.Seam("vllm.v1.engine.core:EngineCore.gone", "wrapped", "a reason", "never")
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, gone))
    with pytest.raises(ValueError, match=r"no vllm\.v1\.engine\.core:EngineCore\.gone") as error:
        seams.require_present()
    assert "a reason" in str(error.value)
