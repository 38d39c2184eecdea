"""Each way in which captured rows can be wrong is seen by the oracle that is there to see it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from .rigs.rollouts import Rollout
from .rigs.tiny_models import MOE_LAYERS, NUM_EXPERTS, NUM_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

NUM_ROWS = 40


@pytest.fixture(scope="module")
def right(oracle: TransformersOracle) -> Rollout:
    """A rollout that holds transformers' own routing."""
    tokens = np.random.default_rng(0).integers(0, 256, NUM_ROWS + 1).tolist()
    (logits,) = oracle.router_logits([tokens[:-1]])
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP_K].astype(np.uint8)
    routed = np.zeros((NUM_ROWS, NUM_LAYERS, TOP_K), np.uint8)
    routed[:, list(MOE_LAYERS)] = ids
    return Rollout("0", 0, tokens[:10], tokens[10:], routed, "length", hooked=ids)


def _shift_by_one_row(ids: np.ndarray) -> np.ndarray:
    return np.roll(ids, 1, axis=0)


def _repeat_a_stale_row(ids: np.ndarray) -> np.ndarray:
    ids[20] = ids[19]
    return ids


def _swap_layers(ids: np.ndarray) -> np.ndarray:
    return ids[:, [1, 0, 2]]


def _zero_a_layer(ids: np.ndarray) -> np.ndarray:
    ids[:, 1] = 0
    return ids


def _repeat_an_expert(ids: np.ndarray) -> np.ndarray:
    ids[5, 0, 1] = ids[5, 0, 0]
    return ids


def _leave_the_range(ids: np.ndarray) -> np.ndarray:
    ids[5, 0, 0] = NUM_EXPERTS
    return ids


def _swap_slots(ids: np.ndarray) -> np.ndarray:
    ids[7, 2, [0, 1]] = ids[7, 2, [1, 0]]
    return ids


_WRONG_SETS = [
    _shift_by_one_row,
    _repeat_a_stale_row,
    _swap_layers,
    _zero_a_layer,
    _repeat_an_expert,
    _leave_the_range,
]


def _damaged(rollout: Rollout, damage: Callable[[np.ndarray], np.ndarray]) -> Rollout:
    assert rollout.routed is not None
    routed = rollout.routed.copy()
    routed[:, list(MOE_LAYERS)] = damage(routed[:, list(MOE_LAYERS)])
    return replace(rollout, routed=routed)


def test_oracles_accept_what_is_right(right: Rollout, oracle: TransformersOracle) -> None:
    assert oracle.agreement([right]).differing == 0
    assert right.ordered_differences() == 0


@pytest.mark.parametrize("damage", _WRONG_SETS)
def test_transformers_oracle_sees_wrong_experts(
    right: Rollout, oracle: TransformersOracle, damage: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert oracle.agreement([_damaged(right, damage)]).differing > 0


@pytest.mark.parametrize("damage", [*_WRONG_SETS, _swap_slots, lambda ids: np.sort(ids, axis=-1)])
def test_ordered_oracle_sees_wrong_experts_and_wrong_order(
    right: Rollout, damage: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert _damaged(right, damage).ordered_differences() > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda routed: routed[1:],
        lambda routed: routed[:, list(MOE_LAYERS)],
        lambda routed: routed.astype(np.int32),
        lambda routed: np.where(np.arange(NUM_LAYERS)[:, None] == 0, 1, routed).astype(np.uint8),
        lambda routed: None,
    ],
    ids=["row missing", "dense layer left out", "wide dtype", "dense layer not zero", "nothing"],
)
def test_form_check_sees_arrays_that_vllm_would_not_return(
    right: Rollout, damage: Callable[[np.ndarray], np.ndarray | None]
) -> None:
    assert right.routed is not None
    with pytest.raises(AssertionError):
        replace(right, routed=damage(right.routed)).check_form()


def test_another_models_routing_differs(right: Rollout, other_moe_model: Path) -> None:
    assert TransformersOracle(other_moe_model).agreement([right]).differing > NUM_ROWS
