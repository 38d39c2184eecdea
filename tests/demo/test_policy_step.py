"""The demo's proof that a policy step replayed the rollout, with calls that did not."""

import numpy as np
import pytest

from examples.demo import DemoError
from examples.demo.policy_step import check_calls
from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout, RowStatus

LAYOUT = RoutingLayout(num_experts=8, top_k=2, moe_layers=(1, 2), num_hidden_layers=3)
IDS = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[5, 2], [6, 0]]], np.uint8)


def _routes(status: np.ndarray | None = None) -> list[RoutedExpertsBatch]:
    return [
        RoutedExpertsBatch.from_list([RoutedExperts(IDS, LAYOUT, status=status)]),
        RoutedExpertsBatch.from_list([RoutedExperts(IDS[::-1], LAYOUT)]),
    ]


def _calls() -> list[list[np.ndarray]]:
    """For each router: forward and recompute of the first micro-batch, then of the second."""
    return [
        [np.sort(ids[:, layer]).astype(np.int64) for ids in (IDS, IDS, IDS[::-1], IDS[::-1])]
        for layer in range(2)
    ]


def test_forwards_and_recomputes_with_the_rollouts_experts_pass():
    check_calls(_calls(), _routes())


def test_a_recompute_with_other_experts_is_named():
    calls = _calls()
    calls[1][3][2] = [0, 7]
    with pytest.raises(DemoError, match=r"MoE layer 1 .* 1 rows of the recompute of micro-batch 1"):
        check_calls(calls, _routes())


def test_recomputes_in_the_order_of_another_micro_batch_are_named():
    calls = [[first, other, second, one] for first, one, second, other in _calls()]
    with pytest.raises(DemoError, match="recompute of micro-batch 0"):
        check_calls(calls, _routes())


def test_a_recompute_that_never_ran_is_named():
    calls = [router_calls[:2] for router_calls in _calls()]
    with pytest.raises(DemoError, match="routed 2 times in 2 micro-batches, expected 4"):
        check_calls(calls, _routes())


def test_a_row_that_was_not_recorded_may_route_natively():
    calls = _calls()
    calls[0][0][1] = calls[0][1][1] = [0, 7]
    status = np.array([0, RowStatus.EVICTED, 0], np.uint8)
    check_calls(calls, _routes(status))
