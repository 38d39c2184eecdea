"""Which rows of a router's batch are the tokens of this rank's own step.

A router does not always see the tokens of its step, all of them and nothing else. Under data
parallelism the dispatch to the experts may come before the routing: the batch then holds every
rank's tokens, one rank after the other, or every rank's shards. Under sequence parallelism a router
sees one shard: the rank's tokens, padded and cut into as many equal parts as there are
tensor-parallel ranks. Which of these it is shows in the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class OwnRows(NamedTuple):
    """Where this rank's tokens are.

    Attributes:
        start, stop: rows of the router's batch; if ``gathered``, of the batches of all
            tensor-parallel ranks, one after the other.
        gathered: whether the batch is one shard.

    """

    start: int
    stop: int
    gathered: bool = False


def own_rows(
    num_rows: int,
    num_tokens: Sequence[int],
    rank: int,
    tp_size: int,
    shards: Sequence[int] | None = None,
) -> OwnRows | None:
    """Find this rank's tokens in a router's batch of ``num_rows`` rows.

    Args:
        num_rows: of the batch.
        num_tokens: of each data-parallel rank's step, with the padding of a CUDA graph; one number
            without data parallelism.
        rank: data-parallel rank.
        tp_size: tensor-parallel size.
        shards: rows of each part that a dispatch gathers, by data-parallel, then tensor-parallel
            rank.

    Returns:
        ``None`` if the number of rows fits no layout. Where it fits several, all of them agree on
        the rows that hold tokens.

    """
    own = num_tokens[rank]
    if num_rows == sum(num_tokens):
        start = sum(num_tokens[:rank])
        return OwnRows(start, start + own)
    if num_rows == own:
        return OwnRows(0, own)
    if shards is not None and num_rows == sum(shards):
        parts = len(shards) // len(num_tokens)
        start = sum(shards[: rank * parts])
        return OwnRows(start, start + own)
    shard = -(-own // tp_size)
    if num_rows == shard:
        return OwnRows(0, own, gathered=True)
    if len(num_tokens) == 1 and num_rows == shard * tp_size:
        return OwnRows(0, own)
    return None
