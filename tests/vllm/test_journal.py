"""What goes wrong is counted each time, said once, and stops nothing."""

import pytest

from vllm_r3_plugin.journal import Journal


def test_an_event_is_logged_the_first_time_and_counted_each_time(caplog):
    journal = Journal()
    journal.note("STEP_LOST", "a step is lost", number=3)
    journal.note("STEP_LOST", "a step is lost")
    assert journal.counts == {"STEP_LOST": 4}
    assert caplog.text.count("a step is lost") == 1


def test_new_counts_are_taken_once():
    journal = Journal()
    journal.count("rows", 5)
    assert journal.take_new() == {"rows": 5}
    assert journal.take_new() == {}
    assert journal.counts == {"rows": 5}


def test_an_error_under_guard_is_counted_by_place_and_answered(caplog):
    journal, answered = Journal(), []
    for _ in range(2):
        with journal.guard("storing", lambda: answered.append(1)):
            raise KeyError("gone")
    assert journal.counts == {"error while storing: KeyError": 2}
    assert answered == [1, 1]
    assert caplog.text.count("routing was lost while storing: KeyError: 'gone'") == 1


def test_an_error_in_the_answer_is_counted_too():
    journal = Journal()
    with journal.guard("storing", lambda: {}["missing"]):
        raise MemoryError
    assert journal.counts == {
        "error while storing: MemoryError": 1,
        "error while recovering from an error while storing: KeyError": 1,
    }


def test_what_ends_the_process_passes():
    with pytest.raises(KeyboardInterrupt), Journal().guard("storing"):
        raise KeyboardInterrupt
