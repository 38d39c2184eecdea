"""Steps wait to be stored together, a few of them and not for long."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.waiting_steps import WaitingSteps

from .rigs.page_stores import LAYOUT, step_rows


def waiting(max_steps=4):
    return WaitingSteps(LAYOUT, 64, max_steps, Journal())


def scheduled(rows):
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(rows.request_ids, 1),
        total_num_scheduled_tokens=len(rows.positions),
    )


def add(steps, rows):
    steps.add(rows, scheduled(rows))


def test_steps_are_due_when_there_are_enough_and_leave_in_order():
    steps = waiting()
    assert not steps
    for position in range(4):
        assert not steps.are_due
        add(steps, step_rows(("a", 1, position, position + 1)))
    assert steps
    assert steps.are_due
    assert [int(step.positions[0]) for step in steps.fitting(steps.take())] == [0, 1, 2, 3]
    assert not steps
    assert not steps.are_due


def test_a_large_step_is_due_at_once_and_so_are_small_ones_that_add_up():
    rows = step_rows(("a", 1, 0, 1))
    steps = waiting()
    add(steps, rows._replace(ids=np.zeros((1 << 20) // 6 + 1, "V6")))
    assert steps.are_due
    steps = waiting()
    smaller = rows._replace(ids=np.zeros(700 << 10, np.uint8))
    for _ in range(2):
        add(steps, smaller)
        assert not steps.are_due
    add(steps, smaller)
    assert steps.are_due


def test_a_step_that_does_not_fit_is_left_out_and_noted_and_no_other():
    journal = Journal()
    steps = WaitingSteps(LAYOUT, 64, 4, journal)
    rows = [step_rows(("a", 1, i, i + 1)) for i in range(3)]
    for one in (rows[0], rows[1]._replace(positions=rows[1].positions - 9), rows[2]):
        add(steps, one)
    assert steps.fitting(steps.take()) == [rows[0], rows[2]]
    assert journal.counts == {"MISFIT": 1}


def test_a_step_without_ids_is_refused_and_does_not_wait_with_the_others():
    steps = waiting()
    with pytest.raises(AttributeError):
        add(steps, step_rows(("a", 1, 0, 1))._replace(ids=None))
    assert not steps
