"""One sequence's routes: an invalid object cannot exist, and slices lose nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_schema import (
    RoutedExperts,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    Source,
    Span,
    concatenate,
)
from tests.schema.strategies import distinct_ids, routed_experts

LAYOUT = RoutingLayout(8, 3, (1, 3), 4)
IDS = distinct_ids(np.random.default_rng(0), 5, LAYOUT)


def changed(row, layer, values):
    ids = IDS.copy()
    ids[row, layer] = values
    return ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": IDS.tolist()}, "ids is a list"),
        ({"ids": IDS.astype(np.float32)}, "float32"),
        ({"ids": IDS[:, :1]}, r"shape \(5, 1, 3\)"),
        ({"ids": IDS[..., :2]}, r"shape \(5, 2, 2\)"),
        ({"ids": IDS[0]}, r"shape \(2, 3\)"),
        ({"ids": changed(2, 1, [0, 1, 8])}, r"position 2, layer 3 are \[0, 1, 8\]"),
        ({"ids": changed(4, 0, [5, 1, 5]), "token_start": 7}, "position 11, layer 1"),
        ({"ids": IDS.astype(np.int64) - 9}, "distinct experts below 8"),
        ({"ids": np.zeros_like(IDS)}, r"\(5 such rows\)"),
        ({"token_start": -1}, "token_start is -1"),
        ({"token_start": 1.0}, r"token_start is 1\.0"),
        ({"token_start": 1 << 53}, "token_start is 9007199254740992, expected a position from 0"),
        ({"token_start": 10**30}, "expected a position from 0 to 9007199254740991"),
        ({"status": np.zeros(4, np.uint8)}, r"status is a ndarray of shape \(4,\)"),
        ({"status": np.full(5, 99)}, "values 99"),
        ({"status": np.ones(5, bool)}, "dtype bool, expected 5 RowStatus values"),
        ({"spans": (Span(0, 4),)}, "consecutive spans"),
        ({"spans": (Span(0, 2), Span(3, 5))}, "consecutive spans"),
        ({"spans": ((0, 5, "elsewhere", None),)}, "'elsewhere' is not a valid Source"),
        ({"spans": (1,)}, "expected .start, stop, source, weight_version."),
    ],
)
def test_nonsense_is_refused_with_the_offence_named(fields, message):
    with pytest.raises(RoutingSchemaError, match=message):
        RoutedExperts(**({"ids": IDS, "layout": LAYOUT} | fields))


def test_zero_rows_that_stand_for_nothing_recorded_must_be_marked():
    """All-zero rows are what engines return when nothing was captured."""
    status = np.zeros(5, np.uint8)
    status[3:] = RowStatus.CAPTURE_FAILED
    ids = IDS.copy()
    ids[3:] = 0
    with pytest.raises(RoutingSchemaError):
        RoutedExperts(ids, LAYOUT)
    routed = RoutedExperts(ids, LAYOUT, 0, status)
    assert routed.recorded.tolist() == [True] * 3 + [False] * 2
    assert (routed.ids[3:] == 255).all()
    assert (ids[3:] == 0).all(), "the caller's array is not written to"


def test_a_valid_narrow_array_is_kept_and_a_wide_one_is_narrowed():
    assert RoutedExperts(IDS, LAYOUT).ids is IDS
    wide = RoutedExperts(IDS.astype(np.int64), LAYOUT)
    assert wide.ids.dtype == np.uint8
    assert wide == RoutedExperts(IDS, LAYOUT)


def test_an_origin_is_put_on_all_rows_without_a_copy():
    routed = RoutedExperts(IDS, LAYOUT, 2, spans=(Span(2, 4), Span(4, 7, Source.TRAINER, "6")))
    again = routed.with_origin("7", Source.PREDICTED)
    assert again.spans == (Span(2, 7, Source.PREDICTED, "7"),)
    assert again.ids is routed.ids
    assert routed[:0].with_origin("7").spans == ()
    with pytest.raises(RoutingSchemaError, match="'engine' is not a valid Source"):
        routed.with_origin("7", "engine")


def test_rows_without_spans_are_one_rollout_span():
    assert RoutedExperts(IDS, LAYOUT, 2).spans == (Span(2, 7, Source.ROLLOUT, None),)


@given(routed_experts(), st.data())
def test_any_split_joined_again_is_the_sequence(routed, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(routed)), max_size=4)))
    edges = [0, *cuts, len(routed)]
    parts = [routed[a:b] for a, b in itertools.pairwise(edges)]
    joined = concatenate(parts)
    assert np.array_equal(joined.ids, routed.ids)
    assert np.array_equal(joined.status, routed.status)
    assert joined.token_start == routed.token_start

    def origins(r):
        return [s[2:] for s in r.spans for _ in range(s.start, s.stop)]

    assert origins(joined) == origins(routed)


def test_parts_that_do_not_follow_each_other_are_refused():
    routed = RoutedExperts(IDS, LAYOUT)
    with pytest.raises(RoutingSchemaError, match="part 1 starts at position 3, expected 2"):
        concatenate([routed[:2], routed[3:]])
    other = RoutedExperts(IDS, RoutingLayout(9, 3, (1, 3), 4), 5)
    with pytest.raises(RoutingSchemaError, match="part 1 has num_experts 9 instead of 8"):
        concatenate([routed, other])


def test_an_index_that_is_no_slice_of_rows_is_refused():
    with pytest.raises(RoutingSchemaError, match="consecutive rows"):
        RoutedExperts(IDS, LAYOUT)[::2]
