"""Micro-batches of different sizes, run forward in order and backward in another one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.megatron.tiny_gpt import VOCAB


@dataclass(frozen=True)
class MicroBatch:
    """A padded batch ``[B, S]``: ``lengths`` real tokens in each of B rows of ``width``."""

    lengths: tuple[int, ...]
    width: int
    tokens: Tensor


def padded_micro_batches(
    sizes: Sequence[tuple[tuple[int, ...], int]] = (((9, 5), 12), ((7,), 8), ((4, 10, 1), 10)),
) -> list[MicroBatch]:
    """One micro-batch for each ``(lengths, width)``."""
    generator = torch.Generator().manual_seed(0)
    return [
        MicroBatch(
            lengths, width, torch.randint(0, VOCAB, (len(lengths), width), generator=generator)
        )
        for lengths, width in sizes
    ]


def forward(model: Any, batch: MicroBatch) -> Tensor:
    """Logits ``[B, S, V]``."""
    positions = torch.arange(batch.width).expand_as(batch.tokens)
    mask = torch.triu(torch.ones(batch.width, batch.width, dtype=torch.bool), 1)[None, None]
    return model(batch.tokens, positions, mask)


def forward_backward(
    model: Any,
    batches: Sequence[MicroBatch],
    before: Callable[[int, MicroBatch], None] = lambda n, batch: None,
    order: Sequence[int] = (2, 0, 1),
) -> list[Tensor]:
    """Run all forwards, then all backwards in ``order``; the logits of each micro-batch."""
    logits = []
    for number, batch in enumerate(batches):
        before(number, batch)
        logits.append(forward(model, batch))
    for number in order:
        logits[number].float().pow(2).mean().backward()
    return [output.detach() for output in logits]
