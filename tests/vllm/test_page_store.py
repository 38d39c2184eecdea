"""The page store by itself: what it returns is what was written for (request, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.page_store import PageStore

LAYOUT = RoutingLayout(num_experts=200, top_k=3, moe_layers=(1, 2), num_hidden_layers=3)
SIZE = 4


class Blocks:
    """A prefix cache: the KV blocks of each request, and those that each key finds, in order."""

    def __init__(self):
        self.of_request, self.cached = {}, {}

    def fill(self, request, **blocks):
        self.of_request[request] = list(blocks.values())
        for key, block in blocks.items():
            found = self.cached.setdefault(key.encode(), [])
            found += [block] * (block not in found)

    def of(self, request, page_index):
        blocks = self.of_request.get(request, ())
        return blocks[page_index] if page_index < len(blocks) else None

    def used_by_hits(self, key):
        found = self.cached.get(key, ())
        return found[0] if found else None


def make_store(cached_pages=64, max_pages=64, layout=LAYOUT, max_tokens=64):
    return PageStore(layout, SIZE, max_tokens, cached_pages, max_pages, Blocks())


def rows_for(tag, positions):
    """Rows that spell who wrote them and for which position."""
    positions = np.asarray(positions)
    ids = np.empty((len(positions), 2, 3), np.uint8)
    ids[:, 0] = tag
    ids[:, 1] = positions[:, None]
    return ids


def feed(store, *runs, status=RowStatus.RECORDED):
    """One step: each run is (request, tag, first position, position after the last)."""
    positions = np.concatenate([np.arange(a, b) for _, _, a, b in runs])
    ids = np.concatenate([rows_for(tag, np.arange(a, b)) for _, tag, a, b in runs])
    lengths = np.array([b - a for _, _, a, b in runs])
    store.write([r for r, *_ in runs], lengths, positions, ids, status)


def tags(store, request, start, stop):
    """Who wrote each row, None where it is unrecorded; positions must be right."""
    ids, status = store.read(request, start, stop)
    assert len(ids) == len(status) == stop - start
    recorded = status == RowStatus.RECORDED
    assert (ids[recorded, 1] == np.arange(start, stop)[recorded, None]).all()
    assert (ids[~recorded] == LAYOUT.fill_id).all()
    return [int(i[0, 0]) if ok else None for i, ok in zip(ids, recorded, strict=True)]


def statuses(store, request, start, stop):
    return [RowStatus(s).name for s in store.read(request, start, stop)[1]]


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
    store.write(["a"], np.array([3]), np.arange(3), ids)
    assert tags(store, "a", 0, 3) == [1, None, 1]
    assert statuses(store, "a", 0, 3) == ["RECORDED", "INVALID", "RECORDED"]


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
    store = make_store(cached_pages=2, max_pages=8)
    store.admit("a", 0, [b"k0"])
    feed(store, ("a", 1, 0, 4))
    store.release("a")
    store.admit("c", 0, [])
    feed(store, ("c", 3, 0, 12))
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


def test_rows_kept_through_several_preemptions_stay_those_of_their_tokens():
    store = make_store()
    store.admit("a", 0, [])
    feed(store, ("a", 1, 0, 5))
    for tag, keep in ((2, 5), (3, 9), (4, 9)):
        store.admit("a", 0, [], keep=keep)
        feed(store, ("a", tag, 0, keep + 4))
    assert tags(store, "a", 0, 13) == [1] * 5 + [2] * 4 + [4] * 4
    assert tags(store, "a", 4, 10) == [1] + [2] * 4 + [4]


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


@pytest.mark.parametrize(("evicted", "hit", "found"), [((), 7, 1), ((7,), 8, None)])
def test_a_hit_finds_the_rows_of_its_own_kv_block_or_none(evicted, hit, found):
    store, blocks = computed_twice()
    blocks.cached[b"k0"] = [block for block in (7, 8) if block not in evicted]
    blocks.fill("c", k0=hit)
    store.resolve(store.admit("c", 4, [b"k0"]))
    assert tags(store, "c", 0, 4) == [found] * 4


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


def test_rejected_drafts_leave_no_rows_even_if_the_next_step_is_lost():
    store = make_store()
    keys = [b"k0"]
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 7))
    store.settle("a", 5)
    assert tags(store, "a", 0, 7) == [1] * 5 + [None] * 2


def test_accepted_drafts_that_fill_a_page_publish_it_once_its_key_is_known():
    store = make_store()
    keys = []
    store.admit("a", 0, keys)
    feed(store, ("a", 1, 0, 6))
    keys.append(b"k0")
    store.settle("a", 5)
    assert store.admit("b", 4, [b"k0"]) == []


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
    store.write(["a"], np.array([2]), np.array([0, 1]), ids)
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


class History:
    """The same store, and the prefix cache that it follows, as dictionaries.

    ``rows`` holds the tag that each (request, position) must read back as, if it is recorded;
    ``content`` the tags of the KV that each block holds, None where the step's rows were lost.
    """

    def __init__(self, cached_pages):
        self.blocks = Blocks()
        self.store = PageStore(LAYOUT, SIZE, 64, cached_pages, 64, self.blocks)
        self.tag = self.next_block = 0
        self.rows, self.kept, self.fed, self.family, self.content = {}, {}, {}, {}, {}

    def admit(self, name, most_hits, keep=0):
        keys = [(self.family[name], index) for index in range(10)]
        found = [self.blocks.cached.get(key, ()) for key in keys[:most_hits]]
        hits = [blocks[0] for blocks in found[: [*map(bool, found), False].index(False)]]
        self.blocks.of_request[name] = hits
        self.fed[name] = self.kept[name] = max(keep, len(hits) * SIZE)
        self.store.resolve(self.store.admit(name, len(hits) * SIZE, keys, keep))
        self.forget(name, keep)
        for position in range(keep, len(hits) * SIZE):
            block, offset = hits[position // SIZE], position % SIZE
            self.rows[name, position] = self.content[block].get(offset)
        self.fed[name] = len(hits) * SIZE

    def begin(self, name, family, most_hits):
        self.family[name] = family
        self.admit(name, most_hits)

    def step(self, names, count, *, arrives):
        self.tag = self.tag % 199 + 1
        for name in names:
            blocks = self.blocks.of_request[name]
            while len(blocks) * SIZE < self.fed[name] + count:
                self.next_block += 1
                self.content[self.next_block] = {}
                key = (self.family[name], len(blocks))
                blocks.append(self.next_block)
                self.blocks.cached.setdefault(key, []).append(self.next_block)
        runs = [(n, self.tag, self.fed[n], self.fed[n] + count) for n in names]
        for name, tag, start, stop in runs:
            self.fed[name] = stop
            for position in range(start, stop):
                block = self.blocks.of_request[name][position // SIZE]
                self.content[block][position % SIZE] = tag if arrives else None
                if position >= self.kept[name]:
                    self.rows[name, position] = tag if arrives else None
        if arrives and runs:
            feed(self.store, *runs)

    def end(self, name):
        self.store.release(name)
        self.forget(name, 0)
        del self.fed[name]

    def forget(self, name, keep):
        self.rows = {k: v for k, v in self.rows.items() if k[0] != name or k[1] < keep}

    def evict(self, key, index):
        del self.blocks.cached[key][index]

    def reset(self):
        self.store.start_generation()
        self.blocks.cached.clear()

    def check(self):
        for name in self.fed:
            for position, tag in enumerate(tags(self.store, name, 0, 40)):
                expected = self.rows.get((name, position))
                assert tag in (None, expected), (name, position, tag, expected)
                if position >= self.kept[name]:
                    assert tag == expected, f"{name} lost position {position}"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_history_of_losses_preemptions_hits_and_resets_yields_a_wrong_row(data):
    history = History(data.draw(st.sampled_from([2, 8, 64])))

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
        history.check()
