"""Tiny random MoE models whose layers keep KV in different ways."""

from pathlib import Path
from typing import Any

from .tiny_models import COMMON, NUM_EXPERTS, TOP_K, widen_gates

SLIDING_WINDOW = 48


def make_sliding(path: Path, layer_types: list[str]) -> Path:
    """Write a float32 EXAONE-MoE whose first layer is dense; `layer_types` as in transformers."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    config = ExaoneMoeConfig(
        **COMMON,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        layer_types=layer_types,
        sliding_window=SLIDING_WINDOW,
        sliding_window_pattern=None,
        n_group=1,
        topk_group=1,
    )
    return _write(ExaoneMoeForCausalLM, config, path)


def make_linear_attention(path: Path) -> Path:
    """Write a Qwen3-Next: three layers of linear attention, one of full attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **COMMON,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[0],
        layer_types=[*["linear_attention"] * 3, "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        # The sizes that vLLM's CPU kernel knows.
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )
    return _write(Qwen3NextForCausalLM, config, path)


def _write(model_class: Any, config: Any, path: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model = model_class(config).float()
    widen_gates(model)
    model.save_pretrained(path)
    return path
