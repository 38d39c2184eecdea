"""The demo's metrics, against values worked out by hand."""

import math

import numpy as np
import pytest

from examples.demo.metrics import compare, differing_decisions


def _ids(*tokens: list[list[int]]) -> np.ndarray:
    return np.array(tokens, np.uint8)


def test_decisions_are_compared_as_sets():
    ids = _ids([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    reference = _ids([[1, 0], [2, 3]], [[4, 6], [7, 6]])
    assert differing_decisions(ids, reference).tolist() == [[False, False], [True, False]]


def test_mismatch_counts_decisions_and_tokens():
    ids = _ids([[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]], [[0, 1], [0, 1]])
    reference = _ids([[0, 1], [2, 4]], [[4, 5], [6, 7]], [[0, 3], [1, 2]], [[0, 1], [0, 1]])
    difference = compare(np.zeros(1), np.zeros(1), ids, reference)
    assert difference.router_mismatch == 3 / 8
    assert difference.token_mismatch == 2 / 4


def test_log_prob_measures_match_hand_computed_values():
    same = _ids([[0, 1]])
    reference = np.array([-1.0, -2.0, -3.0, -4.0])
    log_ratio = np.log([4.0, 0.25, 1.0, 1.5])
    difference = compare(reference + log_ratio, reference, same, same)
    assert difference.logprob_abs_mean == pytest.approx((2 * math.log(4) + math.log(1.5)) / 4)
    assert difference.logprob_abs_max == pytest.approx(math.log(4))
    assert difference.kl_k1 == pytest.approx(-math.log(1.5) / 4)
    # r - 1 - log r: 3 - log 4, -3/4 + log 4, 0, 1/2 - log 1.5
    assert difference.kl_k3 == pytest.approx((2.75 - math.log(1.5)) / 4)
    assert difference.extreme_ratio_share == 2 / 4


def test_a_ratio_of_just_under_two_is_not_extreme():
    same = _ids([[0, 1]])
    difference = compare(np.log([1.99, 1 / 1.99]), np.zeros(2), same, same)
    assert difference.extreme_ratio_share == 0


def test_equal_passes_differ_in_nothing():
    ids = _ids([[0, 1]], [[2, 3]])
    difference = compare(np.array([-1.0, -2.0]), np.array([-1.0, -2.0]), ids, ids)
    assert set(vars(difference).values()) == {0.0}
