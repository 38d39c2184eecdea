"""Workloads drawn by hypothesis on engines that live on: `python -m tests.vllm.fuzz_workloads`."""

from pathlib import Path

import pytest

from .rigs.engine_process import run_in_engine_process
from .rigs.live_engine import ENGINES, Tally, run_workloads
from .rigs.transformers_oracle import TransformersOracle

EXAMPLES = 8


@pytest.fixture(scope="module", params=ENGINES)
def tally(request: pytest.FixtureRequest, moe_model: Path, updated_moe_model: Path) -> Tally:
    return run_in_engine_process(
        run_workloads, moe_model, updated_moe_model, request.param, EXAMPLES, None
    )


def test_no_array_holds_a_wrong_row(tally: Tally) -> None:
    assert tally.counts["rows checked"] >= 400
    assert tally.counts["rows wrong"] == 0


def test_rows_are_those_of_transformers(tally: Tally, oracle: TransformersOracle) -> None:
    agreement = oracle.agreement(tally.for_oracle)
    assert agreement.decisions >= 1200
    assert agreement.differing == 0


@pytest.mark.parametrize("tally", ["asynchronous"], indirect=True)
def test_requests_were_preempted_and_ended_with_steps_in_flight(tally: Tally) -> None:
    assert tally.counts["preempted in flight"] >= 2
    assert tally.counts["finished while preempted"] >= 1
    assert tally.counts["aborted in flight"] >= 1
