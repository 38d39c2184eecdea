"""The training loop runs as a reader would start it, on one rank and on two."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def loop(launcher: tuple[str, ...], rollout: tuple[Path, Path], *options: str) -> str:
    arguments = ("--model", rollout[0], "--rollout", rollout[1], "--samples", "8", "--steps", "1")
    command = [sys.executable, *launcher, "-m", "examples.megatron_loop", *arguments, *options]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def table_rows(output: str) -> list[list[str]]:
    """Cells of the report, a list for each rank."""
    rows = re.findall(r"^│(.*)│$", output, re.MULTILINE)
    return [[cell.strip() for cell in row.split("│")] for row in rows if row.strip()[0].isdigit()]


def loss(output: str) -> str:
    return re.findall(r"loss ([-+.\d]+)", output)[0]


def test_every_stage_of_a_pipeline_replays_its_layers(small_rollout: tuple[Path, Path]) -> None:
    alone = loop((), small_rollout)
    (rank,) = table_rows(alone)
    assert rank[1] == "1, 2, 3, 4, 5"
    replayed, unrecorded, padding, recomputed = (int(cell) for cell in rank[2:])
    assert (unrecorded, recomputed) == (8, 2 * 5)

    staged = loop(TORCHRUN, small_rollout, "--pipeline-parallel", "2")
    assert [rank[1] for rank in table_rows(staged)] == ["1, 2", "3, 4, 5"]
    counts = [str(count) for count in (replayed, unrecorded, padding)]
    assert [rank[2:5] for rank in table_rows(staged)] == [counts, counts]
    assert loss(staged) == loss(alone)


def test_the_lines_that_replay_adds_are_marked() -> None:
    """Without them the loop is Megatron's own."""
    source = Path("examples/megatron_loop/loop.py").read_text()
    marked = [line.split("#")[0].strip() for line in source.splitlines() if "# R3" in line]
    calls = [line for line in marked if "megatron_r3" in line or "controller." in line]
    assert len(calls) >= 4
    rest = "\n".join(line for line in source.splitlines() if "# R3" not in line)
    assert "controller.feed" not in rest
    assert "controller.schedule" not in rest
    assert "megatron_r3.attach" not in rest


@pytest.mark.parametrize("example", ["megatron_loop", "ray_pair"])
def test_help_says_how_to_start_it(example: str) -> None:
    command = [sys.executable, "-m", f"examples.{example}", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0
    assert f"python -m examples.{example}" in finished.stdout


@pytest.mark.parametrize("example", ["megatron_loop", "ray_pair"])
def test_a_missing_model_is_said(example: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"examples.{example}", "--model", str(tmp_path / "none")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "run `make demo` first" in finished.stderr
