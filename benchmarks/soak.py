"""Whether anything grows while an engine serves many requests: memory, objects, time a request.

One real engine of a tiny random model stays up. Requests with shared prefixes come and go in a KV
cache too small for them, so that pages are given up and requests preempted; some are aborted, some
return part of their routing or none. The run is cut into parts of equally many requests; slopes are
those of straight lines through the parts of the second half, when caches are full.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import finish, surroundings
from benchmarks.capture_throughput import make_model

OPTIONS: tuple[dict[str, Any], ...] = ({}, {}, {"r3_start": 16}, {"r3_routing": "off"})


class Traffic:
    """Keeps ``concurrency`` requests in the engine, until ``count`` have ended."""

    def __init__(self, engine: Any, count: int, concurrency: int) -> None:
        self.engine, self.count, self.concurrency = engine, count, concurrency
        self.rng = np.random.default_rng(0)
        self.prefixes = self.rng.integers(10, 2000, (64, 32)).tolist()
        self.added = self.ended = self.returned = self.aborted = 0
        self.preempted = 0
        self.live: set[str] = set()

    def run(self, until: int) -> None:
        """Serve until so many requests have ended."""
        while self.ended < until:
            while len(self.live) < self.concurrency and self.added < self.count:
                self._add()
            self._maybe_abort()
            for output in self.engine.step():
                if output.finished:
                    self.live.discard(output.request_id)
                    self.ended += 1
                    self.returned += output.outputs[0].routed_experts is not None

    def _add(self) -> None:
        from vllm import SamplingParams

        name = f"request-{self.added}"
        prefix = self.prefixes[int(self.rng.integers(len(self.prefixes)))]
        own = self.rng.integers(10, 2000, int(self.rng.integers(1, 48))).tolist()
        params = SamplingParams(
            max_tokens=int(self.rng.integers(1, 32)),
            ignore_eos=True,
            detokenize=False,
            extra_args=OPTIONS[self.added % len(OPTIONS)] or None,
        )
        self.engine.add_request(name, {"prompt_token_ids": prefix + own}, params)
        self.live.add(name)
        self.added += 1

    def _maybe_abort(self) -> None:
        if self.live and self.rng.random() < 0.05:
            name = min(self.live)
            self.engine.abort_request([name])
            self.live.discard(name)
            self.aborted += 1
            self.ended += 1


def held(scheduler: Any) -> dict[str, int]:
    """Sizes of what our scheduler and its store hold beside preallocated arrays."""
    store = scheduler.r3_store
    parts = [scheduler._r3_kv_blocks, scheduler._r3_sender, store, store._slots, store._pool]
    parts.append(store._pool.published)
    owners = [(scheduler, ("r3_", "_r3_")), *((part, "") for part in parts)]
    return {
        f"{type(owner).__name__}.{name}": len(value)
        for owner, prefix in owners
        for name, value in vars(owner).items()
        if name.startswith(prefix) and isinstance(value, Sized) and not hasattr(value, "dtype")
    }


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(values: list[float], step: int) -> float:
    """Growth for each request, from values taken every ``step`` requests; the second half."""
    late = np.array(values[len(values) // 2 :])
    return float(np.polyfit(step * np.arange(len(late)), late, 1)[0])


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Run all parts; returns the result without surroundings."""
    from rich.progress import track
    from vllm import LLM

    llm = LLM(
        model,
        enable_return_routed_experts=not args.off,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=args.concurrency,
        num_gpu_blocks_override=args.kv_blocks,
        block_size=32,
        enforce_eager=True,
        disable_log_stats=True,
    )
    core = llm.llm_engine.engine_core.engine_core
    traffic = Traffic(llm.llm_engine, args.requests, args.concurrency)
    preempt = core.scheduler._preempt_request

    def counted(*given: Any, **named: Any) -> Any:
        traffic.preempted += 1
        return preempt(*given, **named)

    core.scheduler._preempt_request = counted
    step = args.requests // args.parts
    rss, objects, ms = [], [], []
    for part in track(range(args.parts), "parts"):
        start = time.process_time()
        traffic.run((part + 1) * step)
        ms.append(1e3 * (time.process_time() - start) / step)
        gc.collect()
        rss.append(float(resident_bytes()))
        objects.append(float(len(gc.get_objects())))
    traffic.run(traffic.added)
    llm.llm_engine.step()
    return {
        "rss_bytes_per_request": slope(rss, step),
        "objects_per_request": slope(objects, step),
        "ms_slope_per_request": slope(ms, step),
        "rss_mib": [round(value / 2**20, 1) for value in rss],
        "objects": objects,
        "ms_per_request": [round(value, 3) for value in ms],
        "returned": traffic.returned,
        "aborted": traffic.aborted,
        "preempted": traffic.preempted,
        "held": {} if args.off else held(core.scheduler),
        "counted": {} if args.off else dict(core.scheduler.r3_journal.counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Whether memory or time grows with the number of requests served.",
    )
    parser.add_argument("--requests", type=int, default=2000, help="requests in all")
    parser.add_argument("--parts", type=int, default=20, help="parts into which they are cut")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--kv-blocks", type=int, default=128, help="of 32 tokens")
    parser.add_argument("--off", action="store_true", help="vLLM alone, without capture")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, str(make_model(Path(folder), 128, 2)))
    finish({**result, **vars(args), **surroundings("moe-r3", "vllm", "torch", "numpy")})


if __name__ == "__main__":
    main()
