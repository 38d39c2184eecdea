"""A scheduler of vLLM with routing, driven by hand; its workers' outputs are made up."""

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared_schema import RoutingLayout
from vllm_r3_plugin import releases
from vllm_r3_plugin.in_flight import rows_of
from vllm_r3_plugin.scheduler import routing_scheduler
from vllm_r3_plugin.step_rows import STEP_ROWS_ATTRIBUTE, StepRows

LAYOUT = RoutingLayout(num_experts=256, top_k=2, moe_layers=(0,), num_hidden_layers=1)
BLOCK_SIZE = 32


class SteppedScheduler:
    """Rows spell the step and the position; a KV block knows which steps filled it.

    Attributes:
        scheduler: vLLM's, with routing.
        rows: of each request that has ended a turn, what it returned: the step that each row
            spells, None where it is unrecorded.
        expected: the step that fed each position, or whose KV was hit, None where no step filled
            the block: the first that was emitted.

    """

    def __init__(self, model: Path, num_blocks: int, **engine_args: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        config = EngineArgs(
            str(model),
            dtype="float32",
            block_size=BLOCK_SIZE,
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_batched_tokens=256,
            max_num_seqs=8,
            **engine_args,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        base = Scheduler if config.speculative_config else AsyncScheduler
        config.scheduler_config.async_scheduling = base is AsyncScheduler
        self.scheduler = routing_scheduler(
            base,
            LAYOUT,
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.rows: dict[str, list[int | None]] = {}
        self.expected: dict[str, dict[int, int | None]] = defaultdict(dict)
        self._filled_by: dict[tuple[int, int], int] = {}
        self._in_flight: deque[tuple[Any, list[str], list[int], dict[str, dict[int, int | None]]]]
        self._in_flight = deque()
        self._step = 0

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=list(prompt),
                sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                pooling_params=None,
                block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
                **options,
            )
        )

    def schedule(self) -> list[str]:
        """Schedule a step and let the workers run it; returns the requests in it."""
        scheduled = self.scheduler.schedule()
        self._step += 1
        again = scheduled.scheduled_cached_reqs.resumed_req_ids
        fresh = {new.req_id for new in scheduled.scheduled_new_reqs} | set(again)
        positions: list[int] = []
        seen: dict[str, dict[int, int | None]] = {}
        slots = {}
        for name, count in scheduled.num_scheduled_tokens.items():
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            stop = self.scheduler.requests[name].num_computed_tokens
            fed = range(stop - count, stop)
            positions += fed
            slots[name] = [(blocks[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(stop)]
            self._filled_by.update(dict.fromkeys(slots[name][fed.start :], self._step))
            first = 0 if name in fresh else fed.start
            seen[name] = dict.fromkeys(range(first, stop), 0)
        for name, by_position in seen.items():
            for position in by_position:
                by_position[position] = self._filled_by.get(slots[name][position])
        self._in_flight.append((scheduled, list(scheduled.num_scheduled_tokens), positions, seen))
        return list(seen)

    def finish(self, sampled: dict[str, list[int]] | None = None) -> None:
        """Process the output of the oldest step in flight; each request samples a 7 unless told."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled, names, positions, seen = self._in_flight.popleft()
        step = self._step - len(self._in_flight)
        counts = np.array([scheduled.num_scheduled_tokens[name] for name in names])
        tokens: list[list[int]] = []
        stops = dict(zip(names, np.cumsum(counts).tolist(), strict=True))
        for name in names:
            request = self.scheduler.requests.get(name)
            is_last = request is not None and positions[stops[name] - 1] >= request.num_tokens - 1
            tokens.append((sampled or {}).get(name, [7]) if is_last else [])
            if request is not None and not releases.discards_output(request):
                for position, by in seen[name].items():
                    self.expected[name].setdefault(position, by)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=tokens,
        )
        ids = np.empty((len(positions), 1, 2), np.uint8)
        ids[:, 0, 0] = step
        ids[:, 0, 1] = 128 + np.array(positions) % 128
        setattr(output, STEP_ROWS_ATTRIBUTE, StepRows(names, counts, np.array(positions), ids))
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                if one.routed_experts is not None:
                    self._take(one.request_id, one.routed_experts)

    def draft(self, name: str, tokens: list[int]) -> None:
        """Let the next step verify draft tokens."""
        from vllm.v1.outputs import DraftTokenIds

        self.scheduler.update_draft_token_ids(DraftTokenIds([name], [tokens]))

    def run(self) -> None:
        """One step after the other until all requests have ended or wait."""
        while self._in_flight or self.scheduler.get_num_unfinished_requests():
            self.schedule()
            while self._in_flight:
                self.finish()

    def expected_rows(self, name: str) -> list[int | None]:
        """What `rows` should be, from position 0 on."""
        return [by for _, by in sorted(self.expected[name].items())]

    def _take(self, name: str, array: np.ndarray) -> None:
        ids, status = rows_of(array, LAYOUT)
        before = self.rows.setdefault(name, [])
        for row, lost in zip(ids[:, 0].tolist(), status.tolist(), strict=True):
            assert lost or row[1] == 128 + len(before) % 128
            before.append(None if lost else row[0])
