"""A recording is collected from all ranks, and repeated by them without being collected.

The oracle is a gate that chooses foreign experts of each row's (sample, position), which it reads
from an identity tensor that went through Megatron's own split of the batch.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.megatron.gloo_pool import GlooPool
from tests.megatron.parallel_run import context_parallel_share, rows_of_routers
from tests.megatron.test_own_record import RECOMPUTE

LENGTHS, MICRO_BATCHES = (16, 11), 2
LAYOUTS: dict[str, tuple[dict[str, Any], list[int], dict[str, Any]]] = {
    "tp2": ({"tensor_model_parallel_size": 2}, [0, 1, 1, 1], {"num_moe_experts": 300}),
    "tp2_without_sp": ({"tensor_model_parallel_size": 2}, [0, 1, 1], {"sequence_parallel": False}),
    "cp2": ({"context_parallel_size": 2}, [0, 1, 1, 1], {}),
    "pp2_uneven": ({"pipeline_model_parallel_size": 2}, [0, 1, 1, 1], {}),
    "pp2_without_moe": ({"pipeline_model_parallel_size": 2}, [0, 0, 1, 1], {}),
    "pp2_vpp2": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        [0, 1, 1, 0, 1, 1, 1, 1],
        {},
    ),
    "ep2": ({"expert_model_parallel_size": 2}, [0, 1, 1], {}),
}


def expected_ids(layout: Any) -> np.ndarray:
    """``[tokens, L, k]`` foreign ids of all tokens, each row sorted."""
    from tests.megatron.foreign_routes import foreign_routes

    batches = [
        foreign_routes(layout, [length + 1 for length in LENGTHS], 10 * number)
        for number in range(MICRO_BATCHES)
    ]
    return np.sort(np.concatenate([batch.values for batch in batches]), axis=-1)


def choose_foreign_experts(chunks: Any, layout: Any, micro_batch: list[int]) -> None:
    """Replace the gates; ``micro_batch`` holds the number that runs in each chunk."""
    from megatron.core.transformer.moe.router import TopKRouter

    from tests.megatron.foreign_routes import foreign_experts
    from tests.megatron.tiny_gpt import BATCH, SEQ

    identity = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
    for number, chunk in enumerate(chunks):
        for router in chunk.modules():
            if not isinstance(router, TopKRouter):
                continue
            codes = rows_of_routers(identity, False, router.config.sequence_parallel).tolist()
            layer = layout.moe_layers.index(router.layer_number - 1)

            def gating(
                hidden: Any, number: int = number, codes: Any = codes, layer: int = layer
            ) -> torch.Tensor:
                logits = torch.zeros(len(codes), layout.num_experts)
                for row, code in enumerate(codes):
                    sample, position = divmod(code, SEQ)
                    cell = (10 * micro_batch[number] + sample, position, layer)
                    logits[row, foreign_experts(layout, *cell).astype(np.int64)] = 1.0
                return logits.view(*hidden.shape[:2], -1)

            router.gating = gating


def record_and_repeat(moe_layers: list[int], overrides: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import megatron_r3
    from tests.megatron.tiny_gpt import BATCH, SEQ, VOCAB, tiny_chunks, tiny_config

    config = tiny_config(
        moe_layer_freq=moe_layers,
        num_layers=len(moe_layers),
        **overrides,
        **RECOMPUTE["full"] | {"recompute_num_layers": 1},
    )
    chunks = tiny_chunks(config)
    for chunk in chunks:
        # Megatron trains no MoE with tensor but without sequence parallelism.
        chunk.train(config.sequence_parallel or config.tensor_model_parallel_size == 1)
    controller = megatron_r3.attach(chunks, agreement_every=1)
    tokens = torch.randint(
        0, VOCAB, (MICRO_BATCHES, BATCH, SEQ), generator=torch.Generator().manual_seed(0)
    )
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    causal = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    mask = causal if config.context_parallel_size == 1 else None
    micro_batch = [-1] * len(chunks)

    def run(forward_only: bool, recording: Any = None) -> list[torch.Tensor]:
        micro_batch[:] = [-1] * len(chunks)

        def forward_step(_: Any, chunk: Any) -> Any:
            number = next(n for n, c in enumerate(chunks) if c is chunk)
            micro_batch[number] += 1
            if recording is None:
                controller.feed(chunk, host_lengths=LENGTHS, seq_length=SEQ)
            else:
                controller.feed(chunk, recording[micro_batch[number]])
            batch = tokens[micro_batch[number]]
            local = [context_parallel_share(x) for x in (batch, positions, batch.roll(-1, 1))]
            losses = chunk(local[0], local[1], mask, labels=local[2])
            return losses, lambda output: (
                output.float().mean(),
                {"losses": output.detach().clone()},
            )

        virtual = len(chunks) > 1
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if virtual else None,
            model=chunks if virtual else chunks[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )
        return [report["losses"] for report in reports]

    training = chunks[0].training
    with controller.schedule("record") as recording:
        recorded = run(forward_only=True)
    with controller.schedule("replay") as replay:
        replayed = run(forward_only=not training, recording=recording)
    result = {
        "same": [torch.equal(a, b) for a, b in zip(recorded, replayed, strict=True)],
        "recomputes": replay.report.recomputes,
        "metrics": replay.metrics(),
    }
    choose_foreign_experts(chunks, controller.layout, micro_batch)
    with controller.schedule("record") as recording:
        run(forward_only=True)
    batch = recording.gather()
    assert batch.lengths.tolist() == list(LENGTHS) * MICRO_BATCHES
    wrong = (np.sort(batch.values, axis=-1) != expected_ids(controller.layout)).any(-1)
    return result | {"wrong": int(wrong.sum()), "values": batch.values}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gathers_all_rows_and_layers_and_repeats_its_own(
    gloo_2: GlooPool, layout: str
) -> None:
    groups, moe_layers, overrides = LAYOUTS[layout]
    ranks = gloo_2.run(record_and_repeat, moe_layers, overrides, **groups)
    assert [rank["wrong"] for rank in ranks] == [0, 0]
    assert np.array_equal(ranks[0]["values"], ranks[1]["values"])

    same = [equal for rank in ranks for equal in rank["same"]]
    assert same == [True] * (MICRO_BATCHES if layout.startswith("pp2") else 2 * MICRO_BATCHES)
    spread = ranks if layout.startswith("pp2") else ranks[:1]
    recomputes = 0 if layout == "tp2_without_sp" else sum(moe_layers) * MICRO_BATCHES
    assert sum(rank["recomputes"] for rank in spread) == recomputes

    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    metrics = ranks[0]["metrics"]
    data_parallel = 2 if layout == "ep2" else 1
    assert len(metrics.layers) == sum(moe_layers)
    for counts in [*metrics.layers, metrics.total]:
        rows = data_parallel * MICRO_BATCHES * (sum(moe_layers) if counts is metrics.total else 1)
        assert counts.replayed == counts.sampled == rows * sum(LENGTHS)
        assert counts.padding == rows * (2 * max(LENGTHS) - sum(LENGTHS))
        assert (counts.unrecorded, counts.recorded) == (0, 0)
        assert counts.agreement == counts.first_choice == 1.0
        assert 0 < counts.probability_mass <= 1


def test_gathering_names_what_no_rank_recorded(world_of_one: None) -> None:
    import megatron_r3
    from megatron_r3 import LayoutPlan, Shard
    from tests.megatron.micro_batches import EQUAL, forward, padded_micro_batches
    from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

    [model], [batch] = tiny_chunks(tiny_config()), padded_micro_batches(EQUAL[:1])
    controller = megatron_r3.attach(model)
    half = LayoutPlan.padded([9, 5, 5, 5], 12, shard=Shard(cp_size=2, cp_rank=0))
    with controller.schedule("record") as recording:
        controller.feed(model, plan=half)
        forward(model, batch)
    with pytest.raises(
        megatron_r3.ReplayStateError, match="no rank recorded 12 of the 24 tokens of micro-batch 0"
    ):
        recording.gather()
