"""Prefix-cache hits on the page store by itself: they have the rows of their own KV."""

import pytest

from vllm_r3_plugin.kv_blocks import TAKEN
from vllm_r3_plugin.page_store import PageStore

from .rigs.page_stores import LAYOUT, SIZE, Blocks, feed, make_store, statuses, tags


def test_a_hit_shares_the_rows_of_the_request_that_computed_them():
    store = make_store()
    store.admit("a", 0, [b"k0", b"k1"])
    feed(store, ("a", 1, 0, 9))
    assert store.admit("b", 8, [b"k0", b"k1"]) == []
    feed(store, ("b", 2, 8, 10))
    store.release("a")
    assert tags(store, "b", 0, 10) == [1] * 8 + [2] * 2
    assert store.num_pages == 3


def test_a_hit_that_ends_inside_a_page_copies_the_rows_before_it():
    store = make_store()
    store.admit("a", 0, [b"k0", b"k1"])
    feed(store, ("a", 1, 0, 8))
    store.admit("b", 6, [b"k0", b"k1"])
    feed(store, ("b", 2, 6, 8))
    assert tags(store, "b", 0, 8) == [1] * 6 + [2] * 2
    assert tags(store, "a", 0, 8) == [1] * 8


def test_a_hit_on_a_page_still_in_flight_is_resolved_when_its_step_arrives():
    store = make_store()
    store.admit("a", 0, [b"k0"])
    pending = store.admit("b", 4, [b"k0"])
    assert [hit.key for hit in pending] == [b"k0"]
    feed(store, ("a", 1, 0, 4), ("b", 2, 4, 6))
    store.resolve(pending)
    assert tags(store, "b", 0, 6) == [1] * 4 + [2] * 2


def test_a_hit_whose_page_is_gone_reads_as_evicted():
    store = make_store(cached_pages=2, max_pages=3)
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 4))
    store.release("a")
    store.admit("c", 0, [])
    feed(store, ("c", 3, 0, 12))
    store.release("c")
    store.resolve(store.admit("b", 4, [b"k0"]))
    feed(store, ("b", 2, 4, 6))
    assert statuses(store, "b", 0, 6) == ["EVICTED"] * 4 + ["RECORDED"] * 2


def test_a_page_is_not_evicted_while_a_request_that_hit_it_lives():
    store = make_store(cached_pages=1, max_pages=8)
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 4))
    store.admit("b", 4, [b"k0"])
    store.release("a")
    store.admit("c", 0, [b"x0", b"x1", b"x2"])
    feed(store, ("c", 3, 0, 12))
    assert tags(store, "b", 0, 4) == [1] * 4


def test_the_least_recently_used_page_is_given_up_first():
    store = make_store(cached_pages=3, max_pages=3)
    for tag, key in enumerate((b"k0", b"k1", b"k2")):
        store.admit("a", 0, [key])
        feed(store, ("a", tag, 0, 4))
        store.release("a")
    store.admit("b", 4, [b"k0"])
    store.release("b")
    store.admit("c", 0, [])
    feed(store, ("c", 9, 0, 4))
    assert store.admit("d", 4, [b"k0"]) == []
    assert store.admit("e", 4, [b"k2"]) == []
    assert len(store.admit("f", 4, [b"k1"])) == 1


def test_of_the_pages_of_one_request_the_last_is_given_up_first():
    store = make_store(cached_pages=3, max_pages=3)
    store.admit("a", 0, [b"k0", b"k1", b"k2"])
    feed(store, ("a", 1, 0, 12))
    store.release("a")
    store.admit("b", 0, [])
    feed(store, ("b", 2, 0, 4))
    assert store.admit("c", 8, [b"k0", b"k1", b"k2"]) == []
    assert tags(store, "c", 0, 8) == [1] * 8


def test_a_request_that_starts_over_leaves_a_page_it_shares_alone():
    store = make_store()
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 4))
    store.admit("b", 4, [b"k0"])
    store.admit("a", 0, [b"k0"], keep=2)
    feed(store, ("a", 2, 0, 4))
    assert tags(store, "a", 0, 4) == [1, 1, 2, 2]
    assert tags(store, "b", 0, 4) == [1] * 4


def test_a_page_begun_before_the_reset_is_not_published_after_it():
    store = make_store()
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 3))
    store.start_generation()
    feed(store, ("a", 1, 3, 4))
    assert len(store.admit("b", 4, [b"k0"])) == 1


def test_what_a_resumed_request_computes_again_after_a_reset_serves_later_hits():
    store = make_store()
    keys = [b"k0", b"k1"]
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 7))
    store.start_generation()
    store.admit("a", 0, keys, keep=7)
    feed(store, ("a", 2, 0, 9))
    assert store.admit("b", 8, keys) == []
    assert tags(store, "a", 0, 9) == [1] * 7 + [2] * 2
    assert tags(store, "b", 0, 8) == [2] * 8


def test_a_reset_forgets_published_pages_but_not_those_of_running_requests():
    store = make_store()
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 4))
    store.admit("b", 4, [b"k0"])
    store.start_generation()
    assert len(store.admit("c", 4, [b"k0"])) == 1
    assert tags(store, "b", 0, 4) == [1] * 4
    for request in ("a", "b", "c"):
        store.release(request)
    assert store.num_pages == 0


def test_the_newest_rows_are_published_when_a_block_is_computed_again():
    store = make_store()
    for tag in (1, 2):
        store.admit("a", 0, [b"k0"])
        feed(store, ("a", tag, 0, 4))
        store.release("a")
    store.admit("b", 4, [b"k0"])
    assert tags(store, "b", 0, 4) == [2] * 4
    store.release("b")
    assert store.num_pages == 1


def computed_twice(cached_pages=64):
    """ "a" (tag 1) and "b" (tag 2) have computed k0, in the KV blocks 7 and 8."""
    blocks = Blocks()
    store = PageStore(LAYOUT, SIZE, 64, cached_pages, 64, blocks)
    for tag, request, block in ((1, "a", 7), (2, "b", 8)):
        blocks.fill(request, k0=block)
        store.admit(request, 0, [b"k0"])
        feed(store, (request, tag, 0, 4))
        if cached_pages == 1:
            store.release(request)
            feed_elsewhere(store, blocks)
    return store, blocks


def feed_elsewhere(store, blocks):
    """Another request takes the room of all pages that nobody refers to."""
    blocks.fill("other", k9=99)
    store.admit("other", 0, [b"k9"])
    feed(store, ("other", 9, 0, 4))
    store.release("other")


@pytest.mark.parametrize(("evicted", "hit", "found"), [([], 7, 1), ([7], 8, 2)])
def test_a_hit_finds_the_rows_of_its_own_kv_block(evicted, hit, found):
    store, blocks = computed_twice()
    blocks.cached[b"k0"] = [block for block in (7, 8) if block not in evicted]
    store.withdraw(evicted)
    blocks.fill("c", k0=hit)
    store.resolve(store.admit("c", 4, [b"k0"]))
    assert tags(store, "c", 0, 4) == [found] * 4


def test_a_page_is_given_up_when_its_kv_block_is_allocated_anew():
    store, _ = computed_twice()
    store.release("a")
    store.withdraw([7])
    assert store.num_pages == 1
    store.withdraw([8])
    assert tags(store, "b", 0, 4) == [2] * 4
    store.release("b")
    assert store.num_pages == 0


def test_rows_of_a_block_that_was_taken_meanwhile_serve_no_hit():
    store, blocks = computed_twice()
    blocks.fill("c", k1=TAKEN)
    store.admit("c", 0, [b"k1"])
    feed(store, ("c", 3, 0, 4))
    assert len(store.admit("d", 4, [b"k1"])) == 1


def test_pages_of_cached_blocks_stay_however_many_requests_wait_with_their_rows():
    blocks = Blocks()
    store = PageStore(LAYOUT, SIZE, 64, 2, 8, blocks)
    blocks.fill("a", k0=1, k1=2)
    store.admit("a", 0, [b"k0", b"k1"])
    feed(store, ("a", 1, 0, 8))
    store.release("a")
    store.admit("preempted", 0, [])
    feed(store, ("preempted", 2, 0, 16))
    blocks.fill("b", k0=1, k1=2)
    assert store.admit("b", 8, [b"k0", b"k1"]) == []
    assert tags(store, "b", 0, 8) == [1] * 8


def test_rows_of_kv_that_was_copied_are_found_behind_the_copy_too():
    store, blocks = computed_twice()
    for request, block in (("copies", None), ("c", 10)):
        blocks.fill(request, k0=block)
        assert store.admit(request, 4, [b"k0"]) == []
        assert tags(store, request, 0, 4) == [1] * 4


def test_the_block_that_hits_will_use_takes_the_key_over():
    blocks = Blocks()
    store = PageStore(LAYOUT, SIZE, 64, 64, 64, blocks)
    for tag, request, block in ((1, "a", 7), (2, "b", 8)):
        blocks.cached.clear()
        blocks.fill(request, k0=block)
        store.admit(request, 0, [b"k0"])
        feed(store, (request, tag, 0, 4))
    blocks.fill("c", k0=8)
    assert store.admit("c", 4, [b"k0"]) == []
    assert tags(store, "c", 0, 4) == [2] * 4


def test_when_the_first_of_two_equal_blocks_loses_its_page_hits_on_it_are_unrecorded():
    store, blocks = computed_twice(cached_pages=1)
    blocks.fill("b", k0=8)
    store.admit("b", 0, [b"k0"])
    feed(store, ("b", 2, 0, 4))
    blocks.fill("c", k0=7)
    store.resolve(store.admit("c", 4, [b"k0"]))
    assert statuses(store, "c", 0, 4) == ["EVICTED"] * 4


def test_loaded_tokens_that_were_computed_here_have_their_rows():
    store = make_store()
    store.admit("a", 0, [b"k0", b"k1"])
    feed(store, ("a", 1, 0, 9))
    assert store.admit("b", 8, [b"k0", b"k1"], num_loaded=4) == []
    assert tags(store, "b", 0, 8) == [1] * 8


def test_loaded_tokens_that_were_not_computed_here_say_so_also_to_later_hits():
    store = make_store()
    store.admit("a", 8, [b"k0", b"k1"], num_loaded=8)
    feed(store, ("a", 1, 8, 10))
    assert store.admit("b", 7, [b"k0", b"k1"]) == []
    for request in "ab":
        assert statuses(store, request, 0, 7) == ["NOT_COMPUTED_HERE"] * 7
    assert tags(store, "a", 8, 10) == [1] * 2


def test_a_load_that_ends_inside_a_page_leaves_the_rest_of_the_page_to_its_request():
    store = make_store()
    store.admit("a", 7, [b"k0", b"k1"], num_loaded=8)
    feed(store, ("a", 1, 7, 10))
    assert statuses(store, "a", 0, 10) == ["NOT_COMPUTED_HERE"] * 7 + ["RECORDED"] * 3


@pytest.mark.parametrize(("loads_too", "expected"), [(True, [2] * 4), (False, [None] * 4)])
def test_loads_are_not_trusted_after_a_reset_that_left_them(loads_too, expected):
    store = make_store()
    store.start_generation(loads_too=loads_too)
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 2, 0, 4))
    store.admit("b", 4, [b"k0"], num_loaded=4)
    assert tags(store, "b", 0, 4) == expected
    store.admit("c", 4, [b"k0"])
    assert tags(store, "c", 0, 4) == [2] * 4


@pytest.mark.parametrize("computed_before", [True, False])
def test_rows_of_a_load_that_failed_are_taken_anew_for_all_who_share_them(computed_before):
    store = make_store()
    keys = [b"k0", b"k1", b"k2"]
    if computed_before:
        store.admit("old", 0, keys)
        feed(store, ("old", 1, 0, 12))
    store.admit("a", 8, keys, num_loaded=8)
    shares = store.admit("b", 12, keys)
    feed(store, ("a", 2, 8, 13))
    store.resolve(shares)
    store.rewind("a", 4)
    feed(store, ("a", 3, 4, 13))
    before = [1] * 4 if computed_before else [None] * 4
    assert tags(store, "a", 0, 13) == before + [3] * 9
    assert tags(store, "b", 8, 12) == [1 if computed_before else 3] * 4
    if not computed_before:
        assert tags(store, "b", 0, 8) == before + [3] * 4


def test_a_request_whose_hits_were_loaded_well_is_not_rewound():
    store = make_store()
    store.admit("a", 4, [b"k0"], num_loaded=4)
    feed(store, ("a", 1, 4, 6))
    store.rewind("a", 6)
    store.rewind("gone", 0)
    assert statuses(store, "a", 0, 6) == ["NOT_COMPUTED_HERE"] * 4 + ["RECORDED"] * 2


def test_a_page_with_an_unrecorded_row_is_not_published():
    store = make_store()
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 2))
    feed(store, ("a", 1, 3, 4))
    assert len(store.admit("b", 4, [b"k0"])) == 1


def test_accepted_drafts_that_fill_a_page_publish_it_once_its_key_is_known():
    store = make_store()
    keys = []
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 6))
    keys.append(b"k0")
    store.settle("a", 5)
    assert store.admit("b", 4, [b"k0"]) == []


def test_a_rejected_draft_does_not_complete_a_page_whose_key_becomes_known():
    store = make_store()
    keys = []
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 4))
    keys.append(b"k0")
    store.settle("a", 3)
    assert len(store.admit("b", 4, [b"k0"])) == 1
    feed(store, ("a", 2, 3, 4))
    assert store.admit("c", 4, [b"k0"]) == []
    assert tags(store, "c", 0, 4) == [1] * 3 + [2]
