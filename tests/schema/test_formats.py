"""Every format: what is written is read back, ambiguity asks, garbage raises one sentence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_schema import RoutedExperts, RoutingLayout
from shared_schema.formats import FORMATS
from tests.schema.strategies import distinct_ids, layouts

LAYOUT = RoutingLayout(8, 2, (1, 2), 4)
ROUTED = RoutedExperts(distinct_ids(np.random.default_rng(0), 3, LAYOUT), LAYOUT)
WRITABLE = [name for name, fmt in FORMATS.items() if fmt.can_write]


@st.composite
def complete_sequences(draw):
    """Complete sequences of at least one row, where no row looks like a mark."""
    layout = draw(layouts().filter(lambda layout: layout.top_k > 1))
    rows = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return RoutedExperts(distinct_ids(rng, rows, layout), layout, draw(st.integers(0, 50)))


@pytest.mark.parametrize("name", WRITABLE)
@given(routed=complete_sequences())
def test_a_complete_sequence_comes_back_as_it_was_written(name, routed):
    fmt = FORMATS[name]
    said = {"token_start": routed.token_start, "layers": None if fmt.says_layers else "all"}
    assert fmt.read(fmt.write(routed), routed.layout, **said) == routed
    assert fmt.read_file(fmt.write_file(routed), routed.layout, **said) == routed
