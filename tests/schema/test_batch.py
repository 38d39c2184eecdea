"""Ragged batches: sequences come back as they went in, whatever is done in between."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_schema import RoutedExpertsBatch, RoutingLayout, RoutingSchemaError
from tests.schema.strategies import distinct_ids, layouts, routed_experts


@st.composite
def sample_lists(draw):
    layout = draw(layouts())
    return draw(st.lists(routed_experts(layout, max_rows=6), min_size=1, max_size=6))


@given(sample_lists())
def test_a_batch_gives_back_its_sequences(samples):
    batch = RoutedExpertsBatch.from_list(samples)
    assert list(batch) == samples
    assert batch.lengths.tolist() == [len(s) for s in samples]
    checked = RoutedExpertsBatch(
        batch.values, batch.offsets, batch.layout, batch.status, batch.token_starts, batch.spans
    )
    assert checked == batch
    assert pickle.loads(pickle.dumps(batch)) == batch


@given(sample_lists(), st.data())
def test_select_reorders_and_repeats_whole_sequences(samples, data):
    index = st.integers(-len(samples), len(samples) - 1)
    chosen = data.draw(st.lists(index, max_size=8))
    picked = RoutedExpertsBatch.from_list(samples).select(chosen)
    assert list(picked) == [samples[i] for i in chosen]


@given(sample_lists(), st.data())
def test_chunks_joined_again_are_the_batch(samples, data):
    batch = RoutedExpertsBatch.from_list(samples)
    chunks = batch.chunk(data.draw(st.integers(1, len(samples))))
    assert RoutedExpertsBatch.concat(chunks) == batch


def test_consecutive_sequences_are_selected_without_a_copy():
    layout = RoutingLayout(8, 2, (0,), 1)
    values = distinct_ids(np.random.default_rng(0), 6, layout)
    batch = RoutedExpertsBatch(values, np.array([0, 2, 4, 6]), layout)
    assert np.shares_memory(batch.select([1, 2]).values, values)
    assert np.shares_memory(batch[1].ids, values)
    assert not np.shares_memory(batch.select([2, 1]).values, values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": [0, 3]}, "from 0 to 4"),
        ({"offsets": [0, 3, 2, 4]}, "ascending"),
        ({"offsets": [1, 4]}, "from 0 to 4"),
        ({"token_starts": [0]}, "expected 2 positions"),
        ({"token_starts": [0, -1]}, "2 positions from 0"),
        ({"token_starts": [0, 1 << 53]}, "2 positions from 0 to 9007199254740991"),
        ({"token_starts": [0, 10**30]}, "2 positions from 0"),
        ({"spans": ((),)}, "one for each of 2 sequences"),
        ({"status": np.zeros(3)}, "expected 4 RowStatus values"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(fields, message):
    layout = RoutingLayout(8, 2, (0,), 1)
    values = distinct_ids(np.random.default_rng(0), 4, layout)
    with pytest.raises(RoutingSchemaError, match=message):
        RoutedExpertsBatch(**({"values": values, "offsets": [0, 1, 4], "layout": layout} | fields))


def test_an_offence_is_named_by_its_position_in_its_sequence():
    layout = RoutingLayout(8, 2, (0,), 1)
    values = distinct_ids(np.random.default_rng(0), 4, layout)
    values[2] = 1
    with pytest.raises(RoutingSchemaError, match="position 11, layer 0"):
        RoutedExpertsBatch(values, np.array([0, 1, 4]), layout, None, np.array([0, 10]))


def test_batches_of_two_models_do_not_join():
    a, b = (
        RoutedExpertsBatch(np.zeros((1, 1, 1), np.uint8), np.array([0, 1]), layout)
        for layout in (RoutingLayout(8, 1, (0,), 1), RoutingLayout(8, 1, (1,), 2))
    )
    with pytest.raises(RoutingSchemaError, match="batch 1 has moe_layers"):
        RoutedExpertsBatch.concat([a, b])
    with pytest.raises(RoutingSchemaError, match="sample 1 has moe_layers"):
        RoutedExpertsBatch.from_list([a[0], b[0]])
    with pytest.raises(IndexError):
        a[1]
    with pytest.raises(IndexError):
        a.select([1])
