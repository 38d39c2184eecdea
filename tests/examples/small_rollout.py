"""A checkpoint and a rollout folder as the demo leaves them, with routes that no router chose."""

from pathlib import Path

import numpy as np

from examples.demo.rollout import Sample, save
from examples.demo.small_model import held_out_prompts, train_checkpoint
from megatron_r3.hf_loader import read_hf_config
from shared_schema import RoutingLayout
from tests.megatron.foreign_routes import foreign_routes


def make_small_rollout(folder: Path, samples: int) -> tuple[Path, Path]:
    """The folders of the model and of the rollout."""
    model, rollout = folder / "model", folder / "rollout"
    train_checkpoint(model, 1, lambda step, loss: None)
    rollout.mkdir()
    layout = RoutingLayout.from_hf_config(read_hf_config(model))
    rng = np.random.default_rng(0)
    made = []
    for number, prompt in enumerate(held_out_prompts(samples)):
        output = rng.integers(32, 127, 6 + number).tolist()
        (routed,) = foreign_routes(layout, [len(prompt) + len(output)], number)
        made.append(Sample(prompt, output, np.full(len(output), -5.5), routed))
    save(made, rollout)
    return model, rollout
