"""What a framework that drives megatron-core's ``RouterReplay`` by hand does wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_r3.attachment import is_mtp
from megatron_r3.layout_plan import FIRST_IDENTITY, LayoutPlan
from megatron_r3.replay_handle import ReplayHandle

Kind = Literal[
    "orphaned_routers", "unlisted_routers", "mtp_targets", "targets_of_idle_chunks", "row_order"
]


@dataclass(frozen=True)
class Finding:
    """One thing that makes replay by hand wrong.

    Attributes:
        kind: its name.
        text: a sentence: what was seen, what was expected, how to mend it.

    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def check(
    model_chunks: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    identity: Int[np.ndarray | torch.Tensor, " T"] | None = None,
    plan: LayoutPlan | None = None,
) -> list[Finding]:
    """Look for what frameworks get wrong; call it behind a step, before anything is cleared.

    Args:
        model_chunks: all chunks of all models of this process, wrapped or not.
        identity: what the framework's own way of preparing targets made of
            :func:`~megatron_r3.layout_plan.token_identities` in place of expert ids, one for each
            row of a target.
        plan: what each row of the routers is; needed with ``identity``.

    Returns:
        What is wrong, nothing where all is well.

    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    routers = [list(_routers(chunk)) for chunk in chunks]
    findings = [*_registry(routers), *_mtp_targets(routers), *_idle_chunks(routers)]
    if identity is not None and plan is not None:
        findings += _row_order(np.asarray(identity), plan)
    return findings


def _routers(chunk: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in chunk.named_modules():
        if isinstance(module, Router) and getattr(module, "router_replay", None) is not None:
            yield name, module


def _registry(routers: Sequence[Sequence[tuple[str, Any]]]) -> Iterator[Finding]:
    listed = RouterReplay.global_router_replay_instances
    owned = [(name, router.router_replay) for chunk in routers for name, router in chunk]
    orphans = [n for n, entry in enumerate(listed) if all(entry is not own for _, own in owned)]
    if orphans:
        yield Finding(
            "orphaned_routers",
            f"entries {orphans} of {len(listed)} in RouterReplay's global list belong to no router "
            "of these models, expected one for each router: they take the targets of routers "
            "behind them; call clear_global_router_replay_instances() before a model is rebuilt.",
        )
    flagged = [
        (name, router.router_replay)
        for chunk in routers
        for name, router in chunk
        if router.config.moe_enable_routing_replay
    ]
    missing = [name for name, own in flagged if all(entry is not own for entry in listed)]
    if missing:
        yield Finding(
            "unlisted_routers",
            f"the routers {missing} are not in RouterReplay's global list of {len(listed)}, "
            "expected every router: set_replay_data passes them by; clear the list before the "
            "first model is built, not behind it.",
        )


def _mtp_targets(routers: Sequence[Sequence[tuple[str, Any]]]) -> Iterator[Finding]:
    given: dict[bool, list[tuple[str, torch.Tensor]]] = {True: [], False: []}
    for name, router in (named for chunk in routers for named in chunk):
        target = router.router_replay.target_topk_idx
        if target is not None:
            given[is_mtp(name, router)].append((name, target))
    for name, target in given[True]:
        same = [other for other, theirs in given[False] if _equal(target, theirs)]
        of = f", that of {same[0]}" if same else ""
        yield Finding(
            "mtp_targets",
            f"{name}, a router of multi-token prediction, was given a target{of}, expected none: "
            "rollouts do not run it, and layer numbers that start again at 1 take decoder routes; "
            "walk .decoder only.",
        )


def _idle_chunks(routers: Sequence[Sequence[tuple[str, Any]]]) -> Iterator[Finding]:
    for number, chunk in enumerate(routers):
        for name, router in chunk:
            handle = router.router_replay
            if isinstance(handle, ReplayHandle) and handle.targets_set > handle.targets_used:
                yield Finding(
                    "targets_of_idle_chunks",
                    f"{name} of chunk {number} was given {handle.targets_set} targets for "
                    f"{handle.targets_used} forwards, expected one for each: what no forward used "
                    "stays queued, so that recomputes pop the targets of other micro-batches; "
                    "set_replay_data reaches every chunk, set those of the one that runs next.",
                )
                break


def _row_order(identity: np.ndarray[Any, Any], plan: LayoutPlan) -> Iterator[Finding]:
    held = np.maximum(identity.astype(np.int64) - FIRST_IDENTITY, -1)
    expected = np.maximum(plan.token_index(), -1)
    if held.shape != expected.shape:
        yield Finding(
            "row_order",
            f"targets have rows of shape {list(held.shape)}, expected {list(expected.shape)}: "
            "tokens beyond the targets get no expert; prepare as many rows as the router sees.",
        )
        return
    wrong = np.flatnonzero(held != expected)
    if not len(wrong):
        return
    batch = len(plan.lengths)
    batch_major = not len(expected) % batch and np.array_equal(
        held.reshape(batch, -1).T.reshape(-1), expected
    )
    row = int(wrong[0])
    yield Finding(
        "row_order",
        f"row {row} of the targets holds {_cell(int(held[row]), plan)}, expected "
        f"{_cell(int(expected[row]), plan)} ({len(wrong)} of {len(expected)} rows are wrong): "
        + (
            "rows are batch-major and the router's run sequence first; transpose [B, S] to [S, B] "
            "before flattening."
            if batch_major
            else "cut and pad targets as the tokens are."
        ),
    )


def _cell(token: int, plan: LayoutPlan) -> str:
    if token < 0:
        return "padding"
    sample = int(np.searchsorted(np.cumsum(plan.lengths), token, side="right"))
    return f"sample {sample}, position {token - int(plan.lengths[:sample].sum())}"


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (first.shape == second.shape and bool(torch.equal(first, second)))
