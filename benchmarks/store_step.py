"""CPU time of one step's routing bookkeeping, ours beside vLLM's native path.

Two real vLLM schedulers run the same requests without a model: in place of the forward, the
routers' callbacks receive random expert ids. On one of them runs

- ours: the worker's and the scheduler's part of `vllm_r3_plugin`, as in production, without the
  methods of vLLM that they extend; on the other
- vLLM's: `AuxOutputSchedulerConnector` and `AuxOutputWorkerConnector`, called where vLLM's
  scheduler and Model Runner V2 call them, its background store included.

They take turns, 16 steps each, so that every page begins and ends in a turn; the time of a step is
the mean over its turn. Before, prefills of 8,192 tokens fill both stores, so that pages are given
up for new ones, as in a server that has run for a while. Both end in the engine core's process, so
no payload is pickled, and no row is sent to a front end. The routers' writes into the capture
buffers are left out on both sides, and of ours the note of each KV block that vLLM's scheduler
allocates, in the midst of it. Time is CPU time of the process, all threads, so that other programs
on the machine do not count.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._decoding_engines import (
    BLOCK_SIZE,
    PREFILL_TOKENS,
    CallCounter,
    Engine,
    NativeEngine,
    OurEngine,
    engine_config,
    initialize_process_groups,
)
from benchmarks._measure import finish, median_interval, surroundings

PROMPT_TOKENS = 1024


class CountedSlots(dict[str, int]):
    """In place of the store's dictionary of requests: counts the look-ups."""

    lookups = 0

    def __getitem__(self, request_id: str) -> int:
        self.lookups += 1
        return self.get(request_id, 0)


@contextmanager
def counted_slots(store: Any) -> Iterator[CountedSlots]:
    """Count the look-ups of requests in the page store."""
    slots = store._slots
    kept = slots._slot_of
    slots._slot_of = counted = CountedSlots(kept)
    yield counted
    slots._slot_of = kept


@contextmanager
def counted_writes(store: Any) -> Iterator[list[int]]:
    """Yield a list that has the number of steps of each write to the page store."""
    write, written = store.write, []

    def counted(steps: Any) -> None:
        written.append(len(steps))
        write(steps)

    store.write = counted
    yield written
    del store.write


def prefill(engines: dict[str, Engine], steps: int) -> dict[str, list[float]]:
    """Prefill and finish eight prompts at a time; milliseconds of each prefill step."""
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(steps):
        prompts = rng.integers(10, 1000, (PREFILL_TOKENS // PROMPT_TOKENS, PROMPT_TOKENS)).tolist()
        for name, engine in engines.items():
            for index, prompt in enumerate(prompts):
                engine.add(f"prefill-{number}-{index}", prompt, 2)
            engine.forward.clock.lap()
            tokens = sum(engine.step().values())
            assert tokens == PREFILL_TOKENS, f"a prefill step had {tokens} tokens"
            times[name].append(1e3 * engine.forward.clock.lap())
            engine.step()
    return times


def begin_decoding(engine: Engine, count: int, steps: int) -> list[Any]:
    """Bring requests of different lengths, so that each step fills some pages, to decoding."""
    rng = np.random.default_rng(0)
    requests = [
        engine.add(
            f"request-{i}", rng.integers(10, 1000, int(rng.integers(32, 64))).tolist(), steps + 64
        )
        for i in range(count)
    ]
    while any(not request.num_output_tokens for request in requests):
        engine.step()
    return requests


def decode(engine: Engine, count: int, steps: int) -> float:
    """Decode; milliseconds of a step, or thousands of calls, on average."""
    engine.forward.clock.lap()
    for _ in range(steps):
        tokens = engine.step()
        assert set(tokens.values()) == {1}, "a step prefilled"
        assert len(tokens) == count, "a step did not decode every request"
    return 1e3 * engine.forward.clock.lap() / steps


def profile(engine: OurEngine, count: int) -> dict[str, Any]:
    """What our code calls in the decode steps of one page, once when the batch has changed."""
    clock = engine.forward.clock
    scheduler = engine.scheduler
    engine.forward.clock = CallCounter()
    with counted_writes(scheduler.r3_store) as written:
        calls = 1e-3 * decode(engine, count, BLOCK_SIZE)
    engine.forward.clock = clock
    scheduler.r3_store._slots._last_batch = ()
    with counted_slots(scheduler.r3_store) as counted:
        decode(engine, count, 1)
        assert scheduler.r3_store is not None  # now the step has been stored
        once = counted.lookups
        decode(engine, count, 1)
        assert scheduler.r3_store is not None
    return {
        "calls_per_step": calls,
        "writes_per_step": len(written) / BLOCK_SIZE,
        "lookups_per_request": (counted.lookups - once) / count,
        "lookups_per_request_of_a_new_batch": once / count,
    }


def compare(ours: Engine, native: Engine, requests: dict[str, list[Any]]) -> None:
    """The rows of the last step must be the same."""
    for mine, theirs in zip(requests["ours"], requests["native"], strict=True):
        rows = ours.last_row(mine), native.last_row(theirs)
        assert (rows[0] == rows[1]).all(), "the two paths disagree"


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and their ratio."""
    ours, native = np.median(times["ours"]), np.median(times["native"])
    return {
        "ms_per_step": float(ours),
        "interval": median_interval(times["ours"]),
        "native_ms_per_step": float(native),
        "native_interval": median_interval(times["native"]),
        "speedup": float(native / ours),
    }


def measure(args: argparse.Namespace, folder: Path, count: int) -> dict[str, Any]:
    """Run the steps with ``count`` requests; returns the result without surroundings."""
    import torch
    from rich.progress import track
    from vllm.config import set_current_vllm_config

    torch.set_num_threads(1)
    vllm_config, kv_cache_config = engine_config(folder, count, args.layers, args.top_k)
    if not torch.distributed.is_initialized():
        with set_current_vllm_config(vllm_config):
            initialize_process_groups(folder)
    with set_current_vllm_config(vllm_config):
        ours, native = (
            OurEngine(vllm_config, kv_cache_config),
            NativeEngine(vllm_config, kv_cache_config),
        )
        engines: dict[str, Engine] = {"ours": ours, "native": native}
        to_fill = -(-kv_cache_config.num_blocks * BLOCK_SIZE // PREFILL_TOKENS)
        prefills = prefill(engines, max(to_fill, args.prefills))
        gc.collect()
        gc.freeze()  # as vLLM's engine core does
        rounds = args.warm_up + args.rounds
        steps = rounds * BLOCK_SIZE
        requests = {n: begin_decoding(engine, count, steps) for n, engine in engines.items()}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in track(range(rounds), f"{count} requests"):
            for name in sorted(engines, reverse=bool(number % 2)):
                milliseconds = decode(engines[name], count, BLOCK_SIZE)
                times[name] += [milliseconds] if number >= args.warm_up else []
        compare(ours, native, requests)
        profiled = profile(ours, count)
        native.close()
    return {
        **figures(times),
        **profiled,
        "prefill": figures({n: t[-args.prefills :] for n, t in prefills.items()}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store_step",
        description="CPU time of one step's routing bookkeeping, beside vLLM's native path.",
    )
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[64, 256, 1024], help="requests that decode"
    )
    parser.add_argument("--layers", type=int, default=48, help="MoE layers")
    parser.add_argument("--top-k", type=int, default=8, help="experts for each token")
    parser.add_argument("--rounds", type=int, default=16, help="measured rounds of 16 steps")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them")
    parser.add_argument("--prefills", type=int, default=16, help="measured prefill steps")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        results = {count: measure(args, Path(folder), count) for count in args.requests}
    finish(
        {
            **results[max(results)],
            "requests": max(results),
            "by_requests": results,
            "layers": args.layers,
            "top_k": args.top_k,
            "rounds": args.rounds,
            "time": "CPU time of the process, all threads",
            **surroundings("moe-r3", "vllm", "torch", "numpy"),
        }
    )


if __name__ == "__main__":
    main()
