"""An independent record of every routing decision, taken at the routers of a live engine.

It shares nothing with a capture path: it wraps each router's `_compute_routing`, takes token ids
and positions from the forward itself, and keeps a mirror of the KV cache (one entry for each
physical slot), so that a row that came from the prefix cache is known by the KV that was used.
That works only inside the worker, where slots are written in the order of execution.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rollouts import Rollout


@dataclass
class _Request:
    # (step, positions [n], tokens [n] or None, ids [n, L_moe, k]) of each forward or cache hit.
    rows: list[tuple[int, np.ndarray, np.ndarray | None, np.ndarray]] = field(default_factory=list)
    # For each token that the engine sampled and kept: the position that it was sampled at, which
    # is that of the token before, and the step.
    sampled: list[tuple[int, int]] = field(default_factory=list)
    num_preemptions: int = 0
    # Up to 0.32 vLLM may use KV that is not that of the request's tokens: of a block that was
    # cached and then not computed, or behind draft tokens that the end of a session's turn cut off.
    is_garbled: bool = False


class RouterHook:
    """Attach to an `LLM` whose engine core runs in this process."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.max_concurrent_batches = core.vllm_config.max_concurrent_batches
        self.requests: dict[str, _Request] = defaultdict(_Request)
        self.steps = 0
        self.mixed_steps = 0
        self.chunked_prefills = 0
        self.hits = 0
        self.preempted_in_flight = 0
        self.finished_while_preempted = 0
        self._step_of: dict[int, tuple[int, Any]] = {}
        self._layers: dict[int, np.ndarray] = {}
        self._mirror: np.ndarray | None = None
        self._wrap()

    def _wrap(self) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        for module in self.runner.get_model().modules():
            if isinstance(module, MoERunner):
                self._wrap_router(module.router, module.layer_id)
        execute, forward = self.runner.execute_model, self.runner._model_forward
        update, preempt = self.scheduler.update_from_output, self.scheduler._preempt_request
        update_request = self.scheduler._update_request_with_output
        handle_stopped = self.scheduler._handle_stopped_request
        pool = self.scheduler.kv_cache_manager.block_pool
        get_new_blocks = pool.get_new_blocks

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._scheduled = scheduler_output
            self._step_of[id(scheduler_output)] = (self.steps, scheduler_output)
            result = execute(scheduler_output, *args, **kwargs)
            self.steps += 1
            return result

        def model_forward(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
            self._layers.clear()
            result = forward(input_ids, positions, *args, **kwargs)
            # Without token ids the prompts are embeddings, and tokens are not compared.
            tokens = np.full(len(positions), -1) if input_ids is None else input_ids.numpy().copy()
            self._record(tokens, positions.numpy().copy())
            return result

        def update_from_output(scheduler_output: Any, *args: Any) -> Any:
            known = {
                r: self.scheduler.requests[r]
                for r in scheduler_output.num_scheduled_tokens
                if r in self.scheduler.requests
            }
            was_preempted = {r for r in known if known[r].status.name == "PREEMPTED"}
            self._updated_step, _ = self._step_of.pop(id(scheduler_output))
            result = update(scheduler_output, *args)
            for name, request in known.items():
                self.requests[name].num_preemptions = request.num_preemptions
                self.finished_while_preempted += name in was_preempted and request.is_finished()
            return result

        def update_request_with_output(request: Any, *args: Any, **kwargs: Any) -> Any:
            before = request.num_tokens
            kept, stopped = update_request(request, *args, **kwargs)
            self.requests[request.request_id].sampled += [
                (before - 1 + i, self._updated_step) for i in range(len(kept))
            ]
            return kept, stopped

        def preempt_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted_in_flight += request.num_in_flight_tokens > 0
            return preempt(request, *args, **kwargs)

        def handle_stopped_request(request: Any) -> bool:
            num_rows = request.num_tokens - 1
            finished: bool = handle_stopped(request)
            if not finished and request.num_computed_tokens > num_rows:
                self.requests[request.request_id].is_garbled = True
            return finished

        def allocate(*args: Any, **kwargs: Any) -> Any:
            blocks = get_new_blocks(*args, **kwargs)
            if self._mirror is not None:
                size = self.runner.input_batch.block_table[0].block_size
                for block in blocks:
                    self._mirror[block.block_id * size : (block.block_id + 1) * size] = -1
            return blocks

        pool.get_new_blocks = allocate
        self.scheduler._handle_stopped_request = handle_stopped_request
        self.runner.execute_model, self.runner._model_forward = execute_model, model_forward
        self.scheduler.update_from_output = update_from_output
        self.scheduler._update_request_with_output = update_request_with_output
        self.scheduler._preempt_request = preempt_request

    def _wrap_router(self, router: Any, layer: int) -> None:
        compute = router._compute_routing

        def compute_routing(*args: Any, **kwargs: Any) -> Any:
            weights, ids = compute(*args, **kwargs)
            self._layers[layer] = ids.numpy().copy()
            return weights, ids

        router._compute_routing = compute_routing

    def _record(self, tokens: np.ndarray, positions: np.ndarray) -> None:
        ids = np.stack([self._layers[layer] for layer in sorted(self._layers)], axis=1)
        table = self.runner.input_batch.block_table[0]
        blocks, block_size = table.get_numpy_array(), table.block_size
        if self._mirror is None:
            num_slots = self.runner.kv_cache_config.num_blocks * block_size
            self._mirror = np.full((num_slots, *ids.shape[1:]), -1, ids.dtype)
        mirror = self._mirror
        scheduled = self._scheduled.num_scheduled_tokens
        resumed = self._scheduled.scheduled_cached_reqs.resumed_req_ids
        fresh = {r.req_id for r in self._scheduled.scheduled_new_reqs} | resumed
        pieces = []
        offset = 0
        for row, name in enumerate(self.runner.input_batch.req_ids):
            piece = slice(offset, offset + scheduled[name])
            offset = piece.stop
            position = positions[piece]
            mirror[self._slots(blocks[row], position, block_size)] = ids[piece]
            self.requests[name].rows.append((self.steps, position, tokens[piece], ids[piece]))
            pieces.append((row, name, position))
        # After all writes: a request may hit blocks that another one fills in the same step.
        for row, name, position in pieces:
            if name in fresh and position[0] > 0:
                hit = np.arange(position[0])
                rows = mirror[self._slots(blocks[row], hit, block_size)].copy()
                self.requests[name].is_garbled |= bool((rows < 0).any())
                self.requests[name].rows.append((self.steps, hit, None, rows))
                self.hits += name not in resumed
        lengths = [len(position) for _, _, position in pieces]
        self.mixed_steps += min(lengths) == 1 < max(lengths)
        self.chunked_prefills += sum(
            name in scheduled and name not in fresh and len(position) > 1
            for _, name, position in pieces
        )

    @staticmethod
    def _slots(blocks: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
        slots: np.ndarray = blocks[positions // block_size].astype(np.int64) * block_size
        slots += positions % block_size
        return slots

    def expected(self, request: str, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """The rows [T-1, L_moe, k] of a request's final `tokens`: the first that were emitted.

        A row is the one of the step that sampled the next token, and leaves with it; rows of a
        prompt leave with the first token sampled behind them. The second value counts the rows that
        were computed again later with other experts. Rows of a garbled request may be -1: no router
        chose for this token at its position.
        """
        seen = self.requests[request]
        num_rows = len(tokens) - 1
        positions, steps = np.array(seen.sampled).T
        emitted_at = steps[np.searchsorted(positions, np.arange(num_rows))]
        first = np.full((num_rows, *seen.rows[0][3].shape[1:]), -1, np.int64)
        last = first.copy()
        token_array = np.array(tokens)
        for step, position, token, ids in seen.rows:
            keep = position < num_rows
            if token is not None:
                keep[keep] &= (token[keep] == token_array[position[keep]]) | (token[keep] < 0)
            last[position[keep]] = ids[keep]
            keep[keep] &= step <= emitted_at[position[keep]]
            first[position[keep]] = ids[keep]
        assert seen.is_garbled or (first >= 0).all(), f"the hook missed rows of request {request}"
        return first, int((first != last).any(axis=(1, 2)).sum())

    def attach_to(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Fill in what the hook saw for each rollout."""
        by_name = {}
        for name in self.requests:
            match = re.fullmatch(r"(?:(\d+)_)?(.+)-[0-9a-f]{8}", name)
            assert match, f"request id {name!r} is not vLLM's own form"
            by_name[match[2], int(match[1] or 0)] = name
        for rollout in rollouts:
            name = by_name[rollout.request, rollout.index]
            rollout.hooked, rollout.superseded = self.expected(name, rollout.tokens)
            rollout.num_preemptions = self.requests[name].num_preemptions
            rollout.is_garbled = self.requests[name].is_garbled
        return list(rollouts)
