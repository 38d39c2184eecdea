"""Rollout throughput with capture on and off, on real engines, interleaved.

Three engines stay up, each in a process of its own: one with capture and two without. In each
round all of them generate from the same prompts, one after another, in a rotating order, for each
setting: so many requests at once, of one turn, and conversations of several turns, each of which
returns the routing of its whole history. The two engines without capture, compared with each other,
show the noise (A/A).

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
from typing import Any, NamedTuple

import numpy as np

from benchmarks._measure import finish, paired_ratio, surroundings

ENGINES = ("on", "off", "off again")
RUNNER_METHODS = ("execute_model", "sample_tokens")


def make_model(path: Path, hidden_size: int, layers: int, *, with_weights: bool = True) -> Path:
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
    if with_weights:
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    else:
        config.dtype = torch.bfloat16
        config.architectures = ["Qwen3MoeForCausalLM"]
        config.save_pretrained(path)
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
        extended = [n for n in vars(ours) if hasattr(vllms, n) and not n.startswith("__")]
        assert {"schedule", "update_from_output"} <= {*extended}, f"{ours} is not our scheduler"
        for name in extended:
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
        turns, max_tokens = work
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        histories: list[list[int]] = [[] for _ in turns[0]]
        hook_before, steps_before = timer.seconds if timer else 0.0, step_seconds
        start = time.perf_counter()
        for turn in turns:
            histories = [[*h, *new] for h, new in zip(histories, turn, strict=True)]
            inputs = [{"prompt_token_ids": history} for history in histories]
            outputs = [o.outputs[0] for o in llm.generate(inputs, params, use_tqdm=False)]
            returned = [output.routed_experts is not None for output in outputs]
            assert all(returned) == any(returned) == capture, "capture is not as it was asked for"
            histories = [[*h, *o.token_ids] for h, o in zip(histories, outputs, strict=True)]
        seconds = time.perf_counter() - start
        hook = (timer.seconds - hook_before) if timer else 0.0
        rate = len(turns) * len(histories) * max_tokens / seconds
        connection.send((rate, hook / (step_seconds - steps_before)))


class Setting(NamedTuple):
    """Requests at once, and turns of each conversation."""

    concurrency: int
    turns: int

    def prompts(self, rng: np.random.Generator, tokens: int) -> list[list[list[int]]]:
        """What is new in each turn, for each conversation."""
        prompts: list[list[list[int]]] = rng.integers(
            10, 2000, (self.turns, self.concurrency, tokens)
        ).tolist()
        return prompts


def figures(rates: dict[str, list[float]], shares: list[float]) -> dict[str, Any]:
    """What the rounds of a setting say."""
    on_off, interval = paired_ratio(rates["on"], rates["off"])
    aa, aa_interval = paired_ratio(rates["off again"], rates["off"])
    return {
        "ratio_on_off": on_off,
        "interval": interval,
        "aa_ratio": aa,
        "aa_interval": aa_interval,
        "hook_cpu_share": float(np.median(shares)),
        "tokens_per_second_off": float(np.median(rates["off"])),
    }


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Run all rounds; returns the result without surroundings."""
    from rich.progress import track

    settings = [Setting(concurrency, 1) for concurrency in args.concurrency]
    settings += [Setting(min(args.concurrency), args.turns)] if args.turns > 1 else []
    engine = {
        "skip_tokenizer_init": True,
        "max_model_len": args.turns * (args.prompt_tokens + args.output_tokens),
        "max_num_seqs": max(args.concurrency),
        "enforce_eager": not args.graphs,
        "load_format": args.load_format,
        "gpu_memory_utilization": 0.28,  # three engines on one device
        "disable_log_stats": True,
    }
    spawn = mp.get_context("spawn")
    connections, processes = {}, []
    for name in track(ENGINES, "engine starts"):
        connections[name], theirs = spawn.Pipe()
        process = spawn.Process(
            target=serve_rounds, args=(theirs, model, name == "on", engine), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        connections[name].recv()
    rng = np.random.default_rng(0)
    rates: dict[Setting, dict[str, list[float]]] = {s: {n: [] for n in ENGINES} for s in settings}
    shares: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for number in track(range(args.warm_up + args.rounds), "rounds"):
        for setting in settings:
            turns = setting.prompts(rng, args.prompt_tokens)
            for name in np.roll(ENGINES, number).tolist():
                connections[name].send((turns, args.output_tokens))
                rate, share = connections[name].recv()
                if number >= args.warm_up:
                    rates[setting][name].append(rate)
                    shares[setting] += [share] if name == "on" else []
    for connection in connections.values():
        connection.send(None)
    for process in processes:
        process.join(30)
    by_setting = [{**s._asdict(), **figures(rates[s], shares[s])} for s in settings]
    together = {name: [r for s in settings for r in rates[s][name]] for name in ENGINES}
    return {
        **figures(together, [max(setting["hook_cpu_share"] for setting in by_setting)]),
        "by_setting": by_setting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capture_throughput",
        description="Rollout throughput with capture on and off, on real engines, interleaved.",
    )
    parser.add_argument("--model", help="a local MoE checkpoint; default: a random one is made")
    parser.add_argument("--hidden-size", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[8, 32], help="requests that run at a time"
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="of the conversations that run beside them"
    )
    parser.add_argument("--load-format", default="auto", help="dummy: weights are never written")
    parser.add_argument("--graphs", action="store_true", help="compile, with CUDA graphs on a GPU")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=24)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        with_weights = args.load_format != "dummy"
        model = args.model or str(
            make_model(Path(folder), args.hidden_size, args.layers, with_weights=with_weights)
        )
        result = measure(args, model)
    given = {name: value for name, value in vars(args).items() if value is not None}
    finish({**result, **given, **surroundings("moe-r3", "vllm", "torch", "numpy")})


if __name__ == "__main__":
    main()
