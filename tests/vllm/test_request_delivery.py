"""What each request asks for is what it gets: routing off, start, encoding, unrecorded rows."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_schema import RoutingLayout, RowStatus, Span, decode, encode, to_vllm_native

from .rigs.engine import start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.lost_payloads import losing_payloads
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.tiny_models import MOE_LAYERS, NUM_EXPERTS, NUM_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

LAYOUT = RoutingLayout(NUM_EXPERTS, TOP_K, MOE_LAYERS, NUM_LAYERS)
SENTINEL = 255
WRONG = [
    ({"r3_encoding": "zip"}, "r3_encoding is 'zip', expected 'native' or 'r3'"),
    ({"r3_start": 31}, "r3_start is 31, expected 0 to 30"),
    ({"r3_start": 2, "r3_off": 1}, "unknown key 'r3_off'"),
]


class _Engine:
    """An offline engine that notes how many bytes of rows reach its front end."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.llm = start_engine(model, **settings)
        self.hook = RouterHook(self.llm)
        self.bytes_sent = 0
        self._num_requests = 0
        processor = self.llm.llm_engine.output_processor
        process = processor.process_outputs

        def process_outputs(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows = [o.routed_experts for o in outputs if o.routed_experts is not None]
            self.bytes_sent += sum(array.nbytes for array in rows)
            return process(outputs, *args, **kwargs)

        processor.process_outputs = process_outputs

    def run(
        self, prompts: list[list[int]], params: Any, version_at: dict[int, str] | None = None
    ) -> dict[str, Any]:
        """All completions: rollouts, what they carried, why not, the bytes that were sent."""
        from vllm.sampling_params import RequestOutputKind

        engine, before = self.llm.llm_engine, self.bytes_sent
        for prompt, param in zip(prompts, params, strict=True):
            param.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(f"r{self._num_requests}", {"prompt_token_ids": prompt}, param)
            self._num_requests += 1
        outputs, step = [], 0
        while engine.has_unfinished_requests():
            if version_at and step in version_at:
                engine.set_weight_version(version_at[step])
            outputs += [output for output in engine.step() if output.finished]
            step += 1
        outputs.sort(key=lambda output: int(output.request_id[1:]))
        completions = [c for output in outputs for c in output.outputs]
        return {
            "rollouts": self.hook.attach_to(from_outputs(outputs)),
            "carried": [c.routed_experts for c in completions],
            "reasons": [c.routed_experts_reason for c in completions],
            "paths": [c.routed_experts_path for c in completions],
            "bytes": self.bytes_sent - before,
        }


def _run(model: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_r3_plugin import fetch

    engine = _Engine(model, skip_tokenizer_init=False, additional_config={"r3": {"encoding": "r3"}})
    rng = np.random.default_rng(0)
    letters = engine.llm.get_tokenizer().convert_tokens_to_ids(list(string.ascii_lowercase[:3]))
    stops = {
        "max_tokens": 60,
        "allowed_token_ids": letters,
        "stop": ["ab", "cba"],
        "detokenize": True,
    }

    def params(extra_args: Any = None, **settings: Any) -> Any:
        return SamplingParams(
            **{"temperature": 1.0, "max_tokens": 12, "detokenize": False, **settings},
            extra_args=extra_args,
        )

    prompts, _ = workload(30, seed=3)
    starts = [int(rng.integers(0, len(prompt) + 1)) for prompt in prompts]
    found = {
        "r3": engine.run(prompts, [params() for _ in prompts]),
        "r3 from a start": engine.run(prompts, [params({"r3_start": s}) for s in starts]),
        "native": engine.run(prompts, [params({"r3_encoding": "native"}) for _ in prompts]),
        "n=3": engine.run(prompts, [params(n=3) for _ in prompts]),
        "n=2 with stop string": engine.run(prompts, [params(**stops, n=2) for _ in prompts]),
    }
    for delivery in ("response", "fetch"):
        settings = {"temperature": 0.0, "ignore_eos": True}
        found[f"versions, {delivery}"] = engine.run(
            prompts[:4],
            [params({"r3_delivery": delivery}, **settings) for _ in range(4)],
            version_at={0: "default", 4: "a/7 & 8", 8: "8"},
        )
    fetched = found["versions, fetch"]
    fetched["carried"] = [encode(fetch(engine.llm, path)) for path in fetched["paths"]]
    fresh = random_prompts(rng, [100] * 8)
    found["off"] = engine.run(fresh, [params({"r3_routing": "off"}, **stops) for _ in fresh])
    found["after off"] = engine.run(fresh, [params() for _ in fresh])
    for name, extra in {
        "lossy r3": {},
        "lossy omit": {"r3_encoding": "native"},
        "lossy sentinel": {"r3_encoding": "native", "r3_unrecorded": "sentinel"},
    }.items():
        mixed = [params(extra, **(stops if i % 2 else {})) for i in range(40)]
        with losing_payloads(0.1):
            found[name] = engine.run(random_prompts(rng, [30] * 40), mixed)
    found["refused"] = []
    for wrong, _ in WRONG:
        with pytest.raises(ValueError, match="r3_") as error:
            engine.llm.generate([{"prompt_token_ids": fresh[0][:30]}], params(wrong))
        found["refused"].append(str(error.value))
    found["after refusals"] = engine.run(prompts, [params() for _ in prompts])
    return found


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def _decoded(group: dict[str, Any]) -> list[Rollout]:
    """The rollouts of a group, with the native form of the bytes that they carried."""
    for rollout, payload in zip(group["rollouts"], group["carried"], strict=True):
        routed = decode(payload, LAYOUT)
        rollout.routed, rollout.prompt_start = to_vllm_native(routed), routed.token_start
    return list(group["rollouts"])


def _num_rows(rollout: Rollout) -> int:
    return len(rollout.tokens) - 1 - rollout.prompt_start


@pytest.mark.parametrize(
    "group",
    ["r3", "r3 from a start", "n=3", "n=2 with stop string", "after off", "after refusals"],
)
def test_encoded_rows_are_the_routers_own_and_those_of_transformers(
    run: dict[str, Any], group: str, oracle: TransformersOracle
) -> None:
    rollouts = _decoded(run[group])
    assert sum(r.ordered_differences() for r in rollouts) == 0
    assert oracle.agreement(rollouts).differing == 0
    assert not any(run[group]["reasons"] + run[group]["paths"])


def test_a_request_overrides_the_servers_default(run: dict[str, Any]) -> None:
    for rollout in run["native"]["rollouts"]:
        rollout.check_form()


def test_of_n_completions_one_carries_the_rows_of_the_prompt(run: dict[str, Any]) -> None:
    for group in ("n=3", "n=2 with stop string"):
        rollouts = _decoded(run[group])
        for rollout in rollouts:
            assert rollout.prompt_start == (len(rollout.prompt) if rollout.index else 0)
        num_bytes = sum(_num_rows(r) for r in rollouts) * (LAYOUT.row_nbytes + 1)
        assert run[group]["bytes"] >= num_bytes
    stopped = run["n=2 with stop string"]["rollouts"]
    assert sum(isinstance(r.stop_reason, str) for r in stopped) >= 20
    assert run["n=3"]["bytes"] == sum(
        _num_rows(r) * (LAYOUT.row_nbytes + 1) for r in run["n=3"]["rollouts"]
    )


def test_with_routing_off_nothing_is_sent_and_others_still_hit_its_rows(
    run: dict[str, Any],
) -> None:
    off = run["off"]
    assert off["bytes"] == 0
    assert off["carried"] == off["reasons"] == off["paths"] == [None] * 8
    assert all(r.num_cached >= 64 for r in run["after off"]["rollouts"])


def test_spans_say_which_weights_sampled_from_a_row(run: dict[str, Any]) -> None:
    group = run["versions, response"]
    for rollout, payload in zip(group["rollouts"], group["carried"], strict=True):
        first, stop = len(rollout.prompt) - 1, len(rollout.tokens) - 1
        spans = decode(payload).spans
        assert spans == (
            Span(0, first + 4),
            Span(first + 4, first + 8, weight_version="a/7 & 8"),
            Span(first + 8, stop, weight_version="8"),
        )


def test_fetched_bytes_are_those_of_the_response_with_the_versions_of_the_weights(
    run: dict[str, Any],
) -> None:
    assert run["versions, fetch"]["carried"] == run["versions, response"]["carried"]


def test_encoded_rows_that_were_lost_say_so_and_the_others_are_right(run: dict[str, Any]) -> None:
    group = run["lossy r3"]
    lost = 0
    for rollout, payload in zip(group["rollouts"], group["carried"], strict=True):
        routed = decode(payload, LAYOUT)
        assert len(routed) == _num_rows(rollout)
        np.testing.assert_array_equal(routed.ids[routed.recorded], rollout.hooked[routed.recorded])
        assert set(np.unique(routed.status)) <= {RowStatus.RECORDED, RowStatus.STEP_LOST}
        lost += int((~routed.recorded).sum())
    assert lost >= 20


def test_an_array_with_lost_rows_is_left_out_and_the_reason_said(run: dict[str, Any]) -> None:
    group = run["lossy omit"]
    returned = [r for r in group["rollouts"] if r.routed is not None]
    assert 0 < len(returned) < len(group["rollouts"])
    assert sum(r.ordered_differences() for r in returned) == 0
    for rollout, reason in zip(group["rollouts"], group["reasons"], strict=True):
        assert (rollout.routed is None) == (reason is not None)
        if reason is not None:
            assert f"of {_num_rows(rollout)} rows are unrecorded, the first at" in reason
            assert "(STEP_LOST)" in reason


def test_a_sentinel_marks_lost_rows_where_the_user_asked_for_it(run: dict[str, Any]) -> None:
    group = run["lossy sentinel"]
    lost = 0
    for rollout in group["rollouts"]:
        rows = rollout.moe_ids()
        marked = (rows == SENTINEL).all((1, 2))
        assert not (rows[~marked] == SENTINEL).any()
        np.testing.assert_array_equal(rows[~marked], rollout.hooked[~marked])
        lost += int(marked.sum())
    assert lost >= 20
    assert not any(group["reasons"])


def test_wrong_options_are_value_errors_of_that_request_alone(run: dict[str, Any]) -> None:
    for (wrong, said), error in zip(WRONG, run["refused"], strict=True):
        assert said in error, wrong
