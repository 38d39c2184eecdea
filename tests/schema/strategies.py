"""Hypothesis strategies for layouts and routed experts."""

import itertools

import numpy as np
from hypothesis import strategies as st

from shared_schema import RoutedExperts, RoutingLayout, RowStatus, Source, Span


@st.composite
def layouts(draw):
    num_layers = draw(st.integers(1, 6))
    moe = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    experts = draw(st.sampled_from([2, 8, 64, 255, 256, 257, 384, 65_535]))
    top_k = draw(st.integers(1, min(experts, 8)))
    return RoutingLayout(experts, top_k, tuple(sorted(moe)), num_layers)


def distinct_ids(rng, rows, layout):
    """Random valid ids ``[rows, L, k]`` in the layout's dtype."""
    pool = min(layout.num_experts, 64)
    keys = rng.random((rows, layout.num_moe_layers, pool))
    ids = np.argsort(keys, -1)[..., : layout.top_k]
    return (layout.num_experts - 1 - ids).astype(layout.dtype)


@st.composite
def routed_experts(draw, layout=None, max_rows=20):
    layout = draw(layouts()) if layout is None else layout
    rows = draw(st.integers(0, max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    status = np.array(
        draw(st.lists(st.sampled_from(list(RowStatus)), min_size=rows, max_size=rows)), np.uint8
    )
    start = draw(st.integers(0, 1000))
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    edges = [start, *(start + c for c in cuts), start + rows] if rows else []
    spans = tuple(
        Span(a, b, draw(st.sampled_from(list(Source))), draw(st.sampled_from([None, "7", "späť"])))
        for a, b in itertools.pairwise(edges)
    )
    return RoutedExperts(distinct_ids(rng, rows, layout), layout, start, status, spans)
