"""The demo's report: what it writes, and when it calls a run a failure."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.demo.metrics import Difference
from examples.demo.report import Report

GOOD = Report(
    native=Difference(0.01, 0.05, 0.010, 0.5, 1e-4, 2e-4, 0.0),
    replayed=Difference(0.0, 0.0, 0.005, 0.2, 1e-5, 1e-4, 0.0),
    self_noise=Difference(0.002, 0.01, 0.004, 0.2, 1e-5, 1e-4, 0.0),
    tokens=6144,
    rows_missing=0,
)


def test_a_run_in_which_replay_helps_is_a_success():
    assert GOOD.failures() == []
    assert GOOD.exit_status == 0
    assert "5.0% of the tokens" in GOOD.verdict()
    assert "2.0 times smaller" in GOOD.verdict()


@pytest.mark.parametrize("key", ["kl_k3", "logprob_abs_mean"])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_measure_that_replay_does_not_lower_is_a_failure(key: str, value: float):
    report = replace(GOOD, replayed=replace(GOOD.replayed, **{key: value}))
    assert len(report.failures()) == 1
    assert key in report.failures()[0]
    assert report.exit_status == 1


def test_replay_that_changes_nothing_is_a_failure():
    assert len(replace(GOOD, replayed=replace(GOOD.native, router_mismatch=0.0)).failures()) == 2


def test_a_missing_row_is_a_failure():
    report = replace(GOOD, rows_missing=1)
    assert report.failures() == ["1 rows of routed experts did not arrive"]
    assert report.exit_status == 1


def test_a_replayed_router_that_used_other_experts_is_a_failure():
    report = replace(GOOD, replayed=replace(GOOD.replayed, router_mismatch=1e-5))
    assert len(report.failures()) == 1
    assert report.exit_status == 1


def test_json_holds_the_same_seven_keys_for_each_comparison(tmp_path: Path):
    GOOD.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    keys = {
        "router_mismatch",
        "token_mismatch",
        "logprob_abs_mean",
        "logprob_abs_max",
        "kl_k1",
        "kl_k3",
        "extreme_ratio_share",
    }
    assert content.keys() == {"native", "replayed", "self", "tokens", "rows_missing", "versions"}
    assert all(content[name].keys() == keys for name in ("native", "replayed", "self"))
    assert content["self"]["token_mismatch"] == GOOD.self_noise.token_mismatch
    assert content["versions"].keys() >= {"vllm", "megatron-core", "torch"}


def test_markdown_holds_the_verdict_and_every_row(tmp_path: Path):
    GOOD.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert GOOD.verdict() in text
    assert "| router decisions that differ | 1.00% | 0.00% | 0.20% |" in text
