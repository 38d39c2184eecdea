"""Replaying what was recorded repeats the recorded run bit for bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_r3
from megatron_r3 import LayoutMismatchError, ReplayStateError, RowCountError
from shared_schema import RoutedExpertsBatch
from tests.megatron.micro_batches import MicroBatch, forward_backward, padded_micro_batches
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}
SCORES: dict[str, dict[str, Any]] = {
    "softmax_after": {},
    "softmax_before": {"moe_router_pre_softmax": True},
    "sigmoid_with_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "group_limited": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
}


def run(
    controller: Any, model: Any, batches: Sequence[MicroBatch], routes: Any = None
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Logits of each micro-batch, gradients by name, and the schedule."""
    mode = "record" if routes is None else "replay"
    model.zero_grad()
    with controller.schedule(mode) as schedule:
        logits = forward_backward(
            model,
            batches,
            before_forward=lambda n, batch: controller.feed(
                model,
                routes and routes[n],
                packed_seq_params=batch.packed_seq_params,
                host_lengths=batch.lengths,
                seq_length=batch.width,
            ),
        )
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits, gradients, schedule


def split(recorded: RoutedExpertsBatch, batches: Sequence[MicroBatch]) -> list[RoutedExpertsBatch]:
    parts, first = [], 0
    for batch in batches:
        parts.append(recorded.select(range(first, first + len(batch.lengths))))
        first += len(batch.lengths)
    return parts


@pytest.mark.parametrize(
    ("scores", "recompute"),
    [("softmax_after", name) for name in RECOMPUTE] + [(name, "full") for name in SCORES][1:],
)
def test_logits_and_gradients_repeat_bit_for_bit(
    world_of_one: None, scores: str, recompute: str
) -> None:
    [model] = tiny_chunks(tiny_config(**SCORES[scores], **RECOMPUTE[recompute]))
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.uniform_(-0.2, 0.2)
    controller = megatron_r3.attach(model)
    batches = padded_micro_batches()
    logits, gradients, recording = run(controller, model, batches)
    again, gradients_again, replay = run(
        controller, model, batches, split(recording.gather(), batches)
    )
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    routers = {"none": 0, "full": 3, "block": 2, "selective": 3}[recompute]
    assert replay.report.recomputes == routers * len(batches)
    assert replay.report.rows.replayed == sum(sum(batch.lengths) for batch in batches)
    assert [layer.agreement for layer in replay.metrics().layers] == [1.0] * 3


def test_micro_batches_of_a_recording_are_repeated_in_any_order(world_of_one: None) -> None:
    [model] = tiny_chunks(tiny_config(**RECOMPUTE["full"]))
    controller = megatron_r3.attach(model)
    batches = padded_micro_batches()
    logits, _, recording = run(controller, model, batches)
    counts = recording.metrics().total
    rows, tokens = (
        sum(count)
        for count in zip(*((b.tokens.numel(), sum(b.lengths)) for b in batches), strict=True)
    )
    assert (counts.recorded, counts.padding) == (3 * tokens, 3 * (rows - tokens))
    assert (counts.replayed, counts.sampled, counts.agreement) == (0, 0, None)
    order = [2, 0, 0, 1]
    with controller.schedule("replay") as replay:
        again = forward_backward(
            model,
            [batches[number] for number in order],
            before_forward=lambda n, _: controller.feed(model, recording[order[n]]),
            order=(3, 0, 2, 1),
        )
    for number, output in zip(order, again, strict=True):
        assert torch.equal(output, logits[number])
    assert replay.report.recomputes == 3 * len(order)
    assert recording.gather() == recording.gather()


def test_a_gathered_recording_serves_batches_that_are_split_anew(world_of_one: None) -> None:
    [model] = tiny_chunks(tiny_config(**RECOMPUTE["selective"]))
    controller = megatron_r3.attach(model)
    batches = padded_micro_batches()
    logits, _, recording = run(controller, model, batches)
    routes = recording.gather()
    # The third sample, alone in its batch, and the second of the third batch, now in one.
    lengths, sources = (7, 10), ((1, 0), (2, 1))
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    for row, (number, sample) in enumerate(sources):
        tokens[row, : lengths[row]] = batches[number].tokens[sample, : lengths[row]]
    batch = MicroBatch(lengths, 12, tokens)
    with controller.schedule("replay") as replay:
        [output] = forward_backward(
            model,
            [batch],
            before_forward=lambda *_: controller.feed(
                model, routes, samples=[2, 4], host_lengths=lengths, seq_length=12
            ),
            order=(0,),
        )
    assert replay.report.rows.replayed == sum(lengths)
    for row, (number, sample) in enumerate(sources):
        expected = logits[number][sample, : lengths[row]]
        torch.testing.assert_close(output[row, : lengths[row]], expected)
    assert [layer.agreement for layer in replay.metrics().layers] == [1.0] * 3


def test_a_recording_of_something_else_is_refused(world_of_one: None) -> None:
    [model] = tiny_chunks(tiny_config())
    [other] = tiny_chunks(tiny_config(moe_layer_freq=[0, 0, 1, 1]))
    controller, foreign = megatron_r3.attach(model), megatron_r3.attach(other)
    batches = padded_micro_batches()
    _, _, recording = run(controller, model, batches)
    with controller.schedule("record") as unfinished, pytest.raises(ReplayStateError, match="open"):
        unfinished[0]

    def feed(into: Any, chunk: Any, number: int, lengths: Sequence[int]) -> None:
        with into.schedule("replay"):
            into.feed(chunk, recording[number], host_lengths=lengths, seq_length=8)

    with pytest.raises(RowCountError, match=r"micro-batch 3 was asked of a recording of 3"):
        feed(controller, model, 3, (7,))
    with pytest.raises(RowCountError, match=r"recorded with samples of \[9, 5\] tokens in 24 rows"):
        feed(controller, model, 0, (7,))
    with pytest.raises(LayoutMismatchError, match=r"has the MoE layers \[\(0, 1, 2\)\] in its"):
        feed(foreign, other, 1, (7,))
