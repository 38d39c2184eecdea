"""Faults of other replays, made on purpose: the checks of the parallel table must see each."""

import contextlib
from types import SimpleNamespace
from typing import Any

from megatron_r3 import LayoutPlan, ReplayStateError
from megatron_r3.router_calls import ChunkCalls
from tests.megatron.parallel_run import Rank
from tests.megatron.parallel_table import Layout


def rows_that_miss(layout: Layout, fault: str) -> int:
    """Make a fault, replay foreign routes; the rows of this rank that do not follow them."""
    rank = Rank(layout)
    FAULTS[fault](rank)
    native = rank.native_witnesses()
    with contextlib.suppress(ReplayStateError), rank.controller.schedule("replay"):
        step = rank.step(rank.foreign_routes)
    wrong = rank.followed(step).wrong + rank.followed(step, recompute=True).wrong
    return wrong + sum(witness.wrong for witness in native)


def shift_layers(rank: Rank) -> None:
    """Count routers without a look at what they belong to, as an MTP alias does."""
    for chunk in rank.controller._chunks:
        handles = [router.router_replay for router in replaying_routers(chunk.module)]
        for handle in handles:
            handle.layer = (handle.layer + 1) % len(handles)


def alias_mtp(rank: Rank) -> None:
    """Give the routers of multi-token prediction the routes of a decoder layer."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_r3.router import make_replaying

    for chunk, module in zip(rank.controller._chunks, rank.chunks, strict=True):
        for router in module.mtp.modules():
            if isinstance(router, TopKRouter):
                handle = make_replaying(router)
                handle.calls = SimpleNamespace(
                    resolve=lambda layer, calls=chunk.calls: (calls.frames[-1], True),
                    schedule_is_open=True,
                    release_spent=lambda: None,
                )


def feed_batch_major(rank: Rank) -> None:
    """Take the rows of a padded batch for sample after sample."""
    stock_feed = rank.controller.feed

    def feed(chunk: Any, routes: Any, *, host_lengths: Any, seq_length: int, **_: Any) -> None:
        plan = LayoutPlan.padded(host_lengths, seq_length)
        sample, position = (
            rows.reshape(seq_length, -1).T.ravel() for rows in (plan.sample, plan.position)
        )
        stock_feed(chunk, routes, plan=LayoutPlan(plan.lengths, sample, position))

    rank.controller.feed = feed


def one_queue_for_all_chunks(rank: Rank) -> None:
    """Recompute first in first out over all that this process was fed, of whichever chunk."""
    fed: list[int] = []
    stock_push = ChunkCalls.push

    def push(self: ChunkCalls, frame: Any) -> None:
        stock_push(self, frame)
        fed.append(frame.micro_batch)

    def of_recompute(self: ChunkCalls, layer: int) -> Any:
        taken = self.__dict__.setdefault("taken", [0] * len(self.layers))
        taken[layer] += 1
        return self.frames[fed[taken[layer] - 1]]

    ChunkCalls.push, ChunkCalls._of_recompute = push, of_recompute  # type: ignore[method-assign]


FAULTS = {
    "shift_layers": shift_layers,
    "alias_mtp": alias_mtp,
    "feed_batch_major": feed_batch_major,
    "one_queue_for_all_chunks": one_queue_for_all_chunks,
}


def replaying_routers(module: Any) -> list[Any]:
    from megatron_r3.router import ReplayTopKRouter

    return [m for m in module.modules() if isinstance(m, ReplayTopKRouter)]
