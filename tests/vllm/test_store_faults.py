"""An exception anywhere in the page store costs the requests concerned, and no one else a row."""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .rigs.faults import InjectedError, failing, fault_points
from .rigs.page_stores import ROOMY, SIZE, History, feed, make_store, statuses, tags

_REPAIRS = ("__init__", "repair", "clear", "_clear", "withdraw_all")

INSIDE = [
    point
    for point in fault_points(["page_store", "page_pool", "published_pages", "request_slots"])
    if (not point.name.startswith("PageStore.") or point.attribute.startswith(("_", "read")))
    and point.attribute not in _REPAIRS
]


class DisturbedHistory(History):
    """A history in which an exception is answered as the scheduler answers it."""

    def attempt(self, concerned, action):
        try:
            action()
        except InjectedError:
            self.store.repair(concerned)
            self.whole.clear()
            for name in concerned:
                self.forget(name, 0)
                self.fed.pop(name, None)
                assert statuses(self.store, name, 0, 40) == ["CAPTURE_FAILED"] * 40


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_history_with_exceptions_yields_a_wrong_row_or_costs_another_requests(data):
    history = DisturbedHistory(data.draw(st.sampled_from([2, 8, ROOMY])))
    for number in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["begin", "step", "step", "lose", "preempt", "end"]))
        live = sorted(history.fed)
        point, call = data.draw(st.sampled_from(INSIDE)), data.draw(st.integers(1, 3))
        calls = {call} if data.draw(st.booleans()) else set()
        with failing(point, calls, after=data.draw(st.booleans()), error=InjectedError):
            if action == "begin" and len(live) < 4:
                name = f"r{number}"
                family, hit = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
                history.attempt([name], lambda: history.begin(name, family, hit))  # noqa: B023
            elif action in ("step", "lose") and live:
                count = data.draw(st.integers(1, 6))
                names = data.draw(st.lists(st.sampled_from(live), unique=True))
                names = [n for n in names if history.fed[n] + count <= 40]
                arrives = action == "step"
                history.attempt(names, lambda: history.step(names, count, arrives=arrives))  # noqa: B023
            elif action == "preempt" and live:
                name = data.draw(st.sampled_from(live))
                keep = data.draw(st.integers(0, history.fed[name]))
                history.attempt([name], lambda: history.admit(name, 0, keep))  # noqa: B023
            elif action == "end" and live:
                name = data.draw(st.sampled_from(live))
                history.attempt([name], lambda: history.end(name))  # noqa: B023
        history.check()
    for name in list(history.fed):
        history.end(name)
    store = history.store
    store.start_generation()
    assert store.num_pages == 0


def test_a_request_that_was_given_up_takes_no_more_rows():
    store = make_store()
    store.admit("a", 0, [])
    store.admit("b", 0, [])
    feed(store, ("a", 1, 0, 4), ("b", 2, 0, 4))
    store.repair(["a"])
    feed(store, ("a", 1, 4, 6), ("b", 2, 4, 6))
    assert statuses(store, "a", 0, 6) == ["CAPTURE_FAILED"] * 6
    assert tags(store, "b", 0, 6) == [2] * 6


def test_a_hit_of_a_request_that_was_given_up_does_not_reach_the_next_one():
    store = make_store()
    store.admit("a", 0, ["x"])
    pending = store.admit("b", SIZE, ["x"])
    store.repair(["b"])
    store.admit("c", 0, [])
    feed(store, ("a", 1, 0, 4))
    store.resolve(pending)
    assert statuses(store, "c", 0, 4) == ["STEP_LOST"] * 4


def test_a_hit_that_is_still_open_when_its_request_begins_again_is_void():
    store = make_store()
    store.admit("a", 0, ["x", "y"])
    pending = store.admit("b", 2 * SIZE, ["x", "y"])
    store.admit("b", 1, ["x", "y"])
    feed(store, ("a", 1, 0, 8))
    store.resolve(pending)
    assert tags(store, "b", 0, 8) == [1] + [None] * 7


@contextmanager
def refusing(allocate, module, number):
    """Allocation `number`, from 1, of this module of the plugin by a function of numpy fails."""
    calls = []

    def allocates(*args):
        if sys._getframe(1).f_globals["__name__"] == f"vllm_r3_plugin.{module}":
            calls.append(args)
            if len(calls) == number:
                raise MemoryError("none left")
        return allocate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, allocate.__name__, allocates)
        yield
    assert len(calls) >= number


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_host_memory_that_is_refused_costs_the_rows_that_needed_it(number):
    store = make_store(cached_pages=2, max_pages=64)
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 8))
    with refusing(np.zeros, "page_pool", number):
        feed(store, ("a", 1, 8, 24))
    assert tags(store, "a", 0, 24) == [1] * 8 + [None] * 16
    assert store.rows_dropped == 16
    feed(store, ("a", 1, 24, 28))
    assert tags(store, "a", 0, 28) == [1] * 8 + [None] * 20


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_no_memory_for_another_request_leaves_those_there_are_whole(number):
    store = make_store(cached_pages=200, max_pages=200)
    for i in range(63):
        store.admit(f"r{i}", 0, [])
    with refusing(np.concatenate, "request_slots", number), pytest.raises(MemoryError):
        store.admit("one too many", 0, [])
    store.repair(["one too many"])
    store.admit("the next", 0, [])
    feed(store, *((f"r{i}", i, 0, 3) for i in range(63)), ("the next", 99, 0, 3))
    assert [tags(store, f"r{i}", 0, 3) for i in range(63)] == [[i] * 3 for i in range(63)]
    assert tags(store, "the next", 0, 3) == [99] * 3


def test_the_pool_is_not_touched_before_it_is_used():
    before = _resident_bytes()
    store = make_store(cached_pages=1 << 24, max_pages=1 << 25)
    assert store._pool.ids.nbytes > 1 << 28
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 12))
    assert _resident_bytes() - before < store._pool.ids.nbytes / 8


def _resident_bytes():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4096
