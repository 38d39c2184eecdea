"""Rollout throughput with capture on and off, on real engines, interleaved.

Three engines stay up, each in a process of its own: one with capture and two without. In each
round all of them generate from the same prompts, one after another, in a rotating order. The two
engines without capture, compared with each other, show the noise (A/A).

The CPU time of our own code is measured inside the engine with capture: what it adds to the methods
of vLLM's model runner and scheduler that it wraps or extends, over the CPU time of the engine's
steps, both of the thread that runs the engine.
"""

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import finish, median_interval, surroundings

ENGINES = ("on", "off", "off again")
RUNNER_METHODS = ("execute_model", "sample_tokens")
SCHEDULER_METHODS = (
    "schedule",
    "update_from_output",
    "_preempt_request",
    "_handle_stopped_request",
    "_free_request",
)


def make_model(path: Path, hidden_size: int, layers: int) -> Path:
    """Write a random bfloat16 Qwen3-MoE with 32 experts, top-4; no tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        moe_intermediate_size=hidden_size // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


class HookTimer:
    """CPU time that we spend outside the vLLM methods that we extend or wrap."""

    def __init__(self, runner: Any, scheduler: Any) -> None:
        self.seconds = 0.0
        # The outer call is ours and vLLM's, the inner one vLLM's alone.
        capture = runner.execute_model.__self__
        for name in RUNNER_METHODS:
            setattr(runner, name, self._timed(getattr(runner, name), +1))
            setattr(capture, f"_{name}", self._timed(getattr(capture, f"_{name}"), -1))
        ours, vllms = type(scheduler).__mro__[1:3]
        for name in SCHEDULER_METHODS:
            assert name in vars(ours), f"{ours.__name__} does not extend {name}"
            setattr(scheduler, name, self._timed(getattr(scheduler, name), +1))
            setattr(vllms, name, self._timed(getattr(vllms, name), -1))

    def _timed(self, method: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += sign * (time.thread_time() - start)

        return timed


def serve_rounds(connection: Any, model: str, capture: bool, settings: dict[str, Any]) -> None:
    """Body of an engine's process: generate for each round of prompts that arrives."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, enable_return_routed_experts=capture, **settings)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    timer = HookTimer(runner, core.scheduler) if capture else None
    connection.send("ready")
    step, step_seconds = llm.llm_engine.step, 0.0

    def timed_step() -> Any:
        nonlocal step_seconds
        start = time.thread_time()
        try:
            return step()
        finally:
            step_seconds += time.thread_time() - start

    llm.llm_engine.step = timed_step
    while (work := connection.recv()) is not None:
        prompts, max_tokens = work
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        hook_before, steps_before = timer.seconds if timer else 0.0, step_seconds
        start = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        returned = [output.outputs[0].routed_experts is not None for output in outputs]
        assert all(returned) == any(returned) == capture, "capture is not as it was asked for"
        hook = (timer.seconds - hook_before) if timer else 0.0
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        connection.send((tokens / seconds, hook / (step_seconds - steps_before)))


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Run all rounds; returns the result without surroundings."""
    from rich.progress import track

    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": args.prompt_tokens + args.output_tokens,
        "max_num_seqs": args.concurrency,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    spawn = mp.get_context("spawn")
    connections, processes = {}, []
    for name in track(ENGINES, "engine starts"):
        connections[name], theirs = spawn.Pipe()
        process = spawn.Process(
            target=serve_rounds, args=(theirs, model, name == "on", settings), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        connections[name].recv()
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {name: [] for name in ENGINES}
    shares = []
    for number in track(range(args.warm_up + args.rounds), "rounds"):
        prompts = rng.integers(10, 2000, (args.requests, args.prompt_tokens)).tolist()
        for name in np.roll(ENGINES, number).tolist():
            connections[name].send((prompts, args.output_tokens))
            rate, share = connections[name].recv()
            if number >= args.warm_up:
                rates[name].append(rate)
                shares += [share] if name == "on" else []
    for connection in connections.values():
        connection.send(None)
    for process in processes:
        process.join(30)
    on_off = np.array(rates["on"]) / np.array(rates["off"])
    aa = np.array(rates["off again"]) / np.array(rates["off"])
    return {
        "ratio_on_off": float(np.median(on_off)),
        "interval": median_interval(on_off),
        "aa_ratio": float(np.median(aa)),
        "aa_interval": median_interval(aa),
        "hook_cpu_share": float(np.median(shares)),
        "tokens_per_second_off": float(np.median(rates["off"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capture_throughput",
        description="Rollout throughput with capture on and off, on real engines, interleaved.",
    )
    parser.add_argument("--model", help="a local MoE checkpoint; default: a random one is made")
    parser.add_argument("--hidden-size", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--rounds", type=int, default=16, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them")
    parser.add_argument("--requests", type=int, default=32, help="requests in a round")
    parser.add_argument("--concurrency", type=int, default=32, help="requests that run at a time")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=24)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(make_model(Path(folder), args.hidden_size, args.layers))
        result = measure(args, model)
    given = {name: value for name, value in vars(args).items() if value is not None}
    finish({**result, **given, **surroundings("moe-r3", "vllm", "torch", "numpy")})


if __name__ == "__main__":
    main()
