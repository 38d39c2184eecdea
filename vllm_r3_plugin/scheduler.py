"""The scheduler: whichever would have run, with the routing of its requests kept and returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from shared_schema import RoutingLayout
from vllm_r3_plugin import metrics, releases
from vllm_r3_plugin.held_requests import HeldRequests
from vllm_r3_plugin.journal import Guard, Journal, logger
from vllm_r3_plugin.kv_blocks import KVBlocks
from vllm_r3_plugin.late_outputs import LateOutputs
from vllm_r3_plugin.memory import MemoryBounds
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.out_of_band import OutOfBand
from vllm_r3_plugin.page_store import PageStore, PendingHit
from vllm_r3_plugin.request_options import RequestOptions
from vllm_r3_plugin.row_reader import RowReader
from vllm_r3_plugin.row_sender import RowSender
from vllm_r3_plugin.step_rows import STEP_ROWS_ATTRIBUTE, StepRows
from vllm_r3_plugin.tracked_request import TrackedRequest
from vllm_r3_plugin.waiting_steps import WaitingSteps

_WAITING_STEPS = 16
"""Steps that are stored together, unless rows are asked for before."""


@dataclass
class Step:
    """A step that was scheduled and whose output has not been processed.

    Attributes:
        number: of the step, from 1.
        pending_hits: rows that are there once this step and those before it have been stored.
        stored_as: of requests that began again meanwhile, the name that this step's rows belong to.

    """

    number: int
    pending_hits: list[PendingHit]
    stored_as: dict[str, str] = field(default_factory=dict)


class RoutingScheduler:
    """Mixin over a vLLM scheduler class: keeps routed experts and writes them into outputs.

    It follows the requests through :meth:`schedule`, stores each step's rows before vLLM processes
    the step's tokens, and fills ``EngineCoreOutput.routed_experts`` where a request ends. Nothing
    that goes wrong here reaches vLLM: it costs rows, and is counted.
    """

    requests: dict[str, Any]
    kv_cache_manager: Any
    vllm_config: Any
    connector: Any
    hash_block_size: int

    def __init__(self, *args: Any, r3_layout: RoutingLayout, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.r3_journal = Journal()
        self.r3_layout = r3_layout
        self._r3_options = R3Options.of(self.vllm_config)
        self._r3_bounds = MemoryBounds.of(self, r3_layout)
        logger.info("moe-r3: %s", self._r3_bounds)
        self._r3_kv_blocks = KVBlocks(
            self.kv_cache_manager,
            self.hash_block_size,
            self.r3_journal.guard("numbering KV blocks", self._r3_start_over),
        )
        self._r3_stored = _build_store(self, self._r3_bounds)
        self._r3_waiting = WaitingSteps(
            r3_layout,
            self._r3_bounds.request_tokens,
            _WAITING_STEPS if self._r3_kv_blocks.are_kept else 1,
            self.r3_journal,
        )
        self.r3_reader = RowReader()
        self.r3_late = LateOutputs(self.r3_reader, self.r3_journal)
        self.r3_held = HeldRequests(
            self.r3_store,
            self.vllm_config.parallel_config.data_parallel_index,
            self._r3_options.fetch_max_bytes,
            self._r3_options.fetch_ttl_s,
            self.r3_journal,
        )
        self.r3_out_of_band = OutOfBand(lambda: self.r3_store, self.r3_held, self.r3_reader)
        self._r3_num_loaded: dict[str, int] = {}
        if self.connector is not None:
            self._r3_watch_loads()
        self._r3_tracked: dict[str, TrackedRequest] = {}
        self._r3_sender = RowSender(
            r3_layout,
            self._r3_tracked,
            self.r3_out_of_band,
            self.r3_late,
            self.r3_journal,
            self._r3_guard,
        )
        self._r3_restarted: set[str] = set()
        self._r3_given_up: set[str] = set()
        self._r3_steps: deque[Step] = deque()
        self._r3_step_number = 0
        self._r3_retired: deque[tuple[int, str]] = deque()

    # --- what vLLM calls ---------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule, then note which requests begin and which prefix-cache hits they had."""
        scheduler_output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._r3_step_number += 1
        step = Step(self._r3_step_number, [])
        self._r3_steps.append(step)
        # Here and in update_from_output no guards: in each step they take longer than their work.
        try:
            self.r3_reader.release()
            self.r3_held.release_expired()
            if self._r3_retired:
                self._r3_release_retired()
        except Exception as error:
            self.r3_journal.fail("releasing requests", error)
        try:
            replaced = self._r3_kv_blocks.take_replaced()
            if replaced and self.connector is None:  # it may load the same KV again
                self._r3_stored.withdraw(replaced)
        except Exception as error:
            give_up = partial(self._r3_give_up, ())
            self.r3_journal.fail("giving up pages of KV blocks", error, give_up)
        for new in scheduler_output.scheduled_new_reqs:
            with self._r3_guard("admitting a request", (new.req_id,)):
                self._r3_admit(new.req_id, scheduler_output, step)
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            with self._r3_guard("admitting a request again", (request_id,)):
                self._r3_admit(request_id, scheduler_output, step)
        return scheduler_output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Store the step's rows, let vLLM process its tokens, then send rows that are due."""
        step = self._r3_steps.popleft()
        if scheduler_output.total_num_scheduled_tokens:
            try:
                rows = getattr(model_runner_output, STEP_ROWS_ATTRIBUTE, None)
                self._r3_store_step(rows, scheduler_output, step)
            except Exception as error:
                give_up = partial(self._r3_give_up, scheduler_output.num_scheduled_tokens)
                self.r3_journal.fail("storing a step", error, give_up)
        # All that wait: before its output is processed, a later step's hit may lose its KV block.
        for waiting in (step, *self._r3_steps):
            if waiting.pending_hits:
                hits, waiting.pending_hits = waiting.pending_hits, []
                with self._r3_guard("resolving prefix-cache hits", {h.request_id for h in hits}):
                    waiting.pending_hits = self.r3_store.resolve(hits)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request_id in scheduler_output.scheduled_spec_decode_tokens:
            try:
                self._r3_settle(request_id)
            except Exception as error:
                give_up = partial(self._r3_give_up, (request_id,))
                self.r3_journal.fail("settling draft tokens", error, give_up)
        if self._r3_sender.is_due:
            with self.r3_journal.guard("sending rows", lambda: self._r3_sender.withdraw(outputs)):
                self._r3_sender.send(self.r3_store, outputs)
        try:
            self.r3_out_of_band.announce(outputs)
        except Exception as error:
            self.r3_journal.fail("announcing tickets", error)
        try:
            if self.r3_journal.has_new:
                metrics.send(outputs, self.r3_journal, self._r3_stored.nbytes)
        except Exception as error:
            self.r3_journal.fail("sending metrics", error)
        return outputs

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Reset; rows kept for prefix-cache hits belong to the old cache."""
        done = super().reset_prefix_cache(reset_running_requests, reset_connector)  # type: ignore[misc]
        # Where only the connector refused, the cache itself is empty.
        if done or reset_connector:
            loads_too = self.connector is None or (done and reset_connector)
            # Rows of the old cache must not outlive it, whatever happens.
            with self.r3_journal.guard("resetting the prefix cache", self._r3_start_over):
                self.r3_store.start_generation(loads_too=loads_too)
        return bool(done)

    def shutdown(self) -> None:
        """Shut down; say what was counted."""
        self.r3_journal.report()
        self.r3_reader.shutdown()
        super().shutdown()  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        with self._r3_guard("noting lost KV blocks", (request.request_id,)):
            if self._r3_waiting:  # now the blocks are still its own
                self._r3_store_waiting()
            self._r3_kv_blocks.lose(request.request_id)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        with self._r3_guard("preempting a request", (request.request_id,)):
            self._r3_restarted.add(request.request_id)

    def _handle_stopped_request(self, request: Any) -> bool:
        with self._r3_guard("collecting the rows of a request", (request.request_id,)):
            self._r3_sender.collect(self.r3_store, request)
        num_rows = request.num_tokens - 1
        finished = super()._handle_stopped_request(request)  # type: ignore[misc]
        with self._r3_guard("continuing a session", (request.request_id,)):
            if not finished:
                self._r3_continue_session(request, num_rows)
        return bool(finished)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        with self._r3_guard("keeping rows to be fetched", (request.request_id,)):
            self._r3_sender.hold_if_ended_by_stop_string(self.r3_store, request)
        with self._r3_guard("noting lost KV blocks", (request.request_id,)):
            self._r3_kv_blocks.lose(request.request_id)
        result = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        # Steps in flight may still write KV blocks that other requests hit: keep taking its rows.
        self._r3_retired.append((self._r3_step_number, request.request_id))
        return result

    def _handle_invalid_blocks(self, *args: Any, **kwargs: Any) -> Any:
        affected = super()._handle_invalid_blocks(*args, **kwargs)  # type: ignore[misc]
        for request_id in affected:
            with self._r3_guard("taking back a KV load that failed", (request_id,)):
                self.r3_store.rewind(request_id, self.requests[request_id].num_computed_tokens)
        return affected

    @property
    def r3_store(self) -> PageStore:
        """The rows of all steps whose output has been processed."""
        if self._r3_waiting:
            self._r3_store_waiting()
        return self._r3_stored

    # --- what the engine core asks -----------------------------------------------------------

    def r3_rows_of_aborted(
        self, request_ids: Iterable[str], *, from_start: bool = False
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Rows of requests that have just been aborted.

        Rows that have been sent are left out unless ``from_start``.
        """
        found: dict[str, np.ndarray[Any, Any]] = {}
        for request_id in request_ids:
            with self._r3_guard("collecting the rows of an aborted request", (request_id,)):
                tracked = self._r3_tracked.get(request_id)
                if tracked is None or not tracked.request.num_output_tokens:
                    continue
                if request_id in self.r3_out_of_band:
                    self._r3_sender.hold(self.r3_store, tracked)
                    continue
                if from_start:
                    tracked.sent = tracked.options.start
                rows = self._r3_sender.take(self.r3_store, tracked)
                if rows is not None:
                    found[request_id] = rows
        return found

    # --- following requests ------------------------------------------------------------------

    def _r3_admit(self, request_id: str, scheduler_output: Any, step: Step) -> None:
        if request_id in self._r3_given_up:
            return
        request = self.requests[request_id]
        start = request.num_computed_tokens - scheduler_output.num_scheduled_tokens[request_id]
        tracked = self._r3_tracked.get(request_id)
        former = None
        if tracked is None:
            options = RequestOptions.of(request.sampling_params, self._r3_options)
            tracked = TrackedRequest(request, options)
            self._r3_tracked[request_id] = tracked
            if tracked.is_returned and options.delivery == "fetch":
                self.r3_out_of_band.begin(request, options)
            elif tracked.leaves_with_each_output:
                self._r3_sender.riding.add(request_id)
        elif request_id not in self._r3_restarted:
            return  # a session, in the KV blocks that it has
        else:
            self._r3_restarted.discard(request_id)
            former = self._r3_set_aside(request, step)
            if request.num_output_tokens and tracked.is_returned:
                tracked.kept = request.num_tokens - 1
        if not tracked.is_returned and not self.vllm_config.cache_config.enable_prefix_caching:
            return  # nobody will ask for its rows
        num_loaded = self._r3_num_loaded.pop(request_id, 0)
        step.pending_hits += self.r3_store.admit(
            request_id, start, request.block_hashes, tracked.kept, num_loaded, former
        )

    def _r3_continue_session(self, request: Any, num_rows: int) -> None:
        """Follow a session to its next turn; it has rows of ``num_rows`` tokens to go on behind."""
        if request.num_computed_tokens > num_rows:
            # Up to 0.32: it goes on behind draft tokens that the end of the turn cut off.
            self.r3_journal.note(
                "SESSION_SHIFTED",
                f"session {request.request_id} goes on at position {request.num_computed_tokens}, "
                f"expected {num_rows}: its tokens are not those that its client has",
            )
            self._r3_give_up((request.request_id,))
        elif request.num_computed_tokens < num_rows:
            self._r3_restarted.add(request.request_id)
        else:
            self.r3_store.settle(request.request_id, num_rows)
        if releases.discards_output(request):
            for step in self._r3_steps:
                step.stored_as[request.request_id] = ""

    def _r3_set_aside(self, request: Any, step: Step) -> str | None:
        """A name for the rows of steps whose output vLLM drops, though hits may use their KV."""
        if not releases.discards_output(request):
            return None
        former = f"{request.request_id} before step {step.number}"
        for earlier in self._r3_steps:
            if earlier is not step:
                earlier.stored_as.setdefault(request.request_id, former)
                earlier.pending_hits = [
                    hit for hit in earlier.pending_hits if hit.request_id != request.request_id
                ]
        self._r3_retired.append((step.number - 1, former))
        return former

    def _r3_watch_loads(self) -> None:
        """Hear how many tokens' KV each request loads through the KV connector."""
        update_state_after_alloc = self.connector.update_state_after_alloc

        def watch(request: Any, blocks: Any, num_external_tokens: int) -> None:
            if num_external_tokens:
                self._r3_num_loaded[request.request_id] = num_external_tokens
            update_state_after_alloc(request, blocks, num_external_tokens)

        self.connector.update_state_after_alloc = watch

    def _r3_guard(self, place: str, concerned: Iterable[str]) -> Guard:
        """A guard after whose exception the routing of the requests concerned is unrecorded."""
        return self.r3_journal.guard(place, partial(self._r3_give_up, concerned))

    def _r3_give_up(self, request_ids: Iterable[str]) -> None:
        """Forget all rows of requests, for good: nobody knows how far the work on them got."""
        self._r3_given_up.update(request_ids)
        try:
            self.r3_store.repair(request_ids)
        except Exception:
            self._r3_start_over()
            raise

    def _r3_start_over(self) -> None:
        """Give up all requests under way, and what is kept for prefix-cache hits."""
        self._r3_given_up.update(self._r3_tracked)
        self._r3_waiting.take()
        # Without memory for another store there is none: requests are given up until there is.
        vars(self).pop("_r3_stored", None)
        self._r3_stored = _build_store(self, self._r3_bounds)
        self.r3_held.start_over(self._r3_stored)

    def _r3_store_step(self, rows: StepRows | None, scheduler_output: Any, step: Step) -> None:
        if rows is None:
            self.r3_journal.note("STEP_LOST", "a step came back without its routing")
            return
        for event, number in rows.events:
            self.r3_journal.count(event, number)
        if step.stored_as:
            names = [step.stored_as.get(name, name) for name in rows.request_ids]
            rows = rows._replace(request_ids=names)
        self._r3_waiting.add(rows, scheduler_output)
        # Before requests that began again add keys to those of their earlier pages.
        if step.stored_as or self._r3_waiting.are_due:
            self._r3_store_waiting()

    def _r3_store_waiting(self) -> None:
        waiting = self._r3_waiting.take()

        def give_up() -> None:
            self._r3_give_up({name for step in waiting for name in step.rows.request_ids if name})

        with self.r3_journal.guard("storing a step", give_up):
            steps, store = self._r3_waiting.fitting(waiting), self._r3_stored
            if not steps:
                return
            dropped, written = store.rows_dropped, store.rows_written
            store.write(steps)
            self.r3_journal.count(metrics.ROWS_CAPTURED, store.rows_written - written)
            if store.rows_dropped > dropped:
                self.r3_journal.note(
                    "STORE_FULL",
                    f"the routing store is full at {store.num_pages} pages of {store.page_size} "
                    'rows, rows are dropped: raise max_bytes in additional_config["r3"]',
                    number=store.rows_dropped - dropped,
                )

    def _r3_settle(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is not None:
            self.r3_store.settle(request_id, request.num_tokens - 1)

    def _r3_release_retired(self) -> None:
        oldest = self._r3_steps[0].number if self._r3_steps else self._r3_step_number + 1
        while self._r3_retired and self._r3_retired[0][0] < oldest:
            if self._r3_retired[0][1] in self.r3_late:
                return
            _, request_id = self._r3_retired.popleft()
            with self._r3_guard("releasing a request", (request_id,)):
                self._r3_count_served(request_id)
                self.r3_store.release(request_id)
            self._r3_tracked.pop(request_id, None)
            self._r3_num_loaded.pop(request_id, None)
            self.r3_out_of_band.forget(request_id)
            for members in (
                self._r3_sender.riding,
                self._r3_restarted,
                self._r3_given_up,
            ):
                members.discard(request_id)

    def _r3_count_served(self, request_id: str) -> None:
        tracked = self._r3_tracked.get(request_id)
        if request_id in self._r3_given_up or (tracked is not None and tracked.incomplete):
            self.r3_journal.count(f"{metrics.REQUESTS_SERVED}unrecorded")
        elif tracked is not None and tracked.sent > tracked.options.start:
            self.r3_journal.count(f"{metrics.REQUESTS_SERVED}complete")


def _build_store(scheduler: RoutingScheduler, bounds: MemoryBounds) -> PageStore:
    try:
        return PageStore(
            bounds.layout,
            bounds.page_size,
            bounds.request_tokens,
            bounds.cached_pages,
            bounds.max_pages,
            scheduler._r3_kv_blocks,
        )
    except MemoryError as error:
        raise MemoryError(
            f"the system refuses host memory for routing rows ({error}), expected up to "
            f'{bounds.host_nbytes:,} bytes: set max_bytes in additional_config["r3"] to less.'
        ) from error


def routing_scheduler(base: type, layout: RoutingLayout, **kwargs: Any) -> Any:
    """Build a scheduler of class ``base`` that also keeps routing; ``kwargs`` are vLLM's."""
    composed = type(f"Routing{base.__name__}", (RoutingScheduler, base), {"__module__": __name__})
    return composed(r3_layout=layout, **kwargs)
