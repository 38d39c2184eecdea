"""Statistics of routing, against definitions written out and against closed forms."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_schema import RoutedExperts, RoutingLayout, RoutingSchemaError, RowStatus
from shared_schema.statistics import (
    agreement,
    even_bits_per_id,
    routing_statistics,
    shifted_agreement,
)

from .strategies import distinct_ids, layouts, routed_experts


def all_choices(num_experts, top_k):
    """Every ordered choice once, as ids ``[N, 1, k]``: an even load by construction."""
    layout = RoutingLayout(num_experts, top_k, (0,), 1)
    ids = np.array(list(itertools.permutations(range(num_experts), top_k)), layout.dtype)
    return RoutedExperts(ids[:, None], layout)


@given(st.lists(routed_experts(RoutingLayout(8, 3, (1, 2), 4)), min_size=1, max_size=4))
def test_loads_and_sharing_are_those_counted_one_by_one(samples):
    if not any(s.recorded.any() for s in samples):
        with pytest.raises(RoutingSchemaError, match="no row is recorded"):
            routing_statistics(samples)
        return
    found = routing_statistics(samples)
    chosen = Counter()
    pairs, shared = 0, np.zeros(2)
    for sample in samples:
        for row, recorded in zip(sample.ids, sample.recorded, strict=True):
            chosen.update((i, e) for i in range(2) if recorded for e in row[i].tolist())
        for a, b in itertools.pairwise(range(len(sample))):
            if sample.recorded[a] and sample.recorded[b]:
                pairs += 1
                for i in range(2):
                    shared[i] += len({*sample.ids[a, i]} & {*sample.ids[b, i]})
    assert found.num_rows == sum(int(s.recorded.sum()) for s in samples)
    assert {place: n for place, n in np.ndenumerate(found.load) if n} == dict(chosen)
    assert found.num_pairs == pairs
    np.testing.assert_array_equal(found.shared, shared)
    assert found.imbalance == pytest.approx([r.max() / r.mean() for r in found.load])


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (5, 3), (6, 6)])
def test_an_even_load_costs_the_bits_of_an_even_choice(num_experts, top_k):
    routed = all_choices(num_experts, top_k)
    found = routing_statistics([routed])
    ordered, unordered = math.perm(num_experts, top_k), math.comb(num_experts, top_k)
    assert found.bits_per_id[0] == pytest.approx(math.log2(ordered) / top_k)
    assert found.set_bits_per_id[0] == pytest.approx(math.log2(unordered) / top_k, abs=1e-12)
    assert even_bits_per_id(routed.layout) == pytest.approx(math.log2(ordered) / top_k)
    assert even_bits_per_id(routed.layout, ordered=False) == pytest.approx(
        math.log2(unordered) / top_k
    )
    assert found.load_entropy[0] == pytest.approx(math.log2(num_experts))
    assert found.imbalance[0] == pytest.approx(1)
    assert found.shared_by_chance[0] == pytest.approx(top_k / num_experts)


def test_the_bits_are_those_of_a_code_that_knows_the_load():
    layout = RoutingLayout(4, 2, (0,), 1)
    ids = np.array([[0, 1], [0, 2], [0, 1], [1, 0]], np.uint8)
    found = routing_statistics([RoutedExperts(ids[:, None], layout)])
    likely = np.array([4, 3, 1]) / 8
    bits = -sum(math.log2(likely[a] * likely[b] / (1 - likely[a])) for a, b in ids)
    assert found.coded_bits[0] == pytest.approx(bits)
    assert found.unused[0] == 1


def test_one_choice_only_costs_no_bits():
    layout = RoutingLayout(64, 1, (0, 1), 2)
    found = routing_statistics([RoutedExperts(np.full((9, 2, 1), 7, np.uint8), layout)])
    assert found.bits_per_id.tolist() == [0, 0]
    assert found.load_entropy.tolist() == [0, 0]
    assert found.imbalance.tolist() == [64, 64]
    assert found.shared_with_previous.tolist() == [1, 1]
    assert found.shared_by_chance.tolist() == [1, 1]


def test_a_single_row_has_no_pairs():
    layout = RoutingLayout(64, 2, (0,), 1)
    found = routing_statistics([RoutedExperts(np.array([[[3, 9]]], np.uint8), layout)])
    assert found.num_pairs == 0
    assert np.isnan(found.shared_with_previous).all()


@given(st.data())
def test_agreement_compares_sets_and_order_where_both_are_recorded(data):
    layout = data.draw(layouts())
    a = data.draw(routed_experts(layout))
    b = data.draw(routed_experts(layout))
    b = RoutedExperts(
        b.ids, layout, max(0, a.token_start + data.draw(st.integers(-3, 3))), b.status
    )
    expected = {}
    for position in range(max(a.token_start, b.token_start), min(a.token_stop, b.token_stop)):
        i, j = position - a.token_start, position - b.token_start
        if a.recorded[i] and b.recorded[j]:
            expected[position] = (a.ids[i].tolist(), b.ids[j].tolist())
    if not expected:
        with pytest.raises(RoutingSchemaError, match="expected positions"):
            agreement(a, b)
        return
    found = agreement(a, b)
    assert found.positions.tolist() == list(expected)
    for row, (left, right) in enumerate(expected.values()):
        for i in range(layout.num_moe_layers):
            assert found.shared[row, i] == len({*left[i]} & {*right[i]})
            assert found.same_set[row, i] == ({*left[i]} == {*right[i]})
            assert found.same_order[row, i] == (left[i] == right[i])


def test_agreement_of_more_rows_than_fit_one_block():
    layout = RoutingLayout(32, 4, (0, 1), 2)
    ids = distinct_ids(np.random.default_rng(0), 5000, layout)
    other = ids.copy()
    other[4999, 1] = np.roll(other[4999, 1], 1)
    found = agreement(RoutedExperts(ids, layout), RoutedExperts(other, layout))
    assert found.same_set.all()
    assert np.argwhere(~found.same_order).tolist() == [[4999, 1]]


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 0), (0, 1), (0, -1), (1, -1)])
def test_a_shift_of_rows_or_layers_is_found(shift):
    rows, layers = shift
    layout = RoutingLayout(32, 4, tuple(range(6)), 6)
    ids = distinct_ids(np.random.default_rng(0), 60, layout)
    a = RoutedExperts(ids[10:50], layout, 10)
    b = RoutedExperts(np.roll(ids, layers and -layers, 1)[10 + rows : 50 + rows], layout, 10)
    shares = shifted_agreement(a, b)
    assert len(shares) == 15
    assert shares.pop(shift) == 1
    assert max(shares.values()) < 0.1


def test_shifts_of_one_layer_and_one_row_have_nothing_else_to_try():
    layout = RoutingLayout(8, 2, (0,), 1)
    one = RoutedExperts(np.array([[[0, 1]]], np.uint8), layout)
    assert shifted_agreement(one, one) == {(0, 0): 1.0}


def test_routings_that_cannot_be_compared_are_refused():
    layout = RoutingLayout(8, 2, (0,), 1)
    ids = distinct_ids(np.random.default_rng(0), 4, layout)
    a = RoutedExperts(ids, layout)
    with pytest.raises(RoutingSchemaError, match=r"0 … 3 \(4 recorded\) and positions 9 … 12"):
        agreement(a, RoutedExperts(ids, layout, token_start=9))
    lost = np.full(4, RowStatus.STEP_LOST, np.uint8)
    with pytest.raises(RoutingSchemaError, match=r"\(0 recorded\), expected positions that both"):
        agreement(a, RoutedExperts(ids, layout, status=lost))
    other = RoutedExperts(ids, RoutingLayout(9, 2, (0,), 1))
    for compare in (lambda: agreement(a, other), lambda: routing_statistics([a, other])):
        with pytest.raises(RoutingSchemaError, match="num_experts 9 instead of 8"):
            compare()
