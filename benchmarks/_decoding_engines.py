"""Engines without a model, for `store_step`: a real vLLM scheduler and a stand-in for the forward.

In place of the forward, the routers' callbacks receive random expert ids. A clock runs while the
routing's bookkeeping does, and is paused while vLLM's own code and the stand-in run.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

NUM_EXPERTS = 128
BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
PREFILL_TOKENS = 8192


class CpuClock:
    """Adds up this process's CPU time, of all threads, while it runs."""

    def __init__(self) -> None:
        self.total = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside."""
        self.start()
        yield
        self.stop()

    def start(self) -> None:
        """Run from here on."""
        self.total -= time.process_time()

    def stop(self) -> None:
        """Stand still from here on."""
        self.total += time.process_time()

    def lap(self) -> float:
        """Seconds since the last lap."""
        total, self.total = self.total, 0.0
        return total


class CallCounter(CpuClock):
    """In place of seconds: the functions, of Python and of C, that Python code calls."""

    def start(self) -> None:
        """Count from here on."""
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        own = frame.f_globals.get("__name__") in (__name__, "contextlib")
        self.total += event in ("call", "c_call") and not own


def routers(num_layers: int) -> Any:
    """Modules of the kind that vLLM captures from by attribute, one for each MoE layer."""
    import torch

    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(num_layers))
    for layer_id, layer in enumerate(layers):
        layer.layer_id, layer.capture_fn = layer_id, None
    return layers


class Forward:
    """Stands in for vLLM's worker: tells the routers' listeners random ids, samples token 5.

    Every instance tells the same ids in the same step.
    """

    def __init__(self, vllm_config: Any) -> None:
        import torch
        from vllm.platforms import current_platform

        model = vllm_config.model_config
        self.vllm_config = vllm_config
        self.clock = CpuClock()
        self.num_layers = model.get_total_num_hidden_layers()
        self.device = torch.device(current_platform.device_type)
        self.routers = routers(self.num_layers)
        top_k = model.get_num_experts_per_tok()
        shape = (vllm_config.scheduler_config.max_num_batched_tokens, top_k)
        self.rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.ids = [
            torch.argsort(torch.rand(shape[0], NUM_EXPERTS, generator=generator), dim=1)[:, :top_k]
            .int()
            .to(self.device)
            for _ in range(self.num_layers)
        ]
        self.model_runner = SimpleNamespace(
            get_model=lambda: self.routers,
            max_num_tokens=shape[0],
            device=self.device,
            input_batch=SimpleNamespace(num_reqs=0, req_ids=[]),
            num_scheduled_tokens=SimpleNamespace(np=np.zeros(0, np.int32)),
            positions=torch.zeros(0, dtype=torch.int64),
            execute_model=self.run_forward,
            sample_tokens=self.sample,
        )

    def load_model(self) -> None:
        """Nothing to load."""

    def run_forward(self, scheduler_output: Any) -> None:
        """Route the step's tokens."""
        self.clock.stop()
        self._route(scheduler_output)
        self.clock.start()

    def _route(self, scheduler_output: Any) -> None:
        import torch
        from vllm.forward_context import set_forward_context

        starts = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(scheduler_output.num_scheduled_tokens)
        counts = np.array([scheduler_output.num_scheduled_tokens[n] for n in names], np.int32)
        self.first_positions = np.array([starts[n] for n in names])
        bounds = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(bounds[-1]) + np.repeat(self.first_positions - bounds[:-1], counts)
        runner = self.model_runner
        runner.input_batch = SimpleNamespace(num_reqs=len(names), req_ids=names)
        runner.num_scheduled_tokens.np = counts
        runner.positions = torch.from_numpy(positions).to(self.device)
        offset = int(self.rng.integers(0, len(self.ids[0]) - bounds[-1] + 1))
        with set_forward_context(None, self.vllm_config):
            for layer, router in enumerate(self.routers):
                ids = self.ids[(layer + offset) % self.num_layers]
                router.capture_fn(ids[offset : offset + bounds[-1]])
        self.query_start_loc = bounds

    def sample(self, grammar_output: Any) -> Any:
        """One token for each request."""
        self.clock.stop()
        from vllm.v1.outputs import ModelRunnerOutput

        names = self.model_runner.input_batch.req_ids
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[5]] * len(names),
        )
        self.clock.start()
        return output


class Engine:
    """A scheduler, a stand-in for its worker, and the bookkeeping of one of the two paths."""

    scheduler: Any
    forward: Forward

    def step(self) -> dict[str, int]:
        """One step; returns the tokens of each request in it."""
        raise NotImplementedError

    def last_row(self, request: Any) -> np.ndarray[Any, Any]:
        """``[L, k]`` ids of the token that was fed last."""
        raise NotImplementedError

    def add(self, name: str, prompt: list[int], max_tokens: int) -> Any:
        """Add a request."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(name, prompt, params, None, block_hasher=hasher)
        self.scheduler.add_request(request)
        return request

    def close(self) -> None:
        """Nothing to close."""


class OurEngine(Engine):
    """`vllm_r3_plugin`'s worker and scheduler as in production."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        from vllm_r3_plugin.scheduler import routing_scheduler
        from vllm_r3_plugin.worker import RoutingCaptureWorker

        class Worker(RoutingCaptureWorker, Forward):
            """Our worker over the stand-in for vLLM's."""

        worker = self.forward = Worker(vllm_config)

        class VllmScheduler(Scheduler):
            """vLLM's part is not ours."""

            def schedule(self, *args: Any, **kwargs: Any) -> Any:
                worker.clock.stop()
                result = super().schedule(*args, **kwargs)
                worker.clock.start()
                return result

            def update_from_output(self, *args: Any) -> Any:
                worker.clock.stop()
                result = super().update_from_output(*args)
                worker.clock.start()
                return result

        worker.load_model()
        assert worker._r3_capturer is not None
        self.scheduler = routing_scheduler(
            VllmScheduler,
            worker._r3_capturer.layout,
            **_scheduler_arguments(vllm_config, kv_cache_config),
        )

    def step(self) -> dict[str, int]:
        clock, runner = self.forward.clock, self.forward.model_runner
        with clock.running():
            scheduler_output = self.scheduler.schedule()
            runner.execute_model(scheduler_output)
        if self.forward.device.type != "cpu":
            _synchronize()
        with clock.running():
            self.output = runner.sample_tokens(None)
            outputs = self.scheduler.update_from_output(scheduler_output, self.output)
        self.scheduler.r3_late.send(outputs, None)  # else requests that ended keep their pages
        tokens: dict[str, int] = scheduler_output.num_scheduled_tokens
        return tokens

    def last_row(self, request: Any) -> np.ndarray[Any, Any]:
        last = request.num_tokens - 2
        rows, status = self.scheduler.r3_store.read(request.request_id, last, last + 1)
        assert not status.any(), "our store lost a row"
        row: np.ndarray[Any, Any] = rows[0]
        return row


class NativeEngine(Engine):
    """vLLM's own connectors, called where its scheduler and Model Runner V2 call them.

    The background thread of its store is waited for, and counted.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
        from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector
        from vllm.v1.core.sched.scheduler import Scheduler

        forward = self.forward = Forward(vllm_config)

        class Connector(AuxOutputSchedulerConnector):
            """Asked for rows after the scheduler's part, once for the whole batch."""

            def build_connector_meta(self, *args: Any) -> Any:
                with forward.clock.running():
                    return super().build_connector_meta(*args)

            def take_output(self, *args: Any) -> None:
                """Nothing yet."""

        self.scheduler = Scheduler(**_scheduler_arguments(vllm_config, kv_cache_config))
        self.connector = self.scheduler.aux_output_connector = Connector()
        self.take_output = super(Connector, self.connector).take_output
        self.worker = AuxOutputWorkerConnector(
            vllm_config=vllm_config, model=forward.routers, kv_cache_config=kv_cache_config
        )
        self.last_rows: dict[str, np.ndarray[Any, Any]] = {}

    def step(self) -> dict[str, int]:
        clock, forward, scheduler = self.forward.clock, self.forward, self.scheduler
        scheduler_output = scheduler.schedule()
        with clock.running():
            self.worker.begin_step(scheduler_output.aux_output_connector_metadata)
            forward.run_forward(scheduler_output)
            bounds = forward.query_start_loc
            input_batch = SimpleNamespace(
                req_ids=forward.model_runner.input_batch.req_ids,
                query_start_loc_np=bounds,
                num_computed_tokens_np=forward.first_positions,
            )
            counts = np.ones(len(bounds) - 1, np.int64)
            pending = self.worker.prepare_output(input_batch)
            assert pending is not None
            pending.enqueue_cpu_copy(counts, np.zeros_like(counts))
        if forward.device.type != "cpu":
            _synchronize()
        with clock.running():
            rows = pending.process_output()
            self.worker._store._queue.join()
        tokens: dict[str, int] = scheduler_output.num_scheduled_tokens
        batch = [scheduler.requests[name] for name in tokens]
        with clock.running():
            output = forward.sample(None)
        scheduler.update_from_output(scheduler_output, output)
        with clock.running():
            self.last_rows = {r.request_id: self.take_output(r, rows) for r in batch}
        return tokens

    def last_row(self, request: Any) -> np.ndarray[Any, Any]:
        row: np.ndarray[Any, Any] = self.last_rows[request.request_id][-1]
        return row

    def close(self) -> None:
        self.worker.close()


def _synchronize() -> None:
    import torch

    torch.accelerator.synchronize()


def _scheduler_arguments(vllm_config: Any, kv_cache_config: Any) -> dict[str, Any]:
    from vllm.v1.structured_output import StructuredOutputManager

    return {
        "vllm_config": vllm_config,
        "kv_cache_config": kv_cache_config,
        "structured_output_manager": StructuredOutputManager(vllm_config),
        "block_size": BLOCK_SIZE,
    }


def engine_config(folder: Path, requests: int, layers: int, top_k: int) -> tuple[Any, Any]:
    """Configuration of vLLM and that of its KV cache, for a model that is never loaded."""
    import torch
    from transformers import Qwen3MoeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=layers,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
    ).save_pretrained(folder)
    vllm_config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=requests,
        max_num_batched_tokens=PREFILL_TOKENS,
        block_size=BLOCK_SIZE,
        enable_chunked_prefill=False,
        enforce_eager=True,
        async_scheduling=False,
    ).create_engine_config()
    num_blocks = max(32 * requests, 2 * PREFILL_TOKENS // BLOCK_SIZE)
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    return vllm_config, KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])


def initialize_process_groups(folder: Path) -> None:
    """The process groups that vLLM's workers ask for."""
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    initialize_model_parallel()
