"""The driver: it hands references from the rollout to the trainers, and no data passes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.table import Table

from examples.demo.small_model import held_out_prompts
from examples.ray_pair.actors import RolloutActor, TrainerActor, TrainerReport
from megatron_r3.hf_loader import read_hf_config
from shared_schema import RoutingLayout


@dataclass(frozen=True)
class Actors:
    """One rollout actor and the trainers."""

    rollout: Any
    trainers: list[Any]


def make_actors(model: Path, num_trainers: int, store: Path) -> Actors:
    """Start all actors and wait until they are ready; `store` is where the trainers meet."""
    model = model.resolve()
    layout = RoutingLayout.from_hf_config(read_hf_config(model))
    make_rollout, make_trainer = (
        ray.remote(num_cpus=0)(kind) for kind in (RolloutActor, TrainerActor)
    )
    rollout = make_rollout.remote(model, layout)
    trainers = [
        make_trainer.remote(rank, num_trainers, store, model) for rank in range(num_trainers)
    ]
    ray.get([actor.__ray_ready__.remote() for actor in (rollout, *trainers)])
    return Actors(rollout, trainers)


def step(actors: Actors, number: int, num_prompts: int, max_tokens: int) -> list[TrainerReport]:
    """Roll out and train once.

    The trainers' weights are not sent back: how a trainer updates vLLM is another subject.
    """
    prompts = held_out_prompts((number + 1) * num_prompts)[-num_prompts:]
    shards = ray.get(actors.rollout.roll_out.remote(prompts, max_tokens, len(actors.trainers)))
    # A reference that is an argument arrives as the object that it stands for.
    steps = [
        trainer.step.remote(shard) for trainer, shard in zip(actors.trainers, shards, strict=True)
    ]
    reports: list[TrainerReport] = ray.get(steps)
    return reports


def report(number: int, reports: Sequence[TrainerReport]) -> Table:
    """What each trainer got and did."""
    table = Table(
        title=f"step {number}",
        caption="native, replayed: mean absolute difference of log-probs to the rollout, in nats",
    )
    headings = ("trainer", "samples", "routes", "copied", "rows replayed", "native", "replayed")
    for heading in headings:
        table.add_column(heading, justify="right")
    for rank, entry in enumerate(reports):
        table.add_row(
            str(rank),
            str(entry.samples),
            f"{entry.route_bytes / 1024:.1f} KiB",
            "no" if entry.in_object_store else "yes",
            f"{entry.rows.replayed:,}",
            f"{entry.native:.4f}",
            f"{entry.replayed:.4f}",
        )
    return table
