"""Routed experts over HTTP from a real `vllm serve`."""

import base64
import io
import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from .rigs.http_server import failing_serve, serving
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

TEXTS = [f"def function_{i}(argument):" for i in range(24)]


@pytest.fixture(scope="module")
def url(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(moe_model, tmp_path_factory.mktemp("server") / "log") as found:
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
