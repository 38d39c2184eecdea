"""``compat.check`` names what frameworks do wrong, each shown by doing it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from megatron_r3 import LayoutPlan, compat
from tests.megatron.gloo_pool import GlooPool
from tests.megatron.micro_batches import MIXED, forward, padded_micro_batches
from tests.megatron.test_upstream_api import targets_of
from tests.megatron.tiny_gpt import SEQ, tiny_chunks, tiny_config, train_step


@pytest.fixture
def upstream(world_of_one: None) -> Iterator[Any]:
    """megatron-core's ``RouterReplay`` with an empty list."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.clear_global_router_replay_instances()
    yield RouterReplay
    RouterReplay.clear_global_router_replay_instances()


def build(**overrides: Any) -> Any:
    return tiny_chunks(tiny_config(moe_enable_routing_replay=True, **overrides))[0]


def test_a_step_that_is_right_has_no_findings(upstream: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    model, batches = build(), padded_micro_batches()
    megatron_r3.attach(model)
    upstream.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    for batch in batches:
        upstream.set_replay_data(targets_of(model, batch))
        forward(model, batch)
    assert compat.check(model) == []


def test_routers_of_a_rebuilt_model_are_found(upstream: Any) -> None:
    build()
    model = build()
    megatron_r3.attach(model)
    [finding] = compat.check(model)
    assert finding.kind == "orphaned_routers"
    assert "entries [0, 1, 2] of 6" in finding.text
    other = build()
    assert [finding.kind for finding in compat.check([model, other])] == ["orphaned_routers"]


def test_routers_behind_a_cleared_list_are_found(upstream: Any) -> None:
    model = build()
    megatron_r3.attach(model)
    upstream.clear_global_router_replay_instances()
    reference = build()
    [finding] = compat.check([model, reference])
    assert finding.kind == "unlisted_routers"
    assert "decoder.layers.1.mlp.router" in finding.text


def test_decoder_routes_in_a_router_of_multi_token_prediction_are_found(upstream: Any) -> None:
    model = build(mtp_num_layers=1)
    megatron_r3.attach(model)
    assert len(upstream.global_router_replay_instances) == 4
    decoder = torch.zeros(2 * SEQ, 4, dtype=torch.int64) + torch.arange(4)
    # By layer numbers that start again at 1, or by the number of routers.
    upstream.set_replay_data([decoder, decoder + 4, decoder + 8, decoder])
    kinds = {finding.kind: finding.text for finding in compat.check(model)}
    assert "mtp.layers.0" in kinds["mtp_targets"]
    assert "that of decoder.layers.1.mlp.router" in kinds["mtp_targets"]


def findings_of_a_global_set() -> list[list[str]]:
    """What is found when every forward step sets the targets of all chunks, and of its own only."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    config = tiny_config(num_layers=4, moe_layer_freq=1, moe_enable_routing_replay=True)
    chunks = tiny_chunks(config)
    megatron_r3.attach(chunks)
    handles = [chunk.decoder.layers[0].mlp.router.router_replay for chunk in chunks]
    target = torch.zeros(2 * SEQ, 4, dtype=torch.int64) + torch.arange(4)
    found = []
    for everywhere in (True, False):
        RouterReplay.clear_global_indices()
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

        def set_targets(handle: Any, everywhere: bool = everywhere) -> None:
            if everywhere:
                RouterReplay.set_replay_data([target, target])
            else:
                handle.set_target_indices(target)

        hooks = [
            chunk.register_forward_pre_hook(lambda *_, handle=handle: set_targets(handle))
            for chunk, handle in zip(chunks, handles, strict=True)
        ]
        train_step(chunks)
        for hook in hooks:
            hook.remove()
        found.append([str(finding) for finding in compat.check(chunks)])
    return found


def test_a_global_set_under_virtual_stages_is_found(gloo_2: GlooPool) -> None:
    ranks = gloo_2.run(
        findings_of_a_global_set,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    )
    for everywhere, own_only in ranks:
        assert len(everywhere) == 2
        for number, text in enumerate(everywhere):
            assert text.startswith("targets_of_idle_chunks: ")
            assert f"of chunk {number} was given 4 targets for 2 forwards" in text
        assert own_only == []


def test_rows_in_another_order_than_the_routers_are_found_by_identity(upstream: Any) -> None:
    from megatron_r3.layout_plan import token_identities

    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    padded = np.zeros((len(batch.lengths), batch.width), np.int64)
    for sample, identities in enumerate(token_identities(batch.lengths)):
        padded[sample, : len(identities)] = identities
    plan = LayoutPlan.padded(batch.lengths, batch.width)
    assert compat.check(model, identity=padded.T.reshape(-1), plan=plan) == []

    [finding] = compat.check(model, identity=torch.from_numpy(padded.reshape(-1)), plan=plan)
    assert finding.kind == "row_order"
    assert "row 1 of the targets holds sample 0, position 1" in finding.text
    assert "expected sample 1, position 0" in finding.text
    assert "rows are batch-major" in finding.text

    [finding] = compat.check(model, identity=np.roll(padded.T.reshape(-1), 1), plan=plan)
    assert "row 0 of the targets holds padding, expected sample 0, position 0" in finding.text
    assert "cut and pad targets as the tokens are" in finding.text

    [finding] = compat.check(model, identity=padded.T.reshape(-1)[:-1], plan=plan)
    assert "targets have rows of shape [23], expected [24]" in finding.text
