"""The Ray pair runs: routes go from vLLM to the trainers as one array for each of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from examples.demo.small_model import held_out_prompts
from shared_schema import RoutingLayout
from tests.megatron.foreign_routes import foreign_routes


def test_two_trainers_replay_what_the_rollout_actor_sampled(
    small_rollout: tuple[Path, Path],
) -> None:
    model, _ = small_rollout
    command = [sys.executable, "-m", "examples.ray_pair", "--model", str(model)]
    options = ["--prompts", "5", "--max-tokens", "8", "--steps", "1"]
    # Ray's workers step back for others, here for other tests.
    environment = os.environ | {"RAY_worker_niceness": "0"}
    finished = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    rows = re.findall(r"^│(.*)│$", finished.stdout, re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("│")] for row in rows]
    assert [row[1] for row in cells] == ["3", "2"]
    assert [row[3] for row in cells] == ["no", "no"]
    prompts = [len(prompt) for prompt in held_out_prompts(5)]
    for row, lengths in zip(cells, (prompts[:3], prompts[3:]), strict=True):
        # One row less than tokens each; an answer may end early.
        assert sum(lengths) <= int(row[4]) <= sum(lengths) + 7 * len(lengths)
        # bf16 differs by thousandths of a nat, routes that are not the tokens' own by a tenth.
        assert float(row[6]) < 0.03


def test_a_shard_gives_back_its_samples() -> None:
    from examples.demo.rollout import Sample
    from examples.ray_pair.actors import make_shard

    layout = RoutingLayout(8, 2, (1, 2), 3)
    made = []
    for number, (prompt, output) in enumerate([(3, 2), (1, 4), (5, 1)]):
        (routed,) = foreign_routes(layout, [prompt + output], number)
        tokens = list(range(10 * number, 10 * number + prompt + output))
        made.append(Sample(tokens[:prompt], tokens[prompt:], np.arange(output) - 9.0, routed))
    shard = make_shard(made, np.arange(3.0))
    for given, back in zip(made, shard.samples(), strict=True):
        assert (back.prompt_ids, back.output_ids) == (given.prompt_ids, given.output_ids)
        assert np.array_equal(back.logprobs, given.logprobs)
        assert back.routed == given.routed
        assert np.shares_memory(back.routed.ids, shard.routes.values)
