"""Counts ride on the statistics of every engine core and reach the metrics under its label."""

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutputs

import vllm_r3_plugin
from vllm_r3_plugin import metrics
from vllm_r3_plugin.journal import Journal


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
