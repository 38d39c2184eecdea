"""The training loop; what replay adds to it is marked `# R3`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import megatron_r3  # R3
from examples.demo.rollout import Sample, load
from examples.rewards import advantages_of
from megatron_r3 import cpu
from megatron_r3.hf_loader import build_gpt_model, read_hf_config
from shared_schema import RoutedExpertsBatch, RoutingLayout

SAMPLES_PER_MICRO_BATCH = 4
SETTINGS = {
    "moe_token_dispatcher_type": "alltoall",  # micro-batches of data-parallel ranks differ in size
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class MicroBatch:
    """Whole samples in one pack of T rows, the last sample's room extended to the end.

    `tokens`, `targets` and `positions` are int64 `[1, T]`; `sampled` is bool `[T]`, true where the
    next token was sampled; `rollout_logprobs` and `weights` are float32 `[T]`.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    sampled: Tensor
    rollout_logprobs: Tensor
    weights: Tensor
    packing: PackedSeqParams
    routes: RoutedExpertsBatch


@dataclass(frozen=True)
class StepReport:
    """What one step did on this rank.

    `loss`, and `difference`, the mean absolute difference between the log-probs of trainer and
    rollout in nats, are NaN but on the last pipeline stage.
    """

    loss: float
    difference: float
    grad_norm: float
    replay: megatron_r3.ScheduleReport


def start_megatron(
    rank: int, world_size: int, init_method: str | None = None, **groups: int
) -> None:
    """Join the other ranks, by torchrun's environment unless told how."""
    cpu.enable()
    torch.set_num_threads(1)
    if world_size == 1:
        init_method = "tcp://127.0.0.1:0"
    torch.distributed.init_process_group("gloo", init_method, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**groups)
    cpu.seed(0)


def build_model(checkpoint: Path) -> tuple[list[Any], Any]:
    """Build this rank's model chunks, wrapped for training, and their optimizer."""
    inner = build_gpt_model(checkpoint, params_dtype=torch.bfloat16, **SETTINGS)
    config = inner[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunks = [DistributedDataParallel(config, ddp, Float16Module(config, c)) for c in inner]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-5,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        chunks,
    )
    return chunks, optimizer


def make_micro_batches(
    samples: Sequence[Sample], advantages: np.ndarray, routes: RoutedExpertsBatch
) -> list[MicroBatch]:
    """Pack the samples of a step, in order, into micro-batches of equal width."""
    size = SAMPLES_PER_MICRO_BATCH
    runs = [range(i, min(i + size, len(samples))) for i in range(0, len(samples), size)]
    # Pipeline stages exchange tensors of one shape; ranks of sequence parallelism share the rows.
    longest = max(sum(len(samples[i].token_ids) for i in run) for run in runs)
    width = -(-longest // 8) * 8
    return [
        _pack([samples[i] for i in run], advantages[list(run)], routes.select(run), width)
        for run in runs
    ]


def _pack(
    samples: Sequence[Sample], advantages: np.ndarray, routes: RoutedExpertsBatch, width: int
) -> MicroBatch:
    tokens, positions = torch.zeros(2, 1, width, dtype=torch.int64)
    rollout_logprobs, weights = torch.zeros(2, width)
    sampled = torch.zeros(width, dtype=torch.bool)
    ends = list(accumulate(len(s.token_ids) for s in samples))
    for sample, advantage, end in zip(samples, advantages, ends, strict=True):
        length = len(sample.token_ids)
        tokens[0, end - length : end] = torch.tensor(sample.token_ids)
        positions[0, end - length : end] = torch.arange(length)
        scored = slice(end - 1 - len(sample.output_ids), end - 1)
        sampled[scored] = True
        rollout_logprobs[scored] = torch.tensor(sample.logprobs, dtype=torch.float32)
        weights[scored] = float(advantage)
    bounds, rooms = (
        torch.tensor([0, *stops], dtype=torch.int32) for stops in (ends, [*ends[:-1], width])
    )
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=rooms,
        cu_seqlens_kv_padded=rooms,
        max_seqlen_q=width,
        max_seqlen_kv=width,
    )
    targets = tokens.roll(-1, 1)
    return MicroBatch(
        tokens, targets, positions, sampled, rollout_logprobs, weights, packing, routes
    )


def train_step(
    chunks: list[Any],
    optimizer: Any,
    controller: megatron_r3.Controller,  # R3
    micro_batches: Sequence[MicroBatch],
) -> StepReport:
    """Run one step of Megatron's schedule and of its optimizer."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    with controller.schedule("replay") as schedule:  # R3
        losses = run_schedule(chunks, controller, micro_batches, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    return StepReport(
        mean_of(losses, "loss"), mean_of(losses, "difference"), float(grad_norm), schedule.report
    )


def run_schedule(
    chunks: list[Any],
    controller: megatron_r3.Controller,  # R3
    micro_batches: Sequence[MicroBatch],
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run Megatron's own schedule; the losses of the micro-batches, on the last stage only."""

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> Any:
        batch = next(batches)
        controller.feed(chunk, batch.routes, packed_seq_params=batch.packing)  # R3
        output = chunk(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.targets,
            packed_seq_params=batch.packing,
        )
        return output, partial(policy_loss, batch)

    losses: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return losses


def policy_loss(batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with importance ratios; `token_losses` `[1, T]` are negative log-probs."""
    difference = (-token_losses[0].float() - batch.rollout_logprobs)[batch.sampled]
    loss = -(difference.exp() * batch.weights[batch.sampled]).mean()
    return loss, {"loss": loss.detach(), "difference": difference.detach().abs().mean()}


def mean_of(losses: Sequence[dict[str, Tensor]], name: str) -> float:
    """Mean over micro-batches of what the loss function reports; NaN where there is none."""
    return float(np.mean([float(report[name]) for report in losses])) if losses else float("nan")


def train(model: Path, rollout: Path, num_steps: int, samples_per_step: int) -> None:
    """Run all steps and let rank 0 print what each rank replayed."""
    console = Console(quiet=torch.distributed.get_rank() != 0)
    layout = RoutingLayout.from_hf_config(read_hf_config(model))
    samples = load(rollout, layout)
    chunks, optimizer = build_model(model)
    controller = megatron_r3.attach(chunks, layout=layout)  # R3
    console.print(f"rank 0: {controller.report}", highlight=False)

    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    steps = []
    for number in track(range(num_steps), "training steps", console=console):
        first = number * samples_per_step
        of_step = [samples[i % len(samples)] for i in range(first, first + samples_per_step)]
        share, advantages = of_step[dp_rank::dp_size], advantages_of(of_step)[dp_rank::dp_size]
        routes = RoutedExpertsBatch.from_list([sample.routed for sample in share])
        micro_batches = make_micro_batches(share, advantages, routes)
        steps.append(train_step(chunks, optimizer, controller, micro_batches))
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    entries = [entry.layer - 1 for entry in controller.report.replayed]
    torch.distributed.all_gather_object(everywhere, (entries, steps))
    console.print(report(everywhere))
    torch.distributed.destroy_process_group()


def report(ranks: Sequence[tuple[list[int], list[StepReport]]]) -> Table:
    """What each rank replayed, and how the steps went."""
    numbers = np.array([[(step.loss, step.difference) for step in steps] for _, steps in ranks])
    losses, differences = np.nanmean(numbers, axis=0).T
    table = Table(
        title=f"{len(losses)} steps under replay, with full recompute",
        caption=f"loss {', '.join(f'{loss:+.4f}' for loss in losses)}; log-probs differ from the "
        f"rollout's by {', '.join(f'{difference:.4f}' for difference in differences)} nats",
    )
    headings = ("rank", "MoE layers", "rows replayed", "unrecorded", "padding", "recomputed calls")
    for heading in headings:
        table.add_column(heading, justify="right")
    for rank, (layers, steps) in enumerate(ranks):
        rows = sum((step.replay.rows for step in steps), megatron_r3.RowCounts())
        recomputes = sum(step.replay.recomputes for step in steps)
        counts = (rows.replayed, rows.unrecorded, rows.padding, recomputes)
        cells = [f"{count:,}" for count in counts]
        table.add_row(str(rank), ", ".join(map(str, layers)), *cells)
    return table
