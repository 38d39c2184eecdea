"""Collect what the ranks of one model recorded, each its own rows and layers, into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt

from megatron_r3.errors import ReplayStateError
from megatron_r3.frames import Frame
from megatron_r3.groups import Groups, all_gathered
from shared_schema import RoutedExpertsBatch, RoutingLayout, Source, Span

Chunks = Sequence[tuple[Sequence[int], Sequence[Frame]]]
"""For each model chunk of a rank the L-axis positions of its layers, and its frames."""


def gather_recorded(chunks: Chunks, layout: RoutingLayout, groups: Groups) -> RoutedExpertsBatch:
    """Every rank of the model enters, and gets all tokens and layers of its own data.

    Rows travel over the ranks that share the tokens, then whole tokens over the pipeline, one
    micro-batch after the other.

    Args:
        chunks: of this rank, recorded.
        layout: the model's.
        groups: of this rank.

    Raises:
        ReplayStateError: nothing was recorded, or tokens or layers that no rank holds.

    """
    counts = {len(frames) for _, frames in chunks}
    if counts == {0}:
        raise ReplayStateError(
            "the schedule recorded no micro-batch, expected one or more: call feed() before each "
            "forward."
        )
    if len(counts) > 1:
        raise ReplayStateError(
            f"the chunks of this rank recorded {sorted(counts)} micro-batches, expected as many "
            "in each: call feed() for every chunk."
        )
    _check_same_samples([frame.plan.lengths for frame in chunks[0][1]], groups)
    layers = [layer for held, _ in chunks for layer in held]
    parts = []
    missing: list[str] = []
    lengths = []
    for frames in zip(*(frames for _, frames in chunks), strict=True):
        tokens, held = _whole_tokens(frames, len(layers), layout, groups)
        values, found = _whole_layers(tokens, layers, layout, groups)
        parts.append(values)
        lengths.append(frames[0].plan.lengths)
        if not held.all():
            missing.append(
                f"{int((~held).sum())} of the {len(held)} tokens of micro-batch "
                f"{frames[0].micro_batch}"
            )
        if not found.all():
            missing.append(f"the MoE layers with indices {np.flatnonzero(~found).tolist()}")
    if missing:  # after the last collective, so that no rank waits for another
        raise ReplayStateError(
            f"no rank recorded {missing[0]}, expected each token and layer on some rank: give feed "
            "the plan of what this rank holds, and attach to all routers."
        )
    rows = np.concatenate(lengths)
    return RoutedExpertsBatch(
        np.concatenate(parts),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)]),
        layout,
        spans=tuple((Span(0, int(n), Source.TRAINER),) if n else () for n in rows),
    )


def _check_same_samples(lengths: Sequence[Int64[np.ndarray, " B"]], groups: Groups) -> None:
    own = np.concatenate([np.append(batch, -1) for batch in lengths])
    theirs = all_gathered(torch.from_numpy(own), groups.tokens)
    for rank, other in enumerate(theirs):
        if not np.array_equal(other.view(np.int64), theirs[0].view(np.int64)):
            raise ReplayStateError(
                f"rank {rank} of the tensor and context parallel ones recorded samples of other "
                "lengths than rank 0, expected the same micro-batches on all (dynamic context "
                "parallelism has others): repeat them with feed(chunk, recording[n])."
            )


def _whole_tokens(
    frames: Sequence[Frame], num_layers: int, layout: RoutingLayout, groups: Groups
) -> tuple[UInt[np.ndarray, "tokens L_local k"], Bool[np.ndarray, " tokens"]]:
    """All tokens of a micro-batch in this rank's layers, and which of them any rank held."""
    plan = frames[0].plan
    shape = (int(plan.lengths.sum()), num_layers, layout.top_k)
    tokens = np.full(shape, layout.fill_id, layout.dtype)
    held = np.full(len(tokens), not num_layers)
    if num_layers:
        ids = torch.cat([frame.ids.view(torch.uint8) for frame in frames]).transpose(0, 1)
        index = torch.from_numpy(plan.token_index().astype(np.int64))
        theirs = all_gathered(index, groups.tokens), all_gathered(ids, groups.tokens)
        for their_index, their_ids in zip(*theirs, strict=True):
            rows = their_index.view(np.int64)
            real = rows >= 0
            tokens[rows[real]] = their_ids.view(layout.dtype).reshape(-1, *shape[1:])[real]
            held[rows[real]] = True
    return tokens, held


def _whole_layers(
    tokens: UInt[np.ndarray, "tokens L_local k"],
    layers: Sequence[int],
    layout: RoutingLayout,
    groups: Groups,
) -> tuple[UInt[np.ndarray, "tokens L k"], Bool[np.ndarray, " L"]]:
    """All layers of whole tokens, and which of them any rank held."""
    values = np.empty((len(tokens), layout.num_moe_layers, layout.top_k), layout.dtype)
    found = np.zeros(layout.num_moe_layers, bool)
    parts = zip(
        all_gathered(torch.tensor(layers, dtype=torch.int32), groups.pipeline),
        all_gathered(torch.from_numpy(tokens.view(np.uint8)), groups.pipeline),
        strict=True,
    )
    for their_layers, their_tokens in parts:
        held = their_layers.view(np.int32)
        shape = (len(tokens), len(held), layout.top_k)
        values[:, held] = their_tokens.view(layout.dtype).reshape(shape)
        found[held] = True
    return values, found
