"""What was counted, in vLLM's own Prometheus metrics.

The counts ride on the statistics that the engine core sends along with its outputs, so that no
message is added; without statistics (``--disable-log-stats``) they stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared_schema import RowStatus
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.wrapping import wrap_once

ROWS_CAPTURED = "rows_captured"
ROWS_UNRECORDED = "rows_unrecorded:"
REQUESTS_SERVED = "requests_served:"
"""Counted events that have a metric of their own; the last two end in the value of its label."""

_KEY = "moe_r3"

_journal = Journal()


def install() -> None:
    """Wrap what shows the metrics; engines without the flag only pass through."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    wrap_once(StatLoggerManager, "__init__", _init)
    wrap_once(StatLoggerManager, "record", _record)


def send(outputs: dict[int, Any], journal: Journal, bytes_held: int) -> None:
    """In the engine core: let one of a step's outputs carry what is new, if it has statistics.

    Args:
        outputs: ``EngineCoreOutputs`` by client.
        journal: the counts.
        bytes_held: host memory of the rows held, in bytes.

    """
    for core_outputs in outputs.values():
        stats = core_outputs.scheduler_stats
        if stats is not None:
            carried = {"counts": journal.take_new(), "bytes_held": bytes_held}
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), _KEY: carried}
            return


def _init(
    original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, vllm_config, *args, **kwargs)
    self.moe_r3_metrics = []
    if isinstance(vllm_config.scheduler_config.scheduler_cls, SchedulerFactory):
        with _journal.guard("adding metrics"):
            self.moe_r3_metrics = _metrics_beside(self.stat_loggers)


def _metrics_beside(stat_loggers: list[Any]) -> list[RoutingMetrics]:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    return [RoutingMetrics(x) for x in stat_loggers if isinstance(x, PrometheusStatLogger)]


def _record(
    original: Callable[..., Any],
    self: Any,
    scheduler_stats: Any,
    iteration_stats: Any,
    mm_cache_stats: Any = None,
    engine_idx: int | None = None,
) -> None:
    with _journal.guard("recording metrics"):
        # vLLM's loggers take what is there for statistics of a KV connector.
        ours = ((scheduler_stats and scheduler_stats.kv_connector_stats) or {}).pop(_KEY, None)
        if ours is not None:
            scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats or None
            for metrics in self.moe_r3_metrics:
                metrics.record(ours, engine_idx or 0)
    original(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)


class RoutingMetrics:
    """The metrics of all engines that one of vLLM's Prometheus loggers shows.

    Args:
        stat_logger: a ``PrometheusStatLogger``; its kinds of metric and labels are used, since
            under Ray they are others.

    """

    def __init__(self, stat_logger: Any) -> None:
        self._labels: dict[int, list[str]] = stat_logger.per_engine_labelvalues

        def counter(name: str, documentation: str, *labels: str) -> Any:
            return stat_logger._counter_cls(
                name=f"vllm:moe_r3_{name}",
                documentation=documentation,
                labelnames=["model_name", "engine", *labels],
            )

        self._captured = counter("rows_captured", "Routing rows (one per token) that were stored.")
        self._unrecorded = counter(
            "rows_unrecorded", "Routing rows due to a request that are unrecorded.", "reason"
        )
        self._served = counter(
            "requests_served", "Requests that ended, by whether all their rows left.", "routing"
        )
        self._events = counter(
            "events",
            "What went wrong with routing, by the name it was logged with.",
            "event",
        )
        self._bytes_held = stat_logger._gauge_cls(
            name="vllm:moe_r3_bytes_held",
            documentation="Host memory of the engine core that holds routing rows, in bytes.",
            multiprocess_mode="mostrecent",
            labelnames=["model_name", "engine"],
        )
        for labels in self._labels.values():
            self._captured.labels(*labels)
            for status in list(RowStatus)[1:]:
                self._unrecorded.labels(*labels, status.name)
            for routing in ("complete", "unrecorded"):
                self._served.labels(*labels, routing)

    def record(self, carried: dict[str, Any], engine: int) -> None:
        """Add what :func:`send` put on an engine's statistics."""
        labels = self._labels[engine]
        self._bytes_held.labels(*labels).set(carried["bytes_held"])
        for event, number in carried["counts"].items():
            if event == ROWS_CAPTURED:
                self._captured.labels(*labels).inc(number)
            elif event.startswith(ROWS_UNRECORDED):
                reason = event.removeprefix(ROWS_UNRECORDED)
                self._unrecorded.labels(*labels, reason).inc(number)
            elif event.startswith(REQUESTS_SERVED):
                self._served.labels(*labels, event.removeprefix(REQUESTS_SERVED)).inc(number)
            else:
                self._events.labels(*labels, event).inc(number)
