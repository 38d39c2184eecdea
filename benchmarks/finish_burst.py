"""Long requests that end together: what the other requests and the server's event loop feel.

A real `vllm serve` runs with a synthetic model in place of vLLM's workers: a step takes 25 ms,
whatever its size, and brings random expert ids. While a few requests stream their tokens, many
long ones end in the same step and their clients wait for the routed experts. Measured are the time
between two tokens of the streaming requests, at their client, and the longest time for which the
server's event loop was busy, from the burst's end in the engine until its last client has all its
bytes. Arms:

- `vllm`: vLLM alone, without the package;
- `none`: the burst returns no routed experts;
- `response`: it returns them in its responses, in vLLM's own encoding;
- `fetch`: its clients fetch them out of band;
- `native`: rows travel and are put into responses as by vLLM 0.32, without its capture and store.

Clients run in a process of their own, but on the same machine.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import finish, surroundings

BURST, OTHER = 7, 8
_MODULE = "benchmarks._synthetic_server"


SERVERS = {
    "vllm": ((), ""),
    "native": (("--scheduler-cls", f"{_MODULE}.NativeDelivery"), ""),
    "ours": (("--enable-return-routed-experts",), "moe_r3"),
}
"""Options of each server, and vLLM's plugins in it."""
ARMS = {"vllm": "vllm", "none": "ours", "response": "ours", "fetch": "ours", "native": "native"}
"""The server of each arm."""


@contextmanager
def serving(folder: Path, args: argparse.Namespace, server: str) -> Iterator[str]:
    """A server; yields its address."""
    from transformers import Qwen3MoeConfig

    max_len = args.tokens + 4096
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=args.layers,
        num_experts=128,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=max_len,
        eos_token_id=1,
    ).save_pretrained(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options, plugins = SERVERS[server]
    blocks = (args.requests + args.others + 2) * (max_len // 16 + 1)
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "synthetic"),
        *("--skip-tokenizer-init", "--max-model-len", str(max_len), "--block-size", "16"),
        *("--max-num-seqs", str(args.requests + args.others)),
        *("--max-num-batched-tokens", str(args.tokens + 256)),
        *("--distributed-executor-backend", f"{_MODULE}.SyntheticExecutor"),
        *("--middleware", f"{_MODULE}.Heartbeat", "--disable-uvicorn-access-log"),
        *("--generation-config", "vllm", "--no-async-scheduling", "--enforce-eager"),
        *options,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        "SYNTHETIC_BURST": str(args.requests),
        "SYNTHETIC_FOLDER": str(folder),
        "SYNTHETIC_KV_BYTES": str(blocks * 512),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": plugins,
    }
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_healthy(port, process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(port: int, process: Any, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


async def _stream(client: Any, tokens: list[int], max_tokens: int, times: list[float]) -> None:
    body = {"prompt": tokens, "max_tokens": max_tokens, "stream": True, **_SAMPLING}
    body["return_token_ids"] = True
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())


_SAMPLING = {"model": "synthetic", "temperature": 1.0}


async def _long_request(client: Any, prompt: list[int], arm: str, fetches: Any) -> int:
    options = {
        "none": {"vllm_xargs": {"r3_routing": "off"}},
        "fetch": {"vllm_xargs": {"r3_delivery": "fetch"}},
    }.get(arm, {})
    body = {"prompt": prompt, **_SAMPLING, "max_tokens": 2000, **options}
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    nbytes = len(response.content)
    if arm == "fetch":
        path = response.json()["choices"][0]["routed_experts_path"]
        async with fetches:
            fetched = await client.get(path)
        fetched.raise_for_status()
        nbytes = len(fetched.content)
    return nbytes


async def _burst(
    url: str, arm: str, args: argparse.Namespace, number: int, folder: Path
) -> dict[str, float]:
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        times: list[list[float]] = [[] for _ in range(args.others)]
        rng = np.random.default_rng(number)
        streams = [
            asyncio.create_task(_stream(client, [OTHER, number, 10 + i], args.tokens, times[i]))
            for i in range(args.others)
        ]
        while not all(len(t) > 5 for t in times):
            for failed in (task for task in streams if task.done()):
                failed.result()
            await asyncio.sleep(0.01)
        fetches = asyncio.Semaphore(args.fetches)
        prompts = rng.integers(10, 250, (args.requests, args.tokens))
        prompts[:, 0] = BURST
        burst = [
            asyncio.create_task(_long_request(client, p.tolist(), arm, fetches)) for p in prompts
        ]
        ready, go = folder / "ready", folder / "go"
        while not ready.exists():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        await client.get("/stall")
        quiet_from = time.perf_counter()
        await asyncio.sleep(2.0)
        quiet_stall = (await client.get("/stall")).json()["ms"]
        end_from = time.perf_counter()
        go.touch()
        done = await asyncio.gather(*burst)
        stall = (await client.get("/stall")).json()["ms"]
        ready.unlink()
        go.unlink()
        end_to = time.perf_counter()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    quiet, busy = _gaps(times, quiet_from, end_from), _gaps(times, end_from, end_to)
    return {
        "p99_ms": 1e3 * float(np.quantile(busy, 0.99)),
        "quiet_p99_ms": 1e3 * float(np.quantile(quiet, 0.99)),
        "p99_ratio": float(np.quantile(busy, 0.99) / np.quantile(quiet, 0.99)),
        "longest_gap_ms": 1e3 * float(busy.max()),
        "loop_stall_ms": stall,
        "quiet_loop_stall_ms": quiet_stall,
        "seconds": end_to - end_from,
        "mbytes": done[0] / 1e6,
    }


def _gaps(times: list[list[float]], start: float, stop: float) -> np.ndarray:
    """Seconds between two tokens of a request, for each that ends from `start` to `stop`."""
    parts = []
    for of_request in times:
        t = np.array([*of_request, stop])
        parts.append(np.diff(t)[(t[1:] >= start) & (t[1:] <= stop)])
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finish_burst",
        description="Long requests that end together: what others and the event loop feel.",
    )
    parser.add_argument("--requests", type=int, default=32, help="requests that end together")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens of each of them")
    parser.add_argument("--others", type=int, default=8, help="requests that stream meanwhile")
    parser.add_argument("--layers", type=int, default=48, help="MoE layers")
    parser.add_argument("--top-k", type=int, default=8, help="experts for each token")
    parser.add_argument("--fetches", type=int, default=8, help="fetches at the same time")
    parser.add_argument("--rounds", type=int, default=1, help="bursts of each arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    for server in SERVERS:
        arms = [arm for arm in args.arms if ARMS[arm] == server]
        if not arms:
            continue
        with tempfile.TemporaryDirectory() as name, serving(Path(name), args, server) as url:
            for number in range(args.rounds):
                for arm in arms:
                    print(
                        f"burst of {args.requests} requests: {arm}, round {number + 1}",
                        file=sys.stderr,
                    )
                    results[arm].append(asyncio.run(_burst(url, arm, args, number, Path(name))))
    summary = {
        arm: {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        for arm, rounds in results.items()
    }
    best = summary.get("fetch", next(iter(summary.values())))
    finish(
        {
            "p99_ratio": best["p99_ratio"],
            "loop_stall_ms": best["loop_stall_ms"],
            **vars(args),
            "arms": summary,
            "step_ms": 25,
            **surroundings("moe-r3", "vllm", "numpy"),
        }
    )


if __name__ == "__main__":
    main()
