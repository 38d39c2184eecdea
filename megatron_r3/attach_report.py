"""What ``attach`` found and did, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from shared_schema import RoutingLayout


@dataclass(frozen=True)
class AttachedRouter:
    """One router of the model.

    Attributes:
        name: module path in its chunk.
        chunk: index of the model chunk.
        layer: layer number as Megatron counts, from 1 over all pipeline stages.
        index: position on the L axis of routes; ``None`` for multi-token prediction.
        accepted: refusals that the caller accepted for it.

    """

    name: str
    chunk: int
    layer: int
    index: int | None
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttachReport:
    """The routers of this rank.

    Attributes:
        layout: of the routes that ``feed`` takes and ``recorded`` returns.
        replayed: routers that replay.
        native: routers that go on choosing by themselves: of multi-token prediction, or accepted.

    """

    layout: RoutingLayout
    replayed: tuple[AttachedRouter, ...]
    native: tuple[AttachedRouter, ...]

    def __str__(self) -> str:
        lines = [
            f"routing replay on {len(self.replayed)} of {self.layout.num_moe_layers} MoE layers "
            f"(E={self.layout.num_experts}, k={self.layout.top_k})"
        ]
        for router in self.replayed:
            accepted = f"; accepted: {', '.join(router.accepted)}" if router.accepted else ""
            lines.append(f"  [{router.index}] chunk {router.chunk}: {router.name}{accepted}")
        lines += [f"  native: chunk {r.chunk}: {r.name}" for r in self.native]
        return "\n".join(lines)
