"""vLLM's array with a slot for every hidden layer, and back."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given

from shared_schema import (
    RoutedExperts,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    from_vllm_base64,
    from_vllm_native,
    to_vllm_native,
)
from tests.schema.strategies import distinct_ids, routed_experts

LAYOUT = RoutingLayout(8, 2, (1, 2), 4)
ROUTED = RoutedExperts(distinct_ids(np.random.default_rng(0), 3, LAYOUT), LAYOUT, 5)


def npy_base64(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_dense_layers_are_zero_and_moe_layers_stand_at_their_number():
    array = to_vllm_native(ROUTED)
    assert array.shape == (3, 4, 2)
    assert not array[:, [0, 3]].any()
    assert np.array_equal(array[:, 1:3], ROUTED.ids)


@given(routed_experts())
def test_the_array_read_back_is_the_sequence(routed):
    array = to_vllm_native(routed, sentinel=True)
    again = from_vllm_native(array, routed.layout, routed.token_start, routed.status)
    assert np.array_equal(again.ids, routed.ids)
    assert np.array_equal(again.status, routed.status)
    missing = array[~routed.recorded][:, list(routed.layout.moe_layers)]
    assert (missing >= routed.layout.num_experts).all(), "a sentinel is never an expert"


def test_an_unrecorded_row_has_no_bare_array():
    status = np.array([0, RowStatus.EVICTED, 0], np.uint8)
    routed = RoutedExperts(ROUTED.ids, LAYOUT, 5, status)
    with pytest.raises(RoutingSchemaError, match=r"position 6 is unrecorded \(EVICTED\)"):
        to_vllm_native(routed)


def test_base64_npy_is_read():
    text = npy_base64(to_vllm_native(ROUTED))
    assert from_vllm_base64(text, LAYOUT, 5) == ROUTED


def test_shifted_layers_are_noticed():
    shifted = np.roll(to_vllm_native(ROUTED), 1, axis=1)
    with pytest.raises(RoutingSchemaError, match="dense layer 3 holds ids"):
        from_vllm_native(shifted, LAYOUT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--enable-return-routed-experts"),
        ("not base64!", "cut off or altered"),
        (npy_base64(to_vllm_native(ROUTED))[:-40], "cut off or altered"),
        (npy_base64(np.array([{"a": 1}], dtype=object)), "cut off or altered"),
        (npy_base64(np.zeros((3, 3, 2), np.uint8)), "3 layers, expected 4"),
        (npy_base64(np.zeros((3, 4, 2), np.uint8)), r"\[0, 0\], expected 2 distinct"),
    ],
)
def test_a_response_that_is_not_this_models_routing_is_refused(text, message):
    with pytest.raises(RoutingSchemaError, match=message):
        from_vllm_base64(text, LAYOUT)
