"""Parts that `vllm serve` loads by name: a model that only takes time, vLLM's delivery, a pulse.

Everything else of the server is vLLM's: scheduler, engine core process, its threads and sockets,
front end, HTTP.
"""

import asyncio
import json
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

from shared_schema import RoutingLayout
from vllm_r3_plugin.options import PLUGIN_VERSION
from vllm_r3_plugin.step_rows import STEP_ROWS_ATTRIBUTE, StepRows

STEP_S = 0.025
NUM_EXPERTS = 128
TOKEN, END = 5, 1
BURST = 7
"""First token of the prompts of requests that shall end together."""


def _layout(vllm_config: Any) -> RoutingLayout:
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    top_k = vllm_config.model_config.get_num_experts_per_tok()
    return RoutingLayout(NUM_EXPERTS, top_k, tuple(range(layers)), layers)


def _rows(layout: RoutingLayout, count: int) -> np.ndarray:
    """Distinct ids in each slot row, cut out of one random table."""
    shape = (count, layout.num_moe_layers, layout.top_k)
    step = np.arange(layout.top_k) * (NUM_EXPERTS // layout.top_k)
    first = np.random.default_rng(0).integers(0, NUM_EXPERTS // layout.top_k, shape[:2])
    return (first[..., None] + step).astype(layout.dtype)


class SyntheticExecutor(Executor):
    """Takes `STEP_S` for a step and samples `TOKEN`; the burst ends when it is told to.

    It makes a file `ready` when all of the burst decodes, and waits for a file `go`.
    """

    def _init_executor(self) -> None:
        scheduler = self.vllm_config.scheduler_config
        self.layout = _layout(self.vllm_config)
        self.rows = _rows(self.layout, scheduler.max_num_batched_tokens)
        self.prompt_lengths: dict[str, int] = {}
        self.waiting: set[str] = set()
        self.burst: set[str] = set()
        self.burst_size = int(os.environ["SYNTHETIC_BURST"])
        self.folder = Path(os.environ["SYNTHETIC_FOLDER"])

    def collective_rpc(
        self,
        method: Any,
        timeout: Any = None,
        args: Any = (),
        kwargs: Any = None,
        non_block: bool = False,
    ) -> Any:
        """Answers of a single worker."""
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
        report = {"host": "here", "version": PLUGIN_VERSION, "layout": self.layout.to_dict()}
        answers = {
            "moe_r3_report": [report],
            "get_kv_cache_spec": [{"layer": spec}],
            "get_supported_kv_cache_layouts": [["LBNHC"]],
            "determine_available_memory": [int(os.environ["SYNTHETIC_KV_BYTES"])],
            "compile_or_warm_up_model": [],
            "get_supported_tasks": [("generate",)],
        }
        answer = answers.get(method, [None])
        if not non_block:
            return answer
        future: Future[Any] = Future()
        future.set_result(answer)
        return future

    def check_health(self) -> None:
        """Always healthy."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step."""
        time.sleep(STEP_S)
        output = self._output(scheduler_output)
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def _output(self, scheduler_output: Any) -> ModelRunnerOutput:
        computed = {}
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            self.prompt_lengths[new.req_id] = len(new.prompt_token_ids)
            if new.prompt_token_ids[0] == BURST:
                self.waiting.add(new.req_id)
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(scheduler_output.num_scheduled_tokens)
        counts = np.array([scheduler_output.num_scheduled_tokens[n] for n in names], np.int64)
        is_last = len(self.burst) == self.burst_size and (self.folder / "go").exists()
        sampled = []
        for name, count in zip(names, counts.tolist(), strict=True):
            decodes = computed[name] + count >= self.prompt_lengths[name]
            ends = is_last and name in self.burst
            sampled.append([END if ends else TOKEN] if decodes else [])
            if decodes and name in self.waiting:
                self.waiting.discard(name)
                self.burst.add(name)
        if is_last:
            self.burst.clear()
        elif len(self.burst) == self.burst_size:
            (self.folder / "ready").touch()
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        positions = np.concatenate(
            [np.arange(computed[n], computed[n] + c) for n, c in zip(names, counts, strict=True)]
            or [np.zeros(0, np.int64)]
        )
        rows = StepRows(names, counts, positions, self.rows[: len(positions)])
        setattr(output, STEP_ROWS_ATTRIBUTE, rows)
        return output


class NativeDelivery(Scheduler):
    """Puts rows into outputs as vLLM 0.32 does: the prompt's with the first, one with each other.

    Capture and store of vLLM's own are left out, so this costs less than they do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = _rows(_layout(self.vllm_config), self.max_model_len)
        self.sent: dict[str, int] = {}

    def update_from_output(self, scheduler_output: Any, output: Any) -> Any:
        """Fill `routed_experts` in the step's outputs."""
        lengths = {i: self.requests[i].num_tokens for i in scheduler_output.num_scheduled_tokens}
        outputs = super().update_from_output(scheduler_output, output)
        for core_outputs in outputs.values():
            for out in core_outputs.outputs:
                stop = lengths[out.request_id] + len(out.new_token_ids) - 1
                out.routed_experts = self.rows[self.sent.get(out.request_id, 0) : stop].copy()
                self.sent[out.request_id] = stop
        return outputs


class Heartbeat:
    """Middleware: the longest time for which the event loop did nothing else, at `GET /stall`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.task: asyncio.Task[None] | None = None
        self.longest = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer `/stall`, which starts the next measurement, and pass on all else."""
        if scope["type"] != "http" or scope["path"] != "/stall":
            await self.app(scope, receive, send)
            return
        if self.task is None:
            self.task = asyncio.create_task(self._beat())
        body = json.dumps({"ms": 1e3 * self.longest}).encode()
        self.longest = 0.0
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def _beat(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.perf_counter() - before - 0.001)
