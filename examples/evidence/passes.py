"""The same tokens scored again: in float32, and in Megatron with and without replay."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM, logging

import megatron_r3
from examples.demo.metrics import Difference, compare
from examples.demo.rollout import Sample
from examples.demo.trainer import RouterWatch, Scores, build_trainer, score, start_megatron
from megatron_r3.hf_loader import build_gpt_model
from shared_schema import RoutingLayout

Mode = Literal["native", "replay"]

SAMPLES_PER_BATCH = 8
SAMPLES_PER_OTHER_BATCH = 5
PAIRS = {
    "Megatron float32 against float32": ("native in float32", "float32"),
    "vLLM bf16 against float32": ("rollout", "float32"),
    "Megatron bf16 against float32": ("native", "float32"),
    "Megatron bf16 against vLLM bf16": ("native", "rollout"),
    "Megatron, rollout replayed, against vLLM": ("replayed", "rollout"),
    "Megatron against itself, other batches": ("native again", "native"),
    "the same under replay": ("replayed again", "replayed"),
}
RATIOS = (1.1, 1.5, 2.0)


def score_everywhere(
    model: Path, samples: Sequence[Sample], layout: RoutingLayout
) -> dict[str, Scores]:
    """Score the samples' tokens in every pass that `PAIRS` names."""
    passes = {
        "rollout": Scores(
            np.concatenate([s.logprobs for s in samples]),
            np.concatenate([s.routed.ids for s in samples]),
        ),
        "float32": score_in_float32(model, samples, layout),
    }
    batches = _batched(range(len(samples)), SAMPLES_PER_BATCH)
    shuffled = np.random.default_rng(0).permutation(len(samples)).tolist()
    others = _batched(shuffled, SAMPLES_PER_OTHER_BATCH)
    start_megatron()

    def scored(gpt: GPTModel, modes: Mapping[str, tuple[Any, Mode]]) -> dict[str, Scores]:
        controller = megatron_r3.attach(gpt, layout=layout)
        watch = RouterWatch(gpt)
        return {
            name: score(gpt, controller, watch, samples, of, mode)
            for name, (of, mode) in modes.items()
        }

    passes |= scored(build_gpt_model(model)[0], {"native in float32": (batches, "native")})
    return passes | scored(
        build_trainer(model),
        {
            "native": (batches, "native"),
            "native again": (others, "native"),
            "replayed": (batches, "replay"),
            "replayed again": (others, "replay"),
        },
    )


def score_in_float32(model: Path, samples: Sequence[Sample], layout: RoutingLayout) -> Scores:
    """Score with transformers in float32, one sequence at a time."""
    logging.disable_progress_bar()  # it would break into the caller's
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.eval()
    logprobs, ids = [], []
    with torch.no_grad():
        for sample in samples:
            inputs = torch.tensor([sample.token_ids[:-1]])
            output = reference(inputs, output_router_logits=True, use_cache=False)
            logs = output.logits[0].float().log_softmax(-1)
            targets = torch.tensor(sample.token_ids[1:])
            scored = logs.gather(1, targets[:, None])[:, 0]
            logprobs.append(scored[len(sample.prompt_ids) - 1 :].numpy())
            routers = [logits.topk(layout.top_k).indices for logits in output.router_logits]
            ids.append(torch.stack(routers, 1).numpy())
    return Scores(np.concatenate(logprobs), np.concatenate(ids))


def differences(
    passes: dict[str, Scores], samples: Sequence[Sample]
) -> dict[str, tuple[Difference, dict[float, float]]]:
    """Compare each of `PAIRS`, with the share of importance ratios beyond each size."""
    recorded = np.concatenate([s.routed.recorded for s in samples])
    found = {}
    for title, names in PAIRS.items():
        one, other = (passes[name] for name in names)
        log_ratio = np.abs(one.logprobs - other.logprobs)
        beyond = {ratio: float((log_ratio > np.log(ratio)).mean()) for ratio in RATIOS}
        found[title] = (
            compare(one.logprobs, other.logprobs, one.ids[recorded], other.ids[recorded]),
            beyond,
        )
    return found


def _batched(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
