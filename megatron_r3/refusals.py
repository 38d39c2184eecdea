"""Routers that cannot be replayed as they are configured, each with the way to go on anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class Refusal:
    """A reason not to attach to a router.

    Attributes:
        name: what ``attach(accept={name})`` takes.
        applies: whether a router has it.
        why: completes "the router …".
        accepted: what accepting it means, completes "… and replay".
        leaves_native: whether an accepted router keeps choosing by itself.

    """

    name: str
    applies: Callable[[Any], bool]
    why: str
    accepted: str
    leaves_native: bool = False


def _has(name: str) -> Callable[[Any], bool]:
    """Config fields come and go with megatron-core's releases; an absent one is off."""
    return lambda router: bool(getattr(router.config, name, None))


def _captures_router(router: Any) -> bool:
    config = router.config
    if getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False):
        return True
    return getattr(config, "cuda_graph_impl", "none") not in (None, "none")


def _drops_tokens(router: Any) -> bool:
    factors = ("moe_expert_capacity_factor", "moe_expert_rank_capacity_factor")
    return any(getattr(router.config, name, None) is not None for name in factors)


REFUSALS = (
    Refusal(
        "fused_router",
        _has("moe_router_fusion"),
        "chooses in a fused kernel that asks for no target (moe_router_fusion)",
        "unfuse this router alone, while attached",
    ),
    Refusal(
        "sinkhorn",
        lambda router: router.routing_type == "sinkhorn",
        "balances with sinkhorn, which asks for no target",
        "leave it native",
        leaves_native=True,
    ),
    Refusal(
        "quantile_balancing",
        lambda router: router.routing_type == "quantile_balancing",
        "balances by quantiles, which asks for no target",
        "leave it native",
        leaves_native=True,
    ),
    Refusal(
        "hash_layer",
        lambda router: bool(getattr(router, "is_hash_layer", False)),
        "takes its experts from a table of token ids, which asks for no target",
        "leave it native",
        leaves_native=True,
    ),
    Refusal(
        "capacity_factor",
        _drops_tokens,
        "drops tokens beyond a capacity factor, replayed ones too",
        "drop them",
    ),
    Refusal(
        "forced_load_balancing",
        _has("moe_router_force_load_balancing"),
        "replaces its logits by random ones (moe_router_force_load_balancing)",
        "replay on those",
    ),
    Refusal(
        "forced_bias",
        lambda router: getattr(router.config, "moe_router_force_biased", None) is not None,
        "adds a random bias to its logits (moe_router_force_biased)",
        "replay on those",
    ),
    Refusal(
        "input_jitter",
        lambda router: router.config.moe_input_jitter_eps is not None,
        "adds noise to its input (moe_input_jitter_eps), which the rollout does not have",
        "keep the noise",
    ),
    Refusal(
        "cuda_graph",
        _captures_router,
        "may run inside a captured CUDA graph, where targets would be frozen",
        "go on, if your graphs leave the router out; graph_rows= replays inside",
    ),
    Refusal(
        "expert_parallel_overlap",
        _has("overlap_moe_expert_parallel_comm"),
        "runs after forward_step returned (overlap_moe_expert_parallel_comm), so that feed() "
        "cannot say whose routes it needs",
        "go on, if your schedule feeds right before each forward",
    ),
)


def refusals_of(router: TopKRouter) -> list[Refusal]:
    """The reasons that hold for ``router``."""
    return [refusal for refusal in REFUSALS if refusal.applies(router)]
