"""What differs between releases of vLLM, and is the same for the rest of this package.

Every function asks for what it finds, not for a number, so that a release that nobody has seen is
served as the one that it resembles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

CaptureFn = Callable[[Any], None]


def asks_for_routing(engine_args: Any) -> bool:
    """Whether ``EngineArgs`` carry the flag; from 0.31 on it is a field of another option too."""
    aux = getattr(engine_args, "aux_output_config", None)
    return bool(
        engine_args.enable_return_routed_experts
        or (aux is not None and aux.enable_return_routed_experts)
    )


@contextmanager
def native_flags_cleared(engine_args: Any) -> Iterator[None]:
    """Hide the flag from vLLM for a while, and with it vLLM's own implementation."""
    fields = {"enable_return_routed_experts": False}
    aux = getattr(engine_args, "aux_output_config", None)
    if aux is not None:
        fields["aux_output_config"] = replace(aux, enable_return_routed_experts=False)
    before = {name: getattr(engine_args, name) for name in fields}
    _set(engine_args, fields)
    try:
        yield
    finally:
        _set(engine_args, before)


def _set(target: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(target, name, value)


def native_max_bytes(engine_args: Any) -> int | None:
    """VLLM's own limit of host memory for routing, in bytes; there is none before 0.31."""
    max_bytes: int | None = getattr(
        getattr(engine_args, "aux_output_config", None), "max_bytes", None
    )
    return max_bytes


def experts_per_token(model_config: Any) -> int:
    """The model's top-k; before 0.28 only its Hugging Face configuration says it."""
    if hasattr(model_config, "get_num_experts_per_tok"):
        return int(model_config.get_num_experts_per_tok())
    config = model_config.hf_text_config
    return int(getattr(config, "num_experts_per_tok", 0) or getattr(config, "top_k_experts", 0))


def verifies_adaptively(speculative_config: Any) -> bool:
    """Whether the number of verified draft tokens varies, which vLLM knows from 0.28 on."""
    return bool(getattr(speculative_config, "enable_adaptive_verification", False))


def discards_output(request: Any) -> bool:
    """Whether vLLM will throw away what a step in flight produces for this request."""
    if hasattr(request, "async_tokens_to_discard"):  # 0.26
        return bool(request.async_tokens_to_discard)
    return bool(request.drop_stale_output and request.num_stale_output_tokens)


def is_capture_source(module: Any) -> bool:
    """Whether a module routes without a router object, as there are from 0.28 on."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    protocol = getattr(routed_experts_capturer, "RoutedExpertsCaptureSource", None)
    return protocol is not None and isinstance(module, protocol)


def reports_its_choice(experts: Any) -> bool:
    """Whether a kernel that routes by itself says what it chose; none does before 0.27."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

    return (
        isinstance(experts, FusedMoEExpertsMonolithic)
        and hasattr(experts, "supports_routing_replay_capture")
        and bool(experts.supports_routing_replay_capture())
    )


def listen_to_kernel(
    module: Any, experts: Any, chained: Callable[[CaptureFn | None], CaptureFn]
) -> None:
    """Let a kernel that routes by itself report to us.

    Args:
        module: the ``MoERunner``, which holds the callback from 0.32 on.
        experts: its kernel, which holds it before.
        chained: makes the callback, given the one that was there before.

    """
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    sink_class = getattr(routed_experts_capturer, "RoutedExpertsSink", None)
    if sink_class is None:
        experts.set_capture_fn(chained(experts.routing_replay_capture_fn))
        return
    sink = module.routed_experts.routing_sink
    before = sink.capture_fn if sink is not None else None
    module.routed_experts.routing_sink = sink_class(experts.moe_config, chained(before))


def answers_of_generate() -> list[Any]:
    """Pydantic models of what vLLM's own generate answers: choices, then what holds them."""
    from vllm.entrypoints.scale_out.token_in_token_out import protocol

    if hasattr(protocol, "GenerateTokensChoice"):
        names = ["TokensChoice", "TextChoice", "TokensResponse", "TextResponse"]
    else:  # up to 0.31
        names = ["ResponseChoice", "Response"]
    return [getattr(protocol, f"Generate{name}") for name in names]
