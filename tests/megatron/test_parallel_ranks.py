"""Every rank replays its own rows and layers, under Megatron's own schedules, with recompute.

The oracle is an identity tensor ``[B, S]`` of (sample, position) codes that goes through the same
functions of Megatron as the tokens: what a router's row holds is read from it.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.gloo_pool import GlooPool
from tests.megatron.test_own_record import RECOMPUTE

LENGTHS, MICRO_BATCHES = (16, 11), 4
MOE_LAYERS = [0, 1, 1, 0, 1, 1, 1, 1]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}


def context_parallel_share(tensor: Tensor) -> Tensor:
    """This rank's part of ``[B, S]``, cut by Megatron."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import get_batch_on_this_cp_rank

    group: dict[str, Any] = {"cp_group": get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        group["is_hybrid_cp"] = False
    return get_batch_on_this_cp_rank({"tensor": tensor, "cu_seqlens": None}, **group)["tensor"]


def rows_of_routers(identity: Tensor, sequence_parallel: bool) -> Tensor:
    """The code of each row of this rank's routers."""
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    rows = context_parallel_share(identity).T.contiguous()
    return (scatter_to_sequence_parallel_region(rows) if sequence_parallel else rows).flatten()


def wrong_rows(overrides: dict[str, Any]) -> tuple[int, int, int]:
    """Replay foreign routes; rows that had to follow, that did not, and calls that were seen."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import megatron_r3
    from tests.megatron.foreign_routes import RouterWitness, foreign_experts, foreign_routes
    from tests.megatron.tiny_gpt import BATCH, SEQ, VOCAB, tiny_chunks, tiny_config

    config = tiny_config(moe_layer_freq=MOE_LAYERS, num_layers=len(MOE_LAYERS), **overrides)
    chunks = tiny_chunks(config)
    controller = megatron_r3.attach(chunks)
    witnesses = [RouterWitness().watch(chunk) for chunk in chunks]
    fed = [0] * len(chunks)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (MICRO_BATCHES, BATCH, SEQ), generator=generator)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    causal = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    mask = causal if config.context_parallel_size == 1 else None

    def forward_step(_: Any, chunk: Any) -> Any:
        number = next(n for n, c in enumerate(chunks) if c is chunk)
        micro_batch, fed[number] = fed[number], fed[number] + 1
        witnesses[number].micro_batch = micro_batch
        routes = foreign_routes(controller.layout, LENGTHS, 10 * micro_batch)
        controller.feed(chunk, routes, host_lengths=LENGTHS)
        batch = tokens[micro_batch]
        local = [context_parallel_share(x) for x in (batch, positions, batch.roll(-1, 1))]
        losses = chunk(local[0], local[1], mask, labels=local[2])
        return losses, lambda output: (output.float().mean(), {})

    for witness in witnesses:
        # Backwards run in the order of forwards in each chunk of 1F1B and its interleaved form.
        witness.count_recomputes = True
    virtual = len(chunks) > 1
    with controller.schedule("replay"):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if virtual else None,
            model=chunks if virtual else chunks[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
        )

    layout = controller.layout
    moe = [number for number, is_moe in enumerate(MOE_LAYERS, 1) if is_moe]
    identity = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
    codes = rows_of_routers(identity, config.sequence_parallel).tolist()
    followed = wrong = calls = 0
    for number, witness in enumerate(witnesses):
        decoder = chunks[number].decoder.layers
        layers = [moe.index(layer.layer_number) for layer in decoder if layer.layer_number in moe]
        for seen in (witness.forwards, witness.recomputes):
            for (micro_batch, local), used in seen.items():
                calls += 1
                assert len(used) == len(codes)
                for row, code in enumerate(codes):
                    sample, position = divmod(code, SEQ)
                    if position < LENGTHS[sample] - 1:
                        cell = (10 * micro_batch + sample, position, layers[local])
                        experts = set(torch.nonzero(used[row]).flatten().tolist())
                        followed += 1
                        wrong += experts != set(foreign_experts(layout, *cell).tolist())
    return followed, wrong, calls


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_replays_its_own_rows_and_layers(
    gloo_2: GlooPool, layout: str, recompute: str
) -> None:
    ranks = gloo_2.run(wrong_rows, RECOMPUTE[recompute], **LAYOUTS[layout])
    repeats = 1 if recompute == "none" else 2
    layers = 6 if layout.startswith("pp2") else 12
    assert sum(calls for _, _, calls in ranks) == layers * MICRO_BATCHES * repeats
    whole = layout.startswith("ep2")
    tokens = (2 if whole else 1) * (sum(LENGTHS) - len(LENGTHS))
    assert sum(followed for followed, _, _ in ranks) == tokens * 6 * MICRO_BATCHES * repeats
    assert [wrong for _, wrong, _ in ranks] == [0, 0]
