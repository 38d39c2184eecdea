"""The figures of the evidence: known routings give known figures, and the page holds them all."""

import json
import math

import numpy as np
import pytest

from examples.demo.rollout import Sample
from examples.demo.trainer import Scores
from examples.evidence.document import write_document
from examples.evidence.passes import PAIRS, differences
from examples.evidence.routing import measure_routing
from shared_schema import RoutedExperts, RoutingLayout, RowStatus

LAYOUT = RoutingLayout(32, 4, (1, 2, 3), 4)


def random_routing(rows, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((rows, 3, 32)), -1)[..., :4].astype(np.uint8)
    return RoutedExperts(ids, LAYOUT)


@pytest.fixture(scope="module")
def random():
    return measure_routing([random_routing(4000, seed) for seed in range(2)])


def test_random_routing_cannot_be_compressed_below_the_number_of_choices(random):
    sizes = random.bytes_per_token
    assert sizes["raw"] == 12
    assert sizes["packed"] == 3 * 4 * 5 / 8
    ordered = 3 * math.log2(math.perm(32, 4)) / 8
    as_set = 3 * math.log2(math.comb(32, 4)) / 8
    assert sizes["code that knows each layer's load"] == pytest.approx(ordered, rel=0.005)
    assert sizes["the same, order dropped"] == pytest.approx(as_set, rel=0.01)
    for name, size in sizes.items():
        if name.startswith("zstd"):
            assert ordered < size < 12


def test_random_routing_shares_with_any_earlier_token_what_chance_gives(random):
    chance = random.statistics.shared_by_chance.mean()
    assert chance == pytest.approx(4 / 32, rel=0.01)
    for shared in random.by_distance.values():
        assert shared == pytest.approx(chance, rel=0.05)


def test_routing_that_repeats_is_found_at_its_distance():
    ids = np.tile(random_routing(4).ids, (50, 1, 1))
    shared = measure_routing([RoutedExperts(ids, LAYOUT)]).by_distance
    assert shared[4] == shared[8] == 1
    assert shared[1] < 0.5


def test_unrecorded_rows_count_nowhere():
    routed = random_routing(100)
    status = np.zeros(100, np.uint8)
    status[60:] = RowStatus.STEP_LOST
    partly = measure_routing([RoutedExperts(routed.ids, LAYOUT, 0, status)])
    assert partly.bytes_per_token == measure_routing([routed[:60]]).bytes_per_token
    assert partly.by_distance == measure_routing([routed[:60]]).by_distance


def test_the_page_holds_every_comparison_layer_and_size(random):
    routed = random_routing(5)
    samples = [Sample([1, 2], [3, 4, 5, 6], np.zeros(4), routed)]
    names = dict.fromkeys(name for pair in PAIRS.values() for name in pair)
    passes = {
        name: Scores(np.full(4, 0.1 if name == "native" else 0.0), np.roll(routed.ids, number, 0))
        for number, name in enumerate(names)
    }
    found = differences(passes, samples)
    assert found["Megatron bf16 against vLLM bf16"][1] == {1.1: 1.0, 1.5: 0.0, 2.0: 0.0}
    machine = {"versions": {"vllm": "0.32"}, "hardware": {"cores": 2, "cpu": "a CPU"}}
    page = write_document("About.", True, random, found, machine)
    for title in (*PAIRS, *random.bytes_per_token):
        assert f"| {title} |" in page
    for layer in LAYOUT.moe_layers:
        assert f"| {layer} |" in page
    assert "vllm 0.32; 2 cores of a CPU" in page
    assert "## Mismatch" not in write_document("About.", False, random, None, machine)
    json.dumps(random.to_dict())
