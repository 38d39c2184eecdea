"""Rows with ids out of range or repeated are found, and no others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_schema import RoutingLayout
from shared_schema.row_checks import invalid_rows


def invalid_by_sorting(ids, num_experts):
    wide = np.sort(ids.astype(np.int64), -1)
    out_of_range = (wide < 0) | (wide >= num_experts)
    return out_of_range.any((1, 2)) | (wide[..., 1:] == wide[..., :-1]).any((1, 2))


@settings(max_examples=150, deadline=None)
@given(
    experts=st.sampled_from([1, 2, 64, 128, 129, 256, 257, 512, 32_768, 32_769, 65_535]),
    top_k=st.sampled_from([1, 2, 4, 6, 8, 8, 10, 33]),
    layers=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 7, 4000]),
    damages=st.integers(0, 4),
    dtype=st.sampled_from([None, np.int64, np.int32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_exactly_the_rows_that_sorting_finds_are_invalid(
    experts, top_k, layers, rows, damages, dtype, seed
):
    rng = np.random.default_rng(seed)
    layout = RoutingLayout(experts, min(top_k, experts), tuple(range(layers)), layers)
    k = layout.top_k
    base = np.argsort(rng.random((64, layers, min(experts, 64))), -1)[..., :k]
    base = base if rng.random() < 0.5 else experts - 1 - base
    ids = np.resize(base, (rows, layers, k)).astype(dtype or layout.dtype)
    for _ in range(damages):
        row, layer = rng.integers(rows), rng.integers(layers)
        top = min(np.iinfo(ids.dtype).max, experts + 300)
        values = [ids[row, layer, rng.integers(k)], top, -1 if dtype else 0]
        ids[row, layer, rng.integers(k)] = values[rng.integers(3)]
    expected = invalid_by_sorting(ids, experts)
    assert np.array_equal(invalid_rows(ids, layout), expected)
    assert np.array_equal(invalid_rows(ids[::2], layout), expected[::2])
    recorded = rng.random(rows) < 0.7
    assert np.array_equal(invalid_rows(ids, layout, recorded), expected & recorded)


@pytest.mark.parametrize("experts", [64, 128, 256, 384])
def test_the_same_expert_in_neighbouring_layers_is_valid(experts):
    ids = np.resize(np.arange(8), (2000, 3, 8))
    assert not invalid_rows(ids, RoutingLayout(experts, 8, (0, 1, 2), 3)).any()
    assert invalid_rows(ids, RoutingLayout(8, 8, (0, 1, 2), 3)).sum() == 0


def test_an_id_out_of_range_spoils_its_own_row_alone():
    """72 and 200 differ in one bit, the one above the ids of 128 experts."""
    ids = np.resize(np.arange(8), (4, 1, 8)).astype(np.uint8)
    ids[1, 0, 7], ids[2, 0, 0] = 72, 200
    invalid = invalid_rows(ids, RoutingLayout(128, 8, (0,), 1))
    assert invalid.tolist() == [False, False, True, False]
