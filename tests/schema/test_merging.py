"""Parts of a sequence, however cut, overlapped and incomplete, give the sequence."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_schema import (
    RoutedExperts,
    RoutedExpertsBatch,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    Source,
    Span,
    merge,
    splice,
)
from tests.schema.strategies import distinct_ids, layouts, routed_experts

LAYOUT = RoutingLayout(8, 2, (1, 2), 4)
IDS = distinct_ids(np.random.default_rng(0), 12, LAYOUT)
OTHER_IDS = (IDS + 1) % 8


def rows(start, stop, ids=IDS, version=None, status=None):
    """Rows of positions ``start`` … ``stop - 1``, which hold ``ids`` of their position."""
    spans = (Span(start, stop, Source.ROLLOUT, version),)
    return RoutedExperts(ids[start:stop], LAYOUT, start, status, spans)


def origins(routed):
    """Source and weight version of each row."""
    return [s[2:] for s in routed.spans for _ in range(s.start, s.stop)]


def without_rows(routed, lost, reason):
    """``routed`` with the rows where ``lost`` is true unrecorded, as another call might see it."""
    status = np.where(lost & routed.recorded, reason, routed.status).astype(np.uint8)
    return RoutedExperts(routed.ids, routed.layout, routed.token_start, status, routed.spans)


@st.composite
def sequences_and_parts(draw):
    """A sequence, and parts of it that together hold every row that it has recorded."""
    routed = draw(routed_experts())
    parts, held = [], np.zeros(len(routed), bool)
    for _ in range(draw(st.integers(0, 5))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(routed))] * 2)))
        lost = np.array(draw(st.lists(st.booleans(), min_size=b - a, max_size=b - a)), bool)
        parts.append(without_rows(routed[a:b], lost, draw(st.sampled_from(list(RowStatus)[1:]))))
        held[a:b] |= parts[-1].recorded
    missing = without_rows(routed, held, RowStatus.MISSING)  # what no other part has, at the end
    parts.append(missing)
    order = draw(st.permutations(range(len(parts))))
    return routed, [parts[i] for i in order]


@given(sequences_and_parts(), st.sampled_from(["error", "as_generated", "latest"]))
def test_any_parts_of_a_sequence_merged_give_the_sequence(drawn, on_conflict):
    routed, parts = drawn
    merged = merge(parts, on_conflict=on_conflict)
    assert merged.token_start == routed.token_start
    assert np.array_equal(merged.ids, routed.ids)
    assert np.array_equal(merged.recorded, routed.recorded)
    assert origins(merged) == origins(routed)
    checked = RoutedExperts(
        merged.ids, merged.layout, merged.token_start, merged.status, merged.spans
    )
    assert checked == merged, "what is built without checks would pass them"


@st.composite
def disagreeing_parts(draw):
    """Parts that overlap, differ, lack rows and come from other weights."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = []
    for version in range(draw(st.integers(1, 4))):
        start, length = draw(st.integers(0, 9)), draw(st.integers(1, 6))
        status = [draw(st.sampled_from(list(RowStatus) + [0] * 6)) for _ in range(length)]
        ids = distinct_ids(rng, length, LAYOUT)
        part = RoutedExperts(ids, LAYOUT, start, np.array(status, np.uint8))
        parts.append(part.with_origin(str(version)))
    return parts


@given(disagreeing_parts(), st.sampled_from(["as_generated", "latest"]))
def test_a_policy_decides_row_by_row(parts, on_conflict):
    chosen = {}
    for part in parts:
        for row, origin in enumerate(origins(part)):
            position = part.token_start + row
            new = (part.status[row], part.ids[row].tolist(), origin)
            old = chosen.get(position, (RowStatus.MISSING,))
            both = old[0] == new[0] == RowStatus.RECORDED
            if (
                old[0] == RowStatus.MISSING
                or (both and on_conflict == "latest")
                or (old[0] != RowStatus.RECORDED and new[0] == RowStatus.RECORDED)
            ):
                chosen[position] = new
    merged = merge(parts, on_conflict=on_conflict)
    for row, origin in enumerate(origins(merged)):
        nothing = (RowStatus.MISSING, np.full((2, 2), 255).tolist(), (Source.ROLLOUT, None))
        expected = chosen.get(merged.token_start + row, nothing)
        assert (merged.status[row], merged.ids[row].tolist(), origin) == expected


@given(routed_experts(), st.data())
def test_any_split_merged_in_any_order_keeps_every_reason(routed, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(routed)), max_size=4)))
    edges = [0, *cuts, len(routed)]
    parts = [routed[a:b] for a, b in itertools.pairwise(edges)]
    merged = merge(data.draw(st.permutations(parts)))
    assert np.array_equal(merged.ids, routed.ids)
    assert np.array_equal(merged.status, routed.status)
    assert origins(merged) == origins(routed)


@given(routed_experts(), st.data())
def test_rows_that_no_part_has_are_missing_and_of_unknown_weights(routed, data):
    cut = data.draw(st.integers(min(1, len(routed)), len(routed)))
    resume = data.draw(st.integers(cut, len(routed)))
    length = routed.token_stop + data.draw(st.integers(0, 3))
    merged = merge([routed[:cut], routed[resume:]], length)
    gap = slice(cut, resume)
    assert merged.token_stop == length
    assert (merged.status[gap] == RowStatus.MISSING).all()
    assert (merged.status[len(routed) :] == RowStatus.MISSING).all()
    assert (merged.ids[gap] == routed.layout.fill_id).all(), "never zeros"
    assert set(origins(merged)[gap]) <= {(Source.ROLLOUT, None)}
    assert origins(merged)[resume : len(routed)] == origins(routed)[resume:]


@pytest.mark.parametrize(
    ("on_conflict", "from_resumed", "versions"),
    [
        ("as_generated", slice(4, 8), [(0, 4, "7"), (4, 8, "8")]),
        ("latest", slice(0, 8), [(0, 8, "8")]),
    ],
)
def test_a_resumed_rollout_keeps_the_rows_that_the_policy_names(
    on_conflict, from_resumed, versions
):
    aborted, resumed = rows(0, 4, IDS, "7"), rows(0, 8, OTHER_IDS, "8")
    merged = merge([aborted, resumed], on_conflict=on_conflict)
    expected = IDS[:8].copy()
    expected[from_resumed] = OTHER_IDS[from_resumed]
    assert np.array_equal(merged.ids, expected)
    assert [(s.start, s.stop, s.weight_version) for s in merged.spans] == versions


def test_a_resumed_call_that_lost_its_prefix_does_not_take_it_away():
    status = [RowStatus.EVICTED] * 3 + [RowStatus.RECORDED] * 3
    merged = merge([rows(0, 4, IDS, "7"), rows(0, 6, IDS, "8", status)], on_conflict="latest")
    assert merged.is_complete
    assert [s.weight_version for s in merged.spans] == ["7", "8"]
    assert merged.spans[0].stop == 3


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda ids: ids[..., ::-1], "in another order"),
        (lambda ids: (ids + 1) % 8, "different experts"),
    ],
)
def test_parts_that_disagree_name_position_layer_and_how(change, how):
    ids = IDS.copy()
    ids[3, 1] = change(ids[3, 1])
    message = (
        rf"parts 0 and 1 have \[.*\] and \[.*\], {how}, at position 3, layer 2 "
        r"\(1 of 4 shared rows differ\)"
    )
    with pytest.raises(RoutingSchemaError, match=message):
        merge([rows(0, 5), rows(1, 8, ids)])


def test_the_order_of_slots_is_part_of_agreement():
    swapped = IDS[..., ::-1]
    assert np.array_equal(merge([rows(0, 5), rows(2, 8)]).ids, IDS[:8])
    with pytest.raises(RoutingSchemaError, match="in another order"):
        merge([rows(0, 5), rows(2, 8, swapped)])


def test_a_part_without_rows_says_nothing_about_positions():
    assert merge([rows(0, 0), rows(5, 8), RoutedExperts(IDS[:0], LAYOUT, 99)]) == rows(5, 8)
    assert merge([rows(4, 4)], 5).status.tolist() == [RowStatus.MISSING]


def test_halves_of_prefill_and_decode_fit_together():
    elsewhere = [RowStatus.NOT_COMPUTED_HERE] * 4
    prefill = rows(0, 5, version="7")
    for decode in (
        rows(5, 9, version="7"),  # its own rows only
        rows(4, 9, version="7"),  # it computed the last prompt token again
        rows(0, 9, version="7", status=[*elsewhere, *[RowStatus.RECORDED] * 5]),
    ):
        assert splice(prefill, decode) == rows(0, 9, version="7")


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        (rows(0, 5), rows(6, 9), "decode half starts at position 6, expected at most 5"),
        (rows(5, 9), rows(0, 5), "the halves are swapped"),
        (rows(0, 9), rows(2, 5), "the halves are swapped"),
        (rows(0, 5), rows(4, 9, OTHER_IDS), "different experts, at position 4"),
        (
            rows(0, 2, status=[RowStatus.RECORDED, RowStatus.STEP_LOST]),
            rows(2, 9),
            r"position 1 is unrecorded \(STEP_LOST\) in both halves",
        ),
    ],
)
def test_halves_that_do_not_fit_are_refused(prefill, decode, message):
    with pytest.raises(RoutingSchemaError, match=message):
        splice(prefill, decode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "no parts to merge"),
        (([rows(0, 5)], 4), "length is 4, expected at least 5"),
        (([rows(0, 5)], -1), "length is -1"),
        (([rows(0, 5)], 1 << 50), "for rows that no part has, expected at most"),
        (([rows(0, 1), RoutedExperts(IDS, LAYOUT, 1 << 50)],), "rows that no part has"),
        (([rows(0, 5)], None, "newest"), "on_conflict is 'newest'"),
        (
            ([rows(0, 5), RoutedExperts(IDS, RoutingLayout(9, 2, (1, 2), 4))],),
            "part 1 has num_experts 9 instead of 8",
        ),
    ],
)
def test_parts_that_are_not_of_one_sequence_are_refused(arguments, message):
    with pytest.raises(RoutingSchemaError, match=message):
        merge(*arguments)


@given(st.data())
def test_micro_batches_cut_from_a_batch_and_joined_again_are_the_batch(data):
    layout = data.draw(layouts())
    samples = data.draw(st.lists(routed_experts(layout, max_rows=6), min_size=1, max_size=5))
    whole = RoutedExpertsBatch.from_list(samples)
    order = data.draw(st.permutations(range(len(samples))))
    shuffled = whole.select(order)
    pieces = shuffled.chunk(data.draw(st.integers(1, len(samples))))
    assert RoutedExpertsBatch.concat(pieces).select(np.argsort(order)) == whole
