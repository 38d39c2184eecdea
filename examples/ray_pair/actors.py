"""The actors, and what travels between them."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from examples.demo.rollout import Sample
from examples.rewards import advantages_of
from shared_schema import RoutedExpertsBatch, RoutingLayout, from_vllm_native


@dataclass(frozen=True)
class Shard:
    """What one trainer gets of a rollout of B samples: as many arrays whatever B is.

    `tokens` is int32, prompts and outputs one after the other; `prompt_lengths` and `lengths` are
    int64 `[B]`; `logprobs` is float64, of all output tokens; `advantages` is float64 `[B]`.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    routes: RoutedExpertsBatch

    def samples(self) -> list[Sample]:
        """The samples; their routes are views."""
        ends = np.cumsum(self.lengths)
        outputs = np.cumsum(self.lengths - self.prompt_lengths)
        samples = []
        for i, (length, prompt) in enumerate(zip(self.lengths, self.prompt_lengths, strict=True)):
            tokens = self.tokens[ends[i] - length : ends[i]].tolist()
            logprobs = self.logprobs[outputs[i] - (length - prompt) : outputs[i]]
            samples.append(Sample(tokens[:prompt], tokens[prompt:], logprobs, self.routes[i]))
        return samples


@dataclass(frozen=True)
class TrainerReport:
    """What one trainer did with its shard.

    `native` and `replayed` are the mean absolute differences of log-probs to the rollout, in nats.
    """

    samples: int
    route_bytes: int
    in_object_store: bool
    native: float
    replayed: float
    rows: Any
    loss: float


class RolloutActor:
    """Samples with vLLM, in this process."""

    def __init__(self, model: Path, layout: RoutingLayout) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is far more
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.layout = layout
        self.llm = LLM(
            str(model),
            dtype="bfloat16",
            enable_return_routed_experts=True,
            enforce_eager=True,
            disable_log_stats=True,
        )

    def roll_out(self, prompts: list[list[int]], max_tokens: int, num_shards: int) -> list[Any]:
        """Sample once from each prompt and put one :class:`Shard` for each trainer in the store."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=max_tokens, temperature=1.0, logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        samples = []
        for output in outputs:
            completion = output.outputs[0]
            if completion.routed_experts is None:
                raise RuntimeError("vLLM returned no routed experts: its log says why.")
            samples.append(
                Sample(
                    list(output.prompt_token_ids),
                    list(completion.token_ids),
                    np.array([next(iter(step.values())).logprob for step in completion.logprobs]),
                    from_vllm_native(completion.routed_experts, self.layout),
                )
            )
        advantages = advantages_of(samples)
        parts = np.array_split(np.arange(len(samples)), num_shards)
        return [ray.put(make_shard([samples[i] for i in part], advantages[part])) for part in parts]


def make_shard(samples: list[Sample], advantages: np.ndarray) -> Shard:
    """Join samples into arrays."""
    return Shard(
        tokens=np.concatenate([np.asarray(s.token_ids, np.int32) for s in samples]),
        prompt_lengths=np.array([len(s.prompt_ids) for s in samples]),
        lengths=np.array([len(s.token_ids) for s in samples]),
        logprobs=np.concatenate([s.logprobs for s in samples]),
        advantages=advantages,
        routes=RoutedExpertsBatch.from_list([s.routed for s in samples]),
    )


class TrainerActor:
    """One data-parallel rank of Megatron."""

    def __init__(self, rank: int, world_size: int, store: Path, model: Path) -> None:
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        import megatron_r3
        from examples.megatron_loop import loop

        loop.start_megatron(rank, world_size, f"file://{store}")
        self.chunks, self.optimizer = loop.build_model(model)
        self.controller = megatron_r3.attach(self.chunks)

    def step(self, shard: Shard) -> TrainerReport:
        """Score the shard natively and take one step under replay; Ray maps the shard's arrays."""
        import torch

        from examples.megatron_loop import loop

        micro_batches = loop.make_micro_batches(shard.samples(), shard.advantages, shard.routes)
        with torch.no_grad(), self.controller.schedule("native"):
            native = loop.run_schedule(
                self.chunks, self.controller, micro_batches, forward_only=True
            )
        step = loop.train_step(self.chunks, self.optimizer, self.controller, micro_batches)
        values = shard.routes.values
        return TrainerReport(
            samples=len(shard.lengths),
            route_bytes=values.nbytes,
            # Ray maps what it holds read-only; a copy would be this process's own, and writable.
            in_object_store=not values.flags.owndata and not values.flags.writeable,
            native=loop.mean_of(native, "difference"),
            replayed=step.difference,
            rows=step.replay.rows,
            loss=step.loss,
        )
