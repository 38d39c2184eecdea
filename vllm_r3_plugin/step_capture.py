"""What one forward of a model runner routed: taken after it, attached to the step's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shared_schema import RowStatus
from vllm_r3_plugin.capturer import RoutingCapturer
from vllm_r3_plugin.host_copy import HostCopy, on_host
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.pipeline_rows import StageReceiver, StageSender
from vllm_r3_plugin.runner_batch import RunnerBatch, batch_of
from vllm_r3_plugin.step_rows import STEP_ROWS_ATTRIBUTE, StepRows


def attach_rows(output: Any, rows: StepRows) -> None:
    """Put a step's rows on the ``ModelRunnerOutput`` that carries them to the engine core.

    Every payload passes here, once: a test that loses payloads on purpose replaces this function.
    """
    setattr(output, STEP_ROWS_ATTRIBUTE, rows)


class StageRows:
    """One step's ids of this stage's layers while their copy to the host may still be under way."""

    def __init__(self, capturer: RoutingCapturer, num_tokens: int, journal: Journal) -> None:
        self._capturer = capturer
        self._journal = journal
        self._ids = capturer.copy_rows(num_tokens)

    def finish(self) -> np.ndarray[Any, Any] | None:
        """``[N, L_stage, k]`` ids, once they have arrived; ``None`` if a router did not report."""
        ids = self._ids.wait()
        layers = self._capturer.unreported_layers(ids)
        if not layers:
            return ids
        self._journal.note(
            RowStatus.CAPTURE_FAILED.name,
            f"a step's routing is unusable: the routers of layers {layers} did not report",
        )
        return None


class PendingRows:
    """One step's rows of all layers while their copies to the host may still be under way."""

    def __init__(
        self,
        batch: RunnerBatch,
        positions: HostCopy,
        own: StageRows | None,
        step: int,
        receiver: StageReceiver | None,
    ) -> None:
        self._batch = batch
        self._own = own
        self._step = step
        self._receiver = receiver
        self._positions = positions

    def finish(self) -> StepRows:
        """Wait for the copies, and for the rows of earlier stages."""
        batch, positions = self._batch, self._positions.wait()
        parts: list[np.ndarray[Any, Any] | None] = []
        if self._receiver is not None:
            earlier = self._receiver.take(self._step, len(positions))
            parts += [None] if earlier is None else earlier
        if self._own is not None:
            parts.append(self._own.finish())
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            nothing = np.zeros((1, 1, 1), np.uint8)
            return StepRows(
                batch.request_ids, batch.num_tokens, positions, nothing, RowStatus.CAPTURE_FAILED
            )
        ids = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
        return StepRows(batch.request_ids, batch.num_tokens, positions, ids)


class StepCapture:
    """Listens to a model runner: a snapshot after each forward, sent along with its output.

    It wraps the runner's methods, not the worker's, since Ray's executor calls the runner.

    Args:
        runner: vLLM's model runner, V1 or V2.
        capturer: of this stage's routers; ``None`` for a stage without a MoE layer.
        link: to the other pipeline stages, if there are any.
        is_last_stage: whether the runner's outputs are those of the engine.
        journal: where troubles are noted.

    """

    def __init__(
        self,
        runner: Any,
        capturer: RoutingCapturer | None,
        link: StageSender | StageReceiver | None,
        is_last_stage: bool,
        journal: Journal,
    ) -> None:
        self._runner = runner
        self._capturer = capturer
        self._link = link
        self._is_last_stage = is_last_stage
        self._journal = journal
        self._step = 0
        self._pending: PendingRows | None = None
        self._last_request_ids: list[str] = []
        self._last_positions: torch.Tensor | None = None
        self._positions: torch.Tensor | np.ndarray[Any, Any]
        self._execute_model: Callable[..., Any] = runner.execute_model
        self._sample_tokens: Callable[..., Any] = runner.sample_tokens
        runner.execute_model = self.execute_model
        runner.sample_tokens = self.sample_tokens

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the forward and take a snapshot of what was routed."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        self._pending = None
        if not num_tokens or kwargs.get("dummy_run"):
            return self._execute_model(scheduler_output, *args, **kwargs)
        self._step += 1
        armed = False
        try:
            if self._capturer is not None:
                self._capturer.arm(num_tokens)
            armed = True
        except Exception as error:
            self._journal.fail("preparing a capture", error)
        output = self._execute_model(scheduler_output, *args, **kwargs)
        try:
            if not armed:  # stale ids would pass for those of this step
                raise RuntimeError("the capture was not prepared")
            self._take_snapshot(num_tokens)
        except Exception as error:
            self._journal.fail("taking a snapshot", error, self._report_failure)
        return self._send(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; the output takes the step's rows along."""
        return self._send(self._sample_tokens(*args, **kwargs))

    def _take_snapshot(self, num_tokens: int) -> None:
        own = None
        if self._capturer is not None:
            own = StageRows(self._capturer, num_tokens, self._journal)
        if self._is_last_stage:
            receiver = self._link if isinstance(self._link, StageReceiver) else None
            batch = batch_of(self._runner, self._last_request_ids)
            self._last_request_ids = batch.request_ids
            if batch.positions is not self._last_positions:
                self._last_positions = batch.positions
                self._positions = on_host(batch.positions)
            positions = HostCopy(self._positions, num_tokens)
            self._pending = PendingRows(batch, positions, own, self._step, receiver)
        elif own is not None and isinstance(self._link, StageSender):
            self._link.send(self._step, own.finish)

    def _report_failure(self) -> None:
        """Spare the last stage the wait for rows that this one will not send."""
        if isinstance(self._link, StageSender):
            self._link.send(self._step, lambda: None)

    def _send(self, output: Any) -> Any:
        """Let ``output`` carry the pending rows, if it is the output of the step."""
        pending = self._pending
        if output is None or pending is None:
            return output
        self._pending = None
        get_output = getattr(output, "get_output", None)
        if get_output is None:
            self._attach(output, pending)
            return output

        def get_output_with_rows() -> Any:
            result = get_output()
            self._attach(result, pending)
            return result

        output.get_output = get_output_with_rows
        return output

    def _attach(self, output: Any, pending: PendingRows) -> None:
        try:
            if output.req_ids:  # the empty output is one object shared by all steps
                rows = pending.finish()
                if self._journal.has_new:
                    rows = rows._replace(events=tuple(self._journal.take_new().items()))
                attach_rows(output, rows)
        except Exception as error:
            self._journal.fail("sending a step's rows", error)
