"""What was counted reaches /metrics, from every engine core, without a message of its own."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.engine import EngineCoreOutputs

import vllm_r3_plugin
from vllm_r3_plugin import metrics
from vllm_r3_plugin.journal import Journal

from .rigs.failing_on_demand import FAULT_FILE
from .rigs.http_server import serving
from .rigs.tiny_models import MOE_LAYERS, TOP_K

PROMPT_TOKENS, MAX_TOKENS = 40, 6
ROWS = PROMPT_TOKENS + MAX_TOKENS - 1
PAGE_BYTES = 32 * len(MOE_LAYERS) * TOP_K
"""One full page of each prompt is kept for prefix-cache hits."""
UNRECORDED = ("rows_unrecorded_total", "reason", "CAPTURE_FAILED")
LOST = ("rows_unrecorded_total", "reason", "STEP_LOST")
COMPLETE = ("requests_served_total", "routing", "complete")
INCOMPLETE = ("requests_served_total", "routing", "unrecorded")


class Server(NamedTuple):
    """A server with two front ends over one engine core, whose faults a file switches on."""

    url: str
    fault_file: Path
    log: Path

    def complete(self, first: str) -> str | None:
        """The routed experts of one completion, its prompt new to the prefix cache."""
        answer = httpx.post(
            f"{self.url}/v1/completions",
            json={
                "model": "tiny",
                "prompt": first.ljust(PROMPT_TOKENS),
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
            },
            timeout=60,
        )
        assert answer.status_code == 200
        routed: str | None = answer.json()["choices"][0]["routed_experts"]
        return routed

    def metric(self, name: str, label: str = "", value: str = "") -> float:
        """The sum of our metric over the engines' samples with that label."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        found = [
            sample.value
            for sample in samples
            if sample.name == f"vllm:moe_r3_{name}"
            and (not label or sample.labels[label] == value)
            and {sample.labels["model_name"], sample.labels["engine"]} == {"tiny", "0"}
        ]
        return sum(found)

    def rises(self, by: float, *metric: str, since: float) -> bool:
        """Whether the metric reaches `since + by` soon: statistics follow a step's outputs."""
        deadline = time.monotonic() + 30
        while self.metric(*metric) < since + by:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return self.metric(*metric) == since + by


@pytest.fixture(scope="module")
def server(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = (
        *("--api-server-count", "2"),
        *("--worker-cls", "tests.vllm.rigs.failing_on_demand.FaultyWorker"),
        *("--scheduler-cls", "tests.vllm.rigs.failing_on_demand.FaultyScheduler"),
    )
    fault_file = folder / "fault"
    with serving(moe_model, folder / "log", *options, env={FAULT_FILE: str(fault_file)}) as url:
        yield Server(url, fault_file, folder / "log")


def test_rows_bytes_and_requests_are_counted(server: Server) -> None:
    rows, served = server.metric("rows_captured_total"), server.metric(*COMPLETE)
    for i in range(4):
        assert server.complete(str(i)) is not None
    assert server.rises(4, *COMPLETE, since=served)
    assert server.rises(4 * ROWS, "rows_captured_total", since=rows)
    assert server.metric("bytes_held") == 4 * PAGE_BYTES
    for name in (UNRECORDED, LOST, INCOMPLETE, ("events_total",)):
        assert server.metric(*name) == 0


@pytest.mark.parametrize(
    ("place", "reason", "event"),
    [
        ("write", UNRECORDED, "error while storing a step: RuntimeError"),
        ("copy_rows", LOST, "error while taking a snapshot: RuntimeError"),
    ],
    ids=["store", "worker"],
)
def test_a_fault_is_counted_by_its_reason_and_its_place_and_logged_once(
    server: Server, place: str, reason: tuple[str, str, str], event: str
) -> None:
    rows, requests = server.metric(*reason), server.metric(*INCOMPLETE)
    server.fault_file.write_text(place)
    assert server.complete(f"a {place}") is None
    server.fault_file.unlink()
    assert server.complete(f"b {place}") is not None
    assert server.rises(ROWS, *reason, since=rows)
    assert server.rises(1, *INCOMPLETE, since=requests)
    assert server.metric("events_total", "event", event) >= 1
    assert server.log.read_text().count(f"(logged once; counted as {event!r})") == 1


def _through_the_socket(outputs: Any) -> Any:
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))


def test_statistics_of_a_kv_connector_travel_beside_ours() -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    journal = Journal()
    journal.count(metrics.ROWS_CAPTURED, 3)
    sent = {0: EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats={"its": 1}))}
    metrics.send(sent, journal, 10)
    stats = _through_the_socket(sent[0]).scheduler_stats
    recorded: list[Any] = []

    class Manager:
        moe_r3_metrics = ()

    metrics._record(
        lambda *args: recorded.append(args[1].kv_connector_stats), Manager(), stats, None
    )
    assert recorded == [{"its": 1}]
    assert journal.take_new() == {}


def test_without_statistics_nothing_is_sent_and_nothing_is_lost() -> None:
    journal = Journal()
    journal.count(metrics.ROWS_CAPTURED, 3)
    outputs = {0: EngineCoreOutputs()}
    metrics.send(outputs, journal, 10)
    assert outputs[0].scheduler_stats is None
    assert journal.take_new() == {metrics.ROWS_CAPTURED: 3}


def test_each_engine_core_has_its_label(moe_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import REGISTRY
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm_r3_plugin.register()
    config = EngineArgs(
        str(moe_model), enable_return_routed_experts=True, served_model_name="tiny"
    ).create_engine_config()
    manager = StatLoggerManager(config, engine_idxs=[0, 1])
    for engine in (0, 1):
        journal = Journal()
        journal.count(metrics.ROWS_CAPTURED, 3 + engine)
        sent = {0: EngineCoreOutputs(scheduler_stats=SchedulerStats())}
        metrics.send(sent, journal, 10)
        stats = _through_the_socket(sent[0]).scheduler_stats
        manager.record(stats, None, engine_idx=engine)
        assert stats.kv_connector_stats is None
    for engine in (0, 1):
        labels = {"model_name": "tiny", "engine": str(engine)}
        found = REGISTRY.get_sample_value("vllm:moe_r3_rows_captured_total", labels)
        assert found == 3 + engine
