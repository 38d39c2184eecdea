"""Routed experts over HTTP from a real `vllm serve`."""

import base64
import io
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from shared_schema import RoutingLayout, decode, to_vllm_native
from vllm_r3_plugin.seam_check import installed_release

from .rigs.http_server import failing_serve, serving
from .rigs.rollouts import Rollout
from .rigs.tiny_models import MOE_LAYERS, NUM_EXPERTS, NUM_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

LAYOUT = RoutingLayout(NUM_EXPERTS, TOP_K, MOE_LAYERS, NUM_LAYERS)
TEXTS = [f"def function_{i}(argument):" for i in range(24)]


@pytest.fixture(scope="module")
def url(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(moe_model, log, "--enable-scale-out") as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def _rollouts(
    choices: Sequence[Any], prompt: Sequence[int], prompt_start: int = 0
) -> list[Rollout]:
    return [
        Rollout(
            request="",
            index=choice.index,
            prompt=list(prompt),
            output=list(choice.token_ids),
            routed=np.load(io.BytesIO(base64.b64decode(choice.routed_experts))),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_start=prompt_start,
        )
        for choice in choices
    ]


def _complete(client: openai.OpenAI, text: str, **settings: Any) -> list[Rollout]:
    extra = {"return_token_ids": True, **settings.pop("extra_body", {})}
    done = client.completions.create(model="tiny", prompt=text, extra_body=extra, **settings)
    start = extra.get("routed_experts_prompt_start", 0)
    return _rollouts(done.choices, done.choices[0].prompt_token_ids, start)


def test_concurrent_completions_carry_the_rows_of_transformers(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    with ThreadPoolExecutor(8) as pool:
        batches = pool.map(lambda text: _complete(client, text, max_tokens=20), TEXTS)
        rollouts = [rollout for batch in batches for rollout in batch]
    assert len(rollouts) == len(TEXTS)
    assert oracle.agreement(rollouts).differing == 0


def test_each_of_n_choices_carries_its_own_rows(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    rollouts = _complete(client, TEXTS[0], n=3, max_tokens=20)
    assert len({tuple(r.output) for r in rollouts}) == 3
    assert oracle.agreement(rollouts).differing == 0


def test_a_stop_string_keeps_the_rows(client: openai.OpenAI, oracle: TransformersOracle) -> None:
    stops = list("etao")
    rollouts = [
        rollout for text in TEXTS for rollout in _complete(client, text, max_tokens=150, stop=stops)
    ]
    assert sum(rollout.stop_reason in stops for rollout in rollouts) >= 6
    assert oracle.agreement(rollouts).differing == 0


def test_prompt_start_leaves_out_that_many_rows(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    rollouts = _complete(
        client, TEXTS[0], max_tokens=5, extra_body={"routed_experts_prompt_start": 7}
    )
    assert oracle.agreement(rollouts).differing == 0


def test_prompt_start_beyond_the_prompt_is_a_client_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        _complete(client, "ab", max_tokens=5, extra_body={"routed_experts_prompt_start": 99})


def test_chat_completions_carry_the_rows_of_transformers(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    done = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=20,
        n=2,
        extra_body={"return_token_ids": True},
    )
    rollouts = _rollouts(done.choices, done.prompt_token_ids)
    assert len(rollouts) == 2
    assert oracle.agreement(rollouts).differing == 0


def _asked(**options: Any) -> dict[str, Any]:
    return {"return_token_ids": True, "vllm_xargs": {f"r3_{k}": v for k, v in options.items()}}


def _decoded(rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Rollout]:
    """The rollouts with the native form of what `texts` encode."""
    for rollout, text in zip(rollouts, texts, strict=True):
        routed = decode(base64.b64decode(text), LAYOUT)
        rollout.routed, rollout.prompt_start = to_vllm_native(routed), routed.token_start
    return list(rollouts)


def _from_stream(chunks: Iterable[Any]) -> tuple[list[Rollout], list[str]]:
    """What a streaming answer amounts to; only the last chunk of a choice carries its rows."""
    rollouts: dict[int, Rollout] = {}
    texts: dict[int, str] = {}
    prompts: dict[int, list[int]] = {}
    chats_prompt: list[int] = []
    for chunk in chunks:
        for choice in chunk.choices:
            one = rollouts.setdefault(choice.index, Rollout("", choice.index, [], [], None, None))
            extra = choice.model_extra or {}
            if extra.get("prompt_token_ids"):
                prompts[choice.index] = extra["prompt_token_ids"]
            chats_prompt = (chunk.model_extra or {}).get("prompt_token_ids") or chats_prompt
            one.output += extra.get("token_ids") or []
            assert ("routed_experts" in extra) == (choice.finish_reason is not None)
            if choice.finish_reason is not None:
                one.finish_reason = choice.finish_reason
                texts[choice.index] = extra["routed_experts"]
    ordered = [rollouts[index] for index in sorted(rollouts)]
    for rollout in ordered:
        rollout.prompt = prompts.get(rollout.index, chats_prompt)
    return ordered, [texts[rollout.index] for rollout in ordered]


def test_an_encoded_answer_holds_the_rows_of_the_prompt_once(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    done = client.completions.create(
        model="tiny", prompt=TEXTS[:2], n=2, max_tokens=9, extra_body=_asked(encoding="r3", start=3)
    )
    rollouts = [
        Rollout("", c.index, c.prompt_token_ids, list(c.token_ids), None, c.finish_reason)
        for c in done.choices
    ]
    _decoded(rollouts, [choice.routed_experts for choice in done.choices])
    assert [r.prompt_start for r in rollouts] == [3, len(rollouts[0].prompt)] * 2
    assert oracle.agreement(rollouts).differing == 0


@pytest.mark.parametrize("encoding", ["native", "r3"])
@pytest.mark.parametrize("stop", [None, list("etao")])
def test_a_streamed_completion_carries_its_rows_in_the_last_chunk_of_each_choice(
    client: openai.OpenAI, oracle: TransformersOracle, encoding: str, stop: list[str] | None
) -> None:
    chunks = client.completions.create(
        model="tiny",
        prompt=TEXTS[:2],
        n=2,
        max_tokens=30,
        stop=stop,
        stream=True,
        extra_body=_asked(encoding=encoding),
    )
    rollouts, texts = _from_stream(chunks)
    assert len(rollouts) == 4
    _check_streamed(rollouts, texts, encoding, oracle)


@pytest.mark.parametrize("encoding", ["native", "r3"])
def test_a_streamed_chat_carries_its_rows_in_the_last_chunk_of_each_choice(
    client: openai.OpenAI, oracle: TransformersOracle, encoding: str
) -> None:
    chunks = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=20,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=_asked(encoding=encoding),
    )
    rollouts, texts = _from_stream(chunks)
    assert len(rollouts) == 2
    _check_streamed(rollouts, texts, encoding, oracle)


def _check_streamed(
    rollouts: list[Rollout], texts: list[str], encoding: str, oracle: TransformersOracle
) -> None:
    if encoding == "r3":
        _decoded(rollouts, texts)
        starts = {r.prompt_start == len(r.prompt) for r in rollouts}
        assert starts == {True, False}
    else:
        for rollout, text in zip(rollouts, texts, strict=True):
            rollout.routed = np.load(io.BytesIO(base64.b64decode(text)))
    assert oracle.agreement(rollouts).differing == 0


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_own_generate_carries_what_was_asked_for(
    url: str, oracle: TransformersOracle, stream: bool
) -> None:
    prompt = list(range(40))
    # Before 0.32 vLLM breaks off a stream of several completions.
    n = 1 if stream and installed_release() < (0, 32) else 2
    sampling = {"max_tokens": 8, "n": n, "temperature": 1.0}
    rollouts, texts = [], []
    with httpx.Client(base_url=url, timeout=60) as http:
        extra = {"r3_encoding": "r3", "r3_start": 5}
        body = {
            "token_ids": prompt,
            "sampling_params": {**sampling, "extra_args": extra},
            "stream": stream,
        }
        answer = http.post("/inference/v1/generate", json=body)
        assert answer.status_code == 200, answer.text
        lines = answer.text.splitlines() if stream else [f"data: {answer.text}"]
    outputs: dict[int, list[int]] = {0: [], 1: []}
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                outputs[choice["index"]] += choice["token_ids"]
                if choice["routed_experts"] is not None:
                    assert choice["finish_reason"] == "length"
                    rollouts.append(
                        Rollout("", choice["index"], prompt, outputs[choice["index"]], None, None)
                    )
                    texts.append(choice["routed_experts"])
    assert sorted(r.index for r in rollouts) == list(range(n))
    assert oracle.agreement(_decoded(rollouts, texts)).differing == 0


def test_with_routing_off_an_answer_carries_nothing(client: openai.OpenAI) -> None:
    off = _asked(routing="off")
    done = client.completions.create(model="tiny", prompt="ab", max_tokens=5, extra_body=off)
    assert done.choices[0].routed_experts is None
    chunks = client.completions.create(
        model="tiny", prompt="ab", max_tokens=5, stream=True, extra_body=off
    )
    extras = [choice.model_extra for chunk in chunks for choice in chunk.choices]
    assert extras
    assert not any("routed_experts" in extra for extra in extras)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r3_routing": 0}, "r3_routing is 0, expected 'on' or 'off'"),
    ({"r3_encoding": ["r3"]}, "r3_encoding is ['r3'], expected 'native' or 'r3'"),
    ({"r3_delivery": "mail"}, "r3_delivery is 'mail', expected 'response' or 'fetch'"),
    ({"r3_unrecorded": "zero"}, "r3_unrecorded is 'zero', expected 'omit' or 'sentinel'"),
    ({"r3_start": 99}, "r3_start is 99, expected 0 to 2"),
    ({"r3_start": -1}, "r3_start is -1, expected an integer from 0"),
    ({"r3_start": 1.5}, "r3_start is 1.5, expected an integer from 0"),
    ({"r3_begin": 1}, "the request has the unknown key 'r3_begin'"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_a_wrong_option_is_a_400_with_one_sentence(
    client: openai.OpenAI, wrong: dict[str, Any], said: str, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "stream": stream}
    asked["extra_body"] = {"vllm_xargs": wrong}
    with pytest.raises(openai.BadRequestError) as completion:
        client.completions.create(prompt="ab", **asked)
    assert said in str(completion.value)
    if "99" not in said:  # the chat template makes the prompt longer
        with pytest.raises(openai.BadRequestError) as chat:
            client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **asked)
        assert said in str(chat.value)


def test_the_server_goes_on_after_wrong_options(
    client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    assert oracle.agreement(_complete(client, "after", max_tokens=20)).differing == 0


def test_the_responses_api_answers_without_routed_experts(url: str) -> None:
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 8, "store": False}
    answer = httpx.post(f"{url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "routed_experts" not in answer.text


def test_the_server_survives_clients_that_disconnect(
    url: str, client: openai.OpenAI, oracle: TransformersOracle
) -> None:
    long = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "ignore_eos": True}
    for _ in range(4):
        with (
            httpx.Client(timeout=60) as leaving,
            leaving.stream("POST", f"{url}/v1/completions", json={**long, "stream": True}) as left,
        ):
            first = next(line for line in left.iter_lines() if line.startswith("data: "))
            assert "error" not in json.loads(first.removeprefix("data: "))
        _post_and_hang_up(url, "/v1/completions", json.dumps(long).encode())
    assert oracle.agreement(_complete(client, "after", max_tokens=20)).differing == 0


def _post_and_hang_up(url: str, path: str, body: bytes) -> None:
    host, port = httpx.URL(url).host, httpx.URL(url).port
    with socket.create_connection((host, port)) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )


def test_a_port_in_use_is_named_in_the_last_line(url: str, moe_model: Path) -> None:
    assert "Address already in use" in failing_serve(moe_model, httpx.URL(url).port)


def test_a_model_path_that_does_not_exist_is_named_in_the_last_line(tmp_path: Path) -> None:
    assert str(tmp_path / "missing") in failing_serve(tmp_path / "missing", 0)


def test_a_dense_model_is_refused_in_one_sentence(dense_model: Path) -> None:
    refusal = failing_serve(dense_model, 0)
    assert refusal.startswith("ValueError: --enable-return-routed-experts was given with")
    assert str(dense_model) in refusal
