"""The worker: the platform's own worker class, with routing captured and sent along.

vLLM asks this module for a class by name. The name spells the class that would have run without
us, so that a user's own worker class keeps working: ``over:package:module:Class``.
"""

from __future__ import annotations

import socket
from typing import Any

import torch

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.capturer import RoutingCapturer, copy_to_host, find_routers
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import PLUGIN_VERSION, R3Options
from vllm_r3_plugin.runner_batch import RunnerBatch, batch_of
from vllm_r3_plugin.step_rows import STEP_ROWS_ATTRIBUTE, StepRows

_OVER = "over:"


class PendingRows:
    """One step's rows while their copy to the host may still be under way."""

    def __init__(self, batch: RunnerBatch, capturer: RoutingCapturer, journal: Journal) -> None:
        self._batch = batch
        self._capturer = capturer
        self._journal = journal
        num_tokens = len(batch.positions)
        self._ids = capturer.copy_rows(num_tokens)
        self._positions = copy_to_host(batch.positions)
        self._copied = None
        if batch.positions.device.type != "cpu":
            self._copied = torch.Event(batch.positions.device)
            self._copied.record()

    def finish(self) -> StepRows:
        """Wait for the copy, and see whether every router reported."""
        if self._copied is not None:
            self._copied.synchronize()
        status = RowStatus.RECORDED
        layers = self._capturer.unreported_layers(self._ids)
        if layers:
            status = RowStatus.CAPTURE_FAILED
            self._journal.note(
                status.name,
                f"a step's routing is unusable: the routers of MoE layers number {layers} did not "
                "report",
            )
        batch = self._batch
        return StepRows(batch.request_ids, batch.num_tokens, self._positions, self._ids, status)


def attach_rows(output: Any, rows: StepRows) -> None:
    """Put a step's rows on the ``ModelRunnerOutput`` that carries them to the engine core.

    Every payload passes here, once: a test that loses payloads on purpose replaces this function.
    """
    setattr(output, STEP_ROWS_ATTRIBUTE, rows)


class RoutingCaptureWorker:
    """Mixin over a vLLM worker class: captures routed experts and sends each step's rows along."""

    vllm_config: Any
    model_runner: Any
    _r3_capturer: RoutingCapturer | None = None
    _r3_pending: PendingRows | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then listen to the routers: before any graph is captured or compiled."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        R3Options.of(self.vllm_config).require_version(PLUGIN_VERSION, socket.gethostname())
        self._r3_journal = Journal()
        self._r3_bind()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload, then listen again: kernels may have been rebuilt."""
        super().reload_weights(*args, **kwargs)  # type: ignore[misc]
        self._r3_bind()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the forward and take a snapshot of what was routed."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        capturer = self._r3_capturer
        self._r3_pending = None
        if capturer is None or not num_tokens:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        with self._r3_journal.guard("preparing a capture"):
            capturer.arm(num_tokens)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        with self._r3_journal.guard("taking a snapshot"):
            batch = batch_of(self.model_runner, num_tokens)
            self._r3_pending = PendingRows(batch, capturer, self._r3_journal)
        return self._r3_send(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; the output takes the step's rows along."""
        return self._r3_send(super().sample_tokens(grammar_output))  # type: ignore[misc]

    def moe_r3_report(self) -> dict[str, Any]:
        """What the engine core asks every worker at start-up."""
        assert self._r3_capturer is not None
        return {
            "host": socket.gethostname(),
            "version": PLUGIN_VERSION,
            "layout": self._r3_capturer.layout.to_dict(),
        }

    def _r3_bind(self) -> None:
        config = self.vllm_config.model_config
        num_layers = config.get_total_num_hidden_layers()
        sources = list(
            find_routers(
                self.model_runner.get_model(), num_layers, config.get_num_experts_per_tok()
            )
        )
        if self._r3_capturer is None:
            layout = RoutingLayout(
                num_experts=config.get_num_experts(),
                top_k=_common_top_k(sources),
                moe_layers=tuple(sorted(source.layer for source in sources)),
                num_hidden_layers=num_layers,
            )
            max_tokens = self.model_runner.max_num_tokens
            self._r3_capturer = RoutingCapturer(layout, max_tokens, self.model_runner.device)
        self._r3_capturer.bind(sources)

    def _r3_send(self, output: Any) -> Any:
        """Let ``output`` carry the pending rows, if it is the output of the step."""
        from vllm.v1.outputs import AsyncModelRunnerOutput

        pending = self._r3_pending
        if output is None or pending is None:
            return output
        self._r3_pending = None
        if not isinstance(output, AsyncModelRunnerOutput):
            self._r3_attach(output, pending)
            return output
        get_output = output.get_output

        def get_output_with_rows() -> Any:
            result = get_output()
            self._r3_attach(result, pending)
            return result

        output.get_output = get_output_with_rows
        return output

    def _r3_attach(self, output: Any, pending: PendingRows) -> None:
        with self._r3_journal.guard("sending a step's rows"):
            if output.req_ids:  # the empty output is one object shared by all steps
                attach_rows(output, pending.finish())


def _common_top_k(sources: list[Any]) -> int:
    if not sources:
        raise ValueError(
            "no MoE router was found in the loaded model, expected at least one: serve this model "
            "without --enable-return-routed-experts."
        )
    by_top_k = {source.top_k: source.name for source in sources}
    if len(by_top_k) > 1:
        raise ValueError(
            f"the MoE layers choose different numbers of experts ({by_top_k}), expected the same "
            "in all: serve this model without --enable-return-routed-experts."
        )
    return int(next(iter(by_top_k)))


def worker_cls_over(base: str) -> str:
    """Name under which vLLM finds, in every process, our worker over the class named ``base``."""
    return f"{__name__}.{_OVER}{base.replace('.', ':')}"


def __getattr__(name: str) -> type:
    if not name.startswith(_OVER):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    base = resolve_obj_by_qualname(name.removeprefix(_OVER).replace(":", "."))
    bases = (RoutingCaptureWorker, base)
    composed = type(f"RoutingCapture{base.__name__}", bases, {"__module__": __name__})
    globals()[name] = composed
    return composed
