"""Which layers of a model route tokens to experts, among how many, and how many they choose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_schema.errors import RoutingSchemaError

MAX_EXPERTS = 65_535
"""Ids are at most 16 bits wide, and the largest 16-bit value marks unrecorded rows."""


@dataclass(frozen=True)
class RoutingLayout:
    """Shape of one model's routing decisions.

    Attributes:
        num_experts: E, logical experts in each MoE layer; ids are 0 … E-1, before any EPLB mapping.
        top_k: k, experts chosen for each token in each MoE layer.
        moe_layers: global 0-based decoder layer (Hugging Face numbering) of each MoE layer,
            ascending. Its length is L, the layer axis of every array of this schema.
        num_hidden_layers: decoder layers of the model, dense ones included.

    Raises:
        RoutingSchemaError: a field contradicts another or lies outside its range.

    """

    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    num_hidden_layers: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "num_hidden_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise RoutingSchemaError(
                    f"{name} is {value!r}, expected a positive integer: "
                    "take it from the model's config."
                )
            object.__setattr__(self, name, int(value))
        try:
            object.__setattr__(self, "moe_layers", tuple(int(i) for i in self.moe_layers))
        except (TypeError, ValueError):
            raise RoutingSchemaError(
                f"moe_layers is {self.moe_layers!r}, expected the numbers of the MoE layers: "
                "pass for example (1, 2, 3)."
            ) from None
        if self.num_experts > MAX_EXPERTS:
            raise RoutingSchemaError(
                f"num_experts is {self.num_experts}, expected at most {MAX_EXPERTS}: "
                "ids are at most 16 bits wide."
            )
        if self.top_k > self.num_experts:
            raise RoutingSchemaError(
                f"top_k is {self.top_k} with num_experts {self.num_experts}, expected at most that "
                "many: check which of the two is which."
            )
        layers = self.moe_layers
        if not layers:
            raise RoutingSchemaError(
                "moe_layers is empty, expected at least one MoE layer: a dense model has no "
                "routing to record."
            )
        ascending = all(a < b for a, b in itertools.pairwise(layers))
        if not ascending or layers[0] < 0 or layers[-1] >= self.num_hidden_layers:
            raise RoutingSchemaError(
                f"moe_layers is {layers}, expected ascending, distinct 0-based layers below "
                f"num_hidden_layers {self.num_hidden_layers}: number layers as Hugging Face does."
            )

    @property
    def num_moe_layers(self) -> int:
        """L, the length of the layer axis."""
        return len(self.moe_layers)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned dtype that holds every id: uint8 for E ≤ 256, else uint16."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def fill_id(self) -> int:
        """What unrecorded rows hold in every slot: the dtype's largest value."""
        return int(np.iinfo(self.dtype).max)

    @property
    def row_nbytes(self) -> int:
        """Raw bytes of one token's ids."""
        return self.num_moe_layers * self.top_k * self.dtype.itemsize

    @classmethod
    def from_hf_config(cls, config: Any) -> RoutingLayout:
        """Read the layout from a Hugging Face config object or the dict of its ``config.json``.

        Knows Qwen2-MoE, Qwen3-MoE, DeepSeek-V2/V3 (and Kimi-K2, which uses that architecture),
        Mixtral, OLMoE, GPT-OSS and GLM-4.5-MoE; looks inside ``text_config`` of a multimodal model.

        Raises:
            RoutingSchemaError: an unknown architecture, a dense model or a missing field.

        """
        from shared_schema.model_layouts import layout_from_hf_config

        return layout_from_hf_config(config)

    @classmethod
    def from_megatron_config(cls, config: Any) -> RoutingLayout:
        """Read the layout from a Megatron ``TransformerConfig`` (``moe_layer_freq`` and its kin).

        Raises:
            RoutingSchemaError: a dense model or a malformed ``moe_layer_freq``.

        """
        from shared_schema.model_layouts import layout_from_megatron_config

        return layout_from_megatron_config(config)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "moe_layers": list(self.moe_layers),
            "num_hidden_layers": self.num_hidden_layers,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RoutingLayout:
        """Inverse of :meth:`to_dict`; unknown keys are ignored."""
        missing = [k for k in cls.__dataclass_fields__ if k not in fields]
        if missing:
            raise RoutingSchemaError(
                f"the layout lacks {', '.join(missing)}, expected all of "
                f"{', '.join(cls.__dataclass_fields__)}: write it with to_dict()."
            )
        return cls(**{k: fields[k] for k in cls.__dataclass_fields__})

    def require_same(self, other: RoutingLayout, what: str) -> None:
        """Raise unless ``other``, the layout of ``what``, is this one."""
        differing = [
            f"{name} {getattr(other, name)!r} instead of {getattr(self, name)!r}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]
        if differing:
            raise RoutingSchemaError(
                f"{what} has {'; '.join(differing)}, expected this model's layout: "
                "it comes from another model."
            )
