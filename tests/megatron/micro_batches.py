"""Micro-batches of different sizes, run forward in order and backward in another one."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.megatron.tiny_gpt import VOCAB


@dataclass(frozen=True)
class MicroBatch:
    """A padded batch ``[B, width]`` or, with ``rooms``, a pack ``[1, width]``.

    ``lengths`` are the real tokens of each sample, ``rooms`` its rows with alignment padding.
    """

    lengths: tuple[int, ...]
    width: int
    tokens: Tensor
    rooms: tuple[int, ...] = ()

    @property
    def packed_seq_params(self) -> Any:
        if not self.rooms:
            return None
        from megatron.core.packed_seq_params import PackedSeqParams

        real, padded = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            for lengths in (self.lengths, self.rooms)
        )
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max(self.rooms),
            max_seqlen_kv=max(self.rooms),
        )

    def cells(self) -> list[tuple[int, int] | None]:
        """(sample, position) of each router row, ``None`` for padding, counted one by one."""
        cells: list[tuple[int, int] | None] = []
        if self.rooms:
            for sample, (length, room) in enumerate(zip(self.lengths, self.rooms, strict=True)):
                cells += [(sample, position) for position in range(length)]
                cells += [None] * (room - length)
            return cells
        for position in range(self.width):
            for sample, length in enumerate(self.lengths):
                cells.append((sample, position) if position < length else None)
        return cells


Sizes = Sequence[tuple[tuple[int, ...], int]]
MIXED: Sizes = (((9, 5), 12), ((7,), 8), ((4, 10, 1), 10))
EQUAL: Sizes = (((9, 5), 12), ((7, 3), 12), ((4, 10), 12))


def padded_micro_batches(sizes: Sizes = MIXED) -> list[MicroBatch]:
    """One padded micro-batch for each ``(lengths, width)``."""
    generator = torch.Generator().manual_seed(0)
    return [
        MicroBatch(
            lengths, width, torch.randint(0, VOCAB, (len(lengths), width), generator=generator)
        )
        for lengths, width in sizes
    ]


def packed_micro_batches(sizes: Sizes = MIXED, align: int = 4) -> list[MicroBatch]:
    """The same samples as packs, each sample padded to a multiple of ``align``."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths, _ in sizes:
        rooms = tuple(-(-length // align) * align for length in lengths)
        tokens = torch.randint(0, VOCAB, (1, sum(rooms)), generator=generator)
        batches.append(MicroBatch(lengths, sum(rooms), tokens, rooms))
    return batches


def forward(model: Any, batch: MicroBatch) -> Tensor:
    """Logits ``[B, width, V]``."""
    if batch.rooms:
        positions = torch.cat([torch.arange(room) for room in batch.rooms])[None]
        return model(batch.tokens, positions, None, packed_seq_params=batch.packed_seq_params)
    positions = torch.arange(batch.width).expand_as(batch.tokens)
    mask = torch.triu(torch.ones(batch.width, batch.width, dtype=torch.bool), 1)[None, None]
    return model(batch.tokens, positions, mask)


def forward_backward(
    model: Any,
    batches: Sequence[MicroBatch],
    before_forward: Callable[[int, MicroBatch], Any] = lambda n, batch: None,
    before_backward: Callable[[int], Any] = lambda n: None,
    order: Sequence[int] = (2, 0, 1),
) -> list[Tensor]:
    """Run all forwards, then all backwards in ``order``; the logits of each micro-batch."""
    logits = []
    for number, batch in enumerate(batches):
        before_forward(number, batch)
        logits.append(forward(model, batch))
    for number in order:
        before_backward(number)
        logits[number].float().pow(2).mean().backward()
    return [output.detach() for output in logits]


def use_reference_attention(model: Any) -> Any:
    """Give every layer of ``model`` the attention that knows packs."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_r3.reference_attention import ReferenceAttention

    for layer in model.decoder.layers:
        layer.self_attention.core_attention = ReferenceAttention(
            model.config, layer.layer_number, AttnMaskType.causal, "self"
        )
    return model
