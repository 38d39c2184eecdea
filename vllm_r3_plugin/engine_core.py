"""The engine core's part: the handshake with the workers, and rows of aborted requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from shared_schema import RoutingLayout
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.late_outputs import LateOutputs
from vllm_r3_plugin.out_of_band import OutOfBand
from vllm_r3_plugin.scheduler_factory import SchedulerFactory
from vllm_r3_plugin.wrapping import wrap_once

_journal = Journal()


def install() -> None:
    """Wrap what the engine core needs; engines without the flag only pass through."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    wrap_once(EngineCore, "_initialize_kv_caches", _initialize_kv_caches)
    wrap_once(EngineCoreProc, "_send_finish_outputs_to_client", _send_finish_outputs_to_client)
    wrap_once(EngineCore, "step", _step)
    wrap_once(EngineCore, "step_with_batch_queue", _step)
    EngineCore.moe_r3_abort = moe_r3_abort
    EngineCore.moe_r3_fetch = moe_r3_fetch
    EngineCore.moe_r3_layout = moe_r3_layout


def handshake(engine_core: Any) -> RoutingLayout:
    """Ask every worker what it captures; all must run this plugin and agree.

    Raises:
        RuntimeError: a worker does not run the plugin, or captures something else; the message
            names its host.

    """
    try:
        reports = engine_core.collective_rpc("moe_r3_report")
    except Exception as error:
        raise RuntimeError(
            f"a worker does not capture routing ({error}), expected worker_cls "
            f"{engine_core.vllm_config.parallel_config.worker_cls!r} in every worker: use an "
            "executor that honours worker_cls, or remove --enable-return-routed-experts."
        ) from error
    for rank, report in enumerate(reports):
        if report["version"] != reports[0]["version"]:
            raise RuntimeError(
                f"worker {rank} on host {report['host']} runs moe-r3 {report['version']}, expected "
                f"{reports[0]['version']} as on host {reports[0]['host']}: install the same "
                "version on every node."
            )
    # A worker captures the layers of its pipeline stage; without any, it has no layout.
    layouts = [RoutingLayout.from_dict(r["layout"]) for r in reports if r["layout"] is not None]
    if not layouts:
        raise RuntimeError(
            "no MoE router was found in the loaded model, expected at least one: serve this model "
            "without --enable-return-routed-experts."
        )
    layers = sorted({layer for layout in layouts for layer in layout.moe_layers})
    whole = replace(layouts[0], moe_layers=tuple(layers))
    for layout in layouts:
        if replace(layout, moe_layers=whole.moe_layers) != whole:
            raise RuntimeError(
                f"the workers capture {layouts[0]} and {layout}, expected the same number of "
                "experts, top-k and layers: load the same model on every node."
            )
    return whole


def moe_r3_abort(engine_core: Any, request_ids: list[str]) -> dict[str, list[Any]]:
    """Abort requests and return their rows; a method of ``EngineCore``, for front ends.

    Returns:
        ``[shape, bytes]`` of :func:`vllm_r3_plugin.in_flight.rows_array` by request id.

    """
    engine_core.abort_requests(request_ids)
    found = _rows_of_aborted(engine_core, request_ids, from_start=True)
    return {request_id: [list(rows.shape), rows.tobytes()] for request_id, rows in found.items()}


def moe_r3_layout(engine_core: Any) -> dict[str, Any]:
    """What the workers capture; a method of ``EngineCore``, for front ends."""
    layout: RoutingLayout = engine_core.scheduler.r3_layout
    return layout.to_dict()


def moe_r3_fetch(engine_core: Any, ticket: str, stop: int | None, row: int | None) -> Any:
    """Some rows that are held under ``ticket``; a method of ``EngineCore``, for front ends.

    Returns:
        a future of what :meth:`OutOfBand.read` returns, for which the engine core does not wait; or
        the reason why there are none.

    """
    out_of_band: OutOfBand = engine_core.scheduler.r3_out_of_band
    return out_of_band.read(ticket, stop, row)


def _step(original: Callable[..., Any], self: Any) -> Any:
    """Let large rows follow the step's other outputs, where a queue takes them."""
    outputs, executed = original(self)
    late: LateOutputs | None = getattr(self.scheduler, "r3_late", None)
    if late is not None and outputs:
        late.send(outputs, getattr(self, "output_queue", None))
    return outputs, executed


def _initialize_kv_caches(original: Callable[..., Any], self: Any, vllm_config: Any) -> Any:
    # Here every worker has loaded the model and none has captured a graph or compiled.
    scheduler_config = vllm_config.scheduler_config
    factory = scheduler_config.scheduler_cls
    if isinstance(factory, SchedulerFactory):
        scheduler_config.scheduler_cls = replace(factory, layout=handshake(self))
    return original(self, vllm_config)


def _send_finish_outputs_to_client(
    original: Callable[..., Any], self: Any, req_ids: list[str], client_index: int, reason: Any
) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    core_outputs = None
    with _journal.guard("returning the rows of paused requests"):
        rows = _rows_of_aborted(self, req_ids) if reason == FinishReason.ABORT else {}
        if rows:
            outputs = [EngineCoreOutput(i, [], finish_reason=reason) for i in req_ids]
            for output in outputs:
                output.routed_experts = rows.get(output.request_id)
            core_outputs = EngineCoreOutputs(finished_requests=set(req_ids), outputs=outputs)
    if core_outputs is None:
        original(self, req_ids, client_index, reason)
    else:
        self.output_queue.put_nowait((client_index, core_outputs))


def _rows_of_aborted(
    engine_core: Any, request_ids: Iterable[str], **options: bool
) -> dict[str, Any]:
    collect = getattr(engine_core.scheduler, "r3_rows_of_aborted", None)
    return collect(request_ids, **options) if collect is not None else {}
