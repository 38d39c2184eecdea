"""One policy-gradient step under replay, with full recompute, and proof that replay held."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

import megatron_r3
from examples.demo import DemoError
from examples.demo.metrics import differing_decisions
from examples.demo.rollout import Sample
from examples.demo.trainer import RouterWatch, output_logprobs
from shared_schema import RoutedExpertsBatch

MICRO_BATCHES = 2
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class StepReport:
    """What one step did: its loss, the gradient's norm, and the router calls under replay."""

    loss: float
    grad_norm: float
    forwards: int
    recomputes: int


def policy_gradient_step(
    model: GPTModel,
    controller: megatron_r3.Controller,
    watch: RouterWatch,
    samples: Sequence[Sample],
) -> StepReport:
    """Take one REINFORCE step with importance ratios, on two micro-batches.

    Raises:
        DemoError: the loss is not finite, a gate got no gradient, a forward or a recompute used
            other experts than the rollout, or the optimizer skipped the step.

    """
    model.train()
    config = model.config
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(), Float16Module(config, model)
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, bf16=True, params_dtype=torch.bfloat16),
        [wrapped],
    )
    advantages = _advantages(samples)
    batches = np.array_split(np.arange(len(samples)), MICRO_BATCHES)

    def forward_step(numbers: Iterator[np.ndarray], chunk: torch.nn.Module) -> Any:
        batch = next(numbers)
        packed = [samples[i] for i in batch]
        weights = np.concatenate(
            [np.full(len(samples[i].output_ids), advantages[i], np.float32) for i in batch]
        )
        rollout_logprobs = np.concatenate([s.logprobs for s in packed]).astype(np.float32)

        def loss(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            ratio = torch.exp(logprobs - torch.from_numpy(rollout_logprobs))
            mean = -(ratio * torch.from_numpy(weights)).mean()
            return mean, {"loss": mean.detach()}

        return output_logprobs(chunk, controller, packed), loss

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    watch.take()
    with controller.schedule("replay") as schedule:
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=wrapped,
            num_microbatches=MICRO_BATCHES,
            seq_length=max(len(s.token_ids) for s in samples),
            micro_batch_size=1,
            forward_only=False,
        )
    wrapped.finish_grad_sync()
    calls = watch.take()
    check_calls(
        calls, [RoutedExpertsBatch.from_list([samples[i].routed for i in b]) for b in batches]
    )
    _check_gates(model)
    stepped, grad_norm, _ = optimizer.step()
    loss = float(np.mean([float(report["loss"]) for report in losses]))
    if not (math.isfinite(loss) and math.isfinite(grad_norm) and stepped):
        raise DemoError(
            f"the step has loss {loss} and gradient norm {grad_norm}, expected finite values and "
            f"an optimizer that steps (it {'did' if stepped else 'did not'})."
        )
    total = sum(len(router_calls) for router_calls in calls)
    recomputes = schedule.report.recomputes
    return StepReport(loss, float(grad_norm), total - recomputes, recomputes)


def _advantages(samples: Sequence[Sample]) -> np.ndarray:
    """Normalised rewards `[B]`; a stand-in for a real reward likes letters and spaces."""
    rewards = np.array(
        [np.mean([chr(t).isalpha() or t == ord(" ") for t in s.output_ids]) for s in samples]
    )
    return np.asarray((rewards - rewards.mean()) / (rewards.std() + 1e-6))


def check_calls(
    calls: Sequence[Sequence[Int[np.ndarray, "rows k"]]], routes: Sequence[RoutedExpertsBatch]
) -> None:
    """Check that every router ran twice in each micro-batch, with the rollout's experts.

    Args:
        calls: of each router, in order; without pipelining a micro-batch's recompute follows its
            forward.
        routes: of each micro-batch; rows that were not recorded may use any experts.

    Raises:
        DemoError: a call too few or too many, or other experts.

    """
    for layer, router_calls in enumerate(calls):
        if len(router_calls) != 2 * len(routes):
            raise DemoError(
                f"MoE layer {layer} routed {len(router_calls)} times in {len(routes)} "
                f"micro-batches, expected {2 * len(routes)}: a forward and a recompute each."
            )
        for number, used in enumerate(router_calls):
            expected = routes[number // 2]
            differs = differing_decisions(used[:, None], expected.values[:, [layer]])[:, 0]
            wrong = int((differs & expected.recorded).sum())
            if wrong:
                raise DemoError(
                    f"MoE layer {layer} used other experts than the rollout in {wrong} rows of the "
                    f"{'recompute' if number % 2 else 'forward'} of micro-batch {number // 2}."
                )


def _check_gates(model: GPTModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and not module.weight.main_grad.any():
            raise DemoError(f"{name} got no gradient, expected one: replay must keep gates live.")
