"""CPU time of one decode step's routing bookkeeping, ours beside vLLM's native path.

A real vLLM scheduler runs a batch of decoding requests without a model: in place of the forward,
the routers' callbacks receive random expert ids. On the same steps run

- ours: the worker's and the scheduler's part of `vllm_r3_plugin`, as in production, without the
  methods of vLLM that they extend;
- vLLM's: `AuxOutputSchedulerConnector` and `AuxOutputWorkerConnector`, called where vLLM's
  scheduler and Model Runner V2 call them, its background store included.

Both end in the engine core's process, so no payload is pickled, and no row is sent to a front end.
The routers' writes into the capture buffers are left out on both sides. Time is CPU time of the
process, all threads, so that other programs on the machine do not count.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks._measure import finish, median_interval, surroundings

NUM_EXPERTS = 128
BLOCK_SIZE = 16
MAX_MODEL_LEN = 1024
PREFILL_TOKENS = 8192


class CpuClock:
    """Adds up this process's CPU time while it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside."""
        self.seconds -= time.process_time()
        yield
        self.seconds += time.process_time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside."""
        self.seconds += time.process_time()
        yield
        self.seconds -= time.process_time()

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def routers(num_layers: int) -> Any:
    """Modules of the kind that vLLM captures from by attribute, one for each MoE layer."""
    import torch

    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(num_layers))
    for layer_id, layer in enumerate(layers):
        layer.layer_id, layer.capture_fn = layer_id, None
    return layers


class Forward:
    """Stands in for vLLM's worker: tells both captures the same random ids, samples token 5."""

    def __init__(self, vllm_config: Any, clock: CpuClock, native_routers: Any) -> None:
        import torch
        from vllm.platforms import current_platform

        model = vllm_config.model_config
        self.vllm_config = vllm_config
        self.clock = clock
        self.num_layers = model.get_total_num_hidden_layers()
        self.device = torch.device(current_platform.device_type)
        self.rng = np.random.default_rng(0)
        self.native_routers, own = native_routers, routers(self.num_layers)
        top_k = model.get_num_experts_per_tok()
        shape = (vllm_config.scheduler_config.max_num_batched_tokens, top_k)
        self.ids = [
            torch.argsort(torch.rand(shape[0], NUM_EXPERTS), dim=1)[:, :top_k].int().to(self.device)
            for _ in range(self.num_layers)
        ]
        self.model_runner = SimpleNamespace(
            get_model=lambda: own,
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
        with self.clock.paused():
            self._route(scheduler_output)

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
            for layer, own, native in zip(
                range(self.num_layers), runner.get_model(), self.native_routers, strict=True
            ):
                ids = self.ids[(layer + offset) % self.num_layers][offset : offset + bounds[-1]]
                own.capture_fn(ids)
                native.capture_fn(ids)
        self.query_start_loc = bounds

    def sample(self, grammar_output: Any) -> Any:
        """One token for each request."""
        from vllm.v1.outputs import ModelRunnerOutput

        with self.clock.paused():
            names = self.model_runner.input_batch.req_ids
            return ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[[5]] * len(names),
            )


class NativePath:
    """vLLM's own connectors, called in the order in which vLLM calls them."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, model: Any) -> None:
        from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
        from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector

        self.scheduler = AuxOutputSchedulerConnector()
        self.worker = AuxOutputWorkerConnector(
            vllm_config=vllm_config, model=model, kv_cache_config=kv_cache_config
        )
        self.clock = CpuClock()

    def begin(self, scheduler_output: Any, requests: Any) -> None:
        """What runs before the forward."""
        with self.clock.running():
            self.worker.begin_step(self.scheduler.build_connector_meta(scheduler_output, requests))

    def snapshot(self, forward: Forward) -> Any:
        """What runs after the forward, in the worker."""
        import torch

        bounds = forward.query_start_loc
        input_batch = SimpleNamespace(
            req_ids=forward.model_runner.input_batch.req_ids,
            query_start_loc_np=bounds,
            num_computed_tokens_np=forward.first_positions,
        )
        counts = np.ones(len(bounds) - 1, np.int64)
        with self.clock.running():
            pending = self.worker.prepare_output(input_batch)
            pending.enqueue_cpu_copy(counts, np.zeros_like(counts))
        if forward.device.type != "cpu":
            torch.accelerator.synchronize()
        with self.clock.running():
            output = pending.process_output()
            self.worker._store._queue.join()
        return output

    def take(self, requests: list[Any], output: Any) -> dict[str, np.ndarray]:
        """What runs while the scheduler processes the step's tokens."""
        with self.clock.running():
            return {r.request_id: self.scheduler.take_output(r, output) for r in requests}


def _vllm_config(folder: Path, args: argparse.Namespace) -> Any:
    from transformers import Qwen3MoeConfig
    from vllm.engine.arg_utils import EngineArgs

    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=args.layers,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=args.top_k,
    ).save_pretrained(folder)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=args.requests,
        max_num_batched_tokens=max(PREFILL_TOKENS, args.requests),
        block_size=BLOCK_SIZE,
        enable_chunked_prefill=False,
        enforce_eager=True,
        async_scheduling=False,
    ).create_engine_config()


def _scheduler(vllm_config: Any, kv_cache_config: Any, layout: Any, clock: CpuClock) -> Any:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_r3_plugin.scheduler import routing_scheduler

    class VllmScheduler(Scheduler):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            with clock.paused():
                return super().schedule(*args, **kwargs)

        def update_from_output(self, *args: Any) -> Any:
            with clock.paused():
                return super().update_from_output(*args)

    return routing_scheduler(
        VllmScheduler,
        layout,
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
    )


def _add_requests(scheduler: Any, count: int) -> list[Any]:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    rng = np.random.default_rng(0)
    requests = []
    for i in range(count):
        params = SamplingParams(max_tokens=MAX_MODEL_LEN, ignore_eos=True)
        # Lengths differ, so that each step completes some requests' blocks, as in production.
        prompt = rng.integers(10, 1000, int(rng.integers(32, 64))).tolist()
        requests.append(Request(f"request-{i}", prompt, params, None, block_hasher=hasher))
        scheduler.add_request(requests[-1])
    return requests


def _initialize_process_groups(folder: Path) -> None:
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    initialize_model_parallel()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the steps; returns the result without surroundings."""
    import torch
    from rich.progress import track
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from vllm_r3_plugin.worker import RoutingCaptureWorker

    torch.set_num_threads(1)
    vllm_config = _vllm_config(folder, args)
    num_blocks = args.requests * MAX_MODEL_LEN // BLOCK_SIZE // 2
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    clock = CpuClock()
    with set_current_vllm_config(vllm_config):
        _initialize_process_groups(folder)
        native_routers = routers(args.layers)
        native = NativePath(vllm_config, kv_cache_config, native_routers)

        class Worker(RoutingCaptureWorker, Forward):
            """Our worker over the stand-in for vLLM's."""

        worker = Worker(vllm_config, clock, native_routers)
        worker.load_model()
        assert worker._r3_capturer is not None
        layout = worker._r3_capturer.layout
        scheduler = _scheduler(vllm_config, kv_cache_config, layout, clock)
        requests = _add_requests(scheduler, args.requests)

        def step() -> tuple[dict[str, Any], int]:
            with clock.running():
                scheduler_output = scheduler.schedule()
            native.begin(scheduler_output, scheduler.requests)
            with clock.running():
                worker.model_runner.execute_model(scheduler_output)
            native_output = native.snapshot(worker)
            with clock.running():
                output = worker.model_runner.sample_tokens(None)
                scheduler.update_from_output(scheduler_output, output)
            scheduled = scheduler_output.num_scheduled_tokens
            ready = [r for r in requests if r.request_id in native_output]
            return native.take(ready, native_output), sum(scheduled.values())

        while any(not request.num_output_tokens for request in requests):
            step()
        ours, natives = [], []
        for number in track(range(args.warm_up + args.steps), "decode steps"):
            clock.lap(), native.clock.lap()
            native_rows, num_tokens = step()
            assert num_tokens == len(requests), "a step did not decode every request once"
            if number >= args.warm_up:
                ours.append(1e3 * clock.lap())
                natives.append(1e3 * native.clock.lap())
        for request in requests:
            last = request.num_tokens - 2
            own_rows, status = scheduler.r3_store.read(request.request_id, last, last + 1)
            assert not status.any(), "our store lost a row"
            assert (own_rows == native_rows[request.request_id]).all(), "the two paths disagree"
    native.worker.close()
    return {
        "ms_per_step": float(np.median(ours)),
        "interval": median_interval(ours),
        "native_ms_per_step": float(np.median(natives)),
        "native_interval": median_interval(natives),
        "speedup": float(np.median(natives) / np.median(ours)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store_step",
        description="CPU time of one decode step's routing bookkeeping, beside vLLM's native path.",
    )
    parser.add_argument("--requests", type=int, default=1024, help="requests that decode")
    parser.add_argument("--layers", type=int, default=48, help="MoE layers")
    parser.add_argument("--top-k", type=int, default=8, help="experts for each token")
    parser.add_argument("--steps", type=int, default=150, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=20, help="steps before them")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    finish(
        {
            **result,
            "requests": args.requests,
            "layers": args.layers,
            "top_k": args.top_k,
            "steps": args.steps,
            "time": "CPU time of the process, all threads",
            **surroundings("moe-r3", "vllm", "torch", "numpy"),
        }
    )


if __name__ == "__main__":
    main()
