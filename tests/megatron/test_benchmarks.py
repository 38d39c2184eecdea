"""The benchmarks run, and say what their targets are read from."""

import json
import subprocess
import sys
from typing import Any

import pytest

SMALL = {
    "replay_router": "--shapes mixtral-8x7b --tokens 64 --rounds 2 --warm-up 0",
    "train_step": (
        "--layers 2 --hidden-size 64 --experts 8 --top-k 2 --tokens 64 --samples 2 "
        "--micro-batches 2 --rounds 2 --warm-up 0"
    ),
}


@pytest.mark.parametrize(
    ("name", "ratios", "others"),
    [
        (
            "replay_router",
            ("forward_ratio", "routing_ratio_with_agreement", "aa_ratio"),
            ("extra_ops",),
        ),
        ("train_step", ("step_ratio", "aa_ratio"), ("interval", "aa_interval")),
    ],
)
def test_a_benchmark_ends_with_its_figures(
    name: str, ratios: tuple[str, ...], others: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name].split()]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert all(0.01 < result[ratio] < 100 for ratio in ratios)
    assert set(others) <= set(result)
    assert {"versions", "hardware", "device", "rounds"} <= set(result)
