"""What a schedule tells about itself, against counts taken at the routers, and what that costs."""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_r3
from tests.megatron.foreign_routes import RouterWitness, expected_map, foreign_routes
from tests.megatron.micro_batches import (
    EQUAL,
    MIXED,
    forward,
    forward_backward,
    padded_micro_batches,
)
from tests.megatron.test_foreign_routes import replayed_cells
from tests.megatron.test_own_record import SCORES
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config


def build(**overrides: Any) -> Any:
    return tiny_chunks(tiny_config(**overrides))[0]


@pytest.mark.parametrize("scores", SCORES)
def test_agreement_is_what_the_router_would_have_done(world_of_one: None, scores: str) -> None:
    """In the first MoE layer, which sees the same input natively."""
    model, [batch] = build(**SCORES[scores]), padded_micro_batches(MIXED[:1])
    router = model.decoder.layers[1].mlp.router
    if router.expert_bias is not None:
        router.expert_bias.uniform_(-0.2, 0.2)
    witness = RouterWitness(micro_batch=0).watch(model)
    seen: list[torch.Tensor] = []
    hook = router.register_forward_hook(
        lambda module, inputs, _: seen.append(module.gating(inputs[0]))
    )
    forward(model, batch)
    hook.remove()
    native, logits = witness.forwards[0, 0], seen[0].view(-1, 16)
    selected_on = logits
    if SCORES[scores]:
        probabilities = torch.softmax(logits, -1)
        if router.score_function == "sigmoid":
            selected_on = torch.sigmoid(logits)
            probabilities = selected_on / selected_on.sum(-1, keepdim=True)
            if router.expert_bias is not None:
                selected_on = selected_on + router.expert_bias
    else:
        probabilities = torch.softmax(logits, -1)

    controller = megatron_r3.attach(model)
    unrecorded = [(0, 2), (1, 0)]
    with controller.schedule("replay") as schedule:
        routes = foreign_routes(controller.layout, batch.lengths, unrecorded=unrecorded)
        controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)
        witness.micro_batch = 1
        forward(model, batch)
    cells = replayed_cells(batch, 0, unrecorded)
    expected, replayed = expected_map(controller.layout, cells, layer=0)
    first = (selected_on * native).argmax(1)
    metrics = schedule.metrics()
    layer = metrics.layers[0]
    assert (layer.replayed, layer.unrecorded, layer.padding, layer.recorded) == (10, 4, 10, 0)
    assert layer.sampled == 10
    share = (expected & native)[replayed].sum() / expected[replayed].sum()
    assert layer.agreement == pytest.approx(float(share))
    assert layer.probability_mass == pytest.approx(
        float((probabilities * expected)[replayed].sum(1).mean())
    )
    assert layer.first_choice == pytest.approx(
        float(expected.gather(1, first[:, None])[replayed].float().mean())
    )
    assert 0 < layer.agreement < 1
    assert metrics.total.replayed == 30
    assert metrics.total.agreement == pytest.approx(
        sum(entry.agreement or 0 for entry in metrics.layers) / 3
    )


def test_without_samples_there_is_no_agreement(world_of_one: None) -> None:
    model, batches = build(), padded_micro_batches(EQUAL)
    controller = megatron_r3.attach(model, agreement_every=2)
    for first in (0, 1):
        controller.agreement_every = 2 * (1 - first)
        with controller.schedule("replay") as schedule:
            forward_backward(
                model,
                batches,
                lambda _, batch: controller.feed(
                    model,
                    foreign_routes(controller.layout, batch.lengths),
                    host_lengths=batch.lengths,
                    seq_length=batch.width,
                ),
            )
        total = schedule.metrics().total
        sampled = sum(batches[n].lengths[0] + batches[n].lengths[1] - 2 for n in (0, 2))
        assert total.sampled == (0 if first else 3 * sampled)
        assert (total.agreement is None) == bool(first)


class Operations(TorchDispatchMode):
    """Counts what reaches torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


# Reading a value back is the only way in which a router call could wait for the device.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


def operations_of_a_router_call(
    mode: str,
    checkpointed: bool,
    length: int = 8,
    layer: int = 1,
    experts: int = 16,
) -> tuple[int, int]:
    """Kernels, views too, of one forward and of one backward of a router by itself."""
    model = build(num_moe_experts=experts)
    controller = megatron_r3.attach(model, agreement_every=int(mode == "sampled"))
    routers = [block.mlp.router for block in model.decoder.layers[1:]]
    hidden = torch.randn(length, 2, 64, requires_grad=True)
    forwards, backwards = Operations(), Operations()
    with controller.schedule("replay" if mode == "sampled" else mode):
        lengths = (length, length - 2)
        routes = foreign_routes(controller.layout, lengths)
        controller.feed(
            model, routes if mode in ("replay", "sampled") else None, host_lengths=lengths
        )
        for number, router in enumerate(routers, 1):
            with forwards if number == layer else contextlib.nullcontext():
                if checkpointed:
                    probs = torch.utils.checkpoint.checkpoint(
                        lambda hidden, router=router: router(hidden)[0],
                        hidden,
                        use_reentrant=True,
                        preserve_rng_state=False,
                    )
                else:
                    probs, _ = router(hidden)
            with backwards if number == layer else contextlib.nullcontext():
                probs.pow(2).sum().backward()
    for operations in (forwards, backwards):
        assert not [name for name in operations.counts if any(wait in name for wait in WAITS)]
    return sum(forwards.counts.values()), sum(backwards.counts.values())


EXTRA = {"record": (4, 0), "replay": (6, 0), "sampled": (24, 0)}
EXTRA_RECOMPUTED = {"record": (4, 3), "replay": (6, 4), "sampled": (24, 4)}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["once", "recomputed"])
def test_the_extra_operations_of_a_router_call_are_a_constant(
    world_of_one: None, checkpointed: bool
) -> None:
    """Of a forward and of a backward, whatever the number of rows, layers and experts."""
    # More rows than are sampled, another layer, ids of two bytes.
    sizes: list[dict[str, int]] = [{}, {"length": 200, "layer": 3, "experts": 300}]
    for size in sizes:
        native = operations_of_a_router_call("native", checkpointed, **size)
        extra = {
            mode: tuple(
                ours - theirs
                for ours, theirs in zip(
                    operations_of_a_router_call(mode, checkpointed, **size), native, strict=True
                )
            )
            for mode in EXTRA
        }
        assert extra == (EXTRA_RECOMPUTED if checkpointed else EXTRA), size
