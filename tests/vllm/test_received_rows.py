"""Rows on their way to the user: joined and cut by vLLM, lost in part, or replaced by a ticket."""

import numpy as np
import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from shared_schema import RoutingLayout, RowStatus, decode, from_vllm_native
from vllm_r3_plugin import front_end
from vllm_r3_plugin.fetch_path import FETCH_PATH, NotHeldError, Ticket, VersionedRows
from vllm_r3_plugin.in_flight import rows_array, ticket_array, void_array
from vllm_r3_plugin.received_rows import ReceivedRows
from vllm_r3_plugin.request_options import RequestOptions

RNG = np.random.default_rng(0)


def _layout(num_experts: int) -> RoutingLayout:
    return RoutingLayout(num_experts, top_k=4, moe_layers=(1, 2), num_hidden_layers=3)


def _ids(num_rows: int, layout: RoutingLayout) -> np.ndarray:
    order = RNG.random((num_rows, 2, layout.num_experts)).argsort(-1)
    return order[..., :4].astype(layout.dtype)


def _options(encoding: str, unrecorded: str = "omit", start: int = 3) -> RequestOptions:
    return RequestOptions("on", start, encoding, "response", unrecorded)


@pytest.mark.parametrize("num_experts", [64, 256, 384])
def test_parts_joined_and_cut_by_vllm_give_the_rows_back(num_experts: int) -> None:
    layout = _layout(num_experts)
    ids, status = _ids(9, layout), np.zeros(9, np.uint8)
    parts = [rows_array(ids[a:b], status[a:b]) for a, b in ((0, 5), (5, 5), (5, 9))]
    joined = np.concatenate(parts)[:-2]
    native = ReceivedRows(joined, _options("native"), stop=10).deliver(layout)
    np.testing.assert_array_equal(from_vllm_native(native.routed_experts, layout, 3).ids, ids[:7])
    encoded = ReceivedRows(joined, _options("r3"), stop=9).deliver(layout).routed_experts
    routed = decode(encoded, layout)
    assert (routed.token_start, routed.token_stop) == (3, 9)
    np.testing.assert_array_equal(routed.ids, ids[:6])


@pytest.mark.parametrize("arrived", ["nothing", "void", "less"])
def test_rows_that_did_not_arrive_are_missing(arrived: str) -> None:
    layout = _layout(64)
    some = rows_array(_ids(2, layout), np.zeros(2, np.uint8))
    array = {
        "nothing": None,
        "void": np.concatenate([some, void_array(layout), some]),
        "less": some,
    }[arrived]
    num_arrived = 2 if arrived == "less" else 0
    delivery = ReceivedRows(array, _options("r3"), stop=9).deliver(layout)
    status = decode(delivery.routed_experts, layout).status
    assert status.tolist() == [0] * num_arrived + [RowStatus.MISSING] * (6 - num_arrived)
    omitted = ReceivedRows(array, _options("native"), stop=9).deliver(layout)
    assert omitted.routed_experts is None
    assert omitted.reason == (
        f"{6 - num_arrived} of 6 rows are unrecorded, the first at position {3 + num_arrived} "
        "(MISSING)."
    )


def test_a_sentinel_is_wider_where_every_value_is_an_expert() -> None:
    layout = _layout(256)
    status = np.array([0, RowStatus.EVICTED, 0], np.uint8)
    array = rows_array(_ids(3, layout), status)
    delivery = ReceivedRows(array, _options("native", "sentinel"), stop=6).deliver(layout)
    assert delivery.reason is None
    assert delivery.routed_experts.dtype == np.uint16
    assert (delivery.routed_experts[1, 1:] == 65535).all()
    assert from_vllm_native(delivery.routed_experts, layout, 3).recorded.tolist() == [1, 0, 1]


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_ticket_survives_the_cut_of_the_tokens_it_came_with(cut: int) -> None:
    array = ticket_array("0.secret", num_tokens=4)
    array = array[: len(array) - cut]
    delivery = ReceivedRows(array, _options("r3"), stop=9).deliver(_layout(64))
    assert delivery.path == "/v1/routed_experts/0.secret?stop=9"
    assert delivery.routed_experts is delivery.reason is None


def test_a_path_says_which_weights_sampled_from_which_rows() -> None:
    versions = [VersionedRows("step/7 & 8?", 4, 6), VersionedRows("9", 6, 9)]
    array = ticket_array("0.secret", num_tokens=4)
    path = ReceivedRows(array, _options("r3"), 9, versions).deliver(_layout(64)).path
    assert path is not None
    assert Ticket.of(path) == Ticket("0.secret", 9, tuple(versions))


@pytest.mark.parametrize(
    "query", ["stop=x", "weight_version=3:7", "weight_version=7", "weight_version=a-b:7"]
)
def test_a_query_that_no_response_named_is_refused_with_what_it_said(query: str) -> None:
    with pytest.raises(NotHeldError, match="expected stop=ROW") as error:
        Ticket.of(f"{FETCH_PATH}0.secret?{query}")
    assert query in str(error.value)


def test_rows_of_a_last_chunk_stay_when_it_joins_chunks_that_nobody_has_read_yet() -> None:
    front_end.install()

    def chunk(rows: object) -> RequestOutput:
        completion = CompletionOutput(0, "a", [1], None, None, routed_experts=rows)
        return RequestOutput("0", None, [2], None, [completion], finished=rows is not None)

    waiting, rows = chunk(None), object()
    waiting.add(chunk(rows), aggregate=True)
    waiting.add(chunk(None), aggregate=True)
    assert waiting.outputs[0].token_ids == [1, 1, 1]
    assert waiting.outputs[0].routed_experts is rows
