"""Rows of earlier pipeline stages arrive whole and in order, and what is missing stops nothing."""

import numpy as np
import pytest

from vllm_r3_plugin import pipeline_rows
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.pipeline_rows import StageReceiver, StageSender

TOP_K = 4


def rows(step: int, stage: int, num_tokens: int = 5, layers: int = 2) -> np.ndarray:
    rng = np.random.default_rng((step, stage))
    return rng.integers(0, 255, (num_tokens, layers, TOP_K), np.uint8)


@pytest.fixture(params=[None, "127.0.0.1"], ids=["one host", "several hosts"])
def link(request: pytest.FixtureRequest) -> tuple[StageReceiver, list[StageSender]]:
    receiver = StageReceiver({0: 2, 2: 3}, TOP_K, np.dtype(np.uint8))
    address = receiver.bind(request.param)
    return receiver, [StageSender(stage, address, Journal()) for stage in (0, 2)]


def test_rows_of_all_stages_arrive_in_the_order_of_stages(link):
    receiver, (first, second) = link
    for step in range(1, 20):
        second.send(step, lambda step=step: rows(step, 2, layers=3))
        first.send(step, lambda step=step: rows(step, 0))
    for step in range(1, 20):
        got = receiver.take(step, 5)
        np.testing.assert_array_equal(got[0], rows(step, 0))
        np.testing.assert_array_equal(got[1], rows(step, 2, layers=3))


def test_a_step_that_nobody_took_does_not_shift_the_next(link):
    receiver, (first, second) = link
    for step in (1, 2, 3):
        first.send(step, lambda step=step: rows(step, 0))
        second.send(step, lambda step=step: rows(step, 2, layers=3))
    np.testing.assert_array_equal(receiver.take(3, 5)[0], rows(3, 0))


def test_a_failed_capture_costs_its_step_alone(link):
    receiver, (first, second) = link
    for step in (1, 2):
        first.send(step, lambda step=step: None if step == 1 else rows(step, 0))
        second.send(step, lambda step=step: rows(step, 2, layers=3))
    assert receiver.take(1, 5) is None
    np.testing.assert_array_equal(receiver.take(2, 5)[0], rows(2, 0))


def test_rows_of_another_shape_are_an_error_that_names_the_stage(link):
    receiver, (first, second) = link
    first.send(1, lambda: rows(1, 0, num_tokens=4))
    second.send(1, lambda: rows(1, 2, layers=3))
    with pytest.raises(ValueError, match=r"stage 0 sent 32 ids, expected \(5, 2, 4\)"):
        receiver.take(1, 5)


def test_a_silent_stage_is_waited_for_once_and_may_come_back(link):
    receiver, (first, second) = link
    receiver._patience = 0.05
    second.send(1, lambda: rows(1, 2, layers=3))
    with pytest.raises(TimeoutError, match=r"stages \[0\]"):
        receiver.take(1, 5)
    assert receiver._patience == 0
    with pytest.raises(TimeoutError):
        receiver.take(2, 5)
    for step in (1, 2, 3):
        first.send(step, lambda step=step: rows(step, 0))
    for step in (2, 3):
        second.send(step, lambda step=step: rows(step, 2, layers=3))
    first._thread.shutdown()
    second._thread.shutdown()
    while True:
        try:
            got = receiver.take(3, 5)
            break
        except TimeoutError:
            continue
    np.testing.assert_array_equal(got[0], rows(3, 0))
    assert receiver._patience == pipeline_rows.PATIENCE_S


def test_an_error_in_a_stage_costs_its_step_alone_and_no_wait(link):
    receiver, (first, second) = link

    def fails() -> np.ndarray:
        raise RuntimeError("out of pinned memory")

    for step in (1, 2):
        first.send(step, fails if step == 1 else lambda: rows(2, 0))
        second.send(step, lambda step=step: rows(step, 2, layers=3))
    assert receiver.take(1, 5) is None
    np.testing.assert_array_equal(receiver.take(2, 5)[0], rows(2, 0))
    assert first._journal.counts == {"error while finishing a stage's rows: RuntimeError": 1}
