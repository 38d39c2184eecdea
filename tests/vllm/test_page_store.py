"""The page store by itself: what it returns is what was written for (request, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.step_rows import StepRows

from .rigs.page_stores import (
    LAYOUT,
    ROOMY,
    History,
    feed,
    make_store,
    rows_for,
    statuses,
    step_rows,
    tags,
)


def test_rows_come_back_by_request_and_position_whatever_the_batch_order():
    store = make_store()
    store.admit("a", 0, [])
    store.admit("b", 0, [])
    feed(store, ("a", 1, 0, 6), ("b", 2, 0, 3))
    feed(store, ("b", 2, 3, 4), ("a", 1, 6, 7))
    feed(store, ("a", 1, 7, 8), ("b", 2, 4, 5))
    assert tags(store, "a", 0, 8) == [1] * 8
    assert tags(store, "b", 1, 5) == [2] * 4
    assert tags(store, "a", 5, 5) == []


def test_steps_that_are_stored_together_are_stored_as_one_after_the_other():
    keys = [b"k0", b"k1", b"k2"]
    steps = [step_rows(("a", 1 + i, i, i + 1), ("b", 101 + i, i, i + 1)) for i in range(11)]
    steps[4] = step_rows(("a", 5, 4, 5), ("b", 105, 4, 5), status=RowStatus.CAPTURE_FAILED)
    found = []
    for together in ([[step] for step in steps], [steps]):
        store = make_store()
        store.admit("a", 0, keys)
        store.admit("b", 0, [])
        for some in together:
            store.write(some)
        store.admit("c", 8, keys)
        found.append([tags(store, name, 0, 11) for name in "abc"])
        found[-1] += [statuses(store, name, 0, 11) for name in "abc"] + [store.num_pages]
        assert store.rows_written == 20
    assert found[0] == found[1]
    assert found[0][0] == [1, 2, 3, 4, None, 6, 7, 8, 9, 10, 11]


def test_of_two_rows_for_one_position_the_later_step_s_stays():
    store = make_store()
    store.admit("a", 0, [])
    store.write([step_rows(("a", 1, 0, 6)), step_rows(("a", 2, 4, 8))])
    assert tags(store, "a", 0, 8) == [1] * 4 + [2] * 4


def test_rows_of_an_unknown_request_go_nowhere():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("gone", 9, 0, 3), ("a", 1, 0, 3))
    assert tags(store, "a", 0, 3) == [1] * 3
    assert "gone" not in store


def test_a_step_that_never_arrived_leaves_rows_lost():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 2))
    feed(store, ("a", 1, 4, 6))
    assert tags(store, "a", 0, 6) == [1, 1, None, None, 1, 1]
    assert statuses(store, "a", 2, 4) == ["STEP_LOST"] * 2
    assert statuses(store, "a", 0, 9)[6:] == ["STEP_LOST"] * 3


def test_an_unusable_step_keeps_its_reason():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 5), status=RowStatus.CAPTURE_FAILED)
    assert statuses(store, "a", 0, 5) == ["CAPTURE_FAILED"] * 5


def test_an_id_that_is_no_expert_costs_its_row_alone():
    store = make_store()
    store.admit("a", 0, [])
    ids = rows_for(1, range(3))
    ids[1, 0, 2] = LAYOUT.num_experts
    store.write([StepRows(["a"], np.array([3]), np.arange(3), ids)])
    assert tags(store, "a", 0, 3) == [1, None, 1]
    assert statuses(store, "a", 0, 3) == ["RECORDED", "INVALID", "RECORDED"]


def test_rows_of_emitted_tokens_survive_a_recompute():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 6))
    store.admit("a", 0, [], keep=6)
    feed(store, ("a", 2, 0, 8))
    assert tags(store, "a", 0, 8) == [1] * 6 + [2] * 2


def test_a_row_lost_before_a_preemption_is_not_filled_by_the_recompute():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 5))
    store.admit("a", 0, [], keep=7)
    feed(store, ("a", 2, 0, 9))
    assert tags(store, "a", 0, 9) == [1] * 5 + [None] * 2 + [2] * 2


def test_rows_beyond_what_is_kept_are_forgotten_even_if_the_recompute_is_lost():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 8))
    store.admit("a", 0, [], keep=5)
    assert tags(store, "a", 0, 8) == [1] * 5 + [None] * 3


def test_a_request_that_starts_over_writes_all_rows_again():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 6))
    store.admit("a", 0, [])
    feed(store, ("a", 2, 0, 6))
    assert tags(store, "a", 0, 6) == [2] * 6
    assert store.num_pages == 2


def test_rows_kept_through_several_preemptions_stay_those_of_their_tokens():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 5))
    for tag, keep in ((2, 5), (3, 9), (4, 9)):
        store.admit("a", 0, [], keep=keep)
        feed(store, ("a", tag, 0, keep + 4))
    assert tags(store, "a", 0, 13) == [1] * 5 + [2] * 4 + [4] * 4
    assert tags(store, "a", 4, 10) == [1] + [2] * 4 + [4]


def test_rejected_drafts_leave_no_rows_even_if_the_next_step_is_lost():
    store = make_store()
    keys = [b"k0"]
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 7))
    store.settle("a", 5)
    assert tags(store, "a", 0, 7) == [1] * 5 + [None] * 2


def test_a_full_store_drops_new_rows_and_says_how_many():
    store = make_store(cached_pages=2, max_pages=2)
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 12))
    assert tags(store, "a", 0, 12) == [1] * 8 + [None] * 4
    assert store.rows_dropped == 4
    store.release("a")
    store.admit("b", 0, [])
    feed(store, ("b", 2, 0, 8))
    assert tags(store, "b", 0, 8) == [2] * 8


def test_only_rows_that_a_request_keeps_are_counted():
    store = make_store(cached_pages=2, max_pages=2)
    store.admit("a", 2, [])
    feed(store, ("a", 1, 0, 6), ("unknown", 2, 0, 3))
    assert store.rows_written == 4
    feed(store, ("a", 1, 6, 10))
    assert (store.rows_written, store.rows_dropped) == (6, 2)


def test_live_requests_may_exceed_what_is_kept_for_hits():
    store = make_store(cached_pages=1, max_pages=16)
    for request in "abcd":
        store.admit(request, 0, [])
        feed(store, (request, ord(request) - 96, 0, 16))
    assert [tags(store, r, 0, 16) for r in "abcd"] == [[t] * 16 for t in (1, 2, 3, 4)]


def test_many_requests_get_slots_of_their_own():
    store = make_store(cached_pages=400, max_pages=400)
    names = [f"r{i}" for i in range(150)]
    for name in names:
        store.admit(name, 0, [])
    feed(store, *((n, i, 0, 3) for i, n in enumerate(names)))
    for i, name in enumerate(names):
        assert tags(store, name, 0, 3) == [i] * 3
        store.release(name)
    assert store.num_pages == 0


def test_ids_wider_than_a_byte_are_kept():
    layout = RoutingLayout(num_experts=512, top_k=2, moe_layers=(0,), num_hidden_layers=1)
    store = make_store(layout=layout)
    store.admit("a", 0, [])
    ids = np.array([[[511, 3]], [[256, 0]]], np.uint16)
    store.write([StepRows(["a"], np.array([2]), np.array([0, 1]), ids)])
    got, _ = store.read("a", 0, 2)
    assert got.dtype == np.uint16
    assert (got == ids).all()


def test_what_is_read_is_a_copy():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 4))
    ids, _ = store.read("a", 0, 4)
    ids[:] = 0
    assert tags(store, "a", 0, 4) == [1] * 4


def test_a_position_beyond_the_longest_sequence_is_refused():
    store = make_store(max_tokens=8)
    store.admit("a", 0, [])
    with pytest.raises(IndexError):
        feed(store, ("a", 1, 8, 9))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_history_of_losses_preemptions_hits_and_resets_yields_a_wrong_row(data):
    history = History(data.draw(st.sampled_from([2, 8, ROOMY])))

    def draw_hits():
        """0 computes tokens again that are cached, in other blocks."""
        return data.draw(st.sampled_from([0, 1, 3]))

    actions = ["begin", "step", "step", "lose", "preempt", "end", "evict", "reset"]
    for number in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(actions))
        live = sorted(history.fed)
        cached = [(k, i) for k, found in history.blocks.cached.items() for i in range(len(found))]
        if action == "reset":
            history.reset()
        elif action == "evict" and cached:
            history.evict(*data.draw(st.sampled_from(cached)))
        elif action == "begin" and len(live) < 4:
            history.begin(f"r{number}", data.draw(st.sampled_from([0, 0, 0, 1])), draw_hits())
        elif action in ("step", "lose") and live:
            count = data.draw(st.integers(1, 9))
            names = data.draw(st.lists(st.sampled_from(live), unique=True))
            names = [n for n in names if history.fed[n] + count <= 40]
            history.step(names, count, arrives=action == "step")
        elif action == "preempt" and live:
            name = data.draw(st.sampled_from(live))
            keep = data.draw(st.integers(0, history.fed[name]))
            history.admit(name, draw_hits(), keep)
        elif action == "end" and live:
            history.end(data.draw(st.sampled_from(live)))
        if data.draw(st.booleans()):  # else later steps are stored together with this one
            history.check()
    history.check()
