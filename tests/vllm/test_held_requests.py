"""Rows that outlive their request: in the store by itself, and under tickets."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_schema import RowStatus
from vllm_r3_plugin.held_requests import HeldRequests
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.request_options import RequestOptions
from vllm_r3_plugin.row_reader import RowReader

from .rigs.page_stores import LAYOUT, SIZE, History, feed, make_store, rows_for, tags

PAGE_BYTES = SIZE * LAYOUT.row_nbytes
OPTIONS = RequestOptions("on", 0, "r3", "fetch", "omit")


def end(store, request, rows):
    """Pin ``rows`` and end ``request``."""
    store.pin(rows)
    store.release(request)
    return rows


def test_pinned_rows_outlive_their_request_and_everything_written_after_it():
    store = make_store(cached_pages=2, max_pages=2)
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 7))
    rows = end(store, "a", store.freeze("a", 2, 7))
    for number in range(8):
        store.admit(f"b{number}", 0, [])
        feed(store, (f"b{number}", 9, 0, 8))
        store.release(f"b{number}")
    ids, status = store.read_frozen(rows, 2, 7)
    assert not status.any()
    assert (ids == rows_for(1, range(2, 7))).all()
    assert (store.read_frozen(rows, 4, 6)[0] == rows_for(1, range(4, 6))).all()


def test_a_step_still_in_flight_does_not_change_frozen_rows():
    store = make_store()
    store.admit("a", 0, ["x", "y"])
    feed(store, ("a", 1, 0, 5))
    store.admit("a", 0, ["x", "y"], keep=5)  # preempted, with a step in flight
    feed(store, ("a", 2, 5, 6))  # which brings the last token
    rows = end(store, "a", store.freeze("a", 0, 6))
    store.admit("b", 0, [])
    feed(store, ("a", 3, 0, 6))
    ids, status = store.read_frozen(rows, 0, 6)
    assert not status.any()
    assert ids[:, 0, 0].tolist() == [1] * 5 + [2]


def test_the_row_of_the_last_token_still_completes_a_page_for_later_hits():
    store = make_store()
    store.admit("a", 0, ["x"])
    feed(store, ("a", 1, 0, 3))
    rows = store.freeze("a", 0, 3)
    store.pin(rows)
    feed(store, ("a", 1, 3, 4))  # was in flight
    store.release("a")
    assert store.admit("b", 4, ["x"]) == []
    assert tags(store, "b", 0, 4) == [1] * 4


def test_pinned_pages_take_no_room_from_live_requests_and_come_back():
    store = make_store(cached_pages=4, max_pages=4)
    held = []
    for number in range(5):
        name = f"a{number}"
        store.admit(name, 0, [])
        feed(store, (name, number + 1, 0, 4 * SIZE))
        assert tags(store, name, 0, 4 * SIZE) == [number + 1] * 4 * SIZE
        held.append(end(store, name, store.freeze(name, 0, 4 * SIZE)))
    assert store.rows_dropped == 0
    assert store.num_pages == 20
    for rows in held:
        store.unpin(rows)
    assert store.num_pages == 0
    for number in range(3):
        store.admit(f"b{number}", 0, [])
        feed(store, (f"b{number}", 1, 0, 8 * SIZE))
    assert store.num_pages <= 20


def test_pinned_pages_push_no_page_out_that_is_kept_for_hits():
    store = make_store(cached_pages=2, max_pages=8)
    store.admit("a", 0, ["x"])
    feed(store, ("a", 1, 0, SIZE))
    store.release("a")
    for number in range(4):
        store.admit(f"b{number}", 0, [])
        feed(store, (f"b{number}", 9, 0, SIZE))
        end(store, f"b{number}", store.freeze(f"b{number}", 0, SIZE))
    assert store.admit("c", SIZE, ["x"]) == []
    assert tags(store, "c", 0, SIZE) == [1] * SIZE


class HistoryWithHolds(History):
    """Also keeps what was read at the moment of each hold."""

    def __init__(self, cached_pages):
        super().__init__(cached_pages)
        self.held = []

    def hold(self, name, start):
        stop = self.fed[name]
        rows = self.store.freeze(name, start, stop)
        self.store.pin(rows)
        self.held.append((rows, *self.store.read(name, start, stop)))

    def let_go(self, index):
        self.store.unpin(self.held.pop(index)[0])

    def check(self):
        super().check()
        for rows, ids, status in self.held:
            now_ids, now_status = self.store.read_frozen(rows, rows.start, rows.stop)
            np.testing.assert_array_equal(now_status, status)
            np.testing.assert_array_equal(now_ids, ids)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_held_rows_never_change_and_cost_no_other_request_a_row(data):
    history = HistoryWithHolds(data.draw(st.sampled_from([2, 8, 64])))
    actions = ["begin", "step", "step", "hold", "hold and end", "let go", "preempt", "reset"]
    for number in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(actions))
        live = sorted(history.fed)
        if action == "reset":
            history.reset()
        elif action == "begin" and len(live) < 4:
            family, hit = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
            history.begin(f"r{number}", family, hit)
        elif action == "let go" and history.held:
            history.let_go(data.draw(st.integers(0, len(history.held) - 1)))
        elif live:
            name = data.draw(st.sampled_from(live))
            count = data.draw(st.integers(1, 6))
            if action == "step" and history.fed[name] + count <= 40:
                history.step([name], count, arrives=True)
            elif action == "preempt":
                history.admit(name, 0, data.draw(st.integers(0, history.fed[name])))
            elif action.startswith("hold") and history.fed[name] >= history.kept[name]:
                history.hold(name, data.draw(st.integers(0, history.fed[name])))
                if action == "hold and end":
                    history.end(name)
        history.check()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make_held(max_pages=8, ttl_s=60.0):
    store, clock, journal = make_store(), Clock(), Journal()
    held = HeldRequests(store, 3, max_pages * PAGE_BYTES, ttl_s, journal, clock)
    return store, held, clock, journal


def hold(store, held, name, num_rows):
    store.admit(name, 0, [])
    feed(store, (name, 1, 0, num_rows))
    ticket = held.new_ticket()
    held.hold(ticket, store.freeze(name, 0, num_rows), OPTIONS)
    store.release(name)
    return ticket


def test_a_ticket_names_its_engine_and_cannot_be_guessed():
    held = make_held()[1]
    tickets = [held.new_ticket() for _ in range(1000)]
    assert len(set(tickets)) == 1000
    assert all(re.fullmatch(r"3\.[A-Za-z0-9_-]{32}", ticket) for ticket in tickets)


def test_rows_may_be_found_again_until_their_time_is_over():
    store, held, clock, _ = make_held(ttl_s=60)
    ticket = hold(store, held, "a", 5)
    clock.now += 59
    assert held.find(ticket) is held.find(ticket) is not None
    clock.now += 1
    assert held.find(ticket) is None
    assert held.why_not(ticket) == (
        "they were kept for 60 s: fetch them sooner or raise fetch_ttl_s in "
        'additional_config["r3"].'
    )
    assert store.num_pages == held.num_bytes == len(held) == 0


def test_held_rows_stay_within_their_bytes_and_the_oldest_go_first():
    store, held, _, journal = make_held(max_pages=8)
    tickets = [hold(store, held, f"r{i}", 3 * SIZE) for i in range(40)]
    assert held.num_bytes == store.num_pages * PAGE_BYTES == 6 * PAGE_BYTES
    assert [held.find(ticket) is not None for ticket in tickets] == [False] * 38 + [True] * 2
    assert "given up for newer ones" in held.why_not(tickets[0])
    assert journal.counts == {"FETCH_EVICTED": 38}


def test_rows_larger_than_the_whole_buffer_are_refused_and_evict_nothing():
    store, held, _, journal = make_held(max_pages=2)
    small = hold(store, held, "a", SIZE)
    large = hold(store, held, "b", 3 * SIZE)
    assert held.find(small) is not None
    assert held.find(large) is None
    assert held.why_not(large) == (
        f"they take {3 * PAGE_BYTES} bytes, expected at most {2 * PAGE_BYTES}: raise "
        'fetch_max_bytes in additional_config["r3"].'
    )
    assert journal.counts == {"FETCH_REFUSED": 1}


def test_an_unknown_ticket_is_told_where_tickets_come_from():
    assert "take it from the end of the response" in make_held()[1].why_not("0.guess")


def test_holding_a_ticket_again_replaces_its_rows():
    store, held, _, _ = make_held()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 2 * SIZE))
    for stop in (SIZE, 2 * SIZE):
        held.hold("3.t", store.freeze("a", 0, stop), OPTIONS)
    assert len(held) == 1
    assert held.find("3.t").rows.stop == 2 * SIZE
    assert held.num_bytes == 2 * PAGE_BYTES


def test_pages_being_read_are_not_given_away_when_their_ticket_expires():
    import threading

    store, held, clock, _ = make_held()
    reader, may_read = RowReader(), threading.Event()
    ticket = hold(store, held, "a", SIZE)
    rows = held.find(ticket).rows

    def read():
        may_read.wait(60)
        return store.read_frozen(rows, 0, SIZE)

    future = reader.submit(store, rows, read)
    clock.now += 1000
    assert held.find(ticket) is None
    reader.release()
    store.admit("b", 0, [])
    feed(store, ("b", 9, 0, 8 * SIZE))
    may_read.set()
    ids, status = future.result(60)
    assert not status.any()
    assert (ids == rows_for(1, range(SIZE))).all()
    store.release("b")
    reader.release()
    reader.shutdown()
    assert store.num_pages == 0


def test_the_defaults_are_what_the_documentation_says():
    assert (R3Options().fetch_max_bytes, R3Options().fetch_ttl_s) == (4 << 30, 300.0)


@pytest.mark.parametrize("status", [RowStatus.STEP_LOST, RowStatus.CAPTURE_FAILED])
def test_held_rows_say_which_are_unrecorded(status):
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 2))
    if status != RowStatus.STEP_LOST:
        feed(store, ("a", 1, 2, 4), status=status)
    feed(store, ("a", 1, 4, 6))
    rows = end(store, "a", store.freeze("a", 0, 6))
    assert store.read_frozen(rows, 0, 6)[1].tolist() == [0, 0, status, status, 0, 0]
