"""A real `vllm serve` of two API server processes and a key: rows to fetch, and metrics.

What was counted reaches `/metrics` of either process, and either answers
`GET /v1/routed_experts/{ticket}`, also after faults.
"""

import io
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared_schema import decode, to_vllm_native

from .rigs.failing_on_demand import FAULT_FILE
from .rigs.http_server import serving
from .rigs.process_header import HEADER
from .rigs.rollouts import Rollout
from .rigs.tiny_models import MOE_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

KEY = "a-key"
MAX_HELD_REQUESTS = 40
PAGE_BYTES = 32 * len(MOE_LAYERS) * TOP_K
# Most requests take one page.
FETCH_MAX_BYTES = MAX_HELD_REQUESTS * PAGE_BYTES
OPTIONS = (
    *("--api-key", KEY, "--api-server-count", "2"),
    *("--middleware", "tests.vllm.rigs.process_header.name_process"),
    *("--additional-config", json.dumps({"r3": {"fetch_max_bytes": FETCH_MAX_BYTES}})),
    *("--worker-cls", "tests.vllm.rigs.failing_on_demand.FaultyWorker"),
    *("--scheduler-cls", "tests.vllm.rigs.failing_on_demand.FaultyScheduler"),
)
PROMPT_TOKENS, MAX_TOKENS = 40, 6
ROWS = PROMPT_TOKENS + MAX_TOKENS - 1
UNRECORDED = ("rows_unrecorded_total", "reason", "CAPTURE_FAILED")
LOST = ("rows_unrecorded_total", "reason", "STEP_LOST")
COMPLETE = ("requests_served_total", "routing", "complete")
INCOMPLETE = ("requests_served_total", "routing", "unrecorded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def client(moe_model: Path, folder: Path) -> Iterator[httpx.Client]:
    # A connection for each request, so that the system spreads them over the processes.
    limits = httpx.Limits(max_keepalive_connections=0)
    env = {FAULT_FILE: str(folder / "fault")}
    with (
        serving(moe_model, folder / "log", *OPTIONS, env=env) as url,
        httpx.Client(
            base_url=url, timeout=120, limits=limits, headers={"Authorization": f"Bearer {KEY}"}
        ) as found,
    ):
        yield found


def _answer(client: httpx.Client, first: str) -> str | None:
    """The routed experts in the response to a prompt that is new to the prefix cache."""
    settings = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    body = {"model": "tiny", "prompt": first.ljust(PROMPT_TOKENS), **settings}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    routed: str | None = answer.json()["choices"][0]["routed_experts"]
    return routed


def _metric(client: httpx.Client, name: str, label: str = "", value: str = "") -> float:
    """The sum of our metric over the engine's samples with that label."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"vllm:moe_r3_{name}"
        and (not label or sample.labels[label] == value)
        and {sample.labels["model_name"], sample.labels["engine"]} == {"tiny", "0"}
    )


def _rise(client: httpx.Client, *metric: str) -> Callable[[float], bool]:
    """Whether the metric rises by so much soon, and no more: statistics follow a step's outputs."""
    since = _metric(client, *metric)

    def rises(by: float) -> bool:
        deadline = time.monotonic() + 30
        while _metric(client, *metric) < since + by and time.monotonic() < deadline:
            time.sleep(0.1)
        return _metric(client, *metric) == since + by

    return rises


def test_rows_bytes_and_requests_are_counted(client: httpx.Client) -> None:
    rows, served = _rise(client, "rows_captured_total"), _rise(client, *COMPLETE)
    nothing_else = [_rise(client, *name) for name in (UNRECORDED, LOST, INCOMPLETE)]
    nothing_else.append(_rise(client, "events_total"))
    held = _rise(client, "bytes_held")
    for i in range(4):
        assert _answer(client, str(i)) is not None
    assert served(4)
    assert rows(4 * ROWS)
    assert held(4 * PAGE_BYTES)  # a full page of each prompt, for prefix-cache hits
    assert all(rises(0) for rises in nothing_else)


@pytest.mark.parametrize(
    ("place", "reason", "event"),
    [
        ("write", UNRECORDED, "error while storing a step: RuntimeError"),
        ("copy_rows", LOST, "error while taking a snapshot: RuntimeError"),
    ],
    ids=["store", "worker"],
)
def test_a_fault_is_counted_by_its_reason_and_its_place_and_logged_once(
    client: httpx.Client, folder: Path, place: str, reason: tuple[str, str, str], event: str
) -> None:
    rows, requests = _rise(client, *reason), _rise(client, *INCOMPLETE)
    fault = folder / "fault"
    fault.write_text(place)
    assert _answer(client, f"a {place}") is None
    fault.unlink()
    assert _answer(client, f"b {place}") is not None
    assert rows(ROWS)
    assert requests(1)
    assert _metric(client, "events_total", "event", event) >= 1
    assert (folder / "log").read_text().count(f"(logged once; counted as {event!r})") == 1


def _body(text: str, **settings: Any) -> dict[str, Any]:
    options = {"r3_delivery": "fetch", "r3_encoding": "r3", **settings.pop("options", {})}
    return {
        "model": "tiny",
        "prompt": text,
        "max_tokens": 20,
        "return_token_ids": True,
        "vllm_xargs": options,
        **settings,
    }


def _complete(client: httpx.Client, text: str, **settings: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/completions", json=_body(text, **settings))
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def _fetched(client: httpx.Client, choice: dict[str, Any], prompt: list[int]) -> Rollout:
    response = client.get(choice["routed_experts_path"])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    routed = decode(response.content)
    return Rollout(
        request="",
        index=choice["index"],
        prompt=prompt,
        output=choice["token_ids"],
        routed=to_vllm_native(routed),
        finish_reason=choice["finish_reason"],
        stop_reason=choice.get("stop_reason"),
        prompt_start=routed.token_start,
    )


def _rollout(client: httpx.Client, text: str, **settings: Any) -> Rollout:
    choice = _complete(client, text, **settings)[0]
    assert choice.get("routed_experts") is None
    return _fetched(client, choice, choice["prompt_token_ids"])


def test_rows_fetched_by_many_clients_are_those_of_transformers(
    client: httpx.Client, oracle: TransformersOracle
) -> None:
    with ThreadPoolExecutor(8) as pool:
        rollouts = list(pool.map(lambda i: _rollout(client, f"def f_{i}(x):"), range(24)))
    assert oracle.agreement(rollouts).differing == 0


def test_rows_behind_a_stop_string_are_cut_off(
    client: httpx.Client, oracle: TransformersOracle
) -> None:
    settings = {"stop": list("etao"), "max_tokens": 80}
    rollouts = [_rollout(client, f"def f_{i}(x):", **settings) for i in range(24)]
    assert sum(rollout.finish_reason == "stop" for rollout in rollouts) >= 6
    assert oracle.agreement(rollouts).differing == 0


def test_any_process_answers_again_and_again(client: httpx.Client) -> None:
    path = _complete(client, "abc")[0]["routed_experts_path"]
    answers = [client.get(path) for _ in range(40)]
    assert len({answer.headers[HEADER] for answer in answers}) == 2
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


def test_the_native_encoding_is_an_npy_file(client: httpx.Client) -> None:
    choice = _complete(client, "abc", options={"r3_encoding": "native", "r3_start": 2})[0]
    array = np.load(io.BytesIO(client.get(choice["routed_experts_path"]).content))
    assert array.shape == (3 + 20 - 1 - 2, 4, 4)


def test_a_stream_ends_with_the_path(client: httpx.Client, oracle: TransformersOracle) -> None:
    with client.stream("POST", "/v1/completions", json=_body("abc", stream=True)) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    choices = [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]
    assert all("routed_experts_path" not in choice for choice in choices[:-1])
    tokens = [token for choice in choices for token in choice["token_ids"] or []]
    last = {**choices[-1], "token_ids": tokens}
    rollout = _fetched(client, last, choices[0]["prompt_token_ids"])
    assert oracle.agreement([rollout]).differing == 0


@pytest.mark.parametrize("key", [{}, {"Authorization": "Bearer another"}])
def test_a_ticket_is_worth_nothing_without_the_servers_key(
    client: httpx.Client, key: dict[str, str]
) -> None:
    path = _complete(client, "abc")[0]["routed_experts_path"]
    headers = {"Authorization": key.get("Authorization", "")}
    assert client.get(path, headers=headers).status_code == 401
    assert client.get(path).status_code == 200


def test_tickets_are_long_random_and_listed_nowhere(client: httpx.Client) -> None:
    paths = [_complete(client, "abc", max_tokens=1)[0]["routed_experts_path"] for _ in range(4)]
    tickets = [path.removeprefix("/v1/routed_experts/").partition("?")[0] for path in paths]
    assert len(set(tickets)) == 4
    assert all(re.fullmatch(r"0\.[A-Za-z0-9_-]{32}", ticket) for ticket in tickets)
    for path in ("/v1/routed_experts", "/v1/routed_experts/"):
        assert client.get(path).status_code == 404
    assert client.post(paths[0]).status_code == 405


@pytest.mark.parametrize(
    "ticket",
    ["0.guessed-guessed-guessed-guessed-", "7.elsewhere", "no ticket", "0.x?stop=3", "0.x?stop=x"],
)
def test_an_unknown_ticket_is_one_sentence_and_404(client: httpx.Client, ticket: str) -> None:
    response = client.get(f"/v1/routed_experts/{ticket}")
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert message.startswith("there are no routed experts for this ticket, ")
    assert message.endswith(".")
    assert message.count(". ") == 0


def test_a_full_buffer_gives_up_the_oldest_and_the_server_goes_on(
    client: httpx.Client, oracle: TransformersOracle
) -> None:
    first = _complete(client, "abc")[0]["routed_experts_path"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: _complete(client, f"x{i}"), range(MAX_HELD_REQUESTS + 8)))
    gone = client.get(first)
    assert gone.status_code == 404
    assert "given up for newer ones" in gone.json()["error"]["message"]
    assert "raise fetch_max_bytes" in gone.json()["error"]["message"]
    assert oracle.agreement([_rollout(client, "afterwards")]).differing == 0
