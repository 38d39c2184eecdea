"""The trainer: the rollout's weights in megatron-core, scoring the rollout's samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

import megatron_r3
from examples.demo.rollout import Sample
from megatron_r3 import cpu
from megatron_r3.hf_loader import build_gpt_model
from shared_schema import RoutedExpertsBatch


@dataclass(frozen=True)
class Scores:
    """One pass over all samples, in the samples' order.

    `logprobs` are those of the output tokens, sample after sample; `ids` the sets of experts that
    the routers used for the input tokens 0 … P+O-2 of each sample, each set ascending.
    """

    logprobs: Float[np.ndarray, " sampled"]
    ids: Int[np.ndarray, "tokens L k"]


class RouterWatch:
    """Witness of the experts that each router really used, taken from what it hands on.

    `calls[l]` has one int64 array `[rows, k]`, ascending in each row, for each call of the l-th
    router, recomputes included.
    """

    def __init__(self, model: GPTModel) -> None:
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self.calls: list[list[np.ndarray]] = [[] for _ in routers]
        for router, calls in zip(routers, self.calls, strict=True):
            router.register_forward_hook(
                lambda module, args, output, calls=calls: calls.append(_experts_of(output[1]))
            )

    def take(self) -> list[list[np.ndarray]]:
        """Return the calls since the last time, and forget them."""
        taken = [list(calls) for calls in self.calls]
        for calls in self.calls:
            calls.clear()
        return taken


def start_megatron() -> None:
    """Set up megatron-core's groups for this one process, on the CPU."""
    cpu.enable()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    cpu.seed(0)


def build_trainer(model: Path) -> GPTModel:
    """Load the checkpoint as a trainer would run it: bf16, routers in float32, full recompute."""
    (chunk,) = build_gpt_model(
        model,
        params_dtype=torch.bfloat16,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return chunk


def score(
    model: GPTModel,
    controller: megatron_r3.Controller,
    watch: RouterWatch,
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    mode: Literal["native", "replay"],
) -> Scores:
    """Score all samples without gradients, in packed micro-batches of the given sample numbers."""
    logprobs: dict[int, np.ndarray] = {}
    ids: dict[int, np.ndarray] = {}
    model.eval()
    with torch.no_grad(), controller.schedule(mode):
        for batch in batches:
            packed = [samples[i] for i in batch]
            scored = output_logprobs(model, controller, packed)
            used = np.stack([calls[-1] for calls in watch.take()], axis=1)
            outputs = _split(scored, [len(s.output_ids) for s in packed])
            rows = _split(used, [len(s.routed) for s in packed])
            for number, of_output, of_rows in zip(batch, outputs, rows, strict=True):
                logprobs[number], ids[number] = of_output, of_rows
    order = range(len(samples))
    return Scores(
        np.concatenate([logprobs[i] for i in order]), np.concatenate([ids[i] for i in order])
    )


def output_logprobs(
    model: torch.nn.Module, controller: megatron_r3.Controller, samples: Sequence[Sample]
) -> Float32[Tensor, " sampled"]:
    """Run one packed forward and return the log-probs of the samples' output tokens.

    The input is every token but the last of each sample, so each row has its routed experts.
    """
    lengths = [len(s.token_ids) - 1 for s in samples]
    packing = _packing(lengths)
    controller.feed(
        model,
        RoutedExpertsBatch.from_list([s.routed for s in samples]),
        packed_seq_params=packing,
    )
    inputs = torch.tensor([t for s in samples for t in s.token_ids[:-1]])
    targets = torch.tensor([t for s in samples for t in s.token_ids[1:]])
    positions = torch.cat([torch.arange(n) for n in lengths])
    logits = model(inputs[None], positions[None], None, packed_seq_params=packing)
    logprobs = logits[0].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sampled = torch.cat(
        [torch.arange(len(s.token_ids) - 1) >= len(s.prompt_ids) - 1 for s in samples]
    )
    return logprobs[sampled]


def _packing(lengths: Sequence[int]) -> PackedSeqParams:
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _experts_of(routing_map: Tensor) -> np.ndarray:
    """Column numbers of the k true entries in each row of bool `[rows, E]`, as `[rows, k]`."""
    return np.asarray(routing_map.nonzero()[:, 1].reshape(len(routing_map), -1).cpu())


def _split(joined: Any, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.asarray(joined), np.cumsum(lengths)[:-1])
