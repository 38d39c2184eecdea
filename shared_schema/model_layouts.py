"""Layouts read from the configs of Hugging Face models and of Megatron.

Each rule mirrors the condition by which the model itself builds an MoE block in a layer; the
sources are transformers' ``modeling_*.py`` and vLLM's ``model_executor/models``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout

_REQUIRED = object()
_MOST_LAYERS = 100_000


def layout_from_hf_config(config: Any) -> RoutingLayout:
    """See :meth:`RoutingLayout.from_hf_config`."""
    fields = _Fields(config)
    model_type = fields.get("model_type", default=None)
    if not isinstance(model_type, str) or model_type not in _RULES:
        text = fields.get("text_config", default=None)
        if text is not None:
            return layout_from_hf_config(text)
        raise RoutingSchemaError(
            f"model_type is {model_type!r}, expected one of {', '.join(sorted(_RULES))}: "
            "build the layout yourself with RoutingLayout(num_experts, top_k, moe_layers, "
            "num_hidden_layers)."
        )
    experts_keys, is_moe_layer = _RULES[model_type]
    num_experts = fields.get(*experts_keys, default=None)
    if not num_experts:
        raise RoutingSchemaError(
            f"the {model_type} config has {experts_keys[0]} {num_experts!r}, expected a number of "
            "experts: a dense model has no routing to record."
        )
    num_layers = fields.get("num_hidden_layers")
    if not isinstance(num_layers, int) or not 0 < num_layers <= _MOST_LAYERS:
        raise RoutingSchemaError(
            f"num_hidden_layers is {num_layers!r}, expected 1 … {_MOST_LAYERS}: check that it is "
            "the model's own config."
        )
    try:
        moe_layers = tuple(i for i in range(num_layers) if is_moe_layer(fields, i))
    except (TypeError, ZeroDivisionError) as error:
        raise RoutingSchemaError(
            f"the {model_type} config does not say which layers have experts ({error}), expected "
            "layer numbers and positive steps: check that it is the model's own config."
        ) from None
    return RoutingLayout(
        num_experts=num_experts,
        top_k=fields.get("num_experts_per_tok", "experts_per_token"),
        moe_layers=moe_layers,
        num_hidden_layers=num_layers,
    )


def layout_from_megatron_config(config: Any) -> RoutingLayout:
    """See :meth:`RoutingLayout.from_megatron_config`.

    ``moe_layer_freq`` as megatron-core reads it in ``get_gpt_decoder_layer_specs``: an integer N
    makes layers 0, N, 2N, … MoE layers; a list says 1 or 0 for each layer.
    """
    fields = _Fields(config)
    num_experts = fields.get("num_moe_experts", default=None)
    if not num_experts:
        raise RoutingSchemaError(
            f"num_moe_experts is {num_experts!r}, expected a number of experts: "
            "a dense model has no routing to replay."
        )
    num_layers = fields.get("num_layers")
    frequency = fields.get("moe_layer_freq", default=1)
    if isinstance(frequency, int) and frequency >= 1:
        pattern = [int(i % frequency == 0) for i in range(num_layers)]
    else:
        pattern = list(frequency) if isinstance(frequency, list | tuple) else []
    if len(pattern) != num_layers or set(pattern) - {0, 1}:
        raise RoutingSchemaError(
            f"moe_layer_freq is {frequency!r}, expected a positive integer or {num_layers} "
            "entries of 0 and 1: give one entry for each layer."
        )
    return RoutingLayout(
        num_experts=num_experts,
        top_k=fields.get("moe_router_topk"),
        moe_layers=tuple(i for i, moe in enumerate(pattern) if moe),
        num_hidden_layers=num_layers,
    )


class _Fields:
    """Reads a config object and a parsed ``config.json`` alike, naming what is missing."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        for name in names:
            if isinstance(self._config, Mapping):
                value = self._config.get(name)
            else:
                value = getattr(self._config, name, None)
            if value is not None:
                return value
        if default is _REQUIRED:
            raise RoutingSchemaError(
                f"the config has no {' or '.join(names)}, expected it for this architecture: "
                "check that it is the model's complete config."
            )
        return default


def _every_layer(_: _Fields, __: int) -> bool:
    return True


def _qwen(fields: _Fields, layer: int) -> bool:
    if layer in fields.get("mlp_only_layers", default=()):
        return False
    return bool((layer + 1) % fields.get("decoder_sparse_step", default=1) == 0)


def _deepseek(fields: _Fields, layer: int) -> bool:
    if layer < fields.get("first_k_dense_replace", default=0):
        return False
    return bool(layer % fields.get("moe_layer_freq", default=1) == 0)


def _glm(fields: _Fields, layer: int) -> bool:
    return bool(layer >= fields.get("first_k_dense_replace", default=0))


_QWEN_EXPERTS = ("num_experts", "num_local_experts")
_RULES: dict[str, tuple[tuple[str, ...], Callable[[_Fields, int], bool]]] = {
    "qwen2_moe": (_QWEN_EXPERTS, _qwen),
    "qwen3_moe": (_QWEN_EXPERTS, _qwen),
    "deepseek_v2": (("n_routed_experts",), _deepseek),
    "deepseek_v3": (("n_routed_experts",), _deepseek),
    "kimi_k2": (("n_routed_experts",), _deepseek),
    "mixtral": (("num_local_experts",), _every_layer),
    "olmoe": (("num_experts", "num_local_experts"), _every_layer),
    "gpt_oss": (("num_local_experts",), _every_layer),
    "glm4_moe": (("n_routed_experts",), _glm),
}
